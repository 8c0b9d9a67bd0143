"""One request to a running daemon, over TCP, TLS or its operators' Unix socket."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.parse
from typing import TYPE_CHECKING, Any

from broker.commands.failed import CommandFailed

if TYPE_CHECKING:
    import argparse

DEFAULT_URL = "http://127.0.0.1:8321"
_ASK_TIMEOUT_S = 60.0


def add_daemon(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        default=DEFAULT_URL,
        metavar="URL",
        help="the daemon: http://HOST:PORT, https://HOST:PORT or unix:PATH (default: %(default)s)",
    )
    parser.add_argument(
        "--key", metavar="KEY", help="an operator's bearer key, if the daemon has keys"
    )
    parser.add_argument("--json", action="store_true", help="print the daemon's answer as it is")


def ask(arguments: argparse.Namespace, method: str, path: str, body: object = None) -> Any:
    """One request to the daemon; its JSON. Raises CommandFailed with the daemon's own words."""
    connection = connect(arguments.url, _ASK_TIMEOUT_S)
    headers = {"content-type": "application/json"}
    if arguments.key:
        headers["authorization"] = f"Bearer {arguments.key}"
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        status, text = answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise CommandFailed(f"no daemon at {arguments.url}: {error}") from error
    finally:
        connection.close()
    try:
        value = json.loads(text)
    except ValueError:
        raise CommandFailed(f"{arguments.url} is no homeport: status {status}, not JSON") from None
    if status != 200:
        raise CommandFailed(f"{arguments.url}: {value.get('error', {}).get('message', status)}")
    return value


class _UnixConnection(http.client.HTTPConnection):
    """To `server.admin = "unix:PATH"`."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def connect(address: str, timeout_s: float) -> http.client.HTTPConnection:
    """A connection that opens when it is used. Raises CommandFailed for what is no address."""
    if address.startswith("unix:"):
        return _UnixConnection(address.removeprefix("unix:"), timeout_s)
    url = urllib.parse.urlsplit(address)
    if url.scheme not in ("http", "https") or url.hostname is None:
        raise CommandFailed(f"--url {address}: write http://HOST:PORT or unix:PATH")
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    return kind(url.hostname, url.port, timeout=timeout_s)
