"""The dashboard's files over HTTP: who gets them, where, and with which rules for the browser. The page itself is
tested in tests/browser."""

import re

import pytest

from broker.http import HttpSide, operators_app
from broker.listen import Door
from broker.routes.dashboard import _FILES, PAGE_PATHS
from tests.broker.rig import open_rig

HTML = "text/html,application/xhtml+xml,*/*;q=0.8"


async def test_a_browser_gets_the_page_and_a_client_its_probes_answer():
    async with open_rig("auth.keys=['k']") as rig:
        browser = rig.browser()
        page = await browser.request("GET", "/", accept=HTML)
        assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert page.headers["vary"] == "accept"
        for accept in (None, "*/*", "application/json"):
            answer = await browser.request("GET", "/", accept=accept)
            assert answer.json == {"status": "ok"}
        assert (await browser.request("GET", "/admin/overview")).status == 401


async def test_every_file_forbids_scripts_frames_and_addresses_that_are_not_its_own():
    async with open_rig() as rig:
        browser = rig.browser()
        for path in PAGE_PATHS:
            headers = (await browser.request("GET", path, accept=HTML)).headers
            policy = dict(
                rule.split(" ", 1) for rule in headers["content-security-policy"].split("; ")
            )
            assert policy["default-src"] == "'none'"
            assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
            assert policy["frame-ancestors"] == "'none'"
            assert headers["x-content-type-options"] == "nosniff"


async def test_with_an_address_of_the_operators_own_the_page_is_there_and_not_here():
    sets = ("auth.keys=['k']", "auth.operators=['o']", "server.admin='127.0.0.1:9'")
    async with open_rig(*sets) as rig:
        common = rig.browser()
        assert (await common.request("GET", "/", accept=HTML)).json == {"status": "ok"}
        for path in PAGE_PATHS[1:]:
            assert (await common.request("GET", path)).status == 401
            assert (await common.request("GET", path, x_api_key="k")).status == 404
        serve = HttpSide(rig.port, operators_app(rig.port, rig.port.access)).serve
        rig.door = Door(
            max_head=4096,
            head_timeout_s=5,
            max_connections=9,
            max_per_address=9,
            websocket=serve,
            http=serve,
        )
        operators = rig.browser()
        for path in PAGE_PATHS:
            assert (await operators.request("GET", path, accept=HTML)).status == 200
        assert (await operators.request("GET", "/admin/overview")).status == 401
        assert (await operators.request("GET", "/admin/overview", x_api_key="o")).status == 200


@pytest.mark.parametrize("path", sorted(_FILES.iterdir()), ids=lambda path: path.name)
def test_no_file_makes_markup_of_text_or_names_another_address(path):
    """The names that clients choose go through these files: nothing in them parses text as HTML or as a script."""
    text = path.read_text()
    assert f"/dashboard/{path.name}" in PAGE_PATHS or path.name == "index.html"
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", text
    )
    assert not re.search(r"localStorage|document\.cookie", text)
    assert re.findall(r"https?://[^\"]+", text) in ([], ["http://www.w3.org/2000/svg"])
    assert not re.search(r"\sstyle=|\son\w+=\"", text), (
        "the policy forbids inline styles and handlers"
    )
