"""What a variant is said to cost is what it costs: comparisons at equal FLOPs rest on it."""

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..measuring import applied_parameters, flops_per_token
from .subject import VOCABULARY, Subject

TOLERANCE = 0.1


def flops_as_counted(subject: Subject) -> str | None:
    """The FLOPs of training by the formula agree with those of PyTorch's counter, to 10 %, at the block size.

    Counted with attention by eager and by sdpa: of a variant whose two ways differ (duo-predict's eager mask is dense,
    and of its blocks of queries the counter does not know all products) the formula's are between them.
    """
    tokens, counts = subject.block_size, []
    for attention in ("eager", "sdpa"):
        model = subject.model(attention=attention, n_embd=128, vocab_size=16 * VOCABULARY).train()
        ids = subject.ids(1)
        # of the plain kernel the counter knows the matrix products on every device
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(ids, labels=ids, skip_logits=True).loss.backward()
        counts.append(counter.get_total_flops() / tokens)
    config, positions = model.config, model.positions(tokens)
    applied = applied_parameters(subject.variant.on_meta(config))
    said = flops_per_token(applied, config.n_layer, config.n_embd, tokens, positions)
    # positions that are looked up, not multiplied, are among the parameters of the formula
    said -= 6 * sum(p.numel() for p in model.transformer.wpe.parameters()) * positions / tokens
    if (1 - TOLERANCE) * min(counts) <= said <= (1 + TOLERANCE) * max(counts):
        return None
    return (
        f"training FLOPs per token are {said:.4g} by the formula, {counts[1]:.4g} as counted; let its `positions` tell "
        "how many positions a block of tokens is computed for"
    )
