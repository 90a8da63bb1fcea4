"""Computes the golden values with the authors' own code, which is not part of this repository.

Check out the repository that `<method>.json` names, at the commit it names, and run:

    python tests/golden/make.py uniad UNIAD
    python tests/golden/make.py onenip ONENIP
    python tests/golden/make.py ami_net AMI_NET
    python tests/golden/make.py dsr DSR
    python tests/golden/make.py fastflow FASTFLOW FREIA

The authors' modules need einops, tabulate and torchvision besides our requirements. They run on the
CPU in float64. Calls that would need a GPU, a download or a removed name of NumPy are replaced.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from rule import FOLDER, fill, summary, tensor
from torch import Tensor, nn

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNIAD_MAPS = {"channels": (24, 32, 56, 160), "strides": (2, 4, 8, 16)}  # EfficientNet-B4


def main() -> None:
    """Writes one file."""
    method, *checkouts = sys.argv[1:]
    sys.path[:0] = checkouts
    torch.Tensor.cuda = lambda self, *_: self  # type: ignore[method-assign,assignment]
    np.float = float  # type: ignore[attr-defined]
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    result = MAKERS[method]()
    result["made_with"] = {"torch": torch.__version__, "python": platform.python_version()}
    text = json.dumps(result, indent=1)
    file = FOLDER / f"{method}.json"
    file.write_text(text + "\n")
    print(f"{file}: {len(text)} bytes")


class Given(nn.Module):
    """Answers with the same value, whatever it is asked."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: Any) -> Any:
        return self.value


def outputs(**named: Tensor) -> dict[str, Any]:
    """Summaries by name."""
    return {name: summary(output) for name, output in named.items()}


