"""Parts alone, at the shapes of the recipe: attention by each backend, and the loss head by rows at once.

Shape legend: B batch, S tokens, H heads, D head size.
"""

import functools
import time
from unittest import mock

import torch
import torch.nn.functional as F

import duo_attentions
import loss_heads
from gpt2_variants.models import loss_head
from gpu_items import Day, Item, Row, Skipped
from results_page import Column

BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
FLEX = "flex"
# how torch begins where a backend does not take what it is given
NO_KERNEL = ("No available kernel", "No viable backend")
DROPOUTS = (0.0, 0.1)


def mean_seconds(call, repeats: int) -> float:
    """Return seconds of a call of `call`, the mean of `repeats`, after three that do not count."""
    for _ in range(3):
        call()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def attention_flops(batch: int, heads: int, tokens: int, size: int) -> float:
    """Return FLOPs of causal attention's forward pass, half of what a dense one's two products take."""
    return 2 * 2 * batch * heads * tokens * tokens * size / 2


def attention_by(backend: str, day: Day) -> list[Row]:
    """Return causal attention in bf16 by a backend, without and with dropout: forward, and forward and backward.

    Queries, keys and values lie as in the model, parts of one (B, S, 3 H D).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, heads, tokens, size = day.scale.attention
    generator = torch.Generator(day.device).manual_seed(0)
    drawn = {"generator": generator, "device": day.device, "dtype": torch.bfloat16}
    projected = torch.randn(batch, tokens, 3 * heads * size, **drawn).requires_grad_()
    grad = torch.randn(batch, heads, tokens, size, **drawn)
    flops = attention_flops(*day.scale.attention)
    if backend == FLEX:
        attend = flex_attention(tokens, day.device)
    rows, reasons = [], []
    for dropout in DROPOUTS:
        if backend == FLEX and dropout:
            continue

        def forward(dropout: float = dropout) -> torch.Tensor:
            parts = projected.split(heads * size, 2)
            q, k, v = (x.view(batch, tokens, heads, size).transpose(1, 2) for x in parts)
            if backend == FLEX:
                return attend(q, k, v)
            with sdpa_kernel(getattr(SDPBackend, BACKENDS[backend])):
                return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)

        def both() -> None:
            torch.autograd.grad(forward(), projected, grad)

        try:
            forward()
        except RuntimeError as err:
            if not str(err).startswith(NO_KERNEL):
                raise
            reasons.append(f"dropout {dropout}: {str(err).splitlines()[0].split('. ')[0]}")
            continue
        seconds, whole = mean_seconds(forward, day.scale.repeats), mean_seconds(both, day.scale.repeats)
        rows.append(
            {
                "what": backend,
                "shape": f"B {batch}, H {heads}, S {tokens}, D {size}",
                "dropout": dropout,
                "forward_seconds": seconds,
                "both_seconds": whole,
                "teraflops": 3.5 * flops / whole / 1e12,  # two products forward, five backward
            }
        )
    if not rows:
        raise Skipped("; ".join(reasons))
    return rows


def flex_attention(tokens: int, device: torch.device):
    """Causal FlexAttention, compiled: query, key and value (B, H, S, D) to (B, H, S, D)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device.type != "cuda":
        raise Skipped("has no backward pass on a CPU")

    def causal(batch, head, query, key) -> torch.Tensor:
        return query >= key

    mask = create_block_mask(causal, None, None, tokens, tokens, device=device.type)
    return functools.partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


def duo_attention_by(way: str, day: Day) -> list[Row]:
    """Duo-predict's attention in bf16, without and with dropout, by a way of `duo_attentions`."""
    batch, heads, tokens, size = day.scale.duo_attention
    shape, rows = duo_attentions.Shape(batch, heads, tokens, size), []
    *qkv, grad = (x.to(torch.bfloat16) for x in duo_attentions.inputs(shape))
    qkv = [x.requires_grad_() for x in qkv]
    reasons = []
    for dropout in DROPOUTS:
        if reason := duo_attentions.missing(way, torch.bfloat16, dropout):
            reasons.append(f"dropout {dropout}: {reason}")
            continue
        attend = duo_attentions.make_attention(way, tokens, dropout, day.device)

        def forward(attend: duo_attentions.Attention = attend) -> torch.Tensor:
            return attend(*qkv)

        def both() -> None:
            torch.autograd.grad(forward(), qkv, grad)

        row = {"what": f"duo: {way}", "shape": str(shape), "dropout": dropout}
        row["forward_seconds"] = mean_seconds(forward, day.scale.repeats)
        rows.append(row | {"both_seconds": mean_seconds(both, day.scale.repeats)})
    if not rows:
        raise Skipped("; ".join(reasons))
    return rows


def head_by_rows(rows_at_once: int, day: Day) -> list[Row]:
    """Forward and backward of the loss head, eager and compiled, with so many rows of logits alive at once."""
    shape, found = loss_heads.Shape(*day.scale.timed_head), []
    for alternative in (loss_heads.OURS, loss_heads.COMPILED):
        torch._dynamo.reset()
        with mock.patch.dict(loss_head.CHUNK_ROWS, {day.device.type: rows_at_once}):
            trial = loss_heads.Trial(alternative, shape, torch.bfloat16)
            steps = [trial.step() for _ in range(2 + 3)][2:]
        seconds = sorted(step["seconds"] for step in steps)[1]
        found.append(
            {
                "what": alternative,
                "rows_at_once": rows_at_once,
                "seconds": seconds,
                "peak_memory_bytes": max(step["peak_bytes"] for step in steps),
                "loss": steps[-1]["loss"],
            }
        )
    return found


def attention_items(day: Day) -> list[Item]:
    """Return the items of attention."""
    found = [Item(name, functools.partial(attention_by, name), 20) for name in (*BACKENDS, FLEX)]
    ways = (duo_attentions.OURS, duo_attentions.CUDNN, duo_attentions.DENSE, duo_attentions.FLEX)
    return [*found, *(Item(f"duo: {way}", functools.partial(duo_attention_by, way), 30) for way in ways)]


def head_items(day: Day) -> list[Item]:
    """Return the items of the loss head."""
    return [Item(f"loss head, {rows} rows", functools.partial(head_by_rows, rows), 45) for rows in day.scale.chunks]


ATTENTION_COLUMNS = (
    Column("what", "by"),
    Column("shape", "shape"),
    Column("dropout", "dropout"),
    Column("forward_seconds", "ms forward", ",.3f", 1000),
    Column("both_seconds", "ms forward and backward", ",.3f", 1000),
    Column("teraflops", "TFLOP/s", ",.0f"),
)
HEAD_COLUMNS = (
    Column("what", "loss head"),
    Column("rows_at_once", "rows at once", ",.0f"),
    Column("seconds", "ms forward and backward", ",.1f", 1000),
    Column("peak_memory_bytes", "peak MiB", ",.0f", 1 / 1024**2),
    Column("loss", "loss", ".4f"),
)
