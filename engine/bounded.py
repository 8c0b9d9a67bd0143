"""A chat template within its time. Templates come with models, and jinja's sandbox bounds what they may touch, not how long.

Rendering is one synchronous call on the event loop's thread, so a template that loops for ever would hang the daemon for
everybody. Nothing can stop such a call from outside; the interpreter's trace function is inside it.

Laws
    A template that runs for longer than it may raises `TemplateTooSlow` at its next line.
    Traced is only what runs within `within`; whoever traced before goes on afterwards. One long call in C is not seen.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_TEMPLATE = "<template>"  # as jinja calls the code that it compiles from text


class TemplateTooSlow(TemplateError):
    """The template takes longer than templates may."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    due = time.monotonic() + seconds

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > due:
            raise TemplateTooSlow(f"it takes longer than {seconds:g} s")
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line(frame, event, argument) if frame.f_code.co_filename == _TEMPLATE else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)
