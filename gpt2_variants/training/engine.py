"""DeepSpeed's engine around a model."""

import atexit
import contextlib
import ctypes
import os
import platform
import socket
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import nodes
from ..config.optimizer_json import for_deepspeed, make_schedule
from ..config.plan import Plan
from ..faults import UsageError
from ..models.modeling_base import recompute_blocks
from ..ranks import use_accelerator
from ..warm_start import WarmStart
from .masters import Float32Masters, float32_parameters
from .optimizers import apex_adam, parameter_groups
from .seeds import seed_everything


def init_distributed() -> None:
    """Join the process group that the launcher describes; without a launcher, make one of a single rank.

    Raises:
        UsageError: the port where the ranks are to meet is taken; on rank 0.
    """
    alone = "RANK" not in os.environ  # no launcher: one rank
    if alone:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    use_accelerator()
    nodes.choose_interface()
    # of collectives that DeepSpeed calls by the names they had before torch 2.13; every rank would be told
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # of a single rank, which DeepSpeed binds to no device; it is the current one, as set below
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    import deepspeed

    if not torch.cuda.is_available():
        # Training never uses this op; building it needs a compiler, and each rank leaks 66 MiB of shared memory.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before NCCL's first collective takes the current one
    if not dist.is_initialized():
        if alone and not torch.cuda.is_available():
            # without a port, which another process may have taken meanwhile
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            deepspeed.init_distributed()
        except dist.DistNetworkError as err:
            if "EADDRINUSE" not in str(err):
                raise
            port = os.environ["MASTER_PORT"]
            raise UsageError(
                [f"port {port}: another process listens there, such as another run; deepspeed --master_port N"]
            ) from err
        atexit.register(dist.destroy_process_group)


def keep_freed_memory() -> None:
    """On a CPU with glibc: keep what is freed for the next allocation, instead of giving it back to the kernel.

    The kernel clears each page that it hands out again; of the half-gigabyte buffers of a step that took longer than
    filling them (benchmarks/NOTES.md). Elsewhere nothing happens.
    """
    if torch.cuda.is_available() or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def make_engine(plan: Plan, warm: WarmStart | None = None, universal: bool = False) -> tuple[Any, Float32Masters]:
    """Return DeepSpeed's engine around the new model of `plan`, and that model's `Float32Masters`.

    Args:
        universal: the engine is to load a checkpoint in DeepSpeed's universal format.
    """
    import deepspeed

    seed_everything(plan.seed)  # the same weights on every rank
    model = plan.spec.model_class._from_config(plan.model_config(), attn_implementation=plan.attn_implementation)
    if warm is not None:
        warm.apply(model)
    if plan.gradient_checkpointing:
        recompute_blocks(model)
    if plan.apex in ("layer_norm", "all"):
        use_apex_layer_norm(model)
    given, schedule = for_deepspeed(plan.ds_config), make_schedule(plan.ds_config)
    optimizer = None
    if plan.apex in ("adam", "all"):
        optimizer, given = apex_adam(given), {k: v for k, v in given.items() if k != "optimizer"}
    if universal:
        given = {**given, "checkpoint": {**given.get("checkpoint", {}), "load_universal": True}}
    # DeepSpeed rounds the weights to bf16 before it takes the masters: harmless to random ones
    precise = float32_parameters(model) if warm is None else dict(model.named_parameters())
    unrounded = {name: p.detach().clone() for name, p in precise.items()}
    with _without_inductor(plan):
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, plan.weight_decay),
            optimizer=optimizer,
            config=given,
            lr_scheduler=schedule,
        )
    if plan.compile:
        allow_recompilations(plan.model_config().n_layer)
        engine.module.compile_parts()
    seed_everything(plan.seed + engine.global_rank)  # dropout differs between ranks
    return engine, Float32Masters(engine, unrounded)


@contextlib.contextmanager
def _without_inductor(plan: Plan) -> Iterator[None]:
    """While inside, `torch.compile` leaves functions as they are, where the run compiles nothing.

    DeepSpeed imports its Muon for every optimizer and decorates three functions of it; that would import Inductor,
    which takes more than a second.
    """
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    if not plan.compile and "muon" not in plan.optimizer["type"].lower():
        os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def allow_recompilations(num_layers: int) -> None:
    """Let `torch.compile` make as many kinds of blocks as a run needs; beyond that it fails, not goes on without.

    There are kinds for training and evaluation, for full and short batches, and with `scale_attn_by_inverse_layer_idx`
    for each layer: more than the 8 of one function, and 256 of it in all, that dynamo allows.
    """
    limit = max(64, 8 * num_layers)
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(256, limit)
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def use_apex_layer_norm(model: nn.Module) -> None:
    """Put NVIDIA apex's `FusedLayerNorm` in the place of each `LayerNorm`, with the same parameters."""
    from apex.normalization import FusedLayerNorm

    for module in list(model.modules()):
        for name, norm in module.named_children():
            if type(norm) is nn.LayerNorm:
                fused = FusedLayerNorm(norm.normalized_shape, eps=norm.eps)
                fused.weight, fused.bias = norm.weight, norm.bias
                setattr(module, name, fused)
