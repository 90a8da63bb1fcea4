"""The bank against brute force, and k-means against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from anomaly_lit.nn import bank as module
from anomaly_lit.nn.bank import (
    Bank,
    Reservoir,
    coreset,
    kmeans,
    nearest_rows,
    random_projection,
)
from anomaly_lit.types import UserError


def vectors(count: int, dim: int = 5, seed: int = 0, offset: float = 0.0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + offset


def brute_force(queries: Tensor, items: Tensor, count: int) -> tuple[Tensor, Tensor]:
    gaps = (queries.double()[:, None] - items.double()).norm(dim=2)
    found = gaps.sort(dim=1, stable=True)
    return found.values[:, :count], found.indices[:, :count]


@pytest.mark.parametrize("block", [2**24, 2**12, 2**10])  # one block; blocks of items and queries
@pytest.mark.parametrize("count", [1, 3])
def test_nearest_equals_brute_force(
    block: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    bank, queries = Bank(5), vectors(37, seed=1)
    bank.fill(vectors(50))
    distances, rows = bank.nearest(queries, count)
    expected, where = brute_force(queries, bank.items, count)
    assert torch.equal(rows, where)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    queries=st.integers(1, 12), items=st.integers(1, 12), block=st.sampled_from([1, 2**11, 2**24])
)
def test_nearest_of_any_numbers_of_vectors(queries: int, items: int, block: int) -> None:
    asked, kept = vectors(queries, seed=2), vectors(items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        rows = nearest_rows(asked, kept, items)
    assert torch.equal(rows, brute_force(asked, kept, items)[1])


def test_distances_of_vectors_far_from_the_origin_are_exact() -> None:
    """A difference of large squares would leave no digit of them."""
    bank = Bank(5)
    bank.fill(vectors(20, offset=1000.0))
    distances, rows = bank.nearest(bank.items[:4] + 0.01)
    assert rows[:, 0].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(distances[:, 0], torch.full((4,), 0.01 * 5**0.5), rtol=5e-3, atol=0)


def test_distances_are_in_float32_under_autocast() -> None:
    bank, queries = Bank(5), vectors(10, seed=3)
    bank.fill(vectors(30))
    expected = bank.nearest(queries, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = bank.nearest(queries, 2)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_memory_is_bounded_whatever_the_number_of_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    partial = module.partial_distances

    def watched(queries: Tensor, items: Tensor) -> Tensor:
        sizes.append(len(queries) * len(items))
        return partial(queries, items)

    monkeypatch.setattr(module, "partial_distances", watched)
    monkeypatch.setattr(module, "BLOCK", 2**14)
    nearest_rows(vectors(3000, 2), vectors(5000, 2, seed=1))
    assert max(sizes) <= 2**14
    assert len(sizes) < 1100  # 15 million distances


def test_a_bank_keeps_any_length_in_a_state_dict() -> None:
    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank = Bank(5)
            self.maps = Bank(2, 3, 4)

    first, second = Method(), Method()
    first.bank.fill(vectors(7))
    first.maps.fill(torch.rand(2, 2, 3, 4))
    second.bank.fill(vectors(3))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.bank.items, first.bank.items)
    assert torch.equal(second.maps.items, first.maps.items)
    second.load_state_dict(Method().state_dict())
    assert len(second.bank) == len(second.maps) == 0
    assert first.double().bank.items.dtype == torch.float64


def test_more_neighbours_than_vectors_are_refused() -> None:
    with pytest.raises(UserError, match="2 nearest neighbours requested, but only 0"):
        Bank(5).nearest(vectors(1), 2)


# -------------------------------------------------------------------------------------- coreset


def slow_coreset(items: Tensor, count: int) -> list[int]:
    chosen = [0]
    while len(chosen) < count:
        gaps = torch.stack([(items - items[row]).norm(dim=1) for row in chosen]).amin(dim=0)
        gaps[chosen] = -1
        chosen.append(int(gaps.argmax()))
    return chosen


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_coreset_takes_the_farthest_each_time(offset: float) -> None:
    items = vectors(60, offset=offset)
    found = coreset(items, 15)
    assert found.tolist() == slow_coreset(items.double(), 15)


def test_coreset_of_repeated_vectors_repeats_no_row() -> None:
    found = coreset(torch.ones(6, 3), 6)
    assert sorted(found.tolist()) == list(range(6))
    assert coreset(vectors(4), 9).shape == (4,)


def test_coreset_covers_within_twice_the_best_radius() -> None:
    corners = torch.tensor([[0.0, 0], [0, 9], [9, 0], [9, 9]])
    items = torch.cat([corner + 0.1 * vectors(20, 2, seed=n) for n, corner in enumerate(corners)])
    found = items[coreset(items, 4)]
    assert brute_force(items, found, 1)[0].max() < 1.0


def test_projection_keeps_distances_roughly() -> None:
    items = vectors(30, 4000)
    found = random_projection(items, 500, torch.Generator().manual_seed(0))
    assert found.shape == (30, 500)
    ratio = torch.pdist(found) / torch.pdist(items)
    assert ratio.min() > 0.85
    assert ratio.max() < 1.15
    assert random_projection(items, 5000, torch.Generator()) is items


# -------------------------------------------------------------------------------------- k-means


def spread(items: Tensor, centres: Tensor) -> float:
    return float(brute_force(items, centres, 1)[0].square().sum())


def test_kmeans_is_as_good_as_scikit_learn_s() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    items = torch.cat([vectors(60, seed=n) + 6 * vectors(1, seed=n + 9) for n in range(4)])
    found = kmeans(items, 4, torch.Generator().manual_seed(0), tolerance=0.0)
    reference = cluster.KMeans(4, n_init=10, random_state=0).fit(items.numpy())
    assert spread(items, found) == pytest.approx(reference.inertia_, rel=1e-4)
    order, other = np.argsort(found[:, 0].numpy()), np.argsort(reference.cluster_centers_[:, 0])
    np.testing.assert_allclose(found[order], reference.cluster_centers_[other], atol=1e-3)


def test_centres_are_the_means_of_what_is_nearest() -> None:
    items = vectors(80)
    centres = kmeans(items, 6, torch.Generator().manual_seed(1), tolerance=0.0)
    nearest = brute_force(items, centres, 1)[1][:, 0]
    for number in range(6):
        torch.testing.assert_close(centres[number], items[nearest == number].mean(dim=0))


def test_kmeans_depends_on_its_generator_alone() -> None:
    items = vectors(50)
    first, second = (kmeans(items, 5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_kmeans_of_repeated_vectors_gives_finite_centres() -> None:
    found = kmeans(torch.ones(10, 3), 4, torch.Generator().manual_seed(0))
    assert torch.equal(found, torch.ones(4, 3))


def test_more_clusters_than_vectors_are_refused() -> None:
    with pytest.raises(UserError, match="5 clusters requested from 3 vectors"):
        kmeans(vectors(3), 5, torch.Generator())


# ------------------------------------------------------------------------------------ reservoir


@pytest.mark.parametrize("parts", [1, 3, 60])
def test_reservoir_keeps_so_many_vectors_in_their_order(parts: int) -> None:
    """None twice, and all of a short stream."""
    items = torch.arange(60.0)[:, None]
    for most in (1, 7, 59, 60, 100):
        reservoir = Reservoir(most, torch.Generator().manual_seed(0))
        for part in items.chunk(parts):
            reservoir.add(part)
        found = reservoir.drawn()[:, 0]
        assert len(found) == min(most, 60)
        assert (found.diff() > 0).all()


def test_reservoir_draws_every_vector_with_the_same_chance() -> None:
    counts, generator = torch.zeros(20), torch.Generator().manual_seed(0)
    for _ in range(2000):
        reservoir = Reservoir(5, generator)
        for part in torch.arange(20)[:, None].split(3):
            reservoir.add(part)
        counts[reservoir.drawn()[:, 0]] += 1
    assert (counts - 500).abs().max() < 4 * (2000 * 0.25 * 0.75) ** 0.5


def test_reservoir_holds_at_most_twice_what_it_draws() -> None:
    reservoir = Reservoir(10, torch.Generator().manual_seed(0))
    for part in vectors(500).split(5):
        reservoir.add(part)
        assert sum(len(items) for _, items in reservoir._held) <= 20


def test_empty_stream_is_named() -> None:
    with pytest.raises(UserError, match="no normal images to learn from"):
        Reservoir(3, torch.Generator()).drawn()


def test_bank_of_whole_numbers_keeps_its_kind() -> None:
    bank, other = Bank(dtype=torch.long), Bank(dtype=torch.long)
    bank.fill(torch.tensor([3, 1, 2]))
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.items, torch.tensor([3, 1, 2]))


def test_coreset_says_its_size_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    coreset(vectors(2000), 20, title="patches")
    shown = " ".join(capsys.readouterr().err.split())
    assert not shown or "20 of 2,000" in shown  # nothing is shown where nobody looks
    assert module.coreset_bytes(2000, 5) == 2000 * (20 + 16)
