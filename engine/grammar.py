"""Constrained decoding: a constraint becomes a matcher, and a matcher says which ids may come next.

Laws
    The only home of the library. What others see is `Grammars`, `Matcher` and the algebra of `engine/constraint.py`.
    An id that a matcher does not allow has no probability, whatever the logits are.
    A matcher belongs to one sequence and moves by its appended ids alone: preempting the sequence changes nothing.
    Compiling reads no clock and waits for nobody; the service runs it on a thread of its own, with a deadline.
    What the library does not enforce of a schema (`not`, `uniqueItems`, look-around, …) is refused, never ignored,
    unless the constraint is lenient. What might nest too deep for its stack is refused always (engine/nesting.py).

Why llguidance (1.9.1, MIT) and not xgrammar (0.2.8): measured 2026-11 on two x86 cores, the default model's 49,152 ids;
a mask is one allowed set and one step of the matcher, over 2,000 random steps each.

    schema                      compile, best of 3-5     mask: mean, p99
                                llguidance  xgrammar     llguidance    xgrammar
    weather tool                0.3 ms      5.6 ms       13, 98 µs     18, 67 µs
    Codex' shell tool           0.5 ms      5.1 ms       12, 90 µs     10, 44 µs
    invoice: nested, patterns   0.9 ms      392 ms       11, 71 µs      7, 15 µs
    recursive tree              0.3 ms      5.3 ms       13, 95 µs     36, 105 µs
    100 enums of 20             5.3 ms      52 ms        12, 82 µs     13, 28 µs
    any object                  0.4 ms      6.0 ms       16, 99 µs     34, 83 µs
    to install                  3.1 MB,     1.3 MB + tvm-ffi 3.3 MB
                                no deps     + triton 286 MB

Both masks vanish beside a step of the model; compiling is on the way to a request's first token. llguidance also takes
Lark as it is sent by clients, nests grammars, and asks for nothing else, so it never fights over a torch.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

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
    first_at,
    leaves,
)
from engine.nesting import MAX_NESTING, lark_nesting, schema_nesting

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from engine.constraint import Constraint

MAX_ENTRIES = 256  # compiled grammars that are kept
MAX_BYTES = 16 << 20  # the length of all their sources; a compiled one takes several times its own
_MAX_SOURCE = 4 << 20  # of one: the largest that the library's authors have seen work
# The defaults allow seconds of compiling and half a GB of lexer states (1-2 kB each) for one request (guessed).
_LIMITS = LLParserLimits(max_lexer_states=50_000, max_grammar_size=250_000, verbose_errors=False)
# JSON allows any white space between tokens; small models then never stop writing it. Enough for a deep indent.
_JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}
_BLANK = "/[ \\t\\r\\n]{0,8}/"


class Matcher:
    """Where one generation stands in its grammar."""

    __slots__ = ("_compiled", "_matcher")

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled
        self._matcher: LLMatcher = compiled.beginning.deep_copy()

    def allow(self, row: torch.Tensor) -> None:
        """Write the allowed ids, one bit each, to `row`: int32 on the CPU, contiguous; zeros behind them."""
        words = self._compiled.words
        assert row.is_contiguous(), "a row of a mask"
        assert row.numel() >= words, "the model has fewer ids than the tokenizer"
        row[words:] = 0
        self._matcher.unsafe_compute_mask_ptr(row.data_ptr(), words * 4)

    def accept(self, token: int) -> bool:
        """Go on by an id. False if it cannot: not allowed, or the grammar proved too complex on the way.

        One that failed allows a stop id, and takes it as if all were well: that would be a quiet wrong answer.
        """
        accepted = bool(self._matcher.consume_token(token)) and not self._matcher.is_error()
        if not accepted:
            self._compiled.broken = True
        return accepted

    @property
    def complete(self) -> bool:
        """Whether nothing but a stop id may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def fault(self) -> str:
        """Why it went wrong; for the log."""
        return self._matcher.get_error().partition("\n")[0]


@dataclass(slots=True, eq=False)
class Compiled:
    """A grammar of one vocabulary. What its matchers find out about it, they share; so they share its limits."""

    constraint: Constraint
    beginning: LLMatcher
    words: int  # of a mask, 32 ids each
    size: int  # of its source
    broken: bool = False  # it hit a limit while it was used: the next request compiles it anew


