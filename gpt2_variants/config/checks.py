"""What is wrong with a resolved run, as far as it can be known before the data are read."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from .. import hub_client, nodes, warm_start
from ..data import check_source
from ..faults import UsageError
from ..folders import holds_run, only_leftovers
from ..ranks import has_cuda, main_rank, world_size
from ..records import never_began
from ..trackers.registry import TRACKERS
from .deepspeed_json import compiles, resolve_ds_config, zero_stage
from .optimizer_json import is_adam
from .options import Options


def faults(run: Options, found: list[str]) -> list[str]:
    """Everything that is wrong with a resolved run and can be known before the data are read: one line each.

    What takes libraries of seconds to check, the model's and DeepSpeed's configs, is left out where faults were `found`
    already, or are found by then, and nothing of it was asked for: it comes from the package itself.
    """
    lines = list(found)
    model_is_asked = bool(run.asked.keys() & {"model_args", "init_from"})
    model_faults = _model_faults(run) if model_is_asked else []
    if not (run.dry_run and run.dataset == "wikitext-103"):  # a dry run knows its size without reading it
        no_tokenizer = run.tokenizer == run.init_from and model_faults  # told of --init_from already
        lines += check_source(run.dataset, None if no_tokenizer else run.tokenizer, run.reading)
    json_faults = _deepspeed_faults(run, built=False)
    lines += (
        model_faults
        + json_faults
        + _batch_faults(run)
        + _place_faults(run)
        + _installation_faults(run)
        + _hub_faults(run)
    )
    if not json_faults and (not lines or run.deepspeed_config is not None):
        lines += _deepspeed_faults(run, built=True)
    return lines if lines or model_is_asked else _model_faults(run)


def _deepspeed_faults(run: Options, built: bool) -> list[str]:
    lines = []
    try:
        config = resolve_ds_config(run, world_size(), run.max_steps or 1, built)
    except UsageError as err:
        lines += err.lines
    else:
        if run.compile and zero_stage(config) == 3:
            lines.append(
                "--compile: not with ZeRO stage 3, whose hooks around each module would be compiled anew for each; "
                "leave it out, or give zero1.json or zero2.json"
            )
        kind = config["optimizer"].get("type")
        if run.apex in ("adam", "all") and not is_adam(str(kind)):
            lines.append(f"--apex {run.apex}: would put Adam in the place of {kind}; leave it out, or use AdamW")
        if compiles(run, config):
            lines += _compiler_faults()
    return lines


def _batch_faults(run: Options) -> list[str]:
    given = [name for name in ("per_device_train_batch_size", "gradient_accumulation_steps") if name in run.asked]
    if not run.auto_micro_batch or not given:
        return []
    return [f"--auto_micro_batch: --{given[0]} says it already; leave one of them out"]


def _hub_faults(run: Options) -> list[str]:
    if not run.push_to_hub:
        given = [name for name in ("hub_model_id", "hub_private") if getattr(run, name)]
        return [f"--{name}: has no effect without --push_to_hub; add that, or leave it out" for name in given]
    faults = hub_client.local_faults("--hub_model_id", run.hub_name)
    if not faults and main_rank():  # one question, not one of each GPU
        faults = hub_client.access_faults("--hub_model_id", run.hub_name, run.hub_private)
    return faults


def _compiler_faults() -> list[str]:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return ["--compile (default on CUDA): torch.compile needs a C++ compiler; install g++, or give --no-compile"]
    return []


def _installation_faults(run: Options) -> list[str]:
    lines = [fault] if (fault := nodes.fault()) else []
    if find_spec("deepspeed") is None and not run.dry_run:
        lines.append("deepspeed is not installed, and training runs on it; pip install deepspeed")
    for name in run.report_to:
        # one question to the network, not one of each GPU
        if fault := TRACKERS[name].fault() if main_rank() else TRACKERS[name].missing():
            lines.append(f"--report_to {name}: {fault}; or --report_to none")
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(
        run.attn_implementation
    )
    if package:
        import torch

        if find_spec(package) is None or not torch.cuda.is_available():
            lines.append(
                f"--attn_implementation {run.attn_implementation}: needs a CUDA device and the package {package}; "
                "install it, or use sdpa"
            )
    if run.tf32 and not run.dry_run and not has_cuda():
        lines.append("--tf32: has no effect without a CUDA device; leave it out")
    if run.apex and (fault := _apex_fault()):
        lines.append(f"--apex {run.apex}: {fault}")
    return lines


def _apex_fault() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "needs a CUDA device; leave --apex out"
    # the package of that name on PyPI is another; NVIDIA's has these compiled modules beside it
    if any(find_spec(name) is None for name in ("apex", "amp_C", "fused_layer_norm_cuda")):
        return (
            "NVIDIA's apex with its CUDA extensions is not installed, and PyPI does not have it; build it (git clone "
            "https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v "
            "--no-build-isolation .), or leave --apex out"
        )
    return None


def _model_faults(run: Options) -> list[str]:
    from transformers.activations import ACT2FN

    if run.init_from is not None:
        if fault := warm_start.fault_of(run.init_from):
            return [fault]
        if run.size is not None:
            return [f"--size {run.size}: the model has the size of --init_from {run.init_from}; leave --size out"]
    known = run.spec.config_fields()
    lines = [
        f"--model_args {name}: {run.variant} has no such config field; it has {', '.join(known)}"
        for name in run.model_args
        if name not in known
    ]
    if lines:
        return lines
    try:
        config = run.make_config(tokenizer_size=50257)
    except Exception as err:  # the config classes raise ValueError and huggingface_hub's validation errors alike
        return [f"--model_args: {' '.join(str(err).split())}"]
    for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        if getattr(config, name) < 1:
            lines.append(f"--model_args {name}={getattr(config, name)}: at least 1 is needed")
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if not 0 <= getattr(config, name) < 1:
            lines.append(f"--model_args {name}={getattr(config, name)}: a probability below 1 is needed")
    if config.activation_function not in ACT2FN:
        lines.append(
            f"--model_args activation_function={config.activation_function}: one of {', '.join(sorted(ACT2FN))}"
        )
    if lines:
        return lines
    if config.n_embd % config.n_head:
        lines.append(f"--model_args n_embd={config.n_embd}: not a multiple of n_head={config.n_head}")
    if run.block_size > config.n_positions:
        lines.append(
            f"--block_size {run.block_size}: the model has {config.n_positions} positions; a block size up to that, or "
            f"--model_args n_positions={run.block_size}"
        )
    return lines


def _place_faults(run: Options) -> list[str]:
    out = Path(run.output_dir)
    if run.resumes and run.resume_from_checkpoint != "auto" and not Path(run.resume_from_checkpoint).is_dir():
        return [
            f"--resume_from_checkpoint {run.resume_from_checkpoint}: no such folder; auto, a run's folder, or a "
            f"checkpoint such as {out}/checkpoints/step-00000500"
        ]
    if run.dry_run:
        return []
    if out.exists() and not out.is_dir():
        return [f"--output_dir {out}: is a file; a folder is needed"]
    if holds_run(out) and not run.resumes and not never_began(out):
        return [
            f"--output_dir {out}: holds a run already; give another folder, or go on with it by "
            "--resume_from_checkpoint auto"
        ]
    if out.is_dir() and not holds_run(out) and not only_leftovers(out):
        return [f"--output_dir {out}: is not empty and holds no run; give a new folder"]
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        return [f"--output_dir {out}: {parent} cannot be written; give another folder"]
    return []
