"""The pack in a ComfyUI server of its own: workflows, Cancel, memory, and what a user reads when something is wrong."""

import json
import re
import time
import urllib.error
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.host.server import PACK, RUN, WORKFLOWS, frames_of, load_prompt, running

# Frames, by a part of the template's name; 81 where it is not named. The last repeats each.
LENGTHS = {
    "tiny_long_video": 481,
    "tiny_continuation": 93,
    "tiny_story": 193,
    "tiny_stream": 161,
    "wan_long_video": 961,
    "wan_continue_video": 161,
    "wan_upscale_interpolate": 162,
    "wan22_longlive2_text_to_video": 253,
    "wan22_longlive2_image_to_video": 125,
}
SIDES = {"tiny_upscale": 256, "wan_upscale_interpolate": 128}  # pixels; 64 where it is not named


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    with running(comfyui, tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@pytest.fixture(scope="module")
def workflow(server):
    """workflow("name", SelfForcingSampler={"seed": 1}) is that workflow as /prompt takes it, with inputs changed."""
    return partial(load_prompt, definitions=server.get("/object_info"))


def pixels_of(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


# --- The pack among custom nodes -------------------------------------------------------------------------------------


def test_pack_loads_without_a_warning(server):
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert re.search(rf"[\d.]+ seconds: .*{PACK}", log), "loaded, and not (IMPORT FAILED)"
    assert not [line for line in log.splitlines() if re.search("warn|error", line, re.I) and PACK in line]


def test_templates_help_and_translations_are_served(server):
    assert set(server.get("/workflow_templates")[PACK]) == set(WORKFLOWS)
    for name in WORKFLOWS:
        assert server.get(f"/api/workflow_templates/{PACK}/{name}.json")["nodes"]
        assert server.request(f"/api/workflow_templates/{PACK}/{name}.jpg").startswith(b"\xff\xd8")
    assert server.request(f"/extensions/{PACK}/docs/SelfForcingSampler.md").startswith(b"# Self Forcing Sampler")
    assert "SelfForcingSampler" in server.get("/i18n")["en"]["nodeDefs"]


# --- Workflows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_runs_and_saves_a_video(server, workflow, name):
    frames = frames_of(server.run(workflow(name, SelfForcingStream={"file": "video/stream"})))
    side = next((pixels for part, pixels in SIDES.items() if part in name), 64)
    assert len(frames) == next((length for part, length in LENGTHS.items() if part in name), 81)
    assert frames[0].shape == (side, side, 3)


def test_video_from_an_image_begins_with_it_and_moves(server, workflow):
    orange, navy = (255, 128, 13), (15, 20, 82)
    frames = frames_of(server.run(workflow("tiny_image_to_video")))
    assert abs(frames[0][26:38, 12:24] - np.array(orange)).max() < 32
    assert abs(frames[0][:, 36:] - np.array(navy)).max() < 32
    columns = [np.argwhere(frame[..., 0] > 128)[:, 1].mean() for frame in frames[:9]]
    assert columns[0] + 12 < columns[8]


def test_continuation_keeps_the_first_part_and_follows_the_second_prompt(server, workflow):
    frames = frames_of(server.run(workflow("tiny_continuation")))
    words = {"text": "an orange square moves right on a navy background"}
    first = frames_of(
        server.run(workflow("tiny_text_to_video", SelfForcingLatent={"frames": 45}, SelfForcingPrompt=words))
    )
    assert len(first) == 45
    assert max(abs(a - b.astype(int)).mean() for a, b in zip(first, frames[:45], strict=True)) < 4  # x264's own
    (y0, x0), (y1, x1) = (np.argwhere(frame[..., 0] > 128).mean(0) for frame in (frames[70], frames[78]))
    assert (y0 - y1) % 64 > 8  # the picture goes round at its edges
    assert abs(x1 - x0) < 4


def test_a_story_shows_its_four_prompts_one_after_the_other(server, workflow):
    frames = frames_of(server.run(workflow("tiny_story")))
    seen = [np.median(frame[brightest(frame)], axis=0) for frame in (frames[40], frames[90], frames[138], frames[186])]
    red, blue, green, yellow = ([channel > 128 for channel in colour] for colour in seen)
    assert (red, blue, green, yellow) == ([1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 0])


def test_a_clip_goes_on_after_its_own_frames(server, workflow):
    words = {"text": "a red square moves right"}
    frames = frames_of(server.run(workflow("wan_continue_video", SelfForcingPrompt=words)))
    clip = frames_of([server.base / "input" / "clip.mp4"])
    assert max(abs(a - b.astype(int)).mean() for a, b in zip(clip, frames[:81], strict=True)) < 12  # two encoders' own
    assert all(frame[..., 0].max() > 128 > frame[..., 2].mean() for frame in frames[81:])


def test_one_frame_rate_reaches_the_file(server, workflow):
    import av

    for name, rate in (("tiny_text_to_video", 8), ("wan_upscale_interpolate", 16), ("tiny_streaming", 8)):
        changes = {"PrimitiveFloat": {"value": 8.0}, "SelfForcingLatent": {"frames": 9}}
        (path,) = server.run(workflow(name, **changes))
        with av.open(str(path)) as video:
            assert video.streams.video[0].average_rate == rate


@pytest.mark.parametrize(
    ("node", "folder", "source"),
    [("SelfForcingLoadModel", "diffusion_models", "gdhe17"), ("SelfForcingLoadTAEHV", "vae_approx", "taew2_1")],
)
def test_an_empty_folder_is_said_with_what_belongs_there(server, node, folder, source):
    (options,) = [server.get("/object_info")[node]["input"]["required"]["file"][1]["options"]]
    assert options == [f"no file in models/{folder}"]
    inputs = {"family": "auto", "precision": "auto"} if node == "SelfForcingLoadModel" else {}
    for file in [*options, "self_forcing_dmd.pt"]:
        prompt = {"1": {"class_type": node, "inputs": {"file": file, **inputs}}}
        if node == "SelfForcingLoadModel":
            prompt["2"] = {"class_type": "ModelSave", "inputs": {"model": ["1", 0], "filename_prefix": "x"}}
        else:
            prompt["2"] = {"class_type": "VAESave", "inputs": {"vae": ["1", 0], "filename_prefix": "x"}}
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.queue(prompt)
        (error,) = json.loads(refused.value.read())["node_errors"]["1"]["errors"]
        for part in ("Got", f"models/{folder}", source, str(server.base / "models" / folder), "press R"):
            assert part in error["details"]


def brightest(frame: np.ndarray) -> np.ndarray:
    """Where the shape is, on a dark background."""
    return frame.max(-1) > 0.8 * frame.max()


def test_another_video_of_a_clip_has_its_motion_and_the_new_colours(server, workflow):
    prompt = workflow("tiny_video_to_video")
    frames = frames_of(server.run(prompt))
    (clip,) = [name for name, node in prompt.items() if node["class_type"] == "VAEEncode"]
    (create,) = [name for name, node in prompt.items() if node["class_type"] == "CreateVideo"]
    prompt[create]["inputs"]["images"] = prompt[clip]["inputs"]["pixels"]
    source = frames_of(server.run(prompt))
    unguided = frames_of(server.run(workflow("tiny_video_to_video", SelfForcingSampler={"denoise": 1.0})))

    def place(frame):
        """Column of what is bright, on a picture that goes round at its edges."""
        turn = 2 * np.pi * np.argwhere(frame[..., 0] > 128)[:, 1] / 64
        return np.angle(np.exp(1j * turn).mean()) * 64 / (2 * np.pi)

    def apart(video):
        return max(abs((place(a) - place(b) + 32) % 64 - 32) for a, b in zip(source, video, strict=True))

    assert apart(frames) < 10 < apart(unguided)
    green = [np.median(clip[30][brightest(clip[30])][:, 1]) for clip in (source, frames)]
    assert green[0] < 80 and green[1] > 160  # red has turned yellow


def test_stock_sampler_nodes_save_the_same_frames(server, workflow):
    words = {"SelfForcingPrompt": {"text": "a pink circle bounces on a gray background"}}
    ours, stock = (
        frames_of(server.run(workflow(f"tiny_{name}", **words))) for name in ("text_to_video", "custom_sampler")
    )
    assert max(abs(a - b.astype(int)).mean() for a, b in zip(ours, stock, strict=True)) < 4  # x264's own


def test_a_cancelled_stream_leaves_a_whole_video_with_its_workflow(server, workflow):
    import av

    stream = {"file": "video/cancelled", "keep": 9}
    prompt = workflow("tiny_stream", SelfForcingStream=stream, SelfForcingLatent={"frames": 100_001})
    prompt_id = server.queue(prompt)
    deadline = time.monotonic() + RUN
    while not list((server.base / "output" / "video").glob(".cancelled*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)
    server.request("/interrupt", {})
    assert "execution_interrupted" in [name for name, _ in server.finished(prompt_id)["status"]["messages"]]
    (path,) = (server.base / "output" / "video").glob("*cancelled*")
    assert 1 < len(frames_of([path])) < 100_001
    with av.open(str(path)) as video:
        assert json.loads(video.metadata["prompt"]).keys() == prompt.keys()


def test_two_runs_with_one_seed_give_the_same_frames(server, workflow):
    # As pictures: the same frames can come out of x264 a little different when the machine is busy.
    prompt = workflow("tiny_text_to_video", SelfForcingLatent={"frames": 21})
    (decode,) = [name for name, node in prompt.items() if node["class_type"] == "SelfForcingDecode"]
    prompt = {name: node for name, node in prompt.items() if node["class_type"] not in ("CreateVideo", "SaveVideo")}
    prompt["save"] = {"class_type": "SaveImage", "inputs": {"images": [decode, 0], "filename_prefix": "frame"}}
    runs = []
    for _ in range(2):
        runs.append(server.run(prompt))
        server.request("/free", {"free_memory": True})
        time.sleep(2)  # it is done between prompts
    first, second = runs
    assert len(first) == len(second) == 21 and not set(first) & set(second)
    assert all(pixels_of(a) == pixels_of(b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_cancel_gives_the_memory_back_and_leaves_the_server_usable(server, workflow):
    large = {"SelfForcingLatent": {"width": 256, "height": 256, "frames": 121}, "SelfForcingSampler": {"window": 31}}
    cache = 31 * 256 * 160 * 6 * 2 * 4  # frames, tokens, width, layers, keys and values, bytes: 58 MiB
    held = []
    for seed in (1, 2):
        large["SelfForcingSampler"]["seed"] = seed
        prompt_id, idle = server.queue(workflow("tiny_text_to_video", **large)), server.memory()
        deadline = time.monotonic() + RUN
        while server.memory() < idle + 0.6 * cache and time.monotonic() < deadline:
            time.sleep(0.05)
        server.request("/interrupt", {})
        messages = [name for name, _ in server.finished(prompt_id)["status"]["messages"]]
        assert "execution_interrupted" in messages
        time.sleep(1)
        held.append(server.memory())
    assert held[1] < held[0] + 0.3 * cache
    other = {"SelfForcingLatent": {"frames": 21}, "SelfForcingSampler": {"seed": 5}}
    assert len(frames_of(server.run(workflow("tiny_text_to_video", **other)))) == 21


# --- What goes wrong, as the user reads it ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SelfForcingLatent": {"width": 70}}, "multiples of 16"),
        ({"SelfForcingPrompt": {"text": ""}}, "empty prompt"),
        ({"SelfForcingSampler": {"window": 3, "sink": 2}}, "window of 3 latent frames with sink 2 and chunk 3"),
    ],
    ids=["odd size", "empty prompt", "small window"],
)
def test_mistake_is_explained_in_the_node(server, workflow, changes, message):
    error = server.error_of(workflow("tiny_text_to_video", **changes))
    assert message in error
    assert error.startswith("Got")


@pytest.mark.parametrize("frames", [0, 10**9])
def test_impossible_length_is_refused_before_the_run(server, workflow, frames):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.queue(workflow("tiny_text_to_video", SelfForcingLatent={"frames": frames}))
    (node,) = json.loads(refused.value.read())["node_errors"].values()
    assert "frames" in node["errors"][0]["details"]
