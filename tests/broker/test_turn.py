"""Turns against a fake engine: exact tokens, one terminal event, and what each kind of id is worth.

The fake's model depends on every id of its prompt, so an answer to a wrong prompt is a wrong answer.
"""

import itertools
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import trio
import trio.testing
from hypothesis import event, given, settings
from hypothesis import strategies as st

from broker.access import OPEN, Tenant
from broker.errors import BadRequest, ContextTooLong, NotFound, Overloaded, UnknownResponse
from broker.session import ConnectionScope, Sessions
from broker.turn import Cancellation, Outcome, run_turn
from broker.wire.requests import Transport, parse_create
from broker.wire.retention import Retention
from engine.api import FinishReason, RefuseReason
from engine.text import UnrenderableError
from tests.fakes import END, FakeService, byte_text, echoing_sum, saying
from tiers.manifest import decode, encode
from tiers.policy import SessionClass

TERMINAL = ("response.completed", "response.incomplete", "response.failed")
TOOLS = [{"type": "function", "name": "ls", "parameters": {"type": "object"}}]
CALL = 'Looking.\n<tool_call>\n{"name": "ls", "arguments": {"path": "/"}}\n</tool_call>'


class Ticks:
    """A wall clock that moves by a millisecond whenever it is read."""

    def __init__(self) -> None:
        self._now = 1_000.0

    def now(self) -> float:
        self._now += 0.001
        return self._now

    def leap(self) -> None:
        self._now += 60


@dataclass
class Desk:
    """One daemon's worth of state, and a client's connection to it."""

    engine: FakeService
    sessions: Sessions = field(default_factory=Sessions)
    connection: ConnectionScope = field(default_factory=ConnectionScope)
    tenant: Tenant = OPEN
    background: trio.Nursery | None = None
    retention: Retention = field(default_factory=Retention)
    clock: Ticks = field(default_factory=Ticks)
    events: list[dict[str, Any]] = field(default_factory=list)  # of the last turn
    ids: Any = field(default_factory=lambda: itertools.count(1))

    def reconnect(self) -> None:
        self.connection.close(self.engine)
        self.connection = ConnectionScope()

    def restart(self) -> None:
        """Memory is gone; what was persisted comes back as it would from disk."""
        self.reconnect()
        self.sessions = Sessions()
        self.engine.manifests = [decode(encode(m)) for m in self.engine.manifests]

    async def turn(self, cancellation: Cancellation | None = None, **body: Any) -> Outcome:
        self.events = events = []

        async def emit(event: dict[str, Any]) -> None:
            await trio.lowlevel.checkpoint()
            events.append(json.loads(json.dumps(event)))

        outcome = await run_turn(
            parse_create(body, transport=Transport.WEBSOCKET),
            engine=self.engine,
            sessions=self.sessions,
            connection=self.connection,
            tenant=self.tenant,
            emit=emit,
            clock=self.clock,
            new_id=lambda prefix: f"{prefix}_{next(self.ids):032x}",
            retention=self.retention,
            cancellation=cancellation,
        )
        if outcome.behind is not None:
            if self.background is None:
                await outcome.behind()
            else:
                self.background.start_soon(outcome.behind)
        kinds = [e["type"] for e in events]
        assert [e["sequence_number"] for e in events] == list(range(len(events)))
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert [k for k in kinds if k in TERMINAL] == [kinds[-1]]
        assert events[-1]["response"] == json.loads(json.dumps(outcome.response))
        return outcome

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.engine.submitted[-1].prompt


@pytest.fixture
async def desk():
    async with trio.open_nursery() as nursery:
        yield Desk(FakeService(nursery), background=nursery)
        nursery.cancel_scope.cancel()


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(outcome: Outcome) -> str:
    return "".join(
        p["text"]
        for item in outcome.response["output"]
        if item["type"] == "message"
        for p in item["content"]
    )


# --- one turn


