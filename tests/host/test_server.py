"""A ComfyUI server of its own, with this pack among its custom nodes, driven the way a user's browser drives it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PACK = "self-forcing-under-test"
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
LENGTHS = {"tiny_long_video": 481, "tiny_continuation": 93}  # frames; 81 where it is not named
START, RUN = 600, 300  # seconds; both take a few, on a machine that has nothing else to do


class Server:
    """A ComfyUI process on a free port; files go to `base`."""

    def __init__(self, comfyui: Path, base: Path) -> None:
        self.base, self.log = base, base / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            sys.executable, "main.py", "--cpu", "--port", str(self.port), "--base-directory", str(base),
            "--disable-auto-launch", "--disable-api-nodes", "--cache-classic",
        ]  # fmt: skip
        # glibc then gives every larger block back to the system at once, so that memory can be read off the process.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=comfyui, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def request(self, path: str, body: dict | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read()

    def get(self, path: str) -> dict:
        return json.loads(self.request(path))

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text(encoding="utf-8", errors="replace")[-2000:])
            try:
                self.request("/system_stats")
                return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(f"ComfyUI did not start in {START} s")

    def queue(self, prompt: dict) -> str:
        return json.loads(self.request("/prompt", {"prompt": prompt}))["prompt_id"]

    def finished(self, prompt_id: str) -> dict:
        """The history entry of a prompt, once it is over."""
        deadline = time.monotonic() + RUN
        while time.monotonic() < deadline:
            if entry := self.get(f"/history/{prompt_id}").get(prompt_id):
                return entry
            time.sleep(0.1)
        raise TimeoutError(f"the prompt was not over after {RUN} s")

    def run(self, prompt: dict) -> list[Path]:
        """Runs a workflow to its end and gives the files it has saved."""
        entry = self.finished(self.queue(prompt))
        assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
        saved = [file for output in entry["outputs"].values() for file in output.get("images", [])]
        return [self.base / "output" / file["subfolder"] / file["filename"] for file in saved]

    def error_of(self, prompt: dict) -> str:
        """Runs a workflow that fails and gives the message the user reads."""
        messages = dict(self.finished(self.queue(prompt))["status"]["messages"])
        return messages["execution_error"]["exception_message"]

    def memory(self) -> int:
        """Bytes of RAM the server holds."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    copied = shutil.ignore_patterns(".*", "__pycache__", "runs", "tests", "benchmarks")
    shutil.copytree(ROOT, base / "custom_nodes" / PACK, ignore=copied)
    running = Server(comfyui, base)
    try:
        running.wait_until_up()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def workflow(server):
    """workflow("name", SelfForcingSampler={"seed": 1}) is that workflow as /prompt takes it, with inputs changed."""
    definitions = server.get("/object_info")

    def load(name: str, **changes) -> dict:
        saved = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        prompt = to_prompt(saved, definitions)
        for node in prompt.values():
            node["inputs"].update(changes.get(node["class_type"], {}))
        return prompt

    return load


def to_prompt(saved: dict, definitions: dict) -> dict:
    """A saved workflow in the form that /prompt takes: what the frontend does when Run is pressed."""
    links = {link[0]: [str(link[1]), link[2]] for link in saved["links"]}
    prompt = {}
    for node in saved["nodes"]:
        if node["type"] not in definitions:
            assert node["type"] in ("Note", "MarkdownNote"), node["type"]
            continue
        wired = {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        inputs = {**widgets(node, definitions[node["type"]]), **wired}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def widgets(node: dict, definition: dict) -> dict:
    """Widget name -> value. Values are saved by position; a seed is followed by what becomes of it after a run."""
    values, named = iter(node.get("widgets_values") or []), {}
    specs = {**definition["input"].get("required", {}), **definition["input"].get("optional", {})}
    for slot in node["inputs"]:
        if "widget" in slot:
            named[slot["name"]] = next(values)
            options = specs[slot["name"]][1] if len(specs[slot["name"]]) > 1 else {}
            if options.get("control_after_generate"):
                next(values)
    assert not list(values), f"{node['type']} has more values than widgets"
    return named


def frames_of(files: list[Path]) -> list:
    """The frames of the one video that was saved, as arrays [H, W, 3]."""
    import av

    (path,) = files
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


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
    frames = frames_of(server.run(workflow(name)))
    assert len(frames) == LENGTHS.get(name, 81)
    assert frames[0].shape == ((256, 256, 3) if name == "tiny_upscale" else (64, 64, 3))


def test_video_from_an_image_begins_with_it_and_moves(server, workflow):
    orange, navy = (255, 128, 13), (15, 20, 82)
    frames = frames_of(server.run(workflow("tiny_image_to_video")))
    assert abs(frames[0][26:38, 12:24] - np.array(orange)).max() < 32
    assert abs(frames[0][:, 36:] - np.array(navy)).max() < 32
    columns = [np.argwhere(frame[..., 0] > 128)[:, 1].mean() for frame in frames[:9]]
    assert columns[0] + 12 < columns[8]


def test_continuation_keeps_the_first_part_and_follows_the_second_prompt(server, workflow):
    frames = frames_of(server.run(workflow("tiny_continuation")))
    prompt = {"text": "a big yellow circle moves right on a navy background"}
    alone = workflow("tiny_text_to_video", SelfForcingPrompt=prompt, SelfForcingLatent={"frames": 45})
    first = frames_of(server.run(alone))
    assert len(first) == 45
    assert max(abs(a - b.astype(int)).mean() for a, b in zip(first, frames[:45], strict=True)) < 4  # x264's own
    (y0, x0), (y1, x1) = (np.argwhere(frame[..., 0] > 128).mean(0) for frame in (frames[70], frames[78]))
    assert y1 < y0 - 8
    assert abs(x1 - x0) < 4


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
