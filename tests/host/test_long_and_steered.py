"""Settings, streams, SAMPLER, guidance, prefixes and sources: the nodes around the rollout, inside ComfyUI."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.host.core import core_latents

FRAMES = 33  # 9 latent frames, three chunks


@pytest.fixture
def latent(call):
    return call("Latent", 64, 64, FRAMES, 0.0, 16.0, 1)


@pytest.fixture
def stream(call, tiny, latent):
    """stream(...) runs Self Forcing Stream and gives images and latents."""

    def run(**changes):
        inputs = {
            "model": tiny.model, "positive": tiny.prompt, "latent": latent, "vae": tiny.vae, "seed": 0, "fps": 16.0,
            "preset": "auto", "file": "", "keep": 0, **changes,
        }  # fmt: skip
        images, latents, *_ = call("Stream", **inputs)
        return images, latents["samples"]

    return run


@pytest.fixture
def settings(call, tiny):
    """settings(window=6, ...) is the built-in model with these settings."""

    def change(**changes):
        inputs = {
            "model": tiny.model, "preset": "auto", "steps": 0, "chunk": 0, "window": 0, "sink": -1,
            "sink_positions": "auto", "context_noise": -1.0, "shift": 0.0, "first_chunk": 0, "first_steps": 0,
            **changes,
        }  # fmt: skip
        return call("Settings", **inputs)

    return change


@pytest.fixture
def custom(tiny, latent):
    """custom(sampler, sigmas, seed) runs SamplerCustomAdvanced and gives output and denoised output."""
    from comfy_extras.nodes_custom_sampler import BasicGuider, CFGGuider, RandomNoise, SamplerCustomAdvanced

    def run(sampler, sigmas, seed=0, model=None, start=None, negative=None, cfg=1.0):
        guided = (model or tiny.model, tiny.prompt)
        guider = BasicGuider.execute(*guided) if negative is None else CFGGuider.execute(*guided, negative, cfg)
        noise = RandomNoise.execute(seed).args[0]
        outputs = SamplerCustomAdvanced.execute(noise, guider.args[0], sampler, sigmas, start or latent).args
        return [output["samples"] for output in outputs]

    return run


@pytest.fixture
def output_folder(monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


@pytest.fixture
def server(monkeypatch):
    """ComfyUI's server as nodes see it, with one browser: .events it was sent, .waiting messages, .client_id."""
    events = []
    instance = SimpleNamespace(
        events=events, waiting=0, client_id="browser", sockets={"browser": None},
        send_sync=lambda event, data, client: events.append((event, data, client)),
    )  # fmt: skip
    instance.messages = SimpleNamespace(qsize=lambda: instance.waiting)
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    return instance


# --- What nodes tell -------------------------------------------------------------------------------------------------


def test_live_frames_go_to_the_browser_that_asked_while_it_keeps_up(pack, server):
    from any_folder_name.nodes.host import progress as host

    node, made = SimpleNamespace(hidden=SimpleNamespace(unique_id="7")), []
    data = lambda: made.append(1) or {"frames": []}  # noqa: E731
    host.send(node, "frames", data)
    assert server.events == [("frames", {"node": "7", "prompt_id": None, "frames": []}, "browser")]
    server.waiting = host.MOST_WAITING
    host.send(node, "frames", data)
    server.waiting, server.client_id = 0, None  # a script, which no browser waits for
    host.send(node, "frames", data)
    assert len(server.events) == len(made) == 1


def test_notes_on_a_node_do_not_hide_each_other(pack, server):
    from any_folder_name.nodes.host import progress as host

    notes = host.Notes(SimpleNamespace(hidden=SimpleNamespace(unique_id="7")))
    notes.add("chunk 1, but")
    notes.add("seed 5")
    assert server.events[-1][1]["text"] == "chunk 1, but\nseed 5"
    notes.add("stopped", first=True)
    assert server.events[-1][1]["text"].startswith("stopped\nchunk 1")


def test_a_shift_for_stock_samplers_is_said_to_do_nothing(call, tiny, latent, sample, custom, caplog):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    (shifted,) = ModelSamplingSD3().patch(tiny.model, 5.0)
    assert torch.equal(sample(model=shifted), sample()) and "Set it in Self Forcing Settings" in caplog.text
    caplog.clear()
    custom(call("SamplerSelect", 0, 0, -1), call("Sigmas", shifted, "auto", 0), model=shifted)
    assert not caplog.records  # stock schedulers know the shift


