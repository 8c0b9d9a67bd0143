"""Strangers' bytes: HTTP requests made of the served OpenAPI document and then spoilt, raw bytes on the port, and frames and
JSON on the WebSocket.

    python -m tests.campaign.fuzz [--minutes 60] [--seed 1] [--quick]

Passes if: no fault is in the log; nothing hangs; every HTTP answer of 400 and more has the shape of the API that was
asked, and none is a 500; every WebSocket goes on after a bad frame, or is closed with one of the documented codes; and after
each round the daemon answers a good request.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trio

from tests.campaign import stub
from tests.campaign.verdict import Verdict
from tests.campaign.visitors import Hung, answered, ask, body_of, complaint, faults
from tests.campaign.zygote import StubDaemon, Zygote

QUICK_S = 3.0
AT_ONCE = 4
CLOSES = {1000, 1002, 1003, 1007, 1008, 1009, 1011, 1012, 1013}
SETTINGS = stub.settings(
    admission__queue_timeout="5s",
    http__body_timeout="3s",
    http__head_timeout="2s",
    websocket__message_timeout="3s",
    websocket__max_message="64KiB",
    http__max_body="256KiB",
)
WORDS = (
    "", "a", "x" * 3000, "ключ", "\0", "\ud83d\ude00", "null", "resp_x", "../..", "%00", "<|im_end|>",
    "response.create", "user", "assistant", "tool", "stub",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, 3.0)
RAW_JSON = (
    b"", b"{", b"[]", b"null", b"NaN", b'{"input": NaN}', b'{"a":1,"a":2}', b"[" * 5000, b'"\\ud800"', b"\xff\xfe",
    b'{"input": 1e999}', b'{"input": "\\ud800"}', b"9" * 6000, b'{"input":' + b'{"a":' * 200 + b"1" + b"}" * 201,
)  # fmt: skip


class Maker:
    """Values from a schema, or not from it."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def anything(self, depth: int = 0) -> Any:
        kind = self.chance.randrange(7 if depth < 4 else 5)
        match kind:
            case 0:
                return None
            case 1:
                return self.chance.random() < 0.5
            case 2:
                return self.chance.choice(NUMBERS)
            case 3 | 4:
                return self.chance.choice(WORDS)
            case 5:
                return [self.anything(depth + 1) for _ in range(self.chance.randrange(4))]
            case _:
                return {
                    self.chance.choice(
                        ("type", "role", "content", "text", "input", "id", "name")
                    ): (self.anything(depth + 1))
                    for _ in range(self.chance.randrange(5))
                }

    def of(self, schema: dict[str, Any], depth: int = 0) -> Any:
        """A value of the schema, most of the time."""
        if self.chance.random() < 0.12:
            return self.anything(depth)
        if "oneOf" in schema:
            return self.of(self.chance.choice(schema["oneOf"]), depth)
        if "enum" in schema:
            return self.chance.choice(schema["enum"])
        kind = schema.get("type")
        match kind if isinstance(kind, str) else self.chance.choice(kind or ["object"]):
            case "string":
                return self.chance.choice(WORDS)
            case "boolean":
                return self.chance.random() < 0.5
            case "integer":
                return self.chance.choice((1, 2, 16, schema.get("minimum", 0), 10**6))
            case "number":
                return self.chance.choice((0, 0.3, 1, 2, schema.get("minimum", 0)))
            case "array":
                return [self._message() for _ in range(self.chance.randrange(1, 4))]
            case _:
                required = schema.get("required", [])
                return {
                    name: self.of(inner, depth + 1)
                    for name, inner in schema.get("properties", {}).items()
                    if name in required or self.chance.random() < 0.3
                }

    def _message(self) -> Any:
        if self.chance.random() < 0.2:
            return self.anything(2)
        role = self.chance.choice(("user", "assistant", "system", "tool", "developer"))
        content: Any = self.chance.choice(WORDS)
        if self.chance.random() < 0.3:
            kind = self.chance.choice(("text", "input_text", "output_text", "image", "tool_result"))
            content = [{"type": kind, "text": self.chance.choice(WORDS)}]
        return {"role": role, "content": content}

    def body(self, schema: dict[str, Any]) -> bytes:
        if self.chance.random() < 0.1:
            return self.chance.choice(RAW_JSON)
        value = self.of(schema)
        if isinstance(value, dict):
            # Long answers and background work are other campaigns'.
            for name in ("max_output_tokens", "max_tokens", "max_completion_tokens"):
                if name in schema.get("properties", {}):
                    value.setdefault(name, 4)
        text = json.dumps(value).encode()
        if self.chance.random() < 0.1:  # one byte other, or an end too early
            at = self.chance.randrange(len(text))
            text = text[:at] + bytes([self.chance.randrange(256)]) + text[at + 1 :]
            text = text[: self.chance.randrange(1, len(text) + 1)]
        return text


