"""LoRA: low-rank adapters on the student's linear layers: y = W x + (alpha / rank) up down x (arXiv 2106.09685).

Only `down` [rank, in] and `up` [out, rank] are trained; `up` starts at zero, so training starts from the model as it
is. The file has the names that ComfyUI's loader (and diffusers') reads for Wan:

    diffusion_model.blocks.0.self_attn.q.lora_A.weight    down
    diffusion_model.blocks.0.self_attn.q.lora_B.weight    up
    diffusion_model.blocks.0.self_attn.q.alpha            []
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LoraConfig

PREFIX = "diffusion_model."


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter. The layer keeps its own names, so a state dict shows both."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        out, width = linear.weight.shape
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias.requires_grad_(False)
        down = torch.empty(rank, width).uniform_(-1, 1, generator=generator) / math.sqrt(width)
        self.down = nn.Parameter(down.to(linear.weight.device))
        self.up = nn.Parameter(torch.zeros(out, rank, device=linear.weight.device))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.down), self.up) * self.scale


def add_adapters(wan: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    """Freezes a model and puts an adapter on every layer of its blocks that `config` names.

    Raises ValueError where no layer has such a name.
    """
    generator = torch.Generator().manual_seed(seed)
    wan.requires_grad_(False)
    places = [
        name for name, module in wan.named_modules() if isinstance(module, nn.Linear) and has_adapter(name, config)
    ]
    if not places:
        raise ValueError(f"Got lora.layers {list(config.layers)}, which no block has. Use q, k, v, o, ffn.0, ffn.2.")
    for name in places:
        parent, _, own = name.rpartition(".")
        module = wan.get_submodule(parent)
        setattr(module, own, LoraLinear(getattr(module, own), config.rank, config.alpha, generator))
    return wan


def has_adapter(name: str, config: LoraConfig) -> bool:
    """Whether the layer of that name gets an adapter."""
    return name.startswith("blocks.") and any(name.endswith(f".{layer}") for layer in config.layers)


def adapter_file(state: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Tensors of the LoRA file, from the state dict of a model with adapters."""
    kept = {}
    for name, value in state.items():
        layer, _, part = name.rpartition(".")
        if part in ("down", "up"):
            kept[f"{PREFIX}{layer}.lora_{'A' if part == 'down' else 'B'}.weight"] = value
            kept[f"{PREFIX}{layer}.alpha"] = torch.tensor(config.alpha)
    return kept


def merge_adapters(state: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Merges adapters into plain weights; these in float32, which holds changes that are lost in bfloat16."""
    plain = {name: value for name, value in state.items() if name.rpartition(".")[2] not in ("down", "up")}
    for name, up in state.items():
        layer, _, part = name.rpartition(".")
        if part == "up":
            weight = plain[f"{layer}.weight"]
            change = up.float() @ state[f"{layer}.down"].float() * (config.alpha / config.rank)
            plain[f"{layer}.weight"] = weight.float() + change
    return plain
