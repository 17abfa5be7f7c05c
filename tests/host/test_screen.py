"""Self Forcing Stream's screen, notes and errors in ComfyUI's own frontend, in the classic canvas and in Nodes 2.0."""

import json
import re
import time
from itertools import count

import pytest

from tests.host.browser import browsing, change_setting, complaints, open_workflow, start
from tests.host.server import RUN

NUMBERS = count(1)

# How tests see a screen: the element of the Stream node's widget, in the graph that is shown or in a subgraph.
HELPERS = """
window.streams = () => {
    const all = (graph) => graph.nodes.flatMap((node) => [node, ...(node.subgraph ? all(node.subgraph) : [])]);
    return all(app.rootGraph).filter((node) => node.type === "SelfForcingStream");
};
window.activePath = () => app.extensionManager.workflow.activeWorkflow?.path ?? "";
window.screenOf = () => streams()[0]?.widgets.find((widget) => widget.name === "screen").element;
window.said = () => screenOf()?.innerText ?? "";
window.picture = () => [...(screenOf()?.querySelectorAll("canvas, video") ?? [])].find((e) => e.checkVisibility());
window.film = () => screenOf()?.querySelector("video");
window.colours = () => {
    const shown = picture();
    const copy = document.createElement("canvas");
    [copy.width, copy.height] = [shown?.videoWidth ?? shown?.width ?? 0, shown?.videoHeight ?? shown?.height ?? 0];
    if (!copy.width || !copy.height) return 0;
    const context = copy.getContext("2d");
    context.drawImage(shown, 0, 0);
    return new Set(new Uint32Array(context.getImageData(0, 0, copy.width, copy.height).data.buffer)).size;
};
window.lines = [];
setInterval(() => { const line = said().split("\\n")[0]; if (line && line !== lines.at(-1)) lines.push(line); }, 20);
for (const over of ["success", "error", "interrupted"])
    app.api.addEventListener(`execution_${over}`, () => (window.over = over));
"""


@pytest.fixture(scope="module")
def module_page(comfyui, tmp_path_factory):
    with browsing(comfyui, tmp_path_factory.mktemp("screen")) as page:
        page.add_init_script(
            "const help = () => {" + HELPERS + "}; window.addEventListener('help', help, {once: true})"
        )
        reload(page)
        yield page


@pytest.fixture(params=["classic", "nodes 2.0"])
def page(module_page, request):
    change_setting(module_page, "Comfy.VueNodes.Enabled", request.param != "classic")
    module_page.complaints.clear()
    yield module_page
    assert complaints(module_page) == []


def reload(page) -> None:
    start(page)
    page.evaluate("window.dispatchEvent(new Event('help'))")


def open_stream(page, path: str = "", frames: int = 45, **widgets) -> str:
    """Opens tiny_stream in a new tab, whole in view, with another seed than any before; gives the tab's name."""
    number = next(NUMBERS)
    path = path or f"stream {number}"
    open_workflow(page, "tiny_stream", path)
    widgets = {"seed": 1000 + number, "control_after_generate": "fixed", "file": "video/x", **widgets}
    page.evaluate(
        """([values, frames]) => {
            for (const [name, value] of Object.entries(values))
                for (const widget of streams()[0].widgets) if (widget.name === name) widget.value = value;
            app.graph.nodes.find((n) => n.type === "SelfForcingLatent").widgets.find((w) => w.name === "frames").value =
                frames;
            app.canvas.ds.scale = 0.8;
            app.canvas.ds.offset = [60 - Math.min(...app.graph.nodes.map((n) => n.pos[0])), 120];
            app.canvas.setDirty(true, true);
        }""",
        [widgets, frames],
    )
    page.wait_for_timeout(300)
    return path


def begin(page) -> None:
    page.evaluate("window.over = null; window.lines.length = 0; app.queuePrompt(0, 1)")


def run(page) -> None:
    begin(page)
    page.wait_for_function("window.over", timeout=RUN * 1000)
    assert page.evaluate("window.over") == "success"


def show_tab(page, path: str) -> None:
    page.locator(".workflow-label").filter(has_text=re.compile(rf"^{path}$")).first.click(timeout=10_000)
    page.wait_for_function("(path) => activePath().endsWith(`/${path}.json`)", arg=path, timeout=10_000)
    page.wait_for_timeout(500)


