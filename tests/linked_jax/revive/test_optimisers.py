"""What becomes of the state of every transformation of Optax when a net is linked: the table of docs/optimisers.md."""

import dataclasses
import inspect
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from benchmarks import warm_up
from experiments.engine.tables import markdown
from linked_jax.activations import lk_relu
from linked_jax.revive import Pair, link_params, link_params_opt_state
from tests.cases import first_fast

pytestmark = pytest.mark.optimised

PAGE = Path(__file__).parents[3] / "docs" / "optimisers.md"
RATE, UNITS = 1e-2, 8


@dataclasses.dataclass(frozen=True)
class Case:
    """A transformation, as one takes it to train.

    Attributes:
      tx: makes it.
      state: what becomes of its state. "kept": of kept weights kept, of new ones as in tx.init; "none": there is none,
        or none of weights; "anew": a record of it is that of tx.init, all of it; "refused".
      says: why, for the page.
      couples: the update of a weight depends on others, so on new ones too: kept ones do not move just as before.
      still: nothing moves, linked or not.
    """

    tx: Callable[[], optax.GradientTransformation]
    state: str = "kept"
    says: str = ""
    couples: bool = False
    still: bool = False


def down(tx):
    return optax.chain(tx, optax.scale(-RATE))


def sgd_after(tx):
    return optax.chain(tx, optax.sgd(RATE))


def matrices(params):
    return jax.tree.map(lambda a: a.ndim > 1, params)


def rows_first(params):
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(0, 1), params)


def two_rules():
    return {True: optax.adam(RATE), False: optax.sgd(RATE, momentum=0.9)}


