"""TieredCache keeps its laws under any interleaving, and the machine gets to see what it is for."""

from __future__ import annotations

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.tiers.cache_machine import CacheMachine

SEEN = (
    "DEVICE full",
    "HOST full",
    "DISK full",
    "fetch",
    "partial copied",
    "failed Fetch bad",
    "adopted",
    "restored",
)
SEEN_SELDOM = (
    "shared arriving",
    "tail taken over",
    "failed Fetch io",
    "failed Copy bad",
    "hole",
    "gave up",
    "pin granted",
    "pin refused",
    "pinned on the host",
    "deleted",
)

RUNS = 3  # at most: examples are alike within a run, and what is seen fifty times in most is seen three times in some


def test_the_tables_keep_their_laws_under_any_interleaving():
    """A machine that never fills a tier or never fetches passes at once and proves nothing: so it is counted."""
    CacheMachine.reached.clear()
    examples = settings().max_examples
    wanted = dict.fromkeys(SEEN, examples // 10) | dict.fromkeys(SEEN_SELDOM, examples // 60)
    rare: dict[str, int] = wanted
    for _ in range(RUNS):
        run_state_machine_as_test(CacheMachine, settings=settings(stateful_step_count=40))
        reached = CacheMachine.reached
        rare = {what: reached[what] for what, least in wanted.items() if reached[what] < least}
        if not rare:
            break
    assert not rare, f"seen too seldom in {RUNS} times {examples} examples: {rare}"
