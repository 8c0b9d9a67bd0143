"""Real coding agents against a daemon, over a tap: one task with one tool call, and what went over the wire.

    python -m tests.clients codex  --program PATH [--transport websocket|http] [--model-engine]
    python -m tests.clients claude --program PATH [--model-engine]

The agents are not ours to install: `npm install @openai/codex @anthropic-ai/claude-code` somewhere, and name the programs.
Each is set up as its page in docs/ says, with the tap's address for ours, in a home and a working folder of its own. It
sees a scripted model (`scripted.py`) that calls its shell once; with `--model-engine` the default model, which calls
nothing: then only a clean end is asked for.

Exit status 1: something that should have happened did not.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from broker.bench.daemon import Daemon
from tests.broker.wire.grammar import check_events
from tests.clients import scripted
from tests.clients.tap import Tap, events_of, tapped
from tests.docs.pages import blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

TASK = "Make a file named made.txt that says harbour, then tell me how the tide is."
SAYS = "The tide is in."
COMMAND = "echo harbour > made.txt && cat made.txt"
TIMEOUT_S = 300
# Codex would look for updates, and report: not part of what the page is about.
QUIET = """
[analytics]
enabled = false
"""


@dataclass(frozen=True)
class Agent:
    """How one client is started: as its page says, with `arguments` behind its name."""

    name: str
    page: str
    call: tuple[str, str]  # what the scripted model says: the client's own shell
    arguments: tuple[str, ...]
    http_only: tuple[str, str] | None = None  # what to change on the page for that
    context: str = ""  # the page's; the scripted model has another, for its tokens are bytes


AGENTS = {
    one.name: one
    for one in (
        Agent(
            "codex",
            "docs/codex.md",
            ("exec_command", json.dumps({"cmd": COMMAND})),
            ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", TASK),
            ("supports_websockets = true", "supports_websockets = false"),
        ),
        Agent(
            "claude",
            "docs/claude-code.md",
            ("Bash", json.dumps({"command": COMMAND, "description": "make the file"})),
            ("--print", "--allowedTools", "Bash", "--", TASK),
            context="TOKENS=32768",
        ),
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("client", choices=AGENTS)
    parser.add_argument("--program", required=True, type=Path)
    parser.add_argument("--transport", choices=("websocket", "http"), default="websocket")
    parser.add_argument("--model-engine", action="store_true", help="the default model, unscripted")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="write what went over the wire")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="homeport-clients-") as folder:
        return trio.run(run, arguments, Path(folder))


async def run(arguments: argparse.Namespace, folder: Path) -> int:
    home, work = folder / "home", folder / "work"
    home.mkdir()
    work.mkdir()
    agent = AGENTS[arguments.client]
    if arguments.model_engine:
        daemon = Daemon(folder / "state", settings=("log.level=warning",))
    else:
        daemon = scripted.daemon(folder / "state", "log.level=info", say=SAYS, call=agent.call)
    with daemon:
        async with tapped(daemon.url) as tap:
            steps = _as_written(agent, tap.url, home, work, arguments.transport)
            ended = await trio.to_thread.run_sync(_start, arguments.program, agent, home, steps)
        print(daemon.tail(10))
    if arguments.keep:
        arguments.keep.write_text(json.dumps(list(_kept(tap)), indent=1, ensure_ascii=False))
    print(f"{agent.name} ended with {ended.returncode}")
    print("\n".join(f"  | {line}" for line in (ended.stdout + ended.stderr).splitlines()[-40:]))
    for line in _told(tap):
        print(line)
    if arguments.model_engine:
        return 0
    made = work / "made.txt"
    checks = {
        "it ended well": ended.returncode == 0,
        "its tool ran": made.exists() and made.read_text().strip() == "harbour",
        "it says what the model said": SAYS in ended.stdout,
        "every stream of events keeps the grammar": _grammatical(tap),
    }
    for what, passes in checks.items():
        print(f"  {'pass' if passes else 'FAIL'}  {what}")
    return 0 if all(checks.values()) else 1


def _as_written(agent: Agent, url: str, home: Path, work: Path, transport: str) -> str:
    """The page's files are written into `home`; its commands, as one script."""
    steps = [f"cd '{work}'"]
    for block in blocks(agent.page):
        told = block.text.replace("http://127.0.0.1:8321", url)
        if transport == "http" and agent.http_only:
            told = told.replace(*agent.http_only)
        if agent.context:
            told = told.replace(agent.context, f"TOKENS={scripted.MAX_CONTEXT}")
        if block.kind == "toml":
            file = home / block.rest.removeprefix("~/")
            file.parent.mkdir(parents=True)
            file.write_text(told + (QUIET if agent.name == "codex" else ""))
        elif block.kind == "sh":
            steps.append(told)
    # What is on the page comes first: the order of its blocks is that of a reader, not of a script.
    return "\n".join(sorted(steps, key=lambda step: agent.name in step.split()))