def wait_for_film(page) -> None:
    page.wait_for_function("film()?.readyState >= 2 && picture() === film() && colours() > 20", timeout=60_000)


# --- While it is made ------------------------------------------------------------------------------------------------


def test_the_screen_plays_what_is_made_and_then_the_file(page):
    open_stream(page, frames=161)
    begin(page)
    page.wait_for_function("/frame \\d+ of 161/.test(said())", timeout=RUN * 1000)
    page.wait_for_function("picture() instanceof HTMLCanvasElement && colours() > 20")
    first = page.evaluate("said()")
    page.wait_for_function("(first) => said() !== first", arg=first)
    page.wait_for_function("window.over", timeout=RUN * 1000)
    wait_for_film(page)
    assert re.search(r"video/x_\d+_\.mp4", page.evaluate("said()"))


def test_it_says_what_is_being_done_and_no_rate_before_there_is_one(page):
    open_stream(page, frames=81)
    page.request.post(f"http://127.0.0.1:{page.server.port}/free", data='{"free_memory": true}')
    page.wait_for_timeout(1500)
    run(page)
    lines = page.evaluate("lines")
    before = [line for line in lines if not line.startswith("frame")]
    assert any("loading" in line for line in before), lines
    assert any(re.search(r"chunk 1, step \d of 4", line) for line in before), lines
    assert any("made" in line and "per second" not in line for line in lines), lines
    assert not any(re.search(r"\b0\.0 per second", line) for line in lines)


def test_it_says_text_while_the_prompt_is_read(page):
    """The events that the server sends for a text encoder that takes its time."""
    open_stream(page)
    prompt = page.evaluate("String(app.graph.nodes.find((node) => node.type === 'SelfForcingPrompt').id)")
    running = {prompt: {"state": "running", "value": 0, "max": 1, "node_id": prompt, "display_node_id": prompt}}
    page.evaluate(
        "(detail) => app.api.dispatchCustomEvent('progress_state', detail)",
        {"prompt_id": f"prompt {next(NUMBERS)}", "nodes": running},
    )
    assert page.evaluate("said()").startswith("text")


def test_a_video_without_a_file_plays_again_from_its_frames(page):
    open_stream(page, file="")
    run(page)
    page.wait_for_function("colours() > 20")
    assert page.evaluate("film() === null && picture() instanceof HTMLCanvasElement")


def test_frames_larger_than_a_preview_are_shown_whole(page):
    open_stream(page, frames=9, file="")
    page.evaluate(
        """() => { for (const widget of app.graph.nodes.find((n) => n.type === "SelfForcingLatent").widgets)
            if (widget.name === "width") widget.value = 640; }"""
    )
    run(page)
    page.wait_for_function("picture() instanceof HTMLCanvasElement && picture().width === 640")


def test_a_batch_makes_a_file_of_each_video_and_shows_any(page):
    open_stream(page, frames=21)
    page.evaluate(
        """() => { for (const widget of app.graph.nodes.find((n) => n.type === "SelfForcingLatent").widgets)
            if (widget.name === "batch_size") widget.value = 3; }"""
    )
    run(page)
    wait_for_film(page)
    assert len(re.findall(r"_000\d\d_\.mp4", json.dumps(last_outputs(page)))) == 3
    first = page.evaluate("film().src")
    page.evaluate("screenOf().querySelector('select[title*=batch]').focus()")
    page.keyboard.press("ArrowDown")
    page.wait_for_function("(first) => film().src !== first", arg=first)
    wait_for_film(page)


def last_outputs(page) -> dict:
    history = page.server.get("/history")
    return list(history.values())[-1]["outputs"]


# --- What was made stays ---------------------------------------------------------------------------------------------


def test_a_cached_run_in_a_fresh_page_shows_the_file(page):
    path = open_stream(page)
    run(page)
    name = re.search(r"x_\d+_\.mp4", page.evaluate("said()"))[0]
    page.evaluate("sessionStorage.removeItem('self_forcing.videos'); window.saved = app.graph.serialize()")
    saved = page.evaluate("saved")
    reload(page)
    page.evaluate("([saved, path]) => app.loadGraphData(saved, true, true, path)", [saved, f"{path} again"])
    page.wait_for_timeout(500)
    run(page)
    wait_for_film(page)
    assert name in page.evaluate("said()")


