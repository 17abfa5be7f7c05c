"""What a file of a LoRA, or of one of its relatives, adds to one weight: small formulas over the weight W [out, in].

    LoRA                  up down                            arXiv 2106.09685; LoCon's `mid` between for convolutions
    LoHa                  (w1_a w1_b) * (w2_a w2_b)          arXiv 2108.06098; `t1`, `t2` between for convolutions
    LoKr                  w1 (x) w2, a Kronecker product     arXiv 2309.14859; each whole, or w_a w_b; `t2` as above
    GLoRA                 W a1 a2 + b1 b2                    arXiv 2306.07967
    OFT, BOFT             R W - W, rotations R of rows       arXiv 2306.07280, 2311.06243
    Difference            as it stands
    Replacement           another weight in the place of W
    DoRA                  lengths of rows or columns over any of the first four (arXiv 2402.09353)

All but the rotations and replacements times strength and alpha / rank. Layouts are LyCORIS' and PEFT's; where two
programs differ over one layout, the weight is that of ComfyUI's loaders, which these files are made to be used in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alpha:
    """How much a low rank adds: alpha / rank, or alpha / sqrt(rank) of rank-stabilised ones (arXiv 2312.03732).

    rank  to divide by where the tensors show none
    """

    value: float | None = None
    rank_stabilised: bool = False
    rank: int | None = None

    def scale(self, rank: int | None) -> float:
        rank = rank or self.rank
        if self.value is None or not rank:
            return 1.0
        return self.value / (math.sqrt(rank) if self.rank_stabilised else rank)


class Adapter:
    """What is added to a weight: `scale` times `change(weight)`, of the weight's shape or flat behind its rows."""

    scale: float = 1.0

    def change(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def added_to(self, weight: Tensor, strength: float) -> Tensor:
        """The weight with it, in float32. Raises ValueError, or torch's RuntimeError, where shapes do not fit."""
        weight = weight.float()
        change = self.change(weight)
        if change.numel() != weight.numel() or change.shape[0] != weight.shape[0]:
            raise ValueError(f"{list(change.shape)} does not go with {list(weight.shape)}")
        return weight.add(change.reshape(weight.shape), alpha=strength * self.scale)


@dataclass(frozen=True)
class LowRank(Adapter):
    """LoRA: up [out, rank], down [rank, in]; of a convolution with its kernel, and LoCon's mid [rank, rank, ...]."""

    down: Tensor
    up: Tensor
    scale: float
    mid: Tensor | None = None

    def change(self, weight: Tensor) -> Tensor:
        down = self.down.float()
        if self.mid is not None:
            down = torch.einsum("mn...,nj->mj...", self.mid.float(), down.flatten(1))
        return self.up.flatten(1).float() @ down.flatten(1)


@dataclass(frozen=True)
class Product:
    """A matrix as a file has it: whole, or left [out, rank] and right [rank, in], with a kernel's core between them.

    core  [rank of left, rank of right, ...]
    """

    whole: Tensor | None
    left: Tensor | None = None
    right: Tensor | None = None
    core: Tensor | None = None

    def matrix(self) -> Tensor:
        """[out, in], or [out, in, ...] with a kernel."""
        if self.whole is not None:
            return self.whole.float()
        if self.core is None:
            return self.left.float() @ self.right.float()
        product = torch.einsum("ij...,jr,ip->pr...", self.core.float(), self.right.float(), self.left.float())
        return product.contiguous()  # or torch.kron fails


@dataclass(frozen=True)
class Hadamard(Adapter):
    """LoHa: the product, number by number, of two matrices of low rank."""

    first: Product
    second: Product
    scale: float

    def change(self, weight: Tensor) -> Tensor:
        return self.first.matrix() * self.second.matrix()


@dataclass(frozen=True)
class Kronecker(Adapter):
    """LoKr: a small matrix whose every number is multiplied by all of another, which may have a kernel."""

    first: Product
    second: Product
    scale: float

    def change(self, weight: Tensor) -> Tensor:
        first, second = self.first.matrix(), self.second.matrix()
        return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second)


