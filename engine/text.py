"""Text on one side, token ids on the other: the tokenizer, the chat template, and nothing else.

Laws
    A prompt is a pure function of its pieces: each piece is encoded by itself and the ids are concatenated.
    Tokens that a model sampled are never encoded again. They are spliced into a prompt as they were, so a history
    that is replayed in full gives exactly the ids of the turn it continues, followed by the ids of what is new.
    Text written by a client never becomes a control token.
    What `Detokenizer` gives out, concatenated, equals the decoding of all ids at once, between its markup.

How a prompt is made
    The chat template renders strings, so sampled ids cannot pass through it. Each sampled message is rendered as a
    sentinel: a short word with a random part, unknown outside this process, that survives `trim` and `tojson`. The
    rendered text is split at the sentinels; what lies between is template text and client text, one str piece each.
    Everything but sampled output is rendered whole, because templates trim and inspect contents and because a
    template such as `[INST] ` + content must let its space merge with the content's first word.

    If sampled ids end in a stop id, the end-of-turn text that the template writes after them is already there as an
    id, and is taken off the next piece. If they do not (cut by length, or cancelled), the template's text stays.

    A control-token string inside client text (`<|im_end|>` in a web page) is replaced by a sentinel too and encoded
    as plain text. Only the one piece around it is split; ordinary text is encoded as the plain whole string would be.

Tools
    A template that mentions both `tools` and `tool_calls`, and has calls written in a form that we can read
    (`ToolSyntax`), gets them natively. Every other template gets the generic fallback: the tools described at the end of
    the first system message, calls written as `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, and results as a
    user message in `<tool_response>`.

Markup
    What a form of calls or thoughts is made of may be control tokens. `Detokenizer` shows those, and no others.
"""

from __future__ import annotations

import enum
import json
import re
import secrets
from collections import OrderedDict
from copy import copy
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Protocol

from jinja2 import TemplateError

from engine.bounded import within
from tiers.canonical import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from tiers.block import TokenIds
    from tiers.canonical import Value

_TOOLS_HEADER = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_TOOLS_FOOTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
    "<args-json-object>}\n</tool_call>"
)
# An unfinished UTF-8 character spans few tokens; a longer run of undecodable ones is cut where that changes nothing.
_HELD_TOKENS = 32
# What a template may take and make. A history of 10,000 messages takes 0.1 s; a body has at most 32 MiB.
_RENDER_S = 5.0
_RENDERED_CHARS = 128 << 20
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class ToolSyntax(enum.Enum):
    """How a model writes a call."""

    HERMES = "hermes"  # <tool_call>{"name": …, "arguments": {…}}</tool_call>, again and again
    LLAMA3 = (
        "llama3"  # {"name": …, "parameters": {…}}, and nothing else; perhaps after <|python_tag|>
    )
    MISTRAL = "mistral"  # [TOOL_CALLS] [{"name": …, "arguments": {…}}, …]
    MISTRAL_ARGS = "mistral args"  # [TOOL_CALLS]name[ARGS]{…}, again and again


@dataclass(frozen=True, slots=True)
class Markers:
    """What stands around a model's thoughts."""

    open: str
    close: str


# Control tokens that are part of what a model says, where its tokenizer has them.
_MARKUP = (
    "<tool_call>",
    "</tool_call>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[CALL_ID]",
    "[ARGS]",
    "<think>",
    "</think>",
    "[THINK]",
    "[/THINK]",
)
_THOUGHTS = (Markers("<think>", "</think>"), Markers("[THINK]", "[/THINK]"))


class UnrenderableError(ValueError):
    """The chat template refuses this conversation (roles that must alternate, a missing system message, …)."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call as the client knows it. `arguments` is a JSON text, byte for byte."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message. With `sampled`, those ids are the message and `content` and `tool_calls` are not looked at."""

    role: str  # system | user | assistant | tool
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    sampled: TokenIds | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template renders. `tools` are JSON objects: {"type": "function", "function": {name, description, …}}."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool | None = None  # `enable_thinking` of templates that ask; None: as they like


