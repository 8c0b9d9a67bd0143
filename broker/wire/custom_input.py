"""The input of a custom tool out of the arguments that a model writes for it: `{"input": "…"}`, as it streams.

Laws
    However the arguments are cut, the joined input is the same, and it is text that UTF-8 can carry.
    Arguments that are not such an object are the input themselves, as sampled: nothing is lost.
    An escape is held until it is whole; a half of a surrogate pair until its other half is there, or is not.
"""

from __future__ import annotations

import re

from broker.errors import BadRequest
from broker.wire.json_in import parse_json

_HEAD = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_MAY_BE_HEAD = re.compile(r'\s*(?:\{\s*(?:"(?:i(?:n(?:p(?:u(?:t(?:"\s*(?::\s*)?)?)?)?)?)?)?)?)?')
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_HEX = re.compile(r"[0-9a-fA-F]{4}")


class InputReader:
    """Feed it arguments, then finish it once."""

    def __init__(self) -> None:
        self._held = ""
        self._inside = False
        self._over = False  # behind the string
        self._odd = False  # no head, so everything is held to the end

    def feed(self, arguments: str) -> str:
        """What is certainly input."""
        if self._over:
            return ""
        self._held += arguments
        if not self._inside and not self._odd:
            head = _HEAD.match(self._held)
            if head is not None:
                self._inside, self._held = True, self._held[head.end() :]
            else:
                self._odd = not _MAY_BE_HEAD.fullmatch(self._held)
        return self._string() if self._inside else ""

    def finish(self) -> str:
        held, self._held = self._held, ""
        if self._inside:  # cut in the string: an unfinished escape is nothing yet
            return "\ufffd" if _is_high(held[:6]) else ""
        return _input_of(held)

    def _string(self) -> str:
        """All that is whole of the string."""
        out: list[str] = []
        at = 0
        while at < len(self._held):
            char = self._held[at]
            if char == '"':
                self._over, self._inside = True, False
                at = len(self._held)
            elif char != "\\":
                out.append(char)
                at += 1
            else:
                read = _escape(self._held, at)
                if read is None:
                    break
                text, at = read
                out.append(text)
        self._held = self._held[at:]
        return "".join(out)


def _escape(text: str, at: int) -> tuple[str, int] | None:
    """The escape at `at` and where it ends; None while it is not whole."""
    kind = text[at + 1 : at + 2]
    if kind != "u":
        return (_ESCAPES.get(kind, kind), at + 2) if kind else None
    digits = text[at + 2 : at + 6]
    if len(digits) < 4 and (not digits or _HEX.match(digits.ljust(4, "0"))):
        return None
    if not _HEX.fullmatch(digits):
        return "\ufffd", at + 2
    if not _is_high(text[at : at + 6]):
        char = chr(int(digits, 16))
        return ("\ufffd" if "\udc00" <= char <= "\udfff" else char), at + 6
    low = text[at + 6 : at + 12]
    if len(low) < 6 and _may_be_low(low):
        return None
    if re.fullmatch(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}", low):
        pair = chr(int(digits, 16)) + chr(int(low.removeprefix("\\u"), 16))
        return pair.encode("utf-16", "surrogatepass").decode("utf-16"), at + 12
    return "\ufffd", at + 6


def _is_high(escape: str) -> bool:
    return re.fullmatch(r"\\u[dD][89abAB][0-9a-fA-F]{2}", escape) is not None


def _may_be_low(text: str) -> bool:
    return re.fullmatch(r"(?:\\(?:u(?:[dD](?:[c-fC-F][0-9a-fA-F]?)?)?)?)?", text) is not None


def _input_of(arguments: str) -> str:
    try:
        value = parse_json(arguments)
    except BadRequest:
        return arguments
    if isinstance(value, dict) and isinstance(value.get("input"), str):
        text: str = value["input"]
        return text
    return arguments
