"""What a trainer takes steps of.

A task has networks, their moving averages and, in order, the updates of one step. An update is an optimizer and a loss;
losses are given draws (which samples, which random numbers) and how far the run is, 0..1, and say what to minimise
first, then whatever else is worth telling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from ...sampling.plan import Plan
from ...sampling.prompts import PromptSchedule
from ...sampling.rollout import rollout
from ...wan.model import Network, WanModel
from ..config import TrainConfig
from ..distributed import Group, shard, state_of
from ..encoders import (
    DTYPES,
    NEW,
    World,
    check_alike,
    check_lineage,
    check_prompts,
    latent_size,
    load_network,
    load_student,
    student_dtype,
)
from ..lora import adapter_file, add_adapters, merged
from ..network import training_network, training_ops
from ..optim import Average, Optimizer
from ..step_random import Draws

Loss = Callable[[Draws, float], dict[str, Tensor]]


@dataclass(frozen=True)
class Update:
    """One step of one optimizer, once the share `start` of a run's steps is done."""

    optimizer: Optimizer
    loss: Loss
    start: float = 0.0


class Task:
    """Networks under their names, averages of some of them, and the updates of a step."""

    modules: dict[str, nn.Module]
    averages: dict[str, Average]
    updates: list[Update]

    def state(self, keep: bool = True) -> dict[str, dict]:
        """Weights and averages for a checkpoint; every process has to ask for them, and one may `keep` them.

        `results` are made of the very tensors of "averages", which torch.save then writes once.
        """
        modules = {name: state_of(module, keep) for name, module in self.modules.items()}
        averages = {name: average.state_dict(keep) for name, average in self.averages.items()}
        if not keep:
            return {}
        whose = {id(module): modules[name] for name, module in self.modules.items()}
        averaged = {
            name: {**whose[id(average.module)], **averages[name]["values"]} for name, average in self.averages.items()
        }
        return {"modules": modules, "averages": averages, **self.facts(), **self.results(averaged)}

    def facts(self) -> dict:
        """What else a checkpoint says of itself."""
        return {}

    def results(self, averaged: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """What later runs start from: plain averaged weights under "student", and "text" where it belongs to it."""
        return averaged

    def sample(self, prompts: list[str], frames: int) -> Iterator[Tensor]:
        """Videos [T, H, W, 3] of prompts; every process has to call this, one that wants no videos need not iterate."""
        raise ValueError("Got sample videos of a run that makes none. Leave out log.sample_every.")


class WanTask(Task):
    """A task that trains a student Wan."""

    def __init__(self, config: TrainConfig, world: World, group: Group, device: torch.device) -> None:
        self.config, self.world, self.group, self.device = config, world, group, device
        self.precision = DTYPES[config.precision]
        check_lineage(config.model.student, world, "model.student")
        check_prompts(world, (config.data.negative, *config.log.samples))
        torch.manual_seed(config.seed)  # of new weights
        wan = load_student(config.model.student, world, student_dtype(config))
        if config.model.world == "tiny":
            check_alike(NEW, wan.config, "model.student", config.model.student, "the tiny world")
        if config.lora:
            add_adapters(wan, config.lora, config.seed)
        self.student = self.network(wan)
        self.modules = {"student": self.student.wan}
        if any(p.requires_grad for p in world.text.parameters()):
            self.modules["text"] = self.placed(world.text)
        keep = config.average
        self.averages = {name: Average(module, keep.decay, keep.start) for name, module in self.modules.items()}
        self.optimizer = Optimizer(self.modules.values(), config.optimizer)
        self.size = latent_size(config.model)

    def network(self, wan: WanModel) -> Network:
        """A network on its device, spread over the processes where the run is sharded."""
        placed, config = self.placed(wan, wan.blocks), self.config
        return training_network(placed, self.precision, self.device, config.shard, config.recompute)

    def placed(self, module: nn.Module, blocks=(), precision: torch.dtype | None = None) -> nn.Module:
        """A module on its device; a sharded one is computed in `precision`, that of the run unless given."""
        if self.config.shard:
            return shard(module, blocks, precision or self.precision, self.device)
        return module.to(self.device)

    def teacher(self, name: str) -> Network:
        """A frozen network that reads the same prompts and latents as the student."""
        return self.network(self.alike(name, "model.teacher", DTYPES[self.config.model.frozen]))

    def alike(self, source: str, name: str, dtype: torch.dtype) -> WanModel:
        """A network that reads the same prompts and latents as the student; raises ValueError for another."""
        wan = load_network(source, dtype)
        check_alike(self.student.config, wan.config, name, source)
        check_lineage(source, self.world, name)
        return wan

    def null(self, count: int) -> Tensor:
        """What guidance steers away from."""
        return self.world.embeds([self.config.data.negative] * count)

    def facts(self) -> dict:
        words = {"words": self.world.text.words} if self.config.model.world == "tiny" else {}
        return {"wan": asdict(self.student.config), **words}

    def results(self, averaged: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        text = averaged.get("text") or (state_of(self.world.text) if self.config.model.world == "tiny" else {})
        student, lora = averaged["student"], self.config.lora
        if lora:
            return {"student": merged(student, lora), "adapters": adapter_file(student, lora), "text": text}
        return {"student": student, "text": text}

    @torch.no_grad()
    def sample(self, prompts: list[str], frames: int) -> Iterator[Tensor]:
        """Videos [T, H, W, 3] of the averaged student, as production makes them, decoded as they are asked for.

        Rolled out one at a time: a training run has no memory to spare for a batch of them.
        """
        with self.averages["student"].in_place():
            clips = [self._sampled(number, prompt, frames) for number, prompt in enumerate(prompts)]
        return (self.world.decode(clip)[0].cpu() for clip in clips)

    def _sampled(self, number: int, prompt: str, frames: int) -> Tensor:
        """Latents [1, C, F, H, W] of sample `number`. Nothing runs backwards, so no block is to run again."""
        noise = Draws(self.config.seed, 0, (number,)).noise("sample")
        network = replace(self.student, ops=training_ops(self.config.shard, recompute=False))
        plan = Plan(self.config.sampling, frames, *self.size, cache_dtype=self.precision)
        prompts = PromptSchedule.of(self.world.embeds([prompt]))
        return torch.cat([x0 for _, x0 in rollout(network, plan, prompts, noise)], 2)
