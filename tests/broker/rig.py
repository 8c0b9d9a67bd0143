"""A port without a daemon: the fake engine behind both sides, and clients over in-memory streams."""

import json
from contextlib import asynccontextmanager

import h11
import trio
import trio_websocket
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from broker.access import Access
from broker.admission import Admission
from broker.app import new_id
from broker.config import load
from broker.http import HttpSide, common_app
from broker.listen import Door
from broker.port import Port
from broker.session import Sessions
from broker.websocket import WebSocketSide
from tests.fakes import FakeService, saying

TERMINAL = ("response.completed", "response.incomplete", "response.failed", "error")


class Clock:
    time = 1_000_000_000.0

    def now(self):
        return self.time


class Rig:
    """`sets` are configuration assignments, as on the command line."""

    def __init__(self, nursery, *sets, **service):
        self.nursery = nursery
        self.sockets = []
        self.config = load([], sets)
        self.engine = FakeService(
            nursery,
            model_name=self.config.model.name,
            **{"reply": saying("Hello there."), **service},
        )
        self.clock = Clock()
        admission, server = self.config.admission, self.config.server
        self.port = Port(
            config=self.config,
            access=Access(
                host=server.host,
                hosts=server.allowed_hosts,
                origins=server.allowed_origins,
                keys=self.config.auth.keys,
                operators=self.config.auth.operators,
                secret=b"secret",
                shared=self.config.auth.shared,
            ),
            engine=self.engine,
            sessions=Sessions(),
            admission=Admission(
                max_turns=admission.max_turns,
                max_tokens=admission.max_tokens,
                max_queued=admission.max_queued,
                max_queued_tokens=admission.max_queued_tokens,
                queue_timeout_s=admission.queue_timeout,
            ),
            clock=self.clock,
            new_id=new_id,
        )
        self.http = HttpSide(self.port, common_app(self.port))
        self.door = Door(
            max_head=self.config.http.max_head,
            head_timeout_s=self.config.http.head_timeout,
            max_connections=server.max_connections,
            max_per_address=server.max_per_address,
            websocket=WebSocketSide(self.port).serve,
            http=self.http.serve,
        )

    def stream(self):
        """The client's end of a new in-memory connection."""
        client, server = memory_stream_pair()
        self.nursery.start_soon(self.door.serve, server)
        return client

    def socket_stream(self):
        """The same over a socket pair: hypercorn asks for addresses."""
        client, server = trio.socket.socketpair()
        self.nursery.start_soon(self.door.serve, trio.SocketStream(server))
        self.sockets.append(trio.SocketStream(client))
        return self.sockets[-1]

    @asynccontextmanager
    async def websocket(self, path="/v1/responses", **headers):
        """A connected client. Leaving drops the transport without a close frame, as coding agents do."""
        stream = self.stream()
        extra = [
            (name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()
        ]
        async with trio.open_nursery() as nursery:
            connection = await trio_websocket.wrap_client_stream(
                nursery,
                stream,
                "localhost:8321",
                path,
                extra_headers=extra,
                max_message_size=1 << 26,
            )
            try:
                yield Client(connection, stream)
            finally:
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(stream)

    async def settled(self):
        """Wait until nothing moves any more. Bytes in a socket wake their task a moment later, hence the cushion."""
        await wait_all_tasks_blocked(0.02)

    def browser(self):
        return Browser(self.socket_stream())


@asynccontextmanager
async def open_rig(*sets, **service):
    async with trio.open_nursery() as nursery:
        rig = Rig(nursery, *sets, **service)
        await nursery.start(rig.port.background.serve)
        try:
            yield rig
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                for stream in rig.sockets:
                    await stream.aclose()


class Client:
    """A WebSocket client that speaks JSON."""

    def __init__(self, connection, stream):
        self.connection = connection
        self.stream = stream

    async def send(self, frame):
        await self.connection.send_message(
            frame if isinstance(frame, str | bytes) else json.dumps(frame)
        )

    async def create(self, text="Hi.", **fields):
        await self.send({"type": "response.create", "input": text, **fields})

    async def event(self):
        with trio.fail_after(10_000):
            return json.loads(await self.connection.get_message())

    async def until(self, *kinds):
        """Events up to and with the first of one of these types."""
        events = [await self.event()]
        while events[-1]["type"] not in kinds:
            events.append(await self.event())
        return events

    async def turn(self, text="Hi.", **fields):
        await self.create(text, **fields)
        return await self.until(*TERMINAL)

    async def closed(self):
        """Wait for the server to end the connection; its close code."""
        with trio.fail_after(10_000):
            try:
                while True:
                    await self.connection.get_message()
            except trio_websocket.ConnectionClosed as closed:
                return closed.reason.code


class Answer:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def code(self):
        return self.json["error"]["code"]

    @property
    def events(self):
        frames = self.body.decode().removesuffix("data: [DONE]\n\n").split("\n\n")
        return [json.loads(frame.partition("\ndata: ")[2]) for frame in frames if frame]


class Browser:
    """An HTTP/1.1 client with a kept-alive connection."""

    def __init__(self, stream):
        self.stream = stream
        self.parser = h11.Connection(h11.CLIENT)
        self.head = None
        self.body = b""

    async def request(self, method, path, body=None, **headers):
        await self.send(method, path, body, **headers)
        return await self.answer()

    async def send(self, method, path, body=None, **headers):
        data = (
            b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        )
        fields = {"host": "localhost:8321", "content-length": str(len(data)), **headers}
        pairs = [
            (name.replace("_", "-"), value) for name, value in fields.items() if value is not None
        ]
        await self.stream.send_all(
            self.parser.send(h11.Request(method=method, target=path, headers=pairs))
        )
        if data:
            await self.stream.send_all(self.parser.send(h11.Data(data=data)))
        await self.stream.send_all(self.parser.send(h11.EndOfMessage()))

    async def answer(self):
        with trio.fail_after(10_000):
            while True:
                event = await self._event()
                match event:
                    case h11.Response():
                        self.head, self.body = event, b""
                    case h11.Data():
                        self.body += event.data
                    case h11.EndOfMessage():
                        break
                    case h11.ConnectionClosed():
                        raise AssertionError("no answer")
        if self.parser.our_state is h11.DONE and self.parser.their_state is h11.DONE:
            self.parser.start_next_cycle()
        names = {name.decode(): value.decode() for name, value in self.head.headers}
        return Answer(self.head.status_code, names, self.body)

    async def _event(self):
        while (event := self.parser.next_event()) is h11.NEED_DATA:
            self.parser.receive_data(await self.stream.receive_some(65536))
        return event

    async def drop(self):
        await trio.aclose_forcefully(self.stream)
