"""`bench policy`: the generated day has the shape it claims, and the replay agrees with naive caches and with brute force.

The naive caches know sets of units and nothing else: a unit is a block there, and a leaf is a unit that no resident one
continues. They are the oracle for the real tables run at one unit a block.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest

from broker.bench.policy import BLOCK_TOKENS, Row, Size, add_arguments, main, report
from broker.bench.policy_mooncake import BadTrace, read
from broker.bench.policy_plot import Panel, Point, draw
from broker.bench.policy_replay import BOUND, ORDERS, TooSmall, replay, replay_tiered
from broker.bench.policy_survey import NEVER, survey
from broker.bench.policy_trace import Close, Quantiles, Shape, Turn, generate
from tiers.block import Tier
from tiers.policy import SessionClass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from broker.bench.policy_trace import Event

SMALL = Shape(day_s=3 * 3600, sessions=30, subagents=30, oneshots=60)


@pytest.fixture(scope="module")
def day() -> list[Event]:
    return list(generate(Shape(), seed=0))


def turns_of(events: Sequence[Event]) -> list[Turn]:
    return [event for event in events if isinstance(event, Turn)]


def by_session(events: Sequence[Event]) -> dict[int, list[Turn]]:
    sessions: dict[int, list[Turn]] = {}
    for turn in turns_of(events):
        sessions.setdefault(turn.session, []).append(turn)
    return sessions


def continues(turn: Turn, before: Turn) -> bool:
    chain = before.prompt + before.output
    return turn.prompt[: len(chain)] == chain


# -- the generator ---------------------------------------------------------------------------------------------------


def test_a_distribution_passes_through_its_quantiles_and_is_straight_between_them() -> None:
    some = Quantiles(((0, 1), (0.5, 100), (1, 10_000)))
    assert [some.at(share) for share in (0, 0.5, 1)] == pytest.approx([1, 100, 10_000])
    assert some.at(0.25) == pytest.approx(10)


@pytest.mark.parametrize(
    ("name", "quantiles"),
    [
        ("tool_gap", {0.5: 0.3, 0.9: 14, 0.99: 3.6 * 60}),
        ("human_gap", {0.5: 86, 0.9: 21 * 60, 0.99: 14 * 3600}),
        ("delta", {0.5: 1_300}),
    ],
)
def test_gaps_and_deltas_have_the_quantiles_of_the_design(
    name: str, quantiles: dict[float, float]
) -> None:
    chance = random.Random(7)
    drawn = sorted(getattr(Shape(), name).draw(chance) for _ in range(40_000))
    for share, value in quantiles.items():
        assert drawn[int(share * len(drawn))] == pytest.approx(value, rel=0.12)


def test_the_day_has_the_contexts_deltas_and_turns_of_the_design(day: list[Event]) -> None:
    unit = Shape().unit_tokens
    contexts = [len(turn.prompt) * unit for turn in turns_of(day)]
    assert statistics.median(contexts) == pytest.approx(58_000, rel=0.05)
    assert 120_000 < max(contexts) <= Shape().cap
    deltas = [
        (len(turn.prompt) - len(before.prompt) - len(before.output)) * unit
        for turns in by_session(day).values()
        for before, turn in itertools.pairwise(turns)
        if continues(turn, before)
    ]
    assert statistics.median(deltas) == pytest.approx(1_300, rel=0.05)
    chance = random.Random(3)
    lengths = [Shape().turns.draw(chance) for _ in range(20_000)]
    assert statistics.mean(lengths) == pytest.approx(100, rel=0.05)


def test_the_same_seed_is_the_same_day_and_another_seed_is_another() -> None:
    assert list(generate(SMALL, 1)) == list(generate(SMALL, 1))
    assert list(generate(SMALL, 1)) != list(generate(SMALL, 2))


def test_events_come_in_order_of_time_and_end_with_the_day(day: list[Event]) -> None:
    times = [event.at for event in day]
    assert times == sorted(times)
    assert times[0] >= 0
    assert Shape().day_s * 0.99 < times[-1] < Shape().day_s


def test_an_id_stands_for_all_that_came_before_it(day: list[Event]) -> None:
    before: dict[int, int] = {}
    for turn in turns_of(day)[:4_000]:
        chain = turn.prompt + turn.output
        for parent, unit in itertools.pairwise((-1, *chain)):
            assert before.setdefault(unit, parent) == parent


def test_every_turn_shows_something_new(day: list[Event]) -> None:
    seen: set[int] = set()
    for turn in turns_of(day):
        assert turn.prompt[-1] not in seen
        assert seen.isdisjoint(turn.output)
        seen.update(turn.prompt, turn.output)


def test_at_the_cap_a_conversation_is_replaced_by_a_summary_behind_the_same_head(
    day: list[Event],
) -> None:
    shape = Shape()
    compactions = 0
    for turns in by_session(day).values():
        for before, turn in itertools.pairwise(turns):
            if continues(turn, before):
                continue
            compactions += 1
            shared = len([1 for a, b in zip(turn.prompt, before.prompt, strict=False) if a == b])
            assert shared * shape.unit_tokens in range(min(shape.heads) - 256, max(shape.heads) + 1)
            assert len(before.prompt) * shape.unit_tokens > shape.cap * 0.6
            assert len(turn.prompt) * shape.unit_tokens < 60_000
    assert compactions > 100


def test_sessions_share_heads_and_one_shots_share_nothing(day: list[Event]) -> None:
    firsts = [turns[0].prompt[0] for turns in by_session(day).values()]
    popular = {unit for unit in firsts if firsts.count(unit) > 1}
    assert len(popular) == len(Shape().heads)
    alone = [turns for turns in by_session(day).values() if turns[0].prompt[0] not in popular]
    assert len(alone) == Shape().oneshots
    assert all(len(turns) == 1 for turns in alone)


def test_some_sessions_close_some_come_back_after_it_and_some_just_stop(day: list[Event]) -> None:
    closes: dict[int, float] = {
        event.session: event.at for event in day if isinstance(event, Close)
    }
    last = {session: turns[-1] for session, turns in by_session(day).items()}
    ended = [session for session, turn in last.items() if turn.at < Shape().day_s / 2]
    assert any(session not in closes for session in ended)
    assert any(closes[session] > last[session].at for session in ended if session in closes)
    assert any(at < last[session].at for session, at in closes.items())
    assert {turn.waits_for for turn in turns_of(day)} == {
        SessionClass.TOOL_WAIT,
        SessionClass.HUMAN_WAIT,
    }


# -- Mooncake's format -----------------------------------------------------------------------------------------------


def line(at: int, tokens: int, hashes: list[int], **more: object) -> str:
    return json.dumps(
        {"timestamp": at, "input_length": tokens, "output_length": 5, "hash_ids": hashes, **more}
    )


def test_a_mooncake_line_is_a_turn_and_equal_hashes_are_equal_content() -> None:
    one, two = read([line(0, 1024, [7, 8]), line(2500, 1100, [7, 9, 4], tool="x"), "\n"])
    assert (one.at, two.at) == (0, 2.5)
    assert (len(one.prompt), len(two.prompt)) == (2, 3)
    assert one.prompt[0] == two.prompt[0]
    assert set(one.prompt[1:]).isdisjoint(two.prompt[1:])


def test_mooncake_requests_that_go_on_from_the_end_of_another_are_its_session() -> None:
    lines = [
        line(0, 1100, [1, 2, 3]),  # 3 is partial: the next turn has other content there
        line(1, 1024, [1, 9]),
        line(2, 2048, [1, 2, 4, 5]),
        line(3, 2500, [1, 2, 4, 5, 6]),
        line(4, 1024, [1, 2]),  # its session went on from there already
        line(5, 1024, [3, 5]),  # the same hash behind other content is other content
    ]
    turns = read(lines)
    assert [turn.session for turn in turns] == [0, 1, 0, 0, 4, 5]
    assert {*turns[5].prompt}.isdisjoint(turns[3].prompt)


def test_mooncake_lines_may_be_out_of_order_and_may_leave_out_the_partial_hash() -> None:
    late, early = line(9000, 700, [1]), line(0, 700, [1])
    turns = read([late, early])
    assert [turn.at for turn in turns] == [0, 9]
    assert [len(turn.prompt) for turn in turns] == [2, 2]
    assert turns[0].prompt[0] == turns[1].prompt[0]
    assert turns[0].prompt[1] != turns[1].prompt[1]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"timestamp": "now"}', "timestamp"),
        ('{"timestamp": true}', "timestamp"),
        ('{"timestamp": -1}', "timestamp"),
        ('{"timestamp": NaN}', "timestamp"),
        ('{"timestamp": 1}', "input_length"),
        ('{"timestamp": 1, "input_length": 0}', "input_length"),
        ('{"timestamp": 1, "input_length": 5}', "hash_ids"),
        ('{"timestamp": 1, "input_length": 5, "hash_ids": ["a"]}', "hash_ids"),
        ('{"timestamp": 1, "input_length": 5, "hash_ids": [1, 2]}', "5 tokens are 1 hashes"),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_what_is_wrong(bad: str, reason: str) -> None:
    with pytest.raises(BadTrace, match=rf"^line 3: .*{reason}"):
        read([line(0, 512, [1]), "", bad])


# -- the survey ------------------------------------------------------------------------------------------------------


def small_trace(seed: int, events: int = 60, sessions: int = 5) -> list[Event]:
    """Sessions that grow, fork from shared heads and start again; every prompt ends in something new."""
    chance = random.Random(seed)
    fresh = itertools.count()
    heads = [tuple(next(fresh) for _ in range(size)) for size in (2, 3)]
    chains = {session: chance.choice(heads) for session in range(sessions)}
    trace: list[Event] = []
    for number in range(events):
        session = chance.randrange(sessions)
        if chance.random() < 0.12 or len(chains[session]) > 9:
            chains[session] = chance.choice(heads)
        prompt = (*chains[session], *(next(fresh) for _ in range(chance.randint(1, 2))))
        output = tuple(next(fresh) for _ in range(chance.randint(0, 1)))
        chains[session] = prompt + output
        waits_for = chance.choice((SessionClass.TOOL_WAIT, SessionClass.HUMAN_WAIT))
        trace.append(Turn(float(number), session, prompt, output, waits_for))
        if chance.random() < 0.1:
            trace.append(Close(float(number), session))
    return trace


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block_units", [1, 3])
def test_the_survey_agrees_with_looking_at_every_pair_of_events(
    seed: int, block_units: int
) -> None:
    trace = small_trace(seed)
    found = survey(trace, block_units)
    seen: set[int] = set()
    fresh = 0
    uses: list[tuple[float, ...]] = []
    chains: list[tuple[tuple[int, ...], ...]] = []  # [event]: each block as the chain up to its end
    for number, event in enumerate(trace):
        if isinstance(event, Close):
            uses.append(())
            chains.append(())
            continue
        fresh += max(1, len([unit for unit in event.prompt if unit not in seen]))
        seen.update(event.prompt, event.output)
        chain = event.prompt + event.output
        ends = [*range(block_units, len(chain), block_units), len(chain)]
        chains.append(tuple(chain[:end] for end in ends))
        later = [
            next(
                (
                    float(at)
                    for at, other in enumerate(trace[number + 1 :], number + 1)
                    if isinstance(other, Turn) and other.prompt[:end] == chain[:end]
                ),
                NEVER,
            )
            for end in ends
        ]
        uses.append(tuple(later))
    assert found.next_uses == tuple(uses)
    assert found.fresh_units == fresh
    assert found.turns == len(turns_of(trace))
    assert found.longest_blocks == max(map(len, chains))
    alive: dict[tuple[int, ...], float] = {}  # {to be used again: when}
    most = 0
    for number, blocks in enumerate(chains):
        alive = {block: use for block, use in alive.items() if use > number}
        most = max(most, len({*alive, *blocks}))
        later_again = zip(blocks, uses[number], strict=True)
        alive |= {block: use for block, use in later_again if use is not NEVER}
    assert found.footprint_blocks == most


# -- the replay ------------------------------------------------------------------------------------------------------


class NaiveCache:
    """Sets of units. `worth` says which of the leaves that the turn does not need goes first: the smallest."""

    def __init__(self, capacity: int, worth: Callable[[int], tuple[float, ...]]) -> None:
        self._capacity = capacity
        self._worth = worth
        self._resident: set[int] = set()
        self._parents: dict[int, int] = {}

    def serve(self, turn: Turn) -> int:
        """Units of the prompt that had to be computed."""
        chain = turn.prompt + turn.output
        self._parents.update(zip(chain[1:], chain[:-1], strict=True))
        hits = next(at for at, unit in enumerate(turn.prompt) if unit not in self._resident)
        self._resident.update(chain)
        while len(self._resident) > self._capacity:
            parents = {self._parents.get(unit) for unit in self._resident}
            leaves = self._resident - parents - {*chain}
            self._resident.remove(min(leaves, key=self._worth))
        return len(turn.prompt) - hits


def naive_lru(trace: Sequence[Event], capacity: int) -> int:
    used: dict[int, tuple[float, ...]] = {}
    cache = NaiveCache(capacity, lambda unit: used[unit])
    computed = 0
    for turn in turns_of(trace):
        used.update(
            {unit: (turn.at, -depth) for depth, unit in enumerate(turn.prompt + turn.output)}
        )
        computed += cache.serve(turn)
    return computed


def naive_belady(trace: Sequence[Event], capacity: int) -> int:
    turns = turns_of(trace)
    computed = 0
    at = -1

    def worth(unit: int) -> tuple[float, ...]:
        later = range(at + 1, len(turns))
        next_use = next((turn for turn in later if unit in turns[turn].prompt), NEVER)
        return (-next_use,)

    cache = NaiveCache(capacity, worth)
    for turn in turns:
        at += 1
        computed += cache.serve(turn)
    return computed


def least_possible(trace: Sequence[Event], capacity: int) -> int:
    """Whatever is kept after each turn: every choice is tried. A cache keeps no unit without the one before it."""
    costs: dict[frozenset[int], int] = {frozenset(): 0}  # {resident: least units computed so far}
    parents: dict[int, int] = {}
    for turn in turns_of(trace):
        chain = turn.prompt + turn.output
        parents.update(zip(chain[1:], chain[:-1], strict=True))
        after: dict[frozenset[int], int] = {}
        for resident, cost in costs.items():
            hits = next(at for at, unit in enumerate(turn.prompt) if unit not in resident)
            rest = sorted(resident - {*chain})
            for keep in itertools.product((True, False), repeat=len(rest)):
                kept = frozenset((*chain, *itertools.compress(rest, keep)))
                whole = all(parents.get(unit, unit) in kept for unit in kept)
                if whole and len(kept) <= capacity:
                    total = cost + len(turn.prompt) - hits
                    after[kept] = min(total, after.get(kept, total))
        costs = after
    return min(costs.values())


def tiny_trace(seed: int) -> list[Event]:
    return [
        event for event in small_trace(seed, events=9, sessions=3) if len(event_chain(event)) <= 7
    ]


def event_chain(event: Event) -> tuple[int, ...]:
    return event.prompt + event.output if isinstance(event, Turn) else ()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("capacity", [14, 20, 40])
def test_the_tables_agree_with_naive_caches_at_one_unit_a_block(seed: int, capacity: int) -> None:
    trace = small_trace(seed)
    found = survey(trace, 1)
    assert replay(trace, found, "lru", capacity).computed_units == naive_lru(trace, capacity)
    assert replay(trace, found, "belady", capacity).computed_units == naive_belady(trace, capacity)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("capacity", [8, 10])
def test_no_way_to_keep_things_costs_less_than_belady(seed: int, capacity: int) -> None:
    trace = tiny_trace(seed)
    belady = replay(trace, survey(trace, 1), "belady", capacity)
    assert belady.computed_units == least_possible(trace, capacity)


@pytest.mark.parametrize("seed", range(4))
def test_no_order_costs_less_than_belady_and_belady_needs_the_footprint_at_most(seed: int) -> None:
    trace = small_trace(seed, events=100, sessions=9)
    found = survey(trace, 1)
    for share in (0.4, 0.6, 0.8):
        slots = max(found.longest_blocks, round(share * found.footprint_blocks))
        costs = {order: replay(trace, found, order, slots).computed_units for order in ORDERS}
        assert costs[BOUND] == min(costs.values())
        assert costs["lru"] > costs[BOUND] > found.fresh_units
    whole = replay(trace, found, BOUND, found.footprint_blocks)
    assert whole.amplification == 1
    assert whole.computed_units == found.fresh_units


def test_on_a_generated_day_the_sessions_classes_are_worth_much_of_what_belady_knows() -> None:
    trace = list(generate(SMALL, 0))
    found = survey(trace, BLOCK_TOKENS // SMALL.unit_tokens)
    slots = round(0.4 * found.footprint_blocks)
    lru, session_lru, belady = (
        replay(trace, found, order, slots).amplification for order in ("lru", "session_lru", BOUND)
    )
    assert 1 < belady < session_lru < lru
    assert session_lru - belady < 0.8 * (lru - belady)


def test_with_all_tiers_on_nothing_is_computed_again() -> None:
    trace = list(generate(SMALL, 0))
    found = survey(trace, BLOCK_TOKENS // SMALL.unit_tokens)
    outcome = replay_tiered(trace, found, "session_lru")
    assert outcome.amplification <= 1.1
    assert all(outcome.found[tier] > 0 for tier in Tier)
    assert sum(outcome.found.values()) == outcome.prompt_units - outcome.computed_units


def test_a_replay_gives_the_same_outcome_every_time() -> None:
    trace = small_trace(1)
    found = survey(trace, 2)
    for order in ORDERS:
        assert replay(trace, found, order, 9) == replay(trace, found, order, 9)


def test_a_turn_that_does_not_fit_on_the_device_is_said_to() -> None:
    trace = small_trace(1)
    with pytest.raises(TooSmall):
        replay(trace, survey(trace, 1), "lru", 4)


# -- the command -----------------------------------------------------------------------------------------------------


def run_command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return main(parser.parse_args(words))


def test_the_command_prints_a_table_and_writes_the_curves_and_every_replay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    svg, replays = tmp_path / "curves.svg", tmp_path / "replays.json"
    options = ("--seeds", "2", "--sessions", "8", "--policies", "session_lru", "--tiers")
    capacities = ("--capacities", "0.4,0.6")
    status = run_command(*options, *capacities, "--svg", str(svg), "--json", str(replays))
    assert status == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert [row[2] for row in rows if row[1:2] == ["%"]] == ["belady", "session_lru"] * 2
    assert "2 seeds" in out
    assert "footprint" in out
    assert "ALL TIERS" in out
    assert "the goal" not in out  # the goals are for a day of full size
    ET.fromstring(svg.read_text(encoding="utf-8"))
    value = json.loads(replays.read_text(encoding="utf-8"))
    assert len(value["traces"]) == 2
    assert len(value["replays"]) == 2 * (2 * 2 + 1)
    bounds = [each for each in value["replays"] if each["policy"] == BOUND]
    assert all(each["over_bound"] == 1 for each in bounds)
    assert all(each["over_bound"] >= 1 for each in value["replays"])


def test_a_goal_is_met_or_missed_where_its_capacity_was_measured() -> None:
    size = Size("seed 0", turns=1, prompt=10, fresh=5, footprint=10, day=10)
    found = {"device": 0.5, "host": 0.0, "disk": 0.0}
    rows = [
        Row("session_lru", capacity, 0.5, 1.5, ratio, ratio, ratio, found)
        for capacity, ratio in ((0.2, 1.25), (0.3, 9.0), (0.4, 1.16), (None, 1.01))
    ]
    verdicts = report([size], rows, ((0.2, 1.25), (0.4, 1.15))).splitlines()[-3:]
    assert [line.rsplit(" ", 1)[1] for line in verdicts] == ["met", "missed", "met"]


def test_the_command_replays_a_mooncake_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    prompts = [[session, *range(100 * session, 100 * session + 31)] for session in range(9)]
    again = [[*prompt, 1_000 + at] for at, prompt in enumerate(prompts)]
    lines = [line(at, 512 * len(one), one) for at, one in enumerate([*prompts, *again])]
    path.write_text("\n".join(lines))
    assert run_command("--trace", str(path), "--capacities", "0.5,1", "--policies", "lru") == 0
    out = capsys.readouterr().out
    assert out.startswith("trace.jsonl: 18 turns")
    assert "the goal" not in out


def test_a_trace_that_cannot_be_replayed_is_one_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    for content, reason in (
        (None, "No such file"),
        (b"", "no requests"),
        (b"{}", "line 1: timestamp"),
        (b"\xff\xfe", "utf-8"),
        (line(0, 20_000, list(range(40))).encode(), "needs a capacity of"),
    ):
        if content is not None:
            path.write_bytes(content)
        assert run_command("--trace", str(path), "--capacities", "0.5") == 1
        said = capsys.readouterr()
        assert said.out == ""
        last = said.err.splitlines()[-1]
        assert last.startswith("bench: trace.jsonl: ")
        assert reason in last


@pytest.mark.parametrize(
    "words",
    [
        ("--capacities", "0"),
        ("--capacities", "a"),
        ("--capacities", "nan"),
        ("--policies", "lru,fifo"),
        ("--seeds", "0"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_command(*words)
    assert words[0] in capsys.readouterr().err


def said(at: float, session: int, prompt: range, waits_for: SessionClass) -> Turn:
    return Turn(at, session, tuple(prompt), (), waits_for)


@pytest.mark.parametrize(
    ("first", "second", "computed"),
    [
        # Sessions 0 and 1 have five units each of the twelve there are, 2 needs four of them, then 0 comes back.
        (SessionClass.HUMAN_WAIT, SessionClass.TOOL_WAIT, 3),
        (SessionClass.TOOL_WAIT, SessionClass.TOOL_WAIT, 3),
        (SessionClass.TOOL_WAIT, SessionClass.HUMAN_WAIT, 1),
        (SessionClass.HUMAN_WAIT, SessionClass.CLOSED, 1),
    ],
)
def test_what_the_end_of_a_turn_shows_decides_who_gives_way(
    first: SessionClass, second: SessionClass, computed: int
) -> None:
    closed = second is SessionClass.CLOSED
    seen = SessionClass.HUMAN_WAIT if closed else second
    begun = [
        said(0, 0, range(4), SessionClass.TOOL_WAIT),
        said(1, 1, range(10, 14), SessionClass.TOOL_WAIT),
        said(2, 0, range(5), first),
        said(3, 1, range(10, 15), seen),
    ]
    rest = [said(5, 2, range(20, 24), SessionClass.TOOL_WAIT), said(6, 0, range(6), first)]
    trace: list[Event] = [*begun, *([Close(4, 1)] if closed else []), *rest]
    outcome = replay(trace, survey(trace, 1), "session_lru", 12)
    assert outcome.computed_units == 4 + 4 + 1 + 1 + 4 + computed


def test_a_compacted_conversation_gives_way_to_one_that_somebody_will_come_back_to() -> None:
    trace: list[Event] = [
        said(0, 0, range(3), SessionClass.HUMAN_WAIT),
        said(1, 0, range(4), SessionClass.HUMAN_WAIT),
        said(2, 1, range(10, 16), SessionClass.TOOL_WAIT),
        said(3, 1, range(20, 23), SessionClass.TOOL_WAIT),  # nothing of 10 to 15 is in it
        said(4, 2, range(30, 33), SessionClass.TOOL_WAIT),
        said(5, 0, range(5), SessionClass.HUMAN_WAIT),
    ]
    outcome = replay(trace, survey(trace, 1), "session_lru", 13)
    assert outcome.computed_units == 3 + 1 + 6 + 3 + 3 + 1


def test_a_prompt_seen_before_needs_its_last_unit_for_the_logits_and_nothing_else() -> None:
    trace: list[Event] = [said(at, at, range(5), SessionClass.HUMAN_WAIT) for at in range(3)]
    found = survey(trace, 1)
    assert found.fresh_units == 5 + 1 + 1
    assert replay(trace, found, "lru", 6).computed_units == found.fresh_units


# -- the picture -----------------------------------------------------------------------------------------------------


def test_the_picture_is_well_formed_and_names_every_line_twice_in_a_panel_and_the_legend() -> None:
    lines = {
        name: [Point(0.1, 4 + at, 3.5, 5 + at), Point(0.4, 1.2, 1.1, 1.3), Point(1, 1, 1, 1)]
        for at, name in enumerate(("session_lru", "belady", "a<b"))
    }
    panels = [
        Panel("Hits", "of tokens", {"lru": [Point(0.2, 0.9, 0.9, 0.9)]}, percent=True),
        Panel("A", "x", lines, logarithmic=True, goals=((0.4, 1.25),)),
    ]
    text = draw("Title & more", "sub", panels)
    root = ET.fromstring(text)
    said = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert all(said.count(name) == 2 for name in ("session_lru", "belady", "a<b", "lru"))
    assert {"Title & more", "Hits", "A", "capacity, % of the footprint", "10", "40"} <= {*said}
    assert "nan" not in text


def test_names_at_the_ends_of_lines_do_not_overlap_nor_leave_the_panel() -> None:
    lines = {f"p{at}": [Point(0, 2, 2, 2), Point(1, 1, 1, 1)] for at in range(6)}
    root = ET.fromstring(draw("t", "s", [Panel("A", "x", lines)]))
    texts = list(root.iter("{http://www.w3.org/2000/svg}text"))
    ends = sorted(float(text.attrib["y"]) for text in texts if text.text in lines)[6:]
    assert all(below - above >= 13.9 for above, below in itertools.pairwise(ends))
    bottom = next(float(text.attrib["y"]) for text in texts if text.text == "0")
    assert ends[-1] <= bottom + 4.1
