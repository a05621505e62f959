"""The paper's All-CNN (table 4), of Springenberg et al., Striving for simplicity, 2015.

    c, c, c/2, dropout, 2c, 2c, 2c/2, dropout, 2c, 2c 1x1, classes 1x1, global average pool

/2 is stride 2; the convs are 3x3 but for the last two; an activation follows each but the two strided ones and the
last.
"""

from flax import nnx
from jaxtyping import Array, Float

from experiments.engine.rows import INITS, Row, batch_norm, identity, normalised, stem_init
from linked_jax import LinkedConv

# units in multiples of c, window, stride, and whether an activation precedes the layer
_LAYERS = (
    (1, 3, 1, False), (1, 3, 1, True), (1, 3, 2, True),
    (2, 3, 1, False), (2, 3, 1, True), (2, 3, 2, True),
    (2, 3, 1, False), (2, 1, 1, True),
)  # fmt: skip
_DROPOUT_AFTER = (2, 5)


class AllCNN(nnx.Module):
    """The network of table 4.

    Args:
      channels: of the images.
      classes: the number of outputs.
      row: the activation, the norm before it, and the factor of the width.
      init: where kernels start, a name of `rows.INITS`.
      width: c, the units of the first three convs.
      dropout: the rate after the strided convs.
      rngs: Flax random streams; also of dropout.
    """

    def __init__(self, channels: int, classes: int, row: Row, init: str, *, width: int, dropout: float, rngs: nnx.Rngs):
        layers, norms, features = [], [], channels
        specs = [(multiple * row.units(width), *rest) for multiple, *rest in _LAYERS] + [(classes, 1, 1, True)]
        for number, (units, window, stride, activated) in enumerate(specs):
            link = row.activation(features) if activated else identity
            kernel = stem_init(init) if number == 0 else INITS[init](link.link, strides=stride)
            norms.append(batch_norm(features, row.norm if activated else "none", rngs))
            layers.append(
                LinkedConv(features, units, (window, window), link=link, strides=stride, kernel_init=kernel, rngs=rngs)
            )
            features = units
        self.layers, self.norms = nnx.List(layers), nnx.List(norms)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, images: Float[Array, "n h w c"], *, train: bool = False) -> Float[Array, "n classes"]:
        """Images in [0, 1] -> logits."""
        z = images
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            z = layer(normalised(z, norm, train))
            if number in _DROPOUT_AFTER:
                z = self.dropout(z, deterministic=not train)
        return z.mean(axis=(1, 2))
