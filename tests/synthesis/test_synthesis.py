"""What every recipe promises, and what the recipes draw."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.synthesis import (
    NSA,
    Confetti,
    CutPaste,
    Mixed,
    Perlin,
    SaliencyPerlin,
    Smudge,
    Synthesis,
)
from anomaly_lit.synthesis.augment import (
    augment,
    change_one_colour,
    colour_jitter,
    turn_grey,
)
from anomaly_lit.synthesis.base import foreground_of, otsu, random_disc
from anomaly_lit.synthesis.general import (
    GeneralAnomalies,
    blob,
    shifted,
    shuffled_tiles,
    strip,
    stroke,
)
from anomaly_lit.synthesis.noise import perlin_noise
from anomaly_lit.synthesis.nsa import fill_smoothly, partners
from anomaly_lit.synthesis.perlin import PerlinMask
from anomaly_lit.synthesis.saliency import highest, spectral_residual
from anomaly_lit.synthesis.textures import TextureFolder, procedural_textures
from anomaly_lit.types import UserError

OPTIONS = sorted(
    path.stem for path in Path(config_dir(), "synthesis").glob("*.yaml") if path.stem != "none"
)


def compose_recipe(option: str) -> dict[str, Any]:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = compose("train", [f"synthesis={option}", "output_dir=unused"])
    return plain(cfg)["dataset"]["synthesis"]


CONFIGS = {option: compose_recipe(option) for option in OPTIONS}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 4, height: int = 40, width: int = 52, seed: int = 0) -> Tensor:
    """A bright noisy block on a dark ground, somewhere else in each image."""
    image = 0.1 + 0.05 * torch.rand(count, 3, height, width, generator=seeded(seed))
    for row in range(count):
        top = 6 + row % 4
        image[row, :, top : top + height // 2, 10:-12] += 0.6
    return image


@pytest.mark.parametrize("option", OPTIONS)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 5),
    height=st.integers(17, 48),
    width=st.integers(17, 48),
)
def test_promises_of_every_recipe(
    option: str, seed: int, count: int, height: int, width: int
) -> None:
    recipe = instantiate(CONFIGS[option] | {"probability": 1.0})
    image = images(count, height, width, seed)
    kept = image.clone()
    state = torch.get_rng_state()
    corrupted, corruption = recipe(image, seeded(seed), ["bolt"] * count)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(image, kept)
    assert corrupted.shape == image.shape
    assert corrupted.dtype == image.dtype
    assert corruption.shape == (count, 1, height, width)
    assert corruption.dtype == torch.bool
    assert torch.equal(torch.where(corruption, image, corrupted), image)  # elsewhere, to the bit
    assert corrupted.min() >= 0
    assert corrupted.max() <= 1
    changed = ((corrupted - image).abs() * corruption).flatten(1).sum(dim=1) > 0
    assert torch.equal(changed, corruption.flatten(1).any(dim=1))
    if option not in ("onenip", "smudge"):  # whose noise may be empty, as in the authors' code
        assert changed.all()
    again = recipe(image, seeded(seed), ["bolt"] * count)
    assert torch.equal(again[0], corrupted)
    assert torch.equal(again[1], corruption)


@pytest.mark.parametrize("option", OPTIONS)
def test_share_of_corrupted_images_is_the_probability(option: str) -> None:
    recipe = instantiate(CONFIGS[option] | {"probability": 0.3})
    image = images(100, 24, 24)
    corrupted, corruption = recipe(image, seeded())
    chosen = corruption.flatten(1).any(dim=1)
    assert 0.15 < chosen.float().mean() < 0.45
    assert torch.equal(corrupted[~chosen], image[~chosen])


@pytest.mark.parametrize("option", OPTIONS)
def test_recipes_work_under_bfloat16_and_inference(option: str) -> None:
    recipe = instantiate(CONFIGS[option])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        corrupted, corruption = recipe(images().bfloat16(), seeded())
    assert corrupted.dtype == torch.bfloat16
    assert torch.equal(torch.where(corruption, images().bfloat16(), corrupted), images().bfloat16())


def test_foreground_is_kept_to() -> None:
    image = images(6)
    ground = foreground_of(image)
    assert torch.equal(ground[0, 0, 10:20, 15:35], torch.ones(10, 20, dtype=torch.bool))
    assert not ground[:, :, :4].any()
    for recipe in (Smudge(probability=1.0, foreground=True), CutPaste(foreground=True)):
        corruption = recipe(image, seeded())[1]
        assert not (corruption & ~ground).any()
        assert corruption.flatten(1).any(dim=1).all()


def test_plain_image_is_foreground_everywhere() -> None:
    assert foreground_of(torch.full((1, 3, 8, 8), 0.5)).all()


def test_otsu_parts_two_groups_of_values() -> None:
    values = torch.cat([torch.rand(500) * 0.1, 0.6 + torch.rand(500) * 0.1]).view(1, 1, 20, 50)
    assert 0.1 < otsu(values).item() < 0.6


def test_disc_lies_in_the_ground() -> None:
    ground = torch.zeros(50, 1, 20, 30, dtype=torch.bool)
    ground[:, :, 3:9, 20:] = True
    disc = random_disc(ground, seeded())
    assert disc.flatten(1).any(dim=1).all()
    assert not (disc & ~ground).any()
    assert disc.any(dim=0)[0, 3:9, 20:].float().mean() > 0.9


# ------------------------------------------------------------------------------ Perlin noise


def test_noise_equals_its_definition_pixel_by_pixel() -> None:
    cells, height, width = torch.tensor([[4.0], [2.0]]), 12, 10
    found = perlin_noise(cells, height, width, seeded(5))[0]
    angle = torch.rand(1, 5, 5, generator=seeded(5))[0] * 2 * math.pi

    def fade(t: float) -> float:
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    for i in range(height):
        for j in range(width):
            y, x = i / height * 4, j / width * 2
            r, c = int(y), int(x)
            dot = {}
            for a in (0, 1):
                for b in (0, 1):
                    g = float(angle[r + a, c + b])
                    dot[a, b] = math.sin(g) * (y - r - a) + math.cos(g) * (x - c - b)
            v, u = fade(y - r), fade(x - c)
            top = dot[0, 0] + u * (dot[0, 1] - dot[0, 0])
            bottom = dot[1, 0] + u * (dot[1, 1] - dot[1, 0])
            expected = math.sqrt(2) * (top + v * (bottom - top))
            assert found[i, j].item() == pytest.approx(expected, abs=1e-5)


def test_share_of_the_image_can_be_chosen() -> None:
    mask = PerlinMask(area=(0.05, 0.1))(images(20, 64, 64), seeded())
    share = mask.float().mean(dim=(1, 2, 3))
    assert (share > 0.045).all()
    assert (share < 0.105).all()


def test_shares_of_draem_s_masks_are_stable() -> None:
    share = PerlinMask()(images(300, 64, 64), seeded()).float().mean(dim=(1, 2, 3))
    assert 0.02 < share.median() < 0.08
    assert share.max() < 0.5
    assert (share > 0).float().mean() > 0.95


def test_texture_shines_through_by_beta() -> None:
    image = images(3)
    recipe = Perlin(beta=(0.5, 0.5), probability=1.0)
    whole, _ = recipe.propose(image, seeded(), None)
    bare, _ = Perlin(beta=(0.0, 0.0)).propose(image, seeded(), None)
    torch.testing.assert_close(whole, 0.5 * image + 0.5 * bare)


def test_augmentations_change_each_image_and_none_changes_nothing() -> None:
    image = procedural_textures(8, 32, 32, seeded())
    assert torch.equal(augment(image, 0, seeded()), image)
    changed = augment(image, 3, seeded(1))
    assert changed.shape == image.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert ((changed - image).abs().flatten(1).max(dim=1).values > 0.01).float().mean() > 0.8


def test_jitter_of_nothing_is_the_image() -> None:
    image = images()
    torch.testing.assert_close(colour_jitter(image, 0.0, 0.0, seeded()), image, atol=1e-6, rtol=0)


def test_one_colour_of_each_image_is_changed() -> None:
    """Brightness, contrast or saturation, as for each image alone; all three are drawn."""
    image = 0.3 + 0.4 * images(60)
    found = change_one_colour(image, 0.2, seeded())
    grey = turn_grey(image)
    black, mean = torch.zeros_like(image), grey.mean(dim=(2, 3), keepdim=True).expand_as(image)
    kinds = set()
    for number in range(len(image)):
        for kind, other in (("brightness", black), ("contrast", mean), ("saturation", grey)):
            away, moved = (part[number] - other[number] for part in (image, found))
            factor = float((moved * away).sum() / away.square().sum())
            if 0.8 <= factor <= 1.2 and torch.allclose(moved, factor * away, atol=1e-5):
                kinds.add(kind)
                break
        else:
            pytest.fail("more than one was changed")
    assert kinds == {"brightness", "contrast", "saturation"}
    torch.testing.assert_close(change_one_colour(image, 0.0, seeded()), image)


def test_textures_differ_and_have_contrast() -> None:
    texture = procedural_textures(40, 32, 32, seeded())
    assert texture.min() >= 0
    assert texture.max() <= 1
    assert (texture.flatten(1).std(dim=1) > 0.03).float().mean() > 0.95
    assert (texture[1:] - texture[:-1]).abs().flatten(1).mean(dim=1).min() > 0.01


def test_texture_folder_is_searched_and_resized(tmp_path: Path) -> None:
    (tmp_path / "wood").mkdir()
    for value in range(5):
        picture = np.full((9, 7, 3), 50 * value, dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "wood" / f"{value}.png")
    (tmp_path / "notes.txt").write_text("no image")
    drawn = TextureFolder(str(tmp_path))(100, 16, 20, seeded())
    assert drawn.shape == (100, 3, 16, 20)
    assert {round(float(v) * 255) for v in drawn[:, 0, 0, 0]} == {0, 50, 100, 150, 200}
    assert len(TextureFolder(str(tmp_path), 2).files) == 2
    corrupted, corruption = Perlin(texture_dir=str(tmp_path), probability=1.0)(images(), seeded())
    assert not torch.equal(corrupted, images())
    assert corruption.flatten(1).any(dim=1).all()


def test_texture_folder_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone: no folder"):
        TextureFolder(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="no image"):
        TextureFolder(str(tmp_path))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png"):
        TextureFolder(str(tmp_path))(1, 8, 8, seeded())


# ------------------------------------------------------------------------------ CutPaste


def test_patch_is_a_rectangle_of_the_image_elsewhere() -> None:
    image = torch.rand(6, 3, 64, 48, generator=seeded())
    recipe = CutPaste("patch", jitter=0.0, hue=0.0)
    corrupted, corruption = recipe(image, seeded(3))
    for row in range(6):
        rows = corruption[row, 0].any(dim=1).nonzero().flatten()
        columns = corruption[row, 0].any(dim=0).nonzero().flatten()
        height, width = len(rows), len(columns)
        assert corruption[row, 0].sum() == height * width  # a full rectangle
        assert 0.01 < height * width / (64 * 48) < 0.18
        patch = corrupted[row][:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        found = any(
            torch.allclose(image[row, :, r : r + height, c : c + width], patch, atol=1e-5)
            for r in range(64 - height + 1)
            for c in range(48 - width + 1)
        )
        assert found


def test_pasted_pixels_are_the_changed_ones() -> None:
    image = torch.rand(8, 3, 64, 64, generator=seeded())
    for kind in ("patch", "scar"):
        corrupted, corruption = CutPaste(kind)(image, seeded(1))  # type: ignore[arg-type]
        changed = (corrupted != image).any(dim=1, keepdim=True)
        assert not (changed & ~corruption).any()
        assert changed.sum() > 0.98 * corruption.sum()


def test_scar_is_thin_and_turned() -> None:
    corruption = CutPaste("scar", scar_width=(4, 4), scar_length=(40, 40))(
        images(30, 256, 256), seeded()
    )[1]
    share = corruption.float().sum(dim=(1, 2, 3))
    assert ((share - 160).abs() < 40).float().mean() > 0.9
    heights = corruption[:, 0].any(dim=2).sum(dim=1)
    assert heights.min() < 36 < heights.max()


def test_aspects_lie_in_their_range() -> None:
    for scale in ("log", "halves"):
        recipe = CutPaste(aspect_scale=scale)  # type: ignore[arg-type]
        aspect = recipe._aspect(torch.zeros(500, 3, 1, 1), seeded())
        assert aspect.min() >= 0.3
        assert aspect.max() <= 3.3
        assert 0.4 < (aspect > 1).float().mean() < 0.6


# ------------------------------------------------------------------------------ NSA


def test_confetti_is_as_many_turned_rectangles_as_asked_for() -> None:
    image = torch.full((40, 3, 112, 112), 0.5)
    recipe = Confetti(pieces=(2, 3), side=(16, 16), smoothing=1, probability=1.0)
    drawn = recipe.rectangles(image, seeded())
    assert drawn.shape == (40, 3, 112, 112)
    assert drawn[:, :2].flatten(2).any(dim=2).float().mean() > 0.9  # few begin beyond the border
    assert 0.2 < drawn[:, 2].flatten(1).any(dim=1).float().mean() < 0.8  # the third is there or not
    areas = drawn.flatten(2).sum(dim=2).float()
    assert areas.max() <= 81  # 8 x 8 pixels at half of 224, and their border
    assert areas.median() > 40
    corrupted, corruption = recipe(image, seeded())
    assert torch.equal(corruption, recipe.rectangles(image, seeded()).any(dim=1, keepdim=True))
    assert (corrupted > 0.5).any()
    assert (corrupted < 0.5).any()


def test_confetti_reports_only_what_it_changes() -> None:
    white = torch.ones(20, 3, 32, 32)
    corrupted, corruption = Confetti(probability=1.0, allow_empty=True)(white, seeded())
    assert torch.equal((corrupted != white).any(dim=1, keepdim=True), corruption)
    assert not corruption.flatten(1).any(dim=1).all()  # brighter than white is nothing
    assert corruption.any()


@pytest.mark.parametrize("saliency", ["foreground", "spectral"])
@pytest.mark.parametrize("area", [None, (0.05, 0.2)])
def test_a_salient_mask_lies_on_what_is_salient(saliency: Any, area: Any) -> None:
    image = images(30)
    recipe = SaliencyPerlin(saliency, area=area, probability=1.0, allow_empty=True)
    corruption = recipe(image, seeded())[1]
    salient = foreground_of(image) if saliency == "foreground" else spectral_residual(image)
    least = salient.float().mean(dim=(2, 3), keepdim=True) if area else 0.4
    assert not (corruption & (salient < least)).any()
    assert corruption.flatten(1).any(dim=1).float().mean() > 0.5


def test_a_salient_mask_is_noise_times_saliency_above_a_threshold_that_rises() -> None:
    image = images(5)
    recipe = SaliencyPerlin(threshold=0.3, slope=0.5, attempts=1, probability=1.0)
    noise = recipe.mask.noise(image, seeded(3))
    found = recipe.mask(image, seeded(3))
    for number in range(5):
        salient = foreground_of(image[number : number + 1])[0, 0].float()
        wanted = salient * noise[number] > 0.3 + 0.5 * salient.mean()
        assert torch.equal(found[number, 0], wanted)


def test_without_saliency_it_is_the_noise_alone() -> None:
    image = images(5)
    recipe = SaliencyPerlin("none", threshold=0.5, slope=0.2, probability=1.0)
    plain = PerlinMask(threshold=0.5)
    assert torch.equal(recipe.mask(image, seeded()), plain(image, seeded()))


def test_the_share_of_the_salient_region_can_be_chosen() -> None:
    image = images(40, 64, 64)
    recipe = SaliencyPerlin("spectral", area=(0.1, 0.1), probability=1.0)
    salient = spectral_residual(image)
    region = (salient >= salient.mean(dim=(2, 3), keepdim=True)).flatten(1).sum(dim=1)
    covered = recipe.mask(image, seeded()).flatten(1).sum(dim=1) / region
    assert (covered - 0.1).abs().max() < 0.01  # within a tenth of what was asked for


def test_highest_values_are_those_of_the_region() -> None:
    values = torch.tensor([[[1.0, 5.0], [4.0, 3.0]]])
    region = torch.tensor([[[True, False], [True, True]]])
    found = highest(values, region, torch.tensor([[0.67]]))
    assert found.tolist() == [[[[False, False], [True, True]]]]


def test_spectral_residual_finds_the_odd_one_out() -> None:
    stripes = 0.5 + 0.4 * torch.sin(torch.arange(64) * 0.8).expand(1, 3, 64, 64)
    image = stripes.clone()
    image[..., 20:26, 40:46] = 1.0
    salient = spectral_residual(image)
    assert float(salient.min()) == 0
    assert float(salient.max()) == 1
    row, column = divmod(int(salient.argmax()), 64)
    assert 17 <= row <= 29
    assert 37 <= column <= 49
    assert (spectral_residual(torch.full((1, 3, 20, 30), 0.3)) == 1).all()


def test_partner_is_another_image_of_the_category() -> None:
    names = ["a", "b", "a", "c", "a", "b"]
    seen = set()
    for seed in range(30):
        chosen = partners(6, names, seeded(seed)).tolist()
        assert all(names[i] == names[j] for i, j in enumerate(chosen))
        assert [i for i, j in enumerate(chosen) if i == j] == [3]
        seen.add(chosen[0])
    assert seen == {2, 4}
    assert 0 not in {int(partners(3, None, seeded(seed))[0]) for seed in range(20)}


def test_blend_meets_the_image_at_its_border() -> None:
    image = torch.full((1, 3, 64, 64), 0.3)
    image[0] += torch.linspace(0, 0.2, 64)
    known = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    known[:, :, 20:44, 16:40] = False
    step = fill_smoothly((image - 0.8) * known, known)
    blended = torch.where(known, image, 0.8 + step)
    torch.testing.assert_close(torch.where(known, step + 0.8, image), image)
    assert (blended - image).abs().max() < 0.05  # a constant part leaves the ramp as it was


def test_parts_are_hard_to_see_at_their_border() -> None:
    image = images(6, 64, 64)
    corrupted, corruption = NSA()(image, seeded(2), ["a"] * 6)
    assert corruption.flatten(1).any(dim=1).all()
    inside = (corrupted - image).abs().mean(dim=1, keepdim=True)
    eroded = -torch.nn.functional.max_pool2d(-corruption.float(), 3, 1, 1) > 0
    rim = corruption & ~eroded
    assert inside[rim].mean() < 0.6 * inside[eroded].mean()


# ------------------------------------------------------------------------------ Mixed


class Painted(Synthesis):
    """Paints all images in one brightness."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def propose(
        self, image: Tensor, generator: torch.Generator, category: Any
    ) -> tuple[Tensor, Tensor]:
        assert category is None or len(category) == len(image)
        return torch.full_like(image, self.value), torch.ones_like(image[:, :1], dtype=torch.bool)


