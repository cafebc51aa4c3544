"""VARIANTS: every model that can be trained, by the name the command line knows it by."""

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GPT2Config, GPT2PreTrainedModel

    from .models.modeling_base import VariantLMHeadModel
    from .variant_code import VariantCode

GPT2_VOCABULARY = 50_257

# The GPT-2 family (Radford et al., 2019, table 2; GPT2Config on the Hub), and sizes below it for CPUs and for a ladder
# of sizes: with heads of 32 and a vocabulary of 2,048, 0.3, 2.2, 8 and 26 million parameters.
SIZES: dict[str, dict[str, int]] = {
    "pico": {"n_layer": 4, "n_embd": 64, "n_head": 2},
    "nano": {"n_layer": 4, "n_embd": 192, "n_head": 6},
    "micro": {"n_layer": 6, "n_embd": 320, "n_head": 10},
    "mini": {"n_layer": 8, "n_embd": 512, "n_head": 16},
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "gpt2-medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "gpt2-large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
}


@dataclass(frozen=True)
class Variant:
    """What the rest of the package needs to know of a variant.

    Attributes:
        name: as on the command line.
        family: the idea it belongs to; groups runs in W&B and in reports.
        summary: one line, for `list` and the README.
        model: its ...LMHeadModel class, or, of `module`, that class's name.
        module: the file under `models/`, of the package's own variants.
        overrides: the config fields that make this variant of its family.
        block_size: tokens per training sequence in the published recipe.
        extra_vocabulary: entries the model needs beside the tokenizer's.
        medium_parameters: what `num_parameters()` counts, where it is stated; `list` then needs no model.
        code: the user's file that brings it; None: the package itself does.
    """

    name: str
    family: str
    summary: str
    model: "str | type[VariantLMHeadModel]"
    module: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    block_size: int = 1024
    extra_vocabulary: int = 0
    medium_parameters: int | None = None
    code: "VariantCode | None" = None

    @property
    def model_class(self) -> "type[VariantLMHeadModel]":
        """The ...LMHeadModel class, known to transformers' Auto classes. Imports torch and transformers."""
        if isinstance(self.model, str):
            return _class_named(self.module, self.model)
        return _registered(self.model)  # type: ignore[arg-type]  # mypy takes the class for its instances

    @property
    def config_class(self) -> "type[GPT2Config]":
        """The config class of `model_class`."""
        return self.model_class.config_class

    def config_fields(self) -> dict[str, Any]:
        """Return name -> annotation of every config field that a run may choose: GPT-2's and the variant's own.

        Not those of other heads and uses (`summary_*`, cross-attention, untied embeddings), nor what the run itself
        sets (the cache, the tokenizer's special ids).
        """
        from transformers import PreTrainedConfig

        not_chosen = {f.name for f in dataclasses.fields(PreTrainedConfig)}
        not_chosen |= {"add_cross_attention", "tie_word_embeddings", "use_cache"}
        not_chosen |= {"bos_token_id", "eos_token_id", "pad_token_id"}
        own = (f for f in dataclasses.fields(self.config_class) if f.name not in not_chosen)
        return {f.name: f.type for f in own if not f.name.startswith("summary_")}

    def make_config(self, size: str | None, tokenizer_size: int, n_positions: int, **fields: Any) -> "GPT2Config":
        """Return the config at `size` for a tokenizer of `tokenizer_size` entries; `fields` win over everything.

        Without a `size` the `fields` give the shape.

        Raises:
            ValueError: from the config class, when a field does not fit.
        """
        values = {
            **(SIZES[size] if size else {}),
            "vocab_size": tokenizer_size + self.extra_vocabulary,
            "n_positions": n_positions,
            **self.overrides,
            **fields,
        }
        return self.config_class(**values)

    def num_parameters(self, size: str = "gpt2-medium", tokenizer_size: int = GPT2_VOCABULARY) -> int:
        """Return the number of parameters at `size`, tied ones counted once, and of its block's positions."""
        return self.on_meta(self.make_config(size, tokenizer_size, self.block_size)).num_parameters()

    def on_meta(self, config: "GPT2Config") -> "VariantLMHeadModel":
        """Return the model of `config` without memory for its weights: names, shapes and counts."""
        import torch

        with torch.device("meta"):
            return self.model_class(config)

    def auto_classes(self) -> dict[str, "type[GPT2PreTrainedModel]"]:
        """Auto class of transformers -> what it is to load for this variant: the task heads that its module has, too.

        Empty where transformers itself knows the `model_type`.
        """
        return _auto_classes(self.model_class)


