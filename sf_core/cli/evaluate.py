"""Scores a checkpoint of the built-in model: does the video show what the prompt says, and for how long.

Prompts are random combinations of colour, shape, motion and background (`--split held-out` takes only those never
trained on). Every prompt is sampled chunk by chunk as in production, decoded, and read by `detect`. A window is 36
pixel frames, a little over one period of every motion; the first window is what the model was trained on, later ones
show drift.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from .. import tiny
from ..autoencoders.stream import DecoderStream, latent_frames
from ..checkpoints.load import describe
from ..pipeline import Generation
from ..sampling.config import PRESETS, Sampling
from ..sampling.context import Reencode
from ..sampling.noise import SeededNoise
from ..sampling.plan import Plan
from ..sampling.prompts import PromptSchedule
from ..sampling.schedule import add_noise
from ..tiny import detect
from ..tiny.autoencoder import SPACE, TinyAutoencoder, psnr
from ..tiny.data import SIZE, Clips, caption, draw, render
from ..video import contact_sheet, save_picture
from ..wan.attention import FullAttention
from ..wan.fp8 import E4M3, quantise_model
from ..wan.model import Network, WanModel, encode_prompt, velocity
from .arguments import int_in, number_in, seed, window

WINDOW = 36  # pixel frames
BATCH = 16
COLUMNS = (*detect.ATTRIBUTES, "all")
MEASURES = tuple(detect.MEASURES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, given = parser.add_argument, argparse.SUPPRESS
    add(
        "--model",
        nargs="+",
        type=Path,
        default=[None],
        metavar="PATH",
        help="runs' folders, or transformer files (built in)",
    )
    add("--text-encoder", type=Path, metavar="FILE", help="text encoder that belongs to them (beside it, or built in)")
    add("--autoencoder", type=Path, metavar="FILE", help="autoencoder that belongs to them (beside it, or built in)")
    add("--prompts", type=int_in(1, 100_000), default=96, metavar="N", help="number of prompts (96)")
    add(
        "--windows",
        type=int_in(1, 10_000),
        default=1,
        metavar="N",
        help=f"windows of {WINDOW} frames to generate and score (1)",
    )
    add("--split", choices=("all", "trained", "held-out"), default="all", help="which combinations to ask for (all)")
    add("--seed", type=seed, default=0, help="of prompts and noise (0)")
    add("--fp8", action="store_true", help="float8 weights in the blocks")
    add("--fp8-cache", action="store_true", help="float8 cache")
    add("--window", type=window, default=given, help="latent frames attended to, or all (9)")
    add("--sink", type=int_in(0, 1000), default=given, help="first latent frames that never leave the window (0)")
    add("--pinned", action=argparse.BooleanOptionalAction, default=given, help="sinks move along with the window")
    add("--context-noise", type=number_in(0, 999), default=given, help="timestep of finished chunks (0)")
    add("--reencode", action="store_true", help="turn the first frame of a full window into a still")
    add("--sheet", type=Path, metavar="PNG", help="write a contact sheet: a row for each of the first videos")
    add("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> str:
    if args.sheet and (args.sheet.suffix.lower() != ".png" or not args.sheet.parent.is_dir()):
        raise ValueError(f"Got --sheet {args.sheet}; it is written as PNG. Name a .png file in a folder that exists.")
    torch.set_num_threads(1)
    results = []
    changes = {name: vars(args)[name] for name in ("window", "sink", "pinned", "context_noise") if name in args}
    cache_dtype = E4M3 if args.fp8_cache else None
    for path in map(transformer, args.model):
        clips, prompts = ask(args.prompts, args.seed, args.split)
        wan = tiny.load_transformer(path=path)
        text = tiny.load_text_encoder(args.text_encoder or sibling_file(path, "text_encoder"))
        vae = tiny.load_autoencoder(args.autoencoder or sibling_file(path, "autoencoder"))
        sampling = replace(describe(path).sampling if path else PRESETS["tiny"], **changes)
        near = quantise_model(copy.deepcopy(wan)) if args.fp8 else wan
        embeds = text.encode(prompts)
        off = velocity_error(wan, near, embeds[:BATCH], vae.encode(render(clips[:BATCH], 9)))
        reencode = vae.still if args.reencode else None
        videos = generate(near, vae, embeds, args.windows, args.seed, sampling, cache_dtype, reencode)
        first = next(videos)
        decibels = None
        if near is not wan or cache_dtype:
            exact = next(generate(wan, vae, embeds[:BATCH], 1, args.seed, sampling, None, reencode))
            decibels = psnr(first[:, :WINDOW], exact).mean().item()
        scores = score(chain([first], videos), clips, args.windows)
        named = {"model": str(path or "built in"), "prompts": args.prompts}
        named |= {"velocity_error": off, "frames_db": decibels}
        results.append({**named, "windows": scores})
        if args.sheet:
            write_sheet(first, args.sheet)
    return json.dumps(results, indent=1) if args.json else "\n\n".join(text_of(result) for result in results)


def transformer(path: Path | None) -> Path | None:
    """The transformer's file, of a run's folder or of one that a model was exported to."""
    if path is None or not path.is_dir():
        return path
    exported = path / "transformer.safetensors"
    return exported if exported.is_file() else path / "model.safetensors"


def sibling_file(path: Path | None, part: str) -> Path | None:
    """The "text_encoder" or "autoencoder" that training wrote beside a model."""
    file = path.parent / f"{part}.safetensors" if path else None
    return file if file and file.is_file() else None


def text_of(result: dict) -> str:
    off, decibels = result["velocity_error"], result["frames_db"]
    lines = [f"velocity off by {100 * off:.1f}%"] if off else []
    lines += [f"frames of the first window {decibels:.1f} dB from those in float32"] if decibels else []
    return "\n".join([table(result), *lines])


def ask(n: int, seed: int, split: str = "all") -> tuple[Clips, list[str]]:
    """n random clips and prompts for them; positions and phases of the clips do not matter."""
    generator = torch.Generator().manual_seed(seed)
    clips = draw(n, generator, split)
    return clips, caption(clips, generator)


def generate(
    wan: WanModel,
    vae: TinyAutoencoder,
    prompts: Tensor,
    windows: int = 1,
    seed: int = 0,
    sampling: Sampling = PRESETS["tiny"],
    cache_dtype: torch.dtype | None = None,
    reencode: Reencode | None = None,
) -> Iterator[Tensor]:
    """Videos of prompt embeddings [n, tokens, text_dim]: [<= BATCH, windows * WINDOW, 64, 64, 3] at a time.

    Each batch has its own noise.
    """
    latent = SIZE // SPACE
    frames = latent_frames(windows * WINDOW)
    for first in range(0, len(prompts), BATCH):
        embeds = prompts[first : first + BATCH]
        plan = Plan(sampling, frames, latent, latent, len(embeds), cache_dtype=cache_dtype)
        generation = Generation(Network(wan), plan, PromptSchedule.of(embeds), seed + first, reencode=reencode)
        yield torch.cat(list(generation.frames(DecoderStream(vae), windows * WINDOW)), 1)


@torch.no_grad()
def velocity_error(wan: WanModel, near: WanModel, embeds: Tensor, clean: Tensor) -> float:
    """Relative error of `near`'s velocity, against `wan`'s, for a first chunk [B, C, F, H, W] at each step's noise."""
    noise = SeededNoise(0)(0, clean.shape[2], 0, (len(clean), *clean.shape[1:2], *clean.shape[3:]))
    see = FullAttention(wan.config, range(clean.shape[2]), *clean.shape[3:])
    errors = []
    for timestep, sigma in PRESETS["tiny"].steps_of(True):
        x = add_noise(clean, noise, sigma)
        exact, close = (velocity(model, x, timestep, encode_prompt(model, embeds), see) for model in (wan, near))
        errors.append(((close - exact).norm() / exact.norm()).item())
    return sum(errors) / len(errors)


