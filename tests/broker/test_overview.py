"""What the dashboard asks for: bounded, in agreement with the other reports, and on behalf of whom an operator names."""

import trio

from broker.overview import SESSIONS, TURNS
from tests.broker.rig import open_rig

KEYS = ("auth.keys=['a', 'b']", "auth.operators=['o']")


async def turn(browser, session="s", key=None, **fields):
    body = {"input": "Hi.", "prompt_cache_key": session, **fields}
    named = {} if key is None else {"x_api_key": key}
    return (await browser.request("POST", "/v1/responses", body, **named)).json


async def overview(browser, seen=0, **headers):
    path = f"/admin/overview?turns_after={seen}"
    return (await browser.request("GET", path, **headers)).json


async def test_it_says_what_the_other_reports_say():
    async with open_rig() as rig:
        browser = rig.browser()
        for session in ("s", "s", "t"):
            await turn(browser, session)
        seen = await overview(browser)
        assert seen["edge"] == (await browser.request("GET", "/admin/edge")).json
        tiers = (await browser.request("GET", "/admin/tiers")).json
        del tiers["pins"]
        assert seen["engine"] == tiers
        turns = (await browser.request("GET", "/admin/turns")).json
        assert seen["turns"] == turns["turns"]
        assert (seen["turns_ended"], seen["now"], seen["running"]) == (3, turns["now"], [])
        assert [one["session"] for one in seen["sessions"]] == ["t", "s"], "used last first"
        assert seen["sessions"][0]["tokens_on"]["device"] == 1


async def test_turns_that_were_seen_are_left_out():
    async with open_rig() as rig:
        browser = rig.browser()
        for _ in range(3):
            await turn(browser)
        assert [len((await overview(browser, n))["turns"]) for n in (0, 1, 3, 99)] == [3, 2, 0, 0]
        for wrong in ("x", "-1", "1" * 99, "%C2%B2"):
            answer = await browser.request("GET", f"/admin/overview?turns_after={wrong}")
            assert (answer.status, answer.json["error"]["param"]) == (400, "turns_after")


async def test_an_answer_has_a_bound():
    async with open_rig() as rig:
        browser = rig.browser()
        for number in range(TURNS + 2):
            await turn(browser, f"s{number}")
        seen = await overview(browser)
        assert len(seen["turns"]) == TURNS
        assert len(seen["sessions"]) == SESSIONS
        assert seen["sessions_known"] == TURNS + 2
        assert seen["sessions"][0]["session"] == f"s{TURNS + 1}"


async def test_a_turn_under_way_is_shown_with_its_stage_until_it_is_over():
    async with open_rig() as rig:
        browser, busy = rig.browser(), rig.browser()
        rig.engine.hold()
        await busy.send("POST", "/v1/responses", {"input": "Hi.", "prompt_cache_key": "s"})
        await rig.settled()
        (running,) = (await overview(browser))["running"]
        assert (running["session"], running["tenant"]) == ("s", "")
        assert running["stage"] in ("queue", "prefill")
        rig.engine.go()
        await busy.answer()
        assert (await overview(browser))["running"] == []


async def test_a_session_is_joined_with_its_own_lease():
    async with open_rig() as rig:
        browser = rig.browser()
        await turn(browser)
        (one,) = (await overview(browser))["sessions"]
        assert (one["session_class"], one["idle_s"], one["pinned_s"]) == ("pinned", 7.0, 60.0)
        rig.engine.leases.clear()
        rig.clock.time += 5
        (one,) = (await overview(browser))["sessions"]
        assert (one["session_class"], one["idle_s"], one["pinned_s"]) == (None, 5.0, None)


async def test_an_operator_acts_for_the_tenant_that_it_names_and_for_no_other():
    """Two tenants have a session of one name. Each action reaches the named one's alone."""
    async with open_rig(*KEYS) as rig:
        browser = rig.browser()
        for key in "ab":
            await turn(browser, key=key)
        seen = await overview(browser, x_api_key="o")
        b, a = (one["tenant"] for one in seen["sessions"])
        assert a != b
        assert {one["tenant"] for one in seen["turns"]} == {a, b}
        salts = [submit.salt for submit in rig.engine.submitted]

        pin = {"session": "s", "ttl": "1h", "tenant": a}
        assert (await browser.request("POST", "/admin/pins", pin, x_api_key="o")).status == 200
        assert set(rig.engine.pinned) == {(salts[0], "s")}
        down = {"tier": "disk", "session": "s", "tenant": b}
        assert (await browser.request("POST", "/admin/demote", down, x_api_key="o")).status == 200
        assert rig.engine.demoted_salts == [salts[1]]
        path = f"/admin/pins/s?tenant={a}"
        assert (await browser.request("DELETE", path, x_api_key="o")).status == 200
        path = f"/admin/sessions/s?tenant={b}"
        answer = await browser.request("DELETE", path, x_api_key="o")
        assert answer.json == {"session": "s", "deleted_responses": 1}
        assert {tenant for tenant, _ in rig.engine.forgotten} == {b}
        assert [m.tenant for m in rig.engine.manifests] == [a]


async def test_only_an_operator_may_name_another_tenant_and_only_one_that_is():
    async with open_rig(*KEYS) as rig:
        browser = rig.browser()
        await turn(browser, key="a")
        (session,) = (await overview(browser, x_api_key="o"))["sessions"]
        a = session["tenant"]
        for key, tenant, status, code in (
            ("b", a, 403, "operator_only"),
            ("b", "", 403, "operator_only"),
            ("o", "nobody", 404, "tenant_not_found"),
            ("o", "", 404, "session_not_found"),
        ):
            named = f"s?tenant={tenant}"
            paths = [f"/admin/sessions/{named}"]
            if code != "session_not_found":
                paths.append(f"/admin/pins/{named}")
            answers = [await browser.request("DELETE", path, x_api_key=key) for path in paths]
            if code != "session_not_found":
                pin = {"session": "s", "ttl": "1h", "tenant": tenant}
                answers.append(await browser.request("POST", "/admin/pins", pin, x_api_key=key))
            for answer in answers:
                assert (answer.status, answer.code) == (status, code), (key, tenant)
        own = await browser.request("DELETE", f"/admin/sessions/s?tenant={a}", x_api_key="a")
        assert own.status == 200, "its own name is no other's"
        body = {"tier": "disk", "tenant": a}
        answer = await browser.request("POST", "/admin/demote", body, x_api_key="o")
        assert (answer.status, answer.json["error"]["param"]) == (400, "session")


async def test_no_log_line_bears_a_tenants_name(caplog):
    caplog.set_level("INFO")
    async with open_rig(*KEYS) as rig:
        await turn(rig.browser(), key="a")
        await trio.testing.wait_all_tasks_blocked()
        tenant = rig.port.sessions.newest()[0].tenant
    assert tenant
    assert "turn request=" in caplog.text
    assert tenant not in caplog.text
