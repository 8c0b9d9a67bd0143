"""`homeport bench serve` from end to end: stub daemons on one side, a stub peer on the other, sizes of a second."""

import shlex
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from broker.bench import transports
from broker.bench.cases import Nonces, Sizes
from broker.bench.daemon import DidNotStart
from broker.bench.peer import Peer
from broker.bench.report import Report
from broker.bench.sections import ALONE_SECTIONS, QUICK, TWO_SIDED, Run
from tests.campaign import stub
from tests.campaign.zygote import StubDaemon, Zygote

TINY = Sizes(depth=60, delta=10, output=6)  # words; the stub's tokens are their letters
PLAN = replace(
    QUICK,
    rounds=2,
    sizes=TINY,
    depths=(20, 60),
    decode_output=8,
    crowds=(1, 3),
    crowd=TINY,
    loop=Sizes(depth=400, delta=10, output=6),
    turns=3,
    alone_tokens=4,
    budgets=(32, 64),
    slot_files=True,
)
PEER = [sys.executable, str(Path(__file__).with_name("stub_peer.py")), "--port", "{port}"]
ROOM = stub.settings(device=1200, host=1200, disk=2400)  # blocks


@pytest.fixture(scope="module")
def zygote():
    with Zygote() as zygote:
        yield zygote


@pytest.fixture
def run(zygote, tmp_path):
    """Makes a run of a plan. Its daemons are stubs that never end an answer by themselves."""
    states = (tmp_path / f"daemon-{number}" for number in count())

    def make(plan):
        def new_daemon(settings):
            return StubDaemon(zygote, next(states), (*ROOM, *settings), options=("--endless",))

        return Run(plan, Nonces(5), Report(tmp_path / "results.md"), new_daemon)

    return make


def peer(tmp_path, *more, **options):
    return Peer(tmp_path / "peer.log", command=shlex.join([*PEER, *more]), **options)


def rows(text):
    """{row: its cells}"""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        if len(cells) >= 5:
            found[cells[0]] = cells[1:]
    return found


async def test_both_sides_are_measured_in_every_section_and_the_results_are_written(
    run, tmp_path, capsys
):
    told = []
    slots = tmp_path / "slots"
    slots.mkdir()
    asked = peer(tmp_path, "--slots", str(slots), name="stub")
    await run(replace(PLAN, sections=TWO_SIDED)).against(asked, told.append)
    [[ours, theirs]] = told
    assert ours == "homeport, stub"
    assert theirs == "stub, words, requests: ignore_eos, build stub, 1 slots"
    printed = capsys.readouterr().out
    found = rows(printed)
    for row in (
        "cold, first token", "warm, first token", "warm, whole turn", "prefill of 60",
        "decode at 20", "decode at 60", "after 2 other sessions, first token",
        "after 2 other sessions, whole turn", "restart, first token of the next turn",
        "restart, until it is ready", "restart with slot files, first token",
        "1 at once, output of all", "3 at once, each further token", "3 at once, p99 gap", "peak resident memory",
    ):  # fmt: skip
        assert "-" not in found[row][1:4], row  # both sides, and a ratio
    assert (tmp_path / "results.md").read_text().count("```") == 2 * len(TWO_SIDED)


async def test_what_was_cached_shows_which_turns_were_cold(run, tmp_path, capsys):
    slots = tmp_path / "slots"
    slots.mkdir()
    sections = ("turn", "restart")
    asked = peer(tmp_path, "--slots", str(slots), name="stub")
    await run(replace(PLAN, sections=sections)).against(asked, lambda _: None)
    found = rows(capsys.readouterr().out)

    def cached(row):
        ours, _, theirs = found[row][-2].partition("/")
        prompt = int(found[row][-3].split("/")[0])
        return int(ours) / prompt, int(theirs)

    assert cached("cold, first token")[0] < 0.1
    assert cached("warm, first token")[0] > 0.8
    assert cached("restart, first token of the next turn") >= (0.8, 0)
    assert cached("restart, first token of the next turn")[1] < 5
    assert cached("restart with slot files, first token")[1] > 60


async def test_homeports_own_sections_are_measured(run, capsys):
    await run(replace(PLAN, sections=ALONE_SECTIONS)).alone()
    printed = capsys.readouterr().out
    found = rows(printed)
    for row in (
        "3 turns", "a turn after the first, whole", "a restore, between tokens", "a restore, longest",
        "a prefill, mixed_tokens 32, between tokens", "a prefill, mixed_tokens 64, longest",
        "a prefill, mixed_tokens 64, its own first token", "4 fresh prompts, 4 at once",
    ):  # fmt: skip
        assert "-" not in found[row][1:4], row
    prompt, cached = found["a restore, between tokens"][4:6]
    assert int(cached) > 0.8 * int(prompt)
    assert int(found["a prefill, mixed_tokens 32, between tokens"][5]) < 64
    for way in transports.WAYS:
        assert way.value in printed


async def test_a_server_that_refuses_more_fields_is_asked_in_plain_words(tmp_path):
    strict = peer(tmp_path, "--strict")
    try:
        await strict.start()
        assert strict.dialect == "plain"
        assert await strict.peak_bytes() > 1 << 20
    finally:
        await strict.stop()


async def test_a_peer_that_runs_already_is_neither_stopped_nor_weighed(run, tmp_path, capsys):
    theirs = peer(tmp_path)
    try:
        await theirs.start()
        running = Peer(tmp_path / "no.log", url=theirs._running_url)
        plan = replace(PLAN, rounds=1, sections=("decode", "restart", "memory"))
        await run(plan).against(running, lambda _: None)
        assert await theirs._is_ready()
    finally:
        await theirs.stop()
    printed = capsys.readouterr().out
    assert "left out: peer is not ours to stop" in printed
    assert rows(printed)["peak resident memory"][2:4] == ["-", "-"]


async def test_a_command_that_ends_is_said_with_its_last_words(tmp_path):
    broken = Peer(
        tmp_path / "peer.log", command=f"{sys.executable} -c 'raise SystemExit(\"no\")' {{port}}"
    )
    with pytest.raises(DidNotStart, match="no"):
        await broken.start()
    await broken.stop()
