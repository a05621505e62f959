"""One run: nanoGPT's training of a net on a text, and what the net and its step cost."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from experiments.charlm.data import Text
from experiments.charlm.net import BLOCK, ROWS, CharTransformer
from experiments.engine import loop as loop_lib
from experiments.engine.checkpoints import Checkpoints, like
from experiments.engine.loop import Carry, Loop
from experiments.engine.tasks import LossOf
from experiments.engine.timing import in_turns
from linked_jax.probe import probe

BATCH = 12
OPTIMIZER = {
    "name": "adamw", "betas": [0.9, 0.99], "weight_decay": 0.1, "decays": "matrices", "clip": 1.0, "warm_up": 0.05,
    "last_rate": 0.1,
}  # fmt: skip
"""nanoGPT's for characters: 100 of 2,000 iterations warm up; the rate falls as a cosine to a tenth."""
_AT_ONCE = 50  # iterations between two steps of the progress bar
MEASURED = 64  # windows that show the units, and that are validated at once


def cross_entropy(model: Any, codes: Int[Array, " n"], starts: Int[Array, " b"], _key: Any = None) -> Float[Array, ""]:
    """The mean over the characters after each prefix of the windows at these starts, in nats."""
    seen = codes[starts[:, None] + jnp.arange(BLOCK + 1)]
    return optax.softmax_cross_entropy_with_integer_labels(model(seen[:, :-1]), seen[:, 1:]).mean()


@functools.lru_cache
def rule(iterations: int) -> optax.GradientTransformation:
    """nanoGPT's optimiser, for a rate of 1: the loop multiplies by the rate."""
    warm_up = round(OPTIMIZER["warm_up"] * iterations)
    factor = optax.warmup_cosine_decay_schedule(0.0, 1.0, warm_up, iterations, OPTIMIZER["last_rate"])
    b1, b2 = OPTIMIZER["betas"]
    adamw = optax.adamw(
        factor, b1=b1, b2=b2, weight_decay=OPTIMIZER["weight_decay"],
        mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim >= 2, tree),
    )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(OPTIMIZER["clip"]), adamw)


@dataclasses.dataclass(frozen=True)
class Work:
    """What is the same for all rows: a text and a number of iterations."""

    text: Text
    iterations: int

    def start(self, row: str, depth: int, seed: int) -> tuple[Loop, Carry]:
        """The loop of a run, and its carry before the first update."""
        model = CharTransformer(ROWS[row], depth, len(self.text.vocabulary), rngs=nnx.Rngs(seed))
        loss = LossOf(nnx.graphdef(model), cross_entropy)
        loop = Loop(loss, rule(self.iterations), scanned=True)  # no convs: a fifth faster
        return loop, loop.start([model])

    def run(
        self, row: str, depth: int, rate: float, seed: int, *, unfinished: Checkpoints | None = None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> dict[str, Any]:  # fmt: skip
        """Train, at this rate at most; the measures after the last iteration, or how the run diverged.

        `unfinished` keeps where it is, so that the same call goes on after it was cut off; seconds are those before
        that. `advance` is called with the
        number of iterations just done.
        """
        loop, carry = self.start(row, depth, seed)
        last_start, codes = len(self.text.train) - BLOCK - 1, jnp.asarray(self.text.train)
        starts = np.random.default_rng(seed).integers(0, last_start, (self.iterations, BATCH), endpoint=True)
        losses, key, before, began = np.empty(0), jax.random.key(seed), 0.0, time.perf_counter()
        if unfinished is not None and (saved := unfinished.load()) is not None:
            losses, arrays = like(saved, (np.empty(saved.facts["done"]), carry))
            carry, before = jax.tree.map(jnp.asarray, arrays), saved.facts["seconds"]
            advance(len(losses))
        for first in range(len(losses), self.iterations, _AT_ONCE):
            batches = starts[first : first + _AT_ONCE].astype(np.int32)
            carry, found = loop_lib.advance(loop, carry, codes, batches, key, first=first, lr=rate)
            losses = np.append(losses, np.asarray(found))
            advance(len(batches))
            if not np.isfinite(losses[-1]):
                advance(self.iterations - first - len(batches))
                return {"diverged": int(np.isfinite(losses).argmin()) + 1, "seconds": before}
            if unfinished is not None and unfinished.due():
                seconds = before + time.perf_counter() - began
                unfinished.save((losses, carry), {"done": len(losses), "seconds": seconds})
        return self._measured(loop, carry, losses) | {"seconds": before}

    def _measured(self, loop: Loop, carry: Carry, losses: np.ndarray) -> dict[str, Any]:
        graph, codes = loop.loss.graph, jnp.asarray(self.text.validation)  # pyright: ignore[reportFunctionMemberAccess]
        windows = codes[: len(codes) // BLOCK * BLOCK].reshape(-1, BLOCK)[:MEASURED]
        layers = probe(nnx.merge(graph, carry.parameters, carry.state), [windows]).layers
        mlps = [layer for layer in layers if ".mlp" in layer.name]  # the norms' tanh is none of them
        return {
            "validation_loss": float(validation_loss(graph, carry.parameters, codes)),
            "train_loss": float(losses[-max(1, self.iterations // 10) :].mean()),
            "units": sum(layer.units for layer in mlps),
            "dead": int(sum(layer.dead.sum() for layer in mlps)),
            "linear": int(sum(layer.linearised.sum() for layer in mlps)),
        }

    def costs(
        self, nets: Sequence[tuple[str, int]], steps: int, advance: Callable[[int], None] = lambda _: None
    ) -> list[dict[str, Any]]:
        """Parameters, temporary memory of the compiled training step and its median time, of nets in turns.

        Nets are given by row and depth. No step is timed if there are 0; `advance` is called with 1 after each round.
        """
        codes, key = jnp.asarray(self.text.train), jax.random.key(0)
        arguments = (codes, jnp.arange(BATCH, dtype=jnp.int32), key, np.int32(0), np.float32(1e-4))
        programs, carries, found = [], [], []
        for row, depth in nets:
            loop, carry = self.start(row, depth, 0)
            program: Any = loop_lib.step.lower(loop, carry, *arguments).compile()
            parameters = sum(leaf.size for leaf in jax.tree.leaves(carry.parameters))
            found.append({"parameters": parameters, "temporary_bytes": program.memory_analysis().temp_size_in_bytes})
            programs.append(program)
            carries.append(carry)

        def take(net: int) -> Array:
            carries[net], loss = programs[net](carries[net], *arguments)
            return loss

        actions = [functools.partial(take, net) for net in range(len(nets))]
        medians = in_turns(actions, steps, advance) if steps else [None] * len(nets)
        return [line | {"step_seconds": median} for line, median in zip(found, medians, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def validation_loss(graph: Any, parameters: Any, codes: Int[Array, " n"]) -> Float[Array, ""]:
    """The cross entropy on a whole text, in windows that do not overlap; its last, unfinished window is left out."""
    starts = jnp.arange(0, len(codes) - BLOCK, BLOCK)
    model = nnx.merge(graph, parameters)
    return jax.lax.map(lambda start: cross_entropy(model, codes, start[None]), starts, batch_size=MEASURED).mean()
