"""The published causal Wan models: how each is sampled, and which one a file is, by its name.

The numbers are those of each model's own inference configuration; where its sampler does something ours does not, the
description says so. Checkpoints of different families have the same tensors, so only names tell them apart.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..wan.shot_cache import Shots
from .config import Sampling


class Family(NamedTuple):
    """How a family is sampled, and for people: what it is, what its own sampler does besides, where to get it."""

    sampling: Sampling
    description: str


FOUR = (1000, 750, 500, 250)

FAMILIES = {
    # guandeh17/Self-Forcing, configs/self_forcing_dmd.yaml and self_forcing_sid.yaml (the same numbers). Published
    # inference ends at 21 latent frames; a window of 21 changes nothing up to there and keeps longer videos in what
    # training saw. Causal-Forcing (below) inherits this.
    "self-forcing": Family(
        Sampling(FOUR, shift=5.0, chunk=3, window=21),
        "Self Forcing, chunks of 3 latent frames, 4 steps. huggingface.co/gdhe17/Self-Forcing: "
        "checkpoints/self_forcing_dmd.pt",
    ),
    # thu-ml/Causal-Forcing, configs/causal_forcing_dmd_chunkwise.yaml
    "causal-forcing": Family(
        Sampling(FOUR, shift=5.0, chunk=3, window=21),
        "Causal Forcing, chunk-wise: 3 latent frames, 4 steps. huggingface.co/zhuhz22/Causal-Forcing: "
        "chunkwise/causal_forcing.pt",
    ),
    # thu-ml/Causal-Forcing, configs/causal_forcing_dmd_framewise.yaml
    "causal-forcing-framewise": Family(
        Sampling(FOUR, shift=5.0, chunk=1, window=21),
        "Causal Forcing, frame-wise: one latent frame at a time, 4 steps. huggingface.co/zhuhz22/Causal-Forcing: "
        "framewise/causal_forcing.pt",
    ),
    # thu-ml/Causal-Forcing, configs/causal_forcing_dmd_framewise_2step.yaml (the first frame has 4 steps)
    "causal-forcing-2step": Family(
        Sampling((1000, 500), shift=5.0, chunk=1, first_steps=FOUR, window=21),
        "Causal Forcing++, frame-wise, 2 steps (4 for the first frame). huggingface.co/zhuhz22/Causal-Forcing: "
        "causal-forcing++/framewise-2step.pt",
    ),
    # thu-ml/Causal-Forcing, configs/causal_forcing_dmd_framewise_1step.yaml (the first frame has 4 steps)
    "causal-forcing-1step": Family(
        Sampling((1000,), shift=5.0, chunk=1, first_steps=FOUR, window=21),
        "Causal Forcing++, frame-wise, 1 step (4 for the first frame). huggingface.co/zhuhz22/Causal-Forcing: "
        "causal-forcing++/framewise-1step.pt",
    ),
    # NVlabs/LongLive, branch v1.0, configs/longlive_inference.yaml
    "longlive": Family(
        Sampling(FOUR, shift=5.0, chunk=3, window=12, sink=3),
        "LongLive 1.0: window 12, sink 3, made for minutes. Its training on long videos is in a LoRA (models/lora.pt) "
        "on top of models/longlive_base.pt. huggingface.co/Efficient-Large-Model/LongLive-1.3B",
    ),
    # NVlabs/LongLive, branch v1.0, configs/longlive_inference_infinity.yaml (positions counted inside the window)
    "longlive-infinity": Family(
        Sampling(FOUR, shift=5.0, chunk=3, window=12, sink=3, pinned=True),
        "LongLive 1.0 for videos without an end: the sink's positions move with the window. Same files as longlive.",
    ),
    # JaydenLyh/Reward-Forcing, configs/reward_forcing.yaml; its positions are counted inside the window.
    "reward-forcing": Family(
        Sampling(FOUR, shift=5.0, chunk=3, window=9, sink=3, pinned=True),
        "Reward Forcing: window 9, sink 3. Its own sampler also blends frames that leave the window into the sink; "
        "here the sink stays as it was made. huggingface.co/JaydenLu666/Reward-Forcing-T2V-1.3B: rewardforcing.pt",
    ),
    # TencentARC/RollingForcing, configs/rolling_forcing_dmd.yaml; window and sink are constants in its causal_model.py.
    "rolling-forcing": Family(
        Sampling((1000, 800, 600, 400, 200), shift=5.0, chunk=3, window=21, sink=3, pinned=True),
        "Rolling Forcing: 5 steps, window 21, sink 3. Its own sampler denoises 5 chunks at once, each one step further "
        "than the next; here they are made one after the other. huggingface.co/TencentARC/RollingForcing: "
        "checkpoints/rolling_forcing_dmd.pt",
    ),
    # tianweiy/CausVid, configs/wan_causal_dmd.yaml, whose list ends with a 0 that its sampler drops. The steps are not
    # warped: timestep 757 is told to the network, and the noise level is the nearest in the shifted table.
    "causvid": Family(
        Sampling((1000, 757, 522), shift=8.0, warp=False, chunk=3, window=21),
        "CausVid, 3 steps, made for 21 latent frames; for longer ones its own script begins anew with the last chunk, "
        "its first frame re-encoded. huggingface.co/tianweiy/CausVid: autoregressive_checkpoint/model.pt",
    ),
    # tianweiy/CausVid, configs/wan_causal_dmd_warp_4step_cfg2.yaml
    "causvid-4step": Family(
        Sampling(FOUR, shift=8.0, chunk=3, window=21),
        "CausVid, 4 steps, warped. huggingface.co/tianweiy/CausVid: autoregressive_checkpoint_warp_4step_cfg2/model.pt",
    ),
    # NVlabs/LongLive, configs/inference.yaml and inference_i2v.yaml (one with 2 steps is distilled for them).
    "longlive-2": Family(
        Sampling(FOUR, shift=5.0, chunk=8, window=32, sink=8, solver="unipc", shots=Shots(jump=8), holds_prefix=True),
        "LongLive 2.0: Wan 2.2 5B, 1280 x 704 at 24 fps, chunks of 8 latent frames, 4 steps of UniPC; several shots, "
        "each beginning with a cut; an image is held as the first frame. NVIDIA Open Model License. "
        "huggingface.co/Efficient-Large-Model/LongLive-2.0-5B: model_bf16.pt",
    ),
}

DEFAULT = "self-forcing"
OF_48_CHANNELS = "longlive-2"  # the one family whose latents are the Wan 2.2 VAE's

# First match wins. Searched in the path's last two parts, lower case, separators made into single dashes.
PATTERNS = (
    (r"long-?live-?(v|version-?)?2(?![0-9]|-?step)", "longlive-2"),
    (r"long-?live.*(infinit|endless)", "longlive-infinity"),
    (r"long-?live", "longlive"),
    (r"reward-?forcing", "reward-forcing"),
    (r"rolling-?forcing|longvideo", "rolling-forcing"),
    (r"frame-?wise.*\b2-?step|causal-?forcing.*\b2-?step", "causal-forcing-2step"),
    (r"frame-?wise.*\b1-?step|causal-?forcing.*\b1-?step", "causal-forcing-1step"),
    (r"causal-?forcing.*frame-?wise|frame-?wise.*causal-?forcing|frame-?wise", "causal-forcing-framewise"),
    (r"causal-?forcing|chunk-?wise", "causal-forcing"),
    (r"self-?forcing|sfwan", "self-forcing"),
    (r"causvid.*4-?step|autoregressive-?checkpoint-?warp", "causvid-4step"),
    (r"causvid(?!.*bidirect)|autoregressive-?checkpoint", "causvid"),  # bidirectional ones are published beside them
)


class Guess(NamedTuple):
    """A family's name and the piece of a label that told it, None where nothing did."""

    family: str
    evidence: str | None


def guess_family(*labels: str) -> Guess:
    """The family that a file's labels (path, title, ...) speak of; the default where they say nothing."""
    for label in labels:
        dashed = re.sub(r"[^a-z0-9]+", "-", label.lower())
        for pattern, family in PATTERNS:
            if found := re.search(pattern, dashed):
                return Guess(family, found.group())
    return Guess(DEFAULT, None)


def family_named(name: str) -> Family:
    """The family of that name. Raises ValueError for a name that is none."""
    if name not in FAMILIES:
        raise ValueError(f"Got the family {name!r}; known are {', '.join(FAMILIES)}. Choose one, or let it be guessed.")
    return FAMILIES[name]
