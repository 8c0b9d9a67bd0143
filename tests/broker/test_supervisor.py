"""systemd's readiness: one datagram, to whom the environment names, once requests are accepted."""

import os
import socket

import pytest

from broker.commands import serving
from broker.supervisor import tell


@pytest.fixture(params=["a file", "a name without a file"])
def supervisor(request, tmp_path, monkeypatch):
    path = str(tmp_path / "notify")
    address = path if request.param == "a file" else f"\0homeport-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(address)
        listening.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        yield listening


def test_readiness_is_told_with_the_ready_line(supervisor, capsys):
    serving._announce("homeport ready http://127.0.0.1:1")
    assert supervisor.recv(64) == b"READY=1"
    assert capsys.readouterr().out == "homeport ready http://127.0.0.1:1\n"


def test_without_a_supervisor_nobody_is_told(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    tell("READY=1")


def test_a_supervisor_that_is_gone_does_not_end_the_daemon(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    tell("READY=1")
    assert "cannot be told READY=1" in caplog.text
