"""Training steps of linked nets on a mesh, compiled and not run: what a compiled program says of its own costs.

    MLP     z -> z + f(z U + u) V + v                         U split by columns, V by rows, over "model"
    ResNet  z -> z + K2 * f(K1 * f(z) + k1) + k2              three stages, between them z -> P * f(z) with stride 2

Both are followed by a mean square as the loss and an update of gradient descent; the examples are split over "data".
The ResNet's layers are XLA's own convolutions, as `LinkedConv` has them on a GPU or TPU.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from linked_jax import Link, linked

STAGES = 3
_COLLECTIVE = r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
_BYTES = {"f32": 4, "bf16": 2, "f16": 2}


def link_of(arity: int, layout: Literal["blocked", "interleaved"] = "interleaved") -> Link:
    """The mirror link of relu, or relu alone."""
    return linked(jax.nn.relu, layout=layout) if arity == 2 else Link((jax.nn.relu,))


def mesh_of(data: int, model: int = 1) -> Mesh:
    """So many devices on the axes "data" and "model"."""
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def mlp_step(
    width: int, depth: int, batch: int, *, hidden: int, arity: int = 2, data: int = 1, model: int = 1, **link: Any
) -> jax.stages.Compiled:
    """A step of so many blocks on a batch of tokens."""
    f, put = link_of(arity, **link), functools.partial(_abstract, mesh_of(data, model))

    def net(blocks: Any, z: Array) -> Array:
        for up, u, down, v in blocks:
            z = z + jax.checkpoint(lambda h, down=down: f(h) @ down)(z @ up + u) + v
        return z

    block = (
        put((width, hidden), None, "model"), put((hidden,), "model"), put((arity * hidden, width), "model"),
        put((width,)),
    )  # fmt: skip
    return _compiled(net, [block] * depth, put((batch, width), "data"))


def resnet_step(width: int, depth: int, batch: int, *, size: int, arity: int = 2, data: int = 1) -> jax.stages.Compiled:
    """A step of three stages of so many blocks on a batch of maps (size, size, width)."""
    f, put = link_of(arity), functools.partial(_abstract, mesh_of(data))

    def conv(z: Array, kernel: Array, stride: int = 1) -> Array:
        def of(z: Array, kernel: Array) -> Array:
            return jax.lax.conv_general_dilated(
                f(z), kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        return jax.checkpoint(of)(z, kernel)

    def net(stages: Any, z: Array) -> Array:
        for project, blocks in stages:
            z = z if project is None else conv(z, project, 2)
            for first, k, second, l in blocks:  # noqa: E741
                z = z + conv(conv(z, first) + k, second) + l
        return z

    stages = []
    for number in range(STAGES):
        wide = width * 2**number
        kernel = put((3, 3, arity * wide, wide))
        block = (kernel, put((wide,)), kernel, put((wide,)))
        stages.append((put((1, 1, arity * wide // 2, wide)) if number else None, [block] * depth))
    return _compiled(net, stages, put((batch, size, size, width), "data"))


def _abstract(mesh: Mesh, shape: Sequence[int], *spec: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def _compiled(net: Callable[[Any, Array], Array], parameters: Any, z: Any) -> jax.stages.Compiled:
    def step(parameters: Any, z: Array) -> tuple[Any, Float[Array, ""]]:
        loss, gradients = jax.value_and_grad(lambda p: jnp.mean(net(p, z) ** 2))(parameters)
        return jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradients), loss

    return jax.jit(step, donate_argnums=0).lower(parameters, z).compile()


def collectives(compiled: jax.stages.Compiled) -> list[tuple[str, int]]:
    """The kind of each collective of a compiled program, and the bytes that it gives back on one device."""
    found = []
    for line in (compiled.as_text() or "").splitlines():
        if match := re.search(_COLLECTIVE, line):
            shapes = re.findall(r"(f32|bf16|f16)\[([\d,]*)\]", match[1])
            sizes = [_BYTES[kind] * int(np.prod([int(n) for n in shape.split(",") if n])) for kind, shape in shapes]
            found.append((match[2], sum(sizes)))
    return found
