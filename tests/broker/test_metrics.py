"""`/metrics`, read by Prometheus' own parser: names and labels follow the rules, and the numbers are what was done."""

import re
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker.admission import AdmissionStatistics
from broker.breakdown import Origin, Stage, Status
from broker.metrics import EdgeReport, render
from broker.observations import Observations
from engine.api import CachedTokens, DiskReport, EngineReport, TierReport, Usage
from tests.broker.rig import open_rig
from tests.fakes import saying

LABELS = {"tier", "source", "reason", "cause", "stage", "status", "transport", "state", "path", "result", "kept_on", "outcome", "le"}  # fmt: skip
NAME = re.compile(r"homeport_[a-z]+(_[a-z]+)*")
NOTHING = EngineReport(0, 0, 0, 0, 0, 0, {}, 0, {}, 0, 0, 0, {}, (), ())
IDLE = EdgeReport(0, {}, AdmissionStatistics(0, 0, 0), 0)


def parsed(text):
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families, name, **labels):
    """The one sample of that name and those labels."""
    (found,) = [
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == f"homeport_{name}" and sample.labels == labels
    ]
    return found


async def scraped(rig):
    return parsed((await rig.browser().request("GET", "/metrics")).body.decode())


def test_every_name_follows_the_rules():
    text = render(NOTHING, IDLE)
    families = parsed(text)
    assert len(families) == text.count("# TYPE") == text.count("# HELP") > 50
    for family in families.values():
        counter = family.type == "counter"
        full = f"{family.name}_total" if counter else family.name
        assert NAME.fullmatch(full)
        assert f"# TYPE {full} {family.type}\n" in text
        assert family.name.endswith("_total") is False
        assert family.type in ("counter", "gauge", "histogram")


def test_help_says_the_unit_that_the_name_ends_in():
    for family in parsed(render(NOTHING, IDLE)).values():
        assert family.documentation.endswith("."), family.name
        first = family.documentation.split()[0]
        for unit, ending in (("Seconds", "_seconds"), ("Bytes", "_bytes")):
            assert (first == unit) == family.name.endswith(ending), family.name


def test_labels_are_few_and_never_a_tenant_s_or_a_session_s():
    for family in parsed(render(NOTHING, IDLE)).values():
        for sample in family.samples:
            assert sample.labels.keys() <= LABELS
            assert len(sample.labels) <= 2


def test_an_idle_daemon_already_has_every_series():
    families = parsed(render(NOTHING, IDLE))
    for stage in Stage:
        assert value(families, "turn_stage_seconds_count", stage=stage.value) == 0
    for status in Status:
        assert value(families, "turns_ended_total", status=status.value) == 0
    for tier in ("host", "disk"):
        assert value(families, "restores_total", tier=tier) == 0
        assert value(families, "spills_total", tier=tier) == 0
    for reason in ("behind", "degraded", "full", "io"):
        assert value(families, "spill_failures_total", reason=reason) == 0
    assert value(families, "disk_write_amplification") == 0


def test_histograms_are_cumulative_and_end_in_their_count():
    observations = Observations()
    breakdown = observations.begin(Origin("r", "chat", "http"), 0.0)
    breakdown.submitted(0.0)
    for now in (0.25, 0.2578125, 1.0, 1000.0):
        breakdown.sampled(1, now)
    breakdown.ran(Usage(1, CachedTokens(), 1, 4, prefill_s=0.25, decode_s=999.75), 1000.0)
    breakdown.status = Status.COMPLETED
    observations.ended(breakdown.record(1000.0, 0.0))
    families = parsed(render(NOTHING, replace(IDLE, observed=observations.report())))
    for family in families.values():
        if family.type != "histogram":
            continue
        series = {}
        for sample in family.samples:
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
            series.setdefault(labels, []).append(sample)
        for samples in series.values():
            buckets = [s.value for s in samples if s.name.endswith("_bucket")]
            assert buckets == sorted(buckets)
            (count,) = [s.value for s in samples if s.name.endswith("_count")]
            assert samples[len(buckets) - 1].labels["le"] == "+Inf"
            assert buckets[-1] == count
    assert value(families, "inter_token_seconds_bucket", le="0.005") == 0
    assert value(families, "inter_token_seconds_bucket", le="0.01") == 1
    assert value(families, "inter_token_seconds_bucket", le="2.5") == 2
    assert value(families, "inter_token_seconds_count") == 3
    assert value(families, "inter_token_seconds_sum") == pytest.approx(999.75)
    assert value(families, "time_to_first_token_seconds_sum") == pytest.approx(0.25)
    assert value(families, "turn_stage_seconds_sum", stage="decode") == pytest.approx(999.75)


