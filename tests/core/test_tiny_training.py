"""The recipe of the built-in model: every stage runs, continues where it stopped, and its export loads."""

import json
import math
from dataclasses import replace

import pytest
import torch

from sf_core import tiny
from sf_core.checkpoints.load import describe
from sf_core.cli import train_tiny as train
from sf_core.cli.main import main
from sf_core.sampling.config import PRESETS
from sf_core.tiny.autoencoder import has_denoiser
from sf_core.tiny.data import draw, render
from sf_core.training.config import ModelConfig
from sf_core.training.distributed import Group
from sf_core.training.encoders import NEW, load_tiny_autoencoder, open_encoders
from sf_core.training.methods import autoencoder
from sf_core.training.methods.autoencoder import FitAutoencoder
from sf_core.training.methods.decoder import POOL, Pairs, unevenness
from sf_core.training.optim import Muon, orthogonalise
from sf_core.training.run_folder import load_run, read_losses
from sf_core.training.step_random import StepRandom
from sf_core.training.train import make_method
from sf_core.training.train import train as run

STEPS = 2
SMALL = ("batch=4", "data.pool=64")
# A model of two steps shows no prompt; the decoder learns from rollouts of the shipped one, in its latents.
SHIPPED = ("model.student=built-in", f"model.vae={tiny.WEIGHTS / 'autoencoder.safetensors'}", "batch=4", "data.pool=2")