async def test_a_turn_answers_and_reports_what_the_engine_measured(desk: Desk) -> None:
    outcome = await desk.turn(input="hi", instructions="be brief")
    expected = byte_text().encode(
        "<|start|>system\nbe brief<|end|>\n<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    )
    assert desk.prompt == expected
    assert said(outcome).encode() == bytes(echoing_sum(expected)[:-1])
    assert outcome.response["status"] == "completed"
    assert outcome.response["usage"]["input_tokens"] == len(expected)
    assert outcome.response["usage"]["output_tokens"] == 9
    assert outcome.response["usage"]["homeport:cached_by_tier"]["device"] == 0
    assert outcome.node is not None
    assert outcome.node.tokens == expected + echoing_sum(expected)


async def test_a_stored_response_is_durable_before_it_is_completed(desk: Desk) -> None:
    outcome = await desk.turn(input="hi")
    [manifest] = desk.engine.manifests
    assert manifest.response_id == outcome.response["id"]
    assert manifest.stored
    seen_at = []

    async def watch(event):
        if event["type"] in ("response.output_item.done", "response.completed"):
            seen_at.append(len(desk.engine.durable))

    await run_turn(
        parse_create({"input": "again"}, transport=Transport.HTTP),
        engine=desk.engine,
        sessions=desk.sessions,
        connection=ConnectionScope(),
        tenant=OPEN,
        emit=watch,
        clock=Ticks(),
        new_id=lambda prefix: f"{prefix}_x",
    )
    assert seen_at == [2, 2]


async def test_a_disk_that_refuses_costs_durability_and_not_the_turn(desk: Desk) -> None:
    for body in ({}, {"generate": False}):
        desk.engine.faults.persist = False
        taken = await desk.turn(input="hi", **body)
        assert (taken.durable, taken.response["homeport:stored"]) == (True, "disk")
        desk.engine.faults.persist = True
        outcome = await desk.turn(input="hi", **body)
        assert outcome.response["status"] == "completed"
        assert (outcome.durable, outcome.response["homeport:stored"]) == (False, "memory")
        assert outcome.node is not None
        assert outcome.node.response == outcome.response
        desk.reconnect()
        again = await desk.turn(input="more", previous_response_id=outcome.response["id"])
        assert again.response["status"] == "completed"
        unstored = await desk.turn(input="hi", store=False, **body)
        assert unstored.durable is None
        assert "homeport:stored" not in unstored.response


async def test_length_and_failure_end_as_what_they_are(desk: Desk) -> None:
    cut = await desk.turn(input="hi", max_output_tokens=3)
    assert cut.response["status"] == "incomplete"
    assert cut.response["incomplete_details"] == {"reason": "max_output_tokens"}
    desk.engine.faults.fail_after = 2
    failed = await desk.turn(input="hi")
    assert failed.node is None
    assert failed.response["status"] == "failed"
    assert failed.response["error"]["code"] == "server_error"
    assert desk.engine.leases[desk.engine.finished[-1].lease] is SessionClass.CLOSED
    assert len(desk.engine.manifests) == 1


async def test_max_output_tokens_beyond_the_context_is_clamped(desk: Desk) -> None:
    await desk.turn(input="hi", max_output_tokens=32_000)
    submit = desk.engine.submitted[-1]
    assert submit.sampling.max_tokens == desk.engine.max_context - len(submit.prompt)
    await desk.turn(input="hi")
    assert desk.engine.submitted[-1].sampling.max_tokens == submit.sampling.max_tokens


async def test_an_input_that_fills_the_context_is_refused_before_any_event(desk: Desk) -> None:
    fits = desk.engine.max_context - len(
        byte_text().encode("<|start|>user\n<|end|>\n<|start|>assistant\n")
    )
    outcome = await desk.turn(input="x" * (fits - 1))
    assert outcome.response["status"] == "incomplete"
    with pytest.raises(ContextTooLong):
        await desk.turn(input="x" * fits)
    assert desk.events == []


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        (RefuseReason.BUSY, Overloaded),
        (RefuseReason.STOPPING, Overloaded),
        (RefuseReason.CONTEXT, ContextTooLong),
        (RefuseReason.PROMPT, BadRequest),
    ],
)
async def test_what_the_engine_refuses_is_an_error_before_any_event(
    desk: Desk, reason: RefuseReason, error: type[Exception]
) -> None:
    desk.engine.faults.refuse = reason
    with pytest.raises(error):
        await desk.turn(input="hi")
    assert desk.events == []


async def test_sampling_parameters_reach_the_engine(desk: Desk) -> None:
    await desk.turn(input="hi", temperature=0, top_p=0.5, seed=7)
    sampling = desk.engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0, 0.5, 7)
    assert sampling.stop_ids == {END}
    await desk.turn(input="hi")
    sampling = desk.engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (1.0, 1.0, None)


