"""What is at work during an evaluation, as one line in the terminal: minutes pass until the first figure is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def working(console: Console) -> Iterator[Callable[[str, int], None]]:
    """Gives a function that takes what is at work and the stories just done, and shows all that were done of it."""
    done: Counter[str] = Counter()
    with console.status("reading") as status:

        def tell(name: str, stories: int) -> None:
            done[name] += stories
            status.update(f"{name}: {done[name]:,} stories")

        yield tell
