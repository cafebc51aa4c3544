"""One of two ranks that train small models of a variant at each stage of ZeRO: `python -m ... VARIANT LOSSES.json`."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ..variant_code import find
from .sharding import STAGES
from .subject import Subject

STEPS, TOKENS = 4, 48


def main(asked: str, output: Path) -> None:
    """Train, and write stage -> the mean loss of each step to `output`, on rank 0."""
    import deepspeed

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=2)
    subject = Subject(find(asked))
    losses: dict[int, list[float]] = {}
    for stage in STAGES:
        torch.manual_seed(7)
        engine, *_ = deepspeed.initialize(
            model=subject.model(tokens=TOKENS).train(),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            },
        )
        losses[stage] = []
        for step in range(STEPS):
            torch.manual_seed(100 * step + rank)
            ids = subject.ids(2, TOKENS, seed=2 * step + rank)
            loss = engine(ids, labels=ids, skip_logits=True).loss
            engine.backward(loss)
            engine.step()
            mean = loss.detach().float()
            dist.all_reduce(mean)
            losses[stage].append(mean.item() / 2)
    if rank == 0:
        output.write_text(json.dumps(losses))
    sys.stdout.flush()
    os._exit(0)  # the teardown of the ranks' threads is no part of what is asked


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
