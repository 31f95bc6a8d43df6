"""Never more than fit, whatever waits."""

from hypothesis import given
from hypothesis import strategies as st

from nibble.experiment.placement import Need, Place, assign, fits_alone

GB = 10**9
sizes = st.integers(0, 40)
needs = st.builds(Need, sizes, sizes)
places = st.lists(
    st.builds(
        Place,
        st.sampled_from("abcd"),
        sizes,
        most_runs=st.none() | st.integers(1, 3),
        host=st.sampled_from("xy"),
        host_bytes=st.none() | st.integers(0, 60),
    ),
    unique_by=lambda place: place.name,
).map(lambda found: _of_one_host(found))


def _of_one_host(found):
    """Places of a machine know the same of its memory."""
    known = {place.host: place.host_bytes for place in reversed(found)}
    return [Place(p.name, p.memory_bytes, p.most_runs, p.host, known[p.host]) for p in found]


waiting = st.dictionaries(st.text("rst", min_size=1, max_size=3), needs, max_size=8)


def _load(places, on_places):
    """What runs take: of each place, so many runs, and of each host."""
    memory, count, host = {}, {}, {}
    for name, need in on_places:
        memory[name] = memory.get(name, 0) + need.memory_bytes
        count[name] = count.get(name, 0) + 1
        machine = next(place.host for place in places if place.name == name)
        host[machine] = host.get(machine, 0) + need.host_bytes
    return memory, count, host


def _is_within(places, on_places):
    memory, count, host = _load(places, on_places)
    return all(
        memory.get(place.name, 0) <= place.memory_bytes
        and (place.most_runs is None or count.get(place.name, 0) <= place.most_runs)
        and (place.host_bytes is None or host.get(place.host, 0) <= place.host_bytes)
        for place in places
    )


@given(places, waiting, waiting)
def test_never_more_than_fit_and_nothing_that_fits_waits(places, first, then):
    """In two rounds: the second starts beside what the first has put to work."""
    at_work = [(name, first[run]) for run, name in assign(first, places, ()).items()]
    found = assign(then, places, at_work)
    now = [*at_work, *((name, then[run]) for run, name in found.items())]
    assert _is_within(places, now)
    for run in then.keys() - found.keys():
        for place in places:
            assert not _is_within(places, [*now, (place.name, then[run])])


@given(places, needs)
def test_what_fits_alone_is_started_alone(places, need):
    assert fits_alone(need, places) == any(_is_within(places, [(p.name, need)]) for p in places)


def test_runs_spread_before_they_share_and_the_largest_goes_first():
    cards = [Place("a", 24 * GB), Place("b", 24 * GB)]
    found = assign({"s": Need(4 * GB), "m": Need(8 * GB), "l": Need(20 * GB)}, cards, ())
    assert found == {"l": "a", "m": "b", "s": "b"}


def test_a_run_on_a_place_that_is_gone_takes_nothing():
    assert assign({"r": Need(5)}, [Place("a", 5)], [("gone", Need(5))]) == {"r": "a"}
    assert assign({"r": Need(5)}, [Place("a", 5)], [("a", Need(1))]) == {}
