"""Words in, conditioning out."""

from __future__ import annotations

from comfy_api.latest import io

from ..sf_core.sampling.prompt_text import Prompt, explain_unscheduled, parse, parse_start, scene_texts
from ..sf_core.sampling.prompts import TRANSITIONS
from . import inputs
from .host.conditioning import SCENE, start_later, take_scheduled
from .host.progress import Notes
from .host.tiny import words_left_out


class SelfForcingPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingPrompt",
            display_name="Self Forcing Prompt",
            category=inputs.CATEGORY,
            description="Turns a prompt, or several with the times they start at, into conditioning for Self "
            "Forcing Sampler.",
            search_aliases=["text encode", "prompt", "prompt schedule", "video prompt", "umt5", "wan prompt"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="Text encoder that belongs to the model: UMT5 for Wan 2.1, the built-in one for the "
                    "built-in model.",
                ),
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True, default="a red circle moves right",
                    tooltip="Prompt: what the video shows. Wan likes long, detailed prompts; the built-in model knows "
                    "colours, shapes, motions, backgrounds and sizes. Several prompts: a line each, which begins with "
                    "its time, as in 0: a red circle, then 4s: a blue square, then 8s cut: a green star.",
                ),
                io.Float.Input(
                    "fps", default=16.0, min=1.0, max=120.0, step=1.0, optional=True, advanced=True,
                    tooltip="Frames per second that the times of several prompts are counted with.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="Prompt for Self Forcing Sampler or a stock sampler.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    @inputs.check_numbers
    def execute(cls, clip, text, fps=16.0) -> io.NodeOutput:
        if not text.strip():
            raise ValueError("Got an empty prompt; the model needs words to follow. Write what the video shows.")
        first, *later = parse(text, fps)
        conditioning = encode_prompt(clip, first)
        if later:
            entries = [start_later(encode_prompt(clip, prompt), prompt.start) for prompt in later]
            conditioning = [conditioning[0], *entries]
        notes, hint = Notes(cls), explain_unscheduled(text)
        left_out = [line for prompt in (first, *later) for line in words_left_out(clip, prompt.text)]
        for line in ([hint] if hint else []) + left_out:
            notes.add(line)
        return io.NodeOutput(conditioning)


class SelfForcingNextPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SelfForcingNextPrompt",
            display_name="Self Forcing Next Prompt",
            category=inputs.CATEGORY,
            description="Lets one prompt follow another at a time, where each is conditioning of its own. Put several "
            "behind each other for longer stories.",
            search_aliases=["prompt schedule", "prompt travel", "combine conditioning", "story", "prompt switch"],
            inputs=[
                io.Conditioning.Input(
                    "first",
                    tooltip="Prompt, or several with their times, that come first. Of other conditioning the first "
                    "entry is used.",
                ),
                io.Conditioning.Input("next", tooltip="Prompt that takes over. Its first entry is used."),
                io.String.Input(
                    "start", default="4s",
                    tooltip="Start time: when it takes over, in seconds of the video, as in 4s or 1.5s, or after how "
                    "many chunks, as in @20.",
                ),
                io.Combo.Input(
                    "transition", options=list(TRANSITIONS), default=TRANSITIONS[0],
                    tooltip="Transition. recache: the latest frames are read again under the new prompt. renew: the "
                    "same, and they become the new sink. cut: they are forgotten. blend: the old prompt turns into "
                    "the new one. To LongLive 2 a cut is a new shot, and all others change the words alone.",
                ),
                io.Float.Input(
                    "blend", default=1.5, min=0.25, max=10_000.0, step=0.25, advanced=True,
                    tooltip="Blend length in seconds.",
                ),
                io.Float.Input(
                    "fps", default=16.0, min=1.0, max=120.0, step=1.0, optional=True, advanced=True,
                    tooltip="Frames per second that times are counted with.",
                ),
            ],
            outputs=[io.Conditioning.Output(
                tooltip="Prompts, both, for Self Forcing Sampler. Others follow the first.",
            )],
        )  # fmt: skip

    @classmethod
    @inputs.check_numbers
    def execute(cls, first, next, start, transition, blend, fps=16.0) -> io.NodeOutput:
        if not first or not next:
            raise ValueError("Got empty conditioning; both prompts are needed. Connect one to first and one to next.")
        how = f"blend {blend:g}s" if transition == "blend" else transition
        new = start_later(next, parse_start(start.strip() and f"{start.strip()} {how}", fps))
        return io.NodeOutput([*take_scheduled(first), new])


def encode_prompt(clip, prompt: Prompt) -> list:
    """A prompt's CONDITIONING; where a shot begins its first entry has what models of several shots are told, too."""
    words = scene_texts(prompt)
    conditioning = encode(clip, prompt.text)
    if words is None:
        return conditioning
    (embeds, values), *others = conditioning
    scene, caption = (embeds if text == prompt.text else encode(clip, text)[0][0] for text in words)
    return [[embeds, {**values, SCENE: (scene, caption)}], *others]


def encode(clip, text: str) -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


NODES = [SelfForcingPrompt, SelfForcingNextPrompt]
