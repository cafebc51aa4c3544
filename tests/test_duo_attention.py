"""Duo-predict's attention without the dense mask, against softmax over the dense mask."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_variants.models.blockwise_duo_attention import blockwise_duo_attention
from gpt2_variants.models.causal_kernels import has_causal_kernel
from gpt2_variants.models.duo_attention import duo_attention
from gpt2_variants.models.flash_duo_attention import FlashDuoAttention


def visible(num_tokens: int, neighbour: bool) -> torch.Tensor:
    """The dense mask, (2S-1, 2S-1), entry by entry as gpt2_variants/models/duo_predict.md says it."""
    length = 2 * num_tokens - 1
    mask = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(length):
            q_slot, k_slot = query >= num_tokens, key >= num_tokens
            if not q_slot:
                mask[query, key] = not k_slot and key <= query
            elif k_slot:
                mask[query, key] = key == query
            else:
                k = query - num_tokens
                mask[query, key] = key < k or (neighbour and key == k + 1)
    return mask


def dense(query, key, value, num_tokens, neighbour, scale=None):
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-1, -2) * scale
    return scores.masked_fill(~visible(num_tokens, neighbour), -math.inf).softmax(-1) @ value


def flash(query, key, value, num_tokens, neighbour, scale=None):
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return FlashDuoAttention.apply(query, key, value, num_tokens, neighbour, 0.0, scale)


def blockwise(query, key, value, num_tokens, neighbour, scale=None, dropout=0.0, seed=0):
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return blockwise_duo_attention(query, key, value, torch.tensor(seed), num_tokens, neighbour, dropout, scale)


WAYS = {"flash": flash, "blockwise": blockwise, "chosen": duo_attention}


def inputs(num_tokens, batch=2, heads=3, size=8, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(num_tokens)
    # as attention gives them: (B, 2S-1, H, D), transposed
    return [
        torch.randn(batch, 2 * num_tokens - 1, heads, size, dtype=dtype, generator=generator)
        .to(device)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(3)
    ]


@pytest.mark.parametrize("neighbour", [True, False])
@pytest.mark.parametrize("num_tokens", [2, 3, 4, 65, 150])
@pytest.mark.parametrize("way", WAYS)
def test_forward_and_backward_equal_the_dense_mask(way, num_tokens, neighbour):
    tensors = inputs(num_tokens)
    grad = torch.randn(tensors[0].shape, dtype=torch.float64)
    for scale in (None, 0.7):
        expected = dense(*tensors, num_tokens, neighbour, scale)
        out = WAYS[way](*tensors, num_tokens, neighbour, scale=scale)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        for got, wanted in zip(
            torch.autograd.grad(out, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
        ):
            torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_large_scores_stay_finite(way):
    q, k, v = inputs(20, dtype=torch.float32)
    out = WAYS[way](q * 100, k, v, 20, True)
    torch.testing.assert_close(out, dense(q * 100, k, v, 20, True), atol=1e-4, rtol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("way", WAYS)
def test_bf16_is_as_close_to_float64_as_the_dense_mask_is(way):
    exact, rounded = inputs(100), inputs(100, dtype=torch.float64)
    rounded = [x.detach().bfloat16().requires_grad_() for x in rounded]
    with torch.no_grad():
        wanted = dense(*[x.detach().double() for x in rounded], 100, True)
        error = (WAYS[way](*rounded, 100, True) - wanted).abs().max()
        mask = visible(100, True)
        of_dense = torch.nn.functional.scaled_dot_product_attention(*rounded, attn_mask=mask) - wanted
    assert error <= 1.5 * of_dense.abs().max()
    out = WAYS[way](*rounded, 100, True)
    assert out.dtype == torch.bfloat16
    got = torch.autograd.grad(out.sum(), rounded)
    for g, e in zip(got, torch.autograd.grad(dense(*exact, 100, True).sum(), exact), strict=True):
        assert g.dtype == torch.bfloat16
        torch.testing.assert_close(g.double(), e, atol=0.05, rtol=0.05)


def test_dropout_is_that_of_the_softmax_weights():
    """With values that pick out single keys, the output is the dropped weights themselves."""
    num_tokens, dropout = 40, 0.25
    length = 2 * num_tokens - 1
    q, k, _ = inputs(num_tokens, batch=8, heads=16)
    v = torch.eye(length, dtype=torch.float64).expand(8, 16, length, length)
    q, k = (torch.nn.functional.pad(x, (0, length - 8)) for x in (q, k))  # the head sizes are one in attention
    weights = dense(q, k, v, num_tokens, True)
    dropped = blockwise(q, k, v, num_tokens, True, dropout=dropout, seed=3)
    kept = dropped > 0
    torch.testing.assert_close(dropped[kept], weights[kept] / (1 - dropout), atol=1e-12, rtol=0)
    seen = visible(num_tokens, True).expand_as(weights)
    assert not kept[~seen].any()
    frequency = kept[seen].double().mean()
    assert abs(frequency - (1 - dropout)) < 5 * math.sqrt(dropout * (1 - dropout) / seen.sum())
    own = torch.arange(num_tokens, length)  # a slot's own key is dropped as often as the others
    assert abs(kept[:, :, own, own].double().mean() - (1 - dropout)) < 0.03
    assert abs(kept[:, :, own, own - num_tokens + 1].double().mean() - (1 - dropout)) < 0.03
    assert not torch.equal(kept, blockwise(q, k, v, num_tokens, True, dropout=dropout, seed=4) > 0)


@pytest.mark.parametrize("neighbour", [True, False])
def test_the_backward_pass_drops_what_the_forward_pass_dropped(neighbour):
    num_tokens, dropout = 5, 0.3
    tensors = inputs(num_tokens, batch=1, heads=2, size=4)
    assert torch.autograd.gradcheck(
        lambda q, k, v: blockwise(q, k, v, num_tokens, neighbour, None, dropout, 1), tensors
    )


def test_the_default_generator_decides_the_dropout():
    tensors = inputs(12)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(duo_attention(*tensors, 12, True, dropout=0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    state = torch.get_rng_state()
    duo_attention(*tensors, 12, True, dropout=0.0)
    assert torch.equal(state, torch.get_rng_state())


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements a tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_memory_is_linear_in_the_length(dropout):
    largest = []
    for num_tokens in (512, 1024):
        tensors = inputs(num_tokens, batch=1, heads=1, dtype=torch.float32)
        with LargestTensor() as mode:
            torch.autograd.grad(duo_attention(*tensors, num_tokens, True, dropout).sum(), tensors)
        largest.append(mode.elements)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[1] < 1024 * 1024 / 4


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_cuda_kernel_takes_what_it_is_given(dropout):
    """On the meta device: the kernel's signature and shapes, in both directions. Its numbers need a GPU."""
    for num_tokens in (2, 3, 512):
        tensors = [x.detach().bfloat16().requires_grad_() for x in inputs(num_tokens, size=64, device="meta")]
        out = FlashDuoAttention.apply(*tensors, num_tokens, True, dropout, 0.125)
        assert out.shape == tensors[0].shape
        grads = torch.autograd.grad(out, tensors, torch.empty_like(out))
        assert all(g.shape == out.shape and g.dtype == torch.bfloat16 for g in grads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("neighbour", [True, False])
def test_cuda_kernel_equals_the_dense_mask(neighbour):
    tensors = [x.detach().bfloat16().requires_grad_() for x in inputs(300, size=64, device="cuda")]
    wanted = [x.detach().double().cpu().requires_grad_() for x in tensors]
    out, expected = duo_attention(*tensors, 300, neighbour), dense(*wanted, 300, neighbour)
    torch.testing.assert_close(out.double().cpu(), expected, atol=0.02, rtol=0.02)
    grad = torch.randn(out.shape, dtype=torch.float64)
    got = torch.autograd.grad(out, tensors, grad.cuda().bfloat16())
    for g, e in zip(got, torch.autograd.grad(expected, wanted, grad.bfloat16().double()), strict=True):
        torch.testing.assert_close(g.double().cpu(), e, atol=0.06, rtol=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiles_without_graph_breaks(dropout):
    tensors = inputs(12, dtype=torch.float32)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q, k, v: duo_attention(q, k, v, 12, True, dropout), fullgraph=True, backend=backend)
    torch.manual_seed(0)
    out = compiled(*tensors)
    torch.manual_seed(0)
    torch.testing.assert_close(out, duo_attention(*tensors, 12, True, dropout))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("capability", "head_size", "dtype", "fused"),
    [
        ((8, 0), 64, torch.bfloat16, True),
        ((9, 0), 256, torch.float16, True),
        ((7, 5), 64, torch.float16, False),
        ((9, 0), 264, torch.bfloat16, False),
        ((9, 0), 60, torch.bfloat16, False),
        ((9, 0), 64, torch.float32, False),
    ],
)
def test_on_cuda_blocks_take_what_no_kernel_does(capability, head_size, dtype, fused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query = SimpleNamespace(device=torch.device("cuda"), is_cuda=True, dtype=dtype, shape=(1, 2, 5, head_size))
    assert has_causal_kernel(query, dropout=0.1) is fused


def test_wrong_lengths_are_refused():
    q, k, v = inputs(4)
    with pytest.raises(ValueError, match="3 tokens and a length of 7"):
        duo_attention(q, k, v, 3, True)
    with pytest.raises(ValueError, match="1 tokens and a length of 1"):
        duo_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], 1, True)
    with pytest.raises(ValueError, match="kernel='flesh': one of flash, cudnn is allowed"):
        duo_attention(q, k, v, 4, True, kernel="flesh")


@pytest.mark.parametrize("way", WAYS)
def test_autocast_rounds_nothing_inside(way):
    tensors = inputs(70, dtype=torch.float32)
    wanted = WAYS[way](*tensors, 70, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = WAYS[way](*tensors, 70, True)
        grads = torch.autograd.grad(out.sum(), tensors)
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=0)
    for got, expected in zip(grads, torch.autograd.grad(wanted.sum(), tensors), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