def score(videos: Iterator[Tensor], clips: Clips, windows: int = 1) -> list[dict[str, float]]:
    """Share of prompts followed, per attribute, and the mean of each measure, for each window."""
    sums = [{} for _ in range(windows)]
    first = 0
    for video in videos:
        asked = clips[first : first + len(video)]
        first += len(video)
        for number, total in enumerate(sums):
            piece = video[:, number * WINDOW : (number + 1) * WINDOW]
            found = detect.matches(detect.read(piece), asked)
            measured = {name: measure(piece, asked) for name, measure in detect.MEASURES.items()}
            for name, value in {**found, **measured}.items():
                total[name] = total.get(name, 0.0) + float(value.float().sum())
    return [{name: value / first for name, value in total.items()} for total in sums]


def score_truth(n: int, seed: int, vae: TinyAutoencoder) -> dict[str, dict[str, float]]:
    """What the detectors say of drawn clips and of their reconstructions, with the autoencoder's PSNR in dB."""
    clips, _ = ask(n, seed)
    truth = render(clips, WINDOW + 1)
    with torch.no_grad():
        again = torch.cat([vae.decode(vae.encode(part)) for part in truth.split(BATCH)])
    scores = {
        name: score(iter([video[:, :WINDOW]]), clips)[0]
        for name, video in (("truth", truth), ("reconstruction", again))
    }
    scores["reconstruction"]["psnr"] = float(psnr(again, truth).mean())
    return scores


def table(result: dict) -> str:
    lines = [
        f"{result['model']}: {result['prompts']} prompts",
        "window  " + "".join(f"{c:>12}" for c in (*COLUMNS, *MEASURES)),
    ]
    for number, scores in enumerate(result["windows"], 1):
        shares = "".join(f"{scores[c]:12.3f}" for c in COLUMNS)
        lines.append(f"{number:6}  {shares}" + "".join(f"{scores[c]:12.4f}" for c in MEASURES))
    first, last = result["windows"][0], result["windows"][-1]
    if last is not first:
        kept = last["all"] / first["all"] if first["all"] else 0.0
        growth = {c: last[c] - first[c] for c in MEASURES}
        changes = ", ".join(f"{name} {value:+.4f}" for name, value in growth.items())
        lines.append(f"last window against the first: {kept:.3f} of all correct, {changes}")
    return "\n".join(lines)


def write_sheet(videos: Tensor, path: Path) -> None:
    """Every fourth frame of each video [B, T, H, W, 3], a row each, under its number."""
    numbers = range(0, videos.shape[1], 4)
    save_picture(path, contact_sheet(videos[:, ::4].flatten(0, 1), [*numbers] * len(videos), len(numbers)))
