"""What a run says: on stdout as it is measured, and the same into a file of results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from broker.bench.comparison import Ratio, compare, lines
from broker.bench.table import aligned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.bench.comparison import Sample

_HEAD = "# Results\n\nWritten by `homeport bench serve --markdown FILE`, and by nothing else.\n"


class Report:
    """Every block is in the file as soon as it is printed: what a run that fails has measured stays measured."""

    def __init__(self, markdown: Path | None) -> None:
        self._markdown = markdown

    def begin(self, title: str, facts: Sequence[str]) -> None:
        if self._markdown is not None and not self._markdown.exists():
            self._write(_HEAD)
        self._write(f"\n## {title}\n")
        self._block([title, *facts])

    def section(self, name: str, notes: Sequence[str], tables: Sequence[Sequence[str]]) -> None:
        self._write(f"\n### {name}\n")
        text = [name, *notes]
        for table in tables:
            text += ["", *table]
        self._block(text)

    def _block(self, text: Sequence[str]) -> None:
        print("\n".join(text), end="\n\n", flush=True)
        self._write("\n".join(("", "```", *text, "```", "")))

    def _write(self, text: str) -> None:
        if self._markdown is not None:
            with self._markdown.open("a") as file:
                file.write(text)


def table(samples: Sequence[Sample], one: str, other: str, ratio: Ratio = Ratio.GAIN) -> list[str]:
    """The comparison as aligned text, and what has to be said about it."""
    compared = compare(samples, one, other, ratio)
    out = aligned(lines(compared, one, other, ratio))
    if scaled := sum(each.scaled for each in compared):
        out.append(f"{scaled} turns ended early: scaled to the full length by their own rate")
    return out


def spoken(words: Sequence[str]) -> str:
    """A command line without the places where its programs and files lie."""
    return " ".join(_spoken(word) for word in words)


def _spoken(word: str) -> str:
    inner = word.split()
    if len(inner) > 1:
        return f"'{spoken(inner)}'"
    option, equals, value = word.partition("=")
    if equals:
        return f"{option}={Path(value).name if value.startswith('/') else value}"
    return Path(word).name if word.startswith("/") else word
