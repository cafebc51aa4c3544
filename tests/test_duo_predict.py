"""Duo-predict against the published logits, and against plain loops in float64."""

import math

import numpy as np
import pytest
import torch
from conftest import GOLDEN, random_ids, tiny

from gpt2_variants.models import loss_head
from gpt2_variants.models.modeling_duo_predict import DuoPredictGPT2Config, DuoPredictGPT2LMHeadModel, infill_visibility


def reference_logits(model, ids: list[int]) -> tuple[list, list]:
    """Logits of t_1..t_S and m_1..m_{S-1} for one sequence, by plain loops over the interleaved layout, in float64.

    Written from gpt2_variants/models/duo_predict.md, with nothing of the implementation but the weights.
    """
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    c = model.config
    head_size, eps = c.n_embd // c.n_head, c.layer_norm_epsilon

    def norm(x, name):
        centred = x - x.mean()
        return centred / (centred.square().mean() + eps).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    slots = []  # (kind, k), k from 0
    for k in range(len(ids)):
        slots.append(("t", k))
        if k < len(ids) - 1:
            slots.append(("m", k))

    def sees(query, key, layer):
        (kind, k), (other_kind, j) = query, key
        if kind == "t":
            return other_kind == "t" and j <= k
        if other_kind == "m":
            return j == k
        return j < k or (j == k + 1 and (layer == 0 or not c.leak_free))

    wte, wpe = w["transformer.wte.weight"], w["transformer.wpe.weight"]
    x = [wte[ids[k] if kind == "t" else c.vocab_size - 1] + wpe[k] for kind, k in slots]
    for layer in range(c.n_layer):
        p = f"transformer.h.{layer}."
        qkv = [norm(v, p + "ln_1") @ w[p + "attn.c_attn.weight"] + w[p + "attn.c_attn.bias"] for v in x]
        mixed = []
        for i, query in enumerate(slots):
            heads = []
            for h in range(c.n_head):
                part = slice(h * head_size, (h + 1) * head_size)
                q = qkv[i][: c.n_embd][part]
                seen = [j for j, key in enumerate(slots) if sees(query, key, layer)]
                scores = [float(q @ qkv[j][c.n_embd : 2 * c.n_embd][part]) / math.sqrt(head_size) for j in seen]
                top = max(scores)
                exps = [math.exp(s - top) for s in scores]
                heads.append(sum(e / sum(exps) * qkv[j][2 * c.n_embd :][part] for e, j in zip(exps, seen, strict=True)))
            mixed.append(torch.cat(heads) @ w[p + "attn.c_proj.weight"] + w[p + "attn.c_proj.bias"])
        x = [a + b for a, b in zip(x, mixed, strict=True)]
        for i, v in enumerate(x):
            u = norm(v, p + "ln_2") @ w[p + "mlp.c_fc.weight"] + w[p + "mlp.c_fc.bias"]
            u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
            x[i] = v + u @ w[p + "mlp.c_proj.weight"] + w[p + "mlp.c_proj.bias"]
    logits = [norm(v, "transformer.ln_f") @ wte.T for v in x]
    pairs = list(zip(slots, logits, strict=True))
    return [v for (kind, _), v in pairs if kind == "t"], [v for (kind, _), v in pairs if kind == "m"]


