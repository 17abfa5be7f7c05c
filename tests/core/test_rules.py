"""Rules of newer families as laws: what each must leave alone, and what goes together."""

from dataclasses import asdict, replace

import pytest
import torch

from sf_core.sampling.config import LENGTHS, PRESETS, Sampling, fit_window, override, preset_of, read_sampling
from sf_core.sampling.context import allocate_cache
from sf_core.sampling.families import FAMILIES
from sf_core.sampling.noise import SeededNoise
from sf_core.sampling.plan import Plan
from sf_core.sampling.prompts import TimedPrompt
from sf_core.wan.bank import Bank
from sf_core.wan.config import WanConfig
from sf_core.wan.fp8 import E4M3
from sf_core.wan.model import WanModel
from sf_core.wan.rope import BASE, Rope, jittered_bases
from sf_core.wan.shot_cache import Shots
from tests.core.rolling import roll_chunks, roll_out

SMALL = WanConfig(dim=64, heads=4, layers=2, ffn_dim=96, channels=4, freq_dim=32, text_dim=16, text_len=8)
SIZE = (4, 6)
RULES = {
    "plain": Sampling(window=9, sink=3),
    "deep": Sampling(window=9, sink=6, pinned=True),
    "range": Sampling(window=6, sink=3, pinned=True, position_range=9),
    "decay": Sampling(window=9, sink=3, pinned=True, sink_decay=0.9),
    "decay as made": Sampling(window=9, sink=3, sink_decay=0.9),
    "bank": Sampling(window=9, sink=3, bank=Bank(2, 1)),
    "bank, chosen": Sampling(window=9, sink=3, bank=Bank(3, 1, selected=2)),
    "jitter": Sampling(window=9, sink=3, pinned=True, rope_jitter=0.8),
    "rolling": Sampling(window=9, sink=3, pinned=True, sampler="rolling"),
    "shots": Sampling(window=9, sink=3, shots=Shots()),
    "shots, jitter": Sampling(window=9, sink=3, pinned=True, shots=Shots(), rope_jitter=0.8),
}


@pytest.fixture(scope="module")
def wan():
    torch.manual_seed(0)
    model = WanModel(SMALL).initialise().requires_grad_(False)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model


def embeds(batch=1, seed=0):
    return torch.randn(batch, 6, SMALL.text_dim, generator=torch.Generator().manual_seed(seed))


def roll(wan, sampling, frames=21, prompt=None, **more):
    return roll_out(wan, sampling, embeds() if prompt is None else prompt, SeededNoise(0), frames, *SIZE, **more)


@pytest.mark.parametrize("rule", RULES)
def test_frames_of_a_shorter_video_are_those_of_a_longer_one(wan, rule):
    """But for the rolling sampler, whose last chunks see fewer after them."""
    sampling = RULES[rule]
    short, long = roll(wan, sampling, 15), roll(wan, sampling, 24)
    same = 15 - 3 * (len(sampling.steps) - 1) if rule == "rolling" else 15
    torch.testing.assert_close(short[:, :, :same], long[:, :, :same], rtol=0, atol=1e-5)


LATER = ("deep", "range", "decay", "decay as made", "bank")  # rules that come in when the window moves


@pytest.mark.parametrize("rule", LATER)
def test_a_rule_changes_nothing_until_the_window_moves(wan, rule):
    plain = roll(wan, replace(RULES["plain"], window=RULES[rule].window))
    ruled = roll(wan, RULES[rule])
    first = 6 if "bank" not in rule else 3  # a bank holds a frame from the second chunk on
    first = min(first, RULES[rule].window)
    torch.testing.assert_close(ruled[:, :, :first], plain[:, :, :first], rtol=0, atol=1e-6)
    assert (ruled - plain).abs().max() > 1e-5


