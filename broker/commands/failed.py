"""How a command ends that could not do its work: one line on stderr, and a status."""

from __future__ import annotations


class CommandFailed(Exception):
    """What to say on stderr before leaving with `status`."""

    status = 1


class CannotRead(CommandFailed):
    """`verify` found nothing out: neither good nor damaged."""

    status = 2
