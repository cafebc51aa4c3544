"""`--init_from`: a variant that starts from the weights of a trained GPT-2, or of another variant.

All weights that the checkpoint and the variant share are taken over; exactly the variant's own parameters are new.
Anything else that does not fit is a fault, never a random weight.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import network
from .registry import Variant, register

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import GPT2Config

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
LEGAL = "give a folder with config.json and model.safetensors, such as runs/gpt2/model, or a Hub id such as gpt2"


class WarmStartError(ValueError):
    """The checkpoint asked for cannot be had or does not fit: one line, from `--init_from` to the cure."""


def fault_of(source: str) -> str | None:
    """Return what is wrong with `source`, found within seconds and without its weights: a line; None if nothing is."""
    folder = Path(source).expanduser()
    if folder.exists():
        if not folder.is_dir():
            return f"--init_from {source}: is a file; {LEGAL}"
        if not (folder / "config.json").is_file():
            return f"--init_from {source}: holds no config.json; {LEGAL}"
        if not any((folder / name).is_file() for name in WEIGHT_FILES):
            return f"--init_from {source}: holds no weights ({' or '.join(WEIGHT_FILES[::2])}); {LEGAL}"
    elif not network.HUB_ID.fullmatch(source):
        return f"--init_from {source}: neither an existing folder nor a Hub id; {LEGAL}"
    elif not network.hub_cache_has(source, WEIGHT_FILES) and not network.reachable():
        return (
            f"--init_from {source}: no such folder, and the Hugging Face Hub ({network.endpoint()}) cannot be reached "
            "to get it; give a local folder, or load it once where there is a network"
        )
    try:
        _config(source)
    except WarmStartError as err:
        return str(err)
    return None


def config_fields(source: str, variant: Variant) -> dict[str, Any]:
    """Return the config fields that the model of `variant` takes from the checkpoint: its shape, dropout and the like.

    Raises:
        WarmStartError: as `fault_of` says.
    """
    config = _config(source)
    fields = {
        name: getattr(config, name)
        for name in variant.config_fields()
        if hasattr(config, name) and name not in variant.overrides
    }
    if config.model_type != variant.config_class.model_type:
        fields["vocab_size"] += variant.extra_vocabulary
    return fields


@functools.lru_cache
def _config(source: str) -> "GPT2Config":
    from transformers import AutoConfig, GPT2Config

    register()  # the checkpoint may be of any variant
    try:
        with network.offline(_stays_offline(source)):
            config = AutoConfig.from_pretrained(Path(source).expanduser() if Path(source).exists() else source)
    except Exception as err:  # Hub, JSON, validation: their errors share no base class
        raise WarmStartError(
            f"--init_from {source}: its config cannot be read ({' '.join(str(err).split())[:200]}); {LEGAL}"
        ) from err
    if not isinstance(config, GPT2Config):
        raise WarmStartError(f"--init_from {source}: is a {config.model_type}; a GPT-2 or a variant of it is needed")
    return config


def _stays_offline(source: str) -> bool:
    return Path(source).expanduser().exists() or not network.reachable()


@dataclass(frozen=True)
class WarmStart:
    """What a model takes over.

    Attributes:
        source: value of `--init_from`.
        weights: parameter name -> float32 values; where the model has more rows, its first ones.
        new: parameter name -> number of values that stay as initialised.
    """

    source: str
    weights: "dict[str, torch.Tensor]"
    new: dict[str, int]

    def apply(self, model: "nn.Module") -> None:
        """Copy the weights into `model`; the rest stays as it is."""
        import torch

        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.weights.items():
                parameters[name][: len(value)].copy_(value)

    def __str__(self) -> str:
        taken = sum(value.numel() for value in self.weights.values())
        groups: dict[str, int] = {}
        for name, count in self.new.items():
            pattern = re.sub(r"\.h\.\d+\.", ".h.*.", name)
            groups[pattern] = groups.get(pattern, 0) + count
        new = ", ".join(f"{name} ({count:,} values)" for name, count in groups.items())
        return f"--init_from {self.source}: {taken:,} values taken over; new: {new or 'none'}"


def read(source: str, variant: Variant, config: "GPT2Config") -> WarmStart:
    """Return what a model of `variant` with `config` takes over from `source`.

    Raises:
        WarmStartError: the checkpoint is incomplete, or does not fit but for the variant's own parameters.
    """
    import torch
    from transformers import GPT2LMHeadModel

    weights = _weights(source)
    shapes = {name: p.shape for name, p in variant.on_meta(config).named_parameters()}
    with torch.device("meta"):
        stock = {name for name, _ in GPT2LMHeadModel(config).named_parameters()}
    if left_over := sorted(weights.keys() - shapes.keys()):
        raise WarmStartError(
            f"--init_from {source}: holds {_some(left_over)}, for which {variant.name} with n_layer={config.n_layer} "
            "has no place; give a checkpoint of GPT-2 or of the same variant, and leave its shape out of --model_args"
        )
    new = {name: shape.numel() for name, shape in shapes.items() if name not in weights}
    if missing := sorted(new.keys() & stock):
        raise WarmStartError(
            f"--init_from {source}: holds no {_some(missing)}; leave the checkpoint's shape out of --model_args"
        )
    for name, value in weights.items():
        rows = shapes[name][0] - value.shape[0]
        grown = name == "transformer.wte.weight" and 0 < rows <= variant.extra_vocabulary
        if value.shape[1:] != shapes[name][1:] or (rows and not grown):
            raise WarmStartError(
                f"--init_from {source}: {name} has the shape {tuple(value.shape)}, the model's is "
                f"{tuple(shapes[name])}; leave the checkpoint's shape out of --model_args"
            )
        if grown:
            new[f"{name}[{value.shape[0]}:]"] = rows * value.shape[1]
    return WarmStart(source, weights, new)


def _weights(source: str) -> "dict[str, torch.Tensor]":
    """Parameter name -> float32 values of the whole checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        with network.offline(_stays_offline(source)):
            loaded: Any = AutoModelForCausalLM.from_pretrained(  # a pair; transformers says: a model
                Path(source).expanduser() if Path(source).exists() else source,
                dtype=torch.float32,
                output_loading_info=True,
            )
            model, info = loaded
    except Exception as err:  # Hub, safetensors, pickle: their errors share no base class
        raise WarmStartError(
            f"--init_from {source}: its weights cannot be read ({' '.join(str(err).split())[:200]}); {LEGAL}"
        ) from err
    for what, names in (
        ("lacks", info["missing_keys"]),
        ("also holds", info["unexpected_keys"]),
        ("has in another shape", info["mismatched_keys"]),
    ):
        if names := sorted(str(name) for name in names):
            raise WarmStartError(
                f"--init_from {source}: against what its config.json says it {what} {_some(names)}; give a whole one"
            )
    return {name: p.detach() for name, p in model.named_parameters()}


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
