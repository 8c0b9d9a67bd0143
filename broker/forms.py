"""The form that an answer must have: from a request and a model's markup to a constraint. Pure.

    tool_choice            text.format     the answer is
    none                   text            anything
    none                   JSON            the JSON
    auto                   text            anything, unless the request restricts what a call may be (below)
    auto                   JSON            calls, or the JSON
    required, named        any             calls: exactly one if it is named or parallel_tool_calls is false

Laws
    A call that must be made is of an allowed tool, in the form that the template teaches, and its arguments fit the tool's
    schema. Of a tool that is not `strict`, what cannot be enforced is passed over; of a strict one it is refused.
    `auto` is left alone but where somebody asked for less: `allowed_tools`, `strict` tools, or no parallel calls. Then
    text is free until a call is opened, and the call inside its markup is not.
    A custom tool's grammar holds where its call is forced. Such a call is the last thing said (`wire/rawcalls.py`).
    A model that thinks aloud thinks first, freely.
    Calls are written as the templates write them, character by character: models were trained on that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.wire import rawcalls
from broker.wire.requests import ToolKind
from engine.constraint import (
    Anything,
    Blank,
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
from engine.text import ToolSyntax

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from broker.wire.requests import TextFormat, ToolSpec, TurnRequest
    from engine.constraint import Constraint
    from engine.text import Markers

_MAX_CALLS = 8  # in one answer (guessed): the default model, when it may, repeats a call for ever
_ANY_OBJECT = '{"type":"object"}'
# A text that a reader of Llama 3's form takes for text: one that does not begin like a call.
_NO_CALL = Regex(r"([^{\s](?s:.)*)?")


@dataclass(frozen=True, slots=True)
class Markup:
    """How this model writes. `ids` are the control tokens among its markup: {text: id}."""

    syntax: ToolSyntax
    thoughts: Markers | None
    ids: Mapping[str, int]

    def mark(self, text: str) -> Constraint:
        token = self.ids.get(text)
        return Exactly(text) if token is None else Token(token)

    def until(self, text: str) -> Constraint:
        """Anything, and then this mark."""
        token = self.ids.get(text)
        return Until(text) if token is None else InTurn((Anything(), Token(token)))


def form_of(request: TurnRequest, markup: Markup, *, thinking: bool) -> Constraint | None:
    """None: the answer may be anything. `thinking`: the template has opened the model's thoughts already."""
    form = _form(request, markup)
    if form is None or markup.thoughts is None:
        return form
    close = (markup.until(markup.thoughts.close), Blank())
    if thinking:
        return InTurn((*close, form))
    thought = InTurn((markup.mark(markup.thoughts.open), *close))
    return InTurn((Times(thought, 0, 1), form))


def callable_tools(request: TurnRequest) -> list[ToolSpec]:
    return [tool for tool in request.tools if request.tool_choice.allows(tool)]


def raw_tools(request: TurnRequest) -> list[ToolSpec]:
    """The custom tools whose calls will be raw: those with a grammar, where a call is forced."""
    if request.tool_choice.mode != "required":
        return []
    return [tool for tool in callable_tools(request) if tool.grammar is not None]


def _form(request: TurnRequest, markup: Markup) -> Constraint | None:
    tools, text = callable_tools(request), request.text_format
    if request.tool_choice.mode == "required":
        return _calls(request, markup, tools)
    if text is not None:
        json_text = _json_text(text)
        if not tools:
            return json_text
        calls = _calls(request, markup, tools)
        if (
            markup.syntax is ToolSyntax.LLAMA3
        ):  # a call is a JSON object, too: its tag tells them apart
            calls = InTurn((markup.mark("<|python_tag|>"), calls))
        return OneOf((calls, json_text))
    restricted = (
        request.tool_choice.names is not None
        or not request.parallel_tool_calls
        or any(tool.strict for tool in tools)
    )
    return _text_with_calls(request, markup, tools) if tools and restricted else None


def _json_text(text: TextFormat) -> Constraint:
    return Json(json.dumps(text.schema), text.at, lenient=not text.strict)


def _calls(request: TurnRequest, markup: Markup, tools: list[ToolSpec]) -> Constraint:
    """One call or several, and nothing else. A raw one ends the answer."""
    raw = raw_tools(request)
    one = not request.parallel_tool_calls or len(tools) == 1
    most = 1 if one or markup.syntax is ToolSyntax.LLAMA3 else _MAX_CALLS
    options: list[Constraint] = []
    said = [
        _Said(tool, _arguments(request, tool, forced=True)) for tool in tools if tool not in raw
    ]
    if said:
        options.append(_written(markup, said, most))
    if raw:
        options.append(OneOf(tuple(_raw_call(request, tool) for tool in raw)))
    return options[0] if len(options) == 1 else OneOf(tuple(options))


