"""One browser, one zygote and one daemon for a file of tests.

No longer than a file: while Playwright's synchronous API is open, asyncio counts as running in this thread, and other tests
could not run theirs.
"""

import pytest

from tests.browser import chromium
from tests.browser.harbour import Harbour
from tests.campaign.zygote import Zygote


@pytest.fixture(scope="module")
def zygote():
    with Zygote() as one:
        yield one


@pytest.fixture(scope="module")
def browser():
    with chromium.opened() as one:
        yield one


@pytest.fixture(scope="module")
def harbour(zygote, tmp_path_factory):
    """Sessions in every tier. Tests may add to it and move things; none may stop it."""
    with Harbour(zygote, tmp_path_factory.mktemp("harbour") / "state") as one:
        one.fill()
        yield one


class Watched:
    """A page whose console and requests are written down."""

    def __init__(self, page):
        self.page = page
        self.said, self.requests = [], []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))


@pytest.fixture
def watch(browser):
    """Opens pages. A word on a page's console, or a request to elsewhere, fails the test that opened it."""
    opened = []

    def make(url, *, words_expected=False, frozen=False, **settings):
        """`frozen`: the page's clock goes on only as far as `page.clock.run_for` says."""
        window = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}
        context = browser.new_context(**(window | settings))
        context.set_default_timeout(10_000)
        watched = Watched(context.new_page())
        opened.append((context, watched, url, words_expected))
        if frozen:
            watched.page.clock.install(time=0)
            watched.page.clock.pause_at(1000)
        watched.page.goto(url)
        return watched

    yield make
    for context, watched, url, words_expected in opened:
        context.close()
        assert words_expected or watched.said == []
        strangers = [one for one in watched.requests if not one.startswith((url, "data:"))]
        assert strangers == []
