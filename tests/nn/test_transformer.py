from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anomaly_lit.nn.transformer import Attention, TransformerBlock, sincos_positions


def test_attention_equals_torch_s() -> None:
    torch.manual_seed(0)
    attention, reference = Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(attention.qkv.weight)
        reference.in_proj_bias.copy_(attention.qkv.bias)
        reference.out_proj.weight.copy_(attention.proj.weight)
        reference.out_proj.bias.copy_(attention.proj.bias)
    tokens = torch.randn(2, 7, 24)
    expected, _ = reference(tokens, tokens, tokens, need_weights=False)
    torch.testing.assert_close(attention(tokens), expected, rtol=1e-5, atol=1e-6)


def test_block_equals_torch_s_pre_norm_layer() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(16, 2)
    reference = nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
    )
    pairs = {
        "self_attn.in_proj_weight": block.attention.qkv.weight,
        "self_attn.in_proj_bias": block.attention.qkv.bias,
        "self_attn.out_proj.weight": block.attention.proj.weight,
        "self_attn.out_proj.bias": block.attention.proj.bias,
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
