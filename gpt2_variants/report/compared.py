"""What was compared: what all runs have in common, what differs, and the commands that repeat them."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..records import asked_options
from ..words import counted
from .groups import Group
from .runs import SavedRun
from .tables import Table

# Options of a command that say where a run's files are, or what becomes of them.
PLACES = ("output_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_private", "dry_run")
VARIANT = "VARIANT"
SHAPE = {"n_layer": "layers", "n_head": "heads", "n_embd": "wide"}
PRECISIONS = {"bf16": "bf16, float32 master weights"}
DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
TOLD = {*SHAPE, *DROPOUT, "vocab_size", "n_positions", "initializer_range", "bos_token_id", "eos_token_id", "size"}


@dataclass(frozen=True)
class Compared:
    """The box of the page.

    Attributes:
        common: (label, text) of what all groups have in common.
        apart: a row for each group with what differs between them; None where nothing does.
        commands: (groups' labels, command line) of one run of each; `VARIANT` stands for the name of each of several.
    """

    common: list[tuple[str, str]]
    apart: Table | None
    commands: list[tuple[str, str]]


def compared(groups: Sequence[Group]) -> Compared:
    """Read the box from the groups' records; what a record does not tell is left out, or a dash among others."""
    facts = [_facts(group) for group in groups]
    fields = [{name: str(value) for name, value in _model(group).items() if name not in TOLD} for group in groups]
    alike = (
        {name for name in fields[0] if all(found.get(name) == fields[0][name] for found in fields)} if fields else {}
    )
    for found, own in zip(facts, fields, strict=True):
        found |= {name: value for name, value in own.items() if name not in alike}
        if alike:
            found["other fields of the config"] = ", ".join(f"{name} {own[name]}" for name in own if name in alike)
    labels = list(dict.fromkeys(label for found in facts for label in found))
    common: list[tuple[str, str]] = []
    differing: list[str] = []
    for label in labels:
        values = [found.get(label) for found in facts]
        if len(set(values)) == 1:
            common.append((label, str(values[0])))
        else:
            differing.append(label)
    rows = [[group.label, *(found.get(label) or "-" for label in differing)] for group, found in zip(groups, facts)]
    apart = Table("What differs", "l" * (1 + len(differing)), ["run", *differing], rows) if differing else None
    return Compared(common, apart, _commands(groups))


def _commands(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Return the command of each group's first run; groups whose commands differ in the variant alone share one."""
    alike: dict[str, list[Group]] = {}
    for group in groups:
        asked = asked_options(group.first.facts).get("variant", group.first.variant)
        if command := command_of(group, VARIANT if asked == group.first.variant else None):
            alike.setdefault(command, []).append(group)
    found = []
    for command, same in alike.items():
        alone = command_of(same[0]) if len(same) == 1 else None
        found.append((", ".join(group.label for group in same), alone or command))
    return found


def command_of(group: Group, variant: str | None = None) -> str | None:
    """Return the command line that trains the group's first run anew; None where the record does not tell it.

    Args:
        variant: stands in place of the run's own.
    """
    asked = {k: v for k, v in asked_options(group.first.facts).items() if k not in PLACES}
    if not asked:
        return None
    asked = {"variant": group.first.variant, **asked} | ({"variant": variant} if variant else {})
    words = ["python", "train_ds.py"]
    for name, value in asked.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict):
            words += [f"--{name}", *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in value.items())]
        elif isinstance(value, list):
            words += [f"--{name}", *(map(str, value) if value else ["none"])]
        else:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def _facts(group: Group) -> dict[str, str]:
    """Return label -> text of a group's first run; devices, dates, seeds and commits of all its runs."""
    run, plan, model = group.first, group.first.plan, _model(group)
    fingerprint = run.facts.get("data_fingerprint")
    starts = [start for one in group.runs for start in one.facts.get("starts") or []]
    days = sorted({str(start["time"])[:10] for start in starts if start.get("time")})
    dropout = [f"{name} {model[name]}" for name in DROPOUT if name in model]
    rows = {
        "data": run.facts.get("data"),
        "fingerprint of the data": fingerprint and str(fingerprint)[:16],
        "read as asked": _pairs(plan.get("reading")),
        "tokenizer": _tokenizer(plan, model),
        "size and shape": _shape(plan, model),
        "parameters": run.num_parameters and f"{run.num_parameters:,}",
        "block size": run.block_size and f"{run.block_size:,} tokens",
        "batch": _batch(run),
        "steps": _schedule(plan),
        "learning rate": _rate(run),
        "optimizer": _optimizer(plan),
        "initialisation": _initialisation(plan, model),
        "dropout": ", ".join(dropout) or None,
        "precision": PRECISIONS.get(str(plan.get("precision")), plan.get("precision")),
        "exported weights": "of the best evaluation" if plan.get("load_best_model_at_end") else None,
        "seeds": ", ".join(dict.fromkeys(str(one.seed) for one in group.runs if one.seed is not None)) or None,
        "versions": _pairs(run.facts.get("versions")),
        "git commit": ", ".join(dict.fromkeys(str(c) for one in group.runs if (c := one.facts.get("git_commit"))))
        or None,
        "device": group.machine or ("several, or not known" if starts else None),
        "date": " to ".join(dict.fromkeys([days[0], days[-1]])) if days else None,
    }
    return {label: text for label, text in rows.items() if text}


