"""Events to bytes: one JSON text per event, and its Server-Sent Events frame.

An event is written in one send: some clients break when a frame comes in parts. JSON escapes line breaks
inside strings, so one `data:` line always holds the whole event.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

DONE = b"data: [DONE]\n\n"  # ends an SSE body; never sent on a WebSocket


def json_text(value: Mapping[str, Any]) -> str:
    """Compact, not ASCII-escaped. Raises ValueError for NaN, which no event holds."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def sse_frame(event: Mapping[str, Any]) -> bytes:
    """`event:` equals the event's type: some clients drop events without that line."""
    return f"event: {event['type']}\ndata: {json_text(event)}\n\n".encode()


def data_frame(value: Mapping[str, Any]) -> bytes:
    """A frame without `event:`, for an API whose values have no types: its clients know one kind only."""
    return f"data: {json_text(value)}\n\n".encode()
