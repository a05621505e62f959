"""What a net costs, counted without building or running it: parameters, FLOPs, activation memory."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from linked_jax.convolution import plain_convolutions


def count(build: Callable[[], nnx.Module], image_shape: tuple[int, ...], *, all_of_them: bool = True) -> dict[str, int]:
    """Count for one image.

    Args:
      build: makes the model, model(images, train=) -> logits.
      image_shape: (H, W, C).
      all_of_them: else the parameters only, which is quick at any depth.

    Returns:
      parameters: trained ones.
      flops: of the forward pass on one image, as XLA counts its program before it optimises it.
      activation_bytes: what the backward pass keeps for each image beside the parameters: what the derivative of a
        batch of two closes over, less that of a batch of one.

    >>> from experiments import width
    >>> from experiments.engine import costs, data
    >>> settings, digits = width.TABLE.presets["quick"], data.load("digits")
    >>> cell = {"act": "relu", "init": "glorot", "width": 50}
    >>> costs.count(lambda: width.build(settings, cell, digits, 0), (8, 8, 1))["parameters"]  # 9*50+50 + 64*50*10+10
    32510
    """
    graph, parameters, state = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    counted = {"parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))}
    if not all_of_them:
        return counted

    def forward(parameters: Any, state: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graph, parameters, state, copy=True)(images, train=True)  # pyright: ignore[reportCallIssue]

    def images(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *image_shape), jnp.float32)

    def kept(count: int) -> int:
        def pull_back(parameters: Any, state: Any, x: jax.Array) -> Any:
            return jax.vjp(lambda p: forward(p, state, x), parameters)[1]

        leaves = jax.tree.leaves(jax.eval_shape(pull_back, parameters, state, images(count)))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    with plain_convolutions():  # a CPU's own forms have other sums
        analysis: Any = jax.jit(forward).lower(parameters, state, images(1)).cost_analysis()
    return {**counted, "flops": int(analysis["flops"]), "activation_bytes": kept(2) - kept(1)}
