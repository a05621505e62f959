"""Riemannian batch normalisation: kernels before a batch norm, trained on the unit sphere.

    ||y|| = 1 for each output column y of a kernel (kh*kw*c_in, c_out)

Batch norm makes the length of y irrelevant, and yet the length sets the size of gradient steps. Here steps follow
geodesics, the great circles. Apply it to kernels that only a batch norm follows; no weight decay on them.
Kernels of several layers that are stacked for a scan count as one, with longer columns: unstack them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from linked_jax.arrays import Number, is_number, wide, wide_dtype
from linked_jax.remedies.arguments import check_shares, dotted, nearest
from linked_jax.remedies.sphere import column_dot, column_norm, geodesic, tangent, unit_columns


class SphereState(NamedTuple):
    """The number of steps so far, and the averages, each a tree like the kernels: (m,) of SGD-G, (m, v) of Adam-G."""

    steps: Any
    kept: tuple[Any, ...]


def sgd_g(
    learning_rate: optax.ScalarOrSchedule, *, momentum: Number = 0.9, clip: Number = 0.1
) -> optax.GradientTransformation:
    """SGD with momentum on the sphere (SGD-G), for kernels only.

        y <- y / ||y||,   h = tangent(y, g),   m <- momentum m - lr h
        y, m <- y cos||m|| + u sin||m||, ||m|| (u cos||m|| - y sin||m||),   u = m / ||m||

    Args:
      learning_rate: lr, a number or a schedule from the count of earlier steps. The authors take 0.2 at the start.
      momentum: in [0, 1).
      clip: the greatest norm of a column of h.

    Returns:
      An Optax transformation; its update needs params. `optax.apply_updates(params, updates)` has columns of norm 1.
      m and updates are float32 at least.

    Raises:
      ValueError: for a rate or a clip that is not positive, or a momentum outside [0, 1).

    Reference: Cho and Lee, Riemannian approach to batch normalization, 2017. The authors' code adds 1e-8 to ||y||; we
    leave a column of zeros as it is.

    Examples:
      >>> from linked_jax.remedies.riemannian import sgd_g
      >>> optimizer = sgd_g(0.2)
    """
    _check(learning_rate, clip, momentum=momentum)

    def step(y: Array, g: Array, kept: tuple[Array], lr: Any, _: Any) -> tuple[Array, tuple[Array]]:
        m = momentum * kept[0] - lr * tangent(y, g, clip=clip)
        y, m = geodesic(y, m)
        return y, (m,)

    return _on_spheres(step, learning_rate, _zeros)


def adam_g(
    learning_rate: optax.ScalarOrSchedule, *, b1: Number = 0.9, b2: Number = 0.99, clip: Number = 0.1
) -> optax.GradientTransformation:
    """Adam on the sphere (Adam-G), for kernels only; v is one number for each column.

        y <- y / ||y||,   h = tangent(y, g),   m <- b1 m + (1 - b1) h,   v <- b2 v + (1 - b2) ||h||^2
        delta = -lr sqrt(1 - b2^t) / (1 - b1^t) m / sqrt(v + 1e-8)
        y, m <- Exp_y(delta), m - (u.m) (sin||delta|| y + (1 - cos||delta||) u),   u = delta / ||delta||

    The last is the parallel transport of m to the new y.

    Args:
      learning_rate: lr, a number or a schedule from the count of earlier steps. The authors take 0.05 at the start.
      b1: in [0, 1), of the average m.
      b2: in [0, 1), of the average v.
      clip: the greatest norm of a column of h.

    Returns:
      See `sgd_g`.

    Raises:
      ValueError: as `sgd_g`, and for averages outside [0, 1).

    Reference: Cho and Lee, Riemannian approach to batch normalization, 2017.

    Examples:
      >>> from linked_jax.remedies.riemannian import adam_g
      >>> optimizer = adam_g(0.05)
    """
    _check(learning_rate, clip, b1=b1, b2=b2)

    def step(y: Array, g: Array, kept: tuple[Array, Array], lr: Any, t: Any) -> tuple[Array, tuple[Array, Array]]:
        h, (m, v) = tangent(y, g, clip=clip), kept
        m = b1 * m + (1 - b1) * h
        v = b2 * v + (1 - b2) * column_dot(h, h)
        t = t.astype(m.dtype)  # b2**t of an integer t would be float64 where that is on
        delta = -lr * jnp.sqrt(1 - b2**t) / (1 - b1**t) * m / jnp.sqrt(v + 1e-8)
        n = column_norm(delta)
        u = delta / jnp.where(n > 0, n, 1)
        m = m - column_dot(u, m) * (jnp.sin(n) * y + (1 - jnp.cos(n)) * u)
        return geodesic(y, delta)[0], (m, v)

    return _on_spheres(step, learning_rate, _zeros, lambda p: jnp.zeros_like(column_dot(p, p)))


def scale_invariant(params: Any, names: Sequence[str]) -> Any:
    """Of named layers, a mask of the kernels with more rows (kh*kw*c_in) than columns: those for the sphere.

    Args:
      params: any tree of parameters: an `nnx.State` from `nnx.split(model, nnx.Param, ...)`, a Linen dictionary.
      names: layers, or groups of layers, that only a batch norm follows, such as "conv1" or "blocks"; keys are joined
        by dots, and lists count from 0. What follows a layer cannot be seen in params.

    Returns:
      A tree of bools like params.

    Raises:
      ValueError: if a name has no kernel, or no kernel has more rows than columns.

    Examples:
      >>> import jax.numpy as jnp
      >>> from linked_jax.remedies.riemannian import scale_invariant
      >>> scale_invariant({"conv": {"kernel": jnp.ones((3, 3, 1, 4)), "bias": jnp.ones(4)}}, ["conv"])
      {'conv': {'bias': False, 'kernel': True}}
    """
    shapes = {dotted(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    kernels = [name for name in shapes if name.endswith(".kernel")]
    for each in names:
        if not any(kernel.startswith(f"{each}.") for kernel in kernels):
            layers = [kernel.removesuffix(".kernel") for kernel in kernels]
            raise ValueError(f"{each!r} has no kernel in params; the nearest layers: {nearest(each, layers)}")
    named = [kernel for kernel in kernels if kernel.startswith(tuple(f"{each}." for each in names))]
    tall = {kernel for kernel in named if math.prod(shapes[kernel][:-1]) > shapes[kernel][-1]}
    if not tall:
        raise ValueError(
            f"a kernel for the sphere has more rows than columns, got none among {list(names)}; name larger kernels"
        )
    return jax.tree_util.tree_map_with_path(lambda path, _: dotted(path) in tall, params)


def riemannian(
    on_spheres: optax.GradientTransformation, rest: optax.GradientTransformation, mask: Any
) -> optax.GradientTransformation:
    """One optimiser for the kernels of a mask, another for all other parameters.

    Args:
      on_spheres: `sgd_g` or `adam_g`, with its rate.
      rest: any optimiser, with its rate; the authors take Nesterov SGD with momentum 0.9 and rate 0.01.
      mask: a tree of bools, see `scale_invariant`. It goes by names: the parameters may be variables of NNX in one tree
        and arrays in the other, as `nnx.Optimizer` has them.

    Returns:
      An Optax transformation; its update needs params, and what it returns is not to be rescaled. Start from
      `to_sphere(params, mask)`, or the first update takes the kernels there.

    Raises:
      ValueError: if the mask holds no parameter.

    >>> import optax
    >>> from linked_jax.remedies.riemannian import riemannian, sgd_g
    >>> optimizer = riemannian(sgd_g(0.2), optax.sgd(0.01), {"conv": True, "dense": False})
    """
    if not any(jax.tree.leaves(mask)):
        raise ValueError(f"the mask holds no parameter, got {mask}; use scale_invariant, or the other optimiser alone")
    return optax.partition({True: on_spheres, False: rest}, functools.partial(_marked, mask))


def to_sphere(params: Any, mask: Any) -> Any:
    """Give each column of the kernels of a mask norm 1, for the start. A column of zeros stays.

    >>> import jax.numpy as jnp
    >>> from linked_jax.remedies.riemannian import to_sphere
    >>> to_sphere({"kernel": jnp.array([[3.0], [4.0]])}, {"kernel": True})["kernel"].round(3).ravel()
    Array([0.6, 0.8], dtype=float32)
    """
    return jax.tree.map(lambda p, on: unit_columns(p).astype(p.dtype) if on else p, params, _marked(mask, params))


def orthogonality_penalty(params: Any, mask: Any) -> Float[Array, ""]:
    """The authors' regulariser: how far the columns of each kernel are from orthonormal.

        0.1 / 2 sum_kernels ||Y'Y - I||_F^2

    It is a scalar, float32 at least, to be added to the loss.

    >>> import jax.numpy as jnp
    >>> from linked_jax.remedies.riemannian import orthogonality_penalty
    >>> round(float(orthogonality_penalty({"kernel": jnp.array([[1.0, 1.0], [0.0, 0.0]])}, {"kernel": True})), 6)
    0.1
    """

    def penalty(p: Array, on: bool) -> Any:
        if not on:
            return 0.0
        columns = wide(p).reshape(-1, p.shape[-1])
        return 0.05 * jnp.square(columns.T @ columns - jnp.eye(p.shape[-1])).sum()

    return jnp.asarray(sum(jax.tree.leaves(jax.tree.map(penalty, params, _marked(mask, params)))))


def _marked(mask: Any, params: Any) -> Any:
    """The bools of a mask as a tree like params, by the names of its leaves, or of the groups that they are of."""
    marks = {dotted(path): on for path, on in jax.tree_util.tree_leaves_with_path(mask)}

    def mark(path: Any, _: Any) -> bool:
        keys = dotted(path).split(".")
        names = [".".join(keys[:i]) for i in range(len(keys), -1, -1)]
        on = next((marks[name] for name in names if name in marks), None)
        if on is None:
            raise ValueError(f"the mask says nothing of {names[0]!r}; make it of these parameters")
        return on

    return jax.tree_util.tree_map_with_path(mark, params)


def _zeros(p: Array) -> Array:
    return jnp.zeros_like(wide(p))


def _on_spheres(
    step: Callable[..., tuple[Array, Any]], learning_rate: optax.ScalarOrSchedule, *starts: Callable[[Array], Array]
) -> optax.GradientTransformation:
    """The Optax transformation of step(y, g, kept, lr, t) -> (y, kept), where each of `kept` has its start."""

    def init(params: Any) -> SphereState:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if jnp.ndim(leaf) < 2:
                raise ValueError(
                    f"only kernels are on a sphere, got {dotted(path)!r} of shape {jnp.shape(leaf)}; use "
                    "riemannian(..., mask=scale_invariant(...))"
                )
        return SphereState(jnp.zeros((), jnp.int32), tuple(jax.tree.map(start, params) for start in starts))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, SphereState]:
        if params is None:
            raise ValueError("steps on a sphere need the kernels, got None; pass update(gradients, state, params)")
        lr = learning_rate(state.steps) if callable(learning_rate) else learning_rate
        t = optax.safe_increment(state.steps)
        kernels, gradients, *averages = map(jax.tree.leaves, (params, updates, *state.kept))
        moves, kept = [], []
        for p, g, *of_p in zip(kernels, gradients, *averages, strict=True):
            y, of_y = step(unit_columns(p), g.astype(wide_dtype(p.dtype)), tuple(of_p), lr, t)
            moves.append(y - p)
            kept.append(of_y)
        trees = [
            jax.tree.unflatten(jax.tree.structure(tree), of)
            for tree, of in zip(state.kept, zip(*kept, strict=True), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), moves), SphereState(t, tuple(trees))

    return optax.GradientTransformation(init, update)


def _check(learning_rate: optax.ScalarOrSchedule, clip: Number, **averages: Number) -> None:
    for name, value in (("learning_rate", learning_rate), ("clip", clip)):
        if is_number(value) and not 0 < value < math.inf:  # a schedule checks itself
            raise ValueError(f"{name} is positive and finite, got {value!r}; pass e.g. 0.1")
    check_shares(**averages)
