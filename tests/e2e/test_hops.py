"""One session, any API: a conversation that changes its API on every turn computes what is new, and hardly more.

Every turn is a full replay in the next API's own words: Messages and Chat have no ids to go on from, so what a client
repeats must lead back to the tokens that were sampled, whoever heard them first.
"""

import json
from dataclasses import dataclass, field
from itertools import cycle, islice

import pytest
import trio

from broker.bench.client import Socket, call, http_turn
from broker.bench.workload import filler

TURNS = 12
OUTPUT_TOKENS = 16
SYSTEM = "You are an agent. Session 77077.\n" + filler(300, "hops")
PARAMETERS = {
    "type": "object",
    "properties": {"path": {"type": "string", "maxLength": 8}},
    "required": ["path"],
    "additionalProperties": False,
}
NAME, PURPOSE = "read_file", "Read a file of the project."


@dataclass(frozen=True)
class Call:
    id: str
    arguments: str


@dataclass
class Said:
    """What a model answered, whichever API said it, with that API's own counts."""

    text: str
    calls: list[Call]
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int  # as the API counts them
    by_tier: dict[str, int]


@dataclass
class Heard:
    """What the client said: a text, or the result of each call before it."""

    text: str
    forced: bool  # the answer must be a call


@dataclass
class Conversation:
    """In turns of (Heard, Said)."""

    turns: list[tuple[Heard, Said]] = field(default_factory=list)

    def results(self, heard, at):
        """[(call, result)] that `heard`, the turn at this place, answers the calls before it with."""
        before = self.turns[at - 1][1].calls if at else []
        return [(one, heard.text) for one in before]


def walk(conversation, heard):
    """(Heard, results, Said or None), turn by turn."""
    for at, (asked, said) in enumerate(conversation.turns):
        yield asked, conversation.results(asked, at), said
    yield heard, conversation.results(heard, len(conversation.turns)), None


def responses_body(conversation, heard):
    items = []
    for asked, results, said in walk(conversation, heard):
        items += [
            {"type": "function_call_output", "call_id": one.id, "output": text}
            for one, text in results
        ] or [{"role": "user", "content": asked.text}]
        if said is not None:
            items += [{"role": "assistant", "content": said.text}] if said.text else []
            items += [
                {"type": "function_call", "call_id": c.id, "name": NAME, "arguments": c.arguments}
                for c in said.calls
            ]
    return {
        "instructions": SYSTEM,
        "input": items,
        "tools": [
            {"type": "function", "name": NAME, "description": PURPOSE, "parameters": PARAMETERS}
        ],
        "tool_choice": "required" if heard.forced else "auto",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_output_tokens": 48 if heard.forced else OUTPUT_TOKENS,
        "store": False,
    }


def from_response(turn):
    response = turn.response
    texts = [
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    ]
    calls = [
        Call(i["call_id"], i["arguments"])
        for i in response["output"]
        if i["type"] == "function_call"
    ]
    return Said(
        "".join(texts),
        calls,
        turn.prompt_tokens,
        turn.output_tokens,
        turn.cached_tokens,
        turn.by_tier,
    )


async def over_websocket(url, conversation, heard):
    async with trio.open_nursery() as nursery:
        socket = await Socket.open(nursery, url)
        turn = await socket.turn(responses_body(conversation, heard))
        await socket.cut()
        nursery.cancel_scope.cancel()
    return from_response(turn)


async def over_http(url, conversation, heard):
    body = responses_body(conversation, heard)
    return from_response(await trio.to_thread.run_sync(http_turn, url, body))