def maps(
    case: str, count: int, size: Sequence[int], channels: Sequence[int], strides: Sequence[int]
) -> list[Tensor]:
    """A backbone's maps of `count` images of a size, in float64."""
    return [
        tensor(f"{case} map {number}", (count, c, size[0] // s, size[1] // s)).double()
        for number, (c, s) in enumerate(zip(channels, strides, strict=True))
    ]


@contextlib.contextmanager
def drawn(function: str, *values: Any) -> Iterator[None]:
    """Makes a random function of torch give these values, one a call."""
    with mock.patch.object(torch, function, mock.Mock(side_effect=list(values))):
        yield


def attributes(**named: Any) -> Any:
    """What the authors' code reads as attributes and as keys."""

    class Attributes(SimpleNamespace):
        get = lambda self, key, default=None: getattr(self, key, default)  # noqa: E731

    return Attributes(**named)


# ---------------------------------------------------------------------------------------- UniAD


def uniad() -> dict[str, Any]:
    """UniAD, and EfficientNet-B4 as UniAD and OneNIP build it."""
    return {
        "repository": "https://github.com/zhiyuanyou/UniAD",
        "commit": "a5b9d9d20c2aae680fa00fe5088616b611e05f3c",
        "licence": "Apache-2.0",
        "cases": {
            "paper": uniad_case("uniad paper", 1, (224, 224), 7, (256, 8, 1024, 4), **UNIAD_MAPS),
            "small": uniad_case(
                "uniad small", 2, (96, 128), 3, (32, 4, 48, 2), channels=(8, 16), strides=(8, 16)
            ),
            "jitter": uniad_jitter(),
            "start": uniad_start(),
            **{f"backbone {size}": efficientnet(size) for size in (224, 256, 320)},
        },
    }


def uniad_network(channels: int, grid: Sequence[int], window: int, numbers: Sequence[int]) -> Any:
    from models.reconstructions.uniad import UniAD

    dim, heads, feedforward, depth = numbers
    return UniAD(
        [channels],
        [16],
        tuple(grid),
        attributes(scale=20.0, prob=1.0),
        attributes(neighbor_size=(window, window), mask=(True, True, True)),
        dim,
        "learned",
        None,
        {"method": "xavier_uniform"},
        nhead=heads,
        num_encoder_layers=depth,
        num_decoder_layers=depth,
        dim_feedforward=feedforward,
        dropout=0.1,
        activation="relu",
        normalize_before=False,
    )


def uniad_case(
    case: str,
    count: int,
    size: Sequence[int],
    window: int,
    numbers: Sequence[int],
    channels: Sequence[int],
    strides: Sequence[int],
) -> dict[str, Any]:
    from models.necks.mfcn import MFCN
    from utils.criterion_helper import FeatureMSELoss
    from utils.eval_helper import EvalImageMax, EvalImageMean, EvalImageStd

    scales = {"learned_embed|row_embed|col_embed": 4.0, "in_proj_weight": 1.5}
    grid = [side // 16 for side in size]
    neck = MFCN(list(channels), [sum(channels)], list(strides), [16])
    network = uniad_network(sum(channels), grid, window, numbers)
    fill(network, scales)
    network.double().eval()
    features = neck({"features": maps(case, count, size, channels, strides)})["feature_align"]
    found = network({"feature_align": features})
    loss = FeatureMSELoss(1.0)(found)
    loss.backward()
    map_ = found["pred"].detach()[:, 0].numpy()
    scores = {
        "score_max": EvalImageMax.encode_pred(map_, (16, 16)),
        "score_std": EvalImageStd.encode_pred(map_),
        "score_mean": EvalImageMean.encode_pred(map_),
    }
    named = {name: torch.from_numpy(score) for name, score in scores.items()}
    if case == "uniad small":  # with more units, one at the kink of its ReLU shows in a gradient
        weights = dict(network.named_parameters())
        first = "transformer.encoder.layers.0.self_attn.in_proj_weight"
        query = "transformer.decoder.layers.1.learned_embed.weight"
        named |= {
            "gradient_input": weights["input_proj.weight"].grad,
            "gradient_encoder": weights[first].grad,
            "gradient_query": weights[query].grad,
            "gradient_row": weights["pos_embed.row_embed.weight"].grad,
        }
    return {
        "scales": scales,
        "outputs": outputs(loss=loss, anomaly_map=found["pred"], **named),
    }


def uniad_jitter() -> dict[str, Any]:
    network = uniad_network(24, (3, 4), 1, (32, 4, 48, 1))
    tokens = tensor("uniad tokens", (2, 12, 24)).transpose(0, 1)
    noise = tensor("uniad noise", (2, 12, 24)).transpose(0, 1)
    with drawn("randn", noise):
        noisy = network.add_jitter(tokens, 20.0, 1.0)
    return {"outputs": outputs(noisy=noisy.transpose(0, 1))}


def uniad_start() -> dict[str, Any]:
    torch.manual_seed(0)
    state = uniad_network(272, (14, 14), 7, (256, 8, 1024, 4)).state_dict()
    layer, query = "transformer.encoder.layers.0.", "transformer.decoder.layers.{}.learned_embed"
    queries = [state[f"{query.format(number)}.weight"] for number in (0, 3)]
    return {
        "numbers": {
            "std embed": float(state["input_proj.weight"].std()),
            "std head": float(state["output_proj.weight"].std()),
            "std mlp": float(state[f"{layer}linear1.weight"].std()),
            "std attention query": float(state[f"{layer}self_attn.in_proj_weight"][:256].std()),
            "std attention output": float(state[f"{layer}self_attn.out_proj.weight"].std()),
            "std learned query": float(queries[0].std()),
            "layers start equal": float(torch.equal(*queries)),
        }
    }


def efficientnet(size: int) -> dict[str, Any]:
    from models.backbones.efficientnet import efficientnet_b4

    scales = {"_se_.*bias": 5.0}
    network = efficientnet_b4(False, outblocks=[1, 5, 9, 21], outstrides=[2, 4, 8, 16])
    fill(network, scales, "backbone.")
    network.double().eval()
    image = tensor(f"backbone image {size}", (1, 3, size, size), 0.5) + 0.5
    mean, std = (torch.tensor(part).double().view(1, 3, 1, 1) for part in IMAGENET)
    with torch.no_grad():
        found = network({"image": (image.double() - mean) / std})["features"]
    named = {f"stage{number}": map_ for number, map_ in enumerate(found)}
    return {"scales": scales, "outputs": outputs(**named)}


# --------------------------------------------------------------------------------------- OneNIP

ONENIP_SCALES = {"row_embed|col_embed": 4.0, "in_proj_weight": 1.5, "predictor.weight": 8.0}


def onenip() -> dict[str, Any]:
    """OneNIP, second version. Its code has no licence: only numbers are taken."""
    small = {"channels": (8, 16), "strides": (8, 16)}
    return {
        "repository": "https://github.com/gaobb/OneNIP",
        "commit": "e93dec597ccfd60f8839cd25827f58607f8f8bb5",
        "licence": "none: numbers only",
        "cases": {
            "paper": onenip_case("onenip paper", 1, (224, 224), 7, 1024, 4, **UNIAD_MAPS),
            "small": onenip_case("onenip small", 2, (96, 128), 3, 48, 2, **small),
            "training": onenip_training((96, 128), 3, 48, 1, **small),
            "start": onenip_start(),
        },
    }


def onenip_network(
    channels: int, grid: Sequence[int], window: int, feedforward: int, depth: int
) -> Any:
    from models.reconstructions.onenip import OneNIP

    return OneNIP(
        [channels],
        [16],
        tuple(grid),
        None,
        attributes(neighbor_size=(window, window), mask=(True, True, True)),
        256,
        "learned",
        None,
        {"method": "xavier_uniform"},
        nhead=8,
        num_encoder_layers=depth,
        num_decoder_layers=depth,
        dim_feedforward=feedforward,
        dropout=0.1,
        activation="relu",
        normalize_before=False,
    )


def onenip_case(
    case: str,
    count: int,
    size: Sequence[int],
    window: int,
    feedforward: int,
    depth: int,
    channels: Sequence[int],
    strides: Sequence[int],
) -> dict[str, Any]:
    """`count` images with one prompt."""
    from models.necks.mfcn import MFCN
    from utils.eval_helper import EvalImageMax

    neck = MFCN(list(channels), [sum(channels)], list(strides), [16])
    grid = [side // 16 for side in size]
    network = onenip_network(sum(channels), grid, window, feedforward, depth)
    fill(network, ONENIP_SCALES)
    network.double().eval()
    query, prompt = (
        neck({"features": maps(f"{case} {name}", number, size, channels, strides)})["query_feat"]
        for name, number in (("image", count), ("prompt", 1))
    )
    with torch.no_grad():
        found = network({"query_feat": query, "prompt_feat": prompt.repeat(count, 1, 1, 1)})
    distance, refined = found["rec_pred"], found["ref_pred"]
    middle = (distance.max() + distance.min()) / 2  # as in the validation of tools/train_val.py
    fused = 0.5 * distance + 0.5 * middle * refined
    score = EvalImageMax.encode_pred(fused[:, 0].numpy(), (16, 16))
    return {
        "scales": ONENIP_SCALES,
        "numbers": {"fusion constant": float(middle)},
        "outputs": outputs(
            distance=distance, refined=refined, anomaly_map=fused, score=torch.from_numpy(score)
        ),
    }


def onenip_training(
    size: Sequence[int],
    window: int,
    feedforward: int,
    depth: int,
    channels: Sequence[int],
    strides: Sequence[int],
) -> dict[str, Any]:
    """Losses of two images in training, without dropout and jitter."""
    from models.necks.mfcn import MFCN
    from utils.criterion_helper import DiceLoss, FeatureMSELoss

    neck = MFCN(list(channels), [sum(channels)], list(strides), [16])
    grid = [side // 16 for side in size]
    network = onenip_network(sum(channels), grid, window, feedforward, depth)
    fill(network, ONENIP_SCALES)
    network.double().train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    streams = [
        maps(f"onenip training {name}", 2, size, channels, strides)
        for name in ("image", "corrupted", "prompt")
    ]
    together = [torch.cat(stage) for stage in zip(*streams, strict=True)]
    aligned = neck({"features": together, "prompt": True, "aimage": True})
    found = network(aligned)
    corruption = (tensor("onenip corruption", (2, 1, *size)) > 0.5).double()
    found["mask"] = torch.cat([torch.zeros_like(corruption), corruption])
    reconstruction, dice = (loss(found) for loss in (FeatureMSELoss(1.0), DiceLoss(0.5)))
    loss = reconstruction + 0.5 * dice
    loss.backward()
    weights = dict(network.named_parameters())
    last = "transformer.decoder.layers.0.cross_attn_image_to_prompt.out_proj.weight"
    return {
        "scales": ONENIP_SCALES,
        "outputs": outputs(
            reconstruction=reconstruction,
            dice=0.5 * dice,
            loss=loss,
            gradient_input=weights["input_proj.weight"].grad,
            gradient_decoder=weights[last].grad,
            gradient_refiner=weights["seghead.upconv1.0.weight"].grad,
        ),
    }


def onenip_start() -> dict[str, Any]:
    torch.manual_seed(0)
    state = onenip_network(272, (14, 14), 7, 1024, 4).state_dict()
    attention = "transformer.decoder.layers.0.cross_attn_prompt_to_image."
    return {
        "numbers": {
            "std attention query": float(state[f"{attention}in_proj_weight"][:256].std()),
            "std attention output": float(state[f"{attention}out_proj.weight"].std()),
            "std mlp": float(state["transformer.decoder.layers.0.mlp.lin1.weight"].std()),
            "std refiner": float(state["seghead.upconv1.0.weight"].std()),
            "std refiner up": float(state["seghead.upconv1.3.weight"].std()),
        }
    }


# -------------------------------------------------------------------------------------- AMI-Net

AMI_NET_MAPS = {"channels": (4, 8, 16), "strides": (4, 8, 16)}
AMI_NET_SCALES = {"qkv.weight": 1.5, "cls_token": 2.0}


def ami_net() -> dict[str, Any]:
    """AMI-Net on maps of few channels; its code fixes the map at 64 x 64, the image at 256."""
    return {
        "repository": "https://github.com/luow23/AMI-Net",
        "commit": "3350be0a601b35c9b7ed7d726cc0d97b7ce13532",
        "licence": "MIT",
        "cases": {
            "scoring": ami_net_scoring(),
            "training": ami_net_training(),
            "unit length": ami_net_unit_length(),
            "start": ami_net_start(),
        },
    }


def ami_net_network(sigma: float = 0.5, dim: int = 96, depth: int = 2) -> Any:
    from models.model_MAE import Adpative_MAE_k_center

    return Adpative_MAE_k_center(
        img_size=64,
        patch_size=4,
        in_chans=28,
        embed_dim=dim,
        depth=depth,
        num_heads=4,
        clu_depth=1,
        center_num=5,
        sigma=sigma,
    )


def ami_net_features(case: str, count: int) -> Tensor:
    from models.networks import WideResNet50

    extractor: Any = WideResNet50.__new__(WideResNet50)  # its constructor would load weights
    nn.Module.__init__(extractor)
    first, *rest = [nn.Identity(), *map(Given, maps(case, count, (256, 256), **AMI_NET_MAPS))]
    extractor.block1 = first
    extractor.block2, extractor.block3, extractor.block4 = rest
    return extractor(torch.zeros(count, 3, 256, 256))


def ami_net_scoring() -> dict[str, Any]:
    from models.AMI_Net_model import AMAE
    from scipy.ndimage import gaussian_filter

    model: Any = AMAE.__new__(AMAE)
    nn.Module.__init__(model)
    model.Roncon_model = ami_net_network()
    fill(model.Roncon_model, AMI_NET_SCALES)
    model.double().eval()
    features = ami_net_features("ami_net scoring", 2)
    hidden, distances, rebuilt, anomaly_maps = [], [], [], []
    for number in range(2):
        model.Feature_extractor = Given(features[number : number + 1])
        with torch.no_grad():
            given, _, found, _, distance, mask = model(torch.zeros(1, 3, 256, 256), "test")
        both = [gaussian_filter(map_, sigma=4) for map_ in model.a_map(given, found)]
        hidden.append(1 - mask)
        distances.append(distance)
        rebuilt.append(found)
        anomaly_maps.append(torch.from_numpy(both[0] * both[1])[None, None])
    anomaly_map = torch.cat(anomaly_maps)
    return {
        "scales": AMI_NET_SCALES,
        "outputs": outputs(
            features=features,
            nearest=torch.cat(distances),
            hidden=torch.cat(hidden),
            inpainted=torch.cat(rebuilt),
            anomaly_map=anomaly_map,
            score=torch.stack([map_.std(unbiased=False) for map_ in anomaly_map]),
        ),
    }


def ami_net_training() -> dict[str, Any]:
    """Losses of two images: 76 and 153 patches are hidden, those of the least draws."""
    network = ami_net_network()
    fill(network, AMI_NET_SCALES)
    network.double().train()
    features = ami_net_features("ami_net training", 2)
    noises = [
        tensor(f"ami_net {name} noise", (2, 256, 96)).double() for name in ("first", "second")
    ]
    order = tensor("ami_net hidden", (2, 256)).double()
    shares = mock.patch("random.uniform", mock.Mock(side_effect=[0.0, 0.3, 0.6, 0.0]))
    with drawn("randn", *noises), drawn("rand", order), shares:
        loss, rebuilt, _, _ = network(features, "train")
    loss.backward()
    weights = dict(network.named_parameters())
    target = network.patchify(features)
    direction = 1 - torch.cosine_similarity(rebuilt, target, dim=-1).mean()
    distance = (rebuilt - target).square().mean()
    return {
        "scales": AMI_NET_SCALES,
        "outputs": outputs(
            loss=loss,
            direction=5 * direction,
            distance=distance,
            clusters=loss - 5 * direction - distance,
            gradient_embed=weights["patch_embed.proj.weight"].grad.flatten(1),
            gradient_centres=weights["cls_token"].grad[0],
            gradient_mask_token=weights["mask_token"].grad[0, 0],
        ),
    }


def ami_net_unit_length() -> dict[str, Any]:
    """The features that its ResNet-101 makes of four stages."""
    from models.networks import Resnet101

    extractor: Any = Resnet101.__new__(Resnet101)
    nn.Module.__init__(extractor)
    given = maps("ami_net unit length", 1, (256, 256), (2, 4, 8, 16), (4, 4, 8, 16))
    for number, map_ in enumerate(given):
        setattr(extractor, f"block{number + 1}", Given(map_))
    return {"outputs": outputs(features=extractor(torch.zeros(1, 3, 256, 256)))}


def ami_net_start() -> dict[str, Any]:
    torch.manual_seed(0)
    state = ami_net_network(dim=768, depth=1).state_dict()
    named = {
        "embed": "patch_embed.proj.weight",
        "embed bias": "patch_embed.proj.bias",
        "cluster embed": "auxi_embed.proj.weight",
        "cluster embed bias": "auxi_embed.proj.bias",
        "centres": "cls_token",
        "attention": "blocks.0.attn.qkv.weight",
        "attention output": "blocks.0.attn.proj.weight",
        "mlp": "blocks.0.mlp.fc1.weight",
        "head": "inpainting_pred.weight",
    }
    return {"numbers": {f"std {name}": float(state[key].std()) for name, key in named.items()}}


# ------------------------------------------------------------------------------------------ DSR

DSR_SIZE = (64, 96)
DSR_ENCODER = r"_encoder_.*weight|_pre_vq.*weight"
DSR_LATENT_SCALES = {r"_embedding\.weight": 4.0, DSR_ENCODER: 1.5}
DSR_SCALES = {r"_embedding\.weight": 8.0, DSR_ENCODER: 1.35}  # nearest vectors are no close calls


def dsr() -> dict[str, Any]:
    """DSR; `whole` and `training` have vectors of 128, since the object decoder's code does."""
    loaders = ("data_loader", "data_loader_test")  # need OpenCV and imgaug, and are not used
    sys.modules.update({name: mock.MagicMock() for name in loaders})
    networks = dsr_networks()
    return {
        "repository": "https://github.com/VitjanZ/DSR_anomaly_detection",
        "commit": "672bfb81434fd2a6c5ef00db858cef8834c54f28",
        "licence": "Apache-2.0",
        "cases": {
            "codebook": dsr_codebook(1),
            "codebook after 200 moves": dsr_codebook(200),
            "corruption": dsr_corruption(),
            "residual": dsr_residual(),
            "latent": dsr_latent(),
            "restriction": dsr_restriction(),
            "detector": dsr_unet("detector", 6),
            "upsampler": dsr_unet("upsampler", 8),
            "focal": dsr_focal(2.0),
            "focal confident": dsr_focal(20.0),
            "object decoder": dsr_object_decoder(networks),
            "whole": dsr_whole(networks),
            "training": dsr_training(networks),
            "start": dsr_start(),
        },
    }


def dsr_codebook(moves: int) -> dict[str, Any]:
    """Nearest vectors, then the vectors after moves towards what was assigned to them."""
    from discrete_model import VectorQuantizerEMA

    book = VectorQuantizerEMA(32, 8, 0.25, 0.99)
    fill(book, {r"_embedding\.weight|_ema_w": 2.0}, "book.")
    book.double().eval()
    z = tensor("dsr z", (2, 8, 4, 6)).double()
    commitment, quantised, _, _ = book(z)
    book._ema_cluster_size = 2 + tensor("dsr uses", (32,)).double()
    book.train()
    for _ in range(moves):
        book(z)
    return {
        "scales": {r"_embedding\.weight|_ema_w": 2.0},
        "outputs": outputs(
            commitment=commitment,
            quantised=quantised,
            vectors=book._embedding.weight,
            sums=book._ema_w,
        ),
    }


def dsr_corruption() -> dict[str, Any]:
    """Codes drawn from those that are far, where a mask is."""
    from train_dsr import generate_fake_anomalies_joined

    z, clean = (tensor(f"dsr corruption {name}", (2, 8, 4, 6)).double() for name in ("z", "clean"))
    vectors = tensor("dsr corruption vectors", (50, 8)).double()
    mask = (tensor("dsr corruption mask", (2, 1, 16, 24)) > 0.9).double()
    shares = iter(tensor("dsr corruption share", (2, 24)).double().abs())
    strength = torch.tensor([0.437, 0.93])
    with mock.patch.object(torch, "randint", lambda most, size: (next(shares) * most).long()):
        corrupted = generate_fake_anomalies_joined(z, clean, vectors, mask, strength=strength)
    return {"outputs": outputs(corrupted=corrupted)}


def dsr_residual() -> dict[str, Any]:
    from discrete_model import ResidualStack

    stack = ResidualStack(12, 12, 2, 6)
    fill(stack, {}, "stack.")
    with torch.no_grad():
        answer = stack.double()(tensor("dsr residual", (2, 12, 5, 7)).double())
    return {"outputs": outputs(answer=answer)}


def dsr_latent() -> dict[str, Any]:
    from discrete_model import DiscreteLatentModel

    latent = DiscreteLatentModel(16, 2, 8, 64, 16, 0.25, 0.99)
    fill(latent, DSR_LATENT_SCALES)
    latent.double().eval()
    image = tensor("dsr latent image", (2, 3, *DSR_SIZE), 0.5).double() + 0.5
    with torch.no_grad():
        loss_high, loss_low, rebuilt, low, high = latent(image)
    return {
        "scales": DSR_LATENT_SCALES,
        "outputs": outputs(
            low=low, high=high, rebuilt=rebuilt, commitment_low=loss_low, commitment_high=loss_high
        ),
    }


def dsr_restriction() -> dict[str, Any]:
    from dsr_model import SubspaceRestrictionNetwork

    network = SubspaceRestrictionNetwork(8, 8, 8)
    fill(network, {}, "unet.")
    with torch.no_grad():
        answer = network.double()(tensor("dsr restriction", (2, 8, 16, 24)).double())
    return {"outputs": outputs(answer=answer)}


def dsr_unet(name: str, channels: int) -> dict[str, Any]:
    from dsr_model import UnetModel

    network = UnetModel(channels, 2, 8)
    fill(network, {}, f"{name}.unet.")
    with torch.no_grad():
        answer = network.double()(tensor(f"dsr {name}", (2, channels, *DSR_SIZE)).double())
    return {"outputs": outputs(answer=answer)}


def dsr_focal(scale: float) -> dict[str, Any]:
    from loss import FocalLoss

    logits = tensor("dsr logits", (2, 2, 16, 24), scale).double()
    truth = (tensor("dsr truth", (2, 1, 16, 24)) > 0).double()
    return {"outputs": outputs(loss=FocalLoss()(logits.softmax(dim=1), truth))}


def dsr_networks() -> Any:
    """All networks, filled, with codebooks of 64 vectors."""
    from discrete_model import DiscreteLatentModel
    from dsr_model import ImageReconstructionNetwork, SubspaceRestrictionNetwork, UnetModel

    networks = {
        "latent": DiscreteLatentModel(128, 2, 64, 64, 128, 0.25, 0.99),
        "low": SubspaceRestrictionNetwork(128, 128, 32),
        "high": SubspaceRestrictionNetwork(128, 128, 32),
        "object": ImageReconstructionNetwork(256, 128, 2, 64),
        "detector": UnetModel(6, 2, 16),
        "upsampler": UnetModel(8, 2, 16),
    }
    prefixes = {"latent": "", "object": "object."}
    for name, network in networks.items():
        fill(network, DSR_SCALES, prefixes.get(name, f"{name}.unet."))
        network.double().eval()
    return SimpleNamespace(**networks)


def dsr_object_decoder(networks: Any) -> dict[str, Any]:
    with torch.no_grad():
        answer = networks.object(tensor("dsr codes", (1, 256, 16, 24)).double())
    return {"scales": DSR_SCALES, "outputs": outputs(answer=answer)}


def dsr_whole(networks: Any) -> dict[str, Any]:
    """From the image to map and score, in the order of test_dsr.py."""
    latent = networks.latent
    image = tensor("dsr image", (2, 3, *DSR_SIZE), 0.5).double() + 0.5
    with torch.no_grad():
        *_, general, low, high = latent(image)
        quantised_high = latent._vq_vae_bot.get_quantized(networks.high(high))
        quantised_low = latent._vq_vae_top.get_quantized(networks.low(low))
        joined = torch.cat([latent.upsample_t(quantised_low), quantised_high], dim=1)
        specific = networks.object(joined)
        share = networks.detector(torch.cat([specific, general], dim=1)).softmax(dim=1)
        seen = torch.cat([specific, general, share], dim=1)
        map_ = networks.upsampler(seen).softmax(dim=1)[:, 1:]
        around = torch.nn.functional.avg_pool2d(share[:, 1:], 21, stride=1, padding=10)
    return {
        "scales": DSR_SCALES,
        "outputs": outputs(
            specific=specific,
            general=general,
            share=share,
            anomaly_map=map_,
            score=around.amax(dim=(1, 2, 3)),
        ),
    }


def dsr_training(networks: Any) -> dict[str, Any]:
    """Losses of the second stage for given codes, in the order of train_dsr.py."""
    from loss import FocalLoss

    latent = networks.latent
    image = tensor("dsr image", (2, 3, *DSR_SIZE), 0.5).double() + 0.5
    clean_low, low = (tensor(f"dsr {n} low", (2, 128, 8, 12)).double() for n in ("clean", "bad"))
    clean_high, high = (
        tensor(f"dsr {n} high", (2, 128, 16, 24)).double() for n in ("clean", "bad")
    )
    truth = (tensor("dsr training truth", (2, 1, *DSR_SIZE)) > 0).double()
    restricted_high, restricted_low = networks.high(high), networks.low(low)
    quantised_high = latent._vq_vae_bot.get_quantized(restricted_high)
    quantised_low = latent._vq_vae_top.get_quantized(restricted_low)
    with torch.no_grad():
        general = latent._decoder_b(torch.cat([latent.upsample_t(low), high], dim=1))
    joined = torch.cat([latent.upsample_t(quantised_low), quantised_high], dim=1)
    specific = networks.object(joined)
    share = networks.detector(torch.cat([specific.detach(), general], dim=1)).softmax(dim=1)
    mse = torch.nn.functional.mse_loss
    codes = mse(restricted_low, clean_low) + mse(restricted_high, clean_high)
    error = 10 * mse(specific, image)
    detection = FocalLoss()(share, truth)
    (codes + error + detection).backward()
    return {
        "scales": DSR_SCALES,
        "outputs": outputs(
            codes=codes,
            image=error,
            detection=detection,
            gradient_low=networks.low.decoder.fin_out[0].weight.grad,
            gradient_object=networks.object._conv_1.weight.grad,
            gradient_detector=networks.detector.decoder.fin_out[0].weight.grad,
        ),
    }


def dsr_start() -> dict[str, Any]:
    from dsr_model import (
        AnomalyDetectionModule,
        ImageReconstructionNetwork,
        SubspaceRestrictionModule,
        UpsamplingModule,
    )
    from train_dsr import weights_init

    torch.manual_seed(0)
    detector, decoder = AnomalyDetectionModule(), ImageReconstructionNetwork(256, 128, 2, 64)
    detector.apply(weights_init)
    decoder.apply(weights_init)
    first = {
        "restriction": SubspaceRestrictionModule(128).unet.encoder.block3[0],
        "object decoder": decoder.block2[0],
        "object decoder up": decoder.upblock1,
        "detector": detector.unet.encoder.block3[0],
        "upsampler": UpsamplingModule().unet.encoder.block3[0],
    }
    numbers = {f"std {name}": conv.weight.std().item() for name, conv in first.items()}
    numbers["std detector bias"] = first["detector"].bias.std().item()
    return {"numbers": numbers}


# ------------------------------------------------------------------------------------- FastFlow

FASTFLOW_STRIDES = (4, 8, 16)


def fastflow() -> dict[str, Any]:
    """FastFlow as re-implemented; the authors published no code."""
    return {
        "repository": "https://github.com/gathierry/FastFlow",
        "commit": "2cf1f2f4c562a7f13cfb1959e3afe5df2f2d2565",
        "licence": "Apache-2.0",
        "also": {
            "repository": "https://github.com/vislearn/FrEIA",
            "commit": "1779d1fba1e21000fda1927b59eeac0a6fcaa284",
            "licence": "MIT",
        },
        "cases": {
            "alternating": fastflow_case("fastflow alternating", (6, 8, 10), 4, False, 1.0),
            "uneven": fastflow_case("fastflow uneven", (5, 7, 9), 3, True, 0.6),
            "start": fastflow_start(),
        },
    }


def fastflow_network(
    given: Sequence[Tensor], steps: int, conv3x3_only: bool, hidden_ratio: float
) -> Any:
    import timm
    from fastflow import FastFlow

    extractor: Any = Given(list(given))
    extractor.feature_info = SimpleNamespace(
        channels=lambda: [map_.shape[1] for map_ in given], reduction=lambda: FASTFLOW_STRIDES
    )
    with mock.patch.object(timm, "create_model", return_value=extractor):
        return FastFlow("resnet18", steps, 64, conv3x3_only, hidden_ratio)


def fastflow_case(
    case: str, channels: Sequence[int], steps: int, conv3x3_only: bool, hidden_ratio: float
) -> dict[str, Any]:
    """Two images of 64 x 64; a step permutes by the order of drawn numbers."""
    given = maps(case, 2, (64, 64), channels, FASTFLOW_STRIDES)
    network = fastflow_network(given, steps, conv3x3_only, hidden_ratio)
    fill(network)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("global_scale"):
                value.add_(10)  # the scale itself is then about 1
            if name.endswith("w_perm"):
                order = tensor(name, value.shape[:1]).argsort()
                matrix = torch.eye(len(order))[order].view_as(value)
                value.copy_(matrix)
                network.state_dict()[f"{name}_inv"].copy_(matrix.transpose(0, 1))
    network.double().eval()
    found = network(torch.zeros(2, 3, 64, 64))
    found["loss"].backward()
    named = {}
    for number, (norm, flow, map_) in enumerate(
        zip(network.norms, network.nf_flows, given, strict=True)
    ):
        noise, log_det = flow(norm(map_))
        named |= {f"noise{number}": noise, f"log_det{number}": log_det}
        named[f"inverse{number}"] = flow(
            tensor(f"{case} noise {number}", map_.shape).double(), rev=True
        )[0]
    weights = dict(network.named_parameters())
    anomaly_map = found["anomaly_map"]
    return {
        "outputs": outputs(
            loss=found["loss"],
            anomaly_map=anomaly_map,
            score=anomaly_map.amax(dim=(1, 2, 3)),
            **named,
            gradient_conv=weights["nf_flows.0.module_list.0.subnet.0.weight"].grad,
            gradient_scale=weights["nf_flows.2.module_list.1.global_scale"].grad,
            gradient_norm=weights["norms.1.weight"].grad,
        )
    }


def fastflow_start() -> dict[str, Any]:
    """Parameters of the flows, and the log determinant, at the start."""
    torch.manual_seed(0)
    counts = {}
    for name, channels, conv3x3_only in (
        ("ResNet-18", (64, 128, 256), True),
        ("WideResNet-50-2", (256, 512, 1024), False),
    ):
        given = [
            torch.zeros(1, c, 64 // s, 64 // s)
            for c, s in zip(channels, FASTFLOW_STRIDES, strict=True)
        ]
        network = fastflow_network(given, 8, conv3x3_only, 1.0)
        flows = network.nf_flows
        counts[f"parameters {name}"] = sum(p.numel() for p in flows.parameters() if p.requires_grad)
    block = flows[0].module_list[0]
    scale = block.global_scale_activation(block.global_scale)
    counts["scale"] = float(scale.mean().item())
    counts["std subnet"] = block.subnet[0].weight.std().item()
    return {"numbers": counts}


MAKERS: dict[str, Callable[[], dict[str, Any]]] = {
    "uniad": uniad,
    "onenip": onenip,
    "ami_net": ami_net,
    "dsr": dsr,
    "fastflow": fastflow,
}

if __name__ == "__main__":
    main()
