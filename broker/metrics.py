"""Numbers to Prometheus text. Pure: reports in, one string out.

Laws
    Names are `homeport_*`, counters end in `_total` and nothing else does, units come last. No label names a tenant,
    a session or an id. The HELP of each says what is counted, and in what.
    Every series of a known label set is always there, at 0 if need be: an absent series cannot be alerted on.
    Token counts are the engine's measurements, passed on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from broker.breakdown import SOURCES, Stage, Status
from broker.observations import Observations
from tiers.ledger import EVICTION_CAUSES, REASONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from broker.admission import AdmissionStatistics
    from broker.histogram import HistogramReport
    from broker.observations import Observed
    from engine.api import EngineReport

_TIERS = ("device", "host", "disk")
_BELOW = ("host", "disk")  # tiers that blocks are put into, and brought back from
_SPILL_REASONS = ("behind", "degraded", "full", "io", "checksum", "key")
_DISK_STATES = ("off", "ok", "degraded")
_DISK_READS = ("cached", "direct", "bounced", "buffered", "mapped")
_VERIFY_REASONS = (
    "missing",
    "magic",
    "version",
    "fingerprint",
    "key",
    "tokens",
    "size",
    "checksum",
)

Sample = tuple[dict[str, str], float]  # labels, value


@dataclass(frozen=True, slots=True)
class EdgeReport:
    """What the sockets' side knows."""

    websockets: int
    turns_total: Mapping[str, int]  # {transport: turns that were admitted}
    admission: AdmissionStatistics
    sessions: int  # response ids in memory
    stored_total: Mapping[str, int] = field(default_factory=dict)  # {disk|memory: responses}
    background: int = 0  # responses that run without their client
    tasks: int = 0  # trio's
    observed: Observed = field(default_factory=lambda: Observations().report())