@pytest.mark.parametrize(("rule", "of_one_shot"), [("shots", "plain"), ("shots, jitter", "jitter")])
def test_a_model_of_several_shots_is_an_ordinary_one_until_a_cut(wan, rule, of_one_shot):
    """Positions inside the window are those of a pinned sink, whatever each head's base."""
    torch.testing.assert_close(roll(wan, RULES[rule]), roll(wan, RULES[of_one_shot]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cache_dtype", [None, E4M3])
def test_every_rule_makes_videos_alone_that_it_makes_in_a_batch(wan, rule, cache_dtype):
    both = torch.cat((embeds(), embeds(seed=1)))

    class Noise:
        def __call__(self, start, frames, step, shape):
            one = SeededNoise(0)(start, frames, step, (1, *shape[1:]))
            return one.expand(shape[0], -1, -1, -1, -1)

    together = roll_out(wan, RULES[rule], both, Noise(), 18, *SIZE, cache_dtype=cache_dtype)
    alone = roll_out(wan, RULES[rule], both[1:], Noise(), 18, *SIZE, cache_dtype=cache_dtype)
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-4 if cache_dtype is None else 2e-2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("transition", ["recache", "renew", "cut"])
def test_prompts_switch_under_every_rule(wan, rule, transition):
    prompts = [TimedPrompt(0, embeds()), TimedPrompt(12, embeds(seed=1), transition)]
    switched, same = roll(wan, RULES[rule], 24, prompts), roll(wan, RULES[rule], 24)
    assert switched.isfinite().all()
    torch.testing.assert_close(switched[:, :, :12], same[:, :, :12], rtol=0, atol=1e-5)
    assert (switched[:, :, 12:] - same[:, :, 12:]).abs().max() > 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_a_video_goes_on_from_its_history(wan, rule):
    whole = roll(wan, RULES[rule], 24)
    cut = roll(wan, RULES[rule], 24, prefix=whole[:, :, :12], full_history=True)
    if rule == "rolling":  # begins its joint denoising anew
        assert cut.isfinite().all() and torch.equal(cut[:, :, :12], whole[:, :, :12])
    else:
        torch.testing.assert_close(cut, whole, rtol=0, atol=1e-4)


def test_guidance_of_one_prompt_by_itself_changes_nothing_while_rolling(wan):
    plain = roll(wan, RULES["rolling"])
    guided = roll(wan, RULES["rolling"], negative=embeds(), guidance=3.0)
    torch.testing.assert_close(guided, plain, rtol=0, atol=1e-4)


def test_a_cut_gives_a_deep_sink_to_the_new_scene(wan):
    """What comes after it is what a cut without any sink gives, as far as the window holds."""
    deep, none = Sampling(window=21, sink=15, pinned=True), Sampling(window=21)
    prompts = [TimedPrompt(0, embeds()), TimedPrompt(9, embeds(seed=1), "cut")]
    assert torch.equal(roll(wan, deep, 21, prompts), roll(wan, none, 21, prompts))


def test_deep_sinks_leave_the_length_of_a_training_clip_alone(wan):
    assert torch.equal(roll(wan, FAMILIES["self-forcing"].sampling), roll(wan, Sampling(window=21)))


def test_krea_reads_its_memory_again_for_every_chunk(wan):
    stills = []

    def still(latents):
        stills.append(latents.shape[2])
        return latents[:, :, -1:]

    chunks = list(
        roll_chunks(
            wan, FAMILIES["krea-14b"].sampling, embeds(), SeededNoise(0), 18, *SIZE, reencode=still
        )
    )  # fmt: skip
    assert len(chunks) == 6 and len(stills) == 4  # the second chunk's window begins with a still by itself


def test_jitter_gives_each_head_its_own_time():
    bases = jittered_bases(4, 0.8)
    assert len(set(bases)) == 4 and all(0.2 * BASE <= base <= 1.8 * BASE for base in bases)
    assert bases == jittered_bases(4, 0.8) and jittered_bases(4, 0.0) is None
    x = torch.randn(1, 4, 6, 16)
    plain = Rope.at(16, [0], 4, 6, "cpu")
    assert torch.equal(Rope.at(16, [0], 4, 6, "cpu", bases)(x), plain(x))  # positions 0 are what they were
    assert not torch.equal(Rope.at(16, [7], 4, 6, "cpu", bases)(x), Rope.at(16, [7], 4, 6, "cpu")(x))


def test_a_shorter_window_takes_a_share_of_a_deep_sink():
    deep = FAMILIES["self-forcing"].sampling
    sinks = {window: override(deep, window=window).sink for window in (21, 18, 15, 12, 9, 6, 3, 30, None)}
    assert sinks == {21: 15, 18: 12, 15: 9, 12: 6, 9: 3, 6: 0, 3: 0, 30: 15, None: 15}
    assert override(deep, window=12, sink=3).sink == 3
    with pytest.raises(ValueError, match="must hold both"):
        override(FAMILIES["longlive"].sampling, window=3)  # a sink of a chunk is what the model was trained with
    assert fit_window(FAMILIES["self-gradient-forcing"].sampling, 24).position_range is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", LENGTHS)
def test_presets_of_length_leave_all_but_the_window_alone(family, name):
    own = FAMILIES[family].sampling
    made = preset_of(name, own)
    assert (made.steps, made.shift, made.warp, made.chunk) == (own.steps, own.shift, own.warp, own.chunk)
    assert made.window <= (max(12, 3 * own.chunk) if name == "fast" else own.window) and made.pinned
    assert preset_of("cli", own) == PRESETS["cli"]


def test_the_long_and_the_fast_preset_of_self_forcing():
    own = FAMILIES["self-forcing"].sampling
    assert preset_of("long", own) == own
    fast = preset_of("fast", own)
    assert (fast.window, fast.sink, fast.pinned) == (12, 3, True)


def test_presets_of_length_hold_what_a_shot_pins():
    own = FAMILIES["longlive-2"].sampling
    long, fast = (preset_of(name, own) for name in ("long", "fast"))
    assert (long.window, long.sink, fast.window, fast.sink) == (32, 16, 24, 8)
    assert long.shots == fast.shots == own.shots and long.solver == fast.solver == "unipc"


def test_the_bank_is_changed_by_its_fields():
    own = FAMILIES["memflow"].sampling
    assert override(own, bank_frames=5).bank == Bank(5, 3)
    assert override(own, bank_frames=0).bank is None
    assert override(Sampling(), bank_interval=2).bank == Bank(3, 2)


@pytest.mark.parametrize("rule", RULES)
def test_metadata_carry_every_rule(rule):
    assert read_sampling(asdict(RULES[rule])) == RULES[rule]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sampler": "euler"}, "Got sampler 'euler'; there is chunks, rolling"),
        ({"sampler": "rolling", "first_steps": (1000, 500)}, "first steps with the rolling sampler"),
        ({"sampler": "rolling", "bank": Bank()}, "memory bank with the rolling sampler"),
        ({"sink": 3, "sink_decay": 0.5, "sampler": "rolling", "window": 9}, "sink decay with the rolling sampler"),
        ({"sink": 3, "window": 9, "sink_decay": 1.5}, "Got sink decay 1.5"),
        ({"sink": 2, "window": 9, "sink_decay": 0.9}, "sink decay 0.9 with sink 2 and chunk 3"),
        ({"window": 12, "position_range": 9}, "position range of 9 latent frames with a window of 12"),
        ({"position_range": 9}, "with a window of all"),
        ({"shots": Shots(), "sampler": "rolling"}, "rolling sampler for a model of several shots"),
        ({"solver": "unipc", "sampler": "rolling"}, "rolling sampler .* UniPC"),
        ({"holds_prefix": True, "sampler": "rolling"}, "rolling sampler .* holds a prefix"),
        ({"shots": Shots(), "bank": Bank()}, "memory bank.* for a model of several shots"),
        ({"shots": Shots(), "sink": 3, "sink_decay": 0.9, "window": 9}, "sink decay.* for a model of several shots"),
        ({"shots": Shots(), "window": 9, "position_range": 12}, "position range for a model of several shots"),
        ({"rope_jitter": 1.0}, "Got RoPE jitter 1"),
    ],
)
def test_rules_that_do_not_go_together_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**fields)


def test_a_bank_of_nothing_is_refused():
    with pytest.raises(ValueError, match="frames 0"):
        Bank(frames=0)


@pytest.mark.parametrize("rule", ["decay", "bank", "rolling"])
def test_what_changes_what_it_keeps_is_refused_under_gradient_checkpointing(rule):
    with pytest.raises(ValueError, match="gradient checkpointing"):
        allocate_cache(SMALL, Plan(RULES[rule], 12, *SIZE), torch.float32, "cpu", keeps_all=True)


def test_the_bank_takes_no_more_than_its_frames_of_memory():
    plain, banked = (
        allocate_cache(SMALL, Plan(RULES[rule], 12, *SIZE), torch.float32, "meta").nbytes for rule in ("plain", "bank")
    )
    assert banked * 9 == plain * 11
