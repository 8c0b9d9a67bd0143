"""`homeport top` without a terminal: whatever the daemon says, the lines fit, and say it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import top
from broker.top import Snapshot, render, residency

KIB, GIB = 1 << 10, 1 << 30


def tier(name, used=0, capacity=GIB):
    return {
        "tier": name,
        "used_bytes": used,
        "capacity_bytes": capacity,
        "blocks": used // KIB,
        "leased_blocks": 1,
        "held_refs": 0,
        "block_bytes": KIB,
    }


def session(name="s", tokens=100, idle_s=1.0, **on):
    return {
        "session": name,
        "session_class": "BURST",
        "tokens": tokens,
        "idle_s": idle_s,
        "tokens_on": on,
    }


def turn(**changed):
    return {
        "request_id": "req_1",
        "response_id": "resp_1",
        "session": "s",
        "status": "completed",
        "ended_at": 990.0,
        "total_s": 2.5,
        "first_token_s": 0.42,
        "stages_s": dict.fromkeys(
            ("parse", "queue", "render", "restore", "prefill", "decode", "store", "send"), 0.0125
        ),
        "prompt_tokens": 5000,
        "output_tokens": 24,
        "tokens": {"computed": 200, "device": 0, "host": 800, "disk": 4000, "remote": 0},
        **changed,
    }


def snapshot(at=1.0, sessions=(), turns=(), **tokens):
    return Snapshot(
        at=at,
        tiers={
            "running": 2,
            "waiting": 1,
            "loading": 0,
            "dirty": 3,
            "tokens_total": tokens,
            "output_tokens_total": tokens.get("sampled", 0),
            "hit_share": 0.975,
            "amplification": 1.03,
            "tiers": [tier("device", GIB // 2), tier("host"), tier("disk", 0, 0)],
            "spilled_total": {"host": tokens.get("spilled", 0)},
            "restored_total": {},
            "evictions_total": {},
            "disk": {
                "state": "ok",
                "reason": None,
                "pending_bytes": 0,
                "writer_lag_s": 0.2,
                "oldest_dirty_s": 0.0,
                "reading": 0,
            },
        },
        sessions=sessions,
        turns=turns,
        edge={"turns_admitted": 2, "turns_queued": 0, "turns_refused_total": 0, "websockets": 4},
        now=1000.0,
    )


def cells(lines, first):
    (line,) = [line for line in lines if line.startswith(first)]
    return line.split()


def test_it_shows_where_everything_is():
    whole = snapshot(sessions=[session(device=40, host=80, disk=100)], turns=[turn()])
    lines = render(whole, None, width=200, height=None)
    assert "█" * 10 + "·" * 10 in cells(lines, "device")
    assert "50%" in cells(lines, "device")
    (listed,) = [line.split() for line in lines if "burst" in line]
    assert listed[:7] == ["s", "burst", "1s", "100", "40", "80", "100"]
    (shown,) = [line.split() for line in lines if "10s" in line]
    assert shown == [
        "s", "10s", "completed", "5000", "200", "0", "4800", "24", "420ms", "2.5s", *["12ms"] * 8
    ]  # fmt: skip
    assert "hit share 97.5%" in lines[1]


def test_rates_are_differences_over_time_and_unknown_at_first():
    before = snapshot(at=1.0, computed=100, host=5, disk=5, sampled=10, spilled=0)
    now = snapshot(at=3.0, computed=300, host=10, disk=20, sampled=20, spilled=6)
    first = render(before, None, width=200, height=None)
    assert "computed -, device -, restored -, sampled -" in first[1]
    later = render(now, before, width=200, height=None)
    assert "computed 100, device 0, restored 10, sampled 5" in later[1]
    assert cells(later, "host")[-3:] == ["3", "0", "0"]


def test_a_daemon_that_began_anew_has_no_negative_rates():
    before, now = snapshot(at=1.0, computed=300), snapshot(at=2.0, computed=5)
    assert "computed -" in render(now, before, width=200, height=None)[1]


def test_a_disk_in_trouble_says_why():
    hurt = snapshot()
    hurt.tiers["disk"] |= {"state": "degraded", "reason": "full"}
    assert "disk degraded (full)" in "\n".join(render(hurt, None, width=200, height=None))


def test_a_name_cannot_command_the_terminal():
    evil = "\x1b[2Jgone\r\n\x07\u202e"
    lines = render(
        snapshot(sessions=[session(evil)], turns=[turn(session=evil)]), None, width=200, height=None
    )
    assert all(line.isprintable() for line in lines)
    assert sum("gone" in line for line in lines) == 2


def test_a_turn_that_was_refused_shows_its_request():
    refused = turn(session=None, response_id=None, first_token_s=None, status="refused")
    lines = render(snapshot(turns=[refused]), None, width=200, height=None)
    assert cells(lines, "req_1")[2] == "refused"
    assert "-" in cells(lines, "req_1")


@given(
    width=st.integers(0, 200),
    height=st.integers(0, 60),
    sessions=st.integers(0, 40),
    turns=st.integers(0, 60),
)
def test_it_fits(width, height, sessions, turns):
    whole = snapshot(
        sessions=[session(f"s{n}", idle_s=n) for n in range(sessions)],
        turns=[turn(session=f"t{n}") for n in range(turns)],
    )
    lines = render(whole, None, width=width, height=height)
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)


def test_sessions_and_turns_share_the_room_and_the_newest_come_first():
    whole = snapshot(
        sessions=[session(f"s{n}", idle_s=100 - n) for n in range(50)],
        turns=[turn(session=f"t{n}") for n in range(50)],
    )
    lines = render(whole, None, width=200, height=40)
    assert len(lines) == 40
    names = [line.split()[0] for line in lines if line[:1] in "st" and line[1:2].isdigit()]
    listed, ended = [n for n in names if n[0] == "s"], [n for n in names if n[0] == "t"]
    assert listed[0] == "s49"
    assert ended[0] == "t0"
    assert abs(len(listed) - len(ended)) <= 2


@given(st.integers(1, 10_000), *[st.integers(0, 10_000)] * 3)
def test_a_residency_bar_has_all_its_cells(tokens, device, host, disk):
    bar = residency(tokens, {"device": device, "host": host, "disk": disk})
    assert len(bar) == 20
    assert list(bar) == sorted(bar, key="█▓░·".index)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0"), (0.0004, "0.4ms"), (0.0421, "42ms"), (0.9999, "1s"), (12.34, "12.3s"), (99.96, "100s"), (100, "2m"), (7200, "2h")],
)  # fmt: skip
def test_times_are_short(seconds, shown):
    assert top.took(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0B"), (1023, "1023B"), (1536, "1.5KiB"), (5 * GIB, "5GiB"), (3 << 50, "3072.0TiB")]
)  # fmt: skip
def test_sizes_are_short(count, shown):
    assert top.size(count) == shown
