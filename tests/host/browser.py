"""ComfyUI's own frontend in a headless Chromium, in front of a server of its own. Needs playwright and Chromium."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.host.server import running, template

STOCK = ("404", "huggingface.co", "before initialization", "favicon")  # what the frontend says without this pack, too
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.VueNodes.Enabled": False,
    "Comfy.RightSidePanel.IsOpen": False,
    "Comfy.Minimap.Visible": False,
}


@contextmanager
def browsing(comfyui: Path, base: Path) -> Iterator:
    """A page with the frontend; page.complaints: errors in its console, page.server: the Server behind it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium found")
    with running(comfyui, base) as server, playwright.sync_playwright() as driver:
        host = f"127.0.0.1:{server.port}"
        browser = driver.chromium.launch(executable_path=chromium, headless=True, args=QUIET)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.route(lambda url: url.startswith("http") and host not in url, lambda route: route.abort())
        page.server, page.complaints = server, []
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("console", lambda message: message.type == "error" and page.complaints.append(message.text))
        for name, value in SETTINGS.items():
            page.request.post(f"http://{host}/api/settings/{name}", data=json.dumps(value))
        start(page)
        yield page
        browser.close()


def start(page) -> None:
    """Loads the page, as for the first time or once more."""
    page.goto(f"http://127.0.0.1:{page.server.port}", wait_until="domcontentloaded")
    page.wait_for_function(
        "window.app?.graph && Object.keys(LiteGraph.registered_node_types).length > 50", timeout=120_000
    )
    page.wait_for_timeout(1500)
    page.complaints.clear()


def change_setting(page, name: str, value) -> None:
    page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])


def open_workflow(page, name: str, path: str = "test") -> list[str]:
    """Loads a workflow, in a new tab, and gives the types that the frontend does not know."""
    workflow = template(name).read_text(encoding="utf-8")
    return page.evaluate(
        """async ([text, path]) => {
            await app.loadGraphData(JSON.parse(text), true, true, path);
            return app.graph._nodes.map((node) => node.type).filter((type) => !LiteGraph.registered_node_types[type]);
        }""",
        [workflow, path],
    )


def complaints(page) -> list[str]:
    return [text for text in page.complaints if not any(known in text for known in STOCK)]
