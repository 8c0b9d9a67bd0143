"""The HTTP side against a fake engine, over socket pairs."""

import json
import logging
import socket
import threading

import pytest
import trio

from broker.admission import AdmissionStatistics
from broker.metrics import EdgeReport, render
from broker.routes.body import understood
from broker.session import Sessions
from engine.api import DiskReport, EngineReport, PinReport, RefuseReason, TierReport
from tests.broker.rig import open_rig
from tests.broker.wire.grammar import check_events, check_response
from tests.fakes import FakeService, saying
from tiers.block import StoreError, Tier
from tiers.ledger import EVICTION_CAUSES, REASONS

ROUTES = [
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/resp_x"),
    ("DELETE", "/v1/responses/resp_x"),
    ("GET", "/v1/responses/resp_x/input_items"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/chat/completions/chatcmpl-x"),
    ("DELETE", "/v1/chat/completions/chatcmpl-x"),
    ("POST", "/v1/responses/resp_x/cancel"),
    ("POST", "/v1/responses/input_tokens"),
    ("POST", "/v1/responses/compact"),
    ("POST", "/v1/conversations"),
    ("GET", "/v1/conversations/conv_x"),
    ("POST", "/v1/conversations/conv_x"),
    ("DELETE", "/v1/conversations/conv_x"),
    ("GET", "/v1/conversations/conv_x/items"),
    ("POST", "/v1/conversations/conv_x/items"),
    ("GET", "/v1/conversations/conv_x/items/msg_x"),
    ("DELETE", "/v1/conversations/conv_x/items/msg_x"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/m"),
    ("GET", "/metrics"),
    ("GET", "/admin/sessions"),
    ("GET", "/admin/tiers"),
    ("GET", "/admin/edge"),
    ("GET", "/admin/turns"),
    ("GET", "/admin/overview"),
    ("POST", "/admin/demote"),
    ("GET", "/admin/pins"),
    ("POST", "/admin/pins"),
    ("DELETE", "/admin/pins/s"),
    ("DELETE", "/admin/sessions/s"),
    ("GET", "/nowhere"),
    ("PUT", "/v1/models"),
]


async def test_a_post_is_one_json_response():
    async with open_rig() as rig:
        answer = await rig.browser().request("POST", "/v1/responses", {"input": "Hi."})
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        check_response(answer.json)
        assert answer.json["output"][0]["content"][0]["text"] == "Hello there."
        assert answer.headers["x-request-id"].startswith("req_")
        assert int(answer.headers["openai-processing-ms"]) >= 0


async def test_a_streamed_post_is_the_event_stream_and_ends_in_done():
    async with open_rig() as rig:
        answer = await rig.browser().request(
            "POST", "/v1/responses", {"input": "Hi.", "stream": True}
        )
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.body.endswith(b"\n\ndata: [DONE]\n\n")
        check_events(answer.events)
        frames = answer.body.split(b"\n\n")[:-2]
        for frame, event in zip(frames, answer.events, strict=True):
            assert frame.startswith(f"event: {event['type']}\ndata: ".encode())


async def test_each_event_is_one_write():
    async with open_rig() as rig:
        browser = rig.browser()
        await browser.send("POST", "/v1/responses", {"input": "Hi.", "stream": True})
        chunks = b""
        while b"0\r\n\r\n" not in chunks:
            chunks += await browser.stream.receive_some()
        for chunk in chunks.partition(b"\r\n\r\n")[2].split(b"\r\nevent: ")[1:]:
            assert b"\n\n\r\n" in chunk


async def test_several_requests_share_one_connection():
    async with open_rig() as rig:
        browser = rig.browser()
        first = await browser.request("POST", "/v1/responses", {"input": "Hi.", "store": True})
        more = {"input": "More.", "previous_response_id": first.json["id"], "stream": True}
        second = await browser.request("POST", "/v1/responses", more)
        assert check_events(second.events)["usage"]["input_tokens_details"]["cached_tokens"] > 0
        assert (await browser.request("GET", "/healthz")).status == 200


async def test_a_client_that_hangs_up_between_requests_frees_its_connection_at_once():
    """Such connections used to stay until the idle timeout: a busy poller ran into `server.max_connections`."""
    async with open_rig() as rig:
        for _ in range(3):
            browser = rig.browser()
            await browser.request("GET", "/healthz")
            await rig.settled()
            await browser.stream.aclose()
            await rig.settled()
            assert rig.door.connections == 0


async def test_a_stored_response_is_read_paged_deleted_and_then_gone():
    async with open_rig() as rig:
        browser = rig.browser()
        items = [{"role": "user", "content": f"part {n}"} for n in range(3)]
        created = (await browser.request("POST", "/v1/responses", {"input": items})).json
        path = f"/v1/responses/{created['id']}"
        assert (await browser.request("GET", path)).json == created
        page = (await browser.request("GET", f"{path}/input_items?order=asc&limit=2")).json
        assert [item["content"][0]["text"] for item in page["data"]] == ["part 0", "part 1"]
        assert page["has_more"]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][1]["id"])
        page = (
            await browser.request("GET", f"{path}/input_items?order=asc&after={page['last_id']}")
        ).json
        assert [item["content"][0]["text"] for item in page["data"]] == ["part 2"]
        assert not page["has_more"]
        newest = (await browser.request("GET", f"{path}/input_items?limit=1")).json
        assert newest["data"] == page["data"]
        for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=nobody"):
            assert (await browser.request("GET", f"{path}/input_items?{query}")).status == 400
        deleted = await browser.request("DELETE", path)
        assert deleted.json == {"id": created["id"], "object": "response", "deleted": True}
        for method in ("GET", "DELETE"):
            assert (await browser.request(method, path)).status == 404
        assert (await browser.request("GET", f"{path}/input_items")).status == 404


