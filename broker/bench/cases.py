"""What both sides are asked, case by case: each is prepared once on either side, and measured once a round, by turns.

Laws
    Both sides get the same words (conversation.py) and are measured one after the other, never at once; who goes first
    changes from round to round, and nobody is measured before the other one has settled.
    A session that must be new to its server has digits that no other session of this run has.
    The figures are a client's: what is asked for over Chat Completions, and no counter of the server's but its tokens.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import trio

from broker.bench.comparison import Sample, Unit, quantile, whole_turn_s
from broker.bench.conversation import opening, result
from broker.bench.peer import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from broker.bench.chat import Completion
    from broker.bench.conversation import Conversation
    from broker.bench.side import Side

_NONCES = 100_000
OTHERS = 2  # sessions between two turns of one that is evicted


@dataclass(slots=True)
class Nonces:
    """Digits for sessions: the same ones for both sides of a round."""

    first: int
    _given: dict[tuple[object, ...], int] = field(default_factory=dict)

    def of(self, *session: object) -> int:
        number = self._given.setdefault(session, len(self._given))
        return (self.first + number) % _NONCES


@dataclass(frozen=True, slots=True)
class Sizes:
    """In tokens, about."""

    depth: int  # of the context
    delta: int  # what a turn adds
    output: int


class Case(Protocol):
    async def prepare(self, side: Side) -> None: ...

    async def measure(self, side: Side, number: int) -> list[Sample]: ...


async def alternate(
    case: Case, sides: Sequence[Side], rounds: int, tick: Callable[[str], None]
) -> list[Sample]:
    """`tick` is called after each of the rounds and preparations of each side, with its name."""
    samples: list[Sample] = []
    for side in sides:
        await case.prepare(side)
        await side.settle()
        tick(side.name)
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            samples += await case.measure(side, number)
            await side.settle()
            tick(side.name)
    return samples


def ticks(sides: Sequence[Side], rounds: int) -> int:
    return len(sides) * (1 + rounds)


@dataclass(frozen=True, slots=True)
class Turns:
    """A session's first request, and its next turn."""

    sizes: Sizes
    nonces: Nonces

    async def prepare(self, side: Side) -> None:
        pass

    async def measure(self, side: Side, number: int) -> list[Sample]:
        first = opening(self.nonces.of("turns", number), self.sizes.depth)
        cold = await side.ask(first, self.sizes.output)
        following = first.answered(cold.text).asking(result(f"{number}", self.sizes.delta))
        warm = await side.ask(following, self.sizes.output)
        return [
            sample("cold, first token", side, number, cold, cold.ttft_s),
            *turn_samples("warm", side, number, warm, self.sizes.output),
        ]


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt of which nothing is cached: its computed tokens over the time to the first token."""

    tokens: int
    nonces: Nonces

    async def prepare(self, side: Side) -> None:
        pass

    async def measure(self, side: Side, number: int) -> list[Sample]:
        prompt = opening(self.nonces.of("prefill", self.tokens, number), self.tokens)
        done = await side.ask(prompt, 1)
        computed = self.tokens if done.computed_tokens is None else done.computed_tokens
        rate = computed / done.ttft_s
        return [sample(f"prefill of {self.tokens}", side, number, done, rate, Unit.RATE)]


@dataclass(frozen=True, slots=True)
class Decode:
    """One stream on a context of some depth. The prompt is the same in every round: only the first one computes it.

    A server that drafts tokens is measured with what it drafts; Homeport without is `--set engine.draft_tokens=0`."""

    depth: int
    output: int
    nonces: Nonces

    async def prepare(self, side: Side) -> None:
        await side.ask(self._prompt(), 1)

    async def measure(self, side: Side, number: int) -> list[Sample]:
        done = await side.ask(self._prompt(), self.output)
        if done.decode_rate is None:
            return []
        row = f"decode at {self.depth}"
        return [sample(row, side, number, done, done.decode_rate, Unit.RATE)]

    def _prompt(self) -> Conversation:
        return opening(self.nonces.of("decode", self.depth), self.depth)


@dataclass(frozen=True, slots=True)
class Evicted:
    """Sessions that take turns: between two turns of one, each of the others had its own."""

    sizes: Sizes
    nonces: Nonces
    _sessions: dict[str, list[Conversation]] = field(default_factory=dict)  # {side: each so far}

    async def prepare(self, side: Side) -> None:
        firsts = [
            opening(self.nonces.of("evicted", one), self.sizes.depth) for one in range(OTHERS + 1)
        ]
        self._sessions[side.name] = [
            first.answered((await side.ask(first, self.sizes.output)).text) for first in firsts
        ]

    async def measure(self, side: Side, number: int) -> list[Sample]:
        samples: list[Sample] = []
        sessions = self._sessions[side.name]
        for one, session in enumerate(sessions):
            following = session.asking(result(f"{one} {number}", self.sizes.delta))
            done = await side.ask(following, self.sizes.output)
            sessions[one] = following.answered(done.text)
            row = f"after {OTHERS} other sessions"
            samples += turn_samples(row, side, number, done, self.sizes.output)
        return samples


@dataclass(frozen=True, slots=True)
class Restarted:
    """The next turn of a session whose server was stopped and started. Only sides that are ours to stop.

    With slot files the peer is restarted twice: the turn as it comes, then one after its file was loaded by hand, whose
    time counts. Homeport restores by itself: its one turn stands in both rows."""

    sizes: Sizes
    nonces: Nonces
    slot_files: bool

    async def prepare(self, side: Side) -> None:
        assert side.owned, "not ours to stop"

    async def measure(self, side: Side, number: int) -> list[Sample]:
        first = opening(self.nonces.of("restarted", number), self.sizes.depth)
        parent = first.answered((await side.ask(first, self.sizes.output)).text)
        await side.settle()
        by_hand = side if isinstance(side, Peer) and self.slot_files else None
        if by_hand is not None:
            await by_hand.save()
        start_s = await side.restart()
        done = await side.ask(
            parent.asking(result(f"{number}", self.sizes.delta)), self.sizes.output
        )
        samples = [
            sample("restart, first token of the next turn", side, number, done, done.ttft_s),
            Sample("restart, until it is ready", side.name, number, start_s),
        ]
        if not self.slot_files:
            return samples
        load_s = 0.0
        if by_hand is not None:
            await by_hand.restart()
            load_s = await by_hand.load()
            again = parent.asking(result(f"{number} again", self.sizes.delta))
            done = await side.ask(again, self.sizes.output)
        row = "restart with slot files, first token"
        return [*samples, sample(row, side, number, done, load_s + done.ttft_s)]


@dataclass(frozen=True, slots=True)
class Concurrent:
    """Sessions that take their next turn at the same moment. They go on from round to round."""

    sessions: int
    sizes: Sizes
    nonces: Nonces
    _sessions: dict[str, list[Conversation]] = field(default_factory=dict)  # {side: each so far}

    async def prepare(self, side: Side) -> None:
        firsts = [
            opening(self.nonces.of("concurrent", self.sessions, one), self.sizes.depth)
            for one in range(self.sessions)
        ]
        self._sessions[side.name] = [
            first.answered((await side.ask(first, self.sizes.output)).text) for first in firsts
        ]

    async def measure(self, side: Side, number: int) -> list[Sample]:
        asked = [
            session.asking(result(f"{one} {number}", self.sizes.delta))
            for one, session in enumerate(self._sessions[side.name])
        ]
        done = await at_once(side, asked, self.sizes.output)
        self._sessions[side.name] = [
            before.answered(each.text) for before, each in zip(asked, done, strict=True)
        ]
        return crowd_samples(f"{self.sessions} at once", side, number, done)


@dataclass(frozen=True, slots=True)
class Fresh:
    """New prompts, so many at once: nothing is reused, everything is written behind."""

    prompts: int
    at_once: int
    sizes: Sizes
    nonces: Nonces

    async def prepare(self, side: Side) -> None:
        pass

    async def measure(self, side: Side, number: int) -> list[Sample]:
        done: list[Completion] = []
        for begin in range(0, self.prompts, self.at_once):
            batch = range(begin, min(begin + self.at_once, self.prompts))
            asked = [
                opening(self.nonces.of("fresh", number, one), self.sizes.depth) for one in batch
            ]
            done += await at_once(side, asked, self.sizes.output)
        seconds = max(each.ended for each in done) - done[0].sent
        worked = sum((each.computed_tokens or 0) + each.output_tokens for each in done)
        row = f"{self.prompts} fresh prompts, {self.at_once} at once"
        return [sample(row, side, number, done[-1], worked / seconds, Unit.RATE)]


async def at_once(
    side: Side, conversations: Sequence[Conversation], output_tokens: int
) -> list[Completion]:
    """Answers in the order of what was asked."""
    done: dict[int, Completion] = {}

    async def one(at: int, conversation: Conversation) -> None:
        done[at] = await side.ask(conversation, output_tokens)

    async with trio.open_nursery() as nursery:
        for at, conversation in enumerate(conversations):
            nursery.start_soon(one, at, conversation)
    return [done[at] for at in range(len(conversations))]


def crowd_samples(row: str, side: Side, number: int, done: Sequence[Completion]) -> list[Sample]:
    seconds = max(each.ended for each in done) - min(each.sent for each in done)
    said = sum(each.output_tokens for each in done)
    gaps = [1e3 * gap for each in done for gap in each.gaps_s]
    rates = [each.decode_rate for each in done if each.decode_rate is not None]
    first = statistics.median(each.ttft_s for each in done)
    middle = sorted(done, key=lambda each: each.ttft_s)[len(done) // 2]
    samples = [
        sample(f"{row}, output of all", side, number, middle, said / seconds, Unit.RATE),
        sample(f"{row}, first token", side, number, middle, first),
    ]
    if rates:
        each_ms = 1e3 / statistics.median(rates)
        samples += [
            sample(f"{row}, each further token", side, number, middle, each_ms, Unit.MILLISECONDS),
            sample(
                f"{row}, p99 gap", side, number, middle, quantile(gaps, 0.99), Unit.MILLISECONDS
            ),
        ]
    return samples


def turn_samples(row: str, side: Side, number: int, done: Completion, wanted: int) -> list[Sample]:
    whole, scaled = whole_turn_s(done.ttft_s, done.total_s, done.output_tokens, wanted)
    return [
        sample(f"{row}, first token", side, number, done, done.ttft_s),
        sample(f"{row}, whole turn", side, number, done, whole, scaled=scaled),
    ]


def sample(
    row: str,
    side: Side,
    number: int,
    done: Completion,
    value: float,
    unit: Unit = Unit.SECONDS,
    *,
    scaled: bool = False,
) -> Sample:
    return Sample(
        row,
        side.name,
        number,
        value,
        unit,
        done.prompt_tokens,
        done.cached_tokens,
        done.output_tokens,
        scaled,
    )
