"""Whether every variant computes on this device what it computes on a CPU in float64: loss, gradients, dropout.

What is allowed is told by the CPU itself: an error may be 4 times the one that it makes in the same dtype.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

from gpt2_variants.models.duo_predict_attention import DuoPredictAttention
from gpt2_variants.registry import VARIANTS
from gpt2_variants.variant_code import find
from gpu_items import Day, Item, ModelShape, Row, Skipped

FAMILIES = ("gpt2", "duo_predict", "drift_diffusion", "parallel_concat", "rotating_head_norm")
DTYPES = (torch.float32, torch.bfloat16)
# What rounding alone may come to, where the CPU happens to make no error: of the loss in nats, of the gradient's norm.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2e-3}
ALLOWED = 4
DROPOUT = 0.5
# How far the slope may be from 1. Where the backward pass drops other weights than the forward pass, it is 0 to 0.2.
OFF_BY = {torch.float32: 0.02, torch.bfloat16: 0.15}


def make_model(variant: str, shape: ModelShape, dtype: torch.dtype, dropout: float = 0.0, **fields: Any) -> nn.Module:
    """Return a model on the CPU, in training mode, with random weights that are those of `dtype`."""
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    config = find(variant).make_config(
        *(None, shape.vocabulary, shape.tokens),
        **{"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1, **shape.sizes(), **rates, **fields},
    )
    torch.manual_seed(0)
    model = find(variant).model_class._from_config(config, attn_implementation="sdpa")
    return model.to(dtype).train()


def token_ids(shape: ModelShape) -> torch.Tensor:
    """Return (sequences, tokens) of random ids."""
    size = (shape.sequences, shape.tokens)
    return torch.randint(0, shape.vocabulary, size, generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def same_noise() -> Iterator[None]:
    """Within it `torch.randn` gives the same numbers in every dtype and on every device, anew from the first."""
    generator = torch.Generator().manual_seed(2)

    def drawn(shape: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        return original(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    original = torch.randn
    with mock.patch("torch.randn", drawn):
        yield


def loss_and_gradients(model: nn.Module, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the training loss in nats, and each parameter's gradient, float64 on the CPU."""
    model.zero_grad()
    with same_noise():
        loss = model(input_ids=ids, labels=ids, skip_logits=True).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}


def errors(
    found: tuple[float, dict[str, torch.Tensor]], exact: tuple[float, dict[str, torch.Tensor]]
) -> dict[str, float]:
    """Return the error of the loss (nats), of all gradients (over their norm), and of the parameter farthest off.

    That one's difference is set against its own gradient's norm, but at least a hundredth of the norm of all: the
    gradient of a key's bias, for one, is 0.
    """
    norm = torch.stack([g.norm() for g in exact[1].values()]).norm()
    off = {name: (found[1][name] - g).norm() for name, g in exact[1].items()}
    worst = {name: float(off[name] / max(g.norm(), norm / 100)) for name, g in exact[1].items()}
    name = max(worst, key=lambda key: worst[key])
    return {
        "loss_error": abs(found[0] - exact[0]),
        "grad_error": float(torch.stack(list(off.values())).norm() / norm),
        "worst_error": worst[name],
        "worst": name,
    }


def within(row: Row, own: dict[str, float], allowed: dict[str, float], dtype: torch.dtype) -> Row:
    """Return `row` with its `own` errors, what was allowed, and `ok`: whether they are at most that."""
    bound = {key: ALLOWED * allowed[key] + FLOOR[dtype] for key in ("loss_error", "grad_error", "worst_error")}
    return {
        **row,
        "dtype": str(dtype).removeprefix("torch."),
        **own,
        **{f"{key}_allowed": value for key, value in bound.items()},
        "ok": all(own[key] <= most for key, most in bound.items()),  # False for nan
    }


def against_float64(variant: str, compiled: bool, day: Day) -> list[Row]:
    """Loss and gradients of a variant in training, without dropout, in float32 and bf16.

    Compiled, without the diffusion's noise too, which is drawn in another order there.
    """
    ids, rows = token_ids(day.scale.model), []
    for dtype in DTYPES:
        model = make_model(variant, day.scale.model, dtype)
        for name, parameter in model.named_parameters():
            if compiled and name.endswith("diffusion_param"):
                nn.init.zeros_(parameter)
        exact = loss_and_gradients(copy.deepcopy(model).double(), ids)
        on_cpu = errors(loss_and_gradients(model, ids), exact)
        model.to(day.device)
        if compiled:
            torch._dynamo.reset()
            model.compile_parts()
        here = errors(loss_and_gradients(model, ids.to(day.device)), exact)
        what = f"{variant}{', compiled' if compiled else ''}"
        rows.append(within({"what": what, "loss": exact[0]}, here, on_cpu, dtype))
    return rows