def _start(program: Path, agent: Agent, home: Path, steps: str) -> subprocess.CompletedProcess[str]:
    """Run the page's commands, of which the agent's own name gets a task to do."""
    bin_dir = home / "bin"
    bin_dir.mkdir()
    command = shlex.join([str(program.resolve()), *agent.arguments])
    (bin_dir / agent.name).write_text(f"#!/bin/sh\nexec {command}\n")
    (bin_dir / agent.name).chmod(0o700)
    environment = {
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "HOME": str(home),
        # Nothing but the tap is to be reached.
        **dict.fromkeys(
            ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9"
        ),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
    }
    return subprocess.run(
        ["bash", "-ec", steps],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def _streams(tap: Tap) -> Iterator[list[dict[str, Any]]]:
    """Every response's events, over whatever they came."""
    for wire in tap.wires:
        if wire.is_websocket:
            stream: list[dict[str, Any]] = []
            for event in wire.messages()[1]:
                if event["type"] == "response.created":
                    stream = []
                stream.append(event)
                if event["type"] in (
                    "response.completed",
                    "response.incomplete",
                    "response.failed",
                ):
                    yield stream
        else:
            for request, _, _, got in wire.exchanges():
                if request.method == b"POST" and b"/responses" in request.target:
                    yield events_of(got)


def _grammatical(tap: Tap) -> bool:
    for stream in _streams(tap):
        check_events(stream)
    return True


def _kept(tap: Tap) -> Iterator[Any]:
    for wire in tap.wires:
        if wire.is_websocket:
            up, down = wire.messages()
            yield {"handshake": wire.handshake, "client": up, "server": down}
        else:
            for request, sent, answer, got in wire.exchanges():
                yield {
                    "request": f"{request.method.decode()} {request.target.decode()}",
                    "headers": {n.decode(): v.decode("latin-1") for n, v in request.headers},
                    "client": sent.decode(),
                    "status": answer.status_code,
                    "server": got.decode(),
                }


def _told(tap: Tap) -> Iterator[str]:
    """What went over the wire, in short."""
    for number, wire in enumerate(tap.wires):
        if wire.is_websocket:
            up, down = wire.messages()
            yield f"socket {number}: {', '.join(sorted(wire.handshake))}"
            for frame in up:
                yield f"  > {frame.get('type')} {_asked(frame)}"
            for stream in _split(down):
                yield f"  < {_answered(stream)}"
        else:
            for request, sent, answer, got in wire.exchanges():
                yield f"connection {number}: {request.method.decode()} {request.target.decode()} -> {answer.status_code}"
                if sent.startswith(b"{"):
                    yield f"  > {_asked(json.loads(sent))}"
                if got.startswith(b"event:"):
                    yield f"  < {_answered(events_of(got))}"
                elif got:
                    yield f"  < {got[:300].decode(errors='replace')}"


def _split(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    streams: list[list[dict[str, Any]]] = []
    for event in events:
        if event["type"] in ("response.created", "error") or not streams:
            streams.append([])
        streams[-1].append(event)
    return streams


def _asked(body: dict[str, Any]) -> str:
    shown = {
        name: body[name]
        for name in (
            "stream",
            "store",
            "generate",
            "previous_response_id",
            "tool_choice",
            "stream_id",
            "max_tokens",
        )
        if name in body
    }
    items = body.get("input", body.get("messages"))
    kinds = (
        [item.get("type") or item.get("role") for item in items]
        if isinstance(items, list)
        else items
    )
    tools = [f"{tool.get('type')}:{tool.get('name')}" for tool in body.get("tools") or ()]
    return f"{shown} input {kinds} tools {tools} fields {sorted(body)}"


def _answered(stream: list[dict[str, Any]]) -> str:
    counts = Counter(event["type"] for event in stream)
    last = stream[-1]
    usage = (last.get("response") or {}).get("usage") or {}
    cached = (usage.get("input_tokens_details") or {}).get("cached_tokens")
    tokens = f" {usage['input_tokens']} tokens, {cached} cached" if usage else ""
    error = f" {last.get('error')}" if last["type"] == "error" else ""
    return f"{dict(counts)}{tokens}{error}"


if __name__ == "__main__":
    sys.exit(main())
