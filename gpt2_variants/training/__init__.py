"""Training: the only folder that calls the DeepSpeed engine."""
