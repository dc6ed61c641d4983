"""Stories of the quorum, as text files. `EXCIMER_RECORD=1` writes down what happens now; read the diff."""

import os
from pathlib import Path

import pytest

from tests.scenarios.consensus_stage import Stage

STORIES = sorted((Path(__file__).parent / "consensus").glob("*.txt"))


def tell(story: str) -> str:
    """The story with every block's outcome as it is now. Lines before a command that start with # stay."""
    stage = Stage()
    told = []
    for block in story.strip().split("\n\n"):
        lines = block.split("\n----", 1)[0].split("\n")
        comments, command = lines[:-1], lines[-1]
        outcome = stage.run(command)
        told.append("\n".join([*comments, command, "----", *([outcome] if outcome else [])]))
    return "\n\n".join(told) + "\n"


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_story(path: Path) -> None:
    expected = path.read_text()
    told = tell(expected)
    if os.environ.get("EXCIMER_RECORD"):
        path.write_text(told)
    assert told == expected


def test_there_are_stories() -> None:
    assert len(STORIES) >= 6
