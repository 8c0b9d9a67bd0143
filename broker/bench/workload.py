"""The synthetic agent: what it says, turn by turn. Pure: the same arguments give the same text, in every process.

Laws
    Text is made of common short words, one token each in an English byte-pair vocabulary. Sizes in tokens are meant
    so; the true counts are the ones that the daemon reports.
    The only thing that `nonce` changes is digits in the first line of the system prompt: two workloads that differ
    in it share no prefix and have the same length.
    The agent goes on whichever way the model answered: every function call gets a `function_call_output` with the
    tool's result, and when there was none the same result is sent as a user message.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

Item = dict[str, Any]  # one input or output item of the Responses API, as JSON

_TEXT = """
    the of and to in is that it was for on are as with his they be at one have this from or had by
    not but what all were when we there can an your which their said if do will each about how up out
    them then she many some so these would other into has more her two like him see time could no make
    than first been its who now people my made over did down only way find use may water long little
"""
_WORDS = _TEXT.split()

_TOOLS_TOKENS = (
    380  # what TOOLS, roles and the task add to the prompt; measured with the default model
)


def _tool(name: str, purpose: str, **parameters: str) -> Item:
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    return {
        "type": "function",
        "name": name,
        "description": purpose,
        "parameters": {
            "type": "object",
            "properties": properties,
            "required": list(properties),
        },
    }


TOOLS = (
    _tool("read_file", "Read a file of the project.", path="The path, from the project's root."),
    _tool("run", "Run a command and return what it prints.", command="The command line."),
    _tool("search", "Search the project for a text.", text="What to look for.", under="A folder."),
)


def filler(tokens: int, label: str) -> str:
    """Words that `label` alone decides, in lines of nineteen: the line's end is the twentieth token."""
    chosen = random.Random(label).choices(_WORDS, k=max(1, tokens * 19 // 20))
    return "\n".join(" ".join(chosen[at : at + 19]) for at in range(0, len(chosen), 19))


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes of one agent loop. `nonce` has five digits."""

    nonce: int
    system_tokens: int = 1500  # system prompt and tools together
    result_tokens: int = 200
    output_tokens: int = 24

    def instructions(self) -> str:
        head = f"Session {self.nonce:05d}. You are an agent that works on a project with tools.\n"
        return head + filler(self.system_tokens - _TOOLS_TOKENS, "system prompt")

    def task(self) -> tuple[Item, ...]:
        """The input of the first turn."""
        return (_user("Look at the project and go on until the work is done."),)

    def follow(self, output: tuple[Item, ...], label: str) -> tuple[Item, ...]:
        """The input of the turn after one that answered `output`; `label` names the result and decides its text."""
        result = f"Result {label}:\n" + filler(self.result_tokens, label)
        calls = [item for item in output if item["type"] == "function_call"]
        if not calls:
            return (_user(result),)
        return tuple(
            {"type": "function_call_output", "call_id": call["call_id"], "output": result}
            for call in calls
        )

    def body(self, items: tuple[Item, ...], previous: str | None = None) -> Item:
        """The JSON of one request: greedy, bounded, stored."""
        request: Item = {
            "instructions": self.instructions(),
            "tools": list(TOOLS),
            "input": list(items),
            "temperature": 0,
            "max_output_tokens": self.output_tokens,
            "store": True,
        }
        if previous is not None:
            request["previous_response_id"] = previous
        return request


def _user(text: str) -> Item:
    return {"type": "message", "role": "user", "content": text}
