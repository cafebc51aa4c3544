"""Whether the package's own kernels compute on this device what float64 does: duo-predict's attention, the loss head,
the rotation of heads; and whether a saved model is loaded and generates as it should.

Shape legend: B batch, S tokens, H heads, D head size, Q queries, K keys.
"""

import copy
import functools
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from duo_attentions import dense_mask
from gpt2_variants.models.causal_kernels import KERNELS
from gpt2_variants.models.duo_attention import duo_attention
from gpt2_variants.models.loss_head import IGNORE_INDEX, LMHead, padding_of
from gpt2_variants.registry import VARIANTS
from gpu_items import Day, Item, ModelShape, Row, Skipped
from gpu_models import DTYPES, FAMILIES, make_model, token_ids

RATE = 0.125  # a multiple of the 2^-16 in whose steps a CPU drops
# Differences over the reference's norm that rounding accounts for: of an output, and of gradients.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference, over that of `exact`."""
    exact = exact.double()
    return float((found.detach().to(exact.device).double() - exact).norm() / exact.norm())


def row_of(what: str, dtype: torch.dtype, found: dict[str, float], **more: Any) -> Row:
    """Return a row of relative errors, each of which must be at most what `ALLOWED` says."""
    most, name = max(found.values()), str(dtype).removeprefix("torch.")
    ok = all(value <= ALLOWED[dtype] for value in found.values())  # False for nan
    return {"what": what, "dtype": name, "error": most, "error_allowed": ALLOWED[dtype], **found, **more, "ok": ok}


