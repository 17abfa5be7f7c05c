"""Makes a video from a prompt, chunk by chunk, and writes its frames as they come.

    prompt -> embeddings -> rollout -> latent chunk -> streaming decoder -> frames -> file

Videos are made in whole chunks and cut to the frames asked for, so the first frames are the same for any length.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import tiny
from .config import PRESETS, Sampling, WanConfig
from .machine import device_named, memory_of, peak_memory_mib
from .noise import MAX_SEED, SeededNoise
from .rollout import rollout
from .taehv import DecoderStream
from .video import check_destination, check_folder, contact_sheet, save_video

MAX_FRAMES = 1_000_000  # 17 hours
MAX_SIZE = 2048  # pixels
WORKING_BYTES = 2048  # per pixel of a frame, beside the cache: measured for the built-in model
TILES = 12  # frames on the contact sheet
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Request:
    """A video to make: `frames` pixel frames of `width` x `height` pixels, multiples of 16."""

    prompt: str
    seed: int
    frames: int
    width: int
    height: int
    sampling: Sampling
    device: torch.device
    dtype: torch.dtype

    @property
    def latent_frames(self) -> int:
        """Latent frames to decode: one for the first frame, one for every four that follow."""
        return 1 + -(-(self.frames - 1) // 4)

    @property
    def chunks(self) -> int:
        first, n = self.sampling.first_chunk or self.sampling.chunk, self.sampling.chunk
        return 1 + max(0, -(-(self.latent_frames - first) // n))

    @property
    def rollout_frames(self) -> int:
        """Latent frames to generate: whole chunks."""
        first, n = self.sampling.first_chunk or self.sampling.chunk, self.sampling.chunk
        return first + (self.chunks - 1) * n


@dataclass(frozen=True)
class Models:
    wan: torch.nn.Module
    text: torch.nn.Module
    vae: torch.nn.Module


@dataclass
class Stages:
    """Seconds spent in each stage, and until the first frames were there."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def each(self, stage: str, items: Iterator) -> Iterator:
        """The items, with the time spent on making them measured."""
        while True:
            with self.measure(stage):
                item = next(items, None)
            if item is None:
                return
            yield item


