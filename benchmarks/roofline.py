"""What a chunk computes, counted from the engine itself on tensors that are not there, and the speed to expect from it.

    python benchmarks/roofline.py [--json]

The real network and decoders run on torch's meta device, where tensors have shapes and no numbers, with a GPU's kernels
for attention and norms; what would make a GPU be waited for cannot run there. Counted are kernels, multiplications and
the bytes that all other kernels move. Each GPU of the table then takes as long as these counts over its rates, which
are assumptions: about two thirds of what its maker states. Whoever has such a GPU runs
benchmarks/gpu.py, which measures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sf_core.autoencoders import taehv, wan_vae
from sf_core.autoencoders.stream import DecoderStream
from sf_core.cli.bench import plan_of
from sf_core.sampling.config import Sampling
from sf_core.sampling.context import Context
from sf_core.sampling.plan import Plan
from sf_core.sampling.prompts import PromptSchedule
from sf_core.wan.config import WAN_1_3B, WanConfig
from sf_core.wan.model import Network, WanModel

ATTENTION, CONVOLUTION = "attention", "convolution"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "alias", "detach", "_unsafe_view"}


@dataclass
class Counts:
    """Kernels, operations (two for a multiplication and its addition) by kind, and bytes that other kernels move."""

    kernels: int = 0
    flops: dict[str, float] = field(default_factory=lambda: {"product": 0.0, ATTENTION: 0.0, CONVOLUTION: 0.0})
    bytes: float = 0.0


class Counter(TorchDispatchMode):
    """Counts what is run below it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        counts = self.counts
        if name in NO_KERNEL or op.is_view or not any(x.device.type == "meta" for x in made):
            return out
        counts.kernels += 1
        kind = kind_of(name)
        if kind is None:
            counts.bytes += sum(x.nbytes for x in {id(x): x for x in (*tensors, *made)}.values())
        else:
            counts.flops[kind] += flop_registry[op.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def kind_of(name: str) -> str | None:
    """What a kernel's speed is bound by; None: memory."""
    if "attention" in name:
        return ATTENTION
    if "convolution" in name:
        return CONVOLUTION
    return "product" if name in PRODUCTS else None


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """The meta device, with attention and norms as a GPU's fused kernels: torch would take them apart there."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return x.clone()  # one kernel, which reads and writes every number once

    fused = {"scaled_dot_product_attention": attention, "rms_norm": rms_norm}
    with patch.multiple(F, **fused), torch.no_grad(), torch.device("meta"):
        yield


def count(work: Callable[[], object]) -> Counts:
    with Counter() as counter:
        work()
    return counter.counts


def forward_counts(config: WanConfig, plan: Plan, dtype: torch.dtype = torch.bfloat16) -> Counts:
    """One step of the last chunk, with the window full."""
    with gpu_kernels():
        network = Network(WanModel(config, dtype=dtype), dtype)
        prompts = PromptSchedule.of(torch.empty(1, config.text_len, config.text_dim, dtype=dtype))
        context, chunk = Context(network, plan, prompts), plan.chunks[-1]
        context.enter(chunk)
        x = torch.empty(1, config.channels, chunk.frames, plan.height, plan.width)
        return count(lambda: context.predict(x, plan.steps(chunk)[0]))


def decoder_counts(name: str, plan: Plan, dtype: torch.dtype = torch.bfloat16) -> Counts:
    """Decoding of a chunk of three latents that is not the first."""
    vae, stream = {
        "Wan VAE": (wan_vae.WanVAE, wan_vae.DecoderStream),
        "TAEHV": (taehv.TAEHV, DecoderStream),
    }[name]
    with gpu_kernels():
        decoder = stream(vae().to(dtype))
        latents = torch.empty(1, 16, 3, plan.height, plan.width)
        decoder.decode(latents)
        return count(lambda: decoder.decode(latents))


@dataclass(frozen=True)
class Gpu:
    """Assumed rates: TFLOP/s of products, attention and convolutions in bfloat16, and TB/s of memory."""

    product: float
    attention: float
    convolution: float
    memory: float
    launch: float = 2.5e-6  # seconds between two kernels that are shorter than that

    def seconds(self, counts: Counts) -> float:
        rates = {"product": self.product, ATTENTION: self.attention, CONVOLUTION: self.convolution}
        work = sum(counts.flops[kind] / (rate * 1e12) for kind, rate in rates.items()) + counts.bytes / (
            self.memory * 1e12
        )
        return max(work, counts.kernels * self.launch)


GPUS = {
    "H100": Gpu(600, 570, 300, 3.0),
    "H200": Gpu(600, 570, 300, 4.3),
    "RTX 5090": Gpu(190, 190, 95, 1.6),
    "RTX 4090": Gpu(150, 150, 75, 0.9),
    "RTX 3090": Gpu(65, 60, 33, 0.85),
    "RTX 4060 Ti": Gpu(42, 40, 21, 0.26),
}


def frames_per_second(gpu: Gpu, forward: Counts, decoder: Counts, forwards: int = 5) -> float:
    """Of a video under way: a chunk of three latents, twelve frames, is four steps, their commit and a decoding."""
    return 12 / (forwards * gpu.seconds(forward) + gpu.seconds(decoder))


def predictions() -> dict:
    """Counts, and frames per second of each GPU by window and decoder, at 832 x 480."""
    windows = {
        window: forward_counts(WAN_1_3B, plan_of(window, 832, 480, Sampling(window=window))) for window in (21, 12)
    }
    decoders = {name: decoder_counts(name, plan_of(3, 832, 480)) for name in ("Wan VAE", "TAEHV")}
    speeds = {
        gpu: {
            f"window {window}, {decoder}": frames_per_second(rates, forward, decoding)
            for window, forward in windows.items()
            for decoder, decoding in decoders.items()
        }
        for gpu, rates in GPUS.items()
    }
    counts = {f"forward, window {window}": asdict(counts) for window, counts in windows.items()}
    return {"counts": counts | {name: asdict(counts) for name, counts in decoders.items()}, "speeds": speeds}


def table(found: dict) -> str:
    lines = [
        "| | kernels | products, TFLOP | attention | convolutions | other bytes, GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, counts in found["counts"].items():
        flops = " | ".join(f"{work / 1e12:.2f}" for work in counts["flops"].values())
        lines.append(f"| {name} | {counts['kernels']} | {flops} | {counts['bytes'] / 1e9:.1f} |")
    columns = list(next(iter(found["speeds"].values())))
    lines += ["", f"| frames per second, computed | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    lines += [
        f"| {gpu} | {' | '.join(f'{math.floor(10 * speeds[column]) / 10:g}' for column in columns)} |"
        for gpu, speeds in found["speeds"].items()
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    found = predictions()
    sys.stdout.write((json.dumps(found, indent=2) if args.json else table(found)) + "\n")


if __name__ == "__main__":
    main()
