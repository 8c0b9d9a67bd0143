"""Whatever bytes a peer sends behind its handshake, cut in whatever way: nothing of ours fails, nothing hangs, nothing stays.

`make campaign ARGS=fuzz` does the same to a daemon, over sockets and for an hour; this shrinks what it finds.
"""

from __future__ import annotations

import json
import logging
import struct

import trio
import trio.testing
from hypothesis import event, given
from hypothesis import strategies as st

from tests.broker.rig import open_rig
from tests.broker.test_websocket import frame, handshake

DOCUMENTED = {1000, 1002, 1003, 1007, 1008, 1009, 1012, 1013}
KINDS = ("response.create", "response.cancel", "response.steer", "response.item", "x", "", 7, None)
WITHIN_S = 900  # of a clock that jumps: longer than any of our deadlines

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
requests = st.builds(
    lambda kind, known, more: {"type": kind, **known, **more},
    st.sampled_from(KINDS),
    st.fixed_dictionaries(
        {},
        optional={
            "input": st.just("Hi.") | json_values,
            "stream_id": st.sampled_from(["a", "b", "", 3]) | json_values,
            "previous_response_id": st.just("resp_x") | json_values,
            "max_output_tokens": st.integers(-1, 8) | json_values,
            "tools": json_values,
            "response_id": json_values,
        },
    ),
    st.dictionaries(st.text(max_size=6), json_values, max_size=2),
)
texts = st.one_of(
    requests.map(lambda value: json.dumps(value).encode()),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=40),
)
messages = st.builds(lambda text: frame(text), texts)
oddities = st.builds(
    lambda first, payload, mask: bytes([first, mask | len(payload)]) + b"\0" * 4 + payload,
    st.integers(0, 255),
    st.binary(max_size=125),
    st.sampled_from([0x80, 0x80, 0x80, 0]),
)
lies = st.builds(
    lambda first, length: bytes([first, 0xFF]) + struct.pack("!Q", length) + b"\0" * 4,
    st.sampled_from([0x81, 0x82, 0x89, 0x88]),
    st.integers(0, (1 << 64) - 1),
)
fragments = st.builds(
    lambda text, at: (
        frame(text[:at], fin=False) + frame(b"?", opcode=9) + frame(text[at:], opcode=0)
    ),
    texts,
    st.integers(0, 20),
)
streams = st.lists(
    st.integers(0, 9).flatmap(
        lambda kind: messages if kind < 6 else [fragments, fragments, oddities, lies][kind - 6]
    ),
    max_size=8,
)


class Faults(logging.Handler):
    """What a fault of ours says on its way into the log."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record.getMessage())


@given(streams, st.integers(1, 200), st.booleans())
def test_whatever_a_peer_sends_behind_its_handshake_ends_well(sent, step, polite):
    trio.run(
        _served, b"".join(sent), step, polite, clock=trio.testing.MockClock(autojump_threshold=0)
    )


async def _served(data: bytes, step: int, polite: bool) -> None:
    faults = Faults()
    logging.getLogger().addHandler(faults)
    try:
        await _ends_well(data, step, polite)
    finally:
        logging.getLogger().removeHandler(faults)
    assert not faults.records


async def _ends_well(data: bytes, step: int, polite: bool) -> None:
    async with open_rig("websocket.max_message=64KiB") as rig:
        peer = rig.stream()
        said = bytearray()

        async def listen() -> None:
            with trio.fail_after(WITHIN_S):
                while more := await peer.receive_some(4096):
                    said.extend(more)

        async with trio.open_nursery() as nursery:
            await peer.send_all(handshake())
            nursery.start_soon(listen)
            try:
                for at in range(0, len(data), step):
                    await peer.send_all(data[at : at + step])
                if polite:
                    await peer.send_all(frame(struct.pack("!H", 1000), opcode=8))
                else:
                    await peer.send_eof()
            except trio.BrokenResourceError:
                event("it was closed on")
        await trio.testing.wait_all_tasks_blocked()
        assert said.startswith(b"HTTP/1.1 101 ")
        code = _close_code(bytes(said).partition(b"\r\n\r\n")[2])
        event(f"closed with {code}")
        assert code is None or code in DOCUMENTED or 3000 <= code < 5000, code
        assert rig.port.websockets == 0
        assert rig.port.admission.statistics().admitted == 0
        assert not rig.engine._running


def _close_code(said: bytes) -> int | None:
    at = 0
    while at + 2 <= len(said):
        first, length = said[at], said[at + 1]
        at += 2
        assert length < 128, "a server does not mask"
        if length >= 126:
            size = 2 if length == 126 else 8
            length = int.from_bytes(said[at : at + size], "big")
            at += size
        payload = said[at : at + length]
        at += length
        if first == 0x88:
            return int.from_bytes(payload[:2], "big") if payload else 1000
        if first == 0x81:
            json.loads(payload)
    return None