async def test_a_stored_response_is_read_from_its_manifest_after_the_tables_forgot_it():
    async with open_rig() as rig:
        browser = rig.browser()
        created = (await browser.request("POST", "/v1/responses", {"input": "Hi."})).json
        rig.port.sessions.forget("", created["id"])
        assert (await browser.request("GET", f"/v1/responses/{created['id']}")).json == created
        page = (await browser.request("GET", f"/v1/responses/{created['id']}/input_items")).json
        assert page["data"][0]["content"] == [{"type": "input_text", "text": "Hi."}]


async def test_input_items_have_the_shape_of_their_kind():
    call = 'ok <tool_call>{"name": "ls", "arguments": {}}</tool_call>'
    async with open_rig(reply=saying(call, "Done.")) as rig:
        browser = rig.browser()
        tools = [{"type": "function", "name": "ls", "parameters": {"type": "object"}}]
        first = (
            await browser.request("POST", "/v1/responses", {"input": "Go.", "tools": tools})
        ).json
        call_id = first["output"][-1]["call_id"]
        result = {"type": "function_call_output", "call_id": call_id, "output": "a.txt"}
        body = {"input": [result], "previous_response_id": first["id"], "tools": tools}
        second = (await browser.request("POST", "/v1/responses", body)).json
        page = (
            await browser.request("GET", f"/v1/responses/{second['id']}/input_items?order=asc")
        ).json
        kinds = [item["type"] for item in page["data"]]
        assert kinds == ["message", "message", "function_call", "function_call_output"]
        assert page["data"][2]["id"] == first["output"][-1]["id"]
        assert page["data"][2]["arguments"] == first["output"][-1]["arguments"]
        assert page["data"][3]["output"] == "a.txt"


async def test_a_store_false_response_cannot_be_read_or_continued_over_http():
    async with open_rig() as rig:
        browser = rig.browser()
        created = (
            await browser.request("POST", "/v1/responses", {"input": "Hi.", "store": False})
        ).json
        assert (await browser.request("GET", f"/v1/responses/{created['id']}")).status == 404
        more = {"input": "More.", "previous_response_id": created["id"]}
        answer = await browser.request("POST", "/v1/responses", more)
        assert (answer.status, answer.code) == (400, "previous_response_not_found")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff", 400, "invalid_json"),
        (b"[]", 400, "invalid_type"),
        ({"input": 3}, 400, "invalid_type"),
        ({"model": "other"}, 404, "model_not_found"),
        ({"previous_response_id": "resp_x"}, 400, "previous_response_not_found"),
        ({"input": "x" * 5000}, 400, "context_length_exceeded"),
    ],
)
async def test_a_refused_turn_has_its_http_status_also_when_a_stream_was_asked_for(
    stream, body, status, code
):
    async with open_rig() as rig:
        if isinstance(body, dict):
            body = {**body, "stream": stream}
        browser = rig.browser()
        answer = await browser.request("POST", "/v1/responses", body)
        assert (answer.status, answer.code) == (status, code)
        assert (await browser.request("GET", "/healthz")).status == 200


async def test_the_body_is_bounded_and_the_refusal_is_heard():
    async with open_rig("http.max_body=4KiB") as rig:
        for size in (5000, 40_000):
            answer = await rig.browser().request("POST", "/v1/responses", {"input": "x" * size})
            assert (answer.status, answer.code) == (413, "request_too_large")
        answer = await rig.browser().request("POST", "/v1/responses", {"input": "x" * 3000})
        assert answer.status == 200


