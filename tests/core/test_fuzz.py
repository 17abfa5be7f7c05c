"""A few hundred damaged files and odd prompts; thousands are run by hand, see tests/fuzz."""

import pytest

from tests.fuzz.run import KINDS, TooSlow, is_ours, run, time_limit


@pytest.mark.parametrize("kind, count", [("files", 200), ("media", 300), ("prompts", 1000)])
def test_everything_is_taken_or_refused_in_a_sentence(tmp_path, kind, count):
    result = run(KINDS[kind], count, 0, tmp_path)
    assert not result.failures, "\n".join(failure.text for failure in result.failures[:3])
    assert result.taken > count / 50 and result.refused > count / 5
    assert result.taken + result.refused == count


def test_a_case_is_the_same_by_itself(tmp_path):
    drawn = []
    run(lambda folder: lambda random: drawn.append(random.random()), 5, 40, tmp_path)
    run(lambda folder: lambda random: drawn.append(random.random()), 1, 43, tmp_path)
    assert drawn[5] == drawn[3] and len(set(drawn)) == 5


def test_what_is_not_ours_is_told_with_its_seed(tmp_path):
    def case(random):
        raise random.choice((KeyError("x"), ValueError("bad"), ValueError("Got x. Use y."), OSError("Got z; use y.")))

    result = run(lambda folder: case, 40, 7, tmp_path)
    assert result.refused and len(result.failures) + result.refused == 40 and not result.taken
    again = run(lambda folder: case, 1, result.failures[0].seed, tmp_path)
    assert again.failures[0].text.splitlines()[-1] == result.failures[0].text.splitlines()[-1]


def test_only_whole_sentences_are_ours():
    assert is_ours(ValueError("Got a file. Use another.")) and is_ours(ImportError("x is not installed: pip install x"))
    assert not any(map(is_ours, (ValueError("Got a"), KeyError("Got a."), RuntimeError("Got a."), ImportError("x"))))


@pytest.mark.skipif(not hasattr(__import__("signal"), "SIGALRM"), reason="needs an alarm")
def test_a_case_that_takes_too_long_is_stopped():
    with pytest.raises(TooSlow), time_limit(0.05):
        while True:
            pass
