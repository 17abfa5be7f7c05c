"""Templates as a new user meets them, in the classic canvas and in Nodes 2.0: laid out, found, with their files."""

import json
import shutil
from itertools import combinations

import pytest

from tests.host.server import PACK, TEMPLATES, WORKFLOWS, running, template

SIZE = {"width": 1366, "height": 768}  # the smallest usual screen
TEXT_IS_DRAWN = 8 / 14  # zoom below which the classic canvas leaves texts out
# What the frontend says where a file is missing, or an address outside cannot be reached, as in these tests.
EXPECTED = ("404", "huggingface.co", "Content Security Policy", "favicon", "before initialization")
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.45.20",
    "Comfy.Notification.ShowVersionUpdates": False,
}
MODES = {"classic": False, "nodes 2.0": True}
LOADERS = {  # of files: input, and the folders that its list is made of
    "SelfForcingLoadModel": {"file": ["diffusion_models"], "lora": ["loras"]},
    "SelfForcingLoadTAEHV": {"file": ["vae_approx", "vae"]},
    "CLIPLoader": {"clip_name": ["text_encoders"]},
    "VAELoader": {"vae_name": ["vae"]},
    "UpscaleModelLoader": {"model_name": ["upscale_models"]},
    "FrameInterpolationModelLoader": {"model_name": ["frame_interpolation"]},
}
# Rectangles [x, y, width, height] of the graph; a node's has its title. What a DOM text needs and what it gets.
MEASURE = """() => {
    const canvas = app.canvas, {scale, offset} = canvas.ds, box = canvas.canvas.getBoundingClientRect();
    const rectangle = (node) => {
        const shown = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
        if (!shown) return [...node.getBounding()];
        const at = [(shown.left - box.left) / scale - offset[0], (shown.top - box.top) / scale - offset[1]];
        return [...at, shown.width / scale, shown.height / scale];
    };
    const texts = (node) => {
        const shown = document.querySelector(`[data-node-id="${node.id}"]`);
        const elements = shown ? [...shown.querySelectorAll("textarea, .comfy-markdown-content")]
            : (node.widgets ?? []).map((widget) => widget.element?.querySelector?.(".tiptap") ?? widget.element);
        return elements.filter((e) => e?.clientHeight).map((e) => [e.scrollHeight, e.clientHeight]);
    };
    const nodes = app.graph._nodes;
    const start = (link) => [...app.graph.getNodeById(link.origin_id).getOutputPos(link.origin_slot)];
    return {
        scale, view: [-offset[0], -offset[1], box.width / scale, box.height / scale],
        nodes: nodes.map((node) => ({
            id: node.id, type: node.type, rectangle: rectangle(node), texts: texts(node),
            known: Boolean(LiteGraph.registered_node_types[node.type]),
        })),
        groups: app.graph._groups.map((group) => [...group._bounding]),
        starts: [...app.graph._links.values()].map((link) => ({node: link.origin_id, at: start(link)})),
    };
}"""


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    with running(comfyui, tmp_path_factory.mktemp("templates")) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium found")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, headless=True, args=quiet)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=MODES)
def page(request, server, browser):
    """The frontend in one of its two modes; `complaints` are the errors it has printed."""
    address = f"http://127.0.0.1:{server.port}"
    page = browser.new_page(viewport=SIZE)
    page.route(lambda url: url.startswith("http") and not url.startswith(address), lambda route: route.abort())
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.complaints.append(message.text))
    for name, value in {**SETTINGS, "Comfy.VueNodes.Enabled": MODES[request.param]}.items():
        page.request.post(f"{address}/api/settings/{name}", data=json.dumps(value))
    page.goto(address, wait_until="domcontentloaded")
    page.wait_for_function(
        "window.app?.graph && Object.keys(LiteGraph.registered_node_types).length > 50", timeout=120_000
    )
    page.wait_for_timeout(1500)
    yield page
    page.close()


def open_template(page, name: str) -> dict:
    """Opens a template as the template browser does, and measures it once it stands still."""
    page.complaints.clear()
    page.evaluate(
        "([text, name]) => app.loadGraphData(JSON.parse(text), true, true, name, {openSource: 'template'})",
        [template(name).read_text(encoding="utf-8"), name],
    )
    before, now = None, page.evaluate(MEASURE)
    for _ in range(20):
        if before == now:
            break
        page.wait_for_timeout(400)
        before, now = now, page.evaluate(MEASURE)
    return now


