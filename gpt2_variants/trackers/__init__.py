"""Where the figures of a run go: `metrics.jsonl` always, W&B and TensorBoard if asked."""
