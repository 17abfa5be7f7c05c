"""What a user drags into a graph. Each file is a schema and a call; host.py is the seam to ComfyUI."""

from . import decode, load, prompt, sample

NODES = [*load.NODES, *prompt.NODES, *sample.NODES, *decode.NODES]
