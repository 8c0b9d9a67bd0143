"""A day of coding agents, as the cache sees it: who asks when, with which content, and what shows when it is over.

Pure: the same shape and seed give the same events in every process; events come one by one, in order of time.

Content is counted in units: one id stands for `unit_tokens` tokens that are always seen together, so that a day fits
in memory and hashing is cheap. A prompt is the chain of ids from its first token on. Sizes in tokens are carried over
from turn to turn, so no rounding is lost.

Laws
    An id stands for its content and for all that came before it: two prompts share what their chains begin with, and
    nothing behind that.
    A turn's prompt is longer than what its session has had computed of it: there is always something new.
    What no turn has shown yet is not in the event: whether the session comes back is known to nobody but Belady.
    A turn is an instant, its arrival; the time that it takes to answer only delays the next one.

Where the figures are from: the quantiles of gaps, context and deltas, and the 100 turns, are those of the project's
design ("Tier policy" in design.md, and issue 3). The design gives no more than those; what it leaves open was guessed,
once, before any policy was looked at, and says so below.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tiers.policy import SessionClass

if TYPE_CHECKING:
    from collections.abc import Iterator

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Turn:
    """A request arrives, and is answered. `waits_for` is what its end shows: a tool call, or text for a person."""

    at: float
    session: int
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    waits_for: SessionClass


@dataclass(frozen=True, slots=True)
class Close:
    """A session's connection goes away. Most are over then; some come back over another connection."""

    at: float
    session: int


Event = Turn | Close


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution by what is known of it: straight lines between its quantiles, the values on a log scale.

    Between two quantiles that makes every ratio equally likely, which adds no shape that nobody measured.
    """

    points: tuple[tuple[float, float], ...]  # (share, value), both ascending, from share 0 to 1

    def at(self, share: float) -> float:
        after = min(
            bisect_right(self.points, share, key=lambda point: point[0]), len(self.points) - 1
        )
        (low, small), (high, large) = self.points[after - 1 : after + 1]
        part = (share - low) / (high - low)
        return math.exp((1 - part) * math.log(small) + part * math.log(large))

    def draw(self, chance: random.Random) -> float:
        return self.at(chance.random())


@dataclass(frozen=True, slots=True)
class Shape:
    """Every figure of the generated day. "Given": by design.md or issue 3. "Guessed": by us, and used for nothing else."""

    unit_tokens: int = 256  # a fifth of the median delta: fine enough to see each turn

    # -- who comes
    day_s: float = 24 * HOUR_S  # the trace ends here, whoever is in the middle of something
    sessions: int = (
        300  # of people, arriving evenly: time zones smear a working day. Given: several hundred
    )
    subagents: int = 450  # guessed: 1.5 for each session
    oneshots: int = (
        900  # guessed: 3 for each session; titles, commit messages, scripts: asked once, by HTTP
    )
    # Guessed: system prompt and tools of the kinds of clients, in tokens, and how common each is. The sizes are
    # those of today's coding agents (8 to 20 thousand). Sub-agents of a kind have the head of their kind.
    heads: tuple[int, ...] = (20_000, 16_000, 12_000, 8_000)
    popularity: tuple[int, ...] = (4, 3, 2, 1)

    # -- how long a session goes on
    turns: Quantiles = Quantiles(
        ((0, 4), (0.5, 65), (0.9, 230), (1, 520))
    )  # given: about 100, the mean
    tools_per_message: float = (
        8.0  # guessed: turns from one message of a person to the next, on average
    )
    subagent_turns: Quantiles = Quantiles(((0, 1), (0.5, 8), (1, 30)))  # guessed

    # -- how much a turn adds, in tokens. Given: the median, 1.3K, and a heavy tail; the tail is guessed
    delta: Quantiles = Quantiles(
        ((0, 256), (0.5, 1_300), (0.9, 3_600), (0.99, 12_000), (1, 30_000))
    )
    output: Quantiles = Quantiles(
        ((0, 40), (0.5, 220), (0.9, 900), (0.99, 4_000), (1, 12_000))
    )  # guessed
    oneshot: Quantiles = Quantiles(((0, 300), (0.5, 3_000), (0.9, 16_000), (1, 60_000)))  # guessed
    cap: int = 128_000  # given. A prompt that would be longer is compacted first
    summary: Quantiles = Quantiles(((0, 2_000), (0.5, 4_000), (1, 9_000)))  # given: a few thousand

    # -- how long until the next turn, in seconds. Given but for the ends
    tool_gap: Quantiles = Quantiles(((0, 0.02), (0.5, 0.3), (0.9, 14), (0.99, 216), (1, 1_800)))
    human_gap: Quantiles = Quantiles(
        ((0, 3), (0.5, 86), (0.9, 21 * 60), (0.99, 14 * HOUR_S), (1, 72 * HOUR_S))
    )
    first_token_s: float = 1.0  # guessed: what an answer takes beside its tokens
    tokens_per_s: float = 60.0  # guessed: decoding

    # -- how a session ends
    closing: float = 0.5  # guessed: sessions whose connection closes when the person leaves; the others just stop
    # Guessed: pauses of an hour or more that the connection does not outlive, though its session comes back
    # (laptops sleep, and OpenAI's own limit for a connection is 60 minutes).
    dropped: float = 0.5
    connection_s: float = HOUR_S

    def with_sessions(self, sessions: int) -> Shape:
        """As many people, and the rest of the day in proportion."""
        return replace(
            self,
            sessions=sessions,
            subagents=round(self.subagents * sessions / self.sessions),
            oneshots=round(self.oneshots * sessions / self.sessions),
        )

    def answer_s(self, output: float) -> float:
        """How long an answer of so many tokens takes."""
        return self.first_token_s + output / self.tokens_per_s


def generate(shape: Shape, seed: int) -> Iterator[Event]:
    """The day's events in order of time."""
    return _Day(shape, seed).events()


