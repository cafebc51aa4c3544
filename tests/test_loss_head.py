"""The loss without the logits, against the plain head: a matrix product, then cross-entropy over all of its rows."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_variants.models import loss_head
from gpt2_variants.models.loss_head import IGNORE_INDEX, LMHead


def case(rows=2, length=40, channels=24, vocabulary=101, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    head = LMHead(channels, vocabulary, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator, dtype=torch.float64))
    head.to(dtype)
    hidden = torch.randn(rows, length, channels, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows, length), generator=generator)
    targets[0, 3] = targets[1, -5:] = IGNORE_INDEX
    return head, hidden, targets


def plain(head, hidden, targets):
    """In float64, whatever the dtype of the weights."""
    weight, hidden = (x.detach().double().requires_grad_() for x in (head.weight, hidden))
    logits = (hidden @ weight.t()).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return loss, *torch.autograd.grad(loss, (hidden, weight))


@pytest.fixture(params=[7, 1000], ids=["chunks", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setitem(loss_head.CHUNK_ROWS, "cpu", request.param)


@pytest.mark.parametrize("way", ["eager", "compiled elementwise part"])
def test_sum_and_gradients_equal_the_plain_head(way, chunk):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        head, hidden, targets = case(dtype=dtype)
        if way != "eager":
            head._logits_to_grad = torch.compile(loss_head.logits_to_grad, backend="aot_eager")
        loss, _ = head(hidden, targets, summed=True)
        # the upstream gradient counts: twice the mean over 50
        got = torch.autograd.grad(2 * loss / 50, (hidden, head.weight))
        wanted, *grads = plain(head, hidden, targets)
        torch.testing.assert_close(loss.double(), wanted, atol=0, rtol=tolerance)
        for g, w in zip(got, grads, strict=True):
            assert g.dtype == dtype
            torch.testing.assert_close(g.double(), 2 * w / 50, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_inductor_is_given_is_the_same_to_the_bit(dtype, weighted):
    torch._dynamo.reset()
    torch.manual_seed(0)
    logits, targets = (3 * torch.randn(40, 301)).to(dtype), torch.randint(301, (40,))
    targets[::7] = IGNORE_INDEX
    logits[:, -5:] = -torch.inf  # padding
    weights = torch.rand(40) if weighted else None
    as_inductor = torch.compile(loss_head.logits_to_grad, backend="eager", fullgraph=True)
    found, wanted = as_inductor(logits.clone(), targets, weights), loss_head.logits_to_grad(logits, targets, weights)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_bf16_adds_up_in_float32(monkeypatch):
    """Hundreds of chunks: a sum in bf16 would stand still at 256 times an addend."""
    monkeypatch.setitem(loss_head.CHUNK_ROWS, "cpu", 2)
    head, hidden, targets = case(length=1000, dtype=torch.bfloat16)
    loss, _ = head(hidden, targets, summed=True)
    assert loss.dtype == torch.float32
    wanted, grad_hidden, grad_weight = plain(head, hidden, targets)
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-4)
    got = torch.autograd.grad(loss, (hidden, head.weight))
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    for g, w in zip(got, (grad_hidden, grad_weight), strict=True):
        assert (g.double() - w).norm() < 0.01 * w.norm()


def test_without_gradients_and_as_scores(chunk):
    head, hidden, targets = case()
    wanted, grad_hidden, grad_weight = plain(head, hidden, targets)
    with torch.no_grad():
        torch.testing.assert_close(head(hidden, targets, summed=True)[0], wanted, atol=1e-10, rtol=0)
    scores = head(hidden, targets, with_correct=True)
    nll = F.cross_entropy((hidden @ head.weight.t()).mT, targets, ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(scores.nll, nll, atol=1e-12, rtol=0)
    weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1))
    total, rows = head(hidden, targets, summed=True, weights=weights)
    torch.testing.assert_close(rows, nll, atol=1e-12, rtol=0)
    torch.testing.assert_close(total, (nll * weights).sum(), atol=1e-10, rtol=0)
    assert not rows.requires_grad
    assert torch.equal(scores.valid, targets != IGNORE_INDEX)
    assert torch.equal(scores.correct, (hidden @ head.weight.t()).argmax(-1) == targets)
    got = torch.autograd.grad(scores.nll.sum(), (hidden, head.weight))
    torch.testing.assert_close(got, (grad_hidden, grad_weight), atol=1e-12, rtol=0)


def test_under_autocast_it_computes_in_autocasts_dtype():
    head, hidden, targets = case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = head(hidden, targets, summed=True)
    rounded = LMHead(24, 101, bias=False)
    rounded.load_state_dict({"weight": head.weight.detach().bfloat16().float()})
    wanted, grad_hidden, _ = plain(rounded, hidden.bfloat16(), targets)
    assert loss.item() == pytest.approx(wanted.item(), rel=5e-3)
    (got,) = torch.autograd.grad(loss, hidden)
    assert got.dtype == torch.float32
    assert (got.double() - grad_hidden).norm() < 0.02 * grad_hidden.norm()


def test_the_vocabulary_is_padded_where_it_is_not_a_cpu():
    """On the meta device: the shapes of a GPU's matrix products, and gradients without the padding."""
    shapes = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.mm:
                shapes.extend(tuple(x.shape) for x in args)
            return func(*args, **(kwargs or {}))

    head = LMHead(64, 50_257, bias=False, dtype=torch.bfloat16, device="meta")
    hidden = torch.empty(8192, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    targets = torch.empty(8192, dtype=torch.long, device="meta")
    with Products():
        loss, _ = loss_head._SummedLoss.apply(hidden, head.weight, targets, None, loss_head.logits_to_grad)
    assert {size for shape in shapes for size in shape} == {4096, 64, 50_304}
    grads = torch.autograd.grad(loss, (hidden, head.weight))
    assert [g.shape for g in grads] == [hidden.shape, head.weight.shape]


def test_padding_changes_nothing(monkeypatch):
    """As on a GPU, with a CPU's numbers."""
    monkeypatch.setattr(loss_head, "padding_of", lambda weight: -len(weight) % 128)
    head, hidden, targets = case()
    loss, _ = head(hidden, targets, summed=True)
    wanted, *grads = plain(head, hidden, targets)
    torch.testing.assert_close(loss, wanted, atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, head.weight)), tuple(grads), atol=1e-12, rtol=0)
