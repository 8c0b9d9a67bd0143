"""What a model says: sampled ids to events. Pure.

    ids -> text -> up to a stop string -> thoughts | the rest -> raw calls -> the template's calls -> events

Laws
    However the ids are cut, the events say the same; a delta is whole characters.
    Calls are looked for only where the request allows any.
    Logprobs go with the text of their tokens: with the first delta that comes once it is known to be a message's.
    Those of thoughts, calls and markup are nobody's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.forms import callable_tools, raw_tools
from broker.wire.custom_input import InputReader
from broker.wire.rawcalls import CallInput, RawCallSplitter
from broker.wire.requests import ToolKind
from broker.wire.thoughts import Thought, ThoughtSplitter
from broker.wire.toolcalls import CallArguments, CallEnd, CallStart, ToolCallSplitter
from broker.wire.toolcalls import Text as Said
from broker.wire.toolcalls_llama import LlamaSplitter
from broker.wire.toolcalls_mistral import MistralSplitter
from engine.text import StopStrings, ToolSyntax

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from broker.wire.requests import TurnRequest
    from broker.wire.responses_out import ResponseStream
    from broker.wire.toolcalls import Piece, Splitter
    from engine.api import Likelihood, Sampled
    from engine.text import Text

Event = dict[str, Any]


class Speech:
    """One answer. `thinking`: the template has opened the model's thoughts already.

    `token_bytes` says what one id stands for; it is asked only for logprobs.
    """

    def __init__(
        self,
        request: TurnRequest,
        stream: ResponseStream,
        text: Text,
        *,
        new_id: Callable[[str], str],
        token_bytes: Callable[[int], bytes],
        thinking: bool,
    ) -> None:
        self.sampled: list[int] = []  # up to and with the id that completed a stop string
        self.reasoning_tokens = 0
        self._request = request
        self._stream = stream
        self._new_id = new_id
        self._token_bytes = token_bytes
        self._stop_ids = text.stop_ids
        self._detokenizer = text.detokenizer()
        self._stops = StopStrings(request.stop)
        markers = text.thoughts
        self._thoughts = None if markers is None else ThoughtSplitter(markers, inside=thinking)
        raw = [tool.spoken_name for tool in raw_tools(request)]
        self._raw = RawCallSplitter(raw) if raw else None
        self._calls = splitter(text.tool_syntax) if callable_tools(request) else None
        self._input: InputReader | None = None  # of the open call, if it is a custom tool's
        self._logprobs: list[Event] = []  # of tokens whose text is not said yet
        self._unstopped = 0  # characters that may begin a stop string
        self._undecided = 0  # characters that are a call's, or may be

    @property
    def can_be_cut(self) -> bool:
        """Whether something was said, all of it is out as text (no thought or call has begun), and it is not over anyway."""
        thoughts = self._thoughts
        thinking = thoughts is not None and (thoughts.thinking or thoughts.holds)
        held = self._undecided or self._unstopped or self._detokenizer.holds or thinking
        going_on = bool(self.sampled) and self.sampled[-1] not in self._stop_ids
        return going_on and not held

    @property
    def stopped(self) -> bool:
        """Whether a stop string was said."""
        return self.stop_sequence is not None

    @property
    def stop_sequence(self) -> str | None:
        """The stop string that was said."""
        return self._stops.found

    def feed(self, sampled: Sampled) -> list[Event]:
        events: list[Event] = []
        for at, token in enumerate(sampled.tokens):
            if self.stopped:
                break
            self.sampled.append(token)
            if token in self._stop_ids:
                continue
            if sampled.likelihoods:
                self._logprobs.append(self._logprob(token, sampled.likelihoods[at]))
            thinking = self._thoughts is not None and self._thoughts.thinking
            text = self._detokenizer.feed((token,))
            clear = self._stops.feed(text)
            self._unstopped += len(text) - len(clear)
            events += self._text(clear)
            if thinking or (self._thoughts is not None and self._thoughts.thinking):
                self.reasoning_tokens += 1
        return events

    def finish(self) -> list[Event]:
        events = self._text(self._stops.feed(self._detokenizer.finish()) + self._stops.finish())
        if self._thoughts is not None:
            events += self._thought_pieces(self._thoughts.finish())
        if self._raw is not None:
            events += self._raw_pieces(self._raw.finish())
        if self._calls is not None:
            events += self._pieces(self._calls.finish())
        if self._input is not None:
            events += self._stream.call_arguments(self._input.finish())
        return events

    # each stage hands on what it leaves as text

    def _text(self, text: str) -> list[Event]:
        if not text:
            return []
        if self._thoughts is None:
            return self._rest(text)
        return self._thought_pieces(self._thoughts.feed(text))

    def _thought_pieces(self, pieces: Iterable[Thought | Said]) -> list[Event]:
        events: list[Event] = []
        for piece in pieces:
            match piece:
                case Thought():
                    self._logprobs.clear()
                    events += self._stream.thought(piece.text)
                case Said():
                    events += self._rest(piece.text)
        return events

    def _rest(self, text: str) -> list[Event]:
        self._undecided += len(text)
        if self._raw is None:
            return self._unraw(text)
        return self._raw_pieces(self._raw.feed(text))

    def _raw_pieces(self, pieces: Iterable[Piece | CallInput]) -> list[Event]:
        events: list[Event] = []
        for piece in pieces:
            match piece:
                case Said():
                    events += self._unraw(piece.text)
                case CallInput():
                    self._input = None  # as it is
                    events += self._stream.call_arguments(piece.delta)
                case _:
                    events += self._pieces((piece,))
        return events

    def _unraw(self, text: str) -> list[Event]:
        if self._calls is None:
            return self._say(text)
        return self._pieces(self._calls.feed(text))

    def _pieces(self, pieces: Iterable[Piece]) -> list[Event]:
        events: list[Event] = []
        for piece in pieces:
            match piece:
                case Said():
                    events += self._say(piece.text)
                case CallStart():
                    self._logprobs.clear()
                    spec = self._request.tool(piece.name)
                    custom = spec is not None and spec.kind is ToolKind.CUSTOM
                    self._input = InputReader() if custom else None
                    events += self._stream.call_start(piece.name, self._new_id("call"))
                case CallArguments():
                    self._logprobs.clear()
                    read = self._input
                    delta = piece.delta if read is None else read.feed(piece.delta)
                    events += self._stream.call_arguments(delta)
                case CallEnd():
                    self._logprobs.clear()
                    if self._input is not None:
                        events += self._stream.call_arguments(self._input.finish())
                        self._input = None
                    events += self._stream.call_end()
        return events

    def _say(self, text: str) -> list[Event]:
        """The text and its tokens: the last ones, as many as spell it. Those before were markup."""
        self._undecided -= len(text)
        waiting, self._logprobs = self._logprobs, []
        spelled, first = 0, len(waiting)
        while first and spelled < len(text.encode()):
            first -= 1
            spelled += len(waiting[first]["bytes"])
        return self._stream.text(text, waiting[first:])

    def _logprob(self, token: int, likelihood: Likelihood) -> Event:
        top = [self._named(each, logprob) for each, logprob in likelihood.top]
        return {**self._named(token, likelihood.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> Event:
        spelled = self._token_bytes(token)
        return {
            "token": spelled.decode(errors="replace"),
            "bytes": list(spelled),
            "logprob": logprob,
        }


def splitter(syntax: ToolSyntax) -> Splitter:
    match syntax:
        case ToolSyntax.HERMES:
            return ToolCallSplitter()
        case ToolSyntax.LLAMA3:
            return LlamaSplitter()
        case ToolSyntax.MISTRAL | ToolSyntax.MISTRAL_ARGS:
            return MistralSplitter()
