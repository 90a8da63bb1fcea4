from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    jaccard_score,
    precision_score,
    recall_score,
    roc_auc_score,
)
from torch import Tensor
from torch.utils.data import DataLoader

from anomaly_lit.calibration import limits_of, pixel_threshold, promise, threshold_at, verdict
from anomaly_lit.callbacks import Evaluation
from anomaly_lit.callbacks.evaluation import mean_over_categories
from anomaly_lit.callbacks.records import NormalMaps
from anomaly_lit.types import Prediction, UserError


class Oracle(pl.LightningModule):
    """Predicts the batch's own maps; a score is the map's maximum, times a thousand."""

    def forward(self, batch: Any) -> Prediction:
        return Prediction(batch["map"], 1000 * batch["map"].amax(dim=(1, 2, 3)))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Prediction:
        return self(batch)

    def test_step(self, batch: Any, batch_idx: int) -> Prediction:
        return self(batch)


def make_batch(labels: list[bool], category: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    count = len(labels)
    gt_mask = torch.zeros(count, 1, 16, 16, dtype=torch.bool)
    gt_mask[torch.tensor(labels, dtype=torch.bool), :, 4:9, 5:12] = True
    noise = torch.rand(count, 1, 16, 16, generator=generator)
    return {
        "image": torch.zeros(count, 3, 16, 16),
        "map": noise + 0.4 * gt_mask,
        "gt_mask": gt_mask,
        "label": torch.tensor(labels, dtype=torch.bool),
        "category": [category] * count,
        "defect_type": ["scratch" if label else "good" for label in labels],
        "path": [f"{category}/{seed}/{number}.png" for number in range(count)],
    }


def loader(*batches: dict[str, Any]) -> DataLoader[Any]:
    return DataLoader(list(batches), batch_size=None)


def trainer_of(evaluation: Evaluation) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[evaluation],
    )


def held_out(category: str = "bolt", count: int = 20, seed: int = 90) -> dict[str, Any]:
    return make_batch([False] * count, category, seed)


def evaluate(*batches: dict[str, Any], calibrate: bool = True, **arguments: Any) -> Evaluation:
    evaluation = Evaluation(**arguments)
    trainer = trainer_of(evaluation)
    if calibrate:
        trainer.validate(Oracle(), loader(held_out(), held_out("cloth", 9, 91)), verbose=False)
    trainer.test(Oracle(), loader(*batches), verbose=False)
    return evaluation


MIXED = [True, False, True, False, True]


def test_metrics_of_raw_scores_equal_scikit_learn_s_per_category_and_mean() -> None:
    batches = [make_batch(MIXED, "bolt", 1), make_batch(MIXED, "cloth", 2)]
    batches.append(make_batch(MIXED, "bolt", 3))
    evaluation = evaluate(*batches)
    auroc = []
    for category in ("bolt", "cloth"):
        own = [batch for batch in batches if batch["category"][0] == category]
        labels = torch.cat([b["label"] for b in own]).numpy()
        scores = torch.cat([b["map"].amax(dim=(1, 2, 3)) for b in own]).numpy()
        maps = torch.cat([b["map"].flatten() for b in own]).numpy()
        masks = torch.cat([b["gt_mask"].flatten() for b in own]).numpy()
        expected = {
            "image_auroc": roc_auc_score(labels, scores),
            "image_ap": average_precision_score(labels, scores),
            "pixel_auroc": roc_auc_score(masks, maps),
            "pixel_ap": average_precision_score(masks, maps),
        }
        for key, value in expected.items():
            assert evaluation.results[f"{category}/{key}"] == pytest.approx(value, abs=1e-5)
        auroc.append(expected["image_auroc"])
    assert evaluation.results["image_auroc"] == pytest.approx(np.mean(auroc), abs=1e-6)


def test_scores_far_outside_zero_and_one_are_ranked_as_they_are() -> None:
    batch = make_batch(MIXED, "bolt", 1)
    shifted = {**batch, "map": batch["map"] * 1e-3 + 500}
    one, other = evaluate(batch), evaluate(shifted)
    assert other.results["image_auroc"] == pytest.approx(one.results["image_auroc"], abs=1e-6)


def test_metrics_are_logged_by_category() -> None:
    evaluation = Evaluation()
    trainer = trainer_of(evaluation)
    trainer.test(Oracle(), loader(make_batch(MIXED, "bolt", 1)), verbose=False)
    logged = trainer.callback_metrics
    assert float(logged["test/bolt/image_auroc"]) == pytest.approx(
        evaluation.results["bolt/image_auroc"]
    )
    assert "test/image_auroc" in logged


