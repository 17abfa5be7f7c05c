"""Damaged files and odd prompts, thousands of them: each is taken, or refused in a sentence of ours.

    python -m tests.fuzz files --count 20000 --seed 1

Case i of a run has the seed `seed` + i alone, so any of them can be run again by itself. A kind is a function that
prepares what it needs in a folder and returns another, which makes one case with a Random and runs it; to add a kind,
write that function and name it in run.KINDS.
"""
