"""Hourly load series: made here or read from a CSV file, and cut into windows of time that share no target hour.

A window at hour t has the hours before it as inputs, t - 168 to t - 1, and its targets are t to t + 23. The series is
split by time: the first 70 % of the hours train, the next 15 % validate, the last 15 % test. All targets of a window
are in its part. Its inputs may reach back into the part before, as they would in use.
"""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.signal import lfilter

from experiments.engine.errors import UsageError, first_line

HISTORY, HORIZON = 168, 24
FEATURES = 10  # of an hour: load, two for the hour of the day, seven for the weekday
STRIDE = 5  # hours between windows that train; with it, their starts visit every hour of the week
LEAST_HOURS = 4 * 7 * 24
_LEAST, _MOST = 1e-9, 1e15  # a load; its inverse and its square are far from the ends of float32 and float64
_MISSING = (
    "missing between {earlier} and {time}; fill the gap, take the longer part, or give times with their offset from "
    "UTC if clocks changed"
)
_PARTS = {"train": (0.0, 0.7), "validation": (0.7, 0.85), "test": (0.85, 1.0)}


@dataclasses.dataclass(frozen=True)
class Series:
    """A load for every hour, without gaps.

    Attributes:
      start: the first hour.
      load: (T,) float64, in any unit, positive.
      name: of the file, or "made".
    """

    start: np.datetime64
    load: np.ndarray
    name: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the start and the loads, 16 hexadecimal digits."""
        return hashlib.sha256(str(self.start).encode() + self.load.tobytes()).hexdigest()[:16]

    @property
    def identity(self) -> dict[str, str]:
        """What a record says of its data."""
        return {"name": self.name, "fingerprint": self.fingerprint, "description": str(self)}

    def __str__(self) -> str:
        end = self.start + np.timedelta64(len(self.load) - 1, "h")
        mean, low, high = self.load.mean(), self.load.min(), self.load.max()
        span = f"{str(self.start)[:13]}h to {str(end)[:13]}h".replace("T", " ")
        return f"{self.name}: {len(self.load):,} hours, {span}, load {low:,.6g} to {high:,.6g}, mean {mean:,.6g}"


def made(days: int = 730, seed: int = 0) -> Series:
    """A series with the cycles of a town's load. Not measured anywhere.

        load = 1000 exp(season + day + slow + fast)

    season: a cosine over the year, 0.1 in January and -0.1 in July. day: a night at -0.3 and two Gaussian humps; on
    workdays 0.35 high at 8:30 and 0.45 at 19:00, on Saturdays and Sundays 0.15 at 10:30 and 0.35 at 19:00. slow: as the
    weather, noise of deviation 0.05 that is forgotten in 3 days. fast: noise of deviation 0.02, forgotten in 5 hours.
    Both are autoregressive of order 1: x' = phi x + sqrt(1 - phi^2) * deviation * N(0, 1), phi = exp(-1 / hours).

    It has so many days from Monday, 1 January 2018; the seed is that of the noises.

    >>> from experiments.load_forecast.series import made
    >>> print(made())
    made: 17,520 hours, 2018-01-01 00h to 2019-12-31 23h, load 569.993 to 1,454.48, mean 919.344
    """
    hours = np.arange(24 * days)
    hour, weekend = hours % 24, hours // 24 % 7 >= 5

    def hump(height, at, width):
        return height * np.exp(-0.5 * ((hour - at) / width) ** 2)

    day = np.where(weekend, hump(0.15, 10.5, 2.5), hump(0.35, 8.5, 2.5)) + hump(np.where(weekend, 0.35, 0.45), 19, 3)
    season = 0.1 * np.cos(2 * np.pi * (hours - 14 * 24) / (365.25 * 24))
    rng = np.random.default_rng(seed)
    noise = _autoregressive(rng, len(hours), 0.05, 72) + _autoregressive(rng, len(hours), 0.02, 5)
    return Series(np.datetime64("2018-01-01T00", "h"), 1000 * np.exp(season + day - 0.3 + noise), "made")


def _autoregressive(rng: np.random.Generator, count: int, deviation: float, hours: float) -> np.ndarray:
    phi = math.exp(-1 / hours)
    noise = deviation * rng.normal(size=count)
    rest, _ = lfilter([math.sqrt(1 - phi * phi)], [1, -phi], noise[1:], zi=[phi * noise[0]])
    return np.append(noise[0], rest)


def read_csv(path: str, time_column: str, load_column: str) -> Series:
    """A series from a CSV file with a header, a row for each hour in order, and times as ISO 8601 has them.

    Times with an offset, as 2024-03-31T02:00+02:00, are taken to UTC.

    Raises:
      UsageError: if it cannot be read, or an hour is missing, double, or has no positive load; with the row's number in
        the file, the header being row 1.
    """
    rows = _rows(path, {"--time-column": time_column, "--load-column": load_column})
    if len(rows) < LEAST_HOURS:
        raise UsageError(f"{path} has {len(rows):,} hours; a forecast needs {LEAST_HOURS:,} at least, four weeks")
    time: Any = pd.to_datetime(rows[time_column].str.strip(), format="ISO8601", errors="coerce", utc=True)
    time = time.where(time.dt.year >= 1)  # the year 0 is none of Python's
    has_offset = rows[time_column].str.contains(r":.*(?:Z|[+-]\d\d(?::?\d\d)?)\s*$")
    if not has_offset.any():
        time = time.dt.tz_localize(None)
    step = time.diff() / pd.Timedelta(hours=1)  # nan in the first row
    load: Any = pd.to_numeric(rows[load_column], errors="coerce")
    for wrong, says in (
        (time.isna(), "{time_column} is a time such as 2024-01-31 23:00, got {time_text!r}; correct it"),
        (has_offset != has_offset.iloc[0], "some times have an offset from UTC, {time_text} differs; write all alike"),
        (step == 0, "the hour {time} is there twice; remove one, or give times with their offset from UTC"),
        (step < 0, "{time} comes after {earlier}; sort the rows by time"),
        (step < 1, "{time} is less than an hour after {earlier}; take the mean of each hour"),
        ((step > 1) & (step <= 2), f"an hour is {_MISSING}"),
        (step > 2, f"hours are {_MISSING}"),
        (load.isna(), "{load_column} is a number such as 1234.5, got {load_text!r}; correct it, or fill it in"),
        (~load.between(_LEAST, _MOST), "{load_column} is positive, since errors are in per cent of it, and at most "
         f"{_MOST:g}; got {{load_text}}; correct it, or fill it in"),
    ):  # fmt: skip
        if wrong.any():
            row = wrong.idxmax()  # the first
            texts = {"time_text": rows[time_column][row], "load_text": rows[load_column][row], "time": time[row]}
            names = {"time_column": time_column, "load_column": load_column, "earlier": time.shift()[row]}
            raise UsageError(f"{path}, row {row}: {says.format(**texts, **names)}")
    start = time.iloc[0].tz_localize(None).to_datetime64().astype("datetime64[h]")
    return Series(start, load.to_numpy(np.float64), Path(path).name)


def _rows(path: str, columns: dict[str, str]) -> Any:
    """A data frame of texts, without blank lines; the index is the row's number in the file."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            options: Any = {"dtype": str, "keep_default_na": False, "skip_blank_lines": False, "index_col": False}
            rows = pd.read_csv(file, usecols=lambda _: True, **options)  # cells beyond the header are ignored
    except pd.errors.EmptyDataError:
        rows = pd.DataFrame()
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}); pass --csv with a CSV file") from error
    except (UnicodeDecodeError, pd.errors.ParserError) as error:
        raise UsageError(f"{path} is no CSV file in UTF-8 ({first_line(error)}); save it as one") from error
    for option, column in columns.items():
        if column not in rows:
            raise UsageError(f"{path} has no column {column!r}, only {', '.join(rows) or 'none'}; pass {option}")
    rows.index += 2  # the header is row 1
    return rows[(rows != "").any(axis=1)]


