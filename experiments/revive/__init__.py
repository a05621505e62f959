"""A net trained to death, and linked back to life: `python -m experiments.revive`."""