async def test_text_in_many_bytes_comes_out_whole(desk: Desk) -> None:
    desk.engine.reply = saying("héllo 👋🏽")
    outcome = await desk.turn(input="hi")
    deltas = [e["delta"] for e in desk.events if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == said(outcome) == "héllo 👋🏽"
    assert "\ufffd" not in "".join(deltas)


async def test_a_character_cut_in_the_middle_is_shown_as_one(desk: Desk) -> None:
    desk.engine.reply = saying("h€")
    assert said(await desk.turn(input="hi", max_output_tokens=3)) == "h\ufffd"


async def test_a_stop_string_ends_the_turn_and_is_not_said(desk: Desk) -> None:
    desk.engine.reply = saying("one two three four" * 50)
    desk.engine.chunk = 5
    outcome = await desk.turn(input="hi", stop=["three"])
    assert outcome.response["status"] == "completed"
    assert said(outcome) == "one two "
    assert desk.engine.cancelled
    assert outcome.node is not None
    assert bytes(outcome.node.sampled) == b"one two three"


# --- what is kept, and for how long


async def test_the_time_that_is_asked_for_is_granted_up_to_the_most_and_reported(
    desk: Desk,
) -> None:
    desk.retention = Retention(default_s=60, max_s=3600)
    for body, seconds in (
        ({}, 60),
        ({"prompt_cache_options": {"ttl": "30m"}}, 1800),
        ({"prompt_cache_retention": "24h"}, 3600),
        ({"prompt_cache_retention": "24h", "generate": False}, 3600),
    ):
        outcome = await desk.turn(input="hi", **body)
        await trio.testing.wait_all_tasks_blocked()
        assert desk.engine.submitted[-1].keep_s == seconds
        assert outcome.response["homeport:cache"]["ttl_s"] == seconds
        assert desk.events[0]["response"]["homeport:cache"]["ttl_s"] == seconds
        for name in body.keys() - {"generate"}:
            assert outcome.response[name] == (
                {"mode": "implicit", **body[name]} if isinstance(body[name], dict) else body[name]
            )


async def test_every_computed_token_has_its_reason_in_the_usage(desk: Desk) -> None:
    usage = (await desk.turn(input="hi")).response["usage"]
    computed = usage["input_tokens"] - usage["input_tokens_details"]["cached_tokens"]
    assert sum(usage["homeport:recomputed"].values()) == computed
    assert usage["homeport:recomputed"]["logits"] == 1


async def test_a_call_on_an_open_socket_is_a_burst(desk: Desk) -> None:
    desk.engine.reply = saying(CALL, CALL, "Done.")
    for socket, waits_for in ((True, SessionClass.BURST), (False, SessionClass.TOOL_WAIT)):
        desk.connection = ConnectionScope(socket=socket)
        await desk.turn(input="look", tools=TOOLS)
        assert desk.engine.leases[desk.engine.finished[-1].lease] is waits_for
    desk.connection = ConnectionScope(socket=True)
    await desk.turn(input="look", tools=TOOLS)
    assert desk.engine.leases[desk.engine.finished[-1].lease] is SessionClass.HUMAN_WAIT


async def test_who_cancels_in_the_middle_of_a_call_is_a_human(desk: Desk) -> None:
    desk.engine.reply = saying('<tool_call>\n{"name": "ls", "arguments": {"path": "' + "a" * 500)
    cancellation = Cancellation()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _() -> None:
            while len(desk.events) < 20:
                await trio.lowlevel.checkpoint()
            cancellation.request()

        cut = await desk.turn(cancellation, input="look", tools=TOOLS)
    assert cut.response["output"][-1]["type"] == "function_call"
    assert desk.engine.leases[desk.engine.finished[-1].lease] is SessionClass.HUMAN_WAIT


# --- KV on its way before it is asked for


class Watching(FakeService):
    """Notes the order of looking, fetching and rendering."""

    order: ClassVar[list[str]] = []

    def prefetch(self, salt: bytes, prompt: tuple[int, ...]) -> None:
        self.order.append("prefetch")
        FakeService.prefetch(self, salt, prompt)


@pytest.fixture
async def watched(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk whose engine notes when it is told to fetch and when a prompt is rendered."""
    Watching.order.clear()
    desk.engine = Watching(desk.engine.nursery)
    render = type(desk.engine.text).prompt

    def watching(text: Any, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        Watching.order.append("render")
        return render(text, *args, **kwargs)

    monkeypatch.setattr(type(desk.engine.text), "prompt", watching)
    return desk


@pytest.mark.parametrize("again", ["reconnect", "restart"])
async def test_the_kv_of_a_named_response_is_on_its_way_before_anything_is_rendered(
    watched: Desk, again: str
) -> None:
    first = await watched.turn(input="hi")
    assert first.node is not None
    getattr(watched, again)()
    watched.clock.leap()
    Watching.order.clear()
    await watched.turn(input="more", previous_response_id=first.response["id"])
    assert Watching.order == ["prefetch", "render"]
    assert watched.engine.prefetched == [first.node.tokens]


async def test_the_kv_of_a_prompt_cache_key_is_on_its_way_before_anything_is_rendered(
    watched: Desk,
) -> None:
    first = await watched.turn(input="hi", prompt_cache_key="thread")
    watched.clock.leap()
    second = await watched.turn(input="ho", prompt_cache_key="thread")
    assert first.node is not None
    assert second.node is not None
    watched.reconnect()
    watched.clock.leap()
    Watching.order.clear()
    history = [user("ho"), *second.response["output"], user("so?")]
    await watched.turn(input=history, prompt_cache_key="thread")
    assert Watching.order == ["prefetch", "render"]
    # That of the second turn alone, though the key and the history both name it.
    assert watched.engine.prefetched == [first.node.tokens, second.node.tokens]


async def test_the_kv_of_a_prompt_cache_key_is_found_after_a_restart(watched: Desk) -> None:
    first = await watched.turn(input="hi", prompt_cache_key="thread", store=False)
    assert first.node is not None
    watched.restart()
    Watching.order.clear()
    await watched.turn(input="something else", prompt_cache_key="thread")
    assert Watching.order == ["prefetch", "render"]
    assert watched.engine.prefetched == [first.node.tokens]


async def test_a_history_without_any_name_fetches_what_it_is_recognised_by(watched: Desk) -> None:
    first = await watched.turn(input="hi")
    assert first.node is not None
    watched.restart()
    Watching.order.clear()
    history = [user("hi"), *map(stripped, first.response["output"]), user("more")]
    await watched.turn(input=history)
    assert Watching.order == ["prefetch", "render"]
    assert watched.engine.prefetched == [first.node.tokens]


async def test_an_agent_in_a_loop_asks_for_nothing_ahead(desk: Desk) -> None:
    first = await desk.turn(input="hi", prompt_cache_key="thread")
    await desk.turn(
        input="more", prompt_cache_key="thread", previous_response_id=first.response["id"]
    )
    assert desk.engine.prefetched == []


async def test_another_tenants_key_fetches_nothing(watched: Desk) -> None:
    await watched.turn(input="hi", prompt_cache_key="thread")
    watched.clock.leap()
    watched.tenant = Tenant("t2", b"salt2")
    await watched.turn(input="hi", prompt_cache_key="thread")
    assert watched.engine.prefetched == []


# --- where a prompt left its session's


async def test_a_prompt_that_goes_on_does_not_diverge(desk: Desk) -> None:
    first = await desk.turn(input="hi", instructions="be brief", tools=TOOLS)
    same = {"instructions": "be brief", "tools": TOOLS}
    by_id = await desk.turn(input="a", previous_response_id=first.response["id"], **same)
    history = [user("hi"), *first.response["output"], user("b")]
    replayed = await desk.turn(input=history, **same)
    for outcome in (first, by_id, replayed):
        assert outcome.response["homeport:cache"] == {"ttl_s": 0}


@pytest.mark.parametrize("way", ["id", "replay"])
@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"instructions": "It is 12:05."}, "instructions"),
        ({"tools": [{"type": "function", "name": "rm"}]}, "tools"),
        ({"instructions": "x", "tools": [{"type": "function", "name": "rm"}]}, "instructions"),
    ],
)
async def test_changed_instructions_and_tools_are_named(
    desk: Desk, way: str, changed: dict[str, Any], part: str
) -> None:
    same = {"instructions": "It is 12:04.", "tools": TOOLS}
    first = await desk.turn(input="hi", **same)
    assert first.node is not None
    if way == "id":
        body = {"input": "more", "previous_response_id": first.response["id"]}
    else:
        body = {"input": [user("hi"), *first.response["output"], user("more")]}
    second = await desk.turn(**body, **(same | changed))
    cache = second.response["homeport:cache"]
    assert cache["part"] == part
    at = cache["diverged_at"]
    assert desk.prompt[:at] == first.node.tokens[:at]
    assert desk.prompt[at] != first.node.tokens[at]
    assert desk.events[0]["response"]["homeport:cache"] == cache


async def test_a_rewritten_item_is_named_by_its_place(desk: Desk) -> None:
    asked = [user("one"), user("two")]
    first = await desk.turn(input=asked, prompt_cache_key="thread")
    answer = {"role": "assistant", "content": "something else"}
    second = await desk.turn(input=[*asked, answer, user("three")], prompt_cache_key="thread")
    assert second.response["homeport:cache"]["part"] == "input[2]"
    rewritten = [user("one"), user("TWO"), *first.response["output"], user("three")]
    third = await desk.turn(input=rewritten)
    assert third.response["homeport:cache"]["part"] == "input[1]"


async def test_items_are_counted_as_the_client_sent_them(desk: Desk) -> None:
    """An answer of two items is one part of the prompt; what comes behind it keeps its own number."""
    desk.engine.reply = saying(CALL, "Done.")
    first = await desk.turn(input="look", tools=TOOLS)
    message, call = first.response["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "bin"}
    history = [user("look"), message, call, result]
    second = await desk.turn(input=history, tools=TOOLS)
    history[3] = {**result, "output": "rewritten"}
    last = await desk.turn(input=[*history, *second.response["output"], user("b")], tools=TOOLS)
    assert last.response["homeport:cache"]["part"] == "input[3]"


async def test_a_compacted_history_is_compared_with_its_sessions_last_turn(desk: Desk) -> None:
    first = await desk.turn(
        input=[{"role": "developer", "content": "base"}, user("hi")], prompt_cache_key="thread"
    )
    assert first.node is not None
    desk.reconnect()
    compacted = [{"role": "developer", "content": "base"}, user("Summary: we said hi.")]
    second = await desk.turn(input=compacted, prompt_cache_key="thread")
    assert second.response["homeport:cache"]["part"] == "input[1]"
    other = await desk.turn(input=compacted, prompt_cache_key="another")
    assert other.response["homeport:cache"] == {"ttl_s": 0}


async def test_a_template_that_takes_whole_conversations_only_names_the_input(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UnrenderableError("roles must alternate")

    await desk.turn(input="hi", prompt_cache_key="thread")
    monkeypatch.setattr(type(desk.engine.text), "prefix", refuse)
    second = await desk.turn(input="ho", prompt_cache_key="thread")
    assert second.response["homeport:cache"]["part"] == "input"


# --- continuing


async def test_a_continuation_feeds_the_exact_tokens_and_a_suffix(desk: Desk) -> None:
    first = await desk.turn(input="hi")
    assert first.node is not None
    second = await desk.turn(input="more", previous_response_id=first.response["id"])
    suffix = byte_text().encode("\n<|start|>user\nmore<|end|>\n<|start|>assistant\n")
    assert desk.prompt == first.node.tokens + suffix
    assert second.response["usage"]["input_tokens_details"]["cached_tokens"] == len(
        first.node.tokens
    )


async def test_a_continuation_supersedes_its_parents_lease_once(desk: Desk) -> None:
    first = await desk.turn(input="hi")
    lease = desk.engine.finished[-1].lease
    await desk.turn(input="a", previous_response_id=first.response["id"])
    assert desk.engine.submitted[-1].supersedes == lease
    await desk.turn(input="b", previous_response_id=first.response["id"])
    assert desk.engine.submitted[-1].supersedes is None


async def test_a_refused_continuation_leaves_the_parents_lease_to_the_next(desk: Desk) -> None:
    first = await desk.turn(input="hi")
    lease = desk.engine.finished[-1].lease
    desk.engine.faults.refuse = RefuseReason.BUSY
    with pytest.raises(Overloaded):
        await desk.turn(input="a", previous_response_id=first.response["id"])
    desk.engine.faults.refuse = None
    await desk.turn(input="a", previous_response_id=first.response["id"])
    assert desk.engine.submitted[-1].supersedes == lease


async def test_instructions_are_not_inherited_and_tools_are(desk: Desk) -> None:
    first = await desk.turn(input="hi", instructions="be brief", tools=TOOLS)
    assert first.node is not None
    with_both = desk.prompt
    second = await desk.turn(
        input="more", instructions="be brief", previous_response_id=first.response["id"]
    )
    assert desk.prompt[: len(first.node.tokens)] == first.node.tokens
    assert second.node is not None
    assert second.node.tools == first.node.tools != ()
    await desk.turn(input="more", previous_response_id=first.response["id"])
    rendered = byte_text().decode(desk.prompt)
    assert "be brief" not in rendered
    assert "# Tools" in rendered
    assert desk.prompt[:20] != with_both[:20]
    # What was sampled is spliced even into a prompt that is rendered anew.
    assert bytes(first.node.sampled[:-1]) in bytes(t for t in desk.prompt if t < 256)
    await desk.turn(
        input="more",
        instructions="be brief",
        tools=[*TOOLS, {"type": "function", "name": "rm"}],
        previous_response_id=first.response["id"],
    )
    assert '"rm"' in byte_text().decode(desk.prompt)


async def test_tool_calls_come_out_as_items_and_results_go_back_in(desk: Desk) -> None:
    desk.engine.reply = saying(CALL, "Done.")
    first = await desk.turn(input="look", tools=TOOLS)
    message, call = first.response["output"]
    assert message["content"][0]["text"].strip() == "Looking."
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call",
        "ls",
        {"path": "/"},
    )
    assert desk.engine.leases[desk.engine.finished[-1].lease] is SessionClass.TOOL_WAIT
    second = await desk.turn(
        input=[{"type": "function_call_output", "call_id": call["call_id"], "output": "bin"}],
        previous_response_id=first.response["id"],
    )
    assert said(second) == "Done."
    assert desk.engine.leases[desk.engine.finished[-1].lease] is SessionClass.HUMAN_WAIT
    assert (
        byte_text()
        .decode(desk.prompt)
        .endswith(
            "<tool_response>\nbin\n</tool_response>\nassistant\n".replace(
                "\nassistant", "\nassistant"
            )
        )
    )


async def test_without_tools_or_with_choice_none_markup_is_text(desk: Desk) -> None:
    desk.engine.reply = saying(CALL)
    for body in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        outcome = await desk.turn(input="look", **body)
        assert said(outcome) == CALL


async def test_a_result_for_an_unknown_call_is_refused(desk: Desk) -> None:
    first = await desk.turn(input="look", tools=TOOLS)
    for extra in ({}, {"previous_response_id": first.response["id"]}):
        with pytest.raises(BadRequest) as caught:
            await desk.turn(
                input=[{"type": "function_call_output", "call_id": "call_nope", "output": "x"}],
                **extra,
            )
        assert caught.value.param == "input"
        assert "call_nope" in caught.value.message


# --- what an id is worth


async def test_unstored_ids_live_and_die_with_their_connection(desk: Desk) -> None:
    first = await desk.turn(input="hi", store=False)
    second = await desk.turn(input="more", store=False, previous_response_id=first.response["id"])
    with pytest.raises(UnknownResponse):  # only the latest
        await desk.turn(input="x", store=False, previous_response_id=first.response["id"])
    await desk.turn(input="y", store=False, previous_response_id=second.response["id"])
    third = await desk.turn(input="z", store=False)
    desk.reconnect()
    with pytest.raises(UnknownResponse) as gone:
        await desk.turn(input="more", previous_response_id=third.response["id"])
    with pytest.raises(UnknownResponse) as never:
        await desk.turn(input="more", previous_response_id="resp_never")
    assert gone.value.message.replace(third.response["id"], "resp_never") == never.value.message


async def test_stored_ids_answer_from_other_connections_and_after_a_restart(desk: Desk) -> None:
    first = await desk.turn(input="hi", tools=TOOLS, instructions="be brief")
    assert first.node is not None
    for again in (desk.reconnect, desk.restart):
        again()
        await desk.turn(
            input="more", instructions="be brief", previous_response_id=first.response["id"]
        )
        assert desk.prompt[: len(first.node.tokens)] == first.node.tokens


async def test_another_tenants_id_is_an_unknown_id(desk: Desk) -> None:
    first = await desk.turn(input="hi")
    desk.tenant = Tenant("t2", b"salt2")
    with pytest.raises(UnknownResponse):
        await desk.turn(input="more", previous_response_id=first.response["id"])
    desk.restart()
    with pytest.raises(UnknownResponse):
        await desk.turn(input="more", previous_response_id=first.response["id"])
    await desk.turn(input="hi")
    assert desk.engine.submitted[-1].salt == b"salt2"


async def test_a_failed_continuation_evicts_its_parent(desk: Desk) -> None:
    first = await desk.turn(input="hi", store=False)
    desk.engine.faults.refuse = RefuseReason.BUSY
    with pytest.raises(Overloaded):
        await desk.turn(
            input="a", store=False, stream_id="fork", previous_response_id=first.response["id"]
        )
    desk.engine.faults.refuse = None
    await desk.turn(
        input="b", store=False, stream_id="fork", previous_response_id=first.response["id"]
    )
    desk.engine.faults.fail_after = 1
    failed = await desk.turn(input="c", store=False, previous_response_id=first.response["id"])
    assert failed.response["status"] == "failed"
    desk.engine.faults.fail_after = None
    with pytest.raises(UnknownResponse):
        await desk.turn(input="d", store=False, previous_response_id=first.response["id"])
    second = await desk.turn(input="hi", store=False)
    desk.engine.faults.refuse = RefuseReason.BUSY
    with pytest.raises(Overloaded):
        await desk.turn(input="e", store=False, previous_response_id=second.response["id"])
    desk.engine.faults.refuse = None
    with pytest.raises(UnknownResponse):
        await desk.turn(input="e", store=False, previous_response_id=second.response["id"])


async def test_a_closed_connection_closes_its_leases(desk: Desk) -> None:
    first = await desk.turn(input="hi")
    await desk.turn(input="more", previous_response_id=first.response["id"])
    desk.reconnect()
    assert list(desk.engine.leases.values()) == [SessionClass.CLOSED]


# --- replays


def stripped(item: dict[str, Any]) -> dict[str, Any]:
    """As clients that keep no ids replay it."""
    return {k: v for k, v in item.items() if k not in ("id", "status")}


def called_bare(item: dict[str, Any]) -> dict[str, Any]:
    """As clients of an API that has ids for calls only, and sends arguments as JSON values, repeat it."""
    bare = stripped(item)
    if bare.get("type") == "function_call":
        bare["arguments"] = json.dumps(json.loads(bare["arguments"]), indent=1, sort_keys=True)
    return bare


@given(data=st.data())
@settings(max_examples=60)
async def test_a_replay_finds_the_tokens_of_an_uninterrupted_chain(data: st.DataObject) -> None:
    """Whatever was stored, forgotten or stripped, and whichever way each turn continues: the same exact prompt."""
    replies = st.sampled_from(["fine", "fine", "two <|end|> words", CALL, " spaced ", "👋"])
    async with trio.open_nursery() as nursery:
        desk = Desk(FakeService(nursery))
        fixed = {"instructions": "be brief", "tools": TOOLS, "store": data.draw(st.booleans())}
        history: list[dict[str, Any]] = []
        tokens: tuple[int, ...] = ()
        outcome: Outcome | None = None
        for number in range(data.draw(st.integers(1, 4))):
            desk.engine.reply = saying(data.draw(replies))
            delta: list[dict[str, Any]] = [user(f"turn {number}")]
            if outcome is not None and outcome.response["output"][-1]["type"] == "function_call":
                call_id = outcome.response["output"][-1]["call_id"]
                delta.insert(
                    0, {"type": "function_call_output", "call_id": call_id, "output": "bin"}
                )
            way = (
                "replay"
                if outcome is None
                else data.draw(st.sampled_from(["id", "replay", "bare", "called", "restart"]))
            )
            event(way)
            limits = {"max_output_tokens": 5} if data.draw(st.booleans()) and number % 2 else {}
            if way == "id" and outcome is not None:
                body = {"input": delta, "previous_response_id": outcome.response["id"]}
            else:
                if way == "restart":
                    desk.restart()
                as_sent = {"bare": stripped, "called": called_bare}.get(way, dict)
                past = [as_sent(item) for item in history]
                body = {"input": [*past, *delta]}
            outcome = await desk.turn(**body, **fixed, **limits)
            assert outcome.node is not None
            assert desk.prompt[: len(tokens)] == tokens
            tokens = outcome.node.tokens
            history += [*delta, *outcome.response["output"]]
        nursery.cancel_scope.cancel()


async def test_the_ids_decide_and_not_the_json_that_comes_with_them(desk: Desk) -> None:
    first = await desk.turn(input="hi")
    assert first.node is not None
    [item] = first.response["output"]
    item = {**item, "content": [{"type": "output_text", "text": "rewritten by the client"}]}
    await desk.turn(input=[user("hi"), item, user("more")])
    assert desk.prompt[: len(first.node.tokens)] == first.node.tokens
    assert desk.engine.submitted[-1].supersedes == desk.engine.finished[0].lease


async def test_an_output_cut_up_by_the_client_is_spliced_once(desk: Desk) -> None:
    two = CALL + CALL.removeprefix("Looking.")
    desk.engine.reply = saying(two, "ok")
    first = await desk.turn(input="hi", tools=TOOLS)
    assert first.node is not None
    message, one, other = first.response["output"]

    def result(call):
        return {"type": "function_call_output", "call_id": call["call_id"], "output": call["id"]}

    await desk.turn(
        input=[user("hi"), message, one, result(one), other, result(other)], tools=TOOLS
    )
    assert desk.prompt[: len(first.node.tokens)] == first.node.tokens
    rendered = byte_text().decode(desk.prompt)
    assert rendered.count("Looking.") == 1
    assert rendered.count("<tool_response>") == 2


@pytest.mark.parametrize(
    "said",
    [
        CALL,
        CALL + CALL.removeprefix("Looking."),
        CALL + " Between. " + CALL.removeprefix("Looking."),
        CALL.removeprefix("Looking."),
    ],
)
@pytest.mark.parametrize("rewritten", [False, True])
@pytest.mark.parametrize("restart", [False, True])
async def test_what_was_said_beside_a_call_belongs_to_the_response_that_made_it(
    desk: Desk, said: str, rewritten: bool, restart: bool
) -> None:
    desk.engine.reply = saying(said, "ok")
    first = await desk.turn(input="hi", tools=TOOLS, store=not rewritten or not restart)
    assert first.node is not None
    output = [called_bare(item) for item in first.response["output"]]
    if rewritten and not restart:  # without the items that it said, only the whole is recognised
        for item in output:
            if item["type"] == "message":
                item["content"] = "something else"
    if restart:
        desk.restart()
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "bin"}
        for item in output
        if item["type"] == "function_call"
    ]
    await desk.turn(input=[user("hi"), *output, *results], tools=TOOLS)
    assert desk.prompt[: len(first.node.tokens)] == first.node.tokens
    rendered = byte_text().decode(desk.prompt)
    assert rendered.count("Looking.") == said.count("Looking.")
    assert "something else" not in rendered


async def test_a_strangers_words_before_a_call_stay_the_clients(desk: Desk) -> None:
    """Two answers one after the other, the first of another server: only the second is ours."""
    desk.engine.reply = saying(CALL, "ok")
    first = await desk.turn(input="hi", tools=TOOLS)
    output = [called_bare(item) for item in first.response["output"]]
    result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "bin"}
    other = {"role": "assistant", "content": "From elsewhere."}
    second = await desk.turn(input=[user("hi"), other, *output, result], tools=TOOLS)
    rendered = byte_text().decode(desk.prompt)
    assert rendered.count("From elsewhere.") == rendered.count("Looking.") == 1
    assert second.node is not None
    assert first.node is not None
    assert [part.sampled for part in second.node.history[1:3]] == [None, first.node.sampled]


async def test_tools_that_only_are_sorted_anew_stay_the_prompt_that_they_were(desk: Desk) -> None:
    tools = [
        {"type": "function", "name": "a", "parameters": {"type": "object", "properties": {}}},
        {"type": "function", "name": "b", "description": "B.", "strict": True},
    ]
    resorted = [
        {"strict": None, "description": "B.", "name": "b", "type": "function"},
        {"parameters": {"properties": {}, "type": "object"}, "name": "a", "type": "function"},
    ]
    first = await desk.turn(input="hi", tools=tools)
    assert first.node is not None
    by_id = await desk.turn(input="more", tools=resorted, previous_response_id=first.response["id"])
    assert by_id.node is not None
    assert desk.prompt[: len(first.node.tokens)] == first.node.tokens
    assert "part" not in by_id.response["homeport:cache"]
    said = [user("hi"), *map(stripped, first.response["output"])]
    await desk.turn(input=[*said, user("again")], tools=resorted)
    assert desk.prompt[: len(first.node.tokens)] == first.node.tokens
    changed = await desk.turn(input=[*said, user("again")], tools=resorted[:1])
    assert changed.response["homeport:cache"]["part"] == "tools"


async def test_references_stand_for_stored_items(desk: Desk) -> None:
    first = await desk.turn(input="hi")
    assert first.node is not None
    [item] = first.response["output"]
    reference = {"type": "item_reference", "id": item["id"]}
    await desk.turn(input=[user("hi"), reference, user("more")])
    assert desk.prompt[: len(first.node.tokens)] == first.node.tokens
    desk.restart()
    await desk.turn(input=[user("hi"), reference, user("more")])
    assert desk.prompt[: len(first.node.tokens)] == first.node.tokens
    unstored = await desk.turn(input="hi", store=False)
    for gone in ("msg_never", unstored.response["output"][0]["id"]):
        with pytest.raises(NotFound) as caught:
            await desk.turn(input=[user("hi"), {"type": "item_reference", "id": gone}])
        assert (caught.value.status, caught.value.param) == (404, "input")


async def test_a_reference_to_a_call_makes_its_result_known(desk: Desk) -> None:
    desk.engine.reply = saying(CALL, "ok")
    first = await desk.turn(input="hi", tools=TOOLS)
    references = [{"type": "item_reference", "id": item["id"]} for item in first.response["output"]]
    call_id = first.response["output"][-1]["call_id"]
    result = {"type": "function_call_output", "call_id": call_id, "output": "bin"}
    second = await desk.turn(input=[user("hi"), *references, result], tools=TOOLS)
    assert second.node is not None
    assert [item["id"] for item in first.response["output"]] == [
        i.id for i in second.node.history[1].items
    ]


async def test_a_replay_of_what_was_not_stored_is_stored_in_the_clients_words(desk: Desk) -> None:
    first = await desk.turn(input="hi", store=False)
    desk.restart()
    second = await desk.turn(input=[user("hi"), *first.response["output"], user("more")])
    assert second.node is not None
    [item] = second.node.history[1].items
    assert item.text == said(first)


async def test_a_continuation_may_bring_an_answer_of_another_chain(desk: Desk) -> None:
    first = await desk.turn(input="hi")
    other = await desk.turn(input="ho")
    assert first.node is not None
    assert other.node is not None
    await desk.turn(
        input=[user("ho"), *other.response["output"], user("so?")],
        previous_response_id=first.response["id"],
    )
    suffix = byte_text().encode("\n<|start|>user\nho<|end|>\n<|start|>assistant\n")
    end = byte_text().encode("\n<|start|>user\nso?<|end|>\n<|start|>assistant\n")
    assert desk.prompt == first.node.tokens + suffix + other.node.sampled + end


async def test_of_two_that_say_the_same_the_one_that_was_asked_this_is_spliced(desk: Desk) -> None:
    """One text may be sampled in different ids; here, bytes that both show as U+FFFD."""
    nodes = []
    for question, byte in (("a", 0x80), ("b", 0xFF)):
        desk.engine.reply = lambda _, byte=byte: (byte, END)
        nodes.append((await desk.turn(input=question)).node)
    assert nodes[0].content == nodes[1].content
    answer = {"role": "assistant", "content": "\ufffd"}
    for question, node in zip("ab", nodes, strict=True):
        await desk.turn(input=[user(question), answer, user("c")])
        assert desk.prompt[: len(node.tokens)] == node.tokens
    await desk.turn(input=[user("else"), answer, user("c")])
    assert 0xFF in desk.prompt


async def test_what_was_never_said_here_is_rendered_from_its_json(desk: Desk) -> None:
    history = [
        user("look"),
        {"role": "assistant", "content": "Looking."},
        {"type": "function_call", "call_id": "c1", "name": "ls", "arguments": '{"path": "/"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "bin"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "developer", "content": "hurry"},
    ]
    await desk.turn(input=history)
    assert byte_text().decode(desk.prompt) == byte_text().decode(
        byte_text().encode(
            f"<|start|>user\nlook<|end|>\n<|start|>assistant\n{CALL}<|end|>\n<|start|>user\n<tool_response>\nbin\n"
            "</tool_response><|end|>\n<|start|>system\nhurry<|end|>\n<|start|>assistant\n"
        )
    )


async def test_a_manifest_that_cannot_be_read_is_as_good_as_absent(desk: Desk) -> None:
    first = await desk.turn(input="hi")
    desk.restart()
    [manifest] = desk.engine.manifests
    fields = {name: getattr(manifest, name) for name in type(manifest).__slots__}
    desk.engine.manifests = [type(manifest)(**{**fields, "body": b"{"})]
    with pytest.raises(UnknownResponse):
        await desk.turn(input="more", previous_response_id=first.response["id"])


# --- warming up


async def test_a_warm_up_is_acknowledged_at_once_and_prefills_behind(desk: Desk) -> None:
    desk.engine.hold()
    warm = await desk.turn(
        input=[{"role": "developer", "content": "base"}], generate=False, store=False
    )
    assert [e["type"] for e in desk.events] == [
        "response.created",
        "response.in_progress",
        "response.completed",
    ]
    assert warm.response["output"] == []
    await trio.testing.wait_all_tasks_blocked()
    [submit] = desk.engine.submitted
    assert submit.sampling.max_tokens == 0
    assert desk.engine.finished == []
    desk.engine.go()
    await trio.testing.wait_all_tasks_blocked()
    lease = desk.engine.finished[-1].lease
    turn = await desk.turn(input="hi", store=False, previous_response_id=warm.response["id"])
    assert desk.prompt[: len(submit.prompt)] == submit.prompt
    assert desk.engine.submitted[-1].supersedes == lease
    assert turn.response["usage"]["input_tokens_details"]["cached_tokens"] == len(submit.prompt)


async def test_a_turn_waits_for_the_prefill_it_continues(
    desk: Desk, autojump_clock: trio.testing.MockClock
) -> None:
    desk.engine.hold()
    warm = await desk.turn(input=[{"role": "developer", "content": "base"}], generate=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: desk.turn(input="hi", previous_response_id=warm.response["id"]))
        await trio.sleep(25)
        assert len(desk.engine.submitted) == 1
        kinds = [e["type"] for e in desk.events]
        assert kinds == [
            "response.created",
            "response.in_progress",
            "response.in_progress",
            "response.in_progress",
        ]
        desk.engine.go()
    assert len(desk.engine.submitted) == 2
    assert desk.events[-1]["type"] == "response.completed"
    assert desk.connection.warming == {}


async def test_a_warm_up_without_a_nursery_is_prefilled_first(desk: Desk) -> None:
    desk.background = None
    await desk.turn(input="hi", generate=False)
    assert [f.reason for f in desk.engine.finished] == [FinishReason.LENGTH]


async def test_a_warm_up_of_nothing_asks_the_engine_for_nothing(desk: Desk) -> None:
    warm = await desk.turn(input=[], generate=False)
    assert desk.engine.submitted == []
    again = await desk.turn(input="hi", previous_response_id=warm.response["id"])
    assert again.response["status"] == "completed"


async def test_a_warm_up_in_the_middle_of_a_chain_changes_no_prompt(desk: Desk) -> None:
    first = await desk.turn(input="hi")
    assert first.node is not None
    await desk.turn(input="more", previous_response_id=first.response["id"])
    straight = desk.prompt
    warm = await desk.turn(input="more", previous_response_id=first.response["id"], generate=False)
    await trio.testing.wait_all_tasks_blocked()
    assert straight[: len(desk.prompt)] == desk.prompt
    assert len(desk.engine.leases) == 2
    await desk.turn(input=[], previous_response_id=warm.response["id"])
    assert desk.prompt == straight


# --- waiting, cancelling, leaving


async def test_a_silent_engine_does_not_make_a_silent_server(
    desk: Desk, autojump_clock: trio.testing.MockClock
) -> None:
    desk.engine.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: desk.turn(input="hi"))
        await trio.sleep(35)
        assert [e["type"] for e in desk.events] == ["response.created"] + [
            "response.in_progress"
        ] * 4
        desk.engine.go()
    assert desk.events[-1]["type"] == "response.completed"


async def test_a_cancelled_turn_is_incomplete_and_can_be_continued(desk: Desk) -> None:
    before = await desk.turn(input="hi", store=False)
    cancellation = Cancellation()
    desk.engine.reply = saying("a" * 500)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _() -> None:
            while len(desk.events) < 20:
                await trio.lowlevel.checkpoint()
            assert cancellation.response_id == desk.events[0]["response"]["id"]
            cancellation.request()

        cut = await desk.turn(
            cancellation, input="more", store=False, previous_response_id=before.response["id"]
        )
    assert cut.response["status"] == "incomplete"
    assert cut.response["incomplete_details"] == {"reason": "cancelled"}
    assert 0 < len(said(cut)) < 500
    assert cut.node is not None
    desk.engine.reply = echoing_sum
    await desk.turn(
        input="go on", store=False, stream_id="fork", previous_response_id=cut.response["id"]
    )
    assert desk.prompt[: len(cut.node.tokens)] == cut.node.tokens
    await desk.turn(input="or else", store=False, previous_response_id=before.response["id"])


async def test_a_cancellation_before_the_turn_began_counts(desk: Desk) -> None:
    cancellation = Cancellation()
    cancellation.request()
    desk.engine.reply = saying("a" * 500)
    outcome = await desk.turn(cancellation, input="hi")
    assert outcome.response["incomplete_details"] == {"reason": "cancelled"}


async def test_a_client_that_leaves_takes_its_generation_with_it(desk: Desk) -> None:
    desk.engine.reply = saying("a" * 500)
    with trio.CancelScope() as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: desk.turn(input="hi"))
            while len(desk.events) < 20:
                await trio.lowlevel.checkpoint()
            client.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert [f.reason for f in desk.engine.finished] == [FinishReason.CANCELLED]
    assert desk.engine.manifests == []
