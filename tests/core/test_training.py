"""The trainer: every method runs, continues to the bit where it was killed, and says what is wrong."""

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sf_core.checkpoints.load import describe, load_model
from sf_core.cli.main import main
from sf_core.sampling import context
from sf_core.sampling.noise import SeededNoise
from sf_core.tiny import load_autoencoder
from sf_core.training import metrics
from sf_core.training.config import AUTOENCODER_METHODS, METHODS, SHIPPED, ModelConfig, read_config
from sf_core.training.data import ProceduralClips, open_data
from sf_core.training.distributed import Group
from sf_core.training.encoders import open_encoders
from sf_core.training.methods import dmd
from sf_core.training.methods.losses import critic_flow
from sf_core.training.optim import Average, rate_factor
from sf_core.training.run_folder import LOSSES, MODEL, load_run, save_run
from sf_core.training.step_random import StepRandom
from sf_core.training.train import make_method
from sf_core.training.trainer import Trainer, TrainingStopped
from sf_core.video import save_video
from sf_core.wan.config import WanConfig
from sf_core.wan.model import WanModel
from tests.core.rolling import roll_chunks, roll_out
from tests.core.runs import SAMPLING, config, losses, trained, written

CPU = torch.device("cpu")
# What starts from a causal model; autoencoders have tests of their own (test_tiny_training.py).
STARTED = [name for name in METHODS if name not in ("bidirectional", "teacher-forcing", *AUTOENCODER_METHODS)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a teacher and a causal model that others start from."""
    folder = tmp_path_factory.mktemp("runs")
    trained("bidirectional", folder / "teacher")
    trained("teacher-forcing", folder / "causal")
    return folder


@pytest.mark.parametrize("method", STARTED)
def test_every_method_runs_and_its_model_loads(runs, method):
    out = trained(method, runs / method)
    assert [line["step"] for line in losses(out)] == [1, 2, 3]
    assert all(math.isfinite(value) for line in losses(out) for value in line.values())
    wan, checkpoint = load_model(out / MODEL)
    assert checkpoint.sampling == config(method, out).sampling and checkpoint.config.dim == 24
    before = load_run(runs / "causal")["student"]
    assert any(not torch.equal(value, before[name].bfloat16()) for name, value in wan.state_dict().items())


def test_a_student_learns(runs):
    out = trained("bidirectional", runs / "learns", steps=60, batch=8, optimizer={"lr": 3e-3, "clip": 1.0})
    told = losses(out, "loss")
    assert sum(told[-10:]) < 0.9 * sum(told[:10])


def test_a_finished_run_is_not_run_again(runs):
    before = (runs / "teacher" / LOSSES).read_text()
    trained("bidirectional", runs / "teacher")
    assert (runs / "teacher" / LOSSES).read_text() == before


def test_accumulated_passes_are_one_batch(runs):
    whole = trained("dmd", runs / "whole")
    parts = trained("dmd", runs / "parts", micro_batch=1)
    for name in ("generator", "critic"):
        assert losses(parts, name) == pytest.approx(losses(whole, name), rel=1e-4)


@pytest.mark.parametrize("method", ["dmd", "teacher-forcing"])
def test_recomputing_blocks_changes_nothing(runs, method):
    student = {"model": {"world": "tiny", "student": str(runs / "causal"), "teacher": str(runs / "teacher")}}
    plain, again = (
        trained(method, runs / f"{method}-{recompute}", recompute=recompute, **student) for recompute in (False, True)
    )
    for one, other in zip(losses(plain), losses(again)):
        assert one == pytest.approx(other, rel=1e-4)


def test_the_critic_may_learn_from_the_generators_own_clips(runs):
    changes = {"critic": {"updates": 2, "fresh": False, "optimizer": {"lr": 1e-3}}}
    assert losses(trained("dmd", runs / "own", **changes), "critic") != losses(trained("dmd", runs / "dmd"), "critic")


def test_the_critic_may_learn_alone_at_first(runs):
    """On rollouts of its own, as the student makes none."""
    critic = {"updates": 2, "fresh": False, "ahead": 0.2, "optimizer": {"lr": 1e-3}}
    settings = config("gan", runs / "ahead", critic=critic)
    method = make_method(settings, Group(), CPU)
    trainer = Trainer(settings, method, Group())
    parts = {name: next(method.modules[name].parameters()) for name in ("student", "critic", "discriminator")}
    for step, learns in ((0, False), (1, True)):
        before = {name: part.detach().clone() for name, part in parts.items()}
        told = trainer.step(step)
        moved = {name: not torch.equal(part, before[name]) for name, part in parts.items()}
        assert moved == {"student": learns, "critic": True, "discriminator": True}
        assert ("generator" in told) == learns and "discriminator" in told


@pytest.mark.parametrize("method", ["sid", "gan"])
def test_an_update_makes_gradients_of_its_own_weights_alone(runs, method, monkeypatch):
    settings = config(method, runs / f"{method}-alone")
    method = make_method(settings, Group(), CPU)
    trainer, update = Trainer(settings, method, Group()), method.updates[0]
    reached = {}

    def told():
        for name, module in method.modules.items():
            reached[name] = any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        return torch.tensor(0.0)

    monkeypatch.setattr(update.optimizer, "clip", told)
    trainer.update(update, 0)
    assert reached.pop("student") and reached and not any(reached.values())


def test_teacher_forced_chunks_see_the_clips_of_their_captions(runs, monkeypatch):
    method = make_method(config("dmd", runs / "forced", loss={"context": "teacher-forced"}), Group(), CPU)
    seen, self_rollout = [], dmd.self_rollout
    monkeypatch.setattr(dmd, "self_rollout", lambda *args: seen.append((args[2], args[-1])) or self_rollout(*args))
    random = StepRandom(0, 0, (0, 1, 2, 3))
    method.generator_step(random, 0.0)
    (embeds, context), batch = seen[0], method.data.batch(random, "generator", 2, plain=True)
    assert torch.equal(context, batch.clips) and torch.equal(embeds, method.encoders.embeds(batch.captions))


def test_the_discriminator_compares_clips_of_the_same_captions(runs, monkeypatch):
    """And what keeps its critic a score net is the critic's loss, though its forward is the discriminator's."""
    method = make_method(config("gan", runs / "compared"), Group(), CPU)
    random, looks, discriminate = StepRandom(0, 0, (0, 1, 2, 3)), [], method.discriminate
    monkeypatch.setattr(method, "discriminate", lambda *args: looks.append(args) or discriminate(*args))
    method.generator_step(random, 0.0)
    batch = method.data.batch(random, "generator", 2, plain=True)
    made, embeds = method.generated[random.samples], method.encoders.embeds(batch.captions)
    level = method.config.loss.levels.draw(batch.clips, random, "generator")
    (fake, *_), (real, *_) = looks
    assert torch.equal(real, level.apply(batch.clips)) and torch.equal(fake, level.apply(made.clips))
    assert all(torch.equal(args[-1], embeds) for args in looks)
    told = method.critic_losses(made, level, random, "critic")
    assert told["score"].item() == pytest.approx(critic_flow(method.critic, made.clips, embeds, level).item(), rel=1e-5)


def test_bfloat16_stays_near_float32(runs):
    assert losses(trained("dmd", runs / "bf16", precision="bfloat16"), "critic")[0] == pytest.approx(
        losses(trained("dmd", runs / "dmd"), "critic")[0], rel=0.05
    )


# --- Killed and continued --------------------------------------------------------------------------------------------


def start(path, *changes):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sf_core", "train", str(path), *(f"--set={change}" for change in changes)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_killed_run_continues_to_the_bit(runs):
    whole = trained("dmd", runs / "uncut", steps=12, log={"save_every": 4})
    out = runs / "killed"
    process = start(written("dmd", out, steps=12, log={"save_every": 4}))
    wait_for(lambda: (out / LOSSES).is_file() and len(losses(out)) >= 6, process)
    process.kill()
    process.wait()
    done = load_run(out)["step"]
    assert 4 <= done < 12 and done % 4 == 0
    trained("dmd", out, steps=12, log={"save_every": 4})
    assert losses(out) == losses(whole)
    ours, theirs = (load_run(folder)["student"] for folder in (out, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_checkpoint_holds_the_average_once_and_goes_on_apart_from_its_file(runs):
    out = trained("bidirectional", runs / "once", steps=1)
    saved = load_run(out)
    for name, value in saved["averages"]["student"]["values"].items():
        assert saved["student"][name].data_ptr() == value.data_ptr()
    settings = config("bidirectional", out, steps=2)
    method = make_method(settings, Group(), CPU)
    Trainer(settings, method, Group()).restore(saved)
    momenta = saved["optimizers"][0][0]["state"]
    for i, p in enumerate(method.optimizer.parts[0].param_groups[0]["params"]):
        ours, theirs = method.optimizer.parts[0].state[p]["exp_avg"], momenta[i]["exp_avg"]
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()


def test_only_the_first_process_keeps_what_is_gathered_for_a_checkpoint(runs):
    method = make_method(config("dmd", runs / "dropped"), Group(), CPU)
    assert method.state(keep=False) == {} and set(method.state()) >= {"modules", "averages", "student", "text", "wan"}
    for part in method.optimizer.state_dict(keep=False), method.averages["student"].state_dict(keep=False)["values"]:
        assert not any(isinstance(value, torch.Tensor) for value in torch.utils._pytree.tree_leaves(part))


def test_a_kill_while_saving_leaves_the_checkpoint_before(runs, monkeypatch):
    out = runs / "saving"
    trained("bidirectional", out, steps=2)
    kept = (out / "checkpoint.pt").read_bytes()

    def cut_short(content, path):
        path.write_bytes(kept[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(KeyboardInterrupt):
        trained("bidirectional", out, steps=4)
    monkeypatch.undo()
    assert (out / "checkpoint.pt").read_bytes() == kept
    trained("bidirectional", out, steps=4)
    assert load_run(out)["step"] == 4


@pytest.mark.parametrize("spoils", ["loss", "gradient"])
def test_what_is_no_number_stops_the_run_and_keeps_the_checkpoint(runs, spoils):
    out = runs / f"nan-{spoils}"
    trained("bidirectional", out, steps=3, log={"save_every": 3})
    settings = config("bidirectional", out, steps=9, log={"save_every": 4})
    method = make_method(settings, Group(), CPU)
    trainer, loss = Trainer(settings, method, Group()), method.loss

    def spoilt(random, progress):
        good = loss(random, progress)["loss"]
        if random.step < 7:
            return {"loss": good}
        return {"loss": good * math.nan if spoils == "loss" else good + (good * 0).sqrt()}

    method.updates[0] = replace(method.updates[0], loss=spoilt)
    name = "loss" if spoils == "loss" else "loss gradient"
    with pytest.raises(TrainingStopped, match=f"Got nan for '{name}' at step 8;.*holds step 4, which is good"):
        trainer.run()
    saved = load_run(out)
    assert saved["step"] == 4 and all(torch.isfinite(value).all() for value in saved["student"].values())


# --- What is told ----------------------------------------------------------------------------------------------------


def test_tensorboard_plot_and_samples_are_written(runs):
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = {"every": 1, "sample_every": 2, "samples": ["a red circle moves right"], "sample_frames": 2}
    out = trained("dmd", runs / "told", log={**told, "tensorboard": True, "plot": True})
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("generator")] == pytest.approx(losses(out, "generator"))
    assert events.Images("0: a red circle moves right")[0].encoded_image_string.startswith(b"GIF")
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "samples" / "000002-0.mp4").stat().st_size > 0


def test_samples_are_made_one_at_a_time_and_decoded_where_they_are_told(runs, monkeypatch):
    prompts = ["a red circle moves right", "a blue star"]
    settings = config("dmd", runs / "sampled", recompute=True, sampling={**SAMPLING, "window": 2})
    method, caches, decoded = make_method(settings, Group(), CPU), [], []
    decode, cache = method.encoders.decode, context.RollingCache
    monkeypatch.setattr(method.encoders, "decode", lambda latents: decoded.append(latents.clone()) or decode(latents))
    monkeypatch.setattr(context, "RollingCache", lambda config, *args: caches.append(args[0]) or cache(config, *args))
    videos = method.sample(prompts, 4)
    assert [(shape.batch, shape.slots) for shape in caches] == [(1, 2)] * 2 and not decoded
    assert [video.shape for video in videos] == [(13, 64, 64, 3)] * 2
    for number, prompt in enumerate(prompts):
        embeds, noise = method.encoders.embeds([prompt]), StepRandom(0, 0, (0, 1)).noise("sample").seeds[number]
        sampling, noise = settings.sampling, SeededNoise(noise)
        expected = roll_out(method.student.wan, sampling, embeds.detach(), noise, 4, *method.size)
        torch.testing.assert_close(decoded[number], expected, rtol=1e-4, atol=1e-4)


def test_tensorboard_forgets_steps_that_are_taken_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config("bidirectional", tmp_path, log={"tensorboard": True, "every": 1})
    for done, last in ((0, 3), (1, 2)):
        with metrics.Metrics(settings, None, Group(), done) as log:
            for step in range(done + 1, last + 1):
                log.log(step, {"loss": done})
    told = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in told] == [(1, 0), (2, 1)]


@pytest.mark.parametrize(("key", "package"), [("tensorboard", "torch.utils.tensorboard"), ("plot", "matplotlib")])
def test_a_missing_package_is_named_before_the_first_step(runs, monkeypatch, key, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"Got log.{key} without.*pip install"):
        trained("bidirectional", runs / f"without-{key}", log={key: True})


def test_the_average_follows_and_can_be_put_in_place():
    layer = torch.nn.Linear(2, 2)
    first = layer.weight.detach().clone()
    average = Average(layer, 0.5, start=1)
    with torch.no_grad():
        layer.weight += 1
    average.update(0)
    assert torch.equal(average.values["weight"], layer.weight)  # before its start it is the weights themselves
    with torch.no_grad():
        layer.weight += 1
    average.update(1)
    assert (average.values["weight"] > first + 1).all() and (average.values["weight"] < layer.weight).all()
    live = layer.weight.detach().clone()
    with average.swap_in():
        assert torch.equal(layer.weight, average.values["weight"])
    assert torch.equal(layer.weight, live)


def test_rates_warm_up_and_fall_to_zero():
    assert rate_factor(0.0, 0.1, 0.5) < 0.01 < rate_factor(0.05, 0.1, 0.5) < 1 == rate_factor(0.3, 0.1, 0.5)
    assert rate_factor(0.75, 0.1, 0.5) == 0.5 and rate_factor(1.0, 0.1, 0.5) == 0 and rate_factor(0.9, 0.0, 1.0) == 1


# --- Bad input -------------------------------------------------------------------------------------------------------


def refused(capsys, *argv):
    """The one line that a run which cannot be ends with."""
    assert main(["train", *map(str, argv)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("sf_core: error: Got ")
    return line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.learning_rate=1", "'optimizer.learning_rate', which is none"),
        ("optimizr.lr=1", "Did you mean 'optimizer'?"),
        ("critic.optimizer.weight_decy=1", "Did you mean 'critic.optimizer.weight_decay'?"),
        ("steps=many", "Got steps: 'many'; it is a whole number"),
        ("critic.ahead=15", "Got critic.ahead 15.0; it is a share of the run"),
        ("steps=0", "all must be 1 or more"),
        ("method=dmdd", "Did you mean 'dmd'?"),
        ("precision=fp8", "Got precision 'fp8', which is none. There is bfloat16, float32"),
        ("sampling.steps=4", "Got sampling.steps: 4; it is a list"),
        ("optimizer=3", "it has keys of its own: lr, muon_lr"),
        ("rollout.exits=random", "there is shared and per-chunk"),
        ("data.prompts=p.txt", "trained on one of prompts, clips and procedural"),
        ("data.procedural=null", "Got nothing under data"),
        ("data.procedural=some", "there is trained, held-out, all"),
        ("model.teacher=null", "Got no model.teacher; dmd learns from one"),
        ("model.teacher=nowhere.pt", "Got no nowhere.pt; a model is a file"),
        ("micro_batch=3", "every pass takes as many samples"),
        ("shard=true --set optimizer.muon_lr=1e-3", "Got Muon with sharded weights"),
        ("shard=true", "Start the run with torchrun"),
        ("lora={layers: [w]}", "Got lora.layers ['w'], which no block has"),
        ("nonsense", "write it as key=value"),
        ("steps.x=1", "Got --set steps.x=1; steps is 3 and has no keys of its own"),
        ("optimizer.betas=[0.9]", "Got optimizer.betas: [0.9]; it has 2 entries"),
        ("log.sample_every=1", "Got log.sample_every 1 without prompts to sample"),
        ("log.samples=[qwerty] --set log.sample_every=1", "Got the prompt 'qwerty'"),
        ("data.negative=qwerty", "Got the prompt 'qwerty'"),
        ("data.pool=0", "Got data.pool 0; at least one clip"),
        ("lora={rank: 0}", "Got lora.rank 0"),
        ("device=gpu", "Got device 'gpu', which is none"),
        ("model.frozen=bfloat16", "Got model.frozen bfloat16 with precision float32"),
        (
            "recompute=true --set sampling.pinned=true --set sampling.sink=1",
            "Got sampling.pinned with sampling.sink 1, and recompute",
        ),
        ("loss.context=teacher-forced --set rollout.extra_chunks=1", "Got rollout.extra_chunks 1 with loss.context"),
        (
            "model.world=wan --set data.procedural=null --set data.prompts=p --set model.critic=built-in",
            "Got the built-in model in the wan world",
        ),
        ("model.world=wan", "Got procedural data outside the tiny world"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(runs, capsys, change, message):
    first, *more = change.split(" --set ")
    path = written("dmd", runs / "refused")
    assert message in refused(capsys, path, "--set", first, *(word for one in more for word in ("--set", one)))


@pytest.mark.parametrize(("name", "stage"), [("tiny-teacher", "autoencoder"), ("tiny-dmd", "causal")])
def test_a_shipped_configuration_names_the_stage_it_lacks(tmp_path, monkeypatch, capsys, name, stage):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, name).endswith(f"train it first, by python -m sf_core train tiny --stage {stage}.")


def test_files_that_hold_no_configuration_are_refused(tmp_path, capsys):
    assert "shipped configurations are" in refused(capsys, "nothing-of-that-name")
    (tmp_path / "a.yaml").write_text("method: [dmd")
    assert "which is not YAML" in refused(capsys, tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("- dmd")
    assert "which holds no keys" in refused(capsys, tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("method: dmd")
    assert "Got no 'out'; a run needs it" in refused(capsys, tmp_path / "a.yaml")


def test_numbers_may_be_written_as_people_write_them(tmp_path):
    (tmp_path / "a.yaml").write_text("{method: bidirectional, out: o, data: {procedural: all}, optimizer: {lr: 1e-4}}")
    read = read_config(tmp_path / "a.yaml", ["steps=2e3", "average.decay=5e-1"])
    assert (read.optimizer.lr, read.steps, read.average.decay) == (1e-4, 2000, 0.5)


def test_networks_of_another_lineage_are_refused(runs, tmp_path, capsys):
    path = written("dmd", runs / "mixed")
    line = refused(capsys, path, "--set", "model.teacher=built-in")
    assert "Got model.teacher built-in, which was trained with another text encoder" in line
    assert "Got model.critic built-in" in refused(capsys, path, "--set", "model.critic=built-in")
    save_file({name: value + 0.1 for name, value in load_autoencoder().state_dict().items()}, tmp_path / "vae")
    line = refused(capsys, path, "--set", f"model.vae={tmp_path / 'vae'}")
    assert f"Got model.student {runs / 'causal'}, which was trained with another autoencoder" in line


def test_the_file_of_a_run_is_of_the_lineage_of_its_folder(runs):
    files = {name: str(runs / name / MODEL) for name in ("causal", "teacher")}
    model = {"world": "tiny", "student": files["causal"], "teacher": files["teacher"], "critic": str(runs / "teacher")}
    assert len(losses(trained("dmd", runs / "files", steps=1, model=model))) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("seed=1", "Got seed 1; {out}/checkpoint.pt was trained with 0. Continue with that, or choose another `out`."),
        ("method=sid", "Got method 'sid'; {out}/checkpoint.pt was trained with 'dmd'"),
        ("data.pool=9", "Got data.pool 9; {out}/checkpoint.pt was trained with 8"),
        ("batch=8", "Got batch 8;"),
        ("model.teacher=built-in", "Got model.teacher 'built-in';"),
        ("optimizer.muon_lr=1e-3", "Got optimizer.muon_lr 0.001; {out}/checkpoint.pt was trained with None"),
        ("critic.optimizer.muon_lr=1e-3", "Got critic.optimizer.muon_lr 0.001;"),
        ("lora.rank=2", "Got lora {'rank': 2"),
        ("loss.guidance=7", "Got loss.guidance 7.0; {out}/checkpoint.pt was trained with 4.0"),
        ("loss.levels.shift=3", "Got loss.levels.shift 3.0; {out}/checkpoint.pt was trained with 5.0"),
        ("sampling.window=2", "Got sampling.window 2; {out}/checkpoint.pt was trained with None"),
        ("rollout.exits=per-chunk", "Got rollout.exits 'per-chunk'; {out}/checkpoint.pt was trained with 'shared'"),
        ("flow.shift=3", "Got flow.shift 3.0; {out}/checkpoint.pt was trained with 5.0"),
    ],
)
def test_a_run_does_not_continue_as_another(runs, change, told):
    out = runs / "itself"
    path = written("dmd", out, steps=1)
    if not out.exists():
        trained("dmd", out, steps=1)
    settings = read_config(path, ["steps=2", change])
    method = type("Any", (), {})()
    with pytest.raises(ValueError) as error:
        Trainer(settings, method, Group())
    assert told.replace("{out}", str(out)) in str(error.value)


def test_rates_and_steps_may_change_on_the_way_and_old_checkpoints_go_on(runs):
    out = trained("bidirectional", runs / "on", steps=1)
    saved = load_run(out)
    del saved["config"]
    save_run(out, saved)
    trained("bidirectional", out, steps=2)
    model = {"world": "tiny", "student": "new", "dim": 24, "layers": 2, "heads": 2, "ffn_dim": 32, "frozen": "bfloat16"}
    options = {"optimizer": {"lr": 1e-4}, "log": {"save_every": 1}, "model": model, "precision": "bfloat16"}
    trained("bidirectional", out, steps=3, **options)
    assert load_run(out)["step"] == 3


def test_the_settings_of_a_continued_optimizer_are_the_configurations(runs):
    out = trained("bidirectional", runs / "betas", steps=1, optimizer={"lr": 1e-3, "betas": [0.5, 0.9]})
    settings = config("bidirectional", out, steps=2, optimizer={"lr": 1e-3, "betas": [0.0, 0.99], "weight_decay": 0.1})
    method = make_method(settings, Group(), CPU)
    Trainer(settings, method, Group())
    (group,) = method.optimizer.parts[0].param_groups
    assert group["betas"] == (0.0, 0.99) and group["weight_decay"] == 0.1
    assert all("exp_avg" in method.optimizer.parts[0].state[p] for p in group["params"])


def test_the_checkpoint_of_another_architecture_is_refused(runs, capsys):
    out = runs / "other"
    trained("bidirectional", out)
    path = written("bidirectional", out, steps=5, model={"world": "tiny", "student": "new", "dim": 32, "heads": 2})
    saved = load_run(out)
    del saved["config"]
    save_run(out, saved)
    assert "whose student is of another architecture" in refused(capsys, path)


@pytest.mark.parametrize("name", ["student", "critic", "teacher"])
def test_a_network_for_other_prompts_is_refused(runs, tmp_path, capsys, name):
    odd = replace(WanConfig(dim=24, heads=2, layers=1, ffn_dim=32), text_dim=64, text_len=16)
    save_file(WanModel(odd).state_dict(), tmp_path / "odd.safetensors", {"wan": json.dumps(asdict(odd))})
    path = written("dmd", runs / "odd")
    line = refused(capsys, path, "--set", f"model.{name}={tmp_path / 'odd.safetensors'}")
    owner = "the tiny world" if name == "student" else "the student"
    assert f"Got model.{name} {tmp_path / 'odd.safetensors'} with text_dim 64; {owner} has 128" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(runs, capsys):
    assert "Got device cuda; this torch sees no GPU" in refused(capsys, written("dmd", runs / "gpu", device="cuda"))


def test_the_seed_decides_a_new_text_encoder(tmp_path):
    texts = {}
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        method = make_method(config("bidirectional", tmp_path / str(seed), seed=seed), Group(), CPU)
        texts[seed, noise] = method.encoders.text.embedding.weight
    assert torch.equal(texts[0, 1], texts[0, 2]) and not torch.equal(texts[0, 1], texts[1, 1])


def test_a_damaged_checkpoint_is_refused(runs, capsys):
    out = runs / "damaged"
    out.mkdir()
    (out / "checkpoint.pt").write_bytes(b"PK\x03\x04 half of a file")
    assert "which is not a whole checkpoint" in refused(capsys, written("bidirectional", out))


def test_too_little_memory_is_told_before_the_first_step(runs, capsys, monkeypatch):
    monkeypatch.setattr("sf_core.training.memory.available_memory", lambda device: 10_000)
    line = refused(capsys, written("dmd", runs / "small"))
    assert "GiB of memory; this run takes" in line and "Use recompute: true" in line


def clip_folder(folder, names=("a", "b"), frames=9):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        save_video(folder / f"{name}.mp4", torch.rand(frames, 48, 96, 3, generator=torch.Generator().manual_seed(i)))
        (folder / f"{name}.txt").write_text(f"a red circle, number {i}")
    return folder


def test_a_folder_of_clips_is_trained_on(runs, tmp_path):
    folder = clip_folder(tmp_path / "clips")
    out = trained("teacher-forcing", runs / "folder", data={"clips": str(folder)})
    latents = torch.load(out / "latents.pt", weights_only=True)
    assert latents.shape == (2, 16, 2, 8, 8) and len(losses(out)) == 3


def test_clips_are_encoded_again_when_what_they_were_made_from_changes(runs, tmp_path, capsys):
    folder, out = clip_folder(tmp_path / "clips", ("b",)), runs / "stale"

    def latents(said, **changes):
        settings = config("teacher-forcing", out, **{"data": {"clips": str(folder)}, **changes})
        captions = open_data(settings, open_encoders(settings.model, CPU), Group())
        assert ("encoded again" in capsys.readouterr().out) == said
        return captions.latents.clone()

    first = latents(False)
    (out / "latents.pt").touch()
    assert torch.equal(latents(False), first)
    clip_folder(folder, ("a", "b"))
    both = latents(True)
    assert len(both) == 2 and not torch.equal(both[0], both[1])
    assert latents(True, flow={"frames": 3}).shape[2] == 3
    pool = [latents(True, data={"procedural": "all", "pool": 4}, seed=seed) for seed in (0, 1)]
    assert not torch.equal(*pool)
    model = {"world": "tiny", "student": "new", "vae": str(tmp_path / "vae.safetensors")}
    vae = load_autoencoder()
    save_file({name: 1.5 * value for name, value in vae.state_dict().items()}, model["vae"])
    assert not torch.equal(latents(True, data={"procedural": "all", "pool": 4}, seed=1, model=model), pool[1])


def test_processes_share_the_encoding(tmp_path):
    settings = config("bidirectional", tmp_path / "run", data={"procedural": "all", "pool": 130})
    encoders = open_encoders(settings.model, CPU)
    whole = open_data(settings, encoders, Group()).latents.clone()
    (tmp_path / "run" / "latents.json").unlink()

    class Second(Group):
        """Two processes, one after the other."""

        def wait(self):
            if self.rank == 1:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        open_data(settings, encoders, Second(1, 2))
    other = torch.load(tmp_path / "run" / "latents-1.pt", weights_only=True)
    assert sum(map(len, other)) == 66
    assert torch.equal(open_data(settings, encoders, Second(0, 2)).latents, whole)
    assert not list((tmp_path / "run").glob("latents-*.pt"))


def test_plain_batches_have_every_caption_and_begin_at_the_beginning(tmp_path):
    settings = config("gan", tmp_path / "run", data={"procedural": "all", "pool": 8, "dropped": 1, "late": 1})
    pool = open_data(settings, open_encoders(ModelConfig(), CPU), Group())
    random = StepRandom(0, 0, tuple(range(8)))
    plain, changed = (pool.batch(random, "real", 2, plain) for plain in (True, False))
    assert all(plain.captions) and not plain.late.any()
    assert not any(changed.captions) and changed.late.all() and not torch.equal(plain.clips, changed.clips)


def test_real_clips_and_forced_context_are_plain(runs, monkeypatch):
    asked = []
    batch = ProceduralClips.batch
    monkeypatch.setattr(
        ProceduralClips, "batch", lambda self, *args, plain=False: asked.append(plain) or batch(self, *args, plain)
    )
    trained("gan", runs / "plain-gan", steps=1)
    trained("dmd", runs / "plain-forced", steps=1, loss={"context": "teacher-forced"})
    assert len(asked) >= 6 and all(asked)


def test_prompts_alone_are_enough_for_dmd(runs, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n\na blue star moves up\n")
    assert len(losses(trained("dmd", runs / "prompts", data={"prompts": str(tmp_path / "p.txt")}))) == 3


def test_data_with_nothing_to_learn_from_is_refused(runs, tmp_path, capsys):
    def line(method, **data):
        return refused(capsys, written(method, runs / "nodata", data={name: str(path) for name, path in data.items()}))

    assert "Got no folder" in line("teacher-forcing", clips=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "which holds no videos" in line("teacher-forcing", clips=tmp_path / "empty")
    folder = clip_folder(tmp_path / "clips")
    (folder / "b.mp4").unlink()
    assert "1 captions without clips" in line("teacher-forcing", clips=folder)
    (folder / "b.txt").unlink()
    (folder / "a.txt").unlink()
    assert "1 clips without captions" in line("gan", clips=folder)
    assert "with 3 frames; a clip of 2 latent frames takes 5" in line(
        "gan", clips=clip_folder(tmp_path / "short", frames=3)
    )
    (tmp_path / "p.txt").write_text("\n")
    assert "which is empty" in line("dmd", prompts=tmp_path / "p.txt")
    assert "Got no file" in line("dmd", prompts=tmp_path / "q.txt")
    assert "Got prompts alone for gan" in line("gan", prompts=tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("a red circle\nlorem ipsum\n")
    assert "Got the prompt 'lorem ipsum'" in line("dmd", prompts=tmp_path / "p.txt")
    folder = clip_folder(tmp_path / "more")
    (folder / "b.txt").write_text(" \n")
    assert "b.txt, which is empty; it is the caption" in line("gan", clips=folder)
    (folder / "b.txt").write_text("dolor sit")
    assert "Got the prompt 'dolor sit'" in line("gan", clips=folder)
    (folder / "a.webm").touch()
    assert "Got a.mp4 and a.webm" in line("gan", clips=folder)


# --- The shipped configurations and the plan --------------------------------------------------------------------------


def test_shipped_configurations_are_read():
    names = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    assert {"tiny-autoencoder", "tiny-teacher", "tiny-causal", "tiny-dmd"} <= set(names)
    for name in names:
        assert read_config(name).out.name


def test_a_model_is_known_by_its_file(runs):
    about = describe(trained("dmd", runs / "known") / MODEL)
    assert about.sampling.chunk == 1 and "metadata" in about.note
    wan, _ = load_model(runs / "known" / MODEL, dtype=torch.float32)
    prompt = torch.zeros(1, 4, wan.config.text_dim)
    chunks = list(roll_chunks(wan, about.sampling, prompt, SeededNoise(0), 2, 8, 8))
    assert len(chunks) == 2 and torch.isfinite(chunks[-1][1]).all()


def test_the_manuals_examples_run(runs, monkeypatch):
    path = written("dmd", runs / "my", data={"procedural": "trained"}, log={"save_every": 1})
    monkeypatch.chdir(runs)
    text = (SHIPPED.parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    names = {"__name__": "example"}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block.replace("steps=100", "steps=1"), names)
    for out in (runs / "my", runs / "runs" / "calm"):
        assert len(losses(out)) == 1 and (out / MODEL).is_file()
    assert path.name == "my.yaml" and losses(runs / "my") != losses(runs / "runs" / "calm")


def test_the_plot_needs_losses(tmp_path):
    with pytest.raises(ValueError, match="with no losses; train first"):
        metrics.plot_losses(tmp_path)


def test_the_plan_is_printed_without_training(runs, capsys):
    assert main(["train", str(written("dmd", runs / "planned")), "--plan", "--processes", "2"]) == 0
    assert "GiB a device: student" in capsys.readouterr().out and not (runs / "planned").exists()


def test_a_lora_run_trains_adapters_alone_and_exports_both_files(runs):
    out = trained("dmd", runs / "lora", lora={"rank": 2, "alpha": 4.0})
    adapters, start = load_file(out / "lora.safetensors"), load_run(runs / "causal")["student"]
    assert len(adapters) == 3 * 10 * 2  # two layers with ten linear layers each: down, up, alpha
    whole, name = load_run(out)["student"], "blocks.0.self_attn.q"
    down, up = (adapters[f"diffusion_model.{name}.lora_{part}.weight"] for part in "AB")
    assert adapters[f"diffusion_model.{name}.alpha"] == 4 and up.abs().sum() > 0
    torch.testing.assert_close(whole[f"{name}.weight"], start[f"{name}.weight"] + 2 * up @ down)
    assert torch.equal(whole["head.head.weight"], start["head.head.weight"])
    assert set(load_model(out / MODEL)[0].state_dict()) == set(start)


def test_the_weights_under_adapters_are_kept_as_frozen_ones(runs):
    models = {"world": "tiny", "student": str(runs / "causal"), "teacher": str(runs / "teacher"), "frozen": "bfloat16"}
    options = {"lora": {"rank": 2, "alpha": 4.0}, "model": models, "precision": "bfloat16"}
    out = trained("dmd", runs / "lora-bf16", **options)
    saved, name = load_run(out), "blocks.0.self_attn.q"
    kinds = {key: saved["modules"]["student"][f"{name}.{key}"].dtype for key in ("weight", "down", "up")}
    assert kinds == {"weight": torch.bfloat16, "down": torch.float32, "up": torch.float32}
    merged = saved["student"][f"{name}.weight"]
    assert merged.dtype == torch.float32 and not torch.equal(merged, merged.bfloat16().float())
    whole = trained("dmd", runs / "lora-fp32", **{**options, "model": {**models, "frozen": "float32"}})
    assert losses(out, "critic") == pytest.approx(losses(whole, "critic"), rel=0.05)
    trained("dmd", out, **{**options, "steps": 4, "model": {**models, "frozen": "float32"}})
    assert load_run(out)["modules"]["student"][f"{name}.weight"].dtype == torch.float32


def test_a_shipped_student_is_adapted(tmp_path):
    """The built-in model, its words and all, as one would start."""
    data, size = {"prompts": str(tmp_path / "p.txt")}, {"frames": 3}
    (tmp_path / "p.txt").write_text("a red circle moves right")
    model = {"world": "tiny", "student": "built-in", "teacher": "built-in"}
    sampling = {"shift": 3, "window": 9}
    options = {"steps": 1, "batch": 1, "critic": {"updates": 1}, "lora": {"rank": 2}}
    out = trained("dmd", tmp_path / "run", model=model, data=data, sampling=sampling, rollout=size, **options)
    assert (out / "lora.safetensors").is_file() and len(losses(out)) == 1
