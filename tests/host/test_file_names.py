"""What *file* of Self Forcing Stream may say: the replacements of stock save nodes, and names that are refused."""

import json
import re
import time
import urllib.error

import pytest

from tests.host.server import running
from tests.host.test_stream_survives import frames_in, stream_prompt


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    with running(comfyui, tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@pytest.fixture(scope="module")
def names(pack):
    from any_folder_name.nodes.host import file_names

    return file_names


def short(file: str) -> dict:
    prompt = stream_prompt(file)
    prompt["3"]["inputs"]["frames"] = 9
    prompt["4"]["_meta"] = {"title": "My stream"}
    return prompt


def saved(server, prompt: dict, extra: dict | None = None) -> str:
    """Path, in the output folder, of the one video that a prompt saves."""
    body = {"prompt": prompt, **({"extra_data": {"extra_pnginfo": extra}} if extra else {})}
    entry = server.finished(json.loads(server.request("/prompt", body))["prompt_id"])
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    ((file,),) = [output["video"] for output in entry["outputs"].values()]
    assert frames_in(server.base / "output" / file["subfolder"] / file["filename"]) == 9
    return f"{file['subfolder']}/{file['filename']}"


def test_placeholders_are_filled_in_as_in_stock_names(server):
    before = time.strftime("%Y-%m-%d")
    name = saved(server, short("%date:yyyy-MM-dd%/%year%_%width%x%height%_%SelfForcingStream.seed%_%My stream.fps%"))
    assert name == f"{before}/{before[:4]}_64x64_0_16_00001_.mp4" or time.strftime("%Y-%m-%d") != before
    assert saved(server, short("%SelfForcingPrompt.text%")) == "/a red circle bounces_00001_.mp4"
    again = short("%SelfForcingPrompt.text%")
    again["4"]["inputs"]["seed"] = 1
    assert saved(server, again) == "/a red circle bounces_00002_.mp4"


def test_a_node_is_found_by_the_name_it_has_in_the_workflow(server):
    nodes = [
        {"id": 2, "type": "SelfForcingPrompt", "title": "Words", "properties": {"Node name for S&R": "story"}},
        {"id": 4, "type": "SelfForcingStream", "title": "story", "properties": {}},
    ]
    assert saved(server, short("x/%story.text%"), {"workflow": {"nodes": nodes}}).startswith("x/a red circle")
    assert saved(server, short("x/%Words.text%"), {"workflow": {"nodes": nodes}}).startswith("x/a red circle")


def test_what_is_unknown_is_told_and_stays(server):
    assert saved(server, short("y/%nothing%_%KSampler.seed%")) == "y/%nothing%_%KSampler.seed%_00001_.mp4"
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert "file has %nothing%, %KSampler.seed%, which stands for nothing here" in log


@pytest.mark.parametrize("file", ["../x", "a/../../x", "/tmp/x", "..\\x", "D:\\video\\x", "C:x", ".", "x/..", "a\0b"])
def test_a_name_outside_the_output_folder_is_refused_before_anything_runs(server, file):
    with pytest.raises(urllib.error.HTTPError) as error:
        server.queue(short(file))
    answer = error.value.read().decode()
    assert error.value.code == 400 and re.search("outside ComfyUI's output folder|names no file", answer), answer


def test_what_a_placeholder_brings_cannot_lead_out(server):
    prompt = short("%date:../../..%/x")
    assert "outside ComfyUI's output folder" in server.error_of(prompt)
    prompt = short("z/%SelfForcingPrompt.text%")
    prompt["2"]["inputs"]["text"] = "../../a red circle: moves"
    assert saved(server, prompt) == "z/.._.._a red circle_ moves_00001_.mp4"


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("n" * 300, "name of 311 bytes.*255 are allowed"),
        ("d" * 300 + "/x", "folder cannot be made"),
        ("\u00e9" * 200, "name of 411 bytes"),
        ("taken_00001_.mp4/x", "folder cannot be made"),
    ],
)
def test_a_name_that_no_disk_holds_is_refused_in_a_sentence(server, file, words):
    if file.startswith("taken"):
        saved(server, short("taken"))
    assert re.search(words, server.error_of(short(file)))


def test_a_backslash_is_a_folder_as_in_workflows_from_windows(server):
    assert saved(server, short("win\\clip")) == "win/clip_00001_.mp4"


# --- The parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("yyyy-MM-dd", "2026-03-07"),
        ("yy.M.d", "26.3.7"),
        ("hhmmss", "090502"),
        ("h-m-s", "9-5-2"),
        ("yyy", "yyy"),
        ("yyyy/MM", "2026/03"),
        ("", ""),
    ],
)
def test_dates_are_written_as_the_frontend_writes_them(names, form, text):
    now = time.struct_time((2026, 3, 7, 9, 5, 2, 5, 66, 0))
    assert names.format_date(form, now) == text


def test_widgets_are_written_as_the_frontend_writes_them(names):
    inputs = {"on": True, "whole": 16.0, "part": 0.5, "text": 'a/b:"c"\n', "wired": ["9", 0], "model": ["8", 0]}
    prompt = {
        "7": {"class_type": "Node", "inputs": inputs},
        "8": {"class_type": "Loader", "inputs": {"name": "x"}},
        "9": {"class_type": "PrimitiveInt", "inputs": {"value": 12}},
    }
    name = "%Node.on% %Node.whole% %Node.part% %Node.text% %Node.wired% %Node.model%"
    filled, unknown = names.fill_placeholders(name, prompt, None)
    assert filled == "true 16 0.5 a_b__c__ 12 %Node.model%" and unknown == ["%Node.model%"]


def test_a_node_inside_a_subgraph_is_found(names):
    inner = {"id": 5, "type": "KSampler", "title": "Inside", "properties": {"Node name for S&R": "KSampler"}}
    workflow = {
        "nodes": [{"id": 3, "type": "uuid"}],
        "definitions": {"subgraphs": [{"id": "uuid", "nodes": [inner]}]},
    }
    prompt = {"3:5": {"class_type": "KSampler", "inputs": {"seed": 42}}}
    assert names.fill_placeholders("%Inside.seed%", prompt, workflow) == ("42", [])


@pytest.mark.parametrize("workflow", [None, {}, {"nodes": [{}]}, {"nodes": [{"properties": []}], "definitions": None}])
def test_odd_workflows_are_passed_over(names, workflow):
    assert names.fill_placeholders("100%_%a.b%", {"1": {}}, workflow) == ("100%_%a.b%", ["%_%"])


def test_a_subgraph_that_holds_itself_ends(names):
    itself = [{"id": 1, "type": "s"}]
    workflow = {"nodes": itself, "definitions": {"subgraphs": [{"id": "s", "nodes": itself}]}}
    assert names.fill_placeholders("%a.b%", {}, workflow) == ("%a.b%", ["%a.b%"])
