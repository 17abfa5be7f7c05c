"""A ComfyUI server of its own, with this pack among its custom nodes, driven the way a user's browser drives it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACK = "self-forcing-under-test"
SIZE = {"width": 64, "height": 64}
WORDS = ["a big red star orbits on a navy background", "a big red star moves right on a navy background"]
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
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
            "--disable-auto-launch", "--disable-api-nodes", "--cache-classic", *other_frontend(),
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
        shown = [output.get("images", output.get("video", [])) for output in entry["outputs"].values()]
        saved = [file for files in shown for file in files]
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


def other_frontend() -> list[str]:
    """What has ComfyUI serve the frontend in the folder $COMFYUI_FRONTEND, rather than the one it is installed with."""
    folder = os.environ.get("COMFYUI_FRONTEND")
    if not folder:
        return []
    if not (Path(folder) / "index.html").is_file():
        raise FileNotFoundError(f"COMFYUI_FRONTEND is {folder}, which has no index.html: name a wheel's static folder")
    return ["--front-end-root", str(Path(folder).resolve())]


@contextmanager
def running(comfyui: Path, base: Path) -> Iterator[Server]:
    """A server whose files, this pack among them, are in `base`."""
    copied = shutil.ignore_patterns(".*", "__pycache__", "runs", "tests", "benchmarks")
    shutil.copytree(ROOT, base / "custom_nodes" / PACK, ignore=copied)
    server = Server(comfyui, base)
    try:
        server.wait_until_up()
        yield server
    finally:
        server.stop()


def load_prompt(name: str, definitions: dict, **changes) -> dict:
    """A workflow as /prompt takes it, with inputs changed: load_prompt("name", ..., SelfForcingSampler={"seed": 1}).

    Where it is for files that a user has, the built-in model takes their place.
    """
    saved = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    prompt = to_prompt(saved, definitions)
    if any(node["class_type"] == "SelfForcingLoadModel" for node in prompt.values()):
        prompt = with_built_in_model(prompt)
    for node in prompt.values():
        node["inputs"].update(changes.get(node["class_type"], {}))
    return prompt


def with_built_in_model(prompt: dict) -> dict:
    """A prompt whose loaders of files are Load Tiny Self Forcing, at its size and in its words, and images plain."""
    outputs = {"SelfForcingLoadModel": 0, "CLIPLoader": 1, "SelfForcingLoadTAEHV": 2, "VAELoader": 2}
    loaders = {name: outputs[node["class_type"]] for name, node in prompt.items() if node["class_type"] in outputs}
    changed = {"tiny": {"class_type": "SelfForcingLoadTiny", "inputs": {}}}
    for name, node in prompt.items():
        if name not in loaders:
            inputs = {
                key: ["tiny", loaders[value[0]]] if isinstance(value, list) and value[0] in loaders else value
                for key, value in node["inputs"].items()
            }
            changed[name] = {**node, "inputs": inputs}
            if node["class_type"] == "LoadImage":
                changed[name] = {"class_type": "EmptyImage", "inputs": {**SIZE, "batch_size": 1, "color": 988242}}
    for node in changed.values():
        inputs = node["inputs"]
        if node["class_type"] == "SelfForcingPrompt":
            times = [line.partition(":")[0] for line in inputs["text"].splitlines() if re.match(r"[\d.]+s?:", line)]
            inputs["text"] = "\n".join(f"{time}: {word}" for time, word in zip(times, cycle(WORDS))) or WORDS[0]
        if node["class_type"] in ("SelfForcingLatent", "ImageScale"):
            inputs |= SIZE
    return changed


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
    """Widget name -> value. Values are saved by position; what becomes of a seed stands after it."""
    values, named = iter(node.get("widgets_values") or []), {}
    specs = {**definition["input"].get("required", {}), **definition["input"].get("optional", {})}
    for slot in node["inputs"]:
        if "widget" in slot:
            named[slot["name"]] = next(values)
            options = specs[slot["name"]][1] if len(specs[slot["name"]]) > 1 else {}
            if options.get("control_after_generate") or options.get("image_upload"):
                next(values)
    assert not list(values), f"{node['type']} has more values than widgets"
    return named


def frames_of(files: list[Path]) -> list:
    """The frames of the one video that was saved, as arrays [H, W, 3]."""
    import av

    (path,) = files
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