def frames_of(request: Request, models: Models, stages: Stages) -> Iterator[Tensor]:
    """The video of a request, in pieces [T, H, W, 3] in 0..1 on the CPU, one per chunk."""
    with stages.measure("prompt"):
        embeds = models.text.encode([request.prompt]).to(request.device, request.dtype)
    size = {"height": request.height // 8, "width": request.width // 8}
    chunks = rollout(models.wan, request.sampling, embeds, SeededNoise(request.seed), request.rollout_frames, **size)
    stream = DecoderStream(models.vae)
    left = request.frames
    for chunk in stages.each("rollout", chunks):
        with stages.measure("decode"):
            wanted = request.latent_frames - chunk.span.start
            piece = stream.decode(chunk.latents[:, :, :wanted])[0, :left].cpu()
        left -= len(piece)
        yield piece


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, given = parser.add_argument, argparse.SUPPRESS
    add("prompt", help="what the video shows")
    add("--out", required=True, metavar="FILE", help=".mp4, .webm, .gif, or a folder/ of PNGs")
    add("--seed", type=_whole(-1, MAX_SEED), default=0, help="0 by default; -1 draws one and prints it")
    add("--frames", type=_whole(1, MAX_FRAMES), default=81, help="pixel frames (81)")
    add("--width", type=_size, default=64, help="pixels, a multiple of 16 (64)")
    add("--height", type=_size, default=64, help="pixels, a multiple of 16 (64)")
    add("--fps", type=_whole(1, 120), default=16, help="frames per second the file plays at (16)")
    add("--preset", choices=PRESETS, default="tiny", help="sampling settings to start from (tiny); see info")
    add("--steps", type=_steps, default=given, help="denoising steps, a number (4) or timesteps (1000,750,500,250)")
    add("--chunk", type=_whole(1, 1000), default=given, help="latent frames made together")
    add("--window", type=_window, default=given, help="latent frames attended to, or all")
    add("--sink", type=_whole(0, 1000), default=given, help="first latent frames that never leave the window")
    add("--device", type=device_named, default="auto", help="cpu, cuda, cuda:1, mps (cuda if there is one)")
    add("--dtype", choices=DTYPES, default=None, help="numbers to compute in (float32 on cpu, else bfloat16)")
    add("--preview", nargs="?", const="", metavar="PNG", help="also write a contact sheet (beside the video)")
    add("--json", action="store_true", help="print what was done as JSON")


def run(args: argparse.Namespace) -> str:
    request, preview, started = _request(args), _preview(args), time.perf_counter()
    check_destination(args.out)
    if preview:
        check_folder(preview)
    if args.seed < 0:
        _note(f"seed {request.seed}")
    if request.device.type == "cpu":
        torch.set_num_threads(1)  # the built-in model is so small that two threads are slower
    stages, tiles = Stages(request.device), {}
    with _told_memory():
        with stages.measure("load"):
            models = _load(request)
        _check_prompt(models.text, request.prompt)
        with stages.measure("write"):
            save_video(args.out, _watched(frames_of(request, models, stages), request, stages, tiles), args.fps)
    stages.seconds["write"] -= sum(stages.seconds[stage] for stage in ("prompt", "rollout", "decode"))
    if preview:
        contact_sheet(torch.stack(list(tiles.values())), tiles).save(preview)
    stages.seconds["total"] = time.perf_counter() - started
    report = _report(request, args, preview, stages)
    return json.dumps(report, indent=2) if args.json else _sentence(report)


def _load(request: Request) -> Models:
    """The built-in model; refuses what cannot fit before it is allocated."""
    wan = tiny.load_model(request.device, request.dtype)
    _check_memory(request, wan.config)
    text, vae = tiny.load_text_encoder(), tiny.load_autoencoder()
    return Models(wan, text.to(request.device), vae.to(request.device, request.dtype))


def _check_memory(request: Request, config: WanConfig) -> None:
    window = min(request.sampling.window or request.rollout_frames, request.rollout_frames)
    bytes_per_number = torch.finfo(request.dtype).bits // 8
    cache = window * config.cache_bytes_per_frame(request.height // 8, request.width // 8, bytes_per_number)
    needed, there = cache + WORKING_BYTES * request.width * request.height, memory_of(request.device)
    if there and needed > there:
        raise MemoryError(
            f"Got {request.width} x {request.height} pixels with a window of {window} latent frames, which need "
            f"{needed / 2**30:.1f} GiB; {request.device} has {there / 2**30:.1f} GiB. Use a smaller size or --window."
        )


def _watched(pieces: Iterator[Tensor], request: Request, stages: Stages, tiles: dict[int, Tensor]) -> Iterator[Tensor]:
    """The pieces, with a progress bar; notes when the first was there and keeps the frames of the contact sheet."""
    last, done, started = request.frames - 1, 0, time.perf_counter()
    wanted = {round(i * last / (TILES - 1)) for i in range(TILES)}
    with tqdm(total=request.frames, unit=" frames", file=sys.stderr) as bar:
        for index, piece in enumerate(pieces, 1):
            if not done:
                stages.seconds["first_frames"] = time.perf_counter() - started
                bar.set_postfix_str(f"first after {stages.seconds['first_frames']:.2f} s", refresh=False)
            bar.set_description(f"chunk {index}/{request.chunks}", refresh=False)
            tiles.update((i, piece[i - done].clone()) for i in range(done, done + len(piece)) if i in wanted)
            done += len(piece)
            bar.update(len(piece))
            yield piece


def _check_prompt(text: torch.nn.Module, prompt: str) -> None:
    """Tells which words will not count. Raises ValueError if none does."""
    text.tokens(prompt)
    for words, reason in ((text.unknown(prompt), "does not know"), (text.truncated(prompt), "has no room for")):
        if words:
            shown = " ".join(words[:8]) + (" ..." if len(words) > 8 else "")
            _note(f"the built-in model {reason} these words and leaves them out: {shown}")


def _report(request: Request, args: argparse.Namespace, preview: str | None, stages: Stages) -> dict:
    seconds = stages.seconds
    making = seconds["prompt"] + seconds["rollout"] + seconds["decode"]
    return {
        "out": args.out,
        "preview": preview,
        "prompt": request.prompt,
        "seed": request.seed,
        "frames": request.frames,
        "latent_frames": request.rollout_frames,
        "width": request.width,
        "height": request.height,
        "fps": args.fps,
        "sampling": dataclasses.asdict(request.sampling),
        "device": str(request.device),
        "dtype": str(request.dtype).removeprefix("torch."),
        "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
        "frames_per_second": round(request.frames / making, 1),
        "peak_memory_mib": peak_memory_mib(request.device),
    }


def _sentence(report: dict) -> str:
    seconds, preview = report["seconds"], report["preview"]
    sheet = f", contact sheet {preview}" if preview else ""
    return (
        f"{report['out']}: {report['frames']} frames of {report['width']} x {report['height']}, seed {report['seed']}; "
        f"first after {seconds['first_frames']:.2f} s, {report['frames_per_second']} FPS, "
        f"{seconds['total']:.1f} s in all{sheet}"
    )


def _request(args: argparse.Namespace) -> Request:
    changes = {name: value for name, value in vars(args).items() if name in ("steps", "chunk", "window", "sink")}
    default = torch.float32 if args.device.type == "cpu" else torch.bfloat16
    return Request(
        prompt=args.prompt,
        seed=secrets.randbelow(2**32) if args.seed < 0 else args.seed,
        frames=args.frames,
        width=args.width,
        height=args.height,
        sampling=dataclasses.replace(PRESETS[args.preset], **changes),
        device=args.device,
        dtype=DTYPES.get(args.dtype, default),
    )


def _preview(args: argparse.Namespace) -> str | None:
    if args.preview is None:
        return None
    path = args.preview or str(Path(args.out).with_suffix(".png"))
    if Path(path).suffix.lower() != ".png" or Path(path).is_dir():
        raise ValueError(f"Got --preview {path!r}; it is the name of a PNG. Use a name that ends in .png, or none.")
    return path


def _whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number in low..high."""

    def parse(text: str) -> int:
        if not text.lstrip("+-").isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"got {text}; use a whole number from {low} to {high}")
        return int(text)

    return parse


def _size(text: str) -> int:
    """A width or height in pixels."""
    pixels = _whole(1, 10**9)(text)
    if pixels % 16 or pixels > MAX_SIZE:
        nearest = min(max(16, round(pixels / 16) * 16), MAX_SIZE)
        raise argparse.ArgumentTypeError(f"got {text}; use a multiple of 16 up to {MAX_SIZE}, e.g. {nearest}")
    return pixels


def _steps(text: str) -> tuple[float, ...]:
    """A number of evenly spread timesteps, or the timesteps themselves."""
    if "," in text:
        try:
            return tuple(float(step) for step in text.split(",") if step.strip())
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text}; use numbers like 1000,750,500,250") from None
    count = _whole(1, 1000)(text)
    return tuple(1000 - 1000 * i / count for i in range(count))


def _window(text: str) -> int | None:
    return None if text == "all" else _whole(1, 10**9)(text)



@contextmanager
def _told_memory() -> Iterator[None]:
    """Out of memory, as an error with a remedy; torch tells it of a CPU by the words alone."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise MemoryError(f"{error} Use a smaller size or --window, or --device cpu.") from None


def _note(message: str) -> None:
    tqdm.write(f"sf_core: {message}", file=sys.stderr)
