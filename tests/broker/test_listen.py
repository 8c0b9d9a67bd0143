"""The first request head: any split of its bytes, too much of it, too slow, and what the next side sees of it."""

import json

import pytest
import trio
from trio.testing import memory_stream_pair

from broker.errors import ClientError
from broker.listen import Door, Head, Replay, wants_websocket

HEAD = b"POST /v1/responses?x=1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n"
BODY = b"hello and the next request"
UPGRADE = (
    b"GET /v1/responses HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive, Upgrade\r\n"
    b"Upgrade: WebSocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
)


async def read_all(stream):
    data = b""
    while chunk := await stream.receive_some():
        data += chunk
    return data


class Sides:
    """Records which side got the connection and what it could read."""

    def __init__(self):
        self.seen = []

    async def websocket(self, arrival):
        self.seen.append(("websocket", arrival.path, await read_all(arrival.stream)))

    async def http(self, arrival):
        self.seen.append(("http", arrival.path, await read_all(arrival.stream)))


def door(sides, **more):
    settings = {
        "max_head": 2048,
        "head_timeout_s": 5.0,
        "max_connections": 8,
        "max_per_address": 8,
        **more,
    }
    return Door(websocket=sides.websocket, http=sides.http, **settings)


async def exchange(one, chunks, *, eof=True):
    """Send the chunks to a door over a memory stream; what it answers."""
    client, server = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.serve, server)
        for chunk in chunks:
            await client.send_all(chunk)
            await trio.testing.wait_all_tasks_blocked()
        if eof:
            await client.send_eof()
        return await read_all(client)


@pytest.mark.parametrize("head", [HEAD, UPGRADE])
async def test_a_head_split_at_any_byte_reaches_its_side_whole(head):
    whole = head + BODY
    for at in range(1, len(whole)):
        sides = Sides()
        await exchange(door(sides), [whole[:at], whole[at:]])
        kind = "websocket" if head is UPGRADE else "http"
        assert sides.seen == [(kind, "/v1/responses", whole)], at


async def test_a_head_may_come_byte_by_byte():
    sides = Sides()
    await exchange(door(sides), [HEAD[i : i + 1] for i in range(len(HEAD))])
    assert sides.seen == [("http", "/v1/responses", HEAD)]


def parts(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.lower(), json.loads(body)


@pytest.mark.parametrize("chunk", [1, 1000, 5000])
async def test_a_head_over_the_limit_is_431_and_is_never_held(chunk):
    head = b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 5000 + b"\r\n\r\n"
    sides = Sides()
    limit = 2048 if chunk > 1 else 40
    answer = await exchange(
        door(sides, max_head=limit), [head[i : i + chunk] for i in range(0, limit + chunk, chunk)]
    )
    status, fields, body = parts(answer)
    assert (status, body["error"]["code"]) == (431, "head_too_large")
    assert b"connection: close" in fields
    assert sides.seen == []


async def test_the_limit_is_exact():
    for spare, accepted in ((0, True), (-1, False)):
        sides = Sides()
        await exchange(door(sides, max_head=len(HEAD) + spare), [HEAD])
        assert bool(sides.seen) is accepted


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ],
)
async def test_what_is_not_http_1_is_refused_with_json(head, status):
    sides = Sides()
    answer = await exchange(door(sides), [head])
    assert parts(answer)[0] == status
    assert parts(answer)[2]["error"]["type"] == "invalid_request_error"
    assert sides.seen == []


async def test_a_slow_head_is_408_at_the_deadline(autojump_clock):
    sides = Sides()
    answer = await exchange(door(sides, head_timeout_s=5.0), [HEAD[:20]], eof=False)
    assert parts(answer)[0] == 408
    assert 5 <= trio.current_time() < 8
    assert sides.seen == []


async def test_a_head_that_trickles_does_not_reset_the_deadline(autojump_clock):
    client, server = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(door(Sides(), head_timeout_s=5.0).serve, server)
        for i in range(5):
            await client.send_all(HEAD[i : i + 1])
            await trio.sleep(1)
        assert parts(await read_all(client))[0] == 408


async def test_a_peer_that_leaves_before_its_head_is_let_go_silently():
    for sent in ([], [HEAD[:10]]):
        assert await exchange(door(Sides()), sent) == b""


async def test_a_peer_that_vanishes_leaves_no_connection_behind():
    client, server = memory_stream_pair()
    one = door(Sides())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.serve, server)
        await trio.testing.wait_all_tasks_blocked()
        assert one.connections == 1
        await client.aclose()
    assert one.connections == 0


class Held(Sides):
    """Keeps its connections until it is told to let go."""

    def __init__(self):
        super().__init__()
        self.let_go = trio.Event()

    async def http(self, arrival):
        await self.let_go.wait()
        await super().http(arrival)


async def test_one_connection_too_many_is_503_and_the_others_live(autojump_clock):
    sides = Held()
    one = door(sides, max_connections=1)
    first, server = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.serve, server)
        await first.send_all(HEAD)
        await trio.testing.wait_all_tasks_blocked()
        status, head, body = parts(await exchange(one, [HEAD]))
        assert (status, body["error"]["code"]) == (503, "too_many_connections")
        assert b"retry-after: " in head
        await first.send_eof()
        sides.let_go.set()
    assert sides.seen == [("http", "/v1/responses", HEAD)]


