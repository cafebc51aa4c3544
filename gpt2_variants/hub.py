"""What a run hands on: a folder that `from_pretrained` loads without this package."""

import copy
import os
import pickle
import shutil
import sys
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from . import checkpoint
from .data import open_tokenizer
from .registry import VARIANTS, Variant
from .run import Faults, Run, RunRecord, new_folder_faults

MASK_TOKEN = "<|MASK|>"


def export(
    variant: Variant, config, state_dict: dict[str, torch.Tensor], tokenizer, block_size: int, folder: Path
) -> None:
    """Write float32 safetensors, configs, tokenizer and model code to `folder`, whole or not at all.

    Args:
        state_dict: name -> weight, without the tied `lm_head.weight`.
        tokenizer: the data's; gets `<|MASK|>` where the model has an entry for it.
        block_size: tokens per training sequence; the tokenizer's `model_max_length`, since the model may have more
            positions than were ever trained.

    Raises:
        ValueError: `state_dict` lacks a weight of the model or has one too many.
    """
    config = copy.deepcopy(config)
    config.use_cache = True
    config.dtype = torch.float32
    with torch.device("meta"):
        model = _exported_class(variant)(config)
    missing, unexpected = model.load_state_dict(state_dict, strict=False, assign=True)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise ValueError(f"weights do not fit {variant.name}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    disable_progress_bar()
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = block_size
    if getattr(config, "mask_token_id", None) == len(tokenizer):
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    tokenizer.save_pretrained(aside)
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def _exported_class(variant: Variant) -> type:
    """The class to save as: with its code, or transformers' own where it has the `model_type`."""
    if variant.config_class.model_type == GPT2LMHeadModel.config_class.model_type:
        return GPT2LMHeadModel
    variant.config_class.register_for_auto_class()
    variant.model_class.register_for_auto_class("AutoModelForCausalLM")
    return variant.model_class


def finish(run: Run, trained) -> None:
    """Export a finished run to `model/`, and say so in `run.json`."""
    folder = Path(run.output_dir)
    record = RunRecord(folder, writes=True)
    try:
        export(run.spec, trained.config, trained.state_dict, trained.tokenizer, run.block_size, folder / "model")
    except BaseException as err:
        record.update(status="failed", reason=f"export: {type(err).__name__}: {err}".splitlines()[0])
        raise
    record.update(status="finished", reason=None)


def export_checkpoint(source: Path, folder: Path) -> Path:
    """Export from a checkpoint, as a finished run exports itself: without a GPU, of any ZeRO stage and number of ranks.

    Args:
        source: a checkpoint (`.../checkpoints/step-...`), or a run's folder, which means its newest whole checkpoint.
        folder: what to write; it must not exist.

    Returns:
        The checkpoint that was exported.

    Raises:
        Faults: there is no whole checkpoint, or `folder` exists or cannot be written.
    """
    lines = new_folder_faults(folder)
    chosen, fault = _choose(source)
    if fault:
        lines.append(f"--checkpoint {source}: {fault}")
    if lines:
        raise Faults(lines)
    manifest = checkpoint.read_manifest(chosen)
    identity = manifest["identity"]
    variant = VARIANTS[identity["variant"]]
    described = chosen / checkpoint.MODEL
    try:
        weights = checkpoint.float32_weights(chosen, manifest["cut"]["zero_stage"])
    except ValueError as err:
        raise Faults([f"--checkpoint {source}: {err}"]) from err
    except pickle.UnpicklingError as err:
        raise Faults([f"--checkpoint {source}: would run code on being read, so it was not read; use another"]) from err
    export(
        variant,
        variant.config_class.from_json_file(described / "config.json"),
        weights,
        open_tokenizer(str(described)),
        identity["block_size"],
        folder,
    )
    return chosen


def _choose(source: Path) -> tuple[Path | None, str | None]:
    """The checkpoint that `source` means, verified; or what is wrong."""
    if not source.is_dir():
        return None, "no such folder; give a run's folder, or a checkpoint such as runs/gpt2/checkpoints/step-00000500"
    if (source / "checkpoints").is_dir():
        chosen, passed_over = checkpoint.newest_valid(source / "checkpoints")
        print("".join(f"{line}\n" for line in passed_over), end="", file=sys.stderr)
        if chosen is None:
            return None, "holds no whole checkpoint"
    else:
        chosen = source.resolve()
        if fault := checkpoint.fault_of(chosen):
            return None, f"{fault}; give another checkpoint, or the run's folder for its newest whole one"
    if not (chosen / checkpoint.MODEL / "config.json").is_file():
        return None, f"{chosen.name} was saved by a version that did not yet keep config and tokenizer in a checkpoint"
    return chosen, None
