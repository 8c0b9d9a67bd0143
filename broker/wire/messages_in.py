"""An Anthropic `/v1/messages` body to a `TurnRequest`, and to the layout of its cache breakpoints. Pure.

Laws
    What changes the answer is understood or refused by name; unknown fields, beta flags and tools that only the vendor
    can run are accepted and do nothing.
    More tokens asked for than the context holds are no fault: agents ask for 32,000 of every model.

What the prompt is made of is read by `messages_prompt`. The rest of a turn knows one kind of call id and of response
id: see `messages_ids`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from broker.errors import BadRequest
from broker.wire.cache_control import Layout, lay_out
from broker.wire.fields import (
    choice,
    flag,
    invalid_type,
    invalid_value,
    join,
    missing,
    number,
    optional_array,
    optional_integer,
    optional_name,
    optional_object,
    optional_string,
    required_name,
)
from broker.wire.messages_ids import response_id
from broker.wire.messages_prompt import mark, read_content
from broker.wire.requests import (
    MAX_OUTPUT_TOKENS,
    TextFormat,
    ToolChoice,
    TurnRequest,
    required_schema,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.wire.fields import Json
    from broker.wire.requests import ToolSpec

Thinking = Literal["shown", "sealed", "hidden"]

_MAX_STOPS = 64
_MAX_USER_ID_CHARS = 512


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    """`thinking` is how thoughts are shown: in words, as a sealed block without words, or not at all."""

    turn: TurnRequest
    layout: Layout
    thinking: Thinking
    user_id: str | None
    diagnosed: bool  # whether the client asked why its prompt's cached prefix was not reused


def parse_messages(body: Mapping[str, Json]) -> MessagesRequest:
    """Understand a body that asks for a message. Raises BadRequest with the path of the first fault found."""
    max_tokens = optional_integer(body, "max_tokens", least=0, most=MAX_OUTPUT_TOKENS)
    if max_tokens is None:
        raise missing("max_tokens")
    request = _parse(body, max_tokens)
    if max_tokens == 0:
        _check_prewarm(body, request)
    messages = optional_array(body, "messages") or []
    if messages[-1].get("role") == "assistant":
        raise BadRequest(
            "This model does not support assistant message prefill."
            " The conversation must end with a user message.",
            code="unsupported_prefill",
            param=f"messages[{len(messages) - 1}]",
        )
    return request


def parse_count(body: Mapping[str, Json]) -> TurnRequest:
    """Understand a body whose tokens are to be counted: the same without `max_tokens`. Raises BadRequest."""
    return _parse(body, None).turn


def _parse(body: Mapping[str, Json], max_tokens: int | None) -> MessagesRequest:
    content = read_content(body)
    layout = lay_out(content.blocks, mark(body, ""))
    thinking, reasoning = _thinking(body)
    tool_choice, parallel = _tool_choice(body, content.tools)
    diagnostics = optional_object(body, "diagnostics")
    before = (
        None
        if diagnostics is None
        else optional_name(diagnostics, "previous_message_id", at="diagnostics")
    )
    user_id = _user_id(body)
    turn = TurnRequest(
        items=content.items,
        model=optional_name(body, "model"),
        instructions=content.instructions,
        tools=content.tools,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel,
        temperature=_temperature(body),
        top_p=_top_p(body),
        stop=_stop_sequences(body),
        text_format=_text_format(body),
        reasoning_effort="none" if reasoning is None else reasoning["effort"],
        reasoning_events=reasoning is not None,
        encrypted_reasoning=reasoning is not None,
        max_output_tokens=max_tokens,
        store=False,
        stream=flag(body, "stream", default=False),
        metadata={} if user_id is None else {"user_id": user_id},
        asked_ttl_s=layout.longest_s,
        cuts=layout.cuts,
        follows=None if before is None else response_id(before),
        echo={} if reasoning is None else {"reasoning": reasoning},
    )
    return MessagesRequest(turn, layout, thinking, user_id, diagnostics is not None)


def _check_prewarm(body: Mapping[str, Json], request: MessagesRequest) -> None:
    """`max_tokens: 0` computes the prompt's KV and says nothing. Raises BadRequest where something was to be said."""
    thinking = optional_object(body, "thinking") or {}
    for path, wrong in (
        ("stream", request.turn.stream),
        ("thinking", thinking.get("type") == "enabled"),
        ("tool_choice", request.turn.tool_choice.mode == "required"),
        ("output_config.format", request.turn.text_format is not None),
    ):
        if wrong:
            raise BadRequest(
                f"'max_tokens' is 0, which says nothing, and '{path}' asks for an answer.",
                code="invalid_value",
                param=path,
            )


