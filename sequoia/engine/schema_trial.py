"""A script: reads a grammar from stdin, and ends well where that takes neither long nor much memory.

Some schemas take llguidance more time than there is, and no call can be told to end; a process can.
"""

import resource
import sys
from contextlib import suppress

SECONDS = 3  # of a processor, whatever else runs
_BYTES = 2**31


def main() -> None:
    """Read it with the smallest tokenizer there is; whether it can be read is asked again by whoever needs it."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), sys.stdin.read(), log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()


if __name__ == "__main__":
    main()
