"""Train one GPT-2 variant with DeepSpeed: `deepspeed train_ds.py --variant duo_predict` (options: --help)."""

from gpt2_variants.train_command import leave, main

if __name__ == "__main__":
    leave(main())
