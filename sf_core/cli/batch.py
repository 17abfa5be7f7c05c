"""Makes many videos, one for each prompt of a file and each seed; a run that was stopped goes on where it was.

    python -m sf_core batch prompts.txt --out videos/ --samples 5 --names vbench
    torchrun --nproc-per-node 8 -m sf_core batch prompts.csv --out videos/ --model FILE ...

A text file has a prompt a line; a CSV has a column `prompt`, and if it likes `seed` and `name`. Every process that
torchrun started takes its share of the videos, each the same as if one process made them all. What was made stands in
the folder's records, a line of JSON each (batch*.jsonl), and in batch.csv. What a record calls finished, and is still
there, is not made again; all else is, leftovers of a killed run too.
"""

from __future__ import annotations

import argparse
import csv
import glob
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..device import HostCopy, Result, Timer, release_memory, within_memory
from ..pipeline import Pipeline, Request, TinyPipeline, drop_frames
from ..sampling.noise import MAX_SEED
from ..training.distributed import local_device
from ..video import check_folder, check_outputs, save_video
from ..video.destination import LONGEST, holds_own_frames
from ..worker import run_beside
from . import generate
from .arguments import int_in

RECORDS, TABLE = "batch*.jsonl", "batch.csv"
COLUMNS = ("file", "prompt", "seed", "frames", "width", "height", "fps", "seconds", "error", "settings")
FORMATS = {"mp4": ".mp4", "webm": ".webm", "gif": ".gif", "png": "/"}
NAMES = ("number", "vbench")
MOST_SAMPLES = 10_000
SLUG = 48  # characters of a prompt in a file's name
OTHERS = ("prompts", "out", "seed", "samples", "names", "format", "json")  # that are not of every video
NOT_SEEN = ("device", "dtype", "compile", "attention", "tile")  # how it is computed, not what


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompts", type=Path, metavar="FILE", help="prompts: a text file with one a line, or a .csv")
    add("--out", type=Path, required=True, metavar="FOLDER", help="output folder; it is made where it is not there")
    add("--seed", type=int_in(0, MAX_SEED), default=0, help="seed of the first sample (0); a CSV's own comes before it")
    samples = "samples of each prompt (1), with seeds that follow each other"
    add("--samples", type=int_in(1, MOST_SAMPLES), default=1, metavar="N", help=samples)
    names = "names of files: number, words and seed; or vbench, PROMPT-SAMPLE (number)"
    add("--names", choices=NAMES, default="number", help=names)
    add("--format", choices=FORMATS, default="mp4", help="format of the videos (mp4); png: a folder each")
    add("--json", action="store_true", help="report of what was done as JSON")
    generate.add_video(parser)


# --- What is to be made ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """A video to make: its prompt and seed, and its place below the folder; `error` where there can be none."""

    prompt: str
    seed: int
    file: str
    error: str | None = None


@dataclass(frozen=True)
class Row:
    """A line of the prompts' file; `number` from 1. `error` says what is wrong with it."""

    number: int
    prompt: str
    seed: int | None = None
    name: str = ""
    error: str | None = None


def read_rows(path: Path) -> list[Row]:
    """The prompts of a file. Raises OSError where there is none, ValueError for one that holds none."""
    text = generate.read_prompt(path)
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if "prompt" not in (reader.fieldnames or ()):
            found = ", ".join(reader.fieldnames or ()) or "nothing"
            raise ValueError(f"Got {path}, whose first line has {found}; a column named prompt is needed. Name it so.")
        rows = [_row(number, line) for number, line in enumerate(reader, 1)]
    else:
        lines = filter(None, map(str.strip, text.splitlines()))
        rows = [Row(number, line) for number, line in enumerate(lines, 1)]
    if not rows:
        raise ValueError(f"Got {path}, with no prompts in it. Write one a line.")
    return rows


def _row(number: int, line: dict) -> Row:
    prompt, seed, name = ((line.get(column) or "").strip() for column in ("prompt", "seed", "name"))
    try:
        return Row(number, prompt, int_in(0, MAX_SEED)(seed) if seed else None, name)
    except argparse.ArgumentTypeError as error:
        return Row(number, prompt, None, name, f"Row {number}, seed: {error}")