def test_what_moved_is_shown_by_tier_and_reason_and_in_bytes():
    report = replace(
        NOTHING,
        tiers=(TierReport("host", 0, 0, 0, 0, 0, 100), TierReport("disk", 0, 0, 0, 0, 0, 50)),
        restored_total={"host": 3, "disk": 4},
        spilled_total={"host": 5, "disk": 6},
        spill_failures_by_reason={"behind": 7},
        disk=DiskReport(
            written_bytes_total=300,
            new_bytes_total=200,
            writer_lag_s=1.5,
            oldest_dirty_s=2.5,
            oldest_read_s=3.5,
        ),
    )
    families = parsed(render(report, IDLE))
    assert value(families, "restores_total", tier="host") == 3
    assert value(families, "restored_bytes_total", tier="host") == 300
    assert value(families, "restored_bytes_total", tier="disk") == 200
    assert value(families, "spills_total", tier="disk") == 6
    assert value(families, "spill_failures_total", reason="behind") == 7
    assert value(families, "disk_write_amplification") == 1.5
    assert value(families, "disk_writer_lag_seconds") == 1.5
    assert value(families, "disk_oldest_dirty_seconds") == 2.5
    assert value(families, "disk_oldest_read_seconds") == 3.5


async def test_the_counters_are_what_a_scripted_run_did():
    answers = ("one", "number two", "and the third of them")
    async with open_rig(reply=saying(*answers), max_context=400) as rig:
        browser = rig.browser()
        first = (await browser.request("POST", "/v1/responses", {"input": "Hi."})).json
        async with rig.websocket() as client:
            second = await client.turn(previous_response_id=first["id"])
            third = await client.turn()
        usages = [first["usage"], *(turn[-1]["response"]["usage"] for turn in (second, third))]
        refused = await browser.request("POST", "/v1/responses", {"input": "x" * 500})
        assert refused.status == 400
        families = await scraped(rig)
        cached = sum(u["input_tokens_details"]["cached_tokens"] for u in usages)
        prompt = sum(u["input_tokens"] for u in usages)
        output = sum(u["output_tokens"] for u in usages)
        assert output == sum(len(answer) + 1 for answer in answers)
        turns = [turn.as_json() for turn in rig.port.observations.last(9)]
        assert sum(turn["tokens"]["computed"] for turn in turns) == prompt - cached
        assert value(families, "tokens_total", source="computed") == prompt - cached
        assert value(families, "output_tokens_total") == output
        assert value(families, "time_to_first_token_seconds_count") == 3
        assert value(families, "inter_token_seconds_count") == output - 3
        assert value(families, "turns_total", transport="http") == 2
        assert value(families, "turns_total", transport="websocket") == 2
        assert value(families, "turns_ended_total", status="completed") == 3
        assert value(families, "turns_ended_total", status="refused") == 1
        assert value(families, "turn_seconds_count") == 4
        whole = value(families, "turn_seconds_sum")
        stages = [value(families, "turn_stage_seconds_sum", stage=s.value) for s in Stage]
        assert sum(stages) == pytest.approx(whole)
