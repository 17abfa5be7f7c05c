"""What is learnt from: prompts alone, captioned clips, or the tiny world's procedural ones.

Every source gives captions; sources with clips give batches of latents too. Which ones is drawn per sample
(draws.py). Clips are encoded once, into the run's folder, by the first process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tiny.data import Clips, caption, draw, render
from ..video import read_video
from .config import DataConfig, TrainConfig
from .draws import Draws
from .parallel import Group
from .store import whole_or_not
from .worlds import World

VIDEOS = (".mp4", ".webm", ".gif", ".mov", ".mkv", ".avi")
POOL = "latents.pt"
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

    def batch(self, draws: Draws, purpose: str, frames: int) -> Batch: ...


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

    def batch(self, draws: Draws, purpose: str, frames: int) -> Batch:
        raise ValueError("Got prompts alone where clips are needed; give data.clips.")


class ClipPool(ABC):
    """Encoded clips [n, C, F, H, W] and how to caption them."""

    def __init__(self, latents: Tensor, config: DataConfig) -> None:
        self.latents, self.config = latents, config

    def captions(self, draws: Draws, purpose: str) -> list[str]:
        return self._captions(self._rows(draws, purpose), draws, purpose)

    def batch(self, draws: Draws, purpose: str, frames: int) -> Batch:
        rows = self._rows(draws, purpose)
        late = draws.uniform(f"{purpose} late") < self.config.late
        dropped = draws.uniform(f"{purpose} dropped") < self.config.dropped
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
        return PromptList.read(data.prompts)
    if data.clips:
        pairs = captioned(data.clips)
        size = (config.model.height, config.model.width)
        latents = _encoded(config, group, lambda: _encode_folder(pairs, frames, size, world))
        return FolderClips(latents, data, [text.read_text(encoding="utf-8").strip() for _, text in pairs])
    if data.procedural not in ("trained", "held-out", "all"):
        raise ValueError(f"Got data.procedural {data.procedural!r}; there is trained, held-out, all.")
    clips = draw(data.pool, torch.Generator().manual_seed(config.seed + 1), data.procedural)
    if not config.needs_clips:
        return ProceduralClips(torch.empty(0), data, clips)
    latents = _encoded(config, group, lambda: _encode_procedural(clips, frames, world))
    return ProceduralClips(latents, data, clips)


def captioned(folder: Path) -> list[tuple[Path, Path]]:
    """(video, caption) of every clip of a folder, in order of their names. Raises as `open_data` does."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Got no folder {folder}; data.clips holds videos, each beside a .txt with its caption (a.mp4, a.txt)."
        )
    videos = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in VIDEOS}
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


def fitted(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames [T, H, W, 3] resized to cover `size` and cut to its middle."""
    height, width = size
    x = frames.movedim(-1, 1)  # [T, 3, H, W]
    scale = max(height / x.shape[2], width / x.shape[3])
    cover = (max(height, round(x.shape[2] * scale)), max(width, round(x.shape[3] * scale)))
    if cover != tuple(x.shape[2:]):
        x = F.interpolate(x, cover, mode="bilinear", antialias=True)
    top, left = (cover[0] - height) // 2, (cover[1] - width) // 2
    return x[:, :, top : top + height, left : left + width].movedim(1, -1).clamp(0, 1)


def _encode_folder(pairs: list[tuple[Path, Path]], frames: int, size: tuple[int, int], world: World) -> Tensor:
    needed, encoded = 1 + 4 * (frames - 1), []
    for video, _ in pairs:
        pixels = read_video(video)
        if len(pixels) < needed:
            raise ValueError(
                f"Got {video} with {len(pixels)} frames; a clip of {frames} latent frames takes {needed}. Give longer "
                "clips, or set flow.frames and rollout.frames lower."
            )
        encoded.append(world.encode(fitted(pixels[:needed], size)[None]).bfloat16().cpu())
    return torch.cat(encoded)


def _encode_procedural(clips: Clips, frames: int, world: World) -> Tensor:
    parts = [clips[at : at + TOGETHER] for at in range(0, len(clips), TOGETHER)]
    return torch.cat([world.encode(render(part, 1 + 4 * (frames - 1))).bfloat16() for part in parts])


def _encoded(config: TrainConfig, group: Group, encode: Callable[[], Tensor]) -> Tensor:
    """The latents of the run's clips, encoded by the first process and kept."""
    path = config.out / POOL
    if group.first and not path.is_file():
        latents = encode()
        whole_or_not(path, lambda partial: torch.save(latents, partial))
    group.wait()
    return torch.load(path, weights_only=True, mmap=True)
