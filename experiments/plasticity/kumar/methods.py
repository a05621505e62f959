"""The rows: an activation, where it starts, and what else keeps the net learning. Rates go into the optimiser's state.

Settings of the methods are those that the papers or their code chose, and are not searched here; only rates are.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import nnx
from jaxtyping import Array, Float

from experiments.plasticity.kumar.net import Activation, Net, Shape, shape_for
from experiments.plasticity.kumar.problems import Problem
from experiments.plasticity.kumar.starts import STARTS
from linked_jax import Link, fourier, gelu, leaky_relu, linked, lk_gelu, lk_relu, lk_swish, relu, swish
from linked_jax.activations import smooth_leaky
from linked_jax.plasticity import Units, continual_backprop, l2_init, recycle_dormant, shrink_and_perturb

L2_STRENGTH, SHRINK, PERTURB = 1e-2, 1e-4, 1e-2
REPLACEMENT_RATE, MATURITY, TAU = 1e-4, 100, 0.025
SLOPES, BAND = (0.3, 0.7), (0.6, 0.9)
_KEY = jax.random.key(0)  # each run puts its own into the state


@dataclasses.dataclass(frozen=True)
class RandomSmoothLeaky:
    """Smooth leaky ReLU with one slope for each layer and forward pass, a ~ U(low, high)."""

    low: float
    high: float
    arity: int = 1

    @property
    def link(self) -> Link:
        """The link at the mean slope."""
        return Link((functools.partial(smooth_leaky, negative_slope=(self.low + self.high) / 2),))

    def __call__(self, z: Float[Array, "..."], key: Array) -> Float[Array, "..."]:
        """f(z) with the key's slope."""
        return smooth_leaky(z, jax.random.uniform(key, (), z.dtype, self.low, self.high))


