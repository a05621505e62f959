"""The tables of docs/probe.md are what the tests try."""

import itertools
from pathlib import Path

import pytest

from tests.linked_jax.probe.test_foreign import MODELS
from tests.linked_jax.probe.test_forms import FORMS, LINKS, NO_ACTIVATION, NOT_SEEN

PAGE = Path(__file__).parents[3] / "docs" / "probe.md"


def tables() -> str:
    """The tables, as they stand on the page. To write them anew: python -m tests.linked_jax.probe.test_page"""
    forms = {name: activation for name, (_, activation) in {**FORMS, **LINKS}.items()}
    by_activation = {wanted: [n for n, found in forms.items() if found == wanted] for wanted in forms.values()}
    lines = ["| recognised as | written as |", "| --- | --- |"]
    lines += [f"| {activation} | {'; '.join(names)} |" for activation, names in by_activation.items()]
    lines += ["", f"No activation: {'; '.join(NO_ACTIVATION)}. Named in `not_seen`: {'; '.join(NOT_SEEN)}."]
    lines += ["", "| model | activations, with their units |", "| --- | --- |"]
    for name, model in MODELS.items():
        runs = [(key, len(list(group))) for key, group in itertools.groupby(model().found)]
        found = [f"{count} x {g} {units}" if count > 1 else f"{g} {units}" for (g, units), count in runs]
        lines.append(f"| {name} | {', '.join(found)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.slow
def test_the_page_has_every_form_and_every_model():
    assert tables() in PAGE.read_text(encoding="utf-8")
    assert f"{len(FORMS) + len(LINKS)} written forms" in PAGE.read_text(encoding="utf-8")
    assert f"{len(MODELS)} models" in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(tables(), end="")
