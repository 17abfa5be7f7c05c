"""What a node tells while it runs: text, a progress bar with pictures, messages to the browser; it hears Cancel."""

from __future__ import annotations

import math
import threading
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
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ...sf_core.device import HostCopy
from ...sf_core.sampling.rollout import Progress
from .model import family_of

Preview = tuple[str, Image.Image, int]  # format, picture, largest side


NOTE = "self_forcing.note"  # what web/stream.js listens to

SECONDS_BETWEEN_PICTURES = 0.1  # as often as ComfyUI itself tells of progress
SECONDS_BEFORE_PICTURES = 0.5  # of a run: a shorter one is over before anybody has looked
MOST_FOR_PICTURES = 0.05  # of a run's time


SECONDS_UNTIL_HISTORY = 60  # at most, from a node's end to that of its run


MOST_WAITING = 64  # messages; a run that nobody is slow to watch has a few


PREVIEW_SIZE = 256  # pixels, at least where a picture can be enlarged by a whole factor


def say(node: type[io.ComfyNode], text: str) -> None:
    """Shows lines of text on the node that runs: the first on it, all on demand (web/notes.js). Needs the hidden input
    unique_id; does nothing outside a server.
    """
    server = _server(node)
    if server is not None and server.client_id in server.sockets:
        server.send_sync(NOTE, {**_about(node), "text": text}, server.client_id)


def say_on_running_node(text: str) -> None:
    """The same for code that is not a node's, such as a text encoder: on whatever node calls it."""
    running = get_executing_context()
    if running is not None:
        _show_text(text, running.node_id)


def _show_text(text: str, node_id: str) -> None:
    from server import PromptServer  # runs already; without one it would take a second to import

    PromptServer.instance.send_progress_text(text, str(node_id))


class Notes:
    """Lines of text on the node that runs, all of them again for each: what is said takes the place of the last."""

    def __init__(self, node: type[io.ComfyNode]) -> None:
        self.node, self.lines = node, []

    def add(self, line: str, first: bool = False) -> None:
        """Adds a line below the others, or, if it is what matters now, above them."""
        self.lines.insert(0 if first else len(self.lines), line)
        say(self.node, "\n".join(self.lines))


def send(node: type[io.ComfyNode], event: str, data: Callable[[], dict]) -> None:
    """Sends an event about the node that runs to the browser it was started from, if that is there and keeps up.

    ComfyUI queues messages without end and sends them one after the other: those for a slow connection would hold up
    everybody's, and grow. So while MOST_WAITING wait this one is dropped.
    """
    server = _server(node)
    if server is not None and server.client_id in server.sockets and server.messages.qsize() < MOST_WAITING:
        server.send_sync(event, {**_about(node), **data()}, server.client_id)


def list_output(node: type[io.ComfyNode], output: dict) -> None:
    """Lists files as outputs of the node that runs although it will not end well: in the browser, and in the history.

    ComfyUI does so itself for nodes that return. It writes the history when all is over, so a thread waits for that.
    """
    server = _server(node)
    if server is None:
        return
    about, name = _about(node), str(node.hidden.unique_id)
    executed = {"node": name, "display_node": about["node"], "output": output, "prompt_id": about["prompt_id"]}
    if server.client_id is not None:
        server.send_sync("executed", executed, server.client_id)

    def enter() -> None:
        queue, end = server.prompt_queue, time.monotonic() + SECONDS_UNTIL_HISTORY
        while about["prompt_id"] not in queue.history and time.monotonic() < end:
            time.sleep(0.01)
        with queue.mutex:
            if entry := queue.history.get(about["prompt_id"]):
                entry["outputs"].setdefault(name, output)

    threading.Thread(target=enter, daemon=True).start()


def _server(node: type[io.ComfyNode]):  # -> PromptServer | None
    """ComfyUI's server, where the node runs in one."""
    if node is None or node.hidden is None or not node.hidden.unique_id:
        return None
    from server import PromptServer  # runs already; without one it would take a second to import

    return PromptServer.instance


def _about(node: type[io.ComfyNode]) -> dict[str, str | None]:
    """Which node an event is about, and in which run. Of a node that a loop has made, the one that the user sees."""
    context = get_executing_context()
    shown = get_progress_state().dynprompt.get_display_node_id(node.hidden.unique_id)
    return {"node": str(shown), "prompt_id": context and context.prompt_id}


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
