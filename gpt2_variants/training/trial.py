"""A trial of an optimizer before the run: whether DeepSpeed can build it here, and take a step with it."""

import sys
import time

import torch
from torch import nn

from ..config.deepspeed_json import ds_config_name, resolve_ds_config
from ..config.optimizer_json import for_deepspeed, is_adam, make_schedule
from ..config.options import Options
from ..faults import UsageError
from ..ranks import main_rank, world_size
from .engine import init_distributed
from .optimizers import parameter_groups


def try_out(options: Options) -> None:
    """Take an optimizer step with DeepSpeed's engine around one small layer, with the optimizer of resolved options.

    On all ranks. torch's AdamW, as ds_configs/ have it, runs everywhere and is not tried. Any other may have to be
    compiled first, which is said.

    Raises:
        UsageError: DeepSpeed cannot run it; says what DeepSpeed says.
    """
    config = resolve_ds_config(options, world_size(), options.max_steps or 1, built=False)  # parsing has built it
    kind, params = config["optimizer"]["type"], config["optimizer"]["params"]
    if (is_adam(kind) and params.get("torch_adam")) or options.apex in ("adam", "all"):
        return
    init_distributed()
    import deepspeed  # which looks for an accelerator when it is imported, unless it was told of one

    if main_rank():
        print(
            f"optimizer {kind}: tried out on one small layer; DeepSpeed may compile it first, which takes about a "
            "minute, once",
            file=sys.stderr,
            flush=True,
        )
    start = time.perf_counter()
    layer = nn.Linear(8, 8)
    try:
        engine, *_ = deepspeed.initialize(
            model=layer,
            model_parameters=parameter_groups(layer, params.get("weight_decay", 0.0)),
            config=for_deepspeed(config),
            lr_scheduler=make_schedule(config),
        )
        dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
        for _ in range(config["gradient_accumulation_steps"]):
            engine.backward(engine(torch.ones(2, 8, dtype=dtype, device=engine.device)).float().sum())
            engine.step()
        engine.destroy()
    except (
        Exception
    ) as err:  # assertions, missing compilers and kernels, wrong parameters: whatever an optimizer raises
        what = " ".join(str(err).split())
        raise UsageError(
            [
                f"--deepspeed_config {ds_config_name(options)}: optimizer {kind}: DeepSpeed cannot run it here at ZeRO "
                f"stage {config.get('zero_optimization', {}).get('stage', 0)} ({type(err).__name__}: {what[:300]}); "
                'AdamW with "torch_adam": true runs everywhere'
            ]
        ) from err
    if main_rank():
        print(f"optimizer {kind}: runs here ({time.perf_counter() - start:.1f} s)", file=sys.stderr, flush=True)
