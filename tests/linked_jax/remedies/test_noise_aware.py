import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from linked_jax import LinkedConv
from linked_jax.remedies import noise_aware
from linked_jax.remedies.lcw import LCWLinear
from linked_jax.remedies.noise_aware import perturb, recalibrate
from tests.cases import first_fast


class Net(nnx.Module):
    """Two batch norms, dropout, and kernels of two ranks."""

    def __init__(self, seed=0, dtype=jnp.float32):
        rngs = nnx.Rngs(seed)
        self.conv = nnx.Conv(2, 3, (3, 3), param_dtype=dtype, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(features, param_dtype=dtype, rngs=rngs) for features in (3, 4)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(3, 4, param_dtype=dtype, rngs=rngs)
        for norm in self.norms:
            norm.scale[...], norm.bias[...] = norm.scale[...] * 1.5, norm.bias[...] + 0.25
            norm.mean[...], norm.var[...] = norm.mean[...] + 3, norm.var[...] * 7

    def __call__(self, images):
        x = self.dropout(nnx.relu(self.norms[0](self.conv(images)))).mean((1, 2))
        return self.norms[1](self.dense(x))


def images(*lead, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*lead, 4, 4, 2)), jnp.float32)


def pure(model):
    return nnx.to_pure_dict(nnx.state(model))


def identical(left, right):
    def leaf(a, b):
        a, b = (
            jax.random.key_data(each) if jnp.issubdtype(each.dtype, jax.dtypes.prng_key) else each for each in (a, b)
        )
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(leaf, left, right)


def statistics(model):
    return [(norm.mean[...], norm.var[...]) for norm in model.norms]


def close(actual, desired, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, desired)


def moments_in_numpy(model, batch):
    """The moments at both batch norms, the first normalised by the batch, written out without a layer."""
    kernel, bias = np.asarray(model.conv.kernel[...], np.float64), np.asarray(model.conv.bias[...])
    padded = np.pad(np.asarray(batch, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    z = np.einsum("nijcab,abco->nijo", windows, kernel) + bias
    first = z.mean((0, 1, 2)), z.var((0, 1, 2))
    gamma, beta = (np.asarray(each[...]) for each in (model.norms[0].scale, model.norms[0].bias))
    x = np.maximum(gamma * (z - first[0]) / np.sqrt(first[1] + 1e-5) + beta, 0).mean((1, 2))
    u = x @ np.asarray(model.dense.kernel[...]) + np.asarray(model.dense.bias[...])
    return [first, (u.mean(0), u.var(0))]


# --- perturb --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("relative_to", ["max", "std"])
def test_noise_has_the_deviation_that_was_asked_for(relative_to):
    model = nnx.Linear(300, 200, rngs=nnx.Rngs(0))
    w = np.asarray(model.kernel[...])
    noisy = perturb(nnx.state(model), jax.random.key(1), noise=0.2, relative_to=relative_to)
    change = np.asarray(noisy["kernel"][...]) - w
    sigma = 0.2 * (np.abs(w).max() if relative_to == "max" else w.std())
    np.testing.assert_allclose(change.std(), sigma, rtol=0.02)
    assert abs(change.mean()) < 4 * sigma / np.sqrt(w.size)
    assert abs(np.corrcoef(change.ravel(), w.ravel())[0, 1]) < 4 / np.sqrt(w.size)


@pytest.mark.slow
@hypothesis.given(st.floats(0.01, 10))
@hypothesis.settings(max_examples=5)
def test_noise_is_relative_to_the_weights(factor):
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    state, key = nnx.state(model), jax.random.key(0)
    scaled = jax.tree.map(lambda w: factor * w, state)
    for relative_to in ("max", "std"):
        of_scaled = perturb(scaled, key, noise=0.3, relative_to=relative_to)["kernel"][...]
        close(of_scaled, factor * perturb(state, key, noise=0.3, relative_to=relative_to)["kernel"][...])


@pytest.mark.slow
def test_only_kernels_are_under_noise_each_with_its_own():
    model = Net()
    before, after = pure(model), nnx.to_pure_dict(perturb(nnx.state(model), jax.random.key(0), noise=0.1))
    for name in ("conv", "dense"):
        assert (before[name].pop("kernel") != after[name].pop("kernel")).all()
    identical(before, after)
    twins = nnx.List([nnx.Linear(3, 3, rngs=nnx.Rngs(0)) for _ in range(2)])
    noisy = perturb(nnx.state(twins), jax.random.key(0), noise=0.1)
    assert (noisy[0]["kernel"][...] != noisy[1]["kernel"][...]).all()


@pytest.mark.slow
def test_a_filter_says_which_parameters_are_under_noise():
    model = LinkedConv(2, 3, (3, 3), rngs=nnx.Rngs(0))
    model.conv.bias[...] += 1
    noisy = perturb(nnx.state(model), jax.random.key(0), noise=0.1, which=nnx.PathContains("bias"))
    identical(noisy["conv"]["kernel"][...], model.conv.kernel[...])
    assert (noisy["conv"]["bias"][...] != model.conv.bias[...]).all()
    assert (perturb(nnx.state(model), jax.random.key(0), noise=0.1)["conv"]["kernel"][...] != 0).all()


@pytest.mark.slow
def test_no_noise_changes_nothing_and_bfloat16_stays():
    model = Net(dtype=jnp.bfloat16)
    identical(nnx.to_pure_dict(perturb(nnx.state(model), jax.random.key(0), noise=0.0)), pure(model))
    noisy = perturb(nnx.state(model), jax.random.key(0), noise=0.1)
    assert noisy["conv"]["kernel"].dtype == jnp.bfloat16
    assert (noisy["conv"]["kernel"][...] != model.conv.kernel[...]).mean() > 0.9


@pytest.mark.slow
def test_perturb_under_jit_and_vmap_equals_eager():
    state, keys = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0))), jax.random.split(jax.random.key(0), 3)
    noisy = jax.jit(jax.vmap(lambda key: perturb(state, key, noise=0.1)["kernel"][...]))(keys)
    close(noisy, jnp.stack([perturb(state, key, noise=0.1)["kernel"][...] for key in keys]), 1e-6)


