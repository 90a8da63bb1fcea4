from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_lit.nn.attention import Attention, init_as_one, start_equal
from anomaly_lit.nn.transformer import TransformerBlock, init_linear, sincos_positions


def joined(attention: Attention, kind: str) -> Tensor:
    """Queries', keys' and values' weights or biases, as torch keeps them."""
    parts = (attention.query, attention.key, attention.value)
    return torch.cat([getattr(part, kind) for part in parts])


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_torch_s(masked: bool) -> None:
    torch.manual_seed(0)
    attention, reference = Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(joined(attention, "weight"))
        reference.in_proj_bias.copy_(joined(attention, "bias"))
        reference.out_proj.weight.copy_(attention.output.weight)
        reference.out_proj.bias.copy_(attention.output.bias)
    query, key, value = torch.randn(2, 7, 24), torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    allowed = torch.rand(7, 5) < 0.7 if masked else None
    hidden = None if allowed is None else ~allowed  # torch names what must not be looked at
    expected, _ = reference(query, key, value, need_weights=False, attn_mask=hidden)
    found = attention(query, key, value, allowed)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_attention_starts_as_one_projection_would() -> None:
    """Which is what torch's own layer has: one matrix of three times as many rows."""
    torch.manual_seed(0)
    attention = Attention(16, 2).apply(init_linear).apply(init_as_one)
    torch.manual_seed(0)
    whole = nn.Linear(16, 48)
    nn.Linear(16, 16)
    nn.init.xavier_uniform_(whole.weight)
    torch.testing.assert_close(joined(attention, "weight"), whole.weight)


def test_block_equals_torch_s_pre_norm_layer() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(16, 2)
    reference = nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
    )
    pairs = {
        "self_attn.in_proj_weight": joined(block.attention, "weight"),
        "self_attn.in_proj_bias": joined(block.attention, "bias"),
        "self_attn.out_proj.weight": block.attention.output.weight,
        "self_attn.out_proj.bias": block.attention.output.bias,
        "linear1.weight": block.mlp[0].weight,
        "linear1.bias": block.mlp[0].bias,
        "linear2.weight": block.mlp[2].weight,
        "linear2.bias": block.mlp[2].bias,
        "norm1.weight": block.norm1.weight,
        "norm1.bias": block.norm1.bias,
        "norm2.weight": block.norm2.weight,
        "norm2.bias": block.norm2.bias,
    }
    reference.load_state_dict(pairs)
    tokens = torch.randn(2, 5, 16)
    torch.testing.assert_close(block(tokens), reference(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 5)])
def test_positions_are_sines_and_cosines_of_column_and_row(height: int, width: int) -> None:
    code = sincos_positions(16, height, width)
    assert code.shape == (height * width, 16)
    for row in range(height):
        for column in range(width):
            angles = [
                [axis / 10000 ** (i / 4) for i in range(4)] for axis in (float(column), float(row))
            ]
            expected = [f(a) for axis in angles for f in (math.sin, math.cos) for a in axis]
            torch.testing.assert_close(code[row * width + column], torch.tensor(expected))


def test_every_position_has_a_code_of_its_own() -> None:
    assert len(sincos_positions(32, 16, 16).unique(dim=0)) == 256


def test_layers_start_with_equal_attention_and_own_mlps() -> None:
    layers = nn.ModuleList(TransformerBlock(8, 2) for _ in range(3)).apply(init_linear)
    start_equal(layers)
    for layer in layers[1:]:
        for part in ("query", "key", "value"):
            own, first = (getattr(block.attention, part) for block in (layer, layers[0]))
            assert torch.equal(own.weight, first.weight)
        assert not torch.equal(layer.attention.output.weight, layers[0].attention.output.weight)
        assert not torch.equal(layer.mlp[0].weight, layers[0].mlp[0].weight)
