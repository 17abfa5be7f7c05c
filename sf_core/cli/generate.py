"""Makes a video from a prompt, chunk by chunk, and writes its frames as they come.

    prompts -> embeddings -> rollout -> latent chunk -> streaming decoder -> frames -> file

Videos are made in whole chunks and cut to the frames asked for, so the first frames are the same for any length. The
networks are the built-in ones, or a user's files (pipeline.py). Each is loaded when it is its turn, and the text
encoder, the largest, is gone before the model comes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..device import device_named, memory_of, peak_memory_mib, ran_out, release, synchronise, usual_dtype
from ..memory import Plan, advice, gib
from ..pipeline import BuiltIn, Files, Source
from ..sampling.config import PRESETS, Sampling
from ..sampling.families import FAMILIES
from ..sampling.noise import MAX_SEED, SeededNoise
from ..sampling.prompt_text import Prompt, cues, parse, starts
from ..sampling.prompts import REREADING, Cue
from ..sampling.rollout import Progress, Span, plan_spans, rollout, whole_chunks
from ..video import check_destination, check_folder, contact_sheet, read_video, save_video
from ..wan.attention import KERNELS, Attention, attention_named, sdpa
from ..wan.compile import MODES, compile_stages
from ..wan.fp8 import FLOAT8
from ..wan.model import EAGER
from ..wan.model import Stages as Blocks
from .arguments import share, size, steps, whole, window

MAX_FRAMES = 1_000_000  # 17 hours
TILES = 12  # frames on the contact sheet
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Request:
    """A video to make: `frames` pixel frames of `width` x `height` pixels, multiples of 16.

    prompt, fps        a prompt, or several with their times, and the rate at which those are counted
    fp8, cache_dtype   float8 weights; the dtype of the cache, None for `dtype`
    tile               of the decoder, in latent pixels; None: the whole picture at once
    start              frames [1 + 4k, H, W, 3] that the video begins with
    source, strength   frames [T, H, W, 3] of a video to make another of, and how much of it gives way
    negative, guidance a prompt to lead away from, where guidance is not 1
    """

    prompt: str
    fps: int
    seed: int
    frames: int
    width: int
    height: int
    sampling: Sampling
    device: torch.device
    dtype: torch.dtype
    fp8: bool = False
    cache_dtype: torch.dtype | None = None
    tile: int | None = None
    attention: Attention = sdpa
    blocks: Blocks = EAGER
    start: Tensor | None = None
    source: Tensor | None = None
    strength: float = 1.0
    negative: str = ""
    guidance: float = 1.0

    @property
    def given(self) -> int:
        """Latent frames of the start."""
        return 0 if self.start is None else latents_of(len(self.start))

    @property
    def latent_frames(self) -> int:
        """Latent frames to decode: one for the first frame, one for every four that follow."""
        return latents_of(self.frames)

    @property
    def rollout_frames(self) -> int:
        """Latent frames to generate."""
        return whole_chunks(self.latent_frames, self.sampling, self.given)

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        return parse(self.prompt, self.fps)

    @property
    def rereads(self) -> bool:
        """Whether a prompt makes the model read its window again."""
        return any(prompt.entrance.transition in REREADING for prompt in self.prompts[1:])

    @cached_property
    def spans(self) -> list[Span]:
        return plan_spans(self.rollout_frames, self.sampling, self.given)

    @property
    def chunks(self) -> int:
        return len(self.spans)


def latents_of(frames: int) -> int:
    """Latent frames that hold so many frames: the first holds one, the others four."""
    return 1 + -(-(frames - 1) // 4)


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
            synchronise(self.device)
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


@dataclass(frozen=True)
class Networks:
    """What a video is made with: the model, the prompts' embeddings [1, tokens, text_dim], and a decoder's stream.

    prefix, source  latents [1, C, F, H, W] in model space of what it starts from
    """

    wan: torch.nn.Module
    cues: list[Cue]
    negative: Tensor | None
    stream: object
    prefix: Tensor | None
    source: Tensor | None


def frames_of(
    request: Request, networks: Networks, stages: Stages, on_step: Callable[[Progress], None]
) -> Iterator[Tensor]:
    """The video of a request, in pieces [T, H, W, 3] in 0..1 on the CPU, one per chunk."""
    chunks = rollout(
        networks.wan,
        request.sampling,
        networks.cues,
        SeededNoise(request.seed),
        request.rollout_frames,
        height=request.height // 8,
        width=request.width // 8,
        prefix=networks.prefix,
        source=networks.source,
        strength=request.strength,
        negative=networks.negative,
        guidance=request.guidance,
        cache_dtype=request.cache_dtype,
        attention=request.attention,
        stages=request.blocks,
        on_step=on_step,
    )
    left = request.frames
    for chunk in stages.each("rollout", chunks):
        with stages.measure("decode"):
            wanted = request.latent_frames - chunk.span.start
            piece = networks.stream.decode(chunk.latents[:, :, :wanted])[0, :left].cpu()
        left -= len(piece)
        yield piece


# --- The command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, given = parser.add_argument, argparse.SUPPRESS
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("prompt", nargs="?", help="what the video shows; or lines with times, see docs/command-line.md")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text file with the prompt in it")
    add("--out", required=True, metavar="FILE", help=".mp4, .webm, .gif, or a folder/ of PNGs")
    add("--seed", type=whole(-1, MAX_SEED), default=0, help="0 by default; -1 draws one and prints it")
    add("--frames", type=whole(1, MAX_FRAMES), help="pixel frames, --start included (81; 80 more; --source's)")
    add("--width", type=size, help="pixels, a multiple of 16 (64, with --model 832)")
    add("--height", type=size, help="pixels, a multiple of 16 (64, with --model 480)")
    add("--fps", type=whole(1, 120), default=16, help="frames per second the file plays at (16)")
    add("--preset", choices=PRESETS, help="sampling settings to start from (tiny, or the model's own); see info")
    add("--steps", type=steps, default=given, help="denoising steps, a number (4) or timesteps (1000,750,500,250)")
    add("--chunk", type=whole(1, 1000), default=given, help="latent frames made together")
    add("--window", type=window, default=given, help="latent frames attended to, or all")
    add("--sink", type=whole(0, 1000), default=given, help="first latent frames that never leave the window")
    add("--device", type=device_named, default="auto", help="cpu, cuda, cuda:1, mps (cuda if there is one)")
    add("--dtype", choices=DTYPES, default=None, help="numbers to compute in (float32 on cpu, else bfloat16)")
    add("--preview", nargs="?", const="", metavar="PNG", help="also write a contact sheet (beside the video)")
    add("--json", action="store_true", help="print what was done as JSON")
    _add_starts(parser.add_argument_group("what it starts from, and what it leads away from"))
    _add_files(parser.add_argument_group("a model of your own, instead of the built-in one; see docs/files.md"))
    _add_speed(parser.add_argument_group("memory and speed"))


def _add_starts(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--start", type=Path, metavar="FILE", help="image or video that it begins with, and goes on from")
    add("--source", type=Path, metavar="FILE", help="video to make another of")
    add("--strength", type=share, default=0.5, help="how much of the source gives way, above 0 to 1 (0.5)")
    add("--negative", default="", metavar="TEXT", help="prompt to lead away from, with --guidance")
    add("--guidance", type=float, default=1.0, metavar="NUMBER", help="1 (none), which distilled models are made for")


def _add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", type=Path, metavar="FILE", help="causal Wan: file, index of shards, or folder")
    decoder = group.add_mutually_exclusive_group()
    decoder.add_argument("--vae", type=Path, metavar="FILE", help="Wan 2.1 VAE")
    decoder.add_argument("--taehv", type=Path, metavar="FILE", help="taew2_1, a small and fast decoder")
    group.add_argument("--text-encoder", type=Path, metavar="FILE", help="UMT5-XXL: file or folder")
    group.add_argument("--tokenizer", type=Path, metavar="FILE", help="where the text encoder's file lacks it")
    group.add_argument("--lora", type=Path, metavar="FILE", help="merged into the model (LongLive's lora.pt)")
    group.add_argument("--lora-strength", type=float, default=1.0, metavar="NUMBER", help="of --lora (1)")
    group.add_argument("--family", metavar="NAME", help=f"how it is sampled (guessed): {', '.join(FAMILIES)}")


def _add_speed(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--fp8", action="store_true", help="weights in float8")
    group.add_argument("--fp8-cache", action="store_true", help="cache in float8")
    group.add_argument("--tile", type=size, metavar="PIXELS", help="decode --vae in tiles of this size, e.g. 256")
    group.add_argument("--compile", choices=MODES, default="off", help="torch.compile (off)")
    group.add_argument("--attention", choices=KERNELS, default="sdpa", help="attention kernel (sdpa, torch's own)")


def run(args: argparse.Namespace) -> str:
    started, stages, source = time.perf_counter(), Stages(args.device), _source(args)
    request, preview = _request(args, source), _preview(args)
    check_destination(args.out)
    if preview:
        check_folder(preview)
    if source.note:
        _note(f"{source.name}: {source.note}")
    _tell_starts(request)
    if args.seed < 0:
        _note(f"seed {request.seed}")
    if request.device.type == "cpu" and isinstance(source, BuiltIn):
        torch.set_num_threads(1)  # the built-in model is so small that two threads are slower
    with stages.measure("load"):
        plan = source.plan(request)
    _check_memory(plan, request.device)
    with _told_memory(plan, request.device):
        tiles = _make(request, source, stages, args)
    stages.seconds["write"] -= stages.seconds["rollout"] + stages.seconds["decode"]
    if preview:
        contact_sheet(torch.stack(list(tiles.values())), tiles).save(preview)
    stages.seconds["total"] = time.perf_counter() - started
    report = _report(request, args, preview, stages)
    return json.dumps(report, indent=2) if args.json else _sentence(report)


def _tell_starts(request: Request) -> None:
    """Says when prompts after the first take effect. Raises ValueError if their times do not fit the video."""
    begins = starts([prompt.entrance for prompt in request.prompts], request.spans)
    for prompt, begin in list(zip(request.prompts, begins))[1:]:
        frame = 4 * begin - 3
        _note(f"the prompt of {prompt.entrance.said} starts with frame {frame} ({frame / request.fps:.2f} s)")


def _make(request: Request, source: Source, stages: Stages, args: argparse.Namespace) -> dict[int, Tensor]:
    """Writes the video; returns the frames of the contact sheet by their numbers."""
    tiles: dict[int, Tensor] = {}
    networks = _load(request, source, stages)
    with stages.measure("write"), tqdm(total=request.frames, unit=" frames", file=sys.stderr) as bar:
        if args.compile != "off":
            bar.set_description(f"compiling, then chunk 1/{request.chunks}")
        pieces = frames_of(request, networks, stages, _teller(bar, request))
        save_video(args.out, _watched(pieces, request, stages, tiles, bar), args.fps)
    return tiles


def _teller(bar: tqdm, request: Request) -> Callable[[Progress], None]:
    """Notes each step beside the bar, which shows it when it is next drawn: every 10 s at least."""

    def tell(progress: Progress) -> None:
        chunk, step = f"{progress.span.index + 1}/{request.chunks}", f"{progress.step}/{progress.steps}"
        bar.set_description(f"chunk {chunk}, step {step}", refresh=False)

    return tell


def _load(request: Request, source: Source, stages: Stages) -> Networks:
    """The networks, one after the other; the text encoder is freed once it has read the prompt."""
    begun = [_encoded(clip, request, source, stages) for clip in (request.start, _long(request))]
    with stages.measure("load"):
        stream, text = source.decoder(request), source.text_encoder(request)
    for prompt in request.prompts:
        for words, reason in source.left_out(text, prompt.text):
            if words:
                _note(f"{reason}: {' '.join(words[:8])}{' ...' if len(words) > 8 else ''}")
    with stages.measure("prompt"):
        embeds = [text.encode([prompt.text]).to(request.device, request.dtype) for prompt in request.prompts]
        guided = request.guidance != 1
        negative = source.negative(text, request.negative).to(request.device, request.dtype) if guided else None
    del text
    release(request.device)
    entrances = [prompt.entrance for prompt in request.prompts]
    with stages.measure("load"):
        return Networks(source.wan(request), cues(zip(entrances, embeds), request.spans), negative, stream, *begun)


def _encoded(clip: Tensor | None, request: Request, source: Source, stages: Stages) -> Tensor | None:
    """Latents [1, C, F, H, W] of frames [T, H, W, 3]; the encoder is freed again."""
    if clip is None:
        return None
    with stages.measure("encode"):
        latents = source.encode(request, clip[None])
    release(request.device)
    return latents


def _long(request: Request) -> Tensor | None:
    """The source with its last frame repeated, or cut, to what will be generated."""
    if request.source is None:
        return None
    length = 4 * request.rollout_frames - 3
    missing = request.source[-1:].expand(max(0, length - len(request.source)), -1, -1, -1)
    return torch.cat((request.source, missing))[:length]


def _check_memory(plan: Plan, device: torch.device) -> None:
    """Refuses what cannot fit before it is allocated."""
    there = memory_of(device)
    if there and plan.total > there:
        raise MemoryError(
            f"Got {plan.width} x {plan.height} pixels with a window of {plan.window} latent frames, which need "
            f"{_parts(plan)}; {device} has {gib(there)}. {advice(plan, there)}"
        )


def _parts(plan: Plan) -> str:
    model, (held, used) = plan.model, plan.decoding
    largest = {"weights": model.weights, "cache": model.cache, "decoder": held + used}
    return f"{gib(plan.total)} ({', '.join(f'{name} {gib(part)}' for name, part in largest.items())})"


@contextmanager
def _told_memory(plan: Plan, device: torch.device) -> Iterator[None]:
    """Out of memory, as an error with remedies, and all that was made is freed."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        traceback.clear_frames(error.__traceback__)
        release(device)
        raise MemoryError(
            f"Got out of memory on {device}, where {_parts(plan)} were expected to be enough. "
            f"{advice(plan, plan.total - 1)}"
        ) from None


