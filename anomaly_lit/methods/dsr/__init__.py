"""DSR: dual subspace re-projection (Zavrtanik, Kristan, Skočaj, ECCV 2022, arXiv:2208.01521).

Training has three stages in one run. First a quantised latent model learns to describe any image by
two levels of codes; it is then frozen. Second, codes of normal images are corrupted by drawing
other codes that are far away, but not too far. Two restriction networks learn to restore the codes,
and a category-specific decoder to turn them into an image. A detector learns to compare the image
as it is (decoded by the general decoder) with the image as it should be. Third, an upsampling
network learns to sharpen the detector's output, on normal images with synthetic smudges.

Follows the authors' published code. Differs from it:

- The first stage is part of the run and uses the available normal images and textures, mirrored at
  random but not cropped; the authors trained it on ImageNet. Expect less from such a local
  codebook, and nothing from one that is trained for too short a time: its decoder then hides the
  very defects that the detector should see. Unused codes are replaced.
- A latent model can serve other categories too: `latent_weights` reads it from a checkpoint or from
  the authors' file, and the first stage is skipped.
- A smudge of the third stage turns with its image; in the code it is laid on the turned image.
- Batches come from the data module; in the code an epoch is 8000 draws with replacement.
- Pixel metrics cover the whole image, not its central 224 x 224.

There are 38 million parameters, 36 million of them category-specific.

Paper: Zavrtanik, Kristan, Skočaj: DSR – A dual subspace re-projection network for surface anomaly
detection. ECCV 2022, arXiv:2208.01521.
Status: works; measured small (experiments/dsr), too short to compare.
Note: the authors' code is Apache-2.0; written anew from its description, with a first stage on the
images at hand in place of ImageNet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anomaly_lit.losses import focal_loss
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.dsr.network import (
    Codes,
    LatentModel,
    ObjectDecoder,
    Restriction,
    corrupt_codes,
    init_gaussian,
    levelled,
    mirrored,
    turn,
)
from anomaly_lit.methods.dsr.pretrained import load_latent
from anomaly_lit.nn.aggregate import check_multiple
from anomaly_lit.nn.stages import Stages
from anomaly_lit.nn.unet import UNet
from anomaly_lit.synthesis.perlin import PerlinMask
from anomaly_lit.synthesis.textures import TextureFolder, procedural_textures
from anomaly_lit.types import Batch, Prediction, UserError, check_range

SMOOTH = 1e-5  # keeps the focal loss of confident answers bounded
STAGES = ("latent", "detection", "upsampling")


class DSR(Method):
    """Dual subspace re-projection.

    Args:
        optimizer: Builds the optimiser; each stage updates only its own parameters.
        schedule: Factor of the learning rate over each stage of `scheduled`.
        gradient_clip: Largest norm of all gradients together.
        hidden: Channels of the latent model, and length D of a code's vector.
        residual: Channels inside its residual blocks.
        codes: Number of vectors in each of its two codebooks.
        reseed: Number of steps without use after which a vector is replaced.
        textures: Texture images per image of the batch in the first stage.
        texture_dir: Folder of the textures; None generates them.
        restriction: Channels of the restriction networks' first stage.
        object_width: Channels of the object decoder's first stage, a multiple of 4.
        object_neck: Channels of its narrowest map, (H / 16, W / 16); None for `object_width` / 4.
        detector: Channels of the stages of the detector and the upsampling network.
        turned: Shares of images that the last two stages turn by up to 90 degrees.
        level: Shift each image as it should be, so that its median difference to the image as it is
            becomes zero in each colour. Instance normalisation tells the networks next to nothing
            of an image's overall brightness.
        scheduled: Names of these stages: some of `latent`, `detection` and `upsampling`.
        shares: Shares of training of the three stages. With [1, 0, 0] a run trains only the latent
            model, for other runs to read.
        latent_weights: Checkpoint of another run of DSR with the same latent model, or the authors'
            file; the first stage is skipped, and its share goes to the others.
        window: Side of the averaging window, in pixels, odd; the largest of its means is the score.

    Raises:
        UserError: A number is out of range.
    """

    multiple = 32
    leaves_unused = True  # each stage leaves those of the other two
    needs = frozenset({"corrupted"})

    def __init__(
        self,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = None,
        hidden: int = 128,
        residual: int = 64,
        codes: int = 4096,
        reseed: int = 1000,
        textures: float = 0.5,
        texture_dir: str | None = None,
        restriction: int = 128,
        object_width: int = 256,
        object_neck: int | None = None,
        detector: Sequence[int] = (64, 128, 256, 256),
        turned: Sequence[float] = (0.4, 0.3),
        level: bool = False,
        scheduled: Sequence[str] = ("detection",),
        shares: Sequence[float] = (0.25, 0.5, 0.25),
        latent_weights: str | None = None,
        window: int = 21,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "[1, inf)", hidden=hidden, residual=residual, reseed=reseed)
        check_range("method", "[1, inf)", restriction=restriction, detector=detector, window=window)
        check_range("method", "[1, inf)", object_width=object_width)
        check_range("method", "[0, inf)", textures=textures, shares=shares)
        check_range("method", "[1, inf)", object_neck=object_neck)
        check_range("method", "[0, 1]", turned=turned)
        if codes < 20 or hidden % 2 or object_width % 4 or window % 2 == 0:
            raise UserError(
                f"method.codes={codes} must be at least 20, hidden={hidden} even, object_width="
                f"{object_width} a multiple of 4 and window={window} odd"
            )
        if len(turned) != 2 or not set(scheduled) <= set(STAGES):
            raise UserError(
                f"method.turned={list(turned)} must be two shares, and method.scheduled="
                f"{list(scheduled)} some of {', '.join(STAGES)}"
            )
        needed = sum(shares[1:]) if latent_weights else sum(shares)
        if len(shares) != 3 or needed <= 0:
            raise UserError(
                f"method.shares={list(shares)}: give three shares, of which one is above 0 "
                "(with method.latent_weights one of the last two)"
            )
        self.textures = textures
        self.texture_folder = None if texture_dir is None else TextureFolder(texture_dir)
        self.latent_weights = latent_weights
        self.window = window
        self.turned = turned
        self.level = level
        self.scheduled_stages = scheduled
        first = 0.0 if latent_weights else shares[0]
        self.stages = Stages(dict(zip(STAGES, [first, *shares[1:]], strict=True)))
        self.latent = LatentModel(hidden, residual, codes, reseed)
        self.restrict_low = Restriction(hidden, restriction)
        self.restrict_high = Restriction(hidden, restriction)
        self.object_decoder = ObjectDecoder(hidden, residual, object_width, object_neck)
        self.detector = UNet(6, detector)
        self.upsampler = UNet(8, detector)
        for part in (self.object_decoder, self.detector):  # the upsampler keeps torch's start
            part.apply(init_gaussian)
        self.perlin = PerlinMask(attempts=1)
        self.encodings: tuple[Tensor, Tensor] | None = None

    # ------------------------------------------------------------------------------- stages

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the current stage's terms; in evaluation all, so that values can be compared."""
        makers = {
            "latent": self.latent_losses,
            "detection": self.detection_losses,
            "upsampling": self.upsampling_losses,
        }
        stage, _ = self.stages.at(self.done)
        terms: dict[str, Tensor] = {}
        for name in [stage] if self.training else STAGES:
            terms |= makers[name](batch)
        return terms

    def latent_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of reconstruction and of the encodings' distance to their codes."""
        image = batch["image"]
        if self.training:
            image = mirrored(torch.cat([image, self.draw_textures(image)]))
        features, z_low = self.latent.encode(image)
        low = self.latent.low(z_low)
        z_high = self.latent.encoding_high(features, low)
        high = self.latent.high(z_high)
        rebuilt = self.latent.decoder(self.latent.joined(Codes(low, high)))
        if self.training:
            self.encodings = (z_low.detach(), z_high.detach())
        commitment = F.mse_loss(z_low, low.detach()) + F.mse_loss(z_high, high.detach())
        return {"latent": F.mse_loss(rebuilt, image), "commitment": 0.25 * commitment}

    def detection_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of restored codes, the image as it should be, and the detector."""
        generator = self.generator()
        image = batch["image"]
        if self.training:
            image = turn(image, self.turned[0], generator)
        with torch.no_grad():
            clean, corrupted, truth = self.corrupted_codes(image, generator)
            general = self.latent.decoder(self.latent.joined(corrupted))
        low, high = self.restrict_low(corrupted.low), self.restrict_high(corrupted.high)
        specific = self.show(low, high)
        expected = self.expected(specific, general).detach()
        logits = self.detector(torch.cat([expected, general], dim=1))
        return {
            "codes": F.mse_loss(low, clean.low) + F.mse_loss(high, clean.high),
            "image": 10 * F.mse_loss(self.expected(specific, image), image),
            "detection": focal_loss(odds(logits), truth, smooth=SMOOTH),
        }

    def upsampling_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of the upsampling network on smudged images."""
        whole = torch.cat([batch["corrupted"], batch["corruption"].to(batch["image"].dtype)], dim=1)
        if self.training:
            whole = turn(whole, self.turned[1], self.generator())
        with torch.no_grad():
            seen = self.detect(whole[:, :3])
        logits = self.upsampler(torch.cat(seen, dim=1))
        return {"upsampling": focal_loss(odds(logits), (whole[:, 3:] > 0.5).float(), smooth=SMOOTH)}

    # -------------------------------------------------------------------------------- parts

    def corrupted_codes(
        self, image: Tensor, generator: torch.Generator
    ) -> tuple[Codes, Codes, Tensor]:
        """Return clean codes, corrupted codes, and the true mask (B, 1, H, W) in {0., 1.}.

        On average half of the images stay clean. Of the others, half are corrupted at both levels,
        first the coarser and then the finer; a quarter only at the coarser, a quarter only at the
        finer.
        """
        clean, features, z_low = self.latent.codes(image)
        draw = torch.rand(2, len(image), 1, 1, 1, generator=generator, device=image.device)
        with torch.autocast(image.device.type, enabled=False):
            region = self.perlin(image, generator) & (draw[0] < 0.5)
        both, high_only = draw[1] < 0.5, draw[1] >= 0.75
        low_only = ~both & ~high_only
        at_low, at_high = (
            F.adaptive_max_pool2d(region.float(), codes.shape[-2:]) > 0 for codes in clean
        )
        low = corrupt_codes(z_low, clean.low, at_low & ~high_only, self.latent.low, generator)
        z_high = self.latent.encoding_high(features, torch.where(both, low, clean.low))
        changed = corrupt_codes(
            z_high, self.latent.high(z_high), at_high & ~low_only, self.latent.high, generator
        )
        high = torch.where(low_only, clean.high, changed)
        size = image.shape[-2:]
        coarse, fine = (F.interpolate(at.float(), size) for at in (at_low, at_high))
        return clean, Codes(low, high), torch.where(high_only, fine, coarse)

    def show(self, low: Tensor, high: Tensor) -> Tensor:
        """Quantise the restricted codes of both levels, and decode them with the object decoder."""
        up = self.latent.up
        assert up.bias is not None
        fine = F.conv_transpose2d(
            self.latent.low(low), up.weight.detach(), up.bias.detach(), stride=2, padding=1
        )
        return self.object_decoder(torch.cat([fine, self.latent.high(high)], dim=1))

    def expected(self, specific: Tensor, seen: Tensor) -> Tensor:
        """Return decoded images, with the brightness of those seen if `level` is set."""
        return levelled(specific, seen) if self.level else specific

    def detect(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return images as they should be, as they are, and (B, 2, H, W) class probabilities."""
        codes, _, _ = self.latent.codes(image)
        general = self.latent.decoder(self.latent.joined(codes))
        specific = self.show(self.restrict_low(codes.low), self.restrict_high(codes.high))
        specific = self.expected(specific, general)
        logits = self.detector(torch.cat([specific, general], dim=1))
        return specific, general, logits.softmax(dim=1)

    def forward(self, image: Tensor) -> Prediction:
        """Score images; see the base class. A map's values lie in [0, 1]."""
        check_multiple(image.shape[-2:], self.multiple, "the stride of DSR's coarsest map")
        specific, general, share = self.detect(image)
        logits = self.upsampler(torch.cat([specific, general, share], dim=1))
        around = F.avg_pool2d(share[:, 1:], self.window, stride=1, padding=self.window // 2)
        return Prediction(logits.softmax(dim=1)[:, 1:], around.amax(dim=(1, 2, 3)))

    def draw_textures(self, image: Tensor) -> Tensor:
        """Return texture images for the first stage, (textures * B, 3, H, W)."""
        count = math.ceil(self.textures * len(image))
        height, width = image.shape[-2:]
        draw = procedural_textures if self.texture_folder is None else self.texture_folder
        with torch.autocast(image.device.type, enabled=False):
            return draw(count, height, width, self.generator()).to(image.dtype)

    # -------------------------------------------------------------------------------- hooks

    def check(self) -> None:
        """Read the file of the latent model."""
        if self.latent_weights:
            load_latent(self.latent, self.latent_weights)

    def learn(self) -> None:
        """Load the latent model from a file, or draw its first vectors from normal images."""
        if self.latent_weights:
            load_latent(self.latent, self.latent_weights)
            return
        images = torch.cat([batch["image"] for batch in self.normal_batches("train", 16)])
        features, z_low = self.latent.encode(images)
        self.latent.low.start(z_low)
        self.latent.high.start(self.latent.encoding_high(features, self.latent.low(z_low)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the loss as in the base class; in the first stage also update the codebooks."""
        self.encodings = None
        loss = super().training_step(batch, batch_idx)
        if self.encodings is not None:
            self.move_codebooks(self.encodings)
        return loss

    def move_codebooks(self, encodings: tuple[Tensor, Tensor]) -> None:
        """Update both codebooks' averages over all ranks; log the perplexity of their use."""
        for name, book, z in zip(
            ("low", "high"), (self.latent.low, self.latent.high), encodings, strict=True
        ):
            assigned = self.trainer.strategy.reduce(book.assigned(z), reduce_op="sum")
            assert isinstance(assigned, Tensor)
            book.move(assigned, z)
            used = assigned[:, -1] / assigned[:, -1].sum()
            self.log(f"train/perplexity_{name}", torch.exp(-(used * (used + 1e-10).log()).sum()))

    def configure_optimizers(self) -> Any:
        """Return one optimiser; in the stages of `scheduled` its rate follows the schedule."""
        optimizer = self.optimizer(list(self.parameters()))

        def factor(done: float) -> float:
            stage, within = self.stages.at(done)
            if self.schedule is None or stage not in self.scheduled_stages:
                return 1.0
            return self.schedule(within)

        return self.scheduled(optimizer, factor)


def odds(logits: Tensor) -> Tensor:
    """Map (B, 2, H, W) logits to (B, 1, H, W); the sigmoid is the second class's probability."""
    return (logits[:, 1:] - logits[:, :1]).float()
