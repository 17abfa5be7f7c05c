"""What the benchmark counts and compares, on jobs that take no time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sf_core.cli import bench
from sf_core.cli.bench import JOBS, Job, plan_of
from sf_core.cli.main import main
from sf_core.sampling.config import Sampling
from sf_core.wan.config import WAN_1_3B, WanConfig
from tests.core.test_cli import refused

CONFIG = WanConfig(dim=24, heads=2, layers=1, ffn_dim=32, freq_dim=16, text_dim=8, text_len=6)
SMALL = Job(CONFIG, plan_of(6, 32, 16))
RECOMPUTE = f"{Path(__file__).parents[2]}/benchmarks/recompute.py:Recompute"


@pytest.fixture(autouse=True)
def small_jobs(monkeypatch):
    monkeypatch.setitem(JOBS, "cpu", SMALL)
    monkeypatch.setattr("sf_core.cli.bench.matmul_peak", lambda device, dtype: 1e9)


def run(capsys, *options):
    assert main(["bench", "--frames", "6", "--repeats", "1", *options]) == 0
    return capsys.readouterr().out


def test_operations_of_a_full_size_forward():
    one = Job(WAN_1_3B, plan_of(3, 832, 480, Sampling(steps=(1000,))))
    tokens = 3 * WAN_1_3B.tokens_per_frame(60, 104)
    assert tokens == 4680
    attention = 0.863e9 * (tokens + WAN_1_3B.text_len)
    assert one.flops() == pytest.approx(11.7e12 + attention, rel=0.01)
    # Two chunks: the first is committed too, the second sees twice as many tokens.
    two = one.with_frames(6)
    assert two.flops() == pytest.approx(3 * one.flops() + 0.863e9 * tokens, rel=0.001)
    windowed = replace(one, plan=plan_of(6, 832, 480, Sampling(steps=(1000,), window=3)))
    assert windowed.flops() == pytest.approx(3 * one.flops(), rel=1e-6)


def test_the_report_has_every_figure(capsys):
    report = json.loads(run(capsys, "--json", "--decoder", "taehv"))
    assert {"peak_tflops", "rollout_tflop", "step_s", "ours", "taehv", "peak_memory_mib"} <= report.keys()
    ours = report["ours"]
    assert ours["dit_fps"] == pytest.approx(21 / ours["rollout_s"])
    assert ours["share_of_peak"] == pytest.approx(report["rollout_tflop"] * 1e12 / ours["rollout_s"] / 1e9)
    assert 0 < report["taehv"]["first_frames_s"] and 0 < report["taehv"]["fps"] < report["taehv"]["decode_fps"] * 1.5


def test_another_implementation_is_timed_and_compared(capsys):
    report = json.loads(run(capsys, "--json", "--against", RECOMPUTE))
    assert report["difference"] < 1e-5 and report["other"]["rollout_s"] > 0
    assert "difference" in run(capsys, "--against", RECOMPUTE)


@pytest.mark.parametrize("options", [["--fp8"], ["--fp8-cache"], ["--window", "3"], ["--dtype", "bfloat16"]])
def test_options_run(capsys, options):
    assert "% of the matrix product's speed" in run(capsys, *options)


def test_a_single_chunk_is_its_own_last(capsys):
    ours = json.loads(run(capsys, "--json", "--frames", "3"))["ours"]
    assert ours["last_chunk_s"] == ours["chunk_s"] == ours["rollout_s"] > 0


def test_a_system_that_tells_no_peak_gets_a_report(capsys, monkeypatch):
    monkeypatch.setattr(bench, "peak_memory_mib", lambda device: None)
    assert "peak memory      not told by this system" in run(capsys)
    assert json.loads(run(capsys, "--json"))["peak_memory_mib"] is None


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_clocks_wait_for_the_device(monkeypatch, kind):
    waited = []
    monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda *_: waited.append(kind))
    bench.now(torch.device("cpu"))
    assert not waited
    bench.now(torch.device(kind))
    assert waited == [kind]


@pytest.mark.parametrize(
    "options, device, dtype",
    [
        ([], "cpu", torch.float32),
        ([], "cuda", torch.bfloat16),
        ([], "mps", torch.bfloat16),
        (["--dtype", "float16"], "cuda", torch.float16),
    ],
)
def test_it_computes_in_what_generate_computes_in(capsys, monkeypatch, options, device, dtype):
    jobs = []
    monkeypatch.setattr(bench, "measure", lambda job, *_: jobs.append(job) or {})
    monkeypatch.setattr(bench, "device", torch.device)
    run(capsys, "--json", "--device", device, *options)
    assert jobs[0].dtype == dtype


def test_weights_depend_on_nothing_but_the_job():
    torch.manual_seed(1)
    first = SMALL.weights()
    torch.manual_seed(2)
    assert all(torch.equal(tensor, first[name]) for name, tensor in SMALL.weights().items())


@pytest.mark.parametrize("place", ["missing.py:Adapter", RECOMPUTE.replace("Recompute", "Nothing"), "benchmarks"])
def test_an_adapter_that_is_not_there(capsys, place):
    assert "Got --against" in refused(capsys, "bench", "--against", place)
