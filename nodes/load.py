"""The built-in model as a loader."""

from __future__ import annotations

from comfy_api.latest import io

from . import tiny


class SelfForcingLoadTiny(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingLoadTiny",
            display_name="Load Tiny Self Forcing (built in)",
            category="Self Forcing",
            description="A small real model that comes with this pack: nothing to download. It draws coloured shapes "
            "that move, at 64 x 64 pixels, and works with the stock nodes too.",
            search_aliases=["tiny wan", "demo model", "test model", "built-in model", "load self forcing"],
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The video model, a causal Wan network."),
                io.Clip.Output(tooltip="Its text encoder."),
                io.Vae.Output(tooltip="Its autoencoder."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(tiny.load_model(), tiny.load_clip(), tiny.load_vae())


NODES = [SelfForcingLoadTiny]
