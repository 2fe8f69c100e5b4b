"""Why a step was decoded plainly although a tree was wanted."""

from __future__ import annotations

from enum import Enum


class Fallback(Enum):
    """In few words, to be counted by; the words to be read are beside it."""

    OPENING = "opening"  # the draft has not begun yet, or begins again
    NOT_READY = "not_ready"  # it reads the prompt, or is busy with an earlier tree
    LATE = "late"
    LOST = "lost"
    REFUSED = "refused"  # the verify worker did not take its tree
    VERIFY_LOST = "verify_lost"
