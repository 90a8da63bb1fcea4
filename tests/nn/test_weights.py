from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anomaly_lit.nn.weights import find_weights
from anomaly_lit.types import UserError

RESNET = "resnet18.tv_in1k"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of weights; neither hub nor its cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "weights"
    root.mkdir()
    monkeypatch.setenv("ANOMALY_LIT_WEIGHTS", str(root))
    return root


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"")


def test_random_weights_need_no_file(folder: Path) -> None:
    assert find_weights(RESNET, "random") is None


def test_a_named_file_is_taken(folder: Path) -> None:
    put(folder, "mine.pth")
    assert find_weights(RESNET, str(folder / "mine.pth")) == folder / "mine.pth"


@pytest.mark.parametrize(
    "name", ["resnet18.safetensors", "resnet18.tv_in1k.pth", "resnet18.tv_in1k_layers1to3.bin"]
)
def test_option_name_and_tag_find_the_file(folder: Path, name: str) -> None:
    put(folder, name, "resnet50.safetensors", "resnet18_notes.txt")
    assert find_weights(RESNET, "pretrained") == folder / name


def test_option_name_comes_before_the_tag(folder: Path) -> None:
    put(folder, "resnet18.safetensors", "resnet18.tv_in1k.safetensors")
    assert find_weights(RESNET, "pretrained") == folder / "resnet18.safetensors"


def test_files_of_other_networks_and_tags_are_not_taken(folder: Path) -> None:
    put(folder, "resnet18.a1_in1k.safetensors", "resnet180.safetensors", "wide_resnet18.pth")
    with pytest.raises(UserError, match="no weights for the backbone"):
        find_weights(RESNET, "pretrained")


def test_tensorflow_s_mobilenet_is_never_taken_for_pytorch_s(folder: Path) -> None:
    tensorflow = ("mobilenetv2_100.tf2_int8_in1k", "pretrained", "mobilenetv2_100_tf2")
    put(folder, "mobilenetv2_100.tf2_int8_in1k.safetensors")
    assert find_weights(*tensorflow) == folder / "mobilenetv2_100.tf2_int8_in1k.safetensors"
    with pytest.raises(UserError, match="mobilenetv2_100"):
        find_weights("mobilenetv2_100.ra_in1k", "pretrained")
    put(folder, "mobilenetv2_100_tf2.safetensors", "mobilenetv2_100.safetensors")
    assert find_weights(*tensorflow) == folder / "mobilenetv2_100_tf2.safetensors"
    plain = find_weights("mobilenetv2_100.ra_in1k", "pretrained")
    assert plain == folder / "mobilenetv2_100.safetensors"


def test_two_files_that_fit_are_an_error(folder: Path) -> None:
    put(folder, "resnet18.pth", "resnet18.safetensors")
    with pytest.raises(UserError, match=r"resnet18\.pth, resnet18\.safetensors"):
        find_weights(RESNET, "pretrained")


def test_variable_that_names_no_folder_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANOMALY_LIT_WEIGHTS", str(folder / "gone"))
    with pytest.raises(UserError, match=r"ANOMALY_LIT_WEIGHTS names .*gone"):
        find_weights(RESNET, "pretrained")


def test_message_names_the_folder_and_the_ways_out(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        find_weights(RESNET, "pretrained", key="method.teacher.weights")
    for text in (str(folder), "ANOMALY_LIT_WEIGHTS", "method.teacher.weights=FILE", "random"):
        assert text in str(error.value)


def test_hub_s_cache_suffices(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / f"models--timm--{RESNET}" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"")
    assert find_weights(RESNET, "pretrained") is None


def test_a_silent_network_is_noticed_within_two_seconds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:  # a name server that does not answer
        time.sleep(3)
        raise OSError

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(socket, "create_connection", never)
    start = time.monotonic()
    with pytest.raises(UserError, match="the hub does not answer"):
        find_weights(RESNET, "pretrained")
    assert time.monotonic() - start < 2


def test_nothing_heavy_is_imported_for_the_search() -> None:
    code = "import sys, anomaly_lit.nn.weights; assert not {'torch', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
