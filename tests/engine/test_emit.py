"""What the engine's thread waits for when it hands a step over."""

from __future__ import annotations

from queue import SimpleQueue
from types import SimpleNamespace

import trio
import trio.testing

from engine.api import Finished, FinishReason, RequestId, Sampled, Sampling, Step, Submit
from engine.service import EngineService


def service() -> EngineService:
    parts = SimpleNamespace(
        text=None,
        name="m",
        engine=SimpleNamespace(max_context=8),
        inbox=SimpleQueue(),
        store=None,
        scrubber=None,
        grammars=None,
        grammar_timeout_s=1.0,
        clock=lambda: 0.0,
        transfers=None,
    )
    return EngineService(parts)


async def test_on_a_cpu_a_step_s_events_go_out_before_the_next_step_takes_the_cores():
    """A turn that takes outputs, and a writer behind it, as a connection has them. Trio runs what is ready in any order."""
    engine = service()
    outbox, waiting = trio.open_memory_channel[int](8)
    sent: list[int] = []

    async def turn():
        async for output in outputs:
            await outbox.send(output.tokens[0])

    async def write():
        while True:
            sent.append(await waiting.receive())

    submit = Submit(RequestId(1), "s", b"", (1,), Sampling(max_tokens=60))
    async with engine.generate(submit) as outputs, trio.open_nursery() as nursery:
        nursery.start_soon(turn)
        nursery.start_soon(write)
        for token in range(50):
            await trio.testing.wait_all_tasks_blocked()
            await engine._hand_over(Step((Sampled(RequestId(1), (token,)),), ()))
            assert sent[-1:] == [token]
        nursery.cancel_scope.cancel()


async def test_a_loop_that_does_not_keep_up_does_not_hold_the_engine_for_all_it_has_to_do(
    mock_clock, monkeypatch
):
    monkeypatch.setattr("engine.service._EVENT_PASSES", 50)
    engine = service()
    passes = 0

    async def busy():
        nonlocal passes
        while True:
            passes += 1
            mock_clock.jump(0.05)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(busy)
        await trio.lowlevel.checkpoint()
        before = passes
        await engine._hand_over(Step((), ()))
        assert passes - before <= 3  # trio runs what is ready in any order
        nursery.cancel_scope.cancel()


async def test_whoever_asked_to_know_is_told_when_all_is_there_though_he_has_read_nothing():
    engine = service()
    told: list[bool] = []
    submit = Submit(RequestId(1), "s", b"", (1,), Sampling(max_tokens=60))
    async with engine.generate(submit, lambda: told.append(True)):
        engine._deliver(Step((Sampled(RequestId(1), (5,)),), ()))
        assert not told
        engine._deliver(Step((Finished(RequestId(1), FinishReason.LENGTH, None, None, ()),), ()))
        assert told == [True]
