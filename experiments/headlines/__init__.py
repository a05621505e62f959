"""The remedies' own headline claims, each tested by a small run: `python -m experiments.headlines lcw --seeds 3`."""
