"""Linear layers whose weights are kept in float8.

A float8 number (e4m3) has three bits of mantissa and reaches 448. Each row of a weight matrix gets a scale that maps
its largest number to 448, so no row's range is wasted on another's; the scale is applied to the layer's output, which
is the same as scaling the row. That halves the memory of bfloat16 anywhere ("weight-only": the row is turned to the
dtype of the activations just before the product).

GPUs with float8 matrix units (Ada, Hopper and later) multiply float8 by float8 about twice as fast as bfloat16. There
the activations are quantised too, on the fly, one scale per token. As plain operations that takes longer than the
product saves; compiled it is one kernel, for queries, keys and values together. So float8 on such a GPU is faster than
bfloat16 when it is compiled, and slower when it is not.

What reads or writes the latents stays as it is, because its errors would go into every frame: patch, text and time
embeddings, modulation, norms and the head.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
FLOAT8_UNITS = (8, 9)  # the compute capability from which NVIDIA's GPUs have them

log = logging.getLogger(__name__)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] as float8 [..., K] and float32 scales [..., 1] of its rows, with x = float8 * scale nearly."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x / scale).to(E4M3), scale


@torch.compiler.assume_constant_result
def multiplies_float8(device: torch.device) -> bool:
    """Whether the device multiplies float8 with a scale per row, found out by one product: NVIDIA's from compute
    capability 8.9 on do, where this torch has the kernel for them."""
    return _try_product(device)


@lru_cache
def _try_product(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    if torch.cuda.get_device_capability(device) < FLOAT8_UNITS:
        return False
    x, scale = torch.zeros(16, 16, device=device).to(E4M3), torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(x, x.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    except RuntimeError as error:  # of torch on Windows, and of older ones on newer GPUs
        reason = str(error).splitlines()[0]
        log.warning("This torch has no float8 products on %s, which then saves memory and no time: %s", device, reason)
        return False
    return True


@torch.compiler.assume_constant_result
def compiles_float8(device: torch.device) -> bool:
    """Whether Triton knows float8 on the device: on NVIDIA's from compute capability 8.9 on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= FLOAT8_UNITS


@torch.library.custom_op("self_forcing::from_float8", mutates_args=())
def from_float8(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A float8 tensor in another dtype, as an operation that compilers leave as it is."""
    return weight.to(dtype)


@from_float8.register_fake
def _(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


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
        # Without float8 in Triton the whole compiled part would fail, and everything run as it is.
        as_op = torch.compiler.is_compiling() and not compiles_float8(x.device)
        weight = from_float8(self.weight, x.dtype) if as_op else self.weight.to(x.dtype)
        return F.linear(x, weight) * self.scale_weight.to(x.dtype).squeeze(-1)

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