# The mapping of `output_config.format`, the one place where structured output enters this API. Until a turn can be held
# to a schema, a client that needs one must hear so.
def _text_format(body: Mapping[str, Json]) -> TextFormat | None:
    """What the answer's text must be. `output_format` is its name in the beta. Always strict, as at Anthropic."""
    config = optional_object(body, "output_config") or {}
    optional_string(config, "effort", at="output_config")
    for path, form in (
        ("output_config.format", optional_object(config, "format", at="output_config")),
        ("output_format", optional_object(body, "output_format")),
    ):
        if form is not None:
            kind = required_name(form, "type", at=path)
            if kind != "json_schema":
                raise invalid_value(join(path, "type"), kind, ("json_schema",))
            schema = required_schema(form, "schema", at=path)
            return TextFormat(schema, strict=True, at=join(path, "schema"))
    return None


def _thinking(
    body: Mapping[str, Json],
) -> tuple[Thinking, dict[str, Json] | None]:
    """How thoughts are shown, and the same wish as the Responses field `reasoning`."""
    thinking = optional_object(body, "thinking") or {}
    kinds = ("enabled", "adaptive", "disabled", "between_tools")
    kind = choice(thinking, "type", kinds, default="disabled", at="thinking")
    optional_integer(thinking, "budget_tokens", least=1, most=MAX_OUTPUT_TOKENS, at="thinking")
    display = choice(
        thinking, "display", ("summarized", "omitted"), default="summarized", at="thinking"
    )
    if kind == "disabled":
        return "hidden", None
    config = optional_object(body, "output_config") or {}
    effort = optional_string(config, "effort", at="output_config")
    return "sealed" if display == "omitted" else "shown", {"effort": effort, "summary": None}


def _temperature(body: Mapping[str, Json]) -> float:
    """`top_k` of 1 is greedy; a larger one is not applied."""
    top_k = optional_integer(body, "top_k", least=0, most=2**31 - 1)
    temperature = number(body, "temperature", least=0, most=2, default=1.0)
    return 0.0 if top_k == 1 else temperature


def _top_p(body: Mapping[str, Json]) -> float:
    """0 keeps nothing but the best token: as near to it as a share may be."""
    return number(body, "top_p", least=0, most=1, default=1.0) or 1e-9


def _stop_sequences(body: Mapping[str, Json]) -> tuple[str, ...]:
    stops = optional_array(body, "stop_sequences") or []
    if len(stops) > _MAX_STOPS:
        raise BadRequest(
            f"At most {_MAX_STOPS} stop sequences are supported.",
            code="array_above_max_length",
            param="stop_sequences",
        )
    for index, stop in enumerate(stops):
        if not isinstance(stop, str):
            raise invalid_type(f"stop_sequences[{index}]", "a string", stop)
    return tuple(stop for stop in stops if stop)


def _user_id(body: Mapping[str, Json]) -> str | None:
    metadata = optional_object(body, "metadata") or {}
    user_id = optional_string(metadata, "user_id", at="metadata", max_chars=_MAX_USER_ID_CHARS)
    return user_id or None


_CHOICES = ("auto", "any", "tool", "none")


def _tool_choice(body: Mapping[str, Json], tools: tuple[ToolSpec, ...]) -> tuple[ToolChoice, bool]:
    """The choice, and whether calls may be parallel."""
    value = optional_object(body, "tool_choice")
    if value is None:
        return ToolChoice(), True
    kind = required_name(value, "type", at="tool_choice")
    if kind not in _CHOICES:
        raise invalid_value("tool_choice.type", kind, _CHOICES)
    parallel = not flag(value, "disable_parallel_tool_use", default=False, at="tool_choice")
    if kind == "auto":
        return ToolChoice(), parallel
    if kind == "none":
        return ToolChoice("none"), parallel
    if not tools:
        raise BadRequest(
            f"Tool choice '{kind}' needs 'tools'.", code="invalid_value", param="tool_choice"
        )
    if kind == "any":
        return ToolChoice("required"), parallel
    name = required_name(value, "name", at="tool_choice")
    if name not in [spec.name for spec in tools]:
        raise BadRequest(
            f"Tool '{name}' not found in provided tools.",
            code="invalid_value",
            param="tool_choice.name",
        )
    return ToolChoice("required", (name,)), parallel
