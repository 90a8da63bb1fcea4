from __future__ import annotations

import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from anomaly_lit.config.hydra import config_dir
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.types import UserError

NAME = "test_resnet.r160_in1k"  # 0.4 M parameters; its weights want mean and std of 0.5


def build(**arguments: object) -> Backbone:
    torch.manual_seed(0)
    return Backbone(**{"name": NAME, "weights": "random"} | arguments)  # type: ignore[arg-type]


def state_of(architecture: str = "test_resnet", seed: int = 1, **options: object) -> dict:
    """The state dict of the whole network, head and all, as timm's files have it."""
    torch.manual_seed(seed)
    return timm.create_model(architecture, **options).state_dict()


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ANOMALY_LIT_WEIGHTS", raising=False)


def test_maps_have_the_announced_channels_and_strides(image: Tensor) -> None:
    backbone = build(out_indices=[1, 2, 3])
    maps = backbone(image)
    assert backbone.channels == [map_.shape[1] for map_ in maps]
    assert backbone.strides == [64 // map_.shape[2] for map_ in maps]


@pytest.mark.parametrize(
    ("name", "channels", "strides"),
    [
        ("resnet18.tv_in1k", [64, 128, 256], [4, 8, 16]),
        ("mobilenetv2_100.ra_in1k", [24, 32, 96], [4, 8, 16]),
    ],
)
def test_stages_are_counted_as_timm_counts_them(
    name: str, channels: list[int], strides: list[int]
) -> None:
    backbone = build(name=name)
    assert (backbone.channels, backbone.strides) == (channels, strides)


def test_frozen_for_good_whatever_the_mode(image: Tensor) -> None:
    parent = nn.Sequential(build())
    before = {name: value.clone() for name, value in parent.state_dict().items()}
    parent.train()
    parent[0].network.train(False)
    parent(image)
    parent.train(True)
    parent(image)
    assert not any(module.training for module in parent[0].modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    assert all(torch.equal(before[name], value) for name, value in parent.state_dict().items())


def test_gradient_passes_through_to_the_image(image: Tensor) -> None:
    image.requires_grad_()
    build()(image)[0].sum().backward()
    assert image.grad is not None


@pytest.mark.parametrize(
    ("name", "mean"), [(NAME, (0.5, 0.5, 0.5)), ("resnet18.tv_in1k", (0.485, 0.456, 0.406))]
)
def test_normalisation_is_that_of_the_weights(
    name: str, mean: tuple[float, ...], image: Tensor
) -> None:
    backbone = build(name=name)
    std = {0.5: (0.5, 0.5, 0.5), 0.485: (0.229, 0.224, 0.225)}[mean[0]]
    assert torch.allclose(backbone.mean.flatten(), torch.tensor(mean))
    assert torch.allclose(backbone.std.flatten(), torch.tensor(std))
    expected = backbone.network((image - backbone.mean) / backbone.std)
    assert all(torch.equal(a, b) for a, b in zip(backbone(image), expected, strict=True))


def test_normalisation_may_be_given() -> None:
    backbone = build(name="resnet18.tv_in1k", mean=[0.1, 0.2, 0.3], std=[1, 2, 3])
    assert torch.allclose(backbone.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert backbone.std.flatten().tolist() == [1, 2, 3]


def test_options_reach_timm() -> None:
    backbone = build(name="mobilenetv2_100.ra_in1k", options={"pad_type": "same"})
    assert backbone.network.conv_stem.padding != (1, 1)


@pytest.mark.parametrize("indices", [[1, 9], [5]])
def test_a_stage_that_is_not_there_is_named(indices: list[int]) -> None:
    with pytest.raises(UserError, match=r"out_indices=.*its stages are 0 to 4"):
        build(out_indices=indices)


def test_unknown_architecture_gets_suggestions() -> None:
    with pytest.raises(UserError, match="timm has no model 'resnet19'"):
        build(name="resnet19.tv_in1k")


def test_unknown_tag_lists_those_that_timm_knows() -> None:
    with pytest.raises(UserError, match=r"no weights 'resnet18\.mine'.*resnet18\.tv_in1k"):
        build(name="resnet18.mine")


# -------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_the_whole_network_is_read(tmp_path: Path, suffix: str, image: Tensor) -> None:
    state, file = state_of(), tmp_path / f"net{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    backbone = build(weights=str(file))
    assert not backbone.loaded
    backbone.load_weights()
    assert backbone.loaded
    torch.manual_seed(1)
    whole = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 3)).eval()
    whole.load_state_dict({k: v for k, v in state.items() if k in whole.state_dict()})
    expected = whole((image - 0.5) / 0.5)
    assert all(torch.equal(a, b) for a, b in zip(backbone(image), expected, strict=True))


def test_half_precision_in_the_file_is_widened(tmp_path: Path) -> None:
    file = tmp_path / "half.safetensors"
    save_file({name: value.half() for name, value in state_of().items()}, file)
    backbone = build(weights=str(file))
    backbone.load_weights()
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


def test_a_checkpoint_s_state_dict_entry_is_read(tmp_path: Path) -> None:
    torch.save({"state_dict": state_of()}, tmp_path / "net.pth")
    backbone = build(weights=str(tmp_path / "net.pth"))
    backbone.load_weights()
    assert backbone.loaded


def test_absent_file_is_named_with_the_key(tmp_path: Path) -> None:
    file = tmp_path / "none.safetensors"
    with pytest.raises(UserError, match=r"none\.safetensors.*method\.backbone\.weights"):
        build(weights=str(file)).load_weights()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"net{suffix}"
    file.write_bytes(b"not weights at all")
    with pytest.raises(UserError, match=f"net{suffix} cannot be read"):
        build(weights=str(file)).load_weights()


def test_file_that_holds_no_tensors_by_name_is_named(tmp_path: Path) -> None:
    torch.save([1, 2, 3], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list\.pth"):
        build(weights=str(tmp_path / "list.pth")).load_weights()


def test_layer_that_is_not_in_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "partial.safetensors"
    save_file({k: v for k, v in state_of().items() if not k.startswith("layer4")}, file)
    build(weights=str(file), out_indices=[1, 2, 3]).load_weights()
    with pytest.raises(UserError, match=r"partial\.safetensors.*layer4.*out_indices"):
        build(weights=str(file), out_indices=[1, 2, 3, 4]).load_weights()


def test_single_missing_tensor_is_noticed(tmp_path: Path) -> None:
    state = state_of()
    del state["layer2.0.bn1.running_mean"]
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match=r"1 of the \d+ tensors.*layer2\.0"):
        build(weights=str(tmp_path / "net.safetensors")).load_weights()


def test_file_of_another_model_is_refused(tmp_path: Path) -> None:
    save_file(state_of("test_efficientnet"), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors.*test_resnet"):
        build(weights=str(tmp_path / "other.safetensors")).load_weights()


def test_file_with_other_shapes_is_refused(tmp_path: Path) -> None:
    state = state_of()
    state["layer1.0.conv1.weight"] = torch.zeros(1, 2, 3, 3)
    save_file(state, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"wide\.safetensors does not fit.*layer1\.0\.conv1"):
        build(weights=str(tmp_path / "wide.safetensors")).load_weights()


@pytest.mark.usefixtures("offline")
def test_folder_of_weights_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(state_of(), tmp_path / "test_resnet.safetensors")
    monkeypatch.setenv("ANOMALY_LIT_WEIGHTS", str(tmp_path))
    backbone = build(weights="pretrained")
    backbone.load_weights()
    assert torch.equal(backbone.network.conv1[0].weight, state_of()["conv1.0.weight"])


@pytest.mark.usefixtures("offline")
def test_no_file_and_no_hub_is_one_message_at_once() -> None:
    backbone = build(weights="pretrained")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"test_resnet\.r160_in1k.*method\.backbone\.weights=FILE"):
        backbone.load_weights()
    assert time.monotonic() - start < 2


@pytest.mark.usefixtures("offline")
def test_state_dict_counts_as_weights() -> None:
    source, backbone = build(), build(weights="pretrained")
    torch.manual_seed(9)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    nn.Sequential(backbone).load_state_dict(nn.Sequential(source).state_dict())
    backbone.load_weights()  # reaches for nothing
    assert torch.equal(backbone.network.conv1[0].weight, source.network.conv1[0].weight)


def test_transformers_give_maps() -> None:
    backbone = build(
        name="test_vit.r160_in1k", out_indices=[1, 3], options={"dynamic_img_size": True}
    )
    maps = backbone(torch.rand(1, 3, 64, 96))
    assert [map_.shape for map_ in maps] == [(1, 64, 4, 6), (1, 64, 4, 6)]


def test_file_of_a_transformer_is_read(tmp_path: Path) -> None:
    file = tmp_path / "vit.safetensors"
    save_file(state_of("test_vit"), file)
    backbone = build(name="test_vit.r160_in1k", out_indices=[1, 3], weights=str(file))
    backbone.load_weights()
    state = state_of("test_vit")
    assert torch.equal(
        backbone.network.model.patch_embed.proj.weight, state["patch_embed.proj.weight"]
    )


# --------------------------------------------------------------------------- transformers


VIT = {"name": "test_vit.r160_in1k", "out_indices": [1, 2, 3, 4]}  # 6 blocks, patches of 16


def tokens_of_blocks(backbone: Backbone, image: Tensor, wanted: list[int]) -> list[Tensor]:
    """What blocks of the transformer give, (B, 1 + N, C), seen from outside."""
    seen: dict[int, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda *call, i=i: seen.update({i: call[2]}))
        for i, block in enumerate(backbone.network.model.blocks)
    ]
    backbone(image)
    for hook in hooks:
        hook.remove()
    return [seen[i] for i in wanted]


