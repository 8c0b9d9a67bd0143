"""An lmdb environment whose n-th I/O call fails, as a disk that is full or broken makes it fail."""

from __future__ import annotations

from typing import Any

import lmdb

ERRORS = (lmdb.Error, lmdb.DiskError, lmdb.MapFullError, lmdb.TxnFullError)


class Countdown:
    """Fails call number `calls` (from 1) with `error`, once. `fired` says whether it came to that."""

    def __init__(self, calls: int, error: type[lmdb.Error]) -> None:
        self._left = calls
        self._error = error
        self.fired = False

    def tick(self, call: str) -> None:
        self._left -= 1
        if self._left == 0:
            self.fired = True
            raise self._error(f"injected into {call}")


class FaultyEnv:
    def __init__(self, env: Any, countdown: Countdown) -> None:
        self._env = env
        self._countdown = countdown

    def begin(self, **options: Any) -> FaultyTxn:
        self._countdown.tick("begin")
        return FaultyTxn(
            self._env.begin(**options), self._countdown, writes=options.get("write", False)
        )

    def path(self) -> str:
        return self._env.path()


class FaultyTxn:
    """A failed commit leaves nothing behind, as LMDB promises. The end of a read cannot fail."""

    def __init__(self, txn: Any, countdown: Countdown, *, writes: bool) -> None:
        self._txn = txn
        self._countdown = countdown
        self._writes = writes

    def __enter__(self) -> FaultyTxn:
        self._txn.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._writes and raised[0] is None:
            try:
                self._countdown.tick("commit")
            except lmdb.Error:
                self._txn.abort()
                raise
        self._txn.__exit__(*raised)

    def abort(self) -> None:
        self._txn.abort()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._txn, name)  # get, put, pop, delete, cursor, stat

        def counted(*args: Any, **options: Any) -> Any:
            self._countdown.tick(name)
            return call(*args, **options)

        return counted
