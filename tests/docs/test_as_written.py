"""A new user does what the README and docs/ say, block by block, and it works.

One daemon with the real model, started by the README's own block, serves all pages; docs/backup.md stops and starts it
itself and so comes last. docs/secure.md starts another, of which only the edge matters.
"""

import json
import urllib.request
from contextlib import ExitStack

import pytest

from tests.docs import pages
from tests.docs.visitor import Visitor

pytestmark = pytest.mark.e2e

OWN_DAEMON = "docs/secure.md"
STOPS_IT = "docs/backup.md"
SHARED = [page for page in pages.PAGES if page not in (OWN_DAEMON, STOPS_IT)]
START = next(block for block in pages.blocks("README.md") if block.serves and not block.not_run)


@pytest.fixture(scope="module")
def new_visitor(request, tmp_path_factory):
    models = request.config.cache.mkdir("models") / "models"  # where tests/e2e keeps them, too
    with ExitStack() as stack:

        def arrive(engine):
            folder = tmp_path_factory.mktemp("visitor")
            return stack.enter_context(Visitor(folder, models, engine))

        yield arrive


@pytest.fixture(scope="module")
def visitor(new_visitor):
    """One whose daemon runs, and was talked to: what the pages show has happened."""
    visitor = new_visitor("model")
    visitor.do(START)
    ask(visitor, input="Where is the tide?")
    ask(visitor, input="And now?", previous_response_id=visitor.answers[-1]["id"])
    assert post(f"{visitor.url}/admin/demote", tier="disk")["moved_blocks"]
    back = ask(visitor, input="And then?", previous_response_id=visitor.answers[-1]["id"])
    assert back["usage"]["homeport:cached_by_tier"]["disk"]
    # Other instructions before the same conversation: computed again, and the answer says why.
    changed = {"instructions": "Be brief.", "previous_response_id": back["id"]}
    assert ask(visitor, input="Why?", **changed)["usage"]["homeport:recomputed"]["changed"]
    return visitor


def ask(visitor, **body):
    visitor.answers.append(post(f"{visitor.url}/v1/responses", max_output_tokens=1, **body))
    return visitor.answers[-1]


def post(url, **body):
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def follow(visitor, page):
    for block in pages.blocks(page):
        if block.not_run is None and block != START:
            visitor.do(block)


@pytest.mark.parametrize("page", SHARED)
def test_a_page_works_as_written(visitor, page):
    ask(
        visitor, input="Where is the tide?"
    )  # the last turn is of a known kind, whatever pages came before
    follow(visitor, page)


def test_what_is_secured_is(new_visitor):
    follow(new_visitor("scripted"), OWN_DAEMON)


def test_what_is_restored_is_there(visitor):
    told = "Remember everything. " * 8
    before = ask(visitor, instructions=told, input="What is left?")
    follow(visitor, STOPS_IT)
    after = ask(visitor, instructions=told, input="And now?", previous_response_id=before["id"])
    known = before["usage"]["total_tokens"] - 1  # the last one was said, and not read yet
    assert after["usage"]["homeport:cached_by_tier"]["disk"] >= known
