"""Whatever the logits, what is said fits: a model that draws at random is the best adversary a grammar can have."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import trio
import trio.testing
from hypothesis import event, given, settings
from hypothesis import strategies as st

from engine.api import FinishReason, RequestId, Sampling, Submit
from engine.constraint import (
    Anything,
    Blank,
    ConstraintRefused,
    Exactly,
    InTurn,
    Json,
    Lark,
    OneOf,
    Regex,
    Times,
    Token,
    Until,
)
from engine.draft import Draft
from engine.grammar import Compiled, Grammars, Matcher
from engine.sampler import Sampler, SamplingState
from engine.service import Compiling
from tests.engine.fake_model import VOCAB
from tests.engine.test_engine import Bench

CALL, STOP = 256, 257  # a control token that carries syntax, and one that ends a turn
WORDS = [b"the", b'{"', b'": ', b"</", b'"}', b"\n</tool_call>", "é".encode(), b" \n ", b"</think>"]
TOKENS = [bytes([byte]) for byte in range(256)] + [b"[TOOL_CALLS]", b"<|end|>", *WORDS]
GRAMMARS = Grammars.of_tokens(TOKENS, special=[CALL, STOP], stop_ids=[STOP])

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b<|end|>", "é"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FITS = Json(json.dumps(PERSON))
PATCH = Lark(
    'start: begin line+ end\nbegin: "*** Begin" LF\nend: "*** End"\nline: "+" /[^\\n]{0,5}/ LF\n'
    "%import common.LF"
)


def say(constraint, *, seed: int, temperature: float = 1.0, most: int = 600) -> tuple[str, bool]:
    """What a model of random logits says, and whether it ended by itself."""
    matcher = Matcher(GRAMMARS.compile(constraint))
    noise = torch.Generator().manual_seed(seed)
    said: list[int] = []
    while not matcher.complete and len(said) < most and STOP not in said:
        logits = 3 * torch.randn((1, len(TOKENS) + 7), generator=noise)  # more ids than tokens
        state = SamplingState(temperature, 1.0, seed, len(said), matcher=matcher)
        [choice] = Sampler().sample(logits, [state])
        assert matcher.accept(choice.token), matcher.fault
        said.append(choice.token)
    ended = matcher.complete
    spelled = b"".join(TOKENS[token] for token in said if token != STOP)
    return spelled.decode(errors="strict" if ended else "replace"), ended


def fits_person(text: str) -> bool:
    person = json.loads(text)
    return (
        list(person) == ["name", "age", "tags"]
        and len(person["name"]) <= 8
        and 0 <= person["age"] <= 150
        and set(person["tags"]) <= {"a", "b<|end|>", "é"}
    )


def is_calls(text: str) -> bool:
    calls = re.findall(r"<tool_call>(.*?)</tool_call>\n?", text, re.DOTALL)
    assert "".join(f"<tool_call>{call}</tool_call>" for call in calls) == text.replace(
        ">\n<t", "><t"
    )
    return 1 <= len(calls) <= 3 and all(fits_person(call) for call in calls)


A_CALL = InTurn((Exactly("<tool_call>"), FITS, Exactly("</tool_call>")))
FORMS = {
    "json": (FITS, fits_person),
    "call": (A_CALL, is_calls),
    "calls": (InTurn((A_CALL, Times(InTurn((Exactly("\n"), A_CALL)), 0, 2))), is_calls),
    "call or json": (
        OneOf((A_CALL, FITS)),
        lambda t: is_calls(t) if t[0] == "<" else fits_person(t),
    ),
    "control token": (
        InTurn((Token(CALL), Blank(), FITS)),
        lambda t: fits_person(t.removeprefix("[TOOL_CALLS]")) and t.startswith("[TOOL_CALLS]"),
    ),
    "regex": (Regex(r"[a-c/]{2,5}\n"), lambda t: re.fullmatch(r"[a-c/]{2,5}\n", t) is not None),
    "lark": (
        InTurn((Exactly('"\\é\n'), PATCH, Exactly("\n</x>"))),
        lambda t: (
            re.fullmatch(r'"\\é\n\*\*\* Begin\n(\+[^\n]{0,5}\n)+\*\*\* End\n</x>', t) is not None
        ),
    ),
    "thoughts": (
        InTurn((Until("</think>"), Blank(), FITS)),
        lambda t: fits_person(t.partition("</think>")[2]),
    ),
}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), temperature=st.sampled_from([0.0, 0.7, 1.0, 2.0]))
@pytest.mark.parametrize("form", FORMS)
def test_whatever_the_logits_what_ends_by_itself_fits(form, seed, temperature):
    constraint, fits = FORMS[form]
    text, ended = say(constraint, seed=seed, temperature=temperature)
    event("ended" if ended else "cut")
    assert not ended or fits(text), text


@pytest.mark.parametrize("form", FORMS)
def test_random_models_do_come_to_an_end(form):
    """Or the law above would hold of nothing."""
    assert sum(say(FORMS[form][0], seed=seed, most=4000)[1] for seed in range(8)) >= 6


def test_text_is_free_until_a_call_is_opened_and_then_it_is_not():
    call = InTurn((Until("<tool_call>"), FITS, Exactly("</tool_call>")))
    constraint = InTurn((Times(call, 0, None), Anything()))
    matcher = Matcher(GRAMMARS.compile(constraint))
    for byte in b"Let me see <tool <tool_call>":
        assert matcher.accept(byte)
    assert not Matcher(GRAMMARS.compile(constraint)).complete
    assert allowed(matcher) <= {ord("{"), TOKENS.index(b'{"')}
    for byte in b'{"name": "", "age": 1, "tags": []}</tool_call> and more':
        assert matcher.accept(byte), matcher.fault
    assert {STOP, ord("x")} <= allowed(matcher)
    assert CALL not in allowed(matcher)


def allowed(matcher: Matcher) -> set[int]:
    row = torch.full((20,), -1, dtype=torch.int32)
    matcher.allow(row)
    bits = row[:, None].bitwise_right_shift(torch.arange(32, dtype=torch.int32)).bitwise_and(1)
    ids = set(bits.flatten().nonzero().flatten().tolist())
    assert all(token < len(TOKENS) for token in ids)
    return ids


def test_white_space_in_json_has_a_bound():
    matcher = Matcher(GRAMMARS.compile(FITS))
    assert matcher.accept(ord("{"))
    for _ in range(40):
        assert matcher.accept(ord(" "))
    assert not allowed(matcher) & set(b" \n\t\r")


# --- what is refused


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (Json('{"type": "objec"}', "here"), "Invalid type: objec"),
        (Json('{"uniqueItems": true}', "here"), "uniqueItems"),
        (Json('{"not": {}}', "here"), "not"),
        (Json('{"$ref": "#/nowhere"}', "here"), "nowhere"),
        (Json('{"type": "string", "pattern": "(?=a)b"}', "here"), "look-around"),
        (Json('{"type": "object", "properties": 3}', "here"), ""),
        (Regex("(a", "here"), "unclosed group"),
        (Lark("start: nothing", "here"), 'unknown name: "nothing"'),
        (Lark("", "here"), "start"),
        (Lark(f"start: {'|'.join(map(chr, range(97, 123)))} " * 9, "here"), ""),
    ],
)
@pytest.mark.parametrize("amid", [False, True])
def test_what_cannot_be_enforced_is_refused_by_its_field(constraint, says, amid):
    around = InTurn((Exactly("a"), Json('{"type": "object"}', "other"), constraint))
    with pytest.raises(ConstraintRefused) as caught:
        GRAMMARS.compile(around if amid else constraint)
    assert caught.value.at == "here"
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lenient_schema_is_enforced_as_far_as_it_can_be():
    schema = {**PERSON, "not": {"required": ["x"]}, "uniqueItems": True, "format": "odd"}
    for seed in range(3):
        text, ended = say(Json(json.dumps(schema), lenient=True), seed=seed)
        assert not ended or fits_person(text)
    with pytest.raises(ConstraintRefused):
        GRAMMARS.compile(Json('{"type": "objec"}', lenient=True))


def test_a_schema_cannot_loosen_its_own_rules():
    schema = {**PERSON, "uniqueItems": True, "x-guidance": {"lenient": True}}
    with pytest.raises(ConstraintRefused):
        GRAMMARS.compile(Json(json.dumps(schema)))


# --- in the engine

FEW = Grammars.of_tokens([bytes([b]) for b in range(VOCAB)], special=[0], stop_ids=[0])


def constrained(bench: Bench, constraint, *, seed: int, most: int = 400) -> RequestId:
    bench.engine._sampler = Sampler()
    bench.requests += 1
    request = RequestId(bench.requests)
    sampling = Sampling(
        max_tokens=most, seed=seed, stop_ids=frozenset([0]), constraint=constraint, top_logprobs=2
    )
    matcher = Matcher(FEW.compile(constraint))
    prompt = tuple(range(1, 12 + seed))
    bench.inbox.put(Submit(request, "s", b"", prompt, sampling, matcher=matcher))
    return request


SMALL = Json(
    '{"type": "object", "properties": {"a": {"type": "string", "pattern": "^[a-z]{3,40}$"}},'
    '"required": ["a"], "additionalProperties": false}'
)


def test_a_sequence_ends_with_its_grammar_and_says_what_fits():
    bench = Bench(device=200)
    requests = [constrained(bench, SMALL, seed=seed) for seed in range(6)]
    bench.until_quiet()
    for request in requests:
        finished = bench.said[request][-1]
        assert finished.reason is FinishReason.STOP
        assert re.fullmatch("[a-z]{3,40}", json.loads(bytes(bench.ids(request)))["a"])


def test_one_that_is_cut_by_length_says_so():
    bench = Bench(device=200)
    request = constrained(bench, SMALL, seed=1, most=3)
    bench.until_quiet()
    assert bench.said[request][-1].reason is FinishReason.LENGTH
    assert len(bench.ids(request)) == 3


def test_preempted_sequences_go_on_where_their_grammar_stands():
    alone = Bench(device=200)
    wanted = [constrained(alone, SMALL, seed=seed) for seed in range(4)]
    alone.until_quiet()
    crowded = Bench(device=24, host=2)
    preempted: list[int] = []
    preempt = crowded.scheduler.preempt
    crowded.scheduler.preempt = lambda sequence: (
        preempted.append(sequence.output_tokens),
        preempt(sequence),
    )
    said = [constrained(crowded, SMALL, seed=seed) for seed in range(4)]
    crowded.until_quiet()
    assert any(preempted), "nobody was preempted after it had said something"
    assert [crowded.ids(r) for r in said] == [alone.ids(r) for r in wanted]


def test_nothing_is_drafted_for_a_sequence_with_a_grammar():
    bench = Bench(device=200)
    with patch.object(Draft, "propose", lambda *_: (ord('"'),)):
        requests = [constrained(bench, SMALL, seed=seed) for seed in range(3)]
        bench.until_quiet()
    for request in requests:
        assert re.fullmatch("[a-z]{3,40}", json.loads(bytes(bench.ids(request)))["a"])


def test_a_grammar_that_fails_on_the_way_fails_its_turn_alone():
    bench = Bench(device=200)
    doomed, other = (constrained(bench, SMALL, seed=seed) for seed in (1, 2))
    bench.turn()
    sequence = bench.engine._sequences[doomed]
    compiled = Compiled(SMALL, FEW.compile(SMALL).beginning, 8, 1)
    spent = Matcher(compiled)
    assert not spent.accept(ord("x"))
    assert compiled.broken
    sequence.submit = replace(sequence.submit, matcher=spent)
    bench.until_quiet()
    assert bench.said[doomed][-1].reason is FinishReason.FAILED
    assert bench.said[other][-1].reason is FinishReason.STOP


# --- compiling


class Slow:
    """Grammars whose compilations last until they are let go, each counted."""

    def __init__(self) -> None:
        self.inner = Grammars.of_tokens(TOKENS, special=[CALL, STOP], stop_ids=[STOP])
        self.compiled: list[object] = []
        self.gate = threading.Event()
        self.find, self.keep = self.inner.find, self.inner.keep

    def compile(self, constraint):
        self.compiled.append(constraint)
        assert self.gate.wait(60)
        return self.inner.compile(constraint)


async def test_one_grammar_is_compiled_once_however_many_wait():
    slow = Slow()
    compiling = Compiling(slow, timeout_s=60)
    matchers = []

    async def ask():
        matchers.append(await compiling.matcher(FITS))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
        while not slow.compiled:
            await trio.testing.wait_all_tasks_blocked()
        slow.gate.set()
    assert slow.compiled == [FITS]
    await ask()
    assert slow.compiled == [FITS]
    assert len(set(map(id, matchers))) == 6
    assert not compiling._flights


async def test_the_second_compiles_when_the_first_gives_up():
    slow = Slow()
    compiling = Compiling(slow, timeout_s=60)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(compiling.matcher, FITS)
            while not slow.compiled:
                await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    slow.gate.set()
    await compiling.matcher(FITS)
    assert len(slow.compiled) == 2


async def test_a_deadline_refuses_by_the_field(autojump_clock):
    slow = Slow()
    compiling = Compiling(slow, timeout_s=3)
    with pytest.raises(ConstraintRefused, match="3 s") as caught:
        await compiling.matcher(InTurn((Exactly("x"), replace(FITS, at="text.format.schema"))))
    assert caught.value.at == "text.format.schema"
    assert trio.current_time() >= 3
    slow.gate.set()


async def test_a_refused_grammar_leaves_nothing_behind():
    compiling = Compiling(Slow().inner, timeout_s=60)
    for _ in range(2):
        with pytest.raises(ConstraintRefused):
            await compiling.matcher(Regex("(a"))
    assert not compiling._flights


def test_the_cache_is_bounded_and_forgets_the_least_recently_used():
    grammars = Grammars(GRAMMARS._tokenizer, max_entries=2)
    one, two, three = (Exactly(text) for text in "abc")
    for constraint in (one, two):
        grammars.keep(grammars.compile(constraint))
    assert grammars.find(one)
    grammars.keep(grammars.compile(three))
    assert grammars.find(two) is None
    assert grammars.find(one)
    first, second = grammars.compile(one), grammars.compile(Exactly("x" * 250))
    small = Grammars(GRAMMARS._tokenizer, max_bytes=first.size + second.size - 1)
    small.keep(first)
    small.keep(second)
    assert small.entries == 1
    assert small.find(one) is None


def test_a_broken_grammar_is_compiled_again():
    grammars = Grammars(GRAMMARS._tokenizer)
    compiled = grammars.compile(FITS)
    grammars.keep(compiled)
    compiled.broken = True
    assert grammars.find(FITS) is None
    grammars.keep(grammars.compile(FITS))
    assert grammars.find(FITS) is not None
    assert grammars.entries == 1
