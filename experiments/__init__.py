"""The paper's experiments, reproduced: one file a table."""
