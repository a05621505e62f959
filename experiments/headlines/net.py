"""The small convolutional net from which most claims are tested."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments.engine.rows import normalised
from linked_jax import relu

WIDTHS = (16, 16, 32, 32)
batch_norm = functools.partial(nnx.BatchNorm, momentum=0.9)  # the runs are short: 0.99 would lag behind


class ConvNet(nnx.Module):
    """[conv 3x3 -> norm? -> activation -> layer?] for each width; the mean over space; a dense layer.

    Convolutions at the `strided` positions have stride 2. `conv` is made with the arguments of `nnx.Conv`; `norm`,
    before the activation, and `after`, behind it, with features and rngs=.
    """

    def __init__(
        self,
        widths: Sequence[int] = WIDTHS,
        *,
        strided: Sequence[int] = (2,),
        conv: Callable[..., Any] = nnx.Conv,
        norm: Callable[..., Any] | None = None,
        after: Callable[..., Any] | None = None,
        activation: Callable[[Any], Any] = relu,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.convs, self.norms, self.afters = nnx.List([]), nnx.List([]), nnx.List([])
        for number, (features, width) in enumerate(itertools.pairwise((1, *widths))):
            self.convs.append(conv(features, width, (3, 3), strides=1 + (number in strided), rngs=rngs))
            self.norms.append(norm and norm(width, rngs=rngs))
            self.afters.append(after and after(width, rngs=rngs))
        self.dense = nnx.Linear(widths[-1], 10, rngs=rngs)

    def __call__(self, images: Float[Array, "n h w 1"], train: bool = False) -> Float[Array, "n 10"]:
        """The logits."""
        y = images
        for conv, norm, after in zip(self.convs, self.norms, self.afters, strict=True):
            y = normalised(self.activation(normalised(conv(y), norm, train)), after, train)
        return self.dense(y.mean((1, 2)))


@jax.jit
def accuracy(model: ConvNet, images: Float[Array, "n h w 1"], labels: Int[Array, " n"]) -> Float[Array, ""]:
    """The share of images that a model, in evaluation mode, classifies as their labels say."""
    return (model(images).argmax(-1) == labels).mean()
