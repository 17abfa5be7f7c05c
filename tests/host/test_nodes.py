"""The nodes inside ComfyUI's own machinery: models, memory, patches, progress, Cancel."""

import gc
import json

import pytest
import torch

from tests.host.core import core_latents

FRAMES = 21  # 6 latent frames, two chunks


@pytest.fixture
def latent(call):
    return call("Latent", 64, 64, FRAMES, 0.0, 16.0, 1)


def caches_alive() -> int:
    gc.collect()
    return sum(type(thing).__name__ == "RollingCache" for thing in gc.get_objects())


def wan_model(dtype=None, **fields):
    """A small random Wan MODEL, loaded as Load Diffusion Model does; `dtype` is its weight_dtype."""
    import comfy.sd
    from any_folder_name.sf_core.wan.config import WanConfig
    from any_folder_name.sf_core.wan.model import WanModel

    config = WanConfig(**{"dim": 48, "ffn_dim": 96, "heads": 2, "layers": 2, "text_dim": 128, "text_len": 16, **fields})
    torch.manual_seed(0)
    wan = WanModel(config).initialise()
    torch.nn.init.normal_(wan.head.head.weight, std=0.02)
    known = {"num_heads": config.heads, "text_dim": config.text_dim, "text_len": config.text_len}
    metadata = {"config": json.dumps({"transformer": known})}
    options = {} if dtype is None else {"dtype": dtype}
    return comfy.sd.load_diffusion_model_state_dict(wan.state_dict(), model_options=options, metadata=metadata)


# --- The built-in model among stock nodes ----------------------------------------------------------------------------


def test_built_in_model_is_a_native_wan_model(tiny):
    from comfy.model_base import WAN21

    assert isinstance(tiny.model.model, WAN21)
    assert tiny.model.cached_patcher_init[0](*tiny.model.cached_patcher_init[1], disable_dynamic=True).model is not None


def test_stock_sampler_takes_model_prompt_and_latent(tiny, latent):
    import nodes

    sampled = nodes.common_ksampler(tiny.model, 0, 1, 1.0, "euler", "simple", tiny.prompt, tiny.prompt, latent)[0]
    assert sampled["samples"].shape == latent["samples"].shape
    assert sampled["samples"].isfinite().all()


def test_stock_text_encode_gives_the_same_conditioning(tiny):
    import nodes

    stock = nodes.CLIPTextEncode().encode(tiny.clip, "a red circle moves right on a white background")[0]
    assert torch.equal(stock[0][0], tiny.prompt[0][0])


def test_stock_decode_gives_the_same_frames(call, tiny, sample):
    import nodes

    samples = sample()
    ours = call("Decode", {"samples": samples}, tiny.vae)
    stock = nodes.VAEDecode().decode(tiny.vae, {"samples": samples})[0]
    assert ours.shape == (FRAMES, 64, 64, 3)
    assert 0 <= ours.min() and ours.max() <= 1
    assert torch.allclose(ours, stock, atol=2e-5)


def test_stock_encode_makes_a_prefix(call, tiny, sample):
    import nodes

    image = torch.rand(1, 64, 64, 3)
    prefix = nodes.VAEEncode().encode(tiny.vae, image)[0]
    assert prefix["samples"].shape == (1, 16, 1, 8, 8)
    clip = nodes.VAEEncode().encode(tiny.vae, torch.rand(9, 64, 64, 3))[0]
    assert clip["samples"].shape == (1, 16, 3, 8, 8)
    assert torch.allclose(sample(prefix=prefix)[:, :, :1], prefix["samples"], atol=1e-5)


# --- Sampling --------------------------------------------------------------------------------------------------------


def test_sampler_makes_what_the_core_makes(tiny, sample):
    from any_folder_name.sf_core import tiny as core
    from any_folder_name.sf_core.sampling.config import PRESETS

    expected = core_latents(core.load_transformer(), PRESETS["tiny"], tiny.prompt[0][0], 6, 8, 8)
    assert torch.allclose(tiny.model.model.process_latent_in(sample()), expected, atol=2e-4)


