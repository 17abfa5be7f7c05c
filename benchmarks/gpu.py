"""Everything that a GPU has to show, in one command that ends in time:

    python benchmarks/gpu.py --out runs/gpu --seconds 440

Needs torch, einops and safetensors, and downloads nothing: weights are random, drawn once on the device. After every
part, in order of worth, `report.json` is written anew, so that what was measured is kept whatever happens; a part that
fails says how in its place, and one that would begin too late is left out by name. A short table comes last. `--tiny`
runs the same parts on small networks, on a CPU too, to see that they run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.published import Published
from sf_core.autoencoders import taehv, wan_vae
from sf_core.autoencoders.stream import DecoderStream
from sf_core.cli.bench import Job, plan_of
from sf_core.device import HostCopy, default_device, synchronise
from sf_core.memory import TAEHV, WAN_VAE, MemoryPlan
from sf_core.pipeline import Generation
from sf_core.sampling.config import Sampling
from sf_core.sampling.noise import SeededNoise
from sf_core.sampling.prompts import PromptSchedule
from sf_core.wan.compile import compile_ops
from sf_core.wan.config import WAN_1_3B, WanConfig
from sf_core.wan.fp8 import E4M3, multiplies_float8, quantise_model, quantise_rows
from sf_core.wan.model import EAGER, BlockOps, Network, WanModel
from sf_core.worker import run_beside

SMALL = WanConfig(dim=96, ffn_dim=192, heads=2, layers=2, text_dim=64, text_len=16)
LEAST, NO_TIME = 10, "for want of time"  # seconds without which no part begins
CATEGORIES = {  # of kernels, by what their names hold; the first that fits counts
    "attention": ("flash", "fmha", "attention", "sdpa", "sage"),
    "convolution": ("conv", "fprop", "implicit"),
    "matrix product": ("gemm", "cutlass", "nvjet", "matmul", "addmm", "mm_"),
    "copy": ("memcpy", "memset", "copy"),
    "compiled": ("triton",),
}


@dataclass
class Bench:
    """What is measured: sizes, weights, and how long there is."""

    device: torch.device
    tiny: bool
    seconds: float
    began: float = field(default_factory=time.perf_counter)

    @property
    def config(self) -> WanConfig:
        return SMALL if self.tiny else WAN_1_3B

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        torch.manual_seed(0)
        wan = WanModel(self.config, device=self.device, dtype=self.dtype).initialise()
        nn.init.normal_(wan.head.head.weight, std=0.02)
        return wan.state_dict()

    @cached_property
    def vae(self) -> wan_vae.WanVAE:
        layout = wan_vae.Layout(widths=(8, 8, 16, 16)) if self.tiny else wan_vae.Layout()
        return wan_vae.WanVAE(layout).to(self.device, self.dtype)

    @cached_property
    def taehv(self) -> taehv.TAEHV:
        layout = taehv.Layout(widths=(16, 8, 8, 8), encoder_width=8) if self.tiny else taehv.Layout()
        return taehv.TAEHV(layout).to(self.device, self.dtype)

    @property
    def compiled(self) -> BlockOps:
        return compile_ops("default", "eager" if self.tiny else "inductor")

    def network(self, fp8: bool = False, ops: BlockOps = EAGER, dtype: torch.dtype | None = None) -> Network:
        dtype = dtype or self.dtype
        with torch.device("meta"):
            wan = WanModel(self.config)
        wan.load_state_dict({name: weight.to(dtype) for name, weight in self.weights.items()}, assign=True)
        return Network(quantise_model(wan) if fp8 else wan, dtype, ops=ops)

    def job(self, frames: int, window: int | None = None, cache_dtype: torch.dtype | None = None) -> Job:
        """A video of so many latent frames, at 832 x 480."""
        size = (32, 32) if self.tiny else (832, 480)
        plan = replace(plan_of(frames, *size, Sampling(window=window)), cache_dtype=cache_dtype)
        return Job(self.config, plan, self.device, self.dtype)

    def generation(self, network: Network, job: Job) -> Generation:
        return Generation(network, job.plan, PromptSchedule.of(job.prompt().to(network.dtype)))

    def time(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Median seconds of some work, warm."""
        work()
        taken = []
        for _ in range(1 if self.tiny else repeats):
            with stopwatch(self.device, taken):
                work()
        return statistics.median(taken)


