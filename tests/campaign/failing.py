"""A store whose n-th call fails as a full or broken disk makes it fail, inside an otherwise real daemon."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from engine import service
from tiers.block import StoreError
from tiers.lmdb_store import LmdbStore

if TYPE_CHECKING:
    from collections.abc import Iterator

INJECTED = "injected into call"  # in the log, once for each call that was failed
REASONS = {"ENOSPC": "full", "EIO": "io"}

_log = logging.getLogger(__name__)
# What touches no disk: a budget known since the opening, totals kept beside the tables, the end.
_IN_MEMORY = {"block_slots", "statistics", "close"}


class FailingStore:
    """Calls `first` to `first + count - 1`, counted from 1 after the opening, raise; all others are the store's."""

    def __init__(self, store: LmdbStore, first: int, count: int, error: str) -> None:
        self._store = store
        self._failing = range(first, first + count)
        self._reason = REASONS[error]
        self._calls = 0
        self._lock = threading.Lock()  # the disk threads and the lookups call

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._store, name)
        if name in _IN_MEMORY or not callable(value):
            return value

        def call(*positional: Any, **named: Any) -> Any:
            with self._lock:
                self._calls += 1
                number = self._calls
            if number in self._failing:
                _log.warning("%s %d: %s", INJECTED, number, name)
                raise StoreError(self._reason, f"{INJECTED} {number}: {name}")
            return value(*positional, **named)

        return call


@contextmanager
def failing_store(first: int, count: int, error: str) -> Iterator[None]:
    """Within it, `engine.service` opens stores that fail so."""

    class Opens:
        @staticmethod
        def open(*positional: Any, **named: Any) -> FailingStore:
            return FailingStore(LmdbStore.open(*positional, **named), first, count, error)

    with patch.object(service, "LmdbStore", Opens):
        yield
