"""A frozen feature extractor: any timm model that gives intermediate maps."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from anomaly_lit.nn.aggregate import check_multiple
from anomaly_lit.nn.weights import find_weights
from anomaly_lit.types import UserError, check_range


class Backbone(nn.Module):
    """Describes an image by the maps of some stages of a frozen, pretrained network.

    It is always frozen: no parameter takes a gradient and no buffer changes, whatever mode the
    surrounding module is in. The backbone normalises its own input.

    The constructor builds the network with random weights and reads no file; `load_weights` reads
    the weights once, unless a state dict was loaded before.

    Args:
        name: timm's name with the tag of the weights, such as `resnet18.tv_in1k`.
        out_indices: Stages to return, counted as timm counts them.
        weights: `pretrained` (the folder in `ANOMALY_LIT_WEIGHTS`, else timm's hub),
            `random`, or a file with a timm state dict (`.safetensors` or `.pth`).
        file_stem: Name of the file in that folder, without its ending; default: the architecture.
        mean: Mean of each channel, for pixels in [0, 1]; default: that of the weights.
        std: Standard deviation of each channel, likewise.
        options: More arguments for `timm.create_model`.
        final_norm: Whether a transformer's maps pass through its last layer normalisation.
        groups: Number of groups of consecutive stages, all of one size; the mean of each group is
            returned in place of its stages. None returns each stage.
        prefix: Also return a transformer's prefix tokens (class token, then registers).
        padding: Pixels of zeros on every side of a convolution's input, by the convolution's name
            in the network, such as `blocks.2.0.conv_dw`; it replaces the padding that timm chose.

    Attributes:
        channels: Channels of each returned map.
        strides: Pixels of the image per position of each returned map.
        prefix_tokens: Number of prefix tokens that are returned with each map.

    Raises:
        UserError: timm does not know the name, the network has no such stage, no such convolution
            or no prefix tokens, or the stages cannot be grouped.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] = (1, 2, 3),
        weights: str = "pretrained",
        file_stem: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        options: Mapping[str, Any] | None = None,
        final_norm: bool = False,
        groups: int | None = None,
        prefix: bool = False,
        padding: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        if not out_indices or list(out_indices) != sorted(set(out_indices)):
            raise UserError(
                f"method.backbone.out_indices={list(out_indices)}: give at least one stage, each "
                "once, in rising order, such as [1, 2, 3]"
            )
        self.name = name
        self.weights = weights
        self.file_stem = file_stem
        self.out_indices = tuple(out_indices)
        self.options = dict(options or {})
        self.final_norm = final_norm
        self.groups = groups
        self.prefix = prefix
        self.padding = dict(padding or {})
        self.network = self._build()
        for convolution, pixels in self.padding.items():
            self._pad(convolution, pixels)
        channels: list[int] = self.network.feature_info.channels()
        strides: list[int] = self.network.feature_info.reduction()
        self._check_groups(channels, strides)
        self.channels = channels if groups is None else channels[:groups]
        self.strides = strides if groups is None else strides[:groups]
        self.prefix_tokens = self._count_prefix_tokens() if prefix else 0
        if (mean is None) != (std is None):
            raise UserError(f"method.backbone.mean={mean}, std={std}: give both, or neither")
        if mean is None or std is None:
            mean, std = _statistics(name)
        check_range("method.backbone", "(0, inf)", std=std)
        if len(mean) != 3 or len(std) != 3:
            raise UserError(
                f"method.backbone.mean={list(mean)}, std={list(std)}: give a number for each of "
                "three channels"
            )
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.loaded = weights == "random"
        self.requires_grad_(False)
        self.train(False)

    def _build(self) -> Any:
        architecture = self.name.split(".")[0]
        if not timm.is_model(architecture):
            near = timm.list_models(f"*{architecture[:8]}*")[:8]
            raise UserError(f"timm has no model {architecture!r}; near: {', '.join(near) or '-'}")
        try:
            return self._create(architecture)
        except (IndexError, AssertionError) as error:
            stages: Any = timm.create_model(architecture, features_only=True, **self.options)
            last = len(stages.feature_info) - 1
            raise UserError(
                f"the backbone {self.name} does not have all stages of out_indices="
                f"{list(self.out_indices)}: its stages are 0 to {last}; "
                "set method.backbone.out_indices"
            ) from error

    def _create(self, name: str, pretrained: bool = False) -> Any:
        options = {"pretrained": pretrained, **self.options}
        if not self.final_norm:
            return timm.create_model(
                name, features_only=True, out_indices=self.out_indices, **options
            )
        network: Any = timm.create_model(name, **options)
        if not hasattr(network, "forward_intermediates") or not hasattr(network, "norm"):
            raise UserError(
                f"the backbone {self.name} has no last layer normalisation: set "
                "method.backbone.final_norm=false"
            )
        return FeatureGetterNet(network, out_indices=self.out_indices, norm=True)

    def _check_groups(self, channels: Sequence[int], strides: Sequence[int]) -> None:
        if self.groups is None:
            return
        if self.groups < 1 or len(channels) % self.groups:
            raise UserError(
                f"method.backbone.groups={self.groups} must divide the {len(channels)} stages of "
                f"out_indices={list(self.out_indices)}"
            )
        if len(set(channels)) > 1 or len(set(strides)) > 1:
            raise UserError(
                f"method.backbone.groups={self.groups} averages stages, and those of {self.name} "
                f"differ in size (strides {strides}, channels {channels}): set it to null"
            )

    def _count_prefix_tokens(self) -> int:
        count = getattr(getattr(self.network, "model", None), "num_prefix_tokens", 0)
        if not count:
            raise UserError(
                f"the backbone {self.name} has no prefix tokens: set method.backbone.prefix=false"
            )
        return count

    def _pad(self, name: str, pixels: int) -> None:
        """Replace a convolution by the same one with this padding."""
        old = dict(self.network.named_modules()).get(name)
        if not isinstance(old, nn.Conv2d) or not 0 <= pixels <= max(old.kernel_size):
            raise UserError(
                f"method.backbone.padding: {name}={pixels} must name a convolution of "
                f"{self.name}, and give 0 pixels up to the side of its kernel"
            )
        new = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            _pair(old.kernel_size),
            _pair(old.stride),
            (pixels, pixels),
            _pair(old.dilation),
            old.groups,
            old.bias is not None,
        )
        new.load_state_dict(old.state_dict())
        self.network.set_submodule(name, new)

    def load_weights(self) -> None:
        """Read the weights; a second call, or one after a state dict was loaded, does nothing.

        Raises:
            UserError: No weights were found, or they do not fit the requested stages.
        """
        if self.loaded:
            return
        file = find_weights(self.name, self.weights, self.file_stem)
        state = _read_state(file) if file else self._hub_state()
        self._load(state, source=str(file or f"hub: {self.name}"))

    def _hub_state(self) -> Any:
        try:
            return self._create(self.name, pretrained=True).state_dict()
        except Exception as error:
            raise UserError(
                f"the hub gave no weights for {self.name} ({type(error).__name__}: {error}); "
                "set method.backbone.weights=FILE"
            ) from error

    def _load(self, state: Any, source: str) -> None:
        prefix = "model." if hasattr(self.network, "model") else ""
        wanted = self.network.state_dict()
        given = {prefix + key.removeprefix(prefix): value for key, value in state.items()}
        missing = [
            key for key in wanted if key not in given and not key.endswith("num_batches_tracked")
        ]
        if missing:
            stages = sorted({".".join(key.removeprefix(prefix).split(".")[:2]) for key in missing})
            raise UserError(
                f"{source} holds no weights for {len(missing)} of the {len(wanted)} tensors that "
                f"{self.name} with out_indices={list(self.out_indices)} needs: "
                f"{', '.join(stages[:6])}{' ...' if len(stages) > 6 else ''}. Ask for other stages "
                "(method.backbone.out_indices) or give another file (method.backbone.weights)"
            )
        wrong = [key for key in wanted if key in given and given[key].shape != wanted[key].shape]
        if wrong:
            key = wrong[0]
            raise UserError(
                f"{source} does not fit {self.name}: {key} is {tuple(given[key].shape)} in the "
                f"file and {tuple(wanted[key].shape)} in the network ({len(wrong)} such tensors); "
                "method.backbone.weights names a file of another model"
            )
        kept = {key: given[key].float() for key in wanted if key in given}
        self.network.load_state_dict(kept, strict=False)
        self.loaded = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.loaded = True  # a checkpoint holds the backbone, so no file or hub is needed

    def identity(self) -> dict[str, Any]:
        """Return what maps depend on, as plain data (weights and statistics hashed)."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(memoryview(values.numpy()))
        return {
            "network": self.name.split(".")[0],
            "out_indices": list(self.out_indices),
            "options": self.options,
            "final_norm": self.final_norm,
            "groups": self.groups,
            "prefix": self.prefix,
            "weights": digest.hexdigest(),
        } | ({"padding": self.padding} if self.padding else {})

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode, so that no buffer changes."""
        return super().train(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the maps of the requested stages, finest first, or the means of their groups.

        Args:
            image: (B, 3, H, W) float in [0, 1].

        Returns:
            One (B, channels[i], H / strides[i], W / strides[i]) map per stage or group; with
            `prefix`, then one (B, channels[i], 1, prefix_tokens) map for each of them.

        Raises:
            UserError: The network does not take images of this size.
        """
        self._check_size(image.shape[-2], image.shape[-1])
        normalised = (image - self.mean) / self.std
        if not self.prefix:
            return self._grouped(self.network(normalised))
        pairs = self.network.model.forward_intermediates(
            normalised,
            indices=self.network.out_indices,
            norm=self.network.norm,
            return_prefix_tokens=True,
            intermediates_only=True,
        )
        prefixes = [tokens.transpose(1, 2).unsqueeze(2) for _, tokens in pairs]
        return self._grouped([maps for maps, _ in pairs]) + self._grouped(prefixes)

    def _grouped(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the mean of each group of maps, or the maps if there are no groups."""
        if self.groups is None:
            return list(maps)
        size = len(maps) // self.groups
        starts = range(0, len(maps), size)
        return [torch.stack(list(maps[i : i + size])).mean(dim=0) for i in starts]

    def _check_size(self, height: int, width: int) -> None:
        """Refuse images that a transformer cannot cut into patches."""
        model = getattr(self.network, "model", None)
        embed = getattr(model, "patch_embed", None)
        if embed is None or len(set(self.strides)) > 1 or self.options.get("dynamic_img_pad"):
            return
        fixed = getattr(embed, "img_size", None)
        if fixed is not None and getattr(embed, "strict_img_size", False):
            if tuple(fixed) != (height, width):
                raise UserError(
                    f"{self.name} takes images of {fixed[0]} x {fixed[1]} only, not {height} x "
                    f"{width}: set image_size={fixed[0]}, or "
                    "method.backbone.options.dynamic_img_size=true if it can resize its position "
                    "code"
                )
            return
        check_multiple((height, width), self.strides[0], f"the patch of {self.name}")


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]


def _statistics(name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation of the pixels that the weights were trained on."""
    try:
        config = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        architecture = name.split(".")[0]
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*"))
        raise UserError(
            f"timm has no weights {name!r} (known: {tags or 'none'}); name one of these, or give "
            "mean and std with a file of your own"
        ) from error
    if config is None:  # timm has no weights for this architecture: use ImageNet's statistics
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return config.mean, config.std


def _read_state(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message advises running its code
        raise UserError(
            f"the weights file {file} cannot be read: damaged, or it holds more than tensors; "
            "save the network's state_dict"
        ) from error
    except Exception as error:
        raise UserError(f"the weights file {file} cannot be read: {error}") from error
    if not isinstance(state, Mapping):
        raise UserError(f"the weights file {file} holds a {type(state).__name__}, not a state dict")
    return state.get("state_dict", state)
