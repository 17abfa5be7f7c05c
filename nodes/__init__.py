"""What a user drags into a graph. Each file is a schema and a call; host/ is the seam to ComfyUI."""

from . import custom_sampler, decode, load, prompt, report, sample, settings, stream
from .host.errors import plain_errors

NODES = [
    plain_errors(node)
    for file in (load, settings, prompt, sample, stream, custom_sampler, decode, report)
    for node in file.NODES
]
