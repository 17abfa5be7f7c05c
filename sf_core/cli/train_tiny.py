"""Trains the built-in model from nothing: autoencoder, teacher, causal model, few-step model, decoder, export.

Each stage is a shipped configuration of the training library (sf_core/training/configs/tiny-*.yaml) and starts from
the one before; a stage that was stopped continues from its checkpoint. A GPU is used where there is one. On a CPU two
processes share every batch; on networks this small that is the only use of a second core that pays.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from .. import tiny
from ..sampling.config import PRESETS
from ..tiny.autoencoder import TinyAutoencoder
from ..tiny.text import TinyTextEncoder
from ..training.config import AUTOENCODER_METHODS, TrainConfig, read_config
from ..training.distributed import Group, local_device
from ..training.memory import check_memory
from ..training.run_folder import MODEL, load_run, save_model
from ..training.train import TEXT, model_metadata, train
from ..training.trainer import config_dict, flatten
from . import evaluate
from .arguments import int_in, seed

STAGES = ("autoencoder", "teacher", "causal", "dmd", "decoder")
MODELS = ("dmd", "causal", "teacher")  # what can be exported, best first
SCORED, WINDOWS = 96, 4  # prompts and windows of the scores written beside the weights
CPU = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    out = "folder for the stages' folders; a stage continues from its own (runs/tiny)"
    add("--out", type=Path, default=Path("runs/tiny"), help=out)
    add("--stage", choices=(*STAGES, "export"), help="do only this stage (all, then export)")
    add("--steps", type=int_in(1, 10**9), metavar="N", help="steps of the stage, instead of the recipe's")
    add("--processes", type=int_in(1, 1024), default=2, help="processes that share each batch on a CPU (2)")
    add("--seed", type=seed, default=0, help="of weights, data and noise (0); an export has that of its run")
    add("--weights", type=Path, default=tiny.WEIGHTS, help="folder that the model is exported to (the package's own)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help="change a value of the stages")


def run(args: argparse.Namespace) -> str:
    if args.steps and args.stage not in STAGES:
        raise ValueError("Got --steps without a stage to apply it to; add --stage, one of " + ", ".join(STAGES) + ".")
    for stage in [args.stage] if args.stage else [*STAGES, "export"]:
        if stage == "export":
            return export(Recipe(args.out), args.weights)
        steps = [f"steps={args.steps}"] if args.steps else []
        fit(stage_config(stage, args.out, args.seed, (*args.changes, *steps)), args.processes)
    return f"{args.out}: {args.stage} done"


@dataclass(frozen=True)
class Recipe:
    """Where the stages of a run are."""

    folder: Path

    def saved(self, stage: str) -> dict:
        """A stage's checkpoint. Raises FileNotFoundError where it has none."""
        return load_run(self.folder / stage)

    def furthest(self) -> str:
        exported = (stage for stage in MODELS if (self.folder / stage / MODEL).exists())
        return next(exported, "teacher")

    def autoencoder(self) -> str:
        """The stage whose autoencoder is exported: "decoder", which changes what goes with the few-step model alone."""
        return "decoder" if "decoder" in self.done() and self.furthest() == "dmd" else "autoencoder"

    def seconds(self) -> dict[str, float]:
        """Wall-clock time of each stage so far."""
        return {stage: self.saved(stage)["seconds"] for stage in self.done()}

    def done(self) -> list[str]:
        return [stage for stage in STAGES if (self.folder / stage / MODEL).exists()]

    def seed(self, stage: str) -> int:
        return json.loads(self.saved(stage)["config"])["seed"]

    def command(self) -> str:
        """What trains the same again, from what the checkpoints say: one command, or one for each stage."""
        options = {stage: self.options(stage) for stage in self.done()}
        if len(set(options.values())) == 1:
            return f"python -m sf_core train tiny{options.popitem()[1]}"
        return "; ".join(f"python -m sf_core train tiny --stage {stage}{own}" for stage, own in options.items())

    def options(self, stage: str) -> str:
        """How a stage differs from its shipped configuration, apart from where its files are."""
        made, seed = flatten(json.loads(self.saved(stage)["config"])), self.seed(stage)
        shipped = flatten(config_dict(stage_config(stage, self.folder, seed)))
        places = ("out", "model.student", "model.teacher", "model.vae")
        changed = [key for key in made if key in shipped and key not in places and made[key] != shipped[key]]
        return f" --seed {seed}" + "".join(f" --set {shlex.quote(f'{key}={json.dumps(made[key])}')}" for key in changed)


