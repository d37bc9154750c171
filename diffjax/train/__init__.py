"""Training: a pure step, its state, checkpoints, metrics, and the loop that ties them together."""
