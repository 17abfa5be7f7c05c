"""The training loop: takes the steps of a method, logs them, and saves checkpoints.

    for step in range(done, steps):
        for update in the method's updates that have started:
            for the samples of each pass: backward(loss / passes)
            step the optimizer
        update the averages

A checkpoint holds weights, averages and optimizer states; randomness belongs to the step (step_random.py). So a run
that was killed continues with the losses it would have had, to the bit on a CPU, whatever number of processes continues
it.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict

import torch
from torch import Tensor

from .config import TrainConfig
from .distributed import Group, load_full
from .methods.base import Method, Update
from .metrics import Metrics
from .run_folder import CHECKPOINT, load_run, save_run
from .step_random import StepRandom


class TrainingStopped(ValueError):
    """A run that cannot go on; its last checkpoint is good."""


class Trainer:
    """A method's training run; `run` continues it from the folder's checkpoint where there is one."""

    def __init__(self, config: TrainConfig, method: Method, group: Group) -> None:
        self.config, self.method, self.group = config, method, group
        self.passes = group.share(config.batch, config.micro_batch)
        self.done, self.saved_step, self.seconds, self.began = 0, 0, 0.0, time.perf_counter()
        if (config.out / CHECKPOINT).is_file():
            self.restore(load_run(config.out))

    def run(self) -> None:
        """Trains to the end. Raises TrainingStopped when a loss is no longer a number."""
        config = self.config
        if self.done >= config.steps:
            return
        with Metrics(config, self.method, self.group, self.done) as metrics:
            for step in range(self.done, config.steps):
                metrics.log(step + 1, self.step(step))
                self.done = step + 1
                if self.done % config.log.save_every == 0 or self.done == config.steps:
                    self.save()
                    metrics.plot()
                if config.log.sample_every and self.done % config.log.sample_every == 0:
                    metrics.sample(self.done)

    def step(self, step: int) -> dict[str, float]:
        """One step; returns its losses and gradient norms, means over all processes."""
        metrics: dict[str, float] = {}
        for update in self.method.updates:
            metrics |= self.update(update, step) if step / self.config.steps >= update.start else {}
        for average in self.method.averages.values():
            average.update(step)
        return metrics

    def update(self, update: Update, step: int) -> dict[str, float]:
        update.optimizer.zero_grad()  # where weights are sharded, another update's loss may have left gradients
        progress, sums = step / self.config.steps, {}
        for samples in self.passes:
            losses = update.loss(StepRandom(self.config.seed, step, samples), progress)
            loss = next(iter(losses.values())) / len(self.passes)
            # Score networks get no gradients here; but autograd knows sharded weights under other names.
            loss.backward(inputs=None if self.config.shard else update.optimizer.params)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float() / len(self.passes)
        metrics = {name: self.group.mean(value).item() for name, value in sums.items()}
        self.check_finite(metrics, step)
        self.group.average_gradients(update.optimizer.params)
        metrics[f"{next(iter(metrics))} gradient"] = update.optimizer.clip().item()
        self.check_finite(metrics, step)
        update.optimizer.step(progress)
        return metrics

    def check_finite(self, metrics: dict[str, float], step: int) -> None:
        """Raises TrainingStopped for a metric that is no number, before the weights of this update are spoilt."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                saved = f"{self.config.out / CHECKPOINT} holds step {self.saved_step}, which is good"
                raise TrainingStopped(
                    f"Got {value} for {name!r} at step {step + 1}; it must be a number. Training has stopped; "
                    f"{saved if self.saved_step else 'nothing was saved yet'}. Lower the learning rates or use "
                    "precision: float32, and run it again."
                )

    def save(self) -> None:
        """Writes the checkpoint; all processes take part, the first writes."""
        first = self.group.first
        content = {
            "step": self.done,
            "seconds": self.seconds + time.perf_counter() - self.began,
            "config": json.dumps(config_dict(self.config)),
            **self.method.state(keep=first),
            "optimizers": [optimizer.state_dict(keep=first) for optimizer in self.optimizers()],
        }
        if first:
            save_run(self.config.out, content)
        self.group.wait()
        self.saved_step = self.done

    def restore(self, saved: dict) -> None:
        """Raises ValueError for the checkpoint of another run."""
        _check_config(json.loads(saved.get("config", "{}")), self.config)
        for name, module in self.method.modules.items():
            _check_architecture(name, module.state_dict(), saved["modules"].get(name, {}), self.config)
            load_full(module, saved["modules"][name])
        for name, average in self.method.averages.items():
            average.load_state_dict(saved["averages"][name])
        for optimizer, state in zip(self.optimizers(), saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.done, self.saved_step, self.seconds = saved["step"], saved["step"], saved["seconds"]

    def optimizers(self) -> list:
        """Each once, in the order of the updates."""
        return list({id(update.optimizer): update.optimizer for update in self.method.updates}.values())


def config_dict(config: TrainConfig) -> dict:
    """A configuration as plain JSON values, as a checkpoint keeps it."""
    return json.loads(json.dumps(asdict(config), default=str))


def _identity(content: dict) -> dict[str, object]:
    """Settings that identify a run, by dotted names: a checkpoint continues only with the same ones."""
    kept = {name: content[name] for name in ("method", "seed", "batch", "lora") if name in content}
    parts = {name: flatten(content.get(name, {})) for name in ("model", "data", "sampling", "rollout", "loss", "flow")}
    parts["model"].pop("frozen", None)  # a way to compute, like precision: it may change where memory runs out
    rates = {
        "optimizer": content.get("optimizer", {}),
        "critic.optimizer": content.get("critic", {}).get("optimizer", {}),
    }
    parts |= {name: {key: rate for key, rate in part.items() if key == "muon_lr"} for name, part in rates.items()}
    return kept | {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}


def flatten(content: dict, under: str = "") -> dict[str, object]:
    """Flattens {"a": {"b": 1}} to {"a.b": 1}."""
    leaves = {}
    for key, value in content.items():
        leaves |= flatten(value, f"{under}{key}.") if isinstance(value, dict) else {under + key: value}
    return leaves


def _check_config(saved: dict, config: TrainConfig) -> None:
    """Raises ValueError where a run would go on as another one. What an older checkpoint does not state is let pass."""
    before, now = _identity(saved), _identity(config_dict(config))
    for key in (key for key in now if key in before):
        old, new = before[key], now[key]
        alike = (old is None) == (new is None) if key.endswith("muon_lr") else old == new  # a rate may change
        if not alike:
            raise ValueError(
                f"Got {key} {new!r}; {config.out / CHECKPOINT} was trained with {old!r}. Continue with that, or choose "
                "another `out`."
            )


def _check_architecture(name: str, own: dict[str, Tensor], saved: dict[str, Tensor], config: TrainConfig) -> None:
    shapes = [{key: tuple(value.shape) for key, value in state.items()} for state in (own, saved)]
    if shapes[0] == shapes[1]:
        return
    differing = sorted(key for key in shapes[0].keys() | shapes[1].keys() if shapes[0].get(key) != shapes[1].get(key))
    raise ValueError(
        f"Got {config.out / CHECKPOINT}, whose {name} is of another architecture ({differing[0]}: "
        f"{shapes[1].get(differing[0], 'missing')} instead of {shapes[0].get(differing[0], 'none')}). Continue with "
        "the configuration it was made with, or choose another `out`."
    )


def use_threads(device: torch.device) -> None:
    """One thread on a CPU: on networks this small a second one makes training slower; use a second process."""
    if device.type == "cpu":
        torch.set_num_threads(1)
