"""Prompts from conversations: what is spliced, what is escaped, and that a replay equals a continuation."""

import itertools
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.bounded import TemplateTooSlow, within
from engine.model import LoadedModel
from engine.text import (
    ChatMessage,
    Conversation,
    Literal,
    Markers,
    Spliced,
    StopStrings,
    Text,
    ToolCall,
    ToolSyntax,
    UnrenderableError,
)
from tests.fakes import END, START, ByteSpecial, ByteTokenizer, byte_text


@pytest.fixture(scope="module")
def smollm(default_model: LoadedModel) -> Text:
    return Text.from_dir(default_model.path)


class Templated(ByteTokenizer):
    """The byte tokenizer with a jinja template of its own."""

    def __init__(self, template: str) -> None:
        self._template = template

    def get_chat_template(self, chat_template=None, tools=None) -> str:
        return self._template

    def apply_chat_template(self, conversation, **options) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, _ = render_jinja_template(
            conversations=[conversation],
            tools=options["tools"],
            chat_template=self._template,
            **{k: v for k, v in options.items() if k not in ("tools", "tokenize")},
        )
        return rendered[0]


def talk(*turns: str | tuple[int, ...]) -> Conversation:
    """Text is said by the user, ids by the model."""
    return Conversation(
        tuple(
            ChatMessage("user", turn)
            if isinstance(turn, str)
            else ChatMessage("assistant", "?", sampled=turn)
            for turn in turns
        )
    )


# --- the default model's tokenizer


def whole(text: Text, conversation: Conversation) -> tuple[int, ...]:
    """The plain encoding of the plainly rendered string."""
    messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
    rendered = text._tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return text.encode(rendered)


words = st.text(max_size=30) | st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\n\n  indented",
        "def f(x):\n\treturn x\n",
        "👩‍👩‍👧 wörld",
        "\ud83d",
        "日本語",
        "a b  c   ",
        "{}",
        "}}{{",
        "<tool_call>",
    ]
)
spoken = words | st.lists(
    words | st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_start|>system\n"])
).map("".join)


@given(said=st.lists(words, min_size=1, max_size=4))
def test_ordinary_text_is_encoded_as_the_plain_whole_string_is(
    smollm: Text, said: list[str]
) -> None:
    conversation = talk(*(s.replace("\ud83d", "") for s in said))
    assert smollm.prompt(conversation) == whole(smollm, conversation)


@given(data=st.data())
def test_a_full_replay_finds_the_tokens_of_the_continued_turn(
    smollm: Text, data: st.DataObject
) -> None:
    ids = st.lists(st.integers(0, 49151), max_size=6).map(tuple)
    ended = ids.map(lambda i: (*i, 2))
    system = data.draw(st.none() | words)
    tools = data.draw(
        st.sampled_from([(), ({"type": "function", "function": {"name": "f<|im_end|>"}},)])
    )
    messages = () if system is None else (ChatMessage("system", system),)
    kept: tuple[int, ...] | None = None
    for _ in range(data.draw(st.integers(1, 3))):
        role = data.draw(st.sampled_from(["user", "tool"]))
        messages += (ChatMessage(role, data.draw(spoken)),)
        conversation = Conversation(messages, tools)
        replayed = smollm.prompt(conversation)
        if kept is not None:
            assert replayed == smollm.prompt(conversation, after=kept)
            assert replayed[: len(kept)] == kept
        sampled = data.draw(ids | ended)
        event("ended by a stop id" if sampled[-1:] == (2,) else "cut")
        messages += (ChatMessage("assistant", "whatever the client sends", sampled=sampled),)
        kept = replayed + sampled


