"""The two networks of the comparison of remedies, as data, and the network that any remedy makes of them.

    [activation -> pool? -> (IC) -> weights -> (norm)] for each stage

A stage is activation-then-weights, as all layers here are; the first ones have no activation before them.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Float


class Stage(NamedTuple):
    """One weight layer and what is before it.

    Attributes:
      features: of its output.
      kernel_size: of a convolution; None for a dense layer, which flattens what it gets.
      strides: of the convolution.
      padding: of the convolution.
      active: whether an activation is before the weights.
      pool: whether a 2x2 max-pool is between the two, where the image is still that large.
    """

    features: int
    kernel_size: tuple[int, int] | None = None
    strides: int = 1
    padding: str = "SAME"
    active: bool = True
    pool: bool = False

    def window(self, shape: Sequence[int]) -> tuple[int, int]:
        """Of the pool, on an image of shape (H, W, C)."""
        return (min(2, shape[0]), min(2, shape[1])) if self.pool else (1, 1)

    def shape_after(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(H, W, C) -> that of the output, (features,) for a dense layer."""
        if self.kernel_size is None:
            return (self.features,)
        height, width = (size // window for size, window in zip(shape, self.window(shape), strict=False))
        lost = [size - 1 if self.padding == "VALID" else 0 for size in self.kernel_size]
        return (-(-(height - lost[0]) // self.strides), -(-(width - lost[1]) // self.strides), self.features)


def depth_stages(classes: int, *, depth: int = 30, width: int = 8) -> tuple[Stage, ...]:
    """Table 2's network: a strided 7x7 stem, `depth` 3x3 layers of `width` units, a dense layer."""
    stem = Stage(width, (7, 7), strides=2, active=False)
    return (stem, Stage(width, (3, 3), active=False), *(Stage(width, (3, 3)),) * (depth - 1), Stage(classes))


def four_conv_stages(classes: int) -> tuple[Stage, ...]:
    """Table 3's network: four convs of 32, 32, 64 and 64 units, two pools, a dense layer of 512, the read-out."""
    return (
        Stage(32, (3, 3), active=False),
        Stage(32, (3, 3), padding="VALID"),
        Stage(64, (3, 3), pool=True),
        Stage(64, (3, 3), padding="VALID"),
        Stage(512, pool=True),
        Stage(classes),
    )


NETS: dict[str, Callable[[int], tuple[Stage, ...]]] = {"depth": depth_stages, "four_conv": four_conv_stages}


class Place(NamedTuple):
    """Where a step is in its network.

    Attributes:
      stage: what it does.
      shape: of one example of its input, (H, W, C) or (C,), C counting units.
      normed: whether an activation follows, and so a norm.
    """

    stage: Stage
    shape: tuple[int, ...]
    normed: bool

    @property
    def positions(self) -> int:
        """Pixels of a unit that the weights see as features of their own: 1 but for a dense layer on an image."""
        if self.stage.kernel_size is not None or len(self.shape) == 1:
            return 1
        window = self.stage.window(self.shape)
        return (self.shape[0] // window[0]) * (self.shape[1] // window[1])


Context = Any
"""What a method passes from layer to layer beside the features; None for most."""
StepOf = Callable[[Place, nnx.Rngs], Any]


class RemedyNet(nnx.Module):
    """A network whose every step is made by a method, for images (H, W, C).

    `step` makes of a place and rngs a module (x, context, train) -> (z, context).
    """

    def __init__(self, image_shape: Sequence[int], stages: Sequence[Stage], *, step: StepOf, rngs: nnx.Rngs):
        self.steps, shape = nnx.List([]), tuple(image_shape)
        for stage, following in itertools.zip_longest(stages, stages[1:]):
            self.steps.append(step(Place(stage, shape, following is not None and following.active), rngs))
            shape = stage.shape_after(shape)

    def __call__(self, images: Float[Array, "n h w c"], *, train: bool = False) -> Float[Array, "n classes"]:
        """The logits."""
        z, context = images, None
        for step in self.steps:
            z, context = step(z, context, train)
        return z
