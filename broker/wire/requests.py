"""A `response.create` body, as sent over any transport, to a `TurnRequest`.

Laws
    What changes the answer is understood or refused by name; what does not is accepted whatever it is:
    unknown fields, `client_metadata`, `stream` in a frame, a web search that only vendors can run.
    Schemas and grammars are checked for their shape here; whether they can be enforced, the engine says.
    A refusal is a BadRequest with a code and the path of the field at fault.
    The client's own words are kept where the response repeats them (`echo`); all else is typed here, once.
"""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from broker.errors import BadRequest
from broker.wire.context import (
    CacheQuery,
    CompactionRule,
    parse_cache_query,
    parse_compaction,
    parse_conversation,
)
from broker.wire.fields import (
    as_object,
    choice,
    flag,
    invalid_type,
    invalid_value,
    join,
    missing,
    number,
    optional_array,
    optional_flag,
    optional_integer,
    optional_name,
    optional_object,
    optional_string,
    required_name,
    required_string,
    unsupported,
)
from broker.wire.items import Item, parse_input, spoken_name
from broker.wire.metadata import parse_metadata
from broker.wire.retention import applied_options, asked_ttl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.wire.fields import Json

MAX_OUTPUT_TOKENS = 2**31 - 1  # only says what is absurd; the engine clamps to the context
_STREAM_ID = re.compile(r"[A-Za-z0-9_.-]{1,256}")


class Transport(enum.Enum):
    """Decides which fields mean something: `stream_id` on a WebSocket, `background` over HTTP."""

    HTTP = "http"
    WEBSOCKET = "websocket"


