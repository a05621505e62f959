"""The four problems of Kumar et al.: does a net that is scored online go on learning? See `experiments.plasticity`."""