def render(engine: EngineReport, edge: EdgeReport) -> str:
    """The whole of `/metrics`."""
    lines: list[str] = []

    def put(name: str, kind: str, meaning: str, samples: Iterable[Sample]) -> None:
        lines.append(f"# HELP homeport_{name} {meaning}")
        lines.append(f"# TYPE homeport_{name} {kind}")
        for labels, value in samples:
            inner = ",".join(f'{label}="{text}"' for label, text in labels.items())
            lines.append(
                f"homeport_{name}{{{inner}}} {value}" if inner else f"homeport_{name} {value}"
            )

    def put_histograms(
        name: str, meaning: str, series: Iterable[tuple[dict[str, str], HistogramReport]]
    ) -> None:
        lines.append(f"# HELP homeport_{name} {meaning}")
        lines.append(f"# TYPE homeport_{name} histogram")
        for labels, histogram in series:
            lines.extend(_histogram_lines(f"homeport_{name}", labels, histogram))

    def one(value: float) -> list[Sample]:
        return [({}, value)]

    def by(label: str, counts: Mapping[str, float], always: Iterable[str]) -> list[Sample]:
        known = dict.fromkeys(always, 0) | dict(counts)
        return [({label: key}, value) for key, value in known.items()]

    seen = edge.observed
    put_histograms(
        "time_to_first_token_seconds",
        "Seconds from a request's last byte to the first token that was sampled for it, of turns that sampled any.",
        [({}, seen.first_token)],
    )
    put_histograms(
        "inter_token_seconds",
        "Seconds between tokens of a turn, as its connection took them: a reader that does not read shows here too.",
        [({}, seen.inter_token)],
    )
    put_histograms(
        "turn_seconds",
        "Seconds from a request's last byte to its turn's end, however it ended.",
        [({}, seen.turn)],
    )
    put_histograms(
        "turn_stage_seconds",
        "Seconds that turns spent in each stage; a turn's stages add up to its whole time.",
        [({"stage": stage.value}, seen.stages[stage.value]) for stage in Stage],
    )
    put(
        "turns_ended_total",
        "counter",
        "Turns that are over, by how they ended.",
        by("status", seen.ended_total, [status.value for status in Status]),
    )
    put(
        "restore_wait_seconds_total",
        "counter",
        "Seconds that turns waited for KV, by the tier that it came from; device: it was on its way for others.",
        by("tier", seen.restore_s_total, _TIERS),
    )
    put_histograms(
        "event_loop_lag_seconds",
        "Seconds by which the event loop came late to something that was due.",
        [({}, seen.loop_lag)],
    )
    put("running", "gauge", "Sequences in the batch.", one(engine.running))
    put("waiting", "gauge", "Requests the engine has not started.", one(engine.waiting))
    put("loading", "gauge", "Sequences whose KV is being restored.", one(engine.loading))
    put("leases", "gauge", "Finished turns whose KV is kept warm.", one(engine.leases))
    put("refs", "gauge", "References that running sequences hold on blocks.", one(engine.refs))
    put("dirty_blocks", "gauge", "Blocks not yet written to disk.", one(engine.dirty))
    put(
        "tokens_total",
        "counter",
        "Tokens by where their KV came from; sampled ones are computed.",
        by("source", engine.tokens_total, SOURCES),
    )
    put(
        "recomputed_tokens_total",
        "counter",
        "Prompt tokens that were computed, by why no tier had them.",
        by("reason", engine.recomputed_total, REASONS),
    )
    put(
        "amplification",
        "gauge",
        "Ratio of computed to fresh prompt tokens; 1 is a cache that forgets nothing.",
        one(engine.amplification),
    )
    put(
        "hit_share",
        "gauge",
        "Ratio of reused to reusable tokens (cached once and asked for again): the achieved share of the best hit rate.",
        one(engine.hit_share),
    )
    put(
        "compute_threads",
        "gauge",
        "Threads of the processor that computed the last step: fewer while others keep cores busy; 0 on a GPU.",
        one(engine.compute_threads),
    )
    put("output_tokens_total", "counter", "Tokens sampled.", one(engine.output_tokens_total))
    put(
        "draft_tokens_total",
        "counter",
        "Tokens guessed ahead of what was said, by whether they were right.",
        by("outcome", engine.drafts_total, ("right", "wrong")),
    )
    put(
        "evictions_total",
        "counter",
        "Blocks that left a tier to make room.",
        by("tier", engine.evictions_total, _TIERS),
    )
    put(
        "evictions_by_cause_total",
        "counter",
        "Blocks that left a tier, by why.",
        [
            ({"tier": tier, "cause": cause}, engine.eviction_causes.get(tier, {}).get(cause, 0))
            for tier in _TIERS
            for cause in EVICTION_CAUSES
        ],
    )
    put(
        "spills_total",
        "counter",
        "Blocks put into a lower tier.",
        by("tier", engine.spilled_total, _BELOW),
    )
    put(
        "spill_failures_total",
        "counter",
        "Blocks that the disk did not take, by why; they stay in memory, or are recomputed.",
        by("reason", engine.spill_failures_by_reason, _SPILL_REASONS),
    )
    put(
        "restores_total",
        "counter",
        "Blocks brought back from a lower tier.",
        by("tier", engine.restored_total, _BELOW),
    )
    sizes = {tier.tier: tier.block_bytes for tier in engine.tiers}
    put(
        "restored_bytes_total",
        "counter",
        "Bytes brought back from a lower tier, as they are kept there.",
        [
            ({"tier": tier}, engine.restored_total.get(tier, 0) * sizes.get(tier, 0))
            for tier in _BELOW
        ],
    )
    failures = {
        "disk": dict.fromkeys(_VERIFY_REASONS, 0) | engine.verify_failures_total,
        "host": dict.fromkeys(("checksum", "key"), 0) | engine.host_failures_total,
    }
    put(
        "verify_failures_total",
        "counter",
        "Blocks that failed a check and were forgotten.",
        [
            ({"tier": tier, "reason": reason}, count)
            for tier, counts in failures.items()
            for reason, count in counts.items()
        ],
    )
    disk = engine.disk
    put(
        "disk_state",
        "gauge",
        "1 for the state that the disk tier is in.",
        by("state", {disk.state: 1}, _DISK_STATES),
    )
    put("disk_records", "gauge", "Known records on disk.", one(disk.records))
    put(
        "disk_index_complete",
        "gauge",
        "Whether every record on disk is known; prompts find theirs anyway.",
        one(int(disk.index_complete)),
    )
    put("disk_pending_bytes", "gauge", "Bytes on their way to disk.", one(disk.pending_bytes))
    put("disk_reading", "gauge", "Blocks on their way from disk.", one(disk.reading))
    put(
        "disk_reads_total",
        "counter",
        "Records read: from the page cache, past it, or, more slowly, through the store's map.",
        by("path", disk.reads_total, _DISK_READS),
    )
    put(
        "disk_scrubbed_total",
        "counter",
        "Records that the background scrubber verified.",
        one(disk.scrubbed_total),
    )
    put("disk_rotten_total", "counter", "Records that it found damaged.", one(disk.rotten_total))
    put(
        "disk_failures_total",
        "counter",
        "Write transactions that the disk refused.",
        by("reason", disk.failures_total, ("full", "io")),
    )
    put("disk_degraded_seconds", "gauge", "Seconds for which it has refused.", one(disk.degraded_s))
    put(
        "disk_written_bytes_total",
        "counter",
        "Bytes of blocks written to disk, tails that grew and were written again included.",
        one(disk.written_bytes_total),
    )
    put(
        "disk_new_bytes_total",
        "counter",
        "Bytes that all KV computed so far would take on disk, written once.",
        one(disk.new_bytes_total),
    )
    put(
        "disk_write_amplification",
        "gauge",
        "Ratio of bytes written to new bytes; below 1 where KV was dropped before it was written.",
        one(disk.written_bytes_total / disk.new_bytes_total if disk.new_bytes_total else 0),
    )
    put(
        "disk_writer_lag_seconds",
        "gauge",
        "Seconds that the oldest write under way has waited to be durable.",
        one(disk.writer_lag_s),
    )
    put(
        "disk_oldest_dirty_seconds",
        "gauge",
        "Seconds that the oldest block which is to be written has waited to be begun; tiers.disk.max_lag bounds it.",
        one(disk.oldest_dirty_s),
    )
    put("disk_commits_total", "counter", "Write transactions.", one(disk.commits_total))
    put(
        "disk_commit_seconds_total",
        "counter",
        "Seconds spent in write transactions.",
        one(disk.commit_s_total),
    )
    put(
        "disk_oldest_read_seconds",
        "gauge",
        "Seconds that the oldest read of the store has lasted, as last checked: an old one keeps freed pages.",
        one(disk.oldest_read_s),
    )
    put("pins", "gauge", "Pinned sessions.", one(len(engine.pins)))
    put(
        "pinned_bytes",
        "gauge",
        "Bytes that pins keep.",
        one(sum(pin.held_bytes for pin in engine.pins)),
    )
    put(
        "canary_total",
        "counter",
        "Restored blocks that were computed again, those that differed, and those that were gone before.",
        by("result", engine.canary, ("checked", "mismatched", "skipped")),
    )
    tiers = [({"tier": tier.tier}, tier) for tier in engine.tiers]
    put(
        "tier_capacity_bytes",
        "gauge",
        "Bytes that a tier may hold.",
        [(at, t.capacity_bytes) for at, t in tiers],
    )
    put(
        "tier_used_bytes",
        "gauge",
        "Bytes of blocks in a tier.",
        [(at, t.used_bytes) for at, t in tiers],
    )
    put("tier_blocks", "gauge", "Blocks in a tier.", [(at, t.blocks) for at, t in tiers])
    put(
        "tier_leased_blocks",
        "gauge",
        "Blocks that leases keep.",
        [(at, t.leased_blocks) for at, t in tiers],
    )
    put("websockets", "gauge", "Open WebSocket connections.", one(edge.websockets))
    put("tasks", "gauge", "Tasks that live on the event loop.", one(edge.tasks))
    put(
        "background",
        "gauge",
        "Responses that run, or wait to, without their client.",
        one(edge.background),
    )
    put(
        "turns_total",
        "counter",
        "Turns admitted.",
        by("transport", edge.turns_total, ("http", "websocket", "background", "compact")),
    )
    put("turns_admitted", "gauge", "Turns under way.", one(edge.admission.admitted))
    put("turns_queued", "gauge", "Turns waiting for a place.", one(edge.admission.waiting))
    put(
        "turns_refused_total",
        "counter",
        "Turns refused as too many.",
        one(edge.admission.refused_total),
    )
    put(
        "responses_stored_total",
        "counter",
        "Responses with `store: true` by what keeps them: the disk, or memory because the disk refused.",
        by("kept_on", edge.stored_total, ("disk", "memory")),
    )
    put("sessions", "gauge", "Responses that can be continued from memory.", one(edge.sessions))
    return "\n".join([*lines, ""])


def _histogram_lines(
    name: str, labels: Mapping[str, str], histogram: HistogramReport
) -> Iterator[str]:
    """Prometheus' buckets are cumulative."""
    common = [f'{label}="{text}"' for label, text in labels.items()]
    so_far = 0
    for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
        so_far += count
        inner = ",".join([*common, f'le="{bound}"'])
        yield f"{name}_bucket{{{inner}}} {so_far}"
    inner = ",".join(common)
    at = f"{{{inner}}}" if inner else ""
    yield f"{name}_sum{at} {histogram.sum}"
    yield f"{name}_count{at} {so_far}"
