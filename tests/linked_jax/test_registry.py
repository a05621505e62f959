import jax
import jax.numpy as jnp
import pytest

from linked_jax import ACTIVATION_NAMES, activation_arity, get_activation
from linked_jax.activations import ACTIVATIONS, lk_relu
from linked_jax.learned import ChannelPReLU, LinkedPReLU
from linked_jax.linking import Link
from tests.cases import first_fast

pytestmark = pytest.mark.optimised

NAMED = {name: link for name, link in ACTIVATIONS.items() if isinstance(link, Link)}


@pytest.mark.parametrize("name", first_fast(NAMED))
def test_every_name_is_found(name):
    assert get_activation(name) is ACTIVATIONS[name]
    assert get_activation(name).arity in (1, 2)


@pytest.mark.parametrize(
    ("synonym", "name"),
    first_fast(
        [
            ("silu", "swish"),
            ("lk_silu", "lk_swish"),
            ("minmax", "min_max"),
            ("lk_crelu", "lk_relu"),
            ("crelu", "lk_relu"),
        ]
    ),
)
def test_synonyms(synonym, name):
    assert get_activation(synonym) == get_activation(name)
    assert activation_arity(synonym) == activation_arity(name)


@pytest.mark.parametrize(
    ("typo", "nearest"), first_fast([("lk_rellu", "lk_relu"), ("sillu", "silu"), ("Fourier", "fourier")])
)
def test_unknown_name_gets_the_nearest_one_and_the_list(typo, nearest):
    with pytest.raises(ValueError, match=f"no activation '{typo}'; did you mean '{nearest}'") as caught:
        get_activation(typo)
    for name in ACTIVATION_NAMES:
        assert name in str(caught.value)


@pytest.mark.parametrize("name", first_fast(ACTIVATION_NAMES))
def test_every_name_gives_a_callable_with_the_arity_that_is_known_before(name):
    found = get_activation(name, 3)
    assert found.arity == activation_arity(name) == found.link.arity
    assert found(jnp.ones((2, 3))).shape == (2, 3 * found.arity)


@pytest.mark.parametrize("name", first_fast(["prelu", "lk_prelu"]))
def test_slopes_need_the_number_of_features(name):
    with pytest.raises(ValueError, match=rf"{name} has slopes .*features=None; pass get_activation\('{name}', C\)"):
        get_activation(name)
    assert get_activation(name, 3) is not get_activation(name, 3)  # each layer has its own slopes


@pytest.mark.parametrize(("name", "meant"), [("ReLU", "relu"), ("LK-ReLU", "lk_relu"), ("lk_gleu", "lk_gelu")])
def test_a_wrong_name_is_answered_with_the_nearest(name, meant):
    with pytest.raises(ValueError, match=f"no activation '{name}'; did you mean '{meant}'"):
        get_activation(name)


def test_the_table_holds_links_whatever_is_imported():
    assert {type(link) for link in ACTIVATIONS.values()} == {Link}
    assert set(ACTIVATION_NAMES) == {*ACTIVATIONS, "prelu", "lk_prelu"}


@pytest.mark.parametrize("name", first_fast(["", "?", "x" * 200]))
def test_unknown_name_without_a_near_one_still_gets_the_list(name):
    with pytest.raises(ValueError, match="fourier"):
        get_activation(name)


@pytest.mark.parametrize(("name", "module"), first_fast([("prelu", ChannelPReLU), ("lk_prelu", LinkedPReLU)]))
def test_prelu_modules_have_names(name, module):
    assert isinstance(get_activation(name, 3), module)


@pytest.mark.parametrize("name", [None, 3, jax.nn.relu, lk_relu])
def test_the_name_of_an_activation_is_a_string(unchecked, name):
    with pytest.raises(TypeError, match="has a name such as 'lk_relu', got "):
        get_activation(name)
