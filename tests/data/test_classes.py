"""CIFAR and MNIST: small stand-ins in their formats, hostile files, and runs on them."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomaly_lit.data import AnomalyDataModule, CIFAR10Layout, CIFAR100Layout, Layout, MNISTLayout
from anomaly_lit.data.arrays import KEPT, read_arrays
from anomaly_lit.data.caches.disk import DiskCache
from anomaly_lit.data.caches.memory import HostCache
from anomaly_lit.data.images import read_image
from anomaly_lit.data.inspect import inspect_data
from anomaly_lit.data.packed import file_of, packed_picture
from anomaly_lit.types import UserError

GLYPHS = ("disc", "frame", "cross")  # a class each
CLASSES = len(GLYPHS)


def glyph(kind: int, seed: int, side: int) -> np.ndarray:
    """A coloured shape on noise, (side, side, 3) uint8."""
    generator = np.random.default_rng([kind, seed])
    rows, columns = np.abs(np.mgrid[:side, :side] - (side - 1) / 2 + generator.uniform(-2, 2))
    far, near = np.maximum(rows, columns) / side, np.minimum(rows, columns) / side
    shape = (np.hypot(rows, columns) < side / 4, (far > 0.2) & (far < 0.32), near < 0.09)[kind]
    pixels = generator.normal(90, 12, (side, side, 3))
    pixels[shape] += np.eye(3)[kind] * 130
    return pixels.clip(0, 255).astype(np.uint8)


def glyphs(count: int, first: int, side: int = 32) -> tuple[np.ndarray, list[int]]:
    """Pictures (n, side, side, 3) of all classes in turn, and their labels."""
    labels = [number % CLASSES for number in range(count)]
    return np.stack([glyph(k, first + n, side) for n, k in enumerate(labels)]), labels


def python_2(entries: dict[str, Any]) -> bytes:
    """A dictionary as Python 2 pickled it for CIFAR: text as bytes, arrays of bytes."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def write(value: Any) -> bytes:
        if isinstance(value, np.ndarray):
            kind = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
            kind += b"(K\x03" + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
            shape = b"".join(b"J" + struct.pack("<i", n) for n in value.shape) + b"\x86"
            made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
            made += text(b"b") + b"\x87R"
            return made + b"(K\x01" + shape + kind + b"\x89" + text(value.tobytes()) + b"tb"
        if isinstance(value, list):
            return b"](" + b"".join(map(write, value)) + b"e"
        return text(value.encode()) if isinstance(value, str) else b"K" + bytes([value])

    pairs = b"".join(text(key.encode()) + write(value) for key, value in entries.items())
    return b"\x80\x02}(" + pairs + b"u."


def rows_of(pictures: np.ndarray) -> np.ndarray:
    return pictures.transpose(0, 3, 1, 2).reshape(len(pictures), -1)


@pytest.fixture(scope="session")
def small_cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, five times twelve training images and nine test images."""
    folder = tmp_path_factory.mktemp("cifar") / "cifar-10-batches-py"
    folder.mkdir()
    for number in range(1, 6):
        pictures, labels = glyphs(12, 100 * number)
        batch = {"labels": labels, "data": rows_of(pictures), "filenames": ["a.png"] * 12}
        (folder / f"data_batch_{number}").write_bytes(python_2(batch))
    pictures, labels = glyphs(9, 1000)
    (folder / "test_batch").write_bytes(python_2({"labels": labels, "data": rows_of(pictures)}))
    (folder / "batches.meta").write_bytes(python_2({"label_names": list(GLYPHS)}))
    return folder.parent


@pytest.fixture
def small_cifar100(tmp_path: Path) -> Path:
    """As Python 3 and a newer numpy would write it; fine classes 0 to 2 are of two coarse ones."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 12), ("test", 6)):
        pictures, labels = glyphs(count, 10)
        entries = {"data": rows_of(pictures), "fine_labels": labels}
        entries["coarse_labels"] = [int(label > 0) for label in labels]
        (folder / name).write_bytes(pickle.dumps(entries, protocol=4))
    names = {"fine_label_names": list(GLYPHS), "coarse_label_names": ["round", "straight"]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=4))
    return tmp_path


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