async def test_a_coded_body_is_415():
    async with open_rig() as rig:
        answer = await rig.browser().request("POST", "/v1/responses", b"x", content_encoding="gzip")
        assert (answer.status, answer.code) == (415, "unsupported_encoding")


async def test_a_slow_body_is_408(autojump_clock):
    async with open_rig("http.body_timeout=9s") as rig:
        stream = rig.socket_stream()
        head = b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{"
        await stream.send_all(head)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 408 ")
        assert 9 <= trio.current_time() < 12
        await stream.aclose()


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_needs_the_key(method, path):
    async with open_rig("auth.keys=['k']") as rig:
        browser = rig.browser()
        answer = await browser.request(method, path)
        assert (answer.status, answer.code) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert (await browser.request(method, path, authorization="Bearer k")).status != 401


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_probes_need_no_key_but_a_known_host(path):
    async with open_rig("auth.keys=['k']") as rig:
        assert (await rig.browser().request("GET", path)).status == 200
        assert (await rig.browser().request("GET", path, host="evil.example")).status == 421


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"origin": "https://evil.example"}, 403), ({"host": "evil.example"}, 421)],
)
async def test_foreign_browsers_are_refused_on_every_request_of_a_connection(fields, status):
    async with open_rig() as rig:
        browser = rig.browser()
        assert (await browser.request("GET", "/v1/models")).status == 200
        assert (await browser.request("GET", "/v1/models", **fields)).status == status


async def test_unknown_paths_and_methods_have_openai_shaped_errors():
    async with open_rig() as rig:
        browser = rig.browser()
        for path in ("/nowhere", "/v1/response", "/v1/models/", "/v1/responses/a/b"):
            answer = await browser.request("GET", path)
            assert (answer.status, answer.code) == (
                404,
                "model_not_found" if "models" in path else "unknown_url",
            )
        answer = await browser.request("PUT", "/v1/responses")
        assert (answer.status, answer.code) == (405, "method_not_allowed")
        assert answer.headers["allow"] == "POST"
        answer = await browser.request("PUT", "/v1/responses/resp_x")
        assert answer.headers["allow"] == "DELETE, GET, HEAD", "those of all its routes"


async def test_models_are_listed_with_their_aliases():
    async with open_rig("model.aliases=['org/alias']") as rig:
        browser = rig.browser()
        listed = (await browser.request("GET", "/v1/models")).json["data"]
        assert [one["id"] for one in listed] == ["smollm2-135m-instruct", "org/alias"]
        for one in listed:
            assert (await browser.request("GET", f"/v1/models/{one['id']}")).json == one
        answer = await browser.request(
            "POST", "/v1/responses", {"input": "Hi.", "model": "org/alias"}
        )
        assert answer.json["model"] == "org/alias"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_its_turn_without_a_word(stream, caplog):
    async with open_rig() as rig:
        rig.engine.hold()
        browser = rig.browser()
        await browser.send("POST", "/v1/responses", {"input": "Hi.", "stream": stream})
        await rig.settled()
        await browser.drop()
        await rig.settled()
        assert not rig.engine._running
        assert rig.engine.cancelled
        assert rig.port.admission.statistics().admitted == 0
        assert caplog.text == ""


async def test_a_silent_stream_repeats_in_progress(autojump_clock):
    async with open_rig() as rig:
        rig.engine.hold()
        browser = rig.browser()
        await browser.send("POST", "/v1/responses", {"input": "Hi.", "stream": True})
        with trio.move_on_after(35):
            await browser.answer()
        rig.engine.go()
        answer = await browser.answer()
        check_events(answer.events)


async def test_a_turn_that_breaks_is_a_500_as_json_and_a_failed_response_as_a_stream():
    async with open_rig() as rig:
        rig.engine.faults.fail_after = 2
        browser = rig.browser()
        answer = await browser.request("POST", "/v1/responses", {"input": "Hi."})
        assert (answer.status, answer.code) == (500, "server_error")
        answer = await browser.request("POST", "/v1/responses", {"input": "Hi.", "stream": True})
        assert check_events(answer.events)["status"] == "failed"


