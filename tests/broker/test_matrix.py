"""Every route there is, asked with every Host, Origin and key: nobody gets past the guard by a path that was forgotten."""

import itertools

import pytest

from broker.http import client_routes
from broker.routes.admin import OPEN_PATHS, operator_routes
from broker.routes.dashboard import PAGE_PATHS, dashboard_routes
from broker.routes.messages import PROBE_PATHS
from tests.broker.rig import open_rig
from tests.broker.test_websocket import handshake

KEYS = ("auth.keys=['tenant']", "auth.operators=['operator']", "server.max_per_address=10000")
NO_KEY = {*OPEN_PATHS, *PROBE_PATHS, *PAGE_PATHS}  # the page's files hold no data
HOSTS = {"localhost:8321": 200, "evil.example": 421, "localhost.evil.example": 421, "": 421}
ORIGINS = {None: 200, "http://localhost:8321": 200, "https://evil.example": 403, "null": 403}
BEARERS = {None: 401, "Bearer tenant": 200, "Bearer tenan": 401, "Basic tenant": 401}


def all_routes(port):
    """(method, path) of every route, and of paths that are none."""
    table = [*dashboard_routes(), *client_routes(port), *operator_routes(port)]
    for route in table:
        path = route.path.replace(":path", "").replace("{", "").replace("}", "")
        for method in sorted(route.methods - {"HEAD"}):
            yield method, path
    for method in ("GET", "POST", "DELETE", "PUT"):
        for path in ("/nowhere", "/v1", "/admin", "/admin/", "//metrics", "/v1/../metrics"):
            yield method, path


def expected(path, host, origin, bearer):
    """The status of the refusal, or 200 for none of the guard's."""
    checks = [HOSTS[host], ORIGINS[origin] if host != "" else 200]
    if path not in NO_KEY:
        checks.append(BEARERS[bearer])
    return next((status for status in checks if status != 200), 200)


async def test_every_route_with_every_host_origin_and_key():
    asked = 0
    async with open_rig(*KEYS) as rig:
        for method, path in all_routes(rig.port):
            browser = rig.browser()
            for host, origin, bearer in itertools.product(HOSTS, ORIGINS, BEARERS):
                status = expected(path, host, origin, bearer)
                if status == 200:
                    continue
                fields = {"host": host, "origin": origin, "authorization": bearer}
                answer = await browser.request(method, path, **fields)
                assert answer.status == status, (method, path, fields)
                asked += 1
        assert rig.engine.submitted == []
    assert asked > 1500


async def test_what_is_everybodys_is_for_operators():
    async with open_rig(*KEYS) as rig:
        browser = rig.browser()
        for route in operator_routes(rig.port):
            for method in route.methods - {"HEAD"}:
                answer = await browser.request(method, route.path, x_api_key="tenant")
                assert (answer.status, answer.code) == (403, "operator_only"), route.path
                answer = await browser.request(method, route.path, x_api_key="operator")
                assert answer.status in (200, 400), route.path


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/echo", "/", "/healthz", "/admin/tiers", "/metrics"]
)
async def test_every_upgrade_with_every_host_origin_and_key(path):
    async with open_rig(*KEYS, "dev.echo=true") as rig:
        for origin, bearer in itertools.product(ORIGINS, BEARERS):
            # A probe needs no key, but a WebSocket is none, wherever it is asked for.
            status = expected("/v1/responses", "localhost:8321", origin, bearer)
            fields = {"origin": origin, "authorization": bearer}
            fields = {name: value for name, value in fields.items() if value is not None}
            stream = rig.stream()
            await stream.send_all(handshake(path, host="localhost:8321", **fields))
            answer = int((await stream.receive_some()).split()[1])
            if status == 200:
                status = 101 if path in ("/v1/responses", "/echo") else 404
            assert answer == status, (path, fields)
            await stream.aclose()


async def test_a_session_of_another_key_cannot_be_pinned_unpinned_or_deleted_and_looks_absent():
    async with open_rig("auth.keys=['a', 'b']") as rig:
        browser = rig.browser()
        await browser.request(
            "POST", "/v1/responses", {"input": "Hi."}, x_api_key="a", session_id="s"
        )
        pin = {"session": "s", "ttl": "1h"}
        assert (await browser.request("POST", "/admin/pins", pin, x_api_key="a")).status == 200
        for method, path in (("DELETE", "/admin/pins/s"), ("DELETE", "/admin/sessions/s")):
            foreign = await browser.request(method, path, x_api_key="b")
            absent = await browser.request(method, path[:-1] + "t", x_api_key="b")
            assert (foreign.status, absent.status) == (404, 404)
            assert foreign.body.replace(b"'s'", b"'t'") == absent.body
        assert (await browser.request("DELETE", "/admin/pins/s", x_api_key="a")).status == 200
