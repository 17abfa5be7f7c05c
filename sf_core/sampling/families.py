"""The published causal Wan models: how each is sampled, and which one a file is, by its names.

The numbers are those of each model's own inference configuration. Checkpoints of different families have the same
tensors, so only names tell them apart: that of the file, of its folders, and what its metadata say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ..wan.bank import Bank
from ..wan.shot_cache import Shots
from .config import Sampling


class Family(NamedTuple):
    """How a family is sampled, and for people: what it is and where to get it.

    what     what it is, and what to know of it
    page     where its weights are
    licence  of the weights, as their page says it
    size     of the model and of its file
    source   where the numbers are from
    base     pattern of the names of files that are only half of it, and `lora` the file with the other half
    trained  latent frames of the clips it was trained on; None where it was made for longer videos than any window
    """

    sampling: Sampling
    what: str
    page: str
    licence: str
    size: str
    source: str
    base: str | None = None
    lora: str = ""
    trained: int | None = None

    @property
    def description(self) -> str:
        return f"{self.what} {self.page}"


FOUR, FIVE = (1000, 750, 500, 250), (1000, 800, 600, 400, 200)
APACHE, UNSEEN = "Apache-2.0", "not known here: see its page"
LONGLIVE = "CC-BY-NC-SA-4.0 on its card, Apache-2.0 in its repository"
SMALL, LARGE = "1.3B, 5.7 GB in float32", "14B, 28.6 GB"
CLIP = 21  # latent frames of a clip of 5 seconds

# Five-second models beyond five seconds: most of the window is a sink that moves along. Others have measured on Self
# Forcing's weights that one of 15 in a window of 21 stays clean for minutes, where a short one glows and none drifts
# (zaitrarrio/fastvideo-rs, docs/serve; Deep Forcing, arXiv 2512.05081). Up to 21 latent frames it changes nothing.
DEEP = {"window": CLIP, "sink": 15, "pinned": True}


def _small(sampling: Sampling, what: str, page: str, licence: str, source: str, **more) -> Family:
    """A family of 1.3B models."""
    return Family(sampling, what, f"huggingface.co/{page}", licence, SMALL, source, **more)


def _five_seconds(sampling: Sampling, what: str, page: str, licence: str, source: str) -> Family:
    """A family of 1.3B models that were trained on clips of 5 seconds."""
    return _small(replace(sampling, **DEEP), what, page, licence, source, trained=CLIP)


def _rcm(chunk: int, *steps: float) -> Family:
    """Causal-rCM of so many steps. Those of fewer than 4 are the ends of the list of 4; their own were not seen."""
    layout = "chunks of 3 latent frames" if chunk == 3 else "one latent frame at a time"
    told = "" if len(steps) == 4 else " Its own list was not seen: these are taken from that of 4 steps."
    file = f"Causal_rCM_Wan2.1_T2V_1.3B_480p_TF-dCM-init_SF-DMD_c{chunk}-{chunk}_step{len(steps)}.pt"
    return _five_seconds(
        Sampling(steps, warp=False, chunk=chunk),
        f"Causal-rCM, {layout}, {len(steps)} step{'s' * (len(steps) > 1)}.{told}",
        f"worstcoder/rcm-Wan: {file}", APACHE, "NVlabs/rcm",
    )  # fmt: skip


FAMILIES = {
    "self-forcing": _five_seconds(
        Sampling(FOUR),
        "Self Forcing, chunks of 3 latent frames, 4 steps.",
        "gdhe17/Self-Forcing: checkpoints/self_forcing_dmd.pt",
        APACHE,
        "guandeh17/Self-Forcing, configs/self_forcing_dmd.yaml and self_forcing_sid.yaml",
    ),
    "self-forcing-10s": _small(
        Sampling(FOUR, **DEEP),
        "Self Forcing trained on 10 seconds. Its authors' window is not published: that of 5 seconds is assumed.",
        "gdhe17/Self-Forcing: checkpoints/self_forcing_10s.pt",
        APACHE,
        "not published",
        trained=41,
    ),
    "causal-forcing": _five_seconds(
        Sampling(FOUR),
        "Causal Forcing, chunk-wise: 3 latent frames, 4 steps.",
        "zhuhz22/Causal-Forcing: chunkwise/causal_forcing.pt",
        APACHE,
        "thu-ml/Causal-Forcing, configs/causal_forcing_dmd_chunkwise.yaml",
    ),
    "causal-forcing-framewise": _five_seconds(
        Sampling(FOUR, chunk=1),
        "Causal Forcing, frame-wise: one latent frame at a time, 4 steps.",
        "zhuhz22/Causal-Forcing: framewise/causal_forcing.pt",
        APACHE,
        "thu-ml/Causal-Forcing, configs/causal_forcing_dmd_framewise.yaml",
    ),
    "causal-forcing-2step": _five_seconds(
        Sampling((1000, 500), chunk=1, first_steps=FOUR),
        "Causal Forcing++, frame-wise, 2 steps (4 for the first frame).",
        "zhuhz22/Causal-Forcing: causal-forcing++/framewise-2step.pt",
        APACHE,
        "thu-ml/Causal-Forcing, configs/causal_forcing_dmd_framewise_2step.yaml",
    ),
    "causal-forcing-1step": _five_seconds(
        Sampling((1000,), chunk=1, first_steps=FOUR),
        "Causal Forcing++, frame-wise, 1 step (4 for the first frame).",
        "zhuhz22/Causal-Forcing: causal-forcing++/framewise-1step.pt",
        APACHE,
        "thu-ml/Causal-Forcing, configs/causal_forcing_dmd_framewise_1step.yaml",
    ),
    "causal-forcing-long": _small(
        Sampling(FOUR, window=21, sink=3, pinned=True, sampler="rolling"),
        "Causal Forcing for long videos: 4 chunks are denoised together, each a step further than the next.",
        "zhuhz22/Causal-Forcing: chunkwise/longvideo.pt",
        APACHE,
        "thu-ml/Causal-Forcing 1fc7bbc, long_video",
    ),
    "longlive": _small(
        Sampling(FOUR, window=12, sink=3),
        "LongLive 1.0: window 12, sink 3, made for minutes.",
        "Efficient-Large-Model/LongLive-1.3B: models/longlive_base.pt and models/lora.pt",
        LONGLIVE,
        "NVlabs/LongLive, branch v1.0, configs/longlive_inference.yaml",
        base=r"long-?live-?base",
        lora="models/lora.pt",
    ),
    "longlive-infinity": _small(
        Sampling(FOUR, window=12, sink=3, pinned=True),
        "LongLive 1.0 for videos without an end: the sink's positions move with the window.",
        "Efficient-Large-Model/LongLive-1.3B: the files of longlive",
        LONGLIVE,
        "NVlabs/LongLive, branch v1.0, configs/longlive_inference_infinity.yaml",
        base=r"long-?live-?base",
        lora="models/lora.pt",
    ),
    "memflow": _small(
        Sampling(FOUR, window=12, sink=3, bank=Bank(3, 3)),
        "MemFlow: window 12, sink 3, and a memory bank of 3 frames that the prompt chooses.",
        "daydreamlive/MemFlow: base.pt and lora.pt",
        UNSEEN,
        "KlingTeam/MemFlow 7ed5147",
        base=r"(^|-)base-(pt|pth|safetensors)(-|$)",
        lora="lora.pt",
    ),
    "reward-forcing": _small(
        Sampling(FOUR, window=9, sink=3, pinned=True, sink_decay=0.999),
        "Reward Forcing: window 9, sink 3; frames that leave the window are blended into the sink.",
        "JaydenLu666/Reward-Forcing-T2V-1.3B: rewardforcing.pt",
        UNSEEN,
        "JaydenLyh/Reward-Forcing 4317f5a, configs/reward_forcing.yaml",
    ),
    "rolling-forcing": _small(
        Sampling(FIVE, window=21, sink=3, pinned=True, sampler="rolling"),
        "Rolling Forcing: 5 chunks are denoised together, each a step further than the next; window 21, sink 3.",
        "TencentARC/RollingForcing: checkpoints/rolling_forcing_dmd.pt",
        UNSEEN,
        "TencentARC/RollingForcing a1477d0, configs/rolling_forcing_dmd.yaml",
    ),
    "self-gradient-forcing": _small(
        Sampling(FOUR, window=12, sink=3, pinned=True, position_range=21),
        "Self Gradient Forcing, chunk-wise: 3 latent frames, window 12, sink 3, positions within 21.",
        "JunhaoZhuang/Self_Gradient_Forcing: chunkwise/ar/model.pt",
        APACHE,
        "zhuang2002/Self_Gradient_Forcing",
    ),
    "self-gradient-forcing-framewise": _small(
        Sampling(FOUR, chunk=1, window=21, sink=4, pinned=True, position_range=21),
        "Self Gradient Forcing, frame-wise: one latent frame at a time, window 21, sink 4; made for 240 seconds.",
        "JunhaoZhuang/Self_Gradient_Forcing: framewise/ar/model.pt",
        APACHE,
        "zhuang2002/Self_Gradient_Forcing",
    ),
    "sgf-plus": _small(
        Sampling(FOUR, window=12, sink=3, pinned=True, position_range=12),
        "Self Gradient Forcing+, chunk-wise: a second set of weights writes the cache; made for 24 hours.",
        "ZihanSu/Self_Gradient_Forcing_Plus: chunkwise/model.pt",
        APACHE,
        "Zihan-Su/Self_Gradient_Forcing_Plus ec746eb",
    )._replace(size="2 x 1.3B, 11.4 GB in float32"),
    "sgf-plus-framewise": _small(
        Sampling(FOUR, chunk=1, window=21, sink=4, pinned=True, position_range=21),
        "Self Gradient Forcing+, frame-wise: a second set of weights writes the cache; made for 24 hours.",
        "ZihanSu/Self_Gradient_Forcing_Plus: framewise/model.pt",
        APACHE,
        "Zihan-Su/Self_Gradient_Forcing_Plus ec746eb",
    )._replace(size="2 x 1.3B, 11.4 GB in float32"),
    "one-forcing": _five_seconds(
        Sampling((1000,), chunk=1),
        "One-Forcing, frame-wise, 1 step: drafts.",
        "JiaqiFeng/OneForcing: checkpoints/one_forcing.pt",
        UNSEEN,
        "the model card",
    ),
    "causal-rcm": _rcm(3, 999, 937, 833, 625),
    "causal-rcm-2step": _rcm(3, 999, 833),
    "causal-rcm-1step": _rcm(3, 999),
    "causal-rcm-framewise": _rcm(1, 999, 937, 833, 625),
    "causal-rcm-framewise-2step": _rcm(1, 999, 833),
    "causal-rcm-framewise-1step": _rcm(1, 999),
    "streamdiffusion-v2": _small(
        Sampling((750, 250), chunk=1, window=6),
        "StreamDiffusionV2, for live video to video: one latent frame at a time, 2 steps over the noised input clip; "
        "strength 0.7 to 0.8.",
        "daydreamlive/StreamDiffusionV2: wan_causal_dmd_v2v/model.pt",
        UNSEEN,
        "chenfengxu714/StreamDiffusionV2",
    ),
    # Its list ends with a 0 that its sampler drops. The steps are not warped: timestep 757 is told to the network, and
    # the noise level is the nearest in the shifted table.
    "causvid": _five_seconds(
        Sampling((1000, 757, 522), shift=8.0, warp=False),
        "CausVid, 3 steps, made for 5 seconds. Beyond them its own script begins anew with the last chunk, its first "
        "frame re-encoded: first-frame re-encode does that; the default is a deep sink.",
        "tianweiy/CausVid: autoregressive_checkpoint/model.pt",
        UNSEEN,
        "tianweiy/CausVid, configs/wan_causal_dmd.yaml",
    ),
    "causvid-4step": _five_seconds(
        Sampling(FOUR, shift=8.0),
        "CausVid, 4 steps, warped.",
        "tianweiy/CausVid: autoregressive_checkpoint_warp_4step_cfg2/model.pt",
        UNSEEN,
        "tianweiy/CausVid, configs/wan_causal_dmd_warp_4step_cfg2.yaml",
    ),
    "krea-14b": Family(
        Sampling(FOUR, window=6, reencode=True),
        "Krea Realtime 14B: window 6; for every chunk the last 3 latent frames are read again, the first of them "
        "re-encoded as a still.",
        "huggingface.co/krea/krea-realtime-video: krea-realtime-video-14b.safetensors",
        APACHE,
        LARGE,
        "the model card",
    ),
    # One with 2 steps is distilled for them.
    "longlive-2": Family(
        Sampling(FOUR, chunk=8, window=32, sink=8, solver="unipc", shots=Shots(jump=8), holds_prefix=True),
        "LongLive 2.0: Wan 2.2 5B, 1280 x 704 at 24 fps, chunks of 8 latent frames, 4 steps of UniPC; several shots, "
        "each beginning with a cut; an image is held as the first frame.",
        "huggingface.co/Efficient-Large-Model/LongLive-2.0-5B: model_bf16.pt",
        "NVIDIA Open Model License",
        "5B, 10 GB",
        "NVlabs/LongLive, configs/inference.yaml and inference_i2v.yaml",
    ),
}

DEFAULT = "self-forcing"
OF_48_CHANNELS = "longlive-2"  # the one family whose latents are the Wan 2.2 VAE's

# Names of models, searched in the file's name, then in its folders', the nearest first, then in its metadata: the first
# that holds one counts. Lower case, all that is no letter or digit made into single dashes.
MODELS = (
    (r"self-?gradient-?forcing-?plus|\bsgf-?plus\b", "sgf-plus"),
    (r"self-?gradient-?forcing|\bsgf\b", "self-gradient-forcing"),
    (r"long-?live-?(v|version-?)?2(?![0-9]|-?step)", "longlive-2"),
    (r"long-?live", "longlive"),
    (r"mem-?flow", "memflow"),
    (r"reward-?forcing", "reward-forcing"),
    (r"rolling-?forcing", "rolling-forcing"),
    (r"one-?forcing", "one-forcing"),
    (r"causal-?rcm", "causal-rcm"),
    (r"stream-?diffusion-?v2|wan-?causal-?dmd-?v2v", "streamdiffusion-v2"),
    (r"krea-?realtime", "krea-14b"),
    (r"causal-?forcing", "causal-forcing"),
    (r"causvid(?!.*bidirect)|autoregressive-?checkpoint|wan-?causal-?ode", "causvid"),  # others are published beside it
    (r"self-?forcing|sfwan", "self-forcing"),
)
# Where no name of a model is found: how the published files of Causal Forcing are called.
UNNAMED = ((r"frame-?wise|chunk-?wise|long-?video", "causal-forcing"),)

# Of a model that comes in several kinds: what tells the kind, in the nearest of these names. The first that fits.
KINDS = {
    "sgf-plus": ((r"frame-?wise", "sgf-plus-framewise"),),
    "self-gradient-forcing": ((r"frame-?wise", "self-gradient-forcing-framewise"),),
    "longlive": ((r"infinit|endless", "longlive-infinity"),),
    "causal-rcm": (
        (r"c1-1.*\bstep-?1\b", "causal-rcm-framewise-1step"),
        (r"c1-1.*\bstep-?2\b", "causal-rcm-framewise-2step"),
        (r"c1-1", "causal-rcm-framewise"),
        (r"\bstep-?1\b", "causal-rcm-1step"),
        (r"\bstep-?2\b", "causal-rcm-2step"),
    ),
    "causal-forcing": (
        (r"long-?video|forcing-?long\b", "causal-forcing-long"),
        (r"\b2-?step", "causal-forcing-2step"),
        (r"\b1-?step", "causal-forcing-1step"),
        (r"frame-?wise", "causal-forcing-framewise"),
    ),
    "causvid": ((r"4-?step", "causvid-4step"),),
    "self-forcing": ((r"self-?forcing-?10s", "self-forcing-10s"),),
}
LAYOUT = r"frame-?wise|chunk-?wise"
BY_LAYOUT = ("sgf-plus", "self-gradient-forcing", "causal-forcing")  # come chunk-wise and frame-wise, both in use


class Guess(NamedTuple):
    """A family's name, and what told it, in the words that were found; None where nothing did.

    assumed  what was not told, and is assumed; "" where all was
    """

    family: str
    evidence: str | None
    assumed: str = ""


def guess_family(*names: str) -> Guess:
    """The family that names speak of (a file's own, its folders', the nearest first, metadata); else the default."""
    dashed = [re.sub(r"[^a-z0-9]+", "-", name.lower().replace("sgf+", "sgf-plus")) for name in names]
    everything = "-".join(reversed(dashed))
    named = next((hit for name in dashed if (hit := _search(MODELS, name))), None) or _search(UNNAMED, everything)
    if named is None:
        return Guess(DEFAULT, None)
    evidence, model = named
    kind = layout = None
    for name in dashed:  # the nearest that tells the kind
        kind, layout = _search(KINDS.get(model, ()), name), re.search(LAYOUT, name)
        if kind or layout:
            break
    assumed = "chunk-wise" if model in BY_LAYOUT and not (kind or layout) else ""
    told = [evidence] + [found for found in (kind and kind[0], layout and layout.group()) if found]
    return Guess(kind[1] if kind else model, '" and "'.join(dict.fromkeys(told)), assumed)


def _search(patterns: Sequence[tuple[str, str]], name: str) -> tuple[str, str] | None:
    """(what was found, what it stands for) of the first pattern that is in a name."""
    for pattern, meaning in patterns:
        if found := re.search(pattern, name):
            return found.group().strip("-"), meaning
    return None


def family_named(name: str) -> Family:
    """The family of that name. Raises ValueError for a name that is none."""
    if name not in FAMILIES:
        raise ValueError(f"Got the family {name!r}; known are {', '.join(FAMILIES)}. Choose one, or let it be guessed.")
    return FAMILIES[name]
