"""A training step of the paper's nets, here and in PyTorch: the same weights and images, Adam, one after the other.

    python -m benchmarks.pytorch --net depth --act lk_relu --batch-size 128
    pip install "torch>=2.13"   # first; it is no dependency of ours

PyTorch's nets are written out below, channels last, from our kernels. Before anything is timed both give the same
logits. Times are medians of rounds in which the two take turns; the ratio is PyTorch's time over ours, so above 1 we
are faster.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import turns
from benchmarks.steps import Step, noise
from experiments import allcnn, depth, resnet50
from experiments.engine.console import Console
from experiments.engine.errors import UsageError, run_command

try:
    import torch
    from torch import nn
    from torch.nn import functional
except ImportError:
    print('error: PyTorch is not installed; run pip install "torch>=2.13"', file=sys.stderr)
    sys.exit(2)


@dataclasses.dataclass(frozen=True)
class Settings(turns.Settings):
    """Time of a training step of one of the paper's nets, beside PyTorch's."""

    net: Literal["depth", "allcnn", "resnet50"] = "depth"
    """Which table's net."""
    act: Literal["relu", "lk_relu"] = "lk_relu"
    """Plain or linked."""
    batch_size: int = 128
    """Images of 32 x 32 x 3."""


# --- the nets in PyTorch --------------------------------------------------------------------------------------------


def linked_relu(z: torch.Tensor) -> torch.Tensor:
    """The mirror link of relu, along the channels."""
    return torch.cat([torch.relu(z), torch.relu(-z)], 1)


class Conv(nn.Module):
    """Flax' convolution with SAME padding, of images (N, C, H, W) that lie channels last."""

    def __init__(self, layer: Any, index: int | None = None):
        super().__init__()
        kernel, bias = (np.asarray(p[...] if index is None else p[...][index]) for p in (layer.kernel, layer.bias))
        self.kernel = nn.Parameter(torch.tensor(kernel.transpose(3, 2, 0, 1)).contiguous(memory_format=_LAST))
        self.bias = nn.Parameter(torch.tensor(bias))
        strides = layer.strides
        self.stride = strides if isinstance(strides, int) else strides[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        window = self.kernel.shape[-1]
        total = max((-(-x.shape[-1] // self.stride) - 1) * self.stride + window - x.shape[-1], 0)
        if total % 2:
            x = functional.pad(x, (total // 2, total - total // 2) * 2)
        return functional.conv2d(x, self.kernel, self.bias, self.stride, 0 if total % 2 else total // 2)


class Dense(nn.Module):
    """Flax' dense layer after a flatten; the link is along the features."""

    def __init__(self, layer: Any):
        super().__init__()
        self.kernel = nn.Parameter(torch.tensor(np.asarray(layer.kernel[...])))
        self.bias = nn.Parameter(torch.tensor(np.asarray(layer.bias[...])))

    def forward(self, z: torch.Tensor, act: Callable[..., Any]) -> torch.Tensor:
        """(N, C, H, W) -> (N, classes)."""
        return act(z.permute(0, 2, 3, 1).flatten(1)) @ self.kernel + self.bias


class Depth(nn.Module):
    """Table 2."""

    def __init__(self, net: Any, act: Callable[..., Any]):
        super().__init__()
        self.act, self.read_out = act, Dense(net.read_out.linear)
        self.convs = nn.ModuleList([Conv(net.first), *(Conv(net.blocks.conv.conv, k) for k in range(net.depth - 1))])
        self.stem = Conv(net.stem)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images -> logits."""
        first, *others = self.convs
        z = first(self.stem(x))
        for conv in others:
            z = conv(self.act(z))
        return self.read_out(z, self.act)


class AllCNN(nn.Module):
    """Table 4."""

    def __init__(self, net: Any, act: Callable[..., Any]):
        super().__init__()
        self.act, self.convs = act, nn.ModuleList([Conv(layer.conv) for layer in net.layers])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images -> logits."""
        for number, conv in enumerate(self.convs):
            x = conv(x if number in (0, 3, 6) else self.act(x))  # no activation before the first, nor after a stride
            if number in (2, 5):
                x = functional.dropout(x, training=self.training)
        return x.mean((2, 3))


class ResNet50(nn.Module):
    """Tables 5 and 6, links inside the bottlenecks."""

    def __init__(self, net: Any, act: Callable[..., Any]):
        super().__init__()
        self.act, self.stem, self.read_out = act, Conv(net.stem), Dense(net.read_out.linear)
        self.blocks = nn.ModuleList()
        for block in net.blocks:
            layers = {name: getattr(block, name) for name in ("reduce", "spatial", "expand", "shortcut")}
            self.blocks.append(
                nn.ModuleDict({name: Conv(layer.conv) for name, layer in layers.items() if layer is not None})
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images -> logits."""
        z = self.stem(x)
        for block in self.blocks:
            h = torch.relu(z)
            z = block["shortcut"](h) if "shortcut" in block else h
            z = z + block["expand"](self.act(block["spatial"](self.act(block["reduce"](h)))))
        return self.read_out(z, torch.relu)


_LAST = torch.channels_last
_TABLES = {"depth": (depth, Depth), "allcnn": (allcnn, AllCNN), "resnet50": (resnet50, ResNet50)}

# --- a step of each -------------------------------------------------------------------------------------------------


class Theirs:
    """The same in PyTorch."""

    def __init__(self, net: nn.Module, images: np.ndarray, labels: np.ndarray):
        self.net = net.train()
        self.optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        self.images, self.labels = _as_input(images), torch.tensor(labels).long()

    def step(self) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(self.net(self.images), self.labels).backward()
        self.optimizer.step()


def _as_input(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(images.transpose(0, 3, 1, 2) / np.float32(255)).contiguous(memory_format=_LAST)


def check_same(model: Any, net: nn.Module, images: np.ndarray) -> None:
    """Refuse to compare nets that compute different logits."""
    ours = np.asarray(model(jnp.asarray(images, jnp.float32) / 255, train=False))
    with torch.no_grad():
        theirs = net.eval()(_as_input(images)).numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-3 * np.abs(ours).max())


def main() -> None:
    """Measure, print the ratio, and write the record."""
    settings, console = turns.parse(Settings, "pytorch"), Console()
    if jax.default_backend() != "cpu":
        raise UsageError("this benchmark compares on a CPU; run it with JAX_PLATFORMS=cpu")
    table, theirs = _TABLES[settings.net]
    data = noise(32, 3, settings.batch_size)
    images, labels = np.asarray(data.train_images), np.asarray(data.train_labels)
    cell = {"act": settings.act, "init": "auto", "depth": 50, "schedule": "fixed", "link": "inside"}
    model = table.build(table.Settings(), cell, data, 0)
    net = theirs(model, linked_relu if settings.act == "lk_relu" else torch.relu)
    check_same(model, net, images[:4])
    steps = {"ours": Step([model], data, settings.batch_size).take, "PyTorch": Theirs(net, images, labels).step}
    medians = turns.medians(steps, settings.rounds, console, "steps")
    rows = [
        {"net": f"{settings.net}, {settings.act}", "batch": str(settings.batch_size), "by": name,
         "step": f"{1e3 * median:.0f} ms", "PyTorch / ours": f"{medians['PyTorch'] / median:.2f}"}
        for name, median in medians.items()
    ]  # fmt: skip
    console.table(f"A training step on {torch.get_num_threads()} threads, PyTorch {torch.__version__}:", rows)
    turns.save(settings, "pytorch", {**medians, "torch": torch.__version__, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    run_command(main)
