"""Figure 1 of the paper for every named link: members, derivatives, and what their certificate found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.engine.plots import COLOURS, figure, save
from linked_jax import ACTIVATION_NAMES, Certificate, Link, activation_arity, certify, get_activation

_DASHES = ("-", "--")
_RANGE = 6.0  # of z


def named_links() -> dict[str, Link]:
    """Every named link once; LinkedPReLU as it starts.

    >>> from experiments.dynamics.links import named_links
    >>> "lk_relu" in named_links(), "crelu" in named_links()
    (True, False)
    """
    names = (name for name in ACTIVATION_NAMES if activation_arity(name) > 1 and name != "crelu")  # that is lk_relu
    return {name: get_activation(name, 1).link for name in names}


def picture(path: Path, on_link: Callable[[int], None] = lambda _: None) -> Path:
    """Write the figure as a PNG; on_link is called with 1 for each link done."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    links, columns = named_links(), 4
    rows = -(-len(links) // columns)
    sheet = figure(3.7 * columns, 4.1 * rows + 1.2)
    title = "Every named link: members, derivatives, and what their certificate found over every finite bfloat16"
    sheet.suptitle(title, fontsize=14)
    paper = {"min_max": " (figure 1a of the paper)", "lk_selu": " (figure 1b of the paper)"}
    parts = sheet.subfigures(rows, columns, squeeze=False).ravel()
    for part, (name, link) in zip(parts, links.items(), strict=False):
        certificate = certify(link, jnp.bfloat16)
        z = jnp.linspace(-_RANGE, _RANGE, 2400)[:, None]
        members, derivatives = part.subplots(2, 1, sharex=True)
        for axes, curves in zip((members, derivatives), jax.jvp(link, (z,), (jnp.ones_like(z),)), strict=True):
            for number, curve in enumerate(np.asarray(curves).T):
                axes.plot(z[:, 0], curve, color=COLOURS[1 - number], linestyle=_DASHES[number])
            for low, high in certificate.dead_intervals:
                axes.axvspan(max(low, -_RANGE), min(high, _RANGE), color="0.85", lw=0)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        members.set_title(f"{name}{paper.get(name, '')}", fontsize=12)
        members.set_ylabel("$g_i(z)$")
        derivatives.set_title(verdict(certificate), fontsize=9, color="black" if certificate.linked else COLOURS[0])
        derivatives.set(xlabel="z", ylabel="$g_i'(z)$", xlim=(-_RANGE, _RANGE))
        on_link(1)
    handles: list[Any] = [
        Line2D([], [], color=COLOURS[1 - number], linestyle=_DASHES[number], label=f"member {number + 1}")
        for number in range(2)
    ]
    handles.append(Patch(color="0.85", label="dead: every derivative is 0"))
    sheet.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    return save(sheet, path, 110)


def verdict(certificate: Certificate) -> str:
    """One line on a certificate.

    >>> import jax, jax.numpy as jnp
    >>> from linked_jax import certify, linked
    >>> verdict(certify(linked(jnp.tanh), jnp.bfloat16))
    'not linked: dead for z <= -3.47, z >= 3.47'
    """
    if certificate.linked:
        return f"linked: least max|g'| = {certificate.min_gradient:.3g}, at z = {certificate.argmin:.2g}"
    if not certificate.dead_interval_count:
        return f"not linked: g' not finite at {certificate.nonfinite_count:,} values"
    huge = 1e38
    texts = [
        f"z <= {high:.3g}" if low < -huge else f"z >= {low:.3g}" if high > huge else f"[{low:.3g}, {high:.3g}]"
        for low, high in certificate.dead_intervals[:3]
    ]
    return f"not linked: dead for {', '.join(texts)}{', ...' if certificate.dead_interval_count > 3 else ''}"