class _Day:
    """What the sessions of one day share: the heads, and ids that nobody has used."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self._shape = shape
        self._seed = seed
        self._fresh = itertools.count()
        self._heads = [
            tuple(itertools.islice(self._fresh, tokens // shape.unit_tokens))
            for tokens in shape.heads
        ]

    def events(self) -> Iterator[Event]:
        arrivals = self._arrivals()
        live: list[
            tuple[float, int, Event, Iterator[Event]]
        ] = []  # heap of each session's next event
        for session, (start, kind) in enumerate([*arrivals, (math.inf, "")]):
            while live and live[0][0] <= start:
                _, number, event, rest = live[0]
                yield event
                following = next(rest, None)
                if following is None:
                    heapq.heappop(live)
                else:
                    heapq.heapreplace(live, (following.at, number, following, rest))
            if kind:
                rest = self._within_the_day(self._session(session, start, kind))
                first = next(rest, None)
                if first is not None:
                    heapq.heappush(live, (first.at, session, first, rest))

    def _arrivals(self) -> list[tuple[float, str]]:
        chance = random.Random(f"arrivals {self._seed}")
        shape = self._shape
        counts = {"person": shape.sessions, "subagent": shape.subagents, "oneshot": shape.oneshots}
        return sorted(
            (chance.uniform(0, shape.day_s), kind)
            for kind, count in counts.items()
            for _ in range(count)
        )

    def _within_the_day(self, events: Iterator[Event]) -> Iterator[Event]:
        return itertools.takewhile(lambda event: event.at < self._shape.day_s, events)

    def _session(self, session: int, start: float, kind: str) -> Iterator[Event]:
        chance = random.Random(f"session {self._seed} {session}")
        match kind:
            case "person":
                return self._person(chance, session, start)
            case "subagent":
                return self._subagent(chance, session, start)
            case _:
                return self._oneshot(chance, session, start)

    def _person(self, chance: random.Random, session: int, at: float) -> Iterator[Event]:
        """Somebody at work: a message, tool calls until the agent answers in text, a pause, the next message."""
        shape = self._shape
        chain = _Chain(shape, self._fresh, self._head(chance))
        turns = round(shape.turns.draw(chance))
        for number in range(turns):
            said = shape.output.draw(chance)
            prompt, output = chain.turn(shape.delta.draw(chance), said, chance)
            last = number == turns - 1
            answered = last or chance.random() < 1 / shape.tools_per_message
            waits_for = SessionClass.HUMAN_WAIT if answered else SessionClass.TOOL_WAIT
            yield Turn(at, session, prompt, output, waits_for)
            gap = (shape.human_gap if answered else shape.tool_gap).draw(chance)
            at += shape.answer_s(said)
            if last:
                if chance.random() < shape.closing:
                    yield Close(at + min(gap, shape.connection_s), session)
            elif gap >= shape.connection_s and chance.random() < shape.dropped:
                yield Close(at + shape.connection_s, session)
            at += gap

    def _subagent(self, chance: random.Random, session: int, at: float) -> Iterator[Event]:
        """An agent's agent: a few tool turns without a pause, then its connection closes."""
        shape = self._shape
        chain = _Chain(shape, self._fresh, self._head(chance))
        for left in reversed(range(round(shape.subagent_turns.draw(chance)))):
            said = shape.output.draw(chance)
            prompt, output = chain.turn(shape.delta.draw(chance), said, chance)
            waits_for = SessionClass.TOOL_WAIT if left else SessionClass.HUMAN_WAIT
            yield Turn(at, session, prompt, output, waits_for)
            at += shape.answer_s(said)
            if left:
                at += shape.tool_gap.draw(chance)
        yield Close(at, session)

    def _oneshot(self, chance: random.Random, session: int, at: float) -> Iterator[Event]:
        """One request with no head that anybody shares; HTTP shows no end of it."""
        chain = _Chain(self._shape, self._fresh, ())
        said = self._shape.output.draw(chance)
        prompt, output = chain.turn(self._shape.oneshot.draw(chance), said, chance)
        yield Turn(at, session, prompt, output, SessionClass.HUMAN_WAIT)

    def _head(self, chance: random.Random) -> tuple[int, ...]:
        return chance.choices(self._heads, self._shape.popularity)[0]


class _Chain:
    """What a session says in its next prompt. Parts of units wait for the next turn."""

    def __init__(self, shape: Shape, fresh: Iterator[int], head: tuple[int, ...]) -> None:
        self._shape = shape
        self._fresh = fresh
        self._head = head
        self._said = list(head)
        self._rest = 0.0  # tokens that make no unit yet; below zero: a unit was rounded up for them

    def turn(
        self, delta: float, output: float, chance: random.Random
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The next prompt and its answer, which the prompt after it begins with, unless it is compacted."""
        added = self._units(delta, least=1)
        if len(self._said) + len(added) > self._shape.cap // self._shape.unit_tokens:
            summary = self._units(self._shape.summary.draw(chance), least=1)
            self._said = [*self._head, *summary]
        self._said += added
        prompt = tuple(self._said)
        answer = self._units(output, least=0)
        self._said += answer
        return prompt, answer

    def _units(self, tokens: float, *, least: int) -> tuple[int, ...]:
        self._rest += tokens
        count = max(least, math.floor(self._rest / self._shape.unit_tokens))
        self._rest -= count * self._shape.unit_tokens
        return tuple(itertools.islice(self._fresh, count))
