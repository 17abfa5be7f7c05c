"""Makes docs/tiny.gif, the clips that the README shows: python docs/pictures.py"""

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


def clips() -> torch.Tensor:
    """Frames [B, T, 64, 64, 3] in 0..1 of all prompts."""
    torch.set_num_threads(1)
    embeds = tiny.load_text_encoder().encode(PROMPTS)
    chunks = rollout(tiny.load_model(), PRESETS["tiny"], embeds, SeededNoise(0), 1 + FRAMES // 4, 8, 8)
    stream = DecoderStream(tiny.load_autoencoder())
    with torch.inference_mode():
        return torch.cat([stream.decode(chunk.latents) for chunk in chunks], 1)


def page(frames: torch.Tensor) -> Image.Image:
    """One frame of every clip [B, 64, 64, 3], with its prompt below."""
    rows = -(-len(frames) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + 8), rows * (TILE + LABEL + 8)), "white")
    for i, frame in enumerate(frames):
        x, y = i % COLUMNS * (TILE + 8) + 4, i // COLUMNS * (TILE + LABEL + 8) + 4
        picture = Image.fromarray(frame.mul(255).round().byte().numpy())
        sheet.paste(picture.resize((TILE, TILE), Image.Resampling.NEAREST), (x, y))
        lines = "\n".join(textwrap.wrap(PROMPTS[i], 21))
        ImageDraw.Draw(sheet).multiline_text((x, y + TILE + 2), lines, fill="black", font_size=11, spacing=1)
    return sheet


def main() -> None:
    video = clips()
    pages = [page(video[:, i]) for i in range(0, FRAMES, 2)]
    pages = [picture.quantize(128, dither=Image.Dither.NONE) for picture in pages]
    pages[0].save(HERE / "tiny.gif", save_all=True, append_images=pages[1:], duration=125, loop=0)


if __name__ == "__main__":
    main()
