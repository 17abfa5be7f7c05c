"""The comparison: what rolling out one's own generations brings over teacher forcing and diffusion forcing.

    python -m sf_core train tiny --stage autoencoder; python -m sf_core train tiny --stage teacher
    python -m benchmarks.compare --runs runs/tiny --out runs/compare --part 1/2 &
    python -m benchmarks.compare --runs runs/tiny --out runs/compare --part 2/2; wait
    python -m benchmarks.compare --runs runs/tiny --out runs/compare --table

From one bidirectional teacher, chunk-wise (3 latent frames) and frame-wise, for every seed: a causal model by teacher
forcing, one by diffusion forcing; from the first, for equal updates, DMD on teacher-forced context, DMD on its own
output (nothing else differs), and Self Forcing as it ships, with DMD, SiD and GAN. Every model makes the same videos,
longer than training clips were, and is scored as by `python -m sf_core evaluate`, and so are the shipped model and any
other that was exported (`--model`). A run that was stopped goes on where it was; what is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sf_core import tiny
from sf_core.cli import evaluate
from sf_core.sampling.config import PRESETS, Sampling
from sf_core.training.config import TrainConfig, read_config
from sf_core.training.distributed import Group
from sf_core.training.encoders import load_tiny_autoencoder
from sf_core.training.run_folder import MODEL, fingerprint
from sf_core.training.train import TEXT, train
from sf_core.video import contact_sheet

LAYOUTS = {"chunk-wise": 3, "frame-wise": 1}
SCORES, TABLE, SHEET = "scores.json", "table.md", "videos.png"
COLUMNS = ("all", "shape", "motion", "colour", "background", "residual", "sharpness")
TOLD = (1, 4, 10)  # windows of the table: as long as training clips were, and later
SHOWN = 2  # videos of the picture
EXPORTED = "chunk-wise"  # the layout of exported models


@dataclass(frozen=True)
class Row:
    """A way to train: the shipped configuration it is, what it starts from, and what it changes."""

    config: str
    start: str
    changes: tuple[str, ...] = ()
    initial: bool = False  # trained as long as what others start from


ROWS = {
    "teacher forcing": Row("tiny-causal", "teacher", initial=True),
    "diffusion forcing": Row("tiny-diffusion-forcing", "teacher", initial=True),
    "DMD, teacher-forced context": Row(
        "tiny-dmd", "teacher forcing", ("loss.context=teacher-forced", "rollout.extra_chunks=0")
    ),
    "Self Forcing, DMD": Row("tiny-dmd", "teacher forcing"),
    "Self Forcing, SiD": Row("tiny-sid", "teacher forcing"),
    "Self Forcing, GAN": Row("tiny-gan", "teacher forcing"),
    "Self Forcing, DMD, no extra chunks": Row("tiny-dmd", "teacher forcing", ("rollout.extra_chunks=0",)),
}


@dataclass(frozen=True)
class Cell:
    """One model of the table."""

    layout: str
    seed: int
    row: str

    def folder(self, out: Path) -> Path:
        name = self.row.lower().replace(",", "").replace(" ", "-")
        return out / self.layout / f"{name}-{self.seed}"


def cells(args: argparse.Namespace) -> list[Cell]:
    """Of the rows that are asked for, with those that they start from: all, or those of part i of n.

    Layouts and seeds are dealt out, so that no part waits for another.
    """
    number, _, parts = args.part.partition("/")
    groups = [(layout, seed) for seed in range(args.seeds) for layout in LAYOUTS if args.layout in (None, layout)]
    mine = groups[int(number) - 1 :: int(parts)]
    asked = args.row or list(ROWS)
    rows = [row for row in ROWS if row in asked or row in {ROWS[one].start for one in asked}]
    return [Cell(layout, seed, row) for layout, seed in mine for row in rows]


def config_of(cell: Cell, args: argparse.Namespace) -> TrainConfig:
    row = ROWS[cell.row]
    before = Cell(cell.layout, cell.seed, row.start).folder(args.out)
    start = args.runs / "teacher" if row.initial else before
    places = {"out": cell.folder(args.out), "model.student": start, "model.vae": args.runs / "autoencoder"}
    if not row.initial:
        places["model.teacher"] = args.runs / "teacher"
    steps = args.initial_steps if row.initial else args.steps
    return read_config(
        row.config,
        (
            *(f"{name}={json.dumps(str(path))}" for name, path in places.items()),
            f"seed={cell.seed}",
            f"steps={steps}",
            f"batch={args.batch}",
            f"data.pool={args.pool}",
            f"sampling.chunk={LAYOUTS[cell.layout]}",
            "log.save_every=25",
            *row.changes,
        ),
    )


def measured(folder: Path, sampling: Sampling, args: argparse.Namespace) -> dict:
    """Scores of a model per window, and the first videos of them, [SHOWN, T, 64, 64, 3] in bytes."""
    clips, prompts = evaluate.ask(args.prompts, seed=0)
    wan = tiny.load_transformer(path=evaluate.transformer(folder))
    text = tiny.load_text_encoder(folder / TEXT)
    vae = load_tiny_autoencoder(evaluate.sibling_file(folder / MODEL, "autoencoder") or args.runs / "autoencoder")
    shown: list[Tensor] = []

    def watched():
        for videos in evaluate.generate(wan, vae, text.encode(prompts), args.windows, sampling=sampling):
            shown.append(videos[: SHOWN - sum(map(len, shown))])
            yield videos

    return {"windows": evaluate.score(watched(), clips, args.windows), "videos": torch.cat(shown)}


def score(folder: Path, out: Path, sampling: Sampling, args: argparse.Namespace) -> None:
    """Writes the scores of the model in `folder` and its first videos, once."""
    files = sorted(folder.glob("*.safetensors"))  # other weights are other scores
    settings = [args.prompts, args.windows, *(fingerprint(tiny.read(file)[0]) for file in files)]
    if (out / SCORES).is_file() and json.loads((out / SCORES).read_text())["settings"] == settings:
        return
    found = measured(folder, sampling, args)
    out.mkdir(parents=True, exist_ok=True)
    numbers = range(0, found["videos"].shape[1], evaluate.WINDOW // 2)
    frames = found["videos"][:, numbers]
    contact_sheet(frames.flatten(0, 1), [*numbers] * len(frames), len(numbers)).save(out / SHEET)
    (out / SCORES).write_text(json.dumps({"settings": settings, "windows": found["windows"]}))


def run(cell: Cell, args: argparse.Namespace) -> None:
    config = config_of(cell, args)
    train(config, Group(), torch.device("cpu"))
    score(config.out, config.out, config.sampling, args)


def exported(args: argparse.Namespace) -> dict[str, Path]:
    """Where the scores of exported models are, by name."""
    return {name: args.out / "models" / name.replace(" ", "-") for name, _ in args.model}


def table(args: argparse.Namespace) -> str:
    """Markdown, a table for each layout and each of some windows: mean and spread over seeds.

    The last column says how the residual grew since the first window.
    """
    tables = []
    for layout in LAYOUTS:
        files = {row: [Cell(layout, seed, row).folder(args.out) for seed in range(args.seeds)] for row in ROWS}
        if layout == EXPORTED:
            files = {name: [folder] for name, folder in exported(args).items()} | files
        found = {
            name: [json.loads(f.read_text())["windows"] for f in scored(folders)] for name, folders in files.items()
        }
        for number in sorted({min(number, args.windows) for number in TOLD}):
            named = {name: of for name, of in found.items() if of and min(map(len, of)) >= number}
            head = [f"{layout}, window {number}", "seeds", *COLUMNS, "residual growth"]
            lines = [head, ["---"] * len(head), *(line_of(name, scores, number) for name, scores in named.items())]
            if named:
                tables.append("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    return "\n".join(tables)


def scored(folders: list[Path]) -> list[Path]:
    return [folder / SCORES for folder in folders if (folder / SCORES).is_file()]


def picture(layout: str, args: argparse.Namespace) -> Path | None:
    """The first videos of the first seed's models, one below the other under their names: LAYOUT.png."""
    sheets = {row: Cell(layout, 0, row).folder(args.out) / SHEET for row in ROWS}
    if layout == EXPORTED:
        sheets = {name: folder / SHEET for name, folder in exported(args).items()} | sheets
    images = [(name, Image.open(file)) for name, file in sheets.items() if file.is_file()]
    if not images:
        return None
    line = 20
    whole = Image.new(
        "RGB", (max(image.width for _, image in images), sum(image.height + line for _, image in images)), "white"
    )
    top = 0
    for name, image in images:
        ImageDraw.Draw(whole).text((4, top + 4), name, fill="black")
        whole.paste(image, (0, top + line))
        top += image.height + line
    whole.save(args.out / f"{layout}.png")
    return args.out / f"{layout}.png"