def test_seed_decides_the_frames(sample):
    assert torch.equal(sample(seed=3), sample(seed=3))
    assert not torch.equal(sample(seed=3), sample(seed=4))


def test_sampling_leaves_inputs_and_global_randomness_alone(tiny, latent, sample):
    before, weights = latent["samples"].clone(), tiny.model.model.diffusion_model.head.head.weight.clone()
    state = torch.random.get_rng_state()
    sample()
    assert torch.equal(latent["samples"], before) and list(latent) == ["samples"]
    assert torch.equal(tiny.model.model.diffusion_model.head.head.weight, weights)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_shorter_video_is_the_beginning_of_a_longer_one(call, sample):
    shorter = call("Latent", 64, 64, 13, 0.0, 16.0, 1)  # 4 latent frames: the second chunk is cut
    assert torch.equal(sample(latent=shorter), sample()[:, :, :4])


def test_portrait_batch_and_one_prompt(call, sample):
    portrait = call("Latent", 48, 80, 5, 0.0, 16.0, 2)
    samples = sample(latent=portrait)
    assert samples.shape == (2, 16, 2, 10, 6)
    assert not torch.equal(samples[0], samples[1])


def test_auto_is_what_the_model_was_made_for(sample):
    assert torch.equal(sample(preset="auto"), sample(preset="tiny"))
    assert not torch.equal(sample(preset="auto"), sample(preset="cli"))


def test_settings_override_the_preset(sample):
    usual = sample()
    assert torch.equal(sample(steps=4, chunk=3, window=9, sink=1), usual)
    for change in ({"steps": 2}, {"chunk": 2}, {"window": 4}):
        assert not torch.equal(sample(**change), usual), change


