"""nanoGPT's transformer without biases, with any norm or none, and its MLP behind any link.

    x <- s (E[character] + P[place])
    x <- x + attention(norm(x)),   x <- x + K' f(K norm(x))      a block
    logits = norm(x) E^T

Kernels and embeddings start as nanoGPT's: N(0, 0.02^2), the last kernel of a branch N(0, 0.02^2 / (2 depth)). Two
changes take the place of normalisation:

- the embeddings are multiplied by a learned scalar s that starts where a norm would put them, at a mean square of 1,
  s = 1 / (0.02 sqrt(2)); so are they for DyT, whose authors do the same, but with s = sqrt(width): a row of its own;
- the last kernel of a linked MLP starts as `LinkedLinear`'s own does, so that the MLP is linear at the start; in the
  rows *_gpt2 as nanoGPT's.

Attention is as it was, and no branch is scaled.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from linked_jax import Link, LinkedLinear, default_kernel_init, gelu, lk_gelu, lk_relu
from linked_jax.initializers import Initializer

WIDTH, HEADS, BLOCK = 128, 4, 64
STD = 0.02  # of kernels and embeddings at the start: GPT-2's
_TO_ONE = 1 / (STD * math.sqrt(2))  # gives the sum of two embeddings a mean square of 1
_EPSILON = 1e-5  # of the norms: PyTorch's
Norm = Callable[[nnx.Rngs], Callable[[Array], Array]]


class DynamicTanh(nnx.Module):
    """gamma tanh(alpha x) + beta, alpha one learned scalar (DyT).

    alpha starts at 1, as the authors advise for narrow language models, not at the 0.5 of their other nets.

    Reference: Zhu et al., Transformers without normalization, 2025.
    """

    def __init__(self):
        self.alpha = nnx.Param(jnp.float32(1.0))
        self.gamma, self.beta = nnx.Param(jnp.ones(WIDTH)), nnx.Param(jnp.zeros(WIDTH))

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        """An array like x."""
        return self.gamma[...] * jnp.tanh(self.alpha[...] * x) + self.beta[...]


class DynamicErf(DynamicTanh):
    """gamma erf(alpha x + s) + beta, alpha and s learned scalars (Derf).

    Reference: Chen et al., Stronger normalization-free transformers, 2025.
    """

    def __init__(self):
        super().__init__()
        self.s = nnx.Param(jnp.float32(0.0))

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        """An array like x."""
        return self.gamma[...] * jax.scipy.special.erf(self.alpha[...] * x + self.s[...]) + self.beta[...]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
      says: what it is, for the table.
      link: of the MLPs.
      norm: rngs -> what stands in the place of a norm; by default nothing.
      scale: where s starts, by which the embeddings are multiplied; None for no s.
      out_init: link, deviation -> how the last kernel of an MLP starts; by default as GPT-2's.
      hidden: pre-activations of an MLP; by default as many as give every row the parameters of GPT-2's, 4 WIDTH wide.
    """

    says: str
    link: Link = gelu
    norm: Norm = lambda _rngs: lambda x: x
    scale: float | None = None
    out_init: Callable[[Link, float], Initializer] = lambda _link, deviation: nnx.initializers.normal(deviation)
    hidden: int | None = None

    @property
    def units(self) -> int:
        """Pre-activations of an MLP."""
        return self.hidden or _units(self.link)


def _units(link: Link) -> int:
    return round(8 * WIDTH / (1 + link.arity))


