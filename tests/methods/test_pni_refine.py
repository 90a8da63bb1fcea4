"""PNI's refinement: its network, its losses, its map, and what it loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from anomaly_lit.methods.pni_refine import RefineNet
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


@pytest.fixture
def trained(small_method: Build, fit: Build, make_batch: Build) -> Build:
    """Builds ``trained(**changes)``: a tiny network upon a bank of the batch."""

    def build(**changes: Any) -> Any:
        method = small_method("pni_refine", **changes)
        fit(method, make_batch(), 1)
        return method.eval()

    return build


def network(width: int = 32) -> RefineNet:
    torch.manual_seed(0)
    return RefineNet(Backbone("resnet18.tv_in1k", [0, 3], "random"), width).eval()


def test_the_two_stems_are_averaged_and_the_rest_of_the_first_goes_on() -> None:
    part = network()
    image, coarse = torch.rand(2, 3, 32, 48), torch.rand(2, 1, 32, 48)

    def stem(layers: Any, x: torch.Tensor) -> torch.Tensor:
        x = (x - part.mean) / part.std
        return layers["act1"](layers["bn1"](layers["conv1"](x)))

    layers = part.image_encoder
    mixed = (stem(layers, image) + stem(part.map_stem, coarse.repeat(1, 3, 1, 1))) / 2
    deep = layers["layer3"](layers["layer2"](layers["layer1"](layers["maxpool"](mixed))))
    expected = part.shrink(deep)
    for _, reduce, _, mix, _ in part.up:
        expected = F.interpolate(expected, scale_factor=2, mode="bilinear")
        expected = mix(reduce(expected).relu()).relu()
    torch.testing.assert_close(part(image, coarse), part.out(expected))


def test_stems_are_alike_at_the_start_and_learn_apart() -> None:
    part = network()
    part.copy_stem()
    pairs = zip(part.stem(), part.map_stem.items(), strict=True)
    for (name, one), (other_name, other) in pairs:
        assert name == other_name
        for first, second in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(first, second)
            assert first is not second
            assert first.requires_grad


def test_network_of_the_paper_has_its_channels() -> None:
    part = RefineNet(Backbone("densenet161.tv_in1k", [0, 4], "random"), 768)
    assert (part.shrink.in_channels, part.shrink.out_channels) == (2208, 768)
    assert [stage[1].out_channels for stage in part.up] == [384, 192, 96, 48, 24]
    assert part.out.in_channels == 24
    with torch.no_grad():
        assert part.eval()(torch.rand(1, 3, 64, 64), torch.rand(1, 1, 64, 64)).shape[-1] == 64


def test_loss_compares_map_and_slopes_with_the_mask(trained: Build, make_batch: Build) -> None:
    method, batch = trained(), make_batch()
    losses = method.losses(batch)
    small = {"size": (32, 32), "mode": "bilinear", "align_corners": True}
    image = F.interpolate(batch["corrupted"], **small)
    coarse = F.interpolate(method.coarse_map(batch["corrupted"]), **small)
    mask = F.interpolate(batch["corruption"].float(), **small)
    away = coarse + method.network(image, coarse) - mask
    torch.testing.assert_close(losses["mask"], 0.5 * away.square().mean())
    down = (away[:, :, 1:] - away[:, :, :-1]).square().mean()
    across = (away[..., 1:] - away[..., :-1]).square().mean()
    torch.testing.assert_close(losses["slopes"], 0.25 * down + 0.25 * across)


def test_scale_is_0_where_normal_and_1_at_defects(trained: Build, make_batch: Build) -> None:
    method, batch = trained(), make_batch()
    coarse, defect = method.coarse_map(batch["corrupted"]), batch["corruption"]
    assert float(coarse[~defect].mean()) == pytest.approx(0, abs=1e-4)
    assert float(coarse[defect].mean().abs()) == pytest.approx(1, abs=1e-4)


def test_a_share_of_the_refined_map_is_mixed_in(trained: Build, make_batch: Build) -> None:
    method, image = trained(weight=0.0, size=64), make_batch()["image"]
    torch.testing.assert_close(method(image).anomaly_map, method.coarse_map(image))
    method.weight = 0.3
    coarse = method.coarse_map(image)
    expected = coarse + 0.3 * method.network(image, coarse)
    torch.testing.assert_close(method(image).anomaly_map, expected)
    torch.testing.assert_close(method(image).score, expected.amax(dim=(1, 2, 3)))


def test_images_maps_and_masks_are_varied_together(trained: Build) -> None:
    method = trained(flip=1.0, turn=0.0)
    whole = torch.rand(2, 5, 16, 16)
    torch.testing.assert_close(method.varied(whole), whole.flip(-1), atol=1e-5, rtol=0)
    method.flip, method.turn = 0.5, 30.0
    copies = torch.rand(2, 1, 16, 16).expand(-1, 5, -1, -1)
    turned = method.varied(copies)
    assert torch.equal(turned, turned[:, :1].expand(-1, 5, -1, -1))


def test_pni_stays_as_it_is(trained: Build, make_batch: Build, fit: Build) -> None:
    method = trained()
    before = {key: value.clone() for key, value in method.pni.state_dict().items()
              if isinstance(value, torch.Tensor)}  # fmt: skip
    fit(method, make_batch(), 2)
    after = method.pni.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not method.train().pni.training


def save(path: Path, method: Any) -> str:
    torch.save({"state_dict": method.state_dict()}, path)
    return str(path)


def test_loads_a_trained_pni_with_its_network(
    small_method: Build, fit: Build, make_batch: Build, tmp_path: Path
) -> None:
    first, batch = small_method("pni"), make_batch()
    fit(first, batch, 2)
    path = save(tmp_path / "last.ckpt", first.eval())
    method = small_method("pni_refine", pni=small_method("pni"), pni_weights=path)
    fit(method, batch, 1)
    torch.testing.assert_close(
        method.pni(batch["image"]).anomaly_map, first(batch["image"]).anomaly_map
    )


def test_errors_say_what_to_change(
    small_method: Build, fit: Build, make_batch: Build, tmp_path: Path
) -> None:
    batch = make_batch()
    with pytest.raises(UserError, match=r"method\.pni_weights=absent\.ckpt: no such file"):
        fit(small_method("pni_refine", pni_weights="absent.ckpt"), batch, 1)
    path = save(tmp_path / "other.ckpt", small_method("uniad"))
    with pytest.raises(UserError, match=r"does not fit method\.pni: .* give a checkpoint of"):
        fit(small_method("pni_refine", pni_weights=path), batch, 1)
    with pytest.raises(UserError, match="network must be trained first: set method"):
        fit(small_method("pni_refine", pni=small_method("pni")), batch, 1)
    with pytest.raises(UserError, match="size=33 must be a multiple of 16"):
        small_method("pni_refine", size=33)
    with pytest.raises(UserError, match="must give its first and its last stage"):
        RefineNet(Backbone("resnet18.tv_in1k", [1, 2, 3], "random"), 8)
    clean = {**batch, "corruption": torch.zeros_like(batch["corruption"])}
    with pytest.raises(UserError, match="none of 64 images got a synthetic defect"):
        fit(small_method("pni_refine"), clean, 1)