@contextmanager
def stopwatch(device: torch.device, taken: list[float]) -> Iterator[None]:
    synchronise(device)
    began = time.perf_counter()
    yield
    synchronise(device)
    taken.append(time.perf_counter() - began)


def relative(x: Tensor, truth: Tensor) -> float:
    """Distance to the truth, as a share of its norm."""
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


# --- The parts -------------------------------------------------------------------------------------------------------


def versions(bench: Bench) -> dict:
    """What runs here, and which attention kernel torch takes."""
    found = {"torch": torch.__version__, "python": platform.python_version(), "device": str(bench.device)}
    found |= {name: importlib.util.find_spec(name) is not None for name in ("triton", "flash_attn", "sageattention")}
    if bench.is_gpu:
        of = torch.cuda.get_device_properties(bench.device)
        found |= {
            "gpu": of.name, "capability": f"{of.major}.{of.minor}", "GB": round(of.total_memory / 1e9, 1),
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
            "float8 products": multiplies_float8(bench.device),
        }  # fmt: skip
    q, k = attention_inputs(bench, 7)
    return found | {"attention kernels": [name for name, _ in kernels(bench, lambda: attend(q, k))][:4]}


def first_frames(bench: Bench, network: Network | None = None) -> dict:
    """Seconds until the first frames are on the CPU: in a new process, where nothing is warm, and again."""
    network = network or bench.network()
    found = {}
    for name, stream in decoders(bench).items():
        for state in ("cold", "warm"):
            stream.reset()
            pieces, taken = bench.generation(network, bench.job(3)).pieces(stream, 9), []
            with stopwatch(bench.device, taken):
                next(pieces).wait()
            found[f"{name}, {state}"] = taken[0]
            exhaust(pieces)
    return found


def ceilings(bench: Bench) -> dict:
    """What the device can do: copies, the matrix products of a block, attention, convolutions."""
    numbers = 2**20 if bench.tiny else 2**29
    x = torch.empty(numbers, dtype=bench.dtype, device=bench.device)
    found = {"copy GB/s": 2 * x.nbytes / bench.time(lambda: x.clone()) / 1e9}
    plan, dim, ffn = bench.job(3).plan, bench.config.dim, bench.config.ffn_dim
    tokens = 3 * bench.config.tokens_per_frame(plan.height, plan.width)
    for inputs, outputs in ((dim, dim), (dim, ffn), (ffn, dim)):
        a = torch.randn(tokens, inputs, device=bench.device).to(bench.dtype)
        b = torch.randn(outputs, inputs, device=bench.device).to(bench.dtype)
        work = 2 * tokens * inputs * outputs / 1e12
        found[f"{inputs} -> {outputs}, bfloat16 TFLOP/s"] = work / bench.time(partial(F.linear, a, b))
        if multiplies_float8(bench.device):
            found[f"{inputs} -> {outputs}, float8 TFLOP/s"] = work / bench.time(float8_product(a, b))
    return found


def float8_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    (a, scale_a), (b, scale_b) = quantise_rows(a), quantise_rows(b)
    scales = {"scale_a": scale_a, "scale_b": scale_b.t()}
    return lambda: torch._scaled_mm(a, b.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def attention_speed(bench: Bench) -> dict:
    """TFLOP/s of each of torch's kernels, by the frames attended to; and seconds of a new length's first call."""
    found = {}
    for frames in (3, 12, 21):
        q, k = attention_inputs(bench, frames)
        work = 4 * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3] / 1e12
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            name = f"{frames} frames, {backend.name.lower()}"
            try:
                with sdpa_kernel(backend):
                    taken = []
                    with stopwatch(bench.device, taken):
                        attend(q, k)
                    found[name] = work / bench.time(partial(attend, q, k))
                    found[f"{name}, first call s"] = taken[0]
            except RuntimeError as error:
                found[name] = str(error).splitlines()[0]
    return found