async def test_too_many_turns_are_refused_with_a_time_to_come_back():
    async with open_rig("admission.max_turns=1", "admission.max_queued=0") as rig:
        rig.engine.hold()
        busy = rig.browser()
        await busy.send("POST", "/v1/responses", {"input": "Hi."})
        await rig.settled()
        answer = await rig.browser().request("POST", "/v1/responses", {"input": "Hi."})
        assert (answer.status, answer.code) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        rig.engine.go()
        assert (await busy.answer()).status == 200
        rig.engine.faults.refuse = RefuseReason.BUSY
        assert (
            await rig.browser().request("POST", "/v1/responses", {"input": "Hi."})
        ).status == 503


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions", "/v1/messages"])
async def test_what_nobody_would_make_room_for_is_refused_unread_and_observed(path):
    unread = b'{"input": [[['
    async with open_rig("admission.max_turns=1", "admission.max_queued=0") as rig:
        assert (await rig.browser().request("POST", path, unread)).status == 400
        rig.engine.hold()
        await rig.browser().send("POST", "/v1/responses", {"input": "Hi."})
        await rig.settled()
        answer = await rig.browser().request("POST", path, unread)
        assert answer.status == (529 if "messages" in path else 503)
        assert int(answer.headers["retry-after"]) >= 1
        assert rig.port.admission.statistics().refused_total == 1
        assert rig.port.observations.report().ended_total == {"refused": 1}
        if path == "/v1/responses":
            queued = {"input": "Hi.", "background": True}
            assert (await rig.browser().request("POST", path, queued)).status == 200, "it waits"


async def test_a_long_body_is_parsed_beside_the_loop():
    here = threading.get_ident()
    where = [await understood(b"x" * size, lambda _: threading.get_ident()) for size in (9, 70_000)]
    assert where[0] == here != where[1]


async def test_what_is_no_http_1_0_is_refused_in_words():
    """The fuzz campaign found it: h11 writes the head of such an answer in another order."""
    async with open_rig() as rig:
        stream = rig.socket_stream()
        head = (
            b"POST /v1/messages HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        await stream.send_all(head + b"zz\r\n\r\n")
        said = b""
        while more := await stream.receive_some():
            said += more
        assert said.startswith(b"HTTP/1.1 400 ")
        assert json.loads(said.partition(b"\r\n\r\n")[2])["type"] == "error"


async def test_a_client_that_does_not_read_its_stream_is_given_up(autojump_clock):
    """Hypercorn shields its sends from cancellation; the deadline is ours, and ends the turn as well."""
    async with open_rig("http.send_timeout=9s", reply=saying("x" * 3000), chunk=1) as rig:
        browser = rig.browser()
        browser.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await browser.send("POST", "/v1/responses", {"input": "Hi.", "stream": True})
        await trio.sleep(60)
        await rig.settled()
        assert rig.door.connections == 0
        assert rig.port.admission.statistics().admitted == 0


async def test_stopping_does_not_wait_for_a_client_that_does_not_read(autojump_clock):
    async with trio.open_nursery() as nursery:
        async with open_rig("http.send_timeout=1h", reply=saying("x" * 3000), chunk=1) as rig:
            browser = rig.browser()
            browser.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await browser.send("POST", "/v1/responses", {"input": "Hi.", "stream": True})
            await trio.sleep(60)
            assert rig.door.connections == 1
            with trio.fail_after(5):
                rig.nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await rig.settled()
                    assert rig.door.connections == 0
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("anthropic", [False, True])
async def test_a_body_that_is_no_http_is_refused_in_words(anthropic):
    """Found by the fuzz campaign: hypercorn says 400, and nothing else."""
    path = b"/v1/messages" if anthropic else b"/v1/responses"
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % path
    async with open_rig() as rig:
        stream = rig.socket_stream()
        await stream.send_all(head + b"zz\r\n")
        answer = b""
        while chunk := await stream.receive_some():
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-length: %d" % len(body) in head
    assert (json.loads(body).get("type") == "error") is anthropic
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


SMUGGLED = b"GET /admin/tiers HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"0\r\n\r\n"


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 3\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 0",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: 5, 6",
        b"Content-Length: +5",
        b"Content-Length: 0x5",
        b"Content-Length : 5",
        b"Transfer-Encoding: chunked, chunked",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding:\x0bchunked",
        b"X: y\nContent-Length: 5\r\n Transfer-Encoding: chunked",
    ],
)
@pytest.mark.parametrize("first", [True, False])
async def test_no_second_request_is_smuggled_behind_an_ambiguous_one(fields, first):
    """Whether it begins the connection or comes on a kept-alive one."""
    head = b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\n" + fields + b"\r\n\r\n"
    async with open_rig() as rig:
        stream = rig.socket_stream()
        if not first:
            await stream.send_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += await stream.receive_some()
        await stream.send_all(head + CHUNKED + SMUGGLED)
        answer = b""
        with trio.fail_after(10):
            while chunk := await stream.receive_some():
                answer += chunk
        assert b"leases" not in answer
        # Of a connection that is closed on him a client may not hear why: what he sent behind it is in the way.
        assert answer == b"" or 400 <= int(answer[9:12]) < 502


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
async def test_no_word_of_a_client_or_a_model_reaches_the_log(level, caplog):
    caplog.set_level(level)
    logging.getLogger("trio-websocket").setLevel(logging.INFO)  # as `serve` does
    said = "kanarienvogel"
    async with open_rig("auth.keys=['kanarienkey']", reply=saying(said)) as rig:
        key = {"x_api_key": "kanarienkey"}
        message = {"role": "user", "content": said}
        bodies = {
            "/v1/responses": {"input": said, "instructions": said, "metadata": {"a": said}},
            "/v1/chat/completions": {"messages": [message]},
            "/v1/messages": {
                "messages": [message],
                "max_tokens": 9,
                "model": rig.config.model.name,
            },
        }
        for path, body in bodies.items():
            for more in ({}, {"stream": True}, {"model": said}, {"tools": said}):
                await rig.browser().request("POST", path, {**body, **more}, **key)
        async with rig.websocket(authorization="Bearer kanarienkey") as client:
            await client.turn(said)
            await client.send(json.dumps({"type": said}))
            await client.send(said)
            await client.until("error")
        rig.engine.faults.fail_after = 2
        await rig.browser().request("POST", "/v1/responses", {"input": said}, **key)
        answer = await rig.browser().request("GET", "/v1/models", x_api_key="kanarienkei")
        assert answer.status == 401
    assert "kanarien" not in caplog.text


