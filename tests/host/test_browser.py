"""The pack in ComfyUI's own frontend: workflows open whole, the live screen plays. Needs playwright and Chromium."""

import shutil

import pytest

from tests.host.server import WORKFLOWS, running, template

STOCK = ("404", "huggingface.co", "before initialization", "favicon")  # what the frontend says without this pack, too


@pytest.fixture(scope="module")
def page(comfyui, tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium found")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with running(comfyui, tmp_path_factory.mktemp("browser")) as server, playwright.sync_playwright() as driver:
        host = f"127.0.0.1:{server.port}"
        browser = driver.chromium.launch(executable_path=chromium, headless=True, args=quiet)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.route(lambda url: url.startswith("http") and host not in url, lambda route: route.abort())
        page.complaints = []
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("console", lambda message: message.type == "error" and page.complaints.append(message.text))
        settings = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": False}
        for name, value in settings.items():
            page.request.post(f"http://{host}/api/settings/{name}", data="true" if value else "false")
        page.goto(f"http://{host}", wait_until="domcontentloaded")
        page.wait_for_function(
            "window.app?.graph && Object.keys(LiteGraph.registered_node_types).length > 50", timeout=120_000
        )
        page.wait_for_timeout(1500)
        page.complaints.clear()
        yield page
        browser.close()


def open_workflow(page, name: str) -> list[str]:
    """Loads a workflow and gives the types that the frontend does not know."""
    workflow = template(name).read_text(encoding="utf-8")
    return page.evaluate(
        """async (text) => {
            await app.loadGraphData(JSON.parse(text), true, true, "test");
            return app.graph._nodes.map((node) => node.type).filter((type) => !LiteGraph.registered_node_types[type]);
        }""",
        workflow,
    )


def complaints(page) -> list[str]:
    return [text for text in page.complaints if not any(known in text for known in STOCK)]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_opens_without_a_missing_node_or_an_error(page, name):
    assert open_workflow(page, name) == []
    page.wait_for_timeout(300)
    assert complaints(page) == []


SAID = "[...document.querySelectorAll('div')].map((e) => e.textContent).find((t) => /^frame \\d+ of 161/.test(t))"


def test_the_live_screen_plays_what_is_made(page):
    open_workflow(page, "tiny_stream")
    page.evaluate("app.queuePrompt(0, 1)")
    page.wait_for_function(SAID, timeout=120_000)
    first = page.evaluate(SAID)
    colours = """new Set([...document.querySelectorAll('canvas')].filter((c) => c.width === 64).flatMap((c) =>
        [...new Uint32Array(c.getContext('2d').getImageData(0, 0, 64, 64).data.buffer)])).size"""
    assert page.evaluate(colours) > 20
    page.wait_for_timeout(500)
    assert page.evaluate(SAID) != first
    assert complaints(page) == []


def test_a_screen_in_a_subgraph_plays_when_the_graph_was_loaded_again(page):
    open_workflow(page, "tiny_stream")
    page.evaluate(
        """async () => {
            const node = app.graph.nodes.find((node) => node.type === "SelfForcingStream");
            node.widgets.find((widget) => widget.name === "seed").value = 12345; // or nothing would run again
            app.graph.convertToSubgraph(new Set([node]));
            await app.loadGraphData(app.graph.serialize(), true, true, "again");
            app.canvas.setGraph(app.graph.nodes.find((node) => node.subgraph).subgraph);
        }"""
    )
    page.wait_for_timeout(500)
    assert not page.evaluate(SAID)
    page.evaluate("app.queuePrompt(0, 1)")
    page.wait_for_function(SAID, timeout=120_000)
    assert complaints(page) == []
    page.evaluate("app.canvas.setGraph(app.graph)")
