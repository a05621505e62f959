"""What a monitor measures over time, and what is kept of it: histograms, times of death, files and the overview."""

import csv
import json
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linked_jax.histograms import BINS, bin_edges, log_histogram
from linked_jax.probe import Monitor, csv_writer, json_lines_writer, overview, probe, tensorboard_writer
from tests.arrays import white
from tests.linked_jax.probe.common import WEIGHTS, mean_of_squares, mlp

X = white(8, 4)


def shifted(bias, x):
    return jax.nn.relu(x + bias)


def run(*writers, biases=((0, 0), (0, -9), (-9, -9), (0, -9)), **options):
    """A monitor of two units; every unit with a bias of -9 is dead."""
    monitor = Monitor([white(8, 2)], every=10, call=shifted, writers=writers, **options)
    for i, bias in enumerate(biases):
        monitor(10 * i, jnp.array(bias, jnp.float32))
    return monitor


@pytest.mark.slow
def test_the_time_below_the_dead_line_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    dead = rng.random((7, 2)) < 0.6
    monitor = Monitor([white(8, 2)], every=1, call=shifted)
    for step, now in enumerate(dead):
        layer = monitor(step, jnp.where(jnp.asarray(now), -9.0, 0.0)).layers[0]
        streaks = [next((k for k, x in enumerate(unit[::-1]) if not x), step + 1) for unit in dead[: step + 1].T]
        assert layer.dead_checks.tolist() == streaks
        np.testing.assert_allclose(layer.dead_share, dead[: step + 1].mean(0), rtol=1e-6)
        entry = monitor.history[-1]["layers"][0]
        assert entry["dead_checks"] == max(streaks)
        np.testing.assert_allclose(entry["dead_share"], dead[: step + 1].mean(), rtol=1e-6)
    assert 0 < dead.sum() < dead.size


@pytest.mark.slow
def test_histograms_are_those_of_z_and_of_its_gradient():
    batches = [(X, None), (white(8, 4, seed=9), None)]
    report = probe(WEIGHTS, batches, call=mlp, loss_fn=mean_of_squares)
    wanted = [np.zeros(BINS), np.zeros(BINS)]
    for x, _ in batches:
        z = x @ WEIGHTS[0]

        def loss(z):
            return len(z) * mean_of_squares(mlp(WEIGHTS[1:], jax.nn.relu(z)), None)

        wanted[0] += log_histogram(z)
        wanted[1] += log_histogram(jax.grad(loss)(z))
    layer = report.layers[0]
    for found, counts in zip((layer.histogram, layer.gradient_histogram), wanted, strict=True):
        assert found.sum() == 64
        assert np.abs(found - counts).sum() <= 2  # a value beside an edge may be rounded
    assert probe(WEIGHTS, [X], call=mlp).layers[0].gradient_histogram is None


