"""A training step of the paper's nets, here and in PyTorch: the same weights and images, Adam, one after the other.

    python -m benchmarks.pytorch --net depth --act lk_relu --batch-size 128
    python -m benchmarks.pytorch --net resnet50 --compiled --dtype bfloat16
    pip install "torch>=2.13"   # first; it is no dependency of ours

PyTorch's nets are written out below, channels last, from our kernels. Before anything is timed both give the same
logits. Times are medians of rounds in which the two take turns; the ratio is PyTorch's time over ours, so above 1 we
are faster. Where JAX has a GPU both run there, with products in TF32, which is JAX' default; take --compiled, and set
XLA_PYTHON_CLIENT_PREALLOCATE=false, which leaves PyTorch its memory.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters, images and activations, on both sides; the loss is in float32."""
    compiled: bool = False
    """PyTorch's loss and its gradient go through torch.compile, its optimiser does not; our whole step is compiled."""


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


class InDtype(nnx.Module):
    """A net whose parameters and activations have a dtype. Its logits are float32."""

    def __init__(self, net: nnx.Module, dtype: Any):
        self.net, self.dtype = net, dtype
        parameters = nnx.state(net, nnx.Param)
        nnx.update(net, jax.tree.map(lambda p: p.astype(dtype), parameters))

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Images -> logits."""
        net: Any = self.net
        return net(images.astype(self.dtype), train=train).astype(jnp.float32)


class Theirs:
    """The same in PyTorch."""

    def __init__(self, net: nn.Module, images: np.ndarray, labels: np.ndarray, settings: Settings):
        where = {"device": _device(), "dtype": getattr(torch, settings.dtype)}
        self.net = net.train().to(**where)
        self.optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        self.images, self.labels = _as_input(images).to(**where), torch.tensor(labels).long().to(_device())
        self.loss = torch.compile(self._loss) if settings.compiled else self._loss

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.net(images).float(), labels)

    def step(self) -> None:
        """One step, until it is done."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.images, self.labels).backward()
        self.optimizer.step()
        if _device() == "cuda":
            torch.cuda.synchronize()


def _device() -> str:
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


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
    if _device() == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"JAX runs on {jax.default_backend()}, this PyTorch has no GPU; install another, or set JAX_PLATFORMS=cpu"
        )
    if _device() == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    table, theirs = _TABLES[settings.net]
    data = noise(32, 3, settings.batch_size)
    images, labels = np.asarray(data.train_images), np.asarray(data.train_labels)
    cell = {"act": settings.act, "init": "auto", "depth": 50, "schedule": "fixed", "link": "inside"}
    model = table.build(table.Settings(), cell, data, 0)
    net = theirs(model, linked_relu if settings.act == "lk_relu" else torch.relu)
    check_same(model, net, images[:4])
    ours = Step([InDtype(model, settings.dtype)], data, settings.batch_size)
    steps = {"ours": ours.take, "PyTorch": Theirs(net, images, labels, settings).step}
    medians = turns.medians(steps, settings.rounds, console, "steps")
    rows = [
        {"net": f"{settings.net}, {settings.act}, {settings.dtype}", "batch": str(settings.batch_size), "by": name,
         "step": f"{1e3 * median:.3g} ms", "PyTorch / ours": f"{medians['PyTorch'] / median:.2f}"}
        for name, median in medians.items()
    ]  # fmt: skip
    where = f"{torch.get_num_threads()} threads" if _device() == "cpu" else torch.cuda.get_device_name()
    console.table(f"A training step on {where}, PyTorch {torch.__version__}:", rows)
    turns.save(settings, "pytorch", {**medians, "torch": torch.__version__, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    run_command(main)
