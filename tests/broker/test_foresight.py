"""Guesses about the next turn: once, for the right tenant, and for nothing that is not known."""

from dataclasses import dataclass, field

import pytest

from broker.access import Tenant
from broker.foresight import expect, session_labels
from broker.session import Node, Part


@dataclass
class Asked:
    prefetched: list = field(default_factory=list)

    def prefetch(self, salt, prompt):
        self.prefetched.append((salt, prompt))


def node(**fields):
    return Node(
        response_id="resp_a",
        tenant="t",
        session="s",
        parent=None,
        created_at=0.0,
        stored=True,
        tokens=fields.pop("tokens", (1, 2, 3)),
        sampled_from=1,
        history=(Part(()),),
        instructions=None,
        tools=(),
        response=None,
        **fields,
    )


@pytest.mark.parametrize(
    ("headers", "labels"),
    [
        ([], ()),
        ([(b"session-id", b"s")], ("s",)),
        ([(b"session-id", b"s"), (b"thread-id", b"t")], ("t", "s")),
        ([(b"thread-id", b" t "), (b"session-id", b"t")], ("t",)),
        ([(b"x-claude-code-session-id", b"c"), (b"user-agent", b"u")], ("c",)),
        ([(b"thread-id", b""), (b"session-id", b"x" * 513)], ()),
    ],
)
def test_agents_name_their_session_in_headers(headers, labels):
    assert session_labels(headers) == labels


def test_one_turn_is_asked_for_once_and_again_when_time_has_passed():
    engine, tenant, one = Asked(), Tenant("t", b"salt"), node()
    for now in (100, 101, 109.9):
        expect(engine, tenant, one, now)
    assert engine.prefetched == [(b"salt", (1, 2, 3))]
    expect(engine, tenant, one, 110)
    assert len(engine.prefetched) == 2


def test_a_turn_that_has_just_ended_is_on_the_device_anyway():
    engine, tenant = Asked(), Tenant("t", b"salt")
    expect(engine, tenant, node(expected_at=100), 105)
    assert engine.prefetched == []


def test_a_clock_that_was_set_back_stops_no_guess():
    engine, tenant = Asked(), Tenant("t", b"salt")
    expect(engine, tenant, node(expected_at=1000), 100)
    assert len(engine.prefetched) == 1


def test_nothing_is_not_asked_for():
    engine = Asked()
    expect(engine, Tenant("t", b"salt"), node(tokens=()), 100)
    assert engine.prefetched == []
