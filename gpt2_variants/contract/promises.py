"""The promises, in the order in which they are asked."""

from collections.abc import Callable
from dataclasses import dataclass

from . import batches, causality, costs, generation, numerics, saving, scoring, sharding, training
from .subject import Subject


@dataclass(frozen=True)
class Promise:
    """What a variant promises.

    Attributes:
        name: a word or two, joined by dashes.
        title: what is kept, in words.
        ask: gives a finding in words, or None where the promise is kept. Raises `NotApplicable`.
    """

    name: str
    title: str
    ask: Callable[[Subject], str | None]


PROMISES: dict[str, Promise] = {
    name: Promise(name, title, ask)
    for name, title, ask in (
        ("no-leak-by-gradient", "no prediction depends on what it may not see, by gradient", causality.by_gradient),
        ("no-leak-by-change", "no prediction changes with what it may not see", causality.by_perturbation),
        ("sees-its-past", "each prediction depends on the token before it", causality.sees_its_past),
        ("rows-apart", "a text's predictions are its own, whatever else is in the batch", batches.rows_apart),
        ("padding-unseen", "padding changes no prediction", batches.padding_unseen),
        ("packed-apart", "texts packed into one row do not see one another", batches.packed_texts_apart),
        ("labels-shifted-once", "each prediction is held against the next token", scoring.labels_shifted_once),
        ("part-of-a-batch", "a part of a batch has its share of the mean loss", scoring.part_of_a_batch),
        ("random-stays-random", "random tokens are not learned below their entropy", scoring.random_stays_random),
        ("cache", "the logits with a cache are those without, over the whole window", generation.cached_as_uncached),
        ("generation", "greedy, beams, static cache, behind padding: the same text", generation.generates_alike),
        ("evaluation-repeats", "evaluation repeats itself, at any batch size", numerics.evaluation_repeats),
        ("starts-uniform", "the untrained model's loss is log V", numerics.starts_uniform),
        ("bf16", "bf16 is close to float32, at the last position too", numerics.bf16_is_close),
        ("parameters-learn", "every parameter gets a gradient", training.parameters_learn),
        ("saved-whole", "what was trained is what is saved and loaded", saving.saved_whole),
        ("checkpointing", "gradient checkpointing changes nothing", training.recomputed_alike),
        ("compile", "torch.compile traces it whole, and changes nothing", training.compiled_alike),
        ("trainer", "transformers' Trainer trains it with the same loss", training.trains_in_trainer),
        ("flops", "its FLOPs are those of the formula", costs.flops_as_counted),
        ("export", "its export loads without this package", saving.exports_without_package),
        ("zero", "ZeRO 1, 2 and 3 on two ranks train alike", sharding.stages_alike),
    )
}
