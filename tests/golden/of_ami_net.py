"""Golden cases of AMI-Net; run by `make.py`."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from helpers import Given, drawn, maps, outputs
from rule import fill, tensor
from torch import Tensor, nn

AMI_NET_MAPS = {"channels": (4, 8, 16), "strides": (4, 8, 16)}
AMI_NET_SCALES = {"qkv.weight": 1.5, "cls_token": 2.0}


def cases() -> dict[str, Any]:
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