def items_of(rows: Iterable[Row], args: argparse.Namespace) -> list[Item]:
    """All videos, in order. Raises ValueError where two would have one name."""
    items = []
    for row in rows:
        for sample in range(args.samples):
            seed = (args.seed if row.seed is None else row.seed) + sample
            name = _name(row, seed, sample, args)
            file = name + FORMATS[args.format]
            items.append(Item(row.prompt, seed, file, row.error or _problem(file.rstrip("/"), seed)))
    seen: dict[str, Item] = {}
    for item in items:
        if item.error is None and (other := seen.setdefault(item.file.casefold(), item)) is not item:
            raise ValueError(
                f"Got two videos that would be {item.file!r}: {other.prompt!r} and {item.prompt!r}. Remove one, give "
                "them a column `name` in a CSV, or use --names number."
            )
    return items


def _name(row: Row, seed: int, sample: int, args: argparse.Namespace) -> str:
    if row.name:
        return row.name if args.samples == 1 else f"{row.name}-{sample}"
    if args.names == "vbench":
        return f"{row.prompt}-{sample}"
    slug = re.sub(r"[^\w]+", "-", row.prompt.lower())[:SLUG].strip("-")
    return "-".join(filter(None, (f"{row.number:04}", slug, f"seed{seed}")))


def _problem(name: str, seed: int) -> str | None:
    """Why a name can be no file's here, or a seed none."""
    if re.search(r"[/\\\0]", name) or name.startswith("."):
        return f"Got the name {name!r}; a file's name has no slashes and no dot before it. Give it a `name` in a CSV."
    if (length := len(os.fsencode(name))) > LONGEST:
        return f"Got a name of {length} bytes, {name[:24]!r}...; {LONGEST} are allowed. Give it a `name` in a CSV."
    if seed > MAX_SEED:
        return f"Got the seed {seed}; the largest is {MAX_SEED}."
    return None


# --- What was made ---------------------------------------------------------------------------------------------------


class Records:
    """What was made so far in a folder, by all processes: a line of JSON for each video, the last one counts."""

    def __init__(self, folder: Path, own: str) -> None:
        self.folder, self.path = folder, folder / own
        self.entries = self._read()

    def _read(self) -> dict[str, dict]:
        entries: dict[str, dict] = {}
        for path in sorted(self.folder.glob(RECORDS)):
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("}\n"):  # or it was cut short by a kill
                    entry = json.loads(line)
                    if entry["time"] >= entries.get(entry["file"], entry)["time"]:
                        entries[entry["file"]] = entry
        return entries

    def finished(self, item: Item) -> bool:
        """Whether an item's video was made and is whole."""
        entry = self.entries.get(item.file)
        return entry is not None and entry["error"] is None and entry["bytes"] == size_of(self.folder / item.file)

    def check(self, items: Iterable[Item], settings: dict) -> None:
        """Raises ValueError where the folder has another video under an item's name."""
        for item in items:
            if not self.finished(item):
                continue
            entry = self.entries[item.file]
            had = {"prompt": entry["prompt"], "seed": entry["seed"], **entry["settings"]}
            wanted = {"prompt": item.prompt, "seed": item.seed, **settings}
            if changed := [key for key in wanted.keys() | had.keys() if had.get(key) != wanted.get(key)]:
                key = min(changed)
                raise ValueError(
                    f"Got a folder with {item.file!r} made with {key} {had.get(key)!r} instead of {wanted.get(key)!r}. "
                    "Use another folder, or the settings of then."
                )

    def add(self, entry: dict) -> None:
        entry = {**entry, "time": time.time()}
        self.entries[entry["file"]] = entry
        with self.path.open("ab+") as file:
            file.seek(max(0, file.tell() - 1))
            cut = file.read(1) not in (b"", b"\n")  # by a kill
            file.write(b"\n" * cut + json.dumps(entry).encode() + b"\n")

    def write_table(self) -> None:
        """Writes batch.csv from all records. Whichever process is last has all of them in it: each looks again."""
        while True:
            self.entries = self._read()
            text = io.StringIO()
            table = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
            table.writeheader()
            for _, entry in sorted(self.entries.items()):
                table.writerow({**entry, "settings": json.dumps(entry["settings"])})
            own = self.folder / f".{self.path.stem}.csv"  # of this process alone
            own.write_text(text.getvalue(), encoding="utf-8", newline="")
            own.replace(self.folder / TABLE)
            if self._read() == self.entries:
                return


