"""What runs here, as text: one paste into a bug report."""

from __future__ import annotations

import json
import time

from comfy_api.latest import io

from ..sf_core.cli.doctor import as_text, make_report
from .host.progress import say
from .host.report import host_parts, model_folders
from .inputs import CATEGORY

TEXT, JSON = "text", "json"


class SelfForcingReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingReport",
            display_name="Self Forcing Report",
            category=CATEGORY,
            description="Report of what runs here: versions, devices, attention, compiling, free memory, model files "
            "and what they are, and what size, window and speed to expect. Made for pasting into a bug report; it "
            "holds no user names.",
            search_aliases=["doctor", "diagnose", "system info", "bug report", "what runs here", "versions"],
            inputs=[
                io.Combo.Input(
                    "format", options=[TEXT, JSON], default=TEXT,
                    tooltip="Format of the report: text for people, json for programs.",
                ),
            ],
            outputs=[io.String.Output(tooltip="Report; the node shows it too.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, format) -> float:
        """Never the same: memory and files change while the graph does not."""
        return time.time()

    @classmethod
    def execute(cls, format) -> io.NodeOutput:
        report = make_report(model_folders(), host_parts())
        text = as_text(report)
        say(cls, text)
        return io.NodeOutput(json.dumps(report, indent=2) if format == JSON else text, ui={"text": [text]})


NODES = [SelfForcingReport]
