"""Where the figures of a run go: `metrics.jsonl` always, W&B if asked."""
