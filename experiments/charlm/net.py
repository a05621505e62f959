"""nanoGPT's transformer without biases, with any norm or none, and its MLP behind any link."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from linked_jax import LinkedLinear, Link, gelu, lk_gelu, lk_relu, looks_linear

WIDTH, HEADS, BLOCK = 128, 4, 64
STD = 0.02


@dataclasses.dataclass(frozen=True)
class Row:
    says: str
    link: Link = gelu
    norm: Any = None
    emb_std: float = STD
    emb_scale: float = 1.0
    emb_learned: bool = False
    branch: float = 1.0  # x 1/sqrt(2L)^power
    branch_power: float = 0.0
    branch_learned: str = ""  # "", "scalar", "vector"
    out_init: str = "gpt"  # gpt, zero, lecun, full
    mlp_out: str = "gpt"  # gpt, zero, ll
    mlp_scale: float = 1.0
    in_std: float = STD
    gain: str = ""  # "", "vector", "scalar"
    head_scale: float = 1.0
    qk: str = ""


def make_norm(row, rngs):
    if row.norm == "layer":
        return nnx.LayerNorm(WIDTH, use_bias=False, epsilon=1e-5, rngs=rngs)
    if row.norm == "rms":
        return nnx.RMSNorm(WIDTH, epsilon=1e-5, rngs=rngs)
    if row.norm == "dyt":
        return Dynamic(jnp.tanh, row)
    if row.norm == "derf":
        return Dynamic(jax.scipy.special.erf, row)
    if row.gain:
        return Gain(row.gain)
    return lambda x: x


ROWS = {
    "layer_norm": Row("layer normalisation", norm="layer"),
    "rms_norm": Row("RMS normalisation", norm="rms"),
    "dyt": Row("DyT", norm="dyt", emb_scale=128**0.5, emb_learned=True),
    "derf": Row("Derf", norm="derf", emb_scale=128**0.5, emb_learned=True),
    "gelu": Row("no norm, nanoGPT's start", emb_scale=128**0.5, emb_learned=True),
    "lk_gelu": Row("no norm", link=lk_gelu, emb_scale=128**0.5, emb_learned=True, mlp_out="ll", branch_power=0.5),
    "lk_relu": Row("no norm", link=lk_relu, emb_scale=128**0.5, emb_learned=True, mlp_out="ll", branch_power=0.5),
}


class Gain(nnx.Module):
    def __init__(self, kind, value=1.0):
        self.g = nnx.Param(jnp.full((WIDTH,) if kind == "vector" else (), value))

    def __call__(self, x):
        return x * self.g[...]


class Dynamic(nnx.Module):
    def __init__(self, f, row):
        self.f = f
        self.alpha = nnx.Param(jnp.array(getattr(row, "alpha", 0.5)))
        self.shift = nnx.Param(jnp.array(0.0)) if f is not jnp.tanh else None
        self.gamma = nnx.Param(jnp.ones(WIDTH))
        self.beta = nnx.Param(jnp.zeros(WIDTH))

    def __call__(self, x):
        z = self.alpha[...] * x
        if self.shift is not None:
            z = z + self.shift[...]
        return self.gamma[...] * self.f(z) + self.beta[...]


def normal(std):
    return nnx.initializers.normal(std)


class Attention(nnx.Module):
    def __init__(self, row, out_std, rngs):
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, kernel_init=normal(row.in_std), rngs=rngs)
        out = nnx.initializers.zeros if row.out_init == "zero" else normal(out_std)
        self.out = nnx.Linear(WIDTH, WIDTH, use_bias=False, kernel_init=out, rngs=rngs)

    def __call__(self, x):
        n, t, _ = x.shape
        q, k, v = jnp.split(self.qkv(x).reshape(n, t, 3 * HEADS, -1), 3, axis=2)
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(n, t, WIDTH))


class MLP(nnx.Module):
    def __init__(self, row, out_std, rngs):
        hidden = round(8 * WIDTH / (1 + row.link.arity))
        self.wide = nnx.Linear(WIDTH, hidden, use_bias=False, kernel_init=normal(row.in_std), rngs=rngs)
        if row.mlp_out == "gpt":
            init = normal(out_std)
        elif row.mlp_out == "zero":
            init = nnx.initializers.zeros
        else:
            ll = looks_linear(row.link)
            init = lambda *a: row.mlp_scale * ll(*a)
        self.out = LinkedLinear(hidden, WIDTH, link=row.link, use_bias=False, kernel_init=init, rngs=rngs)

    def __call__(self, x):
        return self.out(self.wide(x))


class Block(nnx.Module):
    def __init__(self, row, depth, rngs):
        s = (2 * depth) ** -0.5
        out_std = s * STD if row.out_init == "gpt" else row.in_std
        self.norm_a, self.norm_m = make_norm(row, rngs), make_norm(row, rngs)
        self.attention, self.mlp = Attention(row, out_std, rngs), MLP(row, out_std, rngs)
        self.scale = row.branch * (2 * depth) ** -row.branch_power
        if row.branch_learned:
            self.sa, self.sm = Gain(row.branch_learned, self.scale), Gain(row.branch_learned, self.scale)
            self.scale = 1.0
        else:
            self.sa = self.sm = lambda x: x

    def __call__(self, x):
        x = x + self.scale * self.sa(self.attention(self.norm_a(x)))
        return x + self.scale * self.sm(self.mlp(self.norm_m(x)))


class CharTransformer(nnx.Module):
    def __init__(self, row, depth, vocabulary, *, rngs):
        init = normal(row.emb_std)
        self.tokens = nnx.Embed(vocabulary, WIDTH, embedding_init=init, rngs=rngs)
        self.places = nnx.Embed(BLOCK, WIDTH, embedding_init=init, rngs=rngs)
        self.emb = Gain("scalar", row.emb_scale) if row.emb_learned else (lambda x, s=row.emb_scale: s * x)
        self.blocks = nnx.List([Block(row, depth, rngs) for _ in range(depth)])
        self.norm = make_norm(row, rngs)
        self.head_scale = row.head_scale

    def __call__(self, codes: Int[Array, "n t"]) -> Float[Array, "n t v"]:
        x = self.emb(self.tokens(codes) + self.places(jnp.arange(codes.shape[1])))
        for block in self.blocks:
            x = block(x)
        return self.head_scale * self.tokens.attend(self.norm(x))
