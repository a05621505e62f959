"""The paper's very deep and narrow network (table 2).

    stem 7x7 stride 2 -> [conv 3x3 -> norm? -> activation] x depth -> flatten -> dense

Each layer here is link-then-layer, so the stem and the first 3x3 layer are plain and the read-out is linked: the same
network, cut before the activations instead of after them.
"""

from collections.abc import Callable, Sequence

from flax import nnx
from jaxtyping import Array, Float

from experiments.engine.rows import Activation, Norm, batch_norm, normalised
from linked_jax import Link, LinkedConv, LinkedLinear
from linked_jax.initializers import Initializer


class DepthNet(nnx.Module):
    """The network of table 2; the 3x3 layers after the first are stacked on a leading axis and scanned.

    Args:
      image_shape: (H, W, C) of one image.
      classes: the number of outputs.
      depth: the number of 3x3 layers, each followed by the activation.
      width: the number of units of every layer.
      activation: the number of features -> a link or a module, called once for every activation.
      stem_init: init(key, shape, dtype) of the stem and of the first layer, by its stride.
      kernel_init: link -> init(key, shape, dtype), for all other layers.
      norm: "batch" puts batch norm between each 3x3 layer and its activation (Keras' defaults).
      unroll: run the stacked layers unrolled: a faster step on a CPU, and a longer compile.
      rngs: Flax random streams.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        depth: int,
        width: int,
        activation: Callable[[int], Activation],
        stem_init: Callable[[int], Initializer],
        kernel_init: Callable[[Link], Initializer],
        norm: Norm = "none",
        unroll: bool = True,
        rngs: nnx.Rngs,
    ):
        def block(rngs: nnx.Rngs) -> _Block:
            return _Block(width, activation(width), kernel_init, norm, rngs=rngs)

        height, width_px, channels = image_shape
        positions = -(-height // 2) * -(-width_px // 2)
        self.depth, self.unroll = depth, unroll
        self.stem = nnx.Conv(channels, width, (7, 7), strides=2, kernel_init=stem_init(2), rngs=rngs)
        self.first = nnx.Conv(width, width, (3, 3), kernel_init=stem_init(1), rngs=rngs)
        self.first_norm = batch_norm(width, norm, rngs)
        self.blocks = nnx.data(nnx.vmap(block)(rngs.split(depth - 1)) if depth > 1 else None)
        link = activation(positions * width)
        self.read_out = LinkedLinear(
            positions * width, classes, link=link, kernel_init=kernel_init(link.link), rngs=rngs
        )

    def __call__(self, images: Float[Array, "n h w c"], *, train: bool = False) -> Float[Array, "n classes"]:
        """Images in [0, 1] -> logits."""

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, unroll=self.depth - 1 if self.unroll else 1)
        def layers(block: _Block, z: Array) -> Array:
            return block(z, train=train)

        z = normalised(self.first(self.stem(images)), self.first_norm, train)
        if self.blocks is not None:
            z = layers(self.blocks, z)
        return self.read_out(z.reshape(len(z), -1))


class _Block(nnx.Module):
    """activation -> conv 3x3 -> norm."""

    def __init__(
        self,
        width: int,
        link: Activation,
        kernel_init: Callable[[Link], Initializer],
        norm: Norm,
        *,
        rngs: nnx.Rngs,
    ):
        self.conv = LinkedConv(width, width, (3, 3), link=link, kernel_init=kernel_init(link.link), rngs=rngs)
        self.norm = batch_norm(width, norm, rngs)

    def __call__(self, z: Array, *, train: bool) -> Array:
        return normalised(self.conv(z), self.norm, train)
