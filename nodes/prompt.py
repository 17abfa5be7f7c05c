"""Words in, conditioning out."""

from __future__ import annotations

from comfy_api.latest import io


class SelfForcingPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingPrompt",
            display_name="Self Forcing Prompt",
            category="Self Forcing",
            description="Turns a prompt into conditioning for Self Forcing Sampler.",
            search_aliases=["text encode", "prompt", "video prompt", "umt5", "wan prompt"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder that belongs to the model: UMT5 for Wan 2.1, the built-in one for the "
                    "built-in model.",
                ),
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True, default="a red circle moves right",
                    tooltip="What the video shows. Wan likes long, detailed prompts; the built-in model knows colours, "
                    "shapes, motions, backgrounds and sizes.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="The prompt for Self Forcing Sampler or a stock sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip, text) -> io.NodeOutput:
        if not text.strip():
            raise ValueError("Got an empty prompt; the model needs words to follow. Write what the video shows.")
        return io.NodeOutput(clip.encode_from_tokens_scheduled(clip.tokenize(text)))


NODES = [SelfForcingPrompt]