def test_own_output_goes_on_as_prefix(call, sample):
    first = sample()
    longer = call("Latent", 64, 64, 33, 0.0, 16.0, 1)
    continued = sample(latent=longer, prefix={"samples": first})
    assert torch.allclose(continued[:, :, :6], first, atol=1e-5)
    assert torch.allclose(continued, sample(latent=longer), atol=1e-3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_any_wan_model_of_the_stock_loader_is_sampled(sample, dtype):
    samples = sample(model=wan_model(dtype), latent={"samples": torch.zeros(1, 16, 3, 4, 4)})
    assert samples.dtype == torch.float32 and samples.isfinite().all()
    exact = sample(model=wan_model(torch.float32), latent={"samples": torch.zeros(1, 16, 3, 4, 4)})
    assert (samples - exact).square().mean() < 0.05 * exact.square().mean()


def test_lora_takes_effect_and_leaves_the_model_as_it_was(tiny, sample):
    usual, patched = sample(), tiny.model.clone()
    key = "diffusion_model.blocks.0.self_attn.v.weight"
    patched.add_patches({key: ("diff", (torch.randn(160, 160) * 0.3,))})
    changed = sample(model=patched)
    assert not torch.allclose(changed, usual, atol=1e-2)
    assert torch.equal(sample(), usual)


def test_hosts_attention_is_used(tiny, sample):
    calls = []

    def override(function, *args, **options):
        calls.append(args[0].shape)
        return function(*args, **options)

    patched = tiny.model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(sample(model=patched), sample())
    assert calls


# --- Prompts with times ----------------------------------------------------------------------------------------------

STORY = "0: a red circle moves right on a white background\n0.5s{}: a blue square moves left"


@pytest.fixture
def story(call, tiny):
    """story(" cut") is conditioning of two prompts; the second starts with the second chunk."""
    return lambda transition="": call("Prompt", tiny.clip, STORY.format(transition))


@pytest.mark.parametrize("transition", ["", " renew", " cut", " blend 0.5s"])
def test_second_prompt_takes_over_from_its_time_on(sample, story, transition):
    alone, switched = sample(), sample(positive=story(transition))
    assert torch.equal(switched[:, :, :3], alone[:, :, :3])
    assert not torch.allclose(switched[:, :, 3:], alone[:, :, 3:], atol=1e-2)


def test_sampler_makes_of_a_schedule_what_the_core_makes(tiny, sample, story):
    from any_folder_name.sf_core import tiny as core
    from any_folder_name.sf_core.sampling.config import PRESETS

    (first, _), (second, _) = story(" cut")
    prompts = [(0, first), (3, second, "cut")]
    expected = core_latents(core.load_transformer(), PRESETS["tiny"], prompts, 6, 8, 8)
    assert torch.allclose(tiny.model.model.process_latent_in(sample(positive=story(" cut"))), expected, atol=2e-4)


def test_times_are_counted_at_the_fps(call, tiny, sample, story):
    half = call("Prompt", tiny.clip, STORY.format("").replace("0.5s", "1s"), 8.0)
    assert torch.equal(sample(positive=half), sample(positive=story()))


def test_stock_sampler_follows_the_first_prompt_alone(tiny, latent, story):
    import nodes

    def stock(positive):
        return nodes.common_ksampler(tiny.model, 0, 2, 1.0, "euler", "simple", positive, tiny.prompt, latent)[0]

    assert torch.equal(stock(story())["samples"], stock(tiny.prompt)["samples"])


def test_stock_nodes_keep_the_schedule_and_others_conditioning_means_its_first_entry(sample, tiny, story):
    import nodes

    switched = sample(positive=story())
    area = nodes.ConditioningSetAreaStrength().append(story(), 0.5)[0]
    combined = nodes.ConditioningCombine().combine(story(), tiny.prompt)[0]
    assert torch.equal(sample(positive=area), switched)
    assert torch.equal(sample(positive=combined), switched)
    before = nodes.ConditioningCombine().combine(tiny.prompt, story())[0]
    assert torch.equal(sample(positive=before), sample())


def test_schedule_goes_on_behind_a_prefix(call, sample, story):
    prefix = {"samples": sample()[:, :, :3]}
    assert torch.allclose(sample(positive=story(), prefix=prefix), sample(positive=story()), atol=1e-3)


def test_batch_follows_a_schedule(call, sample, story):
    batch = sample(positive=story(), latent=call("Latent", 64, 64, FRAMES, 0.0, 16.0, 2))
    assert batch.shape[0] == 2 and not torch.equal(batch[0], batch[1])


def test_malformed_schedule_is_refused_with_its_place(call, tiny):
    with pytest.raises(ValueError, match="line 2, column 1 of the prompt; .*Write 4s"):
        call("Prompt", tiny.clip, "0: a red circle\n4: a blue square")


def test_prompt_after_the_end_is_refused(call, tiny, sample):
    with pytest.raises(ValueError, match="at 4s .*make a longer video"):
        sample(positive=call("Prompt", tiny.clip, "0: a red circle\n4s: a blue square"))


# --- Progress and Cancel ---------------------------------------------------------------------------------------------


@pytest.fixture
def pictures_of_every_step(pack, monkeypatch):
    for name, value in {"SECONDS_BETWEEN": 0, "SECONDS_BEFORE": 0, "MOST_FOR": 1e9}.items():
        monkeypatch.setattr(f"any_folder_name.nodes.host.progress.{name}_PICTURES", value)


@pytest.fixture
def progress(pictures_of_every_step):
    """What the node reports: a list of (value, total, preview) that fills while it runs."""
    import comfy.utils

    reports = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: reports.append((value, total, preview)))
    yield reports
    comfy.utils.set_progress_bar_global_hook(None)


def test_every_step_shows_a_picture(sample, progress):
    sample()
    assert [value for value, _, _ in progress] == list(range(1, 9))
    assert {total for _, total, _ in progress} == {8}
    assert all(kind == "JPEG" and picture.size == (256, 256) for _, _, (kind, picture, _) in progress)


def test_pictures_do_not_hold_up_a_fast_model(sample, progress, monkeypatch):
    monkeypatch.setattr("any_folder_name.nodes.host.progress.SECONDS_BETWEEN_PICTURES", 3600)
    sample()
    assert [value for value, _, preview in progress if preview is not None] == [1]
    assert progress[-1][0] == 8