class Grammars:
    """One model's vocabulary, and the grammars that were compiled for it, least recently used first out.

    `compile` may run on any thread; all else belongs to one.
    """

    def __init__(
        self,
        tokenizer: LLTokenizer,
        *,
        controls: Mapping[int, str] | None = None,
        max_entries: int = MAX_ENTRIES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """`controls` are the texts of the ids that are not text."""
        self._tokenizer = tokenizer
        self._controls = dict(controls or {})
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Constraint, Compiled] = OrderedDict()
        self._bytes = 0

    @classmethod
    def of_tokenizer(cls, tokenizer_json: str, stop_ids: Iterable[int]) -> Grammars:
        """From the text of a `tokenizer.json`. Takes a third of a second for 49,152 ids.

        Where only one text is possible, the library forces the ids that the tokenizer makes of it; of text that reads
        like a control token (`"enum": ["<filename>"]`) that would be the control token, which is none of the text, and
        the matcher fails. So control tokens get names that nobody can write.
        """
        stops, plain = sorted(stop_ids), json.loads(tokenizer_json)
        names = {added["id"]: added["content"] for added in plain["added_tokens"]}
        controls = {added["id"] for added in plain["added_tokens"] if added["special"]}
        while True:
            hidden = {token: names[token] for token in controls}
            tokenizer = LLTokenizer(json.dumps(_renamed(plain, hidden)), eos_token=stops)
            # The library takes some others for control tokens by their looks.
            looks = {token for token in names if tokenizer.is_special_token(token)}
            if looks <= controls:
                return cls(tokenizer, controls=hidden)
            controls |= looks

    @classmethod
    def of_tokens(
        cls,
        tokens: Sequence[bytes],
        special: Sequence[int],
        stop_ids: Iterable[int],
    ) -> Grammars:
        """From the bytes of each id, where every byte is an id of its own."""
        stops = sorted(stop_ids)
        wrapper = TokenizerWrapper(_Bytes(list(tokens), list(special), stops[0]))
        return cls(LLTokenizer(wrapper, n_vocab=len(tokens), eos_token=stops))

    def token_bytes(self, token: int) -> bytes:
        """What an id stands for: not always whole characters."""
        if token in self._controls:
            return self._controls[token].encode()
        return bytes(self._tokenizer.decode_bytes([token]))

    def find(self, constraint: Constraint) -> Compiled | None:
        compiled = self._kept.get(constraint)
        if compiled is None or compiled.broken:
            return None
        self._kept.move_to_end(constraint)
        return compiled

    def keep(self, compiled: Compiled) -> None:
        before = self._kept.pop(compiled.constraint, None)
        self._kept[compiled.constraint] = compiled
        self._bytes += compiled.size - (0 if before is None else before.size)
        while len(self._kept) > self._max_entries or self._bytes > self._max_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].size

    @property
    def entries(self) -> int:
        return len(self._kept)

    def compile(self, constraint: Constraint) -> Compiled:
        """Raises ConstraintRefused. What a schema or a grammar may cost is bounded by its size and by limits."""
        source = _Rendering(constraint).json()
        if len(source) > _MAX_SOURCE:
            raise ConstraintRefused(
                f"it is longer than {_MAX_SOURCE} characters", first_at(constraint)
            )
        for leaf in leaves(constraint):
            self._check(leaf)
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise ConstraintRefused(_sentence(matcher.get_error()), first_at(constraint))
        words = (self._tokenizer.vocab_size + 31) // 32
        return Compiled(constraint, matcher, words, len(source))

    def _check(self, leaf: Json | Regex | Lark) -> None:
        """By itself, so that a refusal names the field at fault."""
        if _nesting(leaf) > MAX_NESTING:
            raise ConstraintRefused(f"it nests more than {MAX_NESTING} levels deep", leaf.at)
        alone = _Rendering(leaf).json()
        refused, said = LLMatcher.validate_grammar_with_warnings(
            alone, self._tokenizer, limits=_LIMITS
        )
        if refused:
            raise ConstraintRefused(_sentence(said[0]), leaf.at)


def _nesting(leaf: Json | Regex | Lark) -> int:
    match leaf:
        case Json(schema):
            return schema_nesting(schema)
        case Lark(grammar):
            return lark_nesting(grammar)
        case Regex():  # the library has a bound of its own
            return 0


