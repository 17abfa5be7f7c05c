"""Makes the README's clips (docs/tiny.gif), and the workflows' thumbnails by running each in a ComfyUI:

    python docs/pictures.py [--comfyui ~/ComfyUI]

in a Python that has ComfyUI's requirements. Those for a model of full size run with the built-in one in its place.
"""

import argparse
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from sf_core import tiny  # noqa: E402
from sf_core.autoencoders.stream import DecoderStream, latent_frames  # noqa: E402
from sf_core.pipeline import Generation  # noqa: E402
from sf_core.sampling.config import PRESETS  # noqa: E402
from sf_core.sampling.plan import Plan  # noqa: E402
from sf_core.sampling.prompts import PromptSchedule  # noqa: E402
from sf_core.wan.model import Network  # noqa: E402
from tests.host.server import WORKFLOWS, frames_of, load_prompt, running  # noqa: E402

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
SHOWN = {  # frames on a thumbnail; spread over a second where it is not named
    "tiny_long_video": (10, 150, 310, 470),
    "tiny_image_to_video": (0, 4, 8, 12),
    "tiny_continuation": (0, 20, 68, 78),
    "tiny_story": (40, 90, 138, 186),
    "wan_long_video": (10, 200, 400, 900),
    "wan_continue_video": (0, 40, 100, 150),
}


def clips(prompts: list[str], seed: int = 0) -> torch.Tensor:
    """Frames [B, T, 64, 64, 3] in 0..1 of all prompts."""
    torch.set_num_threads(1)
    plan = Plan(PRESETS["tiny"], latent_frames(FRAMES), 8, 8, len(prompts))
    embeds = tiny.load_text_encoder().encode(prompts)
    generation = Generation(Network(tiny.load_transformer()), plan, PromptSchedule.of(embeds), seed)
    with torch.inference_mode():
        return torch.cat(list(generation.frames(DecoderStream(tiny.load_autoencoder()), FRAMES)), 1)


def picture(frame: np.ndarray, side: int) -> Image.Image:
    """A frame [H, W, 3] of bytes, enlarged without smoothing."""
    return Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)


def page(frames: np.ndarray) -> Image.Image:
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
    video = clips(PROMPTS).mul(255).round().byte().numpy()
    choice = {"method": Image.Quantize.MAXCOVERAGE, "kmeans": 1, "dither": Image.Dither.NONE}
    pages = [page(video[:, i]).quantize(**choice) for i in range(0, FRAMES, 2)]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=125, loop=0)


def thumbnail(name: str, frames: list[np.ndarray]) -> Image.Image:
    """Four frames of the video that a workflow makes; where it upscales them, one of them small and large."""
    sheet = Image.new("RGB", (516, 516), "#333333")
    if "tiny_upscale" in name:
        sheet.paste(picture(frames[40][::4, ::4], 64), (30, 226))
        sheet.paste(picture(frames[40], 384), (116, 66))
    else:
        for i, at in enumerate(next((at for part, at in SHOWN.items() if part in name), (46, 50, 54, 58))):
            sheet.paste(picture(frames[at], 256), (i % 2 * 260, i // 2 * 260))
    return sheet


def save_thumbnails(comfyui: Path) -> None:
    with tempfile.TemporaryDirectory() as base, running(comfyui, Path(base)) as server:
        definitions = server.get("/object_info")
        for name in WORKFLOWS:
            prompt = load_prompt(name, definitions, SelfForcingStream={"file": "video/stream"})
            frames = frames_of(server.run(prompt))
            thumbnail(name, frames).save(HERE.parent / "workflows" / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--comfyui", type=Path, default=Path.home() / "ComfyUI", help="its folder (~/ComfyUI)")
    save_gif(HERE / "tiny.gif")
    save_thumbnails(parser.parse_args().comfyui)
