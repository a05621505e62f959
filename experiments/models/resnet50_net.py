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

from experiments.engine.rows import Activation, Norm, batch_norm, normalised
from linked_jax import LinkedConv, LinkedLinear
from linked_jax.initializers import Initializer

LinkWhere = Literal["inside", "everywhere"]
STEM = 8
STAGES = (((16, 64), 3, 1), ((16, 64), 4, 2), ((32, 128), 6, 2), ((32, 128), 3, 2))
"""(units inside and of the output of a bottleneck), blocks, stride of the first one."""


class ResNet50(nnx.Module):
    """The network of tables 5 and 6: 16 bottlenecks, flatten, dense.

    Args:
      image_shape: (H, W, C) of one image.
      classes: the number of outputs.
      inner: the number of features -> f_i, called once for every activation.
      outer: the same for f_o.
      stem_init: init(key, shape, dtype) of the stem.
      kernel_init: (link, strides=) -> init(key, shape, dtype) of all other layers.
      scale_branches: divide the last kernel of each bottleneck by sqrt(16): a sum of 16 branches of size 1 has size 2.
        Only without batch norm; the paper does not.
      norm: "batch" puts batch norm after every conv.
      link: where the links are, see above; it decides what an identity shortcut carries.
      rngs: Flax random streams.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        *,
        inner: Callable[[int], Activation],
        outer: Callable[[int], Activation],
        stem_init: Initializer,
        kernel_init: Callable[..., Initializer],
        scale_branches: bool = False,
        norm: Norm = "none",
        link: LinkWhere = "inside",
        rngs: nnx.Rngs,
    ):
        height, width, channels = image_shape
        blocks = sum(count for _, count, _ in STAGES)
        scale = blocks**-0.5 if scale_branches and norm == "none" else 1.0
        self.stem = nnx.Conv(channels, STEM, (3, 3), kernel_init=stem_init, rngs=rngs)
        self.stem_norm = batch_norm(STEM, norm, rngs)
        found, features = [], STEM
        for (narrow, wide), count, first_stride in STAGES:
            for number in range(count):
                stride = first_stride if number == 0 else 1
                height, width = -(-height // stride), -(-width // stride)
                found.append(
                    _Bottleneck(
                        (features, narrow, wide), stride, number == 0, inner, outer, kernel_init, scale, norm,
                        carries_z=link == "everywhere", rngs=rngs,
                    )
                )  # fmt: skip
                features = wide
        self.blocks = nnx.List(found)
        last = outer(height * width * features)
        self.read_out = LinkedLinear(
            height * width * features, classes, link=last, kernel_init=kernel_init(last.link), rngs=rngs
        )

    def __call__(self, images: Float[Array, "n h w c"], *, train: bool = False) -> Float[Array, "n classes"]:
        """Images in [0, 1] -> logits; 49 activations are on the way."""
        z = normalised(self.stem(images), self.stem_norm, train)
        for block in self.blocks:
            z = block(z, train)
        return self.read_out(z.reshape(len(z), -1))


class _Bottleneck(nnx.Module):
    def __init__(
        self,
        units: tuple[int, int, int],
        stride: int,
        project: bool,
        inner: Callable[[int], Activation],
        outer: Callable[[int], Activation],
        kernel_init: Callable[..., Initializer],
        scale: float,
        norm: Norm,
        *,
        carries_z: bool,
        rngs: nnx.Rngs,
    ):
        features, narrow, wide = units

        def conv(
            c_in: int, c_out: int, window: int, link: Activation, strides: int = 1, scale: float = 1.0
        ) -> LinkedConv:
            init = _scaled(kernel_init(link.link, strides=strides), scale)
            return LinkedConv(c_in, c_out, (window, window), link=link, strides=strides, kernel_init=init, rngs=rngs)

        self.f_o = outer(features)
        self.carries_z = carries_z
        self.reduce = conv(features, narrow, 1, self.f_o, stride)
        self.spatial = conv(narrow, narrow, 3, inner(narrow))
        self.expand = conv(narrow, wide, 1, inner(narrow), scale=scale)
        self.shortcut = conv(features, wide, 1, self.f_o, stride) if project else None
        self.norms = nnx.List([batch_norm(c, norm, rngs) for c in (narrow, narrow, wide)])
        self.shortcut_norm = batch_norm(wide, norm, rngs) if project else None

    def __call__(self, z: Array, train: bool) -> Array:
        h = normalised(self.reduce(z), self.norms[0], train)
        h = normalised(self.spatial(h), self.norms[1], train)
        h = normalised(self.expand(h), self.norms[2], train)
        if self.shortcut is not None:
            return h + normalised(self.shortcut(z), self.shortcut_norm, train)
        return h + (z if self.carries_z else self.f_o(z))


def _scaled(init: Initializer, scale: float) -> Initializer:
    return lambda key, shape, dtype: scale * init(key, shape, dtype)
