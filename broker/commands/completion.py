"""`homeport completion`: what Tab offers, generated from the tree of commands. The home of shtab."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import shtab

from broker.commands.page import Page, add

if TYPE_CHECKING:
    from collections.abc import Iterator

    from broker.commands.page import Commands

_SHELLS = ("bash", "zsh", "fish")
_COMPLETION = Page(
    "print a script that completes commands and options in your shell",
    """\
Print a completion script, made from the commands and options of this version:
write it again after an upgrade.""",
    (
        ("bash, for you",
         "homeport completion bash > ~/.local/share/bash-completion/completions/homeport"),
        ("zsh, in a folder that is in $fpath", "homeport completion zsh > ~/.zfunc/_homeport"),
        ("fish", "homeport completion fish > ~/.config/fish/completions/homeport.fish"),
    ),
)  # fmt: skip


def add_commands(commands: Commands) -> None:
    parser = add(commands, "completion", _COMPLETION)
    parser.add_argument("shell", choices=_SHELLS, help="whose syntax")
    parser.set_defaults(run=_completion)


def _completion(arguments: argparse.Namespace) -> int:
    from broker.commands.tree import make_parser

    print(script(make_parser(), arguments.shell))
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    for action in _actions(parser):
        if action.type is Path:
            kind = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE
            action.complete = kind  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of this command and all below it."""
    for action in parser._actions:  # noqa: SLF001 argparse has no public list of them; shtab reads the same
        yield action
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for below in action.choices.values():
                yield from _actions(below)
