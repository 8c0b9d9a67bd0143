"""What the campaigns of this folder that load a daemon share: one request in each API over a connection of its own, what
came of it, and what the daemon's process holds."""

from __future__ import annotations

import json
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import h11
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

PROBES = 120  # of a quarter of a second and more each
SILENT_S = 300.0
DIALECTS = ("responses", "chat", "messages")
PATHS = {
    "responses": "/v1/responses",
    "chat": "/v1/chat/completions",
    "messages": "/v1/messages",
}


@dataclass(frozen=True, slots=True)
class Answered:
    """One HTTP answer. `status` 0: there was none."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    taken_s: float = 0.0

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def server_ms(self) -> int:
        """As the daemon measured it."""
        return int(self.headers.get("openai-processing-ms", 0))


def body_of(dialect: str, text: str, tokens: int, **more: Any) -> dict[str, Any]:
    """A small request of that API."""
    match dialect:
        case "responses":
            return {"input": text, "max_output_tokens": tokens, **more}
        case "chat":
            messages = [{"role": "user", "content": text}]
            return {"messages": messages, "max_completion_tokens": tokens, **more}
        case _:
            messages = [{"role": "user", "content": text}]
            return {"model": "stub", "messages": messages, "max_tokens": tokens, **more}


async def ask(
    url: str,
    method: str,
    path: str,
    body: bytes | dict[str, Any] | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    within_s: float = 60.0,
) -> Answered:
    """One request on a connection of its own. Status 0 where the connection was refused or broke; raises TooSlowError."""
    parts = urlsplit(url)
    began = time.perf_counter()
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {
        "host": f"{parts.hostname}:{parts.port}",
        "content-type": "application/json",
        "content-length": str(len(data)),
        "connection": "close",
        **(headers or {}),
    }
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    with trio.fail_after(within_s):
        try:
            async with await trio.open_tcp_stream(parts.hostname, parts.port) as stream:
                head = h11.Request(method=method, target=path, headers=list(fields.items()))
                await stream.send_all(parser.send(head) + (parser.send(h11.Data(data=data)) or b""))
                parser.send(h11.EndOfMessage())
                status, names, said = 0, {}, bytearray()
                while True:
                    match parser.next_event():
                        case h11.NEED_DATA:
                            parser.receive_data(await stream.receive_some(65536))
                        case h11.Response() as answer:
                            status = answer.status_code
                            names = {n.decode(): v.decode() for n, v in answer.headers}
                        case h11.Data(data=more):
                            said += more
                        case h11.EndOfMessage():
                            taken_s = time.perf_counter() - began
                            return Answered(status, names, bytes(said), taken_s)
                        case h11.ConnectionClosed():
                            return Answered(0)
        except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError):
            return Answered(0)


def complaint(dialect: str, answer: Answered) -> str | None:
    """What is wrong with a refusal's shape in its API; None: nothing."""
    try:
        body = answer.json
    except ValueError:
        return f"{answer.status} without JSON: {answer.body[:80]!r}"
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return f"{answer.status} without an error object: {answer.body[:80]!r}"
    if not isinstance(error.get("type"), str):
        return f"{answer.status} without a type: {answer.body[:80]!r}"
    if dialect == "messages" and body.get("type") != "error":
        return f"{answer.status} not in Anthropic's shape: {answer.body[:80]!r}"
    if dialect != "messages" and not isinstance(error.get("code"), str):
        return f"{answer.status} without a code: {answer.body[:80]!r}"
    if answer.status in (429, 503, 529) and int(answer.headers.get("retry-after", 0)) < 1:
        return f"{answer.status} without Retry-After"
    return None


async def metrics(url: str, headers: Mapping[str, str] | None = None) -> dict[str, float]:
    """{series: value} of `/metrics`."""
    answer = await ask(url, "GET", "/metrics", headers=headers)
    assert answer.status == 200, answer
    lines = [line for line in answer.body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


class Hung(Exception):
    """What was asked for did not come, though the daemon had all the time it could need."""


@asynccontextmanager
async def answered(url: str, headers: Mapping[str, str] | None = None) -> AsyncIterator[None]:
    """Raises Hung where the body takes longer than `PROBES` answers of the daemon's to somebody beside, one after the other.

    Measured so, and not in seconds, a machine on which the daemon hardly runs is no hang; a daemon that answers
    nothing at all for `SILENT_S` is.
    """
    hung = ""
    with trio.CancelScope() as waiting:
        async with trio.open_nursery() as nursery:

            async def probe() -> None:
                nonlocal hung
                for _ in range(PROBES):
                    await trio.sleep(0.25)
                    try:
                        await ask(url, "GET", "/healthz", headers=headers, within_s=SILENT_S)
                    except trio.TooSlowError:
                        hung = f"it answered nobody for {SILENT_S:g} s"
                        waiting.cancel()
                        return
                hung = f"it answered {PROBES} others meanwhile"
                waiting.cancel()

            nursery.start_soon(probe)
            yield
            nursery.cancel_scope.cancel()
    if hung:
        raise Hung(hung)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process holds."""

    rss: int
    anonymous: int  # of it, what no file holds: pages of LMDB's map come and go as the kernel likes
    fds: int
    threads: int


def holdings(pid: int) -> Holdings:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return Holdings(
        rss=int(status["VmRSS"].split()[0]) * 1024,
        anonymous=int(status["RssAnon"].split()[0]) * 1024,
        fds=sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
        threads=int(status["Threads"]),
    )


def percentile(values: list[float], share: float) -> float:
    """0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def faults(log: str) -> list[str]:
    """Lines of a daemon's log that tell of a fault nobody meant."""
    marks = ("Traceback", "by our fault", "CRITICAL", "Exception in")
    return [line for line in log.splitlines() if any(mark in line for mark in marks)]
