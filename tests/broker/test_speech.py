"""Sampled ids to items: thoughts, calls in every form, logprobs; however the ids are cut, the same is said."""

import itertools
from typing import ClassVar

import pytest
import trio
from openai.types.responses import Response

from broker.speech import Speech
from broker.wire.requests import Transport, parse_create
from broker.wire.responses_out import ResponseStream
from engine.api import CachedTokens, Likelihood, RequestId, Sampled, Usage
from engine.text import Text
from tests.broker.test_turn import Desk, said
from tests.broker.wire.grammar import check_events
from tests.fakes import END, ByteSpecial, ByteTokenizer, FakeService, saying

USAGE = Usage(1, CachedTokens(), 1, 1)
TOOLS = [
    {"type": "function", "name": "ls"},
    {"type": "custom", "name": "note"},
    {
        "type": "custom",
        "name": "patch",
        "format": {"type": "grammar", "syntax": "regex", "definition": "a"},
    },
]


class Model(ByteTokenizer):
    """A byte tokenizer whose template has this markup in it."""

    def __init__(self, markup: str, *controls: str) -> None:
        self.markup = markup
        self.controls = {300 + n: text for n, text in enumerate(controls)}
        self.added_tokens_decoder = ByteTokenizer.added_tokens_decoder | {
            i: ByteSpecial(text) for i, text in self.controls.items()
        }

    def get_chat_template(self, chat_template=None, tools=None):
        return self.markup

    def decode(self, token_ids, **options):
        kept = [t for t in token_ids if t not in self.controls]
        return super().decode(kept, **options)


HERMES = 'tools tool_calls <tool_call> "arguments"'
LLAMA = 'tools tool_calls ipython "parameters"'
MISTRAL = "tools tool_calls [TOOL_CALLS]"


def speak(ids, *, model=None, chunk=1, thinking=False, likelihoods=False, **body):
    """The response of an answer that is these ids."""
    request = parse_create({"tools": TOOLS, **body}, transport=Transport.HTTP)
    numbers = itertools.count()
    stream = ResponseStream(
        request,
        response_id="resp_1",
        model="m",
        created_at=1,
        new_id=lambda prefix: f"{prefix}_{next(numbers)}",
    )
    text = Text(model or ByteTokenizer())
    speech = Speech(
        request,
        stream,
        text,
        new_id=lambda prefix: prefix,
        token_bytes=lambda token: bytes([token]),
        thinking=thinking,
    )
    events = stream.start()
    for at in range(0, len(ids), chunk):
        tokens = tuple(ids[at : at + chunk])
        likely = tuple(Likelihood(-0.5, ((65, -1.0),)) for _ in tokens) if likelihoods else ()
        events += speech.feed(Sampled(RequestId(1), tokens, likely))
    events += speech.finish()
    events += stream.finish("completed", None, USAGE, 2, speech.reasoning_tokens)
    check_events(events)
    return stream.response()


def items(response):
    """[kind, what it says] of each."""
    return [
        [
            item["type"],
            item.get("name"),
            item.get("arguments", item.get("input"))
            or "".join(p["text"] for p in item.get("content", ())),
        ]
        for item in response["output"]
    ]


CALL = ["function_call", "ls", '{"a": 1}']


@pytest.mark.parametrize(
    ("markup", "controls", "answer", "expected"),
    [
        (
            HERMES,
            (),
            ['So. <tool_call>{"name": "ls", "arguments": {"a": 1}}</tool_call>'],
            [["message", None, "So. "], CALL],
        ),
        (
            HERMES,
            ("<tool_call>", "</tool_call>"),
            [300, '{"name": "ls", "arguments": {"a": 1}}', 301],
            [CALL],
        ),
        (LLAMA, ("<|python_tag|>",), [300, '{"name": "ls", "parameters": {"a": 1}}'], [CALL]),
        (MISTRAL, ("[TOOL_CALLS]",), [300, ' [{"name": "ls", "arguments": {"a": 1}}]'], [CALL]),
        (
            MISTRAL + " [ARGS]",
            ("[TOOL_CALLS]", "[ARGS]"),
            [300, "ls", 301, '{"a": 1}', 300, "note", 301, '{"input": "é\\n"}'],
            [CALL, ["custom_tool_call", "note", "é\n"]],
        ),
        (
            HERMES + " </think>",
            ("<think>", "</think>"),
            [300, "\nHm, <tool_call>é.\n", 301, "\n\nYes."],
            [["reasoning", None, "Hm, <tool_call>é."], ["message", None, "Yes."]],
        ),
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_each_model_is_read_as_it_writes(markup, controls, answer, expected, chunk):
    ids = [i for part in answer for i in ([part] if isinstance(part, int) else part.encode())]
    response = speak([*ids, END], model=Model(markup, *controls), chunk=chunk)
    assert items(response) == expected
    Response.model_validate(response)


def test_thoughts_that_the_template_opened():
    model = Model("</think>", "</think>")
    response = speak([*b"Hm.", 300, *b"Yes."], model=model, thinking=True)
    assert items(response) == [["reasoning", None, "Hm."], ["message", None, "Yes."]]
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 4}
    cut = speak([*b"Hm"], model=model, thinking=True)
    assert items(cut) == [["reasoning", None, "Hm"]]


def test_reasoning_tokens_are_those_of_thoughts():
    model = Model("</think>", "<think>", "</think>")
    ids = [300, *b"abc", 301, *b"Yes."]
    for chunk in (1, 2, 99):
        response = speak(ids, model=model, chunk=chunk)
        assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 5}
    assert speak(b"Yes.", model=model)["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}


def test_a_raw_call_is_looked_for_where_it_was_forced_only():
    spoken = b'<tool_call>{"name": "patch"}\na\n</tool_call>'
    forced = {"tool_choice": {"type": "custom", "name": "patch"}}
    for markup in (HERMES, LLAMA, MISTRAL):
        response = speak(spoken, model=Model(markup), **forced)
        assert items(response) == [["custom_tool_call", "patch", "a"]]
    assert items(speak(spoken)) == [["message", None, spoken.decode()]]


def test_without_anything_to_call_markup_is_text():
    spoken = '<tool_call>{"name": "ls", "arguments": {}}</tool_call>'
    nothing = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}
    for choice in ("none", nothing):
        assert items(speak(spoken.encode(), tool_choice=choice)) == [["message", None, spoken]]


