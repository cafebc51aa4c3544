"""Duo-predict's attention alone, and a training step with it: ours, and over a dense (2S-1)^2 mask.

The streams lie as they do in our model, t_1..t_S m_1..m_{S-1}; `dense_duo_predict` has the published, interleaved one.

Shape legend: B batch, S tokens, H heads, D head size.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from gpt2_variants.models.blockwise_duo_attention import blockwise_duo_attention
from gpt2_variants.models.duo_attention import duo_attention
from gpt2_variants.models.flash_duo_attention import FlashDuoAttention
from gpt2_variants.models.modeling_duo_predict import (
    DuoPredictAttention,
    DuoPredictGPT2LMHeadModel,
    DuoPredictGPT2Model,
    infill_visibility,
)
from gpt2_variants.registry import VARIANTS

OURS, FLASH, BLOCKS, DENSE, FLEX = "ours", "ours by the flash kernel", "ours by blocks", "dense mask", "FlexAttention"
CUDNN = "ours by cuDNN's kernel"
REPEATS = {"cuda": 20}  # calls in a round; elsewhere 1
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """The shape of query, key and value, (B, H, 2S-1, D)."""

    batch: int
    heads: int
    tokens: int
    head_size: int

    def __str__(self) -> str:
        return f"B {self.batch}, H {self.heads}, S {self.tokens}, D {self.head_size}"


@dataclass(frozen=True)
class StepShape:
    """A duo-predict model, and the sequences of a step. `vocabulary` is with the mask's entry."""

    sequences: int = 4
    tokens: int = 512
    layers: int = 4
    channels: int = 256
    heads: int = 4
    vocabulary: int = 8192


@functools.cache
def dense_mask(num_tokens: int, neighbour: bool, device: torch.device) -> torch.Tensor:
    """Who sees whom: bool (2S-1, 2S-1) over t_1..t_S m_1..m_{S-1}; `neighbour`: m_k sees t_{k+1}."""
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
    return torch.cat([F.pad(causal, (0, num_tokens - 1)), infill_visibility(num_tokens, neighbour, device)])


def sees(num_tokens: int, neighbour: bool) -> Callable[..., torch.Tensor]:
    """Return `dense_mask` as FlexAttention takes it: a function of batch, head, and the places of query and key."""

    def mask(batch, head, query, key):
        slot = query - num_tokens
        of_slot = (key < slot) | (key == query)
        if neighbour:
            of_slot = of_slot | (key == slot + 1)
        return ((slot < 0) & (key <= query)) | ((slot >= 0) & of_slot)

    return mask


def missing(way: str, dtype: torch.dtype, dropout: float) -> str | None:
    """Return why attention cannot be computed in that way here; None where it can."""
    on_cuda = torch.cuda.is_available()
    if way == FLASH and on_cuda and dtype == torch.float32:
        return "the kernel takes no float32 on CUDA"
    if way == FLASH and not on_cuda and dropout:
        return "the kernel has no dropout on a CPU"
    if way == FLEX and dropout:
        return "has no dropout"
    if way in (FLEX, CUDNN) and not on_cuda:
        return "CUDA only"
    return None


def make_attention(way: str, num_tokens: int, dropout: float, device: torch.device) -> Attention:
    """Query, key and value (B, H, 2S-1, D) to the output of that shape, with each slot's right neighbour seen."""
    if way == DENSE:
        mask = dense_mask(num_tokens, True, device)
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if way == FLASH:
        return lambda q, k, v: FlashDuoAttention.apply(q, k, v, num_tokens, True, dropout, q.shape[-1] ** -0.5)
    if way == BLOCKS:
        seed = torch.zeros((), dtype=torch.long)
        return lambda q, k, v: blockwise_duo_attention(q, k, v, seed, num_tokens, True, dropout, q.shape[-1] ** -0.5)
    if way == FLEX:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        length, compiled = 2 * num_tokens - 1, torch.compile(flex_attention, dynamic=False)
        block_mask = create_block_mask(sees(num_tokens, True), None, None, length, length, device=device.type)
        return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)
    kernel = "cudnn" if way == CUDNN else "flash"
    return lambda q, k, v: duo_attention(q, k, v, num_tokens, True, dropout, kernel=kernel)


def inputs(shape: Shape) -> list[torch.Tensor]:
    """Query, key, value and the output's gradient, float32; the values are those of bf16, in every dtype the same."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.heads, 2 * shape.tokens - 1, shape.head_size)
    return [torch.randn(size, generator=generator).bfloat16().float().to(_device()) for _ in range(4)]


def reference(shape: Shape) -> list[torch.Tensor]:
    """Output and gradients of query, key and value by the dense mask in float64, a head at a time."""
    attention, heads = make_attention(DENSE, shape.tokens, 0.0, _device()), []
    for head in zip(*(x.flatten(0, 1).split(1) for x in inputs(shape)), strict=True):
        *qkv, grad = (x.double()[None] for x in head)
        qkv = [x.requires_grad_() for x in qkv]
        out = attention(*qkv)
        heads.append([out.detach()[0], *(x[0] for x in torch.autograd.grad(out, qkv, grad))])
    size = (shape.batch, shape.heads, 2 * shape.tokens - 1, shape.head_size)
    return [torch.cat(parts).view(size) for parts in zip(*heads, strict=True)]


def measure(
    shapes: Sequence[Shape],
    dtypes: Sequence[torch.dtype],
    dropouts: Sequence[float],
    rounds: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return a row for each shape, dtype, dropout and way; the ways take turns. `say` is told of each row."""
    rows = []
    for shape in shapes:
        exact = reference(shape) if 0.0 in dropouts else None
        for dtype in dtypes:
            for dropout in dropouts:
                rows += _in_turn(shape, dtype, dropout, rounds, None if dropout else exact)
                for row in rows[-5:]:
                    say(_said(row))
    return rows


