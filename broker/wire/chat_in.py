"""A Chat Completions body to the `TurnRequest` of the same conversation.

The body is said again as a `response.create` body and understood there (`broker/wire/requests.py`), so both APIs have one
set of rules, bounds and refusals. A refusal comes back with the names that the client used: every part of the create
body remembers the field that it was made from.

Laws
    Messages become input items one for one and in order, whatever their role; nothing is merged, moved or added. The
    prompt is then that of the same conversation over Responses, token for token, whether its first system text comes
    as `instructions` or as an input message there: this is what lets a client change its API and keep its KV.
    An assistant message is what one response said: thoughts, text, calls, in this order. What `chat_out` said and a
    client sends back has the `content_digest` of the response it came from, if that spoke in this order, too. A text
    after a call has lost its place, but no word.
    A tool's result answers a call that stands before it.
    What changes the answer is understood or refused by name; everything else is accepted, unknown fields too.
    A completion is stored only if the client says so: the default of this API, and not that of Responses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from broker.errors import BadRequest
from broker.wire.fields import (
    as_object,
    choice,
    flag,
    invalid_value,
    join,
    missing,
    optional_array,
    optional_integer,
    optional_object,
    optional_string,
    required_name,
    required_string,
    unsupported,
)
from broker.wire.requests import Transport, parse_create

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.wire.fields import Json
    from broker.wire.requests import TurnRequest

# Fields that mean the same in both APIs.
_SHARED = (
    "model",
    "parallel_tool_calls",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "store",
    "stream",
    "metadata",
    "user",
    "safety_identifier",
    "service_tier",
    "presence_penalty",
    "frequency_penalty",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
)
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MOST_CHOICES = 128  # OpenAI's own bound of `n`


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """`include_usage`: a stream ends with a chunk that only counts tokens."""

    turn: TurnRequest
    include_usage: bool = False


def parse_chat(body: Mapping[str, Json]) -> ChatRequest:
    """Understand a body. Raises BadRequest with the code and path of the first fault found."""
    _refuse_unbuilt(body)
    options = optional_object(body, "stream_options") or {}
    include_usage = flag(options, "include_usage", default=False, at="stream_options")
    said = _CreateBody(body)
    try:
        turn = parse_create(said.create, transport=Transport.HTTP)
    except BadRequest as error:
        raise said.in_chat_words(error) from None
    # Chunks have a place for thoughts, whether any were asked for or not.
    return ChatRequest(replace(turn, reasoning_events=True), include_usage)


def _refuse_unbuilt(body: Mapping[str, Json]) -> None:
    """Say no to what would be answered wrongly if it were ignored."""
    if (optional_integer(body, "n", least=1, most=_MOST_CHOICES) or 1) > 1:
        raise unsupported("n", "One choice is made for each request.")
    if optional_object(body, "logit_bias"):
        raise unsupported("logit_bias", "Tokens are sampled as the model likes them.")
    if "audio" in (optional_array(body, "modalities") or []):
        raise unsupported("modalities", "This model writes text only.")
    for key in ("functions", "function_call"):
        if body.get(key):
            raise unsupported(key, "Declare functions in 'tools', and choose in 'tool_choice'.")


class _CreateBody:
    """`create` is the create body that a chat body means."""

    def __init__(self, chat: Mapping[str, Json]) -> None:
        self._chat = chat
        self._items: list[dict[str, Json]] = []
        self._call_ids: set[str] = set()
        self._functions: dict[str, str] = {}  # {legacy function's name: id of its latest call}
        # {a path in the create body: the same in the chat body}, also for every path below it
        self._places = {"input": "messages"}
        self.create: dict[str, Json] = {key: chat[key] for key in _SHARED if key in chat}
        self.create |= {
            "input": self._input(),
            "store": flag(chat, "store", default=False),
            "tools": self._tools(),
            "tool_choice": self._tool_choice(),
            "max_output_tokens": self._max_tokens(),
            "text": self._text(),
            "reasoning": self._reasoning(),
        }
        self.create |= self._logprobs()

    def in_chat_words(self, error: BadRequest) -> BadRequest:
        """A refusal of `create`, about the field that the client wrote."""
        path = error.param
        if path is None:
            return error
        for place in sorted(self._places, key=len, reverse=True):
            if path.startswith(place):
                named = self._places[place] + path.removeprefix(place)
                message = error.message.replace(f"'{path}'", f"'{named}'")
                return BadRequest(message, code=error.code, param=named)
        return error

    # Messages

    def _input(self) -> list[dict[str, Json]]:
        messages = optional_array(self._chat, "messages")
        if messages is None:
            raise missing("messages")
        if not messages:
            raise BadRequest(
                "Invalid 'messages': empty array. Expected an array with minimum length 1, "
                "but got an empty array instead.",
                code="empty_array",
                param="messages",
            )
        for index, value in enumerate(messages):
            at = f"messages[{index}]"
            message = as_object(value, at)
            role = required_string(message, "role", at=at)
            match role:
                case "system" | "developer" | "user":
                    self._message(role, message.get("content"), at)
                case "assistant":
                    self._assistant(message, at)
                case "tool":
                    self._result(message, required_name(message, "tool_call_id", at=at), at)
                case "function":
                    name = required_name(message, "name", at=at)
                    self._result(message, self._functions.get(name), at)
                case _:
                    raise invalid_value(join(at, "role"), role, _ROLES)
        return self._items

    def _item(self, item: dict[str, Json], at: str, **names: str) -> None:
        """Add an item that was made from what is at `at`, and those of its fields whose names differ there."""
        place = f"input[{len(self._items)}]"
        self._items.append(item)
        self._places[place] = at
        for field, name in names.items():
            self._places[join(place, field)] = join(at, name)

    def _message(self, role: str, content: Json, at: str) -> None:
        if isinstance(content, list) and role != "assistant":
            content = [_input_part(part) for part in content]
        self._item({"type": "message", "role": role, "content": content}, at)

    def _assistant(self, message: Mapping[str, Json], at: str) -> None:
        if thoughts := _thoughts(message):
            content = [{"type": "reasoning_text", "text": thoughts}]
            self._item({"type": "reasoning", "summary": [], "content": content}, at)
        if message.get("audio") is not None:
            raise unsupported(join(at, "audio"), "This model reads text only.")
        calls = optional_array(message, "tool_calls", at=at) or []
        legacy = optional_object(message, "function_call", at=at)
        said = message.get("content")
        if said is None:
            said = optional_string(message, "refusal", at=at) or ""
        if said or not (calls or legacy):
            self._message("assistant", said, at)
        for index, call in enumerate(calls):
            path = f"{at}.tool_calls[{index}]"
            self._call(as_object(call, path), path)
        if legacy is not None:
            self._legacy_call(legacy, join(at, "function_call"))

    def _call(self, call: Mapping[str, Json], at: str) -> None:
        call_id = required_name(call, "id", at=at)
        self._call_ids.add(call_id)
        kind = choice(call, "type", ("function", "custom"), default="function", at=at)
        called = _required_object(call, kind, at)
        item = {"call_id": call_id, "name": called.get("name")}
        if kind == "function":
            item |= {"type": "function_call", "arguments": called.get("arguments")}
            self._item(item, at, name="function.name", arguments="function.arguments")
        else:
            item |= {"type": "custom_tool_call", "input": called.get("input")}
            self._item(item, at, name="custom.name", input="custom.input")

    def _legacy_call(self, call: Mapping[str, Json], at: str) -> None:
        """A call from before calls had ids: its place in the list is its id."""
        name = required_name(call, "name", at=at)
        call_id = f"call_function_{len(self._items)}"
        self._functions[name] = call_id
        self._call_ids.add(call_id)
        item = {"call_id": call_id, "name": name, "arguments": call.get("arguments")}
        self._item({"type": "function_call", **item}, at)

    def _result(self, message: Mapping[str, Json], call_id: str | None, at: str) -> None:
        if call_id not in self._call_ids:
            answers = "tool_call_id" if message["role"] == "tool" else "name"
            raise BadRequest(
                f"Invalid '{join(at, answers)}': no tool call '{message[answers]}' stands before this"
                f" message. Messages of role '{message['role']}' answer a call of an earlier message"
                " of the assistant.",
                code="invalid_value",
                param=join(at, answers),
            )
        item = {"call_id": call_id, "output": message.get("content")}
        self._item({"type": "function_call_output", **item}, at, output="content")

    # Tools

    def _tools(self) -> list[Json]:
        """Function and custom tools without the object around them; `create` judges all others."""
        tools: list[Json] = []
        for index, value in enumerate(optional_array(self._chat, "tools") or []):
            at = f"tools[{index}]"
            tools.append(self._unwrapped(as_object(value, at), at, at))
        return tools

    def _tool_choice(self) -> Json:
        chosen = self._chat.get("tool_choice")
        if not isinstance(chosen, dict):
            return chosen
        at = "tool_choice"
        if chosen.get("type") != "allowed_tools":
            return self._unwrapped(chosen, at, at)
        allowed = _required_object(chosen, "allowed_tools", at)
        inner = join(at, "allowed_tools")
        self._places |= {join(at, key): join(inner, key) for key in ("mode", "tools")}
        tools: list[Json] = []
        for index, value in enumerate(optional_array(allowed, "tools", at=inner) or []):
            path = f"{inner}.tools[{index}]"
            tools.append(self._unwrapped(as_object(value, path), path, f"{at}.tools[{index}]"))
        return {"type": "allowed_tools", "mode": allowed.get("mode"), "tools": tools}

    def _unwrapped(self, tool: dict[str, Json], at: str, place: str) -> dict[str, Json]:
        """What is at `at`, named or declared as `create` has it at `place`."""
        kind = tool.get("type")
        if kind not in ("function", "custom"):
            return tool
        inner = _required_object(tool, kind, at)
        self._places[place] = join(at, kind)
        form = inner.get("format")
        if isinstance(form, dict) and isinstance(form.get("grammar"), dict):
            inner = {**inner, "format": {**form["grammar"], "type": form.get("type")}}
            self._places[join(place, "format")] = join(at, f"{kind}.format.grammar")
        return {**inner, "type": kind}

    # Everything else that has another name there

    def _max_tokens(self) -> Json:
        for key in ("max_completion_tokens", "max_tokens"):  # the second is the older name
            if self._chat.get(key) is not None:
                self._places["max_output_tokens"] = key
                return self._chat[key]
        return None

    def _text(self) -> dict[str, Json]:
        self._places["text.verbosity"] = "verbosity"
        text = {"format": self._format(), "verbosity": optional_string(self._chat, "verbosity")}
        return {key: value for key, value in text.items() if value is not None}

    def _format(self) -> dict[str, Json] | None:
        """`response_format` as `text.format`: the schema's fields without the object around them."""
        form = optional_object(self._chat, "response_format")
        if form is None:
            return None
        self._places["text.format"] = "response_format"
        if form.get("type") != "json_schema":
            return dict(form)
        schema = _required_object(form, "json_schema", "response_format")
        for key in ("name", "description", "schema", "strict"):
            self._places[f"text.format.{key}"] = f"response_format.json_schema.{key}"
        return {**schema, "type": "json_schema"}

    def _reasoning(self) -> dict[str, Json] | None:
        effort = optional_string(self._chat, "reasoning_effort")
        self._places["reasoning.effort"] = "reasoning_effort"
        return None if effort is None else {"effort": effort}

    def _logprobs(self) -> dict[str, Json]:
        top = optional_integer(self._chat, "top_logprobs", least=0, most=20)
        if flag(self._chat, "logprobs", default=False):
            return {"include": ["message.output_text.logprobs"], "top_logprobs": top}
        if top:
            raise BadRequest(
                "Invalid 'top_logprobs': 'logprobs' must be true when it is given.",
                code="invalid_value",
                param="top_logprobs",
            )
        return {}


def _input_part(part: Json) -> Json:
    """A part of what the client says, with its kind's name in the other API. What is none stays as it is."""
    is_text = isinstance(part, dict) and part.get("type") == "text"
    return {**part, "type": "input_text"} if is_text else part


def _thoughts(message: Mapping[str, Json]) -> str:
    """What open models thought, under the two names that clients send it back by. No part of OpenAI's schema."""
    for key in ("reasoning_content", "reasoning"):
        value = message.get(key)
        if isinstance(value, str) and value:
            return value
    return ""


def _required_object(obj: Mapping[str, Json], key: str, at: str) -> dict[str, Json]:
    if obj.get(key) is None:
        raise missing(join(at, key))
    return as_object(obj[key], join(at, key))
