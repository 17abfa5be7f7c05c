"""The comparison's bookkeeping; what it trains is tested with the trainer."""

import json

import pytest
import torch

from benchmarks import compare
from sf_core.tiny import WEIGHTS
from sf_core.video import contact_sheet


def arguments(out, *more):
    return compare.arguments().parse_args(["--out", str(out), "--runs", str(out / "runs"), *more])


def test_parts_share_the_work_and_keep_what_depends_on_each_other_together(tmp_path):
    whole, *halves = (compare.cells(arguments(tmp_path, f"--part={part}")) for part in ("1/1", "1/2", "2/2"))
    assert sorted(map(str, halves[0] + halves[1])) == sorted(map(str, whole)) and len(whole) == 42
    assert len({(cell.layout, cell.seed) for half in halves for cell in half}) == 6


def test_a_row_comes_with_what_it_starts_from(tmp_path):
    found = compare.cells(arguments(tmp_path, "--row", "Self Forcing, GAN", "--layout", "frame-wise", "--seeds", "1"))
    assert [(cell.layout, cell.row) for cell in found] == [
        ("frame-wise", "teacher forcing"),
        ("frame-wise", "Self Forcing, GAN"),
    ]


def test_every_row_is_a_configuration_that_starts_where_it_should(tmp_path):
    args = arguments(tmp_path, "--steps", "7", "--initial-steps", "9")
    for row, about in compare.ROWS.items():
        config = compare.config_of(compare.Cell("frame-wise", 2, row), args)
        assert (config.seed, config.sampling.chunk, config.steps) == (2, 1, 9 if about.initial else 7)
        start = tmp_path / "runs" / "teacher" if about.initial else tmp_path / "frame-wise" / "teacher-forcing-2"
        assert config.model.student == str(start)


def test_the_table_has_mean_and_spread_and_the_picture_every_row(tmp_path):
    args = arguments(tmp_path, "--seeds", "2", "--windows", "2")
    for seed, share in enumerate((0.4, 0.6)):
        folder = compare.Cell("chunk-wise", seed, "Self Forcing, DMD").folder(tmp_path)
        folder.mkdir(parents=True)
        windows = [dict.fromkeys(compare.COLUMNS, share), dict.fromkeys(compare.COLUMNS, share / 2)]
        (folder / compare.SCORES).write_text(json.dumps({"settings": [1, 2], "windows": windows}))
        contact_sheet(torch.rand(4, 64, 64, 3), columns=4).save(folder / compare.SHEET)
    near, far = compare.table(args).split("\n\n")
    assert near.startswith("| chunk-wise, window 1 | seeds | all |") and far.startswith("| chunk-wise, window 2 |")
    assert near.splitlines()[2].startswith("| Self Forcing, DMD | 2 | 0.500 ±0.141 |")
    assert near.splitlines()[2].endswith("| 0.000 ±0.000 |")
    assert "| 0.250 ±0.071 |" in far and far.splitlines()[2].endswith("| -0.250 ±0.071 |")
    assert compare.table(arguments(tmp_path, "--seeds", "2")) == near.rstrip("\n") + "\n"  # others were not scored
    assert compare.picture("chunk-wise", args).is_file() and compare.picture("frame-wise", args) is None


def test_the_shipped_model_is_scored_once(tmp_path, monkeypatch):
    args = arguments(tmp_path, "--prompts", "2", "--windows", "1")
    compare.score(WEIGHTS, tmp_path / "shipped", compare.PRESETS["tiny"], args)
    written = json.loads((tmp_path / "shipped" / compare.SCORES).read_text())
    assert written["settings"][:2] == [2, 1] and written["windows"][0]["colour"] == 1
    monkeypatch.setattr(compare, "measured", None)
    compare.score(WEIGHTS, tmp_path / "shipped", compare.PRESETS["tiny"], args)
    monkeypatch.setattr(compare, "fingerprint", lambda state: "others")
    with pytest.raises(TypeError):  # it is measured again
        compare.score(WEIGHTS, tmp_path / "shipped", compare.PRESETS["tiny"], args)


def test_other_exported_models_stand_beside_the_shipped_one(tmp_path, capsys):
    args = arguments(tmp_path, "--model", f"as it was={WEIGHTS}")
    assert list(compare.exported(args)) == ["the shipped model", "as it was"]
    with pytest.raises(SystemExit):
        arguments(tmp_path, "--model", f"nothing={tmp_path}")
    assert "it is NAME=FOLDER of a model that" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2"])
def test_a_part_that_is_none_is_refused(tmp_path, capsys, text):
    with pytest.raises(SystemExit):
        arguments(tmp_path, f"--part={text}")
    assert f"Got '{text}'; it is i/n with i from 1 to n" in capsys.readouterr().err
