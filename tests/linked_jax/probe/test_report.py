import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linked_jax.activations import lk_relu
from linked_jax.diagnostics import unit_statistics
from linked_jax.probe import Report, probe
from linked_jax.probe.plot import STATES, unit_states
from linked_jax.signal_statistics import covariate_drift
from tests.arrays import white
from tests.linked_jax.probe.common import KILL, WEIGHTS, custom, mlp


@pytest.fixture(scope="module")
def report():
    """Three layers: one with every state, one with values that are not finite, one with a gradient hidden."""
    weights = [white(4, 6), white(6, 3), white(3, 2)]

    def forward(weights, x):
        h = jax.nn.relu(x @ weights[0] + jnp.array([0.0, KILL, 10.0, 0.0, 0.0, 0.0]))
        return lk_relu(jnp.log(jax.nn.relu(h @ weights[1]) - 1e3) @ jnp.eye(3)) @ jnp.ones((6, 1)) + custom(mlp)(
            weights[2:], h[:, :3]
        )

    x = white(32, 4)
    return probe(weights, [(x, None)], call=forward, loss_fn=lambda out, _: out.sum())


@pytest.mark.slow
def test_json_keeps_every_bit(report, tmp_path):
    report.save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    loaded = Report.load(tmp_path / "report.json")
    assert np.isnan(report.layers[2].mean).all()  # or this test shows less
    assert (loaded.tau, loaded.not_seen) == (report.tau, report.not_seen)
    for a, b in zip(loaded.layers, report.layers, strict=True):
        for field in dataclasses.fields(a):
            one, other = getattr(a, field.name), getattr(b, field.name)
            np.testing.assert_array_equal(one, other)
            assert type(one) is type(other)
            assert getattr(one, "dtype", None) == getattr(other, "dtype", None)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.slow
def test_the_table_has_a_line_for_each_layer(report, capsys):
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(report.layers) + 3  # what the columns are, and where the first NaN comes from
    assert lines[0].split()[:4] == ["name", "activation", "units", "dead"]
    assert lines[1].split()[1:4] == ["relu", "6", "1"]
    assert str(report).isascii()  # some terminals can show nothing else
    assert "NaN/inf" in lines[0]  # where a unit had one
    assert ("grad^2" in lines[0]) == any(layer.gradient_mean_square is not None for layer in report.layers)
    pytest.importorskip("rich")
    report.print()
    printed = capsys.readouterr().out
    assert all(layer.name in printed and layer.activation in printed for layer in report.layers)


def test_a_report_without_layers_is_a_head():
    assert str(Report((), 0.025)).startswith("name  activation  units")


@pytest.mark.slow
def test_the_plot_is_a_picture(report, tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    states = unit_states(report.layers)
    names = [STATES[k][0] for k in states[0]]
    assert names[1:3] == ["dead or no gradient", "linearised"]
    assert states.mask.sum(axis=1).tolist() == [6 - layer.units for layer in report.layers]


@pytest.mark.parametrize(("package", "method"), [("rich.console", "print"), ("matplotlib.figure", "plot")])
@pytest.mark.slow
def test_a_missing_extra_says_what_to_install(report, package, method, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package.partition('.')[0]}"):
        report.print() if method == "print" else report.plot(tmp_path / "x.png")


@pytest.mark.slow
def test_drift_is_that_of_the_diagnostics():
    x = white(16, 4)
    reports = [probe([w * scale + scale for w in WEIGHTS[:1]], [x], call=mlp) for scale in (1.0, 2.0)]
    zs = [x @ (WEIGHTS[0] * scale + scale) for scale in (1.0, 2.0)]
    wanted = covariate_drift(*(unit_statistics(z, z, z) for z in zs))
    np.testing.assert_allclose(reports[0].drift(reports[1])[0], wanted, rtol=1e-4)
    with pytest.raises(ValueError, match="compares a model with itself"):
        reports[0].drift(probe(WEIGHTS, [x], call=mlp))
