"""Values of stock video nodes in workflows, which stand by position, are right for ComfyUI 0.27 and for later ones.

Later ones have more widgets behind those of 0.27, and other kinds of them: SaveVideo's codec belongs to its format, and
CreateVideo's bit depth may be "auto", which 0.27 does not know.
"""

import json
from pathlib import Path

import pytest

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))


def is_rate(value):
    return isinstance(value, (int, float)) and 1 <= value <= 120


WIDGETS = {  # what each value may be, in all of them
    "CreateVideo": (is_rate, (8, 10).__contains__),
    "SaveVideo": (lambda value: isinstance(value, str), ("auto", "mp4").__contains__, ("auto", "h264").__contains__),
}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_values_of_stock_video_nodes_are_right_in_old_and_new_hosts(path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    inner = [node for part in graph.get("definitions", {}).get("subgraphs", []) for node in part["nodes"]]
    for node in (*graph["nodes"], *inner):
        if node["type"] in WIDGETS:
            allowed, values = WIDGETS[node["type"]], node["widgets_values"]
            assert isinstance(values, list) and len(values) == len(allowed), values
            assert all(is_right(value) for is_right, value in zip(allowed, values)), values