def stage_config(stage: str, out: Path, seed: int = 0, changes: Sequence[str] = ()) -> TrainConfig:
    """The shipped configuration of a stage, its folders under `out`."""
    places = {"out": out / stage, "model.vae": out / "autoencoder"} if stage != "autoencoder" else {"out": out / stage}
    before = {
        "causal": {"student": "teacher"},
        "dmd": {"student": "causal", "teacher": "teacher"},
        "decoder": {"student": "dmd"},
    }
    places |= {f"model.{name}": out / source for name, source in before.get(stage, {}).items()}
    moved = [f"{name}={json.dumps(str(path))}" for name, path in places.items()]
    return read_config(f"tiny-{stage}", (*moved, f"seed={seed}", *changes))


def fit(config: TrainConfig, processes: int) -> None:
    """One stage, on a CPU in as many processes as asked for (those of the autoencoder in one)."""
    device = local_device(config.device)
    if device.type != "cpu" or processes == 1 or config.method in AUTOENCODER_METHODS:
        return train(config, Group(), device)
    check_memory(config, processes, CPU)  # here, where an error is one line
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(work, (config, processes, f"file://{folder}/meet"), processes)
        except torch.multiprocessing.ProcessRaisedException as error:
            message = str(error).strip().splitlines()[-1]  # "SomeError: Got ..."
            raise ValueError(message.partition(": ")[2] or message) from error


def work(rank: int, config: TrainConfig, processes: int, meet: str) -> None:
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=processes)
    try:
        train(config, Group(rank, processes), CPU)
    finally:
        dist.destroy_process_group()


def export(recipe: Recipe, folder: Path) -> str:
    """Writes the three parts in bfloat16, of the furthest stage there is, and README.md; returns the scores."""
    stage = recipe.furthest()
    saved = recipe.saved(stage)
    origin = {"command": recipe.command(), "seed": str(recipe.seed(stage)), "stage": stage, "step": str(saved["step"])}
    about = {**origin, **model_metadata(stage_config(stage, recipe.folder), saved["wan"])}
    about["sampling"] = json.dumps(asdict(PRESETS["tiny"]))  # which may have found better ways than training had
    words = {**origin, "words": json.dumps(saved["words"])}

    def write(part: str, state: dict, metadata: dict[str, str]) -> None:
        save_model(folder / f"{part}.safetensors", state, metadata, torch.bfloat16)

    write("autoencoder", recipe.saved(recipe.autoencoder())["student"], origin)
    write("text_encoder", saved["text"], words)
    write("transformer", saved["student"], about)
    scores = measure(folder)
    write("transformer", saved["student"], {**about, "scores": json.dumps(scores)})
    (folder / "README.md").write_text(readme(recipe, folder, origin, scores))
    return evaluate.table({"model": f"{folder}, {stage}", **scores["video"]})


def measure(folder: Path) -> dict:
    """Scores of an exported model: videos of SCORED prompts, and the detectors' on truth and on reconstructions."""
    wan, text, vae = tiny.load_transformer(path=folder / "transformer.safetensors"), *load_others(folder)
    clips, prompts = evaluate.ask(SCORED, seed=0)
    windows = evaluate.score(evaluate.generate(wan, vae, text.encode(prompts), WINDOWS), clips, WINDOWS)
    return {"video": {"prompts": SCORED, "windows": windows}, "detectors": evaluate.score_truth(SCORED, 0, vae)}


def load_others(folder: Path) -> tuple[TinyTextEncoder, TinyAutoencoder]:
    encoder = tiny.load_text_encoder(folder / TEXT)
    return encoder, tiny.load_autoencoder(folder / "autoencoder.safetensors")


def readme(recipe: Recipe, folder: Path, origin: dict[str, str], scores: dict) -> str:
    """README.md beside the weights: what they are, what made them, how good they are."""
    size = {part: (folder / f"{part}.safetensors").stat().st_size / 1e6 for part in tiny.PARTS}
    decibels = scores["detectors"]["reconstruction"]["psnr"]
    columns = (*evaluate.COLUMNS, *evaluate.MEASURES)
    videos = {number: [values[c] for c in columns] for number, values in enumerate(scores["video"]["windows"], 1)}
    detectors = {what: [values[c] for c in columns] for what, values in scores["detectors"].items()}
    return f"""# Weights of the built-in model

Written by the command below; nothing in them comes from anywhere else. bfloat16, Apache-2.0 like the code.

    {origin["command"]}

Seed {origin["seed"]}; last stage: {origin["stage"]}, {origin["step"]} steps.

{markdown(("file", "MB"), {part: [number] for part, number in size.items()})}

{markdown(("stage", "minutes"), {stage: [seconds / 60] for stage, seconds in recipe.seconds().items()})}

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
