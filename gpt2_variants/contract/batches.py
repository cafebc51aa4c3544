"""A text's predictions are its own: other texts of the batch, their order, and padding change nothing."""

import torch

from .causality import embeddings_in
from .subject import Subject, log_probs, of_stream


def rows_apart(subject: Subject) -> str | None:
    """Ask by gradient, in evaluation and training mode; then with the rows in another order, and with a row alone."""
    tokens = subject.block_size
    for mode in ("evaluation", "training"):
        model = subject.model(layers=2).double().train(mode == "training").requires_grad_(False)
        ids = subject.ids(3)
        embedded = embeddings_in(model, ids)
        for stream, (values, _) in log_probs(model, ids).items():
            total = values[0].square().sum()
            (gradient,) = torch.autograd.grad(total, embedded[-1], retain_graph=True, allow_unused=True)
            others = None if gradient is None else (gradient[1:] != 0).any(-1).nonzero().tolist()
            if others:
                return (
                    f"{of_stream(stream)}the predictions of one text depend on token {others[0][1]} of another one in "
                    f"the same batch, in {mode} mode"
                )
    model, ids = subject.model(layers=2).double(), subject.ids(4, tokens // 2)
    with torch.no_grad():
        whole = log_probs(model, ids)
        turned = log_probs(model, ids.flip(0))
        alone = log_probs(model, ids[:1])
    for stream, (values, _) in whole.items():
        if (found := (values - turned[stream][0].flip(0)).abs().max().item()) > 1e-8:
            return f"{of_stream(stream)}in another order of the batch the log-probabilities change by {found:.2g}"
        if (found := (values[:1] - alone[stream][0]).abs().max().item()) > 1e-8:
            return f"{of_stream(stream)}a text alone has other log-probabilities than in a batch, by {found:.2g}"
    return None


def padding_unseen(subject: Subject) -> str | None:
    """Padding on the left or the right, with its attention mask, and whatever token it is, changes no prediction."""
    model = subject.model(layers=4).double()
    tokens = min(subject.block_size // 2, 200)
    pads = 40
    ids = subject.ids(1, tokens)
    with torch.no_grad():
        plain = model(ids).logits[0]
        for side in ("left", "right"):
            found = []
            for pad in (0, 5):
                filling = torch.full((1, pads), pad)
                real = torch.ones_like(ids)
                left = side == "left"
                padded = torch.cat([filling, ids] if left else [ids, filling], dim=1)
                mask = torch.cat([0 * filling, real] if left else [real, 0 * filling], dim=1)
                places = (mask.cumsum(-1) - 1).clamp(min=0)
                logits = model(padded, attention_mask=mask, position_ids=places).logits[0]
                found.append(logits[pads:] if left else logits[:tokens])
            if (moved := (found[0] - found[1]).abs().max().item()) > 1e-9:
                return f"what stands in the padding on the {side} changes the logits, by {moved:.2g}"
            if (moved := (found[0] - plain).abs().max().item()) > 1e-4:
                token = int((found[0] - plain).abs().amax(-1).argmax())
                return f"behind padding on the {side} the logits at token {token} are others, by {moved:.2g}"
    return None


def packed_texts_apart(subject: Subject) -> str | None:
    """Hold the second of two texts in one row, where positions begin anew, against the logits that it has alone."""
    model, tokens = subject.model(layers=4, initializer_range=0.2).double(), min(subject.block_size // 2, 100)
    ids = subject.ids(1, 2 * tokens)
    places = torch.arange(tokens).repeat(2)[None]
    with torch.no_grad():
        packed = model(ids, position_ids=places, use_cache=False).logits[:, tokens:]
        alone = model(ids[:, tokens:], use_cache=False).logits
    off = (packed - alone).abs().amax((0, 2))
    if off.max() > 1e-4:
        token = int((off > 1e-4).nonzero()[0])
        return f"a text packed behind another one has other logits, by {off.max():.2g}, from its token {token} on"
    return None