@functools.cache
def _class_named(module: str | None, name: str) -> "type[VariantLMHeadModel]":
    """Return the class `name` of `models/<module>.py`."""
    return _registered(getattr(importlib.import_module(f"{__package__}.models.{module}"), name))


@functools.cache
def _registered(model_class: "type[VariantLMHeadModel]") -> "type[VariantLMHeadModel]":
    """Return `model_class`, registered with the Auto classes when it is first asked for."""
    import transformers

    config_class = model_class.config_class
    for auto, loaded in _auto_classes(model_class).items():
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        getattr(transformers, auto).register(config_class, loaded, exist_ok=True)
    return model_class


def _auto_classes(model_class: "type[VariantLMHeadModel]") -> dict[str, "type[GPT2PreTrainedModel]"]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from .models.task_heads import HEADS, class_name

    if model_class.config_class.model_type in CONFIG_MAPPING_NAMES:
        return {}
    transformer = model_class.transformer_class
    module = importlib.import_module(model_class.__module__)
    heads = {auto: getattr(module, class_name(transformer, stock), None) for auto, stock in HEADS.items()}
    return {
        "AutoModel": transformer,
        "AutoModelForCausalLM": model_class,
        **{auto: head for auto, head in heads.items() if head is not None},
    }


def register() -> None:
    """Make transformers' Auto classes know every variant's `model_type`, unless transformers itself does.

    Imports torch and transformers. A call after the first one costs nothing.
    """
    for variant in VARIANTS.values():
        _ = variant.model_class


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            name="gpt2",
            family="gpt2",
            summary="the baseline: GPT-2 as it is",
            module="modeling_gpt2_baseline",
            model="GPT2BaselineLMHeadModel",
            medium_parameters=354_823_168,
        ),
        Variant(
            name="duo_predict",
            family="duo_predict",
            summary="every token predicted twice: from its past, and from its past and its right neighbour",
            module="modeling_duo_predict",
            model="DuoPredictGPT2LMHeadModel",
            overrides=MappingProxyType({"leak_free": True}),
            block_size=512,
            extra_vocabulary=1,
            medium_parameters=354_299_904,
        ),
        *(
            Variant(
                name=name,
                family="drift_diffusion",
                summary=summary,
                module="modeling_drift_diffusion",
                model="DDGPT2LMHeadModel",
                overrides=MappingProxyType({"apply_drift": drift, "apply_diffusion": diffusion}),
                medium_parameters=parameters,
            )
            for name, parameters, drift, diffusion, summary in (
                (
                    "drift",
                    354_872_320,
                    True,
                    False,
                    "heads' outputs pushed away from a learned baseline: a + sigmoid(d) (a - b)",
                ),
                ("diffusion", 354_847_744, False, True, "learned noise on the heads' outputs in training: a + g eps"),
                ("drift_diffusion", 354_896_896, True, True, "drift, then diffusion"),
            )
        ),
        *(
            Variant(
                name=name,
                family="parallel",
                summary=f"blocks in pairs on the same input, half the depth: {merged}",
                module="modeling_parallel",
                model="ParallelGPT2LMHeadModel",
                overrides=MappingProxyType({"bottleneck_method": method}),
                medium_parameters=parameters,
            )
            for name, parameters, method, merged in (
                ("parallel", 354_823_168, "mean", "(L + R) / 2"),
                ("parallel_add", 354_823_168, "add", "L + R"),
                ("parallel_concat", 356_921_344, "concat", "W [L; R] + c, shared by all pairs"),
            )
        ),
        *(
            Variant(
                name=name,
                family="rotating_head",
                summary=f"queries and keys rotated, each head by its own frequencies: {frequencies}",
                module="modeling_rotating_head",
                model="RotatingHeadGPT2LMHeadModel",
                overrides=MappingProxyType({"rotatinghead": method, "use_norm": use_norm}),
                medium_parameters=parameters,
            )
            for name, parameters, method, use_norm, frequencies in (
                ("rotating_head", 354_835_456, "lr", False, "learned"),
                ("rotating_head_norm", 354_836_992, "lr", True, "learned, through a LayerNorm"),
                ("rotating_head_gp", 354_823_168, "gp", False, "fixed, in geometric progression"),
                ("rotating_head_gp_norm", 354_824_704, "gp", True, "in geometric progression, through a LayerNorm"),
            )
        ),
    )
}