@dataclass(frozen=True)
class Generalised(Adapter):
    """GLoRA: a change of low rank that depends on the weight, and one that does not."""

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    alpha: Alpha

    def change(self, weight: Tensor) -> Tensor:
        a1, a2, b1, b2 = (part.flatten(1).float() for part in (self.a1, self.a2, self.b1, self.b2))
        if self.is_first_version(weight):
            return (b2 @ b1 + weight.flatten(1) @ a2 @ a1) * self.alpha.scale(len(a1))
        own = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)  # over the channels, where there is a kernel
        return (own.flatten(1) + b1 @ b2) * self.alpha.scale(len(a2))

    def is_first_version(self, weight: Tensor) -> bool:
        """Whether the parts are as LyCORIS first had them: a1, b1 [rank, in], a2 [in, rank], b2 [out, rank]."""
        first = self.b2.shape[1] == len(self.b1) == len(self.a1) == self.a2.shape[1]
        later = len(self.b2) == self.b1.shape[1] == self.a1.shape[1] == len(self.a2)
        return first and (not later or len(self.a2) == weight.shape[0] == weight.shape[1])


@dataclass(frozen=True)
class Rotations(Adapter):
    """OFT: skew-symmetric blocks [blocks, size, size] whose rotations turn as many rows of the weight each.

    most  largest norm of all blocks together; None: any
    """

    blocks: Tensor
    most: float | None

    def change(self, weight: Tensor) -> Tensor:
        rotations = self.rotations() - torch.eye(self.blocks.shape[-1], device=weight.device)
        rows = weight.unflatten(0, self.blocks.shape[:2])
        return torch.einsum("knm,kn...->km...", rotations, rows).flatten(0, 1)

    def rotations(self) -> Tensor:
        """Cayley's: (1 + Q) (1 - Q)^-1 of skew-symmetric Q."""
        skew = self.blocks.float() - self.blocks.float().mT
        if self.most and not skew.is_meta and (norm := skew.norm() + 1e-8) > self.most:
            skew = skew * (self.most / norm)
        one = torch.eye(skew.shape[-1], device=skew.device)
        return (one + skew) @ torch.linalg.inv_ex(one - skew).inverse  # there always is one

    def added_to(self, weight: Tensor, strength: float) -> Tensor:
        return super().added_to(weight, strength * strength)  # as ComfyUI has it, which counts it twice


