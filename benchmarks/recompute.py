"""The rollout without a cache, for `python -m sf_core bench --against benchmarks/recompute.py:Recompute`.

Every step runs all frames so far through the network, finished ones clean at timestep 0, and keeps the newest chunk's
velocity: the plain reading of the method, and an example of an adapter. Same latents as ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from sf_core.cli.bench import Job
from sf_core.sampling.noise import Noise
from sf_core.sampling.schedule import add_noise, x0_from_velocity
from sf_core.wan.attention import FullAttention
from sf_core.wan.model import WanModel, encode_prompt, velocity


def block_causal_mask(chunks: Sequence[int], tokens_per_frame: int, window: int | None = None) -> Tensor:
    """Boolean [L, L] of a video cut into `chunks` (frames each): a chunk sees itself and earlier ones.

    With `window` only the newest `window` frames up to the chunk's own end are seen.
    """
    ends = torch.tensor([end for end, n in zip(accumulate(chunks), chunks) for _ in range(n)])  # [F] end of own chunk
    frame = torch.arange(len(ends))
    seen = frame[None, :] < ends[:, None]
    if window is not None:
        seen &= frame[None, :] >= ends[:, None] - window
    return seen.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)


class Recompute:
    def prepare(self, job: Job, state_dict: dict[str, Tensor]) -> None:
        with torch.device("meta"):
            self.wan = WanModel(job.config)
        self.wan.load_state_dict({name: t.to(job.device) for name, t in state_dict.items()}, assign=True)

    @torch.inference_mode()
    def rollout(self, job: Job, embeds: Tensor, noise: Noise) -> Iterator[Tensor]:
        plan, height, width = job.plan, job.plan.height, job.plan.width
        shape = (1, job.config.channels, height, width)
        tokens, text = job.config.tokens_per_frame(height, width), encode_prompt(self.wan, embeds)
        done = torch.empty(1, job.config.channels, 0, height, width, device=job.device)
        sizes: list[int] = []
        for chunk in plan.chunks:
            sizes.append(chunk.frames)
            mask = block_causal_mask(sizes, tokens).to(job.device)
            see = FullAttention(job.config, range(sum(sizes)), height, width, job.device, mask)
            steps = plan.steps(chunk)
            x = noise(chunk.start, chunk.frames, 0, shape).to(job.device)
            for i, (timestep, sigma) in enumerate(steps):
                t = torch.zeros(1, sum(sizes), device=job.device)
                t[:, chunk.start :] = timestep
                v = velocity(self.wan, torch.cat((done, x), 2).to(job.dtype), t, text, see)
                x0 = x0_from_velocity(x, v[:, :, chunk.start :].float(), sigma)
                if i + 1 < len(steps):
                    again = noise(chunk.start, chunk.frames, i + 1, shape).to(job.device)
                    x = add_noise(x0, again, steps[i + 1].sigma)
            done = torch.cat((done, x0), 2)
            yield x0
