"""What exported models are asked in the tests of this folder."""

from __future__ import annotations

import subprocess

PROMPTS = [[7, 1, 90, 3], [5], list(range(3, 50))]
NEW_TOKENS = 10


def tokens_of(done: subprocess.CompletedProcess[str]) -> list[list[int]]:
    """What examples/cpp printed: the continuation of each prompt."""
    assert done.returncode == 0, done.stderr
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
