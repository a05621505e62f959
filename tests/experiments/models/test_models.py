"""The networks of the tables: counted by hand, and written out with jax.lax beside the modules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import allcnn, covariate_shift, depth, parameters, resnet50, width
from experiments.engine import data as data_lib
from experiments.engine.errors import UsageError
from experiments.engine.published import published
from experiments.engine.rows import Row
from experiments.engine.settings import NOT_PROTOCOL, Cell
from experiments.models.parameters_net import ParametersNet
from linked_jax.probe import observe
from linked_jax.signal_statistics import mean_square
from tests.cases import first_fast

TABLES = (width, depth, parameters, allcnn, resnet50, covariate_shift)


def fake(shape=(32, 32, 3), examples=6):
    """A set of random pixels with the shape of CIFAR-10."""
    key = jax.random.key(0)
    images = jax.random.randint(key, (examples, *shape), 0, 256).astype(jnp.uint8)
    labels = jnp.arange(examples) % 10
    return data_lib.Dataset("fake", 10, images, labels, images, labels, "f" * 16)


def first_cell(table, act, **changes) -> Cell:
    settings = table.check(dataclasses.replace(table.presets["paper"], act=(act,), **changes))
    return table.cells(settings)[0]


def build(module, act, **changes):
    table = module.TABLE
    settings = dataclasses.replace(table.presets["paper"], **changes)
    return table.build(settings, first_cell(table, act, **changes), fake(), 0)


def net(module, act, **changes):
    """The network with random numbers for parameters: nothing is compiled to draw them."""
    random = np.random.default_rng(0)
    graph, parameters, state = nnx.split(nnx.eval_shape(lambda: build(module, act, **changes)), nnx.Param, ...)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1], initial=1.0)
        return jnp.asarray(random.normal(size=leaf.shape) / np.sqrt(fan_in), leaf.dtype)

    def start(leaf):
        return (
            jax.random.key(0) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros(leaf.shape, leaf.dtype)
        )

    return nnx.merge(graph, jax.tree.map(draw, parameters), jax.tree.map(start, state))


def parameter_count(module, act, **changes):
    model = nnx.eval_shape(lambda: build(module, act, **changes))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def resnet_by_hand(arity):
    """Convs and their biases on 32x32: arity multiplies the inputs of the two convs behind an inner activation."""
    stages = ((16, 64, 3), (16, 64, 4), (32, 128, 6), (32, 128, 3))
    total, features = 3 * 3 * 3 * 8 + 8, 8
    for narrow, wide, blocks in stages:
        for block in range(blocks):
            total += features * narrow + narrow
            total += 9 * arity * narrow * narrow + narrow
            total += arity * narrow * wide + wide
            total += (features * wide + wide) if block == 0 else 0
            features = wide
    return total + 4 * 4 * 128 * 10 + 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "act", "count"),
    [
        (width, "relu", 27 * 50 + 50 + 32 * 32 * 50 * 10 + 10),
        (width, "lk_relu", 27 * 50 + 50 + 2 * 32 * 32 * 50 * 10 + 10),
        (parameters, "relu", 1_250_858),  # as Keras' cifar10_cnn prints it
        (parameters, "lk_relu", 896 + (18 * 32 * 32 + 32) + (18 * 32 * 64 + 64) + (18 * 64 * 64 + 64)
         + (2 * 2304 * 512 + 512) + (2 * 512 * 10 + 10)),
        (allcnn, "relu", 1_369_738),  # as published for All-CNN-C
        (resnet50, "relu", resnet_by_hand(1)),
        (resnet50, "lk_relu", resnet_by_hand(2)),
        (resnet50, "prelu", resnet_by_hand(1) + 4 * 4 * 128 + 8 + 3 * 64 + 4 * 64 + 6 * 128 + 2 * 128
         + 7 * 2 * 16 + 9 * 2 * 32),
    ],
)  # fmt: skip
def test_parameters_counted_by_hand(module, act, count):
    assert parameter_count(module, act) == count


def test_the_sqrt2_net_has_about_the_parameters_of_the_linked_one():
    linked, wider, single = (parameter_count(parameters, act) for act in ("lk_relu", "relu_sqrt2", "relu"))
    assert wider == pytest.approx(linked, rel=0.02)
    assert linked > 1.9 * single


def conv(x, layer, stride=1, padding="SAME"):
    out = jax.lax.conv_general_dilated(
        x, layer.kernel[...], (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return out + layer.bias[...]


def pool(x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def relu(z):
    return jnp.maximum(z, 0)


def crelu(z):
    return jnp.concatenate([jnp.maximum(z, 0), jnp.maximum(-z, 0)], axis=-1)


ACTS = {"relu": relu, "lk_relu": crelu}


def dense(h, layer):
    return h @ layer.kernel[...] + layer.bias[...]


def close(model, written_out, images, activations):
    logits = jax.jit(model)(images)
    np.testing.assert_allclose(logits, jax.jit(written_out)(images), rtol=2e-4, atol=2e-4)
    assert len(seen(model, images)) == activations


def seen(model, images):
    """The taps of a model's activations, their shapes alone."""
    graph, state = nnx.split(model)
    return jax.eval_shape(lambda s, x: observe(lambda s, x: nnx.merge(graph, s)(x), s, x)[1], state, images)


