"""TLS from the configuration. The certificate in `tls/` is for these tests alone: its key is published with it."""

import json
import ssl
from pathlib import Path

import pytest
import trio
import trio_websocket

from broker.app import StartError, serve
from broker.config import ConfigError, load
from tests.broker.rig import Browser
from tests.broker.test_app import Daemon, ask_to_stop
from tests.broker.wire.grammar import TERMINALS

TLS = Path(__file__).parent / "tls"
SETS = (f"server.tls_certificate={TLS}/localhost.pem", f"server.tls_key={TLS}/localhost.key")


@pytest.fixture
async def daemon(nursery, tmp_path):
    one = Daemon(nursery, tmp_path, *SETS)
    one.scheme = "https"
    await one.start()
    return one


async def secured(daemon, *protocols):
    trust = ssl.create_default_context(cafile=str(TLS / "localhost.pem"))
    if protocols:
        trust.set_alpn_protocols(protocols)
    stream = await trio.open_tcp_stream("127.0.0.1", daemon.port)
    inner = trio.SSLStream(stream, trust, server_hostname="localhost", https_compatible=True)
    await inner.do_handshake()
    return inner


async def test_http_and_websockets_are_served_under_tls_and_stop_in_order(daemon):
    browser = Browser(await secured(daemon))
    answer = await browser.request("POST", "/v1/responses", {"input": "Hi."})
    assert answer.json["output"][0]["content"][0]["text"] == "Hello there."
    answer = await browser.request("POST", "/v1/responses", {"input": "Hi.", "stream": True})
    assert answer.events[-1]["type"] == "response.completed"
    async with trio.open_nursery() as nursery:
        stream = await secured(daemon)
        socket = await trio_websocket.wrap_client_stream(
            nursery, stream, f"localhost:{daemon.port}", "/v1/responses"
        )
        await socket.send_message(json.dumps({"type": "response.create", "input": "Hi."}))
        while json.loads(await socket.get_message())["type"] not in TERMINALS:
            pass
        ask_to_stop()
        with pytest.raises(trio_websocket.ConnectionClosed) as closed:
            await socket.get_message()
        assert closed.value.reason.code == 1012
        await trio.aclose_forcefully(stream)
        nursery.cancel_scope.cancel()
    await trio.aclose_forcefully(browser.stream)
    await daemon.ended()


async def test_http_1_is_all_that_is_offered(daemon):
    stream = await secured(daemon, "h2", "http/1.1")
    assert stream.selected_alpn_protocol() == "http/1.1"
    await trio.aclose_forcefully(stream)
    ask_to_stop()
    await daemon.ended()


async def test_who_does_not_speak_tls_is_let_go_and_others_are_served(daemon):
    plain = await daemon.browser()
    await plain.stream.send_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    with trio.fail_after(10):
        assert not (await plain.stream.receive_some()).startswith(b"HTTP")
    await plain.drop()
    browser = Browser(await secured(daemon))
    assert (await browser.request("GET", "/healthz")).status == 200
    await trio.aclose_forcefully(browser.stream)
    ask_to_stop()
    await daemon.ended()


async def test_a_certificate_that_cannot_be_used_is_one_clear_reason(tmp_path, nursery):
    (tmp_path / "bad.pem").write_text("nonsense")
    for certificate in ("bad.pem", "absent.pem"):
        sets = (f"server.tls_certificate={tmp_path / certificate}", SETS[1])
        daemon = Daemon(nursery, tmp_path, *sets)
        with pytest.raises(StartError, match=r"server\.tls_certificate"):
            await serve(daemon.config, open_engine=daemon._open_engine, announce=print)
        assert daemon.engines == []


def test_a_certificate_without_its_key_is_refused():
    with pytest.raises(ConfigError, match="both, or neither"):
        load([], [SETS[0]])
