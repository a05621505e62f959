"""Which axis of a pre-activation is that of its units, and which ones are samples.

The axes of the samples are those that are longer for a larger batch. Where they are cannot be told from one jaxpr:
batching puts them anywhere, and a layer may have as many units as the batch has samples.
"""

from typing import Any

from jax.extend.core import Var

from linked_jax.probe.recognise import Site, inner_jaxprs, opened

Samples = dict[Var, tuple[int, ...]] | None
"""For each variable of a jaxpr the axes that grow with the batch; None if that is not known."""


def sample_axes(jaxpr: Any, larger: Any) -> dict[Var, tuple[int, ...]]:
    """The axes of each variable that are longer in the jaxpr of the same model for a larger batch.

    Raises:
      ValueError: if the two jaxprs have other equations.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from linked_jax.probe.axes import sample_axes
      >>> small, large = (jax.make_jaxpr(lambda x: jnp.ones((3, 4)) @ x.T)(jnp.ones((n, 4))) for n in (3, 6))
      >>> list(sample_axes(small, large).values())[-1]
      (1,)
    """
    one, other = opened(jaxpr)[0], opened(larger)[0]
    axes = {}
    for equation, same in zip(one.eqns, other.eqns, strict=True):
        if equation.primitive != same.primitive:
            raise ValueError(f"one jaxpr has a {equation.primitive} and the other a {same.primitive}")
        for inner in zip(inner_jaxprs(equation), inner_jaxprs(same), strict=True):
            axes |= sample_axes(*inner)
    for var, grown in zip(_variables(one), _variables(other), strict=True):
        shapes = zip(var.aval.shape, grown.aval.shape, strict=True)
        axes[var] = tuple(k for k, (before, after) in enumerate(shapes) if before != after)
    return axes


def _variables(body: Any) -> list[Any]:
    variables = [*body.invars, *(var for equation in body.eqns for var in equation.outvars)]
    return [var for var in variables if hasattr(var.aval, "shape")]


def units_last(
    site: Site, shape: tuple[int, ...], outputs: tuple[int, ...], samples: Samples
) -> tuple[list[int], list[int], bool]:
    """How to transpose z and h: the samples first, the units last; and whether all of z is samples of one unit.

    The units are along the link's axis, else along the last axis that is not of samples. Batching may move the
    samples to one axis of z and to another one of h.

    Raises:
      ValueError: if the link's axis is that of the samples.
    """
    z_first, h_first = ((0,), (0,)) if samples is None else (samples[site.z], samples[site.h])
    z_order, h_order = _to_front(z_first, len(shape)), _to_front(h_first, len(outputs))
    ndim, n = len(shape), len(z_first)
    z_sizes, h_sizes = [shape[k] for k in z_order], [outputs[k] for k in h_order]
    alone = [[*z_sizes, site.arity]] + [z_sizes] * (site.arity == 1)  # a link stacks what it makes of a number
    if n == ndim and h_sizes in alone:
        return z_order, h_order, True
    if site.arity > 1:  # its axis is the one that the link made longer; it may be the first if no samples are known
        begin = 0 if samples is None else n
        longer = [k for k in range(begin, ndim) if len(h_sizes) == ndim and h_sizes[k] == site.arity * z_sizes[k]]
        if not longer:
            raise ValueError(
                f"the link {site.activation} is laid along the axis of the samples: it makes {outputs} of z of shape "
                f"{shape}; give z an axis of units, as in link(z[..., None])"
            )
        unit = longer[0]
    elif site.axis % ndim in z_first:  # that axis was counted before batching
        unit = n + site.axis % (ndim - n)
    else:
        unit = z_order.index(site.axis % ndim)
    return _to_end(z_order, unit), _to_end(h_order, unit), False


def _to_front(axes: tuple[int, ...], ndim: int) -> list[int]:
    return [*axes, *(k for k in range(ndim) if k not in axes)]


def _to_end(order: list[int], k: int) -> list[int]:
    return [*order[:k], *order[k + 1 :], order[k]]
