"""More than one process: the same losses, and checkpoints that load in any number of them."""

import os
import subprocess
import sys

import pytest
import torch

from sf_core.checkpoints.load import load_model
from sf_core.training.distributed import Group
from sf_core.training.run_folder import MODEL, load_run
from tests.core.runs import losses, trained, written

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="torchrun needs torch.distributed with gloo"
)
STEPS = 4


def torchrun(path, processes, *changes):
    """Runs a configuration in several processes, on one CPU thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "sf_core", "train", str(path), *(f"--set={change}" for change in changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FSDP2-wrapped" not in done.stderr and len(done.stdout.splitlines()) == 1  # one process speaks for all


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    trained("bidirectional", folder / "teacher")
    trained("teacher-forcing", folder / "causal")
    trained("dmd", folder / "alone", steps=STEPS, log={"save_every": 2})
    return folder


def alike(one, other):
    """Whether two runs had the same losses and gradients."""
    for a, b in zip(losses(one), losses(other), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-4 if "gradient" in name else 1e-5), name


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_give_the_losses_of_one(runs, shard):
    out = runs / f"two-{shard}"
    torchrun(written("dmd", out, steps=STEPS, log={"save_every": 2}, shard=shard), 2)
    alike(out, runs / "alone")
    ours, theirs = (load_run(folder)["student"] for folder in (out, runs / "alone"))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)


def test_sharded_blocks_may_run_again(runs):
    """The discriminator reads the critic's tokens through the hooks, too.

    Without the slopes of logits: differences of nearly equal numbers, over a hundredth, amplify rounding.
    """
    out, changes = runs / "gan", {"steps": 2, "loss": {"gan": {"r1": 0, "r2": 0}}}
    torchrun(written("gan", out, shard=True, recompute=True, **changes), 2)
    alike(out, trained("gan", runs / "gan-alone", **changes))


def test_a_sharded_discriminator_reads_bfloat16_tokens(runs):
    out, changes = runs / "gan-bf16", {"steps": 1, "precision": "bfloat16"}
    torchrun(written("gan", out, shard=True, **changes), 2)
    alone = trained("gan", runs / "gan-bf16-alone", **changes)
    for name in ("generator", "discriminator", "score"):
        assert losses(out, name) == pytest.approx(losses(alone, name), rel=0.02)


def test_a_checkpoint_loads_in_any_number_of_processes(runs):
    """Two sharded, then one, then two that are not: the losses of one process all along."""
    out = runs / "moved"
    path = written("dmd", out, log={"save_every": 1})
    torchrun(path, 2, "shard=true", "steps=1")
    trained("dmd", out, steps=2)
    torchrun(path, 2, "shard=true", "steps=4")
    alike(out, runs / "alone")
    wan, _ = load_model(out / MODEL)
    assert all(torch.isfinite(value).all() for value in wan.state_dict().values())


def test_sharded_processes_sample_together(runs):
    out = runs / "sampled"
    told = {"save_every": 2, "sample_every": 1, "samples": ["a red circle", "a blue star"], "sample_frames": 2}
    torchrun(written("dmd", out, steps=2, log=told, shard=True, recompute=True), 2)
    assert sorted(path.name for path in (out / "samples").iterdir()) == [
        f"00000{i}-{n}.mp4" for i in (1, 2) for n in (0, 1)
    ]


def test_a_batch_that_does_not_divide_is_refused():
    assert Group(1, 2).share(8, 2) == [(4, 5), (6, 7)]
    assert Group().share(4, None) == [(0, 1, 2, 3)]
    with pytest.raises(ValueError, match="Got a batch of 5 for 2 processes"):
        Group(0, 2).share(5, None)
