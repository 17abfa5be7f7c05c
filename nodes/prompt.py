"""Words in, conditioning out."""

from __future__ import annotations

from comfy_api.latest import io

from ..sf_core.storyboard import parse
from . import host


class SelfForcingPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingPrompt",
            display_name="Self Forcing Prompt",
            category="Self Forcing",
            description="Turns a prompt, or several with the times they start at, into conditioning for Self "
            "Forcing Sampler.",
            search_aliases=["text encode", "prompt", "prompt schedule", "video prompt", "umt5", "wan prompt"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder that belongs to the model: UMT5 for Wan 2.1, the built-in one for the "
                    "built-in model.",
                ),
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True, default="a red circle moves right",
                    tooltip="What the video shows. Wan likes long, detailed prompts; the built-in model knows colours, "
                    "shapes, motions, backgrounds and sizes. Several prompts: a line each, which begins with its "
                    "time, as in 0: a red circle, then 4s: a blue square, then 8s cut: a green star.",
                ),
                io.Float.Input(
                    "fps", default=16.0, min=1.0, max=120.0, step=1.0, optional=True, advanced=True,
                    tooltip="Frames per second that the times of several prompts are counted with.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="The prompt for Self Forcing Sampler or a stock sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip, text, fps=16.0) -> io.NodeOutput:
        if not text.strip():
            raise ValueError("Got an empty prompt; the model needs words to follow. Write what the video shows.")
        first, *later = parse(text, fps)
        conditioning = encode(clip, first.text)
        if later:
            entries = [host.entering(encode(clip, prompt.text), prompt.entrance) for prompt in later]
            conditioning = [conditioning[0], *entries]
        return io.NodeOutput(conditioning)


def encode(clip, text: str) -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


NODES = [SelfForcingPrompt]
