import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linked_jax import activations
from linked_jax.linking import Link, linked
from linked_jax.members import Mirrored, formula, member_key, member_name
from tests.cases import first_fast

pytestmark = pytest.mark.optimised

leaky = functools.partial(jax.nn.leaky_relu, negative_slope=0.1)


class Nameless:
    """A callable with the default repr."""

    def __call__(self, z):
        return jax.nn.relu(z)


def test_keys_compare_arguments_with_their_types():
    assert member_key(leaky) == member_key(functools.partial(jax.nn.leaky_relu, negative_slope=0.1))
    one, other = (functools.partial(jax.nn.elu, alpha=alpha) for alpha in (1, 1.0))
    assert member_key(one) != member_key(other)
    for a, b in ((0.0, -0.0), (np.float32(0.0), np.float32(-0.0)), ((1,), (True,)), ((0.0, (1,)), (0.0, (1.0,)))):
        assert member_key(functools.partial(jnp.add, a)) != member_key(functools.partial(jnp.add, b))
        assert member_key(functools.partial(jnp.add, a)) == member_key(functools.partial(jnp.add, a))


@pytest.mark.parametrize(
    ("member", "words"),
    first_fast(
        [
            (jax.nn.relu, "relu(z)"),
            (Mirrored(jax.nn.relu), "relu(-z)"),
            (leaky, "leaky_relu(z, negative_slope=0.1)"),
            (Mirrored(leaky), "leaky_relu(-z, negative_slope=0.1)"),
            (functools.partial(jnp.power, 2.0), "power(2.0, z)"),
            (Mirrored(functools.partial(jnp.power, 2.0)), "power(2.0, -z)"),
            (Mirrored(Mirrored(jax.nn.relu)), "relu(z)"),
            (functools.partial(lambda z, g: g(z), g=jax.nn.relu), "<lambda>(z, g=relu)"),
            (functools.partial(Nameless()), "Nameless(z)"),
            (Nameless(), "Nameless(z)"),
            (Link((jax.nn.relu,)), "Link(relu(z))(z)"),
        ]
    ),
)
def test_formulas(member, words):
    assert formula(member) == words


def test_no_memory_address_stands_in_a_link_or_its_marks():
    for member in (
        Nameless(),
        functools.partial(Nameless()),
        functools.partial(lambda z, g: g(z), g=lambda z: z),
        functools.partial(lambda z, things: z, things=[Nameless(), jax.nn.relu]),
    ):
        link = linked(member)
        assert "0x" not in repr(link)
        assert "0x" not in str(jax.make_jaxpr(link)(1.0)).replace("jvp_jaxpr_fun", "")


@pytest.mark.slow
def test_a_name_is_the_same_in_every_process():
    code = "from tests.linked_jax.test_members import Nameless, linked; print(linked(Nameless()))"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout == "Link(Nameless(z), Nameless(-z))\n"


def test_the_named_links_have_readable_names():
    assert repr(activations.lk_gelu) == "Link(gelu(z), gelu(-z))"
    assert member_name(activations.lk_gelu) == "Link(gelu(z), gelu(-z))"
