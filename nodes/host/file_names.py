"""Names of files to write, in which %...% is replaced as in the names of ComfyUI's own save nodes.

ComfyUI's server replaces %width%, %year% and the like. %date:FORMAT% and %Node.widget% are replaced by its frontend, in
ComfyUI's own nodes alone; here the clock and the hidden prompt and workflow serve, also where no frontend takes part.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import folder_paths

PLACEHOLDER = re.compile(r"%([^%]+)%")
BY_SERVER = {"width", "height", "year", "month", "day", "hour", "minute", "second"}
DATE_PART = re.compile("dd?|MM?|hh?|mm?|ss?|yyy?y?")
DATE_FIELDS = {"d": "tm_mday", "M": "tm_mon", "h": "tm_hour", "m": "tm_min", "s": "tm_sec"}
NOT_IN_NAMES = re.compile(r'[/?<>\\:*|"\x00-\x1f\x7f]')
LONGEST_DETOUR = 10  # nodes between a widget that is an input and the number that is wired to it


def next_file(name: str, width: int, height: int) -> Path:
    """The next free .mp4 of a name in ComfyUI's output folder, whose folders are made; `width` x `height` pixels.

    Raises ValueError and OSError for a name that cannot be one there.
    """
    check_name(name)
    try:
        folder, stem, counter, _, _ = folder_paths.get_save_image_path(
            with_slashes(name), folder_paths.get_output_directory(), width, height
        )
    except OSError as error:
        raise OSError(
            f"Got file {name!r}, whose folder cannot be made: {error.strerror or error}. Choose another name."
        ) from None
    return Path(folder) / f"{stem}_{counter:05}_.mp4"


def check_name(name: str) -> None:
    """Raises ValueError for the name of a file that is none, or that lies outside ComfyUI's output folder."""
    output, given = folder_paths.get_output_directory(), with_slashes(name)
    try:
        os.fsencode(given)
    except UnicodeEncodeError:
        raise ValueError(f"Got file {name!a}, which this system cannot write. Use other characters.") from None
    if "\0" in given or os.path.basename(os.path.normpath(given)) in ("", ".", ".."):
        raise ValueError(f"Got file {name!r}, which names no file. Use a name such as video/self_forcing.")
    path = os.path.abspath(os.path.join(output, given))
    foreign = os.name != "nt" and bool(PureWindowsPath(name).drive)
    if foreign or not Path(path).is_relative_to(output):
        raise ValueError(
            f"Got file {name!r}, which lies outside ComfyUI's output folder. Use a name within it, such as "
            "video/self_forcing."
        )


def with_slashes(name: str) -> str:
    """A name whose folders may have been written with backslashes, as workflows from Windows have them."""
    return name.replace("\\", "/")


def fill_placeholders(name: str, prompt: dict | None, workflow: dict | None) -> tuple[str, list[str]]:
    """A name with %date:FORMAT% and %Node.widget% replaced, and the placeholders that nothing replaces.

    Node   the node's "Node name for S&R", its class, or its title; the first that fits, as in the frontend
    prompt, workflow   the hidden inputs of these names; None where there is none
    """
    unknown, now = [], time.localtime()

    def value(match: re.Match) -> str:
        words = match[1]
        if words.startswith("date:"):
            return format_date(words.removeprefix("date:"), now)
        found = None
        if words.count(".") == 1:
            found = _widget(*words.split("."), prompt or {}, workflow or {})
        if found is None and words not in BY_SERVER:
            unknown.append(match[0])
        return match[0] if found is None else NOT_IN_NAMES.sub("_", found)

    return PLACEHOLDER.sub(value, name), unknown


def format_date(form: str, now: time.struct_time) -> str:
    """A time in the frontend's notation: yyyy or yy, M or MM, d, h (to 23), m, s."""

    def part(match: re.Match) -> str:
        word = match[0]
        if word[0] == "y":
            return {"yy": f"{now.tm_year % 100:02}", "yyyy": str(now.tm_year)}.get(word, word)
        return str(getattr(now, DATE_FIELDS[word[0]])).zfill(len(word))

    return DATE_PART.sub(part, form)


def _widget(name: str, widget: str, prompt: dict, workflow: dict) -> str | None:
    """The value of a node's widget, as the frontend writes it; None where there is none."""
    nodes = list(_workflow_nodes(workflow.get("nodes", []), _subgraphs(workflow)))
    ways = (
        (node_id for node_id, node in nodes if _properties(node).get("Node name for S&R") == name),
        (node_id for node_id, node in prompt.items() if node.get("class_type") == name),
        (node_id for node_id, node in nodes if node.get("title") == name),
        (node_id for node_id, node in prompt.items() if (node.get("_meta") or {}).get("title") == name),
    )
    for node_ids in ways:
        for node_id in node_ids:
            if node_id in prompt:
                value = _resolved(prompt[node_id].get("inputs", {}).get(widget), prompt)
                return None if value is None else _as_text(value)
    return None


def _resolved(value: object, prompt: dict) -> object:
    """A widget's value; where it is wired to a primitive, that one's. None for other wires."""
    for _ in range(LONGEST_DETOUR):
        if not isinstance(value, list):
            return value
        value = prompt.get(str(value[0]) if value else "", {}).get("inputs", {}).get("value")
    return None


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _workflow_nodes(nodes: list[dict], subgraphs: dict, outer: str = "") -> Iterator[tuple[str, dict]]:
    """(id in the prompt, node) of a workflow's nodes; those within a subgraph come before it."""
    for node in nodes:
        node_id = f"{outer}{node.get('id')}"
        if node.get("type") in subgraphs and node_id.count(":") < LONGEST_DETOUR:
            yield from _workflow_nodes(subgraphs[node["type"]], subgraphs, f"{node_id}:")
        yield node_id, node


def _subgraphs(workflow: dict) -> dict[str, list[dict]]:
    return {part.get("id"): part.get("nodes", []) for part in (workflow.get("definitions") or {}).get("subgraphs", [])}


def _properties(node: dict) -> dict:
    properties = node.get("properties")
    return properties if isinstance(properties, dict) else {}
