"""Slices by gcloud's names: how many chips, laid out how, linked how; and the devices that libtpu makes of them."""

import pytest

from derta_jax.errors import UserError
from derta_jax.planning.slices import GENERATIONS, SLICES, find_slice, find_slices


@pytest.mark.parametrize(
    ("name", "chips", "layout"),
    [
        ("v5e-1", 1, "1x1"),
        ("v5e-16", 16, "4x4"),
        ("v5e-256", 256, "16x16"),
        ("v6e-8", 8, "2x4"),
        # v4 and v5p count cores, two a chip
        ("v4-8", 4, "2x2x1"),
        ("v5p-8", 4, "2x2x1"),
        ("v5p-128", 64, "4x4x4"),
        ("v5p-1024", 512, "8x8x8"),
    ],
)
def test_a_name_stands_for_chips_in_a_layout(name, chips, layout):
    place = find_slice(name)
    assert (place.name, place.chips, place.layout, place.count) == (name, chips, layout, 1)
    assert place.generation is GENERATIONS[name.partition("-")[0]]


def test_every_slice_is_found_by_its_own_name():
    assert all(find_slice(name) == place and place.name == name for name, place in SLICES.items())
    assert len({(place.family, place.layout) for place in SLICES.values()}) == len(SLICES)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("V5E-16", "v5e-16"),
        ("v5P-8", "v5p-8"),
        ("v5litepod-16", "v5e-16"),
        ("V5LitePod-256", "v5e-256"),
        ("2xv5litepod-16", "2xv5e-16"),
        ("2xV5E-16", "2xv5e-16"),
        ("2XV5E-16", "2xv5e-16"),
    ],
)
def test_gclouds_other_name_and_capitals_are_the_same_slice(name, known):
    assert find_slice(name) == find_slice(known)
    assert find_slice(name).name == known


def test_slices_joined_by_the_network_have_the_chips_of_all():
    place = find_slice("2xv5e-16")
    assert (place.name, place.count, place.layout, place.chips) == ("2xv5e-16", 2, "4x4", 32)
    assert place.link_bytes == find_slice("v5e-16").link_bytes


def test_several_names_have_commas_between_them():
    assert [place.name for place in find_slices("v5e-16, 4xv5p-8,v4-8,")] == ["v5e-16", "4xv5p-8", "v4-8"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("v5p128", "v5p-128"), ("2xv5p128", "v5p-128"), ("v6e-26", "v6e-32"), ("v5e-025", "v5e-32"), ("4xv4-9", "v4-8")],
)
def test_a_misspelt_name_is_told_the_nearest_one(name, nearest):
    with pytest.raises(UserError, match=f"no slice '{name}'; did you mean '{nearest}'\\?"):
        find_slice(name)


def test_a_number_that_a_family_does_not_have_lists_those_that_it_has():
    with pytest.raises(UserError) as error:
        find_slice("v5e-3")
    assert "v5e-1, v5e-4, v5e-8, v5e-16, v5e-32, v5e-64, v5e-128, v5e-256" in str(error.value)
    assert "v5p" not in str(error.value)


@pytest.mark.parametrize("name", ["0xv5e-16", "xv5e-16", "v5e-16x2", "v5e-", "v5e-²", "v5litepod", ""])
def test_what_is_no_name_is_a_users_mistake(name):
    with pytest.raises(UserError, match="no slice"):
        find_slice(name)


@pytest.mark.parametrize("names", ["", " ", ",", " , ,"])
def test_a_list_without_a_name_is_a_users_mistake(names):
    with pytest.raises(UserError, match=f"no slice in '{names}': name one"):
        find_slices(names)


@pytest.mark.parametrize(
    ("name", "links"),
    [
        ("v5e-1", 0),
        ("v5e-4", 2),
        ("v5e-16", 2),
        ("v5e-64", 2),
        ("v5e-128", 3),  # 8x16: the side of 16 is a ring
        ("v5e-256", 4),
        ("v4-8", 2),
        ("v5p-16", 3),
        ("v5p-64", 3),  # 2x4x4 is open on all sides
        ("v5p-128", 6),  # 4x4x4 is a torus
        ("v5p-1024", 6),
    ],
)
def test_a_chip_sends_over_one_link_of_an_open_side_and_two_of_a_ring(name, links):
    place = find_slice(name)
    assert place.link_bytes == links * place.generation.link_bytes


@pytest.mark.parametrize("name", ["v5e-1", "v5e-16", "v4-8", "v5p-128", "v6e-8"])
def test_libtpu_knows_the_chips_of_a_slice_that_is_not_there(name, libtpu):
    place = find_slice(name)
    devices = place.devices()
    assert len(devices) == place.chips
    assert {device.platform for device in devices} == {"tpu"}
    assert len({tuple(device.coords) for device in devices}) == place.chips
    corner = [max(device.coords[axis] for device in devices) for axis in range(len(place.sides))]
    assert corner == [side - 1 for side in place.sides]


def test_two_slices_are_told_apart_by_their_index(libtpu):
    devices = find_slice("2xv5e-4").devices()
    assert [device.slice_index for device in devices].count(0) == 4
    assert [device.slice_index for device in devices].count(1) == 4
    assert len(devices) == 8


@pytest.mark.parametrize("family", sorted(GENERATIONS))
def test_every_layout_in_the_table_is_one_that_libtpu_makes(family, libtpu):
    places = [place for place in SLICES.values() if place.family == family and place.chips <= 64]
    assert [len(place.devices()) for place in places] == [place.chips for place in places]


def test_without_libtpu_the_user_is_told_what_to_install(monkeypatch):
    from jax.experimental import topologies

    def absent(*args, **kwargs):
        raise RuntimeError("no libtpu")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    with pytest.raises(UserError, match=r"pip install 'derta-jax\[tpu\]' \(no libtpu\)"):
        find_slice("v5e-4").devices()
