"""What a variant declares of the streams of predictions that it makes beside the next-token one."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Stream:
    """A stream of predictions beside the next-token one, as a model's class declares it in `streams`.

    Its figures are logged as `<name>_loss` and `eval_<name>_loss`, and shown under its title, with its caveat.

    Attributes:
        name: what the model's `streams_of` calls it: small letters, digits and _.
        title: heads its figures, in a few words.
        caveat: what a reader must know before comparing them, in a sentence or two.
        sees_ahead: how many tokens after the one that it predicts a prediction may see; 0: its past alone.
    """

    name: str
    title: str
    caveat: str
    sees_ahead: int = 0


def check_declared(owner: str, streams: object) -> None:
    """Raise ValueError where what the class named `owner` declares is no tuple of streams, or one cannot be shown."""
    if not isinstance(streams, tuple) or not all(isinstance(stream, Stream) for stream in streams):
        raise ValueError(f"{owner}.streams={streams!r}: a tuple of Stream is needed, such as (Stream(...),)")
    names = [stream.name for stream in streams]
    for stream in streams:
        where = f"{owner}.streams: name={stream.name!r}"
        if not re.fullmatch(r"[a-z][a-z0-9_]*", str(stream.name)):
            raise ValueError(f"{where}: small letters, digits and _ are allowed")
        if stream.name == "next_token" or re.fullmatch(r"eval(_.*)?", stream.name):
            raise ValueError(f"{where}: other figures have that name; next_token, eval and eval_... are not allowed")
        if names.count(stream.name) > 1:
            raise ValueError(f"{where}: two streams have it; each needs its own")
        for part in ("title", "caveat"):
            if not str(getattr(stream, part) or "").strip():
                raise ValueError(f"{where}: has no {part}; say it in words")
        if type(stream.sees_ahead) is not int or stream.sees_ahead < 0:
            raise ValueError(f"{where}: sees_ahead={stream.sees_ahead!r}: a whole number from 0 is needed")
