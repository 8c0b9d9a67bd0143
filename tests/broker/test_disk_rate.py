"""A disk is measured in a moment, and nothing is left of it."""

import errno
import os

import pytest

from broker import disk_rate
from broker.disk_rate import REQUEST_BYTES, measure


@pytest.mark.parametrize("direct", [True, False])
def test_all_of_it_is_written_and_read_and_nothing_stays(tmp_path, monkeypatch, direct):
    if not direct:
        monkeypatch.setattr(disk_rate, "is_direct", lambda _: False)
    moved = []
    rates = measure(tmp_path, 3 * REQUEST_BYTES, 60.0, moved.append)
    assert sum(moved) == 6 * REQUEST_BYTES
    assert min(rates.write, rates.read) > 0
    assert not rates.direct or direct
    assert list(tmp_path.iterdir()) == []


def test_it_ends_by_itself_when_its_time_is_over(tmp_path):
    moved = []
    measure(tmp_path, 1000 * REQUEST_BYTES, 0.0, moved.append)
    assert sum(moved) == 2 * REQUEST_BYTES


def test_a_disk_that_fails_leaves_nothing_either(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        measure(tmp_path, REQUEST_BYTES, 1.0, lambda _: None)
    assert list(tmp_path.iterdir()) == []
