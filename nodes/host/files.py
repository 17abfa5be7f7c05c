"""Video files that are written while their frames are made: names, metadata, writing."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io, ui
from torch import Tensor

from ...sf_core.video import save_video
from ...sf_core.worker import Worker

DRAWN = -1  # as a seed: another one for each run
SUBGRAPH_INPUT = "-10"  # the node that stands for a subgraph's inputs, in saved workflows


def saved_result(path: Path) -> ui.SavedResult:
    return ui.SavedResult(path.name, output_name(path.parent), io.FolderType.output)


def output_name(path: Path) -> str:
    """A path as it is called within ComfyUI's output folder, with slashes; "" for the folder itself."""
    name = path.relative_to(folder_paths.get_output_directory()).as_posix()
    return "" if name == "." else name


class Recorder:
    """A file of `length` frames that are given to it; a thread writes them while the next ones are made.

    count  frames that are in the file
    """

    def __init__(self, path: Path, fps: float, metadata: dict[str, str], length: int) -> None:
        self.path, self.count, self.is_begun = path, 0, False
        settings = {"keep": True, "metadata": metadata, "length": length}
        self.worker = Worker(lambda pieces: save_video(path, self._counted(pieces), fps, **settings))

    def add(self, frames: Tensor) -> None:
        """Hands over frames [T, H, W, 3] in 0..1. Raises what `save_video` has raised over earlier ones."""
        self.is_begun = True
        self.worker.put(frames)

    def close(self) -> None:
        """Ends the file, which is whole then. Raises what `save_video` raises; without frames there is no file."""
        with nullcontext() if self.is_begun else suppress(ValueError):
            self.worker.close()

    def _counted(self, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        for piece in pieces:
            yield piece
            self.count += len(piece)


class Recording:
    """The files of a batch of videos, one each. What was added before an exception is whole files, too."""

    def __init__(self, paths: list[Path], fps: float, metadata: dict[str, str], length: int) -> None:
        self.recorders = [Recorder(path, fps, metadata, length) for path in paths]

    def __enter__(self) -> Recording:
        return self

    def add(self, frames: Tensor) -> None:
        """Hands over frames [B, T, H, W, 3] in 0..1."""
        for recorder, video in zip(self.recorders, frames):
            recorder.add(video)

    @property
    def written(self) -> list[Path]:
        """The files there are something in."""
        return [recorder.path for recorder in self.recorders if recorder.count]

    @property
    def count(self) -> int:
        """Frames that are in each of them."""
        return min((recorder.count for recorder in self.recorders), default=0)

    def __exit__(self, *error: object) -> None:
        with ExitStack() as stack:  # each is closed, also where another cannot be
            for recorder in self.recorders:
                stack.callback(recorder.close)


# --- The workflow in a file ------------------------------------------------------------------------------------------


def workflow_metadata(node: type[io.ComfyNode], drawn: int | None) -> dict[str, str]:
    """What lets ComfyUI open the workflow from a file, as its own Save Video writes it; with the seed that was drawn in
    the place of -1, so that the workflow makes this video again.
    """
    if args.disable_metadata or node.hidden is None:
        return {}
    written = {**(node.hidden.extra_pnginfo or {}), "prompt": node.hidden.prompt}
    if drawn is not None:
        written = copy.deepcopy(written)
        name = str(node.hidden.unique_id)
        if name in (written["prompt"] or {}):
            written["prompt"][name]["inputs"]["seed"] = drawn
        if written.get("workflow"):
            set_drawn_seed(written["workflow"], name, drawn)
    return {name: json.dumps(value) for name, value in written.items() if value is not None}


def set_drawn_seed(workflow: dict, name: str, seed: int) -> None:
    """Puts a seed in the place of -1 at a node of a saved workflow, or where the node's seed comes from.

    name  the node's: its id, behind those of the subgraphs it is in ("12:3")
    """
    subgraphs = {graph["id"]: graph for graph in workflow.get("definitions", {}).get("subgraphs", [])}
    graph, path = workflow, []
    for part in name.split(":"):
        node = _node(graph, part) if graph else None
        if node is None:
            return
        path.append((graph, node))
        graph = subgraphs.get(node["type"])
    _replace_drawn(path, "seed", seed)


def _replace_drawn(path: list[tuple[dict, dict]], slot: str, seed: int) -> None:
    """The same for an input of the last (graph, node) of a path; those before are the subgraphs around."""
    graph, node = path[-1]
    inputs, values = node.get("inputs", []), node.get("widgets_values")
    widgets = [entry["name"] for entry in inputs if entry.get("widget")]
    place = widgets.index(slot) if slot in widgets else 0
    if isinstance(values, list) and place < len(values) and values[place] == DRAWN:
        values[place] = seed
    link = next((entry.get("link") for entry in inputs if entry["name"] == slot), None)
    origin = next((ends for number, ends in _links(graph) if number == link), None)
    if origin is None:
        return
    source, number = origin
    if source == SUBGRAPH_INPUT and len(path) > 1:
        _replace_drawn(path[:-1], graph["inputs"][number]["name"], seed)
    elif (other := _node(graph, source)) and len(other.get("inputs", [])) <= 1:  # one that holds or hands on a number
        names = [entry["name"] for entry in other.get("inputs", [])]
        _replace_drawn([*path[:-1], (graph, other)], names[0] if names else "value", seed)


def _node(graph: dict, name: str) -> dict | None:
    return next((node for node in graph["nodes"] if str(node["id"]) == name), None)


def _links(graph: dict) -> Iterator[tuple[int, tuple[str, int]]]:
    """(number, (node it comes from, which output)) of each link; subgraphs write them as objects."""
    for link in graph.get("links") or []:
        number, source, output = (
            (link["id"], link["origin_id"], link["origin_slot"]) if isinstance(link, dict) else link[:3]
        )
        yield number, (str(source), output)
