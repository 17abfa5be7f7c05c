"""What the plan says a run takes, against what it takes."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from sf_core.cli import train as command
from sf_core.cli.main import main
from sf_core.training import trainer
from sf_core.training.config import SHIPPED, read_config
from sf_core.training.distributed import Group
from sf_core.training.encoders import NEW
from sf_core.training.memory import (
    UMT5_BYTES,
    NetworkShapes,
    check_memory,
    count_parameters,
    loss_bytes,
    plan_memory,
    read_shape,
)
from sf_core.training.step_random import StepRandom
from sf_core.training.train import make_method
from tests.core.runs import written

CPU = torch.device("cpu")
NAMED = ("model.student=wan-1.3b", "model.teacher=wan-14b", "model.critic=wan-1.3b")
TINY = ("model.student=built-in", "model.teacher=built-in", "model.vae=null", "batch=2", "rollout.extra_chunks=0")
GIB = 2**30


def kept_by(loss, modules):
    """Bytes of the tensors that a loss keeps for its backward pass, weights of `modules` left out."""
    weights, storages = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    del result
    return sum(storages.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("method", ["dmd", "sid", "gan"])
def test_the_plan_is_what_each_loss_keeps_and_no_less(tmp_path, method, recompute, precision):
    settings = (f"method={method}", f"precision={precision}", f"recompute={str(recompute).lower()}", "data.pool=4")
    config = read_config("tiny-dmd", (*TINY, *settings, f"out={tmp_path}"))
    method, random = make_method(config, Group(), CPU), StepRandom(0, 0, (0, 1))
    wan, modules = (
        method.student.config,
        [*method.modules.values()] + ([method.scores.real.wan] if method.scores else []),
    )
    planned = loss_bytes(config, NetworkShapes(wan, wan, wan), 1, CPU)
    for name, step in (("generator", method.generator_step), ("critic", partial(method.critic_step, 0))):
        kept = kept_by(partial(step, random, 0.0), modules)
        assert kept <= sum(planned[name][0]) <= 2 * kept, name


def test_what_an_update_copies_is_counted_where_no_graph_is_larger():
    config = read_config("tiny-dmd", (*TINY, "batch=2", "micro_batch=1", "recompute=true", "rollout.frames=1"))
    wide = replace(config, model=replace(config.model, student="wan-14b", teacher="wan-14b"))
    assert plan_memory(wide).activations == 4 * count_parameters(read_shape("wan-14b", wide.model))


def test_consistency_has_two_averages_and_the_weights_they_replace():
    config = read_config("tiny-consistency", ("model.student=built-in", "model.teacher=built-in"))
    assert plan_memory(config).student == 28 * count_parameters(NEW)


def test_the_papers_recipe_fits_an_80_gib_gpu_sharded_and_not_otherwise():
    config = read_config("wan-dmd-64gpu", NAMED)
    assert plan_memory(config, 64).total < 40 * GIB
    assert plan_memory(replace(config, shard=False), 64).total > 80 * GIB
    assert plan_memory(replace(config, recompute=False), 64).total > 100 * GIB


def test_the_parts_are_counted_from_shapes():
    config = read_config("wan-dmd-64gpu", NAMED)
    small, large = (
        count_parameters(read_shape("wan-1.3b", config.model)),
        count_parameters(read_shape("wan-14b", config.model)),
    )
    assert small == pytest.approx(1.42e9, rel=0.01) and large == pytest.approx(14.3e9, rel=0.01)
    whole = plan_memory(replace(config, shard=False), 64)
    assert (whole.student, whole.critic, whole.teacher) == (20 * small, 16 * small, 2 * large)
    assert whole.cache == 2 * 30 * 21 * 1560 * 1536 * 2 and whole.text == UMT5_BYTES
    assert plan_memory(config, 64).student == 20 * small // 64


def test_the_comments_of_the_recipe_say_what_the_plan_says():
    """Its table is made by `--plan`."""
    text = (SHIPPED / "wan-dmd-64gpu.yaml").read_text(encoding="utf-8")
    config = read_config("wan-dmd-64gpu", NAMED)
    row = next(line for line in text.splitlines() if line.startswith("#     together"))
    plans = (
        plan_memory(config, 64),
        plan_memory(replace(config, batch=8), 8),
        plan_memory(replace(config, shard=False), 64),
    )
    assert row.split()[2:] == [f"{plan.total / GIB:.1f}" for plan in plans]


def test_one_gpu_of_80_gb_is_enough_for_adapters_as_its_configuration_says():
    config = read_config("wan-dmd-1gpu", ("model.student=wan-1.3b", "model.teacher=wan-1.3b"))
    plans = (plan_memory(config), plan_memory(replace(config, lora=None)))
    text = (SHIPPED / "wan-dmd-1gpu.yaml").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("#     together"))
    assert row.split()[2:] == [f"{plan.total / GIB:.1f}" for plan in plans] and plans[0].total < 70e9
    assert f"{plans[0].total / GIB:.1f} GiB" in (SHIPPED.parents[2] / "docs" / "training.md").read_text(
        encoding="utf-8"
    )


def test_processes_on_one_cpu_share_its_memory(monkeypatch):
    config = read_config("tiny-dmd", (*TINY,))
    enough = plan_memory(config, 2, CPU).total * 1.5
    monkeypatch.setattr("sf_core.training.memory.available_memory", lambda device: enough)
    check_memory(config, 1, CPU)
    with pytest.raises(MemoryError, match="Use recompute: true"):
        check_memory(config, 2, CPU)


def test_the_plan_is_for_the_processes_that_there_are(tmp_path, monkeypatch, capsys):
    path, told = written("dmd", tmp_path / "run", model={"world": "tiny", "teacher": "built-in"}), []
    monkeypatch.setattr(command, "plan_memory", lambda config, processes: told.append(processes))
    for size in (None, "4"):
        monkeypatch.setenv("WORLD_SIZE", size) if size else monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert main(["train", str(path), "--plan"]) == 0
    assert main(["train", str(path), "--plan", "--processes", "2"]) == 0 and told == [1, 4, 2]
    assert main(["train", str(path), "--plan", "--processes", "0"]) == 2
    assert "got 0; use a whole number from 1" in capsys.readouterr().err


def test_memory_that_runs_out_is_told_with_remedies(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(trainer.Trainer, "run", full)
    path = written("dmd", tmp_path / "run", model={"world": "tiny", "student": "built-in", "teacher": "built-in"})
    assert main(["train", str(path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("sf_core: error: Got out of memory on cpu, where ") and "GiB a device" in line
    assert all(key in line for key in ("recompute: true", "micro_batch", "shard: true", "model.frozen: bfloat16"))
