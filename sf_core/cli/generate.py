"""Makes a video from a prompt, chunk by chunk, and writes its frames as they come.

The video is made by pipeline.py; here are the options, the progress bar, the contact sheet and the report.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..device import (
    HostCopy,
    Timer,
    available_memory,
    default_dtype,
    peak_memory_mib,
    release_memory,
    use_threads_for,
    within_memory,
)
from ..memory import MemoryPlan, advise, format_bytes
from ..pipeline import ClipFrames, FilePipeline, ModelFiles, Pipeline, Request, Runtime, TinyPipeline, drop_frames
from ..sampling.config import LENGTHS, PRESETS, SAMPLERS, override, preset_of
from ..sampling.families import FAMILIES
from ..sampling.noise import MAX_SEED
from ..sampling.prompt_text import explain_unscheduled, place
from ..sampling.rollout import OnStep, Progress
from ..video import (
    check_destination,
    check_folder,
    check_names,
    check_outputs,
    contact_sheet,
    gif_rate,
    open_clip,
    save_picture,
    save_video,
)
from ..wan.attention import KERNELS, attention_kernel
from ..wan.compile import MODES, compile_ops
from ..wan.fp8 import E4M3
from ..worker import run_beside
from .arguments import DTYPES, add_loras, device, fraction, int_in, number_in, read_loras, size, steps, window

MAX_FRAMES = 1_000_000  # 17 hours
USUAL_STRENGTH = 0.5
TILES = 12  # frames on the contact sheet


# --- Options ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("prompt", nargs="?", help="prompt: what the video shows; or lines with times, see the manual")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="prompt from a text file")
    add("--out", required=True, metavar="FILE", help="output: .mp4, .webm, .gif, or a folder/ of PNGs")
    add("--seed", type=int_in(-1, MAX_SEED), default=0, help="seed (0); -1 draws one and prints it")
    add("--preview", nargs="?", const="", metavar="PNG", help="contact sheet, too (beside the video)")
    add("--json", action="store_true", help="report of what was done as JSON")
    add_video(parser)


def add_video(parser: argparse.ArgumentParser) -> None:
    """The options of a video, whatever its prompt, seed and file."""
    add = parser.add_argument
    frames = "pixel frames, --start included (81; 80 more; --source's; of LongLive 2 125, and 124 more)"
    add("--frames", type=int_in(1, MAX_FRAMES), help=frames)
    add("--width", type=size, help="width in pixels, a multiple of 16 (64, with --model 832; of LongLive 2: 32, 1280)")
    add("--height", type=size, help="height in pixels, a multiple of 16 (64, with --model 480; of LongLive 2: 32, 704)")
    add("--fps", type=int_in(1, 120), help="frames per second the file plays at (16; of LongLive 2 24)")
    add("--device", type=device, default="auto", help="device: cpu, cuda, cuda:1, mps (cuda if there is one)")
    add("--dtype", choices=DTYPES, default=None, help="dtype to compute in (float32 on cpu, else bfloat16)")
    _add_sampling(parser.add_argument_group("sampling: what is not given stays as the model was made for"))
    _add_starts(parser.add_argument_group("what it starts from, and what it leads away from"))
    _add_files(parser.add_argument_group("a model of your own, instead of the built-in one; see docs/files.md"))
    _add_speed(parser.add_argument_group("memory and speed"))


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    add, given = group.add_argument, argparse.SUPPRESS
    preset = (
        "preset of sampling settings to start from (tiny, or the model's own); long and fast change the window alone"
    )
    add("--preset", choices=(*PRESETS, *LENGTHS), help=preset)
    add("--steps", type=steps, default=given, help="denoising steps, a number (4) or timesteps (1000,750,500,250)")
    add("--first-steps", type=steps, default=given, help="denoising steps of the first chunk, where they differ")
    add("--shift", type=number_in(0.01, 100), default=given, help="flow shift: more steps at high noise (5; tiny 3)")
    add("--chunk", type=int_in(1, 1000), default=given, help="chunk: latent frames made together")
    add("--first-chunk", type=int_in(1, 1000), default=given, help="chunk size of the first chunk, where it differs")
    add("--window", type=window, default=given, help="window: latent frames attended to, or all")
    add("--sink", type=int_in(0, 1000), default=given, help="sink: first latent frames that never leave the window")
    pinned = "sink positions move along with the window"
    add("--pinned", action=argparse.BooleanOptionalAction, default=given, help=pinned)
    noise = "context noise: timestep told when a finished chunk enters the cache, below 1000 (0)"
    add("--context-noise", type=number_in(0, 999), default=given, help=noise)
    add("--reencode", action="store_true", help="first-frame re-encode whenever the window is full")
    _add_rules(add, given)


def _add_rules(add: Callable, given: str) -> None:
    """Options of rules that some families have."""
    rolling = "sampler: chunks one after the other, or rolling, several at once, each a step further than the next"
    add("--sampler", choices=SAMPLERS, default=given, help=rolling)
    reach = "position range: latent frames that positions of a pinned sink stay within (the window)"
    add("--position-range", type=int_in(1, 100_000), default=given, metavar="FRAMES", help=reach)
    decay = "sink decay: what a sink keeps as frames that leave the window are blended in, 0 to 1 (1: all)"
    add("--sink-decay", type=number_in(0, 1), default=given, metavar="SHARE", help=decay)
    bank = "memory bank: latent frames kept beside the window, chosen by the prompt (0: none)"
    add("--bank", type=int_in(0, 1000), default=given, dest="bank_frames", metavar="FRAMES", help=bank)
    interval = "memory bank: chunks that share one of its places (3)"
    add("--bank-interval", type=int_in(1, 1000), default=given, metavar="CHUNKS", help=interval)
    chosen = "memory bank: frames of sink and bank that each attention head chooses (all)"
    add("--bank-selected", type=int_in(1, 1000), default=given, metavar="FRAMES", help=chosen)
    jitter = "RoPE jitter: spread of the heads' bases in time, below 1, against a sink's pull (0; LoL has 0.8)"
    add("--rope-jitter", type=number_in(0, 0.99), default=given, metavar="SHARE", help=jitter)


def _add_starts(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--start", type=Path, metavar="FILE", help="start: image or video that it begins with, and goes on from")
    add("--drop-start", action="store_true", help="start left out of the file: only what comes after it")
    history = "history: what of a start that is longer than the window is read again (window)"
    add("--history", choices=("window", "all"), default="window", help=history)
    add("--source", type=Path, metavar="FILE", help="source: video to make another of")
    add("--strength", type=fraction, help="strength: how much of the source gives way, to 1 (0.5)")
    add("--negative", default="", metavar="TEXT", help="negative prompt, to lead away from, with --guidance")
    guidance = "classifier-free guidance; 1 (none) is what distilled models are made for"
    add("--guidance", type=number_in(-100, 100), default=1.0, metavar="NUMBER", help=guidance)


def _add_files(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", type=Path, metavar="FILE", help="causal Wan: file, index of shards, or folder")
    decoder = group.add_mutually_exclusive_group()
    decoder.add_argument("--vae", type=Path, metavar="FILE", help="Wan 2.1 VAE; of LongLive 2: Wan 2.2 VAE")
    decoder.add_argument("--taehv", type=Path, metavar="FILE", help="TAEHV (taew2_1 or 2_2), small and fast")
    add("--text-encoder", type=Path, metavar="FILE", help="text encoder, UMT5-XXL: file or folder")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer, where the text encoder's file lacks it")
    add_loras(group)
    add("--family", metavar="NAME", help=f"family, how it is sampled (guessed): {', '.join(FAMILIES)}")


def _add_speed(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--fp8", action="store_true", help="float8 weights")
    group.add_argument("--fp8-cache", action="store_true", help="float8 KV cache")
    offload = "offload: the model's blocks wait in the CPU's memory and come one at a time"
    group.add_argument("--offload", action="store_true", help=offload)
    group.add_argument("--tile", type=size, metavar="PIXELS", help="tiles of this size for --vae, e.g. 256")
    group.add_argument("--compile", choices=MODES, default="off", help="torch.compile (off)")
    group.add_argument("--attention", choices=KERNELS, default="sdpa", help="attention kernel (sdpa, torch's own)")


def read_pipeline(args: argparse.Namespace) -> Pipeline:
    """The built-in model, or the files that were named."""
    files = ("vae", "taehv", "text_encoder", "tokenizer", "family", "lora", "lora_strength")
    if args.model is None:
        if args.offload:
            raise ValueError("Got --offload without --model; the built-in model is small. Leave --offload out.")
        if stray := [f"--{name.replace('_', '-')}" for name in files if getattr(args, name) is not None]:
            raise ValueError(f"Got {' and '.join(stray)} without --model, to which it belongs. Add --model FILE.")
        return _with_defaults(TinyPipeline(_runtime(args)), args)
    decoder = args.vae or args.taehv
    if decoder is None or args.text_encoder is None:
        raise ValueError(
            "Got --model without all that goes with it; it needs --text-encoder (UMT5-XXL), and --vae (the Wan 2.1 "
            "VAE) or --taehv (taew2_1). Name their files."
        )
    loras, is_taehv = read_loras(args), args.vae is None
    named = ModelFiles(args.model, args.text_encoder, decoder, is_taehv, args.tokenizer, args.family, loras)
    return _with_defaults(FilePipeline(named, _runtime(args)), args)


def _with_defaults(pipeline: Pipeline, args: argparse.Namespace) -> Pipeline:
    """The pipeline with what the options say in pixels, and the options with its frame rate."""
    args.fps = args.fps or pipeline.fps
    if args.tile:
        pipeline.runtime = dataclasses.replace(pipeline.runtime, tile=max(1, args.tile // pipeline.config.space))
    return pipeline


def _runtime(args: argparse.Namespace) -> Runtime:
    dtype = DTYPES.get(args.dtype, default_dtype(args.device))
    return Runtime(
        args.device,
        dtype,
        args.fp8,
        E4M3 if args.fp8_cache else None,
        attention=attention_kernel(args.attention, args.device, dtype),
        ops=compile_ops(args.compile),
        offload=args.offload,
    )


def read_request(args: argparse.Namespace, pipeline: Pipeline) -> Request:
    """The video that the options ask for; reads start and source."""
    names = (
        "steps", "first_steps", "shift", "chunk", "first_chunk", "window", "sink", "pinned", "context_noise", "sampler",
        "position_range", "sink_decay", "bank_frames", "bank_interval", "bank_selected", "rope_jitter",
    )  # fmt: skip
    changes = {name: value for name, value in vars(args).items() if name in names}
    own = pipeline.sampling
    size = {"height": args.height or pipeline.height, "width": args.width or pipeline.width}
    clips = {"start": (args.start, None), "source": (args.source, args.frames)}
    given = {
        name: _open_clip(path, most, tuple(size.values()), args.fps) for name, (path, most) in clips.items() if path
    }
    return pipeline.request(
        args.prompt if args.prompt_file is None else read_prompt(args.prompt_file),
        **({"frames": args.frames} if args.frames else {}),
        **size,
        **given,
        sampling=override(preset_of(args.preset, own) if args.preset else own, **changes),
        fps=args.fps,
        seed=secrets.randbelow(2**32) if args.seed < 0 else args.seed,
        keep_start=not args.drop_start,
        full_history=args.history == "all",
        strength=USUAL_STRENGTH if args.strength is None else args.strength,
        negative=args.negative,
        guidance=args.guidance,
        reencode=args.reencode,
    )


def _open_clip(path: Path, most: int | None, size: tuple[int, int], fps: float) -> ClipFrames:
    """The frames of an image or video, at the size and rate of the video to make; read when they are encoded."""
    try:
        clip = open_clip(path)
    except OSError as error:
        raise OSError(_explain(path, error)) from None
    return ClipFrames(clip, size, fps, most, lambda pieces: _watch_reading(pieces, path, clip.count(fps, most)))


def _watch_reading(pieces: Iterator[Tensor], path: Path, count: int) -> Iterator[Tensor]:
    """The pieces of a clip, with a progress bar where it takes longer."""
    with tqdm(total=count, unit=" frames", desc=f"reading {path.name}", file=sys.stderr, leave=False, delay=2) as bar:
        for piece in pieces:
            bar.update(len(piece))
            yield piece


def _explain(path: Path, error: OSError) -> str:
    if str(error).startswith("Got "):
        return str(error)
    reason = error.strerror or "it is no image or video that can be read"
    return f"Got {path}, but {reason.lower()}. Give an image, a video, or a folder of pictures."


def read_prompt(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"Got no file {path}; the prompt is read from it. Name one that exists.") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Got {path}, which is not UTF-8 text (byte {error.start}). Save it as plain text in UTF-8."
        ) from None


def _check_companions(args: argparse.Namespace) -> None:
    """Raises ValueError for an option without the other one that it works on."""
    needs = {
        "--strength": (args.strength is not None and args.source is None, "--source"),
        "--drop-start": (args.drop_start and args.start is None, "--start"),
        "--history": (args.history != "window" and args.start is None, "--start"),
        "--negative": (bool(args.negative) and args.guidance == 1, "--guidance"),
    }
    for option, (alone, other) in needs.items():
        if alone:
            raise ValueError(f"Got {option} without {other}, on which it works. Add {other}, or leave {option} out.")


def _preview(args: argparse.Namespace) -> str | None:
    if args.preview is None:
        return None
    path = args.preview or str(Path(args.out).with_suffix(".png"))
    if Path(path).suffix.lower() != ".png" or os.path.isdir(path):
        raise ValueError(f"Got --preview {path!r}; it is the name of a PNG. Use a name that ends in .png, or none.")
    return path


def input_files(args: argparse.Namespace) -> dict[str, Path | None]:
    """The files that the options of `add_video` name."""
    names = ("start", "source", "model", "vae", "taehv", "text_encoder", "tokenizer")
    inputs = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    return inputs | {f"--lora {i}" if i > 1 else "--lora": path for i, path in enumerate(args.lora or [], 1)}


def _check_files(args: argparse.Namespace, preview: str | None) -> None:
    """Refuses outputs that cannot be written, or would replace an input or each other."""
    for output in filter(None, (args.out, preview)):
        check_names(output)
    inputs = {"--prompt-file": args.prompt_file, **input_files(args)}
    check_outputs({"--out": args.out, "--preview": preview}, inputs)
    check_destination(args.out)
    if preview:
        check_folder(preview)


# --- The run ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> str:
    started, timer, preview = time.perf_counter(), Timer(args.device), _preview(args)
    _check_companions(args)
    _check_files(args, preview)
    pipeline = read_pipeline(args)
    request = read_request(args, pipeline)
    if pipeline.note:
        note(f"{pipeline.name}: {pipeline.note}")
    _note_starts(request)
    if args.seed < 0:
        note(f"seed {request.seed}")
    if args.out.lower().endswith(".gif") and gif_rate(args.fps) != args.fps:
        note(f"a GIF holds no {args.fps} frames per second; this one plays at {gif_rate(args.fps):.4g}")
    with timer.measure("load"):
        plan = pipeline.memory_plan(request)
    if args.device.type == "cpu" and isinstance(pipeline, TinyPipeline):
        use_threads_for(plan.chunk_tokens)
    _check_clips(request, args)
    check_memory(plan, args.device)
    tiles = within_memory(
        lambda: _write(pipeline, request, timer, args),
        lambda: out_of_memory(plan, args.device),
        lambda: release_memory(args.device),
    )
    if preview:
        save_picture(
            preview, contact_sheet(torch.stack(list(tiles.values())), tiles), f"The video is whole in {args.out!r}. "
        )
    timer.seconds["total"] = time.perf_counter() - started
    report = _report(request, args, preview, timer)
    return json.dumps(report, indent=2) if args.json else _sentence(report)


def _write(pipeline: Pipeline, request: Request, timer: Timer, args: argparse.Namespace) -> dict[int, Tensor]:
    """Writes the video; returns the frames of the contact sheet by their numbers."""
    generation, decoder = pipeline.prepare(request, timer, note_ignored)
    length, chunks, tiles = request.frames - request.skipped, len(generation.plan.chunks), {}
    with tqdm(total=length, unit=" frames", file=sys.stderr) as bar:
        if args.compile != "off":
            bar.set_description(f"compiling, then chunk 1/{chunks}")

        def write(pieces: Iterator[HostCopy]) -> None:
            shown = drop_frames((piece.wait()[0] for piece in pieces), request.skipped)
            save_video(args.out, _watch(shown, length, timer, tiles, bar), args.fps, length=length)

        run_beside(generation.pieces(decoder, request.frames, _step_reporter(bar, chunks), timer), write)
    timer.settle()
    return tiles


def _step_reporter(bar: tqdm, chunks: int) -> OnStep:
    """Notes each step beside the bar, which shows it when it is next drawn: every 10 s at least."""

    def report(progress: Progress) -> None:
        chunk, step = f"{progress.chunk.index + 1}/{chunks}", f"{progress.step}/{progress.steps}"
        bar.set_description(f"chunk {chunk}, step {step}", refresh=False)

    return report


def _watch(
    pieces: Iterator[Tensor], length: int, timer: Timer, tiles: dict[int, Tensor], bar: tqdm
) -> Iterator[Tensor]:
    """The pieces, with a progress bar; notes when the first was there, how long it takes to write them, and keeps the
    frames of the contact sheet."""
    done, started = 0, time.perf_counter()
    wanted = {round(i * (length - 1) / (TILES - 1)) for i in range(TILES)}
    for piece in pieces:
        if not done:
            timer.seconds["first_frames"] = time.perf_counter() - started
            bar.set_postfix_str(f"first after {timer.seconds['first_frames']:.2f} s", refresh=False)
        tiles.update((i, piece[i - done].clone()) for i in range(done, done + len(piece)) if i in wanted)
        done += len(piece)
        bar.update(len(piece))
        handed = time.perf_counter()
        yield piece
        timer.add("write", time.perf_counter() - handed)


def _check_clips(request: Request, args: argparse.Namespace) -> None:
    """Refuses a start or source whose frames have no room while it is read."""
    there = available_memory(torch.device("cpu"))
    for option, path, clip in (("--start", args.start, request.start), ("--source", args.source, request.source)):
        if there and isinstance(clip, ClipFrames) and clip.bytes > there:
            raise MemoryError(
                f"Got {option} {str(path)!r} of {clip.clip.width} x {clip.clip.height} pixels, which takes "
                f"{format_bytes(clip.bytes)} of memory while it is read; this machine has {format_bytes(there)}. Make "
                "a smaller copy of it first."
            )


def check_memory(plan: MemoryPlan, device: torch.device) -> None:
    """Refuses what cannot fit before it is allocated."""
    there = available_memory(device)
    if there and plan.total > there:
        raise MemoryError(
            f"Got {plan.width} x {plan.height} pixels with a window of {plan.window} latent frames, which need "
            f"{_describe_use(plan)}; {device} has {format_bytes(there)}. {advise(plan, there)}"
        )


def out_of_memory(plan: MemoryPlan, device: torch.device) -> MemoryError:
    return MemoryError(
        f"Got out of memory on {device}, where {_describe_use(plan)} were expected to be enough. "
        f"{advise(plan, plan.total - 1)}"
    )


def _describe_use(plan: MemoryPlan) -> str:
    use = plan.use
    largest = {"weights": use.weights, "cache": use.cache, "decoder": use.decoder + use.decoding}
    parts = ", ".join(f"{name} {format_bytes(part)}" for name, part in largest.items())
    return f"{format_bytes(plan.total)} ({parts})"


# --- What is said ----------------------------------------------------------------------------------------------------


def _note_starts(request: Request) -> None:
    """Says when prompts after the first take effect. Raises ValueError if their times do not fit the video."""
    if hint := explain_unscheduled(request.prompt):
        note(hint)
    frames = place([prompt.start for prompt in request.prompts], request.plan().chunks)
    for prompt, latent in list(zip(request.prompts, frames))[1:]:
        frame = 4 * latent - 3
        note(f"the prompt of {prompt.start.said} starts with frame {frame} ({frame / request.fps:.2f} s)")


def note_ignored(reason: str, words: list[str]) -> None:
    note(f"{reason}: {' '.join(words[:8])}{' ...' if len(words) > 8 else ''}")


def note(message: str) -> None:
    tqdm.write(f"sf_core: {message}", file=sys.stderr)


def _report(request: Request, args: argparse.Namespace, preview: str | None, timer: Timer) -> dict:
    seconds = timer.seconds
    making = seconds["prompt"] + seconds["rollout"] + seconds["decode"]
    return {
        "out": args.out,
        "preview": preview,
        "model": str(args.model) if args.model else "built-in",
        "loras": [{"file": str(path), "strength": strength} for path, strength in read_loras(args)],
        "prompt": request.prompt,
        "seed": request.seed,
        "frames": request.frames - request.skipped,
        "latent_frames": request.plan().frames,
        "width": request.width,
        "height": request.height,
        "fps": request.fps,
        "sampling": dataclasses.asdict(request.sampling),
        "device": str(args.device),
        "dtype": str(DTYPES.get(args.dtype, default_dtype(args.device))).removeprefix("torch."),
        "fp8": args.fp8,
        "fp8_cache": args.fp8_cache,
        "offload": args.offload,
        "compile": args.compile,
        "attention": args.attention,
        "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
        "frames_per_second": round(request.frames / making, 1),
        "peak_memory_mib": peak_memory_mib(args.device),
    }


def _sentence(report: dict) -> str:
    seconds, preview = report["seconds"], report["preview"]
    sheet = f", contact sheet {preview}" if preview else ""
    return (
        f"{report['out']}: {report['frames']} frames of {report['width']} x {report['height']}, seed {report['seed']}; "
        f"first after {seconds['first_frames']:.2f} s, {report['frames_per_second']} FPS, "
        f"{seconds['total']:.1f} s in all{sheet}"
    )
