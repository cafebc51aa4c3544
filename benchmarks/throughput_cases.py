"""What the throughput benchmark measures: a case for each variant, and those of the references."""

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
    """The variant of `run` as it is trained, in `dtype`; None: in what the DeepSpeed JSON says."""
    vocabulary = NANO_VOCABULARY if run.size == "nano" else GPT2_VOCABULARY
    case = Case(run.spec.name, run, vocabulary, dtype or "bfloat16", what=run.spec.summary)
    stated = resolve_ds_config(run, world_size(), run.max_steps or 1).get("bf16", {}).get("enabled")
    return case if dtype or stated else replace(case, dtype="float32")


def references(case: Case) -> list[Case]:
    """What `--compare` sets a variant's case against."""
    plain = replace(case, name=f"{case.name}, plain loop", loop="plain", reference=case.name)
    plain = replace(plain, what="the same model, the same arithmetic, without DeepSpeed")
    if case.name == "duo_predict":
        dense = replace(plain, name="duo_predict, dense mask", model="dense_duo_predict", reference=plain.name)
        return [plain, replace(dense, what="plain loop; t_1 m_1 t_2 ... interleaved, a dense (2S-1)^2 mask in SDPA")]
    if case.name != "gpt2":
        return []
    stock = replace(plain, model="stock")
    eager, compiled = replace(case.run, compile=False), replace(case.run, compile=True)
    return [
        plain,
        replace(stock, name="stock", run=eager, what="GPT2LMHeadModel given labels, plain loop, not compiled"),
        replace(stock, name="stock, compiled", run=compiled, what="the same, compiled as a whole"),
        replace(
            stock,
            name="as published",
            model="published",
            run=eager,
            what="stock with eager attention and gradient checkpointing; float32 weights, bf16 autocast",
        ),
    ]
