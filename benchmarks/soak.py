"""A very long video of the built-in model, streamed to a file: is memory flat, is time per chunk flat, does it drift?

    python benchmarks/soak.py [--frames 10000] [--sink 3 --no-pinned]

`--frames` are latent frames, four pixel frames each. Time is the processor's, so that other work on the machine counts
little. Drift is read off by the detectors of `evaluate`, in windows of 36 frames.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sf_core import tiny
from sf_core.autoencoders.stream import DecoderStream
from sf_core.cli.evaluate import WINDOW, ask
from sf_core.pipeline import Generation
from sf_core.sampling.config import PRESETS, Sampling
from sf_core.sampling.plan import Plan
from sf_core.sampling.prompts import PromptSchedule
from sf_core.tiny import detect
from sf_core.video import save_video
from sf_core.wan.model import Network

EARLY, LATE = slice(50, 150), slice(-100, None)  # chunks that are compared


class Soak:
    """Goes through the video and notes, for each chunk, its seconds and the most memory so far.

    Windows are laid aside in `folder` and read when it is over, so that reading takes no part in time and memory.
    """

    def __init__(self, frames: int, sampling: Sampling, seed: int, folder: Path) -> None:
        self.folder = folder
        self.clips, prompts = ask(1, seed)
        prompted = PromptSchedule.of(tiny.load_text_encoder().encode(prompts))
        self.generation = Generation(Network(tiny.load_transformer()), Plan(sampling, frames, 8, 8), prompted, seed)
        self.stream = DecoderStream(tiny.load_autoencoder())
        self.seconds: list[float] = []
        self.mebibytes: list[float] = []
        self.newest = torch.zeros(0, 64, 64, 3)

    def frames(self) -> Iterator[Tensor]:
        started = time.process_time()
        for _, x0 in self.generation.chunks():
            frames = self.stream.decode(x0)[0]
            yield frames
            self.seconds.append(time.process_time() - started)  # writing the frames is in it
            self.mebibytes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            self.lay_aside(frames)
            started = time.process_time()

    def lay_aside(self, frames: Tensor) -> None:
        """Keeps a window now and then: that of every hundredth chunk."""
        self.newest = torch.cat((self.newest, frames))[-WINDOW:]
        if len(self.seconds) % 100 == 0:
            torch.save(self.newest, self.folder / f"{len(self.seconds):06}.pt")

    def windows(self) -> Iterator[tuple[bool, float]]:
        """Of each window that was kept, whether it follows the prompt, and its residual."""
        for path in sorted(self.folder.glob("*.pt")):
            video = torch.load(path)[None]  # [1, T, 64, 64, 3]
            followed = detect.matches(detect.read(video), self.clips)["all"].item()
            yield followed, detect.residual(video, self.clips).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=10_000, help="latent frames (10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sink", type=int, default=PRESETS["tiny"].sink)
    parser.add_argument("--pinned", action=argparse.BooleanOptionalAction, default=PRESETS["tiny"].pinned)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sampling = replace(PRESETS["tiny"], sink=args.sink, pinned=args.pinned)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(args.frames, sampling, args.seed, Path(folder))
        count = save_video(Path(folder) / "soak.mp4", soak.frames())
        report(soak, count)


def report(soak: Soak, count: int) -> None:
    half = len(soak.mebibytes) // 2
    first, second = max(soak.mebibytes[:half]), max(soak.mebibytes[half:])
    early, late = (statistics.median(soak.seconds[part]) for part in (EARLY, LATE))
    followed, residuals = zip(*soak.windows())
    tenth = max(1, len(residuals) // 10)
    begin, end = (statistics.mean(part) for part in (residuals[:tenth], residuals[-tenth:]))
    sys.stdout.write(
        f"{count} frames, {len(soak.seconds)} chunks, {sum(soak.seconds):.0f} s of processor time\n"
        f"memory, MiB at most: {first:.0f} in the first half, {second:.0f} in the second ({second / first - 1:+.1%})\n"
        f"a chunk, median: {1000 * early:.1f} ms of chunks 50-149, {1000 * late:.1f} ms of the last 100 "
        f"({late / early - 1:+.1%})\n"
        f"prompt followed in {sum(followed)} of {len(residuals)} windows; residual {begin:.4f} in the first tenth of "
        f"them, {end:.4f} in the last\n"
    )


if __name__ == "__main__":
    main()
