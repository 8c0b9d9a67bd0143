"""What a stranger would try on a real daemon: damage its disk, delete a response, and ask why tokens were computed."""

from __future__ import annotations

import pytest

from broker.bench.client import Refused, call, http_turn
from broker.bench.workload import Workload

TINY = Workload(nonce=4, system_tokens=400, result_tokens=40, output_tokens=6)


def usage(finished):
    return finished.response["usage"]


def test_every_computed_token_has_a_reason_and_a_deleted_response_leaves_nothing(daemon):
    body = TINY.body(TINY.task())
    first = http_turn(daemon.url, body)
    why = usage(first)["homeport:recomputed"]
    assert sum(why.values()) == first.prompt_tokens - first.cached_tokens
    assert why["logits"] == 1

    again = http_turn(daemon.url, body)
    assert usage(again)["homeport:recomputed"] == {"logits": 1}

    for finished in (again, first):
        answer = call("DELETE", daemon.url, f"/v1/responses/{finished.id}")
        assert answer["deleted"] is True
        with pytest.raises(Refused) as refused:
            call("GET", daemon.url, f"/v1/responses/{finished.id}")
        assert refused.value.status == 404
    after = http_turn(daemon.url, body)
    why = usage(after)["homeport:recomputed"]
    assert why["deleted"] >= after.prompt_tokens - 64, "the prompt's KV went with its responses"
    assert sum(why.values()) == after.prompt_tokens - after.cached_tokens


def flip_bits(path):
    """One in every 300 kB: some of every record, and few pages of LMDB's own."""
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        for at in range(100_000, size, 300_000):
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 4]))


def test_damaged_records_cost_their_tokens_and_no_more(new_daemon):
    daemon = new_daemon("tiers.disk.max_lag=100ms")
    first = http_turn(daemon.url, TINY.body(TINY.task()))
    follow = TINY.body(TINY.follow(first.output, "next"), first.id)
    control = http_turn(daemon.url, follow)
    daemon.terminate()
    flip_bits(daemon.state_dir / "kv" / "data.mdb")
    daemon.start()
    after = http_turn(daemon.url, follow)
    assert after.said == control.said
    why = usage(after)["homeport:recomputed"]
    assert sum(why.values()) == after.prompt_tokens - after.cached_tokens
    assert after.cached_tokens < control.cached_tokens, "something of it was damaged"