def _model(group: Group) -> dict[str, Any]:
    return group.first.plan.get("model") or {}


def _pairs(values: dict[str, Any] | None) -> str | None:
    return ", ".join(f"{name} {value}" for name, value in (values or {}).items()) or None


def _tokenizer(plan: dict[str, Any], model: dict[str, Any]) -> str | None:
    if not plan.get("tokenizer"):
        return None
    entries = f", the model has {model['vocab_size']:,} entries" if "vocab_size" in model else ""
    return f"{plan['tokenizer']}{entries}"


def _shape(plan: dict[str, Any], model: dict[str, Any]) -> str | None:
    parts = [f"{model[name]:,} {what}" for name, what in SHAPE.items() if isinstance(model.get(name), int)]
    return ", ".join([str(plan["size"]), *parts] if plan.get("size") else parts) or None


def _batch(run: SavedRun) -> str | None:
    batch = run.plan.get("train_batch_size")
    if not batch:
        return None
    return f"{counted(batch, 'sequence')} a step" + (f", {batch * run.block_size:,} tokens" if run.block_size else "")


def _schedule(plan: dict[str, Any]) -> str | None:
    if not plan.get("total_steps"):
        return None
    warmup = f", {plan['warmup_steps']:,} of them warm-up" if plan.get("warmup_steps") is not None else ""
    kind = (plan.get("schedule") or {}).get("type")
    return f"{plan['total_steps']:,}{warmup}" + (f", {kind}" if kind else "")


def _rate(run: SavedRun) -> str | None:
    """Return the highest learning rate, and who chose it."""
    rate = run.plan.get("learning_rate")
    if rate is None:
        return None
    if any(str(choice).startswith("learning_rate=") for choice in run.plan.get("chosen") or ()):
        return f"{rate:g}, the preset's"
    return f"{rate:g}, asked for" if "learning_rate" in run.facts.get("asked", {}) else f"{rate:g}"


def _optimizer(plan: dict[str, Any]) -> str | None:
    optimizer = plan.get("optimizer") or {}
    if not optimizer.get("type"):
        return None
    parts = [optimizer["type"], _pairs(optimizer.get("params"))]
    if plan.get("weight_decay") is not None:
        parts.append(f"weight decay {plan['weight_decay']:g}")
    if plan.get("gradient_clipping"):
        parts.append(f"gradients clipped at {plan['gradient_clipping']:g}")
    return ", ".join(part for part in parts if part)


def _initialisation(plan: dict[str, Any], model: dict[str, Any]) -> str | None:
    if plan.get("init_from"):
        return f"from {plan['init_from']}"
    return f"random, initializer_range {model['initializer_range']}" if "initializer_range" in model else None
