"""A claim's table and page, from its record alone."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.engine import tables
from experiments.headlines.claim import Claim, Line


def table(claim: Claim, lines: Sequence[Line]) -> list[dict[str, str]]:
    """A row for each method: each measure's mean and deviation over the seeds."""
    rows = []
    for name in claim.rows:
        runs = [line for line in lines if line["row"] == name]
        if runs:
            row = {"row": name}
            for key, heading in claim.measures.items():
                values = [run[key] for run in runs if key in run]
                row[heading] = tables.spread(values) if values else "-"
            seconds = statistics.fmean(run["seconds"] for run in runs)
            rows.append(row | {"seeds": str(len(runs)), "time": f"{seconds:.0f} s"})
    return rows


def page(claim: Claim, config: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """The page of a record."""
    parts = [
        f"# {claim.title}",
        f"The claim: {config['says']}",
        f"The test: {config['protocol']['text']}",
        f"{config['data']['description']}, fingerprint {config['data']['fingerprint']}; {config['protocol']['epochs']} "
        "epochs; mean ± sample standard deviation over seeds.",
        tables.markdown(table(claim, lines)),
        tables.provenance(config),
    ]
    return "\n\n".join(parts) + "\n"
