"""The baseline: GPT-2, unchanged. Its checkpoints are those of stock `GPT2LMHeadModel`."""

from transformers import GPT2Config

from .modeling_base import VariantLMHeadModel


class GPT2BaselineLMHeadModel(VariantLMHeadModel):
    """`GPT2LMHeadModel` with the loss head that every variant shares.

    Bit for bit in evaluation; in training its activation, `TrainedNewGELU`, rounds otherwise.
    """

    config_class = GPT2Config
