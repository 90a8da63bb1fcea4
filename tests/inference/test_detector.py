"""However a picture is given to a detector, the result is that of its file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from anomaly_lit.data.images import Resize, read_image
from anomaly_lit.inference.detector import Detector
from anomaly_lit.types import Batch, Prediction, UserError


class Brightness(nn.Module):
    """Scores a picture by its channels, so that each change of a pixel shows."""

    device = torch.device("cpu")

    def score_batch(self, batch: Batch) -> Prediction:
        weights = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1)
        ramp = torch.linspace(1, 2, batch["image"].shape[-1])
        anomaly_map: Tensor = (batch["image"] * weights * ramp).sum(dim=1, keepdim=True)
        return Prediction(anomaly_map, anomaly_map.mean(dim=(1, 2, 3)))


@pytest.fixture
def detector() -> Detector:
    return Detector(Brightness(), Resize(16), {})  # type: ignore[arg-type]


def turned(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


RAMP = np.linspace(0, 65535, 24 * 40).reshape(24, 40)
COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8))
FILES: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "16 bits": (Image.fromarray(RAMP.astype(np.uint16)), "a.png", {}),
    "16 bits, TIFF": (Image.fromarray(RAMP.astype(np.uint16)), "a.tif", {}),
    "32 bits": (Image.fromarray(RAMP.astype(np.int32)), "a.tif", {}),
    "float to 1": (Image.fromarray((RAMP / 65535).astype(np.float32)), "a.tif", {}),
    "float to 65535": (Image.fromarray(RAMP.astype(np.float32)), "a.tif", {}),
    **{
        f"EXIF {orientation}, {suffix}": (COLOURS, f"a.{suffix}", turned(orientation))
        for orientation in (2, 3, 6, 8)
        for suffix in ("jpg", "png", "tif", "webp")
    },
    "palette": (COLOURS.convert("P"), "a.png", {"transparency": 3}),
    "alpha": (COLOURS.convert("RGBA"), "a.png", {}),
    "grey with alpha": (COLOURS.convert("LA"), "a.png", {}),
    "bilevel": (COLOURS.convert("1"), "a.png", {}),
    "CMYK": (COLOURS.convert("CMYK"), "a.jpg", {}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_picture_gives_the_result_of_its_path(
    detector: Detector, tmp_path: Path, name: str
) -> None:
    picture, file, options = FILES[name]
    path = tmp_path / file
    picture.save(path, **options)
    with Image.open(path) as opened, path.open("rb") as stream:
        given = [path, str(path), opened, path.read_bytes(), stream, io.BytesIO(path.read_bytes())]
        expected, *others = detector.predict([*given, read_image(path)])
        assert opened.size in ((40, 24), (24, 40))
    for found in others:
        assert found.score == expected.score
        np.testing.assert_array_equal(found.image, expected.image)
        np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)


def test_no_picture_gives_no_finding(detector: Detector) -> None:
    assert detector.predict([]) == []


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_file_over_the_limit_is_refused(
    detector: Detector, tmp_path: Path, as_bytes: bool
) -> None:
    COLOURS.save(tmp_path / "a.png")
    given = (tmp_path / "a.png").read_bytes() if as_bytes else tmp_path / "a.png"
    with pytest.raises(UserError, match=r"40x24.*max_pixels=959: raise it"):
        detector.predict(given, max_pixels=959)
    assert len(detector.predict(given, max_pixels=960)) == 1
    assert len(detector.predict(given, max_pixels=None)) == 1


@pytest.mark.parametrize("given", [str, Path.read_bytes, lambda file: file.open("rb")])
def test_a_file_with_several_pages_is_judged_by_its_first_with_a_warning(
    detector: Detector, tmp_path: Path, given: Any
) -> None:
    pages = [Image.new("RGB", (20, 16), colour) for colour in ("red", "green", "blue")]
    file = tmp_path / "scan.tif"
    pages[0].save(file, save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match="has 3 pages, and only the first is judged"):
        (finding,) = detector.predict(given(file))
    assert np.array_equal(finding.image, np.asarray(pages[0]))
