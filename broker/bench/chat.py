"""A Chat Completions client that stamps what it hears: the same for Homeport and for any other server.

Laws
    A request is timed from the moment it is handed to a connected socket. Its first token has come with the first
    delta that says something: a role, an empty text or a null is not a token, whoever sends it.
    A thought is a token too; clients show it.
    What a server refuses raises `Refused`, also in the middle of a stream. Nothing is retried.
    Token counts are the server's own; a server that does not count is believed a token a delta.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from broker.bench.client import Refused, posted, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_DONE = b"[DONE]"
_SPOKEN = ("content", "reasoning_content", "reasoning")
_LEAST_FOR_RATE = 2  # tokens: one has no gap


@dataclass(frozen=True, slots=True)
class Completion:
    """One answered request: when what arrived, by the client's clock."""

    text: str
    sent: float
    arrivals: tuple[float, ...]  # of deltas that said something
    ended: float
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        """To the end, if it said nothing."""
        return (self.arrivals[0] if self.arrivals else self.ended) - self.sent

    @property
    def total_s(self) -> float:
        return self.ended - self.sent

    @property
    def computed_tokens(self) -> int | None:
        """Of the prompt."""
        return (
            None if self.prompt_tokens is None else self.prompt_tokens - (self.cached_tokens or 0)
        )

    @property
    def gaps_s(self) -> list[float]:
        return [late - early for early, late in pairwise(self.arrivals)]

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first. None for an answer too short to say."""
        if self.output_tokens < _LEAST_FOR_RATE or len(self.arrivals) < _LEAST_FOR_RATE:
            return None
        return (self.output_tokens - 1) / (self.arrivals[-1] - self.arrivals[0])


class Recorder:
    """Makes a completion of its chunks. Made when the request is about to be sent."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._sent = clock()
        self._arrivals: list[float] = []
        self._text: list[str] = []
        self._usage: Mapping[str, Any] = {}

    def feed(self, chunk: Mapping[str, Any]) -> None:
        """Raises `Refused` for an error inside the stream."""
        now = self._clock()
        if chunk.get("error"):
            raise Refused(0, refusal(json.dumps(chunk)))
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            if any(delta.get(key) for key in _SPOKEN):
                self._arrivals.append(now)
                self._text.append(delta.get("content") or "")

    def end(self) -> Completion:
        details = self._usage.get("prompt_tokens_details") or {}
        return Completion(
            text="".join(self._text),
            sent=self._sent,
            arrivals=tuple(self._arrivals),
            ended=self._clock(),
            prompt_tokens=self._usage.get("prompt_tokens"),
            cached_tokens=details.get("cached_tokens"),
            output_tokens=self._usage.get("completion_tokens") or len(self._arrivals),
        )


def complete(url: str, body: Mapping[str, Any], key: str | None = None) -> Completion:
    """One streamed completion. Blocks; raises `Refused` or OSError."""
    with posted(url, "/v1/chat/completions", body, key, Recorder) as (recorder, events):
        for data in events:
            if data == _DONE:
                break
            recorder.feed(json.loads(data))
        return recorder.end()  # there are servers that just close