@pytest.fixture(params=["", ".gz"])
def small_mnist(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for part, count in (("train", 12), ("t10k", 6)):
        pictures, labels = glyphs(count, 10, 28)
        files = {"images-idx3": pictures[..., 0], "labels-idx1": np.array(labels, np.uint8)}
        for name, values in files.items():
            content = idx(values) if not request.param else gzip.compress(idx(values))
            (tmp_path / f"{part}-{name}-ubyte{request.param}").write_bytes(content)
    return tmp_path


def opened(root: Path, layout: Layout, category: str, **options: Any) -> AnomalyDataModule:
    options = {"image_size": 32, "masks": "none", "batch_size": 4} | options
    datamodule = AnomalyDataModule(str(root), [category], layout=layout, **options)
    datamodule.setup()
    return datamodule


# -------------------- what is read


def test_the_old_and_the_new_way_of_writing_are_read_alike(
    small_cifar10: Path, small_cifar100: Path
) -> None:
    expected, labels = glyphs(9, 1000)
    found = read_arrays(small_cifar10 / "cifar-10-batches-py" / "test_batch")
    assert np.array_equal(found.pictures, expected)
    assert found.lists["labels"] == labels
    expected, labels = glyphs(6, 10)
    found = read_arrays(small_cifar100 / "cifar-100-python" / "test")
    assert np.array_equal(found.pictures, expected)
    assert found.lists["fine_labels"] == labels


def test_arrays_in_fortran_order_are_read(tmp_path: Path) -> None:
    rows = rows_of(glyphs(3, 0)[0])
    content = pickle.dumps({"data": np.asfortranarray(rows)}, protocol=4)
    (tmp_path / "batch").write_bytes(content)
    assert np.array_equal(rows_of(read_arrays(tmp_path / "batch").pictures), rows)


def test_a_picture_has_the_path_of_its_file_and_its_number(small_cifar10: Path) -> None:
    path = small_cifar10 / "cifar-10-batches-py" / "test_batch" / "00004"
    assert np.array_equal(read_image(path), glyph(1, 1004, 32))
    assert file_of(path) == path.parent
    with pytest.raises(UserError, match=r"test_batch has no picture number 9"):
        read_image(path.with_name("00009"))
    with pytest.raises(UserError, match="no picture number 0"):
        read_image(small_cifar10 / "cifar-10-batches-py" / "batches.meta" / "0")


def test_a_folder_of_a_number_is_no_packed_picture(tmp_path: Path) -> None:
    (tmp_path / "007").mkdir()
    assert packed_picture(tmp_path / "007") is None
    assert file_of(tmp_path / "007") == tmp_path / "007"


def test_a_file_that_changed_is_read_again(small_mnist: Path) -> None:
    path = next(small_mnist.glob("t10k-labels*"))
    before = read_arrays(path).lists["labels"]
    content = idx(np.array(before[::-1], np.uint8))
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    os.utime(path, ns=(1, 1))
    assert read_arrays(path).lists["labels"] == before[::-1]
    assert KEPT >= 6  # so that CIFAR-10 is read once


# -------------------- what is normal, and where


def test_one_class_or_all_but_one_is_normal(small_cifar10: Path) -> None:
    one = opened(small_cifar10, CIFAR10Layout(), "frame", holdout=0.1)
    assert one.counts() == {
        "frame": {"train": 18, "holdout": 2, "test good": 3, "test disc": 3, "test cross": 3}
    }
    others = opened(small_cifar10, CIFAR10Layout("others"), "frame", holdout=0.1)
    assert others.counts() == {
        "frame": {"train": 36, "holdout": 4, "test good": 6, "test frame": 3}
    }
    assert others.layout.name == "CIFAR10 (all but one normal)"
    seen = {sample.path for sample in [*one.train_samples, *one.holdout_samples]}
    assert not seen & {sample.path for sample in others.train_samples}
    assert one.digest != others.digest
    assert not one.has_masks


def test_cifar100_has_coarse_and_fine_classes(small_cifar100: Path) -> None:
    coarse = opened(small_cifar100, CIFAR100Layout(), "straight")
    assert coarse.counts()["straight"] == {
        "train": 7, "holdout": 1, "test round": 2, "test good": 4,
    }  # fmt: skip
    fine = opened(small_cifar100, CIFAR100Layout(labels="fine"), "disc")
    assert fine.counts()["disc"]["train"] == 3
    with pytest.raises(UserError, match=r"layout\.labels=all: choose coarse or fine"):
        CIFAR100Layout(labels="all")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"layout\.normal=most: choose one or others"):
        CIFAR100Layout("most")  # type: ignore[arg-type]