@pytest.fixture
def images():
    return data_lib.scale(fake().train_images[:2])


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
def test_table_1_written_out(act, images):
    model, f = net(width, act), ACTS[act]
    close(model, lambda x: dense(f(conv(x, model.conv).reshape(2, -1)), model.read_out.linear), images, 1)


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
def test_table_3_written_out(act, images):
    model, f = net(parameters, act), ACTS[act]

    def written_out(x):
        h = f(conv(x, model.conv1))
        h = pool(f(conv(h, model.conv2.conv, padding="VALID")))
        h = f(conv(h, model.conv3))
        h = pool(f(conv(h, model.conv4.conv, padding="VALID")))
        members = jnp.split(h, model.links[3].arity, axis=-1)
        h = jnp.concatenate([member.reshape(2, -1) for member in members], axis=-1)
        return dense(f(dense(h, model.dense5)), model.read_out.linear)

    close(model, written_out, images, 5)


def test_a_linked_net_starts_as_an_odd_function():
    """A mirror link and its start make z O of it, also behind a flatten and a pool of each member."""
    row = Row("lk_relu")
    model = ParametersNet((16, 16, 1), 10, row, "auto", rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16, 16, 1)), jnp.float32)
    logits = jax.jit(lambda x: model(x))(jnp.concatenate([x, -x]))
    np.testing.assert_allclose(logits[:3], -logits[3:], atol=1e-5)
    assert float(jnp.abs(logits).mean()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("act", first_fast(ACTS))
def test_table_4_written_out(act, images):
    model, f = net(allcnn, act, width=8), ACTS[act]
    layers = [layer.conv for layer in model.layers]

    def written_out(x):
        h = f(conv(x, layers[0]))
        h = f(conv(h, layers[1]))
        h = conv(h, layers[2], 2)  # no activation after the strided ones
        h = f(conv(h, layers[3]))
        h = f(conv(h, layers[4]))
        h = conv(h, layers[5], 2)
        h = f(conv(h, layers[6]))
        h = f(conv(h, layers[7]))
        return conv(h, layers[8]).mean(axis=(1, 2))

    close(model, written_out, images, 6)


@pytest.mark.slow
def test_dropout_is_there_in_training_only(images):
    images = images[:, ::4, ::4]
    model = net(allcnn, "relu", width=4)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, x):
        model = nnx.merge(graph, state)
        first, again = (model(x, train=True) for _ in range(2))
        return first, again, model(x)

    first, again, tested = run(state, images)
    assert not np.array_equal(first, again)
    assert not np.array_equal(first, tested)
    without = net(allcnn, "relu", width=4, dropout=0.0)
    np.testing.assert_array_equal(*jax.jit(lambda x: (nnx.clone(without)(x, train=True), without(x)))(images))


def resnet_written_out(model, images, inner, outer):
    """The usual way: between activations, with a ReLU after each addition."""
    h = outer(conv(images, model.stem))
    for number, block in enumerate(model.blocks):
        stride = 2 if number in (3, 7, 13) else 1
        branch = inner(conv(h, block.reduce.conv, stride))
        branch = inner(conv(branch, block.spatial.conv))
        branch = conv(branch, block.expand.conv)
        shortcut = conv(h, block.shortcut.conv, stride) if number in (0, 3, 7, 13) else h
        h = outer(branch + shortcut)
    return dense(h.reshape(len(h), -1), model.read_out.linear)


@pytest.mark.slow
@pytest.mark.parametrize("act", ["lk_relu", "relu"])
def test_tables_5_and_6_written_out(act, images):
    """Links inside the bottlenecks only: the sums keep their width, and their activation stays a plain relu."""
    model = net(resnet50, act)
    close(model, lambda x: resnet_written_out(model, x, ACTS[act], relu), images, 49)


@pytest.mark.slow
@pytest.mark.parametrize(("link", "linked"), [("inside", 32), pytest.param("everywhere", 49, marks=pytest.mark.slow)])
def test_where_the_links_of_a_resnet_are(link, linked):
    arities = [tap.arity for tap in seen(net(resnet50, "lk_relu", link=(link,)), jnp.ones((2, 32, 32, 3)))]
    assert arities.count(2) == linked
    assert arities.count(1) == 49 - linked