class ToolKind(enum.Enum):
    FUNCTION = "function"
    CUSTOM = "custom"  # free text in; given to the model as a function of one string, `input`


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """One function that the model may call. `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Json] | None = None
    strict: bool | None = None
    namespace: str | None = None
    kind: ToolKind = ToolKind.FUNCTION
    grammar: str | None = None  # of a custom tool's input
    grammar_syntax: Literal["lark", "regex"] | None = None

    @property
    def spoken_name(self) -> str:
        """What the model sees and says."""
        return spoken_name(self.name, self.namespace)


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`names` are the spoken names of the only tools that may be called; None is all of them."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] | None = None

    def allows(self, spec: ToolSpec) -> bool:
        """Whether this tool may be called."""
        named = self.names is None or spec.spoken_name in self.names
        return self.mode != "none" and named


@dataclass(frozen=True, slots=True)
class TextFormat:
    """The message must be JSON that fits `schema`. `at` is the schema's path, for refusals.

    Not `strict`: keywords that cannot be enforced are passed over.
    """

    schema: Mapping[str, Json]
    strict: bool = False
    at: str = "text.format"


@dataclass(frozen=True, slots=True)
class Cut:
    """A place in a request: where its prompt has so many tools, characters of the instructions, whole items, and
    characters of the text of the item after them."""

    tools: int
    instructions: int
    items: int = 0
    text: int = 0


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """One request for one response. Everything that a client did not say has its default."""

    items: tuple[Item, ...]
    model: str | None = None
    instructions: str | None = None
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    text_format: TextFormat | None = None  # None: any text
    top_logprobs: int | None = None  # alternatives to each token of the message; None: no logprobs
    reasoning_effort: str | None = None  # "none" keeps a model that can from thinking aloud
    reasoning_events: bool = False  # thoughts stream; they are in the output in any case
    encrypted_reasoning: bool = False  # thoughts carry what leads back to their tokens
    max_output_tokens: int | None = None  # None: until the context is full
    previous_response_id: str | None = None
    store: bool = True
    stream: bool = False
    generate: bool = True  # False: compute the prompt's KV, answer with no output
    stream_id: str | None = None  # None is the default lane
    metadata: Mapping[str, str] = field(default_factory=dict)
    prompt_cache_key: str | None = None
    asked_ttl_s: float | None = None  # how long its KV should be kept at least; None: as ever
    cuts: tuple[
        Cut, ...
    ] = ()  # places whose token positions are said with the prompt's other numbers
    follows: str | None = None  # the response that it is compared with, where none is continued
    background: bool = False  # the turn outlives its request
    conversation: str | None = None  # the id of what the items are appended to
    context: tuple[Item, ...] = ()  # what that conversation holds: stands before `items`
    truncate: bool = False  # drop the oldest turns of a prompt that is too long
    compaction: CompactionRule | None = None
    cache_query: CacheQuery | None = None
    wire_bytes: int = 0  # that the client sent to say all this
    echo: Mapping[str, Json] = field(
        default_factory=dict
    )  # response fields: the client's own words

    def tool(self, spoken: str) -> ToolSpec | None:
        """The declared tool that the model means. A bare name is enough where it is the only one."""
        for spec in self.tools:
            if spec.spoken_name == spoken:
                return spec
        bare = [spec for spec in self.tools if spec.name == spoken]
        return bare[0] if len(bare) == 1 else None


def parse_create(body: Mapping[str, Json], *, transport: Transport) -> TurnRequest:
    """Understand a create body. Raises BadRequest with the code and path of the first fault found."""
    _refuse_unbuilt(body)
    tools = tuple(_tools(body))
    include = _include(body)
    reasoning = optional_object(body, "reasoning")
    return TurnRequest(
        items=parse_input(body.get("input")),
        model=optional_name(body, "model"),
        instructions=optional_string(body, "instructions"),
        tools=tools,
        tool_choice=_tool_choice(body, tools),
        parallel_tool_calls=flag(body, "parallel_tool_calls", default=True),
        temperature=number(body, "temperature", least=0, most=2, default=1.0),
        top_p=_top_p(body),
        seed=optional_integer(body, "seed", least=-(2**63), most=2**63 - 1),
        stop=_stop(body),
        presence_penalty=number(body, "presence_penalty", least=-2, most=2, default=0.0),
        frequency_penalty=number(body, "frequency_penalty", least=-2, most=2, default=0.0),
        text_format=_text_format(body),
        top_logprobs=_top_logprobs(body, include),
        reasoning_effort=optional_string(reasoning or {}, "effort", at="reasoning"),
        reasoning_events=reasoning is not None,
        encrypted_reasoning="reasoning.encrypted_content" in include,
        max_output_tokens=optional_integer(
            body, "max_output_tokens", least=1, most=MAX_OUTPUT_TOKENS
        ),
        previous_response_id=optional_name(body, "previous_response_id"),
        store=flag(body, "store", default=True),
        stream=flag(body, "stream", default=False),
        generate=_generate(body),
        stream_id=parse_stream_id(body) if transport is Transport.WEBSOCKET else None,
        metadata=parse_metadata(body),
        prompt_cache_key=optional_name(body, "prompt_cache_key"),
        asked_ttl_s=asked_ttl(body),
        background=transport is Transport.HTTP and _background(body),
        conversation=parse_conversation(body),
        truncate=choice(body, "truncation", ("auto", "disabled"), default="disabled") == "auto",
        compaction=parse_compaction(body),
        cache_query=parse_cache_query(body),
        echo=_echo(body),
    )


def parse_stream_id(body: Mapping[str, Json]) -> str | None:
    """The named lane of a frame, None for the default lane. Raises BadRequest `invalid_stream_id`."""
    value = body.get("stream_id")
    if value is None:
        return None
    if not isinstance(value, str) or not _STREAM_ID.fullmatch(value):
        raise BadRequest(
            "The 'stream_id' field must be a non-empty string with at most 256 characters and may "
            "only contain letters, numbers, underscores, hyphens, and periods.",
            code="invalid_stream_id",
            param="stream_id",
        )
    return value


def _refuse_unbuilt(body: Mapping[str, Json]) -> None:
    """Say no to what would be answered wrongly if it were ignored."""
    if body.get("prompt") is not None:
        raise unsupported("prompt", "No prompt templates are stored here: send 'instructions'.")


def _include(body: Mapping[str, Json]) -> frozenset[str]:
    """What the client wants besides. What is not known is not there: every client asks for some vendor's own."""
    return frozenset(
        name for name in optional_array(body, "include") or [] if isinstance(name, str)
    )


