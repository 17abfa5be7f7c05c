"""Training data: prompts alone, captioned clips, or the tiny world's procedural ones.

Every dataset gives captions; those with clips give batches of latents too. Which ones is drawn per sample
(step_random.py). Clips are encoded once, into the run's folder, each process a share of them. Beside the latents stands
what they were made from; where that changes they are made again.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ..autoencoders.stream import pixel_frames
from ..tiny.data import Clips, caption, draw, render
from ..video import read_video
from .config import DataConfig, TrainConfig
from .distributed import Group
from .encoders import Encoders, check_prompts
from .run_folder import fingerprint, write_atomically
from .step_random import StepRandom

VIDEOS = (".mp4", ".webm", ".gif", ".mov", ".mkv", ".avi")
POOL, ORIGIN = "latents.pt", "latents.json"
ENCODE_BATCH = 64  # procedural clips that are drawn and encoded at a time


@dataclass(frozen=True)
class Batch:
    """Batch of clips [B, C, F, H, W] in model space with captions, "" where one is left out.

    late   bool [B]: which clips begin in the middle, and so not with a still
    """

    clips: Tensor
    captions: list[str]
    late: Tensor


class Dataset(Protocol):
    """Captions, and clips where there are some, of the samples of a step."""

    def captions(self, random: StepRandom, purpose: str) -> list[str]: ...

    def batch(self, random: StepRandom, purpose: str, frames: int, plain: bool = False) -> Batch: ...


@dataclass(frozen=True)
class PromptList:
    """Prompts, the lines of a text file."""

    lines: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> PromptList:
        """Raises FileNotFoundError, and ValueError for a file without a prompt."""
        if not path.is_file():
            raise FileNotFoundError(f"Got no file {path}; data.prompts is a text file with a prompt a line. Write one.")
        lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        if not lines:
            raise ValueError(f"Got {path}, which is empty; training needs at least one prompt. Write one a line.")
        return cls(lines)

    def captions(self, random: StepRandom, purpose: str) -> list[str]:
        return [self.lines[row] for row in random.integers(f"{purpose} prompt", len(self.lines))]

    def batch(self, random: StepRandom, purpose: str, frames: int, plain: bool = False) -> Batch:
        raise ValueError("Got prompts alone where clips are needed; give data.clips.")


class ClipPool(ABC):
    """Encoded clips [n, C, F, H, W] and how to caption them."""

    def __init__(self, latents: Tensor, config: DataConfig) -> None:
        self.latents, self.config = latents, config

    def captions(self, random: StepRandom, purpose: str) -> list[str]:
        return self._captions(self._rows(random, purpose), random, purpose)

    def batch(self, random: StepRandom, purpose: str, frames: int, plain: bool = False) -> Batch:
        """A batch, captions dropped and clips late as configured; `plain`: from the beginning, all captions."""
        rows = self._rows(random, purpose)
        late = random.uniform(f"{purpose} late") < (0 if plain else self.config.late)
        dropped = random.uniform(f"{purpose} dropped") < (0 if plain else self.config.dropped)
        clips = [self.latents[row, :, int(skip) : int(skip) + frames] for row, skip in zip(rows, late)]
        named = self._captions(rows, random, purpose)
        captions = ["" if drop else one for one, drop in zip(named, dropped)]
        return Batch(torch.stack(clips).float(), captions, late)

    def _rows(self, random: StepRandom, purpose: str) -> Tensor:
        return random.integers(f"{purpose} clip", len(self.latents))

    @abstractmethod
    def _captions(self, rows: Tensor, random: StepRandom, purpose: str) -> list[str]:
        """Captions of clips by their numbers [B]."""


class FolderClips(ClipPool):
    """The clips of a folder, each with one caption."""

    def __init__(self, latents: Tensor, config: DataConfig, texts: list[str]) -> None:
        super().__init__(latents, config)
        self.texts = texts

    def _captions(self, rows: Tensor, random: StepRandom, purpose: str) -> list[str]:
        return [self.texts[row] for row in rows]


class ProceduralClips(ClipPool):
    """The tiny world's clips, phrased anew each time. Captions alone come from all its combinations, not the pool."""

    def __init__(self, latents: Tensor, config: DataConfig, clips: Clips) -> None:
        super().__init__(latents, config)
        self.clips = clips

    def captions(self, random: StepRandom, purpose: str) -> list[str]:
        split = self.config.procedural
        return [caption(draw(1, one, split), one)[0] for one in random.generators(f"{purpose} prompt")]

    def _captions(self, rows: Tensor, random: StepRandom, purpose: str) -> list[str]:
        phrased = zip(rows, random.generators(f"{purpose} caption"))
        return [caption(self.clips[row[None]], generator)[0] for row, generator in phrased]