def test_a_second_test_forgets_the_first() -> None:
    evaluation = Evaluation()
    trainer = trainer_of(evaluation)
    for seed in (1, 1):
        trainer.test(Oracle(), loader(make_batch(MIXED, "bolt", seed)), verbose=False)
    assert len(evaluation.rows) == 5


# -------------------------------------------------------------------------------- undefined


def test_metrics_without_anomalous_images_are_undefined() -> None:
    evaluation = evaluate(make_batch([False, False], "bolt", 1))
    for key in ("image_auroc", "image_ap", "pixel_auroc", "pixel_aupro"):
        assert math.isnan(evaluation.results[key])
    assert 0 <= evaluation.results["false_positive_rate"] <= 1
    assert math.isnan(evaluation.results["true_positive_rate"])


def test_mean_leaves_out_categories_in_which_a_metric_is_undefined() -> None:
    evaluation = evaluate(make_batch(MIXED, "bolt", 1), make_batch([False], "cloth", 2))
    assert math.isnan(evaluation.results["cloth/image_auroc"])
    assert evaluation.results["image_auroc"] == evaluation.results["bolt/image_auroc"]


def test_means_leave_out_what_belongs_to_one_category() -> None:
    values = {"image_auroc": 0.5, "image_auroc_low": 0.1, "image_f1max_threshold": 3.0}
    assert mean_over_categories({"a": values}) == values
    assert mean_over_categories({"a": values, "b": values}) == {"image_auroc": 0.5}


# -------------------------------------------------------------------------------- thresholds


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60),
    st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.5]),
)
def test_threshold_lets_at_most_the_stated_share_of_held_out_images_pass(
    scores: list[float], fpr: float
) -> None:
    threshold, rule = threshold_at(torch.tensor(scores), fpr)
    assert sum(score > threshold for score in scores) <= fpr * len(scores) + 1e-9
    below = [score for score in scores if score < threshold]
    if rule == "quantile" and below:  # no smaller score would do
        assert sum(score > max(below) for score in scores) > fpr * len(scores) - 1e-9


def test_threshold_of_enough_scores_is_one_of_them() -> None:
    scores = torch.arange(100.0)
    assert threshold_at(scores, 0.01) == (98, "quantile")
    assert threshold_at(scores, 0.1) == (89, "quantile")
    assert threshold_at(scores[:10], 0.1) == (8, "quantile")


def test_one_score_is_its_own_threshold() -> None:
    assert threshold_at(torch.tensor([3.0]), 0.01) == (3.0, "maximum")


@pytest.mark.parametrize("count", [3, 10, 40])
def test_few_scores_are_extrapolated_to_the_stated_rate(count: int) -> None:
    fpr, trials = 0.02, 3000
    generator = torch.Generator().manual_seed(count)
    draws = torch.randn(trials, count + 1, generator=generator) * 3 + 7
    exceeded = 0
    for draw in draws:
        threshold, rule = threshold_at(draw[:-1], fpr)
        assert rule == "prediction limit"
        assert threshold >= draw[:-1].max()
        exceeded += int(draw[-1] > threshold)
    assert exceeded / trials == pytest.approx(fpr, abs=0.008)


def test_calibration_is_per_category_and_of_all_together() -> None:
    evaluation = evaluate(make_batch(MIXED, "bolt", 1))
    calibration = evaluation.calibration
    assert calibration["fpr"] == 0.01
    assert set(calibration["categories"]) == {"bolt", "cloth"}
    assert calibration["categories"]["bolt"]["count"] == 20
    assert calibration["all"]["count"] == 29
    scores = 1000 * held_out()["map"].amax(dim=(1, 2, 3))
    limits = calibration["categories"]["bolt"]
    assert limits["threshold"] == pytest.approx(threshold_at(scores, 0.01)[0])
    assert limits["map_low"] < limits["map_high"]
    assert 0.4 < limits["map_median"] < 0.6


def test_verdicts_follow_the_threshold() -> None:
    evaluation = evaluate(make_batch(MIXED, "bolt", 1), make_batch([True], "screw", 5))
    for row in evaluation.rows:
        known = evaluation.calibration["categories"].get(row["category"])
        threshold = (known or evaluation.calibration["all"])["threshold"]
        assert row["threshold"] == threshold
        assert row["verdict"] == ("defect" if row["score"] > threshold else "good")


def test_without_held_out_images_verdicts_are_unknown() -> None:
    evaluation = evaluate(make_batch(MIXED, "bolt", 1), calibrate=False)
    assert {row["verdict"] for row in evaluation.rows} == {"unknown"}
    assert {row["threshold"] for row in evaluation.rows} == {None}
    assert "false_positive_rate" not in evaluation.results
    assert evaluation.results["image_auroc"] > 0