MAX_TOP_LOGPROBS = 20


def _top_logprobs(body: Mapping[str, Json], include: frozenset[str]) -> int | None:
    top = optional_integer(body, "top_logprobs", least=0, most=MAX_TOP_LOGPROBS)
    return top or (0 if "message.output_text.logprobs" in include else None)


_TEXT_FORMATS = ("text", "json_object", "json_schema")
_FORMAT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_SCHEMA_CHARS = 1 << 20  # a guess: real ones have thousands


def _text_format(body: Mapping[str, Json]) -> TextFormat | None:
    text = optional_object(body, "text") or {}
    form = optional_object(text, "format", at="text") or {}
    kind = choice(form, "type", _TEXT_FORMATS, default="text", at="text.format")
    if kind == "text":
        return None
    if kind == "json_object":
        return TextFormat({"type": "object"})
    _format_name(form, "text.format")
    return TextFormat(
        schema=required_schema(form, "schema", at="text.format"),
        strict=flag(form, "strict", default=False, at="text.format"),
        at="text.format.schema",
    )


def _format_name(form: Mapping[str, Json], at: str) -> str:
    name = required_name(form, "name", at=at, max_chars=64)
    if not _FORMAT_NAME.fullmatch(name):
        raise BadRequest(
            f"Invalid '{at}.name': string does not match pattern. Expected a string that matches the "
            "pattern '^[a-zA-Z0-9_-]+$'.",
            code="invalid_value",
            param=join(at, "name"),
        )
    return name


def required_schema(obj: Mapping[str, Json], key: str, *, at: str) -> Mapping[str, Json]:
    """A JSON schema of a size that is worth compiling. What it says is the engine's to judge."""
    schema = optional_object(obj, key, at=at)
    if schema is None:
        raise missing(join(at, key))
    return _bounded(schema, join(at, key))


def _bounded(schema: Mapping[str, Json], at: str) -> Mapping[str, Json]:
    if (length := len(json.dumps(schema))) > MAX_SCHEMA_CHARS:
        raise BadRequest(
            f"Invalid '{at}': schema too long. Expected at most {MAX_SCHEMA_CHARS} characters of JSON, "
            f"but got {length} instead.",
            code="invalid_json_schema",
            param=at,
        )
    return schema


def _generate(body: Mapping[str, Json]) -> bool:
    options = optional_object(body, "prompt_cache_options") or {}
    prewarm = flag(options, "prewarm", default=False, at="prompt_cache_options")
    return flag(body, "generate", default=True) and not prewarm


def _background(body: Mapping[str, Json]) -> bool:
    """Whether the client will ask again. Such a response must be stored, or it could not be asked for."""
    background = flag(body, "background", default=False)
    if background and not flag(body, "store", default=True):
        raise BadRequest(
            "Background responses must be stored: 'background' needs 'store' to be true.",
            code="invalid_value",
            param="background",
        )
    if background and not _generate(body):
        raise BadRequest(
            "A warm-up has nothing to run in the background: it answers at once.",
            code="invalid_value",
            param="background",
        )
    return background


def _top_p(body: Mapping[str, Json]) -> float:
    value = number(body, "top_p", least=0, most=1, default=1.0)
    if value == 0:
        raise BadRequest(
            "Invalid 'top_p': decimal below minimum value. Expected a value > 0, but got 0 instead.",
            code="decimal_below_min_value",
            param="top_p",
        )
    return value


