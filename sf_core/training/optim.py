"""Optimizers: Muon for matrices, AdamW for the rest, a learning-rate schedule, and a moving average of weights.

Muon (Keller Jordan, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest orthogonal matrix,
found by five Newton-Schulz steps. torch.optim.Muon takes 2-D parameters one at a time; on a CPU, with many small
matrices and convolutions, doing all of one shape in one batched product is much faster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import OptimizerConfig
from .distributed import full_tensor, gather, local_shard, reshard, shard_like

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(m: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration: [n, rows, columns] -> as many matrices with singular values near 1, bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x = m.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum .95 (Nesterov), decoupled weight decay; updates are scaled to the size of AdamW's (0.2 sqrt(side))."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.flatten(1).shape].append(p)
            for shape, params in same_shape.items():
                self._update(params, 0.2 * max(shape) ** 0.5, group)

    def _update(self, params: list[Tensor], size: float, group: dict) -> None:
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
        updates = orthogonalise(torch.stack([m.flatten(1) for m in ahead])).to(params[0].dtype)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(
            params, [u.view_as(p) for u, p in zip(updates, params, strict=True)], alpha=-group["lr"] * size
        )


class Optimizer:
    """Optimizers of some modules, stepped together: AdamW, and Muon for matrices where `muon_lr` is given.

    By the `progress` (0..1) given to `step` rates warm up over the first `warmup` of the run and fall linearly to zero
    from `decay_from` on.
    """

    def __init__(self, modules: Iterable[nn.Module], config: OptimizerConfig):
        self.config = config
        self.params = [p for m in modules for p in m.parameters() if p.requires_grad]
        matrices = [p for p in self.params if p.ndim >= 2 and p.shape[0] > 1 and config.muon_lr]
        chosen = set(map(id, matrices))
        others = [p for p in self.params if id(p) not in chosen]
        decay, betas = config.weight_decay, config.betas
        self.parts, self.rates = [], []
        if matrices:
            self.parts.append(Muon(matrices, config.muon_lr, weight_decay=decay))
            self.rates.append(config.muon_lr)
        if others:
            self.parts.append(torch.optim.AdamW(others, config.lr, betas=betas, weight_decay=decay, foreach=True))
            self.rates.append(config.lr)

    def clip(self) -> Tensor:
        """Clips gradients to the norm `clip`; returns their norm before, []."""
        return full_tensor(torch.nn.utils.clip_grad_norm_(self.params, self.config.clip, foreach=True))

    def step(self, progress: float) -> None:
        """Takes a step at `progress` 0..1 of the run, and clears the gradients."""
        factor = rate_factor(progress, self.config.warmup, self.config.decay_from)
        for part, rate in zip(self.parts, self.rates, strict=True):
            part.param_groups[0]["lr"] = rate * factor
            part.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def state_dict(self, keep: bool = True) -> list[dict]:
        """State in full tensors, as `gather` gives it."""
        return [gather(part.state_dict(), keep) for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """Momenta come from `states`; betas, weight decay and all other settings stay those of the configuration."""
        for part, state in zip(self.parts, states, strict=True):
            params = [p for group in part.param_groups for p in group["params"]]
            sharded = {
                i: {key: _copy(shard_like(value, params[i])) for key, value in entry.items()}
                for i, entry in state["state"].items()
            }
            part.load_state_dict({"state": sharded, "param_groups": part.state_dict()["param_groups"]})


def _copy(value: Any) -> Any:
    """A copy of a tensor: a checkpoint's are views of its file, which another is to take the place of."""
    return value.clone() if isinstance(value, Tensor) else value


def rate_factor(progress: float, warmup: float, decay_from: float) -> float:
    """Learning-rate factor 0..1 at some progress 0..1 of a run."""
    rising = (progress + 1e-4) / warmup if warmup else 1.0
    falling = (1 - progress) / (1 - decay_from) if decay_from < 1 else 1.0
    return min(1.0, rising, falling)


class Average:
    """Exponential moving average of a module's trained parameters.

    The first updates count fully (the decay grows towards `decay`); before step `start` it is the weights themselves.
    """

    def __init__(self, module: nn.Module, decay: float, start: int = 0):
        self.module, self.decay, self.start = module, decay, start
        self.values = {name: p.detach().clone() for name, p in self._trained()}
        self.steps = 0

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after step `step` (from 0)."""
        reshard(self.module)
        self.steps += step >= self.start
        weight = 1 - min(self.decay, self.steps / (self.steps + 10)) if step >= self.start else 1.0
        pairs = [(local_shard(self.values[name]), local_shard(p.detach())) for name, p in self._trained()]
        torch._foreach_lerp_([mine for mine, _ in pairs], [new for _, new in pairs], weight)

    @contextmanager
    @torch.no_grad()
    def swap_in(self) -> Iterator[None]:
        """Swaps the averaged weights into the module, for the time of the context."""
        reshard(self.module)
        live = {name: p.detach().clone() for name, p in self._trained()}
        self._load(self.values)
        try:
            yield
        finally:
            self._load(live)

    def state_dict(self, keep: bool = True) -> dict:
        """State in full tensors, as `gather` gives it."""
        return {"steps": self.steps, "values": gather(self.values, keep)}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        for name, p in self._trained():
            local_shard(self.values[name]).copy_(local_shard(shard_like(state["values"][name], p)))

    @torch.no_grad()
    def _load(self, values: dict[str, Tensor]) -> None:
        reshard(self.module)
        for name, p in self._trained():
            local_shard(p).copy_(local_shard(values[name]))
