import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from linked_jax.activations import lk_relu, lk_swish
from linked_jax.initializers import embed_plain_kernel
from linked_jax.layers import LinkedConv, LinkedLinear
from linked_jax.linking import Link, linked
from linked_jax.revive import link_sequential, unlink
from tests.arrays import white
from tests.cases import first_fast

layouts = pytest.mark.parametrize("layout", first_fast(["blocked", "interleaved"]))


def flatten(x):
    return x.reshape(len(x), -1)


def network(activation, *, arity=1):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(2, 5, (3, 3), rngs=rngs), activation, nnx.BatchNorm(arity * 5, rngs=rngs), flatten,
        nnx.Linear(arity * 5 * 24, 7, rngs=rngs), activation, nnx.Linear(arity * 7, 3, rngs=rngs),
    )  # fmt: skip
    model.layers[2].mean[...] = jnp.arange(arity * 5.0)
    model.eval()
    return model


X = white(4, 4, 6, 2)


@pytest.mark.slow
@layouts
@pytest.mark.parametrize("members", [lk_relu.members, (jax.nn.relu, jnp.sin, jnp.cos)], ids=["mirror", "three"])
def test_it_undoes_the_linking_exactly(members, layout):
    model = network(jax.nn.relu)
    revived = link_sequential(model, Link(members, layout=layout))
    plain = unlink(revived)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(plain), nnx.state(model))
    assert [plain.layers[i] for i in (1, 5)] == [Link((jax.nn.relu,))] * 2
    np.testing.assert_array_equal(plain(X), model(X))
    assert (plain.layers[2].num_features, plain.layers[4].in_features) == (5, 120)
    assert revived.layers[4].in_features == 120 * len(members)  # as it was


@pytest.mark.slow
@layouts
def test_the_used_member_may_be_any_and_another_one_in_each_layer(layout):
    link = Link(lk_swish.members, layout=layout)
    model = network(link, arity=2)
    for i, positions, units, used in ((4, 24, 5, 1), (6, 1, 7, 0)):
        kernel = np.array(model.layers[i].kernel[...])
        blocks = kernel.reshape((positions, 2, units, -1) if layout == "blocked" else (positions, units, 2, -1))
        blocks[(slice(None), 1 - used) if layout == "blocked" else (slice(None), slice(None), 1 - used)] = 0
        model.layers[i].kernel[...] = jnp.asarray(kernel)
    plain = unlink(model)
    assert plain.layers[1].members == link.members[1:]
    assert plain.layers[5].members == link.members[:1]
    np.testing.assert_allclose(plain(X), model(X), atol=1e-6)


@pytest.mark.slow
def test_linked_layers_become_plain_ones():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(2, 4, (3, 3), rngs=rngs),
        LinkedConv(4, 5, (3, 3), strides=2, rngs=rngs),
        lambda x: x.mean((1, 2)),
        LinkedLinear(5, 3, rngs=rngs),
    )
    for layer, c in ((model.layers[1].conv, 4), (model.layers[3].linear, 5)):
        layer.kernel[...] = embed_plain_kernel(layer.kernel[...][..., :c, :], lk_relu)
    plain = unlink(model)
    assert [type(a) for a in plain.layers if isinstance(a, nnx.Module)] == [nnx.Conv, nnx.Conv, nnx.Linear]
    np.testing.assert_allclose(plain(X), model(X), atol=1e-6)


@pytest.mark.slow
def test_bad_input():
    model = link_sequential(network(jax.nn.relu), lk_relu)
    model.layers[6].kernel[...] = model.layers[6].kernel[...].at[9, 1].set(0.125)
    with pytest.raises(ValueError, match=r"layers\[6\] uses more than one member.*0\.125"):
        unlink(model)
    model.layers[6].kernel[...] = model.layers[6].kernel[...].at[9, 1].set(jnp.nan)
    with pytest.raises(ValueError, match="more than one member"):
        unlink(model)
    layers = [nnx.Linear(3, 4, rngs=nnx.Rngs(0)), LinkedLinear(4, 4, rngs=nnx.Rngs(0))]
    with pytest.raises(ValueError, match=r"layers\[1\] uses more than one member"):
        unlink(nnx.Sequential(*layers))
    with pytest.raises(ValueError, match="no link of two or more members"):
        unlink(network(jax.nn.relu))
    with pytest.raises(ValueError, match=r"layers\[1\].*no nnx.Linear or nnx.Conv after it"):
        unlink(nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), linked(jax.nn.relu)))
