"""The baseline: GPT-2, unchanged. Its checkpoints are those of stock `GPT2LMHeadModel`."""

from transformers import GPT2Config

from .modeling_base import VariantLMHeadModel


class GPT2BaselineLMHeadModel(VariantLMHeadModel):
    """`GPT2LMHeadModel`, bit for bit, with the loss head that every variant shares."""

    config_class = GPT2Config
