"""The agent's session in Chat Completions' words, which every server understands. Pure.

Laws
    Both sides are told the same words; each one's history holds what it answered itself, as with a real agent.
    No tools: templates and servers differ in how they tell a model of them, and the prompts would not be the same.
    The only thing that `nonce` changes is digits in the first line: two sessions that differ in it share no prefix and
    have the same length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broker.bench.workload import filler

if TYPE_CHECKING:
    from collections.abc import Mapping

Message = dict[str, str]

COUNTED = {"stream_options": {"include_usage": True}}

_TASK = "Tell a long story about a journey, with as many details as you can, and do not stop."


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...]

    def answered(self, text: str) -> Conversation:
        return self._with("assistant", text)

    def asking(self, text: str) -> Conversation:
        return self._with("user", text)

    def _with(self, role: str, text: str) -> Conversation:
        return Conversation((*self.messages, {"role": role, "content": text}))


def opening(nonce: int, tokens: int) -> Conversation:
    """A first request of about so many tokens. `nonce` has five digits."""
    head = f"Session {nonce:05d}. You are an agent that works on a project.\n"
    system: Message = {"role": "system", "content": head + filler(tokens, "system prompt")}
    return Conversation((system,)).asking(_TASK)


def result(label: str, tokens: int) -> str:
    """What a tool is said to have found; `label` decides its words."""
    return f"Result {label}:\n{filler(tokens, label)}\nGo on with the story."


def body(
    conversation: Conversation, output_tokens: int, model: str | None, more: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON of one streamed, greedy, bounded request. `more` are fields that not every server takes."""
    request: dict[str, Any] = {
        "messages": list(conversation.messages),
        "stream": True,
        "temperature": 0,
        "max_tokens": output_tokens,
        **more,
    }
    return request if model is None else {"model": model, **request}