def test_pictures_take_their_share_of_a_run_and_no_more(pack):
    from any_folder_name.nodes.host.progress import PictureAllowance

    now = [0.0]
    allowance, made, spent = PictureAllowance(lambda: now[0]), [], 0.0
    for _ in range(2000):  # steps of 50 ms, pictures of 40 ms
        now[0] += 0.05
        if allowance.is_due:
            with allowance.spend():
                now[0] += 0.04
            made.append(now[0])
            spent += 0.04
    assert 0.5 < made[0] < 0.65, "none in a run that is over at once"
    assert 0.04 < spent / now[0] <= 0.05
    assert min(late - early for early, late in zip(made, made[1:])) > 0.1


def test_a_gpu_is_not_waited_for_to_show_a_picture(pack, tiny, monkeypatch, pictures_of_every_step):
    from any_folder_name.nodes.host import progress

    class Late(progress.HostCopy):
        looks = 0

        @property
        def is_there(self):
            Late.looks += 1
            return Late.looks % 3 == 0

    monkeypatch.setattr(progress, "HostCopy", Late)
    shown = progress.PreviewProgress(tiny.model, progress.Notes(type("Node", (), {"hidden": None})), False)
    steps = [torch.full((1, 16, 3, 8, 8), float(i)) for i in range(9)]
    pictures = [shown.picture(x0) for x0 in steps]
    assert [i for i, picture in enumerate(pictures) if picture is not None] == [2, 5, 8], "when they have arrived"


def test_wan_latents_have_a_picture_too(sample, progress):
    sample(model=wan_model(), latent={"samples": torch.zeros(1, 16, 3, 4, 8)})
    kind, picture, _ = progress[-1][2]
    assert kind == "JPEG" and picture.width == 2 * picture.height


def test_cancel_ends_within_a_step_and_frees_the_cache(sample, pictures_of_every_step):
    import comfy.model_management as management
    import comfy.utils

    seen = []

    def press_cancel(value, total, preview, **_):
        seen.append(value)
        if value == 2:
            management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(press_cancel)
    try:
        with pytest.raises(management.InterruptProcessingException):
            sample()
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        management.interrupt_current_processing(False)
    assert seen == [1, 2]
    assert caches_alive() == 0
    assert sample().isfinite().all()


def test_memory_for_model_and_cache_is_asked_for(tiny, sample, monkeypatch):
    import comfy.model_management as management

    asked, load = [], management.load_models_gpu
    monkeypatch.setattr(
        management, "load_models_gpu", lambda models, memory_required=0: asked.append(memory_required) or load(models)
    )
    sample(window=6), sample(window=4)
    frame = 2 * 6 * 16 * 160 * 4  # keys and values, layers, tokens, dim, bytes
    sink = frame // 2  # in a window that moves, its pinned sink keeps the keys that it began with
    assert asked[0] - asked[1] == 2 * frame - sink


def test_decode_streams_with_progress(call, tiny, sample, progress):
    samples = sample()
    progress.clear()
    call("Decode", {"samples": samples}, tiny.vae)
    assert [value for value, _, _ in progress] == [3, 6]


def test_threads_are_given_back(sample):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sample()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


# --- Decoding with other VAEs ----------------------------------------------------------------------------------------


def test_taehv_is_streamed_to_what_stock_decode_gives(call):
    import comfy.sd
    import nodes
    from comfy.taesd.taehv import TAEHV

    torch.manual_seed(0)
    weights = TAEHV(latent_channels=16).state_dict()
    weights = {name: torch.randn(w.shape) / max(1, w[0].numel()) ** 0.5 for name, w in weights.items()}
    vae = comfy.sd.VAE(weights)
    samples = {"samples": torch.randn(1, 16, 4, 4, 6)}
    stock = nodes.VAEDecode().decode(vae, samples)[0].clamp(0, 1)
    ours = call("Decode", samples, vae)
    assert ours.shape == (13, 32, 48, 3)
    assert torch.allclose(ours, stock, atol=2e-5)


def test_other_vaes_decode_as_they_always_do(call):
    import comfy.sd

    vae = comfy.sd.VAE({"pixel_space_vae": torch.tensor(1.0)})
    frames = call("Decode", {"samples": torch.rand(2, 3, 16, 16)}, vae)
    assert frames.shape == (2, 16, 16, 3)


