"""The page that a pushed model shows on the Hub: what it is, how well it does, how it was trained, how to load it."""

import inspect
from pathlib import Path
from typing import Any

from .config.saved_plan import saved_plan
from .data import SourceName, source_name
from .evaluation import streams_in
from .records import read_facts, recorded_streams
from .registry import Variant
from .variant_code import of_run
from .words import counted

LICENSE = "apache-2.0"
FIGURES = ("perplexity", "loss", "accuracy")


def write_card(run_folder: Path, name: str, pictures: list[tuple[str, str]]) -> str:
    """Return the model card of a finished run, Markdown with the Hub's metadata at its head.

    Args:
        run_folder: holds `run.json`.
        name: the repository's full name.
        pictures: (file name, caption) of images that lie beside the card.
    """
    facts = read_facts(run_folder)
    plan = saved_plan(run_folder, facts)
    variant, source = of_run(run_folder, plan), source_name(plan["dataset"])
    parts = [
        f"---\n{_metadata(facts, plan, variant, source, name)}\n---",
        f"# {name.split('/')[-1]}",
        f"A GPT-2 variant, `{variant.name}`, trained with gpt2_variants: {variant.summary}.",
        _idea(variant),
        "## Figures",
        _figures(facts, source),
        "\n\n".join(f"![{caption}]({file})\n\n*{caption}*" for file, caption in pictures),
        "## Use",
        _use(variant, name),
        "## Training",
        _recipe(facts, plan, source),
        "## License",
        "Weights and code: Apache 2.0. The training text has a license of its own.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(facts: dict[str, Any], plan: dict[str, Any], variant: Variant, source: SourceName, name: str) -> str:
    """YAML by which the Hub shows task, data set and evaluation results."""
    from huggingface_hub import EvalResult, ModelCardData

    start = plan.get("init_from")
    figures, results = facts.get("final_eval", {}), []
    told = [("eval_", "text-generation", "next token", "")]
    for stream in streams_in(figures, recorded_streams(facts)):
        # Another task than the next token's: the Hub shows the results of one task and data set as one.
        task = "fill-mask" if stream.sees_ahead else "other"
        told.append((f"eval_{stream.name}_", task, stream.title, f", {stream.name}"))
    for prefix, task, task_name, of_stream in told:
        results += [
            EvalResult(
                task_type=task,
                task_name=task_name,
                dataset_type=source.hub_id or "other",
                dataset_name=source.name,
                dataset_config=source.config,
                dataset_split=source.split or "validation",
                metric_type=figure,
                metric_value=round(figures[prefix + figure], 6),
                metric_name=f"validation {figure}{of_stream}",
            )
            for figure in FIGURES
            if prefix + figure in figures
        ]
    return ModelCardData(
        model_name=name.split("/")[-1],
        language=source.language,
        license=LICENSE,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=source_name(start).hub_id if start else None,
        datasets=[source.hub_id] if source.hub_id else None,
        tags=["gpt2", "gpt2_variants", *dict.fromkeys((variant.family, variant.name))],
        eval_results=results or None,
    ).to_yaml()


def _idea(variant: Variant) -> str:
    """Return the difference from GPT-2, as the head of the model's own file tells it; nothing for the baseline."""
    paragraphs = (inspect.getdoc(inspect.getmodule(variant.model_class)) or "").split("\n\n")
    told = [p for p in paragraphs if p.startswith("What differs")]
    return "\n\n".join(told)


def _figures(facts: dict[str, Any], source: SourceName) -> str:
    final = facts.get("final_eval")
    if not final:
        return "Not evaluated."
    rows = ["| on the validation part | perplexity | loss, nats a token | accuracy |", "|---|---|---|---|"]
    streams = streams_in(final, recorded_streams(facts))
    for prefix, what in (("eval_", "next token"), *((f"eval_{of.name}_", of.title) for of in streams)):
        perplexity, loss, accuracy = (final[prefix + figure] for figure in FIGURES)
        rows.append(f"| {_in_a_cell(what)} | {perplexity:.2f} | {loss:.4f} | {accuracy:.4f} |")
    lines = ["\n".join(rows), *(f"{_in_a_cell(of.title)}: {of.caveat}" for of in streams)]
    if unigram := facts.get("unigram_perplexity"):
        lines.append(f"Text: {source.name}. A unigram model of it has a perplexity of {unigram:.2f}.")
    return "\n\n".join(lines)


def _in_a_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _use(variant: Variant, name: str) -> str:
    """Code that loads the model without this package."""
    own_code = variant.config_class.model_type != "gpt2"
    trust = ", trust_remote_code=True" if own_code else ""
    # the tokenizer needs none of the model's code, but AutoTokenizer would ask on a terminal whether it may run it
    no_trust = ", trust_remote_code=False" if own_code else ""
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{no_trust})',
        'inputs = tokenizer("The following", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=True)[0]))",
    ]
    lines += [
        f'print(model.score(inputs["input_ids"])["{of.name}"].nll)  # -log p: {" ".join(of.title.split())}'
        for of in variant.model_class.streams
    ]
    lines.append("```")
    if own_code:
        lines += ["", "`trust_remote_code` runs the model's code that lies beside the weights."]
    return "\n".join(lines)