def test_mnist_is_grey_and_its_classes_are_numbered(small_mnist: Path) -> None:
    datamodule = opened(small_mnist, MNISTLayout(), "class_1", image_size=28)
    batch = datamodule.train_dataloader().dataset[0]
    expected = glyph(1, 10 + int(Path(batch["path"][0]).name), 28)[..., 0]
    assert np.array_equal((batch["image"][0] * 255).round().byte().numpy(), [expected] * 3)
    assert datamodule.counts()["class_1"]["test class_2"] == 2


def test_several_classes_in_one_model_are_refused(small_cifar10: Path) -> None:
    for asked in ("all", ["disc", "cross"]):
        datamodule = AnomalyDataModule(str(small_cifar10), asked, layout=CIFAR10Layout())
        with pytest.raises(UserError, match=r"anomalous in another.*categories=\[disc\],\[frame\]"):
            datamodule.setup()
    datamodule = AnomalyDataModule(str(small_cifar10), ["dics"], layout=CIFAR10Layout())
    with pytest.raises(UserError, match=r"no dics .* it holds disc, frame, cross"):
        datamodule.setup()
    datamodule = AnomalyDataModule(str(small_cifar10), ["disc"], layout=MNISTLayout())
    with pytest.raises(UserError, match=r"no disc .* it holds no category"):
        datamodule.setup()


@pytest.mark.parametrize("make", [HostCache, DiskCache, lambda folder: None])
def test_every_cache_gives_the_same_images(
    small_cifar10: Path, tmp_path: Path, make: Callable[..., Any]
) -> None:
    cache = make() if make is HostCache else make(str(tmp_path))
    datamodule = opened(small_cifar10, CIFAR10Layout(), "disc", cache=cache)
    batch = next(iter(datamodule.test_dataloader()))
    expected = glyphs(9, 1000)[0].transpose(0, 3, 1, 2)
    assert np.array_equal((batch["image"] * 255).round().byte().numpy(), expected)


def test_the_digest_sees_each_picture(small_cifar10: Path, tmp_path: Path) -> None:
    shutil.copytree(small_cifar10, tmp_path / "copy")
    before = opened(small_cifar10, CIFAR10Layout(), "disc").digest
    assert opened(tmp_path / "copy", CIFAR10Layout(), "disc").digest == before
    pictures, labels = glyphs(9, 1000)
    pictures[3, 16, 16] += 1
    file = tmp_path / "copy" / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(python_2({"labels": labels, "data": rows_of(pictures)}))
    assert opened(tmp_path / "copy", CIFAR10Layout(), "disc").digest != before


def test_the_check_of_the_data_finds_nothing_wrong(small_cifar10: Path) -> None:
    datamodule = AnomalyDataModule(
        str(small_cifar10), ["disc"], 32, masks="none", layout=CIFAR10Layout()
    )
    report = inspect_data(datamodule)
    assert [found.text for found in report.findings if found.level == "error"] == []


# -------------------- what is refused


