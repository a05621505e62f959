"""The paper's shallow network (table 1): conv 3x3 -> activation -> flatten -> dense."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from experiments.engine.rows import INITS, Row, batch_norm, normalised, stem_init
from linked_jax import LinkedLinear


class WidthNet(nnx.Module):
    """The network of table 1. The paper does not fix the padding; ours is SAME.

    PReLU has a slope for each pixel and channel.

    Args:
      image_shape: (H, W, C) of one image.
      classes: the number of outputs.
      row: the activation, the norm before it, and the factor of the width.
      init: where kernels start, a name of `rows.INITS`.
      width: the units of the conv layer.
      rngs: Flax random streams.
    """

    def __init__(self, image_shape: Sequence[int], classes: int, row: Row, init: str, *, width: int, rngs: nnx.Rngs):
        height, width_px, channels = image_shape
        units = row.units(width)
        features = height * width_px * units
        link = row.activation(features)
        self.conv = nnx.Conv(channels, units, (3, 3), kernel_init=stem_init(init), rngs=rngs)
        self.norm = batch_norm(units, row.norm, rngs)
        self.read_out = LinkedLinear(features, classes, link=link, kernel_init=INITS[init](link.link), rngs=rngs)

    def __call__(self, images: Float[Array, "n h w c"], *, train: bool = False) -> Float[Array, "n classes"]:
        """Images in [0, 1] -> logits."""
        z = normalised(self.conv(images), self.norm, train)
        return self.read_out(z.reshape(len(z), -1))
