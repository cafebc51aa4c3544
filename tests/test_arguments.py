"""What stock `GPT2LMHeadModel`, the control, does with an argument, every variant does with the same meaning."""

import pytest
import torch
from conftest import VARIANTS, random_ids, tiny
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from gpt2_variants.models.loss_head import LMHead
from gpt2_variants.models.modeling_base import CACHE_NAME

CONTROL = "stock"
MODELS = [CONTROL, *sorted(VARIANTS)]


def make(name: str, attn_implementation: str = "sdpa", **fields):
    """Stock GPT-2 or a variant, in float64 and eval mode; weights large enough that a wrong one shows."""
    fields = {"initializer_range": 0.2, **fields}
    if name != CONTROL:
        return tiny(name, attn_implementation=attn_implementation, **fields).double()
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 48, "vocab_size": 67}
    torch.manual_seed(0)
    config = GPT2Config(**shape, bos_token_id=0, eos_token_id=0, **fields)
    return GPT2LMHeadModel._from_config(config, attn_implementation=attn_implementation).double().eval()


def ways(name: str) -> list[dict]:
    """How a loss can be asked for; stock knows one."""
    return [{}] if name == CONTROL else [{}, {"skip_logits": True}, {"return_token_scores": True}]


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def same_loss(a, b):
    """Whatever the model's dtype, GPT-2's own loss is computed in float32."""
    torch.testing.assert_close(a.double(), b.double(), atol=2e-5, rtol=0)


LENGTHS = (9, 5, 12, 2)


def rows() -> list[torch.Tensor]:
    return [random_ids(1, n, seed=n) for n in LENGTHS]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_are_separate_ones(name, attention):
    """`position_ids` that begin anew, as transformers' DataCollatorWithFlattening gives them, with its labels."""
    model = make(name, attention)
    packed = torch.cat(rows(), dim=1)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    labels = packed.clone()
    labels[0, starts] = -100
    items = int((labels != -100).sum())
    for way in ways(name):
        whole = model(packed, labels=labels, position_ids=positions, use_cache=False, **way)
        parts = [
            model(ids, labels=ids.index_fill(1, torch.tensor([0]), -100), num_items_in_batch=items, **way)
            for ids in rows()
        ]
        same_loss(whole.loss, sum(part.loss for part in parts))
        if not way:
            close(whole.logits, torch.cat([part.logits for part in parts], dim=1))
        elif way.get("return_token_scores"):
            for stream, scores in whole.token_scores.items():
                assert scores.valid.sum() == sum(part.token_scores[stream].valid.sum() for part in parts)
                for start, part, ids in zip(starts, parts, rows(), strict=True):
                    inner = slice(start, start + ids.shape[1] - 1)
                    close(scores.nll[:, inner], part.token_scores[stream].nll)


def test_infill_of_packed_sequences_is_that_of_separate_ones():
    model = make("duo_predict")
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
    found = model.infill_log_probs(torch.cat(rows(), dim=1), position_ids=positions)
    nothing = torch.full((1, 1), torch.nan, dtype=found.dtype)
    wanted = torch.cat([x for ids in rows() for x in (model.infill_log_probs(ids), nothing)], dim=1)
    torch.testing.assert_close(found, wanted[:, :-1], atol=1e-10, rtol=0, equal_nan=True)


