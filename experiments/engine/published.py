"""What the paper and its later edition published: CIFAR-10, one run, the best epoch. See experiments/published.json."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EDITIONS = {"paper": "paper", "later": "repository"}
"""Our name -> the key of published.json; "later" is the edition in the authors' repository."""


@functools.cache
def _tables() -> dict[str, Any]:
    return json.loads(Path(__file__).parents[1].joinpath("published.json").read_text(encoding="utf-8"))


def published(experiment: str, cell: Mapping[str, Any]) -> dict[str, float | None]:
    """The accuracies that both editions print for a cell of a table; None where they have none.

    Args:
      experiment: width, depth, parameters, allcnn or resnet50.
      cell: with act (a row's name, such as relu_sqrt2 or relu_bn) and the table's other axes.

    Returns:
      {"paper": accuracy, "later": accuracy}.

    Example:
      >>> from experiments.engine.published import published
      >>> published("depth", {"act": "lk_relu", "depth": 50})
      {'paper': 0.2014, 'later': 0.5667}
      >>> published("depth", {"act": "gelu", "depth": 50})
      {'paper': None, 'later': None}
    """
    find = _FIND.get(experiment, lambda *_: None)
    return {ours: find(theirs, cell) for ours, theirs in EDITIONS.items()}


def _width(edition: str, cell: Mapping[str, Any]) -> float | None:
    return _tables()["width"][edition].get(str(cell["width"]), {}).get(cell["act"])


def _depth(edition: str, cell: Mapping[str, Any]) -> float | None:
    act = "bn" if cell["act"] == "relu_bn" else cell["act"]
    return _tables()["depth"][f"{edition}_max"].get(act) if cell["depth"] == 50 else None


def _parameters(edition: str, cell: Mapping[str, Any]) -> float | None:
    plain = cell["act"].removeprefix("lk_").removesuffix("_sqrt2")
    kind = {plain: "single", f"{plain}_sqrt2": "sqrt2", f"lk_{plain}": "linked"}.get(cell["act"])
    return _tables()["parameters"][edition].get(plain, {}).get(kind)


def _allcnn(edition: str, cell: Mapping[str, Any]) -> float | None:
    return _tables()["allcnn"][edition].get(cell["act"])


def _resnet50(edition: str, cell: Mapping[str, Any]) -> float | None:
    act, bn = cell["act"].removesuffix("_bn"), cell["act"].endswith("_bn")
    if cell.get("link", "inside") != "inside":  # the authors linked nothing but the insides of bottlenecks
        return None
    with_bn = _tables()["resnet50"][edition].get(act)
    return with_bn if bn else _tables()["no_batchnorm"][edition].get(act, {}).get("accuracy")


_FIND = {"width": _width, "depth": _depth, "parameters": _parameters, "allcnn": _allcnn, "resnet50": _resnet50}


def published_time(act: str) -> dict[str, float | None]:
    """The time of an epoch relative to lk_relu without batch norm (table 6), of both editions.

    >>> from experiments.engine.published import published_time
    >>> published_time("lk_relu_bn")
    {'paper': 2.302884, 'later': 2.09}
    """
    table = _tables()["no_batchnorm"]
    return {ours: table[theirs].get(act, {}).get("time") for ours, theirs in EDITIONS.items()}