def slope(model: nn.Module, ids: torch.Tensor, way: float, seed: int = 0, seed_of_gradient: int = 0) -> float:
    """Return by how much the loss changes along its gradient, over what the gradient says.

    Dropout is on, with the same seed in every pass. It is 1 where forward and backward pass use the same masks. Only
    the projections to queries, keys and values are moved, whose gradients depend on the masks of all that follows.

    Args:
        way: the change, in nats, that the gradient is to foretell.
        seed, seed_of_gradient: of the passes that only compute the loss, and of the one with a gradient.
    """

    def loss(number: int) -> torch.Tensor:
        torch.manual_seed(number)
        return model(input_ids=ids, labels=ids, skip_logits=True).loss

    moved = [p for name, p in model.named_parameters() if name.endswith("c_attn.weight")]
    model.zero_grad()
    loss(seed_of_gradient).backward()
    gradients = [p.grad.detach().clone() for p in moved]
    length = way / sum(float(g.double().square().sum()) for g in gradients)
    before, ends, places = [p.detach().clone() for p in moved], [], []
    for sign in (1, -1):
        with torch.no_grad():
            for p, start, g in zip(moved, before, gradients, strict=True):
                p.copy_(start.double() + sign * length / 2 * g.double())
        places.append([p.detach().double() for p in moved])
        # with gradients, as without them the head goes another way
        ends.append(float(loss(seed).detach().double()))
    with torch.no_grad():
        for p, start in zip(moved, before, strict=True):
            p.copy_(start)
    # bf16 rounds the way; what was gone counts
    gone = sum(float(((a - b) * g.double()).sum()) for a, b, g in zip(*places, gradients, strict=True))
    return (ends[0] - ends[1]) / gone


def dropout_agrees(variant: str, day: Day) -> list[Row]:
    """Return whether the backward pass drops what the forward pass dropped: eager and compiled, in float32 and bf16."""
    ids, rows = token_ids(day.scale.model).to(day.device), []
    for dtype in DTYPES:
        for compiled in (False, True):
            model = make_model(variant, day.scale.model, dtype, DROPOUT).to(day.device)
            if compiled:
                torch._dynamo.reset()
                model.compile_parts()
            found = slope(model, ids, way=0.02 if dtype == torch.float32 else 0.2)
            rows.append(
                {
                    "what": f"{variant}, dropout {DROPOUT}{', compiled' if compiled else ''}",
                    "dtype": str(dtype).removeprefix("torch."),
                    "slope": found,
                    "slope_allowed": OFF_BY[dtype],
                    "ok": abs(found - 1) <= OFF_BY[dtype],
                }
            )
    return rows


def by_cudnn(run: Callable[[Day], list[Row]], day: Day) -> list[Row]:
    """Return what `run` gives where duo-predict's attention is computed by cuDNN's kernel."""
    if day.device.type != "cuda":
        raise Skipped("on CUDA only")
    with mock.patch.object(DuoPredictAttention, "kernel", "cudnn"):
        return [{**row, "what": f"{row['what']}, by cuDNN"} for row in run(day)]


def items(day: Day) -> list[Item]:
    """Return the items."""

    def exact(name: str, compiled: bool) -> Callable[[Day], list[Row]]:
        return functools.partial(against_float64, name, compiled)

    every = [Item(name, exact(name, False), seconds=15) for name in VARIANTS]
    compiled = [Item(f"{name}, compiled", exact(name, True), seconds=45) for name in FAMILIES]
    dropped = [
        Item(f"{name}, dropout", functools.partial(dropout_agrees, name), seconds=60)
        for name in ("gpt2", "duo_predict", "drift_diffusion")
    ]
    by_another_kernel = {
        "eager": exact("duo_predict", False),
        "compiled": exact("duo_predict", True),
        "dropout": functools.partial(dropout_agrees, "duo_predict"),
    }
    cudnn = [
        Item(f"duo_predict, {what}, cuDNN", functools.partial(by_cudnn, run), seconds=60)
        for what, run in by_another_kernel.items()
    ]
    return every + compiled + dropped + cudnn