NORM = "a norm over many weights"
WHOLE = "one rate for all weights"
FACTORED = "factored moments are of many weights"
GALORE = "projected moments are of many weights"
OPTAX = {
    "adam": Case(lambda: optax.adam(RATE)),
    "MultiSteps": Case(lambda: optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation()),
    "adabelief": Case(lambda: optax.adabelief(RATE)),
    "adadelta": Case(lambda: optax.adadelta(RATE)),
    "adafactor": Case(lambda: optax.adafactor(RATE, min_dim_size_to_factor=4), "anew", FACTORED),
    "adagrad": Case(lambda: optax.adagrad(RATE)),
    "adamax": Case(lambda: optax.adamax(RATE)),
    "adamaxw": Case(lambda: optax.adamaxw(RATE)),
    "adamw": Case(lambda: optax.adamw(RATE)),
    "adan": Case(lambda: optax.adan(RATE)),
    "adaptive_grad_clip": Case(lambda: sgd_after(optax.adaptive_grad_clip(0.1)), "none", NORM, True),
    "add_decayed_weights": Case(lambda: sgd_after(optax.add_decayed_weights(0.1)), "none"),
    "add_noise": Case(lambda: sgd_after(optax.add_noise(0.1, 0.5, 0)), "none"),
    "amsgrad": Case(lambda: optax.amsgrad(RATE)),
    "apply_every": Case(lambda: sgd_after(optax.apply_every(2))),
    "apply_if_finite": Case(lambda: optax.apply_if_finite(optax.adam(RATE), 3)),
    "centralize": Case(lambda: sgd_after(optax.centralize()), "none"),
    "chain": Case(lambda: optax.chain(optax.trace(0.9), optax.scale(-RATE))),
    "clip": Case(lambda: down(optax.clip(0.1)), "none"),
    "clip_by_block_rms": Case(lambda: down(optax.clip_by_block_rms(0.01)), "none", NORM, True),
    "clip_by_global_norm": Case(lambda: down(optax.clip_by_global_norm(0.1)), "none", NORM, True),
    "conditionally_mask": Case(lambda: optax.conditionally_mask(optax.adam(RATE), lambda step: step % 2 == 0)),
    "conditionally_transform": Case(lambda: down(optax.conditionally_transform(optax.trace(0.5), lambda t: t % 2 > 0))),
    "ema": Case(lambda: down(optax.ema(0.9))),
    "flatten": Case(lambda: optax.flatten(optax.adam(RATE)), "anew", "all weights are one vector"),
    "freeze": Case(lambda: optax.chain(optax.freeze(True), optax.sgd(RATE)), "none", still=True),
    "fromage": Case(lambda: optax.fromage(RATE), "none", NORM, True),
    "identity": Case(lambda: down(optax.identity()), "none"),
    "inject_hyperparams": Case(lambda: optax.inject_hyperparams(optax.adam)(learning_rate=RATE)),
    "inject_stateful_hyperparams": Case(lambda: optax.inject_stateful_hyperparams(optax.adam)(learning_rate=RATE)),
    "keep_params_nonnegative": Case(lambda: optax.chain(optax.sgd(RATE), optax.keep_params_nonnegative()), "none"),
    "lamb": Case(lambda: optax.lamb(RATE), "kept", NORM, True),
    "lars": Case(lambda: optax.lars(RATE), "kept", NORM, True),
    "lbfgs": Case(lambda: optax.lbfgs(), "anew", "its memory is of inner products over all weights"),
    "lion": Case(lambda: optax.lion(RATE)),
    "lookahead": Case(lambda: optax.lookahead(optax.adam(RATE), 5, 0.5), "anew", "of LookaheadParams, by a pair each"),
    "masked": Case(lambda: down(optax.masked(optax.scale_by_adam(), matrices))),
    "measure_with_ema": Case(
        lambda: sgd_after(optax.monitor({"norm": optax.measure_with_ema(optax.tree.norm, 0.9)})),
        "refused",
        "as monitor",
    ),
    "monitor": Case(
        lambda: optax.chain(optax.monitor({"norm": optax.tree.norm}), optax.adam(RATE)), "refused",
        "after an update it has arrays that tx.init does not give",
    ),
    "multi_transform": Case(lambda: optax.multi_transform(two_rules(), matrices)),
    "nadam": Case(lambda: optax.nadam(RATE)),
    "nadamw": Case(lambda: optax.nadamw(RATE)),
    "named_chain": Case(lambda: optax.named_chain(("adam", optax.adam(RATE)))),
    "noisy_sgd": Case(lambda: optax.noisy_sgd(RATE, key=0), "none"),
    "normalize_by_update_norm": Case(lambda: down(optax.normalize_by_update_norm()), "none", NORM, True),
    "novograd": Case(lambda: optax.novograd(RATE), "kept", NORM, True),
    "optimistic_adam": Case(lambda: optax.optimistic_adam(RATE)),
    "optimistic_adam_v2": Case(lambda: optax.optimistic_adam_v2(RATE)),
    "optimistic_gradient_descent": Case(lambda: optax.optimistic_gradient_descent(RATE)),
    "partition": Case(lambda: optax.partition(two_rules(), matrices)),
    "polyak_sgd": Case(lambda: optax.polyak_sgd(1.0), "none", WHOLE, True),
    "radam": Case(lambda: optax.radam(RATE)),
    "rmsprop": Case(lambda: optax.rmsprop(RATE, centered=True, momentum=0.9, initial_scale=0.1)),
    "rprop": Case(lambda: optax.rprop(RATE)),
    "scale": Case(lambda: optax.scale(-RATE), "none"),
    "scale_by_adadelta": Case(lambda: down(optax.scale_by_adadelta())),
    "scale_by_adam": Case(lambda: down(optax.scale_by_adam())),
    "scale_by_adamax": Case(lambda: down(optax.scale_by_adamax())),
    "scale_by_adan": Case(lambda: down(optax.scale_by_adan())),
    "scale_by_amsgrad": Case(lambda: down(optax.scale_by_amsgrad())),
    "scale_by_backtracking_linesearch": Case(
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15, store_grad=True)),
        "kept", WHOLE, True,
    ),
    "scale_by_belief": Case(lambda: down(optax.scale_by_belief())),
    "scale_by_distance_over_gradients": Case(
        lambda: optax.chain(optax.scale_by_distance_over_gradients(), optax.scale(-1.0)), "kept", WHOLE, True
    ),
    "scale_by_factored_rms": Case(
        lambda: down(optax.scale_by_factored_rms(min_dim_size_to_factor=4)), "anew", FACTORED, True
    ),
    "scale_by_lbfgs": Case(lambda: down(optax.scale_by_lbfgs()), "anew", "as lbfgs"),
    "scale_by_learning_rate": Case(lambda: optax.scale_by_learning_rate(RATE), "none"),
    "scale_by_lion": Case(lambda: down(optax.scale_by_lion())),
    "scale_by_novograd": Case(lambda: down(optax.scale_by_novograd()), "kept", NORM, True),
    "scale_by_optimistic_gradient": Case(lambda: down(optax.scale_by_optimistic_gradient())),
    "scale_by_param_block_norm": Case(lambda: down(optax.scale_by_param_block_norm()), "none"),
    "scale_by_param_block_rms": Case(lambda: down(optax.scale_by_param_block_rms()), "none", NORM, True),
    "scale_by_polyak": Case(lambda: optax.chain(optax.sgd(1.0), optax.scale_by_polyak(1.0)), "none", WHOLE, True),
    "scale_by_radam": Case(lambda: down(optax.scale_by_radam())),
    "scale_by_rms": Case(lambda: down(optax.scale_by_rms())),
    "scale_by_rprop": Case(lambda: optax.chain(optax.scale_by_rprop(RATE), optax.scale(-1.0))),
    "scale_by_rss": Case(lambda: down(optax.scale_by_rss())),
    "scale_by_schedule": Case(lambda: down(optax.scale_by_schedule(optax.linear_schedule(1, 0, 100))), "none"),
    "scale_by_sign": Case(lambda: down(optax.scale_by_sign()), "none"),
    "scale_by_sm3": Case(lambda: down(optax.scale_by_sm3()), "anew", FACTORED),
    "scale_by_stddev": Case(lambda: down(optax.scale_by_stddev())),
    "scale_by_trust_ratio": Case(lambda: down(optax.scale_by_trust_ratio()), "none", NORM, True),
    "scale_by_yogi": Case(lambda: down(optax.scale_by_yogi())),
    "scale_by_zoom_linesearch": Case(
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(10)), "kept", WHOLE, True
    ),
    "selective_transform": Case(
        lambda: optax.selective_transform(optax.adam(RATE), freeze_mask=jax.tree.map(lambda a: a.ndim < 2, net()))
    ),
    "set_to_zero": Case(lambda: optax.set_to_zero(), "none", still=True),
    "sgd": Case(lambda: optax.sgd(RATE, momentum=0.9, nesterov=True)),
    "sign_sgd": Case(lambda: optax.sign_sgd(RATE), "none"),
    "signum": Case(lambda: optax.signum(RATE)),
    "sm3": Case(lambda: optax.sm3(RATE), "anew", FACTORED),
    "snapshot": Case(lambda: optax.chain(optax.snapshot("updates", lambda u: u), optax.adam(RATE))),
    "stateless": Case(lambda: optax.stateless(lambda u, _: jax.tree.map(lambda a: -RATE * a, u)), "none"),
    "stateless_with_tree_map": Case(lambda: optax.stateless_with_tree_map(lambda u, _: -RATE * u), "none"),
    "trace": Case(lambda: down(optax.trace(0.9))),
    "with_extra_args_support": Case(lambda: optax.with_extra_args_support(optax.adam(RATE))),
    "yogi": Case(lambda: optax.yogi(RATE)),
    "zero_nans": Case(lambda: optax.chain(optax.zero_nans(), optax.adam(RATE))),
}  # fmt: skip
ACPROP = "divides by the moment of the step before, 0 for a new weight"
CONTRIB = {
    "acprop": Case(lambda: contrib.acprop(RATE), "refused", ACPROP),
    "ademamix": Case(lambda: contrib.ademamix(RATE)),
    "adopt": Case(lambda: contrib.adopt(RATE)),
    "cocob": Case(lambda: contrib.cocob()),
    "dadapt_adamw": Case(lambda: contrib.dadapt_adamw(RATE), "kept", WHOLE, True),
    "differentially_private_aggregate": Case(
        lambda: down(contrib.differentially_private_aggregate(1.0, 0.1, key=jax.random.key(0))), "none", NORM, True
    ),
    "dog": Case(lambda: contrib.dog(1.0), "kept", WHOLE, True),
    "dowg": Case(lambda: contrib.dowg(1.0), "kept", WHOLE, True),
    "dpsgd": Case(lambda: contrib.dpsgd(RATE, 1.0, 0.1, 0, momentum=0.9), "kept", NORM, True),
    "galore": Case(lambda: contrib.galore(RATE, rank=2), "anew", GALORE),
    "hutchinson_estimator_diag_hessian": Case(
        lambda: optax.chain(contrib.hutchinson_estimator_diag_hessian(jax.random.key(0)), optax.scale(-1e-4)),
        "none", "noise", True,
    ),
    "madgrad": Case(lambda: contrib.madgrad(RATE)),
    "mechanize": Case(lambda: contrib.mechanize(optax.adam(RATE)), "kept", WHOLE, True),
    "momo": Case(lambda: contrib.momo(), "kept", WHOLE, True),
    "momo_adam": Case(lambda: contrib.momo_adam(1.0), "kept", WHOLE, True),
    "muon": Case(lambda: contrib.muon(RATE), "kept", "an orthogonal update of the kernel", True),
    "normalize": Case(lambda: down(contrib.normalize()), "none", NORM, True),
    "prodigy": Case(lambda: contrib.prodigy(RATE), "kept", WHOLE, True),
    "reduce_on_plateau": Case(lambda: optax.chain(optax.adam(RATE), contrib.reduce_on_plateau())),
    "sam": Case(lambda: contrib.sam(optax.adam(RATE), optax.sgd(0.05))),
    "scale_by_acprop": Case(lambda: down(contrib.scale_by_acprop()), "refused", ACPROP),
    "scale_by_ademamix": Case(lambda: down(contrib.scale_by_ademamix())),
    "scale_by_adopt": Case(lambda: down(contrib.scale_by_adopt())),
    "scale_by_cocob": Case(lambda: contrib.scale_by_cocob()),
    "scale_by_galore": Case(lambda: down(contrib.scale_by_galore(2)), "anew", GALORE),
    "scale_by_madgrad": Case(lambda: contrib.scale_by_madgrad(RATE)),
    "scale_by_muon": Case(
        lambda: down(optax.masked(contrib.scale_by_muon(weight_dimension_numbers=rows_first), matrices)),
        "kept", "as muon", True,
    ),
    "scale_by_simplified_ademamix": Case(
        lambda: optax.chain(contrib.scale_by_simplified_ademamix(), optax.scale(-RATE / 10))
    ),
    "schedule_free": Case(lambda: contrib.schedule_free(optax.sgd(RATE), RATE)),
    "schedule_free_adamw": Case(lambda: contrib.schedule_free_adamw(RATE)),
    "schedule_free_sgd": Case(lambda: contrib.schedule_free_sgd(RATE)),
    "simplified_ademamix": Case(lambda: contrib.simplified_ademamix(RATE / 10)),
    "sophia": Case(lambda: contrib.sophia(RATE), "kept", "noise", True),
    "split_real_and_imaginary": Case(lambda: contrib.split_real_and_imaginary(optax.adam(RATE))),
}  # fmt: skip
CASES = OPTAX | {f"contrib.{name}": case for name, case in CONTRIB.items()}
NO_TRANSFORMATIONS = {
    "bias_correction", "exponential_decay", "join_schedules", "matrix_inverse_pth_root", "microbatch",
    "schedule_free_eval_params", "sigmoid_binary_cross_entropy", "update_infinity_moment", "update_moment",
    "update_moment_per_elem_norm", "value_and_grad_from_state",
}  # fmt: skip


def transformations(namespace):
    """The functions that say that they give a transformation, and those that do not say what they give."""
    found = set()
    for name, f in vars(namespace).items():
        if callable(f) and name[0] != "_" and name.islower() and re.fullmatch(r"scale_by_\w+|\w+(?<!_schedule)", name):
            gives = inspect.signature(f).return_annotation
            says = getattr(gives, "__name__", str(gives))
            if gives is inspect.Signature.empty or says == "Callable" or "GradientTransformation" in says:
                found.add(name)
    return found - NO_TRANSFORMATIONS


def test_the_table_knows_every_transformation_of_optax():
    assert transformations(optax) | {"MultiSteps"} == set(OPTAX)
    assert transformations(contrib) == set(CONTRIB)


def net():
    rng = np.random.default_rng(0)
    kernel = lambda n, m: jnp.asarray(rng.normal(size=(n, m)) / n**0.5, jnp.float32)  # noqa: E731
    return {
        "in": {"kernel": kernel(6, UNITS), "bias": jnp.full(UNITS, 0.1)},
        "out": {"kernel": kernel(UNITS, 5), "bias": jnp.full(5, 0.1)},
    }


X = jnp.asarray(np.random.default_rng(1).normal(size=(16, 6)), jnp.float32)
Y = jnp.abs(jnp.tanh(X.sum(1, keepdims=True) * jnp.arange(1, 6) / 5))
PAIRS = [Pair("in", "out")]