@given(said=spoken, name=spoken)
def test_nobody_can_write_a_control_token(smollm: Text, said: str, name: str) -> None:
    """Exactly the template's own control tokens come out, whatever stands in contents, tools and calls."""
    tools = (
        {
            "type": "function",
            "function": {"name": name, "description": said, "parameters": {name: said}},
        },
    )
    call = ToolCall("call_1", name, '{"a": "<|im_end|>", "<|im_start|>": 1}')
    messages = (
        ChatMessage("user", said),
        ChatMessage("assistant", said, tool_calls=(call,)),
        ChatMessage("tool", said, tool_call_id="call_1"),
    )
    prompt = smollm.prompt(Conversation(messages, tools))
    assert prompt.count(1) == 5  # system, user, assistant, tool response, generation prompt
    assert prompt.count(2) == 4


def test_the_prefix_of_a_conversation_begins_every_longer_one(smollm: Text) -> None:
    short = Conversation((ChatMessage("system", "be brief"),))
    longer = Conversation((*short.messages, ChatMessage("user", "hello")))
    prefix = smollm.prefix(short)
    assert smollm.prompt(longer)[: len(prefix)] == prefix
    assert smollm.prompt(short)[: len(prefix)] == prefix != smollm.prompt(short)
    assert smollm.prefix(Conversation(())) == ()


@given(ids=st.lists(st.integers(0, 49151), max_size=60), cut=st.integers(0, 60))
def test_detokenized_pieces_make_the_whole(smollm: Text, ids: list[int], cut: int) -> None:
    pieces = smollm.detokenizer()
    out = pieces.feed(ids[:cut]) + pieces.feed(ids[cut:]) + pieces.finish()
    assert out == smollm.decode(ids)


# --- templates other than the default


TRIMMING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}"
    '{% for call in m.tool_calls %}<tool_call>{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}<|end|>{% endfor %}'
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_template_that_knows_tools_gets_them_structured() -> None:
    text = Text(Templated(TRIMMING))
    call = ToolCall("c1", "ls", '{"path": "<|end|>"}')
    conversation = Conversation(
        (
            ChatMessage("assistant", "", tool_calls=(call,)),
            ChatMessage("tool", " out ", tool_call_id="c1"),
        ),
        (
            {
                "type": "function",
                "function": {"name": "ls", "parameters": {"<|end|>": ["<|start|>"]}},
            },
        ),
    )
    pieces = text.render(conversation)
    assert [p for p in pieces if isinstance(p, Literal)] == [
        Literal("<|end|>"),
        Literal("<|end|>"),
        Literal("<|start|>"),
    ]
    rendered = "".join(p.text if isinstance(p, Literal) else p for p in pieces)
    assert '"arguments": {"path": "<|end|>"}' in rendered
    assert "[tool]out<|end|>" in rendered
    assert '"name": "ls", "parameters": {"<|end|>": ["<|start|>"]}' in rendered


TOOLS_OF = "{% if tools %}{{ tools }}{% endif %}{% for call in messages[0].tool_calls %}"
SYNTAXES = {
    "hermes": '<tool_call>{"name": "x", "arguments": 1}</tool_call>',
    "llama3": 'Environment: ipython {"name": "x", "parameters": 1}',
    "mistral": '[TOOL_CALLS] [{"name": "x", "arguments": 1}]',
    "mistral args": "[TOOL_CALLS]x[ARGS]{}",
}
UNREADABLE = ['<tool_call><function=x>"arguments"', "<tool_call>x<arg_key>", "x(y=1)"]


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_the_form_of_calls_is_the_templates(syntax: str) -> None:
    template = TOOLS_OF + SYNTAXES[syntax] + "{% endfor %}"
    text = Text(Templated(template))
    assert text.tool_syntax.value == syntax
    [rendered] = text.render(Conversation((ChatMessage("user", "x"),), ({"type": "function"},)))
    assert "function" in rendered
    assert "# Tools" not in rendered


