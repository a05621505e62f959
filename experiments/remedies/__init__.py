"""All remedies on the same work: `python -m experiments.remedies`."""
