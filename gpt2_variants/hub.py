"""What a run hands on: a folder that `from_pretrained` loads without this package."""

import contextlib
import hashlib
import os
import pickle
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from . import hub_client, network, signals
from .config.options import Options
from .config.saved_plan import saved_plan
from .config.saved_run import run_folder_of
from .data import open_tokenizer
from .export import export
from .faults import RunError, UsageError
from .folders import holds_run, new_folder_faults, write_aside
from .model_card import write_card
from .pictures import save_png
from .reasons import disk_fault, reason_of
from .records import RunRecord, cure, status_of
from .report import plot
from .training import checkpoint, loading
from .variant_code import VariantError, of_run


def finish(run: Options, trained: Any) -> None:
    """Export a finished run to `model/`, and say so in `run.json`. Raises `RunError` where the disk is full."""
    folder = Path(run.output_dir)
    record = trained.record
    try:
        variant = of_run(folder, record.facts["plan"])  # as it was trained, whatever became of its file
        export(variant, trained.config, trained.state_dict, trained.tokenizer, run.block_size, folder / "model")
    except BaseException as err:
        with contextlib.suppress(OSError):
            record.update(status="failed", reason=f"export: {reason_of(err)}")
        if what := disk_fault(err):
            again = f"--resume_from_checkpoint {shlex.quote(str(folder))} exports it"
            raise RunError(f"{folder}: trained to its end, but not exported: {what}, then {again}") from err
        raise
    record.update(status="finished", reason=None)


def publish(folder: Path, repo_id: str | None = None, private: bool | None = None) -> int:
    """Push the `model/` of a finished run with its model card, say how it went, and note it in `run.json`.

    Args:
        folder: of the run.
        repo_id, private: as `--hub_model_id` and `--hub_private`; None: as the run was asked.

    Returns:
        The exit code: 0; 1 where the Hub did not take it, 128 and its number after a signal. Then all is left as it
        was, and the command that repeats the push is printed.
    """
    record = RunRecord(folder, writes=True)
    options = record.facts.get("options", {})
    repo_id = repo_id or options.get("hub_model_id") or folder.absolute().name
    private = bool(options.get("hub_private")) if private is None else private
    about = {"repository": repo_id, "card": record.facts.get("hub", {}).get("card")}
    with signals.handled(signals.that_stop(), _stop):
        try:
            record.update(hub={**about, "status": "pushing"})
            full_name = hub_client.claim(repo_id, private)
            about["card"] = _add_card(record, folder / "model", full_name)
            summary = f"{record.facts.get('variant')}, by gpt2_variants"
            url = hub_client.push_folder(folder / "model", full_name, summary)
        except (hub_client.PushError, _Stopped) as err:
            record.update(hub={**about, "status": "failed", "reason": str(err)})
            again = f"python -m gpt2_variants push {shlex.quote(str(folder))} --hub_model_id {shlex.quote(repo_id)}"
            print(
                f"error: not pushed to {repo_id}: {err}\n{folder} is complete; to repeat the push: {again}"
                + " --hub_private" * private,
                file=sys.stderr,
            )
            return err.exit_code if isinstance(err, _Stopped) else 1
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
    write_aside(card, write_card(run_folder, name, pictures))
    return _digest(card)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def push_faults(folder: Path, repo_id: str | None, private: bool | None) -> list[str]:
    """Return what stands in the way of `publish`, in lines; the Hub is asked, and nothing is written."""
    try:
        facts = RunRecord(folder, writes=False).facts
    except ValueError as err:
        return [str(err)]
    if not facts and holds_run(folder):
        return [f"{folder}: run.json is missing; {cure(folder)}"]
    faults = []
    if not facts:
        faults.append(f"{folder}: holds no run (no run.json); give a run's folder, such as runs/duo_predict")
    elif facts.get("status") != "finished" or not (folder / "model" / "config.json").is_file():
        status = status_of(facts)
        was = "died: its process is gone" if status == "died" else f"is {status}"
        faults.append(
            f"{folder}: the run {was}, and only a finished one is pushed; go on with it by "
            "--resume_from_checkpoint auto"
        )
    elif not os.access(folder, os.W_OK) or not os.access(folder / "model", os.W_OK):
        faults.append(
            f"{folder}: cannot be written, where the model card and the outcome are to stand; push a copy of it"
        )
    else:
        try:
            of_run(folder, saved_plan(folder, facts))
        except VariantError as err:
            faults.append(f"{folder}: {err}")
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
    try:
        variant = of_run(run_folder_of(chosen) or chosen, manifest.get("plan", identity))
    except VariantError as err:
        raise UsageError([f"--checkpoint {source}: {err}"]) from err
    described = chosen / checkpoint.MODEL
    try:
        weights = loading.float32_weights(chosen, manifest["cut"]["zero_stage"])
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
    """Return the checkpoint that `source` means, verified; or what is wrong."""
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
