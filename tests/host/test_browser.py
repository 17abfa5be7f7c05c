"""The pack in ComfyUI's own frontend: workflows open whole."""

import pytest

from tests.host.browser import browsing, complaints, open_workflow
from tests.host.server import WORKFLOWS


@pytest.fixture(scope="module")
def page(comfyui, tmp_path_factory):
    with browsing(comfyui, tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_opens_without_a_missing_node_or_an_error(page, name):
    assert open_workflow(page, name) == []
    page.wait_for_timeout(300)
    assert complaints(page) == []


@pytest.mark.parametrize("words", ["self forcing", "wan", "long video", "realtime", "streaming"])
def test_templates_are_found_by_what_one_looks_for(page, words):
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    cards = page.locator('[data-testid^="template-workflow-"]')
    cards.first.wait_for(timeout=30_000)
    page.wait_for_timeout(1500)  # the search box takes the focus once the dialog has been drawn
    page.keyboard.type(words)
    page.locator('[data-testid^="template-workflow-self_forcing_"]').first.wait_for(state="attached", timeout=10_000)
    page.keyboard.press("Escape")
    cards.first.wait_for(state="detached", timeout=10_000)
