"""Numbers that are what they seem: evaluation repeats itself, bf16 is close to float32, the start is uniform."""

import copy
import math

import torch

from ..models.modeling_base import VariantLMHeadModel
from .subject import VOCABULARY, Subject


def evaluation_repeats(subject: Subject) -> str | None:
    """Evaluation gives the same scores at once, after a pass of training, and in batches of 1 and of 16."""
    model, ids = subject.model(tokens=128).double(), subject.ids(16, 128)
    first = _nll(model, ids)
    if (moved := (first - _nll(model, ids)).abs().max().item()) > 0:
        return f"two evaluations of the same text differ, by {moved:.2g} nats"
    model.train()
    model(ids, labels=ids)
    model.eval()
    if (moved := (first - _nll(model, ids)).abs().max().item()) > 0:
        return f"an evaluation after a forward pass of training, without any step, differs by {moved:.2g} nats"
    alone = torch.cat([_nll(model, row[None]) for row in ids])
    if (moved := (first - alone).abs().max().item()) > 1e-7:
        return f"in batches of 1 and of 16 the scores differ, by {moved:.2g} nats"
    return None


def _nll(model: VariantLMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([scores.nll for scores in model.score(ids).values()], dim=1)


def starts_uniform(subject: Subject) -> str | None:
    """The loss of an untrained model is close to log V: it prefers no token yet."""
    model, ids = subject.model(), subject.ids(2)
    entries = VOCABULARY + subject.variant.extra_vocabulary
    for stream, scores in model.score(ids).items():
        found = scores.nll.sum().item() / int(scores.valid.sum())
        if not math.isclose(found, math.log(entries), abs_tol=0.25):
            least = math.log(entries)
            return f"the loss of the untrained model is {found:.3f} nats ({stream}); log {entries} is {least:.3f}"
    return None


def bf16_is_close(subject: Subject) -> str | None:
    """The logits in bf16 are those in float32 to 2 % of their spread, at the last position as everywhere."""
    model, ids = subject.model(), subject.ids(1)
    with torch.no_grad():
        full = model(ids).logits
        half = copy.deepcopy(model).bfloat16()(ids).logits.float()
    spread = full.std()
    for where, part in (("on average", slice(None)), ("at the last position", slice(-1, None))):
        off = ((half - full)[:, part].abs().mean() / spread).item()
        if not off < 0.02:
            return (
                f"in bf16 the logits {where} are off by {100 * off:.1f} % of their spread; what must not be rounded "
                "belongs in a module of Float32Parameters"
            )
    return None
