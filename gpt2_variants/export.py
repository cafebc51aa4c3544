"""The folder that a model is handed on in: `from_pretrained` loads it without this package."""

import copy
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from .data import open_tokenizer
from .registry import Variant

MASK_TOKEN = "<|MASK|>"


def export(
    variant: Variant,
    config: GPT2Config,
    state_dict: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    folder: Path,
) -> None:
    """Write float32 safetensors, configs, tokenizer and model code to `folder`, whole or not at all.

    Args:
        state_dict: name -> weight, without the tied `lm_head.weight`.
        tokenizer: the data's; gets `<|MASK|>` with the id that the model has for it, where it has one.
        block_size: tokens per training sequence; the tokenizer's `model_max_length`, since the model may have more
            positions than were ever trained.

    Raises:
        ValueError: `state_dict` lacks a weight of the model or has one too many.
    """
    config = copy.deepcopy(config)
    config.use_cache = True
    config.dtype = torch.float32
    auto_classes: dict[str, type] = {**variant.auto_classes()}
    if auto_classes:
        if variant.code is not None:
            auto_classes["AutoConfig"] = variant.config_class
        config.auto_map = {
            auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for auto, cls in auto_classes.items()
        }
    with torch.device("meta"):
        model = _exported_class(variant)(config)
    missing, unexpected = model.load_state_dict(state_dict, strict=False, assign=True)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise ValueError(f"weights do not fit {variant.name}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    disable_progress_bar()
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside)
        if variant.code is not None:
            variant.code.travel_to(aside)
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.model_max_length = block_size
        tokenizer.save_pretrained(aside)
        if (mask_token_id := getattr(config, "mask_token_id", None)) is not None:
            _add_mask(tokenizer, mask_token_id, aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # on a full disk its room is needed
        raise
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # of an export that was killed while it removed it
        os.rename(folder, old)
    os.rename(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def _add_mask(tokenizer: PreTrainedTokenizerBase, mask_token_id: int, folder: Path) -> None:
    """Give the tokenizer saved in `folder` a mask token with exactly this id, or say why it cannot have one."""
    if tokenizer.mask_token_id == mask_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    if mask_token_id in vocabulary.values():
        token = tokenizer.convert_ids_to_tokens(mask_token_id)
        print(f"note: the exported tokenizer names no mask token: id {mask_token_id} is its {token!r}", file=sys.stderr)
        return
    names = itertools.chain([MASK_TOKEN], (f"<|MASK_{i}|>" for i in itertools.count(1)))
    name = next(name for name in names if name not in vocabulary)
    added = copy.deepcopy(tokenizer)
    added.add_special_tokens({"mask_token": name})
    if added.mask_token_id != mask_token_id:
        # It was numbered by the count of tokens, which gaps in the ids leave behind. As an entry of the tokenizer's
        # model it has the id that is written there; so must the other added tokens, or they would be numbered anew.
        file = folder / "tokenizer.json"
        state = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if isinstance(entries := state.get("model", {}).get("vocab"), dict):
            entries |= vocabulary | {name: mask_token_id}
            file.write_text(json.dumps(state, ensure_ascii=False, indent=2), encoding="utf-8")
            added = open_tokenizer(str(folder))
            added.add_special_tokens({"mask_token": name})
    if added.mask_token_id == mask_token_id:
        added.save_pretrained(folder)
    else:
        print(
            f"note: the exported tokenizer names no mask token: it cannot give one the model's id {mask_token_id}, "
            "since it numbers its tokens without gaps",
            file=sys.stderr,
        )


def _exported_class(variant: Variant) -> type[GPT2LMHeadModel]:
    """Return the class to save as: with its code, or transformers' own where it has the `model_type`."""
    if variant.config_class.model_type == GPT2Config.model_type:
        return GPT2LMHeadModel
    if variant.code is not None:
        return variant.model_class  # its file goes along as it was trained, not as it lies there now
    variant.config_class.register_for_auto_class()
    variant.model_class.register_for_auto_class("AutoModelForCausalLM")
    return variant.model_class
