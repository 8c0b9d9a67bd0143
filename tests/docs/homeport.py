"""`homeport` as a page's visitor runs it: the real command, at the visitor's port instead of 8321.

    python -m tests.docs.homeport PORT model|scripted ARGUMENTS…

`scripted` serves without a model (tests/clients/scripted.py), for pages that are about the edge.
"""

import sys
from unittest.mock import patch

from broker.__main__ import main as homeport
from broker.commands.tree import make_parser
from tests.clients import scripted

__all__ = ["make_parser"]  # for tests that read the command line instead of running it

_DEFAULT_URL = "broker.commands.asking.DEFAULT_URL"
# Under what the page says: one thread as in tests/e2e, and what is kept is restored even where computing is faster.
_SETTINGS = ("engine.threads=1", "tiers.restore.decide=false", "tiers.restore.floor=30s")


def main(port: str, engine: str, *arguments: str) -> int:
    with patch(_DEFAULT_URL, f"http://127.0.0.1:{port}"):
        if arguments[:1] != ("serve",):
            return homeport(arguments)
        serve = ["serve", f"--set=server.port={port}", *(f"--set={one}" for one in _SETTINGS)]
        serve += arguments[1:]
        return homeport(serve) if engine == "model" else scripted.main(["--say", "Aye.", *serve])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
