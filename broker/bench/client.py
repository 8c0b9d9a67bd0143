"""The benchmark's clients: a Responses WebSocket that can be cut like a cable, and streaming HTTP.

Laws
    A turn is timed from the moment its request is handed to the socket to the arrival of its first output delta; the
    clock is the client's own, so queueing, rendering and the network are inside.
    A request that the server refuses raises `Refused` and leaves the connection usable.
    Nothing here retries, reconnects or remembers: that is what is being measured.
"""

from __future__ import annotations

import http.client
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from broker.bench.workload import Item

MESSAGE_BYTES = 64 << 20  # the library's own limit of 1 MiB is below a long response.completed
TURN_TIMEOUT_S = 600.0  # a cold prefill on two cores may take a minute; ten is a hang

T = TypeVar("T")
_DATA = b"data:"
_FIRST = ("response.output_text.delta", "response.function_call_arguments.delta")
_TERMINAL = ("response.completed", "response.incomplete", "response.failed")


class Refused(Exception):
    """The server answered with an error instead of a turn."""

    def __init__(self, status: int, error: Item) -> None:
        super().__init__(f"{status} {error.get('code')}: {error.get('message')}")
        self.status = status
        self.code: str | None = error.get("code")
        self.param: str | None = error.get("param")


@dataclass(frozen=True, slots=True)
class Turn:
    """One answered request. `events` are all its events in order, the last one terminal."""

    events: tuple[Item, ...]
    ttft_s: float  # to the first delta, or to the end when the model said nothing
    total_s: float

    @property
    def response(self) -> Item:
        answer: Item = self.events[-1]["response"]
        return answer

    @property
    def id(self) -> str:
        return str(self.response["id"])

    @property
    def output(self) -> tuple[Item, ...]:
        return tuple(self.response["output"])

    @property
    def said(self) -> tuple[tuple[str, ...], ...]:
        """The output without its ids: what two runs must have in common to be equal."""
        return tuple(_said(item) for item in self.output)

    @property
    def prompt_tokens(self) -> int:
        return int(self.response["usage"]["input_tokens"])

    @property
    def cached_tokens(self) -> int:
        return int(self.response["usage"]["input_tokens_details"]["cached_tokens"])

    @property
    def output_tokens(self) -> int:
        return int(self.response["usage"]["output_tokens"])

    @property
    def by_tier(self) -> dict[str, int]:
        return dict(self.response["usage"]["homeport:cached_by_tier"])

    @property
    def recomputed(self) -> dict[str, int]:
        """{reason: tokens}: why the others were computed."""
        return dict(self.response["usage"]["homeport:recomputed"])


def _said(item: Item) -> tuple[str, ...]:
    if item["type"] == "function_call":
        return "call", item["name"], item["arguments"]
    return item["type"], *(part.get("text", "") for part in item.get("content") or ())


