"""OneNIP: one normal image prompt for many classes (Gao, ECCV 2024, arXiv:2505.09264).

UniAD's encoder encodes the image and one normal image of the same category, the prompt. A decoder
lets the two attend to each other, layer by layer. From the prompt's tokens it rebuilds the features
that the image should have. It learns to rebuild normal images and to restore corrupted ones; the
target is always the clean features. A refiner turns the remaining error into a sharp map; it learns
from the known masks of the corruption.

Follows the second version of the authors' published code (in the first, the image never attended to
the prompt). Differs from it:

- The prompt of a test image is the first of `prompts` training images of its category, whose frozen
  features are kept in the checkpoint; the code draws a random training image.
- The constant that brings the refiner's map to the scale of the error map comes from training
  images, clean and corrupted. `fusion="test"` takes it from the test set, in each validation, as
  the paper does. Either way it is one number for thresholds, checkpoint, test and prediction.
- Corrupted images are made as published if `synthesis=onenip` has a folder of textures
  (`dataset.synthesis.recipes.perlin.texture_dir`, the paper's is DTD), up to details of the
  augmentations; without one, textures are generated.
- AUROC is never mirrored when it falls below one half.
- Features of clean images and prompts come from the cache if there is one, so that in a step only
  the corrupted images pass through the backbone.

With EfficientNet-B4 there are 8.373 million trainable parameters at 224 x 224, 0.593 million of
them in the refiner. Positions are learned, so a checkpoint is tied to its image size.

Paper: Gao: Learning to Detect Multi-class Anomalies with Just One Normal Image Prompt. ECCV 2024,
arXiv:2505.09264.
Status: works; measured small (experiments/onenip), not yet at the paper's size.
Note: the authors' code has no licence; written anew from its description, second version.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from anomaly_lit.losses import dice_loss, loss_terms
from anomaly_lit.methods.base import Method, OptimizerFn, ScheduleFn
from anomaly_lit.methods.onenip.network import BidirectionalDecoder, Refiner, StoredPrompts
from anomaly_lit.nn.aggregate import aggregate, grid_of, pooled_maximum, resize
from anomaly_lit.nn.attention import init_as_one, start_equal
from anomaly_lit.nn.backbone import Backbone
from anomaly_lit.nn.bank import Bank
from anomaly_lit.nn.neighbours import (
    LearnedPositions,
    NeighbourEncoder,
    answer_with_mean,
    neighbour_mask,
    silence,
)
from anomaly_lit.nn.transformer import add_jitter, init_linear
from anomaly_lit.types import Batch, Prediction, UserError, check_choice, check_range

FUSION_IMAGES = 64  # training images for the fusion constant


class OneNIP(Method):
    """One normal image prompt.

    Args:
        backbone: Frozen feature extractor; the paper takes four stages of EfficientNet-B4.
        loss: Reconstruction loss on (B, C, h, w) maps.
        optimizer: Builds the optimiser.
        schedule: Factor of the learning rate over training.
        gradient_clip: Largest norm of the gradients. Without it the large first gradients make
            AdamW's second moments so high that hundreds of steps learn almost nothing.
        image_size: Height and width of the images, or one number for both.
        stride: Pixels per position of the feature map; it divides the image size.
        dim: Width of a token, even and a multiple of `heads`.
        heads: Attention heads.
        feedforward: Width of the hidden layers.
        encoder_depth: Layers of the encoder.
        decoder_depth: Layers of the decoder.
        head: How the last layer starts: `random` as published, or `mean`, which outputs the mean
            training feature. At a learning rate far above the published one, only `mean` keeps the
            tokens from forgetting the image (see `nn.neighbours.silence`).
        dropout: Share of attention weights, the encoder's hidden layers and residuals that is
            dropped.
        window: Side of the neighbourhood that attention ignores, in positions; None is half of the
            map's side (7, 9 and 11 positions at 224, 256 and 320 pixels), 0 is none.
        jitter: Noise on tokens in training; see UniAD.
        refiner_dim: Channels of the refiner.
        refiner_weight: Weight of the refiner's dice loss.
        dice_factor: Factor of the overlap in the dice loss: 1 as in the authors' code, 2 for the
            usual dice loss.
        stop_gradient: Keep the refiner's gradient out of the reconstruction.
        prompts: Training images per category kept as prompts.
        prompt: Which prompt a scored image gets: `fixed` (number `prompt_index` of its category),
            `random` (any of its category) or `nearest` (of all categories, the one with the most
            similar mean feature; needs no category). If a batch has an image of unknown category,
            all its images get the nearest.
        prompt_index: From 0 to `prompts` - 1.
        fusion: Where the constant that scales the refiner's map comes from: `train` images, or the
            `test` set as in the paper, anew in each validation.
        pool: Side of the averaging window, in pixels; the largest of its means is the score.

    Raises:
        UserError: Values do not fit each other or the image size.
    """

    needs = frozenset({"corrupted", "prompt"})
    oracle_criterion = "pixel_auroc"
    fusion_constant: Tensor

    def __init__(
        self,
        backbone: Backbone,
        loss: nn.Module,
        optimizer: OptimizerFn,
        schedule: ScheduleFn | None = None,
        gradient_clip: float | None = 0.1,
        image_size: int | Sequence[int] = 224,
        stride: int = 16,
        dim: int = 256,
        heads: int = 8,
        feedforward: int = 1024,
        encoder_depth: int = 4,
        decoder_depth: int = 4,
        head: Literal["random", "mean"] = "random",
        dropout: float = 0.1,
        window: int | None = None,
        jitter: float = 20.0,
        refiner_dim: int = 128,
        refiner_weight: float = 0.5,
        dice_factor: float = 1.0,
        stop_gradient: bool = False,
        prompts: int = 5,
        prompt: Literal["fixed", "random", "nearest"] = "fixed",
        prompt_index: int = 0,
        fusion: Literal["train", "test"] = "train",
        pool: int = 16,
    ) -> None:
        super().__init__(optimizer, schedule, gradient_clip)
        check_range("method", "[1, inf)", dim=dim, heads=heads, feedforward=feedforward, pool=pool)
        check_range("method", "[0, inf)", encoder_depth=encoder_depth, decoder_depth=decoder_depth)
        check_range("method", "[0, inf)", window=window, jitter=jitter)
        check_range("method", "[0, 1)", dropout=dropout)
        if dim % heads or dim % 2:
            raise UserError(f"method.heads={heads} and 2 must divide method.dim={dim}")
        check_range("method", "[1, inf)", refiner_dim=refiner_dim, prompts=prompts)
        check_range("method", "[0, inf)", refiner_weight=refiner_weight, dice_factor=dice_factor)
        check_choice("method", ("random", "mean"), head=head)
        check_choice("method", ("fixed", "random", "nearest"), prompt=prompt)
        check_choice("method", ("train", "test"), fusion=fusion)
        if not 0 <= prompt_index < prompts:
            raise UserError(
                f"method.prompt_index={prompt_index} must lie in 0 to {prompts - 1}, since "
                f"method.prompts={prompts} are kept of each category"
            )
        self.backbone = backbone
        self.loss = loss
        self.grid = grid_of(image_size, stride)
        self.refiner_weight = refiner_weight
        self.dice_factor = dice_factor
        self.stop_gradient = stop_gradient
        self.prompt_count = prompts
        self.prompt = prompt
        self.prompt_index = prompt_index
        self.fusion = fusion
        self.oracle = "fusion constant from test images" if fusion == "test" else ""
        self.pool = pool
        channels = sum(backbone.channels)
        self.jitter = jitter / math.sqrt(channels)  # norm of the noise over that of the token
        window = min(self.grid) // 2 if window is None else window
        self.register_buffer("allowed", neighbour_mask(*self.grid, window), persistent=False)
        self.register_buffer("fusion_constant", torch.ones(()))
        self.stored = StoredPrompts(channels, *self.grid)
        self.prompt_tokens = Bank(math.prod(self.grid), dim)  # the prompts, encoded
        self.positions = LearnedPositions(*self.grid, dim)
        self.embed = nn.Linear(channels, dim)
        self.encoder = NeighbourEncoder(dim, heads, feedforward, encoder_depth, dropout)
        self.decoder = BidirectionalDecoder(dim, heads, feedforward, decoder_depth, dropout)
        self.head = nn.Linear(dim, channels)
        self.refiner = Refiner(channels, refiner_dim)
        for part in (self.embed, self.encoder, self.decoder, self.head, self.refiner):
            part.apply(init_linear).apply(init_as_one)
        for stack in (self.encoder, self.decoder):
            start_equal(stack.layers)
        self.head_start = head
        if head == "mean":
            silence(self.head)

    def encode(self, features: Tensor) -> Tensor:
        """Map (B, C, h, w) to tokens (B, N, dim); with jitter in training."""
        tokens = features.flatten(2).transpose(1, 2)  # (B, N, C)
        tokens = self.embed(add_jitter(tokens, self.jitter if self.training else 0.0))
        return self.encoder(tokens, self.positions(), self.allowed)

    def reconstruct(self, image: Tensor, prompt: Tensor) -> Tensor:
        """Map encoded tokens of images and of their prompts to (B, C, h, w), in float32."""
        decoded = self.head(self.decoder(image, prompt, self.positions(), self.allowed))
        return decoded.float().transpose(1, 2).unflatten(2, self.grid)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of rebuilding clean images, restoring corrupted ones, and refining."""
        normal = aggregate(self.features(self.backbone, batch), self.grid).float()
        corrupted = aggregate(self.backbone(batch["corrupted"]), self.grid).float()
        if "prompt" in batch:
            prompt = aggregate(self.features(self.backbone, batch, of="prompt"), self.grid).float()
        else:  # validation batches have none
            prompt = self.stored.items[self.stored.rows(batch["category"], self.prompt_index)]
        image, restored, prompted = self.encode(torch.cat([normal, corrupted, prompt])).chunk(3)
        both = torch.cat([image, restored])
        rebuilt = self.reconstruct(both, torch.cat([prompted, prompted]))
        terms = loss_terms(self.loss, rebuilt, torch.cat([normal, normal]))
        given = torch.cat([normal, corrupted])
        probability = self.refine(rebuilt, given, batch["image"].shape[-2:])
        corruption = batch["corruption"].float()
        truth = torch.cat([torch.zeros_like(corruption), corruption])
        terms["dice"] = self.refiner_weight * dice_loss(probability, truth, self.dice_factor)
        return terms

    def refine(self, rebuilt: Tensor, given: Tensor, size: Sequence[int]) -> Tensor:
        """Map rebuilt and given (B, C, h, w) to the probability of a defect, (B, 1, H, W)."""
        rebuilt = rebuilt.detach() if self.stop_gradient else rebuilt
        return resize(self.refiner((rebuilt - given).abs()).float(), size).sigmoid()

    def errors(self, features: Tensor, prompts: Tensor, size: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the distance to the rebuilt features and the refiner's map, each (B, 1, H, W).

        Args:
            features: (B, C, h, w) of the images.
            prompts: (B, N, dim), the prompts' tokens.
            size: H and W.
        """
        rebuilt = self.reconstruct(self.encode(features), prompts)
        distance = (rebuilt - features).norm(dim=1, keepdim=True)
        return resize(distance, size), self.refine(rebuilt, features, size)

    def forward(self, image: Tensor) -> Prediction:
        """Score images with the most similar prompts; see the base class."""
        features = aggregate(self.backbone(image), self.grid).float()
        prompts = self.encoded_prompts()[self.stored.most_similar(features)]
        return self._score(features, prompts, image.shape[-2:])

    def predict_batch(self, batch: Batch) -> Prediction:
        """Score a batch with the prompts that `prompt` selects."""
        image, categories = batch["image"], batch["category"]
        known = all(category in self.stored.categories for category in categories)
        if self.prompt == "nearest" or not known:
            return self(image)
        features = aggregate(self.backbone(image), self.grid).float()
        index: list[int] | int = self.prompt_index
        if self.prompt == "random":
            index = torch.randint(self.prompt_count, (len(categories),)).tolist()
        rows = self.stored.rows(categories, index)
        # sliced, not indexed: OpenVINO 2026.4 miscomputes a linear layer whose input is constant
        # rows of a constant tensor
        tokens = self.encoded_prompts()
        prompts = torch.cat([tokens[row : row + 1] for row in rows])
        return self._score(features, prompts, image.shape[-2:])

    def encoded_prompts(self) -> Tensor:
        """Return the tokens of all prompts, (n, N, dim), encoded anew if weights have changed."""
        return self.prompt_tokens.items if self.calibrated else self.encode(self.stored.items)

    def _score(self, features: Tensor, prompts: Tensor, size: Sequence[int]) -> Prediction:
        distance, refined = self.errors(features, prompts, size)
        anomaly_map = 0.5 * distance + 0.5 * self.fusion_constant * refined
        return Prediction(anomaly_map, pooled_maximum(anomaly_map, self.pool))

    # ----------------------------------------------------------- what is taken from the data

    def learn(self) -> None:
        """Keep each category's prompts; start the head at the mean feature if `head` says so."""
        if self.head_start == "mean":
            known = (self.features(self.backbone, b) for b in self.normal_batches("train"))
            answer_with_mean(self.head, (aggregate(maps, self.grid) for maps in known))
        categories = self.trainer.datamodule.categories  # type: ignore[attr-defined]
        maps: list[Tensor] = []
        names: list[str] = []
        with torch.autocast(self.device.type, enabled=False):
            for batch in self.normal_batches("train", self.prompt_count * len(categories)):
                # scoring reads the prompts, so do not use cached features, which may be rounded
                maps.append(aggregate(self.backbone(batch["image"]), self.grid))
                names += batch["category"]
        self.stored.keep(torch.cat(maps), names, self.prompt_count)

    def calibrate(self) -> None:
        """Encode the prompts, and compute the fusion constant.

        It is kept with the weights: a validation, its thresholds, the checkpoint, the test and
        every prediction use the same one.
        """
        self.prompt_tokens.fill(self.encode(self.stored.items))
        if self.fusion == "train":
            batches = self.normal_batches("train", FUSION_IMAGES)
        else:
            loader = self.trainer.datamodule.test_dataloader()  # type: ignore[attr-defined]
            batches = (self.transfer_batch_to_device(batch, self.device, 0) for batch in loader)
        self.fusion_constant.copy_(self._middle(batches, corrupted=self.fusion == "train"))

    def _middle(self, batches: Iterable[Batch], corrupted: bool) -> Tensor:
        """Return the midpoint between the smallest and the largest distance in all maps."""
        extremes = [self.fusion_constant.new_full((2,), -math.inf)]  # a rank may have no image
        for batch in batches:
            prompts = self.prompt_tokens.items[
                self.stored.rows(batch["category"], self.prompt_index)
            ]
            for image in [batch["image"], batch["corrupted"]] if corrupted else [batch["image"]]:
                features = aggregate(self.backbone(image), self.grid)
                distance, _ = self.errors(features, prompts, image.shape[-2:])
                extremes.append(torch.stack([-distance.amin(), distance.amax()]))
        gathered = self.all_gather(torch.stack(extremes).amax(dim=0))
        assert isinstance(gathered, Tensor)  # (2,), or (ranks, 2)
        greatest = gathered.reshape(-1, 2).amax(dim=0)
        return (greatest[1] - greatest[0]) / 2