# --- Memory ----------------------------------------------------------------------------------------------------------


def test_frames_without_room_are_refused_before_anything_is_made(call, tiny, latent, stream, sample, monkeypatch):
    import comfy.model_management as management
    import psutil

    samples = sample()
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=0))
    frame = 64 * 64 * 3 * 4
    monkeypatch.setattr(management, "get_free_memory", lambda *_: 20 * frame)
    monkeypatch.setattr(management, "load_models_gpu", None)
    with pytest.raises(ValueError, match="33 frames to hand on.*Give filename_prefix a name, and set keep to 81"):
        stream()
    with pytest.raises(ValueError, match="33 frames to hand on.*Self Forcing Stream with a file"):
        call("Decode", {"samples": samples}, tiny.vae)
    monkeypatch.undo()
    images, _ = stream(keep=20)
    assert len(images) == 20


def test_stream_asks_for_the_larger_of_a_forward_and_a_decoding(pack, tiny, latent, monkeypatch):
    from any_folder_name.nodes.host import live as module
    from any_folder_name.nodes.host.generation import prepare_generation
    from any_folder_name.nodes.inputs import StreamInputs

    given = StreamInputs(tiny.model, tiny.prompt, latent, 0, vae=tiny.vae)
    generation = prepare_generation(given)
    decoder = module.require_decoder(tiny.vae, latent["samples"])
    made = module.LiveVideo(generation, decoder, given, None)
    held, used = decoder.held(64 * 64, None), decoder.used(64 * 64, None)
    assert made.reserve_bytes == held + max(0, used - generation.memory.use.activations) < held + used
    assert held == 4 * 64 * 64 * decoder.memory.kept  # the weights are ComfyUI's to count


def test_memory_that_a_cpu_has_not_got_is_out_of_memory(pack):
    from any_folder_name.nodes.host import memory as host

    with pytest.raises(torch.OutOfMemoryError, match="Got a video, for which.*Make a smaller one"):
        host.within_memory(lambda: torch.empty(2**60), "a video", "Make a smaller one.")
    with pytest.raises(RuntimeError, match="size"):
        host.within_memory(lambda: torch.ones(2) @ torch.ones(3), "a video", "Make a smaller one.")


# --- Stream ----------------------------------------------------------------------------------------------------------


def test_stream_makes_what_sampler_and_decode_make(call, tiny, sample, stream):
    samples = sample(seed=3)
    images, latents = stream(seed=3)
    assert torch.equal(latents, samples)
    assert torch.equal(images, call("Decode", {"samples": samples}, tiny.vae))


@pytest.mark.parametrize(("keep", "latent_frames"), [(1, 1), (5, 2), (12, 4), (1000, 9)])
def test_stream_keeps_as_many_of_the_last_frames_as_asked_for(stream, keep, latent_frames):
    everything, all_latents = stream()
    images, latents = stream(keep=keep)
    assert torch.equal(images, everything[-keep:])
    assert torch.equal(latents, all_latents[:, :, -latent_frames:])


def test_what_a_stream_keeps_is_enough_to_go_on_from(call, stream):
    _, kept = stream(keep=33)
    longer = call("Latent", 64, 64, 69, 0.0, 16.0, 1)
    images, _ = stream(latent=longer, prefix={"samples": kept}, keep_prefix=False)
    assert len(images) == 36


def test_stream_writes_a_file_of_what_it_shows(stream, output_folder):
    import av

    images, _ = stream(file="clips/story", keep=4, fps=6.0)
    (path,) = output_folder.glob("clips/*.mp4")
    with av.open(str(path)) as video:
        assert video.streams.video[0].average_rate == 6
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == FRAMES
    assert np.abs(frames[-1] - 255 * images[-1].numpy()).mean() < 6  # what H.264 leaves of it
    stream(file="clips/story")
    assert len(list(output_folder.glob("clips/*.mp4"))) == 2


def test_seed_minus_one_is_another_video_each_time(nodes, stream):
    assert not torch.equal(stream(seed=-1)[1], stream(seed=-1)[1])
    changes = nodes["SelfForcingStream"].fingerprint_inputs
    assert changes(seed=-1, fps=16) != changes(seed=-1, fps=16)
    assert changes(seed=5, fps=16) == changes(seed=5, fps=16)


