"""Memory of a start or source: it is read as a stream, and counted before the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sf_core import tiny
from sf_core.cli import generate
from sf_core.pipeline import ClipFrames
from sf_core.video import open_clip, save_video
from tests.core.test_cli import refused

ROOT = Path(__file__).resolve().parents[2]
SIDE, SECONDS = 256, {"short": 5, "long": 30}
ENCODE = """
import sys, torch
from sf_core.device import Timer
from sf_core.pipeline import ClipFrames, TinyPipeline
from sf_core.video import open_clip
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
torch.set_num_threads(1)
pipeline, frames = TinyPipeline(), int(sys.argv[2])
latents = pipeline._encode_clip(ClipFrames(open_clip(sys.argv[1]), (256, 256), 16), frames, Timer(torch.device("cpu")))
assert latents.shape[2] == 1 + frames // 4, latents.shape
print(peak())
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, seconds in SECONDS.items():
        frames = (torch.rand(8, SIDE // 16, SIDE // 16, 3).repeat_interleave(16, 1).repeat_interleave(16, 2),)
        save_video(folder / f"{name}.mp4", frames * (2 * seconds), 16)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak off /proc")
def test_memory_does_not_grow_with_a_clip(clips):
    peaks = {}
    for name, seconds in SECONDS.items():
        command = [sys.executable, "-c", ENCODE, str(clips / f"{name}.mp4"), str(16 * seconds - 3)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        peaks[name] = float(subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=True).stdout)
    in_one_piece = (SECONDS["long"] - SECONDS["short"]) * 16 * SIDE**2 * 12 / 2**20  # MiB of the frames as a tensor
    assert in_one_piece == 300 and peaks["long"] - peaks["short"] < 100, peaks


@pytest.mark.parametrize("size", [(16, 16), (16, 48), (64, 64), (48, 80)])
@pytest.mark.parametrize("length", [1, 2, 5, 33, 80, 81])
def test_a_clip_in_pieces_is_encoded_as_a_whole_one_to_the_bit(size, length):
    vae, frames = tiny.load_autoencoder(), torch.rand(1, length, *size, 3, generator=torch.Generator().manual_seed(0))
    whole = vae.encode(frames)
    assert whole.shape[2] == 1 + -(-(length - 1) // 4)
    for piece in (1, 7, 16, length):
        assert torch.equal(vae.encode_pieces(iter(frames.split(piece, 1))), whole)


@pytest.mark.parametrize("option", ["--start", "--source"])
def test_a_clip_that_has_no_room_is_refused_before_anything_is_loaded(clips, tmp_path, capsys, monkeypatch, option):
    needed = ClipFrames(open_clip(clips / "short.mp4"), (64, 64), 16).bytes
    assert 72 * SIDE**2 < needed < 100 * SIDE**2 + 60 * 16 * 64 * 64
    monkeypatch.setattr(generate, "available_memory", lambda _: needed - 1)
    message = refused(
        capsys, "generate", "a red circle", "--out", f"{tmp_path}/x.mp4", option, str(clips / "short.mp4")
    )
    assert option in message and "while it is read" in message and message.endswith("smaller copy of it first.")
