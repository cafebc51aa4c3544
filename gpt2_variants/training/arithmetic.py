"""How float32 matrices are multiplied, and whether all is repeatable to the bit: settings of the whole process."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from ..config.plan import Plan

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # read by cuBLAS when it starts; with this value its sums are always in one order


@contextlib.contextmanager
def arithmetic(plan: Plan) -> Iterator[None]:
    """Compute inside as `plan` says, and as before outside: TF32, and with `deterministic` repeatable operators only.

    On CUDA the backward passes of flash attention and of gathers, index additions and the sums of cuBLAS are repeatable
    then; an operator that has no such way raises RuntimeError. Kernels that torch.compile tunes by measuring are chosen
    by a rule instead. NCCL adds in the same order on the same GPUs only.
    """
    precision = torch.get_float32_matmul_precision()
    if plan.tf32:
        torch.set_float32_matmul_precision("high")
    try:
        with _deterministic() if plan.deterministic else contextlib.nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    import torch._inductor.config as inductor

    cudnn, workspace = torch.backends.cudnn, os.environ.get(WORKSPACE)
    memory: Any = torch.utils.deterministic
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    flags = (cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory)
    by_rule = inductor.deterministic
    os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    memory.fill_uninitialized_memory = False  # nothing here reads what it has not written
    inductor.deterministic = True
    try:
        yield
    finally:
        inductor.deterministic = by_rule
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = flags
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if workspace is None:
            os.environ.pop(WORKSPACE, None)