@pytest.mark.slow
def test_histograms_of_a_scan_over_layers_and_over_time():
    def layers(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    def times(w, x):
        return jax.lax.scan(lambda h, x: (jnp.tanh(h + x @ w), x), x[:, 0], x.swapaxes(0, 1))[0]

    report = probe(jnp.stack(WEIGHTS), [(X, None)], call=layers, loss_fn=mean_of_squares)
    assert [layer.histogram.sum() for layer in report.layers] == [32] * 3
    assert [layer.gradient_histogram.sum() for layer in report.layers] == [32] * 3
    assert (report.layers[0].gradient_histogram != report.layers[2].gradient_histogram).any()
    (layer,) = probe(WEIGHTS[0], [(white(6, 5, 4), None)], call=times, loss_fn=mean_of_squares).layers
    assert layer.histogram.sum() == layer.gradient_histogram.sum() == 6 * 5 * 4


@pytest.mark.slow
def test_json_lines_are_the_history_with_histograms(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    monitor = run(json_lines_writer(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 10, 20, 30]
    for line, entry in zip(lines, monitor.history, strict=True):
        (layer,) = line["layers"]
        assert sum(layer.pop("histogram")) == 16
        assert layer.pop("gradient_histogram") is None
        assert (layer.pop("activation"), layer.pop("source")[:15]) == ("relu", "test_writers.py")
        assert line == entry
    json_lines_writer(path)(40, monitor.report)  # goes on
    assert len(path.read_text().splitlines()) == 5


def test_csv_has_a_row_for_each_layer_and_goes_on(tmp_path):
    path = tmp_path / "run.csv"
    monitor = run(csv_writer(path), biases=((0, 0), (0, -9)))
    csv_writer(path)(20, monitor.report)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "10", "20"]
    for row, entry in zip(rows, monitor.history, strict=False):
        for name, x in entry["layers"][0].items():
            assert row["layer" if name == "name" else name] == ("" if x is None else str(x))
    path.write_text("step,loss\n")
    with pytest.raises(ValueError, match="name another file"):
        csv_writer(path)(0, monitor.report)


def events_of(path, event_type):
    """Records of a length, a checksum, the event and a checksum."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (n,) = struct.unpack_from("<Q", data, at)
        yield event_type.FromString(data[at + 12 : at + 12 + n])
        at += 16 + n


@pytest.mark.slow
def test_tensorboard_has_scalars_and_histograms(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    writer = tensorboard_writer(tmp_path)
    monitor = run(writer, biases=((0, 0), (0, -9), (0, jnp.nan)))
    writer.close()
    (path,) = tmp_path.glob("events*")
    values = [(event.step, value) for event in events_of(path, Event) for value in event.summary.value]
    name = monitor.history[0]["layers"][0]["name"].replace(":", "_")
    dead = [(step, value.simple_value) for step, value in values if value.tag == f"dead/{name}"]
    assert dead == [(0, 0.0), (10, 0.5), (20, 0.0)]
    histo = next(value.histo for _, value in values if value.tag == f"histogram/{name}")
    counts = np.asarray(histo.bucket)
    assert counts.sum() == histo.num == 16
    limits = np.asarray(histo.bucket_limit)[counts > 0]
    assert set(limits) <= set(bin_edges())
    assert "not_finite_first/text_summary" in [value.tag for _, value in values]


def test_without_the_extra_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install tensorboardX"):
        tensorboard_writer(tmp_path)


@pytest.mark.parametrize("writers", [3, ["run.jsonl"], json_lines_writer("run.jsonl")])
def test_writers_that_are_none_are_refused(writers, unchecked):
    with pytest.raises(ValueError, match="writers is a list of functions"):
        Monitor([X], every=1, writers=writers)


# --- the overview -------------------------------------------------------------------------------------------------


def rows_of(text):
    return {line.split()[-5]: line.split()[-4:] for line in text.splitlines()[1:] if "not finite" not in line}


def test_the_overview_has_first_worst_and_last():
    rows = rows_of(overview(run().history))
    assert rows["dead"] == ["0", "1", "20", "0.5"]
    assert rows["dead_checks"] == ["0", "3", "30", "3"]
    assert "saturated" not in rows or rows["saturated"][0] == "0"
    assert "gradient_mean_square" not in rows
    assert rows["negative_slope"] == ["0", "0", "0", "0"]  # of relu: the worst there is
    assert "not_finite" not in rows


def entry(step, **values):
    return {"step": step, "layers": [{"name": "a very long name of a layer, block[12]", **values}]}


WORST = {
    "dead": ([0.1, 0.5, 0.2], "0.5"),
    "effective_rank": ([4.0, 2.0, 8.0], "2"),
    "negative_slope": ([-1.0, 0.01, 0.5], "0.01"),
    "mean_square": ([2.0, 0.1, 9.0], "0.1"),
    "gradient_mean_square": ([1e-4, 1e-3, 2e-5], "0.001"),
    "activation_shift": ([0.1, -3.0, 2.0], "-3"),
    "stable_rank": ([3.0, None, 2.0], "NaN"),
    "drift": ([None, 0.25, 0.125], "0.25"),
}


@pytest.mark.parametrize("name", WORST)
def test_the_worst_is_the_worst(name):
    values, worst = WORST[name]
    rows = rows_of(overview([entry(10**k, **{name: x}) for k, x in enumerate(values)]))
    assert rows[name][1] == worst
    shown = {f"{x:.3g}" if x is not None else "NaN": 10**k for k, x in enumerate(values)}
    assert rows[name][2] == str(shown[worst])


def test_the_overview_fits_80_columns():
    values = dict.fromkeys(WORST, -1.23456789e-30)
    history = [entry(step, **values) | {"not_finite_first": "word " * 40} for step in (0, 12_345_678)]
    assert max(map(len, overview(history).splitlines())) <= 80
    assert overview([]).splitlines() == overview([entry(0, dead=0.0)]).splitlines()  # the head alone