def convolutions(bench: Bench) -> dict:
    """TFLOP/s of the Wan VAE's convolutions, as 3D ones in both layouts and as three 2D ones."""
    found = {}
    for width, frames, scale in ((384, 1, 1), (384, 2, 2), (192, 4, 4), (96, 4, 8)):
        height, across = (4, 4) if bench.tiny else (60 * scale, 104 * scale)
        conv = nn.Conv3d(width, width, 3, padding=(0, 1, 1), device=bench.device, dtype=bench.dtype)
        x = torch.randn(1, width, frames + 2, height, across, device=bench.device).to(bench.dtype)
        work = 2 * 27 * width * width * frames * height * across / 1e12
        for name, layout in (("3d", torch.contiguous_format), ("3d channels last", torch.channels_last_3d)):
            laid, at = conv.to(memory_format=layout), x.contiguous(memory_format=layout)
            found[f"{width} x {frames} x {height} x {across}, {name}"] = work / bench.time(partial(laid, at))
        found[f"{width} x {frames} x {height} x {across}, three 2d"] = work / bench.time(three_planes(conv, x, frames))
    return found


def three_planes(conv: nn.Conv3d, x: Tensor, frames: int) -> Callable[[], Tensor]:
    flat = [x[0, :, i : i + frames].transpose(0, 1).contiguous(memory_format=torch.channels_last) for i in range(3)]
    weights = [conv.weight[:, :, i].contiguous(memory_format=torch.channels_last) for i in range(3)]
    return lambda: sum(F.conv2d(plane, weight, padding=1) for plane, weight in zip(flat, weights))


def correctness(bench: Bench) -> dict:
    """How far each way to compute is from float32 on the same device: velocity, and latents of two chunks."""
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    job = bench.job(6)
    truth = bench.network(dtype=torch.float32)
    latents = bench.generation(truth, job).latents()
    ways = {"bfloat16": {}, "float8": {"fp8": True}, "compiled": {"ops": bench.compiled}}
    found = {}
    for name, way in ways.items():
        found[name] = relative(bench.generation(bench.network(**way), job).latents(), latents)
    cached = bench.generation(bench.network(), bench.job(6, cache_dtype=E4M3)).latents()
    found["float8 cache"] = relative(cached, latents)
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    return found | {"GPU against CPU, float32": across_devices(bench)}


def across_devices(bench: Bench) -> float:
    """A small rollout on the device and on the CPU, in float32."""
    torch.manual_seed(1)
    wan = WanModel(SMALL).initialise()
    nn.init.normal_(wan.head.head.weight, std=0.02)
    plan, embeds = plan_of(12, 64, 64, Sampling(window=6)), torch.randn(1, 16, SMALL.text_dim)
    made = []
    for device in (torch.device("cpu"), bench.device):
        network, prompts = Network(wan.to(device)), PromptSchedule.of(embeds.to(device))
        made.append(Generation(network, plan, prompts).latents().cpu())
    return relative(made[1], made[0])


def waits(bench: Bench) -> dict:
    """Whether anything waits for the device between a chunk's first step and its frames: an error says where."""
    found = {}
    for name, stream in decoders(bench).items():
        pieces = bench.generation(bench.network(), bench.job(12, 9)).pieces(stream, 45)
        kept = [next(pieces) for _ in range(4)]  # one by one of the first chunk, then one: all is warm
        mode = torch.cuda.get_sync_debug_mode() if bench.is_gpu else None
        if bench.is_gpu:
            torch.cuda.set_sync_debug_mode("error")
        try:
            kept.append(next(pieces))
            found[name] = "none"
        finally:
            if bench.is_gpu:
                torch.cuda.set_sync_debug_mode(mode)
        found[f"{name}, frames"] = sum(piece.wait().shape[1] for piece in kept)
        exhaust(pieces)
    return found


def matrix(bench: Bench) -> dict:
    """Frames per second of the transformer with its window full, in every way to compute it."""
    found = {}
    for window in (21, 12):
        for name, fp8, cache in (("bf16", False, None), ("fp8", True, None), ("fp8, fp8 cache", True, E4M3)):
            for mode, ops in (("eager", EAGER), ("compiled", bench.compiled)):
                generation = bench.generation(bench.network(fp8, ops), bench.job(window + 9, window, cache))
                seconds = chunk_seconds(bench, generation)
                found[f"window {window}, {name}, {mode}"] = 12 / seconds[-1]
                if bench.left < 60:
                    return found | {"left out": NO_TIME}
    return found