def size_of(path: Path) -> int | None:
    """Bytes of a file or of all files in a folder; None where there is none."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir())
    return path.stat().st_size if path.is_file() else None


# --- Networks that stay ----------------------------------------------------------------------------------------------


class EncodedPrompts(nn.Module):
    """A text encoder's answers to prompts that are known beforehand, so that it can go before the model comes.

    Embeddings are kept without the zeros behind a prompt's own tokens: thousands of prompts have room.
    """

    def __init__(self, encoder: nn.Module, prompts: Iterable[str]) -> None:
        super().__init__()
        self.answers: dict[str, tuple[Tensor, int, list[str]] | Exception] = {}
        for prompt in dict.fromkeys(prompts):
            try:
                embeds = encoder.encode([prompt]).cpu()  # [1, tokens, width]
                used = int(embeds.abs().amax(-1).nonzero()[:, 1].max()) + 1 if embeds.any() else 0
                self.answers[prompt] = (embeds[:, :used].clone(), embeds.shape[1], encoder.truncated(prompt))
            except Exception as error:  # noqa: BLE001  one prompt is not to end the others
                self.answers[prompt] = error

    def _answer(self, prompt: str) -> tuple[Tensor, int, list[str]]:
        answer = self.answers[prompt]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def encode(self, prompts: list[str]) -> Tensor:
        (prompt,) = prompts
        embeds, tokens, _ = self._answer(prompt)
        return F.pad(embeds, (0, 0, 0, tokens - embeds.shape[1]))

    def truncated(self, prompt: str) -> list[str]:
        return self._answer(prompt)[2]


def keep_networks(pipeline: Pipeline, requests: Sequence[Request]) -> None:
    """Has a pipeline load each network once, for all of these requests."""
    if isinstance(pipeline, TinyPipeline):
        pipeline.load_text_encoder = cache(pipeline.load_text_encoder)
    else:
        texts = [prompt.text for request in requests for prompt in request.prompts]
        texts += [request.negative for request in requests if request.guidance != 1]
        encoded = EncodedPrompts(pipeline.load_text_encoder(), texts)
        release_memory(pipeline.runtime.device)
        pipeline.load_text_encoder = lambda: encoded
    pipeline.load_model = cache(pipeline.load_model)
    pipeline.load_autoencoder = cache(pipeline.load_autoencoder)


# --- The run ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> str:
    rank, processes = (int(os.environ.get(name, usual)) for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1")))
    args.device = local_device(str(args.device))
    items, settings = items_of(read_rows(args.prompts), args), settings_of(args)
    args.out.mkdir(parents=True, exist_ok=True)
    inputs = {"FILE": args.prompts, **generate.input_files(args)}
    for item in items:
        if item.error is None:
            check_outputs({"--out": args.out / item.file}, inputs)
    records = Records(args.out, f"batch-{rank}-of-{processes}.jsonl" if processes > 1 else "batch.jsonl")
    records.check(items, settings)
    mine = items[rank::processes]
    todo = [item for item in mine if not records.finished(item)]
    try:
        make_all(todo, records, settings, args)
    finally:
        records.write_table()
    failed = [entry for item in todo if (entry := records.entries[item.file])["error"]]
    made, there = len(todo) - len(failed), len(mine) - len(todo)
    report = {"out": str(args.out), "made": made, "there": there, "failed": len(failed)}
    if failed:
        raise ValueError(
            f"{failed[0]['error']} (So it was for {failed[0]['prompt']!r}; {len(failed)} of {len(mine)} videos failed, "
            f"{made} were made, {there} were there; see {args.out / TABLE}.)"
        )
    return json.dumps(report) if args.json else f"{args.out}: {made} made, {there} there already"


def settings_of(args: argparse.Namespace) -> dict:
    """What all videos have in common, as plain values."""
    own = {name: value for name, value in vars(args).items() if name not in OTHERS + NOT_SEEN}
    chosen = {name: value for name, value in own.items() if value is not None and value is not False}
    return json.loads(json.dumps(chosen, default=str))


def make_all(items: Sequence[Item], records: Records, settings: dict, args: argparse.Namespace) -> None:
    """Makes videos and records them; one that fails is recorded with its error, and the next one comes."""
    if not items:
        return
    pipeline = generate.read_pipeline(args)
    if pipeline.note:
        generate.note(f"{pipeline.name}: {pipeline.note}")
    if args.device.type == "cpu" and isinstance(pipeline, TinyPipeline):
        torch.set_num_threads(1)  # processes that share a machine keep its cores busy
    asked = [attempt(lambda item=item: request_of(item, pipeline, args)) for item in items]
    keep_networks(pipeline, [request for request, _ in asked if request is not None])
    with tqdm(total=len(items), unit=" videos", file=sys.stderr) as bar:
        for item, (request, error) in zip(items, asked, strict=True):
            began, size = time.perf_counter(), None
            if request is not None:
                size, error = attempt(lambda item=item, request=request: make(item, request, pipeline, args))
            if error:
                generate.note(f"{item.file}: {error}")
            seconds = round(time.perf_counter() - began, 3)
            about = {"seconds": seconds, "bytes": size, "error": error, "fps": args.fps, "settings": settings}
            records.add({"file": item.file, "prompt": item.prompt, "seed": item.seed, **describe(request), **about})
            bar.update()


def describe(request: Request | None) -> dict:
    """Frames, pixels and sampling of a video, where there can be one."""
    if request is None:
        return {}
    size = {"frames": request.frames - request.skipped, "width": request.width, "height": request.height}
    return {**size, "sampling": asdict(request.sampling)}


def attempt(work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """(what some work gives, None), or (None, its error in one line)."""
    try:
        return work(), None
    except Exception as error:  # noqa: BLE001  one video is not to end the others
        return None, " ".join(str(error).split()) or type(error).__name__


def request_of(item: Item, pipeline: Pipeline, args: argparse.Namespace) -> Request:
    """The video of an item. Raises ValueError for one that there cannot be."""
    if item.error:
        raise ValueError(item.error)
    own = argparse.Namespace(**{**vars(args), "prompt": item.prompt, "prompt_file": None, "seed": item.seed})
    request = generate.read_request(own, pipeline)
    generate.check_memory(pipeline.memory_plan(request), args.device)
    check_folder(args.out / item.file)
    return request


def make(item: Item, request: Request, pipeline: Pipeline, args: argparse.Namespace) -> int:
    """Writes an item's video; returns its bytes."""
    path, plan = args.out / item.file, pipeline.memory_plan(request)
    name = f"{path}/" if args.format == "png" else path

    def save(pieces: Iterator[HostCopy]) -> None:
        save_video(name, drop_frames((piece.wait()[0] for piece in pieces), request.skipped), args.fps)

    def write() -> None:
        generation, decoder = pipeline.prepare(request, Timer(args.device), generate.note_ignored)
        run_beside(generation.pieces(decoder, request.frames), save)

    within_memory(write, lambda: generate.out_of_memory(plan, args.device), lambda: release_memory(args.device))
    remove_recovered(path)
    return size_of(path)


def remove_recovered(path: Path) -> None:
    """Removes what `save_video` has recovered of a run that was killed over a video that is now made again."""
    for left in path.parent.glob(f"{glob.escape(path.stem)}.recovered*{path.suffix}"):
        if left.is_file():
            left.unlink(missing_ok=True)
        elif holds_own_frames(left):
            shutil.rmtree(left)