def _watched(
    pieces: Iterator[Tensor], request: Request, stages: Stages, tiles: dict[int, Tensor], bar: tqdm
) -> Iterator[Tensor]:
    """The pieces, with a progress bar; notes when the first was there and keeps the frames of the contact sheet."""
    last, done, started = request.frames - 1, 0, time.perf_counter()
    wanted = {round(i * last / (TILES - 1)) for i in range(TILES)}
    for index, piece in enumerate(pieces, 1):
        if not done:
            stages.seconds["first_frames"] = time.perf_counter() - started
            bar.set_postfix_str(f"first after {stages.seconds['first_frames']:.2f} s", refresh=False)
        bar.set_description(f"chunk {index}/{request.chunks}", refresh=False)
        tiles.update((i, piece[i - done].clone()) for i in range(done, done + len(piece)) if i in wanted)
        done += len(piece)
        bar.update(len(piece))
        yield piece


def _report(request: Request, args: argparse.Namespace, preview: str | None, stages: Stages) -> dict:
    seconds = stages.seconds
    making = seconds["prompt"] + seconds["rollout"] + seconds["decode"]
    return {
        "out": args.out,
        "preview": preview,
        "model": str(args.model) if args.model else "built-in",
        "lora": {"file": str(args.lora), "strength": args.lora_strength} if args.lora else None,
        "prompt": request.prompt,
        "seed": request.seed,
        "frames": request.frames,
        "latent_frames": request.rollout_frames,
        "width": request.width,
        "height": request.height,
        "fps": request.fps,
        "sampling": dataclasses.asdict(request.sampling),
        "device": str(request.device),
        "dtype": str(request.dtype).removeprefix("torch."),
        "fp8": args.fp8,
        "fp8_cache": args.fp8_cache,
        "compile": args.compile,
        "attention": args.attention,
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


def _source(args: argparse.Namespace) -> Source:
    """The built-in networks, or the files that were named."""
    files = ("vae", "taehv", "text_encoder", "tokenizer", "family", "lora")
    if args.model is None:
        if stray := [f"--{name.replace('_', '-')}" for name in files if getattr(args, name) is not None]:
            raise ValueError(f"Got {' and '.join(stray)} without --model, to which it belongs. Add --model FILE.")
        return BuiltIn()
    decoder = args.vae or args.taehv
    if decoder is None or args.text_encoder is None:
        raise ValueError(
            "Got --model without all that goes with it; it needs --text-encoder (UMT5-XXL), and --vae (the Wan 2.1 "
            "VAE) or --taehv (taew2_1). Name their files."
        )
    tokenizer, lora = args.tokenizer, (args.lora, args.lora_strength)
    return Files(args.model, args.text_encoder, decoder, args.vae is None, tokenizer, args.family, *lora)


def _request(args: argparse.Namespace, source: Source) -> Request:
    changes = {name: value for name, value in vars(args).items() if name in ("steps", "chunk", "window", "sink")}
    dtype = DTYPES.get(args.dtype, usual_dtype(args.device))
    height, width = args.height or source.height, args.width or source.width
    clips = ((args.start, None), (args.source, args.frames))
    start, clip = (path and _read_clip(path, most, (height, width), args.fps) for path, most in clips)
    return Request(
        prompt=args.prompt if args.prompt_file is None else _read_prompt(args.prompt_file),
        fps=args.fps,
        seed=secrets.randbelow(2**32) if args.seed < 0 else args.seed,
        frames=args.frames or _usual_length(start, clip),
        width=width,
        height=height,
        sampling=dataclasses.replace(PRESETS[args.preset] if args.preset else source.sampling, **changes),
        device=args.device,
        dtype=dtype,
        fp8=args.fp8,
        cache_dtype=FLOAT8 if args.fp8_cache else None,
        tile=args.tile and args.tile // 8,
        attention=attention_named(args.attention, args.device, dtype),
        blocks=compile_stages(args.compile),
        start=None if start is None else start[: 1 + (len(start) - 1) // 4 * 4],  # whole latent frames
        source=clip,
        strength=args.strength,
        negative=args.negative,
        guidance=args.guidance,
    )


def _usual_length(start: Tensor | None, clip: Tensor | None) -> int:
    """81 frames, or 80 more than there are, or as many as the source has."""
    if clip is not None:
        return len(clip)
    return 81 if start is None else len(start) + 80


def _read_clip(path: Path, most: int | None, size: tuple[int, int], fps: float) -> Tensor:
    """The frames [T, H, W, 3] of an image or video, at the size and rate of the video to make."""
    try:
        return read_video(path, most, size, fps)
    except OSError as error:
        reason = error.strerror or "it is no image or video that can be read"
        raise OSError(f"Got {path}, but {reason.lower()}. Give an image, a video, or a folder of PNGs.") from None


def _read_prompt(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"Got no file {path}; the prompt is read from it. Name one that exists.") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Got {path}, which is not UTF-8 text (byte {error.start}). Save it as plain text in UTF-8."
        ) from None


def _preview(args: argparse.Namespace) -> str | None:
    if args.preview is None:
        return None
    path = args.preview or str(Path(args.out).with_suffix(".png"))
    if Path(path).suffix.lower() != ".png" or Path(path).is_dir():
        raise ValueError(f"Got --preview {path!r}; it is the name of a PNG. Use a name that ends in .png, or none.")
    return path


def _note(message: str) -> None:
    tqdm.write(f"sf_core: {message}", file=sys.stderr)