class Fuzz:
    def __init__(self, url: str, verdict: Verdict, seed: int) -> None:
        self.url = url
        self.verdict = verdict
        self.chance = random.Random(seed)
        self.make = Maker(self.chance)
        self.statuses: Counter[str] = Counter()
        self.paths: dict[str, Any] = {}
        self.rounds = 0

    async def run(self, seconds: float) -> None:
        self.paths = (await ask(self.url, "GET", "/openapi.json")).json["paths"]
        due = time.monotonic() + seconds
        attacks = (self.http, self.http, self.raw, self.frames, self.speech)
        while time.monotonic() < due:
            self.rounds += 1
            chosen = [self.chance.choice(attacks) for _ in range(AT_ONCE)]
            try:
                async with answered(self.url), trio.open_nursery() as nursery:
                    for attack in chosen:
                        nursery.start_soon(attack)
            except Hung as hung:
                names = [attack.__name__ for attack in chosen]
                self.verdict.violation(f"round {self.rounds} of {names} hung: {hung}")
            if self.rounds % 10 == 0:
                answer = await ask(
                    self.url, "POST", "/v1/responses", body_of("responses", "Hi.", 2)
                )
                self.verdict.require(
                    answer.status == 200,
                    f"a good request got {answer.status} {answer.body[:200]!r}",
                )
            self.verdict.progress(f"{self.rounds} rounds, {dict(self.statuses)}")

    async def http(self) -> None:
        path = self.chance.choice(list(self.paths))
        method, operation = self.chance.choice(list(self.paths[path].items()))
        schema = operation.get("requestBody", {}).get("content", {})
        body = self.make.body(schema["application/json"]["schema"]) if schema else b""
        filled, query = path, []
        for parameter in operation["parameters"]:
            value = self.chance.choice(
                ("resp_x", "%2e%2e", "a%00b", "x" * 300, "1", "-1", "true", "%ff")
            )
            if parameter["in"] == "path":
                filled = filled.replace("{" + parameter["name"] + "}", value)
            elif self.chance.random() < 0.4:
                query.append(f"{parameter['name']}={value}")
        target = filled + ("?" + "&".join(query) if query else "")
        if self.chance.random() < 0.05:
            method = self.chance.choice(("put", "patch", "options", "head", "trace"))
        headers = {}
        if self.chance.random() < 0.2:
            headers["anthropic-version"] = "2023-06-01"
        if self.chance.random() < 0.05:
            headers["content-encoding"] = "gzip"
        answer = await ask(
            self.url, method.upper(), target, body, headers=headers, within_s=math.inf
        )
        self.statuses[str(answer.status)] += 1
        what = f"{method} {target[:80]} {body[:300]!r}"
        if answer.status == 0:
            self.verdict.violation(f"no answer to {what}")
        elif answer.status >= 500 and answer.status not in (503, 529):
            self.verdict.violation(f"{answer.status} {answer.body[:200]!r} to {what}")
        elif answer.status >= 400 and method != "head":
            versioned = "anthropic-version" in headers
            own = path.startswith(("/v1/responses", "/v1/conversations", "/v1/chat"))
            messages = path.startswith("/v1/messages") or (versioned and not own)
            wrong = complaint("messages" if messages else "responses", answer)
            if wrong is not None:
                self.verdict.violation(f"{wrong} to {what}")

    async def raw(self) -> None:
        """Bytes that resemble a request. Whatever is said back begins like HTTP, and the connection ends."""
        good = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
        pieces = [
            good,
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 40_000 + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 500 + b"\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            self.chance.randbytes(self.chance.randrange(1, 400)),
        ]
        data = bytearray(self.chance.choice(pieces))
        for _ in range(self.chance.randrange(4)):
            data[self.chance.randrange(len(data))] = self.chance.randrange(256)
        answer = await self._exchange(bytes(data))
        if answer is not None and answer:
            self.statuses["raw answered"] += 1
            self.verdict.require(
                answer.startswith(b"HTTP/1.1 "), f"{answer[:60]!r} to {bytes(data)[:200]!r}"
            )
            status = int(answer[9:12])
            self.verdict.require(
                status < 500 or status in (501, 503, 505, 529),
                f"{answer[:200]!r} to {bytes(data)[:200]!r}",
            )
            head, _, body = answer.partition(b"\r\n\r\n")
            if status >= 400 and b"content-length: 0" in head.lower():
                self.verdict.violation(f"{status} without a word to {bytes(data)[:200]!r}")
            del body

    async def frames(self) -> None:
        """A WebSocket of random frames: opcodes, lengths, masks, fragments."""
        async with await self._upgraded() as stream:
            for _ in range(self.chance.randrange(1, 12)):
                payload = self.chance.randbytes(self.chance.choice((0, 1, 5, 125, 126, 400)))
                first = self.chance.choice(
                    (0x81, 0x01, 0x80, 0x00, 0x82, 0x89, 0x8A, 0x88, 0x83, 0xF1, 0x09)
                )
                length = len(payload) if self.chance.random() < 0.9 else 2**62
                if not await self._send(stream, frame(first, payload, length, self.chance)):
                    break
            await self._ends(stream)

    async def speech(self) -> None:
        """A WebSocket of texts: JSON that is nearly a request."""
        schema = self.paths["/v1/responses"]["post"]["requestBody"]["content"]["application/json"][
            "schema"
        ]
        async with await self._upgraded() as stream:
            for _ in range(self.chance.randrange(1, 8)):
                body = self.make.body(schema)
                if self.chance.random() < 0.8 and body.startswith(b"{"):
                    kind = self.chance.choice(
                        (
                            "response.create",
                            "response.cancel",
                            "response.steer",
                            "conversation.item.create",
                            "x",
                        )
                    )
                    rest = b"," + body[1:] if len(body) > 2 else b"}"
                    body = b'{"type": "%s"' % kind.encode() + rest
                if not await self._send(stream, frame(0x81, body, len(body), self.chance)):
                    break
            await self._ends(stream)

    async def _upgraded(self) -> trio.SocketStream:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        # From anywhere: at one address, who breaks the rules this often is barred.
        here = ".".join(["127", *(str(self.chance.randrange(1, 255)) for _ in range(3))])
        port = parts.port or 80
        stream = await trio.open_tcp_stream(parts.hostname, port, local_address=here)
        await stream.send_all(
            b"GET /v1/responses HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
        )
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += bytes(await stream.receive_some(4096))
        self.verdict.require(answer.startswith(b"HTTP/1.1 101 "), f"no upgrade: {answer[:80]!r}")
        return stream

    async def _send(self, stream: trio.SocketStream, data: bytes) -> bool:
        try:
            await stream.send_all(data)
        except trio.BrokenResourceError:
            return False
        return True

    async def _ends(self, stream: trio.SocketStream) -> None:
        """Say goodbye, and read to the end: a close frame with a documented code, if any."""
        await self._send(stream, frame(0x88, struct.pack("!H", 1000), 2, self.chance))
        said = bytearray()
        try:
            while data := await stream.receive_some(65536):
                said += data
        except trio.BrokenResourceError:
            pass
        code = close_code(bytes(said))
        self.statuses[f"ws {code}"] += 1
        echoed = code is not None and 3000 <= code < 5000  # the peer's own code, sent back
        if code is not None and code not in CLOSES and not echoed:
            self.verdict.violation(f"closed with {code}")
        self.verdict.require(code != 1011, "closed with 1011: a fault of the daemon")

    async def _exchange(self, data: bytes) -> bytes | None:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        async with await trio.open_tcp_stream(parts.hostname, parts.port or 80) as stream:
            try:
                await stream.send_all(data)
                await stream.send_eof()
                said = bytearray()
                while more := await stream.receive_some(65536):
                    said += more
            except trio.BrokenResourceError:
                return None
        return bytes(said)


