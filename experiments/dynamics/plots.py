"""The pictures of `experiments.dynamics`: decision surfaces with gradients, and figure 1 for every link."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.engine.plots import COLOURS
from linked_jax import Certificate, Link, LinkedPReLU, certify
from linked_jax.activations import ACTIVATIONS

_UNITS = COLOURS[:6]  # black and grey are the surface's
_DASHES = ("-", "--", ":", "-.")
_GRID = 121  # points along each side of a surface
_RANGE = 6.0  # of z in the pictures of links
_FLOOR = 1e-9  # a log axis has no zero: gradients below are drawn here


def dynamics_picture(
    lines: Sequence[Mapping[str, Any]],
    data: tuple[Any, Any],
    restore: Callable[[Mapping[str, Any]], Any],
    path: Path,
    *,
    bias: float,
    title: str,
    on_surface: Callable[[int], None] = lambda _: None,
) -> Path:
    """A row for each activation: surfaces with each unit's zero line, then the gradient norm of each unit.

    Args:
      lines: of one seed, with act, step, accuracy, gradient_norms, and parameters where a surface is drawn.
      data: points (n, 2) and labels 0 or 1 (n,).
      restore: a line with parameters -> the net, with a layer `hidden`.
      path: of the PNG to write.
      bias: at the start; the surfaces reach a little beyond it, so that zero lines are seen from the start.
      title: stands above.
      on_surface: called with 1 for each surface done.

    Returns:
      The path.
    """
    acts = list(dict.fromkeys(line["act"] for line in lines))
    steps = [line["step"] for line in lines if line["act"] == acts[0] and "parameters" in line]
    reach = float(np.abs(data[0]).max())
    reach = min(max(1.15 * reach, 1.25 * abs(bias)), 2 * reach)
    top = 10 * max(max(line["gradient_norms"]) for line in lines)
    figure = _figure(2.2 * len(steps) + 4.4, 2.2 * len(acts) + 1.2)
    figure.suptitle(title, fontsize=13)
    panels = figure.subplots(
        len(acts), len(steps) + 1, squeeze=False, sharex="col", width_ratios=[*[1] * len(steps), 1.8]
    )
    for act, row in zip(acts, panels, strict=True):
        mine = [line for line in lines if line["act"] == act]
        for line, axes in zip((line for line in mine if "parameters" in line), row, strict=False):
            _surface(axes, restore(line), data, reach)
            axes.text(0.03, 0.03, f"accuracy {line['accuracy']:.3f}", transform=axes.transAxes, fontsize=9,
                      bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1.5})  # fmt: skip
            on_surface(1)
        row[0].set_ylabel(act, fontsize=13)
        _gradients(row[-1], mine, top)
    for axes, step in zip(panels[0], steps, strict=False):
        axes.set_title(f"step {step:,}", fontsize=12)
    panels[0, -1].set_title("gradient norm of each unit, by step", fontsize=12)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=11)
    figure.savefig(path, dpi=110)
    return path


def _surface(axes: Any, net: Any, data: tuple[Any, Any], reach: float) -> None:
    """The probability of class 1 (darker is more), the boundary, the data, and the line z = 0 of each unit."""
    side = np.linspace(-reach, reach, _GRID)
    points = jnp.asarray(np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2), jnp.float32)
    probability = np.asarray(jax.nn.softmax(net(points))[:, 1]).reshape(_GRID, _GRID)
    axes.imshow(1 - probability, extent=(-reach, reach, -reach, reach), origin="lower", cmap="gray", vmin=-1.2, vmax=1)
    if probability.min() < 0.5 < probability.max():
        axes.contour(side, side, probability, levels=[0.5], colors="black", linewidths=1.8)
    for number, (w, b) in enumerate(zip(net.hidden.kernel[...].T, net.hidden.bias[...], strict=True)):
        ends = _zero_line(np.asarray(w, np.float64), float(b), reach)
        axes.plot(*ends, **_style(number), label="" if number else "a unit's z = 0, coloured as its gradient")
    axes.plot([], [], color="black", linewidth=1.8, label="boundary between the classes")
    for label, (marker, colour) in enumerate((("o", "white"), ("^", "black"))):
        mine = np.asarray(data[0])[np.asarray(data[1]) == label]
        axes.scatter(
            *mine.T, s=9, marker=marker, c=colour, edgecolors="black", linewidths=0.5, zorder=3, label=f"class {label}"
        )
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[])


def _zero_line(w: np.ndarray, b: float, reach: float) -> np.ndarray:
    """Two ends, (2, 2) with x first, of the line w.x + b = 0; beyond the picture, so that they are not seen."""
    length = max(float(np.hypot(*w)), 1e-30)
    foot = -b * w / length**2
    along = 3 * reach * np.array([-w[1], w[0]]) / length
    return np.stack([foot - along, foot + along], axis=1)


def _gradients(axes: Any, lines: Sequence[Mapping[str, Any]], top: float) -> None:
    steps = [line["step"] for line in lines]
    norms = np.maximum([line["gradient_norms"] for line in lines], _FLOOR)
    for number, unit in enumerate(norms.T):
        axes.plot(steps, unit, **_style(number))
    if not any(any(line["gradient_norms"]) for line in lines):
        axes.text(0.5, 0.16, "exactly 0 for every unit", transform=axes.transAxes, ha="center", fontsize=11)
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    axes.set(yscale="log", ylim=(_FLOOR / 10, top), xlim=(0, steps[-1]))
    ticks = [10.0**power for power in range(-7, 39, 2) if 10.0**power < top]
    axes.set_yticks([_FLOOR, *ticks], ["$<10^{-9}$", *(f"$10^{{{round(np.log10(tick))}}}$" for tick in ticks)])
    axes.minorticks_off()
    axes.yaxis.tick_right()
    axes.grid(alpha=0.25)
    axes.spines[["top", "left"]].set_visible(False)


def named_links() -> dict[str, Link]:
    """Every named link once; LinkedPReLU as it starts.

    >>> from experiments.dynamics.plots import named_links
    >>> "lk_relu" in named_links(), "crelu" in named_links()
    (True, False)
    """
    links = {name: link for name, link in ACTIVATIONS.items() if isinstance(link, Link) and link.arity > 1}
    links["lk_prelu"] = LinkedPReLU(1).link
    return {name: link for name, link in links.items() if name != "crelu"}  # it is lk_relu


def links_picture(path: Path, on_link: Callable[[int], None] = lambda _: None) -> Path:
    """Figure 1 of the paper for every named link: members, derivatives, and what the bfloat16 certificate says.

    Args:
      path: of the PNG to write.
      on_link: called with 1 for each link done.

    Returns:
      The path.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    links, columns = named_links(), 4
    rows = -(-len(links) // columns)
    figure = _figure(3.7 * columns, 4.1 * rows + 1.2)
    title = "Every named link: members, derivatives, and what their certificate found over every finite bfloat16"
    figure.suptitle(title, fontsize=14)
    paper = {"min_max": " (figure 1a of the paper)", "lk_selu": " (figure 1b of the paper)"}
    parts = figure.subfigures(rows, columns, squeeze=False).ravel()
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
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    figure.savefig(path, dpi=110)
    return path


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


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(unit: int) -> dict[str, Any]:
    dash = _DASHES[unit // len(_UNITS) % len(_DASHES)]
    return {"color": _UNITS[unit % len(_UNITS)], "linestyle": dash, "linewidth": 1.3}
