"""Sampling settings of a causal model: one frozen dataclass, with named presets.

It checks itself when it is made, so nothing further in asks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..wan.bank import Bank
from ..wan.shot_cache import Shots
from .prompts import REREADING
from .schedule import Step, even_steps, few_steps
from .unipc import unipc_steps, unshifted

SOLVERS = ("renoise", "unipc")

SAMPLERS = ("chunks", "rolling")


@dataclass(frozen=True)
class Sampling:
    """How a causal model is sampled.

    steps         timesteps (0, 1000] of the few-step list before the shift, falling
    shift         flow shift; `warp=False` uses `steps` as they stand instead of shifting them
    chunk         latent frames generated together
    first_chunk   size of the first chunk where it differs (1 for "independent first frame" models)
    first_steps   steps of the first chunk where they differ
    window        latent frames attended to, the current chunk included; None: the whole video
    sink          first latent frames that never leave the window
    pinned        give sink keys positions just before the window, so that distances stay what training saw
    context_noise timestep (0..1000) told to the network when a finished chunk enters the cache
    solver        one of SOLVERS: "renoise" goes from each guess of the clean latents on with fresh noise, "unipc" along
                  the flow, with whole timesteps (unipc.py)
    shots         what a scene cut does (shot_cache.py); None: it forgets all but the sink
    holds_prefix  latent frames of a prefix that make no whole chunk are held at timestep 0 inside the first new chunk,
                  instead of a chunk of their own
    sampler       one of SAMPLERS: "chunks", one after the other; "rolling", several at once, each a step further than
                  the next
    position_range  latent frames within which positions stay, of pinned sinks; None: the window
    sink_decay    what a sink keeps of itself each time that a frame which leaves the window is blended into it; 1: all
    bank          memory bank beside the window; None: none
    rope_jitter   spread of the heads' RoPE bases in time, 0..1, so that a sink does not pull a long video back
    reencode      first-frame re-encode: the memory begins anew, with a still, whenever the window is full

    Raises ValueError for lists that do not fall, sizes below 1, a window smaller than sink + chunk, and rules that do
    not go together.
    Source: arXiv 2506.08009 section 3; presets `cli` and `demo` are the published inference script and web demo.
    """

    steps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    warp: bool = True
    chunk: int = 3
    first_chunk: int | None = None
    first_steps: tuple[float, ...] | None = None
    window: int | None = None
    sink: int = 0
    pinned: bool = False
    context_noise: float = 0.0
    solver: str = "renoise"
    shots: Shots | None = None
    holds_prefix: bool = False
    sampler: str = "chunks"
    position_range: int | None = None
    sink_decay: float = 1.0
    bank: Bank | None = None
    rope_jitter: float = 0.0
    reencode: bool = False

    def __post_init__(self) -> None:
        self._check_steps()
        self._check_window()
        self._check_rules()

    def _check_steps(self) -> None:
        for steps in filter(None, (self.steps, self.first_steps)):
            falling = all(a > b for a, b in zip(steps, steps[1:]))
            if not falling or steps[0] > 1000 or steps[-1] <= 0:
                raise ValueError(
                    f"Got steps {list(steps)}; timesteps must fall and lie in (0, 1000]. Use e.g. 1000, 750, 500, 250."
                )
        if not self.steps:
            raise ValueError("Got no steps; sampling needs at least one. Use e.g. 1000, 750, 500, 250.")
        if self.shift <= 0:
            raise ValueError(f"Got shift {self.shift}; it must be above 0. The published models use 5.")
        if not 0 <= self.context_noise < 1000:
            raise ValueError(f"Got context noise {self.context_noise}; it is a timestep in [0, 1000).")

    def _check_window(self) -> None:
        for name, value in (("chunk", self.chunk), ("first_chunk", self.first_chunk), ("window", self.window)):
            if value is not None and value < 1:
                raise ValueError(f"Got {name} {value}; it must be at least 1 latent frame.")
        if self.sink < 0:
            raise ValueError(f"Got sink {self.sink}; it must be 0 or more latent frames.")
        largest = max(self.chunk, self.first_chunk or 0)
        if self.window is not None and self.sink + largest > self.window:
            raise ValueError(
                f"Got a window of {self.window} latent frames with sink {self.sink} and chunk {largest}; the window "
                f"must hold both. Use a window of at least {self.sink + largest}, or a smaller sink or chunk."
            )
        if self.solver not in SOLVERS:
            raise ValueError(f"Got solver {self.solver!r}; there is {', '.join(SOLVERS)}.")
        self._check_shots()

    def _check_shots(self) -> None:
        """Raises ValueError where frames pinned at a scene cut would not stay whole, or leave no room for a chunk."""
        if self.shots is None or not self.shots.pinned or not self.sink or self.window is None:
            return
        chunk, sink, window = self.chunk, self.sink, self.window
        if sink % chunk or window % chunk:
            whole = [-(-frames // chunk) * chunk for frames in (window, sink)]
            raise ValueError(
                f"Got a window of {window} latent frames and sink {sink} with chunk {chunk}, for a model that pins the "
                f"first frames of a shot; both must be multiples of the chunk. Use a window of {whole[0]} and sink "
                f"{whole[1]}."
            )
        if window < (least := sink + min(sink, chunk) + chunk):
            raise ValueError(
                f"Got a window of {window} latent frames with sink {sink} and chunk {chunk}, for a model that pins the "
                f"first frames of a shot; the window must hold all three. Use a window of at least {least}, or a "
                "smaller sink."
            )

    def _check_rules(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"Got sampler {self.sampler!r}; there is {', '.join(SAMPLERS)}.")
        if self.sampler == "rolling" and self.first_steps:
            raise ValueError(
                "Got first steps with the rolling sampler, which denoises the first chunk together with the next ones. "
                "Leave first steps out, or use the sampler chunks."
            )
        if self.sampler == "rolling" and (self.solver != "renoise" or self.shots or self.holds_prefix):
            raise ValueError(
                "Got the rolling sampler for a model of several shots, or one that is solved by UniPC or holds a "
                "prefix; such models make one chunk after the other. Use the sampler chunks."
            )
        if self.shots and (self.bank or self.sink_decay < 1 or self.position_range):
            raise ValueError(
                "Got a memory bank, a sink decay or a position range for a model of several shots, which has rules of "
                "its own for what its window holds. Leave them out."
            )
        if self.sampler == "rolling" and self.bank:
            raise ValueError("Got a memory bank with the rolling sampler, which has none. Leave one of the two out.")
        if not 0 <= self.rope_jitter < 1:
            raise ValueError(f"Got RoPE jitter {self.rope_jitter:g}; it is in [0, 1). 0.8 is what LoL found best.")
        if self.position_range is not None and (self.window is None or self.position_range < self.window):
            raise ValueError(
                f"Got a position range of {self.position_range} latent frames with a window of {self.window or 'all'}; "
                "the window must lie within it. Use a window that does, or no position range."
            )
        self._check_decay()

    def _check_decay(self) -> None:
        if not 0 <= self.sink_decay <= 1:
            raise ValueError(f"Got sink decay {self.sink_decay:g}; it is in [0, 1], and 1 leaves sinks as they are.")
        if self.sink_decay < 1 and (self.sink != self.chunk or self.first_chunk not in (None, self.chunk)):
            raise ValueError(
                f"Got sink decay {self.sink_decay:g} with sink {self.sink} and chunk {self.chunk}; frames that leave "
                "are blended into the sink chunk by chunk, so both must have as many. Use sink "
                f"{self.chunk}, or sink decay 1."
            )
        if self.sink_decay < 1 and self.sampler == "rolling":
            raise ValueError("Got sink decay with the rolling sampler, which keeps its sinks. Use sink decay 1.")

    def steps_of(self, first: bool, strength: float = 1.0) -> tuple[Step, ...]:
        """The (timestep, sigma) list of a chunk; `first` for the first one that is generated.

        With a `strength` below 1 the list begins at that level, before the shift, and goes on with the lower steps.
        """
        steps = self.first_steps if first and self.first_steps else self.steps
        if strength < 1:
            steps = (1000 * strength, *(step for step in steps if step < 1000 * strength))
        if self.solver == "unipc":
            return unipc_steps(steps, self.shift)
        return few_steps(steps, self.shift, self.warp)

    def rereads_at(self, transition: str) -> bool:
        """Whether the window is read again where a prompt takes over in that way."""
        return transition in REREADING and self.shots is None

    def at_levels(self, sigmas: Sequence[float]) -> Sampling:
        """The same with steps at these noise levels (0..1], falling."""
        if self.solver == "unipc":
            return replace(self, steps=tuple(unshifted(sigma, self.shift) for sigma in sigmas), first_steps=None)
        return replace(self, steps=tuple(1000 * sigma for sigma in sigmas), shift=1.0, warp=True, first_steps=None)


def override(sampling: Sampling, **changes) -> Sampling:
    """A sampling with some of its fields changed.

    `steps` and `first_steps` may be a number instead of timesteps: so many, evenly spaced before the shift. Those of
    the memory bank have `bank_` before their names; 0 `bank_frames` leave it out. Raises ValueError as `Sampling` does.
    """
    if "sink" not in changes and "window" in changes:
        sampling = fit_window(sampling, changes.pop("window"), **{k: changes[k] for k in ("chunk",) if k in changes})
    bank = {name.removeprefix("bank_"): changes.pop(name) for name in list(changes) if name.startswith("bank_")}
    if bank:
        changes |= {"bank": replace(sampling.bank or Bank(), **bank) if bank.get("frames", 1) else None}
    for name in ("steps", "first_steps"):
        if isinstance(count := changes.get(name), int):
            changes |= {name: even_steps(count)} | ({"warp": True} if name == "steps" else {})
    return replace(sampling, **changes)


def read_sampling(entry: dict) -> Sampling:
    """The sampling that metadata describe, `dataclasses.asdict` of one. Raises TypeError and ValueError for others."""
    entry = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    for name, kind in (("bank", Bank), ("shots", Shots)):
        if isinstance(rules := entry.get(name), dict):
            entry[name] = kind(**rules)
    return Sampling(**entry)


def fit_window(sampling: Sampling, window: int | None, **changes) -> Sampling:
    """A sampling with another window, and what goes by its window made to fit.

    A deep sink, one of more than a chunk, gets the same share of a shorter window, in whole chunks, and leaves room for
    two; a position range that the window outgrows goes. Models of several shots keep their sinks.
    """
    chunk, sink = max(changes.get("chunk", sampling.chunk), sampling.first_chunk or 0), sampling.sink
    if window is not None and sampling.window and sink > sampling.chunk and not sampling.shots:
        share = min(sink, sink * window // sampling.window, window - 2 * chunk)
        changes |= {"sink": sink if share == sink else max(0, share // chunk * chunk)}
    if sampling.position_range and (window is None or window > sampling.position_range):
        changes |= {"position_range": None}
    return replace(sampling, window=window, **changes)


PRESETS = {
    "cli": Sampling(),
    "demo": Sampling(shift=8.0),
    # Trained without a sink; one that is pinned measured best in long videos and at prompt switches (benchmarks).
    "tiny": Sampling(shift=3.0, window=9, sink=1, pinned=True),
}

LENGTHS = ("long", "fast")  # presets of the window alone: all else stays as the model was made for


def preset_of(name: str, own: Sampling) -> Sampling:
    """The preset of that name for a model that is sampled as `own`.

    long  most of the window is a sink that moves along, for minutes with models of seconds: 15 of 21 latent frames, and
          the same share of another window
    fast  a window of at most 12 latent frames with a sink of 3 that moves along: more frames per second; of models of
          larger chunks at most three chunks, with a sink of one

    Source: measured by others on Self Forcing's weights (zaitrarrio/fastvideo-rs); Deep Forcing, arXiv 2512.05081.
    """
    if name not in LENGTHS:
        return PRESETS[name]
    most = max(12, 3 * own.chunk)
    window = min(most, own.window or most) if name == "fast" else own.window or 21
    deep = 15 * window // 21 if name == "long" else max(3, own.chunk)
    largest = window - max(own.chunk, own.first_chunk or 0) * (2 if name == "long" else 1)
    sink = max(0, min(deep, largest) // own.chunk * own.chunk)
    return replace(
        own, window=window, sink=sink, pinned=True, position_range=None, sink_decay=1.0, bank=None, reencode=False,
        sampler="chunks",
    )  # fmt: skip