class Runs:
    """Makes a file when a careless reader unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "data_batch_1"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for content in (Runs(mark), {"data": Runs(mark)}, {"labels": [1, [Runs(mark)]]}):
            file.write_bytes(b"\x80\x02" + pickle.dumps(content, protocol=protocol))
            with pytest.raises(UserError, match=r"names (posix|nt|os)\.mkdir"):
                read_arrays(file)
    pickle.loads(pickle.dumps(Runs(mark)))
    assert mark.is_dir()  # which shows that the file would have done it


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "copyreg __newobj__",
        "copyreg _reconstructor",
        "_codecs encode",
        "numpy load",
        "numpy.core.multiarray fromfile",
        "numpy._core.multiarray _reconstruct.__globals__",
        "anomaly_lit.data.arrays _Said",
    ],
)
def test_no_name_but_those_of_an_array_is_admitted(tmp_path: Path, name: str) -> None:
    module, attribute = name.split()
    (tmp_path / "f").write_bytes(b"\x80\x02c%s\n%s\n." % (module.encode(), attribute.encode()))
    with pytest.raises(UserError, match=f"it names {module}"):
        read_arrays(tmp_path / "f")


def test_what_stands_for_a_name_cannot_be_spoiled_for_the_next_file(
    tmp_path: Path, small_cifar10: Path
) -> None:
    """A pickle may set attributes of what a name gives (BUILD with a pair)."""
    for name in (b"numpy\nndarray", b"numpy\ndtype", b"numpy.core.multiarray\n_reconstruct"):
        attack = b"\x80\x02c" + name + b"\nN}U\x0c__defaults__K\x01s\x86b."
        (tmp_path / "f").write_bytes(attack)
        with pytest.raises(UserError, match="not a file of pictures"):
            read_arrays(tmp_path / "f")
    copy = shutil.copytree(small_cifar10, tmp_path / "copy") / "cifar-10-batches-py"
    assert read_arrays(copy / "test_batch").pictures is not None


@pytest.mark.parametrize(
    "data",
    [
        np.zeros((2, 3072), np.float32),
        np.array([{}, []], dtype=object),
        np.zeros((2, 3071), np.uint8),
        np.zeros(0, "datetime64[s]"),
        [1, 2, 3],
        b"bytes",
        None,
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, data: Any) -> None:
    (tmp_path / "f").write_bytes(pickle.dumps({"data": data}, protocol=4))
    with pytest.raises(UserError, match="f: not a file of pictures in the format of CIFAR"):
        read_arrays(tmp_path / "f")


def test_damaged_files_are_named(tmp_path: Path, small_cifar10: Path) -> None:
    whole = (small_cifar10 / "cifar-10-batches-py" / "test_batch").read_bytes()
    images = idx(glyphs(3, 0, 28)[0][..., 0])
    damaged = [b"", b"\x80", whole[:-100], b"\x80\x02]." + whole, b"\x89PNG", images[:-1]]
    damaged += [images + b"0", images[:10], b"\0\0\x0d\x01" + bytes(8), gzip.compress(images)[:-9]]
    damaged.append(struct.pack(">4B3I", 0, 0, 8, 3, *[2**32 - 1] * 3))  # more than any memory
    for number, content in enumerate(damaged):
        (tmp_path / str(number)).write_bytes(content)
        with pytest.raises(UserError, match=f"{number}: not a file of pictures"):
            read_arrays(tmp_path / str(number))
    with pytest.raises(UserError, match="absent: the file does not exist"):
        read_arrays(tmp_path / "absent")


def test_an_incomplete_set_is_named(small_cifar10: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_cifar10, tmp_path / "copy") / "cifar-10-batches-py"
    labels = {"labels": [0, 1], "data": rows_of(glyphs(3, 0)[0])}
    (folder / "data_batch_3").write_bytes(python_2(labels))
    with pytest.raises(UserError, match="data_batch_3: 3 pictures and 2 labels"):
        opened(folder.parent, CIFAR10Layout(), "disc")
    (folder / "data_batch_3").write_bytes(python_2({"data": labels["data"]}))
    with pytest.raises(UserError, match="data_batch_3: it has no labels, only"):
        opened(folder.parent, CIFAR10Layout(), "disc")
    (folder / "data_batch_3").unlink()
    with pytest.raises(UserError, match="data_batch_3: the file does not exist"):
        opened(folder.parent, CIFAR10Layout(), "disc")


def test_mnist_without_a_file_says_which(small_mnist: Path) -> None:
    next(small_mnist.glob("t10k-images*")).unlink()
    with pytest.raises(UserError, match=r"no file t10k-images-idx3-ubyte or .*all four"):
        opened(small_mnist, MNISTLayout(), "class_1")


# -------------------- the commands


def test_train_test_and_predict_without_masks(
    small_cifar10: Path,
    tmp_path: Path,
    settings: tuple[str, ...],
    run_here: Callable[..., Any],
) -> None:
    """With a method that localises; tests/methods/test_sap2.py has one that does not."""
    from PIL import Image

    run = tmp_path / "run"
    changes = ["dataset=cifar10", f"dataset.root={small_cifar10}", "dataset.categories=[disc]"]
    ended = run_here("train", *settings, *changes, f"output_dir={run}")
    assert ended.code == 0, ended.err
    metrics = (run / "metrics.json").read_text()
    assert "image_auroc" in metrics
    assert "pixel_auroc" not in metrics
    checkpoint = f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    ended = run_here("test", checkpoint, f"output_dir={tmp_path / 'test'}")
    assert ended.code == 0, ended.err
    (tmp_path / "in").mkdir()
    Image.fromarray(glyph(2, 0, 32)).save(tmp_path / "in" / "0.png")
    ended = run_here(
        "predict", checkpoint, f"input={tmp_path / 'in'}", f"output_dir={tmp_path / 'out'}"
    )
    assert ended.code == 0, ended.err
    assert "0.png" in (tmp_path / "out" / "predictions.csv").read_text()