def published(bench: Bench) -> dict:
    """Frames per second, 81 of them, of the transformer: the published algorithm and ours, on the same weights."""
    job, other = bench.job(21), Published()
    other.prepare(job, bench.weights)
    network, taken, seconds = bench.network(), [], {}
    for _ in range(1 if bench.tiny else 2):
        for name in ("published", "ours"):
            with stopwatch(bench.device, taken):
                if name == "ours":
                    latents = bench.generation(network, job).latents()
                else:
                    theirs = torch.cat(list(other.rollout(job, job.prompt(), SeededNoise(0))), 2)
            seconds[name] = taken[-1]
    fps = {name: 81 / value for name, value in seconds.items()}
    return fps | {"times as fast": fps["ours"] / fps["published"], "latents apart": relative(latents, theirs)}


def end_to_end(bench: Bench) -> dict:
    """Frames per second, 81 of them, from the first step to bytes on the CPU in a thread of their own."""
    ways = {"bf16": ({}, None), "fp8, fp8 cache, compiled": ({"fp8": True, "ops": bench.compiled}, E4M3)}
    found = {}
    for way, (made, cache) in ways.items():
        network = bench.network(**made)
        for name, stream in decoders(bench).items():
            for window in (None, 12):
                taken = []
                for _ in range(2):  # the first one warms up
                    stream.reset()
                    pieces = bench.generation(network, bench.job(21, window, cache)).pieces(stream, 81)
                    with stopwatch(bench.device, taken):
                        run_beside(pieces, lambda pieces: [as_bytes(piece.wait()) for piece in pieces])
                found[f"{way}, {name}, window {window or 21}"] = 81 / taken[-1]
    return found


def as_bytes(frames: Tensor) -> int:
    return frames.mul(255).round().to(torch.uint8).numpy().nbytes


def kernel_times(bench: Bench) -> dict:
    """Share of the time of a chunk's kernels, with its decoding, by category."""
    found = {}
    for name, stream in decoders(bench).items():
        pieces = bench.generation(bench.network(), bench.job(12, 9)).pieces(stream, 45)
        for _ in range(4):
            next(pieces)
        times: dict[str, float] = {}
        for kernel, seconds in kernels(bench, partial(next_frames, pieces)):
            kind = next((kind for kind, marks in CATEGORIES.items() if any(m in kernel.lower() for m in marks)), "rest")
            times[kind] = times.get(kind, 0.0) + seconds
        whole = sum(times.values()) or 1.0
        found |= {f"{name}, {kind}": share / whole for kind, share in sorted(times.items(), key=lambda kv: -kv[1])}
        found[f"{name}, seconds"] = whole
        exhaust(pieces)
    return found


def long_video(bench: Bench) -> dict:
    """Sixty chunks with a window of 12: do time and memory stay flat?"""
    generation = bench.generation(bench.network(), bench.job(18 if bench.tiny else 180, 12))
    seconds, memory = chunk_seconds(bench, generation), torch.cuda.memory_reserved() if bench.is_gpu else 0
    third = len(seconds) // 3
    return {
        "chunks": len(seconds), "early chunk s": statistics.median(seconds[-2 * third : -third]),
        "late chunk s": statistics.median(seconds[-third:]), "reserved GB": memory / 1e9,
    }  # fmt: skip


def peak_memory(bench: Bench) -> dict:
    """The peak of a video beside its plan."""
    if not bench.is_gpu:
        return {"left out": "a CPU does not tell it"}
    found = {}
    memories = {"Wan VAE": WAN_VAE, "TAEHV": TAEHV}
    for name, stream in decoders(bench).items():
        network, job = bench.network(), bench.job(15, 12)
        held = sum(weight.nbytes for weight in network.wan.state_dict().values())
        spare = torch.cuda.memory_allocated() - held - sum(p.nbytes for p in stream.vae.parameters())
        torch.cuda.reset_peak_memory_stats()
        exhaust(bench.generation(network, job).pieces(stream, 57))
        plan = MemoryPlan(bench.config, job.plan, bench.dtype, held, memories[name])
        found[f"{name}, peak GB"] = (torch.cuda.max_memory_allocated() - spare) / 1e9
        found[f"{name}, plan GB"] = plan.total / 1e9
    return found


