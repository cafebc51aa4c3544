"""Which rank this process is, of how many, on what."""

import os


def main_rank() -> bool:
    """Whether this process is the one that speaks (rank 0, or no launcher)."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """The number of ranks the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def use_accelerator() -> None:
    """To be called before deepspeed is imported: on a CPU it is told so, and need not warn that it found nothing."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
