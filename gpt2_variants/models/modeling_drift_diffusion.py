"""Drift-diffusion: GPT-2 whose heads' outputs are pushed away from a baseline, and in training blurred by noise.

What differs from GPT-2: a is the heads' outputs before `c_proj`,
  drift:     a <- a + sigmoid(d) (a - b), or a + sigmoid(d) a without the baseline b;
  diffusion: a <- a + g eps, eps ~ N(0, 1) fresh for each element, after the drift and in training only.
d, b and g are learned per head and channel.
"""

import torch
from torch import nn
from transformers import GPT2Config
from transformers import initialization as init

from .modeling_base import VariantAttention, VariantLMHeadModel, VariantModel
from .task_heads import task_heads


class DDGPT2Config(GPT2Config):
    """`GPT2Config` with the parts that are applied.

    Args:
        apply_drift, apply_diffusion: which of the two; neither is plain GPT-2.
        baseline_each_head: the drift is away from a learned baseline, not from zero.

    Raises:
        ValueError: one of them is not a bool.
    """

    model_type = "dd-gpt2"

    apply_drift: bool = True
    apply_diffusion: bool = True
    baseline_each_head: bool = True

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        for name in ("apply_drift", "apply_diffusion", "baseline_each_head"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={value!r}: true or false is allowed")


class DDAttention(VariantAttention):
    """GPT-2's attention with drift and diffusion of the heads' outputs. Own parameters: (H, D) each."""

    def __init__(self, config: DDGPT2Config, layer_idx: int | None = None):
        super().__init__(config, layer_idx=layer_idx)
        shape = (self.num_heads, self.head_dim)
        self.drift_param = nn.Parameter(torch.empty(shape)) if config.apply_drift else None
        with_baseline = config.apply_drift and config.baseline_each_head
        self.baseline = nn.Parameter(torch.empty(shape)) if with_baseline else None
        self.diffusion_param = nn.Parameter(torch.empty(shape)) if config.apply_diffusion else None

    def reset_own_parameters(self) -> None:
        """d, g ~ N(0, 1); b ~ 0.001 N(0, 1)."""
        for parameter, std in ((self.drift_param, 1.0), (self.baseline, 1e-3), (self.diffusion_param, 1.0)):
            if parameter is not None:
                init.normal_(parameter, mean=0.0, std=std)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Do what `VariantAttention.attend` does, then drift its output and, in training, diffuse it: (B, Sq, H, D)."""
        heads, weights = super().attend(query, key, value, attention_mask, **kwargs)
        if self.drift_param is not None:
            # linear in the heads: they alone are kept for the backward pass, and the attention keeps them anyway
            gate = self.drift_param.sigmoid()
            shift = torch.zeros_like(gate) if self.baseline is None else -gate * self.baseline
            heads = torch.addcmul(shift, heads, 1 + gate)
        if self.diffusion_param is not None and self.training:
            # not randn_like: it follows the strides, and the same seed would give each backend other noise
            noise = torch.randn(heads.shape, dtype=heads.dtype, device=heads.device)
            heads = heads + self.diffusion_param * noise
        return heads, weights


class DDGPT2Model(VariantModel):
    """`GPT2Model` with `DDAttention`."""

    config_class = DDGPT2Config
    attention_class = DDAttention


class DDGPT2LMHeadModel(VariantLMHeadModel):
    """Drift-diffusion GPT-2 with its language modelling head."""

    config_class = DDGPT2Config
    transformer_class = DDGPT2Model


DDGPT2ForSequenceClassification, DDGPT2ForTokenClassification, DDGPT2ForQuestionAnswering = task_heads(DDGPT2Model)
