"""A larger frozen model as a judge: the perplexity of our stories under it.

A low perplexity alone means little, since a story that loops is the easiest to predict. So the judge scores some
held-out stories as well, and the two figures should be near to each other.

The judge is a folder in Hugging Face's format, read by the `transformers` package if that is installed. It is no
dependency of this project, and nothing is downloaded.
"""

import importlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from model.errors import InputError

REFERENCE_STORIES = 64
"""Number of held-out stories that are scored for comparison, the first ones."""
PACKAGE = "transformers"
FIRST_SENTENCE = re.compile(r"^.*?[.!?]\"?(?=\s)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Judged:
    """The judge's loss on one continuation, given its beginning."""

    nats: float
    tokens: int
    """In the judge's own vocabulary."""
    bytes: int


@dataclass(frozen=True, slots=True)
class Judgement:
    """Figures of all stories that were scored."""

    judge: str
    stories: tuple[Judged, ...]
    reference: tuple[Judged, ...]
    """The held-out stories."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; perplexity is by the judge's token, so it compares only stories of the same judge."""
        figures: dict[str, Any] = {"judge": self.judge, "reference_stories": len(self.reference)}
        for prefix, judged in (("", self.stories), ("reference_", self.reference)):
            nats, tokens, size = (sum(getattr(one, name) for one in judged) for name in ("nats", "tokens", "bytes"))
            figures[f"{prefix}perplexity"] = math.exp(nats / tokens) if tokens else None
            figures[f"{prefix}bits_per_byte"] = nats / math.log(2) / size if size else None
        return figures


def why_not(path: Path | None) -> str | None:
    """Why there is no judge; None if there is one.

    Raises:
        InputError: a judge is named, and there is no such folder.
    """
    if path is None:
        return "no judge was named (--judge FOLDER)"
    if not path.is_dir():
        raise InputError("judge", f"must be a folder that holds a model in Hugging Face's form, got {path}")
    if find_spec(PACKAGE) is None:
        return f"the judge needs the package '{PACKAGE}', which is not installed"
    return None


class Judge:
    """A causal language model out of a local folder."""

    def __init__(self, path: Path) -> None:
        """Load it. Raises `InputError` where the folder holds no model that can be a judge."""
        package: Any = importlib.import_module(PACKAGE)
        try:
            self._tokenizer = package.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
            self._model = package.AutoModelForCausalLM.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # the package raises all kinds of errors for damaged files
            reason = " ".join(str(error).split())[:200]
            raise InputError("judge", f"{path} cannot be read as a causal language model: {reason}") from error
        self._model.eval()
        if not getattr(self._tokenizer, "is_fast", False):
            raise InputError("judge", f"{path} needs a fast tokenizer: one that gives the offsets of its tokens")
        self.name = path.resolve().name
        self.window: int | None = getattr(self._model.config, "max_position_embeddings", None)
        """Tokens that it can read at once; later ones are not scored."""

    def read(self, given: str, continuation: str) -> Judged:
        """Nats of the continuation's tokens, after `given`; the very first token is not scored.

        A token that holds the end of the one and the beginning of the other belongs to the continuation.
        """
        import torch

        encoded = self._tokenizer(given + continuation, return_offsets_mapping=True, add_special_tokens=False)
        ids, offsets = encoded["input_ids"][: self.window], encoded["offset_mapping"][: self.window]
        places = [place for place in range(1, len(ids)) if offsets[place][1] > len(given)]
        if not places:
            return Judged(0.0, 0, 0)
        with torch.no_grad():
            logits_TV = self._model(input_ids=torch.tensor([ids])).logits[0].double()
        chances_TV = logits_TV.log_softmax(-1)
        nats = -sum(float(chances_TV[place - 1, ids[place]]) for place in places)
        judged = (given + continuation)[offsets[places[0]][0] : offsets[places[-1]][1]]
        return Judged(nats, len(places), len(judged.encode()))


def first_sentence(text: str) -> str:
    """The beginning that is given to the judge of a held-out story; all of it where it is one sentence."""
    found = FIRST_SENTENCE.match(text)
    return found[0] if found else text


def judge_stories(
    judge: Judge,
    stories: Sequence[tuple[str, str]],
    held_out: Sequence[str],
    done: Callable[[int], None] = lambda stories: None,
) -> Judgement:
    """Read (prompt, continuation) pairs, and the first held-out stories behind their first sentence."""

    def read(given: str, continuation: str) -> Judged:
        done(1)
        return judge.read(given, continuation)

    reference = []
    for text in held_out[:REFERENCE_STORIES]:
        given = first_sentence(text)
        reference.append(read(given, text[len(given) :]))
    return Judgement(judge.name, tuple(read(*story) for story in stories), tuple(reference))
