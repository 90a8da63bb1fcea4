"""Read a latent model of DSR that was trained elsewhere: by another run, or by the authors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomaly_lit.methods.dsr.network import LatentModel
from anomaly_lit.nn.weights import check_archive
from anomaly_lit.types import UserError

# Parts of our latent model, and what they are called in the authors' state dict.
RELEASED = {
    "encode_high.0.": "_encoder_b._conv_1.",
    "encode_high.2.": "_encoder_b._conv_2.",
    "encode_high.4.": "_encoder_b._conv_3.",
    "encode_high.5.": "_encoder_b._residual_stack.",
    "encode_low.0.": "_encoder_t._conv_1.",
    "encode_low.2.": "_encoder_t._conv_2.",
    "encode_low.4.": "_encoder_t._residual_stack.",
    "encode_low.5.": "_pre_vq_conv_top.",
    "low.vectors": "_vq_vae_top._embedding.weight",
    "high.vectors": "_vq_vae_bot._embedding.weight",
    "up.": "upsample_t.",
    "join.": "_pre_vq_conv_bot.",
    "decoder.0.": "_decoder_b._conv_1.",
    "decoder.1.": "_decoder_b._residual_stack.",
    "decoder.2.": "_decoder_b._conv_trans_1.",
    "decoder.4.": "_decoder_b._conv_trans_2.",
}


@torch.no_grad()
def load_latent(latent: LatentModel, path: str) -> None:
    """Load a latent model from a checkpoint of DSR or from the authors' file.

    Raises:
        UserError: The file cannot be read, holds no latent model, or one of another size.
    """
    state = _read(path)
    weights = state.get("state_dict", {})
    found = {k.removeprefix("latent."): v for k, v in weights.items() if k.startswith("latent.")}
    if not found and "_vq_vae_top._embedding.weight" in state:
        found = latent.state_dict() | from_released(state, latent.state_dict())
    if not found:
        raise UserError(
            f"method.latent_weights={path} is neither a checkpoint of DSR nor the authors' file: "
            "it has no latent model"
        )
    try:
        latent.load_state_dict(found)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(
            f"method.latent_weights={path} holds another latent model than method.hidden, "
            f"method.residual and method.codes describe: {reason}"
        ) from error


def from_released(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the authors' weights under our names, for images in RGB instead of BGR.

    The averages from which codebooks move (`_ema_w`, `_ema_cluster_size`) are left out, since a
    loaded latent model is frozen.

    Args:
        state: The authors' state dict.
        ours: A state dict of our latent model, for its names.

    Raises:
        UserError: A weight is missing.
    """
    found: dict[str, Tensor] = {}
    for name in ours:
        own = next((part for part in RELEASED if name.startswith(part)), None)
        if own is None:  # a codebook's averages
            continue
        theirs = RELEASED[own] + name.removeprefix(own)
        theirs = theirs.replace("stack.blocks.", "stack._layers.")
        if "_layers." in theirs:  # _layers.0.1.weight is _layers.0._block.1.weight
            block, _, rest = theirs.partition("_layers.")
            number, _, layer = rest.partition(".")
            theirs = f"{block}_layers.{number}._block.{layer}"
        if theirs not in state:
            raise UserError(f"method.latent_weights: the authors' file has no {theirs}")
        found[name] = state[theirs]
    found["encode_high.0.weight"] = found["encode_high.0.weight"].flip(1)
    found["decoder.4.weight"] = found["decoder.4.weight"].flip(1)
    found["decoder.4.bias"] = found["decoder.4.bias"].flip(0)
    return found


def _read(path: str) -> dict[str, Any]:
    """Return the file's content; tensors and plain data only."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"method.latent_weights={path}: no such file")
    try:
        with file.open("rb") as opened:
            check_archive(opened, file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"method.latent_weights={path} cannot be read, or holds more than weights: give a "
            "checkpoint of DSR or the authors' state dict"
        ) from error
    return state if isinstance(state, dict) else {}
