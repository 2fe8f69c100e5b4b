"""What must not be read in logs, errors and figures: passwords in URLs, and tokens."""

from __future__ import annotations

import re

HIDDEN = "***"
# As far as the last @: a password may have one too, though a URL should not.
_PASSWORD = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s/@:'\"]*):[^\s'\"]*@")
_PASSWORD_ARGUMENT = re.compile(r"([?&](?:\w*password|username)=)[^\s&'\"]+", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer\s+)[A-Za-z0-9._~+/=-]+", re.IGNORECASE)


def redacted(text: str) -> str:
    """The text with every password of a URL and every bearer token hidden."""
    text = _PASSWORD.sub(rf"\1:{HIDDEN}@", text)
    text = _PASSWORD_ARGUMENT.sub(rf"\1{HIDDEN}", text)
    return _BEARER.sub(rf"\1{HIDDEN}", text)
