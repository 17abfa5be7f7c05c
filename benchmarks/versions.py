"""Versions of av (PyAV) and imageio against what is written and read with them.

    python benchmarks/versions.py --av 17.0.0 18.1.0 --imageio 2.31.0 2.38.1

Each pair is installed into a folder of its own, over the packages of the Python that runs this. Prints a table in
Markdown: whether an mp4 is written, and how far colours of a BT.709 clip are off as they are read (of 255).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ((200, 30, 40), (30, 180, 60), (40, 60, 210), (120, 120, 120))
TITLES = {
    "mp4": "writes mp4",
    "bt709": "reads BT.709, off by",
    "imageio_mp4": "imageio writes mp4",
    "imageio_bt709": "imageio reads BT.709, off by",
    "gif": "imageio writes GIF",
}


def clip(path: str) -> None:
    """A clip of plain colours with BT.709's matrix, and tagged so."""
    import av
    import numpy as np

    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=16, options={"crf": "1"})
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        for colour in COLOURS:
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), colour, np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            frame.colorspace, frame.color_range = 1, 1
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def off(frames) -> float:
    """The greatest difference of frames [T, H, W, 3] in 0..255 from the colours."""
    import numpy as np

    return float(max(abs(np.asarray(frame)[32, 32] - colour).max() for frame, colour in zip(frames, COLOURS)))


def checks(folder: str) -> dict:
    import imageio.v3 as imageio
    import numpy as np
    import torch

    from sf_core.video import read_video, save_video

    def attempt(check) -> str:
        try:
            return check()
        except Exception as error:  # noqa: BLE001  any of them is the answer
            return f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"

    def written() -> str:
        save_video(f"{folder}/a.mp4", torch.rand(9, 64, 64, 3))
        return "yes" if len(read_video(f"{folder}/a.mp4")) == 9 else "no"

    def imageio_written() -> str:
        imageio.imwrite(f"{folder}/b.mp4", np.zeros((9, 64, 64, 3), np.uint8), plugin="pyav", codec="libx264", fps=16)
        return "yes" if len(read_video(f"{folder}/b.mp4")) == 9 else "no"

    def gif() -> str:
        data = imageio.imwrite("<bytes>", np.zeros((9, 64, 64, 3), np.uint8), extension=".gif", duration=60, loop=0)
        return "yes" if data.startswith(b"GIF8") else "no"

    clip(f"{folder}/c.mp4")
    return {
        "mp4": attempt(written),
        "bt709": attempt(lambda: f"{off(read_video(f'{folder}/c.mp4') * 255):.0f}"),
        "imageio_mp4": attempt(imageio_written),
        "imageio_bt709": attempt(lambda: f"{off(imageio.imread(f'{folder}/c.mp4', plugin='pyav').astype(float)):.0f}"),
        "gif": attempt(gif),
    }


def row(versions: tuple[str, str]) -> dict:
    """The checks with these versions, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        packages = [f"{name}=={version}" for name, version in zip(("av", "imageio"), versions)]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", f"{folder}/packages", *packages]
        subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
        env = {**os.environ, "PYTHONPATH": f"{folder}/packages{os.pathsep}{ROOT}"}
        done = subprocess.run([sys.executable, __file__, "--in", folder], env=env, capture_output=True, text=True)
        last = (done.stdout.splitlines() or [""])[-1]
        return json.loads(last) if last.startswith("{") else {"mp4": done.stderr.strip().splitlines()[-1][:80]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--av", nargs="+", default=["17.0.0"])
    parser.add_argument("--imageio", nargs="+", default=["2.31.0"])
    parser.add_argument("--in", dest="folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        sys.stdout.write(json.dumps(checks(args.folder)) + "\n")
        return
    sys.stdout.write(f"| av | imageio | {' | '.join(TITLES.values())} |\n|{' --- |' * (2 + len(TITLES))}\n")
    for versions in product(args.av, args.imageio):
        found = row(versions)
        sys.stdout.write(f"| {' | '.join([*versions, *(found.get(name, '') for name in TITLES)])} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
