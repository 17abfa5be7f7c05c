"""Matrices in four bits, as LongLive 2.0's model_4o6.pt has them, back to numbers.

    blocks.0.self_attn.q.quantized_weight_values          uint8 [out, in / 2]: two numbers, the even column's lower
    blocks.0.self_attn.q.quantized_weight_scale_factors   float8 [padded out * padded in / 16]: one for 16 columns
    blocks.0.self_attn.q.quantized_weight_amax            float32 [] or [1]: the largest number of the matrix
    blocks.0.self_attn.q.quantized_weight_metadata        int32 [4]: out, in, and both padded

A number is sign and one of eight magnitudes; weight = number * scale * amax / (6 * largest scale). Scales lie in tiles
of 128 rows by 4 blocks, in the order in which tensor cores read them. The largest scale is 448 where each block of 16
ends at 6; "four over six" lets blocks end at 4, with scales half as large again, and so begins at 256: then 384 is the
most, which tells the two apart.

Source: NVlabs/LongLive (main), quantisation with mit-han-lab/fouroversix (arXiv 2512.02010).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

PARTS = ("values", "scale_factors", "amax", "metadata")
PREFIX = "quantized_weight_"
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCK = 16  # columns that share a scale
STATIC, FOUR_OVER_SIX = 448.0, 256.0  # the scale of a block with the largest number of the matrix, ending at 6


def dequantise(values: Tensor, scale_factors: Tensor, amax: Tensor) -> Tensor:
    """The matrix [out, in] in float32."""
    numbers = torch.stack((values & 15, values >> 4), dim=-1).flatten(1).int()  # [out, in]
    signs = 1 - 2 * (numbers >> 3).float()
    weights = signs * torch.tensor(MAGNITUDES, device=values.device)[numbers & 7]
    scales = unswizzle(scale_factors.view(torch.float8_e4m3fn).float(), len(values), numbers.shape[1] // BLOCK)
    largest = STATIC if scales.max() > 1.5 * FOUR_OVER_SIX else FOUR_OVER_SIX
    scaled = (weights.unflatten(1, (-1, BLOCK)) * scales.unsqueeze(-1)).flatten(1)
    return scaled * amax.float().reshape(()) / (6 * largest)  # in this order it is theirs to the bit


def unswizzle(scales: Tensor, rows: int, blocks: int) -> Tensor:
    """Scales [rows, blocks] out of their tiles: 128 rows by 4 blocks, of which 32 rows by 4 quarters are told apart."""
    across = -(-blocks // 4)
    tiles = scales.reshape(-1, across, 32, 4, 4)  # [down, across, row in a quarter, quarter, block]
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1, 4 * across)[:rows, :blocks]


class Unpacked(Mapping[str, Tensor]):
    """A state dict whose four-bit matrices are made bfloat16 when they are read.

    packed  {name of a weight: {part: tensor}}
    """

    def __init__(self, state: Mapping[str, Tensor], packed: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.state, self.packed = state, packed

    def __getitem__(self, name: str) -> Tensor:
        if (parts := self.packed.get(name)) is None:
            return self.state[name]
        return dequantise(parts["values"], parts["scale_factors"], parts["amax"]).bfloat16()

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)