@dataclasses.dataclass(frozen=True)
class Windows:
    """A series as a net sees it.

    Attributes:
      features: (T, 10) float32: the standardised load, sine and cosine of the hour of the day, the weekday as one of
        seven.
      mean: of the load in the training part.
      deviation: of the load in the training part.
      starts: "train", "validation", "test" -> the hours t at which windows start.
    """

    features: np.ndarray
    mean: float
    deviation: float
    starts: dict[str, np.ndarray]


def windows(series: Series) -> Windows:
    """Standardise by the training part, and cut.

    Windows that train or validate start every 5 hours, those that test every hour.

    Raises:
      UsageError: if the series is too short, or constant in its training part.

    Examples:
      >>> from experiments.load_forecast.series import made, windows
      >>> {part: (int(starts[0]), int(starts[-1])) for part, starts in windows(made(days=100)).starts.items()}
      {'train': (168, 1653), 'validation': (1680, 2015), 'test': (2040, 2376)}
    """
    count = len(series.load)
    if count < LEAST_HOURS:
        raise UsageError(f"{series.name} has {count:,} hours; a forecast needs {LEAST_HOURS:,} at least, four weeks")
    ends = {part: (round(first * count), round(last * count)) for part, (first, last) in _PARTS.items()}
    seen = series.load[: ends["train"][1]]
    mean, deviation = float(seen.mean()), float(seen.std())
    if not deviation > 1e-6 * mean:
        raise UsageError(
            f"the load of {series.name} is constant in its first 70 %, {mean:g}: nothing is to be forecast"
        )
    times = series.start + np.arange(count)
    angle = 2 * np.pi * (times.astype(int) % 24) / 24
    weekday = (times.astype("datetime64[D]").astype(int) + 3) % 7  # 1970 began on Thursday
    calendar = np.column_stack([np.sin(angle), np.cos(angle), np.eye(7)[weekday]])
    features = np.column_stack([(series.load - mean) / deviation, calendar]).astype(np.float32)
    starts = {
        part: np.arange(max(first, HISTORY), last - HORIZON + 1, 1 if part == "test" else STRIDE)
        for part, (first, last) in ends.items()
    }
    return Windows(features, mean, deviation, starts)


def mape_by_hour(forecast: np.ndarray, load: np.ndarray) -> np.ndarray:
    """The mean absolute percentage error of each of the 24 hours ahead, from (N, 24) forecasts and loads."""
    return 100 * (np.abs(forecast - load) / load).mean(axis=0)
