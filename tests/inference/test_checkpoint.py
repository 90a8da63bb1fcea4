"""A checkpoint that is damaged, of another kind or another format is refused in one sentence."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import anomaly_lit
from anomaly_lit.inference import checkpoint as reading
from anomaly_lit.inference.checkpoint import build_method, geometry_of, method_of, read_checkpoint
from anomaly_lit.types import UserError


@pytest.fixture(scope="module")
def last(
    run_here: Callable[..., Any],
    mvtec_folder: Path,
    settings: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run's last.ckpt. Shared: nobody writes into it."""
    folder = tmp_path_factory.mktemp("run")
    own = ["trainer.max_steps=1", "trainer.val_check_interval=1", "dataset.categories=[bolt]"]
    outcome = run_here(
        "train", *settings, *own, f"dataset.root={mvtec_folder}", f"output_dir={folder}"
    )
    assert outcome.code == 0, outcome.err
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture
def content(last: Path) -> dict[str, Any]:
    return torch.load(last, weights_only=True)


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------ damage


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_flipped_bit_of_a_real_checkpoint_is_noticed(last: Path, tmp_path: Path) -> None:
    data = last.read_bytes()
    draw = random.Random(0)
    for bit in (draw.randrange(8 * len(data)) for _ in range(20)):
        damaged = tmp_path / "damaged.ckpt"
        damaged.write_bytes(flipped(data, bit))
        assert "damaged" in refusal(damaged)


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    """Names, offsets and checksums of a small archive included; what fills gaps is of no matter."""
    entry = {"format_version": 1, "config": {"method": {}, "dataset": {}}}
    values = torch.arange(6.0)
    file = saved({"anomaly_lit": entry, "state_dict": {"a": values}}, tmp_path / "small.ckpt")
    data, damaged = file.read_bytes(), tmp_path / "damaged.ckpt"
    draw, noticed = random.Random(1), 0
    for bit in draw.sample(range(8 * len(data)), 400):
        damaged.write_bytes(flipped(data, bit))
        try:
            read = read_checkpoint(damaged)
        except UserError:
            noticed += 1
        else:
            assert read["anomaly_lit"] == entry
            assert read["state_dict"]["a"].equal(values)
    assert noticed > 100


def test_a_record_marked_as_a_folder_is_refused(tmp_path: Path) -> None:
    """One bit outside of all checksums has torch give uninitialised memory for its values."""
    entry = {"format_version": 1, "config": {"method": {}, "dataset": {}}}
    file = saved({"anomaly_lit": entry, "state_dict": {"a": torch.zeros(6)}}, tmp_path / "a.ckpt")
    data = file.read_bytes()
    listed = data.rindex(b"a/data/0")  # in the directory at the end; its attributes are before it
    file.write_bytes(flipped(data, 8 * (listed - 8) + 4))
    assert "its records are not as torch writes them" in refusal(file)


def test_a_file_that_is_cut_short_is_noticed(last: Path, tmp_path: Path) -> None:
    data = last.read_bytes()
    cut = tmp_path / "cut.ckpt"
    for length in (4, 100, 4096, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:length])
        assert "is damaged or truncated" in refusal(cut)


def test_empty_files_texts_folders_and_pipes_are_named_as_such(last: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "text.ckpt").write_text("weights")
    (tmp_path / "folder").mkdir()
    assert "is empty" in refusal(tmp_path / "empty.ckpt")
    assert "is not a checkpoint" in refusal(tmp_path / "text.ckpt")
    assert "is a folder; set ckpt_path=" in refusal(tmp_path / "folder")
    assert f"set ckpt_path={last}" in refusal(last.parents[1])
    assert "does not exist; set ckpt_path=FILE" in refusal(tmp_path / "gone.ckpt")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.ckpt")
        assert "is not a regular file" in refusal(tmp_path / "pipe.ckpt")


@pytest.mark.parametrize("command", ["predict", "test"])
def test_the_commands_say_it_in_one_line(
    run_here: Callable[..., Any], tmp_path: Path, mvtec_folder: Path, command: str
) -> None:
    (tmp_path / "text.ckpt").write_text("weights")
    own = [f"input={mvtec_folder}"] if command == "predict" else []
    for path in (tmp_path / "text.ckpt", tmp_path):
        outcome = run_here(command, f"ckpt_path={path}", f"output_dir={tmp_path / 'out'}", *own)
        assert outcome.code
        assert "Traceback" not in outcome.err
        last = outcome.err.splitlines()[-1]
        assert last.startswith("error: ")
        assert str(path) in last


# ------------------------------------------------------------------------------ other kinds


