import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linked_jax import activations
from linked_jax.linking import Link, linked
from linked_jax.members import (
    Mirrored,
    evaluate,
    formula,
    is_homogeneous,
    jumps_at_zero,
    member_key,
    member_name,
    slopes,
    weights_of_z,
)
from tests.cases import first_fast

pytestmark = pytest.mark.optimised

leaky = functools.partial(jax.nn.leaky_relu, negative_slope=0.1)


class Nameless:
    """A callable with the default repr."""

    def __call__(self, z):
        return jax.nn.relu(z)


class Unhashable(Nameless):
    __hash__ = None


def in_float32(z):
    return jax.nn.relu(z.astype(jnp.float32)).astype(z.dtype)


QUESTIONS = {slopes: None, is_homogeneous: False, jumps_at_zero: True}
"""What each answers for a member that cannot be measured."""

MEMBERS = {  # slopes, homogeneous, c with g(z) - g(-z) = c z, jumps at zero
    jax.nn.relu: ((1, 0), True, 1, True),
    jnp.abs: ((1, -1), True, 0, False),
    leaky: ((1, 0.1), True, 1.1, False),
    Mirrored(leaky): ((-0.1, -1), True, -1.1, True),
    jnp.negative: ((-1, -1), True, -2, False),
    in_float32: (None, True, 1, True),
    jnp.zeros_like: ((0, 0), True, 0, False),
    jax.nn.silu: (None, False, 1, False),
    jax.nn.softplus: (None, False, 1, False),
    jnp.square: (None, False, 0, False),
    jax.nn.relu6: (None, False, None, True),
    jax.nn.elu: (None, False, None, False),
    jnp.tanh: (None, False, None, False),
    jnp.log: (None, False, None, False),  # not finite
}


@pytest.mark.parametrize("member", first_fast(MEMBERS), ids=formula)
def test_the_answers(member):
    expected, homogeneous, c, jumps = MEMBERS[member]
    assert (slopes(member), is_homogeneous(member), jumps_at_zero(member)) == (expected, homogeneous, jumps)
    weights, deviation = weights_of_z((member, Mirrored(member)))
    if c:
        np.testing.assert_allclose(weights, [1 / c, -1 / c], atol=1e-6)
    assert (deviation < 1e-6) == bool(c)


@pytest.mark.parametrize("question", first_fast(QUESTIONS), ids=lambda question: question.__name__)
def test_what_cannot_be_measured_gets_the_safe_answer(question):
    def needs_two_axes(z):
        return jax.nn.relu(z) * z.shape[-1] / z.shape[-2]

    assert question(jax.vmap(jax.vmap(jax.nn.relu))) == QUESTIONS[question]
    assert question(needs_two_axes) == QUESTIONS[question]
    assert question(Unhashable()) == QUESTIONS[question]
    assert jax.jit(lambda a: float(question(lambda z: a * z) == QUESTIONS[question]))(2.0) == 1


def test_an_error_of_the_member_itself_is_not_hidden():
    def broken(z):
        raise KeyError("slope")

    for question in QUESTIONS:
        with pytest.raises(KeyError):
            question(broken)


def test_a_member_is_measured_once():
    calls = []

    def counted(z):
        calls.append(z)
        return z

    for question in QUESTIONS:
        question(counted)
        asked = len(calls)
        question(counted)
        assert len(calls) == asked > 0


def test_answers_hold_inside_a_trace():
    answers = []
    jax.jit(lambda z: answers.append([question(lambda x: 3 * x) for question in QUESTIONS]) or z)(1.0)
    assert answers == [[(3, 3), True, False]]


def test_evaluate_is_float64_everywhere():
    z = np.array([1 / 3, -1e-3])
    found = []
    jax.jit(lambda x: found.append(evaluate(jnp.exp, z)) or x)(1.0)
    assert found[0].dtype == np.float64
    np.testing.assert_allclose(found[0], np.exp(z), rtol=1e-15)


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
            (functools.partial(jnp.power, 2.0), "power(z, 2.0)"),
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
