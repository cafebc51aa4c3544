"""What every variant promises, as functions that give a finding in words, or None where the promise is kept."""

from .promises import PROMISES, Promise
from .run import BROKEN, KEPT, Answer, ask, keeps_all, listed
from .subject import NotApplicable, Subject

__all__ = ["BROKEN", "KEPT", "PROMISES", "Answer", "NotApplicable", "Promise", "Subject", "ask", "keeps_all", "listed"]
