"""What a method makes of a stage: an activation, weights and a norm, with what the method needs of them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.engine.flatten import flatten
from experiments.engine.optimizers import adam
from experiments.engine.rows import identity, normalised
from experiments.remedies.net import NETS, Context, Place, RemedyNet, Stage
from linked_jax import Link, default_kernel_init, get_activation
from linked_jax.initializers import Initializer
from linked_jax.remedies import bkn, normprop
from linked_jax.remedies import moment_calculus as calculus
from linked_jax.remedies.drelu import drelu

_FEW_POSITIONS = 32  # images that BKN's prediction draws where a layer has one pixel: one gives no variance
_ADAM = adam(1.0)
Rule = tuple[optax.GradientTransformation, float]
"""An optimiser, and the rate that its updates are multiplied by."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
      says: what it is, in a few words.
      act: a name of `linked_jax.get_activation`.
      branches: pre-activations of a unit.
      step: a subclass of `Step`.
      conv: a class of convolutions with the signature of `nnx.Conv`.
      linear: a class of dense layers with the signature of `nnx.Linear`.
      init: the link before it, strides -> the kernel's initialiser; or None for the layer's own.
      norm: features, whether it is on an image, rngs -> a norm before the activation; or None.
      before: features, rngs -> a layer between activation and weights; or None.
      rule: net, rate -> how to train.
      rates: that are tried.
      batch_one: whether it can train at batch size 1, by construction.
    """

    says: str
    act: str = "relu"
    branches: int = 1
    step: Callable[["Method", Place, nnx.Rngs], Any] = lambda method, place, rngs: Step(method, place, rngs)
    conv: Callable[..., Any] = nnx.Conv
    linear: Callable[..., Any] = nnx.Linear
    init: Callable[[Link, int], Initializer] | None = lambda link, strides: default_kernel_init(link, strides=strides)
    norm: Callable[[int, bool, nnx.Rngs], Any] | None = None
    before: Callable[[int, nnx.Rngs], Any] | None = None
    rule: Callable[[str, float], Rule] = lambda _net, rate: (_ADAM, rate)
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    batch_one: bool = True

    def weights(self, in_features: int, out_features: int, stage: Stage, link: Link, rngs: nnx.Rngs) -> Any:
        """The weights of a stage, behind that link."""
        options: Any = {"rngs": rngs}
        if self.init is not None:
            options["kernel_init"] = self.init(link, stage.strides)
        if stage.kernel_size is None:
            return self.linear(in_features, out_features, **options)
        options |= {"strides": stage.strides, "padding": stage.padding}
        return self.conv(in_features, out_features, stage.kernel_size, **options)

    def build(self, net: str, image_shape: Sequence[int], classes: int, seed: int) -> RemedyNet:
        """The network that it makes."""
        step = functools.partial(self.step, self)
        return RemedyNet(image_shape, NETS[net](classes), step=step, rngs=nnx.Rngs(seed))


class Step(nnx.Module):
    """Activation -> pool? -> before? -> weights -> norm?."""

    def __init__(self, method: Method, place: Place, rngs: nnx.Rngs):
        stage, units = place.stage, place.shape[-1]
        self.stage, self.positions = stage, place.positions
        self.link = get_activation(method.act).link if stage.active else identity
        features = self.link.arity * units * place.positions
        self.before = nnx.data(method.before(features, rngs) if method.before and stage.active else None)
        outputs = stage.features * (method.branches if place.normed else 1)
        self.weights = method.weights(features, outputs, stage, self.link, rngs)
        on_image = stage.kernel_size is not None
        self.norm = nnx.data(method.norm(outputs, on_image, rngs) if method.norm and place.normed else None)

    def __call__(self, x: Any, context: Context, train: bool) -> tuple[Any, Context]:
        """What the step before gave, its context -> this one's."""
        return normalised(self.layer(x, train), self.norm, train), None

    def layer(self, x: Any, train: bool) -> Any:
        """All but the norm."""
        return self.weights(normalised(self.flat(self.pool(self.activation(x))), self.before, train))

    def activation(self, x: Any) -> Any:
        """The link."""
        return self.link(x)

    def pool(self, h: Any) -> Any:
        """Max-pool, where the stage has one."""
        window = self.stage.window(h.shape[1:])
        return h if window == (1, 1) else nnx.max_pool(h, window, strides=window)

    def flat(self, h: Any) -> Any:
        """A dense layer sees all pixels."""
        return flatten(h, self.link.arity) if self.stage.kernel_size is None else h


class DReluStep(Step):
    """A step whose units have two pre-activations each: max(0, a) - max(0, b)."""

    def activation(self, x: Any) -> Any:
        """(..., 2 C) -> (..., C)."""
        return drelu(*jnp.split(x, 2, axis=-1)) if self.stage.active else x


class NormPropStep(Step):
    """A step whose activations and pools have mean 0 and variance 1 on standard normal pre-activations."""

    def activation(self, x: Any) -> Any:
        """The link, normalised."""
        return normprop.normalized(self.link)(x) if self.stage.active else x

    def pool(self, h: Any) -> Any:
        """Max-pool, then mean 0 and variance 1 for independent N(0, 1) pixels."""
        window = self.stage.window(h.shape[1:])
        return h if window == (1, 1) else normprop.normalized_max_pool(h, window, strides=window)


class KalmanStep(Step):
    """A step whose batch statistics are fused with what the step before predicts. The context is x's posterior."""

    def __init__(self, method: Method, place: Place, rngs: nnx.Rngs):
        super().__init__(method, place, rngs)
        self.rngs = rngs.fork()

    def __call__(self, x: Any, context: Context, train: bool) -> tuple[Any, Context]:
        """See `Step`."""
        z = self.layer(x, train)
        if self.norm is None:
            return z, None
        predicted = None
        if context is not None and train:
            samples = 1 if z[0, ..., 0].size > 1 else _FEW_POSITIONS
            key = self.rngs.prediction()
            predicted = bkn.predict(context, key, lambda y: self.layer(y, train), x.shape[1:], samples=samples)
        return self.norm(z, predicted, use_running_average=not train)


class VarianceStep(Step):
    """A step that normalises by moments which it propagates. The context is x's moments."""

    def __call__(self, x: Any, context: Context, train: bool) -> tuple[Any, Context]:
        """See `Step`. The moments are pooled before the activation, which is the same as long as that is monotone."""
        height, width = self.stage.window(x.shape[1:]) if x.ndim > 2 else (1, 1)
        moments = context or calculus.Moments(jnp.zeros(x.shape[-1]), jnp.ones(x.shape[-1]))
        if height * width > 1:
            moments = calculus.through_pool(moments, height * width, kind="max")
        moments = jax.tree.map(self.of_all_pixels, calculus.through_link(moments, self.link))
        return self.weights(self.flat(self.pool(self.activation(x))), moments)

    def of_all_pixels(self, moment: Any) -> Any:
        """(d*C,) -> (d*P*C,), in the order that `flat` has for features; P is 1 before a convolution."""
        return flatten(jnp.broadcast_to(moment, (1, self.positions, moment.size)), self.link.arity)[0]
