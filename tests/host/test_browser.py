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