def open_data(config: TrainConfig, encoders: Encoders, group: Group) -> Dataset:
    """The dataset of a run, its clips encoded.

    Raises FileNotFoundError and ValueError for folders and files that hold nothing to learn from.
    """
    data, frames = config.data, max(config.flow.frames, config.rollout.frames) + (config.data.late > 0)
    if data.prompts:
        prompts = PromptList.read(data.prompts)
        check_prompts(encoders, prompts.lines)
        return prompts
    if data.clips:
        pairs = list_clips(data.clips)
        texts = [_read_caption(text) for _, text in pairs]
        check_prompts(encoders, texts)
        return FolderClips(_folder_latents([video for video, _ in pairs], frames, config, encoders, group), data, texts)
    if data.procedural not in ("trained", "held-out", "all"):
        raise ValueError(f"Got data.procedural {data.procedural!r}; there is trained, held-out, all.")
    clips = draw(data.pool, torch.Generator().manual_seed(config.seed + 1), data.procedural)
    if not config.needs_clips:
        return ProceduralClips(torch.empty(0), data, clips)
    return ProceduralClips(_procedural_latents(clips, frames, config, encoders, group), data, clips)


def list_clips(folder: Path) -> list[tuple[Path, Path]]:
    """(video, caption) of every clip of a folder, in order of their names. Raises as `open_data` does."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Got no folder {folder}; data.clips holds videos, each beside a .txt with its caption (a.mp4, a.txt)."
        )
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in VIDEOS]
    videos = {path.stem: path for path in files}
    twice = [path for path in files if videos[path.stem] != path]
    if twice:
        raise ValueError(
            f"Got {twice[0].name} and {videos[twice[0].stem].name} in {folder}, which would share a caption. Give each "
            "clip a name of its own, or move one away."
        )
    texts = {path.stem: path for path in sorted(folder.glob("*.txt"))}
    if not videos and not texts:
        raise ValueError(f"Got {folder}, which holds no videos ({', '.join(VIDEOS)}). Put clips and captions there.")
    for ones, others, what, missing in (
        (texts, videos, "captions without clips", "a video"),
        (videos, texts, "clips without captions", "a .txt"),
    ):
        alone = sorted(ones.keys() - others.keys())
        if alone:
            raise ValueError(
                f"Got {len(alone)} {what} in {folder} (such as {ones[alone[0]].name}); each needs {missing} of the "
                "same name. Add it, or move the file away."
            )
    return [(videos[stem], texts[stem]) for stem in videos]


def _read_caption(path: Path) -> str:
    text = path.read_text(encoding="utf-8").strip()
    if not text:
        raise ValueError(f"Got {path}, which is empty; it is the caption of a clip. Write what the clip shows.")
    return text


def _folder_latents(videos: list[Path], frames: int, config: TrainConfig, encoders: Encoders, group: Group) -> Tensor:
    needed, model = pixel_frames(frames), config.model

    def encode(video: Path) -> Tensor:
        pixels = read_video(video, needed, (model.height, model.width))
        if len(pixels) < needed:
            raise ValueError(
                f"Got {video} with {len(pixels)} frames; a clip of {frames} latent frames takes {needed}. Give longer "
                "clips, or set flow.frames and rollout.frames lower."
            )
        return encoders.encode(pixels[None])

    stats = [video.stat() for video in videos]
    files = [[video.name, one.st_size, one.st_mtime_ns] for video, one in zip(videos, stats)]
    origin = {"files": files, "width": model.width, "height": model.height}
    return _encode_pool(config, encoders, group, {**origin, "frames": frames}, videos, encode)


def _procedural_latents(clips: Clips, frames: int, config: TrainConfig, encoders: Encoders, group: Group) -> Tensor:
    parts = [clips[at : at + ENCODE_BATCH] for at in range(0, len(clips), ENCODE_BATCH)]
    origin = {"procedural": config.data.procedural, "pool": len(clips), "seed": config.seed, "frames": frames}
    return _encode_pool(
        config, encoders, group, origin, parts, lambda part: encoders.encode(render(part, pixel_frames(frames)))
    )


def _encode_pool(
    config: TrainConfig, encoders: Encoders, group: Group, origin: dict, pieces: Sequence, encode: Callable[..., Tensor]
) -> Tensor:
    """The latents of the run's clips, encoded once for each `origin` and autoencoder; all processes share the work.

    Raises as `encode` does.
    """
    path, origin_path = config.out / POOL, config.out / ORIGIN
    wanted = json.dumps({**origin, "autoencoder": fingerprint(encoders.vae.state_dict())})
    if not (path.is_file() and origin_path.is_file() and origin_path.read_text() == wanted):
        if path.is_file() and group.first:
            tqdm.write(f"{path} was not made from these clips by this autoencoder; they are encoded again")
        first, end = (len(pieces) * rank // group.size for rank in (group.rank, group.rank + 1))
        mine = [encode(piece).bfloat16().cpu() for piece in pieces[first:end]]
        write_atomically(_share_path(path, group.rank), lambda partial: torch.save(mine, partial))
        group.wait()
        if group.first:
            _join(path, origin_path, wanted, group.size)
        group.wait()
    return torch.load(path, weights_only=True, mmap=True)


def _join(path: Path, origin_path: Path, wanted: str, size: int) -> None:
    """Puts the processes' shares together. What they were made from is written last: a kill leaves no wrong pair."""
    shares = [_share_path(path, rank) for rank in range(size)]
    latents = torch.cat([latents for share in shares for latents in torch.load(share, weights_only=True)])
    origin_path.unlink(missing_ok=True)
    write_atomically(path, lambda partial: torch.save(latents, partial))
    write_atomically(origin_path, lambda partial: partial.write_text(wanted))
    for share in shares:
        share.unlink()


def _share_path(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.stem}-{rank}{path.suffix}")
