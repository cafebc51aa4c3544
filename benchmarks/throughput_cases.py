"""What the throughput benchmark measures: a case for each variant, and those of the references."""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from gpt2_variants.config.deepspeed_json import resolve_ds_config
from gpt2_variants.config.options import Options
from gpt2_variants.ranks import world_size
from gpt2_variants.registry import GPT2_VOCABULARY
from training_case import Case

NANO_VOCABULARY = 4_000  # of the tokenizer that the demo trains


@dataclass(frozen=True)
class Plan:
    """What is to be measured: the cases, how often, and where the results go (None: the device's folder)."""

    preset: str
    cases: list[Case]
    steps: int
    warmup_steps: int
    rounds: int
    output_dir: Path | None


def make_case(run: Options, dtype: str | None) -> Case:
    """Return the variant of `run` as it is trained, in `dtype`; None: in what the DeepSpeed JSON says.

    Where DeepSpeed is not installed, the plain loop stands for its engine.
    """
    vocabulary = NANO_VOCABULARY if run.size == "nano" else GPT2_VOCABULARY
    case = Case(run.spec.name, run, vocabulary, dtype or "bfloat16", what=run.spec.summary)
    if not has_deepspeed():
        case = replace(case, loop="plain")
    stated = resolve_ds_config(run, world_size(), run.max_steps or 1).get("bf16", {}).get("enabled")
    return case if dtype or stated else replace(case, dtype="float32")


def has_deepspeed() -> bool:
    """Return whether DeepSpeed is installed."""
    return importlib.util.find_spec("deepspeed") is not None


def references(case: Case, fitting: int | None = None) -> list[Case]:
    """Return what `--compare` sets a variant's case against; in each only the model or only the loop differs.

    Args:
        fitting: sequences of a step that stock GPT-2 has memory for where it is not compiled; None: those of `case`.
            Where they are fewer, ours is measured with as many too, as the reference.
    """
    plain = case
    found = []
    if case.loop == "deepspeed":
        plain = replace(case, name=f"{case.name}, plain loop", loop="plain", reference=case.name)
        plain = replace(plain, what="the same model, the same arithmetic, without DeepSpeed")
        found.append(plain)
    if case.name == "duo_predict":
        dense = replace(plain, name="duo_predict, dense mask", model="dense_duo_predict", reference=plain.name)
        return [*found, replace(dense, what="plain loop; t_1 m_1 t_2 ... interleaved, a dense (2S-1)^2 mask in SDPA")]
    if case.name != "gpt2":
        return found
    stock = replace(plain, model="stock", reference=plain.name)
    what = "GPT2LMHeadModel given labels, plain loop"
    published = "stock with eager attention and gradient checkpointing; float32 weights, bf16 autocast"
    eager = replace(case.run, compile=False)
    compiled = replace(case.run, compile=True)
    found += [
        replace(stock, name="stock, compiled", run=compiled, what=f"{what}, compiled as a whole"),
        replace(stock, name="as published", model="published", run=eager, what=published),
    ]
    ours, aside = plain, ""
    sequences = case.run.per_device_train_batch_size
    if fitting is not None and sequences is not None and fitting < sequences:
        name = f"{plain.name}, {fitting} sequences"
        fewer = replace(case.run, per_device_train_batch_size=fitting)
        ours = replace(plain, name=name, run=fewer, reference=case.name, what="what stock is set against")
        aside = f"; {fitting} sequences, as its logits and activations have no room with {sequences}"
        found.append(ours)
    stock = replace(stock, name="stock", run=replace(ours.run, compile=False), reference=ours.name)
    return [*found, replace(stock, what=f"{what}, not compiled{aside}")]
