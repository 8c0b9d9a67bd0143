"""What our pages say, as data: their blocks, their links, and the names that they use. Reads files, runs nothing.

A block says by its info string what it is:

    sh            commands, run by bash. One that serves (`make serve`, `homeport serve`) is its block's last
    python        a program, run as pasted
    toml FILE     a file of that name; a configuration of ours unless it is under ~
    json          a part of an answer
    text          what the commands before it print: the same words, other numbers; `text exactly`: those numbers
    text log      a line of the log;  text usage  commands;  text files  where things are

`<!-- not run: REASON -->` on the line before a block says why the tests do not run it; test_pages.py lists all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"^ *```(.*)$")
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True, slots=True)
class Block:
    page: str
    line: int
    kind: str  # the info string's first word
    rest: str  # and what follows it
    text: str
    not_run: str | None = None  # why

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def serves(self) -> bool:
        return self.kind == "sh" and any(one.serves for one in commands(self.text))


@dataclass(frozen=True, slots=True)
class Command:
    """One of ours, in a block or between backticks: `homeport pin --ttl 1h`, `make bench ARGS=…`."""

    program: str  # homeport, make, or a module of ours
    words: tuple[str, ...]

    @property
    def serves(self) -> bool:
        return self.program in ("homeport", "make") and self.words[:1] == ("serve",)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """Every fenced block, in order."""
    found: list[Block] = []
    inside: list[str] | None = None
    before, kind, rest, start, reason = "", "", "", 0, None
    for number, line in enumerate(text(page).splitlines(), 1):
        fence = _FENCE.match(line)
        if inside is None:
            if fence is not None:
                kind, _, rest = fence[1].partition(" ")
                marker = _NOT_RUN.fullmatch(before.strip())
                inside, start, reason = [], number, marker and marker[1]
        elif fence is not None:
            found.append(Block(page, start, kind, rest, "\n".join(inside) + "\n", reason))
            inside = None
        else:
            inside.append(line)
        before = line
    assert inside is None, f"{page}:{start}: a block that never ends"
    return found


def markers(page: str) -> int:
    """How many times the page says that something is not run, wherever that stands."""
    return text(page).count("<!-- not run")


def prose(page: str) -> str:
    """The page without its blocks."""
    return re.sub(r"(?ms)^ *```.*?^ *```$", "", text(page))


def ticked(page: str) -> list[str]:
    """What stands between backticks in the prose."""
    return [" ".join(one.split()) for one in re.findall(r"`([^`]+)`", prose(page))]


def links(page: str) -> list[str]:
    """Targets of links that lead to a place of ours."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [one for one in found if not re.match(r"[a-z]+:", one)]


def anchors(page: str) -> set[str]:
    """The names under which a page's headings can be linked to, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


def commands(shell: str) -> list[Command]:
    """The commands of ours in a piece of shell or prose."""
    found = []
    joined = shell.replace("\\\n", " ")
    for line in joined.splitlines():
        line = re.sub(r"(^|\s)#.*", "", line)
        for part in re.split(r"[|;&]+|\$\(|\)", re.sub(r"'[^']*'", _closed, line)):
            words = tuple(word.replace("\0", " ") for word in part.split())
            match words:
                case ("homeport", "ready", *_):
                    pass  # what it says
                case (program, *rest) if program in ("homeport", ".venv/bin/homeport"):
                    found.append(Command("homeport", tuple(rest)))
                case ("make", *rest):
                    found.append(Command("make", tuple(rest)))
                case (python, "-m", module, *rest) if python.rpartition("/")[2] == "python":
                    found.append(Command(module, tuple(rest)))
    return found


def _closed(quoted: re.Match[str]) -> str:
    """A quoted word, as one word without its quotes."""
    return re.sub(r"[ |;&()]", "\0", quoted[0][1:-1])


def command_said(page: str) -> list[Command]:
    """Every command of ours that a page names, whether it runs there or not."""
    found = []
    for block in blocks(page):
        if block.kind == "sh":
            found += commands(block.text)
        elif (block.kind, block.rest) == ("text", "usage"):
            found += commands(re.sub(r"(?m)(?<=\S)  .*", "", block.text))
    for one in ticked(page):
        found += commands(one)
    # What make passes on is a command line as well.
    for command in list(found):
        if command.program == "make":
            target, arguments = command.words[0], _passed_on(command)
            if target == "serve":
                found.append(Command("homeport", ("serve", *arguments)))
            elif target == "bench":
                found.append(Command("homeport", ("bench", "agent", *arguments)))
    return found


def _passed_on(command: Command) -> tuple[str, ...]:
    for word in command.words:
        if word.startswith("ARGS="):
            return tuple(word.removeprefix("ARGS=").split())
    return ()


def block_of(page: str, kind: str, rest: str = "") -> Block:
    """The page's only block of that kind."""
    (found,) = [one for one in blocks(page) if (one.kind, one.rest) == (kind, rest)]
    return found