def train(params, tx, state, steps, act):
    """The parameters and the state after some updates; all losses, and the first update."""
    tx, losses, first = optax.with_extra_args_support(tx), [], None

    def loss(params, x=X, y=Y):
        params = getattr(params, "fast", params)
        h = act(x @ params["in"]["kernel"] + params["in"]["bias"])
        return jnp.square(h @ params["out"]["kernel"] + params["out"]["bias"] - y).mean()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(getattr(params, "fast", params))
        for given in ({"value": value, "grad": grads, "value_fn": loss}, {"obj_fn": loss}, {}):
            try:
                return value, *tx.update(grads, state, params, **given)
            except (TypeError, ValueError):
                continue
        each = jax.vmap(jax.grad(loss), (None, 0, 0))(params, X[:, None], Y[:, None])  # privacy: one an example
        return value, *tx.update(each, state, params)

    for _ in range(steps):
        value, updates, state = step(params, state)
        first = updates if first is None else first
        losses.append(float(value))
        params = optax.apply_updates(params, updates)
    return params, state, losses, first


def rows(tree):
    return getattr(tree, "fast", tree)["out"]["kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast(CASES))
def test_twenty_updates_after_linking(name):
    case = CASES[name]
    with warnings.catch_warnings(action="ignore"):  # some are deprecated
        tx, params, pairs = case.tx(), net(), PAIRS
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
        pairs = [Pair(f"{which}/in", f"{which}/out") for which in ("fast", "slow")]
    params, state, *_ = train(params, tx, tx.init(params), 20, jax.nn.relu)
    if case.state == "refused":
        with pytest.raises(
            ValueError, match=r"start the optimiser anew \(tx.init\)|could not be tried|no state of tx.init"
        ):
            link_params_opt_state(state, params, pairs, lk_relu, tx=tx)
        return
    linked, new_state = link_params(params, pairs, lk_relu), link_params_opt_state(state, params, pairs, lk_relu, tx=tx)
    assert outcome(state, new_state, tx.init(linked)) == case.state
    after, _, losses, first = train(linked, tx, new_state, 20, lk_relu)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((after, first)))
    assert losses[-1] <= 1.3 * losses[0]
    assert jnp.any(rows(after)[UNITS:] != 0) == (not case.still)
    would = rows(train(params, tx, state, 1, jax.nn.relu)[3])
    change = float(jnp.abs(rows(first)[:UNITS] - would).max() / (jnp.abs(would).max() + 1e-30))
    assert change < 1e-5 or case.couples or case.state == "anew", change


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        optax.cosine_decay_schedule(1.0, 50),
        optax.piecewise_constant_schedule(1e-6, {70: 1e6}),
        optax.constant_schedule(0.0),
    ],
)
def test_a_rate_that_changes_in_the_trial_does_not_matter(schedule):
    tx, params = optax.adam(schedule), net()
    new_state = link_params_opt_state(tx.init(params), params, PAIRS, lk_relu, tx=tx)
    assert rows(new_state[0].mu).shape == (2 * UNITS, 5)


