"""The grammar of a Responses event stream, as an independent reader of the published rules would check it.

    stream  := created [queued] in_progress (item | in_progress)* terminal
    item    := added (message | call | custom | thoughts) done
    item    := added done                        a compaction, which can only be the first item
    message := (content_part.added output_text.delta* output_text.done content_part.done)*
    call    := arguments.delta* arguments.done
    custom  := custom_tool_call_input.delta* custom_tool_call_input.done
    thoughts := content_part.added reasoning_text.delta* reasoning_text.done content_part.done, if the request has a
                `reasoning` object, else nothing
    terminal := completed | incomplete | failed

A failed stream may stop inside an item. `in_progress` may come again anywhere before the terminal: it is the
keepalive. A background response is queued first; it may fail before it is in progress, and one that is cancelled
ends in `incomplete` with the status `cancelled`. Knows nothing of the code under test, and trusts no field that another field determines.
"""

from __future__ import annotations

from typing import Any

Event = dict[str, Any]

RESPONSE_FIELDS = frozenset(
    [
        "id",
        "object",
        "created_at",
        "completed_at",
        "status",
        "incomplete_details",
        "model",
        "previous_response_id",
        "instructions",
        "output",
        "error",
        "tools",
        "tool_choice",
        "truncation",
        "parallel_tool_calls",
        "text",
        "top_p",
        "presence_penalty",
        "frequency_penalty",
        "top_logprobs",
        "temperature",
        "reasoning",
        "usage",
        "max_output_tokens",
        "max_tool_calls",
        "store",
        "background",
        "service_tier",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
    ]
)
EMPTY_WHEN_ADDED = {
    "message": "content",
    "function_call": "arguments",
    "custom_tool_call": "input",
    "reasoning": "content",
    "compaction": "encrypted_content",
}
TEXT_OF = {"message": "output_text", "reasoning": "reasoning_text"}  # the kind of an item's parts
SAID_OF = {"function_call": "arguments", "custom_tool_call": "input"}
TERMINALS = ("response.completed", "response.incomplete", "response.failed")


class GrammarError(AssertionError):
    """A sentence that says which rule the stream breaks."""


def check_events(events: list[Event], *, stream_id: str | None = None) -> dict[str, Any]:
    """Check a whole stream; the terminal event's response is returned. Raises GrammarError.

    Give it one response's events, without request errors, steer answers or the article's `response.done`.
    """
    reader = _Reader(stream_id)
    for event in events:
        try:
            reader.read(event)
        except KeyError as error:
            raise GrammarError(f"{event.get('type')} has no field {error}") from error
    _require(reader.terminal is not None, "the stream ends without a terminal event")
    assert reader.terminal is not None
    return reader.terminal


def check_response(response: dict[str, Any]) -> None:
    """The shape of a response object, whatever its status. Raises GrammarError."""
    _require(
        response.keys() >= RESPONSE_FIELDS, f"fields missing: {RESPONSE_FIELDS - response.keys()}"
    )
    _require(response["object"] == "response", "object is not 'response'")
    _require(response["id"].startswith("resp_"), "the response id has no resp_ prefix")
    status = response["status"]
    _require((response["error"] is not None) == (status == "failed"), "error and status disagree")
    _require(
        (response["incomplete_details"] is not None) == (status == "incomplete"),
        "incomplete_details and status disagree",
    )
    _require(
        (response["completed_at"] is not None) == (status == "completed"),
        "completed_at and status disagree",
    )
    for tool in response["tools"]:
        if tool["type"] == "function":
            for key in ("name", "description", "parameters", "strict"):
                _require(key in tool, f"an echoed function tool has no {key}")
    _require(
        response["background"] or status not in ("queued", "cancelled"),
        f"{status}, but not in the background",
    )
    for item in response["output"]:
        _check_item(item)
    kinds = [item["type"] for item in response["output"]]
    _require("compaction" not in kinds[1:], "a compaction is not the first item")
    statuses = [item.get("status") for item in response["output"]]
    _require("incomplete" not in statuses[:-1], "an incomplete item is not the last")
    _require(
        "incomplete" not in statuses or status in ("incomplete", "cancelled"),
        "an incomplete item in a response that is not incomplete",
    )
    if response["usage"] is not None:
        _check_usage(response["usage"])