@dataclass(frozen=True)
class Butterfly(Rotations):
    """BOFT: stages [stages, blocks, size, size] of such rotations, each over rows further apart; rescale [out, 1]."""

    rescale: Tensor | None = None

    def added_to(self, weight: Tensor, strength: float) -> Tensor:
        weight, rotations = weight.float(), self.rotations()
        size, turned = rotations.shape[-1], weight
        one = torch.eye(size, device=weight.device)
        for stage, rotation in enumerate(rotations):
            apart = 2**stage * (size // 2)
            rows = turned.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
            rows = torch.einsum("bij,bj...->bi...", rotation * strength + one * (1 - strength), rows).flatten(0, 1)
            turned = rows.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
        if self.rescale is not None:
            turned = turned * self.rescale.float()
        return weight + strength * (turned - weight)  # strength once more, as ComfyUI has it


@dataclass(frozen=True)
class Difference(Adapter):
    """What is added to a weight or bias as it stands, of as many numbers."""

    tensor: Tensor

    def change(self, weight: Tensor) -> Tensor:
        return self.tensor.float().reshape(weight.shape)


@dataclass(frozen=True)
class Replacement(Adapter):
    """Another weight in the place of the model's, whatever the strength."""

    tensor: Tensor

    def added_to(self, weight: Tensor, strength: float) -> Tensor:
        return self.tensor.float().expand(weight.shape)


@dataclass(frozen=True)
class Magnitudes(Adapter):
    """DoRA: the weight with another adapter in it, its rows or columns given lengths of their own.

    lengths  [out, 1] of rows or [1, in] of columns
    """

    adapter: Adapter
    lengths: Tensor

    def added_to(self, weight: Tensor, strength: float) -> Tensor:
        weight = weight.float()
        merged = self.adapter.added_to(weight, 1.0)
        scaled = merged * (self.lengths.float() / self.norms(weight, merged))
        return weight + strength * (scaled - weight)

    def norms(self, weight: Tensor, merged: Tensor) -> Tensor:
        # ComfyUI measures rows before the adapter is in and columns after it.
        by_rows = self.lengths.shape[0] == weight.shape[0]
        measured, dims = (weight, tuple(range(1, weight.ndim))) if by_rows else (merged, _all_but(1, weight.ndim))
        return torch.linalg.vector_norm(measured, dim=dims, keepdim=True) + torch.finfo(torch.float32).eps


class PeftMagnitudes(Magnitudes):
    """DoRA of PEFT: lengths [out] of rows, measured with the adapter in them."""

    def norms(self, weight: Tensor, merged: Tensor) -> Tensor:
        return torch.linalg.vector_norm(merged, dim=tuple(range(1, merged.ndim)), keepdim=True)


def _all_but(dim: int, ndim: int) -> tuple[int, ...]:
    return tuple(d for d in range(ndim) if d != dim)


# --- From the tensors of a file --------------------------------------------------------------------------------------

Parts = dict[str, Tensor]
"""A layer's tensors by what they are of it, as below."""

NEEDS = {  # by a tensor that only this kind has: all that it needs
    "down": ("down", "up"),
    "up": ("down", "up"),
    "hada_w1_a": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "a1": ("a1", "a2", "b1", "b2"),
    "oft_blocks": ("oft_blocks",),
    "diff": ("diff",),
    "set_weight": ("set_weight",),
}
MAGNITUDES = {"dora_scale": Magnitudes, "magnitude": PeftMagnitudes}


def missing_part(parts: Parts) -> str | None:
    """The name of a tensor without which the others are of no use; None if there is none."""
    for marker, needed in NEEDS.items():
        if marker in parts:
            return next((name for name in needed if name not in parts), None)
    for side in ("lokr_w1", "lokr_w2"):
        if any(name.startswith("lokr_") for name in parts) and side not in parts:
            if missing := next((f"{side}_{half}" for half in "ab" if f"{side}_{half}" not in parts), None):
                return missing
    return None


def adapter_of(parts: Parts, alpha: Alpha) -> Adapter | None:
    """What a layer's tensors add to its weight; None where they are of no kind that is known here."""
    adapter = _low_rank(parts, alpha)
    if adapter is not None and (kind := next((name for name in MAGNITUDES if name in parts), None)):
        lengths = parts[kind]
        ndim = max(2, parts["down"].ndim if "down" in parts else lengths.ndim)
        return MAGNITUDES[kind](adapter, lengths.reshape(-1, *[1] * (ndim - 1)) if lengths.ndim == 1 else lengths)
    if adapter is not None:
        return adapter
    if "oft_blocks" in parts:
        blocks = parts["oft_blocks"]
        return (
            Butterfly(blocks, alpha.value, parts.get("rescale")) if blocks.ndim == 4 else Rotations(blocks, alpha.value)
        )
    if "set_weight" in parts:
        return Replacement(parts["set_weight"])
    return Difference(parts["diff"]) if "diff" in parts else None


def unused_parts(parts: Parts) -> list[str]:
    """Names of tensors that `adapter_of` takes for nothing, since they belong to another kind, or ComfyUI leaves them
    out, too.
    """
    low_rank = any(name in parts for name in ("down", "hada_w1_a", "a1")) or any("lokr_" in name for name in parts)
    unused = [name for name in MAGNITUDES if name in parts and not low_rank]
    stages = "oft_blocks" in parts and parts["oft_blocks"].ndim == 4
    return unused + [
        name for name in ("rescale", "reshape_weight") if name in parts and not (stages and name == "rescale")
    ]


def _low_rank(parts: Parts, alpha: Alpha) -> Adapter | None:
    if "down" in parts:
        return LowRank(parts["down"], parts["up"], alpha.scale(len(parts["down"])), parts.get("mid"))
    if "hada_w1_a" in parts:
        first, second = (_product(parts, f"hada_w{n}", f"hada_t{n}") for n in (1, 2))
        return Hadamard(first, second, alpha.scale(len(parts["hada_w1_b"])))
    if any(name.startswith("lokr_") for name in parts):
        ranks = [len(parts[f"lokr_w{n}_b"]) for n in (2, 1) if f"lokr_w{n}" not in parts]
        first, second = _product(parts, "lokr_w1"), _product(parts, "lokr_w2", "lokr_t2")
        return Kronecker(first, second, alpha.scale(ranks[0] if ranks else None))
    if "a1" in parts:
        return Generalised(*(parts[name] for name in NEEDS["a1"]), alpha)
    return None


def _product(parts: Parts, name: str, core: str = "") -> Product:
    if name in parts:
        return Product(parts[name])
    return Product(None, parts[f"{name}_a"], parts[f"{name}_b"], parts.get(core))