def test_stream_with_a_prefix_shows_it_or_not(call, tiny, sample, stream, latent):
    start = sample(latent=call("Latent", 64, 64, 9, 0.0, 16.0, 1))
    kept, all_latents = stream(prefix={"samples": start})
    new, latents = stream(prefix={"samples": start}, keep_prefix=False)
    assert torch.equal(new, kept[9:]) and torch.equal(latents, all_latents[:, :, 3:])


def test_a_vae_that_cannot_stream_is_refused(stream):
    import comfy.sd

    with pytest.raises(ValueError, match="channels"):
        stream(vae=comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}))


def test_a_batch_makes_a_file_of_each_video(call, tiny, sample, output_folder):
    latent = call("Latent", 64, 64, 21, 0.0, 16.0, 3)
    samples = sample(latent=latent)
    images, latents, videos, paths = stream_outputs(call, tiny, latent, file="clips/b")
    assert torch.equal(latents["samples"], samples) and len(samples) == 3
    assert torch.equal(images, call("Decode", {"samples": samples}, tiny.vae))
    assert [Path(path).name for path in paths] == [f"b_0000{number}_.mp4" for number in (1, 2, 3)]
    for video, path, made in zip(videos, paths, images.unflatten(0, (3, -1)), strict=True):
        assert video.get_stream_source() == path
        assert (video.get_components().images - made).abs().mean() < 6 / 255  # what H.264 leaves of it
    images, latents, _, _ = stream_outputs(call, tiny, latent, keep=5)
    assert torch.equal(images.unflatten(0, (3, -1))[1], call("Decode", {"samples": samples[1:2]}, tiny.vae)[-5:])


def stream_outputs(call, tiny, latent, **changes) -> tuple:
    inputs = {"model": tiny.model, "positive": tiny.prompt, "latent": latent, "vae": tiny.vae, "seed": 0, **changes}
    return call("Stream", **inputs)


def test_a_video_without_a_file_is_of_the_frames_that_are_kept(call, tiny, latent):
    images, _, (video,), (path,) = stream_outputs(call, tiny, latent, keep=6, fps=8.0)
    assert path == "" and video.get_frame_rate() == 8
    assert torch.equal(video.get_components().images, images) and len(images) == 6


def test_the_seed_that_was_drawn_is_in_the_files_workflow(call, nodes, tiny, latent, output_folder, server):
    import av

    workflow = {"nodes": [{"id": 4, "type": "SelfForcingStream", "widgets_values": [-1, "fixed", 16.0]}], "links": []}
    hidden = SimpleNamespace(
        unique_id="4", extra_pnginfo={"workflow": workflow}, prompt={"4": {"inputs": {"seed": -1}}}, api_key=None
    )
    node = type("Stream", (nodes["SelfForcingStream"],), {"hidden": hidden})
    inputs = {"model": tiny.model, "positive": tiny.prompt, "latent": latent, "vae": tiny.vae}
    output = node.execute(**inputs, seed=-1, file="drawn")
    (video,) = [av.open(path) for path in output.args[3]]
    seed = json.loads(video.metadata["prompt"])["4"]["inputs"]["seed"]
    assert json.loads(video.metadata["workflow"])["nodes"][0]["widgets_values"] == [seed, "fixed", 16.0]
    assert video.metadata["seed"] == output.ui["self_forcing"][0]["seed"] == str(seed) and seed > 0
    assert workflow["nodes"][0]["widgets_values"][0] == hidden.prompt["4"]["inputs"]["seed"] == -1  # ComfyUI's own
    again = call("Stream", **inputs, seed=seed)
    assert torch.equal(again[1]["samples"], output.args[1]["samples"])


def test_a_drawn_seed_is_set_where_it_comes_from(pack):
    from any_folder_name.nodes.host.files import set_drawn_seed

    def widget(name, link=None):
        return {"name": name, "link": link, "widget": {"name": name}}

    stream = {"id": 3, "type": "SelfForcingStream", "inputs": [widget("seed", 9)], "widgets_values": [-1, "fixed"]}
    number = {"id": 5, "type": "PrimitiveInt", "inputs": [widget("value")], "widgets_values": [-1, "fixed"]}
    set_drawn_seed({"nodes": [stream, number], "links": [[9, 5, 0, 3, 0, "INT"]]}, "3", 77)
    assert number["widgets_values"] == [77, "fixed"]
    number["widgets_values"][0] = stream["widgets_values"][0] = -1
    inner = {"id": "a-b", "nodes": [stream], "inputs": [{"name": "words"}, {"name": "seed_1"}]}
    inner["links"] = [{"id": 9, "origin_id": -10, "origin_slot": 1, "target_id": 3, "target_slot": 0}]
    outer = {"id": 12, "type": "a-b", "inputs": [widget("words"), widget("seed_1", 2)], "widgets_values": ["x", -1]}
    links = [[2, 5, 0, 12, 1, "INT"]]
    set_drawn_seed({"nodes": [outer, number], "links": links, "definitions": {"subgraphs": [inner]}}, "12:3", 78)
    assert outer["widgets_values"] == ["x", 78] and number["widgets_values"][0] == stream["widgets_values"][0] == 78