@dataclass(frozen=True, slots=True)
class Spliced:
    """Ids that go into the prompt as they are."""

    tokens: TokenIds


@dataclass(frozen=True, slots=True)
class Literal:
    """Text in which no control token may be recognised."""

    text: str


Piece = str | Spliced | Literal


class SpecialToken(Protocol):
    @property
    def content(self) -> str: ...
    @property
    def special(self) -> bool: ...


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, SpecialToken]: ...
    def get_chat_template(
        self, chat_template: str | None = None, tools: list[Any] | None = None
    ) -> str: ...
    def apply_chat_template(self, conversation: list[Any], **options: Any) -> Any: ...
    def encode(self, text: str, **options: Any) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], **options: Any) -> str: ...


class Text:
    """One model's tokenizer and template. Encoded pieces are kept, because agents resend the same long prefix."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop_ids: Iterable[int] = (),
        digest: bytes = b"",
        cache_bytes: int = 32 << 20,
    ) -> None:
        # Names the tokenizer and the templates: what ids mean, and which of them a conversation becomes.
        self.digest = digest
        eos = tokenizer.eos_token_id
        self.stop_ids = frozenset(stop_ids) | (frozenset() if eos is None else {eos})
        self._tokenizer = tokenizer
        self._stop_text = {
            i: tokenizer.decode([i], skip_special_tokens=False) for i in self.stop_ids
        }
        specials = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        longest_first = sorted(specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items()}
        self.markup = {added[text]: text for text in _MARKUP if text in added}  # {id: its text}
        template = tokenizer.get_chat_template(tools=[{}])
        syntax = _tool_syntax(template)
        self._native_tools = syntax is not None
        self.tool_syntax = syntax or ToolSyntax.HERMES
        # None: this model does not think aloud.
        self.thoughts = next((t for t in _THOUGHTS if t.close in template), None)
        nonce = secrets.token_hex(8)
        self._sentinel = f"xq{nonce}n{{}}z"
        self._sentinels = re.compile(f"xq{nonce}n([0-9]+)z")
        # Mistral's templates count turns, and a call is none: a sampled message that tools answered must be shown as a
        # call. The sentinel is the call's name then, and what the template writes around it goes again.
        self._counts_turns = self.tool_syntax in (ToolSyntax.MISTRAL, ToolSyntax.MISTRAL_ARGS)
        self._call_mark = f"xq{nonce}c"
        ends = "|".join(map(re.escape, self._stop_text.values())) or r"\Z"
        self._wrapped = re.compile(
            rf"\[TOOL_CALLS\][^\n]{{0,80}}?{self._call_mark}(xq{nonce}n[0-9]+z).*?(?={ends}|\Z)",
            re.DOTALL,
        )
        self._encoded: OrderedDict[str | Literal, TokenIds] = (
            OrderedDict()
        )  # least recently used first
        self._encoded_bytes = 0
        self._cache_bytes = cache_bytes

    @classmethod
    def from_dir(cls, path: Path) -> Text:
        """Load what `save_pretrained` left in `path`. Never touches the network.

        Raises ValueError if the tokenizer has no chat template, OSError if it is not there.
        """
        # Imported here because it takes two seconds, and everything above works without it.
        from transformers import AutoTokenizer, GenerationConfig

        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        stops: list[int] = []
        if (path / "generation_config.json").is_file():
            eos = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id
            stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
        return cls(tokenizer, stop_ids=stops, digest=_digest(path, stops))

    def encode(self, text: str) -> TokenIds:
        """The ids of trusted text: control-token strings in it become control tokens."""
        return self._encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """All at once, control tokens left out."""
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self)

    def tokenizer_json(self) -> str:
        """The tokenizer as the `tokenizers` library writes it, without what it would add or cut."""
        return _tokenizer_json(self._tokenizer)

    def thinks_after(self, prompt: TokenIds) -> bool:
        """Whether the template has opened the model's thoughts already."""
        if self.thoughts is None:
            return False
        end = "".join(self._shown(token) for token in prompt[-8:])
        return end.rstrip().endswith(self.thoughts.open)

    def _shown(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def render(self, conversation: Conversation) -> tuple[Piece, ...]:
        """The pieces of a prompt that asks for the next assistant message. Raises UnrenderableError."""
        if not conversation.messages:
            raise UnrenderableError("there is no message to answer")
        return self._pieces(conversation, add_generation_prompt=True)

    def prompt(self, conversation: Conversation, after: TokenIds | None = None) -> TokenIds:
        """The ids to feed for the next assistant message.

        `after` are the exact ids of the turn that the conversation's last sampled message ended (its prompt and
        what was sampled). They are kept, and only what the template renders behind that message is encoded.
        """
        pieces = self.render(conversation)
        if after is None:
            return self._join(pieces)
        last = max(
            (i for i, piece in enumerate(pieces) if isinstance(piece, Spliced)), default=None
        )
        if last is None:  # this template does not show the message at all
            return self._join(pieces)
        return after + self._join(pieces[last + 1 :])

    def prefix(self, conversation: Conversation) -> TokenIds:
        """The ids that any longer conversation begins with: for prefilling before there is a question."""
        if not conversation.messages and not conversation.tools:
            return ()  # templates cannot be asked about nothing
        return self._join(self._pieces(conversation, add_generation_prompt=False))

    def _pieces(
        self, conversation: Conversation, *, add_generation_prompt: bool
    ) -> tuple[Piece, ...]:
        hidden: list[Piece] = []  # what the n-th sentinel stands for

        def hide(piece: Piece) -> str:
            hidden.append(piece)
            return self._sentinel.format(len(hidden) - 1)

        def guard(text: str) -> str:
            whole = _LONE_SURROGATE.sub(
                "\ufffd", text
            )  # JSON can carry halves of pairs; UTF-8 cannot
            return self._special.sub(lambda found: hide(Literal(found.group())), whole)

        messages, tools = conversation.messages, conversation.tools
        if not self._native_tools:
            messages, tools = _without_native_tools(messages, tools), ()
        thinking = conversation.thinking
        options = {} if thinking is None else {"enable_thinking": thinking}
        try:
            told = [
                self._template_message(message, then, hide=hide, guard=guard)
                for message, then in zip_longest(messages, messages[1:])
            ]
            declared = [_guarded(tool, guard) for tool in tools] or None
            with within(_RENDER_S):
                rendered = self._tokenizer.apply_chat_template(
                    told,
                    tools=declared,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **options,
                )
        except TemplateError as error:
            raise UnrenderableError(f"the model's chat template refuses this: {error}") from error
        if len(rendered) > _RENDERED_CHARS:
            raise UnrenderableError(f"the chat template makes {len(rendered)} characters of this")
        rendered = self._wrapped.sub(r"\1", rendered)
        pieces: list[Piece] = []
        for index, part in enumerate(
            self._sentinels.split(rendered)
        ):  # text, number, text, number, …, text
            if index % 2 == 1:
                pieces.append(hidden[int(part)])
                continue
            before = pieces[-1] if pieces else None
            if isinstance(before, Spliced) and before.tokens and before.tokens[-1] in self.stop_ids:
                part = part.removeprefix(self._stop_text[before.tokens[-1]])
            if part:
                pieces.append(part)
        return tuple(pieces)

    def _template_message(
        self,
        message: ChatMessage,
        then: ChatMessage | None,
        *,
        hide: Callable[[Piece], str],
        guard: Callable[[str], str],
    ) -> dict[str, Any]:
        """`then` is the message after it."""
        if message.sampled is not None:
            sentinel = hide(Spliced(message.sampled))
            if self._counts_turns and then is not None and then.role == "tool":
                call = _call("", self._call_mark + sentinel, {}, self._call_id)
                return {"role": message.role, "content": "", "tool_calls": [call]}
            return {"role": message.role, "content": sentinel}
        out: dict[str, Any] = {"role": message.role, "content": guard(message.content)}
        if message.tool_calls:
            out["tool_calls"] = [
                _call(
                    guard(call.call_id),
                    guard(call.name),
                    _guarded(_parsed(call.arguments), guard),
                    self._call_id,
                )
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            out["tool_call_id"] = self._call_id(guard(message.tool_call_id))
        if message.name is not None:
            out["name"] = guard(message.name)
        return out

    def _call_id(self, call_id: str) -> str:
        """As the template takes it: Mistral's want nine letters or digits, and say nothing of where they come from."""
        if not self._counts_turns:
            return call_id
        return blake2b(call_id.encode(), digest_size=5).hexdigest()[:9]

    def _join(self, pieces: Iterable[Piece]) -> TokenIds:
        ids: list[int] = []
        for piece in pieces:
            ids.extend(piece.tokens if isinstance(piece, Spliced) else self._encode(piece))
        return tuple(ids)

    def _encode(self, piece: str | Literal) -> TokenIds:
        known = self._encoded.get(piece)
        if known is not None:
            self._encoded.move_to_end(piece)
            return known
        literal = isinstance(piece, Literal)
        text = piece.text if isinstance(piece, Literal) else piece
        tokens = tuple(
            self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=literal)
        )
        self._encoded[piece] = tokens
        self._encoded_bytes += _cost(piece, tokens)
        while self._encoded_bytes > self._cache_bytes:
            self._encoded_bytes -= _cost(*self._encoded.popitem(last=False))
        return tokens


def _tool_syntax(template: str) -> ToolSyntax | None:
    """What this template teaches; None if it knows no tools, or writes calls as we cannot read them."""
    if "tool_calls" not in template or re.search(r"\btools\b", template) is None:
        return None
    if "[TOOL_CALLS]" in template:
        return ToolSyntax.MISTRAL_ARGS if "[ARGS]" in template else ToolSyntax.MISTRAL
    if '"arguments' in template and "<tool_call>" in template:
        # Some put XML in the same tag.
        xml = any(tag in template for tag in ("<function=", "<arg_key>", "<parameter="))
        return None if xml else ToolSyntax.HERMES
    if '"parameters' in template and ("<|python_tag|>" in template or "ipython" in template):
        return ToolSyntax.LLAMA3
    return None


def _tokenizer_json(tokenizer: Any) -> str:
    backend = copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return str(backend.to_str())


# What transformers reads a tokenizer and its templates from. One file too many forgets stored responses when it
# changes; one too few would read them as other words.
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "added_tokens.json",
    "special_tokens_map.json",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "additional_chat_templates/*",
)
_RENDERING = 2  # raise it when this file renders the same conversation to other text


