"""The rollout without a cache, for `python -m sf_core bench --against benchmarks/recompute.py:Recompute`.

Every step runs all frames so far through the network, finished ones clean at timestep 0, and keeps the newest chunk's
velocity: the plain reading of the method, and an example of an adapter. Same latents as ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sf_core.cli.bench import Job
from sf_core.sampling.noise import Noise
from sf_core.sampling.rollout import plan_spans
from sf_core.sampling.schedule import add_noise, x0_from_velocity
from sf_core.wan.attention import Sequence, block_causal_mask
from sf_core.wan.model import WanModel, encode_text, velocity


class Recompute:
    def prepare(self, job: Job, state_dict: dict[str, Tensor]) -> None:
        with torch.device("meta"):
            self.wan = WanModel(job.config)
        self.wan.load_state_dict({name: t.to(job.device) for name, t in state_dict.items()}, assign=True)

    @torch.inference_mode()
    def rollout(self, job: Job, embeds: Tensor, noise: Noise) -> Iterator[Tensor]:
        height, width = job.latent_size
        shape = (1, job.config.channels, height, width)
        tokens, text = job.config.tokens_per_frame(height, width), encode_text(self.wan, embeds)
        done = torch.empty(1, job.config.channels, 0, height, width, device=job.device)
        sizes: list[int] = []
        for span in plan_spans(job.frames, job.sampling):
            sizes.append(span.frames)
            mask = block_causal_mask(sizes, tokens).to(job.device)
            see = Sequence(job.config, range(sum(sizes)), height, width, job.device, mask)
            steps = job.sampling.steps_of(span.index == 0)
            x = noise(span.start, span.frames, 0, shape).to(job.device)
            for i, (timestep, sigma) in enumerate(steps):
                t = torch.zeros(1, sum(sizes), device=job.device)
                t[:, span.start :] = timestep
                v = velocity(self.wan, torch.cat((done, x), 2).to(job.dtype), t, text, see)
                x0 = x0_from_velocity(x, v[:, :, span.start :].float(), sigma)
                if i + 1 < len(steps):
                    again = noise(span.start, span.frames, i + 1, shape).to(job.device)
                    x = add_noise(x0, again, steps[i + 1].sigma)
            done = torch.cat((done, x0), 2)
            yield x0
