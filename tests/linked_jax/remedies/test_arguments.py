"""Arguments that the remedies share: a link that is none, a size that is no integer, one that is NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from linked_jax import LinkedPReLU
from linked_jax.remedies.bcn import BatchChannelNorm
from linked_jax.remedies.bkn import BatchKalmanNorm
from linked_jax.remedies.enorm import Layer
from linked_jax.remedies.lcw import LCWConv, LCWLinear, keep_variance
from linked_jax.remedies.moment_calculus import Moments, through_link
from linked_jax.remedies.normprop import normalized


@pytest.mark.parametrize("wrong", [jax.nn.relu, None, "relu"])
@pytest.mark.parametrize(
    "take",
    [
        keep_variance,
        normalized,
        lambda link: Layer("a", link=link),
        lambda link: through_link(Moments(jnp.zeros(1), jnp.ones(1)), link),
    ],
)
def test_what_is_no_link_is_refused_in_one_line(take, wrong, unchecked):
    with pytest.raises(TypeError, match=r"^link is a Link, got .*; pass e.g. linked\(jax.nn.relu\)"):
        take(wrong)


def test_a_module_is_no_link(unchecked):
    with pytest.raises(TypeError, match="link is a Link, got LinkedPReLU"):
        normalized(LinkedPReLU(3))


def test_sizes_may_be_numpys(unchecked):
    layer = LCWLinear(np.int64(8), np.int32(4), rngs=nnx.Rngs(0))
    assert layer(jnp.ones((2, 8))).shape == (2, 4)
    conv = LCWConv(np.int64(3), 4, (np.int64(3), 3), rngs=nnx.Rngs(0))
    assert conv(jnp.ones((2, 6, 6, 3))).shape == (2, 6, 6, 4)
    assert BatchChannelNorm(np.int64(8), 2, rngs=nnx.Rngs(0))(jnp.ones((4, 8))).shape == (4, 8)


def test_sizes_that_are_no_integers_and_averages_out_of_range_are_refused(unchecked):
    with pytest.raises(TypeError, match=r"in_features is an integer or a tuple of integers, got 8.0"):
        LCWLinear(8.0, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"momentum is at least 0 and below 1, got 1.5"):
        BatchKalmanNorm(4, momentum=1.5)
