"""`homeport serve` with a stub model: the real broker, command line, engine thread, tiers and LMDB.

    python -m tests.campaign.stub_daemon --state-dir DIR [--port N] --set key.path=value ... [--fail-call N --error ENOSPC] [--endless]

Started like this it takes the seconds that importing torch takes; `zygote.py` starts it in a few hundredths of one.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING
from unittest.mock import patch

from broker.__main__ import main as homeport
from broker.session import Sessions
from engine.text import Text
from tests.campaign import chain, stub
from tiers.ledger import Ledger
from tiers.store import StoreLimits

if TYPE_CHECKING:
    from collections.abc import Iterator


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state-dir", required=True)
    parser.add_argument("--port", default="0", help="0 picks a free one")
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    parser.add_argument("--fail-call", type=int, help="the store's call, from 1, that fails")
    parser.add_argument("--fail-calls", type=int, default=1, help="so many in a row fail")
    parser.add_argument("--error", choices=("ENOSPC", "EIO"), default="EIO")
    parser.add_argument("--endless", action="store_true", help="no answer ends by itself")
    parser.add_argument("--tables", type=int, help="what may be forgotten is, beyond so many")
    arguments = parser.parse_args(argv)
    serve = ["serve", "--port", arguments.port, "--state-dir", arguments.state_dir]
    for one in stub.settings() if not arguments.assignments else arguments.assignments:
        serve += ["--set", one]
    failing = nullcontext()
    if arguments.fail_call is not None:
        from tests.campaign.failing import failing_store

        failing = failing_store(arguments.fail_call, arguments.fail_calls, arguments.error)
    endless = patch.object(chain, "END", ord("e")) if arguments.endless else nullcontext()
    with stub.stubbed(), failing, endless, small_tables(arguments.tables):
        return homeport(serve)


@contextmanager
def small_tables(entries: int | None) -> Iterator[None]:
    """The tables whose bounds take the default sizes hours to reach have these bounds instead; None: they have not."""
    if entries is None:
        yield
        return
    sessions, ledger, text = Sessions.__init__, Ledger.__init__, Text.__init__
    _, manifest_bytes, min_free = (limits := StoreLimits.__init__).__defaults__
    with (
        patch.object(sessions, "__kwdefaults__", sessions.__kwdefaults__ | {"max_nodes": entries}),
        patch.object(ledger, "__defaults__", (entries,)),
        patch.object(limits, "__defaults__", (entries, manifest_bytes, min_free)),
        patch.object(text, "__kwdefaults__", text.__kwdefaults__ | {"cache_bytes": entries << 10}),
    ):
        yield


if __name__ == "__main__":
    sys.exit(main())
