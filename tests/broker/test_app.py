"""The whole daemon around a fake engine: ready line, real sockets, signals, the secret."""

import json
import os
import signal
import stat
from contextlib import asynccontextmanager

import pytest
import trio
import trio_websocket

from broker.app import StartError, new_id, serve
from broker.config import ConfigError, load
from tests.broker.rig import Browser
from tests.fakes import FakeService, saying


class Daemon:
    """`serve` in a task. `engines` records what was opened and closed."""

    scheme = "http"

    def __init__(self, nursery, tmp_path, *sets):
        self.config = load([], ["server.port=0", f"server.state_dir={tmp_path}", *sets])
        self.nursery = nursery
        self.ready, self._said = trio.open_memory_channel(10), []
        self.engines = []
        self.over = trio.Event()

    async def start(self):
        send, receive = self.ready
        self.nursery.start_soon(self._serve, send)
        with trio.fail_after(10):
            line = await receive.receive()
        assert line.startswith(f"homeport ready {self.scheme}://127.0.0.1:")
        self.port = int(line.rpartition(":")[2])

    async def _serve(self, send):
        await serve(self.config, open_engine=self._open_engine, announce=send.send_nowait)
        self.over.set()

    @asynccontextmanager
    async def _open_engine(self, config):
        async with trio.open_nursery() as nursery:
            self.engine = FakeService(
                nursery, reply=saying("Hello there."), model_name=config.model.name
            )
            self.engines.append("opened")
            try:
                yield self.engine
            finally:
                self.engines.append("closed")
                nursery.cancel_scope.cancel()

    async def browser(self):
        return Browser(await trio.open_tcp_stream("127.0.0.1", self.port))

    @asynccontextmanager
    async def websocket(self):
        """The library's own helper leaves its socket open when the server closes first."""
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        async with stream, trio.open_nursery() as nursery:
            host = f"127.0.0.1:{self.port}"
            yield await trio_websocket.wrap_client_stream(nursery, stream, host, "/v1/responses")
            nursery.cancel_scope.cancel()

    async def ended(self):
        with trio.fail_after(10):
            await self.over.wait()
        assert self.engines == ["opened", "closed"]


@pytest.fixture
async def daemon(nursery, tmp_path):
    one = Daemon(nursery, tmp_path)
    await one.start()
    return one


