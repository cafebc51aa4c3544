"""What a preset says."""

from typing import Any

# The recipe of the published runs (seed), and a model that trains in minutes on 2 CPU cores (demo).
# Batch, optimizer, clipping and precision of the seed recipe stand in ds_configs/.
PRESETS: dict[str, dict[str, Any]] = {
    "seed": {
        "size": "gpt2-medium",
        "dataset": "wikitext-103",
        "tokenizer": "openai-community/gpt2-medium",
        "num_train_epochs": 5.0,
        "warmup_ratio": 0.1,
        "eval_steps": 500,
        "save_steps": 500,
        "logging_steps": 100,
    },
    "demo": {
        "size": "nano",
        "dataset": "builtin",
        "tokenizer": "builtin",
        "block_size": 64,
        "max_steps": 400,
        "train_batch_size": 16,
        "learning_rate": 2e-3,
        "warmup_ratio": 0.1,
        "eval_steps": 100,
        "save_steps": 100,
        "logging_steps": 10,
        # GPT-2's 0.02 suits a width of 1024; at nano's it leaves attention flat for most of a run this short
        # (validation perplexity 360 instead of 250). Dropout costs a quarter of a CPU step.
        "model_args": {"initializer_range": 0.05, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    },
}
