"""What the experiments share: data, the training loop, records, plots."""
