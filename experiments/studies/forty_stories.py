"""Forty stories of the shipped model, as they came: the first twenty prompts of each set, one seed, none left out.

    python -m experiments.studies.forty_stories

`docs/stories.md` holds them with a comment on each, and a test holds them to be these.
"""

from collections.abc import Iterator
from itertools import chain

from experiments.quality.generation import RARE_PROMPTS, WrittenStory, generate_stories, load_prompts
from model.architecture.folder import PRETRAINED
from model.engine.load import load_engine

EACH = 20
SEED = 0


def forty_stories() -> list[WrittenStory]:
    """Generate them: prompts with common names first, then those with unusual ones."""
    prompts = (*load_prompts()[:EACH], *load_prompts(RARE_PROMPTS)[:EACH])
    with load_engine(PRETRAINED, precision="int8", queue_limit=len(prompts)) as engine:
        return generate_stories(engine, prompts, [SEED])


def as_markdown(story: WrittenStory) -> str:
    """A story with its prompt in bold letters, paragraph by paragraph."""
    text = "\n\n".join(part.strip() for part in story.text.split("\n") if part.strip())
    return f"**{story.prompt.text}** {text}"


def main() -> Iterator[str]:
    """The lines of the page, without comments."""
    for number, story in enumerate(forty_stories(), 1):
        yield from chain([f"### {number}", ""], as_markdown(story).split("\n"), [""])


if __name__ == "__main__":
    print("\n".join(main()))