def test_limits_fall_back_to_all_together() -> None:
    calibration = {"categories": {"a": {"threshold": 1}}, "all": {"threshold": 2}}
    assert limits_of(calibration, "a") == {"threshold": 1}
    assert limits_of(calibration, "b") == limits_of(calibration, None) == {"threshold": 2}
    assert limits_of({}, "a") == {}


def test_a_score_at_the_threshold_is_good() -> None:
    assert verdict(1.0, 1.0)["verdict"] == "good"
    assert verdict(1.1, 1.0)["verdict"] == "defect"
    assert verdict(1.0, math.nan) == {"threshold": None, "verdict": "unknown"}


@pytest.mark.parametrize("fpr", [0.0, 1.0, -0.1])
def test_false_positive_rate_is_a_share(fpr: float) -> None:
    with pytest.raises(UserError, match=r"threshold\.fpr"):
        Evaluation(fpr=fpr)
    with pytest.raises(UserError, match="pixel_fpr"):
        Evaluation(pixel_fpr=fpr)


def test_calibration_holds_what_the_thresholds_can_promise() -> None:
    calibration = evaluate(make_batch(MIXED, "bolt", 1)).calibration
    assert calibration["categories"]["cloth"]["promise"] == promise(9, 0.01)
    assert calibration["all"]["promise"] == promise(29, 0.01)


def test_a_stored_calibration_is_taken_as_an_argument() -> None:
    stored = evaluate(make_batch(MIXED, "bolt", 1))
    other = evaluate(make_batch(MIXED, "bolt", 1), calibrate=False, calibration=stored.calibration)
    assert other.rows == stored.rows
    assert other.results == pytest.approx(stored.results, abs=0, nan_ok=True)


def test_calibration_travels_with_the_checkpoint() -> None:
    evaluation = evaluate(make_batch(MIXED, "bolt", 1))
    checkpoint: dict[str, Any] = {}
    evaluation.on_save_checkpoint(None, None, checkpoint)  # type: ignore[arg-type]
    other = Evaluation()
    other.on_load_checkpoint(None, None, checkpoint)  # type: ignore[arg-type]
    assert other.calibration == evaluation.calibration


# -------------------------------------------------------------------------------- segmentation


@pytest.mark.parametrize("engine", ["exact", "streaming"])
def test_segmentation_at_the_threshold_of_held_out_maps_equals_scikit_learn_s(engine: str) -> None:
    batches = [make_batch(MIXED, "bolt", 1), make_batch(MIXED, "cloth", 2)]
    evaluation = evaluate(*batches, engine=engine, pixel_fpr=0.05)
    f1 = []
    for batch, normal in zip(batches, [held_out(), held_out("cloth", 9, 91)], strict=True):
        category = batch["category"][0]
        pixels = normal["map"].flatten().sort().values
        threshold = pixels[math.ceil(0.95 * len(pixels)) - 1]
        limits = evaluation.calibration["categories"][category]
        assert limits["pixel_threshold"] == float(threshold)
        truth = batch["gt_mask"].flatten().numpy()
        marked = (batch["map"] > threshold).flatten().numpy()
        for name, function in {
            "precision": precision_score,
            "recall": recall_score,
            "f1": f1_score,
            "iou": jaccard_score,
        }.items():
            found = evaluation.results[f"{category}/segmentation_{name}"]
            assert found == pytest.approx(function(truth, marked), abs=1e-12)
        f1.append(evaluation.results[f"{category}/segmentation_f1"])
    assert evaluation.results["segmentation_f1"] == pytest.approx(np.mean(f1))
    assert evaluation.calibration["all"]["pixel_fpr"] == 0.05


def test_without_held_out_images_there_is_no_segmentation() -> None:
    evaluation = evaluate(make_batch(MIXED, "bolt", 1), calibrate=False)
    assert not any("segmentation" in key for key in evaluation.results)


@given(
    st.integers(0, 10**6), st.sampled_from([0.001, 0.02, 0.3]), st.integers(1, 6), st.integers(1, 4)
)
@settings(deadline=None, max_examples=30)
def test_few_kept_pixels_give_the_threshold_of_all(
    seed: int, share: float, count: int, size: int
) -> None:
    batch = make_batch([False] * count, "bolt", seed)
    batch["map"][0] += 5  # one image holds all the highest pixels
    found = []
    for images in (None, count, 3 * count):
        maps = NormalMaps(share, images, None)
        for start in range(0, count, size):
            rows = slice(start, start + size)
            part = {"category": batch["category"][rows]}
            maps.add(part, batch["map"][rows])  # type: ignore[arg-type]
        pixels = maps.by_category()["bolt"]
        found.append(pixel_threshold(pixels.highest, pixels.number, share))
        if images is not None:
            assert len(pixels.highest) <= share * images * 256 + 1
    assert len(set(found)) == 1


