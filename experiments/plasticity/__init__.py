"""Does a net that learns one task after the other go on learning? `python -m experiments.plasticity`."""
