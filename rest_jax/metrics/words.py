"""Words of a text in any script, for diagnostics and corruptions.

Floor 4. Languages that write no spaces have no words to see, so there a character counts as one.
"""

from __future__ import annotations

import re

# Han, kana, and the CJK and full-width punctuation that stands between them without spaces.
_CJK = (
    "\u2e80-\u2fdf\u3000-\u30ff\u31c0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
)
_PIECES = re.compile(f"[{_CJK}]|[^\\s{_CJK}]+")
_ANY_CJK = re.compile(f"[{_CJK}]")


def split_words(text: str) -> list[str]:
    """Splits a text into words, and every Chinese or Japanese character into a word of its own."""
    return _PIECES.findall(text.replace("\u3000", " "))


def join_words(words: list[str]) -> str:
    """Joins words with spaces, leaving none beside a Chinese or Japanese character."""
    parts: list[str] = []
    for word in words:
        touches_cjk = _ANY_CJK.match(word) or (parts and _ANY_CJK.match(parts[-1]))
        if parts and not touches_cjk:
            parts.append(" ")
        parts.append(word)
    return "".join(parts)
