"""The paper's shallow network (table 1): conv 3x3 -> activation -> flatten -> dense."""

from collections.abc import Callable, Sequence

from flax import nnx
from jaxtyping import Array, Float

from experiments.engine.rows import Activation, Norm, batch_norm, normalised
from linked_jax import Link, LinkedLinear
from linked_jax.initializers import Initializer


class WidthNet(nnx.Module):
    """The network of table 1. The paper does not fix the padding; ours is SAME.

    Args:
      image_shape: (H, W, C) of one image.
      classes: the number of outputs.
      width: the units of the conv layer.
      activation: the number of features -> a link or a module.
      stem_init: init(key, shape, dtype) of the conv layer.
      kernel_init: link -> init(key, shape, dtype) of the dense layer.
      norm: "batch" puts batch norm before the activation.
      rngs: Flax random streams.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        width: int,
        activation: Callable[[int], Activation],
        stem_init: Initializer,
        kernel_init: Callable[[Link], Initializer],
        norm: Norm = "none",
        rngs: nnx.Rngs,
    ):
        height, width_px, channels = image_shape
        features = height * width_px * width
        link = activation(features)
        self.conv = nnx.Conv(channels, width, (3, 3), kernel_init=stem_init, rngs=rngs)
        self.norm = batch_norm(width, norm, rngs)
        self.read_out = LinkedLinear(features, classes, link=link, kernel_init=kernel_init(link.link), rngs=rngs)

    def __call__(self, images: Float[Array, "n h w c"], *, train: bool = False) -> Float[Array, "n classes"]:
        """Images in [0, 1] -> logits."""
        z = normalised(self.conv(images), self.norm, train)
        return self.read_out(z.reshape(len(z), -1))
