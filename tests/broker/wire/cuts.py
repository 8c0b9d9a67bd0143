"""Feeding a machine its text in pieces: whole, at every single cut, and one character at a time."""

from itertools import groupby


def cuts(text):
    """The text in pieces, in every way that has at most one cut, and in single characters."""
    yield [text]
    yield list(text)
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]


def played(splitter, pieces):
    """What it says, neighbours of one kind joined. Nothing empty may come out."""
    out = [piece for text in pieces for piece in splitter.feed(text)] + splitter.finish()
    said = []
    for kind, run in groupby(out, key=type):
        fields = kind.__slots__
        if fields in (("text",), ("delta",)):
            texts = [getattr(piece, fields[0]) for piece in run]
            assert all(texts), "an empty piece"
            said.append(kind("".join(texts)))
        else:
            said += run
    return said
