"""Every campaign at a size that fits into the suite. The full sizes: `make campaign`."""

import pytest

from tests.campaign import (
    cancels,
    flips,
    floods,
    full_disk,
    fuzz,
    idle,
    isolation,
    kills,
    overload,
    round_trips,
    sigterms,
    soak,
    truncations,
)
from tests.campaign.zygote import StubDaemon, Zygote


@pytest.fixture(scope="module")
def zygote():
    with Zygote() as zygote:
        yield zygote


def test_killed_daemons_lose_nothing_acknowledged_and_restore_nothing_wrong(zygote, tmp_path):
    assert kills.campaign(zygote, tmp_path, kills=kills.QUICK, seed=1) == 0


def test_flipped_bits_and_moved_values_are_refused_and_counted(tmp_path):
    bits, moves = flips.QUICK
    assert flips.campaign(tmp_path, flips=bits, moves=moves, seed=1) == 0


def test_a_daemon_starts_and_serves_on_a_damaged_file(zygote, tmp_path):
    offsets = truncations.QUICK
    assert truncations.campaign(zygote, tmp_path, offsets=offsets, seed=1) == 0


def test_turns_go_on_while_the_disk_is_full_or_fails(zygote, tmp_path):
    cycles, calls = full_disk.QUICK_CYCLES, full_disk.QUICK_CALLS
    assert full_disk.campaign(zygote, tmp_path, cycles=cycles, calls=calls, seed=1) == 0


def test_round_trips_through_the_tiers_change_no_bit(tmp_path):
    assert round_trips.campaign(tmp_path, count=round_trips.QUICK, seed=1) == 0


def test_a_client_that_leaves_at_any_checkpoint_leaves_nothing_behind():
    assert cancels.campaign(orders=cancels.QUICK_ORDERS, seed=1) == 0


def test_under_overload_the_refused_hear_it_and_another_tenant_is_served(zygote, tmp_path):
    seconds = overload.QUICK_S
    daemon = StubDaemon(zygote, tmp_path / "state", overload.STUB.settings)
    how = {"rounds": 1, "factor": 5, "seed": 1, "timed": False}
    assert overload.campaign(daemon, overload.STUB, seconds=seconds, **how) == 0


def test_a_sigterm_in_the_middle_of_turns_loses_nothing_acknowledged(zygote, tmp_path):
    assert sigterms.campaign(zygote, tmp_path, signals=sigterms.QUICK, seed=1, timed=False) == 0


def test_strangers_bytes_cause_no_fault_and_are_answered_in_shape(zygote, tmp_path):
    assert fuzz.campaign(zygote, tmp_path, seconds=fuzz.QUICK_S, seed=1) == 0


def test_what_clients_do_leaves_nothing_behind(zygote, tmp_path):
    assert soak.campaign(zygote, tmp_path, seconds=soak.QUICK_S, seed=1) == 0


def test_idle_sockets_are_kept_and_given_back(zygote, tmp_path):
    sockets, kept = idle.QUICK
    assert idle.campaign(zygote, tmp_path, sockets=sockets, kept=kept, seed=1, timed=False) == 0


def test_a_tenant_learns_nothing_of_anothers_prompts_and_takes_little_of_his_cache(
    zygote, tmp_path
):
    pairs = isolation.QUICK
    assert isolation.campaign(zygote, tmp_path, pairs=pairs, seed=1, timed=False) == 0


def test_a_good_client_is_served_beside_floods_of_every_kind(zygote, tmp_path):
    seconds = floods.QUICK_S
    assert floods.campaign(zygote, tmp_path, seconds=seconds, seed=1, timed=False) == 0
