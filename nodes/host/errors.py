"""Errors as the user reads them: ComfyUI puts the class before the message, and its module unless it is Python's."""

from __future__ import annotations

import functools
from collections.abc import Callable

from comfy_api.latest import io


def plain_errors(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, whose own kinds of ValueError are ValueErrors to those outside: "ValueError: Got ...", and no path."""
    node.execute = classmethod(_plain(node.execute.__func__))
    return node


def _plain(execute: Callable) -> Callable:
    @functools.wraps(execute)
    def run(cls, *args, **inputs):
        try:
            return execute(cls, *args, **inputs)
        except ValueError as error:
            if type(error) is ValueError:
                raise
            raise ValueError(str(error)) from error

    return run
