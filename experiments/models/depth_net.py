"""The paper's very deep and narrow network (table 2).

    stem 7x7 stride 2 -> [conv 3x3 -> norm? -> activation] x depth -> flatten -> dense

Each layer here is link-then-layer, so the stem and the first 3x3 layer are plain and the read-out is linked: the same
network, cut before the activations instead of after them.
"""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from experiments.engine.rows import INITS, Row, batch_norm, identity, normalised, stem_init
from linked_jax import LinkedConv, LinkedLinear


class DepthNet(nnx.Module):
    """The network of table 2; the 3x3 layers after the first are stacked on a leading axis and scanned.

    Args:
      image_shape: (H, W, C) of one image.
      classes: the number of outputs.
      row: the activation, the norm before it, and the factor of the width. PReLU has a slope for each channel, and
        before the read-out one for each pixel and channel.
      init: where kernels start, a name of `rows.INITS`.
      depth: the number of 3x3 layers, each followed by the activation.
      width: the number of units of every layer.
      unroll: run the stacked layers unrolled: a faster step on a CPU, and a longer compile.
      rngs: Flax random streams.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        row: Row,
        init: str,
        *,
        depth: int,
        width: int,
        unroll: bool = True,
        rngs: nnx.Rngs,
    ):
        height, width_px, channels = image_shape
        units = row.units(width)
        features = -(-height // 2) * -(-width_px // 2) * units
        self.depth, self.unroll = depth, unroll
        self.stem = nnx.Conv(channels, units, (7, 7), strides=2, kernel_init=stem_init(init), rngs=rngs)
        self.first = nnx.Conv(units, units, (3, 3), kernel_init=INITS[init](identity), rngs=rngs)
        self.first_norm = batch_norm(units, row.norm, rngs)
        blocks = nnx.vmap(lambda rngs: _Block(units, row, init, rngs=rngs))
        self.blocks = nnx.data(blocks(rngs.split(depth - 1)) if depth > 1 else None)
        link = row.activation(features)
        self.read_out = LinkedLinear(features, classes, link=link, kernel_init=INITS[init](link.link), rngs=rngs)

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

    def __init__(self, units: int, row: Row, init: str, *, rngs: nnx.Rngs):
        link = row.activation(units)
        self.conv = LinkedConv(units, units, (3, 3), link=link, kernel_init=INITS[init](link.link), rngs=rngs)
        self.norm = batch_norm(units, row.norm, rngs)

    def __call__(self, z: Array, *, train: bool) -> Array:
        return normalised(self.conv(z), self.norm, train)
