"""AMI-Net's blocks against the formulas of the paper and its code, written plainly."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from scipy import ndimage, stats
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.losses import total
from anomaly_lit.masks import NoMask, RandomMask
from anomaly_lit.methods.ami_net import (
    AMINet,
    ClusterBranch,
    InpaintingNetwork,
    adaptive_mask,
    cluster_loss,
    token_distance,
)
from anomaly_lit.nn.aggregate import aggregate
from anomaly_lit.nn.transformer import add_jitter, sincos_positions
from anomaly_lit.types import UserError

Build = Callable[..., Any]


@pytest.fixture
def ami_net(small_method: Build) -> AMINet:
    return small_method("ami_net_small")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance_by_hand(t: np.ndarray, c: np.ndarray) -> float:
    cosine = t @ c / (np.linalg.norm(t) * np.linalg.norm(c))
    return float(np.linalg.norm(t - c) * (1 - cosine))


def mask_by_hand(distance: np.ndarray, sigma: float) -> np.ndarray:
    """Section by section: own centre, mean + sigma * unbiased deviation, at or beyond."""
    hidden = np.zeros(distance.shape[:2], dtype=bool)
    for image in range(distance.shape[0]):
        own = distance[image].argmin(axis=1)
        for cluster in range(distance.shape[2]):
            members = [n for n in range(distance.shape[1]) if own[n] == cluster]
            if len(members) > 1:
                scores = [float(distance[image, n, cluster]) for n in members]
                limit = statistics.mean(scores) + sigma * statistics.stdev(scores)
                for n, score in zip(members, scores, strict=True):
                    hidden[image, n] = score >= limit
    return hidden


# -------------------------------------------------------------------------------- distances


def test_token_distance_is_euclidean_times_one_minus_cosine() -> None:
    tokens, centres = random(2, 5, 7), random(2, 3, 7, seed=1)
    found = token_distance(tokens, centres)
    for b in range(2):
        for n in range(5):
            for k in range(3):
                expected = distance_by_hand(tokens[b, n].numpy(), centres[b, k].numpy())
                assert found[b, n, k].item() == pytest.approx(expected, rel=1e-4)


def test_cluster_loss_leaves_out_centres_with_themselves() -> None:
    tokens, centres = random(2, 6, 8), random(2, 3, 8, seed=1)
    near, between = [], []
    for b in range(2):
        c = centres[b].numpy()
        near += [min(distance_by_hand(t, k) for k in c) for t in tokens[b].numpy()]
        pairs = [distance_by_hand(c[i], c[j]) for i in range(3) for j in range(3) if i != j]
        between.append(sum(pairs) / (3 * 2))
    expected = np.mean(near) - 0.1 * np.mean(between)
    assert cluster_loss(tokens, centres).item() == pytest.approx(expected, rel=1e-4)


def test_gradient_of_the_cluster_loss_is_finite() -> None:
    tokens = random(1, 6, 8).requires_grad_()
    centres = tokens[:, :3].detach().clone().requires_grad_()  # distances of zero
    cluster_loss(tokens, centres).backward()
    assert tokens.grad is not None
    assert centres.grad is not None
    assert tokens.grad.isfinite().all()
    assert centres.grad.isfinite().all()


# -------------------------------------------------------------------------------- adaptive mask


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("sigma", [-0.5, 0.0, 0.5, 1.5])
def test_threshold_of_each_cluster_equals_a_loop(seed: int, sigma: float) -> None:
    distance = random(3, 20, 6, seed=seed).abs().double()
    found = adaptive_mask(distance, sigma).numpy()
    np.testing.assert_array_equal(found, mask_by_hand(distance.numpy(), sigma))


def test_large_sigma_hides_nothing_and_a_very_negative_one_everything() -> None:
    distance = random(2, 64, 3).abs()
    assert not adaptive_mask(distance, 1e6).any()
    assert adaptive_mask(distance, -1e6).all()


def test_clusters_of_one_hide_nothing() -> None:
    distance = torch.full((1, 3, 3), 9.0)
    distance[0, range(3), range(3)] = torch.tensor([1.0, 2.0, 3.0])
    assert not adaptive_mask(distance, -5.0).any()


def test_members_that_are_all_equally_far_are_hidden_together() -> None:
    distance = torch.tensor([[[0.5, 9.0], [0.5, 9.0], [0.5, 9.0], [9.0, 1.0]]])
    assert adaptive_mask(distance, 0.5).tolist() == [[True, True, True, False]]


# -------------------------------------------------------------------------------- jitter, mask


@pytest.mark.parametrize("dim", [256, 768])
def test_jitter_has_the_paper_s_relative_norm_at_every_width(dim: int) -> None:
    tokens = 3 * random(1, 400, dim)
    noise = add_jitter(tokens, 20 / math.sqrt(768)) - tokens
    relative = (noise.norm(dim=-1) / tokens.norm(dim=-1)).mean()
    assert relative.item() == pytest.approx(0.72, abs=0.005)


def test_jitter_equals_the_published_formula_at_width_768() -> None:
    tokens = random(1, 4, 768)
    torch.manual_seed(5)
    found = add_jitter(tokens, 20 / math.sqrt(768))
    torch.manual_seed(5)
    z = torch.randn_like(tokens)
    expected = tokens + z * (tokens.norm(dim=2).unsqueeze(2) / 768) * 20
    torch.testing.assert_close(found, expected)


def test_configured_jitter_is_the_paper_s() -> None:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        for name in ("ami_net", "ami_net_small"):
            cfg = compose("train", [f"method={name}", "output_dir=unused"])
            assert cfg.method.jitter == pytest.approx(20 / math.sqrt(768), abs=1e-4)


def inpainting(depth: int = 1) -> InpaintingNetwork:
    torch.manual_seed(0)
    return InpaintingNetwork(12, 16, 2, depth, sincos_positions(16, 2, 3))


def test_mask_token_is_zero_at_the_start_and_never_jittered() -> None:
    network = inpainting()
    assert not network.mask_token.any()
    hidden = torch.ones(1, 6, dtype=torch.bool)
    assert torch.equal(network(random(1, 6, 12), hidden, 0.72), network(random(1, 6, 12), hidden))


def test_hidden_tokens_are_not_seen() -> None:
    network = inpainting()
    nn.init.normal_(network.mask_token)
    hidden = torch.tensor([[True, False, True, False, False, False]])
    tokens = random(1, 6, 12)
    other = torch.where(hidden[..., None], random(1, 6, 12, seed=1), tokens)
    assert torch.equal(network(tokens, hidden), network(other, hidden))
    seen = torch.where(hidden[..., None], tokens, random(1, 6, 12, seed=1))
    assert not torch.equal(network(tokens, hidden), network(seen, hidden))


def test_all_tokens_pass_all_blocks() -> None:
    network = inpainting(depth=2)
    shapes: list[torch.Size] = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    network(random(2, 6, 12), torch.ones(2, 6, dtype=torch.bool))
    assert shapes == [(2, 6, 16), (2, 6, 16)]


def test_distances_are_taken_from_clean_tokens_and_noise_reaches_the_centres() -> None:
    torch.manual_seed(0)
    branch = ClusterBranch(12, 16, 2, 1, 3, sincos_positions(16, 2, 3))
    tokens = random(2, 6, 12)
    clean, centres = branch(tokens)
    noisy, moved = branch(tokens, jitter=0.72)
    assert torch.equal(clean, noisy)
    assert not torch.allclose(centres, moved)
    assert torch.equal(clean, branch.embed(tokens) + branch.positions)


def test_centres_belong_to_the_image() -> None:
    torch.manual_seed(0)
    branch = ClusterBranch(12, 16, 2, 1, 3, sincos_positions(16, 2, 3)).eval()
    tokens = random(2, 6, 12)
    _, together = branch(tokens)
    _, alone = branch(tokens[:1])
    torch.testing.assert_close(together[:1], alone)
    assert not torch.allclose(together[0], together[1])


def test_initialisation_follows_the_code() -> None:
    network = inpainting()
    bound = math.sqrt(6 / (12 + 16))
    assert network.embed.weight.abs().max() <= bound
    assert network.embed.weight.abs().max() > 0.9 * bound
    assert 0 < network.embed.bias.abs().max() <= 1 / math.sqrt(12)  # torch's own start
    torch.manual_seed(0)
    branch = ClusterBranch(400, 16, 2, 1, 2000, sincos_positions(16, 2, 3))
    assert branch.centres.std().item() == pytest.approx(0.02, rel=0.05)
    assert branch.embed.weight.abs().max() <= 1 / math.sqrt(400)  # torch's own


def test_share_of_hidden_patches_in_training_is_uniform() -> None:
    hidden = RandomMask()(3000, 16, 16, torch.Generator().manual_seed(0))
    share = hidden[0].flatten(1).float().mean(dim=1).numpy()
    assert share.max() < 1
    assert stats.kstest(share + 0.5 / 256, "uniform").pvalue > 0.01


# -------------------------------------------------------------------------------- whole method


def test_patches_and_maps_are_inverse(ami_net: AMINet) -> None:
    features = [random(2, c, s, s, seed=s) for c, s in ((64, 16), (128, 8), (256, 4))]
    tokens = ami_net.tokens(features)
    assert tokens.shape == (2, 16, 448 * 4)
    whole = F.pixel_shuffle(ami_net.map_of(tokens), 2)
    assert torch.equal(whole, aggregate(features, (8, 8), average=True))
    patch = whole[0, :, 2:4, 4:6]  # the second row's third patch: token 4 * 1 + 2
    assert torch.equal(tokens[0, 6], patch.reshape(-1))


def test_loss_terms_follow_the_formulas(ami_net: AMINet, make_batch: Build) -> None:
    batch = make_batch()
    ami_net.eval()
    ami_net.mask = NoMask()
    terms = ami_net.losses(batch)
    target = ami_net.tokens(ami_net.backbone(batch["image"]))
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    rebuilt = ami_net.inpainting(target, hidden)
    squares, directions = [], []
    for b in range(2):
        for n in range(16):  # over patch tokens, each a whole patch of channels
            g, h = target[b, n].detach().double(), rebuilt[b, n].detach().double()
            squares.append(float((g - h).square().mean()))
            directions.append(1 - float(g @ h / (g.norm() * h.norm())))
    assert terms["distance"].item() == pytest.approx(np.mean(squares), rel=1e-4)
    assert terms["direction"].item() == pytest.approx(5 * np.mean(directions), rel=1e-4)
    clusters = cluster_loss(*ami_net.clustering(target))
    assert terms["clusters"].item() == pytest.approx(clusters.item(), rel=1e-5)
    assert set(terms) == {"distance", "direction", "clusters"}


def test_map_and_score_follow_the_formulas(small_method: Build, make_batch: Build) -> None:
    method = small_method("ami_net_small", smoothing=4.0).eval()
    image = make_batch(2)["image"]
    with torch.inference_mode():
        found = method(image)
        target = method.tokens(method.backbone(image))
        distance = token_distance(*method.clustering(target))
        hidden = torch.from_numpy(mask_by_hand(distance.numpy(), 0.5))
        rebuilt = method.inpainting(target, hidden)
    assert 0.1 < hidden.float().mean() < 0.6
    for b in range(2):
        difference, direction = np.zeros((8, 8)), np.zeros((8, 8))
        for row in range(8):
            for column in range(8):
                token = row // 2 * 4 + column // 2
                place = slice(row % 2 * 2 + column % 2, None, 4)  # of each channel's 2 x 2 patch
                f = target[b, token][place].double().numpy()
                g = rebuilt[b, token][place].double().numpy()
                difference[row, column] = ((g - f) ** 2).mean()
                direction[row, column] = 1 - f @ g / (np.linalg.norm(f) * np.linalg.norm(g))
        smoothed = []
        for small in (difference, direction):
            large = F.interpolate(
                torch.from_numpy(small)[None, None], (64, 64), mode="bilinear", align_corners=True
            )
            smoothed.append(ndimage.gaussian_filter(large[0, 0].numpy(), 4.0, truncate=4.0))
        expected = smoothed[0] * smoothed[1]
        np.testing.assert_allclose(found.anomaly_map[b, 0].numpy(), expected, rtol=1e-3)
        assert found.score[b].item() == pytest.approx(expected.std(), rel=1e-3)


def test_score_may_be_the_maximum(small_method: Build, make_batch: Build) -> None:
    method = small_method("ami_net_small", score="max").eval()
    with torch.inference_mode():
        found = method(make_batch()["image"])
    assert torch.equal(found.score, found.anomaly_map.amax(dim=(1, 2, 3)))


def test_perfect_inpainting_scores_zero(ami_net: AMINet, make_batch: Build) -> None:
    class Identity(nn.Module):
        def forward(self, tokens: Tensor, hidden: Tensor, jitter: float = 0.0) -> Tensor:
            return tokens

    ami_net.inpainting = Identity()  # type: ignore[assignment]
    with torch.inference_mode():
        found = ami_net.eval()(make_batch()["image"])
    assert not found.anomaly_map.any()
    assert not found.score.any()


def test_without_adaptive_mask_nothing_is_hidden(small_method: Build, make_batch: Build) -> None:
    method = small_method("ami_net_small", adaptive_mask=False).eval()
    seen: list[Tensor] = []
    method.inpainting.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    with torch.inference_mode():
        method(make_batch()["image"])
    assert not seen[0].any()


def test_jitter_is_off_in_evaluation(ami_net: AMINet, make_batch: Build) -> None:
    ami_net.mask = NoMask()

    def clusters(training: bool, seed: int) -> float:
        ami_net.train(training)
        torch.manual_seed(seed)
        with torch.no_grad():
            return float(total(ami_net.losses(make_batch())))

    assert clusters(False, 1) == clusters(False, 2)
    assert clusters(True, 1) != clusters(True, 2)


def test_jitter_may_be_switched_off(small_method: Build, make_batch: Build) -> None:
    method = small_method("ami_net_small", jitter=0.0).train()
    method.mask = NoMask()
    with torch.no_grad():
        first, second = (float(total(method.losses(make_batch()))) for _ in range(2))
    assert first == second


def gradients(method: AMINet, loss: Tensor) -> set[str]:
    method.zero_grad()
    loss.backward(retain_graph=True)
    return {name for name, p in method.named_parameters() if p.grad is not None and p.grad.any()}


def test_branches_share_no_gradient_and_none_reaches_the_backbone(
    ami_net: AMINet, make_batch: Build
) -> None:
    ami_net.train()
    terms = ami_net.losses(make_batch())
    of_clusters = gradients(ami_net, terms["clusters"])
    of_inpainting = gradients(ami_net, terms["distance"] + terms["direction"])
    assert {name.split(".")[0] for name in of_clusters} == {"clustering"}
    assert {name.split(".")[0] for name in of_inpainting} == {"inpainting"}
    assert {"clustering.centres", "clustering.embed.weight"} <= of_clusters
    assert {"inpainting.mask_token", "inpainting.embed.weight"} <= of_inpainting


def test_cached_features_replace_the_backbone(ami_net: AMINet, make_batch: Build) -> None:
    batch = make_batch()
    torch.manual_seed(1)
    expected = total(ami_net.losses(batch))
    features = {"backbone": ami_net.backbone(batch["image"])}
    ami_net.backbone.forward = None  # type: ignore[assignment]
    torch.manual_seed(1)
    assert total(ami_net.losses({**batch, "features": features})) == expected


def test_grid_may_have_two_sides(small_method: Build, make_batch: Build) -> None:
    method = small_method("ami_net_small", grid=[4, 8]).eval()
    batch = make_batch(2, 32, 64)
    assert total(method.losses(batch)).isfinite()
    assert method(batch["image"]).anomaly_map.shape == (2, 1, 32, 64)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"grid": 9}, "method.patch"),
        ({"heads": 3}, "method.heads"),
        ({"dim": 30}, "method.dim"),
        ({"score": "mean"}, "method.score"),
    ],
)
def test_numbers_that_do_not_fit_are_named(
    small_method: Build, changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError, match=key):
        small_method("ami_net_small", **changes)


def test_normalised_features_have_unit_length_over_all_stages(small_method: Build) -> None:
    method = small_method("ami_net_small", normalise=True, average=False, grid=4, patch=1)
    features = [5 * random(1, c, 4, 4, seed=c) for c in (64, 128, 256)]
    tokens = method.tokens(features)
    assert torch.allclose(tokens.norm(dim=-1), torch.tensor(1.0))


def test_published_configuration_has_the_published_size() -> None:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = compose("train", ["method=ami_net", "output_dir=unused"])
    config = plain(cfg)["method"]
    assert config["backbone"]["name"] == "wide_resnet50_2.tv_in1k"
    config["backbone"]["weights"] = "random"
    with torch.device("meta"):  # shapes without memory
        method = instantiate(config)
    trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in method.parameters()) - trainable
    assert round(trainable / 1e6, 1) == 129.9
    assert round(frozen / 1e6, 1) == 24.9
    assert method.inpainting.embed.in_features == method.inpainting.head.out_features == 28672
    assert method.inpainting.positions.shape == (256, 768)


def test_optimizer_is_the_paper_s_and_constant() -> None:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = compose("train", ["method=ami_net", "output_dir=unused"])
    optimizer = instantiate(plain(cfg)["method"]["optimizer"])([nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.AdamW)
    group = optimizer.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (1e-4, (0.9, 0.95), 0.01)