@dataclass(slots=True)
class _Bytes:
    """What the library's wrapper asks of a tokenizer: ids that are bytes encode text by themselves."""

    tokens: list[bytes]
    special_token_ids: list[int]
    eos_token_id: int
    bos_token_id: int | None = None

    def __call__(self, text: bytes) -> list[int]:
        return [self.tokens.index(bytes([byte])) for byte in text]


def _renamed(tokenizer: dict[str, Any], controls: Mapping[int, str]) -> dict[str, Any]:
    """A `tokenizer.json` in which these ids have other names, wherever it has them."""
    nonce = secrets.token_hex(8)
    names = {content: f"<|{nonce} {token}|>" for token, content in controls.items()}
    model = tokenizer["model"]
    vocab: Any = model["vocab"]
    if isinstance(vocab, dict):
        vocab = {names.get(name, name): token for name, token in vocab.items()}
    else:  # a unigram's: [[name, score], …]
        vocab = [[names.get(name, name), score] for name, score in vocab]
    unknown = model.get("unk_token")
    return {
        **tokenizer,
        "model": {**model, "vocab": vocab, "unk_token": names.get(unknown, unknown)},
        "added_tokens": [
            {**added, "content": names.get(added["content"], added["content"])}
            for added in tokenizer["added_tokens"]
        ],
    }


class _Rendering:
    """A constraint in the library's form of Lark: one rule a node, clients' grammars beside it."""

    def __init__(self, constraint: Constraint) -> None:
        self._rules: list[str] = []
        self._names: dict[Constraint, str] = {}
        self._beside: list[dict[str, str]] = []
        self._rules.append(f"start: {self._rule(constraint)}")

    def json(self) -> str:
        main = {"name": "main", "lark_grammar": "\n".join(self._rules) + "\n"}
        return json.dumps({"grammars": [main, *self._beside]})

    def _rule(self, constraint: Constraint) -> str:
        """The name of its rule; the same for what is equal."""
        name = self._names.get(constraint)
        if name is None:
            body, options = self._body(constraint), ""
            if isinstance(constraint, Until):
                options = "[lazy]"
            name = self._names[constraint] = f"r{len(self._names)}"
            self._rules.append(f"{name}{options}: {body}")
        return name

    def _body(self, constraint: Constraint) -> str:
        match constraint:
            case Exactly(text):
                return json.dumps(text, ensure_ascii=False)
            case Token(token):
                return f"<[{token}]>"
            case Json(schema, _, lenient):
                return f"%json {_with_options(schema, lenient=lenient)}"
            case Regex(pattern):
                [grammar] = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"]
                return self._nested(grammar["lark_grammar"])
            case Lark(grammar):
                return self._nested(grammar)
            case Until(end):
                return f"/(?s:.*){_escaped(end)}/"
            case Anything():
                return "/(?s:.*)/"
            case Blank():
                return _BLANK
            case InTurn(parts):
                return " ".join(map(self._rule, parts)) or '""'
            case OneOf(options):
                return " | ".join(map(self._rule, options))
            case Times(part, least, most):
                return f"{self._rule(part)}{{{least},{'' if most is None else most}}}"

    def _nested(self, grammar: str) -> str:
        name = f"g{len(self._beside)}"
        self._beside.append({"name": name, "lark_grammar": grammar})
        return f"@{name}"


def _with_options(schema: str, *, lenient: bool) -> str:
    """Our options in place of any that a client sent: it might ask for less than its own schema says."""
    value: Any = json.loads(schema)
    if value is True:
        value = {}
    if isinstance(value, dict):
        value = {**value, "x-guidance": {**_JSON_OPTIONS, "lenient": lenient}}
    return json.dumps(value)


def _escaped(text: str) -> str:
    """As part of a Lark regex: every character that could mean something by its code."""
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):X}}}" for c in text)


_WHERE = re.compile(
    r"^at \d+\(\d+\): (failed to compile JSON schema: )?"
)  # in our Lark, not in their text


def _sentence(fault: str) -> str:
    """The library's words on one line, without the source that it quotes."""
    lines = [line.strip() for line in fault.partition("\n\n")[0].splitlines() if " | " not in line]
    return _WHERE.sub("", " ".join(filter(None, lines)))[:300]
