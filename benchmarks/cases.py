"""What scaling.py measures at one size: each case gives its quantities, in a process of its own."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from metrics import memory
from PIL import Image
from torch import Tensor, nn

from anomaly_lit.callbacks import Evaluation
from anomaly_lit.callbacks.run import StepSeeds
from anomaly_lit.config.build import instantiate
from anomaly_lit.config.hydra import config_dir, plain
from anomaly_lit.data import DiskCache, HostCache, MVTecAD
from anomaly_lit.losses import total
from anomaly_lit.methods.base import Method
from anomaly_lit.nn.bank import Bank, Reservoir, coreset
from anomaly_lit.types import Batch, Prediction

Quantities = dict[str, float]  # "name, unit" to a number
PEAK = "peak memory, MiB"
SIDE, BATCH, DRAWN = 64, 8, 16
LENGTH, MOST = 128, 50_000  # of vectors, and drawn from them


def apart(work: Callable[[], Quantities], threads: int) -> Quantities | str:
    """Run the work in a fork, whose memory nothing has used before; a string says why it failed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(threads)
        try:
            sender.send(work())
        except Exception as error:
            sender.send(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        found: Quantities | str = receiver.recv()
    except EOFError:
        found = "the process was killed, as for lack of memory"
    process.join()
    return found


class Peak:
    """The most memory that the process takes within the block, over what it had at the start."""

    def __init__(self) -> None:
        gc.collect()
        self.before, self.mib = memory("VmRSS"), 0.0

    def __enter__(self) -> Peak:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        return self

    def __exit__(self, *error: object) -> None:
        self.mib = max(memory("VmHWM") - self.before, 0.1)  # a power law needs values above 0


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---------------------------------------------------------------- data sets


def write_set(root: Path, categories: int, count: int) -> Path:
    """Write images of 64 x 64 in the layout of MVTec AD, as hard links to a few that are drawn.

    Of each category three fifths are for training, one fifth are normal test images, and one fifth
    anomalous ones.
    """
    drawn = root / "drawn"
    if not drawn.exists():
        drawn.mkdir(parents=True)
        for number in range(DRAWN):
            pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(drawn / f"{number}.png")
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[8:20, 8:20] = 255
        Image.fromarray(mask).save(drawn / "mask.png")
    folder = root / f"{categories}_{count}"
    for category in range(categories):
        base, own = folder / f"c{category:02d}", count // categories
        defects = own // 5
        for part, number in (("train/good", own - 2 * defects), ("test/good", defects),
                             ("test/spot", defects), ("ground_truth/spot", defects)):  # fmt: skip
            (base / part).mkdir(parents=True)
            for index in range(number):
                name = "mask" if part.startswith("ground") else str(index % DRAWN)
                os.link(drawn / f"{name}.png", base / part / f"{index:05d}.png")
    return folder


class Brightness(Method):
    """A method that costs next to nothing, so that all other work is what is measured."""

    def __init__(self) -> None:
        super().__init__(partial(torch.optim.SGD, lr=1e-3))
        self.weight = nn.Parameter(torch.ones(()))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return any loss."""
        return {"brightness": (self.weight * batch["image"].mean()).square()}

    def forward(self, image: Tensor) -> Prediction:
        """Return the mean of the channels as the map."""
        anomaly_map = self.weight * image.mean(dim=1, keepdim=True)
        return Prediction(anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))


def module_of(folder: Path, cache: Any = None, **options: Any) -> MVTecAD:
    return MVTecAD(
        str(folder), image_size=SIDE, batch_size=BATCH, holdout=0.1, cache=cache, **options
    )


def trainer_of() -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[StepSeeds(0), Evaluation()],
    )


def images(folder: Path) -> Quantities:
    """Measure all that happens to a data set of one category, one thing after the other."""
    found: Quantities = {}
    with Peak() as peak:
        datamodule = module_of(folder, HostCache())
        plain_module = module_of(folder)
        found["set-up, s"] = seconds(plain_module.setup)
        samples, resize = plain_module.samples(), plain_module.resize
        found["filling cache=host, s"] = seconds(lambda: HostCache().fill(samples, resize))
        stored = folder.parent / f"{folder.name}.{os.getpid()}"
        disk = partial(DiskCache, str(stored))
        found["filling cache=disk, s"] = seconds(lambda: disk().fill(samples, resize))
        found["opening cache=disk, s"] = seconds(lambda: disk().fill(samples, resize))
        datamodule.setup()
        found |= epochs(folder, datamodule)
    return found | {PEAK: peak.mib}


def epochs(folder: Path, datamodule: MVTecAD) -> Quantities:
    """Measure an epoch with validation, a test, and the batches with prompts or balanced."""
    method, trainer = Brightness(), trainer_of()
    steps = len(datamodule.train_dataloader())
    found = {
        "epoch in the trainer, ms a step": seconds(
            lambda: trainer.fit(method, datamodule=datamodule)
        )
    }
    found["test with all metrics, s"] = seconds(
        lambda: trainer.test(method, datamodule=datamodule, verbose=False)
    )
    options: dict[str, dict[str, Any]] = {
        "prompts": {"needs": {"prompt"}},
        "balanced": {"balanced": True},
    }
    for name, option in options.items():
        other = module_of(folder, datamodule.cache, **option)  # decodes nothing again
        other.setup()
        found[f"batches, {name}, ms a step"] = seconds(lambda: list(other.train_dataloader()))  # noqa: B023
    per_step = {name for name in found if name.endswith("ms a step")}
    return {k: 1000 * v / steps if k in per_step else v for k, v in found.items()}


def categories(folder: Path) -> Quantities:
    """Measure the same number of images, spread over more categories, all learned by one model."""
    with Peak() as peak:
        datamodule = module_of(folder, HostCache(), balanced=True)
        found = {"set-up with cache=host, s": seconds(datamodule.setup)}
        method, trainer = Brightness(), trainer_of()
        found["epoch, s"] = seconds(lambda: trainer.fit(method, datamodule=datamodule))
        found["test with all metrics, s"] = seconds(
            lambda: trainer.test(method, datamodule=datamodule, verbose=False)
        )
    return found | {PEAK: peak.mib}


# ---------------------------------------------------------------- methods


def method_of(name: str, size: int, *overrides: str) -> Any:
    """Return a method with random weights in its backbone."""
    from hydra import compose, initialize_config_dir

    wanted = [f"method={name}", f"image_size={size}", "output_dir=none", *overrides]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = plain(compose("train", overrides=wanted))["method"]
    config["backbone"]["weights"] = "random"
    pl.seed_everything(0, verbose=False)
    return instantiate(config)


def resolution(name: str, batch: int, size: int) -> Quantities:
    """Measure the forward pass and the training step of one method."""
    method = method_of(name, size)
    image = torch.rand(batch, 3, size, size)

    def forward() -> None:
        with torch.inference_mode():
            method.eval()(image)

    peak = Peak()  # one for both: memory that the forward pass frees is used again
    found = repeated("forward", forward, peak)
    return found | repeated("training step", stepper(method, {"image": image}), peak)


def tokens(name: str, batch: int, side: int) -> Quantities:
    """Measure the training step on given features, without the backbone: side x side tokens."""
    grid = [f"method.grid={2 * side}"] if name.startswith("ami_net") else []  # patches of 2 x 2
    method = method_of(name, 16 * side, *grid)
    backbone = method.backbone
    maps = [
        torch.rand(batch, count, 16 * side // stride, 16 * side // stride)
        for count, stride in zip(backbone.channels, backbone.strides, strict=True)
    ]
    image = torch.zeros(batch, 3, 1, 1)  # only the size of the batch is read
    batch_ = {"image": image, "features": {"backbone": maps}}
    return repeated("training step", stepper(method, batch_), Peak())


def stepper(method: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """Return a training step of the method's optimiser."""
    optimizer = method.optimizer([p for p in method.parameters() if p.requires_grad])

    def step() -> None:
        method.train()
        optimizer.zero_grad()
        total(method.losses(batch)).backward()
        optimizer.step()

    return step


def repeated(name: str, work: Callable[[], None], peak: Peak, least: float = 0.5) -> Quantities:
    """Measure the mean seconds of calls after the first, for `least` seconds, and the peak."""
    with peak:
        work()
        count, spent = 0, 0.0
        while spent < least:
            spent += seconds(work)
            count += 1
    return {f"{name}, s": spent / count, f"{name}, {PEAK}": peak.mib}


# ------------------------------------------------------------------ a bank


def vectors(count: int) -> Quantities:
    """Build and search a bank of random vectors, in CPU time, which other programs change less.

    The vectors are drawn before, so that the memory is what the work takes beside them.
    """
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(count, LENGTH, generator=generator)
    reservoir, found = Reservoir(MOST, generator), {}
    with Peak() as peak:
        found[f"drawing at most {MOST:,}, CPU s"] = cpu_seconds(
            lambda: [reservoir.add(part) for part in items.split(BATCH * SIDE)]
        )
        drawn = reservoir.drawn()
    found[f"drawing, {PEAK}"] = peak.mib
    found["coreset of 1 % of the drawn, CPU s"] = cpu_seconds(
        lambda: coreset(drawn, len(drawn) // 100)
    )
    with Peak() as peak:
        found["coreset of 100, CPU s"] = cpu_seconds(lambda: coreset(items, 100))
    found[f"coreset of 100, {PEAK}"] = peak.mib
    bank, queries = Bank(LENGTH), torch.randn(1000, LENGTH, generator=generator)
    bank.items = items
    with Peak() as peak:
        found["search of 1,000 queries, CPU s"] = cpu_seconds(lambda: bank.nearest(queries))
    found[f"search of 1,000 queries, {PEAK}"] = peak.mib
    return found


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
