"""docs/python.md: every snippet runs, one after the other, as a reader would type them."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_every_snippet_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, snippet in enumerate(SNIPPETS):
        exec(compile(snippet, f"snippet {number}", "exec"), names)
    assert len(SNIPPETS) >= 5
    assert (tmp_path / "circle.mp4").stat().st_size > 1000


def test_the_snippet_for_files_names_what_there_is():
    from sf_core.pipeline import FilePipeline, ModelFiles

    (snippet,) = re.findall(r"```\n(from pathlib.*?)```", TEXT, re.DOTALL)
    compile(snippet, "files", "exec")
    with pytest.raises(ValueError, match="self_forcing_dmd.pt"):
        FilePipeline(ModelFiles(Path("self_forcing_dmd.pt"), Path("umt5.safetensors"), Path("vae.safetensors")))