# --- Sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "seconds", "fps", "latent_frames"),
    [(1, 0, 16, 1), (2, 0, 16, 2), (81, 0, 16, 21), (80, 0, 16, 21), (1, 5, 16, 21), (1, 0.01, 16, 1), (1, 2, 24, 13)],
)
def test_length_is_rounded_up_to_whole_latent_frames(call, frames, seconds, fps, latent_frames):
    samples = call("Latent", 832, 480, frames, seconds, fps, 2)["samples"]
    assert samples.shape == (2, 16, latent_frames, 60, 104)
    assert not samples.any()


def test_size_that_is_left_open_is_the_models_own(call, tiny, sample):
    left_open = call("Latent", 0, 0, FRAMES, 0.0, 16.0, 1)
    assert left_open["samples"].shape[-2:] == (60, 104)  # for stock samplers
    assert torch.equal(sample(latent=left_open), sample())
    wide = call("Latent", 128, 0, FRAMES, 0.0, 16.0, 1)
    assert sample(latent=wide).shape[-2:] == (8, 16)


def test_size_that_is_left_open_is_the_prefixs(call, sample):
    prefix = {"samples": torch.zeros(1, 16, 3, 10, 12)}
    left_open = call("Latent", 0, 0, FRAMES, 0.0, 16.0, 1)
    assert sample(latent=left_open, prefix=prefix).shape[-2:] == (10, 12)


def test_size_is_no_longer_open_when_something_is_in_the_latent(call, tiny, sample):
    import nodes

    left_open = call("Latent", 0, 0, 1, 0.0, 16.0, 1)
    upscaled = nodes.LatentUpscale().upscale(left_open, "nearest-exact", 96, 80, "disabled")[0]
    assert sample(latent=upscaled).shape[-2:] == (10, 12)


def test_size_the_built_in_model_was_not_made_for_is_told_on_the_node(tiny, monkeypatch):
    from any_folder_name.nodes.host import generation, progress
    from any_folder_name.nodes.inputs import RolloutInputs

    said = []
    monkeypatch.setattr(progress, "say", lambda node, text: said.append(text))
    for side, told in ((8, False), (10, False), (16, True), (4, True)):
        said.clear()
        latent = {"samples": torch.zeros(1, 16, 3, side, side)}
        generation.begin_notes(generation.prepare_generation(RolloutInputs(tiny.model, tiny.prompt, latent, 0)), None)
        assert any("made for 64 x 64" in text and "Set width to 64" in text for text in said) == told
    said.clear()
    latent = {"samples": torch.zeros(1, 16, 3, 16, 16)}
    generation.begin_notes(generation.prepare_generation(RolloutInputs(wan_model(), tiny.prompt, latent, 0)), None)
    assert not said


# --- What goes wrong -------------------------------------------------------------------------------------------------


def image_model():
    """An image MODEL: Stable Diffusion's UNet, made small."""
    from comfy.model_management import unet_offload_device
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models import SD15

    unet = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1],
        "channel_mult": [1], "transformer_depth": [0], "transformer_depth_output": [0, 0],
        "transformer_depth_middle": -2, "dtype": torch.float32,
        "use_spatial_transformer": True, "context_dim": 768, "num_heads": 8,
    }  # fmt: skip
    config = SD15(unet)
    config.set_inference_dtype(torch.float32, None)
    cpu = unet_offload_device()
    return ModelPatcher(config.get_model({}), cpu, cpu)


def test_image_model_is_refused(sample):
    with pytest.raises(ValueError, match="samples Wan video models"):
        sample(model=image_model())


def test_image_to_video_model_is_refused(sample):
    model = wan_model()
    model.model.diffusion_model.in_dim = 36
    with pytest.raises(ValueError, match="36 input channels"):
        sample(model=model)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 4, 3, 8, 8), (1, 48, 3, 8, 8)], ids=str)
def test_latents_of_another_model_are_refused(sample, shape):
    with pytest.raises(ValueError, match=r"this model needs \[batch, 16, frames, height, width\]"):
        sample(latent={"samples": torch.zeros(shape)})