def test_a_crop_scores_the_middle_of_maps_and_masks() -> None:
    batch = make_batch(MIXED, "bolt", 1)
    whole = evaluate(batch, pixel_fpr=0.05)
    cropped = evaluate(batch, pixel_crop=8, pixel_fpr=0.05)
    middle = [batch[key][..., 4:12, 4:12].flatten().numpy() for key in ("gt_mask", "map")]
    assert cropped.results["pixel_auroc"] == pytest.approx(roc_auc_score(*middle), abs=1e-6)
    normal = held_out()["map"][..., 4:12, 4:12].flatten()
    threshold = float(normal.sort().values[math.ceil(0.95 * len(normal)) - 1])
    limits = cropped.calibration["categories"]["bolt"]
    assert limits["pixel_threshold"] == threshold
    f1 = f1_score(middle[0], middle[1] > threshold)
    assert cropped.results["segmentation_f1"] == pytest.approx(f1)
    assert limits["map_high"] == whole.calibration["categories"]["bolt"]["map_high"]
    assert cropped.results["image_auroc"] == whole.results["image_auroc"]


@pytest.mark.parametrize("size", [0, -1, [8], [8, 0], [8, 8, 8], 2.5])
def test_a_crop_is_one_or_two_positive_whole_numbers(size: Any) -> None:
    with pytest.raises(UserError, match="pixel_crop"):
        Evaluation(pixel_crop=size)


def test_a_crop_larger_than_the_maps_is_refused() -> None:
    with pytest.raises(UserError, match=r"pixel_crop=\[17, 16\].*\[16, 16\]"):
        evaluate(make_batch(MIXED, "bolt", 1), calibrate=False, pixel_crop=[17, 16])


# -------------------------------------------------------------------------------- images only


class ImagesOnly(Oracle):
    localises = False

    def forward(self, batch: Any) -> Prediction:
        return super().forward(batch)._replace(anomaly_map=None)


def test_a_method_that_scores_images_only_has_no_metric_and_no_range_of_maps() -> None:
    evaluation, batch = Evaluation(), make_batch(MIXED, "bolt", 1)
    trainer = trainer_of(evaluation)
    trainer.validate(ImagesOnly(), [loader(held_out()), loader(batch)], verbose=False)
    criterion = float(trainer.callback_metrics["oracle/criterion"])
    trainer.test(ImagesOnly(), loader(batch), verbose=False)
    expected = evaluate(batch)
    kept = {k: v for k, v in expected.results.items() if "pixel" not in k and "segm" not in k}
    assert evaluation.results == kept
    assert set(evaluation.calibration["all"]) == {"threshold", "rule", "count", "promise"}
    assert set(evaluation.curves["bolt"]) >= {"roc", "pr"}
    assert "pro" not in evaluation.curves["bolt"]
    assert evaluation.rows == expected.rows
    assert criterion == pytest.approx(evaluation.results["image_auroc"])


def test_a_map_has_to_fit_what_the_method_says_of_itself() -> None:
    class Promises(Oracle):
        def forward(self, batch: Any) -> Prediction:
            return super().forward(batch)._replace(anomaly_map=None)

    class Surprises(Oracle):
        localises = False

    for module, told in ((Promises(), "gives no map"), (Surprises(), "gives a map")):
        name = type(module).__name__
        with pytest.raises(UserError, match=rf"{name}\.localises .*{told}.*set localises"):
            trainer_of(Evaluation()).test(module, loader(make_batch(MIXED, "bolt", 1)))
        with pytest.raises(UserError, match=told):
            trainer_of(Evaluation()).validate(module, loader(held_out()))


# -------------------------------------------------------------------------------- selection


def test_test_images_as_a_second_loader_give_the_oracle_s_criterion_and_no_threshold() -> None:
    evaluation = Evaluation()
    trainer = trainer_of(evaluation)
    loaders = [loader(held_out()), loader(make_batch(MIXED, "bolt", 1))]
    trainer.validate(Oracle(), loaders, verbose=False)
    test = evaluate(make_batch(MIXED, "bolt", 1)).results
    expected = test["image_auroc"] + test["pixel_auroc"]
    assert float(trainer.callback_metrics["oracle/criterion"]) == pytest.approx(expected, abs=1e-6)
    assert evaluation.calibration["all"]["count"] == 20