async def test_a_late_upgrade_is_told_to_open_a_new_connection():
    async with open_rig() as rig:
        browser = rig.browser()
        assert (await browser.request("GET", "/healthz")).status == 200
        stream = browser.stream
        await stream.send_all(
            b"GET /v1/responses HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
        )
        answer = b""
        while chunk := await stream.receive_some():
            answer += chunk
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert (
            json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]
            == "upgrade_on_used_connection"
        )


async def test_a_fault_of_ours_is_a_500_in_shape_and_a_traceback_in_the_log(caplog):
    async with open_rig() as rig:
        rig.engine.text = None
        with caplog.at_level(logging.ERROR):
            answer = await rig.browser().request("POST", "/v1/responses", {"input": "Hi."})
            await rig.settled()
        assert (answer.status, answer.code) == (500, "server_error")
        assert "Traceback" in caplog.text
        assert "NoneType" not in answer.body.decode()


async def test_while_stopping_readiness_fails_and_turns_are_refused_but_health_and_reading_go_on():
    async with open_rig() as rig:
        browser = rig.browser()
        created = (await browser.request("POST", "/v1/responses", {"input": "Hi."})).json
        rig.port.stopping.set()
        assert (await browser.request("GET", "/readyz")).status == 503
        assert (await browser.request("POST", "/v1/responses", {"input": "Hi."})).status == 503
        assert (await browser.request("GET", "/healthz")).status == 200
        assert (await browser.request("GET", f"/v1/responses/{created['id']}")).status == 200


async def test_stopping_closes_idle_connections_and_lets_running_turns_answer():
    async with open_rig() as rig:
        idle, busy = rig.browser(), rig.browser()
        assert (await idle.request("GET", "/healthz")).status == 200
        rig.engine.hold()
        await busy.send("POST", "/v1/responses", {"input": "Hi."})
        await rig.settled()
        rig.port.stopping.set()
        await rig.http.stop()
        with trio.fail_after(5):
            assert await idle.stream.receive_some() == b""
        rig.engine.go()
        assert (await busy.answer()).status == 200


async def test_admin_reports_and_demotes():
    async with open_rig() as rig:
        browser = rig.browser()
        await browser.request("POST", "/v1/responses", {"input": "Hi."})
        assert (await browser.request("GET", "/admin/sessions")).json == {"sessions": []}
        assert (await browser.request("GET", "/admin/tiers")).json["leases"] == 1
        answer = await browser.request("POST", "/admin/demote", {"tier": "disk", "session": "s"})
        assert answer.json == {"moved_blocks": 1}
        await browser.request("POST", "/admin/demote", {"tier": "host"})
        assert rig.engine.demoted == [(Tier.DISK, "s"), (Tier.HOST, None)]
        for body in ({}, {"tier": "device"}, {"tier": "host", "session": 3}, {"tier": []}):
            assert (await browser.request("POST", "/admin/demote", body)).status == 400


