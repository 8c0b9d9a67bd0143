"""Plant named bugs, one at a time, in a copy of the tree, and see the tests catch each of them.

    python tests/mutants.py [part of a name ...]

A mutant is an edit of one piece of text that must occur exactly once; one that no longer applies fails the run, as does
one that survives: that is a missing law, or a line to delete. A control run without an edit comes first. Runs are
derandomized and do not shrink, so the table is the same every time but for the seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("broker", "engine", "tiers", "tests", "config", "pyproject.toml")
RUN_S = 240  # a mutant may also loop for ever: that counts as caught

EXAMPLES, MACHINE = "tests/tiers/test_cache.py", "tests/tiers/test_cache_machine.py"
LAWS = (MACHINE, EXAMPLES)  # a law is broken: the machine should see it
HITS = (EXAMPLES, MACHINE)  # legal, but the cache is worth less


@dataclass(frozen=True)
class Mutant:
    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...] = LAWS  # run in this order until one fails


CACHE, INDEX, POLICY, LEASE, POOL, BLOCK = (
    f"tiers/{name}.py" for name in ("cache", "index", "policy", "lease", "pool", "block")
)

MUTANTS = (
    # slots
    Mutant(
        "a vacated slot is leaked",
        CACHE,
        "self._pools[tier].give(self._displace(block, tier), SlotState.HELD)",
        "self._displace(block, tier)",
    ),
    Mutant(
        "unused private slots are leaked",
        CACHE,
        "for slot in hold.private:\n            self._pools[Tier.DEVICE].give(slot, SlotState.LENT)",
        "pass",
    ),
    Mutant(
        "a given slot is not free", POOL, "        self._free.append(slot)\n", "        return\n"
    ),
    Mutant(
        "an unwanted copy gives its slot before it lands",
        CACHE,
        "            hold.flight.hold = None\n",
        "            hold.flight.hold = None\n"
        "            self._pools[Tier.DEVICE].give(slot, SlotState.ARRIVING)\n",
    ),
    Mutant(
        "an unwanted copy still lends its slot",
        CACHE,
        "            hold.flight.hold = None\n",
        "",
    ),
    Mutant(
        "a copy lands over what was computed meanwhile",
        CACHE,
        "        block.arriving.pop(Tier.DEVICE, None)  # who waits for a copy in flight has it now\n",
        "",
    ),
    # refs and busy
    Mutant(
        "victims may be referenced",
        POLICY,
        "if block.refs or block.busy:",
        "if block.busy:",
    ),
    Mutant("victims may be busy", POLICY, "if block.refs or block.busy:", "if block.refs:"),
    Mutant(
        "running blocks are demoted",
        CACHE,
        "        if block.refs or block.busy:\n            return\n        if to is Tier.DISK",
        "        if block.busy:\n            return\n        if to is Tier.DISK",
    ),
    Mutant(
        "a block needed again while it is copied away goes",
        CACHE,
        "if not block.refs and not block.busy:  # asked again",
        "if not block.busy:  # asked again",
    ),
    Mutant(
        "the first of two copies takes the other's source away",
        CACHE,
        "if not block.refs and not block.busy:  # asked again",
        "if not block.refs:  # asked again",
    ),
    Mutant(
        "forgetting a chain ignores busy",
        CACHE,
        "if any(each.busy for each in doomed):",
        "if False:",
    ),
    Mutant(
        "a shortened hold keeps its refs",
        CACHE,
        "for block in hold.referenced[blocks:]:\n            block.refs -= 1",
        "pass",
    ),
    Mutant(
        "an adopted block is not referenced",
        CACHE,
        "            block.refs += 1\n            hold.blocks.append(block)",
        "            hold.blocks.append(block)",
    ),
    # in flight
    Mutant(
        "a source is dropped before its copy lands",
        CACHE,
        "self._issue(actions, copy, Flight(block, vacate=(Tier.DEVICE,)))",
        "self._issue(actions, copy, Flight(block))\n        self._vacate(block, Tier.DEVICE)",
    ),
    Mutant(
        "a spill counts as written when it is issued",
        CACHE,
        "            dirty.arriving[Tier.DISK] = slot\n",
        "            self._pools[Tier.DISK].move(slot, SlotState.ARRIVING, SlotState.HELD)\n"
        "            self._place(dirty, Tier.DISK, slot)\n",
    ),
    Mutant(
        "a hold is ready before its private copy",
        CACHE,
        "if hold.landed < len(hold.blocks) or hold.flight is not None:",
        "if hold.landed < len(hold.blocks):",
    ),
    Mutant(
        "a hold is ready before its blocks",
        CACHE,
        "if hold.landed < len(hold.blocks) or hold.flight is not None:",
        "if hold.flight is not None:",
    ),
    Mutant(
        "a block is loaded once for each who asks",
        CACHE,
        "            if Tier.DEVICE not in block.places and Tier.DEVICE not in block.arriving:\n",
        "            if Tier.DEVICE not in block.places:\n",
    ),
    Mutant(
        "who waits for a bad record waits for ever",
        CACHE,
        "        for hold in self._holds:\n            self._truncate_at(hold, block)\n",
        "",
    ),
    Mutant(
        "a bad record stays on disk",
        CACHE,
        "            if Tier.DISK in block.places:\n                self._drop(block, actions)\n",
        "",
        HITS,
    ),
    Mutant(
        "a failed spill is never tried again",
        CACHE,
        "        self._note_dirty(block, now)\n        self._settle(block)\n        return actions",
        "        self._settle(block)\n        return actions",
    ),
    Mutant(
        "a block whose record failed for another is not written again",
        CACHE,
        "            self._note_dirty(block, now)  # its record may have failed for somebody else meanwhile\n",
        "",
    ),
    # matching and sharing
    Mutant(
        "a match has a gap",
        INDEX,
        "            if block is None or not block.places:\n                break\n"
        "            blocks.append(block)\n",
        "            if block is not None and block.places:\n                blocks.append(block)\n",
    ),
    Mutant(
        "the last token is matched too",
        INDEX,
        "limit, size = len(tokens) - 1, self._block_tokens",
        "limit, size = len(tokens), self._block_tokens",
    ),
    Mutant(
        "a partial match has a row too many",
        INDEX,
        "        if one != two:\n            return at\n",
        "        if one != two:\n            return at + 1\n",
    ),
    Mutant(
        "a key forgets its parent", BLOCK, '{len(tokens)}I", parent,', '{len(tokens)}I", bytes(32),'
    ),
    Mutant(
        "a block is filed under its root",
        CACHE,
        "parent = hold.blocks[-1].key if hold.blocks else hold.root",
        "parent = hold.root",
    ),
    Mutant(
        "the same tokens are not adopted",
        CACHE,
        "        if Tier.DEVICE in block.places:\n"
        "            self._pools[Tier.DEVICE].give(slot, SlotState.LENT)\n            return block\n",
        "",
    ),
    Mutant(
        "an adopted block does not enter the table",
        CACHE,
        "            hold.table[len(hold.blocks)] = block.places[Tier.DEVICE]\n",
        "",
    ),
    Mutant("a shared tail is taken over", CACHE, "            and tail.refs == 1\n", "", HITS),
    Mutant("a busy tail is taken over", CACHE, "            and not tail.busy\n", ""),
    Mutant(
        "a tail is taken over before it is written",
        CACHE,
        "            and Tier.DISK in tail.places\n",
        "",
    ),
    Mutant(
        "another session's tail is taken over",
        CACHE,
        "            and sum(tail.leases) == mine\n",
        "",
        HITS,
    ),
    Mutant(
        "a tail is taken over for a part of it",
        CACHE,
        "            and hold.partial_rows == len(tail.tokens)\n",
        "",
        HITS,
    ),
    Mutant(
        "a full block stays private",
        CACHE,
        "while len(hold.pending) >= self.block_tokens:",
        "while len(hold.pending) > self.block_tokens:",
    ),
    # forgetting
    Mutant(
        "a parent is forgotten before its child",
        CACHE,
        "            return not self._index.children(block)\n",
        "            return True\n",
    ),
    Mutant(
        "a head is forgotten without its chain",
        CACHE,
        "            doomed += self._index.children(above)\n",
        "            break\n",
    ),
    Mutant(
        "a record goes before those that continue it",
        CACHE,
        "return tier is not Tier.DISK or all(",
        "return True or all(",
    ),
    Mutant(
        "a child is written before its parent",
        CACHE,
        "for dirty in reversed(chain):",
        "for dirty in chain:",
    ),
    Mutant(
        "what was dropped from disk does not get dirty",
        CACHE,
        "            self._drop(block, actions)\n            self._note_dirty(block, now)\n",
        "            self._drop(block, actions)\n",
    ),
    Mutant(
        "a superseded tail is thinned out under a hold",
        CACHE,
        "needed = tail.refs or tail.busy or",
        "needed = tail.busy or",
    ),
    Mutant(
        "a superseded tail is thinned out under a copy",
        CACHE,
        "needed = tail.refs or tail.busy or",
        "needed = tail.refs or",
    ),
    # order and time
    Mutant(
        "the newcomer evicts its betters",
        CACHE,
        "self._victims[tier].take(policy.rank(newcomer))",
        "self._victims[tier].take()",
        HITS,
    ),
    Mutant(
        "classes do not count",
        POLICY,
        "return session_class(block), block",
        "return 0, block",
        HITS,
    ),
    Mutant(
        "most recently used goes first",
        POLICY,
        "block.last_used, -block",
        "-block.last_used, -block",
        HITS,
    ),
    Mutant("heads go before tails", POLICY, " if block.key not in self._children\n", "\n", HITS),
    Mutant(
        "everything is taken for too young to write",
        CACHE,
        "self._dirty[block] + self.limits.max_lag_s <= until",
        "self._dirty[block] + self.limits.max_lag_s < until",
        HITS,
    ),
    Mutant(
        "a block without room on disk is retried at once",
        CACHE,
        "                self._dirty[dirty] = now\n",
        "                self._dirty[dirty] = now - self.limits.max_lag_s\n",
    ),
    Mutant(
        "a demoted session takes shared blocks along",
        CACHE,
        "            if sum(block.leases) == mine[block]:\n                self._sink(block, to, now, actions)\n",
        "            self._sink(block, to, now, actions)\n",
        HITS,
    ),
    # leases and restart
    Mutant(
        "an ended lease still counts",
        LEASE,
        "            block.leases[lease.session_class] -= 1\n            if not any",
        "            if not any",
    ),
    Mutant(
        "a reclassed lease counts twice",
        LEASE,
        "            block.leases[lease.session_class] -= 1\n            block.leases[to] += 1",
        "            block.leases[to] += 1",
    ),
    Mutant(
        "a superseded lease goes on",
        CACHE,
        "            self._leases.end(superseded, SessionClass.CLOSED)\n",
        "",
        HITS,
    ),
    Mutant(
        "a lease that is on disk goes on",
        CACHE,
        "            self._leases.end(lease, SessionClass.HUMAN_WAIT)\n",
        "            pass\n",
        HITS,
    ),
    Mutant(
        "a restart loses what came behind a colder head",
        INDEX,
        "            path.append(above)\n",
        "            break\n",
    ),
    Mutant(
        "a restart believes any key",
        INDEX,
        "if 0 < len(tokens) <= block_tokens and chain_key(parent, tokens) == key:",
        "if 0 < len(tokens) <= block_tokens:",
        HITS,
    ),
)


def main(wanted: list[str]) -> int:
    chosen = [
        mutant for mutant in MUTANTS if not wanted or any(part in mutant.name for part in wanted)
    ]
    failures = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, tree / name)
        tests = tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
        caught_by, seconds = run(tree, tests)
        show("(control)", caught_by or "passes", seconds)
        if caught_by:
            return 1
        for mutant in chosen:
            caught_by, seconds = plant(tree, mutant)
            show(mutant.name, caught_by or "SURVIVED", seconds)
            failures += caught_by is None or caught_by == "does not apply"
    print(f"{len(chosen) - failures} of {len(chosen)} caught in {time.monotonic() - began:.0f} s")
    return 1 if failures else 0


def plant(tree: Path, mutant: Mutant) -> tuple[str | None, float]:
    path = tree / mutant.path
    original = path.read_text()
    if original.count(mutant.old) != 1:
        return "does not apply", 0.0
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        return run(tree, mutant.tests)
    finally:
        path.write_text(original)


def run(tree: Path, tests: tuple[str, ...]) -> tuple[str | None, float]:
    """The first test that fails, if any, and the seconds it took."""
    began = time.monotonic()
    for test in tests:
        command = [
            sys.executable,
            "-B",
            "-m",
            "pytest",
            "-x",
            "-p",
            "no:cacheprovider",
            "--tb=no",
            test,
        ]
        environment = {**os.environ, "HYPOTHESIS_PROFILE": "mutants"}
        try:
            ended = subprocess.run(
                command,
                cwd=tree,
                env=environment,
                capture_output=True,
                text=True,
                timeout=RUN_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"{Path(test).stem} (never ended)", time.monotonic() - began
        if ended.returncode:
            failed = [
                line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
            ]
            name = (
                failed[0].split("::")[-1].split(" - ")[0] if failed else f"exit {ended.returncode}"
            )
            return f"{Path(test).stem}: {name}", time.monotonic() - began
    return None, time.monotonic() - began


def show(name: str, caught_by: str, seconds: float) -> None:
    print(f"{name:<58} {seconds:6.1f} s  {caught_by}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
