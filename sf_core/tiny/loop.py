"""What every training stage shares: a folder for its checkpoints, a line of progress now and then, one or more
processes.

A stage is a function that takes steps until a `Stage` says it is done. Its checkpoint holds everything that changes,
random state included, so a stage continues from where it was stopped.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

Report = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """Where a training run keeps its files, what it was seeded with, and who hears of its progress."""

    folder: Path
    seed: int = 0
    report: Report = lambda line: None
    every: int = 20  # steps between two lines
    save_every: int = 250  # steps between two checkpoints

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    def generator(self, stage: str) -> torch.Generator:
        """The random numbers of one stage in this process."""
        return torch.Generator().manual_seed(hash_text(stage) + 1000 * self.seed + self.rank)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"

    def save(self, name: str, content: dict) -> None:
        """Writes a checkpoint whole or not at all; only the first process writes."""
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f"{name}.partial"
            torch.save(content, partial)
            partial.replace(self.path(name))

    def load(self, name: str) -> dict:
        if not self.path(name).exists():
            raise FileNotFoundError(
                f"Got no {self.path(name)}; this stage starts from it. Run all stages: python -m sf_core train tiny."
            )
        return torch.load(self.path(name), weights_only=True)

    def resume(self, generator: torch.Generator, saved: dict) -> None:
        """Puts a stage's generator where the checkpoint left it; processes whose state is not saved start a new one."""
        generator.set_state(saved["generator"])
        if self.rank:
            generator.manual_seed(saved["step"] + 1000 * self.rank)

    def wait(self) -> None:
        """Until every process is here."""
        if dist.is_initialized():
            dist.barrier()

    def seconds(self) -> dict[str, float]:
        """Wall-clock time spent in each stage so far."""
        path = self.folder / "seconds.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def spend(self, stage: str, seconds: float) -> None:
        if self.rank == 0:
            spent = self.seconds()
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "seconds.json").write_text(json.dumps({**spent, stage: spent.get(stage, 0) + seconds}))


def hash_text(text: str) -> int:
    """A number below a million that depends on the text alone (Python's own hash changes from run to run)."""
    return sum((i + 1) * 131 * ord(c) for i, c in enumerate(text)) % 1_000_000


def steps(
    run: Run, name: str, first: int, total: int, losses: dict[str, Tensor], save: Callable[[int], None]
) -> Iterator[int]:
    """Counts first..total-1; after each step reports now and then what is in `losses`, and calls save(steps done)."""
    began = unsaved = time.perf_counter()
    sums, counted = {}, 0
    for step in range(first, total):
        yield step
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + value.detach()
        counted += 1
        done = step + 1
        if done % run.every == 0 or done == total:
            pace = (time.perf_counter() - began) / (done - first)
            shown = "  ".join(f"{key} {float(value) / counted:.4f}" for key, value in sums.items())
            run.report(f"{name} {done}/{total}  {shown}  {pace:.3f} s/step  ETA {pace * (total - done) / 60:.1f} min")
            sums, counted = {}, 0
        if done % run.save_every == 0 or done == total:
            save(done)
            run.spend(name, time.perf_counter() - unsaved)
            unsaved = time.perf_counter()


def average_gradients(params: Iterable[Tensor]) -> None:
    """Data parallel in one line: every process ends up with the mean gradient."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        grads = [p.grad for p in params if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))