def outcome(old, new, fresh):
    """What became of a state, leaf by leaf, told by the values alone."""
    kinds = set()
    for a, b, c in zip(*map(jax.tree.leaves, (old, new, fresh)), strict=True):
        a, b, c = (np.asarray(jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v)
                   for v in map(jnp.asarray, (a, b, c)))  # fmt: skip
        if a.shape == (UNITS, 5):
            kept = np.array_equal(b[:UNITS], a) and np.array_equal(b[UNITS:], c[UNITS:])
            kinds.add("kept" if kept else "anew" if np.array_equal(b, c) else "wrong")
        elif a.shape != b.shape or not np.array_equal(a, b, equal_nan=True):
            kinds.add("anew" if np.array_equal(b, c) else "wrong")
    return next((kind for kind in ("wrong", "anew", "kept") if kind in kinds), "none")


def table():
    says = {"none": "none of weights", "kept": "kept", "anew": "anew", "refused": "refused"}
    lines = ["| transformation | its state | kept weights move as before | why |", "|---|---|---|---|"]
    for name, case in sorted(CASES.items(), key=lambda item: item[0].lower()):
        moves = {"refused": "", "anew": "no"}.get(case.state, "no" if case.couples else "yes")
        lines.append(f"| `{name}` | {says[case.state]} | {moves} | {case.says} |")
    return "\n".join(lines)


def test_the_page_has_this_table():
    assert table() in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["warm_up", "warm_up_at_3e-3"])
def test_the_page_has_what_the_benchmark_measured(name):
    record = json.loads((PAGE.parents[1] / "results" / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))
    assert markdown(warm_up.rows(record["results"])) in PAGE.read_text(encoding="utf-8")