def test_a_disk_that_is_full_is_said_and_leaves_the_other_files(call, tiny, output_folder, monkeypatch):
    from any_folder_name.nodes.host import files

    saved = files.save_video

    def full(path, frames, *args, **settings):
        if "00002" in str(path):
            next(frames)
            raise OSError(28, "Got a full disk")
        return saved(path, frames, *args, **settings)

    monkeypatch.setattr(files, "save_video", full)
    with pytest.raises(OSError, match="full disk"):
        stream_outputs(call, tiny, call("Latent", 64, 64, 21, 0.0, 16.0, 3), file="b")
    assert [path.name for path in sorted(output_folder.glob("*.mp4"))] == ["b_00001_.mp4", "b_00003_.mp4"]


def test_a_file_that_fails_at_its_only_frames_is_an_error(call, tiny, output_folder, monkeypatch):
    from any_folder_name.nodes.host import files

    def full(path, frames, *args, **settings):
        next(frames)
        raise OSError(28, "Got a full disk")

    monkeypatch.setattr(files, "save_video", full)
    with pytest.raises(OSError, match="full disk"):
        stream_outputs(call, tiny, call("Latent", 64, 64, 1, 0.0, 16.0, 1), file="b")


# --- SAMPLER and SIGMAS ----------------------------------------------------------------------------------------------


def test_stock_sampling_gives_the_same_frames(call, tiny, sample, custom):
    output, denoised = custom(call("SamplerSelect", 0, 0, -1), call("Sigmas", tiny.model, "auto", 0), seed=7)
    assert torch.equal(output, sample(seed=7))
    assert torch.equal(denoised, output)


def test_stock_sampling_follows_settings_and_window(call, settings, sample, custom):
    model = settings(chunk=1, window=4, sink=1)
    sigmas = call("Sigmas", model, "cli", 3)
    output, _ = custom(call("SamplerSelect", 0, 5, -1), sigmas, model=model)
    assert torch.equal(output, sample(model=settings(chunk=1, window=4, sink=1, shift=5.0), steps=3, window=5))


def test_stock_sampling_with_guidance_is_ours(call, tiny, sample, custom):
    negative = call("Prompt", tiny.clip, "a blue square")
    sampler, sigmas = call("SamplerSelect", 0, 0, -1), call("Sigmas", tiny.model, "auto", 0)
    output, _ = custom(sampler, sigmas, negative=negative, cfg=2.0)
    assert torch.equal(output, sample(negative=negative, cfg=2.0))


def test_stock_sampling_of_a_clip_is_video_to_video(call, tiny, sample, custom):
    clip = {"samples": sample(seed=5)}
    output, _ = custom(call("SamplerSelect", 0, 0, -1), call("Sigmas", tiny.model, "auto", 0, 0.5), start=clip)
    torch.testing.assert_close(output, sample(latent=clip, denoise=0.5), rtol=0, atol=1e-5)


def test_a_prefix_goes_into_the_sampler(call, tiny, sample, custom):
    start = {"samples": sample()[:, :, :3]}
    output, _ = custom(call("SamplerSelect", 0, 0, -1, start), call("Sigmas", tiny.model, "auto", 0))
    assert torch.equal(output, sample(prefix=start))


@pytest.mark.parametrize("sigmas", [[0.0], [1.0, 0.5], [0.5, 1.0, 0.0], [14.6, 1.0, 0.0]])
def test_other_sigmas_are_refused(call, custom, sigmas):
    with pytest.raises(ValueError, match="fall from at most 1 to 0"):
        custom(call("SamplerSelect", 0, 0, -1), torch.tensor(sigmas))


