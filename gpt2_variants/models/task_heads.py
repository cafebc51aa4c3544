"""Other tasks than language modelling: transformers' own GPT-2 heads over a variant's transformer."""

from transformers import (
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2PreTrainedModel,
)

from .modeling_base import ScaledInit, VariantModel

# auto class of transformers -> GPT-2's own class for it
HEADS = {
    "AutoModelForSequenceClassification": GPT2ForSequenceClassification,
    "AutoModelForTokenClassification": GPT2ForTokenClassification,
    "AutoModelForQuestionAnswering": GPT2ForQuestionAnswering,
}


def task_heads(transformer_class: type[VariantModel]) -> tuple[type[GPT2PreTrainedModel], ...]:
    """Return classes for sequence classification, token classification and question answering, in this order.

    They are transformers' `GPT2For...` with a `transformer_class` inside; weights beside it, options and results are
    those of GPT-2. A module must give them the names that `class_name` makes, by which they are found again.
    """
    return tuple(_over(transformer_class, stock) for stock in HEADS.values())


def class_name(transformer_class: type[VariantModel], stock: type[GPT2PreTrainedModel]) -> str:
    """Return the name of `stock` over `transformer_class`: DDGPT2Model gives DDGPT2ForTokenClassification."""
    return transformer_class.__name__.removesuffix("Model") + stock.__name__.removeprefix("GPT2")


def _over(transformer_class: type[VariantModel], stock: type[GPT2PreTrainedModel]) -> type[GPT2PreTrainedModel]:
    def __init__(self, config) -> None:  # noqa: ANN001
        stock.__init__(self, config)
        self.transformer = transformer_class(config)
        self.post_init()

    return type(
        class_name(transformer_class, stock),
        (ScaledInit, stock),
        {
            "__init__": __init__,
            "__module__": transformer_class.__module__,
            "__doc__": f"`{stock.__name__}` over `{transformer_class.__name__}`.",
            "config_class": transformer_class.config_class,
        },
    )
