"""`homeport serve` with a model that keeps to a script: the real listener, broker and command line, no weights.

    python -m tests.clients.scripted --say TEXT [--call NAME=JSON] [serve's own arguments]

The model reads the last message of its prompt. A tool's result is answered with the text, anything else with a call of
the tool if the prompt declares it, else with the text. So a task of one tool call ends, whatever the client is.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

import trio

from broker.__main__ import main as homeport
from broker.bench.daemon import Daemon
from tests.fakes import END, START, FakeService

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from broker.config import Config
    from tiers.block import TokenIds

MAX_CONTEXT = 1 << 20  # a token is a byte: a coding agent's first prompt has 100,000


def scripted(text: str, call: tuple[str, str] | None) -> Callable[[TokenIds], TokenIds]:
    """`call` is a tool's name as the model says it, and its arguments' JSON."""

    def reply(prompt: TokenIds) -> TokenIds:
        *before, last, _ = "".join(
            "\0" if token == START else chr(token) for token in prompt if token != END
        ).split("\0")
        said = text
        if call is not None and "<tool_response>" not in last:
            name, arguments = call
            if json.dumps(name) in "".join((*before, last)):
                called = {"name": name, "arguments": json.loads(arguments)}
                said = f"<tool_call>\n{json.dumps(called)}\n</tool_call>"
        return (*said.encode(), END)

    return reply


def daemon(
    state_dir: Path, *settings: str, say: str, call: tuple[str, str] | None = None
) -> Daemon:
    """One as a subprocess, not started."""
    program = [sys.executable, "-m", "tests.clients.scripted", "--say", say]
    if call is not None:
        program += ["--call", "=".join(call)]
    return Daemon(state_dir, settings=settings, program=tuple(program))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--say", required=True, metavar="TEXT")
    parser.add_argument("--call", metavar="NAME=JSON")
    ours, theirs = parser.parse_known_args(argv)
    name, _, arguments = (ours.call or "").partition("=")
    reply = scripted(ours.say, (name, arguments) if name else None)

    @asynccontextmanager
    async def open_scripted(config: Config) -> AsyncIterator[FakeService]:
        async with trio.open_nursery() as nursery:
            yield FakeService(
                nursery, reply=reply, model_name=config.model.name, max_context=MAX_CONTEXT
            )
            nursery.cancel_scope.cancel()

    with patch("broker.app.open_model_engine", open_scripted):
        return homeport(theirs)


if __name__ == "__main__":
    sys.exit(main())
