"""The nets of the four problems: an MLP and a small conv net, of equal parameters at any number of members.

    MLP     784, n, n, 10                                                          n = 100
    conv    conv 5x5 m, pool 2, conv 5x5 m, pool 2, flatten, n, n, outputs         m = 16, VALID

The activation comes before the pool, so a link doubles what is pooled; members are outermost where it is flattened. A
net whose link has d members keeps a share 1 - f of m and n: f is the largest one, in hundredths, that leaves at least
the plain net's parameters (the authors' rule: 0.09 for MNIST, 0.27 and 0.31 for CIFAR-10 and CIFAR-100 of CReLU).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from experiments.engine.flatten import flatten
from experiments.plasticity.kumar.problems import Problem
from experiments.plasticity.kumar.starts import Start
from linked_jax.linking import Link

HIDDEN, CHANNELS, WINDOW, SIDE = 100, 16, 5, 32
_PIXELS = 25  # after both pools

Activation = Link | Any
"""A link, or one that draws: (z, key) -> h, with an arity and a link."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a net: `sizes` are the units of its hidden layers, in order."""

    conv: bool
    channels: int
    hidden: int
    inputs: int
    outputs: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """The units of the hidden layers."""
        return (self.channels,) * 2 * self.conv + (self.hidden,) * 2

    def kernels(self, arity: int) -> list[tuple[int, ...]]:
        """The shapes of all kernels, in order."""
        m, n, d = self.channels, self.hidden, arity
        convs = [(WINDOW, WINDOW, self.inputs, m), (WINDOW, WINDOW, d * m, m)] * self.conv
        return [*convs, (d * _PIXELS * m if self.conv else self.inputs, n), (d * n, n), (d * n, self.outputs)]

    def parameters(self, arity: int) -> int:
        """How many there are, without those of norms."""
        return sum(math.prod(shape) + shape[-1] for shape in self.kernels(arity))