def stage(folder, name, steps=STEPS):
    changes = [word for change in (SHIPPED if name == "decoder" else SMALL) for word in ("--set", change)]
    options = [
        "--out",
        str(folder),
        "--stage",
        name,
        "--steps",
        str(steps),
        "--processes",
        "1",
        "--seed",
        "3",
        *changes,
    ]
    return main(["train", "tiny", *options])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in which every stage took two steps on few clips."""
    folder = tmp_path_factory.mktemp("run")
    assert [stage(folder, name) for name in train.STAGES] == [0] * len(train.STAGES)
    return folder


def test_every_stage_runs_and_stays_finite(trained):
    for name in train.STAGES:
        saved = load_run(trained / name)
        assert saved["step"] == STEPS and saved["seconds"] > 0
        assert all(torch.isfinite(value).all() for value in saved["student"].values())
        losses = read_losses(trained / name)
        assert len(losses) == STEPS and all(math.isfinite(value) for line in losses for value in line.values())


def test_the_autoencoder_sees_the_same_clips_however_a_batch_is_cut(tmp_path, monkeypatch):
    method, seen = FitAutoencoder(train.stage_config("autoencoder", tmp_path), torch.device("cpu")), []

    def watched(vae, frames):
        seen.append(frames)
        return frames.mean(), frames.mean()

    monkeypatch.setattr(autoencoder, "decoder_loss", watched)
    for progress in (0.5, 0.9):
        seen.clear()
        for samples in ((0, 1, 2, 3, 4, 5, 6, 7), (0, 1, 2, 3), (4, 5, 6, 7)):
            method.loss(StepRandom(0, 0, samples), progress)
        assert torch.equal(seen[0], torch.cat(seen[1:])) and not torch.equal(seen[1], seen[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_autoencoder_is_trained_on_a_gpu(tmp_path):
    changes = ("steps=2", "batch=4", "device=cuda")
    run(train.stage_config("autoencoder", tmp_path, changes=changes), Group(), torch.device("cuda"))
    assert load_run(tmp_path / "autoencoder")["step"] == 2


def test_a_decoder_is_trained_on_rollouts_and_leaves_the_latents_alone(trained):
    shipped, made = tiny.load_autoencoder(), load_tiny_autoencoder(trained / "decoder")
    assert torch.equal(made.encoder.weight, shipped.encoder.weight)
    assert not torch.equal(made.decoder[0].linear.weight, shipped.decoder[0].linear.weight)
    pairs = Pairs(**torch.load(trained / "decoder" / POOL, weights_only=True))
    assert pairs.made.shape == pairs.drawn.shape == (len(pairs), 16, 15, 8, 8)
    assert 0.1 < (pairs.made - pairs.drawn).square().mean().sqrt() < 0.6
    assert torch.equal(pairs.frames(0, 0)[3], pairs.frames(0, 0)[0])  # a video's first latent frame is a still
    again = shipped.encode(pairs.frames(0, 0)[None, 3:])
    assert torch.allclose(again[0], pairs.drawn[0, :, :6], atol=1e-4)


def test_a_decoder_needs_a_model_that_follows_prompts_in_its_own_latents(trained, tmp_path):
    config = train.stage_config("decoder", trained, changes=("data.pool=2", f"out={tmp_path}"))
    with pytest.raises(ValueError, match="Got 2 rollouts of .*dmd, none of which shows what its prompt says"):
        make_method(config, Group(), torch.device("cpu"))
    others = train.stage_config("decoder", trained, changes=("model.student=built-in",))
    with pytest.raises(ValueError, match="trained with another autoencoder|trained with another text encoder"):
        make_method(others, Group(), torch.device("cpu"))


def test_a_decoder_weighs_the_grid_of_latent_pixels():
    flat, line, elsewhere = torch.zeros(3, 1, 3, 32, 32).unbind(0)
    line[..., :8] = 0.1
    elsewhere[..., :12] = 0.1
    assert unevenness(flat) == 0
    assert unevenness(line) > 3 * unevenness(elsewhere) > 0


def test_stages_start_from_the_ones_before(trained):
    teacher, dmd = (train.stage_config(name, trained) for name in ("teacher", "dmd"))
    decoder = train.stage_config("decoder", trained)
    assert decoder.model.vae == trained / "autoencoder" and decoder.model.student == str(trained / "dmd")
    assert decoder.sampling == PRESETS["tiny"]
    assert teacher.model.vae == trained / "autoencoder"
    assert dmd.model.student == str(trained / "causal") and dmd.model.teacher == str(trained / "teacher")
    assert dmd.sampling == replace(PRESETS["tiny"], sink=0, pinned=False)
    words = [load_run(trained / name)["text"]["embedding.weight"] for name in ("teacher", "causal", "dmd")]
    assert torch.equal(words[0], words[1]) and torch.equal(words[0], words[2])


def test_a_stage_continues_from_its_checkpoint(trained):
    before = read_losses(trained / "causal")
    assert stage(trained, "causal", STEPS + 1) == 0
    assert read_losses(trained / "causal")[:STEPS] == before
    assert load_run(trained / "causal")["step"] == STEPS + 1


def test_export_writes_parts_that_load(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SCORED", 2)
    monkeypatch.setattr(train, "WINDOWS", 1)
    train.export(train.Recipe(trained), tmp_path)
    wan = tiny.load_transformer(path=tmp_path / "transformer.safetensors")
    assert wan.config == NEW
    _, metadata = tiny.read(tmp_path / "transformer.safetensors")
    assert metadata["seed"] == "3" and metadata["stage"] == "dmd"
    assert metadata["command"].startswith("python -m sf_core train tiny --")
    assert "--seed 3 --set data.pool=64 --set steps=2 --set batch=4" in metadata["command"]
    assert has_denoiser(tiny.read(tmp_path / "autoencoder.safetensors")[0])
    assert describe(tmp_path / "transformer.safetensors").sampling == PRESETS["tiny"]
    assert "shape" in json.loads(metadata["scores"])["video"]["windows"][0]
    assert metadata["command"] in (tmp_path / "README.md").read_text()


def test_a_run_is_evaluated_with_its_own_autoencoder(trained, capsys):
    def residual(*options):
        assert main(["evaluate", "--prompts", "2", "--json", "--model", *map(str, options)]) == 0
        return json.loads(capsys.readouterr().out)[0]["windows"][0]["residual"]

    own, shipped = trained / "autoencoder" / "model.safetensors", tiny.WEIGHTS / "autoencoder.safetensors"
    folder = residual(trained / "dmd")
    assert folder == residual(trained / "dmd" / "model.safetensors", "--autoencoder", own)
    assert folder != residual(trained / "dmd", "--autoencoder", shipped)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_stage_without_the_one_before_is_refused(tmp_path, capsys, processes):
    assert main(["train", "tiny", "--out", str(tmp_path), "--stage", "causal", "--processes", processes]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("sf_core: error: Got no ") and "or train it first" in line


def test_a_still_stays_the_still_it_is():
    encoders = open_encoders(ModelConfig(), torch.device("cpu"))
    stills = encoders.encode(render(draw(8, torch.Generator().manual_seed(0)), 1))
    assert (encoders.still(stills) - stills).abs().mean() < 0.15 * stills.abs().mean()


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