def _check_usage(usage: dict[str, Any]) -> None:
    details = usage["input_tokens_details"]
    _require(
        usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"],
        "total_tokens is not the sum",
    )
    _require(
        0 <= details["cached_tokens"] <= usage["input_tokens"],
        "more tokens cached than there were",
    )
    _require(details["cache_write_tokens"] >= 0, "cache_write_tokens is negative")
    _require(usage["output_tokens_details"]["reasoning_tokens"] >= 0, "no reasoning_tokens")
    by_tier = usage["homeport:cached_by_tier"]
    _require(set(by_tier) == {"device", "host", "disk", "remote"}, "not the four tiers")
    _require(sum(by_tier.values()) == details["cached_tokens"], "tiers do not sum to cached_tokens")


def _check_item(item: dict[str, Any]) -> None:
    """An item that is done."""
    if item["type"] == "compaction":
        _require(item["id"].startswith("cmp_"), "a compaction id has no cmp_ prefix")
        _require(bool(item["encrypted_content"]), "a compaction without content")
        return
    _require(item["status"] in ("completed", "incomplete"), f"a done item is {item['status']}")
    if item["type"] == "message":
        _require(item["id"].startswith("msg_"), "a message id has no msg_ prefix")
        _require(item["role"] == "assistant", "an output message is not the assistant's")
        for part in item["content"]:
            _check_part(part)
    elif item["type"] in SAID_OF:
        prefix = "fc_" if item["type"] == "function_call" else "ctc_"
        _require(item["id"].startswith(prefix), f"a call's item id has no {prefix} prefix")
        for key in ("call_id", "name"):
            _require(bool(item[key]), f"a call has no {key}")
        _require(isinstance(item[SAID_OF[item["type"]]], str), "arguments are not a string")
    elif item["type"] == "reasoning":
        _require(item["id"].startswith("rs_"), "a reasoning id has no rs_ prefix")
        _require(item["summary"] == [], "a summary that nobody made")
        for part in item["content"]:
            _check_part(part)
            _require(part["text"].strip() != "", "thoughts of nothing")
    else:
        raise GrammarError(f"unknown item type {item['type']}")


def _check_part(part: dict[str, Any]) -> None:
    _require(isinstance(part["text"], str), "a part's text is not a string")
    if part["type"] == "reasoning_text":
        return
    _require(part["type"] == "output_text", f"unknown part type {part['type']}")
    _require(part["annotations"] == [], "annotations missing")
    for token in part["logprobs"]:
        _check_logprob(token)
    # The first and the last token may reach beyond the text: into markup, or a stop string.
    spelled = b"".join(bytes(token["bytes"]) for token in part["logprobs"])
    _require(not spelled or part["text"].encode() in spelled, "the tokens do not spell the text")


def _check_logprob(token: dict[str, Any]) -> None:
    for each in (token, *token["top_logprobs"]):
        _require(isinstance(each["token"], str), "a token is not a string")
        _require(bytes(each["bytes"]).decode(errors="replace") == each["token"], "other bytes")
        _require(each["logprob"] <= 0, "a probability above 1")


def _require(fact: bool, sentence: str) -> None:
    if not fact:
        raise GrammarError(sentence)


