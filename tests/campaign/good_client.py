"""A client that behaves, in a process of its own: how long it waits is the daemon's doing, and no attacking loop's beside it.

    python -m tests.campaign.good_client stream|newcomers|turns URL SECONDS

    stream       one answer after the other on one WebSocket: the times between two tokens
    newcomers    connect, be upgraded, leave: the time that took, the welcome with it
    turns        a short turn on a new connection: the time to its end

Says how it goes on stderr, and at the end one line of JSON: {"times_s": [..], "wrong": [what should not have happened]}.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

import trio
from trio_websocket import open_websocket_url

from tests.campaign.idle import HANDSHAKE
from tests.campaign.visitors import PATHS, ask, body_of

KEY = "good"
HEADERS = {"authorization": f"Bearer {KEY}"}
STREAM_TOKENS = 100
NEWCOMERS_EVERY_S = 0.1
TURNS_EVERY_S = 0.05


def upgrade(key: str) -> bytes:
    """A whole handshake."""
    return HANDSHAKE.replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer %s\r\n\r\n" % key.encode())


async def upgraded(stream: trio.SocketStream, key: str) -> bytes:
    """The head of the answer to a handshake. Raises trio.BrokenResourceError where there is none."""
    await stream.send_all(upgrade(key))
    answer = b""
    while b"\r\n\r\n" not in answer:
        if not (more := bytes(await stream.receive_some(4096))):
            raise trio.BrokenResourceError
        answer += more
    return answer


@dataclass(slots=True)
class Seen:
    times_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def progress(self) -> None:
        longest = max(self.times_s, default=math.nan)
        print(f"{len(self.times_s)} good, the longest {longest:.3f} s", file=sys.stderr)


async def stream(url: str, seconds: float, seen: Seen) -> None:
    due = trio.current_time() + seconds
    address = url.replace("http", "ws") + PATHS["responses"]
    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    async with open_websocket_url(address, extra_headers=headers) as ws:
        while trio.current_time() < due:
            body = body_of("responses", "A good one.", STREAM_TOKENS, store=False)
            await ws.send_message(json.dumps({"type": "response.create", **body}))
            last, kind = math.nan, ""
            while not kind.startswith(("response.completed", "response.incomplete")):
                kind = json.loads(await ws.get_message())["type"]
                if kind in ("error", "response.failed"):
                    seen.wrong.append(f"a good stream ended in {kind}")
                    return
                if kind == "response.output_text.delta":
                    now = trio.current_time()
                    if not math.isnan(last):
                        seen.times_s.append(now - last)
                    last = now
            seen.progress()


async def newcomers(url: str, seconds: float, seen: Seen) -> None:
    due = trio.current_time() + seconds
    parts = urlsplit(url)
    while trio.current_time() < due:
        began = trio.current_time()
        async with await trio.open_tcp_stream(parts.hostname or "", parts.port or 80) as one:
            answer = await upgraded(one, KEY)
        if not answer.startswith(b"HTTP/1.1 101 "):
            seen.wrong.append(f"a newcomer was answered {answer[:80]!r}")
        seen.times_s.append(trio.current_time() - began)
        seen.progress()
        await trio.sleep(NEWCOMERS_EVERY_S)


async def turns(url: str, seconds: float, seen: Seen) -> None:
    due = trio.current_time() + seconds
    while trio.current_time() < due:
        body = body_of("responses", "A good one.", 4, store=False)
        answer = await ask(url, "POST", PATHS["responses"], body, headers=HEADERS)
        if answer.status == 200:
            seen.times_s.append(answer.taken_s)
        else:
            seen.wrong.append(f"a good client was answered {answer.status}")
        seen.progress()
        await trio.sleep(TURNS_EVERY_S)


async def of_its_own(what: str, url: str, seconds: float) -> Seen:
    """One in a process of its own, to its end."""
    command = [sys.executable, "-m", __name__, what, url, str(seconds)]
    done = await trio.run_process(command, capture_stdout=True)
    return Seen(**json.loads(done.stdout))


if __name__ == "__main__":
    seen = Seen()
    trio.run(
        {"stream": stream, "newcomers": newcomers, "turns": turns}[sys.argv[1]],
        sys.argv[2],
        float(sys.argv[3]),
        seen,
    )
    print(json.dumps(asdict(seen)))