@pytest.mark.parametrize("first", [1 - 1e-7, 1 + 1e-7])
def test_schedulers_may_round(call, tiny, custom, first):
    sampler, sigmas = call("SamplerSelect", 0, 0, -1), call("Sigmas", tiny.model, "auto", 0)
    rounded = sigmas.clone()
    rounded[0] = first
    assert torch.equal(custom(sampler, rounded)[0], custom(sampler, sigmas)[0])


def test_masks_and_other_guiders_are_refused(call, tiny, latent, custom, sample):
    from comfy_extras.nodes_custom_sampler import DualCFGGuider, RandomNoise, SamplerCustomAdvanced

    sampler, sigmas = call("SamplerSelect", 0, 0, -1), call("Sigmas", tiny.model, "auto", 0)
    with pytest.raises(ValueError, match="noise mask"):
        custom(sampler, sigmas, start={**latent, "noise_mask": torch.ones(1, 1, 9, 8, 8)})
    with pytest.raises(ValueError, match="empty latent"):
        custom(sampler, sigmas[1:])
    with pytest.raises(ValueError, match="noise mask"):
        sample(latent={**latent, "noise_mask": torch.ones(1, 1, 9, 8, 8)})
    prompts = (tiny.prompt, tiny.prompt, tiny.prompt)
    guider = DualCFGGuider.execute(tiny.model, *prompts, 2.0, 2.0, "regular").args[0]
    with pytest.raises(ValueError, match="Use BasicGuider or CFGGuider"):
        SamplerCustomAdvanced.execute(RandomNoise.execute(0).args[0], guider, sampler, sigmas, latent)


# --- Guidance --------------------------------------------------------------------------------------------------------


def test_guidance_is_the_cores(call, tiny, sample):
    from any_folder_name.sf_core import tiny as core
    from any_folder_name.sf_core.sampling.config import PRESETS

    negative = call("Prompt", tiny.clip, "a blue square")
    ours = tiny.model.model.process_latent_in(sample(negative=negative, cfg=3.0))
    prompts = {"negative": negative[0][0], "guidance": 3.0}
    expected = core_latents(core.load_transformer(), PRESETS["tiny"], tiny.prompt[0][0], 9, 8, 8, **prompts)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4)


def test_guidance_needs_a_negative_prompt(sample):
    with pytest.raises(ValueError, match="without a negative prompt.*set cfg to 1"):
        sample(cfg=3.0)


def test_the_stock_empty_prompt_is_a_negative_one(tiny, sample):
    import nodes

    empty = nodes.CLIPTextEncode().encode(tiny.clip, "")[0]
    assert not torch.equal(sample(negative=empty, cfg=2.0), sample())


def test_a_negative_prompt_without_guidance_costs_and_changes_nothing(call, tiny, sample):
    assert torch.equal(sample(negative=call("Prompt", tiny.clip, "a blue square")), sample())


def test_too_little_memory_for_two_branches_is_said_with_what_would_fit(call, tiny, sample, monkeypatch):
    import comfy.model_management as management
    from any_folder_name.nodes.host import memory as room

    needed = []
    check = room.check
    monkeypatch.setattr(room, "check", lambda memory, device: needed.append(memory.total) or check(memory, device))
    negative = call("Prompt", tiny.clip, "a blue square")
    sample()
    reserved = management.extra_reserved_memory()
    monkeypatch.setattr(management, "get_total_memory", lambda device: 1.5 * needed[0] + reserved)
    sample()
    with pytest.raises(ValueError, match=r"Set cfg to 1 \(.*MiB\)"):
        sample(negative=negative, cfg=3.0)


# --- Prefix, history, source -----------------------------------------------------------------------------------------


def test_a_continued_video_is_the_video_made_at_once(call, sample, settings):
    model = settings(window=6, sink=1)
    whole = sample(model=model, latent=call("Latent", 64, 64, 81, 0.0, 16.0, 1))
    longer = {"latent": call("Latent", 64, 64, 81, 0.0, 16.0, 1), "prefix": {"samples": whole[:, :, :12]}}
    torch.testing.assert_close(sample(model=model, history="all", **longer), whole, rtol=0, atol=2e-3)
    quick = sample(model=model, **longer)
    torch.testing.assert_close(quick[:, :, :12], whole[:, :, :12])
    assert 1e-4 < (quick - whole)[:, :, 12:].norm() / whole[:, :, 12:].norm() < 0.5


