"""Forced tool calls and JSON answers of the real model: every one is valid, at temperature 0 and 1.

    python -m tests.campaign.forced [--answers 200] [--models DIR] [--seed 1] [--set KEY=VALUE]… [--quick]

Half of the answers are calls that `tool_choice` demands, half are messages in a `json_schema`; the schemas are of the kinds
that agents send. Another reader (the jsonschema library) decides what is valid. An answer that is cut by
`max_output_tokens` before it ends is not valid either.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio
from jsonschema import Draft202012Validator

from broker.bench.client import Refused, Socket
from broker.bench.daemon import Daemon
from broker.config import Server
from tests.campaign.verdict import Verdict

if TYPE_CHECKING:
    from broker.bench.client import Turn

QUICK = 8
AT_ONCE = 8
MAX_OUTPUT_TOKENS = 2048  # eight calls of the longest schema need less


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT: dict[str, Any] = {"type": "string", "maxLength": 60}
SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": _object(city=TEXT, unit={"enum": ["celsius", "fahrenheit"]}),
    "run_command": _object(
        command={"type": "array", "items": TEXT, "minItems": 1, "maxItems": 4},
        workdir={"anyOf": [TEXT, {"type": "null"}]},
        timeout_ms={"type": "integer", "minimum": 1, "maximum": 600_000},
    ),
    "book_table": _object(
        guests={"type": "integer", "minimum": 1, "maximum": 12},
        date={"type": "string", "pattern": "^20[0-9]{2}-[01][0-9]-[0-3][0-9]$"},
        contact=_object(name=TEXT, phone={"type": "string", "pattern": r"^\+[0-9]{8,15}$"}),
        outside={"type": "boolean"},
    ),
    "record_steps": _object(
        title=TEXT,
        steps={
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": _object(
                text=TEXT,
                minutes={"type": "number", "minimum": 0, "maximum": 600},
                kind={"enum": ["prepare", "cook", "wait", 'serve "hot"']},
            ),
        },
    ),
    "file_tree": {
        "$defs": {
            "node": _object(
                name={"type": "string", "maxLength": 30},
                children={"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/leaf"}},
            ),
            "leaf": _object(name={"type": "string", "maxLength": 30}),
        },
        **_object(root={"$ref": "#/$defs/node"}),
    },
}
ASKS = (
    "What is the weather in Reykjavík and in Rome?",
    "List the files of the project, then run the tests.",
    "Book a table for four next Friday; my name is Ada.",
    "How do I cook rice for two people?",
    "Describe the folder of a small web site.",
    "¿Qué tiempo hace hoy en Málaga? 🌦",
    "Say hello.",
)


def body(number: int, seed: int) -> dict[str, Any]:
    """The n-th request: calls and messages in turn, then temperatures, schemas, forms of the choice, prompts."""
    names = list(SCHEMAS)
    name = names[number // 4 % len(names)]
    request: dict[str, Any] = {
        "input": ASKS[number // 3 % len(ASKS)],
        "temperature": number // 2 % 2,
        "seed": seed + number,
        "max_output_tokens": MAX_OUTPUT_TOKENS,
        "store": False,
    }
    if number % 2:
        form = {"type": "json_schema", "name": name, "strict": True, "schema": SCHEMAS[name]}
        return request | {"text": {"format": form}}
    tools = [
        {"type": "function", "name": each, "parameters": SCHEMAS[each], "strict": True}
        for each in (name, names[(names.index(name) + 1) % len(names)])
    ]
    choices = (
        "required",
        {"type": "function", "name": name},
        {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": name}],
        },
    )
    return request | {
        "tools": tools,
        "tool_choice": choices[number // 4 % 3],
        "parallel_tool_calls": number % 8 == 0,
    }


def faults(request: dict[str, Any], turn: Turn) -> list[str]:
    """What is wrong with an answer."""
    response = turn.response
    if response["status"] != "completed":
        reason = (response["incomplete_details"] or {}).get("reason")
        return [f"{response['status']} ({reason}) after {turn.output_tokens} tokens"]
    if "text" in request:
        said = [turn.output[0]["content"][0]["text"]] if len(turn.output) == 1 else []
        return _misfits(said, request["text"]["format"]["schema"])
    calls = [item for item in turn.output if item["type"] == "function_call"]
    if len(calls) != len(turn.output):
        return ["something else was said beside the calls"]
    choice = request["tool_choice"]
    if len(calls) > 1 and (not request["parallel_tool_calls"] or choice != "required"):
        return [f"{len(calls)} calls where one was asked for"]
    allowed = [tool["name"] for tool in request["tools"]]
    if choice != "required":
        allowed = [choice["name"]] if "name" in choice else [choice["tools"][0]["name"]]
    wrong = [call["name"] for call in calls if call["name"] not in allowed]
    if not calls or wrong:
        return [f"calls of {wrong or 'nothing'} where {allowed} were allowed"]
    return [
        fault for call in calls for fault in _misfits([call["arguments"]], SCHEMAS[call["name"]])
    ]


def _misfits(texts: list[str], schema: dict[str, Any]) -> list[str]:
    if not texts:
        return ["not one message"]
    try:
        value = json.loads(texts[0])
    except ValueError as error:
        return [f"no JSON: {error}: {texts[0]!r:.80}"]
    return [error.message for error in Draft202012Validator(schema).iter_errors(value)]


async def ask_all(url: str, count: int, verdict: Verdict) -> tuple[int, Counter[str]]:
    """How many answers were valid, and the tokens of all."""
    valid, tally = 0, Counter[str]()
    numbers = iter(range(count))

    async def client(nursery: trio.Nursery) -> None:
        nonlocal valid
        socket = await Socket.open(nursery, url)
        for number in numbers:
            request = body(number, verdict.seed)
            try:
                turn = await socket.turn(request)
            except Refused as refused:
                verdict.violation(f"request {number} was refused: {refused}")
                continue
            found = faults(request, turn)
            valid += not found
            tally["calls" if "tools" in request else "messages"] += not found
            tally["tokens"] += turn.output_tokens
            tally["longest"] = max(tally["longest"], turn.output_tokens)
            for fault in found[:1]:
                verdict.violation(
                    f"answer {number} at temperature {request['temperature']}: {fault}"
                )
            verdict.progress(f"{number + 1} of {count} answers asked for, {valid} valid")

    async with trio.open_nursery() as sockets:
        async with trio.open_nursery() as clients:
            for _ in range(min(AT_ONCE, count)):
                clients.start_soon(client, sockets)
        sockets.cancel_scope.cancel()
    return valid, tally


def campaign(
    folder: Path, *, answers: int, models: Path, seed: int, settings: tuple[str, ...] = ()
) -> int:
    """The exit status."""
    verdict = Verdict("forced", seed)
    quiet = ("log.level=warning", *settings)
    with Daemon(folder / "state", settings=quiet, models=models) as daemon:
        valid, tally = trio.run(ask_all, daemon.url, answers, verdict)
        verdict.require(daemon.terminate() == 0, "the daemon did not end well")
    return verdict.finish(
        {"answers": answers, "valid": valid, **tally},
        f"{valid} of {answers} forced tool calls and json_schema answers are valid",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--models", type=Path, default=Server().state_dir / "models")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} answers")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="homeport-forced-") as folder:
        return campaign(
            Path(folder),
            answers=QUICK if arguments.quick else arguments.answers,
            models=arguments.models,
            seed=arguments.seed,
            settings=tuple(arguments.settings),
        )


if __name__ == "__main__":
    sys.exit(main())
