"""What options may be: what is refused, and how it is said."""

import math
from types import SimpleNamespace

import pytest

from experiments.engine.checks import in_range, known
from experiments.engine.errors import UsageError


@pytest.mark.parametrize(
    ("value", "least", "most", "said"),
    [
        (0, 1, 10_000, "--time-steps is from 1 to 10,000, got 0; try the default"),
        (20_000, 1, 10_000, "--time-steps is from 1 to 10,000, got 20,000; try the default"),
        (-1, 0, math.inf, "--time-steps is at least 0, got -1; try the default"),
        (math.nan, 0, 1, "--time-steps is from 0 to 1, got nan; try the default"),
    ],
)
def test_a_number_outside_its_range_is_refused(value, least, most, said):
    with pytest.raises(UsageError) as error:
        in_range(SimpleNamespace(seeds=1, time_steps=value), {"seeds": (1, 1), "time_steps": (least, most)})
    assert str(error.value) == said


def test_names_are_given_once_each_and_in_their_order():
    assert known("methods", ["b", "a", "b"], ["a", "b", "c"]) == ("b", "a")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "--methods takes at least one of a, b, got none"),
        (["a", "d"], "--methods: there is no 'd'; take of a, b"),
    ],
)
def test_no_name_and_an_unknown_one_are_refused(given, said):
    with pytest.raises(UsageError) as error:
        known("methods", given, ["a", "b"])
    assert str(error.value) == said