def overlap(a: list[float], b: list[float]) -> bool:
    return all(a[i] + 1 < b[i] + b[i + 2] and b[i] + 1 < a[i] + a[i + 2] for i in (0, 1))


def within(inner: list[float], outer: list[float]) -> bool:
    return all(outer[i] <= inner[i] + 1 and inner[i] + inner[i + 2] <= outer[i] + outer[i + 2] + 1 for i in (0, 1))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_template_opens_whole_laid_out_and_legible(page, name):
    shown = open_template(page, name)
    nodes = shown["nodes"]
    assert all(node["known"] for node in nodes)
    assert shown["scale"] > TEXT_IS_DRAWN
    for node in nodes:
        assert within(node["rectangle"], shown["view"]), node
        if node["type"] in ("MarkdownNote", "SelfForcingPrompt"):
            assert all(needed <= there + 1 for needed, there in node["texts"]), node
        touched = [group for group in shown["groups"] if overlap(node["rectangle"], group)]
        assert len(touched) == (node["type"] != "MarkdownNote"), node
        assert all(within(node["rectangle"], group) for group in touched), node
    for a, b in combinations(nodes, 2):
        assert not overlap(a["rectangle"], b["rectangle"]), (a, b)
    for a, b in combinations(shown["groups"], 2):
        assert not overlap(a, b)
    for start in shown["starts"]:
        covering = [node for node in nodes if within([*start["at"], 0, 0], node["rectangle"])]
        assert [node["id"] for node in covering] in ([], [start["node"]]), start
    assert [text for text in page.complaints if not any(part in text for part in EXPECTED)] == []


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if "_wan_" in name])
def test_every_file_of_a_template_is_offered_with_its_folder(page, server, name):
    open_template(page, name)
    wanted = {}
    for node in json.loads(template(name).read_text(encoding="utf-8"))["nodes"]:
        models = {model["name"]: model for model in node.get("properties", {}).get("models", [])}
        for folders in LOADERS.get(node["type"], {}).values():
            for model in models.values():
                if model["directory"] in folders:
                    assert model["url"].startswith("https://huggingface.co/")
                    assert model["url"].endswith("/" + model["name"])
                    assert model["name"] in node["widgets_values"]
                    wanted[model["name"]] = model["directory"]
        assert bool(models) == (node["type"] in LOADERS), node["type"]
    page.get_by_role("button", name="Show missing models").or_(page.get_by_role("button", name="See Errors")).click()
    for file, folder in wanted.items():
        page.locator(f'[title="{file}"]').first.wait_for(state="attached", timeout=10_000)
        assert page.get_by_text(folder).count()
    page.keyboard.press("Escape")


@pytest.mark.parametrize(
    ("words", "node"),
    [("wan", "Self Forcing"), ("long video", "Self Forcing"), ("self forcing", "Self Forcing Stream")],
)
def test_nodes_are_found_by_what_one_looks_for(page, words, node):
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.wait_for_timeout(500)
    page.keyboard.type(words)
    page.get_by_text(node).first.wait_for(timeout=10_000)
    page.keyboard.press("Escape")
    page.wait_for_timeout(300)


def test_the_first_template_is_the_one_to_begin_with_and_the_rest_are_in_order(server):
    served = sorted(server.get("/workflow_templates")[PACK])
    assert served == WORKFLOWS
    assert "start_here" in served[0] and "tiny" in served[0]
    assert [name.split("_")[2] for name in served] == [f"{number:02}" for number in range(1, len(served) + 1)]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_length_that_counts_is_shown_and_one_frame_rate_goes_everywhere(path):
    saved = json.loads(path.read_text(encoding="utf-8"))
    kinds = {node["id"]: node["type"] for node in saved["nodes"]}
    for node in saved["nodes"]:
        if node["type"] == "SelfForcingLatent":
            assert node["widgets_values"][3] == 0, "seconds would take the place of length"
        for slot in node["inputs"]:
            if slot["name"] == "fps":
                (source,) = [link[1] for link in saved["links"] if link[0] == slot["link"]]
                assert kinds[source] in ("PrimitiveFloat", "ComfyMathExpression")
    assert list(kinds.values()).count("PrimitiveFloat") == 1


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_app_mode_knows_inputs_and_outputs(path):
    saved = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in saved["nodes"]}
    app = saved["extra"]["linearData"]
    for node, widget in app["inputs"]:
        assert widget in [slot["name"] for slot in nodes[node]["inputs"] if slot.get("widget") and slot["link"] is None]
    assert [nodes[node]["type"] for node in app["outputs"]] in (["SaveVideo"], ["SelfForcingStream"])
