"""Laws of the rollout and its cache that hold for any size, chunking, window and sink."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.recompute import block_causal_mask
from sf_core.sampling.config import PRESETS, Sampling
from sf_core.sampling.context import Context, allocate_cache
from sf_core.sampling.noise import SeededNoise
from sf_core.sampling.plan import Plan, cut_into_chunks, round_up_to_chunks
from sf_core.sampling.prompts import PromptSchedule, TimedPrompt
from sf_core.sampling.rollout import denoise
from sf_core.wan.attention import FullAttention, attention_by_rows, sdpa
from sf_core.wan.cache import CacheShape, RollingCache
from sf_core.wan.config import WAN_1_3B, WanConfig
from sf_core.wan.model import EAGER, Network, WanLayers, WanModel, encode_prompt, velocity
from tests.core.rolling import roll_chunks, roll_out

SMALL = WanConfig(dim=24, heads=2, layers=2, ffn_dim=32, channels=4, freq_dim=16, text_dim=8, text_len=6)
HEIGHT, WIDTH = 4, 6
chunk_sizes = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def small_model():
    torch.manual_seed(0)
    wan = WanModel(SMALL).requires_grad_(False)
    torch.nn.init.normal_(wan.head.head.weight, std=0.2)
    return wan


WAN = small_model()
PROMPT = torch.randn(1, 5, SMALL.text_dim, generator=torch.Generator().manual_seed(1))


def roll(frames, sampling=None, seed=0, prompt=PROMPT, wan=WAN, size=(HEIGHT, WIDTH), **options):
    return roll_out(wan, sampling or Sampling(), prompt, SeededNoise(seed), frames, *size, **options)


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@settings(max_examples=25)
@given(chunks=chunk_sizes, batch=st.integers(1, 2))
@torch.no_grad()
def test_cached_chunk_by_chunk_is_the_block_causal_forward(chunks, batch):
    frames = sum(chunks)
    generator = torch.Generator().manual_seed(frames)
    x = torch.randn(batch, SMALL.channels, frames, HEIGHT, WIDTH, generator=generator)
    text = encode_prompt(WAN, PROMPT.expand(batch, -1, -1))
    tokens = SMALL.tokens_per_frame(HEIGHT, WIDTH)
    see = FullAttention(SMALL, range(frames), HEIGHT, WIDTH, mask=block_causal_mask(chunks, tokens))
    whole = velocity(WAN, x, 500, text, see)
    cache = RollingCache(SMALL, CacheShape(batch, HEIGHT, WIDTH, slots=frames))
    start, pieces = 0, []
    for n in chunks:
        pieces.append(velocity(WAN, x[:, :, start : start + n], 500, text, cache.chunk(start, n)))
        start += n
    equal(torch.cat(pieces, 2), whole)


@settings(max_examples=60)
@given(
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=9),
    sink=st.integers(0, 4),
    spare=st.integers(0, 5),
)
@torch.no_grad()
def test_the_ring_holds_what_a_list_of_frames_would(chunks, sink, spare):
    window = sink + max(chunks) + spare
    cache = RollingCache(SMALL, CacheShape(1, HEIGHT, WIDTH, slots=window, sink=sink))
    tokens, start, seen = cache.tokens, 0, []

    def spy(q, k, v, mask):
        seen.append(sorted(set(v[0, 0, :, 0].int().tolist())))
        return q

    for n in chunks:
        for _ in range(2):  # a chunk is written once per step and again when it is committed
            values = torch.arange(start, start + n).repeat_interleave(tokens).float()
            v = values[None, None, :, None].expand(1, SMALL.heads, -1, SMALL.head_dim)
            cache.chunk(start, n, spy)(0, v, v, v)
        start += n
        oracle = list(range(start))
        if start > window:
            oracle = oracle[:sink] + oracle[start - (window - sink) :]
        assert seen[-1] == seen[-2] == oracle


@settings(max_examples=20)
@given(chunks=st.lists(st.integers(1, 3), min_size=2, max_size=6), sink=st.integers(0, 2), spare=st.integers(0, 3))
def test_with_gradients_and_read_only_a_chunk_sees_the_same_window(chunks, sink, spare):
    window = sink + max(chunks) + spare
    cache = RollingCache(SMALL, CacheShape(1, HEIGHT, WIDTH, slots=window, sink=sink))
    x = torch.randn(1, SMALL.channels, sum(chunks), HEIGHT, WIDTH, generator=torch.Generator().manual_seed(len(chunks)))
    text, start = encode_prompt(WAN, PROMPT), 0
    for n in chunks:
        piece = x[:, :, start : start + n]
        with torch.enable_grad():
            beside = velocity(WAN, piece, 500, text, cache.chunk(start, n).read_only())
        with torch.no_grad():
            equal(beside, velocity(WAN, piece, 500, text, cache.chunk(start, n)))
        start += n


@pytest.mark.parametrize("window", [9, 12, 100])
def test_a_window_as_long_as_the_video_changes_nothing(window):
    assert torch.equal(roll(9, Sampling(window=window, sink=2)), roll(9))


@settings(max_examples=20)
@given(frames=st.integers(1, 12), more=st.integers(1, 6), sink=st.integers(0, 2), pinned=st.booleans())
def test_the_first_frames_do_not_depend_on_the_length(frames, more, sink, pinned):
    sampling = Sampling(window=6, sink=sink, pinned=pinned)
    whole = frames - frames % sampling.chunk
    short, long = roll(frames, sampling), roll(frames + more, sampling)
    equal(short[:, :, :whole], long[:, :, :whole])


@settings(max_examples=25)
@given(
    frames=st.integers(1, 12),
    chunk=st.integers(1, 3),
    sink=st.integers(0, 3),
    spare=st.integers(0, 4),
    again=st.booleans(),
)
def test_a_cache_that_keeps_everything_shows_the_same_window(frames, chunk, sink, spare, again):
    sampling = Sampling(chunk=chunk, sink=sink, window=sink + chunk + spare)
    network = Network(WAN, ops=EAGER._replace(recomputes=again))
    expected = roll(frames, sampling)
    for gradient in (False, True):  # inside the cache, and beside it
        equal(gone_through(network, Plan(sampling, frames, HEIGHT, WIDTH), gradient), expected)


def gone_through(network, plan, gradient):
    """A rollout as training makes it: with `gradient` the last step of a chunk only reads the cache."""
    context, made = Context(network, plan, PromptSchedule.of(PROMPT)), []
    for chunk in plan.chunks:
        context.enter(chunk)
        noise = context.noise(SeededNoise(0), chunk)
        made.append(denoise(context, plan.steps(chunk), noise, gradient=gradient))
        context.append(chunk, made[-1])
    return torch.cat(made, 2)


def test_a_cache_that_keeps_everything_cannot_move_sinks():
    with pytest.raises(ValueError, match="pinned sinks with gradient checkpointing.*Turn off one"):
        roll(6, Sampling(sink=1, window=6, pinned=True), ops=EAGER._replace(recomputes=True))


def test_a_prefix_continues_as_if_it_had_been_generated():
    whole = roll(12)
    equal(roll(12, prefix=whole[:, :, :6]), whole)


@settings(max_examples=15)
@given(chunk=st.sampled_from((1, 2, 4)), window=st.integers(0, 14), sink=st.integers(0, 2), pinned=st.booleans())
def test_a_video_continued_from_its_whole_history_is_the_video_made_at_once(chunk, window, sink, pinned):
    sampling = Sampling(chunk=chunk, window=sink + chunk + window, sink=sink, pinned=pinned)
    whole = roll(40, sampling)
    first = roll(20, sampling)
    assert torch.equal(first, whole[:, :, :20])
    # Equal but for the last bits: where the ring begins anew a slot differs, and with it the order of a sum.
    equal(roll(40, sampling, prefix=first, full_history=True), whole)


@pytest.mark.parametrize(
    "changes", [{"context_noise": 100}, {"steps": (1000, 500), "first_steps": (1000, 750, 500, 250)}]
)
def test_so_it_is_with_context_noise_and_with_first_steps_of_their_own(changes):
    sampling = Sampling(window=9, sink=1, **changes)
    whole = roll(24, sampling)
    equal(roll(24, sampling, prefix=whole[:, :, :18], full_history=True), whole)


def test_a_long_prefix_is_read_as_far_as_the_first_new_chunk_sees():
    sampling = Sampling(window=9, sink=1)
    read = [chunk.start for chunk in cut_into_chunks(24, sampling, prefix=18) if chunk.cached and chunk.given]
    assert read == [0, 12, 15]  # the sink's chunk, and the 5 frames beside sink and new chunk
    assert all(chunk.cached for chunk in cut_into_chunks(24, sampling, prefix=9))
    assert all(chunk.cached for chunk in cut_into_chunks(24, sampling, prefix=18, full_history=True))


def test_what_of_a_prefix_is_not_read_does_not_matter_but_comes_out():
    sampling, prefix = Sampling(window=9, sink=1), roll(18)
    other = prefix.clone()
    other[:, :, 3:12] = 7
    ours, theirs = (roll(24, sampling, prefix=given) for given in (prefix, other))
    assert torch.equal(ours[:, :, :18], prefix) and torch.equal(theirs[:, :, :18], other)
    assert torch.equal(ours[:, :, 18:], theirs[:, :, 18:])
    near = roll(24, sampling, prefix=prefix, full_history=True)
    assert 0 < (near - ours)[:, :, 18:].norm() < 0.5 * near[:, :, 18:].norm()


OTHER = torch.randn(1, 4, SMALL.text_dim, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize("start", [24, 30, 33])
def test_a_new_prompt_in_or_after_a_long_prefix_reads_the_newest_frames(sink, start, monkeypatch):
    sampling, prefix = Sampling(window=9, sink=sink), roll(30)
    read = []
    commit = Context._commit

    def spy(self, x0, timestep, attend):
        if x0.shape[2] > sampling.chunk:  # a chunk is committed alone, a window in one piece
            read.append((attend.frames, x0))
        commit(self, x0, timestep, attend)

    monkeypatch.setattr(Context, "_commit", spy)
    whole = roll(36, sampling, prompt=[TimedPrompt(0, PROMPT), TimedPrompt(start, OTHER)], prefix=prefix)
    if not next(chunk for chunk in cut_into_chunks(36, sampling, 30) if chunk.start == start).cached:
        assert not read  # what is read later is read under the new prompt anyway
        return
    ((frames, latents),) = read
    assert frames[-1] == start - 1
    assert torch.equal(latents, whole[:, :, frames[0] : start])


@pytest.mark.parametrize("sink", [0, 1])
def test_reencode_goes_on_from_a_long_prefix(sink):
    asked, prefix = [], roll(24)
    sampling = Sampling(window=9, sink=sink)
    roll(36, sampling, prefix=prefix, reencode=lambda latents: asked.append(latents) or latents[:, :, -1:])
    assert torch.equal(asked[0][:, :, -1], prefix[:, :, asked_for(24, sampling)])


def asked_for(prefix, sampling):
    """The frame that is made a still first: three before the first chunk that is read and finds the window full."""
    chunks = cut_into_chunks(36, sampling, prefix)
    first = next(chunk for chunk in chunks if chunk.cached and chunk.end > sampling.window)
    return first.start - 3


@pytest.mark.parametrize(("window", "options"), [(3, {"first_chunk": 1}), (3, {}), (4, {})])
def test_reencode_needs_no_more_frames_than_there_are(window, options):
    prefix = None if options else roll(window - 2)
    latents = roll(9, Sampling(window=window, **options), prefix=prefix, reencode=lambda latents: latents[:, :, -1:])
    assert latents.isfinite().all()


def test_strength_decides_how_much_of_a_source_stays():
    source = roll(7, seed=3)
    distances = [(roll(7, source=source, strength=s) - source).norm() for s in (0.05, 0.3, 0.6, 0.9)]
    assert distances == sorted(distances)
    assert torch.equal(roll(7, source=source, strength=1.0), roll(7))


def test_a_strength_between_steps_begins_at_its_own_level():
    listed = [round(step.timestep, 1) for step in Sampling(shift=1).steps_of(False, 0.6)]
    assert listed == [600, 500, 250]
    steps = []
    roll(3, source=roll(3), strength=0.6, on_step=lambda progress: steps.append((progress.step, progress.total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_a_source_is_followed_chunk_by_chunk():
    source = roll(9, seed=3)
    other = source.clone()
    other[:, :, 6:] = 0
    ours, theirs = (roll(9, source=clip, strength=0.5) for clip in (source, other))
    assert torch.equal(ours[:, :, :6], theirs[:, :, :6])
    assert (ours - theirs)[:, :, 6:].abs().amax() > 0.1


def test_first_frame_reencode_begins_a_full_window_with_a_still():
    asked = []

    def still(latents):
        asked.append(latents)
        return torch.zeros_like(latents[:, :, -1:])

    sampling = Sampling(window=9)
    plain, renewed = roll(18, sampling), roll(18, sampling, reencode=still)
    assert torch.equal(renewed[:, :, :9], plain[:, :, :9])
    assert [latents.shape[2] for latents in asked] == [7, 7]  # of 9 frames, 3 go on; at frames 9 and 15
    assert torch.equal(asked[0][:, :, -1], plain[:, :, 6])
    assert (renewed - plain)[:, :, 9:12].abs().amax() > 1e-3
    assert torch.equal(roll(9, sampling, reencode=still), plain[:, :, :9])


def test_a_video_of_a_batch_is_the_same_alone():
    both = roll(6, prompt=PROMPT.expand(2, -1, -1))
    equal(both[:1], roll(6))


def test_pinned_sinks_cost_nothing_before_the_window_moves_and_differ_after():
    free, pinned = (roll(15, Sampling(window=6, sink=2, pinned=pinned)) for pinned in (False, True))
    equal(free[:, :, :6], pinned[:, :, :6])
    assert (free[:, :, 9:] - pinned[:, :, 9:]).abs().max() > 1e-4


def test_any_even_size_and_chunking():
    for size in ((2, 2), (10, 4)):
        for sampling in (Sampling(chunk=1), Sampling(chunk=5), Sampling(chunk=3, first_chunk=1)):
            latents = roll(7, sampling, size=size)
            assert latents.shape == (1, SMALL.channels, 7, *size)
            assert latents.isfinite().all()


def test_the_first_chunk_may_take_other_steps():
    calls = []
    roll(
        6,
        Sampling(steps=(1000, 500), first_steps=(1000, 750, 500, 250)),
        on_step=lambda progress: calls.append((progress.chunk.index, progress.step, progress.steps, progress.total)),
    )
    assert calls == [(0, 1, 4, 6), (0, 2, 4, 6), (0, 3, 4, 6), (0, 4, 4, 6), (1, 1, 2, 6), (1, 2, 2, 6)]


def test_the_last_chunk_is_not_committed():
    calls = []

    def call(part, module, *args):
        calls.append(part)
        return part(module, *args)

    roll(9, ops=EAGER._replace(call=call))
    assert calls.count(velocity) == 3 * 4 + 2


def test_the_cache_is_allocated_once_and_as_small_as_the_window():
    size = (HEIGHT, WIDTH)
    cache = allocate_cache(SMALL, Plan(Sampling(window=6, sink=1), 99, *size, batch=2), torch.float32, "cpu")
    assert cache.nbytes == 2 * 6 * SMALL.cache_bytes_per_frame(HEIGHT, WIDTH, 4)
    assert allocate_cache(SMALL, Plan(Sampling(), 4, *size), torch.float32, "cpu").slots == 4


def test_a_float8_cache_takes_half_the_memory_and_moves_the_video_little():
    plan = Plan(Sampling(window=2, chunk=1), 9, HEIGHT, WIDTH)
    half, eighth = (allocate_cache(WAN_1_3B, plan, dtype, "cpu") for dtype in (torch.bfloat16, torch.float8_e4m3fn))
    assert eighth.nbytes / half.nbytes == pytest.approx(0.5, abs=0.02)  # the scales: 4 bytes for 128 numbers
    plain, eighth = roll(12), roll(12, cache_dtype=torch.float8_e4m3fn)
    assert (plain - eighth).norm() / plain.norm() < 0.02


@torch.no_grad()
def test_the_hundred_thousandth_chunk_costs_what_the_tenth_costs():
    x = torch.randn(1, SMALL.channels, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))
    text, seen = encode_prompt(WAN, PROMPT), []

    def spy(q, k, v, mask):
        seen.append(k.shape[2])
        return sdpa(q, k, v)

    def cost(number):
        cache = RollingCache(SMALL, CacheShape(1, HEIGHT, WIDTH, slots=9, sink=1, pinned=True), first=3 * (number - 10))
        seen.clear()
        for chunk in range(number - 10, number):
            velocity(WAN, x, 500, text, cache.chunk(3 * chunk, 3, spy))
        started = time.perf_counter()
        for _ in range(20):
            velocity(WAN, x, 500, text, cache.chunk(3 * (number - 1), 3, spy))
        return cache.nbytes, list(seen), time.perf_counter() - started

    tenth, far = (min((cost(number) for _ in range(5)), key=lambda costs: costs[2]) for number in (10, 100_000))
    assert far[:2] == tenth[:2]
    assert far[2] < 1.5 * tenth[2]


def test_far_positions_change_next_to_nothing():
    # Rotary attention knows distances only; float32 angles would have lost them at this position.
    x = torch.randn(1, SMALL.channels, 6, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))
    text = encode_prompt(WAN, PROMPT)

    def last(first):
        cache = RollingCache(SMALL, CacheShape(1, HEIGHT, WIDTH, slots=6), first=first)
        with torch.no_grad():
            velocity(WAN, x[:, :, :3], 0, text, cache.chunk(first, 3))
            return velocity(WAN, x[:, :, 3:], 500, text, cache.chunk(first + 3, 3))

    equal(last(0), last(300_000))


def test_the_same_forward_runs_on_any_tree_with_wans_names():
    class Host(torch.nn.Module):  # as a host would hold it: same layers, other class, other attributes
        def __init__(self, wan):
            super().__init__()
            for name, child in wan.named_children():
                setattr(self, name, child)

    assert torch.equal(roll(6, wan=WanLayers.of(Host(WAN), SMALL)), roll(6))


def test_linear_layers_are_injected():
    class Doubling(torch.nn.Linear):
        pass

    wan = WanModel(SMALL, linear=Doubling)
    kinds = {type(module) for module in wan.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {Doubling}


def test_attention_is_injected():
    seen = []

    def attention(q, k, v, mask):
        seen.append(k.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    assert torch.equal(roll(6, attention=attention), roll(6))
    tokens = SMALL.tokens_per_frame(HEIGHT, WIDTH)
    assert set(seen) == {SMALL.text_len, 3 * tokens, 6 * tokens}


@torch.no_grad()
def test_attention_by_rows_is_attention():
    q, k, v = (torch.randn(2, 3, n, 16, generator=torch.Generator().manual_seed(n)) for n in (70, 130, 130))
    equal(attention_by_rows(q, k, v, rows=32), sdpa(q, k, v))
    near = sdpa(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()
    assert (near - sdpa(q, k, v)).norm() / near.norm() < 0.02


def test_raising_in_a_step_ends_the_rollout():
    class Stop(Exception):
        pass

    def stop(progress):
        raise Stop

    with pytest.raises(Stop):
        roll(6, on_step=stop)


def test_global_randomness_is_left_alone():
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    roll(3)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
def test_nothing_in_the_loop_waits_for_the_gpu(cache_dtype):
    wan = small_model().cuda()
    sampling = Sampling(window=6, sink=1, pinned=True)
    chunks = roll_chunks(wan, sampling, PROMPT.cuda(), SeededNoise(0), 15, HEIGHT, WIDTH, cache_dtype=cache_dtype)
    next(chunks)  # the first allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        latents = [x0 for _, x0 in chunks]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cat(latents, 2).isfinite().all()


def test_seeds_give_different_videos_and_the_same_seed_the_same():
    assert torch.equal(roll(6, seed=2**64 - 1), roll(6, seed=2**64 - 1))
    assert (roll(6, seed=0) - roll(6, seed=1)).abs().max() > 0.1
    with pytest.raises(ValueError, match="seed -1"):
        SeededNoise(-1)


def test_chunks_feed_the_odd_prefix_chunk_first():
    sizes = [(chunk.frames, chunk.given) for chunk in cut_into_chunks(12, Sampling(), prefix=4)]
    assert sizes == [(1, True), (3, True), (3, False), (3, False), (2, False)]
    sizes = [chunk.frames for chunk in cut_into_chunks(8, Sampling(first_chunk=1))]
    assert sizes == [1, 3, 3, 1]


@pytest.mark.parametrize(
    ("frames", "first_chunk", "prefix", "whole"),
    [(1, None, 0, 3), (7, None, 0, 9), (9, None, 0, 9), (1, 1, 0, 1), (2, 1, 0, 4), (5, None, 1, 7), (6, None, 3, 6)],
)
def test_whole_chunks(frames, first_chunk, prefix, whole):
    assert round_up_to_chunks(frames, Sampling(first_chunk=first_chunk), prefix) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "at least one frame must be left"),
        ({"frames": 6, "prefix": torch.zeros(1, 4, 6, HEIGHT, WIDTH)}, "Ask for 7 latent frames"),
        ({"frames": 6, "prefix": torch.zeros(1, 3, 2, HEIGHT, WIDTH)}, r"prefix of shape \[1, 3, 2, 4, 6\]"),
        ({"frames": 6, "source": torch.zeros(1, 4, 5, HEIGHT, WIDTH)}, r"source of shape \[1, 4, 5, 4, 6\]"),
        ({"frames": 6, "strength": 0}, "strength 0"),
        ({"frames": 6, "size": (3, 6)}, "latents of 3 x 6.*multiples of 16"),
        ({"frames": 6, "prompt": torch.zeros(1, 5, 9)}, "width 9; this model needs 8"),
        ({"frames": 6, "prompt": torch.zeros(1, 7, 8)}, "prompt of 7 tokens; this model reads 6"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        roll(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": ()},
        {"steps": (500, 1000)},
        {"steps": (1000, 0)},
        {"first_steps": (2000,)},
        {"shift": 0},
        {"chunk": 0},
        {"first_chunk": 0},
        {"window": 0},
        {"sink": -1},
        {"context_noise": 1000},
        {"window": 3, "sink": 1},
    ],
)
def test_impossible_samplings_are_refused(options):
    with pytest.raises(ValueError, match=r"^Got"):
        Sampling(**options)


def test_presets_are_the_published_ones():
    assert [round(step.timestep, 2) for step in PRESETS["cli"].steps_of(True)] == [1000, 937.5, 833.33, 625]
    assert [round(step.timestep, 2) for step in PRESETS["demo"].steps_of(True)] == [1000, 960, 888.89, 727.27]
    assert [round(step.sigma, 3) for step in PRESETS["tiny"].steps_of(True)] == [1, 0.9, 0.75, 0.5]


def test_an_odd_head_is_refused():
    with pytest.raises(ValueError, match="dim 30 with 2 heads"):
        WanConfig(dim=30, heads=2)
