from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anomaly_lit.data import DiskFeatureCache, FeatureCache, HostCache, MVTecAD
from anomaly_lit.data.images import Resize
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import Batch, Sample, UserError

CPU = torch.device("cpu")
Make = Callable[..., FeatureCache]


class Halves(nn.Module):
    """Two stages, and a count of its images."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor, self.seen = factor, 0

    def identity(self) -> dict[str, Any]:
        return {"weights": str(self.factor)}

    def forward(self, image: Tensor) -> list[Tensor]:
        self.seen += len(image)
        return [self.factor * image[:, :2, ::2, ::2], image[:, :1, ::4, ::4].bfloat16()]


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Five files, which nobody reads."""
    for name in "abcde":
        (tmp_path / name).write_text(name)
    return [Sample(str(tmp_path / name), "part", "good", False) for name in "abcde"]


@pytest.fixture(params=["host", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    def build(**options: Any) -> FeatureCache:
        if request.param == "host":
            return FeatureCache(**options)
        return DiskFeatureCache(str(tmp_path / "cache"), **options)

    return build


def batches_of(samples: list[Sample]) -> Iterator[Batch]:
    """Constant images, two in a batch."""
    for start in range(0, len(samples), 2):
        paths = [sample.path for sample in samples[start : start + 2]]
        value = torch.tensor([float(Path(path).name.encode()[0]) / 97 for path in paths])
        yield {"path": paths, "image": value.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)}  # type: ignore[typeddict-item]


def fill(cache: FeatureCache, samples: list[Sample], size: int = 8, **named: nn.Module) -> None:
    cache.fill(named, samples, batches_of, Resize(size))


def test_what_is_kept_equals_what_the_backbone_gives(make: Make, samples: list[Sample]) -> None:
    cache, backbone = make(), Halves()
    fill(cache, samples, teacher=backbone)
    assert len(cache) == 5
    chosen = [samples[3], samples[0]]
    kept = cache.get([sample.path for sample in chosen], CPU)
    assert kept is not None
    for name, stages in kept.items():
        assert name == "teacher"
        image = next(batches_of(chosen))["image"]
        for stage, expected in zip(stages, backbone(image), strict=True):
            assert torch.equal(stage, expected)
            assert stage.dtype == expected.dtype


def test_features_are_computed_once(make: Make, samples: list[Sample]) -> None:
    cache, backbone = make(), Halves()
    for _ in range(2):
        fill(cache, samples, backbone=backbone)
    assert backbone.seen <= 5 + 1  # one image tells the shapes


def test_an_unknown_image_has_none(make: Make, samples: list[Sample]) -> None:
    cache = make()
    assert cache.get([samples[0].path], CPU) is None
    fill(cache, samples[:2], backbone=Halves())
    assert cache.get([samples[0].path, "z"], CPU) is None


def test_too_little_space_keeps_none_and_says_so(
    make: Make, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    cache = make(max_gb=1e-7)
    fill(cache, samples, backbone=Halves())
    assert cache.get([samples[0].path], CPU) is None
    assert "dataset.feature_cache.max_gb" in caplog.text


def test_half_precision_rounds_little_and_gives_the_backbone_s_type(
    make: Make, samples: list[Sample]
) -> None:
    exact, rounded = make(), make(dtype="float16")
    for cache in (exact, rounded):
        fill(cache, samples, backbone=Halves())
    paths = [sample.path for sample in samples]
    pairs = [cache.get(paths, CPU) for cache in (exact, rounded)]
    assert pairs[0] is not None
    assert pairs[1] is not None
    for before, after in zip(pairs[0]["backbone"], pairs[1]["backbone"], strict=True):
        assert after.dtype == before.dtype
        assert torch.allclose(before.float(), after.float(), rtol=2**-11, atol=0)
    assert not torch.equal(pairs[0]["backbone"][0], pairs[1]["backbone"][0])


def test_values_too_large_for_half_precision_are_refused(make: Make, samples: list[Sample]) -> None:
    with pytest.raises(UserError, match=r"65504.*dtype=bfloat16"):
        fill(make(dtype="float16"), samples, backbone=Halves(factor=1e6))
    fill(make(dtype="bfloat16"), samples, backbone=Halves(factor=1e6))


def test_wrong_settings_are_refused(make: Make) -> None:
    with pytest.raises(UserError, match="max_gb=-1"):
        make(max_gb=-1)
    with pytest.raises(UserError, match=r"dtype=float8: choose float16 or bfloat16"):
        make(dtype="float8")


def test_a_later_run_computes_nothing_and_reads_the_same(
    samples: list[Sample], tmp_path: Path
) -> None:
    first, later = Halves(), Halves()
    caches = [DiskFeatureCache(str(tmp_path / "cache")) for _ in range(2)]
    fill(caches[0], samples, teacher=first)
    fill(caches[1], samples, student_s=later)  # the name in the method does not matter
    assert (first.seen, later.seen) == (6, 1)
    kept = [cache.get([s.path for s in samples], CPU) for cache in caches]
    assert kept[0] is not None
    assert kept[1] is not None
    for before, after in zip(kept[0]["teacher"], kept[1]["student_s"], strict=True):
        assert torch.equal(before, after)


def test_other_weights_geometry_precision_and_files_are_other_features(
    samples: list[Sample], tmp_path: Path
) -> None:
    def computed(backbone: Halves | None = None, size: int = 8, **options: Any) -> int:
        backbone = backbone or Halves()
        fill(DiskFeatureCache(str(tmp_path / "cache"), **options), samples, size, b=backbone)
        return backbone.seen - 1

    assert computed() == 5
    assert computed() == 0
    assert computed(Halves(factor=2.0)) == 5
    assert computed(size=16) == 5
    assert computed(dtype="bfloat16") == 5
    with torch.autocast("cpu", torch.bfloat16):
        assert computed() == 5
    wide = Halves()
    wide.weight = nn.Parameter(torch.ones(2, 2, 3, 3).to(memory_format=torch.channels_last))
    assert computed(wide) == 5
    Path(samples[0].path).write_text("another picture")
    assert computed() == 1


def test_a_backbone_is_known_by_weights_stages_and_normalisation(tmp_path: Path) -> None:
    def make(seed: int = 0, **options: Any) -> dict[str, Any]:
        torch.manual_seed(seed)
        options = {"out_indices": (1, 2), "weights": "random", **options}
        return Backbone("resnet18.tv_in1k", **options).identity()

    assert make() == make()
    changes: list[dict[str, Any]] = [
        {"seed": 1}, {"out_indices": (1,)}, {"mean": [0.5, 0.5, 0.5], "std": [1.0, 1.0, 1.0]},
    ]  # fmt: skip
    assert all(make(**change) != make() for change in changes)


def test_a_network_that_does_not_tell_what_it_is_is_refused(
    samples: list[Sample], tmp_path: Path
) -> None:
    class Nameless(nn.Module):
        def forward(self, image: Tensor) -> list[Tensor]:
            return [image]

    with pytest.raises(UserError, match=r"features of teacher \(Nameless\).*cache=host"):
        fill(DiskFeatureCache(str(tmp_path)), samples, teacher=Nameless())


def test_a_training_batch_has_the_features_of_its_images_and_companions(
    mvtec: Any, outliers: Any, make: Make
) -> None:
    datamodule = MVTecAD(
        str(mvtec),
        image_size=32,
        batch_size=2,
        outlier_dir=str(outliers),
        cache=HostCache(),
        feature_cache=make(),
        needs={"prompt", "outlier"},
    )
    datamodule.setup()
    backbone = Halves()
    samples = datamodule.feature_samples()
    assert datamodule.feature_cache is not None
    datamodule.feature_cache.fill(
        {"backbone": backbone}, samples, datamodule.batches_of, datamodule.resize
    )

    class Trainer:
        training = True
        global_rank, world_size = 0, 1

    datamodule.trainer = Trainer()  # type: ignore[assignment]
    datamodule._position = lambda: 0  # type: ignore[method-assign]
    for batch in datamodule.train_dataloader():
        whole = datamodule.on_after_batch_transfer(batch, 0)
        for key, image in (
            ("features", "image"),
            ("prompt_features", "prompt"),
            ("outlier_features", "outlier"),
        ):
            for kept, expected in zip(whole[key]["backbone"], backbone(batch[image]), strict=True):
                assert torch.equal(kept, expected)
        assert "features" not in batch