Draw = Callable[[Array], Any]
Optimizer = Callable[[Problem, Shape, Draw], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
      says: what it is, for the table.
      act: of all hidden layers.
      start: of `STARTS`.
      norm: whether layer norm stands before each activation.
      optimizer: (problem, shape, draw) -> an Optax transformation; Adam by default.
      tracked: whether the optimiser asks for mean |h| of the units.
      at_end: the link that replaces the activation before the task in the middle, without a change of outputs.
    """

    says: str
    act: Activation
    start: str = "pytorch"
    norm: bool = False
    optimizer: Optimizer | None = None
    tracked: bool = False
    at_end: Link | None = None

    def shape(self, problem: Problem) -> Shape:
        """The net's sizes, at the parameters of the plain net."""
        return shape_for(problem, (self.at_end or self.act).arity)

    def net(self, problem: Problem, key: Array, act: Activation | None = None) -> Net:
        """The net at its start; with another activation: the one that it has at the end."""
        options = {"norm": self.norm, "tracked": self.tracked}
        return Net(self.shape(problem), act or self.act, STARTS[self.start], key=key, **options)

    def draw(self, problem: Problem, key: Array) -> Any:
        """The parameters of the net at its start."""
        return nnx.split(self.net(problem, key), nnx.Param, ...)[1]

    def rule(self, problem: Problem) -> optax.GradientTransformation:
        """The optimiser; `seeded` gives its state a rate and a key."""
        draw = functools.partial(self.draw, problem)
        return self.optimizer(problem, self.shape(problem), draw) if self.optimizer else adam()


def adam() -> optax.GradientTransformation:
    """Adam as PyTorch has it, with the rate in its state."""
    return optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps", "eps_root"))(learning_rate=1e-3)


def seeded(opt_state: Any, rate: float, key: Array) -> Any:
    """The optimiser's state before the first step of a run."""
    opt_state = optax.tree_utils.tree_set(opt_state, learning_rate=jax.numpy.float32(rate))
    has_key = any(jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(opt_state))
    return optax.tree_utils.tree_set(opt_state, key=key) if has_key else opt_state


def hidden_units(shape: Shape) -> list[Units]:
    """Where the weights of the hidden layers are."""
    return [Units(f"layers/{i}", f"layers/{i + 1}") for i in range(len(shape.sizes))]


def _with_magnitudes(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The transformation that takes the magnitudes of units from the net's state."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return tx.update(updates, state, params, magnitudes=jax.tree.leaves(extra["seen"]["magnitudes"]))

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _continual_backprop(_: Problem, shape: Shape, draw: Draw) -> optax.GradientTransformation:
    options = {"replacement_rate": REPLACEMENT_RATE, "maturity": MATURITY}
    return _with_magnitudes(continual_backprop(adam(), hidden_units(shape), draw, key=_KEY, **options))


def _recycled(problem: Problem, shape: Shape, draw: Draw) -> optax.GradientTransformation:
    period = {"key": _KEY, "period": problem.steps, "tau": TAU}
    return _with_magnitudes(recycle_dormant(adam(), hidden_units(shape), draw, **period))


def _both(name: str, says: str, act: Activation, starts: Mapping[str, str]) -> dict[str, Method]:
    return {f"{name}{suffix}": Method(says, act, start) for suffix, start in starts.items()}


_STARTS = {"": "pytorch", "_ours": "ours"}
_ABLATION = {f"_{start}": start for start in STARTS if start not in _STARTS.values()}
_leaky = [functools.partial(jax.nn.leaky_relu, negative_slope=slope) for slope in SLOPES]
_smooth = functools.partial(smooth_leaky, negative_slope=SLOPES[-1])

METHODS: dict[str, Method] = {
    **_both("relu", "ReLU", relu, _STARTS),
    **_both("lk_relu", "(relu(z), relu(-z)): CReLU", lk_relu, _STARTS | _ABLATION),
    **_both("leaky_relu", "leaky ReLU, slope 0.01", leaky_relu, _STARTS),
    **_both("leaky_relu_0.7", "leaky ReLU, slope 0.7", Link((_leaky[1],)), _STARTS),
    **_both("fourier", "(sin z, cos z): deep Fourier", fourier, _STARTS),
    **_both("smooth_leaky", "smooth leaky ReLU, slope 0.7, sharpness 5", Link((_smooth,)), _STARTS),
    **_both("random_smooth_leaky", f"smooth leaky ReLU, slope U{BAND}", RandomSmoothLeaky(*BAND), _STARTS),
    **_both("swish", "swish", swish, _STARTS),
    **_both("gelu", "gelu", gelu, _STARTS),
    **_both("lk_swish", "(swish(z), swish(-z))", lk_swish, _STARTS),
    **_both("lk_gelu", "(gelu(z), gelu(-z))", lk_gelu, _STARTS),
    **_both("lk_leaky_0.3", "leaky ReLU of slope 0.3 and its mirror", linked(_leaky[0]), _STARTS),
    **_both("lk_leaky_0.7", "leaky ReLU of slope 0.7 and its mirror", linked(_leaky[1]), _STARTS),
    **_both("lk_smooth_leaky", "smooth leaky ReLU of slope 0.7 and its mirror", linked(_smooth), _STARTS),
    "layer_norm": Method("layer norm, then ReLU", relu, norm=True),
    "redo": Method(f"ReLU; units of a score <= {TAU} start anew once a task", relu, optimizer=_recycled, tracked=True),
    "l2_init": Method(
        f"ReLU; L2 Init of {L2_STRENGTH:g}", relu, optimizer=lambda *_: optax.chain(l2_init(L2_STRENGTH), adam())
    ),
    "continual_backprop": Method(
        f"ReLU; continual backprop, rate {REPLACEMENT_RATE:g}, maturity {MATURITY}", relu,
        optimizer=_continual_backprop, tracked=True,
    ),
    "shrink_and_perturb": Method(
        f"ReLU; shrink {SHRINK:g} and perturb {PERTURB:g} a step", relu,
        optimizer=lambda _, __, draw: optax.chain(adam(), shrink_and_perturb(SHRINK, PERTURB, draw, key=_KEY)),
    ),
    "revived": Method("ReLU, linked before the task in the middle", relu, at_end=lk_relu),
}  # fmt: skip
"""NAME starts as PyTorch has it, NAME_ours as we have it; the further ends of lk_relu are the ablation of its start."""
