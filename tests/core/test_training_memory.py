"""What the plan says a run takes, against what it takes."""

from dataclasses import replace

import pytest
import torch

from sf_core.training.command import make_task
from sf_core.training.config import SHIPPED, read_config
from sf_core.training.draws import Draws
from sf_core.training.memory import UMT5_BYTES, check_memory, graph_bytes, needed, parameters, shape_of
from sf_core.training.parallel import Group

CPU = torch.device("cpu")
NAMED = ("model.student=wan-1.3b", "model.teacher=wan-14b", "model.critic=wan-1.3b")
TINY = ("model.student=built-in", "model.teacher=built-in", "model.vae=null", "batch=2", "rollout.extra_chunks=0")
GIB = 2**30


def kept_by(loss):
    """Bytes of the tensors that a loss keeps for its backward pass, weights left out."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    del result
    return sum(storages.values())


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_a_rollout_keeps(tmp_path, recompute):
    changes = (*TINY, f"out={tmp_path}", "precision=float32", f"recompute={str(recompute).lower()}")
    config = read_config("tiny-dmd", changes)
    task = make_task(config, Group(), CPU)
    kept = kept_by(lambda: task.generator_step(Draws(0, 0, (0, 1)), 0.0))
    estimate = graph_bytes(config, task.student.config, 1, generates=True)
    assert 0.5 * kept < estimate < 2 * kept


def test_the_papers_recipe_fits_an_80_gib_gpu_sharded_and_not_otherwise():
    config = read_config("wan-dmd-64gpu", NAMED)
    assert needed(config, 64).total < 30 * GIB
    assert needed(replace(config, shard=False), 64).total > 80 * GIB
    assert needed(replace(config, recompute=False), 64).total > 100 * GIB


def test_the_parts_are_counted_from_shapes():
    config = read_config("wan-dmd-64gpu", NAMED)
    small, large = parameters(shape_of("wan-1.3b", config.model)), parameters(shape_of("wan-14b", config.model))
    assert small == pytest.approx(1.42e9, rel=0.01) and large == pytest.approx(14.3e9, rel=0.01)
    whole = needed(replace(config, shard=False), 64)
    assert (whole.student, whole.critic, whole.teacher) == (20 * small, 16 * small, 2 * large)
    assert whole.cache == 2 * 30 * 21 * 1560 * 1536 * 2 and whole.text == UMT5_BYTES
    assert needed(config, 64).student == 20 * small // 64


def test_the_comments_of_the_recipe_say_what_the_plan_says():
    """Its table is made by `--plan`."""
    text = (SHIPPED / "wan-dmd-64gpu.yaml").read_text(encoding="utf-8")
    config = read_config("wan-dmd-64gpu", NAMED)
    row = next(line for line in text.splitlines() if line.startswith("#     together"))
    plans = (needed(config, 64), needed(replace(config, batch=8), 8), needed(replace(config, shard=False), 64))
    assert row.split()[2:] == [f"{plan.total / GIB:.1f}" for plan in plans]


def test_processes_on_one_cpu_share_its_memory(monkeypatch):
    config = read_config("tiny-dmd", (*TINY,))
    enough = needed(config, 2).total * 1.5
    monkeypatch.setattr("sf_core.training.memory.memory_of", lambda device: enough)
    check_memory(config, 1, CPU)
    with pytest.raises(MemoryError, match="Use recompute: true"):
        check_memory(config, 2, CPU)