def weights_used(attend: Attention, query: torch.Tensor, key: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the weights (B, H, Q, K) that `attend` gives its values under a seed, with dropout.

    Its values are unit vectors, D keys at a time: what comes out are the weights of these keys. What is dropped hangs
    on the seed alone, and not on the values.
    """
    keys, size = key.shape[2], key.shape[3]
    parts = []
    for first in range(0, keys, size):
        value = torch.zeros_like(key)
        some = torch.arange(min(size, keys - first), device=key.device)
        value[:, :, first + some, some] = 1
        torch.manual_seed(seed)
        parts.append(attend(query, key, value).double())
    return torch.cat(parts, dim=-1)[..., :keys]


def duo_attention_dropped(kernel: str, day: Day) -> list[Row]:
    """Duo-predict's attention with dropout against a dense mask in float64, which drops what the kernel dropped.

    Output and gradients; and the part of the visible weights that was kept. `kernel`: as for `duo_attention`.
    """
    if kernel != KERNELS[0] and day.device.type != "cuda":
        raise Skipped("on CUDA only")
    batch, heads, tokens, size = day.scale.dropped
    generator, rows = torch.Generator().manual_seed(0), []
    drawn = [torch.randn(batch, heads, 2 * tokens - 1, size, generator=generator).bfloat16() for _ in range(4)]
    for dtype in DTYPES:
        for neighbour in (True, False):
            *qkv, grad = (x.to(day.device, dtype, copy=True) for x in drawn)
            qkv = [x.requires_grad_() for x in qkv]

            def attend(q, k, v, neighbour=neighbour) -> torch.Tensor:
                return duo_attention(q, k, v, tokens, neighbour, RATE, kernel=kernel)

            visible = dense_mask(tokens, neighbour, day.device)
            with torch.no_grad():
                kept = weights_used(attend, qkv[0], qkv[1], seed=3) != 0
            torch.manual_seed(3)
            out = attend(*qkv)
            found = [out, *torch.autograd.grad(out, qkv, grad)]
            exact = dropped_by(kept, visible, [x.detach().double().requires_grad_() for x in qkv], grad.double())
            part = float(kept.double().sum() / (visible.sum() * batch * heads))
            spread = 5 * (RATE * (1 - RATE) / float(visible.sum() * batch * heads)) ** 0.5
            names = ("output", "query", "key", "value")
            off = {f"{n}_error": distance(a, b) for n, a, b in zip(names, found, exact, strict=True)}
            what = f"duo attention, {kernel}, dropout {RATE}, {'with' if neighbour else 'without'} the right neighbour"
            row = row_of(what, dtype, off, kept=part)
            row["ok"] = row["ok"] and abs(part - (1 - RATE)) <= spread and not bool((kept & ~visible).any())
            rows.append(row)
    return rows


def dropped_by(
    kept: torch.Tensor, visible: torch.Tensor, qkv: list[torch.Tensor], grad: torch.Tensor
) -> list[torch.Tensor]:
    """Attention whose weights (B, H, Q, K) stay where they are `kept`: the output, and the gradients of `qkv`."""
    scores = (qkv[0] @ qkv[1].transpose(2, 3) * qkv[0].shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    out = (scores.softmax(-1) * kept / (1 - RATE)) @ qkv[2]
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def loss_head(day: Day) -> list[Row]:
    """Loss and gradients of the head, eager and compiled, with weights and ignored targets, against float64."""
    count, channels, vocabulary = day.scale.head
    generator, rows = torch.Generator().manual_seed(0), []
    hidden = torch.randn(1, count, channels, generator=generator).bfloat16()
    weight = torch.randn(vocabulary, channels, generator=generator).mul_(0.05).bfloat16()
    targets = torch.randint(0, vocabulary, (1, count), generator=generator)
    targets[0, ::5] = IGNORE_INDEX
    share = torch.rand(1, count, generator=generator)
    there = hidden.to(day.device, torch.float64).requires_grad_()
    its_weight = weight.to(day.device, torch.float64).requires_grad_()
    nll = F.cross_entropy(F.linear(there[0], its_weight), targets[0].to(day.device), reduction="none")
    exact = (nll * share[0].to(day.device)).sum()
    exact.backward()
    for dtype in DTYPES:
        for compiled in (False, True):
            head = LMHead(channels, vocabulary, bias=False).to(day.device, dtype)
            head.weight.data.copy_(weight)
            if compiled:
                torch._dynamo.reset()
                head.compile_loss()
            given = hidden.to(day.device, dtype, copy=True).requires_grad_()
            loss, _ = head(given, targets.to(day.device), summed=True, weights=share.to(day.device))
            loss.backward()
            off = {
                "loss_error": float(abs(loss.detach().double() - exact.detach()) / exact.detach()),
                "hidden_error": distance(given.grad, there.grad),
                "weight_error": distance(head.weight.grad, its_weight.grad),
            }
            what = f"loss head, {vocabulary} and {padding_of(head.weight)} of padding{', compiled' if compiled else ''}"
            rows.append(row_of(what, dtype, off))
    return rows


def rotation(day: Day) -> list[Row]:
    """Queries and keys of bf16 models, rotated at the places 1020 to 1023, against float64: eager and compiled."""
    rows = []
    for name in (name for name in VARIANTS if name.startswith("rotating_head")):
        shape = ModelShape(1, 64 * day.scale.model.n_head, day.scale.model.n_head, 17, 1024, 1)
        attention = make_model(name, shape, torch.bfloat16).transformer.h[0].attn
        generator = torch.Generator().manual_seed(0)
        size = (1, shape.n_head, 4, 64)
        given = [torch.randn(size, generator=generator).bfloat16() for _ in range(2)]
        with torch.no_grad():
            exact = copy.deepcopy(attention).double().place(*(x.double() for x in given), 1020)
            attention.to(day.device)
            for compiled in (False, True):
                torch._dynamo.reset()
                place = torch.compile(attention.place) if compiled else attention.place
                found = place(*(x.to(day.device) for x in given), 1020)
                off = {f"{n}_error": distance(a, b) for n, a, b in zip(("query", "key"), found, exact, strict=True)}
                rows.append(row_of(f"{name} at 1020 to 1023{', compiled' if compiled else ''}", torch.bfloat16, off))
    return rows


def saved_and_generating(variant: str, day: Day) -> list[Row]:
    """A model saved and loaded is the same bit for bit; its logits are float64's, and those by which it generates, with
    the cache, are those that it has for the same tokens without one.
    """
    shape = day.scale.model
    model = make_model(variant, shape, torch.float32).eval()
    ids = token_ids(shape)[:, : shape.tokens // 2]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).to(day.device).eval()
        same = all(torch.equal(a, b.cpu()) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
        exact = copy.deepcopy(model).double()(ids).logits
        there = ids.to(day.device)
        new = min(16, shape.tokens - ids.shape[1])
        settings = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
        told = {"return_dict_in_generate": True, "output_logits": True}
        cached = loaded.generate(there, attention_mask=torch.ones_like(there), **settings, **told)
        # the tokens that came, read at once without a cache
        plain = loaded(cached.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
        off = {
            "logits_error": distance(loaded(there, use_cache=False).logits, exact),
            "cached_error": distance(torch.stack(cached.logits, dim=1), plain),
        }
    row = row_of(f"{variant}, saved, loaded, generating", torch.float32, off, same=same)
    return [{**row, "ok": row["ok"] and same}]


def items(day: Day) -> list[Item]:
    """Return the items."""
    found = [
        *(Item(f"duo attention, {name}", functools.partial(duo_attention_dropped, name)) for name in KERNELS),
        Item("loss head", loss_head, seconds=60),
        Item("rotation", rotation, seconds=60),
    ]
    return found + [Item(f"{n}, generating", functools.partial(saved_and_generating, n), seconds=15) for n in FAMILIES]