def test_golden_interleaved_logits():
    io = np.load(GOLDEN / "duo_predict" / "io.npz")
    model = DuoPredictGPT2LMHeadModel.from_pretrained(GOLDEN / "duo_predict").eval()
    interleaved = torch.tensor(io["duo_input_ids"])
    assert (interleaved[:, 1::2] == model.config.mask_token_id).all()
    tokens = interleaved[:, 0::2]
    with torch.no_grad():
        out = model(tokens, labels=tokens)
    np.testing.assert_allclose(out.logits.numpy(), io["duo_logits"][:, 0::2], atol=1e-5, rtol=0)
    np.testing.assert_allclose(out.infill_logits.numpy(), io["duo_logits"][:, 1::2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("leak_free", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_logits_equal_a_plain_loop_in_float64(attention, leak_free):
    model = tiny("duo_predict", attn_implementation=attention, leak_free=leak_free).double()
    with torch.no_grad():  # biases and norms away from 0 and 1, so that they count
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    ids = random_ids(2, 9)
    losses = {"t": [], "m": []}
    with torch.no_grad():
        out = model(ids, labels=ids)
        for b in range(2):
            tokens, slots = reference_logits(model, ids[b].tolist())
            torch.testing.assert_close(out.logits[b], torch.stack(tokens), atol=1e-10, rtol=0)
            torch.testing.assert_close(out.infill_logits[b], torch.stack(slots), atol=1e-10, rtol=0)
            for k in range(8):
                losses["t"].append(-float(tokens[k].log_softmax(-1)[ids[b, k + 1]]))  # t_k predicts t_{k+1}
                losses["m"].append(-float(slots[k].log_softmax(-1)[ids[b, k]]))  # m_k predicts t_k
        assert float(out.next_token_loss) == pytest.approx(np.mean(losses["t"]), abs=1e-12)
        assert float(out.infill_loss) == pytest.approx(np.mean(losses["m"]), abs=1e-12)
        assert float(out.loss) == pytest.approx(np.mean(losses["t"] + losses["m"]), abs=1e-12)
        skipped = model(ids, labels=ids, skip_logits=True)
        assert float(skipped.loss) == pytest.approx(np.mean(losses["t"] + losses["m"]), abs=1e-12)
        for stream, of_slots in (("next_token", "t"), ("infill", "m")):
            assert skipped.stream_sums[stream].tolist() == pytest.approx([sum(losses[of_slots]), 16], abs=1e-12)


@pytest.mark.parametrize("head", ["ours", "in a wrapper"])
@pytest.mark.parametrize("padded", ["labels", "mask", "packed"])
def test_sums_of_the_streams_are_those_of_the_logits(padded, head, monkeypatch):
    """Unweighted, several chunks of rows, in training mode; what is ignored is neither added nor counted."""
    monkeypatch.setitem(loss_head.CHUNK_ROWS, "cpu", 7)
    model, ids = (
        tiny("duo_predict", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).double().train(),
        random_ids(3, 12),
    )
    labels, more = ids.clone(), {}
    labels[0, 4] = labels[1, 8:] = -100
    if padded == "mask":
        more["attention_mask"] = (torch.arange(12) < torch.tensor([[12], [8], [10]])).long()
    elif padded == "packed":
        more["position_ids"] = torch.cat([torch.arange(5), torch.arange(7)]).expand(3, -1)
    with_logits = model(ids, labels=labels, **more)
    streams = model.prediction_streams(ids, labels, **more)
    if head == "in a wrapper":
        model.lm_head = torch.nn.Sequential(model.lm_head)
    out = model(ids, labels=labels, skip_logits=True, **more)
    for name, mean in (("next_token", with_logits.next_token_loss), ("infill", with_logits.infill_loss)):
        total, count = out.stream_sums[name].tolist()
        assert not out.stream_sums[name].requires_grad
        assert count == (streams[name][1] != -100).sum()
        assert total == pytest.approx(mean.item() * count, rel=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_the_loss_weighs_infill_as_asked(weight):
    """By the sums of the two streams of a model that weighs them alike; with and without logits, padded too."""
    fields = {"n_positions": 24}
    plain = tiny("duo_predict", **fields).double().eval()
    model = tiny("duo_predict", infill_weight=weight, **fields).double().eval()
    model.load_state_dict(plain.state_dict())
    ids = random_ids(2, 24)
    scores = plain.score(ids)
    n, m = (int(scores[name].valid.sum(1)[0]) for name in ("next_token", "infill"))
    by_row = [scores[name].nll.sum(1) for name in ("next_token", "infill")]
    expected = ((by_row[0] + weight * by_row[1]) / (n + weight * m)).mean()
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)
    torch.testing.assert_close(model(ids, labels=ids, skip_logits=True).loss, expected)
    torch.testing.assert_close(model.infill_log_probs(ids), plain.infill_log_probs(ids))
    assert model.positions(24) == (24 if weight == 0 else 47)
    assert ("infill" in model.score(ids)) == (weight > 0)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_weight_that_is_none_is_an_error(weight):
    with pytest.raises(ValueError, match=r"infill_weight=.*0 or more is allowed"):
        DuoPredictGPT2Config(infill_weight=weight)


def test_ignored_labels_count_in_neither_stream():
    model, ids = tiny("duo_predict").double(), random_ids(1, 8)
    labels = ids.clone()
    labels[0, 0] = labels[0, 5] = -100
    with torch.no_grad():
        out = model(ids, labels=labels)
        t = [-float(out.logits[0, k].log_softmax(-1)[ids[0, k + 1]]) for k in range(7) if k + 1 != 5]
        m = [-float(out.infill_logits[0, k].log_softmax(-1)[ids[0, k]]) for k in range(1, 7) if k != 5]
    assert float(out.loss) == pytest.approx(np.mean(t + m), abs=1e-12)


@pytest.mark.parametrize("leak_free", [True, False])
def test_infill_log_probs_equal_a_plain_loop_in_float64(leak_free):
    model = tiny("duo_predict", leak_free=leak_free, initializer_range=0.3).double()
    ids = random_ids(2, 9)
    log_probs = model.infill_log_probs(ids)
    assert log_probs.shape == (2, 8)
    for b in range(2):
        _, slots = reference_logits(model, ids[b].tolist())
        for k in range(8):
            expected = float(slots[k].log_softmax(-1)[ids[b, k]])
            assert float(log_probs[b, k]) == pytest.approx(expected, abs=1e-10)


def test_infill_log_probs_are_float32_and_equal_those_from_the_logits():
    ids = random_ids(3, 24)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        model = tiny("duo_predict", initializer_range=0.3).to(dtype)
        with torch.no_grad():
            expected = model(ids, labels=ids).infill_logits.float().log_softmax(-1)
        log_probs = model.infill_log_probs(ids)
        assert log_probs.dtype == torch.float32
        expected = expected.gather(-1, ids[:, :-1, None]).squeeze(-1)
        torch.testing.assert_close(log_probs, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_infill_log_probs_of_padded_rows_equal_those_of_plain_rows(attention):
    model = tiny("duo_predict", attn_implementation=attention, initializer_range=0.3).double()
    rows = [random_ids(1, n, seed=n)[0] for n in (9, 6, 2, 1)]
    for left in (True, False):
        ids, mask = torch.full((4, 9), 5), torch.zeros(4, 9, dtype=torch.long)
        for row, tokens in enumerate(rows):
            place = slice(9 - len(tokens), 9) if left else slice(0, len(tokens))
            ids[row, place], mask[row, place] = tokens, 1
        log_probs = model.infill_log_probs(ids, attention_mask=mask)
        assert log_probs.shape == (4, 8)
        for row, tokens in enumerate(rows):
            first = 9 - len(tokens) if left else 0
            inner = slice(first, first + len(tokens) - 1)
            if len(tokens) > 1:
                plain = model.infill_log_probs(tokens[None])[0]
                torch.testing.assert_close(log_probs[row, inner], plain, atol=1e-12, rtol=0)
            assert log_probs[row].isnan().sum() == 8 - (len(tokens) - 1)


def test_visibility():
    #                t1 t2 t3 t4 m1 m2 m3
    assert infill_visibility(4).int().tolist() == [
        [0, 1, 0, 0, 1, 0, 0],
        [1, 0, 1, 0, 0, 1, 0],
        [1, 1, 0, 1, 0, 0, 1],
    ]
    assert infill_visibility(4, neighbour=False).int().tolist() == [
        [0, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1],
    ]


def embedding_gradients(model, ids):
    """For each k: d(log-probability t_k gives its target)/d(embeddings), and the same of m_k; each (S, E)."""
    kept = {}
    hook = model.transformer.wte.register_forward_hook(
        lambda _, args, out: kept.setdefault("x", out.requires_grad_()) if args[0].shape == ids.shape else None
    )
    model.requires_grad_(False)
    out = model(ids, labels=ids)
    hook.remove()
    for k in range(ids.shape[1] - 1):
        token = out.logits[0, k].log_softmax(-1)[ids[0, k + 1]]
        slot = out.infill_logits[0, k].log_softmax(-1)[ids[0, k]]
        yield k, *(torch.autograd.grad(x, kept["x"], retain_graph=True)[0][0] for x in (token, slot))


def test_gradients_do_not_leak_in_either_loss():
    for k, of_token, of_slot in embedding_gradients(tiny("duo_predict", n_layer=4).double(), random_ids(1, 7)):
        assert (of_token[k + 1 :] == 0).all()
        assert (of_token[: k + 1].abs().sum(-1) > 0).all()
        assert (of_slot[k] == 0).all()
        assert (of_slot[k + 2 :] == 0).all()
        assert (of_slot[k + 1].abs().sum() > 0).all()


def test_the_published_pattern_leaks_from_the_second_layer_on():
    """Why `leak_free` exists: in the published pattern m_k depends on t_k, by way of t_{k+1}."""
    for n_layer, leaks in ((1, False), (2, True)):
        model = tiny("duo_predict", n_layer=n_layer, leak_free=False).double()
        for k, _, of_slot in embedding_gradients(model, random_ids(1, 7)):
            assert bool((of_slot[k] != 0).any()) == leaks


def test_padding_is_seen_by_no_stream():
    model = tiny("duo_predict")
    ids = random_ids(1, 8)
    padded = torch.cat([torch.full((1, 3), 5), ids], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = padded.masked_fill(mask == 0, -100)
    with torch.no_grad():
        plain = model(ids, labels=ids)
        behind = model(padded, labels=labels, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(behind.logits[:, 3:], plain.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(behind.infill_logits[:, 3:], plain.infill_logits, atol=1e-5, rtol=0)


def test_attention_dropout_is_honoured_in_both_streams():
    model = tiny("duo_predict", attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    ids = random_ids()
    with torch.no_grad():
        still = model(ids, labels=ids)
        model.train()
        noisy = model(ids, labels=ids)
    assert not torch.allclose(still.logits, noisy.logits)
    assert not torch.allclose(still.infill_logits, noisy.infill_logits)


def test_without_labels_it_is_gpt2_and_never_generates_the_mask():
    model = tiny("duo_predict")
    with torch.no_grad():
        model.transformer.wte.weight[-1] += 5 * model.transformer.wte.weight[:-1].sum(0).sign()
    ids = random_ids(1, 4)
    out = model.generate(ids, max_new_tokens=20, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
    assert (out != model.config.mask_token_id).all()


@pytest.mark.parametrize("mask_token_id", [-1, 67])
def test_a_mask_outside_the_vocabulary_is_an_error(mask_token_id):
    with pytest.raises(ValueError, match=rf"mask_token_id={mask_token_id} is outside the vocabulary: 0 to"):
        DuoPredictGPT2Config(vocab_size=67, mask_token_id=mask_token_id)


def test_one_token_has_no_right_neighbour():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        tiny("duo_predict")(torch.tensor([[1]]), labels=torch.tensor([[1]]))
    with pytest.raises(ValueError, match="at least 2 tokens"):
        tiny("duo_predict").infill_log_probs(torch.tensor([[1]]))


@pytest.mark.slow
def test_on_random_tokens_only_the_published_pattern_can_learn_to_infill():
    """Tokens drawn uniformly tell nothing of each other: whoever beats log V has seen the answer."""
    losses = {}
    for leak_free in (True, False):
        fields = {"vocab_size": 17, "n_embd": 64, "n_positions": 16, "initializer_range": 0.1, "leak_free": leak_free}
        model = tiny("duo_predict", **fields, **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(800):  # the leak is found between 300 and 600, depending on the seed
            ids = torch.randint(0, 16, (32, 16), generator=torch.Generator().manual_seed(step))
            out = model(ids, labels=ids)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        losses[leak_free] = out.infill_loss.item()
    assert losses[True] > math.log(16) - 0.05
    assert losses[False] < 0.1
