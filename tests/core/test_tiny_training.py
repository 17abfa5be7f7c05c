"""The training of the built-in model: every stage runs, continues where it stopped, and sees what it should."""

import json
import math

import pytest
import torch

from sf_core import tiny
from sf_core.cli import main
from sf_core.config import PRESETS
from sf_core.tiny import few_step, flow, train
from sf_core.tiny.data import draw, render
from sf_core.tiny.loop import Run
from sf_core.tiny.optim import Muon, orthogonalise

STEPS = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in which every stage took two steps on few clips, with the losses that it reported."""
    folder, lines = tmp_path_factory.mktemp("run"), []
    run = Run(folder, report=lines.append, every=1)
    pool, flow.POOL = flow.POOL, 64
    for fit in train.FIT.values():
        fit(run, STEPS, 4)
    flow.POOL = pool
    return run, lines


def test_every_stage_runs_and_stays_finite(trained):
    run, lines = trained
    for stage in train.FIT:
        assert run.load(stage)["step"] == STEPS
        assert all(torch.isfinite(value).all() for value in run.load(stage)["model"].values())
        told = [line.split() for line in lines if line.startswith(f"{stage} ")]
        assert [words[1] for words in told] == ["1/2", "2/2"]
        assert all(math.isfinite(float(words[3])) and words[-3] == "ETA" for words in told)


def test_a_finished_stage_is_not_run_again(trained):
    run, lines = trained
    before = len(lines)
    flow.fit_causal(run, STEPS, 4)
    few_step.fit_few_step(run, STEPS, 4)
    assert len(lines) == before


def test_a_stage_continues_from_its_checkpoint(trained):
    run, _ = trained
    few_step.fit_few_step(run, STEPS + 1, 2)
    assert run.load("few-step")["step"] == STEPS + 1
    assert run.seconds()["few-step"] > 0


def test_export_writes_parts_that_load(trained, tmp_path, monkeypatch):
    run, _ = trained
    monkeypatch.setattr(train, "SCORED", 2)
    monkeypatch.setattr(train, "WINDOWS", 1)
    train.export(run, tmp_path, "a command")
    wan = tiny.load_model(path=tmp_path / "transformer.safetensors")
    assert wan.config == flow.CONFIG
    _, metadata = tiny.read(tmp_path / "transformer.safetensors")
    assert metadata["command"] == "a command" and metadata["seed"] == "0"
    assert json.loads(metadata["sampling"])["window"] == PRESETS["tiny"].window
    assert "shape" in json.loads(metadata["scores"])["video"]["windows"][0]
    assert "a command" in (tmp_path / "README.md").read_text()


def test_a_stage_without_the_one_before_is_refused(tmp_path, capsys):
    assert main(["train", "tiny", "--out", str(tmp_path), "--stage", "causal", "--processes", "1"]) == 2
    assert "this stage starts from it" in capsys.readouterr().err


def test_noisy_chunks_see_clean_chunks_before_them_and_themselves():
    sees = flow.teacher_forcing(flow.CONFIG, 9).mask[::16, ::16]  # one token of each frame
    clean, noisy = sees[:9], sees[9:]
    assert clean[:3, :3].all() and not clean[:3, 3:].any()
    assert clean[6:, :9].all() and not clean[:, 9:].any()
    assert not noisy[:3, :9].any() and noisy[:3, 9:12].all() and not noisy[:3, 12:].any()
    assert noisy[6:, :6].all() and not noisy[6:, 6:15].any() and noisy[6:, 15:].all()


def test_rollout_carries_gradient_through_the_exit_step_of_its_last_chunks_only():
    wan, text = flow.new_models(0)
    torch.nn.init.normal_(wan.head.head.weight, std=0.02)
    embeds = text.encode(["a red circle"] * 2)
    clip = few_step.self_rollout(wan, PRESETS["tiny"], embeds, 1, 1, torch.Generator().manual_seed(0))
    assert clip.shape == (2, 16, 9, 8, 8)
    clip[:, :, :3].square().sum().backward()
    assert wan.blocks[0].ffn[0].weight.grad.abs().sum() > 0


def test_a_still_stays_the_still_it_is():
    vae = tiny.load_autoencoder()
    stills = vae.encode(render(draw(8, torch.Generator().manual_seed(0)), 1))
    assert (few_step.as_still(vae, stills) - stills).abs().mean() < 0.15 * stills.abs().mean()


def test_orthogonalised_matrices_have_singular_values_near_one():
    for shape in ((3, 8, 20), (2, 20, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
        assert values.min() > 0.5 and values.max() < 1.3


def test_muon_finds_the_minimum_of_a_bowl():
    weight = torch.nn.Parameter(torch.randn(6, 4))
    muon = Muon([weight], lr=0.05)
    for _ in range(200):
        muon.zero_grad()
        weight.square().sum().backward()
        muon.step()
    assert weight.abs().max() < 0.3
