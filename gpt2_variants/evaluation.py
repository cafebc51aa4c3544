"""Loss, perplexity and accuracy over the validation blocks, on all ranks."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist


def evaluate(
    score: Callable, batches: Iterable[dict[str, torch.Tensor]], device: torch.device | str
) -> dict[str, float]:
    """`eval_loss`, `eval_perplexity` and `eval_accuracy` of the next token, and the same of every further stream.

    Args:
        score: (input_ids, labels), each (B, S) -> stream -> `TokenScores`.
        batches: this rank's; every rank must have the same number of them (ZeRO stage 3 gathers weights in step).
        device: where `score` computes.

    Returns:
        Means over the predictions of all ranks: the loss in nats per token, its exp, and the part predicted right.
        "infill" gives `eval_infill_loss` and so on.
    """
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        for stream, scores in score(batch["input_ids"].to(device), batch["labels"].to(device)).items():
            correct = scores.correct & scores.valid
            part = torch.stack([x.sum(dtype=torch.float64) for x in (scores.nll, correct, scores.valid)])
            sums[stream] = sums.get(stream, 0) + part
    figures = {}
    for stream, total in sums.items():
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        nll, correct, count = total.tolist()
        prefix = "eval_" if stream == "next_token" else f"eval_{stream}_"
        loss = nll / count
        figures[f"{prefix}loss"] = loss
        figures[f"{prefix}perplexity"] = math.exp(min(loss, 700.0))  # exp overflows a float64 above that
        figures[f"{prefix}accuracy"] = correct / count
    return figures
