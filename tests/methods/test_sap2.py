"""SAP2's attention against plain loops, neighbours, losses, scores, and a run without maps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from anomaly_lit.methods.sap2 import AdaptiveProjection, angle, mean_cosine, nearest_by_angle
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


@pytest.fixture
def trained(small_method: Build, fit: Build, make_batch: Build) -> Build:
    """Builds ``trained(**changes)``, trained for a step on six images, which it gives as well."""

    def build(**changes: Any) -> tuple[Any, Any]:
        method, batch = small_method("sap2", **changes), make_batch(6)
        fit(method, batch, 1)
        return method.eval(), batch

    return build


def pooled(method: Any, batch: Any) -> Any:
    return method.backbone(batch["image"])[-1].mean(dim=(2, 3))


# ------------------------------------------------------------------------------------- the head


@torch.no_grad()
def test_the_head_is_the_formula() -> None:
    torch.manual_seed(0)
    head, z, near = AdaptiveProjection(5), torch.randn(3, 5), torch.randn(3, 4, 5)
    found, expected = head(z, near)
    v, q, k = (part.weight.T for part in (head.value, head.query, head.key))
    for n in range(3):
        torch.testing.assert_close(found[n], z[n] @ v)
        rows = [neighbour @ v for neighbour in near[n]]
        mixed = torch.zeros(5)
        for row in rows:
            weights = [math.exp(float((row @ q) @ (other @ k)) / math.sqrt(5)) for other in rows]
            read = sum(w * other for w, other in zip(weights, rows, strict=True)) / sum(weights)
            mixed += (read + row) / 4
        torch.testing.assert_close(expected[n], mixed, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_without_projection_and_attention_the_mean_is_expected_twice() -> None:
    head, z, near = AdaptiveProjection(5), torch.randn(3, 5), torch.randn(3, 4, 5)
    head.value.weight.copy_(torch.eye(5))
    head.query.weight.zero_()
    head.key.weight.zero_()
    found, expected = head(z, near)
    torch.testing.assert_close(expected, 2 * near.mean(dim=1))
    torch.testing.assert_close(
        angle(found, expected), 1 - F.cosine_similarity(near.mean(dim=1), z, dim=1)
    )


@torch.no_grad()
def test_neighbours_have_no_order() -> None:
    head, z, near = AdaptiveProjection(5), torch.randn(3, 5), torch.randn(3, 4, 5)
    torch.testing.assert_close(head(z, near)[1], head(z, near[:, [2, 0, 3, 1]])[1])


def test_parameters_of_the_paper(published_method: Build) -> None:
    method = published_method("sap2", 224)
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == 3 * 2048**2
    assert sum(p.numel() for p in method.backbone.parameters()) / 1e6 == pytest.approx(
        58.1, abs=0.2
    )
    assert method.neighbours == 32
    assert not method.localises


# ----------------------------------------------------------------------------------- neighbours


def test_nearest_by_angle_equals_a_sort_of_all() -> None:
    queries, items = torch.randn(7, 5), 3 * torch.randn(40, 5)
    cosines = F.cosine_similarity(queries[:, None], items, dim=2)
    assert torch.equal(
        nearest_by_angle(queries, items, 6), cosines.argsort(1, descending=True)[:, :6]
    )


@torch.no_grad()
def test_an_image_is_left_out_by_its_number_in_training_alone(
    trained: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch = trained(neighbours=2)
    z = pooled(method, batch)
    torch.testing.assert_close(method.images.items, z)
    torch.testing.assert_close(method.near(z)[:, 0], z)  # itself is the nearest
    others = method.near(z, batch["index"])
    for n in range(6):
        rest = [m for m in range(6) if m != n]
        rest.sort(key=lambda m: -float(F.cosine_similarity(z[n], z[m], dim=0)))
        torch.testing.assert_close(others[n], z[rest[:2]])
    asked: list[Any] = []
    near = method.near
    monkeypatch.setattr(method, "near", lambda z, own: asked.append(own) or near(z, own))
    method.train().losses(batch)
    method.eval().losses(batch)
    assert torch.equal(asked[0], batch["index"])
    assert asked[1] is None


@torch.no_grad()
def test_a_duplicate_stays_a_neighbour(trained: Build) -> None:
    method, batch = trained(neighbours=2)
    z = pooled(method, batch)
    method.images.fill(torch.cat([z, z[:1]]))  # image 6 is image 0 again
    for number in (0, 6):
        near = method.near(z[:1], torch.tensor([number]))
        torch.testing.assert_close(near[0, 0], z[0])
        assert not torch.allclose(near[0, 1], z[0])


def test_row_n_of_the_bank_is_training_image_n(
    small_method: Build, make_batch: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch = small_method("sap2", neighbours=2), make_batch(6)
    order = [4, 0, 5, 2, 1, 3]
    parts = [
        {key: value[rows] for key, value in batch.items() if isinstance(value, torch.Tensor)}
        for rows in (order[:4], order[4:])
    ]
    monkeypatch.setattr(method, "normal_batches", lambda split, most: parts)
    with torch.no_grad():
        method.eval().learn()
        torch.testing.assert_close(method.images.items, pooled(method, batch), atol=1e-5, rtol=1e-4)


def test_fewer_images_than_neighbours_are_told_and_one_is_refused(
    small_method: Build, fit: Build, make_batch: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(small_method("sap2", neighbours=9), make_batch(4), 1)
    assert "there are 4 training images, so each is compared with 3" in capsys.readouterr().out
    for method, count in ((small_method("sap2"), 0), (small_method("sap2"), 1)):
        with pytest.raises(UserError, match=f"at least two training images and knows {count}"):
            fit(method, make_batch(1), 1) if count else method(make_batch(1)["image"])


# -------------------------------------------------------------------------------- loss and score


def test_the_loss_is_the_formula(trained: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = trained(constraint_weight=3.0)
    told: dict[str, Any] = {}
    monkeypatch.setattr(method, "report", told.update)
    z = pooled(method, batch)
    found, expected = (part.detach() for part in method.head(z, method.near(z)))
    losses = {name: value.detach() for name, value in method.losses(batch).items()}
    similar, near = 0.0, 0.0
    for n in range(6):
        similar += float(1 - F.cosine_similarity(expected[n], found[n], dim=0)) / 6
        near += float(1 - F.cosine_similarity(z[n], found[n], dim=0)) / 6
    assert float(losses["similarity"]) == pytest.approx(similar, rel=1e-4)
    constraint = float((z - found).square().mean()) + near
    assert float(losses["constraint"]) == pytest.approx(3 * constraint, rel=1e-4)
    pairs = [
        float(F.cosine_similarity(found[i], found[j], dim=0))
        for i in range(6) for j in range(6) if i != j
    ]  # fmt: skip
    assert float(told["cosine_between_images"]) == pytest.approx(sum(pairs) / 30, abs=1e-4)
    assert float(mean_cosine(torch.ones(1, 3))) == pytest.approx(0, abs=1e-6)


def test_the_constraint_keeps_images_apart(small_method: Build, make_batch: Build) -> None:
    """Without it all are mapped to one direction, more than their features already are."""
    torch.manual_seed(0)
    maps = 1 + torch.rand(6, 512, 1, 1)
    given, apart = maps.flatten(1), {}
    batch = {**make_batch(6), "features": {"backbone": [maps]}}
    for weight in (0.0, 2.0):
        method = small_method("sap2", constraint_weight=weight).train()
        method.images.fill(given)
        optimizer = torch.optim.Adam(method.head.parameters(), lr=1e-3)
        for _ in range(60):
            optimizer.zero_grad()
            torch.stack(list(method.losses(batch).values())).sum().backward()
            optimizer.step()
        with torch.no_grad():
            projected = method.head.value(given)
        apart[weight] = float((1 - mean_cosine(projected)) / (1 - mean_cosine(given)))
    assert apart[0.0] < 0.3
    assert apart[2.0] > 3 * apart[0.0]


@torch.no_grad()
def test_scores_with_and_without_the_head(trained: Build, make_batch: Build) -> None:
    method, batch = trained()
    image = make_batch(3)["image"]
    z = pooled(method, {"image": image})
    found, expected = method.head(z, method.near(z))
    given = method(image)
    assert given.anomaly_map is None
    torch.testing.assert_close(given.score, 1 - F.cosine_similarity(found, expected, dim=1))
    method.score = "raw"
    cosines = F.cosine_similarity(z[:, None], pooled(method, batch), dim=2)
    torch.testing.assert_close(method(image).score, 1 - cosines.topk(2).values.mean(dim=1))


@torch.no_grad()
def test_a_map_compares_positions_and_leaves_the_score(trained: Build, make_batch: Build) -> None:
    method, batch = trained(maps=True, map_neighbours=2, coreset_share=0.5, smoothing=0.0)
    assert method.localises
    image = make_batch(3)["image"]
    last = method.backbone(image)[-1]
    rows, columns = last.shape[2:]
    normal = method.backbone(batch["image"])[-1].flatten(2).transpose(1, 2).flatten(0, 1)
    bank = method.positions.items
    assert len(bank) == len(normal) // 2
    assert (torch.cdist(bank, normal).amin(dim=1) < 1e-3).all()
    found = method(image)
    expected = torch.zeros(3, 1, rows, columns)
    for b in range(3):
        for row in range(rows):
            for column in range(columns):
                z = last[b, :, row, column]
                order = F.cosine_similarity(z, bank, dim=1).argsort(descending=True)[:2]
                one, other = method.head(z[None], bank[order][None])
                expected[b, 0, row, column] = 1 - F.cosine_similarity(one[0], other[0], dim=0)
    expected = F.interpolate(expected, (64, 64), mode="bilinear", align_corners=True)
    torch.testing.assert_close(found.anomaly_map, expected, atol=1e-5, rtol=1e-4)
    method.localises = False
    torch.testing.assert_close(method(image).score, found.score)


def test_values_out_of_range_are_named(small_method: Build) -> None:
    wrong = {
        "neighbours": 0, "constraint_weight": -1.0, "score": "own", "map_neighbours": 0,
        "coreset_share": 0.0, "smoothing": -1.0,
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(UserError, match=rf"method\.{name}={value}"):
            small_method("sap2", **{name: value})


# ------------------------------------------------------------------------------------ a whole run


def test_a_run_that_scores_images_only(run_here: Build, mvtec_folder: Path, tmp_path: Path) -> None:
    run, root = tmp_path / "run", f"dataset.root={mvtec_folder}"
    ended = run_here(
        "train", "method=sap2_small", "method.backbone.weights=random", "dataset=mvtec_ad", root,
        "dataset.categories=[bolt]", "dataset.masks=none", "dataset.batch_size=2",
        "image_size=64", "trainer=cpu", "trainer.precision=32-true", "trainer.max_steps=2",
        "trainer.val_check_interval=2", "logger=none", f"output_dir={run}",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 <= metrics["test/image_auroc"] <= 1
    assert not any("pixel" in key or "segmentation" in key for key in metrics if key[:5] == "test/")
    checkpoint = f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    raw = tmp_path / "raw"
    ended = run_here("test", checkpoint, "+method.score=raw", f"output_dir={raw}")
    assert ended.code == 0, ended.err
    found = tmp_path / "found"
    images = f"input={mvtec_folder / 'bolt' / 'test' / 'scratch'}"
    ended = run_here("predict", checkpoint, images, f"output_dir={found}")
    assert ended.code == 0, ended.err
    assert len((found / "predictions.csv").read_text().splitlines()) == 3
