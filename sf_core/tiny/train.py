"""Trains the built-in model from nothing: autoencoder, teacher, causal model, few-step model, export.

Every stage keeps a checkpoint in the run's folder and continues from it. Two processes share the work by averaging
gradients; on a machine this small that is the only use of a second core that pays.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from .. import tiny
from ..config import PRESETS
from . import evaluate
from .autoencoder import TinyAutoencoder
from .data import vocabulary
from .few_step import fit_few_step
from .fit_autoencoder import fit_autoencoder
from .flow import CONFIG, fit_causal, fit_teacher
from .loop import Run
from .text import TinyTextEncoder

FIT = {"autoencoder": fit_autoencoder, "teacher": fit_teacher, "causal": fit_causal, "few-step": fit_few_step}
SCORED, WINDOWS = 96, 4  # prompts and windows of the scores written beside the weights
MODELS = ("few-step", "causal", "teacher")  # what can be exported, best first


@dataclass(frozen=True)
class Recipe:
    """Steps and batch size (over all processes) of each stage."""

    steps: dict[str, int]
    batch: dict[str, int]


RECIPE = Recipe(
    steps={"autoencoder": 1800, "teacher": 3000, "causal": 300, "few-step": 600},
    batch={"autoencoder": 16, "teacher": 64, "causal": 32, "few-step": 32},
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("runs/tiny"),
        help="folder for checkpoints; a stage continues from its own (runs/tiny)",
    )
    add("--stage", choices=(*FIT, "export"), help="do only this stage (all, then export)")
    add("--steps", type=int, metavar="N", help="steps of the stage, instead of the recipe's")
    add("--processes", type=int, default=2, help="processes that share each batch (2)")
    add("--seed", type=int, default=0, help="of weights, data and noise (0)")
    add("--every", type=int, default=20, help="steps between two lines of progress (20)")
    add("--weights", type=Path, default=tiny.WEIGHTS, help="folder that the model is exported to (the package's own)")


def run(args: argparse.Namespace) -> str:
    if args.processes < 1 or args.every < 1 or (args.steps is not None and args.steps < 1):
        raise ValueError(
            f"Got --processes {args.processes}, --every {args.every}, --steps {args.steps}; all must be 1 or more."
        )
    if args.steps and args.stage not in FIT:
        raise ValueError("Got --steps without a stage to apply it to; add --stage, one of " + ", ".join(FIT) + ".")
    recipe = replace(RECIPE, steps={**RECIPE.steps, args.stage: args.steps}) if args.steps else RECIPE
    for stage in [args.stage] if args.stage else [*FIT, "export"]:
        if stage == "export":
            return export(Run(args.out, args.seed), args.weights, command(args))
        fit(args, stage, recipe)
    return f"{args.out}: {args.stage} done"


def fit(args: argparse.Namespace, stage: str, recipe: Recipe) -> None:
    """One stage, in as many processes as asked for (the autoencoder in one)."""
    processes = 1 if stage == "autoencoder" else args.processes
    with tempfile.TemporaryDirectory() as folder:
        job = (args, stage, recipe.steps[stage], recipe.batch[stage] // processes, processes, f"file://{folder}/meet")
        if processes == 1:
            work(0, *job)
        else:
            torch.multiprocessing.spawn(work, job, processes)


def work(rank: int, args: argparse.Namespace, stage: str, total: int, batch: int, processes: int, meet: str) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=processes)
    FIT[stage](Run(args.out, args.seed, tell if rank == 0 else quiet, args.every), total, batch)
    if processes > 1:
        dist.destroy_process_group()


def tell(line: str) -> None:
    sys.stderr.write(line + "\n")


def quiet(line: str) -> None:
    pass


def command(args: argparse.Namespace) -> str:
    return f"python -m sf_core train tiny --seed {args.seed} --processes {args.processes}"


def export(run: Run, folder: Path, made_by: str) -> str:
    """Writes the three parts in bfloat16, of the furthest stage there is, and README.md; returns the scores."""
    stage = next((name for name in MODELS if run.path(name).exists()), "teacher")
    saved = run.load(stage)
    origin = {"command": made_by, "seed": str(run.seed), "stage": stage, "step": str(saved["step"])}
    about = {
        "config": json.dumps({"transformer": {"causal_ar": True}}),
        "wan": json.dumps(asdict(CONFIG)),
        "sampling": json.dumps(asdict(PRESETS["tiny"])),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "autoencoder.safetensors", run.load("autoencoder")["model"], origin)
    write(folder / "text_encoder.safetensors", saved["text"], {**origin, "words": json.dumps(vocabulary())})
    write(folder / "transformer.safetensors", saved["model"], {**origin, **about})
    scores = measure(folder)
    write(folder / "transformer.safetensors", saved["model"], {**origin, **about, "scores": json.dumps(scores)})
    (folder / "README.md").write_text(describe(run, folder, origin, scores))
    return evaluate.table({"model": f"{folder}, {stage}", **scores["video"]})


def write(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file in bfloat16, written whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file({name: value.bfloat16().contiguous() for name, value in state.items()}, partial, metadata)
    partial.replace(path)


def measure(folder: Path) -> dict:
    """Scores of an exported model: videos of SCORED prompts, and the detectors' on truth and on reconstructions."""
    wan, text, vae = tiny.load_model(path=folder / "transformer.safetensors"), *load_others(folder)
    clips, prompts = evaluate.ask(SCORED, seed=0)
    windows = evaluate.score(evaluate.generate(wan, text, vae, prompts, WINDOWS), clips, WINDOWS)
    return {"video": {"prompts": SCORED, "windows": windows}, "detectors": evaluate.score_truth(SCORED, 0, vae)}


def load_others(folder: Path) -> tuple[TinyTextEncoder, TinyAutoencoder]:
    encoder = tiny.load_text_encoder(folder / "text_encoder.safetensors")
    return encoder, tiny.load_autoencoder(folder / "autoencoder.safetensors")


def describe(run: Run, folder: Path, origin: dict[str, str], scores: dict) -> str:
    """README.md beside the weights: what they are, what made them, how good they are."""
    size = {part: (folder / f"{part}.safetensors").stat().st_size / 1e6 for part in tiny.PARTS}
    decibels = scores["detectors"]["reconstruction"]["psnr"]
    columns = (*evaluate.COLUMNS, "residual")
    videos = {number: [values[c] for c in columns] for number, values in enumerate(scores["video"]["windows"], 1)}
    detectors = {what: [values[c] for c in columns] for what, values in scores["detectors"].items()}
    return f"""# Weights of the built-in model

Written by the command below; nothing in them comes from anywhere else. bfloat16, Apache-2.0 like the code.

    {origin["command"]}

Seed {origin["seed"]}; last stage: {origin["stage"]}, {origin["step"]} steps.

{markdown(("file", "MB"), {part: [number] for part, number in size.items()})}

{markdown(("stage", "minutes"), {stage: [seconds / 60] for stage, seconds in run.seconds().items()})}

Share of {scores["video"]["prompts"]} random prompts that the video follows, 4 steps, chunk by chunk, in windows of
{evaluate.WINDOW} frames (`python -m sf_core evaluate --windows {WINDOWS}`):

{markdown(("window", *columns), videos)}

The same detectors on drawn clips and on the autoencoder's reconstructions, which reach {decibels:.1f} dB:

{markdown(("frames", *columns), detectors)}
"""


def markdown(head: tuple[str, ...], rows: dict[object, list[float]]) -> str:
    """A table: first the rows' names, then their numbers."""
    lines = [head, ["---"] * len(head), *([str(name), *(f"{n:.3f}" for n in row)] for name, row in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
