"""Self Forcing for ComfyUI: autoregressive Wan video, chunk by chunk, with a rolling KV cache."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .nodes import NODES

WEB_DIRECTORY = "./web"


class SelfForcing(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> ComfyExtension:
    return SelfForcing()