def test_each_image_gets_one_recipe_by_weight() -> None:
    recipes = {"dark": Painted(0.0), "grey": Painted(0.5), "bright": Painted(1.0)}
    mixed = Mixed(recipes, {"dark": 1, "grey": 0, "bright": 3})
    corrupted, corruption = mixed(images(400, 17, 17), seeded(), ["bolt"] * 400)
    assert corruption.all()
    values = corrupted[:, 0, 0, 0]
    assert torch.equal(corrupted, values.view(-1, 1, 1, 1).expand_as(corrupted))
    assert set(values.tolist()) == {0.0, 1.0}
    assert 0.68 < values.mean() < 0.82


def test_gpu_and_cpu_agree_on_who_gets_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the path without waiting, which a CPU does not take by itself."""
    mixed = Mixed({"dark": Painted(0.0), "bright": Painted(1.0)}, {"dark": 1, "bright": 1})
    expected = mixed(images(20), seeded())
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    assert torch.equal(mixed(images(20), seeded())[0], expected[0])
    assert augment(images(5), 3, seeded()).isfinite().all()


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Mixed({"a": Painted(0)}, {"b": 1}), "recipes names a"),
        (lambda: Mixed({"a": Painted(0)}, {"a": 0}), "one weight above 0"),
        (lambda: Perlin(probability=2), "probability=2"),
        (lambda: Perlin(beta=(0.5, 0.1)), "beta="),
        (lambda: Perlin(exponents=(3, 1)), "exponents="),
        (lambda: Smudge(area=(0.0, 0.1)), "area="),
        (lambda: CutPaste(area=(0.2, 0.1)), "area="),
        (lambda: CutPaste(aspect=(2, 3)), "aspect="),
        (lambda: NSA(half_size=(0.1, 0.6)), "half_size="),
        (lambda: Confetti(pieces=(0, 2)), "pieces="),
        (lambda: Confetti(side=(5, 2)), "side="),
        (lambda: Confetti(smoothing=4), "smoothing=4"),
        (lambda: SaliencyPerlin(saliency="none at all"), "saliency=none at all"),  # type: ignore[arg-type]
        (lambda: SaliencyPerlin(area=(0.2, 0.1)), "area="),
    ],
)
def test_wrong_numbers_are_refused(build: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        build()


@pytest.mark.real_data
def test_real_textures_are_read() -> None:
    folder = os.environ.get("ANOMALY_LIT_DATA")
    if not folder:
        pytest.skip("ANOMALY_LIT_DATA is not set")
    drawn = TextureFolder(folder, 8)(4, 64, 64, seeded())
    assert drawn.std() > 0.05


# ------------------------------------------------------------------------------ general


@pytest.mark.parametrize("shape", [blob, strip, stroke])
def test_shapes_are_small_and_varied(shape: Any) -> None:
    region = shape(torch.zeros(60, 3, 128, 96), seeded())
    share = region.flatten(1).float().mean(dim=1)
    assert region.dtype == torch.bool
    assert (share > 0).float().mean() > 0.9
    assert share.max() < 0.25
    assert share.std() > 0.2 * share.mean()


def test_stroke_is_connected() -> None:
    from scipy import ndimage

    for mask in stroke(torch.zeros(20, 3, 256, 256), seeded())[:, 0].numpy():
        _regions, count = ndimage.label(mask, np.ones((3, 3)))
        assert count <= 3  # it may leave the image and come back


def test_shifted_rolls_each_image_by_its_own_distance() -> None:
    image = torch.rand(3, 3, 5, 7, generator=seeded())
    moved = shifted(image, seeded(1))
    for one, other in zip(image, moved, strict=True):
        rolls = [one.roll((-i, -j), (1, 2)) for i in range(5) for j in range(7)]
        assert sum(torch.equal(other, roll) for roll in rolls) == 1


@pytest.mark.parametrize("size", [(16, 24), (17, 23)])
def test_shuffled_tiles_are_the_image_s_tiles(size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *size, generator=seeded())
    mixed = shuffled_tiles(image, seeded(1))
    assert mixed.shape == image.shape
    assert not torch.equal(mixed, image)
    if size == (16, 24):
        for one, other in zip(image, mixed, strict=True):
            tiles = [one[:, r : r + 2, c : c + 3] for r in range(0, 16, 2) for c in range(0, 24, 3)]
            found = [
                other[:, r : r + 2, c : c + 3] for r in range(0, 16, 2) for c in range(0, 24, 3)
            ]
            order = sorted(tuple(t.flatten().tolist()) for t in tiles)
            assert order == sorted(tuple(t.flatten().tolist()) for t in found)


def test_hard_border_keeps_to_one_content() -> None:
    recipe = GeneralAnomalies(
        contents={"grey": 1.0}, shapes={"strip": 1.0}, beta=(0.0, 0.0), augmentations=0, feather=1,
        probability=1.0,
    )  # fmt: skip
    corrupted, corruption = recipe(images(6, 128, 128), seeded())
    for image, mask in zip(corrupted, corruption, strict=True):
        inside = image[mask.expand_as(image)]
        assert inside.clamp(0.01, 0.99).std() < 0.15


def test_feather_lies_within_the_reported_corruption() -> None:
    """A faded border is weaker than the middle."""
    recipe = GeneralAnomalies(
        contents={"grey": 1.0}, shapes={"blob": 1.0}, beta=(0.0, 0.0), augmentations=0, feather=5,
        probability=1.0,
    )  # fmt: skip
    image = torch.zeros(8, 3, 128, 128)
    corrupted, corruption = recipe(image, seeded())
    inner = -torch.nn.functional.max_pool2d(-corruption.float(), 9, 1, 4) > 0
    border = corruption & ~inner
    assert (
        corrupted.mean(dim=1, keepdim=True)[border].mean()
        < corrupted.mean(dim=1, keepdim=True)[inner].mean()
    )


@pytest.mark.parametrize(
    "wrong",
    [{"shapes": {"cube": 1.0}}, {"contents": {"grey": -1.0}}, {"beta": (0.5, 0.2)}, {"feather": 2}],
)
def test_general_refuses_what_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"dataset\.synthesis"):
        GeneralAnomalies(**wrong)


def test_shuffled_and_mirrored_augmentations_stay_in_range_and_repeat() -> None:
    image = images(6, 16, 16, 0)

    def draw(**options: bool) -> Tensor:
        return augment(image, 3, seeded(1), mirror=True, **options)

    changed = draw(shuffle=True)
    assert torch.equal(changed, draw(shuffle=True))
    assert changed.shape == image.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert not torch.equal(changed, draw())


def test_scars_may_keep_their_size_in_pixels() -> None:
    image = images(40, 128, 128, 0)
    scaled = CutPaste("scar", scar_angle=0.0)(image, seeded(1))[1].float().mean()
    fixed = CutPaste("scar", scar_angle=0.0, scale_scars=False)(image, seeded(1))[1].float().mean()
    assert fixed.item() == pytest.approx(4 * scaled.item(), rel=0.25)  # twice as long and wide
