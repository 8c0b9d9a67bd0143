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
COPIED = (
    *("broker", "engine", "tiers", "tests", "config", "docs", "pyproject.toml"),
    *("README.md", "CHANGELOG.md", "LICENSE", "Makefile"),
)
RUN_S = 240  # a mutant may also loop for ever: that counts as caught

EXAMPLES, MACHINE = "tests/tiers/test_cache.py", "tests/tiers/test_cache_machine.py"
VICTIMS = "tests/tiers/test_victims.py"
LAWS = (MACHINE, EXAMPLES)  # a law is broken: the machine should see it
HITS = (EXAMPLES, MACHINE)  # legal, but the cache is worth less


@dataclass(frozen=True)
class Mutant:
    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...] = LAWS  # run in this order until one fails


CACHE, INDEX, POLICY, RESIDENCY, LEASE, POOL, BLOCK = (
    f"tiers/{name}.py"
    for name in ("cache", "index", "policy", "residency", "lease", "pool", "block")
)

LMDB, INSPECTION, THREADS = (f"tiers/{name}.py" for name in ("lmdb_store", "inspection", "disk"))
STORE, STORE_MACHINE, DISK, KEYS, READS, RECORDS = (
    f"tests/tiers/test_{name}.py"
    for name in ("lmdb_store", "store_machine", "disk", "keys", "data_file", "record")
)
DATA_FILE, RECORD = (f"tiers/{name}.py" for name in ("data_file", "record"))

CACHE_CONTROL, CONTENT, MESSAGES_OUT, CUTS = (
    *(f"broker/wire/{name}.py" for name in ("cache_control", "messages_prompt", "messages_out")),
    "broker/cuts.py",
)
COUNTING = ("tests/broker/wire/test_cache_control.py",)
READING = ("tests/broker/wire/test_messages_in.py",)
SAYING = ("tests/broker/wire/test_messages_out.py",)
PLACES = ("tests/broker/test_cuts.py",)
OVER_HTTP = ("tests/broker/test_messages.py",)
DRAFTING = ("tests/engine/test_engine.py",)

SOCKET, SESSION, TURN, STEERING = (
    "broker/websocket.py", "broker/session.py", "broker/turn.py", "broker/wire/steering.py"
)  # fmt: skip
LANES, STEERS, IDS = (
    f"tests/broker/test_{name}.py" for name in ("websocket", "steering", "id_rules")
)
COMPARISON = "broker/bench/comparison.py"
STEERS_PURE = "tests/broker/wire/test_steering.py"

PAGES = ("tests/docs/test_pages.py",)
INIT, DOCTOR_RULES, DOCTOR_EYES = (
    "broker/commands/init.py", "broker/doctor/rules.py", "broker/doctor/look.py"
)  # fmt: skip
FIRST, EXAMINED = ("tests/broker/test_init.py",), ("tests/broker/test_doctor.py",)

TRANSFERS, MOVES = "engine/transfers.py", ("tests/engine/test_transfers.py",)

SEEN, PAGE = ("tests/broker/test_overview.py",), ("tests/browser",)