def ask_to_stop(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


async def test_one_port_speaks_http_and_websocket(daemon):
    browser = await daemon.browser()
    answer = await browser.request(
        "POST", "/v1/responses", {"input": "Hi."}, host=f"127.0.0.1:{daemon.port}"
    )
    assert answer.json["output"][0]["content"][0]["text"] == "Hello there."
    async with daemon.websocket() as socket:
        await socket.send_message(json.dumps({"type": "response.create", "input": "Hi."}))
        assert json.loads(await socket.get_message())["type"] == "response.created"
    await browser.drop()
    ask_to_stop()
    await daemon.ended()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_an_idle_daemon_and_its_sockets_in_order(daemon, number):
    browser = await daemon.browser()
    assert (await browser.request("GET", "/readyz")).status == 200
    async with daemon.websocket() as socket:
        ask_to_stop(number)
        with pytest.raises(trio_websocket.ConnectionClosed) as closed:
            await socket.get_message()
        assert closed.value.reason.code == 1012
        assert await browser.stream.receive_some() == b""
        await browser.drop()
    await daemon.ended()
    with pytest.raises(OSError, match=r"could not|connect"):
        await daemon.browser()


async def test_running_turns_finish_before_the_daemon_ends(daemon):
    daemon.engine.hold()
    browser = await daemon.browser()
    await browser.send("POST", "/v1/responses", {"input": "Hi."})
    async with daemon.websocket() as socket:
        await socket.send_message(json.dumps({"type": "response.create", "input": "Hi."}))
        while len(daemon.engine._running) < 2:  # noqa: ASYNC110
            await trio.sleep(0.001)
        ask_to_stop()
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert daemon.engines == ["opened"]
        daemon.engine.go()
        assert (await browser.answer()).json["status"] == "completed"
        await browser.drop()
        last = None
        with pytest.raises(trio_websocket.ConnectionClosed) as closed:
            while True:
                last = json.loads(await socket.get_message())
        assert last["type"] == "response.completed"
        assert closed.value.reason.code == 1012
    await daemon.ended()


async def test_turns_that_do_not_finish_are_cut_after_the_grace(nursery, tmp_path):
    daemon = Daemon(nursery, tmp_path, "server.grace=100ms")
    await daemon.start()
    daemon.engine.hold()
    async with daemon.websocket() as socket:
        await socket.send_message(json.dumps({"type": "response.create", "input": "Hi."}))
        await socket.get_message()
        ask_to_stop()
        with pytest.raises(trio_websocket.ConnectionClosed) as closed:
            while True:
                await socket.get_message()
        assert closed.value.reason.code == 1012
    await daemon.ended()
    assert daemon.engine.cancelled


async def test_an_http_turn_that_does_not_finish_is_cut_too(nursery, tmp_path, autojump_clock):
    daemon = Daemon(nursery, tmp_path, "server.grace=3s")
    await daemon.start()
    daemon.engine.hold()
    browser = await daemon.browser()
    await browser.send("POST", "/v1/responses", {"input": "Hi."})
    await trio.testing.wait_all_tasks_blocked(0.02)
    ask_to_stop()
    await daemon.ended()
    assert daemon.engine.cancelled
    await browser.drop()


async def test_a_second_signal_ends_the_daemon_now(daemon):
    daemon.engine.hold()
    browser = await daemon.browser()
    await browser.send("POST", "/v1/responses", {"input": "Hi."})
    while not daemon.engine._running:  # noqa: ASYNC110
        await trio.sleep(0.001)
    ask_to_stop()
    await trio.testing.wait_all_tasks_blocked(0.02)
    assert not daemon.over.is_set()
    ask_to_stop()
    with trio.fail_after(2):
        await daemon.ended()
    await browser.drop()


async def test_a_port_in_use_is_one_clear_reason(daemon, tmp_path):
    async with trio.open_nursery() as nursery:
        second = Daemon(nursery, tmp_path, f"server.port={daemon.port}")
        with pytest.raises(StartError, match=rf"cannot listen on 127\.0\.0\.1:{daemon.port}"):
            try:
                await serve(second.config, open_engine=second._open_engine, announce=print)
            except BaseExceptionGroup as group:
                (only,) = group.exceptions
                while isinstance(only, BaseExceptionGroup):
                    (only,) = only.exceptions
                raise only from None
        assert second.engines == ["opened", "closed"]
    ask_to_stop()
    await daemon.ended()


async def test_an_exposed_open_server_does_not_start(nursery, tmp_path):
    daemon = Daemon(nursery, tmp_path, "server.host=0.0.0.0")
    with pytest.raises(ConfigError, match=r"auth\.keys"):
        await serve(daemon.config, open_engine=daemon._open_engine, announce=print)
    assert daemon.engines == []


async def test_with_keys_the_secret_is_made_once_and_is_private(tmp_path):
    tenants = []
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            daemon = Daemon(nursery, tmp_path, "auth.keys=['k']")
            await daemon.start()
            browser = await daemon.browser()
            body = {"input": "Hi.", "store": True}
            assert (
                await browser.request("POST", "/v1/responses", body, x_api_key="k")
            ).status == 200
            await browser.drop()
            tenants.append((daemon.engine.manifests[0].tenant, daemon.engine.submitted[0].salt))
            ask_to_stop()
            await daemon.ended()
    assert tenants[0] == tenants[1]
    secret = tmp_path / "secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert len(secret.read_bytes()) == 32
    assert secret.read_bytes() not in tenants[0]


async def test_a_damaged_secret_is_refused_rather_than_replaced(tmp_path, nursery):
    (tmp_path / "secret").write_bytes(b"short")
    daemon = Daemon(nursery, tmp_path, "auth.keys=['k']")
    with pytest.raises(BaseExceptionGroup) as caught:
        await serve(daemon.config, open_engine=daemon._open_engine, announce=print)
    assert caught.group_contains(StartError, match="5 bytes instead of 32")


def test_ids_are_long_prefixed_and_never_repeat():
    ids = {new_id("resp") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(one.startswith("resp_") and len(one) == 5 + 48 for one in ids)
