"""The paper's four-conv network (table 3).

    [conv SAME -> conv VALID -> max-pool] of 32 units, the same of 64, flatten, dense 512, dense; an activation after
    each conv and after the dense 512

A pool sees what the activation gives, so the conv after it takes all members of the link.
"""

from collections.abc import Callable, Sequence

from flax import nnx
from jaxtyping import Array, Float

from experiments.engine.rows import Activation, Norm, batch_norm, normalised
from linked_jax import Link, LinkedConv, LinkedLinear
from linked_jax.initializers import Initializer

_POOL = 2


class ParametersNet(nnx.Module):
    """The network of table 3.

    Args:
      image_shape: (H, W, C) of one image, at least 4 pixels high and wide.
      classes: the number of outputs.
      widths: units of the first two convs, of the next two, and of the dense layer.
      activation: the number of features -> a link or a module, called once for every activation.
      stem_init: init(key, shape, dtype) of the first conv.
      kernel_init: link -> init(key, shape, dtype) of all other layers.
      norm: "batch" puts batch norm before every activation.
      rngs: Flax random streams.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        widths: tuple[int, int, int],
        activation: Callable[[int], Activation],
        stem_init: Initializer,
        kernel_init: Callable[[Link], Initializer],
        norm: Norm = "none",
        rngs: nnx.Rngs,
    ):
        low, high, dense = widths
        height, width, channels = image_shape
        links = [activation(features) for features in (low, low, high, high, dense)]
        arity = links[0].arity

        def linked_conv(features: int, link: Activation) -> LinkedConv:
            init = kernel_init(link.link)
            return LinkedConv(features, features, (3, 3), link=link, padding="VALID", kernel_init=init, rngs=rngs)

        init = [kernel_init(link.link) for link in links]
        self.links = nnx.List(links)
        self.norms = nnx.List([batch_norm(units, norm, rngs) for units in (low, low, high, high, dense)])
        self.conv1 = nnx.Conv(channels, low, (3, 3), kernel_init=stem_init, rngs=rngs)
        self.conv2 = linked_conv(low, links[0])
        self.conv3 = nnx.Conv(arity * low, high, (3, 3), kernel_init=init[1], rngs=rngs)
        self.conv4 = linked_conv(high, links[2])
        positions = _after(height) * _after(width)
        self.dense5 = nnx.Linear(arity * positions * high, dense, kernel_init=init[3], rngs=rngs)
        self.read_out = LinkedLinear(dense, classes, link=links[4], kernel_init=init[4], rngs=rngs)

    def __call__(self, images: Float[Array, "n h w c"], *, train: bool = False) -> Float[Array, "n classes"]:
        """Images in [0, 1] -> logits."""
        z = normalised(self.conv1(images), self.norms[0], train)
        z = normalised(self.conv2(z), self.norms[1], train)
        z = normalised(self.conv3(_pool(self.links[1](z))), self.norms[2], train)
        z = normalised(self.conv4(z), self.norms[3], train)
        h = _pool(self.links[3](z))
        return self.read_out(normalised(self.dense5(h.reshape(len(h), -1)), self.norms[4], train))


def _pool(h: Array) -> Array:
    window = _windows(h.shape[1], h.shape[2])
    return nnx.max_pool(h, window, strides=window)


def _windows(*sizes: int) -> tuple[int, ...]:
    """2 pixels, or the one that is left of a small image."""
    return tuple(min(_POOL, size) for size in sizes)


def _after(size: int) -> int:
    """Pixels that two rounds of a VALID 3x3 conv and a pool leave of an edge."""
    for _ in range(2):
        size = (size - 2) // min(_POOL, size - 2)
    return size