def test_prefix_tokens_follow_the_maps(image: Tensor) -> None:
    backbone = build(**VIT, prefix=True)
    blocks = tokens_of_blocks(backbone, image, [1, 2, 3, 4])
    found = backbone(image)
    assert (len(found), backbone.prefix_tokens) == (8, 1)
    for tokens, map_, prefix in zip(blocks, found[:4], found[4:], strict=True):
        assert torch.equal(map_, tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
        assert torch.equal(prefix, tokens[:, :1].transpose(1, 2)[:, :, None])


def test_groups_are_means_of_their_stages(image: Tensor) -> None:
    single, grouped = build(**VIT, prefix=True), build(**VIT, prefix=True, groups=2)
    maps, found = single(image), grouped(image)
    assert (grouped.channels, grouped.strides) == ([64, 64], [16, 16])
    assert len(found) == 4
    for i in range(4):
        assert torch.allclose(found[i], (maps[2 * i] + maps[2 * i + 1]) / 2, atol=1e-6)


def test_groups_and_prefix_tokens_belong_to_the_identity_of_a_cache() -> None:
    kinds = [build(**VIT), build(**VIT, groups=2), build(**VIT, prefix=True)]
    assert len({str(backbone.identity()) for backbone in kinds}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**VIT, "groups": 3}, r"groups=3 must divide the 4 stages of out_indices=\[1, 2, 3, 4\]"),
        ({**VIT, "groups": 0}, "groups=0 must divide"),
        ({"groups": 1}, r"groups=1 averages stages.*differ in size"),
        ({"prefix": True}, "has no prefix tokens: set method.backbone.prefix=false"),
    ],
)
def test_groups_and_prefix_tokens_that_cannot_be_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((64, 70), r"64 x 70: 70 is no multiple of 16.*image_size to 64 or 80"),
        ((8, 64), r"8 is no multiple of 16.*image_size to 16$"),
    ],
)
def test_a_size_that_no_patch_divides_names_the_nearest(
    size: tuple[int, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(**VIT)(torch.rand(1, 3, *size))


def test_a_transformer_of_one_size_says_which() -> None:
    backbone = build(**VIT, options={"dynamic_img_size": False})
    with pytest.raises(UserError, match=r"takes images of 160 x 160 only.*image_size=160"):
        backbone(torch.rand(1, 3, 64, 64))


def test_a_transformer_may_pad_instead() -> None:
    backbone = build(**VIT, options={"dynamic_img_pad": True})
    assert backbone(torch.rand(1, 3, 70, 64))[0].shape == (1, 64, 5, 4)


OPTIONS = sorted(path.stem for path in Path(config_dir(), "backbone").glob("vit_*.yaml"))


@pytest.mark.parametrize("option", [name for name in OPTIONS if "_small_" in name])
def test_options_take_any_multiple_of_their_patch(option: str) -> None:
    text = yaml.safe_load(Path(config_dir(), "backbone", f"{option}.yaml").read_text())
    backbone = Backbone(**{k: v for k, v in text.items() if k[0] != "_"} | {"weights": "random"})
    patch = backbone.strides[0]
    maps = backbone(torch.rand(1, 3, 2 * patch, 3 * patch))
    assert [map_.shape for map_ in maps] == [(1, 384, 2, 3)] * 3


def test_padding_replaces_that_of_one_convolution_and_keeps_its_weights(image: Tensor) -> None:
    arguments = {"name": "tf_efficientnet_b4.aa_in1k", "out_indices": [1, 2]}
    plain, padded = build(**arguments), build(**arguments, padding={"blocks.2.0.conv_dw": 2})
    padded.load_state_dict(plain.state_dict())
    first, second = plain(image), padded(image)
    assert torch.equal(first[0], second[0])  # the stage before it
    assert first[1].shape == second[1].shape
    assert not torch.allclose(first[1], second[1])
    assert "padding" not in plain.identity()
    assert padded.identity()["padding"] == {"blocks.2.0.conv_dw": 2}


@pytest.mark.parametrize("padding", [{"conv9": 1}, {"bn1": 1}, {"conv1": -1}, {"conv1": 10**9}])
def test_padding_of_what_is_no_convolution_is_named(padding: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"method\.backbone\.padding: \w+="):
        build(name="resnet18.tv_in1k", padding=padding)