class Touch:
    """What a pickle runs when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_pickle_is_not_run(content: dict[str, Any], tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    content["extra"] = Touch(marker)
    assert "holds more than plain data" in refusal(saved(content, tmp_path / "evil.ckpt"))
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Touch(marker)))
    assert "is not a checkpoint" in refusal(tmp_path / "pickle.ckpt")
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert "is not a checkpoint" in refusal(tmp_path / "old.ckpt")
    assert not marker.exists()


def test_other_archives_are_refused(last: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("readme.txt", "weights")
    assert "the checkpoint" in refusal(tmp_path / "texts.zip")
    packed = tmp_path / "packed.ckpt"  # a small file may unpack to more than a machine holds
    with zipfile.ZipFile(last) as source, \
            zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:  # fmt: skip
        for record in source.infolist():
            archive.writestr(record.filename, source.read(record))
    assert "its records are not as torch writes them" in refusal(packed)
    scripted = torch.jit.script(torch.nn.Identity())
    torch.jit.save(scripted, str(tmp_path / "script.pt"))
    assert "the checkpoint" in refusal(tmp_path / "script.pt")


def test_a_calibration_that_names_code_stays_data(
    content: dict[str, Any], run_here: Callable[..., Any], tmp_path: Path
) -> None:
    made = {"_target_": "pathlib.Path", "_args_": [str(tmp_path / "made")]}
    touch = {"_target_": "pathlib.Path.touch", "_args_": [made]}
    content["anomaly_lit"]["calibration"]["extra"] = touch
    path = saved(content, tmp_path / "evil.ckpt")
    outcome = run_here("test", f"ckpt_path={path}", f"output_dir={tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err
    anomaly_lit.load(path, device="cpu")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("where", "value", "text"),
    [
        (("anomaly_lit",), None, "holds no configuration"),
        (("anomaly_lit",), {"format_version": 1}, "holds no configuration"),
        (("anomaly_lit", "format_version"), "1", "no valid format_version"),
        (("anomaly_lit", "format_version"), None, "no valid format_version"),
        (("anomaly_lit", "config"), 3, "no valid config:"),
        (("anomaly_lit", "config", "method"), [], "no valid config.method"),
        (("anomaly_lit", "config", "dataset"), {1: 2}, "no valid config.dataset"),
        (("anomaly_lit", "calibration"), "0.5", "no valid calibration"),
        (("state_dict",), None, "no valid state_dict"),
    ],
)
def test_a_part_of_another_kind_is_named(
    content: dict[str, Any], tmp_path: Path, where: tuple[str, ...], value: Any, text: str
) -> None:
    inner = content
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    assert text in refusal(saved(content, tmp_path / "odd.ckpt"))


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"state_dict": {}}, None])
def test_a_file_without_a_configuration_is_no_checkpoint(content: Any, tmp_path: Path) -> None:
    assert "holds no configuration" in refusal(saved(content, tmp_path / "other.ckpt"))


def test_a_configuration_without_end_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    content["anomaly_lit"]["config"]["seed"] = endless
    with pytest.raises(UserError, match="levels or 100000 values"):
        read_checkpoint(saved(content, tmp_path / "endless.ckpt"))


# ------------------------------------------------------------------------------ formats


@pytest.fixture
def second_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that writes and reads format 2 alone."""
    monkeypatch.setattr(reading, "FORMAT_VERSION", 2)
    monkeypatch.setattr(reading, "OLDEST_READABLE", 2)


@pytest.mark.usefixtures("second_format")
def test_an_older_format_says_how_to_go_on(content: dict[str, Any], tmp_path: Path) -> None:
    content["anomaly_lit"]["format_version"] = 1
    path = saved(content, tmp_path / "old.ckpt")
    assert refusal(path) == (
        f"{path} has format 1 (anomaly_lit 0.1); this version reads format 2: train again with "
        "the same command, or use anomaly_lit 0.1 to read it"
    )


@pytest.mark.usefixtures("second_format")
def test_a_later_format_asks_for_an_update(content: dict[str, Any], tmp_path: Path) -> None:
    content["anomaly_lit"]["format_version"] = 3
    text = refusal(saved(content, tmp_path / "later.ckpt"))
    assert text.endswith("has format 3, this version reads up to 2: update anomaly_lit")
    content["anomaly_lit"]["format_version"] = 2
    assert read_checkpoint(saved(content, tmp_path / "present.ckpt"))


# ------------------------------------------------------------------------------ building


def test_a_checkpoint_gives_its_method_and_its_geometry(content: dict[str, Any]) -> None:
    method = method_of(content)
    state = method.state_dict()
    assert list(state) == list(content["state_dict"])
    for name, value in content["state_dict"].items():
        assert value.equal(state[name]) if isinstance(value, torch.Tensor) else value == state[name]
    assert geometry_of(content["anomaly_lit"]["config"]).size == (64, 64)


def test_weights_that_do_not_fit_are_an_error_in_one_sentence(content: dict[str, Any]) -> None:
    state = content["state_dict"]
    lost = next(name for name, value in state.items() if isinstance(value, torch.Tensor))
    odd = [{"extra": 3}, {"extra": torch.zeros(3)}, {lost: 3}, {lost: torch.zeros(7, 7, 7)}]
    odd += [{name: "x"} for name in state if name.endswith("_extra_state")]
    less = {name: value for name, value in state.items() if name != lost}
    for changed in (less, *(state | change for change in odd)):
        with pytest.raises(UserError, match="weights do not fit its configuration") as error:
            method_of({**content, "state_dict": changed})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"image_size": "x"},
            "dataset.image_size: expected int | collections.abc.Sequence[int], found 'x'",
        ),
        (
            {"image_size": None},
            "dataset.image_size: expected int | collections.abc.Sequence[int], found None",
        ),
        ({"center_crop": "x"}, "found 'x'"),
        ({"resize": "shrink"}, "dataset.resize=shrink"),
    ],
)
def test_a_geometry_of_another_type_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as error:
        geometry_of({"dataset": {"image_size": 64, **changes}})
    assert text in str(error.value)
    with pytest.raises(UserError, match="needs 'image_size'"):
        geometry_of({"dataset": {}})


def test_load_asks_for_trust_where_the_list_ends(content: dict[str, Any], tmp_path: Path) -> None:
    config = content["anomaly_lit"]["config"]
    config["method"]["loss"] = {"_target_": "torch.nn.Identity"}
    path = saved(content, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match=r"method\.loss: torch\.nn\.Identity .*trust=true"):
        anomaly_lit.load(path, device="cpu")
    assert anomaly_lit.load(path, device="cpu", trust=True)
    assert isinstance(build_method(config, trust=True).loss, torch.nn.Identity)