def _digest(path: Path, stop_ids: Iterable[int]) -> bytes:
    files = {file for pattern in _TOKENIZER_FILES for file in path.glob(pattern) if file.is_file()}
    named: dict[str, Value] = {
        "files": {
            file.relative_to(path).as_posix(): blake2b(file.read_bytes()).digest() for file in files
        },
        "stop_ids": sorted(stop_ids),
        "rendering": _RENDERING,
    }
    return digest(b"homeport-text-1", named)


class Detokenizer:
    """Ids in, text out, as soon as that text is certain.

    An id may end inside a character; the decoder shows that as U+FFFD, so text that ends in U+FFFD is held back. The
    last ids given out stay as context, because a decoder may treat the first id of a text differently.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._context: list[int] = []  # given out already
        self._held: list[int] = []

    @property
    def holds(self) -> bool:
        """Whether a character is unfinished."""
        return bool(self._held)

    def feed(self, tokens: Iterable[int]) -> str:
        out: list[str] = []
        for token in tokens:
            if token in self._text.markup:
                out.append(self.finish() + self._text.markup[token])
                continue
            self._held.append(token)
            fresh = self._fresh(self._held)
            if not fresh.endswith("\ufffd"):
                out.append(fresh)
                self._give(len(self._held))
            elif len(self._held) >= _HELD_TOKENS:
                out.append(self._shorten(fresh))
        return "".join(out)

    def finish(self) -> str:
        """What was held, as it stands: an unfinished character is U+FFFD."""
        fresh = self._fresh(self._held)
        self._give(len(self._held))
        return fresh

    def _fresh(self, tokens: list[int]) -> str:
        before = self._text.decode(self._context)
        return self._text.decode(self._context + tokens)[len(before) :]

    def _give(self, count: int) -> None:
        given, self._held = self._held[:count], self._held[count:]
        if self._text.decode(given):  # control tokens alone are no context
            self._context = given

    def _shorten(self, fresh: str) -> str:
        """Give out as many held ids as possible such that a cut behind them does not change the text."""
        for count in range(len(self._held) - 1, 0, -1):
            head = self._fresh(self._held[:count])
            if head + self._text.decode(self._held[count:]) == fresh:
                self._give(count)
                return head
        return ""


class StopStrings:
    """Finds the first of some strings in streamed text; holds back only what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The text that is certainly before any stop string; nothing more once one was `found`."""
        if self.found is not None:
            return ""
        self._held += text
        hits = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            # The one that ends first, because it was complete first; of those the longest.
            at, self.found = min(hits, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            out, self._held = self._held[:at], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def finish(self) -> str:
        """The end of the text: what was held is no stop string."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a proper beginning of `stop`."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )


