"""The tables of responses: who finds what, what is forgotten first, what survives a manifest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.session import ConnectionScope, Node, Part, Sessions, from_manifest, to_manifest
from broker.wire.items import (
    FunctionCall,
    FunctionCallOutput,
    Item,
    Message,
    Reasoning,
    content_digest,
)
from broker.wire.requests import ToolKind, ToolSpec
from engine.api import LeaseId
from tiers.manifest import decode, encode
from tiers.policy import SessionClass


def node(
    name: str,
    *,
    tenant: str = "",
    says: str = "hello",
    tokens: tuple[int, ...] = (1, 2, 3),
    stored: bool = True,
    history: tuple[Part, ...] = (),
    tools: tuple[ToolSpec, ...] = (),
) -> Node:
    output: tuple[Item, ...] = (Message(f"msg_{name}", "assistant", says),)
    return Node(
        response_id=f"resp_{name}",
        tenant=tenant,
        session="s",
        parent=None,
        created_at=1.5,
        stored=stored,
        tokens=tokens,
        sampled_from=1,
        history=(*history, Part(output, tokens[1:])),
        instructions="be brief",
        tools=tools,
        response={"id": f"resp_{name}", "output": []} if stored else None,
        item_ids=(f"msg_{name}",),
        content=content_digest(output),
    )


def test_a_response_is_found_by_its_id_its_items_and_what_it_says() -> None:
    sessions, a = Sessions(), node("a")
    sessions.add(a)
    assert sessions.find("", "resp_a") is a
    assert sessions.find_item("", "msg_a") is a
    assert sessions.find_content("", a.content) == (a,)


def test_the_newest_turn_of_a_session_is_found_by_each_of_its_labels() -> None:
    sessions = Sessions()
    a, b, old = node("a"), node("b"), node("old")
    a.labels, b.labels, old.labels = ("s", "thread"), ("s",), ("s",)
    b.created_at, old.created_at = 2.5, 0.5
    for one in (a, b, old):  # one from disk may come late
        sessions.add(one)
    assert sessions.latest("", "s") is b
    assert sessions.latest("", "thread") is a
    assert sessions.latest("other", "s") is None
    assert sessions.of_session("", "s") == (a, b, old)
    assert sessions.of_session("other", "s") == ()
    sessions.forget("", "resp_a")
    assert sessions.latest("", "thread") is None
    sessions.forget("", "resp_b")
    assert sessions.latest("", "s") is None


def test_an_unstored_response_is_found_by_its_items_but_not_by_its_id() -> None:
    sessions, a = Sessions(), node("a", stored=False)
    sessions.add(a)
    assert sessions.find("", "resp_a") is None
    assert sessions.known("", "resp_a") is a
    assert sessions.find_item("", "msg_a") is a


def test_a_tenant_finds_nothing_of_another() -> None:
    sessions, a = Sessions(), node("a", tenant="t1")
    sessions.add(a)
    assert sessions.find("t2", "resp_a") is None
    assert sessions.known("t2", "resp_a") is None
    assert sessions.find_item("t2", "msg_a") is None
    assert sessions.find_content("t2", a.content) == ()
    assert not sessions.forget("t2", "resp_a")


def test_equal_contents_are_given_newest_first() -> None:
    sessions, a, b = Sessions(), node("a"), node("b")
    sessions.add(a)
    sessions.add(b)
    assert sessions.find_content("", a.content) == (b, a)
    assert sessions.forget("", "resp_b")
    assert sessions.find_content("", a.content) == (a,)


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["add", "find", "item", "forget"]), st.integers(0, 9), st.integers(1, 6)
        ),
        min_size=25,
        max_size=60,
    )
)
def test_the_tables_keep_their_budgets_and_agree(steps: list[tuple[str, int, int]]) -> None:
    """Against the naive way: a list of nodes, least recently used first."""
    sessions, naive = Sessions(max_nodes=5, max_tokens=16), list[Node]()
    for what, number, length in steps:
        name = f"resp_{number}"
        here = next((n for n in naive if n.response_id == name), None)
        match what:
            case "add":
                new = node(str(number), tokens=tuple(range(length)), says=f"{length}")
                sessions.add(new)
                naive = [n for n in naive if n is not here] + [new]
                while len(naive) > 5 or sum(len(n.tokens) for n in naive) > 16:
                    naive.pop(0)
            case "find" | "item":
                found = (
                    sessions.find("", name)
                    if what == "find"
                    else sessions.find_item("", f"msg_{number}")
                )
                assert found is here
                if here is not None:
                    naive.remove(here)
                    naive.append(here)
            case "forget":
                assert sessions.forget("", name) == (here is not None)
                naive = [n for n in naive if n is not here]
        assert sessions.statistics().nodes == len(naive)
        assert sessions.statistics().tokens == sum(len(n.tokens) for n in naive)
        for says in range(1, 7):
            digest = content_digest((Message(None, "assistant", f"{says}"),))
            expected = {n.response_id for n in naive if n.content == digest}
            assert {n.response_id for n in sessions.find_content("", digest)} == expected


# --- one connection


def test_a_lane_remembers_its_latest_response_only() -> None:
    scope, a, b = ConnectionScope(), node("a", stored=False), node("b", stored=False)
    scope.remember(None, a)
    scope.remember("other", b)
    assert scope.find("", "resp_a") is a
    scope.remember(None, node("c"))
    assert scope.find("", "resp_a") is None
    assert scope.find("", "resp_b") is b
    assert scope.find("t", "resp_b") is None


def test_after_a_cancel_the_response_before_can_be_continued_too() -> None:
    scope, a, cut, more = ConnectionScope(), node("a"), node("cut"), node("more")
    scope.remember(None, a)
    scope.remember_cut(None, cut)
    scope.remember_cut(None, more)
    assert scope.find("", "resp_a") is a
    assert scope.find("", "resp_cut") is None
    assert scope.find("", "resp_more") is more
    scope.remember(None, node("b"))
    assert scope.find("", "resp_a") is None


def test_a_failed_turn_evicts_its_own_lanes_parent_and_no_forks() -> None:
    scope, a = ConnectionScope(), node("a")
    scope.remember(None, a)
    scope.failed("fork", "resp_a")
    scope.failed(None, "resp_else")
    scope.failed(None, None)
    assert scope.find("", "resp_a") is a
    scope.failed(None, "resp_a")
    assert scope.find("", "resp_a") is None


class Leases:
    def __init__(self) -> None:
        self.closed: list[LeaseId] = []

    def reclass(self, lease: LeaseId, to: SessionClass) -> None:
        assert to is SessionClass.CLOSED
        self.closed.append(lease)


def test_closing_a_connection_closes_the_leases_that_are_still_its_own() -> None:
    scope, engine = ConnectionScope(), Leases()
    scope.remember(None, node("a"))
    scope.leased(LeaseId(1), None)
    scope.leased(LeaseId(2), LeaseId(1))
    scope.leased(LeaseId(3), None)
    scope.close(engine)
    assert engine.closed == [2, 3]
    assert scope.find("", "resp_a") is None
    scope.close(engine)
    assert engine.closed == [2, 3]


def test_a_connection_with_many_branches_forgets_its_oldest_leases() -> None:
    scope, engine = ConnectionScope(), Leases()
    for lease in range(1000):
        scope.leased(LeaseId(lease), None)
    scope.close(engine)
    assert engine.closed == list(range(1000 - 256, 1000))


# --- manifests


ITEMS: tuple[Item, ...] = (
    Message(None, "user", "hé\ud800"),
    FunctionCall("fc_1", "call_1", "ls", '{"a": 1}', "fs"),
    FunctionCallOutput(None, "call_1", "bin"),
    Reasoning("rs_1", "hm", None),
)
TOOL = ToolSpec("ls", None, {"type": "object"}, None, "fs", ToolKind.CUSTOM)


def test_a_stored_node_survives_as_a_manifest() -> None:
    a = node("a", history=(Part(ITEMS), Part((ITEMS[1],), (4, 5))), tools=(TOOL,))
    a.lease = LeaseId(7)
    b = from_manifest(decode(encode(to_manifest(a))))
    assert b.lease is None
    assert b.labels == ("s",)
    for name in Node.__slots__:
        if name not in ("lease", "labels"):
            assert getattr(b, name) == getattr(a, name), name


def test_an_unstored_node_leaves_its_tokens_and_none_of_its_words() -> None:
    a = node("a", stored=False, history=(Part(ITEMS),))
    manifest = to_manifest(a)
    assert manifest.body == b""
    b = from_manifest(decode(encode(manifest)))
    assert (b.sampled, b.output, b.item_ids, b.content) == (a.sampled, (), a.item_ids, a.content)
    assert (b.tools, b.instructions, b.response, b.stored) == ((), None, None, False)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"version": 2}',
        b'{"version": 1, "history": [{"items": [{"kind": "Shell"}], "sampled": null}], "tools": []}',
        b'{"version": 1, "history": [{"items": [{"kind": "Message"}], "sampled": null}], "tools": []}',
        b'{"version": 1, "history": 3, "tools": []}',
        b'{"version": 1, "history": [], "tools": [{"kind": "none"}], "instructions": null, "response": null}',
    ],
)
def test_a_body_of_another_make_is_a_value_error(body: bytes) -> None:
    manifest = to_manifest(node("a"))
    with pytest.raises(ValueError, match=r".*"):
        from_manifest(
            type(manifest)(
                **{**{f: getattr(manifest, f) for f in type(manifest).__slots__}, "body": body}
            )
        )
