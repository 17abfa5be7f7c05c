"""Makes the clips that the README shows (docs/tiny.gif) and the thumbnails of the workflows: python docs/pictures.py"""

import json
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from sf_core import tiny  # noqa: E402
from sf_core.config import PRESETS  # noqa: E402
from sf_core.noise import SeededNoise  # noqa: E402
from sf_core.rollout import rollout, whole_chunks  # noqa: E402
from sf_core.taehv import DecoderStream  # noqa: E402

PROMPTS = [
    "a red circle moves right",
    "a big yellow star orbits on a navy background",
    "a green triangle bounces on a white background",
    "a small cyan square moves up",
    "a purple star pulses on a gray background",
    "a blue circle moves left on a white background",
    "an orange square orbits on a checkered background",
    "a pink triangle moves down on a navy background",
]
FRAMES, COLUMNS, TILE, LABEL = 81, 4, 128, 42
SHOWN = {
    "tiny_text_to_video": (46, 50, 54, 58),
    "tiny_long_video": (10, 150, 310, 470),
    "tiny_image_to_video": (0, 4, 8, 12),
    "tiny_continuation": (28, 38, 68, 78),
}


def clips(prompts: list[str], seed: int = 0) -> torch.Tensor:
    """Frames [B, T, 64, 64, 3] in 0..1 of all prompts."""
    torch.set_num_threads(1)
    embeds = tiny.load_text_encoder().encode(prompts)
    chunks = rollout(tiny.load_model(), PRESETS["tiny"], embeds, SeededNoise(seed), 1 + FRAMES // 4, 8, 8)
    stream = DecoderStream(tiny.load_autoencoder())
    with torch.inference_mode():
        return torch.cat([stream.decode(chunk.latents) for chunk in chunks], 1)


def picture(frame: torch.Tensor, side: int) -> Image.Image:
    whole = Image.fromarray(frame.mul(255).round().byte().numpy())
    return whole.resize((side, side), Image.Resampling.NEAREST)


def page(frames: torch.Tensor) -> Image.Image:
    """One frame of every clip [B, 64, 64, 3], with its prompt below."""
    rows = -(-len(frames) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + 8), rows * (TILE + LABEL + 8)), "white")
    for i, frame in enumerate(frames):
        x, y = i % COLUMNS * (TILE + 8) + 4, i // COLUMNS * (TILE + LABEL + 8) + 4
        sheet.paste(picture(frame, TILE), (x, y))
        lines = "\n".join(textwrap.wrap(PROMPTS[i], 21))
        ImageDraw.Draw(sheet).multiline_text((x, y + TILE + 2), lines, fill="black", font_size=11, spacing=1)
    return sheet


def save_gif(path: Path) -> None:
    video = clips(PROMPTS)
    pages = [page(video[:, i]).quantize(128, dither=Image.Dither.NONE) for i in range(0, FRAMES, 2)]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=125, loop=0)


class Graph:
    """A saved workflow of the built-in model, run without ComfyUI."""

    def __init__(self, workflow: Path) -> None:
        saved = json.loads(workflow.read_text(encoding="utf-8"))
        self.nodes = {node["id"]: node for node in saved["nodes"]}
        self.sources = {link[0]: link[1] for link in saved["links"]}

    def frames(self) -> torch.Tensor:
        """Frames [T, H, W, 3] in 0..1 that its Self Forcing Decode gives."""
        (decode,) = [node for node in self.nodes.values() if node["type"] == "SelfForcingDecode"]
        return self.output(decode["id"])

    def output(self, node: int) -> torch.Tensor | None:
        kind = self.nodes[node]["type"]
        return None if kind == "SelfForcingLoadTiny" else NODES[kind](**self.inputs(self.nodes[node]))

    def inputs(self, node: dict) -> dict:
        """Name -> widget value, saved by position (after a seed: what becomes of it), or output of what is wired."""
        values, named = iter(node.get("widgets_values") or []), {}
        for slot in node["inputs"]:
            if "widget" in slot:
                named[slot["name"]] = next(values)
                if slot["name"] == "seed":
                    next(values)
            if slot["link"] is not None:
                named[slot["name"]] = self.output(self.sources[slot["link"]])
        return named


def encode_text(clip: None, text: str) -> torch.Tensor:
    return tiny.load_text_encoder().encode([text])


def empty_latent(width: int, height: int, frames: int, **unused: float) -> torch.Tensor:
    return torch.zeros(1, 16, 1 + -(-(frames - 1) // 4), height // 8, width // 8)


def sample(
    model: None,
    positive: torch.Tensor,
    latent: torch.Tensor,
    seed: int,
    window: int,
    sink: int,
    prefix: torch.Tensor | None = None,
    **presets: object,
) -> torch.Tensor:
    own = PRESETS["tiny"]
    sampling = replace(own, window=window or own.window, sink=own.sink if sink < 0 else sink)
    frames, height, width = latent.shape[2:]
    total = whole_chunks(frames, sampling, 0 if prefix is None else prefix.shape[2])
    chunks = rollout(tiny.load_model(), sampling, positive, SeededNoise(seed), total, height, width, prefix=prefix)
    return torch.cat([chunk.latents for chunk in chunks], 2)[:, :, :frames]


def decode(latent: torch.Tensor, vae: None) -> torch.Tensor:
    return tiny.load_autoencoder().decode(latent)[0]


def encode(pixels: torch.Tensor, vae: None) -> torch.Tensor:
    return tiny.load_autoencoder().encode(pixels[None])


def solid(width: int, height: int, batch_size: int, color: int) -> torch.Tensor:
    return torch.tensor(list(color.to_bytes(3, "big"))).div(255).expand(batch_size, height, width, 3)


def composite(destination: torch.Tensor, source: torch.Tensor, x: int, y: int, resize_source: bool) -> torch.Tensor:
    whole, (height, width) = destination.clone(), source.shape[1:3]
    whole[:, y : y + height, x : x + width] = source
    return whole


NODES = {
    "SelfForcingPrompt": encode_text,
    "SelfForcingLatent": empty_latent,
    "SelfForcingSampler": sample,
    "SelfForcingDecode": decode,
    "VAEEncode": encode,
    "EmptyImage": solid,
    "ImageCompositeMasked": composite,
}


def save_thumbnail(workflow: Path) -> None:
    """Four frames of the video that a workflow makes; where it upscales them, one of them small and large."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        frames = Graph(workflow).frames()
    sheet = Image.new("RGB", (516, 516), "#333333")
    if workflow.stem == "tiny_upscale":
        sheet.paste(picture(frames[40], 64), (30, 226))
        sheet.paste(picture(frames[40], 384), (116, 66))
    else:
        for i, at in enumerate(SHOWN[workflow.stem]):
            sheet.paste(picture(frames[at], 256), (i % 2 * 260, i // 2 * 260))
    sheet.save(workflow.with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    save_gif(HERE / "tiny.gif")
    for workflow in sorted((HERE.parent / "workflows").glob("tiny_*.json")):
        save_thumbnail(workflow)