async def over_messages(url, conversation, heard):
    messages = []
    for asked, results, said in walk(conversation, heard):
        content = [
            {"type": "tool_result", "tool_use_id": one.id, "content": text} for one, text in results
        ] or asked.text
        messages.append({"role": "user", "content": content})
        if said is not None:
            blocks = [{"type": "text", "text": said.text}] if said.text else []
            blocks += [
                {"type": "tool_use", "id": c.id, "name": NAME, "input": json.loads(c.arguments)}
                for c in said.calls
            ]
            messages.append({"role": "assistant", "content": blocks})
    body = {
        "model": "smollm2-135m-instruct",
        "system": SYSTEM,
        "messages": messages,
        "tools": [{"name": NAME, "description": PURPOSE, "input_schema": PARAMETERS}],
        "tool_choice": {
            "type": "any" if heard.forced else "auto",
            "disable_parallel_tool_use": True,
        },
        "temperature": 0,
        "max_tokens": 48 if heard.forced else OUTPUT_TOKENS,
        "cache_control": {"type": "ephemeral"},
    }
    message = await trio.to_thread.run_sync(call, "POST", url, "/v1/messages", body)
    usage = message["usage"]
    read, written = usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]
    return Said(
        "".join(block["text"] for block in message["content"] if block["type"] == "text"),
        [
            Call(block["id"], json.dumps(block["input"]))
            for block in message["content"]
            if block["type"] == "tool_use"
        ],
        read + written + usage["input_tokens"],
        usage["output_tokens"],
        read,
        usage["homeport:cached_by_tier"],
    )


async def over_chat(url, conversation, heard):
    messages = [{"role": "system", "content": SYSTEM}]
    for asked, results, said in walk(conversation, heard):
        messages += [
            {"role": "tool", "tool_call_id": one.id, "content": text} for one, text in results
        ] or [{"role": "user", "content": asked.text}]
        if said is not None:
            message = {"role": "assistant", "content": said.text or None}
            if said.calls:
                message["tool_calls"] = [
                    {
                        "id": c.id,
                        "type": "function",
                        "function": {"name": NAME, "arguments": c.arguments},
                    }
                    for c in said.calls
                ]
            messages.append(message)
    function = {"name": NAME, "description": PURPOSE, "parameters": PARAMETERS}
    body = {
        "messages": messages,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required" if heard.forced else "auto",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_completion_tokens": 48 if heard.forced else OUTPUT_TOKENS,
    }
    done = await trio.to_thread.run_sync(call, "POST", url, "/v1/chat/completions", body)
    message, usage = done["choices"][0]["message"], done["usage"]
    return Said(
        message["content"] or "",
        [Call(c["id"], c["function"]["arguments"]) for c in message.get("tool_calls") or ()],
        usage["prompt_tokens"],
        usage["completion_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
        usage["homeport:cached_by_tier"],
    )


WAYS = (over_websocket, over_http, over_messages, over_chat)


@pytest.fixture(scope="module")
def conversation(daemon):
    """Twelve turns; two of them are forced calls, so that each API hears of another's."""
    told = Conversation()

    async def talk():
        for number, way in enumerate(islice(cycle(WAYS), TURNS)):
            text = f"Result {number}:\n" + filler(60, f"hop {number}")
            heard = Heard(text, forced=number in (3, 6))
            told.turns.append((heard, await way(daemon.url, told, heard)))

    trio.run(talk)
    return told


def test_what_is_computed_is_what_is_new(conversation):
    computed = new = 0
    known = 0
    for number, (_, said) in enumerate(conversation.turns):
        if number:
            computed += said.prompt_tokens - sum(said.by_tier.values())
            new += said.prompt_tokens - known
        known = said.prompt_tokens + said.output_tokens
    assert new > 0
    assert computed <= 1.10 * new, (computed, new)


def test_each_api_counts_in_its_own_way_and_all_agree_on_what_was_reused(conversation):
    for number, (_, said) in enumerate(conversation.turns):
        reused = sum(said.by_tier.values())
        if WAYS[number % len(WAYS)] is over_messages:
            assert said.cached_tokens <= reused, "a read that was none"
        else:
            assert said.cached_tokens == reused


def test_a_forced_call_is_one_over_every_api(conversation):
    for heard, said in conversation.turns:
        assert said.calls or not heard.forced
        for one in said.calls:
            assert json.loads(one.arguments).keys() == {"path"}
