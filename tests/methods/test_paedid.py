"""PAEDID's patches, proximal maps and solver against closed forms; a defect that is found."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.inference.openvino import OpenVINO
from anomaly_lit.methods import paedid
from anomaly_lit.methods.paedid import network, solver
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


def autoencoder(patch: int = 16, stride: int = 4, positions: bool = False) -> Any:
    torch.manual_seed(0)
    return network.PatchAutoencoder(patch, stride, [4, 4, 8], 6, positions).eval()


@pytest.mark.parametrize(("patch", "stride"), [(16, 4), (16, 8), (32, 8)])
@pytest.mark.parametrize("size", [(64, 64), (41, 70)])
def test_folding_undoes_unfolding(patch: int, stride: int, size: tuple[int, int]) -> None:
    image, part = torch.rand(2, 3, *size), autoencoder(patch, stride)
    patches = part.unfold(image)
    assert patches.shape[1] == -(-size[0] // stride) * -(-size[1] // stride)
    torch.testing.assert_close(part.fold(patches, size), image)


def test_patches_are_squares_of_the_padded_image_in_rows() -> None:
    image, part = torch.rand(1, 3, 32, 40), autoencoder(16, 8)
    padded = F.pad(image, (4, 4, 4, 4), mode="reflect")
    patches, number = part.unfold(image), 0
    for row in range(4):
        for column in range(5):
            top, left = 8 * row, 8 * column
            own = padded[0, :, top : top + 16, left : left + 16]
            assert torch.equal(patches[0, number], own)
            number += 1
    assert torch.equal(part.places(image)[[0, 4, 19]], torch.tensor([[-1, -1], [-1, 1], [1, 1.0]]))


def test_1024_patches_of_an_image_of_256() -> None:
    assert autoencoder(32, 8).unfold(torch.rand(1, 3, 256, 256)).shape == (1, 1024, 3, 32, 32)


def test_a_position_changes_what_is_rebuilt() -> None:
    part, image = autoencoder(positions=True), torch.full((1, 3, 32, 32), 0.5)
    _, patches = part(image)
    assert not torch.allclose(patches[0, 0], patches[0, -1])
    _, patches = autoencoder()(image)
    torch.testing.assert_close(patches[0, 0], patches[0, -1])


def test_colours_are_shortened() -> None:
    x = torch.randn(1, 3, 4, 5)
    found = solver.shrink_colours(x, 0.7)
    for row in range(4):
        for column in range(5):
            colour = x[0, :, row, column]
            length = colour.norm()
            expected = colour * max(0.0, 1 - 0.7 / float(length))
            torch.testing.assert_close(found[0, :, row, column], expected)


def test_divergence_is_the_negative_adjoint_of_the_gradient() -> None:
    x, dual = torch.randn(2, 3, 5, 6), torch.randn(2, 2, 3, 5, 6)
    left = (solver.gradient(x) * dual).sum()
    torch.testing.assert_close(left, -(x * solver.divergence(dual)).sum())


def variation(x: Tensor) -> Tensor:
    return solver.gradient(x).square().sum(dim=0).sqrt().sum()


def test_smoothing_a_step_of_two_halves_is_known() -> None:
    """A step from 0 to 1 comes nearer by the amount over the width of each half."""
    x = torch.zeros(1, 1, 4, 8)
    x[..., 4:] = 1
    found = solver.reduce_variation(x, 0.4, 2000)
    expected = torch.where(x > 0, 1 - 0.4 / 4, 0.4 / 4)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert torch.equal(solver.reduce_variation(x, 0.0, 10), x)
    flat = solver.reduce_variation(torch.full((1, 3, 4, 4), 0.3), 0.5, 10)
    torch.testing.assert_close(flat, torch.full((1, 3, 4, 4), 0.3))


def test_smoothing_lowers_its_energy() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, 12, 12)

    def energy(u: Tensor) -> Tensor:
        return 0.5 * (u - x).square().sum() + 0.3 * variation(u)

    found = solver.reduce_variation(x, 0.3, 500)
    for _ in range(20):
        assert energy(found) <= energy(found + 0.05 * torch.randn_like(x)) + 1e-4


def projector(image: Tensor) -> Tensor:
    """Onto images that are constant along each row: orthogonal and linear."""
    return image.mean(dim=-1, keepdim=True).expand_as(image).clone()


def run(image: Tensor, **changes: Any) -> solver.Decomposition:
    settings: dict[str, Any] = {
        "prior": projector, "sparsity": 0.1, "smoothness": 0.05, "weight": 1.0, "growth": 1.0,
        "most_weight": 10.0, "iterations": 20, "tolerance": 0.0, "smoothing_iterations": 300,
    }  # fmt: skip
    return solver.decompose(image, **settings | changes)


def test_energy_never_rises_with_a_linear_projector_and_one_channel() -> None:
    torch.manual_seed(0)
    image = projector(torch.rand(1, 1, 16, 16)) + 0.05 * torch.randn(1, 1, 16, 16)
    image[..., 4:9, 5:11] += 0.8

    def energy(b: Tensor, s: Tensor) -> float:
        prior = 0.5 * (b - projector(b)).square().sum()
        rest = 0.5 * (image - b - s).square().sum()
        return float(rest + 0.1 * s.abs().sum() + 0.05 * variation(s) + prior)

    parts = [run(image, iterations=count) for count in range(1, 7)]
    energies = [energy(part.background, part.defect) for part in parts]
    for before, after in pairwise(energies):
        assert after <= before + 1e-4
    assert energies[-1] < energies[0] - 0.1


def test_an_image_that_the_prior_keeps_has_no_defect() -> None:
    image = projector(torch.rand(2, 3, 16, 16))
    found = run(image, tolerance=1e-3)
    assert not found.defect.any()
    torch.testing.assert_close(found.background, image)
    assert found.iterations.tolist() == [1, 1]


def test_background_is_the_best_for_its_defect_with_a_projector() -> None:
    """The energy has no slope in B: (B - (Y - S)) + r (B - P(B)) = 0."""
    torch.manual_seed(0)
    image = projector(torch.rand(2, 3, 16, 16)) + 0.05 * torch.randn(2, 3, 16, 16)
    image[..., 4:9, 5:11] += 0.8
    for weight in (0.5, 1.0, 10.0):
        b, s, _ = run(image, weight=weight, iterations=3)
        assert s.any()
        slope = (b - (image - s)) + weight * (b - projector(b))
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-5, rtol=0)


def coarse(image: Tensor) -> Tensor:
    """Blur and pale rows: an image becomes grey if this is repeated, so it is no projector."""
    rows = projector(image)[..., :1]
    blurred = F.avg_pool2d(F.pad(rows, (0, 0, 2, 2), mode="reflect"), (5, 1), 1)
    return (0.5 + 0.9 * (blurred - 0.5)).expand_as(image).clone()


def rows_of_brightness(count: int) -> Tensor:
    """Images that are constant along each row but for noise, bright above and dark below."""
    waves = 0.3 + 0.25 * (torch.arange(64.0) / 10 + 6.28 * torch.rand(count, 1)).sin()
    return (waves[:, None, :, None] + 0.01 * torch.randn(count, 3, 64, 64)).clamp(0, 1)


def split_with_coarse_prior(image: Tensor) -> solver.Decomposition:
    """Run with the defaults, and weights from what the prior leaves of normal images."""
    normal = rows_of_brightness(8)
    noise = float(paedid.deviation(normal - coarse(normal)))
    weights = {"sparsity": 2.5 * noise, "smoothness": 1.5 * noise}
    settings = {"growth": 1.1, "iterations": 30, "tolerance": 1e-3, "smoothing_iterations": 10}
    return run(image, prior=coarse, **weights, **settings)


def test_a_normal_image_that_the_prior_rebuilds_coarsely_has_nearly_no_defect() -> None:
    """A prior that is applied to its own output makes it grey, and all the rest a defect."""
    torch.manual_seed(0)
    normal, repeated = rows_of_brightness(4), rows_of_brightness(4)
    parts = split_with_coarse_prior(normal)
    assert (parts.defect != 0).any(dim=1).float().mean() < 0.01
    for _ in range(30):
        repeated = coarse(repeated)
    assert (normal - parts.background).norm() <= (normal - coarse(normal)).norm()
    assert (normal - repeated).norm() > 3 * (normal - coarse(normal)).norm()


def test_a_square_is_found_although_the_prior_is_coarse() -> None:
    torch.manual_seed(0)
    image, truth = rows_of_brightness(4), torch.zeros(4, 1, 64, 64, dtype=torch.bool)
    truth[..., 22:32, 30:40] = True
    parts = split_with_coarse_prior(image + 0.4 * truth)
    assert overlap((parts.defect != 0).any(dim=1, keepdim=True), truth) > 0.8


def test_a_faint_defect_shows_when_the_prior_has_its_full_weight() -> None:
    """Weight 1 needs twice the sparsity, weight 10 only 1.1 times."""
    image = torch.full((1, 3, 32, 32), 0.2)
    image[..., 8:16, 8:16] += 0.1 / 3**0.5 * 1.7  # a colour of length 0.17
    settings = {"prior": lambda x: torch.full_like(x, 0.2), "smoothness": 0.0, "tolerance": 1e-3}
    assert not run(image, **settings).defect.any()
    grown = run(image, **settings, growth=1.1, iterations=60).defect
    assert torch.equal((grown != 0).any(dim=1), (image != 0.2).any(dim=1))


@pytest.mark.parametrize("structure", [0.0, 0.6])
def test_deviation_of_noise_is_raised_where_what_is_left_has_structure(structure: float) -> None:
    torch.manual_seed(0)
    residual = 0.05 * torch.randn(4, 3, 32, 32)
    residual[..., 10:14] += structure  # an edge that the prior blurs, in an eighth of the pixels
    found, plain = paedid.deviation(residual), residual.square().mean().sqrt()
    assert found == plain if not structure else found > plain
    left = solver.defect_in(residual, 2.5 * found, 1.5 * found)
    assert (left != 0).any(dim=1).float().mean() <= 0.01


def test_sparsity_is_higher_where_normal_images_vary_more(small_method: Build) -> None:
    torch.manual_seed(0)
    method, image = small_method("paedid", sparsity=None).eval(), torch.zeros(1, 3, 64, 64)
    residual = 0.02 * torch.randn(6, 3, 64, 64)
    residual[..., 32:] *= 5
    method.measure(residual)
    weight = method.sparsity_in(image)
    assert weight.shape == (1, 1, 64, 64)
    torch.testing.assert_close(weight[..., 40:] / weight[..., :24], torch.tensor(5.0).expand(
        1, 1, 64, 24), rtol=0.1, atol=0)  # fmt: skip
    places = paedid.spread(method.noise_places, residual)
    assert paedid.share_of_defects(residual, method.noise_std, places) <= 0.01
    assert method.sparsity_in(torch.zeros(1, 3, 40, 72)).shape == (1, 1, 40, 72)
    method.sparsity = 0.05
    assert method.sparsity_in(image) == 0.05


def test_even_noise_has_no_places() -> None:
    places = paedid.places_of(0.1 * torch.randn(8, 3, 64, 64))
    torch.testing.assert_close(places, torch.ones(1, 1, 8, 8), rtol=0.1, atol=0)
    assert not paedid.places_of(torch.zeros(1, 3, 16, 16)).any()


def test_deviation_of_a_residual_that_is_not_finite_is_not_either() -> None:
    assert paedid.deviation(torch.full((1, 3, 8, 8), torch.nan)).isnan()


def test_an_image_stops_by_itself_whatever_its_batch() -> None:
    torch.manual_seed(0)
    image = projector(torch.rand(3, 3, 16, 16))
    image[1, :, 4:9, 5:11] += 0.8
    image[2, :, 2:5] += torch.rand(3, 3, 16)
    settings = {"tolerance": 0.02, "growth": 1.1, "most_weight": 1.2, "smoothing_iterations": 10}
    together = run(image, **settings)
    assert len(together.iterations.unique()) > 1
    for row in range(3):
        alone = run(image[row : row + 1], **settings)
        torch.testing.assert_close(alone.defect[0], together.defect[row])
        torch.testing.assert_close(alone.background[0], together.background[row])
        assert alone.iterations[0] == together.iterations[row]


def test_no_defect_outside_of_the_region(small_method: Build, make_batch: Build) -> None:
    method = small_method("paedid", region=[0.25, 0.0, 1.0, 0.5], sparsity=0.0, smoothness=0.0)
    defect = method.eval().decompose(make_batch()["image"]).defect
    assert not defect[..., :16, :].any()
    assert not defect[..., 32:].any()
    assert defect[..., 16:, :32].any()


def overlap(mask: Tensor, truth: Tensor) -> float:
    """Return the intersection over the union."""
    return float((mask & truth).sum() / (mask | truth).sum())


def textures(count: int) -> Tensor:
    """Oblique waves at any phase, 64 x 64, with a little noise."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    phase = 6.28 * torch.rand(count, 1, 1)
    wave = 0.4 + 0.2 * (0.6 * rows + 0.4 * columns + phase).sin()
    image = wave[:, None] * torch.tensor([1.0, 0.9, 0.7]).view(3, 1, 1)
    return (image + 0.01 * torch.randn(count, 3, 64, 64)).clamp(0, 1)


