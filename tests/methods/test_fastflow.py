"""FastFlow's blocks against autograd and plain formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.losses import total
from anomaly_lit.methods.fastflow import CouplingStep, Flow
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import UserError

Build = Callable[..., Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


def stirred(flow: Any) -> Any:
    """With weights far from where they start, so that every part of a step does something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(torch.randn_like(parameter))
    return flow


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("channels", [2, 5, 6])
def test_log_determinant_is_autograd_s(kernel: int, double: bool, channels: int) -> None:
    step = stirred(CouplingStep(channels, kernel, 1.0, double)).double()
    x = torch.randn(1, channels, 3, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda flat: step(flat.view_as(x))[0].flatten(), x.flatten()
    )
    assert isinstance(jacobian, Tensor)
    _, log_det = step(x)
    torch.testing.assert_close(log_det[0], jacobian.slogdet().logabsdet)


@pytest.mark.parametrize("double", [False, True])
def test_inverse_takes_a_flow_back(double: bool) -> None:
    flow = Flow(7, [3, 1, 3, 1], 0.5, double, None)
    features = torch.randn(2, 7, 6, 5)
    noise, _ = flow(features)
    torch.testing.assert_close(flow.inverse(noise), flow.normalise(features), atol=1e-4, rtol=1e-4)


def test_step_is_the_published_formula() -> None:
    step = stirred(CouplingStep(4, 3, 1.0, double_coupling=False))
    x = torch.randn(2, 4, 5, 5)
    answer = 0.1 * step.subnet(x[:, :2])
    log_s = 2 * torch.tanh(answer[:, :2])
    changed = x[:, 2:] * log_s.exp() + answer[:, 2:]
    gain = 0.1 * F.softplus(step.scale, beta=0.5)
    y = torch.cat([x[:, :2], changed], dim=1) * gain + step.offset
    expected = y[:, step.permutation]
    log_det = log_s.sum(dim=(1, 2, 3)) + 25 * gain.log().sum()
    torch.testing.assert_close(step(x), (expected, log_det))


def test_scale_starts_at_one() -> None:
    torch.testing.assert_close(CouplingStep(6, 1, 1.0, False)._scale(), torch.ones(1, 6, 1, 1))


@pytest.mark.parametrize(
    ("name", "channels", "steps", "kernels", "ratio", "double", "millions"),
    [
        ("resnet18", (64, 128, 256), 8, [3], 1.0, False, 4.66),
        ("resnet18", (64, 128, 256), 8, [3, 1], 1.0, False, 2.59),
        ("wide_resnet50_2", (256, 512, 1024), 8, [3, 1], 1.0, False, 41.3),
        ("deit", (768,), 20, [3, 1], 0.16, False, 7.1),
        ("deit", (768,), 20, [3, 1], 0.16, True, 14.1),
    ],
)
def test_parameters_are_as_many_as_in_the_paper(
    name: str,
    channels: tuple[int, ...],
    steps: int,
    kernels: list[int],
    ratio: float,
    double: bool,
    millions: float,
) -> None:
    sizes = [kernels[step % len(kernels)] for step in range(steps)]
    with torch.device("meta"):
        flows = [Flow(count, sizes, ratio, double, None) for count in channels]
    found = sum(p.numel() for flow in flows for p in flow.parameters())
    assert found / 1e6 == pytest.approx(millions, abs=0.05)


def test_kernels_alternate(small_method: Build) -> None:
    method = small_method("fastflow", steps=4)
    sizes = [step.subnet[0].kernel_size[0] for step in method.flows[0].steps]
    assert sizes == [3, 1, 3, 1]
    sizes = [
        s.subnet[0].kernel_size[0] for s in small_method("fastflow", kernels="3-3").flows[0].steps
    ]
    assert set(sizes) == {3}


def test_loss_is_the_negative_log_likelihood(small_method: Build, make_batch: Build) -> None:
    method = stirred(small_method("fastflow")).train()
    batch = make_batch()
    expected = torch.zeros(())
    for flow, features in zip(method.flows, method.backbone(batch["image"]), strict=True):
        noise, log_det = flow(features)
        normal = torch.distributions.Normal(0, 1).log_prob(noise).sum(dim=(1, 2, 3))
        constant = 0.5 * math.log(2 * math.pi) * noise[0].numel()
        expected = expected - (normal + constant + log_det).mean()
    losses = method.losses(batch)
    torch.testing.assert_close(total(losses), expected, rtol=1e-4, atol=1e-2)
    assert set(losses) == {"likelihood0", "likelihood1", "likelihood2"}


def test_map_is_one_minus_the_likelihood_averaged_over_stages(
    small_method: Build, make_batch: Build
) -> None:
    method = small_method("fastflow", average=0.0, smoothing=0.0).eval()
    image = make_batch()["image"]
    with torch.no_grad():
        maps = []
        for flow, features in zip(method.flows, method.backbone(image), strict=True):
            chance = torch.exp(-0.5 * flow(features)[0].square().mean(dim=1, keepdim=True))
            maps.append(F.interpolate(1 - chance, (64, 64), mode="bilinear"))
        expected = sum(maps) / 3
        found = method(image)
    torch.testing.assert_close(found.anomaly_map, expected)
    torch.testing.assert_close(found.score, expected.amax(dim=(1, 2, 3)))
    assert 0 <= found.anomaly_map.min() <= found.anomaly_map.max() <= 1


def test_average_moves_with_each_step_and_scores(
    small_method: Build, fit: Build, make_batch: Build
) -> None:
    method = small_method("fastflow")
    fit(method, make_batch(), 3)
    assert method.averaged.n_averaged == 3
    first, *_ = method.scoring_flows()
    assert not torch.equal(method.flows[0].steps[0].offset, first.steps[0].offset)
    with torch.no_grad():
        for parameter in method.flows.parameters():
            parameter.zero_()
        assert method.eval()(make_batch()["image"]).anomaly_map.std() > 0


def test_affine_normalisation_belongs_to_an_image_size(small_method: Build) -> None:
    method = small_method("fastflow", affine=True, image_size=[64, 96])
    assert method.flows[0].norm.normalized_shape == (64, 16, 24)


def test_average_out_of_range_is_an_error(small_method: Build) -> None:
    with pytest.raises(UserError, match=r"method\.average=1"):
        small_method("fastflow", average=1.0)


def test_a_transformer_s_maps_pass_its_last_normalisation() -> None:
    torch.manual_seed(0)
    options = {"img_size": 64}
    backbone = Backbone(
        "deit_tiny_distilled_patch16_224.fb_in1k", [5], "random", options=options, final_norm=True
    )
    maps = backbone(torch.rand(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 192, 4, 4)]
    torch.testing.assert_close(maps[0].mean(dim=1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        maps[0].std(dim=1, unbiased=False), torch.ones(2, 4, 4), atol=1e-3, rtol=0
    )
    assert len(backbone.network.model.blocks) == 6


def test_a_network_without_a_last_normalisation_is_named() -> None:
    with pytest.raises(UserError, match="final_norm=false"):
        Backbone("resnet18.tv_in1k", weights="random", final_norm=True)
