"""What a run hands on: a folder that `from_pretrained` loads without this package."""

import copy
import hashlib
import itertools
import json
import os
import pickle
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from . import hub_client, network
from .config.options import Options
from .data import open_tokenizer
from .faults import UsageError
from .folders import new_folder_faults
from .model_card import write_card
from .pictures import save_png
from .records import RunRecord
from .registry import VARIANTS, Variant
from .report import plot
from .training import checkpoint

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
    if auto_classes := variant.auto_classes():
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
    model.save_pretrained(aside)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = block_size
    tokenizer.save_pretrained(aside)
    if (mask_token_id := getattr(config, "mask_token_id", None)) is not None:
        _add_mask(tokenizer, mask_token_id, aside)
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
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
    """The class to save as: with its code, or transformers' own where it has the `model_type`."""
    if variant.config_class.model_type == GPT2Config.model_type:
        return GPT2LMHeadModel
    variant.config_class.register_for_auto_class()
    variant.model_class.register_for_auto_class("AutoModelForCausalLM")
    return variant.model_class


def finish(run: Options, trained: Any) -> None:
    """Export a finished run to `model/`, and say so in `run.json`."""
    folder = Path(run.output_dir)
    record = RunRecord(folder, writes=True)
    try:
        export(run.spec, trained.config, trained.state_dict, trained.tokenizer, run.block_size, folder / "model")
    except BaseException as err:
        record.update(status="failed", reason=f"export: {type(err).__name__}: {err}".splitlines()[0])
        raise
    record.update(status="finished", reason=None)


def publish(folder: Path, repo_id: str | None = None, private: bool | None = None) -> int:
    """Push the `model/` of a finished run with its model card, say how it went, and note it in `run.json`.

    Args:
        folder: of the run.
        repo_id, private: as `--hub_model_id` and `--hub_private`; None: as the run was asked.

    Returns:
        The exit code: 0; 1 where the Hub did not take it, 130 or 143 after a signal. Then all is left as it was, and
        the command that repeats the push is printed.
    """
    record = RunRecord(folder, writes=True)
    options = record.facts["options"]
    repo_id = repo_id or options.get("hub_model_id") or folder.absolute().name
    private = bool(options.get("hub_private")) if private is None else private
    about = {"repository": repo_id, "card": record.facts.get("hub", {}).get("card")}
    handlers = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        record.update(hub={**about, "status": "pushing"})
        full_name = hub_client.claim(repo_id, private)
        about["card"] = _add_card(record, folder / "model", full_name)
        url = hub_client.push_folder(folder / "model", full_name, f"{record.facts['variant']}, by gpt2_variants")
    except (hub_client.PushError, _Stopped) as err:
        record.update(hub={**about, "status": "failed", "reason": str(err)})
        again = f"python -m gpt2_variants push {shlex.quote(str(folder))} --hub_model_id {shlex.quote(repo_id)}"
        print(
            f"error: not pushed to {repo_id}: {err}\n{folder} is complete; to repeat the push: {again}"
            + " --hub_private" * private,
            file=sys.stderr,
        )
        return err.exit_code if isinstance(err, _Stopped) else 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    record.update(hub={**about, "repository": full_name, "status": "pushed", "commit": url})
    print(f"pushed      {network.endpoint()}/{full_name}")
    return 0


class _Stopped(BaseException):
    """A signal that ends a push, like KeyboardInterrupt. Training leaves handlers behind that only set a flag."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def _stop(number: int, frame: object) -> None:
    raise _Stopped(number)


def _add_card(record: RunRecord, model: Path, name: str) -> str:
    """Write README.md and the pictures it shows to the folder `model`; the digest of what was written.

    A README.md that was edited since is left as it is.
    """
    card, run_folder = model / "README.md", record.path.parent
    written = record.facts.get("hub", {}).get("card")
    if card.exists() and _digest(card) != written:
        return written
    try:
        pictures = save_png(model, model)
        shutil.copyfile(plot(run_folder), model / "curves.png")
        pictures.insert(0, ("curves.png", "Loss and perplexity against optimizer steps."))
    except UsageError as err:
        pictures = []
        print(f"note: the model card has no pictures: {'; '.join(err.lines)}", file=sys.stderr)
    card.write_text(write_card(run_folder, name, pictures), encoding="utf-8")
    return _digest(card)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def push_faults(folder: Path, repo_id: str | None, private: bool | None) -> list[str]:
    """What stands in the way of `publish`, in lines; the Hub is asked, and nothing is written."""
    facts = RunRecord(folder, writes=False).facts
    faults = []
    if not facts:
        faults.append(f"{folder}: holds no run (no run.json); give a run's folder, such as runs/duo_predict")
    elif facts.get("status") != "finished" or not (folder / "model" / "config.json").is_file():
        faults.append(
            f"{folder}: the run is {facts.get('status')}, and only a finished one is pushed; go on with it by "
            "--resume_from_checkpoint auto"
        )
    elif not os.access(folder, os.W_OK) or not os.access(folder / "model", os.W_OK):
        faults.append(
            f"{folder}: cannot be written, where the model card and the outcome are to stand; push a copy of it"
        )
    options = facts.get("options", {})
    name = repo_id or options.get("hub_model_id") or folder.absolute().name
    private = bool(options.get("hub_private")) if private is None else private
    unasked = hub_client.local_faults("--hub_model_id", name, by="push")
    return faults + (unasked or hub_client.access_faults("--hub_model_id", name, private, by="push"))


def export_checkpoint(source: Path, folder: Path) -> Path:
    """Export from a checkpoint, as a finished run exports itself: without a GPU, of any ZeRO stage and number of ranks.

    Args:
        source: a checkpoint (`.../checkpoints/step-...`), or a run's folder, which means its newest whole checkpoint.
        folder: what to write; it must not exist.

    Returns:
        The checkpoint that was exported.

    Raises:
        UsageError: there is no whole checkpoint, or `folder` exists or cannot be written.
    """
    lines = new_folder_faults(folder)
    chosen, fault = _choose(source)
    if fault:
        lines.append(f"--checkpoint {source}: {fault}")
    if lines or chosen is None:
        raise UsageError(lines)
    manifest = checkpoint.read_manifest(chosen)
    identity = manifest["identity"]
    variant = VARIANTS[identity["variant"]]
    described = chosen / checkpoint.MODEL
    try:
        weights = checkpoint.float32_weights(chosen, manifest["cut"]["zero_stage"])
    except ValueError as err:
        raise UsageError([f"--checkpoint {source}: {err}"]) from err
    except pickle.UnpicklingError as err:
        raise UsageError(
            [f"--checkpoint {source}: would run code on being read, so it was not read; use another"]
        ) from err
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
