"""Muon for matrices, AdamW for the rest, a learning rate that ends at zero, and a moving average of weights.

Muon (Keller Jordan, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest orthogonal matrix,
found by five Newton-Schulz steps. torch.optim.Muon takes 2-D parameters one at a time; on a CPU, with many small
matrices and convolutions, doing all of one shape in one batched product is much faster.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(m: Tensor, steps: int = 5) -> Tensor:
    """[n, rows, columns] -> matrices of the same size with singular values near 1, bfloat16."""
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
    """Both optimizers over a module's parameters, stepped together.

    lr is AdamW's, muon_lr the matrices'. By the `progress` (0..1) given to `step` they warm up over the first `warmup`
    of the run and fall linearly to zero from `decay_from` on. Gradients are clipped to norm 1.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        lr: float,
        muon_lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup: float = 0.02,
        decay_from: float = 0.4,
    ):
        self.params = [p for m in modules for p in m.parameters() if p.requires_grad]
        matrices = [p for p in self.params if p.ndim >= 2 and p.shape[0] > 1]
        others = [p for p in self.params if p.ndim < 2 or p.shape[0] == 1]
        self.parts = [
            Muon(matrices, muon_lr),
            torch.optim.AdamW(others, lr, betas=betas, weight_decay=0.0, foreach=True),
        ]
        self.rates = [muon_lr, lr]
        self.warmup, self.decay_from = warmup, decay_from

    def step(self, progress: float) -> None:
        factor = min(1.0, (progress + 1e-4) / self.warmup, (1 - progress) / (1 - self.decay_from))
        torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        for part, rate in zip(self.parts, self.rates, strict=True):
            part.param_groups[0]["lr"] = rate * factor
            part.step()
            part.zero_grad()

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


class Average:
    """Exponential moving average of a module's parameters; early steps count fully (decay grows towards `decay`)."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.steps = 0
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        weight = 1 - min(self.decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in module.parameters()], weight)

    def copy_to(self, module: nn.Module) -> None:
        module.load_state_dict(self.values, strict=False)