# --- recalibrate ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_statistics_are_the_average_of_those_of_the_batches():
    """Against NumPy; dropout is off although the model was left in training mode."""
    model, batches = Net(), images(3, 5)
    calibrated = recalibrate(model, batches)
    each = [moments_in_numpy(model, batch) for batch in batches]
    close(statistics(calibrated), jax.tree.map(lambda *values: np.mean(values, 0), *each), 1e-4)


@pytest.mark.slow
def test_under_noise_they_are_the_average_over_the_noisy_models(monkeypatch):
    drawn = []

    def recorded(*given, draw=noise_aware._perturb):
        state = draw(*given)
        jax.debug.callback(
            lambda kernels: drawn.append(kernels), [state[name]["kernel"][...] for name in ("conv", "dense")]
        )
        return state

    monkeypatch.setattr(noise_aware, "_perturb", recorded)
    model, batches, noisy = Net(), images(3, 5), Net()
    calibrated = recalibrate(model, batches, noise=0.3, key=jax.random.key(0), forward=lambda model, x: model(x))
    jax.effects_barrier()
    each = []
    for kernels, batch in zip(drawn, batches, strict=True):
        noisy.conv.kernel[...], noisy.dense.kernel[...] = kernels
        each.append(moments_in_numpy(noisy, batch))
    close(statistics(calibrated), jax.tree.map(lambda *values: np.mean(values, 0), *each), 1e-4)
    assert all((a[0] != b[0]).all() and (a[1] != b[1]).all() for a, b in itertools.combinations(drawn, 2))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_all_but_the_running_statistics_is_bit_for_bit_the_same(mode):
    model = Net()
    getattr(model, mode)()
    before, graph = pure(model), nnx.graphdef(model)
    calibrated = recalibrate(model, images(2, 3), noise=0.5, key=jax.random.key(0))
    identical(pure(model), before)
    assert nnx.graphdef(model) == graph == nnx.graphdef(calibrated)  # modes and momenta are there
    after = pure(calibrated)
    for index in range(2):
        for name in ("mean", "var"):
            assert (before["norms"][index].pop(name) != after["norms"][index].pop(name)).all()
    identical(after, before)
    calibrated.norms[0].mean[...] = jnp.zeros(3)
    assert (model.norms[0].mean[...] == 3).all()


@pytest.mark.slow
def test_zero_noise_is_plain_recalibration_whatever_the_key():
    plain = recalibrate(Net(), images(2, 3))
    identical(pure(recalibrate(Net(), images(2, 3), noise=0.0, key=jax.random.key(7))), pure(plain))
    identical(pure(recalibrate(plain, images(2, 3))), pure(plain))  # and it can be done again


@pytest.mark.slow
def test_the_key_decides_the_noise():
    one, same, other = (
        statistics(recalibrate(Net(), images(2, 3), noise=0.2, key=jax.random.key(seed))) for seed in (0, 0, 1)
    )
    identical(one, same)
    assert (one[0][0] != other[0][0]).all()


@pytest.mark.slow
def test_statistics_that_are_not_finite_are_repaired():
    model = Net()
    model.norms[0].mean[...] = jnp.full(3, jnp.nan)
    model.norms[0].var[...] = jnp.full(3, jnp.inf)
    close(statistics(recalibrate(model, images(2, 3))), statistics(recalibrate(Net(), images(2, 3))), 0)


