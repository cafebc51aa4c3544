"""The page that a pushed model shows on the Hub: what it is, how well it does, how it was trained, how to load it."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

from .data import SourceName, source_name
from .registry import VARIANTS, Variant

LICENSE = "apache-2.0"
FIGURES = ("perplexity", "loss", "accuracy")


def write_card(run_folder: Path, name: str, pictures: list[tuple[str, str]]) -> str:
    """The model card of a finished run, Markdown with the Hub's metadata at its head.

    Args:
        run_folder: holds `run.json` and `ds_config.json`.
        name: the repository's full name.
        pictures: (file name, caption) of images that lie beside the card.
    """
    facts = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
    ds_config = json.loads((run_folder / "ds_config.json").read_text(encoding="utf-8"))
    variant, source = VARIANTS[facts["variant"]], source_name(facts["options"]["dataset"])
    parts = [
        f"---\n{_metadata(facts, variant, source, name)}\n---",
        f"# {name.split('/')[-1]}",
        f"A GPT-2 variant, `{variant.name}`, trained with gpt2_variants: {variant.summary}.",
        _idea(variant),
        "## Figures",
        _figures(facts, source),
        "\n\n".join(f"![{caption}]({file})\n\n*{caption}*" for file, caption in pictures),
        "## Use",
        _use(variant, name),
        "## Training",
        _recipe(facts, ds_config, source),
        "## License",
        "Weights and code: Apache 2.0. The training text has a license of its own.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(facts: dict[str, Any], variant: Variant, source: SourceName, name: str) -> str:
    """YAML by which the Hub shows task, data set and evaluation results."""
    from huggingface_hub import EvalResult, ModelCardData

    start = facts["options"].get("init_from")
    results = []
    for stream, task, task_name in (
        ("eval_", "text-generation", "next token"),
        ("eval_infill_", "fill-mask", "each token given its past and its right neighbour"),
    ):
        results += [
            EvalResult(
                task_type=task,
                task_name=task_name,
                dataset_type=source.hub_id or "other",
                dataset_name=source.name,
                dataset_config=source.config,
                dataset_split=source.split or "validation",
                metric_type=figure,
                metric_value=round(facts["final_eval"][stream + figure], 6),
                metric_name=f"validation {figure}",
            )
            for figure in FIGURES
            if stream + figure in facts.get("final_eval", {})
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
    """The difference from GPT-2, as the head of the model's own file tells it; nothing for the baseline."""
    paragraphs = (inspect.getdoc(inspect.getmodule(variant.model_class)) or "").split("\n\n")
    told = [p for p in paragraphs if p.startswith("What differs")]
    return re.sub(r" \(`variants\.md`[^)]*\)", "", "\n\n".join(told))


def _figures(facts: dict[str, Any], source: SourceName) -> str:
    final = facts.get("final_eval")
    if not final:
        return "Not evaluated."
    rows = ["| on the validation part | perplexity | loss, nats a token | accuracy |", "|---|---|---|---|"]
    for prefix, what in (("eval_", "next token"), ("eval_infill_", "infill, not comparable with the line above")):
        if f"{prefix}loss" in final:
            perplexity, loss, accuracy = (final[prefix + figure] for figure in FIGURES)
            rows.append(f"| {what} | {perplexity:.2f} | {loss:.4f} | {accuracy:.4f} |")
    lines = ["\n".join(rows)]
    if "eval_infill_loss" in final:
        lines.append("Infill: each token is predicted from its past and its right neighbour.")
    if unigram := facts.get("unigram_perplexity"):
        lines.append(f"Text: {source.name}. A unigram model of it has a perplexity of {unigram:.2f}.")
    return "\n\n".join(lines)


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
    if hasattr(variant.model_class, "infill_log_probs"):
        lines.append('model.infill_log_probs(inputs["input_ids"])  # log p of each token, its right neighbour seen')
    lines.append("```")
    if own_code:
        lines += ["", "`trust_remote_code` runs the model's code that lies beside the weights."]
    return "\n".join(lines)


def _recipe(facts: dict[str, Any], ds_config: dict[str, Any], source: SourceName) -> str:
    options, start = facts["options"], facts["starts"][-1]
    optimizer, scheduler = ds_config["optimizer"]["params"], ds_config.get("scheduler", {}).get("params", {})
    zero = ds_config.get("zero_optimization", {}).get("stage", 0)
    tokenizer = source_name(options["tokenizer"]) if options["tokenizer"] != "builtin" else SourceName("builtin")
    data = facts["data"].replace(options["dataset"], source.name, 1).replace(options["tokenizer"], tokenizer.name)
    rows = {
        "data": data,
        "start": f"warm, from {source_name(options['init_from']).name}"
        if options.get("init_from")
        else "random weights",
        "parameters": f"{facts['num_parameters']:,}",
        "training FLOPs per token": f"{facts['flops_per_token']:.4g}",
        "batch": f"{ds_config['train_batch_size']} sequences of {options['block_size']} tokens a step",
        "optimizer": f"AdamW, learning rate {optimizer.get('lr')}, weight decay {optimizer.get('weight_decay')}, "
        f"gradients clipped at {ds_config.get('gradient_clipping')}",
        "schedule": f"{scheduler.get('warmup_num_steps')} of {scheduler.get('total_num_steps')} steps linear warm-up, "
        "linear decay to 0",
        "precision": "bf16, float32 master weights" if ds_config.get("bf16", {}).get("enabled") else "float32",
        "seed": options["seed"],
        "hardware": f"{start['world_size']} x {start['device']}, DeepSpeed ZeRO {zero}",
        "seconds of training": f"{facts['train_seconds']:,.0f}" if facts.get("train_seconds") else None,
        "versions": ", ".join(f"{package} {version}" for package, version in facts["versions"].items()),
        "commit": facts.get("git_commit"),
    }
    lines = ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows.items() if value is not None)]
    return "\n".join(lines)
