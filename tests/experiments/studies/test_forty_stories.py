"""The page of forty stories shows what the shipped model writes, and says something of each."""

from __future__ import annotations

import re
from pathlib import Path

from experiments.quality.generation import all_kept
from experiments.studies.forty_stories import as_markdown, forty_stories
from tests.model.runtimes.shared import needs_native


@needs_native
def test_the_manual_shows_the_stories_as_they_come(repository: Path) -> None:
    page = (repository / "docs" / "stories.md").read_text("utf-8")
    _, *parts = re.split(r"^### \d+\n", page, flags=re.MULTILINE)
    shown, comments = zip(*(part.strip().rsplit("\n\n> ", 1) for part in parts), strict=True)
    stories = forty_stories()
    assert list(shown) == [as_markdown(story) for story in stories]
    assert all(comments)
    kept = sum(all_kept(story.text, story.prompt.names) for story in stories)
    ended = sum(story.ended for story in stories)
    assert f"{ended} of 40 end by themselves. All names of the prompt come back in {kept};" in " ".join(page.split())
