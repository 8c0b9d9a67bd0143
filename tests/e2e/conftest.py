"""A real daemon with the real default model, on a free loopback port, with a state directory of its own.

Converted models are kept in pytest's cache, so that only the first run on a machine converts one.
"""

from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from broker.bench.daemon import Daemon
from broker.bench.session import Agent
from broker.bench.workload import Workload

# One thread: two that share a core with anything else wait for one another at every layer (measured at load 5 on two
# cores: 1.5 s a token against 0.3 s).
# Everything that is kept is restored: on a busy disk a tail of 20 tokens may rightly be computed instead, and these tests
# ask whether anything was lost, not what was faster (tests/engine/test_restore.py, `homeport bench tiers`).
# Texts are compared of prompts that were cut differently, here by an eviction, there by a neighbour: in bfloat16 that may
# change what is said, in float32 only a wrong byte does.
QUIET = (
    "log.level=warning",
    "engine.threads=1",
    "model.prefill_dtype=float32",
    "tiers.restore.decide=false",
    "tiers.restore.floor=30s",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def models(request):
    return request.config.cache.mkdir("models") / "models"  # where tests/engine keeps them, too


@pytest.fixture(scope="session")
def quiet():
    """Settings for every daemon of these tests."""
    return QUIET


@pytest.fixture(scope="session")
def new_daemon(tmp_path_factory, models, quiet):
    """Makes daemons, started, each on an empty state directory; what still runs at the end is killed."""
    with ExitStack() as stack:

        def make(*settings: str) -> Daemon:
            daemon = Daemon(
                tmp_path_factory.mktemp("state"), settings=quiet + settings, models=models
            )
            return stack.enter_context(daemon)

        yield make


@pytest.fixture(scope="session")
def daemon(new_daemon):
    """One daemon with default settings that tests share: they may fill it, but not stop or demote it."""
    return new_daemon()


@pytest.fixture
async def new_agent():
    """Makes agents whose sockets live as long as the test."""
    async with trio.open_nursery() as nursery:

        def make(url: str, workload: Workload) -> Agent:
            return Agent(nursery, url, workload)

        yield make
        nursery.cancel_scope.cancel()
