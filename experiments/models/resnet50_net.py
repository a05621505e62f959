"""The paper's scaled ResNet-50 (tables 5 and 6), written between pre-activations.

    block:  z -> f_o(z) -> conv 1x1 -> norm -> f_i -> conv 3x3 -> norm -> f_i -> conv 1x1 -> norm -> + shortcut

f_i are the two activations inside a bottleneck, f_o the one after each addition (and after the stem). In the authors'
linked networks only f_i is linked and f_o is plain, so that the sums keep their width: link="inside". With
link="everywhere" f_o is linked too, and the identity shortcut carries z itself; that is ours.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from flax import nnx
from jaxtyping import Array, Float

from experiments.engine.rows import INITS, Activation, Row, batch_norm, normalised, stem_init
from linked_jax import LinkedConv, LinkedLinear
from linked_jax.initializers import Initializer

LinkWhere = Literal["inside", "everywhere"]
STEM = 8
STAGES = (((16, 64), 3, 1), ((16, 64), 4, 2), ((32, 128), 6, 2), ((32, 128), 3, 2))
"""(units inside and of the output of a bottleneck), blocks, stride of the first one."""
_BLOCKS = sum(count for _, count, _ in STAGES)


class ResNet50(nnx.Module):
    """The network of tables 5 and 6: 16 bottlenecks, flatten, dense.

    Args:
      image_shape: (H, W, C) of one image.
      classes: the number of outputs.
      row: the activation, and the norm after every conv. PReLU has a slope for each channel, and before the read-out
        one for each pixel and channel.
      init: where kernels start, a name of `rows.INITS`. With auto and no norm the last kernel of each bottleneck is
        divided by sqrt(16), as the paper does not: a sum of 16 branches of size 1 has size 2.
      link: where the links are, see above; it decides what an identity shortcut carries.
      rngs: Flax random streams.
    """

    def __init__(
        self, image_shape: Sequence[int], classes: int, row: Row, init: str, *, link: LinkWhere, rngs: nnx.Rngs
    ):
        height, width, channels = image_shape
        self.stem = nnx.Conv(channels, STEM, (3, 3), kernel_init=stem_init(init), rngs=rngs)
        self.stem_norm = batch_norm(STEM, row.norm, rngs)
        found, features = [], STEM
        for (narrow, wide), count, first_stride in STAGES:
            for stride in (first_stride, *[1] * (count - 1)):
                height, width = -(-height // stride), -(-width // stride)
                found.append(_Bottleneck((features, narrow, wide), stride, row, init, link, rngs))
                features = wide
        self.blocks = nnx.List(found)
        features *= height * width
        last = _outer(row, link)(features)
        self.read_out = LinkedLinear(features, classes, link=last, kernel_init=INITS[init](last.link), rngs=rngs)

    def __call__(self, images: Float[Array, "n h w c"], *, train: bool = False) -> Float[Array, "n classes"]:
        """Images in [0, 1] -> logits; 49 activations are on the way."""
        z = normalised(self.stem(images), self.stem_norm, train)
        for block in self.blocks:
            z = block(z, train)
        return self.read_out(z.reshape(len(z), -1))


class _Bottleneck(nnx.Module):
    def __init__(self, units: tuple[int, int, int], stride: int, row: Row, init: str, link: LinkWhere, rngs: nnx.Rngs):
        features, narrow, wide = units

        def conv(c_in: int, c_out: int, window: int, f: Activation, strides: int = 1, scale: float = 1) -> LinkedConv:
            kernel = _scaled(INITS[init](f.link, strides=strides), scale)
            return LinkedConv(c_in, c_out, (window, window), link=f, strides=strides, kernel_init=kernel, rngs=rngs)

        project = stride > 1 or features != wide
        scale = _BLOCKS**-0.5 if init == "auto" and row.norm == "none" else 1
        self.f_o = _outer(row, link)(features)
        self.carries_z = link == "everywhere"
        self.reduce = conv(features, narrow, 1, self.f_o, stride)
        self.spatial = conv(narrow, narrow, 3, row.activation(narrow))
        self.expand = conv(narrow, wide, 1, row.activation(narrow), scale=scale)
        self.shortcut = conv(features, wide, 1, self.f_o, stride) if project else None
        self.norms = nnx.List([batch_norm(c, row.norm, rngs) for c in (narrow, narrow, wide)])
        self.shortcut_norm = batch_norm(wide, row.norm, rngs) if project else None

    def __call__(self, z: Array, train: bool) -> Array:
        h = normalised(self.reduce(z), self.norms[0], train)
        h = normalised(self.spatial(h), self.norms[1], train)
        h = normalised(self.expand(h), self.norms[2], train)
        if self.shortcut is not None:
            return h + normalised(self.shortcut(z), self.shortcut_norm, train)
        return h + (z if self.carries_z else self.f_o(z))


def _outer(row: Row, link: LinkWhere) -> Callable[[int], Activation]:
    """The number of features -> f_o."""
    return row.plain if link == "inside" else row.activation


def _scaled(init: Initializer, scale: float) -> Initializer:
    return lambda key, shape, dtype: scale * init(key, shape, dtype)