# As Mistral's: roles must alternate, calls and their results do not count, ids have nine characters.
ALTERNATING = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% if m.role != 'tool' and not m.tool_calls %}{% if (m.role == 'user') != (ns.n % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% set ns.n = ns.n + 1 %}{% endif %}"
    "{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    '{{ (c.function | tojson)[:-1] }}, "id": "{{ c.id }}"}{% endfor %}]<|end|>'
    "{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    "[RESULT]{{ m.content }}[/RESULT]"
    "{% elif m.role == 'user' %}{{ tools or '' }}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)


def test_a_template_that_counts_turns_is_shown_sampled_calls_as_calls() -> None:
    text = Text(Templated(ALTERNATING))
    assert text.tool_syntax is ToolSyntax.MISTRAL
    first, second = (*b"[TOOL_CALLS] [f]", END), (*b"It is [TOOL_CALLS] warm", END)
    cut = (*b"[TOOL_CALLS] [g", 7)
    messages = (
        ChatMessage("user", "a"),
        ChatMessage("assistant", "", sampled=first),
        ChatMessage("tool", "20", tool_call_id="call_0123456789"),
        ChatMessage("assistant", "", sampled=second),
        ChatMessage("user", "b"),
        ChatMessage("assistant", "", sampled=cut),
        ChatMessage("tool", "21", tool_call_id="call_x"),
        ChatMessage("tool", "22", tool_call_id="call_y"),
    )
    assert text.render(Conversation(messages)) == (
        "[INST]a[/INST]",
        Spliced(first),
        "[RESULT]20[/RESULT]",
        Spliced(second),
        "[INST]b[/INST]",
        Spliced(cut),
        "<|end|>[RESULT]21[/RESULT][RESULT]22[/RESULT]",
    )
    call = ToolCall("call_0123456789", "f", "{}")
    [told] = text.render(
        Conversation(
            (
                ChatMessage("user", "a"),
                ChatMessage("assistant", "", tool_calls=(call,)),
                ChatMessage("tool", "20", tool_call_id=call.call_id),
            )
        )
    )
    assert '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "' in told


@pytest.mark.parametrize("form", UNREADABLE)
def test_a_form_that_we_cannot_read_is_not_taught(form: str) -> None:
    template = (
        "{{ messages[0].content }}{% if tools %}" + TOOLS_OF + form + "{% endfor %}{% endif %}"
    )
    text = Text(Templated(template))
    assert text.tool_syntax is ToolSyntax.HERMES
    [rendered] = text.render(Conversation((ChatMessage("user", "x"),), ({"type": "function"},)))
    assert "# Tools" in rendered


class Thinker(Templated):
    """One whose markup is control tokens: <think> 258, </think> 259, [TOOL_CALLS] 260."""

    added_tokens_decoder: ClassVar = ByteTokenizer.added_tokens_decoder | {
        258: ByteSpecial("<think>", special=False),
        259: ByteSpecial("</think>"),
        260: ByteSpecial("[TOOL_CALLS]"),
    }

    def decode(self, token_ids, *, skip_special_tokens, clean_up_tokenization_spaces=False):
        plain = [i for i in token_ids if i < START or (i <= END and not skip_special_tokens)]
        if len(token_ids) == 1 and token_ids[0] > END and not skip_special_tokens:
            return self.added_tokens_decoder[token_ids[0]].content
        return super().decode(plain, skip_special_tokens=skip_special_tokens)

    def encode(self, text, **options):
        head, opened, rest = text.partition("<think>")
        ids = super().encode(head, **options)
        return ids + ([258, *super().encode(rest, **options)] if opened else [])


def test_control_tokens_that_are_markup_are_shown_and_no_others() -> None:
    text = Text(Thinker("{{ messages[0].content }}</think>"))
    assert text.markup == {258: "<think>", 259: "</think>", 260: "[TOOL_CALLS]"}
    sampled = [258, *"é".encode(), 259, START, *b"x", 260, *b"f{}", END]
    for cut in range(len(sampled) + 1):
        detokenizer = text.detokenizer()
        said = detokenizer.feed(sampled[:cut]) + detokenizer.feed(sampled[cut:])
        assert said + detokenizer.finish() == "<think>é</think>x[TOOL_CALLS]f{}"


def test_whether_the_template_has_opened_the_thoughts() -> None:
    think = (
        "{{ messages[0].content }}{% if add_generation_prompt %}:{% if enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
    )
    text = Text(Thinker(think))
    assert text.thoughts == Markers("<think>", "</think>")
    for thinking, opened in ((None, True), (True, True), (False, False)):
        prompt = text.prompt(replace(talk("a <think>"), thinking=thinking))
        assert text.thinks_after(prompt) is opened
    plain = Text(Thinker("{{ messages[0].content }}"))
    assert plain.thoughts is None
    assert not plain.thinks_after(plain.prompt(talk("<think>")))


def test_sampled_ids_pass_a_template_that_trims() -> None:
    text = Text(Templated(TRIMMING))
    pieces = text.render(talk("hi", (32, 65, 32, END)))
    assert pieces == ("[user]hi<|end|>[assistant]", Spliced((32, 65, 32, END)), "[assistant]")


def test_a_template_that_refuses_says_why() -> None:
    text = Text(Templated("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(UnrenderableError, match="roles must alternate"):
        text.prompt(talk("hi"))


def test_a_template_that_drops_the_sampled_message_is_rendered_whole() -> None:
    text = Text(Templated("{{ messages[-1].content }}"))
    assert text.prompt(talk("a", (1, END), "b"), after=(1, 2, 3)) == (ord("b"),)


def test_tools_are_described_once_in_the_first_system_message() -> None:
    text = byte_text()
    tools = ({"type": "function", "function": {"name": "ls"}},)
    [rendered] = text.render(
        Conversation((ChatMessage("system", "be brief"), ChatMessage("user", "x")), tools)
    )
    assert isinstance(rendered, str)
    assert rendered.startswith("<|start|>system\nbe brief\n\n# Tools")
    assert rendered.count("<tools>\n{") == 1
    [alone] = text.render(Conversation((ChatMessage("user", "x"),), tools))
    assert isinstance(alone, str)
    assert alone.startswith("<|start|>system\n# Tools")


def test_a_call_without_known_ids_is_written_in_the_markup_the_model_was_shown() -> None:
    call = ToolCall("c1", "ls", '{"path":"/"}')
    broken = ToolCall("c2", "rm", "{not json")
    messages = (
        ChatMessage("assistant", "Looking.", tool_calls=(call, broken)),
        ChatMessage("tool", "bin"),
    )
    [rendered] = byte_text().render(Conversation(messages))
    assert rendered == (
        '<|start|>assistant\nLooking.\n<tool_call>\n{"name": "ls", "arguments": {"path": "/"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "rm", "arguments": "{not json"}\n</tool_call><|end|>\n'
        "<|start|>user\n<tool_response>\nbin\n</tool_response><|end|>\n<|start|>assistant\n"
    )


# --- bytes: every id is a piece of a character


@given(
    ids=st.lists(
        st.integers(0, 257) | st.sampled_from([0x80, 0xE2, 0x82, 0xF0, 0x9F, END]), max_size=150
    )
)
def test_held_bytes_come_out_as_they_would_all_at_once(ids: list[int]) -> None:
    text = byte_text()
    pieces = text.detokenizer()
    assert pieces.feed(ids) + pieces.finish() == text.decode(ids)


def test_what_is_certain_is_given_out_at_once() -> None:
    pieces = byte_text().detokenizer()
    euro = "€".encode()
    assert [pieces.feed([i]) for i in (ord("a"), *euro, ord("b"))] == ["a", "", "", "€", "b"]
    assert pieces.feed([END]) == ""
    assert pieces.feed(euro[:2]) == ""
    assert pieces.finish() == "\ufffd"
    assert pieces.finish() == ""


def test_endless_garbage_is_not_held_for_ever() -> None:
    pieces = byte_text().detokenizer()
    given_out = pieces.feed([0x80] * 1000)
    assert len(given_out) > 900
    assert len(pieces._held) < 50


@pytest.mark.parametrize("garbage", range(28, 40))
def test_a_character_that_begins_in_endless_garbage_stays_whole(garbage: int) -> None:
    ids = [*[0x80] * garbage, *"€".encode(), 0xE2, *[0x80] * garbage, *"👋".encode()]
    text = byte_text()
    pieces = text.detokenizer()
    assert "".join(pieces.feed([i]) for i in ids) + pieces.finish() == text.decode(ids)


def test_a_piece_in_use_outlives_newer_ones() -> None:
    encoded: list[str] = []

    class Counting(ByteTokenizer):
        def encode(self, text: str, **options: bool) -> list[int]:
            encoded.append(text)
            return super().encode(text, **options)

    text = Text(Counting(), cache_bytes=3000)
    for n in range(100):
        text.encode("the long prefix")
        text.encode(f"what is new: {n}")
    assert encoded.count("the long prefix") == 1


def test_the_cache_of_pieces_keeps_its_budget_and_its_answers() -> None:
    text = Text(ByteTokenizer(), cache_bytes=4000)
    for n in range(200):
        assert text.encode(f"piece {n % 7} {'x' * (n % 13)}") == tuple(
            f"piece {n % 7} {'x' * (n % 13)}".encode()
        )
        assert text._encoded_bytes <= 4000
    assert text._encoded
    assert text.encode("x" * 5000) == (120,) * 5000
    assert not text._encoded
    assert text._encoded_bytes == 0


def test_literal_and_trusted_text_are_different_pieces() -> None:
    text = byte_text()
    assert text.encode("<|start|>") == (START,)
    [before, literal, after] = text.render(Conversation((ChatMessage("user", "<|start|>"),)))
    assert literal == Literal("<|start|>")
    assert text.prompt(Conversation((ChatMessage("user", "<|start|>"),))) == (
        text.encode(before) + tuple(b"<|start|>") + text.encode(after)
    )


# --- stop strings


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=5).map(sorted),
)
def test_any_split_finds_the_same_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopStrings(stops)
    edges = [0, *cuts, len(text)]
    out = "".join(matcher.feed(text[a:b]) for a, b in itertools.pairwise(edges))
    # The naive way: the end of the shortest beginning of the text that contains a stop string.
    ends = [n for n in range(len(text) + 1) if any(s in text[:n] for s in stops)]
    if ends:
        assert matcher.found == max((s for s in stops if text[: ends[0]].endswith(s)), key=len)
        assert out == text[: ends[0] - len(matcher.found)]
        assert matcher.finish() == ""
    else:
        assert matcher.found is None
        assert out + matcher.finish() == text


def test_only_a_possible_beginning_is_held() -> None:
    matcher = StopStrings(["STOP"])
    assert [matcher.feed(c) for c in "aSTxSTOPb"] == ["a", "", "", "STx", "", "", "", "", ""]
    assert matcher.found == "STOP"


LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% for i in range(9999) %}{{ m(n) if false }}{% endfor %}{% endmacro %}"
    "{% for a in range(99999) %}{{ m(a) }}{% endfor %}",
)


@pytest.mark.parametrize("template", LOOPS)
def test_a_template_that_does_not_end_is_refused_in_time(template):
    """Through jinja's sandbox, as transformers compiles it."""
    environment = ImmutableSandboxedEnvironment()
    compiled = environment.from_string(template)
    with pytest.raises(TemplateTooSlow), within(0.05):
        compiled.render()
    assert sys.gettrace() is None


def test_a_template_in_time_renders_as_without_a_bound():
    compiled = ImmutableSandboxedEnvironment().from_string("{% for a in n %}{{ a }},{% endfor %}")
    with within(60):
        assert compiled.render(n=[1, 2]) == "1,2,"
