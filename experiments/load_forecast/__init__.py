"""Recurrent nets that forecast a day of hourly load: `python -m experiments.load_forecast`."""
