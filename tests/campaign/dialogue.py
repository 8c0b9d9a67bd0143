"""What a client of a stub daemon says and must hear: prompts as exact ids, answers from the oracle, and an ear that
compares as it listens.

The ids are made here from the template's shape, not with the daemon's own `Text`: two ways to the same prompt.
"""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tests.campaign import chain
from tests.fakes import END, START

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiers.block import TokenIds

Item = dict[str, Any]
TERMINAL = ("response.completed", "response.incomplete", "response.failed")
ANSWER_TOKENS = 12
_TIMEOUT_S = 30.0


class Wrong(Exception):
    """The daemon said what it must never say."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn as it has to be. `items` is the whole conversation with this answer, as a client would replay it."""

    instructions: str
    prompt: TokenIds
    said: TokenIds
    items: tuple[Item, ...]

    @property
    def text(self) -> str:
        return chain.text_of(self.said)

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.said)


def opening(instructions: str, words: str) -> Turn:
    """The first turn of a session."""
    prompt = (*_message("system", instructions), *_message("user", words), *_CUE)
    return _turn(instructions, prompt, (_user(words),))


def following(turn: Turn, words: str) -> Turn:
    end = () if turn.said[-1] == END else (END,)
    prompt = (*turn.prompt, *turn.said, *end, *b"\n", *_message("user", words), *_CUE)
    return _turn(turn.instructions, prompt, (*turn.items, _user(words)))


def _turn(instructions: str, prompt: TokenIds, items: tuple[Item, ...]) -> Turn:
    said = chain.answer(prompt, ANSWER_TOKENS)
    answer = {"type": "message", "role": "assistant", "content": chain.text_of(said)}
    return Turn(instructions, prompt, said, (*items, answer))


def _message(role: str, content: str) -> TokenIds:
    return (START, *f"{role}\n{content}".encode(), END, *b"\n")


_CUE = (START, *b"assistant\n")


def _user(words: str) -> Item:
    return {"type": "message", "role": "user", "content": words}


def body(turn: Turn, *, previous: str | None, store: bool = True) -> Item:
    """The request for `turn`: its last words after `previous`, or everything again."""
    said = turn.items[:-1]
    request: Item = {
        "instructions": turn.instructions,
        "input": list(said if previous is None else said[-1:]),
        "temperature": 0,
        "max_output_tokens": ANSWER_TOKENS,
        "store": store,
    }
    if previous is not None:
        request["previous_response_id"] = previous
    return request


@dataclass(slots=True)
class Ear:
    """Listens to one turn. `feed` raises Wrong at the first event that cannot belong to `turn`."""

    turn: Turn
    response_id: str | None = None
    heard: str = ""
    done: bool = False
    by_tier: dict[str, int] = field(default_factory=dict)  # {tier: cached prompt tokens}

    def feed(self, event: Item) -> None:
        kind = event["type"]
        if kind == "error":
            raise Wrong(f"an error instead of a turn: {event['error']}")
        if kind == "response.created":
            self.response_id = event["response"]["id"]
        elif kind == "response.output_text.delta":
            self.heard += event["delta"]
            if not self.turn.text.startswith(self.heard):
                raise Wrong(f"{self.response_id} says {self.heard!r} and not {self.turn.text!r}")
        elif kind in TERMINAL:
            check_whole(event["response"], self.turn)
            usage = event["response"]["usage"]
            self.by_tier = usage["homeport:cached_by_tier"]
            if usage["input_tokens"] != len(self.turn.prompt):
                raise Wrong(
                    f"{self.response_id} was fed {usage['input_tokens']} ids and not {len(self.turn.prompt)}"
                )
            self.done = True


def check_whole(response: Item, turn: Turn) -> None:
    """Raises Wrong unless the response object is `turn`'s, finished."""
    status = "completed" if turn.said[-1] == END else "incomplete"
    text = "".join(
        part["text"]
        for item in response["output"]
        for part in item["content"]
        if item["type"] == "message"
    )
    if (response["status"], text) != (status, turn.text):
        raise Wrong(
            f"{response['id']} is {response['status']} {text!r} and not {status} {turn.text!r}"
        )


def http_turn(url: str, request: Item, hear: Callable[[Item], None]) -> None:
    """One streamed POST. Blocks. Raises OSError or HTTPException when the connection dies, Wrong for a refusal."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT_S)
    try:
        payload = json.dumps({**request, "stream": True})
        connection.request("POST", "/v1/responses", payload, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise Wrong(f"status {answer.status}: {answer.read().decode(errors='replace')[:300]}")
        for line in answer:
            if line.startswith(b"data: {") and line.endswith(b"\n"):
                event = json.loads(line.removeprefix(b"data: "))
                hear(event)
                if event["type"] in TERMINAL:
                    return
    finally:
        connection.close()
    raise ConnectionError("the stream ended without a terminal event")
