"""The paper's four-conv network (table 3).

    [conv SAME -> conv VALID -> max-pool] of 32 units, the same of 64, flatten, dense 512, dense; an activation after
    each conv and after the dense 512

A pool sees what the activation gives, so the conv after it takes all members of the link.
"""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from experiments.engine.flatten import flatten
from experiments.engine.rows import INITS, Row, batch_norm, normalised, stem_init
from linked_jax import LinkedConv, LinkedLinear

_UNITS = (32, 32, 64, 64, 512)
_POOL = 2


class ParametersNet(nnx.Module):
    """The network of table 3.

    Args:
      image_shape: (H, W, C) of one image, at least 4 pixels high and wide.
      classes: the number of outputs.
      row: the activation, the norm before it, and the factor of the units.
      init: where kernels start, a name of `rows.INITS`.
      rngs: Flax random streams.
    """

    def __init__(self, image_shape: Sequence[int], classes: int, row: Row, init: str, *, rngs: nnx.Rngs):
        height, width, channels = image_shape
        units = [row.units(single) for single in _UNITS]
        low, _, high, _, dense = units
        links = [row.activation(features) for features in units]
        inits = [INITS[init](link.link) for link in links]
        arity = links[0].arity
        self.links = nnx.List(links)
        self.norms = nnx.List([batch_norm(features, row.norm, rngs) for features in units])
        self.conv1 = nnx.Conv(channels, low, (3, 3), kernel_init=stem_init(init), rngs=rngs)
        self.conv2 = LinkedConv(low, low, (3, 3), link=links[0], padding="VALID", kernel_init=inits[0], rngs=rngs)
        self.conv3 = nnx.Conv(arity * low, high, (3, 3), kernel_init=inits[1], rngs=rngs)
        self.conv4 = LinkedConv(high, high, (3, 3), link=links[2], padding="VALID", kernel_init=inits[2], rngs=rngs)
        positions = _after(height) * _after(width)
        self.dense5 = nnx.Linear(arity * positions * high, dense, kernel_init=inits[3], rngs=rngs)
        self.read_out = LinkedLinear(dense, classes, link=links[4], kernel_init=inits[4], rngs=rngs)

    def __call__(self, images: Float[Array, "n h w c"], *, train: bool = False) -> Float[Array, "n classes"]:
        """Images in [0, 1] -> logits."""
        z = normalised(self.conv1(images), self.norms[0], train)
        z = normalised(self.conv2(z), self.norms[1], train)
        z = normalised(self.conv3(_pool(self.links[1](z))), self.norms[2], train)
        z = normalised(self.conv4(z), self.norms[3], train)
        h = _pool(self.links[3](z))
        return self.read_out(normalised(self.dense5(flatten(h, self.links[3].arity)), self.norms[4], train))


def _pool(h: Array) -> Array:
    window = tuple(min(_POOL, size) for size in h.shape[1:3])  # 1 where one pixel is left of a small image
    return nnx.max_pool(h, window, strides=window)


def _after(size: int) -> int:
    """Pixels that two rounds of a VALID 3x3 conv and a pool leave of an edge."""
    for _ in range(2):
        size = (size - 2) // min(_POOL, size - 2)
    return size
