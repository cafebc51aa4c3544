"""Generation: what comes with a cache is what comes without."""

import torch

from ..models.modeling_base import CACHE_NAME
from .subject import Subject

PLAIN = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def cached_as_uncached(subject: Subject) -> str | None:
    """The logits over the whole window, fed in parts of many sizes, are those of one pass."""
    tokens = subject.block_size
    model, ids = subject.model(layers=4), subject.ids(2)
    ends = [1, 2, 3, tokens // 4, tokens // 4 + 1, tokens // 2, *range(tokens // 2 + 1, tokens // 2 + 6), tokens - 2]
    if not subject.quick:
        ends += [*range(tokens // 8, tokens // 8 + 40), *range(tokens - 40, tokens)]
    ends = sorted({*ends, tokens - 1, tokens})
    with torch.no_grad():
        whole = model(ids).logits
        cache = None
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            given: dict = {} if cache is None else {CACHE_NAME: cache}
            out = model(ids[:, start:end], use_cache=True, **given)
            cache = out[CACHE_NAME]
            off = (out.logits - whole[:, start:end]).abs().amax((0, 2))
            if off.max() > 1e-4:
                token = start + int((off > 1e-4).nonzero()[0])
                return f"the logits at token {token} are others with a cache than without, by {off.max():.2g}"
    return None


def generates_alike(subject: Subject) -> str | None:
    """Greedy, by beams and with a static cache, behind padding on the left: the text of a pass without a cache."""
    # larger weights than at the start of a training, so that attention decides
    model, ids = subject.model(tokens=96, initializer_range=0.2), subject.ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    new = 24 if subject.quick else 80
    ways: dict[str, dict] = {"greedy": {}, "beams": {"num_beams": 3}}
    for name, way in ways.items():
        asked = {"attention_mask": mask, "max_new_tokens": new, **PLAIN, **way}
        plain = model.generate(ids, use_cache=False, **asked)
        kinds: dict[str, dict] = {"a cache": {}}
        if name == "greedy":
            kinds["a static cache"] = {"cache_implementation": "static"}
        for kind, more in kinds.items():
            found = model.generate(ids, use_cache=True, **asked, **more)
            if not torch.equal(found, plain):
                token = int((found != plain).any(0).nonzero()[0])
                return f"{name} generation with {kind} goes another way from token {token} on than without"
    alone = model.generate(ids[:1, 3:], max_new_tokens=new, **PLAIN)[0, 6:]
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=new, **PLAIN)[0, 9:]
    if not torch.equal(alone, padded):
        token = int((alone != padded).nonzero()[0])
        return f"behind padding on the left another text is generated, from new token {token} on"
    return None
