"""The text of tokens, in which bytes that are no characters are shown as such."""

import codecs
from typing import Any

from tokenizers import decoders
from transformers import TextStreamer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.generation.streamers import BaseStreamer

ESCAPED = "backslashreplace"  # \xe2, where `decode` would put U+FFFD


class Spelling:
    """What a tokenizer's ids spell.

    A byte-level tokenizer may give the bytes of a character in several tokens, and a model need not give them all.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._is_byte_level = backend is not None and isinstance(backend.decoder, decoders.ByteLevel)
        self._byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        self._special = set(tokenizer.all_special_ids)
        self._added = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items()}

    def text(self, ids: list[int]) -> str:
        """Return the text of `ids`, without special tokens."""
        if self._is_byte_level:
            return b"".join(map(self._bytes, ids)).decode("utf-8", ESCAPED)
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def quoted(self, id: int) -> str:
        """Return a token in quotes, a special one too, or as Python writes bytes, b'\\xe2', where it is no text."""
        if id in self._added:
            return repr(self._added[id])
        if self._is_byte_level:
            spelled = self._bytes(id)
            try:
                return repr(spelled.decode("utf-8"))
            except UnicodeDecodeError:
                return repr(spelled)
        return repr(self.tokenizer.decode([id], clean_up_tokenization_spaces=False))

    def streamer(self) -> BaseStreamer:
        """Return what prints the tokens of `generate` to stdout as they come, and a new line at the end."""
        if self._is_byte_level:
            return ByteStreamer(self)
        return TextStreamer(self.tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _bytes(self, id: int) -> bytes:
        if id in self._special:
            return b""
        if id in self._added:
            return self._added[id].encode("utf-8")
        token = self.tokenizer.convert_ids_to_tokens(id)
        if token is None:  # the model may have more entries than the tokenizer
            return b""
        if not self._byte_of.keys() >= set(token):
            return token.encode("utf-8")  # as ByteLevel does with an entry that it has not made
        return bytes(self._byte_of[character] for character in token)


class ByteStreamer(BaseStreamer):
    """Prints tokens as they come; the bytes of a character wait for those that complete it."""

    def __init__(self, spelling: Spelling):
        self._spelling = spelling
        self._decoder = codecs.getincrementaldecoder("utf-8")(ESCAPED)

    def put(self, value: Any) -> None:
        """Print the characters that the ids `value` complete: the prompt's at first, then one token's."""
        for id in value.flatten().tolist():
            print(self._decoder.decode(self._spelling._bytes(id)), end="", flush=True)

    def end(self) -> None:
        """Print what waits in vain, and a new line."""
        print(self._decoder.decode(b"", final=True), flush=True)