_MAX_STOPS = 16


def _stop(body: Mapping[str, Json]) -> tuple[str, ...]:
    """Stop strings: no part of this API, but local clients send them and mean it."""
    value = body.get("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise invalid_type("stop", "one of a string or array of strings", stops)
    if len(stops) > _MAX_STOPS:
        raise BadRequest(
            f"Invalid 'stop': array too long. Expected an array with maximum length {_MAX_STOPS}, "
            f"but got an array with length {len(stops)} instead.",
            code="array_above_max_length",
            param="stop",
        )
    for index, stop in enumerate(stops):
        if not isinstance(stop, str):
            raise invalid_type(f"stop[{index}]", "a string", stop)
    return tuple(stop for stop in stops if stop)


# Tools

_CUSTOM_PARAMETERS: Mapping[str, Json] = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
}
_TOOL_TYPES = ("function", "custom", "namespace", "web_search")


def _tools(body: Mapping[str, Json]) -> list[ToolSpec]:
    specs: list[ToolSpec] = []
    for index, value in enumerate(optional_array(body, "tools") or []):
        at = f"tools[{index}]"
        obj = as_object(value, at)
        if optional_string(obj, "type", at=at) != "namespace":
            specs += _tool(obj, at, namespace=None)
            continue
        namespace = required_name(obj, "name", at=at)
        for inner, member in enumerate(optional_array(obj, "tools", at=at) or []):
            path = f"{at}.tools[{inner}]"
            specs += _tool(as_object(member, path), path, namespace=namespace)
    return specs


def _tool(obj: Mapping[str, Json], at: str, *, namespace: str | None) -> list[ToolSpec]:
    """No tool at all for a web search: the vendor runs it, and a model here simply does not have it."""
    kind = optional_string(obj, "type", at=at)
    if kind is None:
        raise missing(join(at, "type"))
    if kind.startswith("web_search"):
        return []
    if kind not in ("function", "custom"):
        raise invalid_value(join(at, "type"), kind, _TOOL_TYPES)
    parameters = optional_object(obj, "parameters", at=at)
    if parameters is not None:
        _bounded(parameters, join(at, "parameters"))
    grammar, syntax = _grammar(obj, at) if kind == "custom" else (None, None)
    return [
        ToolSpec(
            name=required_name(obj, "name", at=at, max_chars=128),
            description=optional_string(obj, "description", at=at),
            parameters=parameters if kind == "function" else _CUSTOM_PARAMETERS,
            strict=optional_flag(obj, "strict", at=at),
            namespace=namespace,
            kind=ToolKind(kind),
            grammar=grammar,
            grammar_syntax=syntax,
        )
    ]


_SYNTAXES: tuple[Literal["lark", "regex"], ...] = ("lark", "regex")


def _grammar(
    tool: Mapping[str, Json], at: str
) -> tuple[str | None, Literal["lark", "regex"] | None]:
    """What a custom tool's input must be, if it says."""
    form = optional_object(tool, "format", at=at) or {}
    at = join(at, "format")
    if choice(form, "type", ("text", "grammar"), default="text", at=at) == "text":
        return None, None
    definition = required_string(form, "definition", at=at)
    if len(definition) > MAX_SCHEMA_CHARS:
        raise BadRequest(
            f"Invalid '{at}.definition': string too long.",
            code="string_above_max_length",
            param=join(at, "definition"),
        )
    given = required_string(form, "syntax", at=at)
    for syntax in _SYNTAXES:
        if given == syntax:
            return definition, syntax
    raise invalid_value(join(at, "syntax"), given, _SYNTAXES)


_CHOICE_MODES: tuple[Literal["auto", "none", "required"], ...] = ("auto", "none", "required")
_CHOICE_TYPES = ("function", "custom", "allowed_tools")


