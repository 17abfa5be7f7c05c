"""LongLive 2.0: UniPC, scene cuts, held frames, against the published code's outputs (tests/golden)."""

import pytest
import torch

from sf_core.sampling.unipc import UniPC, unipc_steps
from sf_core.wan.cache import CacheShape
from sf_core.wan.model import encode_prompt, velocity
from sf_core.wan.shot_cache import ShotCache, Shots
from tests.core.goldens import HEIGHT, WIDTH, frames_second
from tests.core.longlive2 import CONFIG, FACTS, model, normal, replay, sampling, tensors

TOLERANCE = 2e-5
QUIRKS = {"shots4_sink2"}  # recorded mistakes, whose settings are refused
CASES = sorted(FACTS.keys() - QUIRKS)
SCHEDULE = tensors("h0_sched_forward")


def close(got, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def watch(monkeypatch):
    """[(first frame of a chunk, frames that its attention sees, jump of its positions)], as a rollout makes them."""
    seen, chunk = [], ShotCache.chunk

    def watched(self, start, frames, *rest):
        attend = chunk(self, start, frames, *rest)
        seen.append((start, self.held.copy(), self.jumped))
        return attend

    monkeypatch.setattr(ShotCache, "chunk", watched)
    return seen


@pytest.mark.parametrize("case", CASES)
def test_rollout(case, monkeypatch):
    seen, fact, golden = watch(monkeypatch), FACTS[case], tensors(FACTS[case]["file"])
    ours, theirs = replay(case, golden.get(f"{case}.negative_embeds")), golden[f"{case}.latents"]
    close(ours[:, -theirs.shape[1] :], theirs)
    for start in {start for start, *_ in seen}:
        recorded = [(call["slots"], call["rope_offset"]) for call in fact["calls"] if call["first_frame"] == start]
        looks = [(frames, jumped) for at, frames, jumped in seen if at == start]
        assert (looks[0], looks[-1]) == (recorded[0], recorded[-1] if len(looks) > 1 else looks[-1])


def test_a_sink_that_is_no_multiple_of_the_chunk_is_refused():
    with pytest.raises(ValueError, match="window of 16 latent frames and sink 2 with chunk 4.*window of 16 and sink 4"):
        sampling(FACTS["shots4_sink2"])


@pytest.mark.parametrize(("window", "sink", "least"), [(20, 16, 24), (24, 16, None), (8, 4, 12)])
def test_a_window_holds_sink_pin_and_chunk(window, sink, least):
    fact = FACTS["shots4"] | {"window": window, "sink": sink}
    if least is None:
        assert sampling(fact).window == window
    else:
        with pytest.raises(ValueError, match=f"hold all three. Use a window of at least {least}"):
            sampling(fact)


@torch.no_grad()
def test_cached_forwards_with_a_timestep_for_each_frame():
    wan, context = model(), SCHEDULE["fwd.context"]
    cache = ShotCache(CONFIG, CacheShape(len(context), HEIGHT, WIDTH, slots=8), Shots(jump=8))
    text = encode_prompt(wan, context)
    for call, start in (("a", 0), ("b", 4), ("c", 6)):
        if start:
            cache.begin_shot(start)
        x, flow = (frames_second(SCHEDULE[f"fwd.{call}.{name}"]) for name in ("x", "flow"))
        close(velocity(wan, x, SCHEDULE[f"fwd.{call}.t"], text, cache.chunk(start, x.shape[2])), flow)
    for layer in range(CONFIG.layers):
        close(
            cache.keys[layer].read(len(SCHEDULE["fwd.cache_k.0"][0])).transpose(1, 2), SCHEDULE[f"fwd.cache_k.{layer}"]
        )


UNIPC = sorted({name.rsplit(".", 1)[0] for name in SCHEDULE if name.startswith("unipc.") and name.endswith("0")})


@pytest.mark.parametrize("case", UNIPC)
def test_unipc(case):
    steps = case_steps(case)
    assert [step.timestep for step in steps] == SCHEDULE[f"{case}.timesteps"].tolist()
    close(torch.tensor([step.sigma for step in steps]), SCHEDULE[f"{case}.sigmas"][:-1], 0)
    x, solver = normal(f"input:{case}.x", SCHEDULE[f"{case}.after0"].shape), UniPC(steps)
    for i, step in enumerate(steps):
        x = solver(i, x, x - step.sigma * SCHEDULE[f"{case}.flow{i}"])
        close(solver.corrected, SCHEDULE[f"{case}.corrected{i}"], 2e-6)
        close(x, SCHEDULE[f"{case}.after{i}"], 2e-6)


def case_steps(case):
    shift, count = (int(part.lstrip("abcdefghijklmnopqrstuvwxyz")) for part in case.split(".")[1:])
    return unipc_steps(tuple(1000 * (count - i) / count for i in range(count)), float(shift))


def test_two_steps_of_unipc_are_euler():
    steps = unipc_steps((1000.0, 500.0), 5.0)
    x, flows = torch.randn(8), torch.randn(2, 8)
    between = x + (steps[1].sigma - steps[0].sigma) * flows[0]
    solver = UniPC(steps)
    ours = solver(0, x, x - steps[0].sigma * flows[0])
    close(ours, between, 1e-6)
    close(solver(1, ours, ours - steps[1].sigma * flows[1]), between - steps[1].sigma * flows[1], 1e-6)


def test_unipc_follows_a_straight_flow_exactly():
    x0, noise = torch.randn(2, 16)
    steps = unipc_steps((1000, 800, 600, 400, 200), 3.0)
    solver, x = UniPC(steps), (1 - steps[0].sigma) * x0 + steps[0].sigma * noise
    for i in range(len(steps)):
        x = solver(i, x, x0)
        sigma = steps[i + 1].sigma if i + 1 < len(steps) else 0
        close(x, (1 - sigma) * x0 + sigma * noise, 1e-6)
