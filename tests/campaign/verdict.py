"""What a campaign says: progress on the way, every violation when it is seen, and at the end one line of JSON and one
sentence. The exit status is 1 if there was a violation."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

_EVERY_S = 5.0


class Verdict:
    def __init__(self, campaign: str, seed: int) -> None:
        self.campaign = campaign
        self.seed = seed
        self.violations: list[str] = []
        self._began = self._said = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def violation(self, what: str) -> None:
        self.violations.append(what)
        print(f"VIOLATION {self.campaign} (seed {self.seed}): {what}", flush=True)

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.violation(what)

    def progress(self, what: str) -> None:
        """Said every few seconds at most."""
        if time.monotonic() - self._said >= _EVERY_S:
            self._said = time.monotonic()
            print(f"{self.campaign} {self.elapsed_s:4.0f} s: {what}", file=sys.stderr, flush=True)

    def finish(self, figures: dict[str, Any], sentence: str) -> int:
        """Print the last lines; the exit status."""
        ended = "passed" if not self.violations else f"FAILED, {len(self.violations)} violations"
        line = {
            "campaign": self.campaign,
            "seed": self.seed,
            "seconds": round(self.elapsed_s, 1),
            "violations": len(self.violations),
            **figures,
        }
        print(json.dumps(line))
        print(f"{self.campaign}: {ended}: {sentence} ({self.elapsed_s:.0f} s, seed {self.seed})")
        return 1 if self.violations else 0
