"""Method: what a trainer takes steps of. It has networks, their moving averages and the updates of one step, in order.

An update is an optimizer and a loss. A loss is given the step's randomness (which samples, which random numbers) and
the progress of the run, 0..1; it returns scalars by name: what to minimise first, then what is logged beside it.
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
from ..distributed import Group, gather_state, shard
from ..encoders import (
    DTYPES,
    NEW,
    Encoders,
    check_compatible,
    check_lineage,
    check_prompts,
    latent_size,
    load_network,
    load_student,
    student_dtype,
)
from ..lora import adapter_file, add_adapters, merge_adapters
from ..network import training_network, training_ops
from ..optim import Average, Optimizer
from ..step_random import StepRandom

Loss = Callable[[StepRandom, float], dict[str, Tensor]]


@dataclass(frozen=True)
class Update:
    """An optimizer step in every training step, once the share `start` (0..1) of a run's steps is done."""

    optimizer: Optimizer
    loss: Loss
    start: float = 0.0


class Method:
    """Training method: networks by name, moving averages of some of them, and the updates of a step."""

    modules: dict[str, nn.Module]
    averages: dict[str, Average]
    updates: list[Update]

    def state(self, keep: bool = True) -> dict[str, dict]:
        """Weights and averages for a checkpoint; every process has to ask for them, and one may `keep` them.

        `results` are made of the very tensors of "averages", which torch.save then writes once.
        """
        modules = {name: gather_state(module, keep) for name, module in self.modules.items()}
        averages = {name: average.state_dict(keep) for name, average in self.averages.items()}
        if not keep:
            return {}
        whose = {id(module): modules[name] for name, module in self.modules.items()}
        averaged = {
            name: {**whose[id(average.module)], **averages[name]["values"]} for name, average in self.averages.items()
        }
        return {"modules": modules, "averages": averages, **self.facts(), **self.results(averaged)}

    def facts(self) -> dict:
        """Facts that a checkpoint states beside its weights."""
        return {}

    def results(self, averaged: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Results, which later runs start from: averaged weights under "student", and "text" where it belongs to it."""
        return averaged

    def sample(self, prompts: list[str], frames: int) -> Iterator[Tensor]:
        """Videos [T, H, W, 3] of prompts; every process has to call this, one that wants no videos need not iterate."""
        raise ValueError("Got sample videos of a run that makes none. Leave out log.sample_every.")


class WanMethod(Method):
    """Method that trains a student Wan."""

    def __init__(self, config: TrainConfig, encoders: Encoders, group: Group, device: torch.device) -> None:
        self.config, self.encoders, self.group, self.device = config, encoders, group, device
        self.precision = DTYPES[config.precision]
        check_lineage(config.model.student, encoders, "model.student")
        check_prompts(encoders, (config.data.negative, *config.log.samples))
        torch.manual_seed(config.seed)  # of new weights
        wan = load_student(config.model.student, encoders, student_dtype(config))
        if config.model.world == "tiny":
            check_compatible(NEW, wan.config, "model.student", config.model.student, "the tiny world")
        if config.lora:
            add_adapters(wan, config.lora, config.seed)
        self.student = self.network(wan)
        self.modules = {"student": self.student.wan}
        if any(p.requires_grad for p in encoders.text.parameters()):
            self.modules["text"] = self.place(encoders.text)
        keep = config.average
        self.averages = {name: Average(module, keep.decay, keep.start) for name, module in self.modules.items()}
        self.optimizer = Optimizer(self.modules.values(), config.optimizer)
        self.size = latent_size(config.model)

    def network(self, wan: WanModel) -> Network:
        """A network on its device, sharded where the run is."""
        placed, config = self.place(wan, wan.blocks), self.config
        return training_network(placed, self.precision, self.device, config.shard, config.recompute)

    def place(self, module: nn.Module, blocks=(), precision: torch.dtype | None = None) -> nn.Module:
        """A module on its device; a sharded one is computed in `precision`, that of the run unless given."""
        if self.config.shard:
            return shard(module, blocks, precision or self.precision, self.device)
        return module.to(self.device)

    def load_teacher(self, name: str) -> Network:
        """A frozen network that reads the same prompts and latents as the student."""
        return self.network(self.load_compatible(name, "model.teacher", DTYPES[self.config.model.frozen]))

    def load_compatible(self, source: str, name: str, dtype: torch.dtype) -> WanModel:
        """A network that reads the same prompts and latents as the student; raises ValueError for another."""
        wan = load_network(source, dtype)
        check_compatible(self.student.config, wan.config, name, source)
        check_lineage(source, self.encoders, name)
        return wan

    def null(self, count: int) -> Tensor:
        """Embeddings [count, tokens, text_dim] that guidance steers away from."""
        return self.encoders.embeds([self.config.data.negative] * count)

    def facts(self) -> dict:
        words = {"words": self.encoders.text.words} if self.config.model.world == "tiny" else {}
        return {"wan": asdict(self.student.config), **words}

    def results(self, averaged: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        text = averaged.get("text") or (gather_state(self.encoders.text) if self.config.model.world == "tiny" else {})
        student, lora = averaged["student"], self.config.lora
        if lora:
            return {"student": merge_adapters(student, lora), "adapters": adapter_file(student, lora), "text": text}
        return {"student": student, "text": text}

    @torch.no_grad()
    def sample(self, prompts: list[str], frames: int) -> Iterator[Tensor]:
        """Videos [T, H, W, 3] of the averaged student, as production makes them, decoded as they are asked for.

        Rolled out one at a time: a training run has no memory to spare for a batch of them.
        """
        with self.averages["student"].swap_in():
            clips = [self._sample_latents(number, prompt, frames) for number, prompt in enumerate(prompts)]
        return (self.encoders.decode(clip)[0].cpu() for clip in clips)

    def _sample_latents(self, number: int, prompt: str, frames: int) -> Tensor:
        """Latents [1, C, F, H, W] of sample `number`. Nothing runs backwards, so no block is to run again."""
        noise = StepRandom(self.config.seed, 0, (number,)).noise("sample")
        network = replace(self.student, ops=training_ops(self.config.shard, recompute=False))
        plan = Plan(self.config.sampling, frames, *self.size, cache_dtype=self.precision)
        prompts = PromptSchedule.of(self.encoders.embeds([prompt]))
        return torch.cat([x0 for _, x0 in rollout(network, plan, prompts, noise)], 2)