MUTANTS = (
    # slots
    Mutant(
        "a vacated slot is leaked",
        CACHE,
        "self._pools[tier].give(self._where.displace(block, tier), SlotState.HELD)",
        "self._where.displace(block, tier)",
    ),
    Mutant(
        "unused private slots are leaked",
        CACHE,
        "for slot in (*hold.hole_slots, *hold.private):",
        "for slot in hold.hole_slots:",
    ),
    Mutant(
        "the slot of a hole that was never computed is leaked",
        CACHE,
        "for slot in (*hold.hole_slots, *hold.private):",
        "for slot in hold.private:",
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
        "        self._where.expect_no_more(block, Tier.DEVICE)  # who waits for a copy in flight has it now\n",
        "",
    ),
    # refs and busy
    Mutant(
        "victims may be referenced",
        RESIDENCY,
        "if not block.refs and not block.busy:",
        "if not block.busy:",
    ),
    Mutant(
        "victims may be busy",
        RESIDENCY,
        "if not block.refs and not block.busy:",
        "if not block.refs:",
    ),
    Mutant(
        "running blocks are demoted",
        CACHE,
        "        if block.refs or block.busy:\n            return\n        if to is Tier.DISK",
        "        if block.busy:\n            return\n        if to is Tier.DISK",
    ),
    Mutant(
        "a block needed again while it is copied away goes",
        CACHE,
        "if not block.refs and not block.busy and not pinned:  # asked",
        "if not block.busy and not pinned:  # asked",
    ),
    Mutant(
        "the first of two copies takes the other's source away",
        CACHE,
        "if not block.refs and not block.busy and not pinned:  # asked",
        "if not block.refs and not pinned:  # asked",
    ),
    Mutant(
        "a pin that comes while its block is written is overlooked",
        CACHE,
        "if not block.refs and not block.busy and not pinned:  # asked",
        "if not block.refs and not block.busy:  # asked",
        (VICTIMS, *LAWS),
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
        "        for block in given:\n            self._unreference(block)\n",
        "",
    ),
    Mutant(
        "an adopted block is not referenced",
        CACHE,
        "            self._reference(block)\n            hold.blocks.append(block)",
        "            hold.blocks.append(block)",
    ),
    # in flight
    Mutant(
        "a source is dropped before its copy lands",
        CACHE,
        "        self._issue(actions, copy, Flight(block, vacate=(Tier.DEVICE,), cause=cause))\n",
        "        self._issue(actions, copy, Flight(block))\n        self._vacate(block, Tier.DEVICE, cause)\n",
    ),
    Mutant(
        "a spill counts as written when it is issued",
        CACHE,
        "            self._where.expect(dirty, Tier.DISK, slot)\n",
        "            self._pools[Tier.DISK].move(slot, SlotState.ARRIVING, SlotState.HELD)\n            self._where.place(dirty, Tier.DISK, slot)\n",
    ),
    Mutant(
        "a hold is ready before its private copy",
        CACHE,
        "        if hold.flight is not None:\n            return False\n        self._run",
        "        self._run",
    ),
    Mutant(
        "a hold is ready before its blocks",
        CACHE,
        "                return False\n            hold.landed += 1",
        "                break\n            hold.landed += 1",
    ),
    Mutant(
        "a block is loaded once for each who asks",
        CACHE,
        "return bool(block.places) and Tier.DEVICE not in block.places | block.arriving",
        "return bool(block.places) and Tier.DEVICE not in block.places",
    ),
    Mutant(
        "who waits for a bad record waits for ever",
        CACHE,
        "        if not flight.private and block.arriving.get(tier) == slot:\n            self._where.expect_no_more(block, tier)\n        source",
        "        source",
    ),
    Mutant(
        "a bad record stays on disk",
        CACHE,
        "            self._refuse_place(block, source, actions)\n",
        "            pass\n",
        HITS,
    ),
    Mutant(
        "a record goes because the disk failed once",
        CACHE,
        "if reason not in _DISK_FAULTS and source in block.places:",
        "if source in block.places and source is not Tier.DEVICE:",
        HITS,
    ),
    Mutant(
        "bytes refused on the host are not fetched from the disk",
        CACHE,
        "if isinstance(action, Copy) and wanted and _is_to_be_brought(block):",
        "if False:",
        HITS,
    ),
    Mutant(
        "a block behind a hole is computed too",
        CACHE,
        "            if Tier.DEVICE not in block.places:\n                hold.holes",
        "            if hold.holes or Tier.DEVICE not in block.places:\n                hold.holes",
        HITS,
    ),
    Mutant(
        "a hole is taken for computed when it is begun",
        CACHE,
        "if hold.hole_rows == self.block_tokens:",
        "if hold.hole_rows:",
    ),
    Mutant(
        "a hole's reason is forgotten",
        CACHE,
        "                hold.missed[hold.failures.get(block, reason)] += tokens\n",
        "",
    ),
    Mutant(
        "a lease covers what lies behind a hole",
        CACHE,
        "chain = hold.blocks[: hold.holes[0]] if hold.holes else list(hold.blocks)",
        "chain = list(hold.blocks)",
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
        "a key forgets its parent",
        BLOCK,
        'b"y", sizes[1], parent, b"y"',
        'b"y", sizes[1], bytes(32), b"y"',
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
        "            self._pools[Tier.DEVICE].give(slot, SlotState.LENT)\n            self._where.reweigh((block,))\n            return\n",
        "            self._pools[Tier.DEVICE].give(slot, SlotState.LENT)\n",
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
        RESIDENCY,
        "or len(block.places) > 1 or not self._index.has_children(block)",
        "or True",
    ),
    Mutant(
        "a head is forgotten without its chain",
        CACHE,
        "            doomed += self._index.children(above)\n",
        "            break\n",
    ),
    Mutant(
        "a record goes before those that continue it",
        RESIDENCY,
        "if not block.kids[tier] and self._may_leave",
        "if self._may_leave",
    ),
    Mutant(
        "a child is written before its parent",
        CACHE,
        "            dirty = chain.pop()\n",
        "            dirty = chain.pop(0)\n",
    ),
    Mutant(
        "a child is kept at its parent's cost",
        CACHE,
        "        self._where.announce(newcomer, tier)\n",
        "",
    ),
    Mutant(
        "what was dropped from disk does not get dirty",
        CACHE,
        "        if block.unwanted:\n            block.unwanted = False\n            self._note_dirty(block, now)\n        other",
        "        other",
        (VICTIMS, *LAWS),
    ),
    Mutant(
        "what the disk gave up is written again at once",
        CACHE,
        "            block.unwanted = True  # or it",
        "            self._note_dirty(block, now)  # or it",
        (VICTIMS, *HITS),
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
        RESIDENCY,
        "if compared and newcomer is not None and",
        "if False and newcomer is not None and",
        HITS,
    ),
    Mutant(
        "classes do not count",
        POLICY,
        "return session_class(block), block.last_used, ",
        "return 0, block.last_used, ",
        HITS,
    ),
    Mutant(
        "most recently used goes first",
        POLICY,
        "session_class(block), block.last_used, -block",
        "session_class(block), -block.last_used, -block",
        HITS,
    ),
    Mutant(
        "heads go before tails",
        RESIDENCY,
        "                    parent.kids[tier] += 1 if stays >> tier & 1 else -1\n",
        "                    parent.kids[tier] += 0\n",
        HITS,
    ),
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
        "                    self._dirty[postponed] = now\n",
        "                    self._dirty[postponed] = now - self.limits.max_lag_s\n",
    ),
    Mutant(
        "a demoted session takes shared blocks along",
        CACHE,
        "            if sum(block.leases) == mine[block] and not pinned:\n",
        "            if not pinned:\n",
        HITS,
    ),
    Mutant(
        "a demotion takes what is pinned",
        CACHE,
        "            if sum(block.leases) == mine[block] and not pinned:\n",
        "            if sum(block.leases) == mine[block]:\n",
        (VICTIMS, *LAWS),
    ),
    # leases and restart
    Mutant(
        "an ended lease still counts",
        LEASE,
        "        self._uncover(lease)\n        for block in lease.blocks:\n            if not any",
        "        for block in lease.blocks:\n            if not any",
    ),
    Mutant(
        "a reclassed lease counts twice",
        LEASE,
        "        self._uncover(lease)\n        lease.session_class = to\n",
        "        lease.session_class = to\n",
    ),
    Mutant(
        "a superseded lease goes on",
        CACHE,
        "            self._end_lease(superseded, SessionClass.CLOSED)\n",
        "",
        HITS,
    ),
    Mutant(
        "a lease that is on disk goes on",
        CACHE,
        "            self._end_lease(lease, min(lease.session_class, SessionClass.HUMAN_WAIT))\n",
        "            pass\n",
        HITS,
    ),
    Mutant(
        "a restart loses what came behind a colder head",
        INDEX,
        "            self._lost.add(entry.parent)\n",
        "            pass\n",
    ),
    Mutant(
        "a restart believes any key",
        CACHE,
        "                and chain_key(entry.parent, entry.tokens) == entry.key\n",
        "",
        HITS,
    ),
    Mutant(
        "what finds no room at a start is adopted from an older slice",
        CACHE,
        "                self._drop_record(entry.key, actions)\n                self._note_dirty(block, now)",
        "                actions.append(Drop(entry.key))\n                self._note_dirty(block, now)",
        HITS,
    ),
    Mutant(
        "a slice older than a drop is believed",
        CACHE,
        "if self._gone is None or entry.key in self._gone:",
        "if self._gone is None:",
    ),
    Mutant(
        "the slots of what is not read yet are given away",
        CACHE,
        "take_many(records, SlotState.HELD)",
        "take_many(0, SlotState.HELD)",
        HITS,
    ),
    Mutant(
        "a pin passes its quota",
        CACHE,
        "        if len(self._leases.pinned() | blocks) > self.pin_quota:\n            return None\n",
        "",
        (VICTIMS, *LAWS),
    ),
    Mutant(
        "pinned blocks leave the host",
        RESIDENCY,
        "        if tier is Tier.HOST:\n",
        "        if False:\n",
        (VICTIMS, *LAWS),
    ),
    Mutant(
        "a TTL protects nothing",
        CACHE,
        "        elif lease.keep_until > now:\n",
        "        elif False:\n",
        (VICTIMS, *LAWS),
    ),
    Mutant(
        "a kept session sinks to the disk",
        CACHE,
        "        target = min(lease.target, Tier.HOST) if kept else lease.target\n",
        "        target = lease.target\n",
        (VICTIMS, *LAWS),
    ),
    Mutant(
        "a session's class never decays",
        CACHE,
        "        if idle_s >= self.limits.protect_s.get(asked, math.inf):\n",
        "        if False:\n",
        (VICTIMS, *LAWS),
    ),
    Mutant(
        "quotas are not looked at",
        RESIDENCY,
        "> self._tenant_share * self.pools[tier].capacity:",
        "> 1e9:",
        (VICTIMS, *LAWS),
    ),
    Mutant(
        "a changed class is not told to the order",
        RESIDENCY,
        "            if block.offered:\n                self.weigh(block)\n",
        "            pass\n",
        (VICTIMS, *LAWS),
    ),
    Mutant(
        "a deleted chain stays where it is needed by nobody",
        CACHE,
        '                    self._forget(block, actions, "deleted")\n',
        "                    break\n",
    ),
    Mutant(
        "a deletion takes what others need",
        CACHE,
        "return bool(block.refs) or any(block.leases) or self._index.has_children(block)",
        "return bool(block.refs) or self._index.has_children(block)",
        HITS,
    ),
    Mutant(
        "above the high watermark nothing leaves",
        CACHE,
        "            if pool.capacity - pool.free > marks.high * pool.capacity:",
        "            if False:",
        HITS,
    ),
    # the store, its threads, and what is believed
    Mutant(
        "a failed write is believed",
        LMDB,
        "self._broken = self._suspect = True",
        "self._suspect = True",
        (STORE,),
    ),
    Mutant(
        "a replaced record is counted twice",
        LMDB,
        "        self._discount(change, block.key)\n",
        "",
        (STORE_MACHINE,),
    ),
    Mutant(
        "the environment is opened again under a reader",
        LMDB,
        "left = self._changed.wait_for(lambda: not self._inside, _READERS_LEAVE_S)",
        "left = True",
        (STORE,),
    ),
    Mutant(
        "unsynced writes are believed under another boot",
        INSPECTION,
        "if there != boot:",
        "if False:",
        (STORE,),
    ),
    Mutant(
        "a clean mark holds for any file",
        INSPECTION,
        "if (size, time) == _shape(path):",
        "if True:",
        (STORE,),
    ),
    Mutant(
        "a store that failed leaves a clean mark",
        LMDB,
        "            if self._suspect:  # everything",
        "            if False:  # everything",
        (STORE,),
    ),
    Mutant(
        "a manifest fails with its blocks",
        THREADS,
        "self._commit([self._without_blocks(command, reason)])",
        "self._answer(command, reason)",
        (DISK,),
    ),
    Mutant(
        "a degraded disk is never probed",
        THREADS,
        "return trouble is not None and self._monotonic() < trouble.probe_at",
        "return trouble is not None",
        (DISK,),
    ),
    Mutant(
        "the floor of free space is not looked at",
        LMDB,
        "if free - wanted < self._limits.min_free_bytes:",
        "if False:",
        (STORE,),
    ),
    Mutant(
        "the first write comes before the mark",
        LMDB,
        "            if not self._marked_open:\n                self._mark_open()\n",
        "            self._marked_open = True\n",
        (STORE,),
    ),
    # reads past lmdb
    Mutant(
        "what lies at a place is believed",
        LMDB,
        "lambda fill: extract(fill, size, into, asked)",
        "lambda fill: fill(size - into.nbytes, into)",
        (READS, STORE_MACHINE),
    ),
    Mutant(
        "what lies at a place is the last word",
        LMDB,
        "            except (StoreError, ShortFile):\n                return None\n",
        "",
        (READS,),
    ),
    Mutant(
        "the map is asked where the disk cannot read",
        LMDB,
        "except (StoreError, ShortFile):",
        "except (StoreError, OSError):",
        (READS,),
    ),
    Mutant(
        "a place is that of the page, not of the record",
        DATA_FILE,
        "number * page_bytes + _PAGE_HEAD.size if own",
        "number * page_bytes if own",
        (STORE_MACHINE, READS),
    ),
    Mutant(
        "a piece that came in part is taken for whole",
        DATA_FILE,
        "if got != target.nbytes:",
        "if not got:",
        (READS,),
    ),
    Mutant(
        "pages that came in part are taken for whole",
        DATA_FILE,
        "return got == sum(part.nbytes for part in parts)",
        "return got > 0",
        (READS,),
    ),
    Mutant(
        "two readers share a buffer",
        DATA_FILE,
        "found = self._free.pop()",
        "found = self._free[-1]",
        (READS,),
    ),
    Mutant(
        "the data file stays open behind the environment",
        LMDB,
        "        if data is not None:\n            data.close()\n",
        "",
        (READS,),
    ),
    Mutant(
        "a file is closed under its reader",
        LMDB,
        "        with self._gate.passing():\n            if self._data is None:",
        "        with suppress():\n            if self._data is None:",
        (READS,),
    ),
    Mutant(
        "what the disk put in its place stays though it was refused",
        DATA_FILE,
        "                into[:] = BLANK * into.nbytes\n",
        "                pass\n",
        (READS,),
    ),
    Mutant(
        "the disk writes where no sector begins",
        DATA_FILE,
        "number % _SECTOR_BYTES for number in (begin, into.nbytes, _address(into))",
        "number % _SECTOR_BYTES for number in (begin, into.nbytes)",
        (READS,),
    ),
    Mutant(
        "half a payload stays where it was read to",
        RECORD,
        "        if not good:\n",
        "        if False:\n",
        (RECORDS, READS),
    ),
    Mutant(
        "the environment that came back is any",
        LMDB,
        "if found not in (self._acknowledged, self._acknowledged + 1):",
        "if False:",
        (STORE,),
    ),
    Mutant(
        "a key alone is believed",
        INDEX,
        "return block if block and (block.parent, block.tokens) == (parent, tokens) else None",
        "return block",
        (KEYS,),
    ),
    # the Messages API
    Mutant(
        "a read is claimed that the engine did not give",
        CACHE_CONTROL,
        "            and entry.tokens <= cached_tokens\n",
        "",
        COUNTING,
    ),
    Mutant(
        "a breakpoint walks back 21 positions",
        CACHE_CONTROL,
        "point.block - _WALK + 1",
        "point.block - _WALK",
        COUNTING,
    ),
    Mutant(
        "a hit is not refreshed",
        CACHE_CONTROL,
        "            self._write(entries, best, read, 0.0, started_at)",
        "            pass",
        COUNTING,
    ),
    Mutant(
        "an entry outlives its time",
        CACHE_CONTROL,
        "entry.readable_until <= now",
        "entry.readable_until < now",
        COUNTING,
    ),
    Mutant(
        "the lowest prefix does not count",
        CACHE_CONTROL,
        "end >= self._min_tokens",
        "end > self._min_tokens",
        COUNTING,
    ),
    Mutant(
        "five breakpoints are accepted",
        CACHE_CONTROL,
        "MAX_BREAKPOINTS = 4",
        "MAX_BREAKPOINTS = 5",
        COUNTING,
    ),
    Mutant(
        "a tool's name does not cover the system prompt",
        CONTENT,
        'name_after(b"tools", system.text)',
        'name_after(b"tools")',
        READING,
    ),
    Mutant(
        "the billing line stays in the prompt",
        CONTENT,
        "text if billed is None else text[billed.end() :]",
        "text",
        READING,
    ),
    Mutant(
        "a result may answer no call",
        CONTENT,
        "if used not in self._calls:",
        "if False:",
        READING,
    ),
    Mutant(
        "a user's neighbouring messages stay apart",
        CONTENT,
        '            if role == "assistant":\n                self._grown()',
        "            if role:\n                self._grown()",
        READING,
    ),
    Mutant(
        "message_start does not wait for the prompt's usage",
        MESSAGES_OUT,
        "if self._started or prompt is None:",
        "if self._started:",
        SAYING,
    ),
    Mutant(
        "sealed thoughts are said",
        MESSAGES_OUT,
        'case "response.reasoning_text.delta" if self._thinking == "shown":',
        'case "response.reasoning_text.delta" if self._thinking != "hidden":',
        SAYING,
    ),
    Mutant(
        "a full context passes for max_tokens",
        MESSAGES_OUT,
        'return "model_context_window_exceeded" if short else "max_tokens"',
        'return "max_tokens"',
        SAYING,
    ),
    Mutant(
        "a place counts what the prompt does not share",
        CUTS,
        "return min(len(before), len(prompt)) if at is None else at",
        "return min(len(before), len(prompt))",
        PLACES,
    ),
    Mutant(
        "a recalled part before a place is rendered from its words",
        CUTS,
        "            parts.append(part)",
        "            parts.append(Part(part.items))",
        PLACES,
    ),
    Mutant(
        "a message that does not stream never hears its prompt",
        "broker/routes/turns.py",
        "        frames = self._answer.frames(event)\n        if self._answer.streams:\n",
        "        if self._answer.streams:\n            frames = self._answer.frames(event)\n",
        OVER_HTTP,
    ),
    # what a model may say
    Mutant(
        "what a grammar forbids is merely unlikely",
        "engine/sampler.py",
        "masked_fill(forbidden, -torch.inf)",
        "masked_fill(forbidden, 0.0)",
        ("tests/engine/test_sampler.py",),
    ),
    Mutant(
        "a step's events wait for the next step",
        "engine/service.py",
        "_EVENT_PASSES = 3",
        "_EVENT_PASSES = 1",
        ("tests/engine/test_emit.py",),
    ),
    Mutant(
        "drafts are believed",
        "engine/engine.py",
        "choices[right].token == chunk.draft[right]:",
        "choices[right].token:",
        DRAFTING,
    ),
    Mutant(
        "the kv of wrong drafts is kept",
        "engine/engine.py",
        "fed = (*sequence.tokens[chunk.begin : chunk.end], *chunk.draft[:right])",
        "fed = (*sequence.tokens[chunk.begin : chunk.end], *chunk.draft)",
        DRAFTING,
    ),
    Mutant(
        "a draft crosses into a block that is not there",
        "engine/draft.py",
        "            -chunk.end % self.block_tokens,\n",
        "",
        DRAFTING,
    ),
    Mutant(
        "a draft passes the end",
        "engine/draft.py",
        "return draft[: next(ends, len(draft))]",
        "return draft",
        DRAFTING,
    ),
    Mutant(
        "drafted tokens are sampled at one step",
        "engine/engine.py",
        "dataclasses.replace(state, step=state.step + at)",
        "dataclasses.replace(state, step=state.step)",
        DRAFTING,
    ),
    Mutant(
        "a grammar is drafted past",
        "engine/draft.py",
        "return not drafted.submit.sampling.penalises and drafted.submit.matcher is None",
        "return not drafted.submit.sampling.penalises",
        ("tests/engine/test_grammar.py",),
    ),
    Mutant(
        "what never pays is drafted for ever",
        "engine/draft.py",
        "for correct in (1,) * right + (0,) * (right < drafted):",
        "for correct in (1,) * right:",
        ("tests/engine/test_draft.py",),
    ),
    Mutant(
        "a token may begin in the middle of another",
        "engine/draft.py",
        "            if at % 4 == 0:\n",
        "            if True:\n",
        ("tests/engine/test_draft.py",),
    ),
    Mutant(
        "a fulfilled grammar ends nothing",
        "engine/engine.py",
        "if token in sampling.stop_ids or (matcher is not None and matcher.complete):",
        "if token in sampling.stop_ids:",
        ("tests/engine/test_grammar.py",),
    ),
    Mutant(
        "a matcher that failed is believed",
        "engine/grammar.py",
        "bool(self._matcher.consume_token(token)) and not self._matcher.is_error()",
        "bool(self._matcher.consume_token(token))",
        ("tests/engine/test_grammar.py",),
    ),
    Mutant(
        "a preempted sequence begins its grammar anew",
        "engine/engine.py",
        "        sequence.hold = None\n        sequence.computed = 0\n",
        "        sequence.hold = None\n        sequence.computed = 0\n"
        "        if (m := sequence.submit.matcher) is not None:\n            m.__init__(m._compiled)\n",
        ("tests/engine/test_grammar.py",),
    ),
    Mutant(
        "everybody compiles",
        "engine/service.py",
        "async with flight:",
        "async with trio.Lock():",
        ("tests/engine/test_grammar.py",),
    ),
    Mutant(
        "a schema may loosen its own rules",
        "engine/grammar.py",
        'value = {**value, "x-guidance": {**_JSON_OPTIONS, "lenient": lenient}}',
        'value = {"x-guidance": {**_JSON_OPTIONS, "lenient": lenient}, **value}',
        ("tests/engine/test_grammar.py",),
    ),
    Mutant(
        "calls are parallel whatever was asked",
        "broker/forms.py",
        "one = not request.parallel_tool_calls or len(tools) == 1",
        "one = len(tools) == 1",
        ("tests/broker/test_forms.py",),
    ),
    Mutant(
        "allowed tools are a wish",
        "broker/forms.py",
        "request.tool_choice.names is not None\n        or not",
        "not",
        ("tests/broker/test_forms.py",),
    ),
    Mutant(
        "a closing tag ends a raw call wherever it stands",
        "broker/wire/rawcalls.py",
        "if held == CLOSE:",
        "if held:",
        ("tests/broker/wire/test_splitters.py",),
    ),
    Mutant(
        "tokens of markup go with the text behind it",
        "broker/speech.py",
        "self._stream.text(text, waiting[first:])",
        "self._stream.text(text, waiting)",
        ("tests/broker/test_speech.py",),
    ),
    # one session over any API
    Mutant(
        "a call's id leads nowhere",
        "broker/recall.py",
        "if node is None and isinstance(item, FunctionCall):",
        "if False:",
        ("tests/broker/test_turn.py",),
    ),
    Mutant(
        "what stands beside a call is the client's own",
        "broker/recall.py",
        "return _united([(node, tuple(run)) for node, run in runs])",
        "return [(node, tuple(run)) for node, run in runs]",
        ("tests/broker/test_turn.py",),
    ),
    Mutant(
        "a stranger's words before a call are the model's",
        "broker/recall.py",
        "            if content_digest(whole) == node.content:\n                return left, right",
        "            return left, right",
        ("tests/broker/test_turn.py",),
    ),
    Mutant(
        "tools that are sorted anew are other tools",
        "broker/turn.py",
        "return len(some) == len(others) and seen(some) == seen(others)",
        "return False",
        ("tests/broker/test_turn.py",),
    ),
    # restoring, and computing on the CPU
    Mutant(
        "what is on its way is there already",
        "engine/restore.py",
        "waits |= part.tier is Tier.DISK or part.arriving",
        "waits |= part.tier is Tier.DISK",
        ("tests/engine/test_restore.py",),
    ),
    Mutant(
        "weights are packed nearly as they were",
        "engine/packed_cpu.py",
        "    if not torch.equal(codes * scale + least, shares):\n        return None\n",
        "",
        ("tests/engine/test_packed_cpu.py",),
    ),
    Mutant(
        "a bias is left out",
        "engine/kernels_cpu.py",
        "mixed[t, i] += net.biases[layer, i]",
        "mixed[t, i] += 0",
        ("tests/engine/test_fused_cpu.py",),
    ),
    Mutant(
        "a key that float16 cannot hold becomes an infinity",
        "engine/kernels_cpu.py",
        "                number = HIGHEST_HALF\n",
        "                number = number\n",
        ("tests/engine/test_fused_cpu.py",),
    ),
    Mutant(
        "a decode is computed as a prompt where it has a neighbour that is one",
        "engine/fused_cpu.py",
        "        decodes = [segment for segment in batch.segments if segment.decodes]\n"
        "        rest = [segment for segment in batch.segments if not segment.decodes]\n",
        "        alone = all(segment.decodes for segment in batch.segments)\n"
        "        decodes = list(batch.segments) if alone else []\n"
        "        rest = [] if alone else list(batch.segments)\n",
        ("tests/engine/test_fused_cpu.py",),
    ),
    Mutant(
        "the logits of two passes are mixed up",
        "engine/fused_cpu.py",
        "            logits[rows] = computed_by(batch.part(segments), arena)\n",
        "            logits[rows] = computed_by(batch.part(segments), arena).flip(0)\n",
        ("tests/engine/test_fused_cpu.py",),
    ),
    Mutant(
        "what is computed in bfloat16 and in float32 shares its keys",
        "engine/attention.py",
        """prefill_cpu {str(prefill).removeprefix('torch.')}""",
        "prefill_cpu",
        (
            "tests/engine/test_model.py::test_fingerprint_names_the_dtypes_of_kv_and_of_what_computes_it",
        ),
    ),
    Mutant(
        "what prefills took is not owed to decodes",
        "engine/engine.py",
        "            self._scheduler.took(decodes, len(chunks) - decodes, self._clock() - began)\n",
        "",
        ("tests/engine/test_engine.py",),
    ),
    Mutant(
        "a prompt owes decodes all that its step took, their own part as well",
        "engine/scheduler.py",
        "(seconds - self._decode_s) * self._owed_per_second",
        "seconds * self._owed_per_second",
        ("tests/engine/test_scheduler.py",),
    ),
    Mutant(
        "a token of a prompt sees the one after it",
        "engine/kernels_cpu.py",
        "                            if first + token > past + start + lane:\n",
        "                            if first + token > past + start + lane + 1:\n",
        ("tests/engine/test_fused_cpu.py",),
    ),
    Mutant(
        "what a prompt's token summed so far keeps the weight that it had",
        "engine/kernels_cpu.py",
        "                    total[lane] *= shrink[lane]\n",
        "",
        ("tests/engine/test_fused_cpu.py",),
    ),
    Mutant(
        "a prompt's sums depend on where its tiles begin",
        "engine/kernels_cpu.py",
        "            for first in range(0, min(past + start + LANES, context), _KEYS):\n",
        "            for first in range(past % 2, min(past + start + LANES, context), _KEYS):\n",
        ("tests/engine/test_fused_cpu.py",),
    ),
    Mutant(
        "a product's rows beyond the tokens are what was there before",
        "engine/kernels_cpu.py",
        "    words[tokens * pairs : padded * pairs] = 0\n",
        "",
        ("tests/engine/test_fused_cpu.py",),
    ),
    Mutant(
        "a pair of bfloat16 is the other way round",
        "engine/kernels_cpu.py",
        "order = [k + side * AT_ONCE for k in range(AT_ONCE) for side in range(2)]",
        "order = [k + side * AT_ONCE for k in range(AT_ONCE) for side in (1, 0)]",
        ("tests/engine/test_fused_cpu.py",),
    ),
    Mutant(
        "connections are begun in the order that they came in",
        "broker/arrivals.py",
        "            self._of[address] = waiting\n",
        "            self._of[address] = waiting\n            self._of.move_to_end(address, last=False)\n",
        ("tests/broker/test_arrivals.py",),
    ),
    Mutant(
        "who waits when serving ends is left to wait",
        "broker/arrivals.py",
        "            line.next().close()\n",
        "            line.next().detach()\n",
        ("tests/broker/test_arrivals.py",),
    ),
    Mutant(
        "a rush at the start is taken for the disk",
        "engine/calibrate.py",
        "    per_block = min(together)\n",
        "    per_block = sum(together) / len(together)\n",
        ("tests/engine/test_calibrate.py",),
    ),
    Mutant(
        "the disk is measured while its index is read",
        "engine/service.py",
        "        adopted.wait()\n",
        "",
        ("tests/engine/test_start.py",),
    ),
    Mutant(
        "nobody is told that everything on disk is known",
        "engine/engine.py",
        "        self._adopted()\n",
        "",
        ("tests/engine/test_engine.py",),
    ),
    Mutant(
        "what is free goes back to the machine once, at the start",
        "broker/heap.py",
        "    while trim is not None:\n",
        "    if trim is not None:\n",
        ("tests/broker/test_heap.py",),
    ),
    # what operators see
    Mutant(
        "what was seen of the engine counts beside what it measured",
        "broker/breakdown.py",
        "        del self._laps[kept:]\n",
        "",
        ("tests/broker/test_breakdown.py",),
    ),
    Mutant(
        "tokens that come together take their time each",
        "broker/breakdown.py",
        "self._gap((now - self._last) / tokens, tokens)",
        "self._gap(now - self._last, tokens)",
        ("tests/broker/test_breakdown.py",),
    ),
    Mutant(
        "a client's word is in the log",
        "broker/breakdown.py",
        '"response": self.response_id or "-",',
        '"response": self.session,',
        ("tests/broker/test_breakdown.py", "tests/broker/test_observations.py"),
    ),
    Mutant(
        "a client that left is a fault of ours",
        "broker/port.py",
        "Status.ABANDONED if left else Status.FAILED",
        "Status.FAILED",
        ("tests/broker/test_observations.py",),
    ),
    Mutant(
        "a histogram's buckets are not cumulative",
        "broker/metrics.py",
        "so_far += count",
        "so_far = count",
        ("tests/broker/test_metrics.py",),
    ),
    Mutant(
        "waiting in the engine's inbox is nobody's time",
        "engine/sequence.py",
        "arrived = now if submit.at is None else submit.at",
        "arrived = now",
        ("tests/engine/test_usage_times.py",),
    ),
    Mutant(
        "the caller's trace ends here",
        "broker/tracing.py",
        "context=_parent(turn.origin.trace),",
        "context=None,",
        ("tests/broker/test_tracing.py",),
    ),
    Mutant(
        "a session's name commands the operator's terminal",
        "broker/top.py",
        'letter if letter.isprintable() else "?"',
        "letter",
        ("tests/broker/test_top.py",),
    ),
    # sockets: lanes, ids, warm-ups, steers
    Mutant(
        "socket: a cancel forgets the response before it",
        SESSION,
        "self._lanes[lane] = (*self._lanes.get(lane, ())[:1], node)",
        "self._lanes[lane] = (node,)",
        (IDS, "tests/broker/test_turn.py"),
    ),
    Mutant(
        "socket: a failed continuation leaves its parent",
        SESSION,
        "for n in self._lanes.get(lane, ()) if n.response_id != response_id)",
        "for n in self._lanes.get(lane, ()))",
        (IDS,),
    ),
    Mutant(
        "socket: a lane refuses out of its turn",
        SOCKET,
        "            frame = Refused(late, name, parent)\n",
        "            self._reply(error_event(late, stream_id=name))\n            return\n",
        (LANES,),
    ),
    Mutant(
        "socket: the end of the lifetime tells one lane only",
        SOCKET,
        "if lane.waiting and lane.name is not None:",
        "if False:",
        (LANES,),
    ),
    Mutant(
        "socket: a message may take for ever",
        SOCKET,
        "self._due = trio.current_time() + self._timeout_s",
        "self._due = math.inf",
        (LANES,),
    ),
    Mutant(
        "socket: a warm-up is waited for by its id only",
        TURN,
        "2 * _shared(warm.tokens, prompt) > len(warm.tokens)",
        "self.request.previous_response_id == _",
        (LANES,),
    ),
    Mutant(
        "socket: every warm-up is waited for",
        TURN,
        "2 * _shared(warm.tokens, prompt) > len(warm.tokens)",
        "True",
        (LANES,),
    ),
    Mutant(
        "socket: a steer cuts inside a character or a tag",
        "broker/speech.py",
        "return going_on and not held\n",
        "return going_on\n",
        (STEERS,),
    ),
    Mutant(
        "socket: what the engine sampled after a cut is said",
        TURN,
        "if isinstance(output, Sampled) and not cut:",
        "if isinstance(output, Sampled):",
        (STEERS,),
    ),
    Mutant(
        "socket: a successor that failed takes the steered response along",
        SOCKET,
        "self.scope.remember(lane.name, steered)  # the client may still go on from it",
        "pass",
        (STEERS,),
    ),
    Mutant(
        "socket: steers of a cancelled response are dropped",
        STEERING,
        'return self._returned(queued, "response_not_active", f"The response was {why}.")',
        "return []",
        (STEERS_PURE, STEERS),
    ),
    Mutant(
        "socket: steers are used twice",
        STEERING,
        "self._handed, self._queued = self._queued, []\n        return replace(",
        "self._handed = self._queued\n        return replace(",
        (STEERS_PURE, STEERS),
    ),
    # CUDA, interpreted and simulated
    Mutant(
        "cuda: the model writes a slot that is being copied out",
        TRANSFERS,
        "                self._streams.compute.wait(leaving)",
        "                pass",
        MOVES,
    ),
    Mutant(
        "cuda: a copy writes a slot that is being copied out",
        TRANSFERS,
        "return (now,) if leaving is None else (now, leaving)",
        "return (now,)",
        MOVES,
    ),
    Mutant(
        "cuda: a copy writes a slot that the model reads",
        TRANSFERS,
        "return (now,) if leaving is None else (now, leaving)",
        "return () if leaving is None else (leaving,)",
        MOVES,
    ),
    Mutant(
        "cuda: a copy has landed before its bytes are there",
        TRANSFERS,
        "    arrived.wait()  # also",
        "    # also",
        MOVES,
    ),
    Mutant(
        "cuda: the model does not wait for what the disk brought",
        TRANSFERS,
        "self._streams.compute.wait(up.record())",
        "up.record()",
        MOVES,
    ),
    Mutant(
        "cuda: a spill is written before its bytes are there",
        TRANSFERS,
        "return super().arrival() if last is None else last.wait",
        "return super().arrival()",
        MOVES,
    ),
    Mutant(
        "cuda: a seal is made before the bytes are there",
        TRANSFERS,
        "    job.arrived.wait()\n",
        "",
        MOVES,
    ),
    Mutant(
        "cuda: a query token sees those behind it",
        "engine/kernels_cuda.py",
        "seen = tl.where(asked, context - count + token + 1, 0)",
        "seen = tl.where(asked, context, 0)",
        ("tests/engine/test_kernels_cuda.py",),
    ),
    Mutant(
        "cuda: padding writes its KV to a slot",
        "engine/graphs.py",
        "*[-1] * len(tokens),",
        "*[0] * len(tokens),",
        ("tests/engine/test_graphs.py",),
    ),
    Mutant(
        "engine: a copy that is on its way is taken for landed",
        "engine/engine.py",
        "        if not is_there:\n",
        "        if not is_there and False:\n",
        ("tests/engine/test_engine.py",),
    ),
    # who may, how many, and what is said to those who may not
    Mutant(
        "safe: a tenant's key opens what is everybody's",
        "broker/routes/admin.py",
        "if not tenant_of(request).operator:",
        "if False:",
        ("tests/broker/test_matrix.py",),
    ),
    Mutant(
        "safe: a path that nobody serves needs no key",
        "broker/http.py",
        'if scope["path"] in self._keyless:',
        'if not scope["path"].startswith(("/v1/", "/admin/", "/metrics", "/openapi")):',
        ("tests/broker/test_matrix.py",),
    ),
    Mutant(
        "safe: a tenant's key acts on the session of a tenant that it names",
        "broker/access.py",
        "        if not asker.operator:\n",
        "        if False:\n",
        SEEN,
    ),
    Mutant(
        "safe: a demotion for one tenant moves another's session of that name",
        CACHE,
        "if session in (None, lease.session) and root in (None, lease.root)",
        "if session in (None, lease.session)",
        (EXAMPLES,),
    ),
    Mutant(
        "safe: the log names the tenant",
        "broker/breakdown.py",
        '            "response": self.response_id or "-",\n',
        '            "response": self.response_id or "-",\n            "tenant": self.tenant,\n',
        SEEN,
    ),
    Mutant(
        "seen: an overview has no bound",
        "broker/routes/admin.py",
        "nodes[:SESSIONS]",
        "nodes",
        SEEN,
    ),
    Mutant(
        "seen: a turn that has ended runs on the page for ever",
        "broker/port.py",
        "            del self.under_way[breakdown]\n",
        "",
        SEEN,
    ),
    Mutant(
        "seen: the page is served where its data is not",
        "broker/http.py",
        "    if apart:\n        return build_app(port, port.access, client_routes(port), _PROBES)\n",
        "",
        ("tests/broker/test_dashboard.py",),
    ),
    Mutant(
        "page: a name is read as markup",
        "broker/dashboard/pictures.js",
        "  if (element.textContent !== text) element.textContent = text;",
        "  if (element.textContent !== text) element.innerHTML = text;",
        ("tests/broker/test_dashboard.py",),
    ),
    Mutant(
        "page: an order is carried out unasked",
        "broker/dashboard/page.js",
        "  if (!(await confirmed(...question(session)))) return;\n",
        "",
        PAGE,
    ),
    Mutant(
        "page: a look takes the focus away",
        "broker/dashboard/pictures.js",
        "if (focused !== document.activeElement && parent.contains(focused)) focused.focus({ preventScroll: true });",
        "",
        PAGE,
    ),
    Mutant(
        "page: a refusal is not said",
        "broker/dashboard/page.js",
        'say($("trouble"), error instanceof Refused ? error.said : ',
        'say($("outcome"), error instanceof Refused ? "done" : ',
        PAGE,
    ),
    Mutant(
        "page: the next daemon's turns are added to those of the one before",
        "broker/dashboard/page.js",
        "if (kept.now && now.began_at !== kept.now.began_at) {",
        "if (false) {",
        PAGE,
    ),
    Mutant(
        "page: a hidden page goes on asking",
        "broker/dashboard/page.js",
        "timer = document.hidden ? null : setTimeout(look, ms);",
        "timer = setTimeout(look, ms);",
        PAGE,
    ),
    Mutant(
        "page: the key outlives the tab",
        "broker/dashboard/actions.js",
        'sessionStorage.setItem(KEY, $("key").value.trim());',
        'localStorage.setItem(KEY, $("key").value.trim()); sessionStorage.setItem(KEY, $("key").value.trim());',
        PAGE,
    ),
    Mutant(
        "page: tokens found on the device are not drawn",
        "broker/dashboard/page.js",
        "words.SOURCES.map((source) => [source, turn.tokens[source]]), largest",
        "words.SOURCES.map((source) => [source, source === 'device' ? 0 : turn.tokens[source]]), largest",
        PAGE,
    ),
    Mutant(
        "safe: half-open connections keep their places",
        "broker/places.py",
        "victim = next(iter(self._silent), None)",
        "victim = None",
        ("tests/broker/test_places.py", "tests/broker/test_listen.py"),
    ),
    Mutant(
        "safe: a client that does not read is waited for",
        "broker/http.py",
        "arrival.stream.send_timeout_s = self._send_timeout_s",
        "pass",
        ("tests/broker/test_http.py",),
    ),
    Mutant(
        "safe: a shielded send outlives its connection's end",
        "broker/http.py",
        "            await trio.aclose_forcefully(arrival.stream)\n\n    async def stop",
        "            pass\n\n    async def stop",
        ("tests/broker/test_http.py",),
    ),
    Mutant(
        "safe: pings cost nothing",
        "broker/websocket.py",
        "            self.controls += 1\n",
        "            pass\n",
        ("tests/broker/test_websocket.py",),
    ),
    Mutant(
        "calm: leases keep what is known no more",
        "tiers/cache.py",
        "        self._let_leases_go()\n",
        "",
        ("tests/tiers/test_cache.py",),
    ),
    Mutant(
        "calm: a lease that lost its end does not go with its response",
        "tiers/cache.py",
        "[x for x in self._leases.all if x.tail in keys[-1:]]",
        "[x for x in self._leases.all if x.blocks and x.blocks[-1].key in keys[-1:]]",
        ("tests/tiers/test_cache.py",),
    ),
    Mutant(
        "calm: replaced schedules stay until their time",
        "tiers/lease.py",
        "if len(self._due) > 2 * len(self._leases) + _STALE:",
        "if False:",
        ("tests/tiers/test_cache.py",),
    ),
    Mutant(
        "calm: what a disk that began empty drops is remembered for ever",
        "engine/engine.py",
        "        self._compute_threads = 0  # of the last step\n        if self._adoption.complete:\n            self._end_adopting()\n",
        "        self._compute_threads = 0  # of the last step\n",
        ("tests/engine/test_engine.py",),
    ),
    Mutant(
        "calm: a turn is refused unread though another could make room",
        "broker/admission.py",
        "self._makes_room(Ticket(tenant, 0, math.inf, patient=False))",
        "self._makes_room(Ticket(tenant, 1 << 30, math.inf, patient=False))",
        ("tests/broker/test_admission.py",),
    ),
    Mutant(
        "calm: a turn that is refused is read first",
        "broker/routes/chat.py",
        "        self._port.check_room(tenant, breakdown)\n",
        "",
        ("tests/broker/test_http.py",),
    ),
    Mutant(
        "calm: the loop parses long bodies",
        "broker/routes/body.py",
        "    if len(body) < _LARGE:\n",
        "    if body:\n",
        ("tests/broker/test_http.py",),
    ),
    Mutant(
        "calm: the first tenant in line is served first",
        "broker/admission.py",
        "tenant = min(self._lines, key=self._held_by)",
        "tenant = next(iter(self._lines))",
        ("tests/broker/test_admission.py",),
    ),
    Mutant(
        "calm: admitted tokens have no bound",
        "broker/admission.py",
        "return len(self._admitted) < turns and in_all <= tokens",
        "return len(self._admitted) < turns",
        ("tests/broker/test_admission.py",),
    ),
    Mutant(
        "calm: a tenant may hold every place",
        "broker/admission.py",
        "turns, tokens = self._most if has_some else (self._max_turns, self._max_tokens)",
        "turns, tokens = (self._max_turns, self._max_tokens) if has_some else self._most",
        ("tests/broker/test_admission.py",),
    ),
    Mutant(
        "calm: a client that reads nothing keeps his place",
        "engine/service.py",
        "                ended()\n",
        "",
        ("tests/engine/test_emit.py",),
    ),
    Mutant(
        "calm: what is left to say holds a place",
        "broker/turn.py",
        "self.engine.generate(submit, self.computed)",
        "self.engine.generate(submit)",
        ("tests/broker/test_websocket.py",),
    ),
    Mutant(
        "calm: the engine serves a flood in order of arrival",
        "engine/scheduler.py",
        "key=lambda s: under_way[s.tenant]",
        "key=lambda s: 0",
        ("tests/engine/test_scheduler.py",),
    ),
    Mutant(
        "calm: a client event that we do not know is a fault of ours",
        "broker/websocket.py",
        '                log.debug("ignored a client event of a type that we do not know")\n',
        "                raise KeyError(frame)\n",
        ("tests/broker/test_frames_fuzz.py",),
    ),
    Mutant(
        "calm: whoever is barred bars his neighbours",
        "broker/websocket.py",
        "who = tenant.name, address_of(arrival.stream.transport)",
        'who = "", ""',
        ("tests/broker/test_websocket.py",),
    ),
    Mutant(
        "calm: a flood comes again as often as it likes",
        "broker/websocket.py",
        "                    self._offences.note(who, trio.current_time())\n",
        "                    pass\n",
        ("tests/broker/test_websocket.py",),
    ),
    Mutant(
        "calm: a ping that crosses our close is a fault of ours",
        "broker/websocket.py",
        "            if self.closing is None:\n                raise\n            await self._last_word(self.closing.code)",
        "            raise",
        ("tests/broker/test_websocket.py",),
    ),
    Mutant(
        "calm: small frames are read by the thousand",
        "broker/websocket.py",
        "min(self._room, max_bytes)",
        "max_bytes",
        ("tests/broker/test_websocket.py",),
    ),
    Mutant(
        "calm: the engine waits for a loop that does not keep up",
        "engine/service.py",
        "            if trio.current_time() > enough:\n                break\n",
        "",
        ("tests/engine/test_emit.py",),
    ),
    Mutant(
        "calm: a turn that nobody waits for any more is admitted",
        "broker/admission.py",
        "if following.due < now:",
        "if False:",
        ("tests/broker/test_admission.py",),
    ),
    Mutant(
        "calm: a refusal that comes late is a fault",
        "broker/errors.py",
        "    if code == Overloaded.code:\n        return Overloaded(message, retry_after_s=_LATE_S)\n",
        "",
        ("tests/broker/test_messages.py",),
    ),
    Mutant(
        "calm: work that stands still looks alive",
        "broker/liveness.py",
        "(look is not None and (not look.work or look != self._last))",
        "look is not None",
        ("tests/broker/test_liveness.py",),
    ),
    # homeport bench serve
    Mutant(
        "a gain in seconds is ours over theirs",
        COMPARISON,
        "    return theirs / mine\n",
        "    return mine / theirs\n",
        ("tests/broker/test_bench_comparison.py",),
    ),
    Mutant(
        "a first token is any delta",
        "broker/bench/chat.py",
        "if any(delta.get(key) for key in _SPOKEN):",
        "if delta:",
        ("tests/broker/test_bench_comparison.py",),
    ),
    Mutant(
        "a gap that holds a whole restore is overlooked",
        COMPARISON,
        "if early < end and late > begin]",
        "if begin <= early and late <= end]",
        ("tests/broker/test_bench_comparison.py",),
    ),
    Mutant(
        "a turn that ended early passes for a fast one",
        COMPARISON,
        "if said >= wanted or said <= 1:",
        "if said:",
        ("tests/broker/test_bench_comparison.py",),
    ),
    Mutant(
        "the session whose restore is timed is not moved away",
        "broker/bench/interference.py",
        "                await session.leave()\n",
        "",
        ("tests/broker/test_bench_serve.py",),
    ),
    Mutant(
        "the slot file is not loaded",
        "broker/bench/cases.py",
        "load_s = await by_hand.load()",
        "load_s = 0.0",
        ("tests/broker/test_bench_serve.py",),
    ),
    Mutant(
        "nothing is rendered as a conversation of none",
        "engine/text.py",
        "        if not conversation.messages and not conversation.tools:\n"
        "            return ()  # templates cannot be asked about nothing\n",
        "",
        ("tests/broker/test_chat.py",),
    ),
    # cores
    Mutant(
        "whoever uses a core beside us is in the way of every step",
        "engine/cores.py",
        "return min(self._threads, self._cores - taken)",
        "return self._threads",
        ("tests/engine/test_cores.py",),
    ),
    Mutant(
        "what we compute ourselves counts as somebody else's",
        "engine/cores.py",
        "others_s = self._seen.everybody_s - before.everybody_s - ours_s",
        "others_s = self._seen.everybody_s - before.everybody_s",
        ("tests/engine/test_cores.py",),
    ),
    Mutant(
        "a core changes hands with every look",
        "engine/cores.py",
        "for edge in (_GIVE, _TAKE))",
        "for edge in (_GIVE, _GIVE))",
        ("tests/engine/test_cores.py",),
    ),
    Mutant(
        "a busy minute long ago slows the next turn down",
        "engine/cores.py",
        "        if ours_s < _COMPUTED * took_s:\n            self._taken = 0\n            return\n",
        "",
        ("tests/engine/test_cores.py",),
    ),
    Mutant(
        "who is given half of the cores makes way though there is room",
        "engine/cores.py",
        "return min(self._threads, self._cores - taken)",
        "return self._threads - taken",
        ("tests/engine/test_cores.py",),
    ),
    Mutant(
        "no core is left in the end",
        "engine/cores.py",
        "min(self._cores - 1, max(theirs, min(taken, at_most)))",
        "max(theirs, min(taken, at_most))",
        ("tests/engine/test_cores.py",),
    ),
    Mutant(
        "the kernels compute as many shares as there are threads just now",
        "engine/paged_cpu.py",
        "    return int(given)\n",
        "    return int(min(given, numba.get_num_threads()))\n",
        ("tests/engine/test_fused_cpu.py",),
    ),
    Mutant(
        "the first kernel gives torch all threads again",
        "engine/paged_cpu.py",
        "    torch.set_num_threads(given)\n",
        "",
        ("tests/engine/test_cores.py",),
    ),
    Mutant(
        "the readers' cores are taken from them",
        "engine/engine.py",
        "decodes == len(chunks) and self._reads.reading > 0",
        "False",
        ("tests/engine/test_engine.py",),
    ),
    Mutant(
        "a prompt goes slowly because something is being read",
        "engine/engine.py",
        "decodes == len(chunks) and self._reads.reading > 0",
        "self._reads.reading > 0",
        ("tests/engine/test_engine.py",),
    ),
    Mutant(
        "each commit interns names that nobody holds",
        "tiers/lmdb_store.py",
        '*("psize", "depth", "branch_pages", "leaf_pages", "overflow_pages", "entries"),',
        '*("psize", "depth", "branch_pages", "leaf_pages", "entries"),',
        ("tests/tiers/test_lmdb_store.py",),
    ),
    # pages
    Mutant(
        "a page names an option that is not there",
        "README.md",
        "ID --ttl 1h`",
        "ID --for 1h`",
        PAGES,
    ),
    Mutant(
        "a page names a key that is not there",
        "docs/sizing.md",
        "`tiers.disk.min_free` is",
        "`tiers.disk.free` is",
        PAGES,
    ),
    Mutant(
        "a page names a metric as it was called once",
        "docs/numbers.md",
        "rate(homeport_turns_refused_total",
        "rate(homeport_refused_total",
        PAGES,
    ),
    Mutant(
        "a page names a label that the metric has not",
        "docs/numbers.md",
        "homeport_restore_wait_seconds_total{tier}",
        "homeport_restore_wait_seconds_total{cause}",
        PAGES,
    ),
    Mutant(
        "a page leads to a heading that has another name",
        "docs/sdks.md",
        "README.md#talk-to-it",
        "README.md#talk-to-me",
        PAGES,
    ),
    Mutant(
        "a block is not run, and nobody is told",
        "docs/secure.md",
        "```toml secure.toml",
        "<!-- not run: hard -->\n```toml secure.toml",
        PAGES,
    ),
    Mutant(
        "a page is in no index", "docs/README.md", "[upgrade.md](upgrade.md)", "upgrade.md", PAGES
    ),
    # setting up
    Mutant(
        "init: a file that is there is measured for, and then refused",
        INIT,
        "    if not arguments.force and os.path.lexists(target):\n",
        "    if False:\n",
        FIRST,
    ),
    Mutant(
        "init: a file that appeared meanwhile is overwritten",
        INIT,
        "target.hardlink_to(beside)",
        "beside.replace(target)",
        FIRST,
    ),
    Mutant(
        "init: the file holds a key",
        INIT,
        "key=digest_as_written(key)",
        "key=key",
        FIRST,
    ),
    Mutant(
        "init: a file gets its name before it was loaded",
        INIT,
        "            check_exposure(load([beside]))\n",
        "",
        FIRST,
    ),
    Mutant(
        "init: the device tier is made for a GPU without weights",
        "broker/first_config.py",
        "gpu.free_bytes - _weights(found) - max(",
        "gpu.free_bytes - max(",
        ("tests/broker/test_first_config.py",),
    ),
    Mutant(
        "a written digest is a key itself",
        "broker/config.py",
        "    if not value.startswith(_DIGEST):\n",
        "    if True:\n",
        ("tests/broker/test_config.py",),
    ),
    Mutant(
        "a control group above ours does not count",
        "broker/machine.py",
        "for group in (own, *above)]",
        "for group in (own,)]",
        ("tests/broker/test_machine.py",),
    ),
    Mutant(
        "doctor: an open daemon that others reach is a note",
        DOCTOR_RULES,
        "    if found.keyless == 200 and not found.loopback:\n",
        "    if found.keyless == 200 and found.loopback is None:\n",
        EXAMINED,
    ),
    Mutant(
        "doctor: what serve would refuse as exposed is not said",
        DOCTOR_RULES,
        "    if found.exposure is not None:\n",
        "    if found.exposure == '':\n",
        EXAMINED,
    ),
    Mutant(
        "doctor: what is broken is only a warning",
        DOCTOR_RULES,
        "return 2 if Level.BROKEN in levels else 1",
        "return 1 if Level.BROKEN in levels else 1",
        EXAMINED,
    ),
    Mutant(
        "doctor: a key goes over the network in clear",
        DOCTOR_EYES,
        "ask = _Asking(url, key if known else None, config)",
        "ask = _Asking(url, key, config)",
        EXAMINED,
    ),
    Mutant(
        "doctor: the lock that was tried is kept",
        "tiers/state_dir.py",
        "        return LockReport(pid, held=False)\n    finally:\n        os.close(fd)\n",
        "        return LockReport(pid, held=False)\n    finally:\n        pass\n",
        EXAMINED,
    ),
    Mutant(
        "the unit kills a daemon that drains",
        "config/systemd/homeport.service",
        "TimeoutStopSec=90s",
        "TimeoutStopSec=20s",
        ("tests/broker/test_deployment.py",),
    ),
    Mutant(
        "the dashboard asks for a metric that is not exposed",
        "config/grafana/homeport.json",
        "max(homeport_disk_writer_lag_seconds{",
        "max(homeport_disk_writer_lag{",
        ("tests/broker/test_deployment.py",),
    ),
    Mutant(
        "systemd never hears that we are ready",
        "broker/commands/serving.py",
        '    tell("READY=1")\n',
        "",
        ("tests/broker/test_supervisor.py",),
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
