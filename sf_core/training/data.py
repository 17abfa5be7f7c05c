"""What is learnt from: prompts alone, captioned clips, or the tiny world's procedural ones.

Every source gives captions; sources with clips give batches of latents too. Which ones is drawn per sample
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

from ..tiny.data import Clips, caption, draw, render
from ..video import read_video
from .config import DataConfig, TrainConfig
from .distributed import Group
from .encoders import World, check_prompts
from .run_folder import fingerprint, whole_or_not
from .step_random import Draws

VIDEOS = (".mp4", ".webm", ".gif", ".mov", ".mkv", ".avi")
POOL, MADE_FROM = "latents.pt", "latents.json"
TOGETHER = 64  # procedural clips that are drawn and encoded at a time


@dataclass(frozen=True)
class Batch:
    """Clips [B, C, F, H, W] in model space with captions, "" where one is left out.

    late   bool [B]: which clips begin in the middle, and so not with a still
    """

    clips: Tensor
    captions: list[str]
    late: Tensor


class Source(Protocol):
    def captions(self, draws: Draws, purpose: str) -> list[str]: ...

    def batch(self, draws: Draws, purpose: str, frames: int, plain: bool = False) -> Batch: ...


@dataclass(frozen=True)
class PromptList:
    """Lines of a text file."""

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

    def captions(self, draws: Draws, purpose: str) -> list[str]:
        return [self.lines[row] for row in draws.whole(f"{purpose} prompt", len(self.lines))]

    def batch(self, draws: Draws, purpose: str, frames: int, plain: bool = False) -> Batch:
        raise ValueError("Got prompts alone where clips are needed; give data.clips.")


class ClipPool(ABC):
    """Encoded clips [n, C, F, H, W] and how to caption them."""

    def __init__(self, latents: Tensor, config: DataConfig) -> None:
        self.latents, self.config = latents, config

    def captions(self, draws: Draws, purpose: str) -> list[str]:
        return self._captions(self._rows(draws, purpose), draws, purpose)

    def batch(self, draws: Draws, purpose: str, frames: int, plain: bool = False) -> Batch:
        """Clips as the configuration wants them; `plain`: from their beginning, and with all captions."""
        rows = self._rows(draws, purpose)
        late = draws.uniform(f"{purpose} late") < (0 if plain else self.config.late)
        dropped = draws.uniform(f"{purpose} dropped") < (0 if plain else self.config.dropped)
        clips = [self.latents[row, :, int(skip) : int(skip) + frames] for row, skip in zip(rows, late)]
        named = self._captions(rows, draws, purpose)
        captions = ["" if drop else one for one, drop in zip(named, dropped)]
        return Batch(torch.stack(clips).float(), captions, late)

    def _rows(self, draws: Draws, purpose: str) -> Tensor:
        return draws.whole(f"{purpose} clip", len(self.latents))

    @abstractmethod
    def _captions(self, rows: Tensor, draws: Draws, purpose: str) -> list[str]:
        """Captions of clips by their numbers [B]."""


class FolderClips(ClipPool):
    """The clips of a folder, each with one caption."""

    def __init__(self, latents: Tensor, config: DataConfig, texts: list[str]) -> None:
        super().__init__(latents, config)
        self.texts = texts

    def _captions(self, rows: Tensor, draws: Draws, purpose: str) -> list[str]:
        return [self.texts[row] for row in rows]


class ProceduralClips(ClipPool):
    """The tiny world's clips, phrased anew each time. Captions alone come from all its combinations, not the pool."""

    def __init__(self, latents: Tensor, config: DataConfig, clips: Clips) -> None:
        super().__init__(latents, config)
        self.clips = clips

    def captions(self, draws: Draws, purpose: str) -> list[str]:
        split = self.config.procedural
        return [caption(draw(1, one, split), one)[0] for one in draws.of_samples(f"{purpose} prompt")]

    def _captions(self, rows: Tensor, draws: Draws, purpose: str) -> list[str]:
        phrased = zip(rows, draws.of_samples(f"{purpose} caption"))
        return [caption(self.clips[row[None]], generator)[0] for row, generator in phrased]


