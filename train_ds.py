"""Train one GPT-2 variant with DeepSpeed: `deepspeed train_ds.py --variant duo_predict` (options: --help)."""

from gpt2_variants.ending import end_with
from gpt2_variants.train_command import main

if __name__ == "__main__":
    end_with(main)
