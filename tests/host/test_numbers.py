"""Numbers that are none, and numbers out of range: refused in a sentence, by the host or by the node, before a run."""

import json
import math
import urllib.error

import pytest

from tests.host.server import running

VALUES = {  # as JSON has them, or Python's and JavaScript's dialects of it
    "NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf, "1e999": "1e999", "text nan": "nan",
    "text inf": "inf", "words": "many", "empty": "", "null": None, "below": "min", "above": "max", "huge": 10**400,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    models = base / "models" / "diffusion_models"
    models.mkdir(parents=True)
    (models / "a.safetensors").touch()  # nothing gets as far as to read it
    with running(comfyui, base) as server:
        yield server


def numbers_of(definition):
    """(input, its options) of each number of a node."""
    for group in ("required", "optional"):
        for name, (kind, *options) in definition["input"].get(group, {}).items():
            if kind in ("INT", "FLOAT"):
                yield name, options[0]


def prompts_of(definitions):
    """(node, number, its options, a prompt with the node as "it"), for each number of our nodes."""
    tiny = {"class_type": "SelfForcingLoadTiny", "inputs": {}}
    words = {"class_type": "SelfForcingPrompt", "inputs": {"clip": ["tiny", 1], "text": "a red circle"}}
    latent = {"class_type": "SelfForcingLatent", "inputs": {
        "width": 64, "height": 64, "frames": 9, "seconds": 0.0, "fps": 16.0, "batch_size": 1}}  # fmt: skip
    wires = {"MODEL": ["tiny", 0], "CLIP": ["tiny", 1], "VAE": ["tiny", 2], "CONDITIONING": ["words", 0],
             "LATENT": ["latent", 0], "IMAGE": ["image", 0]}  # fmt: skip
    image = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}
    around = {"tiny": tiny, "words": words, "latent": latent, "image": image}
    for node, definition in sorted(definitions.items()):
        if not node.startswith("SelfForcing"):
            continue
        for number, options in numbers_of(definition):
            inputs = {}
            for name, (kind, *more) in definition["input"].get("required", {}).items():
                default = more[0].get("default") if more else None
                choices = kind if isinstance(kind, list) else (more[0].get("options") if more else None)
                inputs[name] = wires.get(kind, choices[0] if choices and default is None else default)
            shown = {"class_type": "PreviewAny", "inputs": {"source": ["it", 0]}}
            yield node, number, options, {**around, "it": {"class_type": node, "inputs": inputs}, "show": shown}


def answer_of(server, prompt):
    """The sentences that /prompt refuses a prompt with, or None and the prompt's id."""
    try:
        return None, server.queue(prompt)
    except urllib.error.HTTPError as error:
        told = json.loads(error.read())
        nodes = told.get("node_errors") or {}
        return [e["message"] + " " + e["details"] for node in nodes.values() for e in node["errors"]], None


def test_no_number_that_is_none_or_out_of_range_reaches_a_run(server):
    definitions, seen = server.get("/object_info"), set()
    for node, number, options, prompt in prompts_of(definitions):
        seen.add(node)
        for title, value in VALUES.items():
            value = {"min": options["min"] - 1, "max": options["max"] + 1}.get(value, value)
            prompt["it"]["inputs"][number] = value
            refused, queued = answer_of(server, prompt)
            if queued is None:
                assert refused and any(number in line for line in refused), (node, number, title, refused)
                continue
            status = server.finished(queued)["status"]
            told = dict(status["messages"]).get("execution_error", {})
            assert told.get("exception_type") == "ValueError", (node, number, title, status["messages"])
            assert f"Got {number} {float(value)}; it is a number from" in told["exception_message"]
    assert {"SelfForcingLatent", "SelfForcingSampler", "SelfForcingStream", "SelfForcingSettings"} <= seen


def test_numbers_that_come_by_a_wire_are_checked_too(call, nodes, tiny):
    with pytest.raises(ValueError, match="Got seconds nan; it is a number from 0.0 to 100000.0. Change seconds."):
        call("Latent", 64, 64, 9, math.nan, 16.0, 1)
    with pytest.raises(ValueError, match="Got blend inf"):
        call("NextPrompt", tiny.prompt, tiny.prompt, "4s", "blend", math.inf)
    for name, node in nodes.items():
        assert hasattr(node.execute, "__wrapped__"), name