async def test_headers_that_name_a_session_have_its_kv_fetched_before_the_body_is_read():
    async with open_rig() as rig:
        browser = rig.browser()
        await browser.request("POST", "/v1/responses", {"input": "Hi."}, session_id="s")
        (node,) = rig.port.sessions.of_session("", "s")
        rig.clock.time += 60
        answer = await browser.request("POST", "/v1/responses", b"no JSON", session_id="s")
        assert answer.status == 400
        assert rig.engine.prefetched == [node.tokens]


async def test_a_pin_is_granted_for_no_longer_than_the_most_and_is_listed():
    async with open_rig("tiers.ttl_max=2h") as rig:
        browser = rig.browser()
        body = {"input": "Hi.", "prompt_cache_key": "a/b"}
        response_id = (await browser.request("POST", "/v1/responses", body)).json["id"]
        for named in ({"session": "a/b"}, {"response_id": response_id}):
            for asked, granted in (("1h", 3600), (90, 90), ("30d", 7200)):
                answer = await browser.request("POST", "/admin/pins", {**named, "ttl": asked})
                assert answer.json == {
                    "session": "a/b",
                    "held_bytes": 1024,
                    "tokens": len(rig.engine.fed[0][1]),
                    "ttl_s": granted,
                    "expires_at": 1_000_000_000 + granted,
                }
                assert rig.engine.pinned == {(b"", "a/b"): granted}
        assert (await browser.request("GET", "/admin/pins")).json == {
            "pins": [{"session": "a/b", "held_bytes": 1024, "expires_s": 7200}]
        }
        metrics = (await browser.request("GET", "/metrics")).body.decode().splitlines()
        assert "homeport_pins 1" in metrics
        assert "homeport_pinned_bytes 1024" in metrics
        answer = await browser.request("DELETE", "/admin/pins/a%2Fb")
        assert answer.json == {"session": "a/b", "deleted": True}
        assert rig.engine.pinned == {}
        answer = await browser.request("DELETE", "/admin/pins/a%2Fb")
        assert (answer.status, answer.code) == (404, "pin_not_found")


async def test_a_pin_over_the_quota_is_a_conflict_and_one_of_nothing_is_not_found():
    async with open_rig() as rig:
        browser = rig.browser()
        body = {"input": "Hi.", "prompt_cache_key": "s"}
        await browser.request("POST", "/v1/responses", body)
        rig.engine.faults.pin = True
        answer = await browser.request("POST", "/admin/pins", {"session": "s", "ttl": "1h"})
        assert (answer.status, answer.code) == (409, "pin_quota_exceeded")
        assert "25%" in answer.json["error"]["message"]
        for named, code in (
            ({"session": "t"}, "session_not_found"),
            ({"response_id": "resp_x"}, "not_found"),
        ):
            answer = await browser.request("POST", "/admin/pins", {**named, "ttl": "1h"})
            assert (answer.status, answer.code) == (404, code)
        for wrong, param in (
            ({}, "session"),
            ({"session": "s", "response_id": "r", "ttl": 1}, "session"),
            ({"session": 3, "ttl": 1}, "session"),
            ({"session": "s"}, "ttl"),
            ({"session": "s", "ttl": "soon"}, "ttl"),
            ({"session": "s", "ttl": 0}, "ttl"),
            ({"session": "s", "ttl": "0s"}, "ttl"),
            ({"session": "s", "ttl": True}, "ttl"),
        ):
            answer = await browser.request("POST", "/admin/pins", wrong)
            assert (answer.status, answer.json["error"]["param"]) == (400, param)


async def test_a_deleted_response_is_gone_from_memory_and_from_the_engine():
    async with open_rig() as rig:
        browser = rig.browser()
        response_id = (await browser.request("POST", "/v1/responses", {"input": "Hi."})).json["id"]
        assert (await browser.request("DELETE", f"/v1/responses/{response_id}")).status == 200
        assert rig.engine.forgotten == [("", response_id)]
        assert rig.engine.manifests == []
        for method in ("GET", "DELETE"):
            assert (await browser.request(method, f"/v1/responses/{response_id}")).status == 404


async def test_what_the_disk_cannot_delete_is_there_still():
    class Stuck(FakeService):
        async def forget_response(self, tenant, response_id):
            raise StoreError("io", "as asked")

    async with open_rig() as rig:
        rig.engine = rig.port.engine = Stuck(rig.nursery)
        browser = rig.browser()
        body = {"input": "Hi.", "prompt_cache_key": "s"}
        response_id = (await browser.request("POST", "/v1/responses", body)).json["id"]
        for path in (f"/v1/responses/{response_id}", "/admin/sessions/s"):
            answer = await browser.request("DELETE", path)
            assert (answer.status, answer.code) == (503, "overloaded")
            assert answer.headers["retry-after"] == "5"
        assert (await browser.request("GET", f"/v1/responses/{response_id}")).status == 200