def open_data(config: TrainConfig, world: World, group: Group) -> Source:
    """Raises FileNotFoundError and ValueError for folders and files that hold nothing to learn from."""
    data, frames = config.data, max(config.flow.frames, config.rollout.frames) + (config.data.late > 0)
    if data.prompts:
        prompts = PromptList.read(data.prompts)
        check_prompts(world, prompts.lines)
        return prompts
    if data.clips:
        pairs = captioned(data.clips)
        texts = [_caption_in(text) for _, text in pairs]
        check_prompts(world, texts)
        return FolderClips(_folder_latents([video for video, _ in pairs], frames, config, world, group), data, texts)
    if data.procedural not in ("trained", "held-out", "all"):
        raise ValueError(f"Got data.procedural {data.procedural!r}; there is trained, held-out, all.")
    clips = draw(data.pool, torch.Generator().manual_seed(config.seed + 1), data.procedural)
    if not config.needs_clips:
        return ProceduralClips(torch.empty(0), data, clips)
    return ProceduralClips(_procedural_latents(clips, frames, config, world, group), data, clips)


def captioned(folder: Path) -> list[tuple[Path, Path]]:
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


def _caption_in(path: Path) -> str:
    text = path.read_text(encoding="utf-8").strip()
    if not text:
        raise ValueError(f"Got {path}, which is empty; it is the caption of a clip. Write what the clip shows.")
    return text


def _folder_latents(videos: list[Path], frames: int, config: TrainConfig, world: World, group: Group) -> Tensor:
    needed, model = 1 + 4 * (frames - 1), config.model

    def encode(video: Path) -> Tensor:
        pixels = read_video(video, needed, (model.height, model.width))
        if len(pixels) < needed:
            raise ValueError(
                f"Got {video} with {len(pixels)} frames; a clip of {frames} latent frames takes {needed}. Give longer "
                "clips, or set flow.frames and rollout.frames lower."
            )
        return world.encode(pixels[None])

    about = [video.stat() for video in videos]
    files = [[video.name, one.st_size, one.st_mtime_ns] for video, one in zip(videos, about)]
    source = {"files": files, "width": model.width, "height": model.height}
    return _encoded(config, world, group, {**source, "frames": frames}, videos, encode)


def _procedural_latents(clips: Clips, frames: int, config: TrainConfig, world: World, group: Group) -> Tensor:
    parts = [clips[at : at + TOGETHER] for at in range(0, len(clips), TOGETHER)]
    source = {"procedural": config.data.procedural, "pool": len(clips), "seed": config.seed, "frames": frames}
    return _encoded(config, world, group, source, parts, lambda part: world.encode(render(part, 1 + 4 * (frames - 1))))


def _encoded(
    config: TrainConfig, world: World, group: Group, source: dict, pieces: Sequence, encode: Callable[..., Tensor]
) -> Tensor:
    """The latents of the run's clips, encoded once for each `source` and autoencoder; all processes share the work.

    Raises as `encode` does.
    """
    path, about = config.out / POOL, config.out / MADE_FROM
    wanted = json.dumps({**source, "autoencoder": fingerprint(world.vae.state_dict())})
    if not (path.is_file() and about.is_file() and about.read_text() == wanted):
        if path.is_file() and group.first:
            tqdm.write(f"{path} was not made from these clips by this autoencoder; they are encoded again")
        first, end = (len(pieces) * rank // group.size for rank in (group.rank, group.rank + 1))
        mine = [encode(piece).bfloat16().cpu() for piece in pieces[first:end]]
        whole_or_not(_share(path, group.rank), lambda partial: torch.save(mine, partial))
        group.wait()
        if group.first:
            _join(path, about, wanted, group.size)
        group.wait()
    return torch.load(path, weights_only=True, mmap=True)


def _join(path: Path, about: Path, wanted: str, size: int) -> None:
    """Puts the processes' shares together. What they were made from is told last: a kill leaves no wrong pair."""
    shares = [_share(path, rank) for rank in range(size)]
    latents = torch.cat([latents for share in shares for latents in torch.load(share, weights_only=True)])
    about.unlink(missing_ok=True)
    whole_or_not(path, lambda partial: torch.save(latents, partial))
    whole_or_not(about, lambda partial: partial.write_text(wanted))
    for share in shares:
        share.unlink()


def _share(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.stem}-{rank}{path.suffix}")