def _tool_choice(body: Mapping[str, Json], tools: tuple[ToolSpec, ...]) -> ToolChoice:
    value = body.get("tool_choice")
    if value is None:
        return ToolChoice()
    if isinstance(value, str):
        chosen = ToolChoice(_mode(value, "tool_choice", _CHOICE_MODES))
    elif isinstance(value, dict):
        chosen = _choice_object(value, tools)
    else:
        raise invalid_type("tool_choice", "one of a string or object", value)
    if chosen.mode == "required" and not any(map(chosen.allows, tools)):
        raise BadRequest(
            "Tool choice 'required' must be specified with 'tools' parameter.",
            code="invalid_value",
            param="tool_choice",
        )
    return chosen


def _choice_object(value: dict[str, Json], tools: tuple[ToolSpec, ...]) -> ToolChoice:
    kind = required_name(value, "type", at="tool_choice")
    if kind not in _CHOICE_TYPES:
        raise invalid_value("tool_choice.type", kind, _CHOICE_TYPES)
    if kind != "allowed_tools":
        return ToolChoice("required", tuple(_named(value, "tool_choice", tools)))
    mode = _mode(
        choice(value, "mode", ("auto", "required"), default="auto", at="tool_choice"),
        "tool_choice.mode",
        _CHOICE_MODES,
    )
    names: list[str] = []
    for index, entry in enumerate(optional_array(value, "tools", at="tool_choice") or []):
        path = f"tool_choice.tools[{index}]"
        allowed = as_object(entry, path)
        if not str(allowed.get("type")).startswith("web_search"):
            names += _named(allowed, path, tools)
    return ToolChoice(mode, tuple(names))


def _mode(
    given: str, path: str, modes: tuple[Literal["auto", "none", "required"], ...]
) -> Literal["auto", "none", "required"]:
    for mode in modes:
        if given == mode:
            return mode
    raise invalid_value(path, given, modes)


def _named(entry: Mapping[str, Json], at: str, tools: tuple[ToolSpec, ...]) -> list[str]:
    """Spoken names of the tools that an entry of a tool choice names; a namespace may be left out."""
    name = required_name(entry, "name", at=at)
    namespace = optional_name(entry, "namespace", at=at)
    names = [
        spec.spoken_name
        for spec in tools
        if spec.name == name and namespace in (None, spec.namespace)
    ]
    if not names:
        raise BadRequest(
            f"Tool choice '{name}' not found in 'tools' parameter.",
            code="invalid_value",
            param=join(at, "name"),
        )
    return names


# What the response repeats

_ECHOED_AS_SENT = ("tool_choice", "user", "prompt_cache_retention")
_SAFETY_IDENTIFIER_CHARS = 128


def _echo(body: Mapping[str, Json]) -> dict[str, Json]:
    """Response fields that the client set, completed to what the published schema requires of them.

    `service_tier` is only checked: the response says what was done, not what was asked.
    """
    optional_string(body, "service_tier")
    text = optional_object(body, "text") or {}
    echo: dict[str, Json] = {
        "tools": [_echo_tool(tool) for tool in optional_array(body, "tools") or []],
        "text": {**text, "format": text.get("format") or {"type": "text"}},
        "max_tool_calls": optional_integer(body, "max_tool_calls", least=1, most=2**31 - 1),
        "safety_identifier": optional_string(
            body, "safety_identifier", max_chars=_SAFETY_IDENTIFIER_CHARS
        ),
    }
    reasoning = optional_object(body, "reasoning")
    if reasoning is not None:
        echo["reasoning"] = {"effort": None, "summary": None, **reasoning}
    options = applied_options(body)
    if options is not None:
        echo["prompt_cache_options"] = options
    return echo | {key: body[key] for key in _ECHOED_AS_SENT if body.get(key) is not None}


def _echo_tool(tool: dict[str, Json]) -> dict[str, Json]:
    if tool["type"] != "function":
        return tool
    return {"description": None, "parameters": None, "strict": None, **tool}
