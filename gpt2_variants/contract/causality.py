"""No prediction depends on what it may not see: the tokens from the one that it predicts on.

A second stream may see further by as many tokens as its declaration says in `sees_ahead`, never the one it predicts.
"""

import torch

from ..models.modeling_base import VariantLMHeadModel
from .subject import NotApplicable, Subject, log_probs, of_stream

LAYERS = 12  # as many as the smallest GPT-2 has, since only some of them may leak


def boundaries(tokens: int, quick: bool) -> list[int]:
    """Return places that halve, quarter, ... a sequence, odd ones, that no window or chunk ends at; and its ends."""
    parts = (2, 4) if quick else (2, 4, 8, 16)
    found = {1, tokens - 1, *(tokens * k // part | 1 for part in parts for k in range(1, part, 2))}
    return sorted(place for place in found if 0 < place < tokens)


def by_gradient(subject: Subject) -> str | None:
    """No gradient goes from a prediction to what it may not see, in evaluation and training mode and in bf16."""
    modes = ("evaluation", "training") if subject.quick else ("evaluation", "training", "bf16")
    for mode in modes:
        model = subject.model(layers=LAYERS)
        model = model.bfloat16() if mode == "bf16" else model.double()
        model.train(mode == "training").requires_grad_(False)
        ids = subject.ids(1)
        embedded = embeddings_in(model, ids)
        for stream, (values, places) in log_probs(model, ids).items():
            if not values.isfinite().all():
                return f"{of_stream(stream)}a prediction is not finite, in {_named(mode)}"
            for boundary in boundaries(ids.shape[1], subject.quick or mode != "evaluation"):
                if found := _leak(values[0], places, embedded[-1], boundary, _ahead(model, stream)):
                    return f"{of_stream(stream)}{found}, in {_named(mode)}"
    return None


def embeddings_in(model: VariantLMHeadModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return a list to which the next pass over `ids` (B, S) adds their embeddings (B, S, E), which take gradients."""
    embedded: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        if inputs and inputs[0].shape == ids.shape:
            embedded.append(output.requires_grad_())
        return output

    model.get_input_embeddings().register_forward_hook(keep)
    return embedded


def _leak(values: torch.Tensor, places: torch.Tensor, embedded: torch.Tensor, boundary: int, ahead: int) -> str | None:
    """Return which of the predictions of tokens up to `boundary` sees a token that it may not; None: none does."""
    early = (places <= boundary).nonzero().flatten().tolist()
    seen = _depends(values, early, embedded)
    if ahead and boundary in _depends(values, [n for n in early if places[n] == boundary], embedded):
        return f"the prediction of token {boundary} depends on token {boundary} itself"
    # with a neighbour in sight, the token at the boundary is one that the prediction before it may see
    forbidden = {token for token in seen if (token > boundary + ahead if ahead else token >= boundary)}
    if not forbidden:
        return None
    token = max(forbidden)
    while len(early) > 1:
        half = early[: len(early) // 2]
        early = half if token in _depends(values, half, embedded) else early[len(half) :]
    return f"the prediction of token {int(places[early[0]])} depends on token {token}"


def _depends(values: torch.Tensor, predictions: list[int], embedded: torch.Tensor) -> set[int]:
    """Return the tokens that any of these predictions (rows of `values`, (N, V)) depends on, by its gradient."""
    if not predictions:
        return set()
    total = values[predictions].square().sum()
    (gradient,) = torch.autograd.grad(total, embedded, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise NotApplicable("the predictions have no gradient to the embeddings")
    return set((gradient[0] != 0).any(-1).nonzero().flatten().tolist())


def by_perturbation(subject: Subject) -> str | None:
    """Another token in the place of one, in float64 and in bf16: earlier predictions stay as they were, bit for bit."""
    for dtype in (torch.float64,) if subject.quick else (torch.float64, torch.bfloat16):
        model = subject.model(layers=LAYERS, attention="eager")
        model = model.double() if dtype == torch.float64 else model.bfloat16()
        ids = subject.ids(1)
        with torch.no_grad():
            before = log_probs(model, ids)
            for changed in reversed(boundaries(ids.shape[1], quick=True)):
                after = log_probs(model, _with_another(ids, changed))
                for stream, (values, places) in before.items():
                    moved = (values != after[stream][0]).any(-1)[0]
                    blind = places <= changed
                    if ahead := _ahead(model, stream):
                        blind = (places == changed) | (places < changed - ahead)
                    if wrong := (moved & blind).nonzero().flatten().tolist():
                        target = int(places[wrong[0]])
                        mode = _named("bf16" if dtype == torch.bfloat16 else "evaluation")
                        what = f"the prediction of token {target} changes with token {changed}, in {mode}"
                        return of_stream(stream) + what
    return None


def sees_its_past(subject: Subject) -> str | None:
    """Each next-token prediction depends on the token right before the one that it predicts."""
    model, ids = subject.model(tokens=48).double(), subject.ids(1, 48)
    with torch.no_grad():
        before, places = log_probs(model, ids)["next_token"]
        for changed in boundaries(47, subject.quick):
            after = log_probs(model, _with_another(ids, changed))["next_token"][0]
            moved = (before != after).any(-1)[0]
            if not moved[places == changed + 1].all():
                return f"the prediction of token {changed + 1} does not depend on token {changed}"
    return None


def _with_another(ids: torch.Tensor, place: int) -> torch.Tensor:
    """Return `ids` (1, S) with another token at `place`."""
    other = ids.clone()
    other[0, place] = (other[0, place] + 7) % 66
    return other


def _ahead(model: VariantLMHeadModel, stream: str) -> int:
    return next((declared.sees_ahead for declared in model.streams if declared.name == stream), 0)


def _named(mode: str) -> str:
    return mode if mode == "bf16" else f"{mode} mode"
