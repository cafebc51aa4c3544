"""A tokenizer of so many entries as the small models have, for what is handed on with one."""

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .subject import VOCABULARY


def small_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of words w0, w1, ..., as many as `VOCABULARY`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")
