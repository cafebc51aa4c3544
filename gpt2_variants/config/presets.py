"""What a preset says, and the recipe that stands in where neither an option nor the DeepSpeed JSON says a number."""

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

# What of a preset suits its own size alone: a model of another size keeps GPT-2's settings and the JSON's rate.
OF_ITS_SIZE = ("model_args", "learning_rate")

# The published recipe's value of each number that a DeepSpeed JSON may leave to "auto", or leave out where DeepSpeed
# has no default that anyone would want.
RECIPE: dict[str, Any] = {
    "lr": 1e-4,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "weight_decay": 0.01,
    "gradient_clipping": 1.0,
    "train_batch_size": 64,
    "warmup_ratio": 0.1,
}