def test_logprobs_spell_the_message_and_nothing_else():
    spoken = 'é, <b>\n<tool_call>{"name": "ls", "arguments": {}}</tool_call> so'
    for chunk in (1, 5):
        response = speak(spoken.encode(), likelihoods=True, chunk=chunk, top_logprobs=1)
        first, _, last = response["output"]
        for message in (first, last):
            [part] = message["content"]
            spelled = bytes(b for token in part["logprobs"] for b in token["bytes"])
            assert spelled.decode() == part["text"]
        [part] = last["content"]
        assert part["logprobs"][-1] == {
            "token": "o",
            "bytes": [111],
            "logprob": -0.5,
            "top_logprobs": [{"token": "A", "bytes": [65], "logprob": -1.0}],
        }


@pytest.fixture
async def at_desk():
    async with trio.open_nursery() as nursery:
        yield Desk(FakeService(nursery), background=nursery)
        nursery.cancel_scope.cancel()


async def test_a_turn_asks_for_logprobs_and_passes_them_on(at_desk: Desk) -> None:
    at_desk.engine.reply = saying("hé")
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    outcome = await at_desk.turn(input="x", **asked)
    assert at_desk.engine.submitted[-1].sampling.top_logprobs == 2
    [message] = outcome.response["output"]
    tokens = message["content"][0]["logprobs"]
    assert [token["bytes"] for token in tokens] == [[b] for b in "hé".encode()]
    assert [top["logprob"] for top in tokens[0]["top_logprobs"]] == [-0.5, -1.0]
    deltas = [e for e in at_desk.events if e["type"] == "response.output_text.delta"]
    assert [len(e["logprobs"]) for e in deltas] == [1, 2]
    for body, top in (({"include": asked["include"]}, 0), ({"top_logprobs": 1}, 1), ({}, None)):
        await at_desk.turn(input="x", **body)
        assert at_desk.engine.submitted[-1].sampling.top_logprobs == top


async def test_a_turn_passes_penalties_and_effort_on(at_desk: Desk) -> None:
    await at_desk.turn(input="x", presence_penalty=0.5, frequency_penalty=-1)
    sampling = at_desk.engine.submitted[-1].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -1.0)


class Thinking(Model):
    """Opens its thoughts, unless it is told not to."""

    seen: ClassVar[list] = []

    def apply_chat_template(self, conversation, *, enable_thinking=True, **options):
        self.seen.append(enable_thinking)
        text = super().apply_chat_template(conversation, **options)
        return text + ("<think>" if enable_thinking else "")


async def test_thoughts_come_back_by_what_they_carry(at_desk: Desk) -> None:
    at_desk.engine.text = Text(Thinking("</think>"))
    at_desk.engine.reply = saying("hm</think>Yes.", "Again.")
    first = await at_desk.turn(input="x", include=["reasoning.encrypted_content"], reasoning={})
    thoughts, message = first.response["output"]
    assert (thoughts["content"][0]["text"], said(first)) == ("hm", "Yes.")
    assert first.response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    kinds = [e["type"] for e in at_desk.events]
    assert kinds.index("response.reasoning_text.delta") < kinds.index("response.output_text.delta")
    replay = [
        {"role": "user", "content": "x"},
        {"type": "reasoning", "summary": [], "encrypted_content": thoughts["encrypted_content"]},
        {"role": "assistant", "content": message["content"]},
        {"role": "user", "content": "again"},
    ]
    await at_desk.turn(input=replay)
    sampled = bytes(first.node.sampled[:-1])
    assert sampled in bytes(t for t in at_desk.prompt if t < 256)
    for effort, thinks in (("none", False), ("low", True), (None, True)):
        await at_desk.turn(input="x", reasoning={"effort": effort})
        assert Thinking.seen[-1] is thinks