def _cost(piece: str | Literal, tokens: TokenIds) -> int:
    """Bytes that one cached piece takes, roughly: its text, 8 per id, and the entry."""
    text = piece.text if isinstance(piece, Literal) else piece
    return 2 * len(text) + 8 * len(tokens) + 200


def _call(call_id: str, name: str, arguments: Any, shown: Callable[[str], str]) -> dict[str, Any]:
    """A call as templates are given it."""
    function = {"name": name, "arguments": arguments}
    return {"id": shown(call_id), "type": "function", "function": function}


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _guarded(value: Any, guard: Callable[[str], str]) -> Any:
    """`value`, a JSON value, with every string in it guarded."""
    match value:
        case str():
            return guard(value)
        case dict():
            return {guard(key): _guarded(inner, guard) for key, inner in value.items()}
        case list() | tuple():
            return [_guarded(inner, guard) for inner in value]
        case _:
            return value


def _without_native_tools(
    messages: tuple[ChatMessage, ...], tools: tuple[Mapping[str, Any], ...]
) -> tuple[ChatMessage, ...]:
    """The generic fallback for templates that know no tools."""
    out = [_plain(message) for message in messages]
    if tools:
        described = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        block = _TOOLS_HEADER + described + _TOOLS_FOOTER
        if out and out[0].role == "system":
            out[0] = replace(out[0], content=f"{out[0].content}\n\n{block}")
        else:
            out.insert(0, ChatMessage("system", block))
    return tuple(out)


def _plain(message: ChatMessage) -> ChatMessage:
    if message.sampled is not None:
        return message
    if message.role == "tool":
        return ChatMessage("user", f"<tool_response>\n{message.content}\n</tool_response>")
    if message.tool_calls:
        calls = [
            "<tool_call>\n"
            + json.dumps(
                {"name": call.name, "arguments": _parsed(call.arguments)}, ensure_ascii=False
            )
            + "\n</tool_call>"
            for call in message.tool_calls
        ]
        content = "\n".join([message.content, *calls] if message.content else calls)
        return ChatMessage(message.role, content)
    return message
