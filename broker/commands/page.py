"""A command's page of help: what it does, examples, exit statuses, files, environment. Pure.

Laws
    Everything that can be asked for has a page, every page has an example, and each example is a command line that
    parses: tests walk the tree.
    What a parser knows (options, choices, defaults) is not said again in prose.
    Statuses that a page does not name are those of every command, and are written under each of them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction
    from collections.abc import Iterator

    Commands = _SubParsersAction[argparse.ArgumentParser]

_STATUS = {
    0: "done",
    1: "failed; the reason is one line on stderr",
    2: "wrong usage or configuration",
}
_WIDTH = 24  # of the column that names things


@dataclass(frozen=True, slots=True)
class Page:
    summary: str  # in the list of commands: a clause, no full stop
    about: str  # paragraphs, wrapped by hand
    examples: tuple[tuple[str, str], ...]  # (what for, command line)
    status: tuple[tuple[int, str], ...] = ()  # where they are not everybody's
    files: tuple[tuple[str, str], ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def epilog(self) -> str:
        status = {str(number): said for number, said in (_STATUS | dict(self.status)).items()}
        sections = {
            "examples": [f"  # {purpose}\n  {line}" for purpose, line in self.examples],
            "exit status": list(_rows(status)),
            "files": list(_rows(dict(self.files))),
            "environment": list(_rows(dict(self.environment))),
        }
        return "\n\n".join(
            "\n".join([f"{title}:", *lines]) for title, lines in sections.items() if lines
        )


def _rows(named: dict[str, str]) -> Iterator[str]:
    indent = "\n" + " " * _WIDTH
    for name, said in named.items():
        said = said.replace("\n", indent)
        fits = len(name) <= _WIDTH - 4
        yield f"  {name:<{_WIDTH - 2}}{said}" if fits else f"  {name}{indent}{said}"


def add(commands: Commands, name: str, page: Page) -> argparse.ArgumentParser:
    """The parser of one command, with its page as help."""
    return _with(page, commands.add_parser(name, help=page.summary))


def root(prog: str, page: Page) -> argparse.ArgumentParser:
    return _with(page, argparse.ArgumentParser(prog=prog))


def _with(page: Page, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.description, parser.epilog = f"{page.summary}\n\n{page.about}", page.epilog
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser
