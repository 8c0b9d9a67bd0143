"""TieredCache keeps its laws under any interleaving, and the machine gets to see what it is for."""

from __future__ import annotations

from hypothesis import settings

from tests.tiers.cache_machine import CacheMachine, run_and_count

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


def test_the_tables_keep_their_laws_under_any_interleaving():
    """A machine that never fills a tier or never fetches passes at once and proves nothing: so it is counted."""
    examples = settings().max_examples
    wanted = dict.fromkeys(SEEN, examples // 10) | dict.fromkeys(SEEN_SELDOM, examples // 60)
    rare = run_and_count(CacheMachine, wanted, stateful_step_count=40)
    assert not rare, f"seen too seldom in {examples} examples: {rare}"