async def test_a_deleted_session_takes_its_responses_and_its_pin_and_nobody_elses():
    async with open_rig("auth.keys=['a', 'b']") as rig:
        browser = rig.browser()

        async def turn(key, **body):
            body = {"input": "Hi.", "prompt_cache_key": "s", **body}
            return (await browser.request("POST", "/v1/responses", body, x_api_key=key)).json["id"]

        gone = [await turn("a"), await turn("a", store=False)]
        gone.append(await turn("a", previous_response_id=gone[0]))
        kept = [await turn("b"), await turn("a", prompt_cache_key="other")]
        for key in "ab":
            pin = {"session": "s", "ttl": "1h"}
            await browser.request("POST", "/admin/pins", pin, x_api_key=key)
        answer = await browser.request("DELETE", "/admin/sessions/s", x_api_key="a")
        assert answer.json == {"session": "s", "deleted_responses": 3}
        assert sorted(one for _, one in rig.engine.forgotten) == sorted(gone)
        assert [m.response_id for m in rig.engine.manifests] == kept
        assert len(rig.engine.pinned) == 1
        assert rig.engine.forgotten[0][1] == gone[2], "what continues others goes first"
        for key, response_id, status in (("a", gone[0], 404), ("b", kept[0], 200)):
            path = f"/v1/responses/{response_id}"
            assert (await browser.request("GET", path, x_api_key=key)).status == status
        answer = await browser.request("DELETE", "/admin/sessions/s", x_api_key="a")
        assert (answer.status, answer.code) == (404, "session_not_found")


async def test_a_session_is_deleted_from_disk_after_a_restart_and_its_kv_fetched_by_its_name():
    async with open_rig() as rig:
        browser = rig.browser()
        body = {"input": "Hi.", "prompt_cache_key": "s", "store": False}
        await browser.request("POST", "/v1/responses", body)
        (manifest,) = rig.engine.manifests
        rig.port.sessions = Sessions()
        await browser.request("POST", "/v1/responses", b"{", session_id="s")
        assert rig.engine.prefetched == [manifest.tokens]
        rig.port.sessions = Sessions()
        answer = await browser.request("DELETE", "/admin/sessions/s")
        assert answer.json == {"session": "s", "deleted_responses": 1}
        assert rig.engine.manifests == []


async def test_the_operators_times_are_granted_over_http():
    async with open_rig("tiers.ttl_default=1m", "tiers.ttl_max=1h") as rig:
        browser = rig.browser()
        for body, granted in (({}, 60), ({"prompt_cache_retention": "24h"}, 3600)):
            answer = await browser.request("POST", "/v1/responses", {"input": "Hi.", **body})
            assert answer.json["homeport:cache"] == {"ttl_s": granted}
            assert rig.engine.submitted[-1].keep_s == granted
        answer = await browser.request(
            "POST", "/v1/responses", {"input": "Hi.", "prompt_cache_options": {"ttl": "ever"}}
        )
        assert (answer.status, answer.code) == (400, "invalid_value")
        assert answer.json["error"]["param"] == "prompt_cache_options.ttl"


async def test_a_disk_that_refuses_is_one_log_line_and_counted_and_comes_back_by_itself(caplog):
    async with open_rig() as rig:
        browser = rig.browser()
        stored = []
        with caplog.at_level(logging.WARNING):
            for refuses in (False, True, True, False):
                rig.engine.faults.persist = refuses
                answer = await browser.request("POST", "/v1/responses", {"input": "Hi."})
                assert answer.json["status"] == "completed"
                stored.append(answer.json["homeport:stored"])
                path = f"/v1/responses/{answer.json['id']}"
                assert (await browser.request("GET", path)).json == answer.json
        assert stored == ["disk", "memory", "memory", "disk"]
        assert len(caplog.records) == 2
        metrics = (await browser.request("GET", "/metrics")).body.decode().splitlines()
        assert 'homeport_responses_stored_total{kept_on="disk"} 2' in metrics
        assert 'homeport_responses_stored_total{kept_on="memory"} 2' in metrics


