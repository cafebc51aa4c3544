"""What the loss says is what the predictions are worth."""

import math

import torch

from .subject import NotApplicable, Subject, of_stream

RANDOM_TOKENS = 16
STEPS = 200


def labels_shifted_once(subject: Subject) -> str | None:
    """The scores are those that a plain loop takes from the logits, and so is the loss, by both of its ways."""
    model, ids = subject.model(tokens=64).double(), subject.ids(2, 64)
    labels = ids.clone()
    labels[1, 7] = labels[0, 20:24] = -100
    with torch.no_grad():
        logits = model(ids).logits
        scores = model.score(ids, labels)["next_token"]
        with_logits = model(ids, labels=labels).loss.item()
        without = model(ids, labels=labels, skip_logits=True).loss.item()
    logits = logits.log_softmax(-1)
    wanted = {shift: _mean_nll(logits, labels, shift) for shift in range(4)}
    found = scores.nll.sum().item() / int(scores.valid.sum())
    if not math.isclose(found, wanted[1], abs_tol=1e-4):
        near = min(wanted, key=lambda shift: abs(wanted[shift] - found))
        if math.isclose(wanted[near], found, abs_tol=1e-4):
            return f"the scores hold each prediction against the token {near} places on; 1 is right"
        return f"the scores of the labels come to {found:.4f} nats, of the logits to {wanted[1]:.4f}"
    single = len(model.prediction_streams(ids, labels)) == 1
    losses = {"with logits": with_logits, "with skip_logits": without}
    for what, found in losses.items():
        if single and not math.isclose(found, wanted[1], abs_tol=1e-3):
            return f"the loss {what} is {found:.4f} nats, of the logits {wanted[1]:.4f}"
    if not math.isclose(with_logits, without, abs_tol=1e-3):
        return f"the loss with logits is {with_logits:.4f}, with skip_logits {without:.4f}"
    return None


def _mean_nll(values: torch.Tensor, labels: torch.Tensor, shift: int) -> float:
    """Return the mean of -log p over the labels (B, S), each held against the logits `shift` places before it."""
    found = [
        -values[row, place - shift, labels[row, place]].item()
        for row in range(len(labels))
        for place in range(max(shift, 1), labels.shape[1])
        if labels[row, place] >= 0
    ]
    return sum(found) / len(found)


def part_of_a_batch(subject: Subject) -> str | None:
    """The loss is a part's share of the mean where `num_items_in_batch` is given, as transformers' Trainer does."""
    model, ids = subject.model(tokens=32).double(), subject.ids(2, 32)
    with torch.no_grad():
        mean = model(ids, labels=ids).loss.item()
        for way in ({}, {"skip_logits": True}, {"return_token_scores": True}):
            loss = model(ids, labels=ids, num_items_in_batch=torch.tensor(10), **way).loss.item()
            if not math.isclose(loss, mean * 2 * 31 / 10, rel_tol=1e-4):
                return f"num_items_in_batch=10 gives a loss of {loss:.4f}; the sum over 10 is {mean * 2 * 31 / 10:.4f}"
    return None


def random_stays_random(subject: Subject) -> str | None:
    """Nothing can be learned of uniformly random tokens: in 200 steps no loss falls below their entropy."""
    if subject.quick:
        raise NotApplicable("takes 200 steps of training")
    model = subject.model(layers=2, vocab_size=RANDOM_TOKENS + subject.variant.extra_vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    least = math.log(RANDOM_TOKENS)
    losses: dict[str, list[float]] = {}
    for step in range(STEPS):
        ids = torch.randint(0, RANDOM_TOKENS, (1, subject.block_size), generator=generator)
        scored = model.train()(ids, labels=ids, return_token_scores=True)
        optimizer.zero_grad()
        scored.loss.backward()
        optimizer.step()
        if step >= STEPS - 20:
            evaluated = model.eval().score(ids)
            for mode, scores in (("training", scored.token_scores), ("evaluation", evaluated)):
                for stream, part in scores.items():
                    key = f"{of_stream(stream)}{mode}"
                    losses.setdefault(key, []).append(part.nll.sum().item() / int(part.valid.sum()))
    for key, values in losses.items():
        mean = sum(values) / len(values)
        if mean < least - 0.02:
            return (
                f"tokens drawn at random, {RANDOM_TOKENS} of them, are predicted with a loss of {mean:.3f} nats after "
                f"{STEPS} steps ({key}); without a leak none falls below log {RANDOM_TOKENS} = {least:.3f}"
            )
    return None