@pytest.mark.slow
def test_a_bright_square_on_a_learned_texture_is_recovered(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method = small_method("paedid", channels=[8, 16, 32], latent=8, iterations=30)
    torch.manual_seed(0)
    fit(method, make_batch(4) | {"image": textures(4)}, 150)
    image, truth = textures(4), torch.zeros(4, 1, 64, 64, dtype=torch.bool)
    truth[..., 22:42, 30:50] = True
    image = torch.where(truth, torch.tensor(0.95), image)
    with torch.inference_mode():
        found = method.eval().segment(method.decompose(image).defect)
    assert overlap(found, truth) > 0.8


def test_weights_follow_from_the_noise_of_held_out_images(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method, batch = small_method("paedid", sparsity=None), make_batch()
    with pytest.raises(UserError, match=r"method\.sparsity is null.*dataset\.holdout above 0"):
        method.eval()(batch["image"])
    fit(method, batch, 1)
    with torch.no_grad():
        residual = batch["image"] - method.eval().prior(batch["image"])
        noise = paedid.deviation(residual, paedid.spread(paedid.places_of(residual), residual))
    torch.testing.assert_close(method.noise_std, noise)
    assert method.weight_of("sparsity") == pytest.approx(2.5 * float(noise))
    assert method.weight_of("smoothness") == 0.03


def test_map_is_the_defect_with_ties_broken_and_the_score_its_highest_mean(
    small_method: Build, make_batch: Build
) -> None:
    method, image = small_method("paedid").eval(), make_batch()["image"]
    with torch.inference_mode():
        parts, found = method.decompose(image), method(image)
    expected = parts.defect.norm(dim=1) + 1e-3 * (image - parts.background).norm(dim=1)
    torch.testing.assert_close(found.anomaly_map[:, 0], expected)
    highest = expected.flatten(1).sort(descending=True).values[:, :20]  # 0.5 % of 4096
    torch.testing.assert_close(found.score, highest.mean(dim=1))


def test_region_of_the_defect_is_opened_and_loses_small_parts(small_method: Build) -> None:
    method, defect = small_method("paedid", least_region=10), torch.zeros(1, 3, 32, 32)
    defect[:, 1, 4:9, 4:9] = 0.2  # 25 px
    defect[:, 0, 20:23, 20:23] = 0.2  # 9 px: too small
    defect[:, 0, 12, :] = 0.2  # a line: opened away
    found = method.segment(defect)
    expected = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    expected[..., 4:9, 4:9] = True
    assert torch.equal(found, expected)


def test_export_is_refused_in_words(small_method: Build, make_batch: Build) -> None:
    method, image = small_method("paedid").eval(), make_batch()["image"]
    with pytest.raises(UserError, match="PAEDID solves an optimisation problem for each image"):
        OpenVINO(method, "bolt", image)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"solver": "rpca"}, r"method\.solver=rpca: choose decomposition or residual"),
        ({"patch": 20}, r"method\.patch=20 must be a multiple of 8"),
        ({"stride": 12}, r"method\.stride=12 must be at most half"),
        ({"iterations": 0}, r"method\.iterations=0"),
        ({"region": [0, 0, 2, 1]}, r"method\.region=\[0, 0, 2, 1\]"),
    ],
)
def test_unknown_and_impossible_values_are_named(
    changes: dict[str, Any], words: str, small_method: Build
) -> None:
    with pytest.raises(UserError, match=words):
        small_method("paedid", **changes)
