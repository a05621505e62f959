"""Units that start dead, in the plane: `python -m experiments.dynamics`."""
