"""Linear layers whose weights are kept in float8.

A float8 number (e4m3) has three bits of mantissa and reaches 448. Each row of a weight matrix gets a scale that maps
its largest number to 448, so no row's range is wasted on another's; the scale is applied to the layer's output, which
is the same as scaling the row. That halves the memory of bfloat16 anywhere ("weight-only": the row is turned to the
dtype of the activations just before the product).

GPUs with float8 matrix units (Ada, Hopper and later) multiply float8 by float8 about twice as fast as bfloat16. There
the activations are quantised too, on the fly, one scale per token.

What reads or writes the latents stays as it is, because its errors would go into every frame: patch, text and time
embeddings, modulation, norms and the head.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] as float8 [..., K] and float32 scales [..., 1] of its rows, with x = float8 * scale nearly."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x / scale).to(E4M3), scale


def multiplies_float8(device: torch.device) -> bool:
    """Whether the device has float8 matrix units that torch can use: NVIDIA from compute capability 8.9 on.

    Not on Windows, where torch is built without the kernel that scales by row.
    """
    if device.type != "cuda" or torch.version.cuda is None or sys.platform == "win32":
        return False
    properties = torch.cuda.get_device_properties(device)  # a constant to torch.compile; the capability is not
    return (properties.major, properties.minor) >= (8, 9)


class Fp8Linear(nn.Module):
    """A linear layer with float8 weights [out, in], a float32 scale [out, 1] per row, and an optional bias."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale_weight", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, linear: nn.Linear) -> Fp8Linear:
        """The float8 version of a linear layer, on the same device."""
        weight, scale = quantise_rows(linear.weight.detach())
        return cls(weight, scale, None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        whole = all(n % 16 == 0 for n in self.weight.shape)  # the matrix units take multiples of 16
        y = self._product_in_float8(x) if whole and multiplies_float8(x.device) else self._product(x)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale_weight.to(x.dtype).squeeze(-1)

    def _product_in_float8(self, x: Tensor) -> Tensor:
        tokens, scale = quantise_rows(x.flatten(0, -2))  # [M, in], [M, 1]
        scales = {"scale_a": scale, "scale_b": self.scale_weight.t()}
        # The kernels that scale by row before CUDA 12.9, and on Ada still, write nothing but bfloat16.
        y = torch._scaled_mm(tokens, self.weight.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


def quantise_model(wan: nn.Module) -> nn.Module:
    """Puts float8 layers in the place of the linear layers of all blocks, one at a time; returns the same model.

    Keys and values of the prompt are made once per prompt by the same layers, so cross-attention is included.
    """
    for block in wan.blocks:
        quantise_block(block)
    return wan


def quantise_block(block: nn.Module) -> None:
    """`quantise_model` for one block."""
    for parent in block.modules():
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Fp8Linear.of(child))