def _recipe(facts: dict[str, Any], plan: dict[str, Any], source: SourceName) -> str:
    """Return how it was trained, as a table, from the plan alone; what an older record does not tell is left out."""
    start, best = facts["starts"][-1], facts.get("best")
    tokenizer = source_name(plan["tokenizer"]) if plan["tokenizer"] != "builtin" else SourceName("builtin")
    rows = {
        "data": plan["data"].replace(plan["dataset"], source.name, 1).replace(plan["tokenizer"], tokenizer.name),
        "start": f"warm, from {source_name(plan['init_from']).name}" if plan.get("init_from") else "random weights",
        "parameters": f"{plan['num_parameters']:,}",
        "training FLOPs per token": f"{plan['flops_per_token']:.4g}",
        "batch": f"{counted(plan['train_batch_size'], 'sequence')} of {plan['block_size']} tokens a step",
        "optimizer": _optimizer(plan),
        "schedule": _schedule(plan),
        "precision": "bf16, float32 master weights" if plan["precision"] == "bf16" else plan["precision"],
        "seed": plan["seed"],
        "weights": f"those of step {best['step']}, where the validation loss was lowest" if best else None,
        "hardware": f"{start['world_size']} x {start['device']}, DeepSpeed ZeRO {plan['zero_stage']}",
        "seconds of training": f"{facts['train_seconds']:,.0f}" if facts.get("train_seconds") else None,
        "chosen for the user": ", ".join(plan["chosen"]) if plan.get("chosen") else None,
        "versions": ", ".join(f"{package} {version}" for package, version in facts["versions"].items()),
        "commit": facts.get("git_commit"),
    }
    lines = ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows.items() if value is not None)]
    return "\n".join(lines)


def _optimizer(plan: dict[str, Any]) -> str:
    rate = plan["learning_rate"]
    parts = [
        plan["optimizer"]["type"],
        "rates by its schedule" if rate is None else f"learning rate {rate}",
        f"weight decay {plan['weight_decay']}",
        *(f"{name} {value}" for name, value in plan["optimizer"]["params"].items()),
        f"gradients clipped at {plan['gradient_clipping']}" if plan["gradient_clipping"] else "gradients not clipped",
    ]
    return ", ".join(parts)


def _schedule(plan: dict[str, Any]) -> str:
    schedule, total = plan["schedule"], plan["total_steps"]
    told = ("warmup_num_steps", "total_num_steps", "warmup_max_lr")
    others = [f"{name} {value}" for name, value in schedule["params"].items() if name not in told]
    return ", ".join([f"{schedule['type']}, {plan['warmup_steps']} of {counted(total, 'step')} warm-up", *others])
