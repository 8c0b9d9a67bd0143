"""All commands as one parser."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from broker.commands import benches, completion, doctor, init, offline, operating, serving
from broker.commands.page import Page, root

if TYPE_CHECKING:
    import argparse

_HOMEPORT = Page(
    "an LLM server for agents whose KV cache survives",
    """\
A broken connection, an idle hour, a restart, a kill -9: the next turn restores
the session's KV instead of computing it again. `homeport COMMAND --help` is the
manual of each command, with examples.""",
    (
        ("the daemon, with the default model", "homeport serve"),
        ("what it is doing", "homeport top"),
    ),
    files=(("~/.local/share/homeport", "the default state directory"),),
)


def make_parser() -> argparse.ArgumentParser:
    parser = root("homeport", _HOMEPORT)
    parser.add_argument(
        "--version",
        action="version",
        version=f"homeport {version('homeport')}",
        help="print the version and leave",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (init, doctor, serving, offline, operating, benches, completion):
        group.add_commands(commands)
    return parser