async def test_every_series_of_a_known_label_is_always_there():
    async with open_rig() as rig:
        text = (await rig.browser().request("GET", "/metrics")).body.decode()
    for reason in REASONS:
        assert f'homeport_recomputed_tokens_total{{reason="{reason}"}} 0' in text
    for tier in ("device", "host", "disk"):
        for cause in EVICTION_CAUSES:
            series = f'homeport_evictions_by_cause_total{{tier="{tier}",cause="{cause}"}} 0'
            assert series in text
    for reason in ("full", "io"):
        assert f'homeport_disk_failures_total{{reason="{reason}"}} 0' in text
    for state in ("off", "degraded"):
        assert f'homeport_disk_state{{state="{state}"}} 0' in text
    assert 'homeport_disk_state{state="ok"} 1' in text
    for result in ("checked", "mismatched", "skipped"):
        assert f'homeport_canary_total{{result="{result}"}} 0' in text
    for name in ("amplification", "hit_share", "pins", "pinned_bytes", "disk_pending_bytes"):
        assert f"\nhomeport_{name} " in text


async def test_metrics_are_prometheus_text():
    async with open_rig() as rig:
        browser = rig.browser()
        await browser.request("POST", "/v1/responses", {"input": "Hi."})
        answer = await browser.request("GET", "/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = answer.body.decode().splitlines()
        assert 'homeport_turns_total{transport="http"} 1' in lines
        assert "homeport_leases 1" in lines


def test_metrics_show_every_number_of_the_report_without_rounding():
    report = EngineReport(
        running=1,
        waiting=2,
        loading=3,
        leases=4,
        refs=5,
        dirty=6,
        tokens_total={"computed": 1_234_567_891, "disk": 7},
        output_tokens_total=8,
        evictions_total={"host": 9},
        spills_total=10,
        spill_failures_total=11,
        fetches_total=12,
        verify_failures_total={"checksum": 13, "io": 14},
        tiers=(TierReport("device", 1 << 40, 15, 16, 17, 18),),
        sessions=(),
        eviction_causes={"host": {"quota": 25}},
        recomputed_total={"slow": 26},
        amplification=1.0625,
        hit_share=0.96875,
        compute_threads=51,
        disk=DiskReport(
            state="degraded",
            reason="full",
            index_complete=False,
            records=27,
            pending_bytes=28,
            reading=29,
            scrubbed_total=30,
            rotten_total=31,
            degraded_s=32.5,
            failures_total={"full": 33},
            commits_total=34,
            commit_s_total=35.5,
            oldest_read_s=36.5,
            reads_total={"direct": 41},
        ),
        canary={"checked": 37, "mismatched": 38},
        host_failures_total={"checksum": 39},
        spilled_total={"disk": 10},
        spill_failures_by_reason={"behind": 11},
        restored_total={"disk": 12},
        pins=(PinReport("a", 40, 1.0), PinReport("b", 50, 1.0)),
    )
    text = render(report, EdgeReport(19, {"websocket": 20}, AdmissionStatistics(21, 22, 23), 24))
    for line in (
        'homeport_tokens_total{source="computed"} 1234567891',
        'homeport_tokens_total{source="host"} 0',
        'homeport_tokens_total{source="remote"} 0',
        'homeport_verify_failures_total{tier="disk",reason="checksum"} 13',
        'homeport_tier_capacity_bytes{tier="device"} 1099511627776',
        'homeport_evictions_total{tier="host"} 9',
        'homeport_turns_total{transport="http"} 0',
        'homeport_evictions_by_cause_total{tier="host",cause="quota"} 25',
        'homeport_recomputed_tokens_total{reason="slow"} 26',
        "homeport_amplification 1.0625",
        "homeport_hit_share 0.96875",
        "homeport_compute_threads 51",
        'homeport_disk_state{state="degraded"} 1',
        'homeport_disk_state{state="ok"} 0',
        "homeport_disk_index_complete 0",
        "homeport_disk_pending_bytes 28",
        "homeport_disk_degraded_seconds 32.5",
        'homeport_disk_failures_total{reason="full"} 33',
        "homeport_disk_commit_seconds_total 35.5",
        "homeport_disk_oldest_read_seconds 36.5",
        'homeport_disk_reads_total{path="direct"} 41',
        'homeport_disk_reads_total{path="mapped"} 0',
        'homeport_canary_total{result="mismatched"} 38',
        'homeport_verify_failures_total{tier="host",reason="checksum"} 39',
        'homeport_verify_failures_total{tier="host",reason="key"} 0',
        "homeport_pins 2",
        "homeport_pinned_bytes 90",
        "homeport_dirty_blocks 6",
        "homeport_turns_refused_total 23",
    ):
        assert line in text.splitlines()
    shown = {line.rpartition(" ")[2] for line in text.splitlines() if not line.startswith("#")}
    whole = {*range(1, 18), *range(19, 32), 33, 34, 37, 38}
    assert {str(n) for n in whole} <= shown
    assert text.endswith("\n")
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