PARTS = (
    versions, first_frames, waits, correctness, published, end_to_end, matrix, ceilings, attention_speed, kernel_times,
    peak_memory, long_video, convolutions,
)  # fmt: skip


# --- What the parts share --------------------------------------------------------------------------------------------


def decoders(bench: Bench) -> dict[str, DecoderStream | wan_vae.DecoderStream]:
    return {"TAEHV": DecoderStream(bench.taehv), "Wan VAE": wan_vae.DecoderStream(bench.vae)}


def attention_inputs(bench: Bench, frames: int) -> tuple[Tensor, Tensor]:
    """Queries of a chunk and keys of so many frames, [1, N, L, D]."""
    config, plan = bench.config, bench.job(3).plan
    tokens = config.tokens_per_frame(plan.height, plan.width)
    return tuple(
        torch.randn(1, config.heads, count * tokens, config.head_dim, device=bench.device).to(bench.dtype)
        for count in (3, frames)
    )


def attend(q: Tensor, k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, k)


def chunk_seconds(bench: Bench, generation: Generation) -> list[float]:
    """Seconds from each chunk to the next, its commit included."""
    marks = []
    for _ in generation.chunks():
        synchronise(bench.device)
        marks.append(time.perf_counter())
    return [late - early for early, late in pairwise(marks)]


def kernels(bench: Bench, work: Callable[[], object]) -> list[tuple[str, float]]:
    """(name, seconds) of the kernels that some work runs, the longest first; of operators on a CPU."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA] if bench.is_gpu else [activity.CPU]) as run:
        work()
        synchronise(bench.device)
    if not bench.is_gpu:
        return sorted(((e.key, e.self_cpu_time_total / 1e6) for e in run.key_averages()), key=lambda pair: -pair[1])
    on_device = [e for e in run.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sorted(((e.key, e.self_device_time_total / 1e6) for e in on_device), key=lambda pair: -pair[1])


def next_frames(pieces: Iterator[HostCopy]) -> Tensor:
    return next(pieces).wait()


def exhaust(pieces: Iterator) -> None:
    """Takes what is left."""
    for _ in pieces:
        pass


# --- The run ---------------------------------------------------------------------------------------------------------


def run(bench: Bench, out: Path, only: list[str]) -> dict:
    """Runs the parts while there is time; writes the report after each."""
    report: dict[str, dict] = {}
    for part in (part for part in PARTS if not only or part.__name__ in only):
        began = time.perf_counter()
        found = report[part.__name__] = _run_part(part, bench) if bench.left >= LEAST else {"left out": NO_TIME}
        found["took s"] = time.perf_counter() - began
        (out / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        sys.stderr.write(f"{bench.seconds - bench.left:6.1f} s  {part.__name__}\n")
    return report


def _run_part(part: Callable[[Bench], dict], bench: Bench) -> dict:
    try:
        with torch.no_grad():
            return part(bench)
    except Exception as error:  # noqa: BLE001 - the other parts are worth as much
        return {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}
    finally:
        if bench.is_gpu:
            torch.cuda.empty_cache()


def table(report: dict[str, dict]) -> str:
    """The report for people."""
    lines = []
    for part, found in report.items():
        lines.append(part.replace("_", " "))
        for name, value in found.items():
            if name != "where":
                shown = f"{value:.4g}" if isinstance(value, float) else str(value)
                lines.append(f"  {name:48} {shown}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for report.json")
    parser.add_argument("--seconds", type=float, default=440, help="time there is (440)")
    parser.add_argument("--device", type=torch.device, default=default_device(), help="device (cuda if there is one)")
    parser.add_argument("--tiny", action="store_true", help="small networks, to see that it runs")
    parser.add_argument("--part", action="append", default=[], choices=[part.__name__ for part in PARTS], help="only")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    report = run(Bench(args.device, args.tiny, args.seconds), args.out, args.part)
    sys.stdout.write(f"{table(report)}\n")
    return int(any("error" in found for found in report.values()))


if __name__ == "__main__":
    raise SystemExit(main())
