"""Ask a variant for its promises, and say how it went."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from transformers.utils import logging

from .promises import PROMISES, Promise
from .subject import NotApplicable, Subject

KEPT, BROKEN, NOT_APPLICABLE = "kept", "BROKEN", "not applicable"


@dataclass(frozen=True)
class Answer:
    """How a promise was answered.

    Attributes:
        promise: its name.
        title: what is promised.
        state: kept, BROKEN, or not applicable.
        finding: what was found, in words, of a broken one; why, of one that is not applicable; else None.
        seconds: that asking took.
    """

    promise: str
    title: str
    state: str
    finding: str | None
    seconds: float


def ask(subject: Subject, promises: Iterable[Promise] | None = None) -> Iterator[Answer]:
    """Ask for each of the promises (None: all), one after the other; an error on the way is a finding, too."""
    for promise in PROMISES.values() if promises is None else promises:
        start = time.perf_counter()
        state, finding = _answer(promise.ask, subject)
        yield Answer(promise.name, promise.title, state, finding, time.perf_counter() - start)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep progress bars and notes of the libraries away, and stdout to the answers."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _answer(function: Callable[[Subject], str | None], subject: Subject) -> tuple[str, str | None]:
    try:
        with _quietly():
            finding = function(subject)
    except NotApplicable as err:
        return NOT_APPLICABLE, str(err)
    except Exception as err:  # a user's model may raise anything
        return BROKEN, f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"
    return (KEPT, None) if finding is None else (BROKEN, finding)


def keeps_all(answers: Iterable[Answer]) -> bool:
    """Return whether no promise is broken."""
    return all(answer.state != BROKEN for answer in answers)


def listed(answer: Answer) -> str:
    """Return the lines of an answer: what is promised, and what was found."""
    line = f"{answer.state:<15} {answer.title}"
    return f"{line}\n{'':<15} {answer.finding}" if answer.finding else line
