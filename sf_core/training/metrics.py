"""Metrics of a run: a progress bar, losses.jsonl, TensorBoard, a plot, sample videos.

Only the first process logs; all take part in making samples, because their weights may be sharded.
"""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import imageio.v3 as imageio
from torch import Tensor
from tqdm import tqdm

from ..video import save_video
from .config import TrainConfig
from .distributed import Group
from .methods.base import Method
from .run_folder import LOSSES, LossLog, read_losses

FPS = 16
PLOT = "losses.png"


class Metrics:
    """The log of one run, open while it goes. Raises ImportError at once for a package that is asked for."""

    def __init__(self, config: TrainConfig, method: Method, group: Group, done: int) -> None:
        self.config, self.method, self.first = config, method, group.first
        self.bar = tqdm(total=config.steps, initial=done, disable=not group.first, desc=config.out.name, unit="step")
        self.losses = LossLog(config.out, done) if group.first else None
        self.board = _open_board(config.out, done) if config.log.tensorboard and group.first else None
        if config.log.plot:
            _import_pyplot()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        if self.board:
            self.board.close()

    def log(self, number: int, metrics: dict[str, float]) -> None:
        """Logs the losses and gradient norms of step `number`, from 1."""
        if not self.first:
            return
        self.losses.add(number, metrics)
        self.bar.update()
        if number % self.config.log.every == 0:
            self.bar.set_postfix({name: f"{value:.4f}" for name, value in metrics.items() if "gradient" not in name})
            for name, value in metrics.items() if self.board else ():
                self.board.add_scalar(name, value, number)

    def plot(self) -> None:
        """Draws losses.png, where the configuration asks for it."""
        if self.first and self.config.log.plot:
            plot_losses(self.config.out)

    def sample(self, number: int) -> None:
        """Saves sample videos of the averaged student after step `number`."""
        prompts = list(self.config.log.samples)
        videos = self.method.sample(prompts, self.config.log.sample_frames)
        if not self.first:
            return  # the videos are decoded as the loop asks for them
        for i, video in enumerate(videos):
            save_video(_make_folder(self.config.out / "samples") / f"{number:06d}-{i}.mp4", video, FPS)
            if self.board:
                _add_video(self.board, f"{i}: {prompts[i]}", video, number)


def plot_losses(folder: Path) -> Path:
    """losses.png: every loss of losses.jsonl over the steps. Raises ImportError without matplotlib."""
    pyplot, lines = _import_pyplot(), read_losses(folder)
    if not lines:
        raise ValueError(f"Got {folder / LOSSES} with no losses; train first.")
    names = [name for name in lines[-1] if name != "step"]
    figure, axes = pyplot.subplots(len(names), 1, figsize=(8, 2.2 * len(names)), sharex=True, squeeze=False)
    for axis, name in zip(axes[:, 0], names):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points), linewidth=0.8)
        axis.set_ylabel(name)
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(folder / PLOT, dpi=100)
    pyplot.close(figure)
    return folder / PLOT


def _make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _add_video(board: Any, name: str, video: Tensor, number: int) -> None:
    """A video [T, H, W, 3] as an animated picture: TensorBoard's own video writer needs moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    frames, buffer = (video * 255).round().byte().numpy(), io.BytesIO()
    imageio.imwrite(buffer, frames, extension=".gif", duration=1000 / FPS, loop=0)
    height, width = frames.shape[1:3]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
    board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), number)


def _open_board(folder: Path, done: int) -> Any:
    """TensorBoard's writer; steps that were logged before and will be taken again are dropped."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "Got log.tensorboard without TensorBoard. Install it (pip install tensorboard), or leave it out."
        ) from None
    return SummaryWriter(folder / "tensorboard", purge_step=done + 1)


def _import_pyplot() -> ModuleType:
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "Got log.plot without matplotlib. Install it (pip install matplotlib), or leave it out."
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
