"""Makes the clips that the README shows (docs/tiny.gif) and the thumbnails of the workflows: python docs/pictures.py"""

import json
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from sf_core import tiny  # noqa: E402
from sf_core.config import PRESETS  # noqa: E402
from sf_core.noise import SeededNoise  # noqa: E402
from sf_core.rollout import rollout  # noqa: E402
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


def save_thumbnail(workflow: Path) -> None:
    """Frames of the video that a workflow makes; where it upscales them, one of them small and large."""
    values = {node["type"]: node.get("widgets_values") for node in json.loads(workflow.read_text())["nodes"]}
    frames = clips([values["SelfForcingPrompt"][0]], values["SelfForcingSampler"][0])[0]
    sheet = Image.new("RGB", (516, 516), "#333333")
    if "ImageScaleBy" in values:
        sheet.paste(picture(frames[40], 64), (30, 226))
        sheet.paste(picture(frames[40], 384), (116, 66))
    else:
        for i, at in enumerate((46, 50, 54, 58)):
            sheet.paste(picture(frames[at], 256), (i % 2 * 260, i // 2 * 260))
    sheet.save(workflow.with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    save_gif(HERE / "tiny.gif")
    for workflow in sorted((HERE.parent / "workflows").glob("tiny_*.json")):
        save_thumbnail(workflow)
