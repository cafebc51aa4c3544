"""What a run hands on: a folder that `from_pretrained` loads without this package."""

import copy
import os
import shutil
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from .registry import Variant
from .run import Run, RunRecord

MASK_TOKEN = "<|MASK|>"


def export(variant: Variant, config, state_dict: dict[str, torch.Tensor], tokenizer, folder: Path) -> None:
    """Write float32 safetensors, configs, tokenizer and model code to `folder`, whole or not at all.

    Args:
        state_dict: name -> weight, without the tied `lm_head.weight`.
        tokenizer: the data's; gets `<|MASK|>` where the model has an entry for it.

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
    if getattr(config, "mask_token_id", None) is not None:
        tokenizer = copy.deepcopy(tokenizer)
        if config.mask_token_id == len(tokenizer):
            tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    tokenizer.save_pretrained(aside)
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(aside, folder)


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
        export(run.spec, trained.config, trained.state_dict, trained.tokenizer, folder / "model")
    except BaseException as err:
        record.update(status="failed", reason=f"export: {type(err).__name__}: {err}".splitlines()[0])
        raise
    record.update(status="finished", reason=None)
