import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linked_jax.measurements import evaluate, is_homogeneous, jumps_at_zero, slopes, weights_of_z
from linked_jax.members import Mirrored, formula
from tests.cases import first_fast

pytestmark = pytest.mark.optimised

leaky = functools.partial(jax.nn.leaky_relu, negative_slope=0.1)


class Unhashable:
    """relu, which cannot be asked once and remembered."""

    __hash__ = None

    def __call__(self, z):
        return jax.nn.relu(z)


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
