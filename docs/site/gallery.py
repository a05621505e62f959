"""The gallery of links: picture, members, gain, certificate and cost of each, computed when the site is built."""

import io

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import linked_jax
from linked_jax import ACTIVATION_NAMES, Link, certify, gain, get_activation
from linked_jax.members import formula

SPAN = 4.0  # pre-activations from -4 to 4
COLOURS = "#0072B2", "#D55E00"  # blue and vermillion of Okabe and Ito, told apart by all eyes
UNITS = 1024

PAGE = """# Gallery

All links by name, as `linked_jax.get_activation(name)` gives them, drawn and computed when this page was built
(linked_jax {version}, JAX {jax}). Solid is the value, dashed the derivative; where all dashed lines are at zero, a
unit gets no gradient.

- **gain**: the factor of the kernel's standard deviation that keeps a layer's mean square, for standard normal
  pre-activations.
- **bfloat16, float16**: the certificate, over every finite value. Linked: the least gradient. Not linked: the share of
  [-10, 10] in which every derivative is below 0.001 in size. float32 takes half a minute each at most:
  `python -m linked_jax certify lk_relu`.
- **cost**: what XLA counts for a pre-activation on this platform, forward: floating-point operations and
  transcendental functions.

"""


def files() -> dict[str, str]:
    """The page and its pictures: a path on the site, and what is in it."""
    links = {name: get_activation(name, 1) for name in ACTIVATION_NAMES}
    fixed = {name: link for name, link in links.items() if isinstance(link, Link)}
    page = PAGE.format(version=linked_jax.__version__, jax=jax.__version__)
    page += "".join(entry(name, link) for name, link in fixed.items())
    learned = " and ".join(name for name in links if name not in fixed)
    page += f"{learned} are modules with slopes that are learned: [Links](api/links.md).\n"
    return {"gallery.md": page, **{f"gallery/{name}.svg": picture(link) for name, link in fixed.items()}}


def entry(name: str, link: Link) -> str:
    """A heading, the picture and the numbers of one link."""
    members = "; ".join(f"`{formula(member)}`" for member in link.members)
    numbers = f"{gain(link):.4f} | {proof(link, 'bfloat16')} | {proof(link, 'float16')} | {cost(link)}"
    return f"""## {name}

![{name}: values and derivatives of its members between -4 and 4](gallery/{name}.svg)

| members | gain | bfloat16 | float16 | cost |
| --- | --- | --- | --- | --- |
| {members} | {numbers} |

"""


def proof(link: Link, dtype: str) -> str:
    """The certificate in some words."""
    found = certify(link, dtype)
    if found.linked:
        return f"linked: {found.min_gradient:.3g} at {found.argmin:.3g}"
    not_finite = f", not finite at {found.nonfinite_count:,} values" if found.nonfinite_count else ""
    return f"not linked: flat in {100 * found.dead_band:.0f} %{not_finite}"


def cost(link: Link) -> str:
    """Flops and transcendental functions for each pre-activation."""
    counted = jax.jit(link).lower(jnp.ones((UNITS,))).compile().cost_analysis()
    return (
        f"{counted.get('flops', 0) / UNITS:.0f} flops, {counted.get('transcendentals', 0) / UNITS:.0f} transcendental"
    )


def picture(link: Link) -> str:
    """Members and their derivatives, as SVG."""
    z = jnp.linspace(-SPAN, SPAN, 801)
    with mpl.rc_context({"svg.hashsalt": "linked_jax", "font.size": 9}):
        figure = Figure((4.2, 2.4), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color="0.7", linewidth=0.8)
        for member, colour in zip(link.members, COLOURS, strict=False):
            values, slopes = jax.vmap(jax.value_and_grad(lambda z, g=member: g(z).astype(jnp.float32)))(z)
            label = formula(member).lstrip("_")  # Matplotlib hides a label with an underscore in front
            axes.plot(z, np.clip(values, -2.2, SPAN), color=colour, label=label)
            axes.plot(z, slopes, color=colour, linestyle="--", linewidth=1)
        axes.set(xlabel="z", xlim=(-SPAN, SPAN), ylim=(-2.2, SPAN))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper center")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