def test_the_video_is_there_after_another_tab_an_undo_and_a_reload(page):
    path = open_stream(page)
    run(page)
    wait_for_film(page)
    other = open_stream(page)
    assert page.evaluate("picture()") is None
    show_tab(page, path)
    wait_for_film(page)
    page.evaluate(
        """async () => {
            const { changeTracker } = app.extensionManager.workflow.activeWorkflow;
            streams()[0].pos[0] += 20;
            changeTracker.captureCanvasState ? changeTracker.captureCanvasState() : changeTracker.checkState();
            window.before = streams()[0];
            await changeTracker.undo();
        }"""
    )
    assert page.evaluate("streams()[0] !== before"), "nothing was undone"
    wait_for_film(page)
    page.wait_for_timeout(1500)  # until the frontend has stored its tabs
    reload(page)
    page.wait_for_function("app.extensionManager.workflow.activeWorkflow?.path", timeout=60_000)
    show_tab(page, path)
    wait_for_film(page)
    show_tab(page, other)
    assert page.evaluate("picture()") is None


def test_a_run_of_one_tab_is_not_shown_in_another(page):
    first = open_stream(page, frames=401)
    other = open_stream(page)
    show_tab(page, first)
    begin(page)
    page.wait_for_function("/frame/.test(said())", timeout=RUN * 1000)
    show_tab(page, other)
    page.wait_for_timeout(1000)
    assert page.evaluate("!window.over"), "the run is over, so that nothing could be shown"
    assert page.evaluate("picture()") is None and "frame" not in page.evaluate("said()")
    show_tab(page, first)
    page.wait_for_function("/frame/.test(said()) && colours() > 20", timeout=RUN * 1000)
    show_tab(page, other)
    page.wait_for_function("window.over", timeout=RUN * 1000)
    page.wait_for_timeout(500)
    assert page.evaluate("picture()") is None
    show_tab(page, first)
    wait_for_film(page)
    show_tab(page, other)
    assert page.evaluate("picture()") is None


