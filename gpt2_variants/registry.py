"""VARIANTS: every model that can be trained, by the name the command line knows it by."""

import dataclasses
import importlib
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GPT2Config, GPT2PreTrainedModel

    from .models.modeling_base import VariantLMHeadModel

GPT2_VOCABULARY = 50_257

# The GPT-2 family (Radford et al., 2019, table 2; GPT2Config on the Hub), and a size for CPUs.
SIZES: dict[str, dict[str, int]] = {
    "nano": {"n_layer": 4, "n_embd": 192, "n_head": 6},
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
        module: the file under `models/`.
        model: its ...LMHeadModel class.
        overrides: the config fields that make this variant of its family.
        block_size: tokens per training sequence in the published recipe.
        extra_vocabulary: entries the model needs beside the tokenizer's.
    """

    name: str
    family: str
    summary: str
    module: str
    model: str
    overrides: MappingProxyType = field(default_factory=lambda: MappingProxyType({}))
    block_size: int = 1024
    extra_vocabulary: int = 0

    @property
    def model_class(self) -> "type[VariantLMHeadModel]":
        """The ...LMHeadModel class. Imports torch and transformers."""
        return getattr(importlib.import_module(f"{__package__}.models.{self.module}"), self.model)

    @property
    def config_class(self) -> "type[GPT2Config]":
        """The config class of `model_class`."""
        return self.model_class.config_class

    def config_fields(self) -> dict[str, Any]:
        """Name -> annotation of every config field that a run may choose: GPT-2's and the variant's own.

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
        """The config at `size` for a tokenizer of `tokenizer_size` entries; `fields` win over everything.

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
        """Parameters of the model at `size`, tied ones counted once, with as many positions as its block size."""
        import torch

        config = self.make_config(size, tokenizer_size, self.block_size)
        with torch.device("meta"):
            return self.model_class(config).num_parameters()

    def auto_classes(self) -> dict[str, "type[GPT2PreTrainedModel]"]:
        """Auto class of transformers -> what it is to load for this variant: the task heads that its module has, too.

        Empty where transformers itself knows the `model_type`.
        """
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        from .models.task_heads import HEADS, class_name

        if self.config_class.model_type in CONFIG_MAPPING_NAMES:
            return {}
        transformer = self.model_class.transformer_class
        module = importlib.import_module(self.model_class.__module__)
        heads = {auto: getattr(module, class_name(transformer, stock), None) for auto, stock in HEADS.items()}
        return {
            "AutoModel": transformer,
            "AutoModelForCausalLM": self.model_class,
            **{auto: head for auto, head in heads.items() if head is not None},
        }

    def register(self) -> None:
        """Make the Auto classes know the variant's `model_type`, unless transformers itself does."""
        import transformers

        for auto, model_class in self.auto_classes().items():
            transformers.AutoConfig.register(self.config_class.model_type, self.config_class, exist_ok=True)
            getattr(transformers, auto).register(self.config_class, model_class, exist_ok=True)


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            name="gpt2",
            family="gpt2",
            summary="the baseline: GPT-2 as it is",
            module="modeling_gpt2_baseline",
            model="GPT2BaselineLMHeadModel",
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
        ),
        *(
            Variant(
                name=name,
                family="drift_diffusion",
                summary=summary,
                module="modeling_drift_diffusion",
                model="DDGPT2LMHeadModel",
                overrides=MappingProxyType({"apply_drift": drift, "apply_diffusion": diffusion}),
            )
            for name, drift, diffusion, summary in (
                ("drift", True, False, "heads' outputs pushed away from a learned baseline: a + sigmoid(d) (a - b)"),
                ("diffusion", False, True, "learned noise on the heads' outputs in training: a + g eps"),
                ("drift_diffusion", True, True, "drift, then diffusion"),
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
            )
            for name, method, merged in (
                ("parallel", "mean", "(L + R) / 2"),
                ("parallel_add", "add", "L + R"),
                ("parallel_concat", "concat", "W [L; R] + c, shared by all pairs"),
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
            )
            for name, method, use_norm, frequencies in (
                ("rotating_head", "lr", False, "learned"),
                ("rotating_head_norm", "lr", True, "learned, through a LayerNorm"),
                ("rotating_head_gp", "gp", False, "fixed, in geometric progression"),
                ("rotating_head_gp_norm", "gp", True, "in geometric progression, through a LayerNorm"),
            )
        ),
    )
}