def frame(first: int, payload: bytes, length: int, chance: random.Random) -> bytes:
    """A client's frame; now and then without its mask."""
    masked = 0 if chance.random() < 0.03 else 0x80
    if length < 126:
        head = struct.pack("!BB", first, masked | length)
    elif length < 1 << 16:
        head = struct.pack("!BBH", first, masked | 126, length)
    else:
        head = struct.pack("!BBQ", first, masked | 127, length)
    if not masked:
        return head + payload
    mask = chance.randbytes(4)
    return head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


def close_code(said: bytes) -> int | None:
    """Of the server's close frame, if there is one in what it said."""
    at = 0
    while at + 2 <= len(said):
        first, length = said[at], said[at + 1] & 0x7F
        at += 2
        if length == 126:
            length, at = struct.unpack_from("!H", said, at)[0], at + 2
        elif length == 127:
            length, at = struct.unpack_from("!Q", said, at)[0], at + 8
        if first == 0x88 and at + 2 <= len(said):
            return int(struct.unpack_from("!H", said, at)[0]) if length >= 2 else 1000
        at += length
    return None


def campaign(zygote: Zygote, folder: Path, *, seconds: float, seed: int) -> int:
    """The exit status."""
    verdict = Verdict("fuzz", seed)
    with StubDaemon(zygote, folder / "state", SETTINGS) as daemon:
        fuzz = Fuzz(daemon.url, verdict, seed)
        trio.run(fuzz.run, seconds)
        verdict.require(daemon.ended() is None, "the daemon ended")
        verdict.require(daemon.terminate() == 0, "it did not end well")
        for line in faults(daemon.log.read_text(errors="replace"))[:20]:
            verdict.violation(line)
        if verdict.violations:
            print(daemon.tail(60), file=sys.stderr)
    figures = {"rounds": fuzz.rounds, "outcomes": dict(sorted(fuzz.statuses.items()))}
    return verdict.finish(
        figures, f"{fuzz.rounds} rounds of {AT_ONCE}: no fault, no hang, every answer in shape"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_S:g} s")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="homeport-fuzz-") as folder, Zygote() as zygote:
        seconds = QUICK_S if arguments.quick else arguments.minutes * 60
        return campaign(zygote, Path(folder), seconds=seconds, seed=arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
