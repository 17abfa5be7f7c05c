"""Sampling settings of a causal model: one frozen dataclass, with named presets.

It checks itself when it is made, so nothing further in asks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..wan.shot_cache import Shots
from .prompts import REREADING
from .schedule import Step, even_steps, few_steps
from .unipc import unipc_steps, unshifted

SOLVERS = ("renoise", "unipc")


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

    Raises ValueError for lists that do not fall, sizes below 1 and a window smaller than sink + chunk.
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

    def __post_init__(self) -> None:
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
        for name, value in (("chunk", self.chunk), ("first_chunk", self.first_chunk), ("window", self.window)):
            if value is not None and value < 1:
                raise ValueError(f"Got {name} {value}; it must be at least 1 latent frame.")
        if self.sink < 0:
            raise ValueError(f"Got sink {self.sink}; it must be 0 or more latent frames.")
        if not 0 <= self.context_noise < 1000:
            raise ValueError(f"Got context noise {self.context_noise}; it is a timestep in [0, 1000).")
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

    `steps` and `first_steps` may be a number instead of timesteps: so many, evenly spaced before the shift. Raises
    ValueError as `Sampling` does.
    """
    for name in ("steps", "first_steps"):
        if isinstance(count := changes.get(name), int):
            changes |= {name: even_steps(count)} | ({"warp": True} if name == "steps" else {})
    return replace(sampling, **changes)


def read_sampling(entry: dict) -> Sampling:
    """The sampling that metadata describe, `dataclasses.asdict` of one. Raises TypeError and ValueError for others."""
    entry = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    if isinstance(shots := entry.get("shots"), dict):
        entry["shots"] = Shots(**shots)
    return Sampling(**entry)


PRESETS = {
    "cli": Sampling(),
    "demo": Sampling(shift=8.0),
    # Trained without a sink; one that is pinned measured best in long videos and at prompt switches (benchmarks).
    "tiny": Sampling(shift=3.0, window=9, sink=1, pinned=True),
}