def line_of(name: str, scores: list[list[dict[str, float]]], number: int) -> list[str]:
    """A model in one window, from the windows' scores for each seed."""
    now, first = ([windows[i] for windows in scores] for i in (number - 1, 0))
    growth = [later["residual"] - before["residual"] for later, before in zip(now, first, strict=True)]
    return [name, str(len(scores)), *(spread([values[c] for values in now]) for c in COLUMNS), spread(growth)]


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ±{statistics.stdev(values):.3f}"


def part(text: str) -> str:
    """i/n with i in 1..n."""
    if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", text) or int(text.partition("/")[0]) > int(text.partition("/")[2]):
        raise argparse.ArgumentTypeError(f"Got {text!r}; it is i/n with i from 1 to n. Use e.g. 1/2 and 2/2.")
    return text


def named(text: str) -> tuple[str, Path]:
    """NAME=FOLDER of an exported model."""
    name, _, folder = text.partition("=")
    if not name or not (Path(folder) / "transformer.safetensors").is_file():
        raise argparse.ArgumentTypeError(
            f"Got {text!r}; it is NAME=FOLDER of a model that `train tiny --stage export --weights FOLDER` wrote."
        )
    return name, Path(folder)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--runs", type=Path, default=Path("runs/tiny"), help="where the teacher and the autoencoder are (runs/tiny)")
    add("--out", type=Path, default=Path("runs/compare"), help="folder for models and scores (runs/compare)")
    add("--seeds", type=int, default=3)
    add("--initial-steps", type=int, default=300, help="updates of teacher and diffusion forcing (300)")
    add("--steps", type=int, default=150, help="updates of the others (150)")
    add("--batch", type=int, default=16)
    add("--pool", type=int, default=4096, help="clips that are drawn once (4096)")
    add("--prompts", type=int, default=96)
    add("--windows", type=int, default=10, help="windows of 36 frames to score; the first is as long as training (10)")
    add("--model", type=named, action="append", metavar="NAME=FOLDER", help="one more exported model")
    add(
        "--row",
        action="append",
        choices=ROWS,
        metavar="ROW",
        help=f"only this row, with what it starts from: {', '.join(map(repr, ROWS))} (all)",
    )
    add("--layout", choices=LAYOUTS, help="only this layout (both)")
    add("--part", type=part, default="1/1", help="only part i/n of the work (1/1)")
    add("--table", action="store_true", help="only write the table of what is there")
    parser.set_defaults(model=[("the shipped model", tiny.WEIGHTS)])
    return parser


def main() -> None:
    args = arguments().parse_args()
    torch.set_num_threads(1)
    if not args.table:
        if args.part.startswith("1/"):
            for (_, folder), out in zip(args.model, exported(args).values(), strict=True):
                score(folder, out, PRESETS["tiny"], args)
        for cell in cells(args):
            run(cell, args)
    args.out.mkdir(parents=True, exist_ok=True)
    written = table(args)
    for layout in LAYOUTS:
        picture(layout, args)
    (args.out / TABLE).write_text(written)
    sys.stdout.write(written)


if __name__ == "__main__":
    main()