def test_cancel_is_heard_while_a_prefix_is_read(call, sample, monkeypatch):
    import comfy.model_management as management
    from any_folder_name.sf_core.sampling.context import Context

    prefix, longer = {"samples": sample()}, call("Latent", 64, 64, 81, 0.0, 16.0, 1)
    append, read = Context.append, []
    monkeypatch.setattr(Context, "append", lambda *args: read.append(args[1]) or append(*args))
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        sample(prefix=prefix, latent=longer)
    assert not read


def test_a_prefix_can_be_left_out_of_the_output(sample):
    prefix = {"samples": sample()[:, :, :4]}
    assert torch.equal(sample(prefix=prefix, keep_prefix=False), sample(prefix=prefix)[:, :, 4:])


def test_one_image_starts_every_video_of_a_batch(call, tiny, sample):
    image = {"samples": tiny.vae.encode(torch.rand(1, 64, 64, 3))}
    both = sample(prefix=image, latent=call("Latent", 64, 64, FRAMES, 0.0, 16.0, 2))
    assert torch.equal(both[0, :, 0], both[1, :, 0])
    torch.testing.assert_close(both[:1], sample(prefix=image), rtol=1e-4, atol=1e-4)  # raw latents reach 10


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 16, 1, 16, 8), "Encode the image or clip at the video's size"),
        ((1, 4, 1, 8, 8), "this model needs"),
        ((1, 16, 8, 8), "this model needs"),
        ((1, 16, 9, 8, 8), "at least one frame must be left"),
    ],
)
def test_a_prefix_that_does_not_fit_is_refused(sample, shape, message):
    with pytest.raises(ValueError, match=message):
        sample(prefix={"samples": torch.ones(shape)})


def test_denoise_decides_how_much_of_a_clip_stays(sample):
    clip = sample(seed=5)
    near, far = (sample(latent={"samples": clip}, denoise=denoise) for denoise in (0.3, 0.9))
    assert (near - clip).norm() < 0.7 * (far - clip).norm()
    assert torch.equal(sample(latent={"samples": clip}), sample())


def test_denoise_below_1_needs_a_clip(sample):
    with pytest.raises(ValueError, match="denoise 0.5 with an empty latent.*VAE Encode"):
        sample(denoise=0.5)


# --- Settings --------------------------------------------------------------------------------------------------------


def test_settings_travel_with_the_model_and_leave_the_first_alone(settings, sample):
    before = sample()
    assert torch.equal(sample(model=settings(window=6, steps=2)), sample(window=6, steps=2))
    assert torch.equal(sample(), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"sink": 1, "window": 4, "sink_positions": "as made"},
        {"context_noise": 100.0},
        {"shift": 8.0},
        {"first_chunk": 1},
        {"first_steps": 6},
    ],
)
def test_every_setting_has_an_effect(settings, sample, changes):
    base = {"sink": 1, "window": 4} if "sink" in changes else {}
    assert not torch.equal(sample(model=settings(**changes)), sample(model=settings(**base)))


def test_reencoding_begins_when_the_window_is_full(call, tiny, settings, sample):
    longer = call("Latent", 64, 64, 81, 0.0, 16.0, 1)
    plain, renewed = sample(latent=longer), sample(latent=longer, model=settings(reencode_vae=tiny.vae))
    assert torch.equal(plain[:, :, :9], renewed[:, :, :9])
    assert (plain - renewed)[:, :, 9:].abs().max() > 1e-3


def test_reencoding_by_the_host_is_the_cores(tiny, settings, call, sample):
    from any_folder_name.sf_core import tiny as core
    from any_folder_name.sf_core.sampling.config import PRESETS

    longer = call("Latent", 64, 64, 57, 0.0, 16.0, 1)
    ours = tiny.model.model.process_latent_in(sample(latent=longer, model=settings(reencode_vae=tiny.vae)))
    still = core.load_autoencoder().still
    prompt = tiny.prompt[0][0]
    expected = core_latents(core.load_transformer(), PRESETS["tiny"], prompt, 15, 8, 8, reencode=still)
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-4)


def test_a_chunk_the_model_was_not_trained_with_is_told_with_its_reason(sample, settings, caplog):
    sample(chunk=1)
    assert "trained with chunks of 3" in caplog.text and "flicker" in caplog.text
    caplog.clear()
    sample(chunk=3)
    sample()
    assert "trained with" not in caplog.text


