"""Every public function with wrong arguments: an answer, or a TypeError or ValueError of one line."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import linked_jax
from linked_jax import lk_relu
from linked_jax.linking import Link
from tests.cases import first_fast

WRONG = {
    "None": None,
    "a string": "relu",
    "an integer": 3,
    "floats": jnp.ones((2, 3)),
    "integers": jnp.arange(3),
    "an object": object(),
    "a class": linked_jax.LinkedPReLU,
    "a function": jax.nn.relu,
    "a negative number": -1.5,
    "NaN": float("nan"),
    "a module": nnx.PReLU(),
    "a list": [None],
    "a dictionary": {},
}
Z, KERNEL, RNGS = jnp.ones((2, 3)), jnp.ones((3, 2)), nnx.Rngs(0)
KERNEL_OPTIONS = {"link": lk_relu, "strides": 1, "feature_group_count": 1, "transpose": False}


def with_init(make):
    return lambda link, **options: make(link, **options)(jax.random.key(0), (3, 3, 4, 4))


def with_z(make, z):
    return lambda **options: make(**options)(z)


CALLS = {
    "ChannelPReLU": (with_z(linked_jax.ChannelPReLU, Z), {"features": 3, "negative_slope": 0.1, "share": "channel"}),
    "LinkedPReLU": (with_z(linked_jax.LinkedPReLU, Z), {
        "features": 3, "negative_slope": 0.1, "share": "channel", "layout": "blocked"}),
    "Link": (with_z(Link, Z), {"members": (jax.nn.relu,), "axis": -1, "layout": "blocked"}),
    "a member": (lambda member: Link((member,))(Z), {"member": jax.nn.relu}),
    "linked": (lambda g, h, **options: linked_jax.linked(g, h, **options)(Z), {
        "g": jnp.sin, "h": jnp.cos, "axis": -1, "layout": "blocked"}),
    "LinkedLinear": (with_z(linked_jax.LinkedLinear, Z), {
        "in_features": 3, "out_features": 2, "link": lk_relu, "rngs": RNGS}),
    "LinkedConv": (with_z(linked_jax.LinkedConv, jnp.ones((2, 4, 3))), {
        "in_features": 3, "out_features": 2, "kernel_size": (3,), "link": lk_relu, "strides": 1,
        "rngs": RNGS, "feature_group_count": 1, "padding": "SAME"}),
    "LinkedConvTranspose": (with_z(linked_jax.LinkedConvTranspose, jnp.ones((2, 4, 3))), {
        "in_features": 3, "out_features": 2, "kernel_size": (3,), "link": lk_relu, "strides": 1,
        "rngs": RNGS, "padding": "SAME"}),
    "a layer": (lambda z: linked_jax.LinkedLinear(3, 2, rngs=RNGS)(z), {"z": Z}),
    "a convolution": (lambda z: linked_jax.LinkedConv(3, 2, (3,), rngs=RNGS)(z), {"z": jnp.ones((2, 4, 3))}),
    "activation_arity": (linked_jax.activation_arity, {"name": "relu"}),
    "get_activation": (lambda **options: linked_jax.get_activation(**options)(Z), {"name": "prelu", "features": 3}),
    "certify": (linked_jax.certify, {"link": lk_relu, "dtype": jnp.bfloat16}),
    "gain": (linked_jax.gain, {"link": lk_relu}),
    "read_out": (linked_jax.read_out, {"link": lk_relu}),
    "variance_preserving": (with_init(linked_jax.variance_preserving), KERNEL_OPTIONS),
    "looks_linear": (with_init(linked_jax.looks_linear), KERNEL_OPTIONS),
    "default_kernel_init": (with_init(linked_jax.default_kernel_init), KERNEL_OPTIONS),
    "embed_plain_kernel": (linked_jax.embed_plain_kernel, {"kernel": KERNEL, "link": lk_relu, "member": 0}),
    "live_units": (linked_jax.live_units, {"h": Z, "arity": 1, "layout": "blocked"}),
    "prelu": (linked_jax.prelu, {"z": Z, "negative_slope": 0.1}),
    "inverse_time_decay": (linked_jax.inverse_time_decay, {"init_value": 0.1, "decay": 0.1}),
    **{name: (link, {"z": Z}) for name, link in vars(linked_jax).items() if isinstance(link, Link)},
}  # fmt: skip
"""Name -> a function of the linked_jax module, and arguments that are right."""
CASES = [(name, argument) for name, (_, right) in CALLS.items() for argument in right]


def test_every_public_name_is_called():
    no_function = {"ACTIVATION_NAMES", "Certificate", "linen", "plasticity", "probe", "remedies", "revive"}
    assert set(linked_jax.__all__) - no_function <= set(CALLS)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("name", "argument"), first_fast(CASES))
def test_a_wrong_argument_is_taken_or_refused_in_one_line(name, argument):
    call, right = CALLS[name]
    call(**right)
    for kind, wrong in WRONG.items():
        said = "an answer"
        try:
            call(**{**right, argument: wrong})
        except (TypeError, ValueError) as error:
            said = str(error).strip()
        assert len(said.splitlines()) == 1, f"{kind}: {said!r}"
