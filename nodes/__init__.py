"""What a user drags into a graph. Each file is a schema and a call; host/ is the seam to ComfyUI."""

from . import custom_sampler, decode, load, prompt, report, sample, settings, stream

NODES = [
    *load.NODES, *settings.NODES, *prompt.NODES, *sample.NODES, *stream.NODES, *custom_sampler.NODES, *decode.NODES,
    *report.NODES,
]  # fmt: skip
