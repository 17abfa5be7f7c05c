"""What a node tells while it runs: text, a progress bar with pictures, messages to the browser; it hears Cancel."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management as management
import comfy.sd
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ...sf_core.device import HostCopy
from ...sf_core.sampling.rollout import Progress
from .model import family_of

Preview = tuple[str, Image.Image, int]  # format, picture, largest side


SECONDS_BETWEEN_PICTURES = 0.1  # as often as ComfyUI itself tells of progress
SECONDS_BEFORE_PICTURES = 0.5  # of a run: a shorter one is over before anybody has looked
MOST_FOR_PICTURES = 0.05  # of a run's time


MOST_WAITING = 64  # messages; a run that nobody is slow to watch has a few


PREVIEW_SIZE = 256  # pixels, at least where a picture can be enlarged by a whole factor


def say(node: type[io.ComfyNode], text: str) -> None:
    """Shows a line of text on the node that runs. Needs the hidden input unique_id; does nothing outside a server."""
    if node.hidden is not None and node.hidden.unique_id:
        from server import PromptServer  # runs already; without one it would take a second to import

        PromptServer.instance.send_progress_text(text, str(node.hidden.unique_id))


class Notes:
    """Lines of text on the node that runs, one below the other: a text that is said takes the place of the last."""

    def __init__(self, node: type[io.ComfyNode]) -> None:
        self.node, self.lines = node, []

    def add(self, line: str) -> None:
        self.lines.append(line)
        say(self.node, "\n".join(self.lines))


def send(node: type[io.ComfyNode], event: str, data: Callable[[], dict]) -> None:
    """Sends an event about the node that runs to the browser it was started from, if that is there and keeps up.

    ComfyUI queues messages without end and sends them one after the other: those for a slow connection would hold up
    everybody's, and grow. So while MOST_WAITING wait this one is dropped.
    """
    if node.hidden is not None and node.hidden.unique_id:
        from server import PromptServer

        server = PromptServer.instance
        if server.client_id in server.sockets and server.messages.qsize() < MOST_WAITING:
            server.send_sync(event, {"node": str(node.hidden.unique_id), **data()}, server.client_id)


def check_cancelled() -> None:
    """Raises ComfyUI's interruption when the user has pressed Cancel."""
    management.throw_exception_if_processing_interrupted()


class StepProgress:
    """Denoising steps on the node's progress bar, the one `on_step` of all nodes; Cancel is heard here."""

    def __init__(self) -> None:
        self.bar, self.done = comfy.utils.ProgressBar(1), 0

    def __call__(self, progress: Progress) -> None:
        check_cancelled()
        self.done += 1
        self.show(progress)

    def show(self, progress: Progress) -> None:
        self.bar.update_absolute(self.done, progress.total)


class PreviewProgress(StepProgress):
    """The same with a picture of the newest frames.

    `compiling` notes that the first step takes longer, and then how long it took.
    """

    def __init__(self, patcher: ModelPatcher, notes: Notes, compiling: bool) -> None:
        super().__init__()
        self.allowance, self.newest = PictureAllowance(), None
        self.preview = family_of(patcher).preview
        self.previewer = previewer_of(patcher)
        self.notes, self.began = notes, time.monotonic() if compiling else None
        if compiling:
            notes.add("Compiling. The first step takes longer.")

    def show(self, progress: Progress) -> None:
        if self.began is not None:
            self.notes.add(f"First step with compiling: {time.monotonic() - self.began:.0f} s")
            self.began = None
        self.bar.update_absolute(self.done, progress.total, self.picture(progress.x0))

    def picture(self, x0: Tensor) -> Preview | None:
        """None where the last one was too dear to make another, or a GPU has not handed over what it shows."""
        if self.newest is None and self.allowance.is_due:
            self.newest = HostCopy(x0[:1, :, -1:])  # [1, C, 1, H, W]
        if self.newest is None or not self.newest.is_there:
            return None
        newest, self.newest = self.newest.wait(), None
        with self.allowance.spend():
            if self.preview is not None:
                return as_preview(self.preview(newest))
            return self.previewer.decode_latent_to_preview_image("JPEG", newest)


class PictureAllowance:
    """How often pictures may be made: at a share of the run's time, whatever one costs here."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.began = clock, clock()
        self.shown, self.spent, self.dearest = -math.inf, 0.0, 0.0

    @property
    def is_due(self) -> bool:
        now = self.clock()
        if now < self.shown + SECONDS_BETWEEN_PICTURES or now < self.began + SECONDS_BEFORE_PICTURES:
            return False
        return self.spent + self.dearest <= MOST_FOR_PICTURES * (now - self.began)

    @contextmanager
    def spend(self) -> Iterator[None]:
        self.shown = self.clock()
        yield
        cost = self.clock() - self.shown
        self.spent, self.dearest = self.spent + cost, max(self.dearest, cost)


def previewer_of(patcher: ModelPatcher) -> latent_preview.LatentPreviewer:
    """The kind the user has chosen. Where previews are off, as they are by default, plain colours: watching the video
    grow is the point, and they cost nothing beside a step."""
    form = patcher.model.latent_format
    return latent_preview.get_previewer(patcher.load_device, form) or latent_preview.Latent2RGBPreviewer(
        form.latent_rgb_factors, form.latent_rgb_factors_bias, form.latent_rgb_factors_reshape
    )


def as_preview(picture: Image.Image) -> Preview:
    """A picture for a progress bar. The canvas shows it pixel by pixel, so the built-in model's are enlarged."""
    factor = max(1, PREVIEW_SIZE // max(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)
    return ("JPEG", picture, min(latent_preview.MAX_PREVIEW_RESOLUTION, max(picture.size)))


def frame_picture(frame: Tensor) -> Image.Image:
    """A frame [H, W, 3] in 0..1 as a picture."""
    return Image.fromarray(frame.mul(255).round().to("cpu", torch.uint8).numpy())
