"""Choices follow from hashes of names; a group of images is never divided."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomaly_lit.data.layouts.base import Listing
from anomaly_lit.data.splits import Draw, draw_seen, split_category
from anomaly_lit.types import Sample, UserError

ROOT = Path("data")


def images(count: int, groups: list[str] | None = None) -> list[Sample]:
    paths = [str(ROOT / "bolt" / f"{i:03d}.png") for i in range(count)]
    names = groups or [""] * count
    return [
        Sample(path, "bolt", "good", False, group=name)
        for path, name in zip(paths, names, strict=True)
    ]


def first_by_hash(samples: list[Sample], count: int, seed: int, purpose: str) -> list[Sample]:
    """The definition of a draw without groups: the first `count` in the order of their hashes."""

    def rank(sample: Sample) -> str:
        name = Path(sample.path).relative_to(ROOT).as_posix()
        return hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).hexdigest()

    chosen = sorted(samples, key=rank)[:count]
    return [sample for sample in samples if sample in chosen]


@given(st.integers(0, 40), st.integers(0, 45), st.integers(0, 9), st.sampled_from(["a", "b"]))
def test_without_groups_the_first_by_hash_are_drawn(
    total: int, count: int, seed: int, purpose: str
) -> None:
    samples = images(total)
    chosen, others = Draw(seed, ROOT)(samples, count, purpose)
    assert chosen == first_by_hash(samples, count, seed, purpose)
    assert others == [sample for sample in samples if sample not in chosen]


def test_a_draw_is_that_of_earlier_versions() -> None:
    splits = split_category(Listing(images(12), []), Draw(0, ROOT), 0.25, 4)
    names = [[int(Path(s.path).stem) for s in part] for part in (splits.holdout, splits.train)]
    assert names == [[1, 7, 8], [0, 6, 9, 10]]


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=40), st.floats(0, 0.99),
       st.integers(1, 9) | st.none(), st.integers(0, 5))  # fmt: skip
def test_a_group_stays_on_one_side(
    groups: list[str], holdout: float, shots: int | None, seed: int
) -> None:
    listing = Listing(images(len(groups), groups), [])
    most = len(split_category(listing, Draw(seed, ROOT), holdout, None)[0])
    if shots is not None and shots > most:
        with pytest.raises(UserError, match=r"dataset\.shots="):
            split_category(listing, Draw(seed, ROOT), holdout, shots)
        return
    train, held, _ = split_category(listing, Draw(seed, ROOT), holdout, shots)
    sides = [{sample.group for sample in part} for part in (train, held)]
    assert not sides[0] & sides[1]
    assert train
    assert bool(held) == (holdout > 0 and len(set(groups)) > 1)
    for part, side in zip((train, held), sides, strict=True):
        assert len(part) == sum(group in side for group in groups)


def test_as_many_whole_groups_as_fit_are_drawn() -> None:
    samples = images(12, [*"aaaa", *"bbbb", *"cccc"])
    for count, drawn in ((0, 0), (1, 4), (4, 4), (7, 4), (8, 8), (11, 8), (12, 12)):
        assert len(Draw(0, ROOT)(samples, count, "holdout")[0]) == drawn


def test_the_smallest_group_is_drawn_where_none_fits() -> None:
    samples = images(12, [*"aaaaaaaaa", *"bbb"])
    for seed in range(5):
        assert {s.group for s in Draw(seed, ROOT)(samples, 1, "holdout")[0]} == {"b"}


def test_a_share_is_kept_for_testing_before_any_is_held_out() -> None:
    samples, test = images(20), [Sample("data/x.png", "bolt", "scratch", True)]
    splits = split_category(Listing(samples, test), Draw(0, ROOT), 0.25, None, test_share=0.2)
    assert [len(part) for part in splits] == [12, 4, 5]
    assert splits.test[-1] == test[0]
    assert {*splits.train, *splits.holdout, *splits.test[:-1]} == {*samples}


@pytest.mark.parametrize("root", [ROOT, Path("elsewhere")])
def test_names_are_relative_to_the_root(root: Path) -> None:
    def at(root: Path) -> list[Sample]:
        return [sample._replace(path=str(root / f"{i}.png")) for i, sample in enumerate(images(9))]

    chosen, _ = Draw(1, root)(at(root), 3, "shots")
    assert [Path(s.path).name for s in chosen] == [
        Path(s.path).name for s in Draw(1, ROOT)(at(ROOT), 3, "shots")[0]
    ]


def defects(kinds: str, groups: list[str] | None = None) -> list[Sample]:
    """Test images: a letter for the kind of defect, a dot for a normal image."""
    return [
        sample._replace(label=kind != ".", defect_type=kind)
        for sample, kind in zip(images(len(kinds), groups), kinds, strict=True)
    ]


@given(st.text("ab.", max_size=30), st.integers(0, 6), st.integers(0, 5))
def test_seen_defects_are_the_first_by_hash_of_each_type(kinds: str, count: int, seed: int) -> None:
    test, found = defects(kinds), set(kinds) - {"."}
    if count and (not found or any(kinds.count(kind) < count for kind in found)):
        with pytest.raises(UserError, match=rf"dataset\.seen={count} draws"):
            draw_seen(test, Draw(seed, ROOT), count)
        return
    seen, rest = draw_seen(test, Draw(seed, ROOT), count)
    for kind in found:
        own = [sample for sample in test if sample.defect_type == kind]
        drawn = [sample for sample in seen if sample.defect_type == kind]
        assert drawn == first_by_hash(own, count, seed, "seen")
    assert len(seen) == count * len(found)
    assert rest == [sample for sample in test if sample not in seen]


def test_what_is_of_a_group_with_a_seen_defect_is_not_tested() -> None:
    """An item that was photographed twice, once with the defect in view."""
    test = defects("aab..", ["one", "two", "three", "one", "four"])
    for seed in range(5):
        seen, rest = draw_seen(test, Draw(seed, ROOT), 1)
        assert len(seen) == 2
        assert not {s.group for s in seen} & {s.group for s in rest}
        assert any(not s.label for s in rest)