class Collector:
    """Gathers one turn's events and stamps the first output. Made when the request is about to be sent."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._events: list[Item] = []
        self._sent = clock()
        self._first: float | None = None

    def feed(self, event: Item) -> Turn | None:
        """The whole turn once its terminal event is in. Raises `Refused` on an error event."""
        now = self._clock()
        if event["type"] == "error":
            raise Refused(int(event.get("status", 0)), event["error"])
        self._events.append(event)
        if self._first is None and event["type"] in _FIRST:
            self._first = now
        if event["type"] not in _TERMINAL:
            return None
        first = now if self._first is None else self._first
        return Turn(tuple(self._events), first - self._sent, now - self._sent)


class Socket:
    """One WebSocket on `/v1/responses`. Its background tasks live in the caller's nursery and end with it."""

    def __init__(self, stream: trio.SocketStream, connection: WebSocketConnection) -> None:
        self._stream = stream
        self._connection = connection

    @classmethod
    async def open(
        cls,
        nursery: trio.Nursery,
        url: str,
        key: str | None = None,
        headers: Mapping[bytes, bytes] | None = None,
    ) -> Socket:
        """`url` is the daemon's http address. Raises OSError, or trio_websocket's handshake errors."""
        host, port = address(url)
        stream = await trio.open_tcp_stream(host, port)
        nursery.start_soon(_hold, stream)
        fields = [(b"Authorization", f"Bearer {key}".encode())] if key else []
        connection = await wrap_client_stream(
            nursery,
            stream,
            f"{host}:{port}",
            "/v1/responses",
            extra_headers=[*fields, *(headers or {}).items()],
            message_queue_size=256,
            max_message_size=MESSAGE_BYTES,
        )
        return cls(stream, connection)

    async def turn(self, body: Item) -> Turn:
        """Send `response.create` and wait for the turn's end. One turn at a time."""
        collector = Collector()
        await self.send({"type": "response.create", **body})
        with trio.fail_after(TURN_TIMEOUT_S):
            while True:
                turn = collector.feed(await self.receive())
                if turn is not None:
                    return turn

    async def send(self, frame: Item) -> None:
        """Raises ConnectionError when the socket is closed, as `receive` does."""
        try:
            await self._connection.send_message(json.dumps(frame))
        except ConnectionClosed as closed:
            raise ConnectionError(f"the WebSocket is closed: {closed.reason}") from None

    async def receive(self) -> Item:
        try:
            event: Item = json.loads(await self._connection.get_message())
        except ConnectionClosed as closed:
            raise ConnectionError(f"the WebSocket is closed: {closed.reason}") from None
        return event

    async def close_code(self) -> int:
        """Read until the server closes, and say with which code."""
        while True:
            try:
                await self._connection.get_message()
            except ConnectionClosed as closed:
                return int(closed.reason.code)

    async def close(self) -> None:
        """Leave politely, with a close frame."""
        await self._connection.aclose()

    async def cut(self) -> None:
        """Drop the TCP connection without a close frame, as a dying process does."""
        await trio.aclose_forcefully(self._stream)


async def _hold(stream: trio.SocketStream) -> None:
    """Close the stream when the nursery is cancelled: the library leaves that to whoever made it."""
    async with stream:
        await trio.sleep_forever()


@contextmanager
def posted(
    url: str, path: str, body: Mapping[str, Any], key: str | None, listen: Callable[[], T]
) -> Iterator[tuple[T, Iterator[bytes]]]:
    """A POST on a connection of its own, and the data of its events as they come. `listen` makes who hears them, once there
    is a connection: from then on time counts. Blocks; raises `Refused` or OSError."""
    host, port = address(url)
    connection = http.client.HTTPConnection(host, port, timeout=TURN_TIMEOUT_S)
    payload = json.dumps(body)
    try:
        connection.connect()
        listener = listen()
        connection.request("POST", path, payload, headers(key))
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise Refused(answer.status, refusal(answer.read().decode(errors="replace")))
        yield listener, (line[len(_DATA) :].strip() for line in answer if line.startswith(_DATA))
    finally:
        connection.close()


def http_turn(url: str, body: Item, key: str | None = None) -> Turn:
    """One streamed `POST /v1/responses`. Blocks; raises `Refused` or OSError."""
    streamed = {**body, "stream": True}
    with posted(url, "/v1/responses", streamed, key, Collector) as (collector, events):
        for data in events:
            turn = collector.feed(json.loads(data)) if data.startswith(b"{") else None
            if turn is not None:
                return turn
    raise ConnectionError("the stream ended without a terminal event")


def call(method: str, url: str, path: str, body: Item | None = None, key: str | None = None) -> Any:
    """One plain HTTP call: the decoded JSON, or text for what is not JSON. Blocks; raises `Refused` or OSError."""
    host, port = address(url)
    connection = http.client.HTTPConnection(host, port, timeout=TURN_TIMEOUT_S)
    try:
        payload = None if body is None else json.dumps(body)
        connection.request(method, path, payload, headers(key))
        answer = connection.getresponse()
        text = answer.read().decode()
        if answer.status >= http.client.BAD_REQUEST:
            raise Refused(answer.status, refusal(text))
        return json.loads(text) if "json" in (answer.headers["content-type"] or "") else text
    finally:
        connection.close()


def refusal(text: str) -> Item:
    """The error object of an answer. Not every server has OpenAI's form: then what it said is the message."""
    try:
        told = json.loads(text)
    except ValueError:
        told = None
    error = told.get("error") if isinstance(told, dict) else None
    return error if isinstance(error, dict) else {"message": text[:300]}


def headers(key: str | None) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return headers


def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.hostname is None:
        raise ValueError(f"not an http address: {url}")
    return parts.hostname, parts.port or 80
