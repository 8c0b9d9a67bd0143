"""Where in a prompt's tokens the places are that a request marked: after a tool, a block of its system prompt, a message.

The conversation is cut there, rendered by itself, and what its tokens have in common with the prompt's is counted:
exactly what a prompt that changes behind the place can reuse. Pure, but for the rendering that is given.

Laws
    A position is never more than the prompt shares with the conversation that ends at the place.
    A template that does not take a conversation cut there puts the place at the beginning: nothing is promised for it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from broker.divergence import diverged_at
from broker.session import Part
from broker.wire.items import Message
from engine.text import UnrenderableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker.recall import Recalled
    from broker.wire.requests import Cut, TurnRequest
    from tiers.block import TokenIds

    Parts = tuple[Part, ...]


def token_positions(
    request: TurnRequest,
    said: Recalled,
    prompt: TokenIds,
    prefix: Callable[[Cut, Parts], TokenIds],
) -> tuple[int, ...]:
    """The position of each of the request's cuts. `prefix` gives the tokens of a conversation that ends at a cut."""
    return tuple(
        _shared(prompt, partial(prefix, cut, parts_before(cut, request, said)))
        for cut in request.cuts
    )


def parts_before(cut: Cut, request: TurnRequest, said: Recalled) -> Parts:
    """The parts of the request's own items up to the cut. One that the cut goes through is the client's words."""
    parts: list[Part] = []
    ends = (*said.starts[1:], len(request.items))
    for part, start, end in zip(said.parts, said.starts, ends, strict=True):
        if end <= cut.items:
            parts.append(part)
        elif start < cut.items:
            parts.append(Part(request.items[start : cut.items]))
    if cut.text:
        message = request.items[cut.items]
        assert isinstance(message, Message), "only a message's text is cut"
        parts.append(Part((replace(message, text=message.text[: cut.text]),)))
    return tuple(parts)


def _shared(prompt: TokenIds, render: Callable[[], TokenIds]) -> int:
    try:
        before = render()
    except UnrenderableError:
        return 0
    at = diverged_at(before, prompt)
    return min(len(before), len(prompt)) if at is None else at