def test_so_it_is_where_settings_say_the_chunk(sample, settings, caplog):
    framewise = settings(chunk=1)
    sample(model=framewise)
    assert "trained with chunks of 3" in caplog.text
    caplog.clear()
    sample(model=framewise, chunk=3)
    assert "trained with" not in caplog.text


def test_a_window_smaller_than_sink_and_chunk_is_refused(settings):
    with pytest.raises(ValueError, match="window of 4 latent frames with sink 2 and chunk 3"):
        settings(window=4, sink=2)


# --- FP8 -------------------------------------------------------------------------------------------------------------


def test_fp8_halves_the_weights_of_the_blocks_and_can_be_switched_off(call, tiny, sample):
    small = call("FP8", tiny.model, True)
    assert small.model_size() < 0.45 * tiny.model.model_size()  # float32 to float8
    away = (sample(model=small) - sample()).norm() / sample().norm()
    assert 0 < away < 0.3
    assert call("FP8", tiny.model, False) is tiny.model
    assert call("FP8", small, True) is small


def test_fp8_keeps_loras_and_settings(call, tiny, settings, sample):
    lora = settings(window=6).clone()
    strong = {"diffusion_model.blocks.0.ffn.0.weight": (torch.randn(640, 160) * 0.3,)}
    lora.add_patches(strong, 1.0)
    both = call("FP8", lora, True)
    assert not torch.equal(sample(model=both), sample(model=call("FP8", settings(window=6), True)))
    assert (sample(model=both) - sample(model=lora)).norm() < 0.5 * (sample(model=lora) - sample()).norm()
    assert not torch.equal(sample(model=lora), sample())


def test_fp8_is_made_once_whatever_loras_come(call, tiny):
    one, two = (call("FP8", model, True) for model in (tiny.model, tiny.model.clone()))
    assert one.model is two.model is not tiny.model.model


def test_fp8_of_another_kind_of_model_is_refused(call):
    from types import SimpleNamespace

    other = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="this node samples Wan video models"):
        call("FP8", other, True)


def test_fp8_of_a_model_that_cannot_be_read_again_is_refused(call, tiny):
    model = tiny.model.clone()
    model.cached_patcher_init = None
    with pytest.raises(ValueError, match="Load Self Forcing Model or Load Diffusion Model"):
        call("FP8", model, True)


# --- Several prompts from several nodes ------------------------------------------------------------------------------


def test_joined_prompts_are_those_of_a_text_with_lines(call, tiny, sample):
    longer = {"latent": call("Latent", 64, 64, 81, 0.0, 16.0, 1)}
    lines = "0: a red circle\n2s: a blue square\n4s blend 1s: a green star"
    text = call("Prompt", tiny.clip, lines)
    first, second, third = (
        call("Prompt", tiny.clip, words) for words in ("a red circle", "a blue square", "a green star")
    )
    two = call("NextPrompt", first, second, "2s", "recache", 1.5)
    three = call("NextPrompt", two, third, " 4s ", "blend", 1.0)
    assert torch.equal(sample(positive=three, **longer), sample(positive=text, **longer))
    assert len(first) == 1 and len(two) == 2  # inputs are left alone


def test_of_combined_conditioning_the_first_entry_comes_first(call, tiny, sample):
    longer = {"latent": call("Latent", 64, 64, 81, 0.0, 16.0, 1)}
    first, second, other = (call("Prompt", tiny.clip, words) for words in ("a red circle", "a blue square", "a star"))
    expected = sample(positive=call("NextPrompt", first, second, "2s", "cut", 1.5), **longer)
    assert torch.equal(
        sample(positive=call("NextPrompt", [*first, *other], second, "2s", "cut", 1.5), **longer), expected
    )


@pytest.mark.parametrize(
    ("start", "message"),
    [("", "has a time"), ("0", "a later time"), ("4", "Write 4s"), ("soon", "Write seconds as 4s"), ("@x", "Write")],
)
def test_times_that_are_none_are_refused_with_their_place(call, tiny, start, message):
    with pytest.raises(ValueError, match=rf"line 1, column 1.*{message}"):
        call("NextPrompt", tiny.prompt, tiny.prompt, start, "cut", 1.5)


def test_joined_prompts_out_of_order_are_refused_by_the_sampler(call, tiny, sample):
    late = call("NextPrompt", tiny.prompt, tiny.prompt, "1s", "cut", 1.5)
    with pytest.raises(ValueError, match="in the wrong order"):
        sample(positive=call("NextPrompt", late, tiny.prompt, "0.5s", "cut", 1.5))
