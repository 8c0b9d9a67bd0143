"""Who has said nothing gives way; who has said something never does."""

from functools import partial

from hypothesis import event, given
from hypothesis import strategies as st

from broker.places import Places

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.sampled_from(["", "a", "b"])),
        st.tuples(st.sampled_from(["spoke", "give"]), st.integers(0, 9)),
    ),
    max_size=60,
)


@given(st.integers(1, 5), st.integers(1, 3), STEPS)
def test_places_are_bounded_and_the_oldest_silent_one_gives_way(most, most_per_address, script):
    places = Places(most=most, most_per_address=most_per_address)
    here, silent, gone = [], [], []  # in order of arrival
    for step, what in script:
        if step == "take":
            lost = []
            place = places.take(what, partial(lost.append, True))
            mine = [one for one in here if one.address == what]
            crowded = bool(what) and len(mine) >= most_per_address
            if crowded or len(here) >= most:
                rivals = [one for one in silent if not crowded or one.address == what]
                event("crowded" if crowded else "full")
                assert (place is None) == (not rivals)
                if rivals:
                    assert not rivals[0].held
                    gone.append(rivals[0])
                    here.remove(rivals[0])
                    silent.remove(rivals[0])
            else:
                assert place is not None
            if place is not None:
                here.append(place)
                silent.append(place)
            assert not lost, "nobody loses the place that he has just got"
        elif here:
            place = here[what % len(here)]
            if step == "spoke":
                places.spoke(place)
                silent = [one for one in silent if one is not place]
            else:
                places.give(place)
                here.remove(place)
                silent = [one for one in silent if one is not place]
        for one in gone:
            places.give(one)  # again, as its task does when it ends
        assert places.held == len(here) <= most
        assert all(one.held for one in here)


def test_who_gives_way_is_told():
    places, told = Places(most=1, most_per_address=9), []
    places.take("a", lambda: told.append("first"))
    places.take("b", lambda: told.append("second"))
    assert told == ["first"]
