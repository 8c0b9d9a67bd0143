import errno
import socket
from collections import deque
from contextlib import suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from broker import arrivals
from broker.arrivals import Line, network_of, serve_fairly


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_addresses_take_turns_and_each_keeps_its_order(coming):
    line = Line()
    waiting = {}
    for number, address in enumerate(coming):
        line.put(address, (address, number))
        waiting.setdefault(address, deque()).append(number)
    begun = dict.fromkeys(waiting, 0)
    assert len(line) == len(coming)
    for left in range(len(coming), 0, -1):
        assert len(line) == left
        address, number = line.next()
        assert number == waiting[address].popleft()
        begun[address] += 1
        still = [begun[other] for other in waiting if waiting[other]]
        assert all(begun[address] <= count + 1 for count in still)
    assert not line
    with pytest.raises(KeyError):
        line.next()


def test_who_comes_beside_a_crowd_is_next():
    line = Line()
    for number in range(1000):
        line.put("crowd", number)
    assert [line.next() for _ in range(3)] == [0, 1, 2]
    line.put("newcomer", "here")
    assert "here" in (line.next(), line.next())


async def connect(address, source):
    one = trio.socket.socket()
    try:
        await one.bind((source, 0))
        await one.connect(address)
    except OSError:
        one.close()
        raise
    return trio.SocketStream(one)


async def heard(stream):
    """What it was told before it was closed. Closes it."""
    async with stream:
        said = b""
        with trio.fail_after(10), suppress(trio.BrokenResourceError):
            while more := await stream.receive_some():
                said += more
        return said


async def serving(nursery, serve):
    """The address of a server that begins nobody before the test lets go of the loop."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = listeners[0].socket.getsockname()
    return address, lambda: nursery.start_soon(serve_fairly, serve, listeners, nursery)


def test_a_newcomer_behind_a_crowd_is_served_among_the_first():
    order = []

    async def serve(stream):
        order.append(stream.socket.getpeername()[0])
        await stream.aclose()

    async def main():
        async with trio.open_nursery() as nursery:
            address, begin = await serving(nursery, serve)
            streams = [await connect(address, "127.0.0.2") for _ in range(60)]
            streams.append(await connect(address, "127.0.0.3"))
            begin()
            for stream in streams:
                assert await heard(stream) == b""
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert len(order) == 61
    assert order.index("127.0.0.3") < 10


def test_when_too_many_wait_the_rest_stay_outside_and_are_served_later(monkeypatch):
    monkeypatch.setattr(arrivals, "WAITING_AT_MOST", 3)
    served = []

    async def serve(stream):
        served.append(stream)
        await stream.aclose()

    async def main():
        async with trio.open_nursery() as nursery:
            address, begin = await serving(nursery, serve)
            streams = [await connect(address, "127.0.0.2") for _ in range(40)]
            begin()
            for stream in streams:
                assert await heard(stream) == b""
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert len(served) == 40


class Listening:
    """A listening socket whose first accept fails."""

    def __init__(self, inner, error):
        self.inner = inner
        self.error = error

    def accept(self):
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.inner.accept()

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.inner.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ECONNABORTED])
def test_who_cannot_be_accepted_now_is_accepted_later(monkeypatch, number):
    real = socket.fromfd
    monkeypatch.setattr(
        arrivals.socket, "fromfd", lambda *names: Listening(real(*names), OSError(number, "full"))
    )

    async def serve(stream):
        await stream.send_all(b"welcome")
        await stream.aclose()

    async def main():
        async with trio.open_nursery() as nursery:
            address, begin = await serving(nursery, serve)
            begin()
            stream = await connect(address, "127.0.0.2")
            assert await heard(stream) == b"welcome"
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_whoever_is_not_begun_is_closed_when_serving_ends(monkeypatch):
    monkeypatch.setattr(arrivals, "_BEGUN_AT_ONCE", 1)

    async def main():
        async with trio.open_nursery() as handlers, trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            address = listeners[0].socket.getsockname()
            streams = [await connect(address, "127.0.0.2") for _ in range(20)]

            async def serve(stream):
                nursery.cancel_scope.cancel()
                await stream.aclose()

            nursery.start_soon(serve_fairly, serve, listeners, handlers)
        for stream in streams:
            assert await heard(stream) == b""
        with pytest.raises(ConnectionRefusedError):
            await connect(address, "127.0.0.2")

    trio.run(main)


@pytest.mark.parametrize(
    ("family", "name", "network"),
    [
        (socket.AF_INET, ("10.1.2.3", 5), "10.1.2.3"),
        (socket.AF_INET6, ("2001:db8:1:2:3::4", 5, 0, 0), "2001:db8:1:2::/64"),
        (socket.AF_INET6, ("fe80::1%eth0", 5, 0, 2), "fe80::/64"),
        (socket.AF_INET6, ("::ffff:10.1.2.3", 5, 0, 0), "10.1.2.3"),
        (socket.AF_UNIX, "", ""),
    ],
)
def test_whom_a_peer_counts_for(family, name, network):
    assert network_of(family, name) == network