async def test_who_has_said_nothing_gives_way_to_who_arrives(autojump_clock):
    """However many half-open connections there are, one that speaks at once is served."""
    sides = Sides()
    one = door(sides, max_connections=2, head_timeout_s=1000)
    clients = []
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            client, server = memory_stream_pair()
            nursery.start_soon(one.serve, server)
            clients.append(client)
            await trio.testing.wait_all_tasks_blocked()
            assert one.connections <= 2
        await exchange(one, [HEAD])
        assert sides.seen == [("http", "/v1/responses", HEAD)]
        assert trio.current_time() < 1000
        assert [await client.receive_some() for client in clients[:49]] == [b""] * 49
        nursery.cancel_scope.cancel()
    assert one.connections == 0


async def test_above_those_who_are_being_told_nobody_is_told(autojump_clock):
    one = door(Held(), max_connections=0)
    async with trio.open_nursery() as nursery:
        answers = []

        async def arrive():
            client, server = memory_stream_pair()
            nursery.start_soon(one.serve, server)
            answers.append(await read_all(client))

        async with trio.open_nursery() as crowd:
            for _ in range(100):
                crowd.start_soon(arrive)
    assert answers.count(b"") == 100 - 64


async def test_a_peer_that_does_not_read_is_given_up(autojump_clock):
    _, server = memory_stream_pair()
    replay = Replay(Unread(server), b"")
    replay.send_timeout_s = 7
    with pytest.raises(trio.BrokenResourceError):
        await replay.send_all(b"x")
    assert trio.current_time() == pytest.approx(7)
    with pytest.raises(trio.ClosedResourceError):
        await server.send_all(b"x")


class Unread(Replay):
    async def send_all(self, data):
        await trio.sleep_forever()

    def __init__(self, stream):
        super().__init__(stream, b"")


ANTHROPIC = b"\r\nanthropic-version: 2023-06-01"


@pytest.mark.parametrize(
    ("head", "anthropic"),
    [
        (b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", True),
        (b"POST /v1/messages?beta=true HTTP/1.1\r\nA: " + b"a" * 3000, True),
        (b"POST /v1/messages/count_tokens HTTP/9.9\r\n\r\n", True),
        (b"GET /v1/models HTTP/1.1" + ANTHROPIC + b"\r\nHost: a\r\nHost: b\r\n\r\n", True),
        (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", False),
        (b"POST /v1/responses HTTP/1.1" + ANTHROPIC + b"\r\nHost: a\r\nHost: b\r\n\r\n", False),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", False),
        (b"\r\n \r\n\r\n\r\n", False),
    ],
)
async def test_a_head_that_is_no_good_is_refused_in_the_shape_of_its_api(head, anthropic):
    body = parts(await exchange(door(Sides()), [head]))[2]
    assert ("type" in body, set(body["error"]) == {"type", "message"}) == (anthropic, anthropic)


async def test_an_upgrade_to_http_2_is_ignored():
    sides = Sides()
    head = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n"
    await exchange(door(sides), [head + BODY])
    ((kind, path, seen),) = sides.seen
    assert (kind, path) == ("http", "/healthz")
    assert b"h2c" not in seen
    assert b"http2-settings" not in seen.lower()
    assert seen.endswith(b"\r\n\r\n" + BODY)


async def test_a_refusal_does_not_wait_for_ever_for_a_peer_that_never_hangs_up(autojump_clock):
    client, server = memory_stream_pair()
    with trio.fail_after(10):
        await door(Sides(), max_connections=0).serve(server)
    await client.aclose()


async def test_a_fault_of_a_side_ends_its_connection_loudly_and_no_other(caplog):
    async def broken(arrival):
        raise AssertionError("ours")

    client, server = memory_stream_pair()
    await client.send_all(HEAD)
    sides = Sides()
    sides.websocket = sides.http = broken
    one = door(sides, max_connections=1)
    await one.serve(server)
    assert "AssertionError: ours" in caplog.text
    assert await read_all(client) == b""
    assert one.connections == 0


async def test_replay_gives_back_what_was_seen_in_pieces_and_then_the_rest():
    client, server = memory_stream_pair()
    replay = Replay(server, b"abcdef")
    await client.send_all(b"gh")
    assert [await replay.receive_some(n) for n in (4, 4, 4)] == [b"abcd", b"ef", b"gh"]


async def test_an_upgrade_needs_both_headers():
    for drop in (b"Connection: keep-alive, Upgrade\r\n", b"Upgrade: WebSocket\r\n"):
        client, server = memory_stream_pair()
        await client.send_all(UPGRADE.replace(drop, b""))
        arrival = await Head(server, 2048).read()
        assert not wants_websocket(arrival.request)


async def test_a_bad_head_raises_what_the_door_answers():
    client, server = memory_stream_pair()
    await client.send_all(b"nonsense\r\n\r\n")
    with pytest.raises(ClientError) as caught:
        await Head(server, 2048).read()
    assert (caught.value.status, caught.value.code) == (400, "invalid_http")
