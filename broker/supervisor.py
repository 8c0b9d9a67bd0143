"""What a supervisor that asked for it is told: systemd's notification protocol, one datagram.

It names its socket in the environment. That is the protocol's way, and no setting of ours; without it nobody is told.
"""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def tell(state: str) -> None:
    """Such as "READY=1". A supervisor that cannot be reached is a log line: it will find out by its own deadline."""
    address = os.environ.get("NOTIFY_SOCKET")  # noqa: TID251
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # Linux's names without files
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(state.encode(), address)
        except OSError as error:
            log.warning("the supervisor cannot be told %s: %s", state, error)