class _Reader:
    """One pass over the events, keeping what must agree later."""

    def __init__(self, stream_id: str | None) -> None:
        self.stream_id = stream_id
        self.terminal: dict[str, Any] | None = None
        self.queued = False  # as response.created says
        self.number = 0
        self.response_id: str | None = None
        self.done: list[dict[str, Any]] = []
        self.added: dict[str, Any] | None = None  # the open item, as it was added
        self.parts: list[dict[str, Any]] = []  # done parts of the open item
        self.part: str | None = None  # text of the open part so far
        self.text_done = False  # output_text.done was seen for the open part
        self.logprobs: list[dict[str, Any]] = []  # of the open part so far
        self.thoughts_shown = False
        self.arguments = ""
        self.arguments_done = False

    def read(self, event: Event) -> None:
        kind = event["type"]
        _require(self.terminal is None, f"{kind} after the terminal event")
        _require(
            event["sequence_number"] == self.number,
            f"{kind} is numbered {event['sequence_number']}, not {self.number}",
        )
        if self.stream_id is None:
            _require("stream_id" not in event, f"{kind} names a lane on the default lane")
        else:
            _require(event.get("stream_id") == self.stream_id, f"{kind} is on another lane")
        self._order(kind)
        self.number += 1
        if "response" in event:
            self._response(kind, event["response"])
        elif kind == "response.output_item.added":
            self._item_added(event)
        elif kind == "response.output_item.done":
            self._item_done(event)
        else:
            self._inside_item(kind, event)

    def _order(self, kind: str) -> None:
        """The first events; `queued` is the second or none."""
        match self.number:
            case 0:
                allowed = ["response.created"]
            case 1:
                allowed = ["response.queued" if self.queued else "response.in_progress"]
            case 2 if self.queued:
                allowed = ["response.in_progress", "response.failed"]
            case _:
                _require(kind not in ("response.created", "response.queued"), f"{kind} twice")
                return
        _require(kind in allowed, f"event {self.number} is {kind}")

    def _response(self, kind: str, response: dict[str, Any]) -> None:
        check_response(response)
        self.response_id = self.response_id or response["id"]
        self.thoughts_shown = response["reasoning"] is not None
        _require(response["id"] == self.response_id, "the response id changes")
        _require(response["output"] == self.done, f"{kind}: output is not the items done so far")
        status = response["status"]
        if kind in TERMINALS:
            ends = [kind.removeprefix("response.")]
            if kind == "response.incomplete":
                ends.append("cancelled")
            _require(status in ends, f"{kind} with status {status}")
            _require(
                self.added is None or kind == "response.failed", f"{kind} while an item is open"
            )
            self.terminal = response
        else:
            kinds = ("response.created", "response.queued", "response.in_progress")
            _require(kind in kinds, f"unknown event {kind}")
            if kind == "response.created":
                self.queued = status == "queued"
            waiting = self.queued and kind != "response.in_progress"
            _require(
                status == ("queued" if waiting else "in_progress"), f"{kind} with status {status}"
            )

    def _item_added(self, event: Event) -> None:
        item = event["item"]
        _require(self.added is None, "an item is added inside an item")
        _require(event["output_index"] == len(self.done), "output_index does not count up")
        if item["type"] != "compaction":
            _require(item["status"] == "in_progress", f"an item is added {item['status']}")
        empty = EMPTY_WHEN_ADDED.get(item["type"])
        _require(empty is not None, f"unknown item type {item['type']}")
        _require(not item[str(empty)], f"an item is added with {empty}")
        _require(item["id"] not in [done["id"] for done in self.done], "two items have one id")
        self.added = item
        self.parts, self.part, self.text_done = [], None, False
        self.arguments, self.arguments_done = "", False

    def _item_done(self, event: Event) -> None:
        item = event["item"]
        added = self._open_item(event, item["id"])
        _check_item(item)
        if item["type"] in SAID_OF:
            _require(self.arguments_done, "a call is done before its arguments are")
            said = item[SAID_OF[item["type"]]]
            _require(said == self.arguments, "the done call differs from its deltas")
        elif item["type"] == "message" or self.thoughts_shown:
            _require(self.part is None, "a message is done while a part is open")
            _require(item["content"] == self.parts, "the done message differs from its parts")
            _require(bool(self.parts), "a message is done without a part")
        for key in ("type", "id", "role", "name", "call_id", "namespace"):
            _require(added.get(key) == item.get(key), f"an item's {key} changes")
        self.done.append(item)
        self.added = None

    def _inside_item(self, kind: str, event: Event) -> None:
        added = self._open_item(event, event["item_id"])
        match kind.removeprefix("response."):
            case "content_part.added":
                self._part_added(added, event)
            case "output_text.delta" | "reasoning_text.delta":
                self._of_kind(added, kind)
                _require(not self.text_done, "text after output_text.done")
                _require(event["delta"] != "", "an empty text delta")
                if added["type"] == "message":
                    _require(isinstance(event["logprobs"], list), "a text delta without logprobs")
                    self.logprobs += event["logprobs"]
                self.part = self._part_text(event) + event["delta"]
            case "output_text.done" | "reasoning_text.done":
                self._of_kind(added, kind)
                _require(not self.text_done, "output_text.done twice")
                if added["type"] == "message":
                    _require(event["logprobs"] == self.logprobs, "the done logprobs differ")
                _require(
                    event["text"] == self._part_text(event), "the done text differs from its deltas"
                )
                self.text_done = True
            case "content_part.done":
                _require(self.text_done, "a part is done before its text is")
                _check_part(event["part"])
                _require(event["part"]["text"] == self._part_text(event), "the done part differs")
                if added["type"] == "message":
                    _require(
                        event["part"]["logprobs"] == self.logprobs, "the part's logprobs differ"
                    )
                self.parts.append(event["part"])
                self.part, self.text_done = None, False
            case "function_call_arguments.delta" | "custom_tool_call_input.delta":
                self._in_call(added, kind)
                _require(event["delta"] != "", "an empty arguments delta")
                self.arguments += event["delta"]
            case "custom_tool_call_input.done":
                self._in_call(added, kind)
                _require(event["input"] == self.arguments, "done input differs from deltas")
                self.arguments_done = True
            case "function_call_arguments.done":
                self._in_call(added, kind)
                _require(event["arguments"] == self.arguments, "done arguments differ from deltas")
                _require(event["name"] == added["name"], "done arguments of another name")
                self.arguments_done = True
            case _:
                raise GrammarError(f"unknown event {kind}")

    def _part_added(self, added: dict[str, Any], event: Event) -> None:
        _require(added["type"] in TEXT_OF, "a part is added to a call")
        _require(
            added["type"] == "message" or self.thoughts_shown, "thoughts that nobody asked for"
        )
        _require(self.part is None, "a part is added inside a part")
        _require(event["content_index"] == len(self.parts), "content_index does not count up")
        _check_part(event["part"])
        _require(event["part"]["type"] == TEXT_OF[added["type"]], "a part of another kind")
        _require(event["part"]["text"] == "", "a part is added with text")
        self.part, self.logprobs = "", []

    def _of_kind(self, added: dict[str, Any], kind: str) -> None:
        wanted = TEXT_OF.get(added["type"])
        _require(wanted is not None and f".{wanted}." in kind, f"{kind} in a {added['type']}")

    def _part_text(self, event: Event) -> str:
        _require(self.part is not None, f"{event['type']} outside a part")
        _require(event["content_index"] == len(self.parts), f"{event['type']} of another part")
        return str(self.part)

    def _in_call(self, added: dict[str, Any], kind: str) -> None:
        wanted = {
            "function_call": "function_call_arguments",
            "custom_tool_call": "custom_tool_call_input",
        }
        named = wanted.get(added["type"])
        _require(named is not None and named in kind, "arguments outside a call")
        _require(not self.arguments_done, "arguments after they were done")

    def _open_item(self, event: Event, item_id: str) -> dict[str, Any]:
        _require(self.added is not None, f"{event['type']} outside an item")
        assert self.added is not None
        _require(item_id == self.added["id"], f"{event['type']} is about another item")
        _require(event["output_index"] == len(self.done), f"{event['type']} of another index")
        return self.added