def _text_with_calls(request: TurnRequest, markup: Markup, tools: list[ToolSpec]) -> Constraint:
    said = [_Said(tool, _arguments(request, tool, forced=False)) for tool in tools]
    one = not request.parallel_tool_calls
    match markup.syntax:
        case ToolSyntax.LLAMA3:
            return OneOf((_written(markup, said, 1), _NO_CALL))
        case ToolSyntax.MISTRAL:
            rest = _list(said, 1 if one else _MAX_CALLS)
            return OneOf((InTurn((markup.until("[TOOL_CALLS]"), rest)), Anything()))
        case ToolSyntax.HERMES:
            return _amid_text(markup.until("<tool_call>"), _hermes_inside(markup, said), one=one)
        case ToolSyntax.MISTRAL_ARGS:
            return _amid_text(markup.until("[TOOL_CALLS]"), _named_inside(markup, said), one=one)


def _amid_text(begin: Constraint, rest: Constraint, *, one: bool) -> Constraint:
    """Calls wherever they are opened in a text; with `one`, the text ends at the first."""
    call = InTurn((begin, rest))
    return OneOf((call, Anything())) if one else InTurn((Times(call, 0, None), Anything()))


@dataclass(frozen=True, slots=True)
class _Said:
    tool: ToolSpec
    arguments: Constraint

    def object(self, key: str) -> Constraint:
        """The call as a JSON object whose arguments go by `key`."""
        name = json.dumps(self.tool.spoken_name, ensure_ascii=False)
        head = f'{{"name": {name}, "{key}": '
        return InTurn((Exactly(head), self.arguments, Exactly("}")))


def _written(markup: Markup, said: list[_Said], most: int) -> Constraint:
    """One to `most` calls as this model's template writes them."""
    match markup.syntax:
        case ToolSyntax.HERMES:
            call = InTurn((markup.mark("<tool_call>"), _hermes_inside(markup, said)))
            return _separated(call, "\n", most)
        case ToolSyntax.LLAMA3:
            return _any(each.object("parameters") for each in said)
        case ToolSyntax.MISTRAL:
            return InTurn((markup.mark("[TOOL_CALLS]"), _list(said, most)))
        case ToolSyntax.MISTRAL_ARGS:
            call = InTurn((markup.mark("[TOOL_CALLS]"), _named_inside(markup, said)))
            return Times(call, 1, most)


def _hermes_inside(markup: Markup, said: list[_Said]) -> Constraint:
    objects = _any(each.object("arguments") for each in said)
    return InTurn((Exactly("\n"), objects, Exactly("\n"), markup.mark("</tool_call>")))


def _named_inside(markup: Markup, said: list[_Said]) -> Constraint:
    return _any(
        InTurn((Exactly(each.tool.spoken_name), markup.mark("[ARGS]"), each.arguments))
        for each in said
    )


def _list(said: list[_Said], most: int) -> Constraint:
    objects = _separated(_any(each.object("arguments") for each in said), ", ", most)
    return InTurn((Blank(), Exactly("["), objects, Exactly("]")))


def _separated(part: Constraint, separator: str, most: int) -> Constraint:
    if most == 1:
        return part
    return InTurn((part, Times(InTurn((Exactly(separator), part)), 0, most - 1)))


def _any(options: Iterable[Constraint]) -> Constraint:
    several = tuple(options)
    return several[0] if len(several) == 1 else OneOf(several)


def _raw_call(request: TurnRequest, tool: ToolSpec) -> Constraint:
    assert tool.grammar is not None
    at = _path(request, tool, "format.definition")
    by = Lark if tool.grammar_syntax == "lark" else Regex
    head = f'{rawcalls.OPEN}{{"name": {json.dumps(tool.spoken_name, ensure_ascii=False)}}}\n'
    return InTurn((Exactly(head), by(tool.grammar, at), Exactly(rawcalls.CLOSE)))


def _arguments(request: TurnRequest, tool: ToolSpec, *, forced: bool) -> Constraint:
    """In free text, only a strict tool's schema is enforced: no tool declaration may break a turn that calls nothing."""
    if tool.parameters is None or not (forced or tool.strict):
        return Json(_ANY_OBJECT)
    schema = dict(tool.parameters)
    schema.setdefault("type", "object")
    return Json(json.dumps(schema), _path(request, tool, "parameters"), lenient=not tool.strict)


def _path(request: TurnRequest, tool: ToolSpec, field: str) -> str:
    """Where the client wrote this tool's field; `tools` if it stands in an earlier request."""
    if tool.kind is ToolKind.CUSTOM and field == "parameters":
        return "tools"  # a schema of ours
    for at, declared in enumerate(request.echo.get("tools") or []):
        if declared.get("type") != "namespace":
            if tool.namespace is None and declared.get("name") == tool.name:
                return f"tools[{at}].{field}"
        elif declared.get("name") == tool.namespace:
            for inner, member in enumerate(declared.get("tools") or []):
                if member.get("name") == tool.name:
                    return f"tools[{at}].tools[{inner}].{field}"
    return "tools"
