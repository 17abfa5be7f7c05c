"""Times rollout and decoding on random weights, and says how much of the machine's matrix speed they reach.

    python -m sf_core bench --job wan-1.3b --device cuda

Everything is measured in one run, on the same weights, noise and prompt: the machine's own matrix product, the
rollout (per step, per chunk, frames per second), the decoders, and all of it together from the first step to the last
frame. What a rollout computes is counted from its shapes (`Job.flops`), so "share of peak" is work done over work the
machine could have done in the same time.

Another implementation can be timed on the same job and checked against ours:

    python -m sf_core bench --job cpu --against other.py:Adapter

where Adapter has `prepare(job, state_dict)` and `rollout(job, embeds, noise)` -> iterator of latent chunks [B, C, n,
H, W]. The two take turns, so that a machine whose speed drifts treats them alike.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..autoencoders.stream import DecoderStream as TaehvStream
from ..autoencoders.stream import pixel_frames
from ..autoencoders.taehv import TAEHV
from ..autoencoders.wan_vae import DecoderStream as VaeStream
from ..autoencoders.wan_vae import WanVAE
from ..device import default_dtype, peak_memory_mib, synchronise
from ..pipeline import Generation
from ..sampling.config import Sampling, override
from ..sampling.noise import Noise, SeededNoise
from ..sampling.plan import Plan
from ..sampling.prompts import PromptSchedule
from ..sampling.rollout import OnStep, Progress, rollout
from ..wan.compile import MODES, compile_ops
from ..wan.config import WAN_1_3B, WanConfig
from ..wan.fp8 import E4M3, quantise_model
from ..wan.model import Network, WanModel
from .arguments import DTYPES, device, int_in

PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Job:
    """What is timed: a video of random weights."""

    config: WanConfig
    plan: Plan
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @property
    def pixel_frames(self) -> int:
        return pixel_frames(self.plan.frames)

    def with_frames(self, frames: int) -> Job:
        """The same with so many latent frames."""
        return replace(self, plan=replace(self.plan, frames=frames))

    def weights(self) -> dict[str, Tensor]:
        """Random weights; the head's are not zero, so that latents depend on everything."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            wan = WanModel(self.config, dtype=self.dtype).initialise()
            nn.init.normal_(wan.head.head.weight, std=0.02)
        return wan.state_dict()

    def prompt(self) -> Tensor:
        """Random embeddings [1, tokens, text_dim]."""
        shape = (1, min(PROMPT_TOKENS, self.config.text_len), self.config.text_dim)
        generator = torch.Generator().manual_seed(1)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def flops(self) -> int:
        """Operations of the transformer over the whole rollout, two for each multiplication and addition."""
        c, total = self.config, 0
        per_frame = c.tokens_per_frame(self.plan.height, self.plan.width)
        for chunk in self.plan.chunks:
            attended = min(chunk.end, self.plan.sampling.window or chunk.end) * per_frame
            tokens = chunk.frames * per_frame
            linear = c.layers * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim) + 2 * c.dim * 4 * c.channels
            attention = c.layers * 2 * c.dim * (attended + c.text_len)
            forwards = len(self.plan.steps(chunk)) + (not chunk.is_last)
            total += forwards * 2 * tokens * (linear + attention)
        return total


