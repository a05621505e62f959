"""Tables and one page, from records alone: `python -m experiments.report`."""