def padded(left: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `rows` in one batch: ids, mask and labels; on the left the first token has no context and no label."""
    longest = max(LENGTHS)
    ids, mask = torch.full((len(LENGTHS), longest), 5), torch.zeros(len(LENGTHS), longest, dtype=torch.long)
    for row, tokens in enumerate(rows()):
        length = tokens.shape[1]
        place = slice(longest - length, longest) if left else slice(0, length)
        ids[row, place], mask[row, place] = tokens[0], 1
    labels = ids.masked_fill(mask == 0, -100)
    if left:
        labels[torch.arange(len(LENGTHS)), mask.argmax(1)] = -100
    return ids, mask, labels


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right", "right, without a mask"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_rows_have_the_loss_and_gradients_of_plain_rows_cut_up_or_not(name, side, attention):
    model, left = make(name, attention), side == "left"
    ids, mask, labels = padded(left)
    told = {} if side.endswith("mask") else {"attention_mask": mask}
    if left:
        told["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    items = int((labels[:, 1:] != -100).sum())
    for way in ways(name):
        results = []
        for loss in (
            lambda way=way: model(ids, labels=labels, **told, **way).loss,
            lambda way=way: sum(
                model(
                    tokens,
                    labels=tokens.index_fill(1, torch.tensor([0]), -100) if left else tokens,
                    num_items_in_batch=items,
                    **way,
                ).loss
                for tokens in rows()
            ),
        ):
            model.zero_grad()
            value = loss()
            value.backward()
            results.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for batch, parts in zip(*results, strict=True):
            same_loss(batch, parts)


@pytest.mark.parametrize("name", MODELS)
def test_labels_that_are_shifted_or_ignored_by_another_number(name):
    model, ids = make(name), random_ids(2, 12)
    labels = ids.clone()
    labels[0, 3:6] = -100
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    for way in ways(name):
        wanted = model(ids, labels=labels, **way).loss
        same_loss(model(ids, labels=labels, shift_labels=shifted, **way).loss, wanted)
        same_loss(model(ids, labels=labels.masked_fill(labels == -100, 777), ignore_index=777, **way).loss, wanted)
        assert (model(ids, labels=labels, shift_labels=shifted.roll(1, 1), **way).loss - wanted).abs() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_token_types_and_embeddings_count_in_the_loss(name):
    model, ids = make(name), random_ids(2, 12)
    types = random_ids(2, 12, seed=9)
    embedded = model.transformer.wte(ids).detach()
    logits = model(ids, token_type_ids=types).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for way in ways(name):
        out = model(ids, labels=ids, token_type_ids=types, **way)
        same_loss(model(inputs_embeds=embedded, labels=ids, token_type_ids=types, **way).loss, out.loss)
        assert (out.loss - model(ids, labels=ids, **way).loss).abs() > 1e-3
        if "duo" not in name:
            same_loss(out.loss, nll)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_asked_for_beside_the_loss_is_given(name, attention):
    """Hidden states, attentions, a cache to go on with, a tuple: as without labels."""
    model, ids = make(name, attention), random_ids(2, 12)
    asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    plain = model(ids, **asked)
    assert len(plain.attentions) == (2 if attention == "eager" else 0)
    for way in ways(name):
        out = model(ids, labels=ids, **asked, **way)
        for field in ("hidden_states", "attentions"):
            assert len(out[field]) == len(plain[field])
            for a, b in zip(out[field], plain[field], strict=True):
                close(a, b)
        assert out[CACHE_NAME].get_seq_length() == 12
        close(
            model(ids[:, :3], **{CACHE_NAME: out[CACHE_NAME]}).logits,
            model(torch.cat([ids, ids[:, :3]], 1)).logits[:, 12:],
        )
        as_tuple = model(ids, labels=ids, return_dict=False, **way)
        assert isinstance(as_tuple, tuple)
        same_loss(as_tuple[0], out.loss)


@pytest.mark.parametrize("name", MODELS)
def test_labels_after_a_cache_are_scored_or_refused(name):
    model, ids = make(name), random_ids(2, 12)
    for way in ways(name):
        cache = model(ids[:, :7], use_cache=True)[CACHE_NAME]
        if name == "duo_predict":
            with pytest.raises(ValueError, match="the cache holds 7 tokens"):
                model(ids[:, 7:], labels=ids[:, 7:], **{CACHE_NAME: cache}, **way)
            continue
        loss = model(ids[:, 7:], labels=ids[:, 7:], **{CACHE_NAME: cache}, **way).loss
        labels = ids.index_fill(1, torch.arange(8), -100)
        same_loss(loss, model(ids, labels=labels, **way).loss)


def test_what_a_loss_of_our_own_cannot_honour_is_refused(variant):
    model, ids = tiny(variant), random_ids()
    ours = [{"skip_logits": True}, {"return_token_scores": True}] + [{}] * (variant == "duo_predict")
    for way in ours:
        with pytest.raises(ValueError, match="logits_to_keep"):
            model(ids, labels=ids, logits_to_keep=1, **way)
    model.loss_function = lambda logits, labels, **_: logits.sum()
    for way in ours:
        with pytest.raises(ValueError, match="would not call it"):
            model(ids, labels=ids, **way)
    if variant != "duo_predict":
        torch.testing.assert_close(model(ids, labels=ids).loss, model(ids).logits.sum())
    else:
        with pytest.raises(ValueError, match=r"attention_mask of \(batch, tokens\)"):
            tiny(variant)(ids, labels=ids, attention_mask=torch.ones(2, 1, 24, 24, dtype=torch.bool))


def test_positional_arguments_stand_where_gpt2s_do(variant):
    model, ids = tiny(variant), random_ids()
    out = model(ids, None, None, None, None, None, None, None, ids)
    assert torch.equal(out.loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("name", MODELS)
def test_scores_in_float32_where_the_config_asks_for_it(name):
    """`reorder_and_upcast_attn`, which stock knows in eager attention: bf16 logits come closer to float32's."""
    ids, errors = random_ids(4, 48), []
    with torch.no_grad():
        for upcast in (False, True):
            model = make(name, "eager", reorder_and_upcast_attn=upcast, initializer_range=0.4).float()
            exact = model(ids).logits
            errors.append((model.bfloat16()(ids).logits - exact).abs().mean().item())
            assert model.transformer.h[0].attn.reorder_and_upcast_attn == upcast
    assert errors[0] != errors[1]


@pytest.mark.parametrize("name", MODELS)
def test_cross_attention_with_a_cache_equals_without(name):
    model, ids = make(name, add_cross_attention=True), random_ids(2, 12)
    seen = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole = model(ids, encoder_hidden_states=seen)
    assert isinstance(whole[CACHE_NAME], EncoderDecoderCache)
    cache = model(ids[:, :9], encoder_hidden_states=seen, use_cache=True)[CACHE_NAME]
    rest = model(ids[:, 9:], encoder_hidden_states=seen, **{CACHE_NAME: cache})
    close(rest.logits, whole.logits[:, 9:])
    assert (whole.logits - model(ids, encoder_hidden_states=0 * seen).logits).abs().max() > 1e-3
    for way in ways(name):
        out = model(ids, labels=ids, encoder_hidden_states=seen, **way)
        assert (out.loss - model(ids, labels=ids, encoder_hidden_states=0 * seen, **way).loss).abs() > 1e-4
        if not way:
            close(out.logits, whole.logits)


@pytest.mark.parametrize("name", MODELS)
def test_a_head_of_another_kind_is_called_for_its_logits(name):
    """Resizing untied embeddings puts `nn.Linear` in the head's place; an adapter wraps it."""
    model, ids = make(name, tie_word_embeddings=False), random_ids()
    model.resize_token_embeddings(model.config.vocab_size + 4)
    assert not isinstance(model.lm_head, LMHead)
    wanted = None
    for way in ways(name):
        model.zero_grad()
        loss = model(ids, labels=ids, **way).loss
        loss.backward()
        found = [loss.detach(), model.lm_head.weight.grad.clone(), model.transformer.wte.weight.grad.clone()]
        wanted = wanted or found
        for a, b in zip(found, wanted, strict=True):
            same_loss(a, b)


@pytest.mark.parametrize("given", ["call", "config", "model"])
def test_what_is_suppressed_by_the_caller_stays_so_and_the_mask_too(given):
    model, ids = tiny("duo_predict"), random_ids(1, 4)
    mask, unwanted = model.config.mask_token_id, [3, 4, 5]
    with torch.no_grad():  # the mask and the unwanted are by far the most probable
        model.transformer.wte.weight[[mask, *unwanted]] += 5 * model.transformer.wte.weight.sum(0).sign()
    how = {"max_new_tokens": 20, "do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
    if given == "call":
        out = model.generate(ids, suppress_tokens=unwanted, **how)
    elif given == "config":
        config = type(model.generation_config)(suppress_tokens=unwanted, **how)
        out = model.generate(ids, config)
        assert config.suppress_tokens == unwanted, "the caller's own config is left alone"
    else:
        model.generation_config.suppress_tokens = unwanted
        out = model.generate(ids, **how)
    assert not set(out[0, 4:].tolist()) & {mask, *unwanted}
    for config in (type(model.generation_config)(**how), None):
        model.generation_config.suppress_tokens = None
        assert mask not in model.generate(ids, config, **({} if config else how))[0, 4:].tolist()


def test_an_empty_cache_is_filled_with_the_tokens_alone():
    model, ids = make("duo_predict"), random_ids(2, 12)
    cache = DynamicCache(config=model.config)
    model(ids, labels=ids, use_cache=True, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 12
    for filled, wanted in zip(cache.layers, model(ids, use_cache=True)[CACHE_NAME].layers, strict=True):
        close(filled.keys, wanted.keys)
        close(filled.values, wanted.values)
