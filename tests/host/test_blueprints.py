"""Blueprints of the pack: listed by the host, found by search in the frontend, one node that makes a video."""

import json
import time

import numpy as np
import pytest

from tests.host.server import PACK, ROOT, RUN, SIZE, with_built_in_model
from tests.host.test_browser import complaints, page  # noqa: F401  fixture

BLUEPRINTS = sorted(path.stem for path in (ROOT / "subgraphs").glob("*.json"))
INPUTS = {
    "Text to Video (Self Forcing)": {"prompt", "width", "height", "frames", "model", "text_encoder", "vae"},
    "Image to Video (Self Forcing)": {"prompt", "width", "height", "frames", "model", "text_encoder", "vae", "image"},
    "Continue Video (Self Forcing)": {"prompt", "width", "height", "frames", "model", "text_encoder", "vae", "images"},
    "Long Story (Self Forcing)": {
        "story", "width", "height", "seconds", "file", "model", "lora", "text_encoder", "taehv",
    },
}  # fmt: skip


def get(page, path: str):  # noqa: F811
    return page.request.get(page.url.rstrip("/").partition("?")[0].rstrip("/") + path).json()


def saved(name: str) -> dict:
    return json.loads((ROOT / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_four_are_there():
    assert set(BLUEPRINTS) == set(INPUTS)


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_is_one_node_whose_links_and_files_are_whole(nodes, name):
    (outer,), (inner,) = saved(name)["nodes"], saved(name)["definitions"]["subgraphs"]
    assert outer["type"] == inner["id"] and inner["name"] == name and inner["description"] and inner["category"]
    assert {slot["name"] for slot in outer["inputs"]} == {slot["name"] for slot in inner["inputs"]} == INPUTS[name]
    by_id = {node["id"]: node for node in inner["nodes"]}
    for link in inner["links"]:
        source = inner["inputs"] if link["origin_id"] == -10 else by_id[link["origin_id"]]["outputs"]
        target = inner["outputs"] if link["target_id"] == -20 else by_id[link["target_id"]]["inputs"]
        ends = source[link["origin_slot"]], target[link["target_slot"]]
        assert all(end["type"] == link["type"] for end in ends)
    for node in inner["nodes"]:
        if node["type"] in nodes:  # ours: every input has its slot, and every widget its value
            schema = nodes[node["type"]].GET_SCHEMA()
            assert {slot["name"] for slot in node["inputs"]} == {slot.id for slot in schema.inputs}
        for model in node["properties"].get("models", []):
            assert model["name"] in node["widgets_values"] and model["url"].endswith(model["name"])
    loaders = {"SelfForcingLoadModel", "CLIPLoader", "VAELoader"}
    assert all(node["properties"].get("models") for node in inner["nodes"] if node["type"] in loaders)


def test_the_host_lists_them(page):  # noqa: F811
    listed = get(page, "/global_subgraphs")
    ours = {entry["name"]: key for key, entry in listed.items() if entry["info"]["node_pack"] == f"custom_nodes.{PACK}"}
    assert set(ours) == set(BLUEPRINTS)
    for name, key in ours.items():
        assert json.loads(get(page, f"/global_subgraphs/{key}")["data"]) == saved(name)


def add_by_search(page, name: str) -> None:  # noqa: F811
    """As a user does: a double click on the empty canvas, some words, Enter, and a click where the node is to be."""
    page.evaluate("app.graph.clear()")
    page.keyboard.press("Escape")
    page.mouse.dblclick(800, 600)
    page.wait_for_timeout(500)
    page.keyboard.type(name, delay=10)
    page.wait_for_timeout(1000)
    page.keyboard.press("Enter")
    page.wait_for_function("app.graph.nodes.some((node) => node.subgraph)", timeout=20_000)
    page.mouse.click(500, 200)
    page.wait_for_timeout(300)


def runnable(prompt: dict, name: str, frames: int) -> dict:
    """What the frontend would send, with the built-in model in place of files, an image, and a place to save."""
    prompt = with_built_in_model(prompt)
    prompt["image"] = {"class_type": "EmptyImage", "inputs": {**SIZE, "batch_size": 5, "color": 988242}}
    for node in list(prompt.values()):
        if node["class_type"] == "ImageScale":
            node["inputs"]["image"] = ["image", 0]
        if node["class_type"] == "SelfForcingLatent":
            node["inputs"] |= {"frames": frames, "seconds": 0.0}
    for number, node in list(prompt.items()):
        if node["class_type"] == "CreateVideo":  # two blueprints may make the same video: the file tells them apart
            inputs = {"video": [number, 0], "filename_prefix": name.split()[0], "format": "auto", "codec": "auto"}
            prompt["save"] = {"class_type": "SaveVideo", "inputs": inputs}
    return prompt


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_is_found_by_search_and_makes_a_video(page, name, tmp_path):  # noqa: F811
    import av

    page.complaints.clear()
    add_by_search(page, name)
    node = page.evaluate(
        """() => { const node = app.graph.nodes.find((node) => node.subgraph);
        return {title: node.title, inputs: node.inputs.map((slot) => slot.name), outputs: node.outputs.length,
                widgets: node.widgets.map((widget) => widget.name)}; }"""
    )
    assert node["title"] == name and set(node["inputs"]) == INPUTS[name] and node["outputs"]
    assert "seed" in node["widgets"]
    length = 657 if "Story" in name else 21  # a story's last prompt begins after 40 s
    prompt = page.evaluate("app.graphToPrompt().then((made) => made.output)")
    host = page.url.partition("?")[0].rstrip("/")
    answer = page.request.post(f"{host}/prompt", data={"prompt": runnable(prompt, name, length)}).json()
    assert "prompt_id" in answer, answer
    until = time.monotonic() + RUN
    while not (entry := get(page, f"/history/{answer['prompt_id']}").get(answer["prompt_id"])):
        assert time.monotonic() < until
        time.sleep(0.2)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1][1].get("exception_message")
    files = [file for output in entry["outputs"].values() for shown in output.values() for file in shown]
    videos = [file for file in files if isinstance(file, dict) and file.get("filename", "").endswith(".mp4")]
    assert len(videos) == 1, entry["outputs"]
    (file,) = videos
    query = f"filename={file['filename']}&subfolder={file['subfolder']}&type=output"
    (tmp_path / "made.mp4").write_bytes(page.request.get(f"{host}/view?{query}").body())
    with av.open(str(tmp_path / "made.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == length and frames[0].shape == (64, 64, 3) and np.ptp(frames[-1]) > 50
    assert complaints(page) == []
