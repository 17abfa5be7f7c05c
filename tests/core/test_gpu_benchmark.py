"""benchmarks/gpu.py runs, on a CPU and small, and the published algorithm beside it is the same algorithm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.published import Published
from sf_core.cli.bench import Job, Ours, plan_of, timed
from sf_core.sampling.config import Sampling
from sf_core.wan.config import WanConfig

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = "import sys; sys.modules.update(dict.fromkeys(('av', 'imageio', 'PIL', 'tokenizers', 'tqdm', 'yaml')));"


@pytest.mark.parametrize(
    "sampling",
    (
        Sampling(),
        Sampling(window=9),
        Sampling(window=9, sink=3),
        Sampling(window=5, sink=1, chunk=2, context_noise=100),
    ),
)
def test_the_published_algorithm_makes_the_same_latents(sampling):
    config = WanConfig(dim=48, ffn_dim=96, heads=2, layers=2, text_dim=32, text_len=8)
    job = Job(config, plan_of(18 if sampling.chunk == 3 else 14, 64, 32, sampling))
    made = []
    for implementation in (Ours(), Published()):
        implementation.prepare(job, job.weights())
        made.append(timed(job, implementation)[1])
    assert gpu.relative(made[1], made[0]) < 1e-6


def test_every_part_runs_with_torch_einops_and_safetensors_alone(tmp_path):
    """The machine with the GPU may have nothing else."""
    command = f"{WITHOUT} from benchmarks.gpu import main; sys.exit(main(['--out', {str(tmp_path)!r}, '--tiny']))"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert list(report) == [part.__name__ for part in gpu.PARTS]
    assert report["waits"]["TAEHV"] == report["waits"]["Wan VAE"] == "none" and report["waits"]["TAEHV, frames"] == 33
    assert report["correctness"]["GPU against CPU, float32"] == 0
    assert all(0 < report["correctness"][way] < 0.1 for way in ("bfloat16", "float8", "compiled", "float8 cache"))
    assert report["published"]["latents apart"] < 0.01 and "end to end" in done.stdout


def test_a_part_that_fails_or_would_begin_too_late_is_named_and_the_others_run(tmp_path, monkeypatch):
    def broken(bench):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "PARTS", (broken, gpu.versions))
    assert gpu.main(["--out", str(tmp_path), "--tiny"]) == 1
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["broken"]["error"] == "RuntimeError: no such kernel" and report["versions"]["torch"]
    assert gpu.main(["--out", str(tmp_path), "--tiny", "--seconds", "5"]) == 0
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["versions"]["left out"] == "for want of time" and "torch" not in report["versions"]