@pytest.mark.slow
def test_forward_is_traced_once_for_batches_of_one_shape_and_all_noises():
    traces = []

    def forward(model, batch):
        traces.append(batch["image"].shape)
        return model(batch["image"])

    batches = [{"image": batch} for batch in images(4, 3)]
    for noise in (0.1, 0.2):
        recalibrate(Net(), iter(batches), noise=noise, key=jax.random.key(0), forward=forward)
    assert len(traces) == 1


def test_a_batch_of_one_example_is_enough_where_each_norm_sees_several_values():
    norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    found, x = recalibrate(norm, images(1, 1)), images(1)
    close((found.mean[...], found.var[...]), (x.mean((0, 1, 2)), x.var((0, 1, 2))), 1e-4)
    with pytest.raises(ValueError, match="variance 0 in every channel of a batch norm"):
        recalibrate(Net(), images(1, 1))  # its second norm sees means of images


class WithMode(nnx.Module):
    """The mode is an argument of the call, and one norm is never run."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norms = nnx.List([nnx.BatchNorm(2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)])
        self.norms[1].var[...] = jnp.full(2, 5.0)

    def __call__(self, images, train=False):
        return self.norms[0](images, use_running_average=not train)


def test_forward_sets_the_mode_and_a_norm_that_is_not_run_keeps_its_statistics():
    model = WithMode()
    with pytest.raises(ValueError, match="ran no batch norm by batch statistics"):
        recalibrate(model, images(2, 3))
    calibrated = recalibrate(model, images(1, 3), forward=lambda model, x: model(x, train=True))
    x = np.asarray(images(1, 3))[0]
    close(statistics(calibrated), [(x.mean((0, 1, 2)), x.var((0, 1, 2))), (np.zeros(2), np.full(2, 5.0))])


@pytest.mark.slow
def test_norms_of_a_stack_of_layers_are_found():
    @nnx.vmap
    def stack(rngs):
        return nnx.BatchNorm(2, rngs=rngs)

    def forward(norms, x):
        return nnx.scan(lambda norm, x: norm(x) + x, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(norms, x)

    norms, x = stack(nnx.Rngs(0).split(3)), images(1, 5)[0]
    calibrated, expected = recalibrate(norms, [x], forward=forward), []
    for _ in range(3):
        expected.append(x.mean((0, 1, 2)))
        x = x + (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)
    close(calibrated.mean[...], jnp.stack(expected), 1e-4)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    first_fast(
        [
            ({"noise": -0.1, "key": jax.random.key(0)}, "noise is 0 or above, got -0.1"),
            ({"noise": float("nan"), "key": jax.random.key(0)}, "noise is 0 or above, got nan"),
            ({"noise": 0.1}, "noise needs a key"),
            ({"relative_to": "mean"}, "relative_to is one of"),
            ({"noise": 0.1, "key": jax.random.key(0), "which": nnx.PathContains("w")}, "no parameter to put noise on"),
        ]
    ),
)
def test_bad_options_are_refused(options, match, unchecked):
    with pytest.raises(ValueError, match=match):
        recalibrate(Net(), images(2, 3), **options)


@pytest.mark.parametrize(("noise", "relative_to"), first_fast([(-1.0, "max"), (0.1, "mean")]))
def test_perturb_refuses_the_same(noise, relative_to, unchecked):
    with pytest.raises(ValueError, match=r"noise is|relative_to is"):
        perturb(nnx.state(Net()), jax.random.key(0), noise=noise, relative_to=relative_to)


def test_no_batches_and_no_batch_norm_are_refused():
    with pytest.raises(ValueError, match="at least one batch, got none"):
        recalibrate(Net(), [])
    with pytest.raises(ValueError, match="got Linear without any"):
        recalibrate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), images(2, 3))


def test_one_array_in_the_place_of_a_list_of_batches_is_refused():
    net = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32))
    with pytest.raises(ValueError, match=r"variance 0 in every channel of a batch norm, .*; pass a list of batches"):
        recalibrate(net, x)
    assert (recalibrate(net, [x]).layers[1].var[...] > 0).all()


def test_noise_on_a_kernel_that_is_computed_is_refused_until_it_is_folded():
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(LCWLinear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    x = [jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32))]
    with pytest.raises(ValueError, match=r"layers.0, a LCWLinear, computes its own; put layer.fold\(\) in its place"):
        recalibrate(net, x, noise=0.5, key=jax.random.key(0))
    folded = nnx.Sequential(net.layers[0].fold(), net.layers[1])
    noisy = recalibrate(folded, x, noise=0.5, key=jax.random.key(0)).layers[1].var[...]
    assert (noisy != recalibrate(net, x).layers[1].var[...]).all()