def _in_turn(shape, dtype, dropout, rounds, exact) -> list[dict[str, Any]]:
    *qkv, grad = (x.to(dtype) for x in inputs(shape))
    qkv = [x.requires_grad_() for x in qkv]
    rows, ways, seconds = {}, {}, {}
    for way in (DENSE, OURS, FLASH, BLOCKS, FLEX):
        row = {"way": way, "shape": str(shape), "dtype": str(dtype).removeprefix("torch."), "dropout": dropout}
        rows[way] = row
        if reason := missing(way, dtype, dropout):
            row["not_measured"] = reason
            continue
        ways[way], seconds[way] = make_attention(way, shape.tokens, dropout, grad.device), []
        out = ways[way](*qkv)
        found = [out, *torch.autograd.grad(out, qkv, grad)]
        if exact is not None:
            errors = [float((a.detach().double() - b).abs().max()) for a, b in zip(found, exact, strict=True)]
            row |= {"error": errors[0], "grad_error": max(errors[1:])}
    repeats = REPEATS.get(grad.device.type, 1)
    for number in range(rounds):
        for way in list(ways) if number % 2 else reversed(list(ways)):
            forward = both = 0.0
            for _ in range(repeats):
                start = _now()
                out = ways[way](*qkv)
                middle = _now()
                torch.autograd.grad(out, qkv, grad)
                forward, both = forward + middle - start, both + _now() - start
            seconds[way].append((forward / repeats, both / repeats))
    for way, own in seconds.items():
        for part, key in enumerate(("forward", "both")):
            times = [taken[part] for taken in own]
            ratios = [theirs[part] / taken[part] for theirs, taken in zip(seconds[DENSE], own, strict=True)]
            rows[way] |= {
                f"{key}_seconds": statistics.median(times),
                f"{key}_rounds": times,
                f"{key}_speed": statistics.median(ratios),
                f"{key}_speed_min": min(ratios),
                f"{key}_speed_max": max(ratios),
            }
    return list(rows.values())


class DenseMaskAttention(DuoPredictAttention):
    """Duo-predict's attention, of whole sequences without padding, over a dense mask."""

    def attend(self, query, key, value, attention_mask, num_tokens=None, neighbour=True, infill_mask=None, **kwargs):
        """Do what `DuoPredictAttention.attend` does, for both streams."""
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=dense_mask(num_tokens, neighbour, query.device),
            dropout_p=self.attn_dropout.p if self.training else 0.0,
            scale=self.scaling,
        )
        return mixed.transpose(1, 2), None


class DenseMaskModel(DuoPredictGPT2Model):
    """`DuoPredictGPT2Model` with `DenseMaskAttention`."""

    attention_class = DenseMaskAttention


class DenseMaskLMHeadModel(DuoPredictGPT2LMHeadModel):
    """`DuoPredictGPT2LMHeadModel` with `DenseMaskAttention`; weights, predictions and loss head are the same."""

    transformer_class = DenseMaskModel


class Step:
    """A model in training mode and its AdamW, with a batch of random tokens."""

    def __init__(self, model_class: type, shape: StepShape, dtype: torch.dtype, dropout: float):
        config = VARIANTS["duo_predict"].make_config(
            None,
            shape.vocabulary - 1,
            shape.tokens,
            n_layer=shape.layers,
            n_embd=shape.channels,
            n_head=shape.heads,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
        )
        torch.manual_seed(0)
        self.model = model_class._from_config(config, attn_implementation="sdpa").to(_device(), dtype).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(0, shape.vocabulary - 1, (shape.sequences, shape.tokens), device=_device())

    def take(self) -> tuple[float, float]:
        """Take one step; return its seconds and its loss."""
        start = _now()
        loss = self.model(input_ids=self.ids, labels=self.ids, skip_logits=True).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return _now() - start, float(loss.detach())


def measure_steps(
    shape: StepShape, dtypes: Sequence[torch.dtype], dropouts: Sequence[float], rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return a row for each dtype and dropout: ours and the dense mask take a step in turn, after one of warm-up."""
    rows = []
    for dtype in dtypes:
        for dropout in dropouts:
            steps = {
                "ours": Step(DuoPredictGPT2LMHeadModel, shape, dtype, dropout),
                "dense": Step(DenseMaskLMHeadModel, shape, dtype, dropout),
            }
            losses = [step.take()[1] for step in steps.values()]
            seconds = {name: [] for name in steps}
            for number in range(rounds):
                for name in list(steps) if number % 2 else reversed(list(steps)):
                    seconds[name].append(steps[name].take()[0])
            ratios = [dense / ours for dense, ours in zip(seconds["dense"], seconds["ours"], strict=True)]
            row = {
                "dtype": str(dtype).removeprefix("torch."),
                "dropout": dropout,
                "ours_seconds": statistics.median(seconds["ours"]),
                "dense_seconds": statistics.median(seconds["dense"]),
                "speed": statistics.median(ratios),
                "speed_min": min(ratios),
                "speed_max": max(ratios),
                "loss_difference": None if dropout else abs(losses[0] - losses[1]),
                "rounds": seconds,
            }
            rows.append(row)
            say(f"duo_predict step, {row['dtype']}, dropout {dropout}: {row['speed']:.2f} times the dense mask's speed")
    return rows


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _said(row: dict[str, Any]) -> str:
    text = row.get("not_measured")
    if text is None:
        text = f"{1000 * row['both_seconds']:,.2f} ms, {row['both_speed']:.2f} times the dense mask's speed"
    return f"duo attention, {row['shape']}, {row['dtype']}, dropout {row['dropout']}, {row['way']}: {text}"