@pytest.mark.slow
def test_scaled_branches_keep_the_sum_of_a_residual_net_in_size():
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))

    @functools.partial(jax.jit, static_argnums=0)
    def signals(init):
        model = build(resnet50, "lk_relu", init=(init,), link=("everywhere",))
        return jnp.stack([mean_square(tap.stats) for tap in observe(lambda model, x: model(x), model, images)[1]])

    scaled, unscaled = signals("auto"), signals("looks_linear")
    assert scaled[-1] < 3 * scaled[0]
    assert unscaled[-1] > 10 * scaled[-1]


@pytest.mark.slow
@pytest.mark.parametrize("module", [width, depth, parameters, allcnn, covariate_shift])
def test_every_row_of_a_table_can_be_built(module):
    table = module.TABLE
    settings = table.check(dataclasses.replace(table.presets["quick"], act=("all",)))
    for cell in {cell["act"]: cell for cell in table.cells(settings)}.values():
        model = nnx.eval_shape(lambda cell=cell: table.build(settings, cell, fake((8, 8, 1)), 0))
        assert jax.tree.leaves(nnx.state(model, nnx.Param))


@pytest.mark.slow
@pytest.mark.exhaustive  # 16 nets of 50 layers
def test_every_row_of_tables_5_and_6_can_be_built():
    test_every_row_of_a_table_can_be_built(resnet50)


EPOCHS = {width: 50, depth: 200, parameters: 200, allcnn: 3000, resnet50: 2000, covariate_shift: 200}


@pytest.mark.parametrize("module", TABLES)
def test_presets(module):
    presets = module.TABLE.presets
    assert set(presets) == {"auto", "quick", "paper"}
    assert (presets["quick"].dataset, presets["paper"].dataset, presets["auto"].dataset) == (
        "digits",
        "cifar10",
        "auto",
    )
    paper = module.TABLE.check(presets["paper"])
    assert (paper.seed, paper.epochs, paper.preset) == (100, EPOCHS[module], "paper")
    assert paper.init in (("glorot",), ("glorot_normal",))
    rows = module.TABLE.check(dataclasses.replace(paper, act=("all",))).act
    assert len(rows) == {width: 8, depth: 13, parameters: 12, allcnn: 8, resnet50: 16, covariate_shift: 12}[module]
    assert set(NOT_PROTOCOL) <= {field.name for field in dataclasses.fields(paper)}


@pytest.mark.slow
@pytest.mark.parametrize("inputs", ["unit", "standardised", "raw", "offset", "x100", "x0.01"])
def test_the_inputs_of_covariate_shift(inputs):
    data = fake(examples=50)
    cell = {**first_cell(covariate_shift.TABLE, "relu"), "inputs": inputs}
    seen = np.asarray(data_lib.scale(data.train_images, covariate_shift.inputs(cell, data)), np.float64)
    pixels = np.asarray(data.train_images, np.float64)
    mean, deviation = seen.mean(axis=(0, 1, 2)), seen.std(axis=(0, 1, 2))
    if inputs == "unit":
        np.testing.assert_allclose(seen, pixels / 255, rtol=1e-6)
    elif inputs == "raw":
        np.testing.assert_allclose(seen, pixels, rtol=1e-5)
    else:
        scale = {"x100": 100.0, "x0.01": 0.01}.get(inputs, 1.0)
        np.testing.assert_allclose(deviation, scale, rtol=1e-4)
        np.testing.assert_allclose(mean, 10.0 if inputs == "offset" else 0.0, atol=1e-3 * scale)


def test_the_step_schedule_of_table_4():
    settings = dataclasses.replace(allcnn.TABLE.presets["paper"], decay=0.0)
    step, fixed = (allcnn.schedule(settings, {"schedule": kind}, 10) for kind in ("step", "fixed"))
    epochs = [0, 499, 500, 1999, 2000, 2349, 2350, 2749, 2750, 2999]
    factors = [1, 1, 0.75, 0.75, 0.5, 0.5, 0.1, 0.1, 0.05, 0.05]
    np.testing.assert_allclose([step(10 * epoch) for epoch in epochs], factors, rtol=1e-6)
    assert fixed(30_000) == 1.0


def test_a_resnet_has_no_wider_row():
    with pytest.raises(UsageError, match="--act relu_sqrt2: the ResNet has fixed widths"):
        build(resnet50, "relu_sqrt2")
    assert published("resnet50", {"act": "lk_relu", "link": "everywhere"}) == {"paper": None, "later": None}
    assert published("resnet50", {"act": "lk_relu", "link": "inside"}) == {"paper": 0.7656, "later": 0.9048}
