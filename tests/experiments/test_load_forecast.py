"""The load forecast: what a run leaves, what the nets and the errors are, that no future leaks, and bad input."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.engine.console import Console
from experiments.engine.errors import UsageError
from experiments.load_forecast import __main__ as load_forecast
from experiments.load_forecast import forecast as forecasts
from experiments.load_forecast import net as recurrent_net
from experiments.load_forecast import series as load_series
from tests.cases import first_fast
from tests.commands import command, in_this_process, metrics

ROOT = Path(__file__).parents[2]
TINY = ["--cells", "lk_relu", "tanh", "--parameters", 250, "--epochs", 2]
HOURS = 40 * 24


@pytest.fixture(scope="module")
def in_process():
    """The exit code, standard output and standard error of a command."""
    return lambda folder, *arguments: in_this_process(load_forecast.main, *arguments, folder=folder)


def hourly(count=HOURS, start="2023-12-25T05:00"):
    times = np.datetime64(start, "m") + 60 * np.arange(count)
    loads = 500 + 100 * np.sin(2 * np.pi * np.arange(count) / 24) + np.random.default_rng(1).normal(0, 20, count)
    return [[str(time), f"{load:.3f}"] for time, load in zip(times, loads, strict=True)]


def written(path, rows, header="time,load"):
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n", encoding="utf-8")
    return path


def read(path, **columns):
    return load_series.read_csv(str(path), **({"time_column": "time", "load_column": "load"} | columns))


def changed_after(series, hour):
    load = series.load.copy()
    load[hour:] = load[hour:][::-1] * 3
    return dataclasses.replace(series, load=load)


def trained(series, cell="tanh", units=5, **changes):
    options = {"epochs": 2, "seeds": 2, "lr": 0.01, "console": Console()} | changes
    return forecasts.train(cell, units, series, load_series.windows(series), **options)


def stacked_start(cell, units):
    """The graph of a net, and its parameters before training, stacked over one seed."""
    graph, parameters = nnx.split(recurrent_net.RecurrentNet(cell, units, rngs=nnx.Rngs(0)))
    return graph, jax.tree.map(lambda leaf: leaf[None], parameters)


# --- a whole run


@pytest.fixture(scope="module")
def a_run(in_process, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    written(folder / "town.csv", hourly())
    return in_process(folder, "--csv", "town.csv", *TINY, "--seeds", 2, "--out", "record"), folder / "record"


@pytest.mark.slow
def test_a_run_leaves_its_record(a_run):
    (code, out, error), folder = a_run
    assert (code, error) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "load_forecast.png", "metrics.jsonl"]
    lines = metrics(folder)
    tests = [line for line in lines if "test_mape" in line]
    assert [(line["cell"], line["seed"]) for line in tests] == [
        ("last week", None), ("yesterday", None), ("lk_relu", 0), ("lk_relu", 1), ("tanh", 0), ("tanh", 1),
    ]  # fmt: skip
    for line in tests:
        assert len(line["test_mape_by_hour"]) == 24
        assert line["test_mape"] == pytest.approx(np.mean(line["test_mape_by_hour"]))
    epochs = [(line["cell"], line["epoch"], line["seed"]) for line in lines if "epoch" in line]
    assert epochs == [(cell, epoch, seed) for cell in ("lk_relu", "tanh") for epoch in (1, 2) for seed in (0, 1)]
    config = json.loads((folder / "config.json").read_text())
    assert {"versions", "hardware", "commit", "time"} <= set(config)
    assert config["protocol"]["csv"] == config["data"]["name"] == "town.csv"
    assert str(folder.parent) not in (folder / "config.json").read_text()
    assert "town.csv: 960 hours, 2023-12-25 05h to 2024-02-03 04h" in out
    assert (folder / "load_forecast.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.slow
def test_the_table_is_the_mean_and_the_deviation_over_seeds(a_run):
    (_, out, _), folder = a_run
    config = json.loads((folder / "config.json").read_text())
    for net in config["nets"]:
        one, other = (line for line in metrics(folder) if line["cell"] == net["cell"] and "test_mape" in line)
        row = re.search(rf"^ {net['cell']} .*", out[out.index("Test MAPE in per cent") :], re.MULTILINE)
        assert row
        mean, deviation = (
            (one["test_mape"] + other["test_mape"]) / 2,
            abs(one["test_mape"] - other["test_mape"]) / 2**0.5,
        )
        assert f"{mean:.4f} ± {deviation:.4f}" in row[0]
        assert f" {net['parameters']} " in row[0]
        assert f"{(one['test_mape_by_hour'][5] + other['test_mape_by_hour'][5]) / 2:.3f}" in row[0]


@pytest.mark.slow
def test_the_best_epoch_is_that_of_the_least_validation_error(a_run):
    _, folder = a_run
    lines = metrics(folder)
    for line in lines:
        if "best_epoch" in line:
            mine = [
                one for one in lines if "epoch" in one and (one["cell"], one["seed"]) == (line["cell"], line["seed"])
            ]
            assert min(mine, key=lambda one: one["validation_mape"])["epoch"] == line["best_epoch"]


@pytest.mark.slow
def test_the_same_command_resumes_a_record_and_another_one_does_not(a_run, in_process, tmp_path):
    (_, table, _), folder = a_run
    written(tmp_path / "town.csv", hourly())
    shutil.copytree(folder, tmp_path / "record")
    whole = metrics(folder)
    kept = [line for line in whole if line["cell"] != "tanh"]
    (tmp_path / "record" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    same = ("--csv", "town.csv", *TINY, "--seeds", 2, "--out", "record")
    code, out, error = in_process(tmp_path, *same)
    assert (code, error) == (0, "")
    assert metrics(tmp_path / "record") == whole
    assert out[out.index("Test MAPE") :].split("record")[0] == table[table.index("Test MAPE") :].split("record")[0]
    assert "lk_relu seed" not in out  # it was there
    code, _, error = in_process(tmp_path, *same, "--lr", "0.02")
    assert (code, "is a record with another protocol (lr: 0.01 there, 0.02 here); pass another" in error) == (2, True)
    written(tmp_path / "town.csv", hourly(start="2023-12-25T06:00"))
    code, _, error = in_process(tmp_path, *same)
    assert (code, "is a record with another data (" in error) == (2, True)


def test_an_out_with_a_name_that_is_too_long_is_refused(in_process, tmp_path):
    code, _, error = in_process(tmp_path, *TINY, "--out", "x" * 300)
    assert (code, "too long" in error, len(error.splitlines())) == (2, True, 1)


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(tmp_path):
    code, _, error = command("experiments.load_forecast", "--epochs", 2, "--seeds", 1, "--out", tmp_path / "record")
    assert (code, error) == (0, "")
    cells = [line["cell"] for line in metrics(tmp_path / "record") if "test_mape" in line]
    assert cells == ["last week", "yesterday", "tanh", "relu", "lk_relu", "drelu"]


# --- nothing leaks


def test_each_target_hour_is_in_one_part_and_the_parts_follow_each_other():
    for count in (load_series.LEAST_HOURS, HOURS, 1001):
        series = load_series.Series(np.datetime64("2024-01-01T00"), np.arange(1.0, count + 1), "line")
        cut = load_series.windows(series)
        hours = {part: forecasts.targets(series, starts) - 1 for part, starts in cut.starts.items()}
        assert all(len(starts) for starts in cut.starts.values())
        assert hours["train"].min() >= load_series.HISTORY
        assert hours["train"].max() < hours["validation"].min()
        assert hours["validation"].max() < hours["test"].min()
        assert hours["test"].max() == count - 1
        # the loads from which the mean and the deviation come are before all others' targets
        assert cut.mean == pytest.approx(np.arange(1, int(hours["validation"].min()) + 1).mean())


@pytest.mark.slow
def test_a_forecast_sees_nothing_of_its_own_hours():
    series = load_series.made(days=60)
    cut = load_series.windows(series)
    graph, state = stacked_start("lk_relu", 5)
    for start in cut.starts["test"][[0, -1]]:
        features = cut.features.copy()
        before = forecasts.forecast(graph, state, cut, np.array([start]))
        features[start:] += 7
        after = forecasts.forecast(graph, state, dataclasses.replace(cut, features=features), np.array([start]))
        np.testing.assert_array_equal(before, after)
        features[start - 1] += 7
        after = forecasts.forecast(graph, state, dataclasses.replace(cut, features=features), np.array([start]))
        assert np.abs(before - after).max() > 1


@pytest.mark.slow
def test_the_test_part_has_no_part_in_training_and_choosing():
    series = load_series.made(days=60)
    first = int(load_series.windows(series).starts["test"][0])
    one, other = trained(series), trained(changed_after(series, first))
    assert [line for line in one if "epoch" in line] == [line for line in other if "epoch" in line]
    assert [line["test_mape"] for line in one if "test_mape" in line] != [
        line["test_mape"] for line in other if "test_mape" in line
    ]


@pytest.mark.slow
def test_the_validation_part_has_no_part_in_training():
    series = load_series.made(days=60)
    cut = load_series.windows(series)
    other_series = changed_after(series, int(cut.starts["validation"][0]))
    other = load_series.windows(other_series)
    assert (other.mean, other.deviation) == (cut.mean, cut.deviation)
    losses = [[line["train_loss"] for line in trained(s) if "epoch" in line] for s in (series, other_series)]
    assert losses[0] == losses[1]


# --- what the numbers are


def test_the_baselines_are_the_loads_of_a_week_and_of_a_day_before():
    series = load_series.made(days=50)
    cut = load_series.windows(series)
    for name, back in {"last week": 168, "yesterday": 24}.items():
        line = forecasts.baseline(name, series, cut)
        for ahead in (0, 11, 23):
            errors = [
                abs(series.load[t + ahead - back] - series.load[t + ahead]) / series.load[t + ahead]
                for t in cut.starts["test"]
            ]
            assert line["test_mape_by_hour"][ahead] == pytest.approx(100 * sum(errors) / len(errors))


def test_mape_of_a_small_case():
    forecast, load = np.array([[110.0, 50.0], [90.0, 150.0]]), np.array([[100.0, 100.0], [100.0, 100.0]])
    np.testing.assert_allclose(load_series.mape_by_hour(forecast, load), [10, 50])


NUMPY = {
    "tanh": np.tanh,
    "relu": lambda z: np.maximum(z, 0),
    "lk_relu": lambda z: np.concatenate([np.maximum(z, 0), np.maximum(-z, 0)], -1),
    "drelu": lambda z: np.maximum(z[..., : z.shape[-1] // 2], 0) - np.maximum(z[..., z.shape[-1] // 2 :], 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("cell", first_fast(NUMPY))
def test_the_net_is_the_loop(cell):
    x = np.random.default_rng(0).normal(size=(3, 6, 4))
    with jax.enable_x64(True):
        net = recurrent_net.RecurrentNet(cell, 5, features=4, horizon=2, rngs=nnx.Rngs(0))
        graph, state = nnx.split(net)
        net = nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64) + 0.01, state))
        found = net(jnp.asarray(x))
        w, b, u, v, c = (
            np.asarray(leaf[...])
            for leaf in (net.input.kernel, net.input.bias, net.recurrent.kernel, net.read_out.kernel, net.read_out.bias)
        )
    h = np.zeros((3, 10 if cell == "lk_relu" else 5))
    for t in range(6):
        h = NUMPY[cell](x[:, t] @ w + h @ u + b)
    np.testing.assert_allclose(found, h @ v + c, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("cell", NUMPY)
def test_the_number_of_parameters_is_that_of_the_net_and_alike_for_all(cell):
    wanted = load_forecast.Settings().parameters
    units = recurrent_net.units_for(cell, wanted)
    _, state = stacked_start(cell, units)
    count = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert count == recurrent_net.parameters(cell, units)
    assert abs(count / wanted - 1) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lk_relu", "tanh", "drelu"])
def test_the_recurrence_starts_orthogonal(cell):
    net = recurrent_net.RecurrentNet(cell, 6, features=4, horizon=2, rngs=nnx.Rngs(0))
    u = np.asarray(net.recurrent.kernel[...])
    parts = {"lk_relu": [u[:6], -u[6:]], "drelu": [u[:, :6], u[:, 6:]]}.get(cell, [u])
    for part in parts:
        np.testing.assert_allclose(part @ part.T, np.eye(6), atol=1e-5)
    if cell == "lk_relu":
        np.testing.assert_array_equal(*parts)
    if cell == "drelu":
        assert np.abs(parts[0] - parts[1]).max() > 0.1


@pytest.mark.slow
def test_the_first_loss_and_the_validation_error_are_those_of_the_start():
    series = load_series.made(days=28)
    cut = load_series.windows(series)
    cut = dataclasses.replace(cut, starts=cut.starts | {"train": cut.starts["train"][:64]})  # one batch
    first, _ = forecasts.train("tanh", 5, series, cut, epochs=1, seeds=1, lr=1e-12, console=Console())
    graph, state = stacked_start("tanh", 5)
    errors = {
        part: np.abs(forecasts.forecast(graph, state, cut, starts)[0] - forecasts.targets(series, starts))
        for part, starts in cut.starts.items()
    }
    filled = np.random.default_rng(0).permutation(cut.starts["train"])
    weights = np.bincount(np.resize(filled, 64), minlength=filled.max() + 1)[cut.starts["train"]]
    loss = np.average(errors["train"].mean(axis=1), weights=weights) / cut.deviation
    assert first["train_loss"] == pytest.approx(loss, rel=1e-4)
    relative = errors["validation"] / forecasts.targets(series, cut.starts["validation"])
    assert first["validation_mape"] == pytest.approx(100 * relative.mean(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cell", NUMPY)
def test_each_cell_learns(cell):
    series = load_series.made(days=120)
    lines = [line for line in trained(series, cell, units=20, epochs=20, seeds=1) if "epoch" in line]
    seen = load_series.windows(series).features[: len(series.load) * 7 // 10, 0]
    assert lines[-1]["train_loss"] < 0.75 * np.abs(seen - np.median(seen)).mean()  # the best constant forecast


@pytest.mark.slow
def test_seeds_together_are_seeds_alone():
    series = load_series.made(days=60)
    alone, together = trained(series, seeds=1), [line for line in trained(series, seeds=2) if line["seed"] == 0]
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        for key in {"train_loss", "validation_mape", "test_mape"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-3)


def test_the_made_series_has_its_cycles():
    series = load_series.made()
    np.testing.assert_array_equal(series.load, load_series.made().load)
    assert series.fingerprint != load_series.made(seed=1).fingerprint
    days = np.log(series.load).reshape(-1, 24)
    first = np.datetime64("2018-01-01")
    weekday = np.array([(first + np.timedelta64(day, "D")).item().weekday() for day in range(len(days))])
    assert weekday[0] == 0
    assert days[weekday < 5][:, 8].mean() - days[weekday >= 5][:, 8].mean() > 0.15
    assert abs(days[weekday < 5][:, 3].mean() - days[weekday >= 5][:, 3].mean()) < 0.05
    profile = days.mean(axis=0)
    assert profile.argmax() == 19
    months = days.mean(axis=1).reshape(2, 365).mean(axis=0)
    assert months[:30].mean() - months[180:210].mean() == pytest.approx(0.2, abs=0.06)
    slope, _ = np.polyfit(np.arange(len(days)), days.mean(axis=1), 1)
    assert abs(slope) * len(days) < 0.1


def test_features_are_the_load_the_hour_and_the_weekday():
    series = load_series.Series(np.datetime64("2024-02-29T22", "h"), 100 + np.arange(800.0) % 7, "leap")  # a Thursday
    features = load_series.windows(series).features
    assert features.shape == (800, load_series.FEATURES)
    hours = [22, 23, 0, 1]
    np.testing.assert_allclose(features[:4, 1], np.sin(2 * np.pi * np.array(hours) / 24), atol=1e-6)
    np.testing.assert_allclose(features[:4, 2], np.cos(2 * np.pi * np.array(hours) / 24), atol=1e-6)
    assert features[:4, 3:].argmax(axis=1).tolist() == [3, 3, 4, 4]
    assert (features[:, 3:].sum(axis=1) == 1).all()
    assert features[:560, 0].mean() == pytest.approx(0, abs=1e-6)
    assert features[:560, 0].std() == pytest.approx(1, abs=1e-5)


# --- CSV files


def test_a_csv_is_read_as_it_is(tmp_path):
    rows = hourly()
    series = read(written(tmp_path / "a.csv", rows))
    np.testing.assert_array_equal(series.load, [float(load) for _, load in rows])
    assert str(series.start) == "2023-12-25T05"
    swapped = [[load, "x", time.replace("T", " ")] for time, load in rows]
    path = written(tmp_path / "b.csv", swapped, "MW,note,when")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as Excel writes it
    other = read(path, time_column="when", load_column="MW")
    assert other.fingerprint == series.fingerprint


def test_blank_lines_and_a_comma_at_each_end_are_no_fault(tmp_path):
    rows = hourly()
    series = read(written(tmp_path / "a.csv", rows))
    blank = written(tmp_path / "b.csv", [*rows[:5], [], *rows[5:], []])
    ended = written(tmp_path / "c.csv", [[*row, ""] for row in rows])
    assert read(blank).fingerprint == read(ended).fingerprint == series.fingerprint
    with pytest.raises(UsageError, match="row 9: an hour is missing"):  # the blank line, row 7, is counted
        read(written(tmp_path / "d.csv", [*rows[:5], [], rows[5], *rows[7:]]))


def test_hours_that_begin_at_half_past_are_hours(tmp_path):
    series = read(written(tmp_path / "a.csv", hourly(start="2023-12-25T05:30")))
    assert (str(series.start), len(series.load)) == ("2023-12-25T05", HOURS)


def test_times_with_an_offset_go_through_the_change_of_clocks(tmp_path):
    rows = hourly(start="2024-10-26T00:00")
    change = 49  # 02:00 comes twice on the 27th: with +02:00, then with +01:00
    rows = [
        [time + "+02:00", load]
        if n < change + 2
        else [str(np.datetime64(time) - np.timedelta64(60, "m")) + "+01:00", load]
        for n, (time, load) in enumerate(rows)
    ]
    assert rows[change + 1][0][:13] != rows[change + 2][0][:13] or rows[change + 1][0][-6:] != rows[change + 2][0][-6:]
    series = read(written(tmp_path / "a.csv", rows))
    assert (str(series.start), len(series.load)) == ("2024-10-25T22", HOURS)


def put(row, column, text):
    def change(rows):
        rows[row - 2][column] = text  # the header is row 1
        return rows

    return change


def without(*numbers):
    return lambda rows: [row for number, row in enumerate(rows, 2) if number not in numbers]


BAD_ROWS = {
    "an hour missing": (without(50), "row 50: an hour is missing between 2023-12-27 04:00:00 and 2023-12-27 06:00:00"),
    "hours missing": (without(50, 51), "row 50: hours are missing", "fill the gap"),
    "an hour twice": (lambda rows: [*rows[:9], rows[8], *rows[9:]], "row 11: the hour 2023-12-25 13:00:00 is there"),
    "going back": (lambda rows: [*rows[30:], *rows[:30]], "row 932: ", "sort the rows by time"),
    "half hours": (put(3, 0, "2023-12-25T05:30"), "row 3: 2023-12-25 05:30:00 is less than an hour after", "mean of"),
    "no time": (put(9, 0, "yesterday"), "row 9: time is a time such as 2024-01-31 23:00, got 'yesterday'"),
    "a time before all": (put(2, 0, "0001-01-01T00:00+05:00"), "row 2: time is a time such as 2024-01-31 23:00"),
    "mixed offsets": (put(9, 0, "2023-12-25T12:00+01:00"), "row 9: some times have an offset", "write all alike"),
    "mixed offsets, hours": (put(9, 0, "2023-12-25T12:00+00"), "row 9: some times have an offset", "write all alike"),
    "text": (put(700, 1, "n/a"), "row 700: load is a number such as 1234.5, got 'n/a'"),
    "empty": (put(700, 1, ""), "row 700: load is a number such as 1234.5, got ''"),
    "zero": (put(8, 1, "0"), "row 8: load is positive, since errors are in per cent of it", "got 0"),
    "negative": (put(8, 1, "-3.5"), "row 8: load is positive", "got -3.5"),
    "nan": (put(8, 1, "nan"), "row 8: load is a number such as 1234.5, got 'nan'"),
    "infinite": (put(8, 1, "inf"), "row 8: load is positive", "got inf"),
    "a row cut short": (lambda rows: [*rows[:-1], rows[-1][:1]], "row 961: load is a number", "got ''"),
    "too short": (lambda rows: rows[:671], "has 671 hours; a forecast needs 672 at least"),
    "constant": (lambda rows: [[time, "5"] for time, _ in rows], "is constant in its first 70 %, 5"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(case, in_process, tmp_path):
    change, *parts = BAD_ROWS[case]
    path = written(tmp_path / "town.csv", change(hourly()))
    code, _, error = in_process(tmp_path, "--csv", "town.csv", "--out", "record")
    assert code == 2
    assert re.fullmatch(r"error: .*town\.csv.*\n", error)
    for part in parts:
        assert part in error
    assert list(tmp_path.iterdir()) == [path]


BAD_FILES = {
    "missing": (None, "cannot read town.csv (No such file or directory); pass --csv"),
    "empty": (b"", "town.csv has no column 'time', only none; pass --time-column"),
    "other columns": (b"a,load\n1,2\n", "town.csv has no column 'time', only a, load; pass --time-column"),
    "no load": (b"time,b\n1,2\n", "town.csv has no column 'load', only time, b; pass --load-column"),
    "not UTF-8": ("time,load\n,\u00e9\n".encode("latin-1"), "town.csv is no CSV file in UTF-8"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named(case, in_process, tmp_path):
    content, message = BAD_FILES[case]
    if content is not None:
        (tmp_path / "town.csv").write_bytes(content)
    code, _, error = in_process(tmp_path, "--csv", "town.csv", "--out", "record")
    assert code == 2
    assert re.fullmatch(r"error: .*\n", error)
    assert message in error
    assert not (tmp_path / "record").exists()


def test_a_series_that_is_too_short_is_refused_also_when_made():
    with pytest.raises(UsageError, match="has 648 hours; a forecast needs 672 at least"):
        load_series.windows(load_series.made(days=27))
    assert load_series.windows(load_series.made(days=28)).starts["test"].size


# --- other bad input


BAD = {
    "epochs 0": ("--epochs 0", "--epochs is from 1 to 100,000, got 0"),
    "seeds 0": ("--seeds 0", "--seeds is from 1 to 100, got 0"),
    "seeds -1": ("--seeds -1", "--seeds is from 1 to 100, got -1"),
    "parameters 0": ("--parameters 0", "--parameters is from 1 to 1,000,000, got 0"),
    "lr nan": ("--lr nan", "--lr is a positive number up to 1, got nan"),
    "lr 0": ("--lr 0", "--lr is a positive number up to 1, got 0"),
    "no cell": ("--cells", "--cells"),
    "unknown cell": ("--cells gru", "gru", "lk_relu"),
    "no paper preset": ("--preset paper", "paper", "quick"),
    "no number": ("--epochs many", "many"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_short_message_and_leaves_nothing(case, in_process, tmp_path):
    arguments, *parts = BAD[case]
    code, _, error = in_process(tmp_path, "--out", "record", *arguments.split())
    assert code == 2
    for part in parts:
        assert part in error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 15  # tyro draws a box around its own
    assert list(tmp_path.iterdir()) == []


def test_an_existing_record_is_refused_and_kept(in_process, tmp_path):
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "metrics.jsonl").write_text("mine")
    code, _, error = in_process(tmp_path, *TINY, "--out", "record")
    assert code == 2
    assert "is there and is no record; pass --out with a new folder" in error
    assert [path.read_text() for path in (tmp_path / "record").iterdir()] == ["mine"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_with_3_and_keeps_the_record(in_process, tmp_path, monkeypatch):
    def broken(graph, state, cut, starts):
        return np.full((1, len(starts), 24), np.nan)

    written(tmp_path / "town.csv", hourly())
    monkeypatch.setattr(forecasts, "forecast", broken)
    code, _, error = in_process(tmp_path, "--csv", "town.csv", *TINY, "--seeds", 1, "--out", "record")
    assert code == 3
    assert re.fullmatch(r"stopped: .*not finite \(lk_relu, seed 0, epoch 1\); try a smaller --lr\n", error)
    assert [line["cell"] for line in metrics(tmp_path / "record")] == ["last week", "yesterday"]