@pytest.mark.parametrize("criterion", ["pixel_auroc", "image_ap + pixel_ap", "image_f1max"])
def test_a_method_says_what_its_paper_chose_weights_by(criterion: str) -> None:
    module, batch = Oracle(), make_batch(MIXED, "bolt", 1)
    module.oracle_criterion = criterion  # type: ignore[assignment]
    trainer = trainer_of(Evaluation())
    trainer.validate(module, [loader(held_out()), loader(batch)], verbose=False)
    results = evaluate(batch).results
    expected = sum(results[name.strip()] for name in criterion.split("+"))
    assert float(trainer.callback_metrics["oracle/criterion"]) == pytest.approx(expected, abs=1e-5)


class WithoutMasks(pl.LightningDataModule):
    """Held-out images, and the test set of the oracle, whose masks nobody drew."""

    has_masks = False

    def validation_names(self) -> list[str]:
        return ["holdout", "test"]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        batch = make_batch(MIXED, "bolt", 1)
        return [loader(held_out()), loader({**batch, "gt_mask": batch["gt_mask"] & False})]


def test_the_oracle_of_a_test_set_without_masks_is_that_of_images() -> None:
    trainer = trainer_of(Evaluation())
    trainer.validate(Oracle(), datamodule=WithoutMasks(), verbose=False)
    expected = evaluate(make_batch(MIXED, "bolt", 1)).results["image_auroc"]
    assert float(trainer.callback_metrics["oracle/criterion"]) == pytest.approx(expected)


def test_a_criterion_that_cannot_be_is_refused() -> None:
    module = Oracle()
    module.oracle_criterion = "pixel_auroc"  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"Oracle by pixel_auroc.*without masks"):
        trainer_of(Evaluation()).validate(module, datamodule=WithoutMasks(), verbose=False)
    module.oracle_criterion = "pixel_auc"  # type: ignore[assignment]
    loaders = [loader(held_out()), loader(make_batch(MIXED, "bolt", 1))]
    with pytest.raises(UserError, match=r"names pixel_auc, .*pixel_auroc"):
        trainer_of(Evaluation()).validate(module, loaders, verbose=False)


class Validated(pl.LightningDataModule):
    """Held-out images, and as second loader the same with defects."""

    def validation_names(self) -> list[str]:
        return ["holdout", "synthetic"]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [loader(held_out()), loader(make_batch([True] * 5, "bolt", 4))]


def test_synthetic_defects_are_scored_against_held_out_images() -> None:
    evaluation = Evaluation()
    trainer = trainer_of(evaluation)
    trainer.validate(Oracle(), datamodule=Validated(), verbose=False)
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    normal, defective = held_out()["map"], make_batch([True] * 5, "bolt", 4)["map"]
    scores = torch.cat([normal, defective]).amax(dim=(1, 2, 3))
    expected = roc_auc_score([0] * 20 + [1] * 5, scores)
    assert logged["val/synthetic_image_auroc"] == pytest.approx(expected)
    assert 0.5 < logged["val/synthetic_pixel_ap"] < 1
    both = logged["val/synthetic_image_auroc"] + logged["val/synthetic_pixel_ap"]
    assert logged["val/synthetic_criterion"] == pytest.approx(both)
    assert not any("segmentation" in key for key in logged)  # no threshold of these weights yet
    assert "oracle/criterion" not in logged
    assert evaluation.calibration["all"]["count"] == 20


def test_curves_cover_every_category() -> None:
    evaluation = evaluate(make_batch(MIXED, "bolt", 1), make_batch(MIXED, "cloth", 2))
    assert set(evaluation.curves) == {"bolt", "cloth"}
    curves = evaluation.curves["bolt"]
    for name in ("roc", "pr", "pro"):
        x, y = curves[name]
        assert len(x) == len(y) > 1
        assert np.isfinite(x).all()
        assert np.isfinite(y).all()
    assert len(curves["scores"]) == len(curves["labels"]) == 5


def test_scores_of_low_precision_are_taken() -> None:
    class Half(Oracle):
        def forward(self, batch: Any) -> Prediction:
            maps: Tensor = batch["map"].bfloat16()
            return Prediction(maps, maps.amax(dim=(1, 2, 3)))

    evaluation = Evaluation()
    trainer_of(evaluation).test(Half(), loader(make_batch(MIXED, "bolt", 1)), verbose=False)
    assert 0 <= evaluation.results["pixel_auroc"] <= 1