def test_cancel_names_the_file_that_it_leaves(page):
    open_stream(page, frames=100_001, keep=81)
    begin(page)
    page.wait_for_function("/frame 1\\d of/.test(said())", timeout=RUN * 1000)
    page.request.post(f"http://127.0.0.1:{page.server.port}/interrupt")
    page.wait_for_function("window.over", timeout=RUN * 1000)
    assert page.evaluate("window.over") == "interrupted"
    wait_for_film(page)
    said = page.evaluate("said()")
    name = re.search(r"x_\d+_\.mp4", said)[0]
    assert re.search(rf"{name}, stopped after \d+ of 100001 frames", said)
    assert name in page.locator(".self-forcing-note").first.inner_text()
    assert re.search(rf"stopped; its first \d+ frames are in \S*{name}", page.server.log.read_text())
    deadline = time.monotonic() + 10
    while name not in json.dumps(last_outputs(page)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert name in json.dumps(last_outputs(page))


# --- In the canvas ---------------------------------------------------------------------------------------------------


def test_the_properties_panel_leaves_the_screen_alone(page):
    open_stream(page)
    change_setting(page, "Comfy.RightSidePanel.IsOpen", True)
    page.wait_for_timeout(500)
    try:
        width = "screenOf().getBoundingClientRect().width / app.canvas.ds.scale"
        before = page.evaluate(width)
        page.evaluate("app.canvas.selectItems(streams())")
        page.wait_for_timeout(1000)
        page.evaluate("app.canvas.setDirty(true, true)")
        page.wait_for_timeout(300)
        panel = page.locator("[data-testid=properties-panel]")
        assert "denoise" in panel.inner_text(), "the panel does not show the node"
        assert "screen" not in panel.inner_text().split()
        assert abs(page.evaluate(width) - before) < 2
    finally:
        change_setting(page, "Comfy.RightSidePanel.IsOpen", False)
        page.evaluate("app.canvas.deselectAll()")


@pytest.mark.parametrize("scale", [0.45, 0.2])
def test_the_screen_is_there_however_small(page, scale):
    open_stream(page)
    run(page)
    wait_for_film(page)
    page.evaluate("(scale) => { app.canvas.ds.scale = scale; app.canvas.setDirty(true, true); }", scale)
    page.wait_for_timeout(800)
    assert page.evaluate("picture()?.getBoundingClientRect().width > 20")
    assert page.evaluate("colours() > 20")


def test_wheel_and_middle_drag_over_the_screen_move_the_canvas(page):
    open_stream(page)
    run(page)
    box = page.evaluate(
        "(() => { const b = screenOf().getBoundingClientRect(); return [b.x + b.width / 2, b.y + 60]; })()"
    )
    scale, offset = page.evaluate("[app.canvas.ds.scale, [...app.canvas.ds.offset]]")
    page.mouse.move(*box)
    page.mouse.wheel(0, -100)
    page.wait_for_timeout(300)
    assert page.evaluate("app.canvas.ds.scale") > scale
    page.evaluate(
        "(s) => { app.canvas.ds.scale = s[0]; app.canvas.ds.offset = s[1]; app.canvas.setDirty(true, true); }",
        [scale, offset],
    )
    page.wait_for_timeout(300)
    page.mouse.down(button="middle")
    page.mouse.move(box[0] + 60, box[1] + 40, steps=5)
    page.mouse.up(button="middle")
    page.wait_for_timeout(300)
    x, y = page.evaluate("[...app.canvas.ds.offset]")
    assert x == pytest.approx(offset[0] + 60 / scale, abs=8) and y == pytest.approx(offset[1] + 40 / scale, abs=8)
    assert page.evaluate("!film()?.paused"), "the middle button has paused it"


def test_in_a_subgraph_the_screen_is_on_the_outside(page):
    open_stream(page, frames=81)
    page.evaluate(
        """async () => {
            app.graph.convertToSubgraph(new Set(streams()));
            await app.loadGraphData(app.graph.serialize(), true, true, "again " + Math.random());
            app.canvas.setDirty(true, true);
        }"""
    )
    page.wait_for_timeout(800)
    begin(page)
    page.wait_for_function("/frame/.test(said()) && picture()", timeout=RUN * 1000)
    page.wait_for_function("window.over", timeout=RUN * 1000)
    wait_for_film(page)
    outside = page.evaluate(
        "(() => { const n = app.graph.nodes.find((n) => n.subgraph); return [...n.pos, ...n.size]; })()"
    )
    left, top = page.evaluate(
        """(() => { const b = picture().getBoundingClientRect(), c = app.canvas.canvas.getBoundingClientRect();
            return app.canvas.convertCanvasToOffset([b.x - c.x, b.y - c.y]); })()"""
    )
    assert outside[0] - 5 < left < outside[0] + outside[2] and outside[1] < top < outside[1] + outside[3] + 200
    page.evaluate("app.canvas.setGraph(app.graph.nodes.find((node) => node.subgraph).subgraph)")
    page.wait_for_timeout(800)
    assert page.evaluate("said()")
    page.evaluate("app.canvas.setGraph(app.rootGraph)")


# --- The player ------------------------------------------------------------------------------------------------------


def test_the_player_works_from_the_keyboard(page):
    open_stream(page)
    run(page)
    wait_for_film(page)
    nodes = page.evaluate("app.graph.nodes.length")
    page.evaluate("screenOf().focus()")
    page.keyboard.press(" ")
    page.wait_for_function("film().paused && screenOf().querySelector('.sign').checkVisibility()")
    page.keyboard.press("Home")
    page.wait_for_function("film().currentTime === 0")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("Math.abs(film().currentTime - 1 / 16) < 1e-3")
    page.keyboard.press("End")
    page.wait_for_function("film().currentTime > 2.5")
    page.keyboard.press(" ")
    page.wait_for_function("!film().paused")
    page.evaluate("screenOf().querySelector('select[title=Speed]').focus()")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("film().playbackRate") == 2
    page.evaluate("screenOf().focus()")
    page.keyboard.press("f")
    page.wait_for_function("document.fullscreenElement === screenOf()")
    page.keyboard.press("f")
    page.wait_for_function("!document.fullscreenElement")
    assert page.evaluate("app.graph.nodes.length") == nodes


def test_video_and_frame_can_be_saved(page):
    open_stream(page)
    run(page)
    wait_for_film(page)
    with page.expect_download() as video:
        page.evaluate("screenOf().querySelector('[title=\"Save video\"]').click()")
    assert re.fullmatch(r"x_\d+_\.mp4", video.value.suggested_filename)
    with page.expect_download() as frame:
        page.evaluate("screenOf().querySelector('[title=\"Save frame\"]').click()")
    assert frame.value.suggested_filename.endswith(".png")
    from PIL import Image

    assert Image.open(frame.value.path()).size == (64, 64)
    menu = page.evaluate("app.canvas.getNodeMenuOptions(streams()[0]).map((entry) => entry?.content)")
    assert {"Open Video", "Save Video", "Save Frame"} <= set(menu)


def test_out_of_sight_nothing_is_decoded(page):
    open_stream(page)
    run(page)
    wait_for_film(page)
    page.evaluate("app.canvas.ds.offset[0] += 5000; app.canvas.setDirty(true, true)")
    page.wait_for_function("film().paused")
    page.evaluate("app.canvas.ds.offset[0] -= 5000; app.canvas.setDirty(true, true)")
    page.wait_for_function("!film().paused")


# --- Seeds, notes, errors --------------------------------------------------------------------------------------------


def test_a_dropped_file_of_seed_minus_one_brings_the_seed_it_was_made_with(page):
    open_stream(page, seed=-1)
    run(page)
    wait_for_film(page)
    name, seed = re.search(r"(x_\d+_\.mp4), seed (\d+)", page.evaluate("said()")).groups()
    assert f"seed {seed}" in page.locator(".self-forcing-note").first.inner_text()
    page.evaluate(
        """async (name) => {
            const file = await (await fetch(`/api/view?filename=${name}&subfolder=video&type=output`)).blob();
            await app.handleFile(new File([file], name, { type: "video/mp4" }));
        }""",
        name,
    )
    page.wait_for_timeout(500)
    assert page.evaluate("streams()[0].widgets.find((widget) => widget.name === 'seed').value") == int(seed)


def test_long_notes_take_one_line_and_are_read_on_demand(page):
    """Notes of a chunk that the model was not trained with, and of a seed: two lines, the first one long."""
    open_stream(page, seed=-1, chunk=1, frames=9)
    size = "app.canvas.graph.nodes.map((node) => [...node.size])"
    before = page.evaluate(size)
    run(page)
    note = page.locator(".self-forcing-note").first
    assert note.inner_text().startswith("2 notes: chunk 1, but this model")
    box = note.bounding_box()
    assert box["height"] < 30 * page.evaluate("app.canvas.ds.scale")
    page.wait_for_timeout(500)
    grown = [b[1] - a[1] for a, b in zip(before, page.evaluate(size), strict=True)]
    assert max(grown) <= 32, "one line, and not as many as there is text"
    note.click()
    whole = page.locator(".self-forcing-notes")
    assert "frames flicker" in whole.inner_text() and "seed" in whole.inner_text()
    page.keyboard.press("Escape")
    page.wait_for_function("!document.querySelector('.self-forcing-notes')")


def test_an_error_reads_as_its_message(page, comfyui):
    """A checkpoint of another model, whose error is a class of our own."""
    import torch
    from safetensors.torch import save_file

    folder = page.server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4)}, folder / "other.safetensors")
    inputs = {"file": "other.safetensors", "family": "auto", "precision": "auto"}
    saved = {"1": {"class_type": "SelfForcingLoadModel", "inputs": inputs}}
    saved["2"] = {"class_type": "ModelSave", "inputs": {"model": ["1", 0], "filename_prefix": "x"}}
    entry = page.server.finished(page.server.queue(saved))
    error = dict(entry["status"]["messages"])["execution_error"]
    assert error["exception_type"] == "ValueError"
    assert error["exception_message"].startswith("Got ")
    page.evaluate("(saved) => app.loadApiJson(saved, 'error')", saved)
    begin(page)
    page.wait_for_function("window.over === 'error'", timeout=RUN * 1000)
    page.wait_for_timeout(800)
    shown = page.evaluate("document.body.innerText")
    assert "tensorfiles" not in shown and "CheckpointError" not in shown
    page.complaints.clear()
