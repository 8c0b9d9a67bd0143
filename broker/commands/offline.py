"""`homeport config check` and `homeport verify`: files are read, no daemon is needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from broker.commands.failed import CannotRead
from broker.commands.page import Page, add
from broker.commands.serving import STATE_FILES, add_config, config_of
from broker.config import load

if TYPE_CHECKING:
    import argparse

    from broker.commands.page import Commands

_CONFIG = Page(
    "look at configuration files",
    "Look at configuration files without starting anything.",
    (("whether a file is good", "homeport config check homeport.toml"),),
)
_CHECK = Page(
    "say whether a file is good, and what it will hold",
    """\
Read configuration files as `serve` would, later ones over earlier ones, and say
what the tiers will hold: tokens, full contexts, days. What looks like a mistake
is a line that begins with "warning:". Nothing is loaded or started.""",
    (
        ("one file", "homeport config check homeport.toml"),
        ("an overlay over another file", "homeport config check large-gpu.toml team.toml"),
    ),
    status=((0, "good, whatever it warns of"), (2, "an unknown key, a wrong value, or unsafe")),
    files=(("config/default.toml", "in the sources: every key and its reason"),),
)
_VERIFY = Page(
    "check every record of a state directory (daemon stopped)",
    """\
Read every block and every stored response of a state directory, of whichever
model, and verify keys and checksums. What is bad is a line on stdout: the
record's name and the reason. Nothing is changed: a daemon forgets a bad record
when it meets it. No daemon may use the directory meanwhile.""",
    (
        ("the default state directory", "homeport verify"),
        ("another one, say a restored backup", "homeport verify --state-dir /srv/homeport"),
    ),
    status=((0, "clean"), (1, "damaged"), (2, "cannot be read, or a daemon holds it")),
    files=STATE_FILES,
)


def add_commands(commands: Commands) -> None:
    config = add(commands, "config", _CONFIG)
    check = add(config.add_subparsers(required=True, metavar="COMMAND"), "check", _CHECK)
    check.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="read in order, later keys win"
    )
    check.set_defaults(run=_config_check)

    verify = add(commands, "verify", _VERIFY)
    add_config(verify)
    verify.set_defaults(run=_verify)


def _config_check(arguments: argparse.Namespace) -> int:
    from broker.access import check_exposure
    from broker.forecast import forecast, look_around, read_shape

    config = load(arguments.files)
    check_exposure(config)
    print(f"{', '.join(str(one) for one in arguments.files)}: good")
    print("\n".join(forecast(config, read_shape(config), look_around(config))))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from tiers.block import StoreError
    from tiers.lmdb_store import scrub
    from tiers.state_dir import StateDir, StateDirRefused

    directory = config_of(arguments).server.state_dir
    if not directory.is_dir():
        raise CannotRead(f"{directory}: no such state directory")
    records, bad = 0, 0
    try:
        state = StateDir.open(directory)
        try:
            # A small store is done before there is anything to show.
            with tqdm(unit=" records", file=sys.stderr, delay=1) as bar:
                for step in scrub(state):
                    records = bar.total = step.total
                    bar.update()
                    if step.reason is not None:
                        bad += 1
                        bar.write(f"{step.name}: {step.reason}", file=sys.stdout)
        finally:
            state.close()
    except (StateDirRefused, StoreError) as error:
        raise CannotRead(str(error)) from error
    print(f"{records} records, {bad} bad")
    return 1 if bad else 0
