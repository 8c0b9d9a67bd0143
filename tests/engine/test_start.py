"""What a start does in which order, with everything of the daemon's engine but the model."""

import threading

import trio

from engine import calibrate
from engine.api import Sampling, Submit
from tests.campaign import chain, stub
from tiers.cache import TieredCache
from tiers.lmdb_store import LmdbStore

SETTINGS = stub.settings(device=100, host=100, disk=400)


async def a_turn(service):
    submit = Submit(
        request=service.new_request(),
        session="s",
        salt=b"",
        prompt=tuple(range(97, 122)) * 10,
        sampling=Sampling(max_tokens=2, temperature=0.0, stop_ids=frozenset({chain.END})),
    )
    async with service.generate(submit) as outputs:
        async for _ in outputs:
            pass


def test_the_disk_is_measured_when_its_index_is_there_and_nobody_reads_it(tmp_path, monkeypatch):
    async def first():
        async with stub.opened(tmp_path, SETTINGS) as opened:
            await a_turn(opened.service)

    trio.run(first)
    order = []
    measured = threading.Event()
    index, end_adopting = LmdbStore.index, TieredCache.end_adopting

    def slow_index(self, *what):
        measured.wait(0.3)  # who does not wait for the index has the time to come first
        return index(self, *what)

    def noted_end(self):
        order.append("index")
        end_adopting(self)

    def noted_measuring(*_):
        order.append("disk")
        measured.set()

    monkeypatch.setattr(LmdbStore, "index", slow_index)
    monkeypatch.setattr(TieredCache, "end_adopting", noted_end)
    monkeypatch.setattr(calibrate, "measure_reads", noted_measuring)

    async def second():
        async with stub.opened(tmp_path, SETTINGS):
            with trio.fail_after(30):
                await trio.to_thread.run_sync(measured.wait)

    trio.run(second)
    assert order == ["index", "disk"]


def test_an_engine_that_stops_before_it_knows_its_disk_does_not_wait_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(TieredCache, "end_adopting", lambda _: None)
    monkeypatch.setattr("engine.engine.Engine._end_adopting", lambda _: None)

    async def main():
        with trio.fail_after(30):
            async with stub.opened(tmp_path, SETTINGS):
                pass

    trio.run(main)
