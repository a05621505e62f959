"""What the paper and its later edition published: CIFAR-10, one run, the best epoch. See experiments/published.json."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EDITIONS = ("paper", "later")
"""The paper, and its edition in the authors' repository."""


@functools.cache
def _tables() -> dict[str, Any]:
    return json.loads(Path(__file__).parents[1].joinpath("published.json").read_text(encoding="utf-8"))


def published(experiment: str, cell: Mapping[str, Any]) -> dict[str, float | None]:
    """The accuracies that both editions print for a cell of a table; None where they have none.

    A cell has act (a row's name, such as relu_sqrt2 or relu_bn) and the sizes that the paper's net had: of another net
    it has no number.

    >>> from experiments.engine.published import published
    >>> published("depth", {"act": "lk_relu", "depth": 50, "width": 4})
    {'paper': 0.2014, 'later': 0.5667}
    >>> published("depth", {"act": "lk_relu", "depth": 50, "width": 8})
    {'paper': None, 'later': None}
    """
    for nets in _tables().get(experiment, {"nets": []})["nets"]:
        if all(cell[size] == nets[size] for size in nets if size not in EDITIONS):
            return {edition: nets[edition].get(cell["act"]) for edition in EDITIONS}
    return dict.fromkeys(EDITIONS)


def published_time(act: str) -> dict[str, float | None]:
    """The time of an epoch relative to lk_relu without batch norm (table 6), of both editions.

    >>> from experiments.engine.published import published_time
    >>> published_time("lk_relu_bn")
    {'paper': 2.302884, 'later': 2.09}
    """
    times = _tables()["resnet50"]["times"]
    return {edition: times[edition].get(act) for edition in EDITIONS}
