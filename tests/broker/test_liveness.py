"""Work that hangs is noticed; stillness without work is none."""

import trio

from broker.liveness import Look, Watch
from tests.broker.rig import open_rig


def test_work_without_movement_is_a_stall_until_something_moves():
    watch = Watch(10)
    still = Look(1, (5, 5))
    seen = []
    for now, look in [
        (0, still), (9, still), (10, still), (25, still), (26, Look(1, (6, 5))), (30, Look(1, (6, 5))),
        (36, Look(1, (6, 5))), (37, Look(0, (6, 5))), (99, Look(0, (6, 5))), (100, still), (105, still),
    ]:  # fmt: skip
        watch.see(look, now)
        seen.append(watch.stalled_s)
    assert seen == [None, None, 10, 25, None, None, 10, None, None, None, None]


def test_an_engine_that_does_not_answer_is_one_that_does_not_move():
    watch = Watch(10)
    watch.see(Look(0, ()), 0)
    watch.see(None, 9)
    assert watch.stalled_s is None
    watch.see(None, 11)
    assert watch.stalled_s == 11
    watch.see(Look(0, ()), 12)
    assert watch.stalled_s is None


async def test_liveness_fails_while_a_turn_hangs_and_comes_back_with_it(autojump_clock, caplog):
    async with open_rig("server.stall=20s", "websocket.max_lifetime=1h") as rig:
        rig.nursery.start_soon(rig.port.liveness.serve)
        await trio.sleep(300)
        assert (await rig.browser().request("GET", "/healthz")).status == 200
        rig.engine.hold()
        async with rig.websocket() as client:
            await client.create()
            await client.until("response.created")
            await trio.sleep(10)
            assert (await rig.browser().request("GET", "/healthz")).status == 200
            await trio.sleep(20)
            answer = await rig.browser().request("GET", "/healthz")
            assert (answer.status, answer.json["status"]) == (503, "stalled")
            rig.engine.go()
            await client.until("response.completed")
        await trio.sleep(5)
        assert (await rig.browser().request("GET", "/healthz")).json == {"status": "ok"}
    assert caplog.text.count("liveness fails") == 1