def _layer_norm(rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(WIDTH, use_bias=False, epsilon=_EPSILON, rngs=rngs)


def _linear(link: Link, _deviation: float) -> Initializer:
    return default_kernel_init(link)


ROWS = {
    "layer_norm": Row("layer normalisation, gelu: nanoGPT", norm=_layer_norm),
    "layer_norm_scaled": Row("layer normalisation, gelu; the scalar", norm=_layer_norm, scale=_TO_ONE),
    "layer_norm_lk_gelu": Row("layer normalisation, linked gelu, linear MLPs", lk_gelu, _layer_norm, out_init=_linear),
    "layer_norm_lk_gelu_scaled": Row(
        "layer normalisation, linked gelu, linear MLPs; the scalar",
        lk_gelu,
        _layer_norm,
        scale=_TO_ONE,
        out_init=_linear,
    ),
    "layer_norm_lk_gelu_gpt2": Row("layer normalisation, linked gelu, GPT-2's start", lk_gelu, _layer_norm),
    "layer_norm_lk_gelu_wide": Row(
        "layer normalisation, linked gelu, GPT-2's start, as many units as gelu has: more parameters",
        lk_gelu,
        _layer_norm,
        hidden=_units(gelu),
    ),
    "layer_norm_narrow": Row(
        "layer normalisation, gelu, as few units as a linked row has: fewer parameters",
        norm=_layer_norm,
        hidden=_units(lk_gelu),
    ),
    "rms_norm": Row("RMS normalisation, gelu", norm=lambda rngs: nnx.RMSNorm(WIDTH, epsilon=_EPSILON, rngs=rngs)),
    "dyt": Row("DyT, gelu; the scalar", norm=lambda _rngs: DynamicTanh(), scale=_TO_ONE),
    "dyt_sqrt_width": Row("DyT, gelu; its authors' scalar", norm=lambda _rngs: DynamicTanh(), scale=math.sqrt(WIDTH)),
    "derf": Row("Derf, gelu; the scalar", norm=lambda _rngs: DynamicErf(), scale=_TO_ONE),
    "gelu": Row("no norm, gelu, nothing else changed"),
    "gelu_scaled": Row("no norm, gelu; the scalar", scale=_TO_ONE),
    "lk_gelu": Row("no norm, linked gelu, linear MLPs; the scalar", lk_gelu, scale=_TO_ONE, out_init=_linear),
    "lk_gelu_gpt2": Row("no norm, linked gelu, GPT-2's start; the scalar", lk_gelu, scale=_TO_ONE),
    "lk_relu": Row("no norm, linked relu; else as lk_gelu", lk_relu, scale=_TO_ONE, out_init=_linear),
}


class Attention(nnx.Module):
    """Causal self-attention of `HEADS` heads; the last kernel starts with this deviation."""

    def __init__(self, deviation: float, *, rngs: nnx.Rngs):
        self.qkv = _kernel(WIDTH, 3 * WIDTH, STD, rngs)
        self.out = _kernel(WIDTH, WIDTH, deviation, rngs)

    def __call__(self, x: Float[Array, "n t c"]) -> Float[Array, "n t c"]:
        """softmax(Q K^T / sqrt(C / HEADS)) V, of the places up to each."""
        heads = self.qkv(x).reshape(*x.shape[:2], 3 * HEADS, -1)
        q, k, v = jnp.split(heads, 3, axis=2)
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


class MLP(nnx.Module):
    """x -> K' f(K x), of a row's link f; K' has this deviation where it starts as GPT-2's."""

    def __init__(self, row: Row, deviation: float, *, rngs: nnx.Rngs):
        init = row.out_init(row.link, deviation)
        self.wide = _kernel(WIDTH, row.units, STD, rngs)
        self.out = LinkedLinear(row.units, WIDTH, link=row.link, use_bias=False, kernel_init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "n t c"]) -> Float[Array, "n t c"]:
        """An array like x."""
        return self.out(self.wide(x))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); one of so many blocks as the depth says."""

    def __init__(self, row: Row, depth: int, *, rngs: nnx.Rngs):
        deviation = STD / math.sqrt(2 * depth)
        self.norms = nnx.List([row.norm(rngs), row.norm(rngs)])
        self.attention, self.mlp = Attention(deviation, rngs=rngs), MLP(row, deviation, rngs=rngs)

    def __call__(self, x: Float[Array, "n t c"]) -> Float[Array, "n t c"]:
        """An array like x."""
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class CharTransformer(nnx.Module):
    """Codes of so many characters as the vocabulary has -> logits of the next one, at each place; depth: in blocks."""

    def __init__(self, row: Row, depth: int, vocabulary: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(STD)
        self.tokens = nnx.Embed(vocabulary, WIDTH, embedding_init=init, rngs=rngs)
        self.places = nnx.Embed(BLOCK, WIDTH, embedding_init=init, rngs=rngs)
        self.scale = None if row.scale is None else nnx.Param(jnp.float32(row.scale))
        self.blocks = nnx.List([Block(row, depth, rngs=rngs) for _ in range(depth)])
        self.norm = row.norm(rngs)

    def __call__(self, codes: Int[Array, "n t"]) -> Float[Array, "n t v"]:
        """The logits; those of a place are made from the characters up to it."""
        x = self.tokens(codes) + self.places(jnp.arange(codes.shape[1]))
        x = x if self.scale is None else self.scale[...] * x
        for block in self.blocks:
            x = block(x)
        return self.tokens.attend(self.norm(x))


def _kernel(in_features: int, out_features: int, deviation: float, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(deviation)
    return nnx.Linear(in_features, out_features, use_bias=False, kernel_init=init, rngs=rngs)