def plan_of(frames: int, width: int, height: int, sampling: Sampling = Sampling()) -> Plan:
    """One video of `width` x `height` pixels and so many latent frames."""
    return Plan(sampling, frames, height // 8, width // 8)


CPU_CONFIG = WanConfig(dim=512, ffn_dim=2048, heads=4, layers=8, text_dim=512, text_len=64)
JOBS = {"wan-1.3b": Job(WAN_1_3B, plan_of(21, 832, 480)), "cpu": Job(CPU_CONFIG, plan_of(21, 416, 240))}


class Implementation(Protocol):
    """A rollout that can be timed. `rollout` yields latents [1, C, n, H, W] chunk by chunk."""

    def prepare(self, job: Job, state_dict: dict[str, Tensor]) -> None: ...

    def rollout(self, job: Job, embeds: Tensor, noise: Noise) -> Iterator[Tensor]: ...


class Ours:
    """The engine, with float8 weights and compiled blocks where asked for."""

    def __init__(self, fp8: bool = False, compiled: str = "off") -> None:
        self.fp8, self.ops = fp8, compile_ops(compiled)

    def prepare(self, job: Job, state_dict: dict[str, Tensor]) -> None:
        with torch.device("meta"):
            wan = WanModel(job.config)
        wan.load_state_dict({name: tensor.to(job.device) for name, tensor in state_dict.items()}, assign=True)
        wan = quantise_model(wan) if self.fp8 else wan
        self.network = Network(wan, job.dtype, ops=self.ops)

    def generation(self, job: Job, embeds: Tensor) -> Generation:
        return Generation(self.network, job.plan, PromptSchedule.of(embeds))

    def rollout(self, job: Job, embeds: Tensor, noise: Noise, on_step: OnStep | None = None) -> Iterator[Tensor]:
        for _, x0 in rollout(self.network, job.plan, PromptSchedule.of(embeds), noise, on_step=on_step):
            yield x0


# --- Clocks ----------------------------------------------------------------------------------------------------------


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    synchronise(device)
    return time.perf_counter()


def matmul_peak(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[int] | None = None, repeats: int = 8
) -> float:
    """Operations per second of the best of a few square matrix products, each repeated."""
    best = 0.0
    sizes = sizes or ((4096, 8192) if device.type == "cuda" else (1024, 1536, 2048))
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(repeats):
            began = now(device)
            a @ b
            best = max(best, 2 * size**3 / (now(device) - began))
    return best


def timed(job: Job, implementation: Implementation) -> tuple[list[float], Tensor]:
    """When each chunk was there, in seconds from the start, and all latents."""
    began, chunks, times = now(job.device), [], []
    for latents in implementation.rollout(job, job.prompt(), SeededNoise(0)):
        times.append(now(job.device) - began)
        chunks.append(latents)
    return times, torch.cat(chunks, dim=2)


def step_seconds(job: Job, ours: Ours) -> float:
    """Median seconds of one forward of the last chunk."""
    marks: list[tuple[int, float]] = []

    def mark(progress: Progress) -> None:
        marks.append((progress.chunk.index, now(job.device)))

    for _ in ours.rollout(job, job.prompt(), SeededNoise(0), mark):
        pass
    last = [at for index, at in marks if index == marks[-1][0]]
    return statistics.median(b - a for a, b in zip(last, last[1:])) if len(last) > 1 else float("nan")


def decode_times(job: Job, name: str, repeats: int) -> dict:
    """Frames per second of decoding alone, and of a rollout's latents streamed chunk by chunk."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        vae, stream_of = (WanVAE(), VaeStream) if name == "vae" else (TAEHV(), TaehvStream)
    stream = stream_of(vae.to(job.device, job.dtype))
    plan, best = job.plan, float("inf")
    latents = torch.randn(1, 16, plan.frames, plan.height, plan.width, device=job.device)
    for _ in range(repeats + 1):  # the first warms up
        stream.reset()
        began = now(job.device)
        with torch.inference_mode():
            for chunk in plan.chunks:
                stream.decode(latents[:, :, chunk.start : chunk.end])
        best = min(best, now(job.device) - began)
    return {"decode_fps": job.pixel_frames / best, "stream": stream}


def end_to_end(job: Job, ours: Ours, stream) -> dict:
    """Seconds until the first frames are there and frames per second of the whole, latents decoded as they come."""
    stream.reset()
    began, first = now(job.device), None
    with torch.inference_mode():
        for _ in ours.generation(job, job.prompt()).frames(stream, job.pixel_frames):
            first = first or now(job.device) - began
    return {"first_frames_s": first, "fps": job.pixel_frames / (now(job.device) - began)}


# --- The report ------------------------------------------------------------------------------------------------------


def measure(job: Job, ours: Ours, other: Implementation | None, decoders: list[str], repeats: int) -> dict:
    """All figures of a job as plain numbers."""
    weights = job.weights()
    implementations = {"ours": ours} | ({"other": other} if other else {})
    for implementation in implementations.values():
        implementation.prepare(job, weights)
        timed(job.with_frames(job.plan.sampling.chunk), implementation)  # warms up, compiles
    runs: dict[str, list] = {name: [] for name in implementations}
    peaks = [matmul_peak(job.device, job.dtype)]
    for _ in range(repeats):
        for name, implementation in implementations.items():
            times, latents = timed(job, implementation)
            runs[name].append((times, latents))
        peaks.append(matmul_peak(job.device, job.dtype))
    peak = max(peaks)
    report = {"peak_tflops": peak / 1e12, "rollout_tflop": job.flops() / 1e12, "step_s": step_seconds(job, ours)}
    for name, done in runs.items():
        totals = [times[-1] for times, _ in done]
        chunks = [[b - a for a, b in zip([0.0, *times], times)] for times, _ in done]
        report[name] = {
            "rollout_s": statistics.median(totals),
            "chunk_s": statistics.median(seconds for run in chunks for seconds in run),
            "last_chunk_s": statistics.median(run[-1] for run in chunks),
            "dit_fps": job.pixel_frames / statistics.median(totals),
            "share_of_peak": job.flops() / statistics.median(totals) / peak,
        }
    if other:
        ours_latents, other_latents = (runs[name][0][1].float() for name in ("ours", "other"))
        report["difference"] = ((ours_latents - other_latents).norm() / ours_latents.norm()).item()
    for name in decoders:
        times = decode_times(job, name, repeats)
        report[name] = end_to_end(job, ours, times.pop("stream")) | times
    report["peak_memory_mib"] = peak_memory_mib(job.device)
    return report


def table(report: dict) -> str:
    """The report for people."""
    lines = [
        f"matrix product   {report['peak_tflops']:.3f} TFLOP/s measured",
        f"rollout          {report['rollout_tflop']:.3f} TFLOP, {1000 * report['step_s']:.1f} ms per step",
    ]
    for name in ("ours", "other"):
        if name in report:
            r = report[name]
            share = f"{100 * r['share_of_peak']:.0f}% of the matrix product's speed"
            pace = f"{r['rollout_s']:.2f} s, {r['last_chunk_s']:.3f} s for the last chunk, {r['dit_fps']:.2f} FPS"
            lines.append(f"{name:16} {pace}, {share}")
    if "difference" in report:
        lines.append(f"difference       {report['difference']:.1e} of the latents' norm")
    for name in ("vae", "taehv"):
        if name in report:
            r = report[name]
            lines.append(
                f"{name:16} {r['decode_fps']:.1f} FPS alone; with the rollout {r['fps']:.2f} FPS, "
                f"first frames after {r['first_frames_s']:.2f} s"
            )
    peak = report["peak_memory_mib"]
    return "\n".join([*lines, f"peak memory      {'not told by this system' if peak is None else f'{peak:.0f} MiB'}"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--job", choices=JOBS, default="cpu", help="cpu: dim 512, 8 layers, 416 x 240; wan-1.3b: full size, 832 x 480")
    add("--frames", type=int_in(1, 10_000), default=21, help="latent frames (21)")
    add("--width", type=int, help="pixels")
    add("--height", type=int, help="pixels")
    add("--window", type=int, help="latent frames attended to (all)")
    add("--sink", type=int, default=0, help="first latent frames that stay in the window (0)")
    add("--device", type=device, default="auto", help="cpu, cuda, mps (cuda if there is one)")
    add("--dtype", choices=DTYPES, default=None, help="numbers to compute in (float32 on cpu, else bfloat16)")
    add("--fp8", action="store_true", help="float8 weights")
    add("--fp8-cache", action="store_true", help="float8 cache")
    add("--compile", choices=MODES, default="off", help="torch.compile (off)")
    add("--decoder", choices=("none", "vae", "taehv", "both"), default="none", help="decoders to time too (none)")
    add("--threads", type=int_in(1, 1024), default=1, help="CPU threads (1)")
    add("--repeats", type=int_in(1, 1000), default=3, help="counted runs of each (3)")
    add("--against", metavar="FILE.py:NAME", help="another implementation to time and check")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> str:
    torch.set_num_threads(args.threads)
    job = JOBS[args.job]
    size = {"height": (args.height or 8 * job.plan.height) // 8, "width": (args.width or 8 * job.plan.width) // 8}
    sampling = override(job.plan.sampling, window=args.window, sink=args.sink)
    cache_dtype = E4M3 if args.fp8_cache else None
    plan = replace(job.plan, sampling=sampling, frames=args.frames, cache_dtype=cache_dtype, **size)
    job = Job(job.config, plan, args.device, DTYPES.get(args.dtype, default_dtype(args.device)))
    decoders = {"none": [], "both": ["vae", "taehv"]}.get(args.decoder, [args.decoder])
    other = adapter(args.against) if args.against else None
    report = measure(job, Ours(args.fp8, args.compile), other, decoders, args.repeats)
    return json.dumps(report, indent=2) if args.json else table(report)


def adapter(place: str) -> Implementation:
    """The implementation at FILE.py:NAME. Raises ValueError if there is none."""
    path, _, name = place.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"Got --against {place}; it names a class in a Python file. Use FILE.py:NAME.")
    spec = importlib.util.spec_from_file_location("other", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with suppress(AttributeError):
        return getattr(module, name)()
    raise ValueError(f"Got --against {place}; {path} has no {name}. Use the name of its adapter class.")