def test_latents_of_another_model_are_refused_by_decode(call, tiny):
    with pytest.raises(ValueError, match="4 channels"):
        call("Decode", {"samples": torch.zeros(1, 4, 8, 8)}, tiny.vae)


@pytest.mark.parametrize(
    ("width", "height", "hint"),
    [(70, 64, "64 x 64"), (64, 1, "64 x 16"), (833, 481, "832 x 480")],
)
def test_odd_sizes_are_refused_with_the_nearest_one(call, width, height, hint):
    with pytest.raises(ValueError, match=hint):
        call("Latent", width, height, 5, 0.0, 16.0, 1)


def test_odd_latents_are_refused(sample):
    with pytest.raises(ValueError, match="multiples of 16"):
        sample(latent={"samples": torch.zeros(1, 16, 3, 7, 8)})


@pytest.mark.parametrize("text", ["", "  \n ", "\U0001f980"], ids=["empty", "blank", "emoji"])
def test_prompt_without_a_word_is_refused(call, tiny, text):
    with pytest.raises(ValueError, match="prompt"):
        call("Prompt", tiny.clip, text)


def test_very_long_prompt_is_read_as_far_as_it_goes(call, tiny):
    conditioning = call("Prompt", tiny.clip, "a red circle moves right " * 5000)
    assert conditioning[0][0].shape == (1, 16, 128)


def test_words_the_built_in_model_does_not_know_are_named(call, tiny, caplog):
    call("Prompt", tiny.clip, "a red unicorn moves right")
    assert "unicorn" in caplog.text
    assert "red" not in caplog.text


def test_words_the_built_in_model_does_not_know_are_told_on_the_node(call, tiny, monkeypatch):
    import nodes
    from any_folder_name.nodes.host import progress
    from comfy_execution.utils import CurrentNodeContext

    said = []
    monkeypatch.setattr(progress, "say", lambda node, text: said.append(text))
    monkeypatch.setattr(progress, "_show_text", lambda text, node_id: said.append((node_id, text)))
    with CurrentNodeContext("prompt", "7"):
        nodes.CLIPTextEncode().encode(tiny.clip, "a red unicorn moves right")
        assert len(said) == 1 and said[0][0] == "7" and "unicorn" in said[0][1]
        call("Prompt", tiny.clip, "0: a red unicorn\n2s: a blue dragon square")
    assert "unicorn" in said[-1] and "dragon" in said[-1]
    said.clear()
    call("Prompt", tiny.clip, "a red circle")
    assert not said


def test_prompt_of_another_text_encoder_is_refused(sample):
    with pytest.raises(ValueError, match="prompt embeddings of width 768"):
        sample(positive=[[torch.zeros(1, 77, 768), {}]])


def test_no_prompt_is_refused(sample):
    with pytest.raises(ValueError, match="empty conditioning"):
        sample(positive=[])


def test_window_too_small_for_sink_and_chunk_is_refused(sample):
    with pytest.raises(ValueError, match="window of 4 latent frames with sink 3 and chunk 3"):
        sample(window=4, sink=3)


def test_prefix_of_another_size_is_refused(sample):
    with pytest.raises(ValueError, match="prefix of shape"):
        sample(prefix={"samples": torch.zeros(1, 16, 1, 8, 10)})


def test_prefix_as_long_as_the_video_is_refused(sample, latent):
    with pytest.raises(ValueError, match="at least one frame"):
        sample(prefix=latent)


def test_cache_larger_than_the_machine_is_refused_before_anything_is_made(sample):
    endless = {"samples": torch.zeros(1).expand(1, 16, 1_000_000_000, 8, 8)}
    with pytest.raises(ValueError, match="Set a smaller window"):
        sample(latent=endless, preset="cli")


def test_damaged_weights_are_named(nodes, monkeypatch, tmp_path):
    from any_folder_name.sf_core import tiny

    (tmp_path / "transformer.safetensors").write_bytes(b"\x40" + b"\x00" * 99)
    monkeypatch.setattr(tiny, "WEIGHTS", tmp_path)
    with pytest.raises(ValueError, match="not a whole safetensors file.*Reinstall"):
        nodes["SelfForcingLoadTiny"].execute()
