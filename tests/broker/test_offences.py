"""Who breaks the rules again and again is barred for a while, and nobody else."""

from hypothesis import given
from hypothesis import strategies as st

from broker.offences import BARRED_S, KNOWN, MOST, WITHIN_S, Offences

ONE, OTHER = ("tenant", "10.0.0.1"), ("tenant", "10.0.0.2")


@given(st.lists(st.floats(0.01, 15), max_size=40), st.floats(0, 40))
def test_barred_is_who_had_so_many_offences_in_so_long_until_some_time_after_the_last(gaps, later):
    offences, times, now = Offences(), [], 0.0
    for gap in gaps:
        now += gap
        offences.note(ONE, now)
        times.append(now)
    newest = times[-MOST:]
    often = len(newest) == MOST and newest[-1] - newest[0] <= WITHIN_S
    left = now + BARRED_S - (now + later)
    assert (offences.barred_s(ONE, now + later) > 0) is (often and left > 0)
    assert offences.barred_s(ONE, now + later) <= BARRED_S
    assert offences.barred_s(OTHER, now) == 0


def test_who_offended_longest_ago_is_forgotten_first():
    offences = Offences()
    for _ in range(MOST):
        offences.note(ONE, 0.0)
    for number in range(KNOWN - 1):
        offences.note(("", str(number)), 1.0)
    assert offences.barred_s(ONE, 1.0)
    offences.note(("", "one more"), 1.0)
    assert not offences.barred_s(ONE, 1.0)