def shape_for(problem: Problem, arity: int) -> Shape:
    """The net of a problem whose link has that many members.

    >>> from experiments.plasticity.kumar.net import shape_for
    >>> from experiments.plasticity.kumar.problems import PROBLEMS
    >>> [shape_for(PROBLEMS["cifar_5plus1"], arity).sizes for arity in (1, 2)]
    [(16, 16, 100, 100), (11, 11, 69, 69)]
    """
    inputs = len(problem.mean) if problem.is_conv else 784

    def without(hundredths: int) -> Shape:
        kept = 100 - hundredths
        return Shape(problem.is_conv, CHANNELS * kept // 100, HIDDEN * kept // 100, inputs, problem.classes)

    wanted = without(0).parameters(1)
    return next(shape for f in range(99, -1, -1) if (shape := without(f)).parameters(arity) >= wanted)


def by_patches(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c c_out"], *_: Any, **__: Any
) -> Float[Array, "n h2 w2 c_out"]:
    """x * K, VALID, at stride 1, as a product of patches: in a loop on a CPU, where XLA's convolution is slow.

    An update of the linked net of 5+1, batch 32, on two busy cores: 11 to 15 ms in a scan; XLA's convolution takes 15
    in a jitted step of its own.
    """
    size, (height, width) = len(kernel), x.shape[1:3]
    rows = [x[:, :, j : j + width - size + 1] for j in range(size)]
    rows = jnp.stack(rows, axis=-2).reshape(*rows[0].shape[:3], -1)
    patches = jnp.concatenate([rows[:, i : i + height - size + 1] for i in range(size)], axis=-1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


def max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """The largest of each 2x2 pixels."""
    rows = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


class Seen(nnx.Variable):
    """What a net has seen since it was last asked: the sum of the accuracies of its batches; mean |h| of its units."""


class Net(nnx.Module):
    """(N, *shape) -> (N, outputs), with the same activation in all hidden layers.

    With `norm`, layer norm over all of an example's pre-activations stands before each activation. With `tracked`, mean
    |h| of each unit in the last batch is kept, which some methods ask for. The key draws the start.
    """

    def __init__(self, shape: Shape, act: Activation, start: Start, *, norm: bool, tracked: bool, key: Array):
        rngs = nnx.Rngs(0)  # of no consequence: each kernel and bias is drawn below
        self.act, self.arity = act, act.arity
        layers: list[nnx.Conv | nnx.Linear] = []
        for place, size in enumerate(shape.kernels(act.arity)):
            kernel_init, bias_init = start(act.link, place == 0)
            of_kernel, of_bias = jax.random.split(jax.random.fold_in(key, place))
            bias_init = functools.partial(bias_init, fan_in=math.prod(size[:-1]))
            drawn: Any = {"kernel_init": _drawn(kernel_init, of_kernel), "bias_init": _drawn(bias_init, of_bias)}
            *window, c_in, c_out = size
            if window:
                drawn |= {"padding": "VALID", "conv_general_dilated": by_patches}
                layers.append(nnx.Conv(c_in, c_out, tuple(window), rngs=rngs, **drawn))
            else:
                layers.append(nnx.Linear(c_in, c_out, rngs=rngs, **drawn))
        self.layers = nnx.List(layers)
        features = [math.prod(space) * units for space, units in zip(_spaces(shape), shape.sizes, strict=True)]
        self.norms = nnx.List([nnx.LayerNorm(size, epsilon=1e-5, rngs=rngs) for size in features] if norm else [])
        self.magnitudes = nnx.List([Seen(jnp.zeros(units)) for units in shape.sizes] if tracked else [])
        self.right = Seen(jnp.zeros(()))

    def __call__(self, x: Float[Array, "n ..."], key: Array) -> Float[Array, "n outputs"]:
        """The logits; the key is for activations that draw."""
        return self.hidden_and_logits(x, key)[1]

    def hidden_and_logits(
        self, x: Float[Array, "n ..."], key: Array
    ) -> tuple[list[Float[Array, "n ..."]], Float[Array, "n outputs"]]:
        """What each hidden layer gives, before pools, and the logits."""
        hidden = []
        for place, layer in enumerate(self.layers[:-1]):
            z = layer(x)
            if self.norms:
                z = self.norms[place](z.reshape(len(z), -1)).reshape(z.shape)
            h = self.act(z) if isinstance(self.act, Link) else self.act(z, jax.random.fold_in(key, place))
            hidden.append(h)
            if self.magnitudes:
                self.magnitudes[place][...] = jax.lax.stop_gradient(magnitudes(h, self.arity))
            x = max_pool(h) if h.ndim == 4 else h
            if h.ndim == 4 and isinstance(self.layers[place + 1], nnx.Linear):
                x = flatten(x, self.arity)
        return hidden, self.layers[-1](x)


def _drawn(init: Callable[..., Array], key: Array) -> Callable[..., Array]:
    """The initialiser that draws with this key, whatever Flax gives it."""
    return lambda _, shape, dtype: init(key, shape, dtype)


def magnitudes(h: Float[Array, "*n c_linked"], arity: int) -> Float[Array, " c"]:
    """The mean of |h| of each unit, over examples, positions and members."""
    return jnp.abs(h).reshape(-1, arity, h.shape[-1] // arity).mean(axis=(0, 1))


def _spaces(shape: Shape) -> Sequence[tuple[int, ...]]:
    """The pixels of the pre-activations of each hidden layer."""
    first = SIDE - WINDOW + 1
    second = first // 2 - WINDOW + 1
    return [(first, first), (second, second)] * shape.conv + [(), ()]


@dataclasses.dataclass(frozen=True)
class Online:
    """The mean cross-entropy of a batch; the net's state counts how many it had right before it learnt them."""

    graph: Any
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __call__(self, parameters: Any, state: Any, data: Any, batch: Array, key: Array) -> tuple[Array, Any]:
        """See `loop.Loss`; data: a `Task`."""
        net = nnx.merge(self.graph, parameters, state, copy=True)
        labels = data.labels[batch]
        logits = net(self.inputs(data.images[batch]), key)
        net.right[...] += (logits.argmax(axis=-1) == labels).mean()
        log_p = jax.nn.log_softmax(logits)
        loss = -jnp.take_along_axis(log_p, labels[:, None], axis=-1).mean()
        return loss, nnx.split(net, nnx.Param, ...)[2]

    def inputs(self, pixels: Array) -> Array:
        """Standardised, as the authors do."""
        mean, deviation = jnp.array(self.mean), jnp.array(self.deviation)
        return (pixels.astype(jnp.float32) / 255 - mean) / deviation
