"""A judge's figures, against a computation of their own.

`transformers` is no dependency of this project, so a stand-in of the few names that are used takes its place: a real
tokenizer with offsets and a real (bigram) language model in PyTorch, read from a folder. It stands for the package's
form, not for its many models.
"""

from __future__ import annotations

import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.quality import judge as module
from experiments.quality.judge import Judge, Judged, Judgement, first_sentence, judge_stories, why_not
from model.errors import InputError

VOCAB = 128
TABLE_VV = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))


class PairTokenizer:
    """Two letters of ASCII a token, by their sum; the last one may be single."""

    is_fast = True

    @classmethod
    def from_pretrained(cls, path: str, *, local_files_only: bool) -> PairTokenizer:
        assert local_files_only, "nothing is ever fetched"
        if not (Path(path) / "tokenizer.json").exists():
            raise OSError("no file named tokenizer.json\nsee the documentation")
        return cls()

    def __call__(self, text: str, *, return_offsets_mapping: bool, add_special_tokens: bool) -> dict[str, Any]:
        assert return_offsets_mapping
        assert not add_special_tokens
        spans = [(start, min(start + 2, len(text))) for start in range(0, len(text), 2)]
        ids = [sum(map(ord, text[start:end])) % VOCAB for start, end in spans]
        return {"input_ids": ids, "offset_mapping": spans}


class BigramModel:
    config = SimpleNamespace(max_position_embeddings=40)

    @classmethod
    def from_pretrained(cls, path: str, *, local_files_only: bool) -> BigramModel:
        assert local_files_only, "nothing is ever fetched"
        return cls()

    def eval(self) -> BigramModel:
        return self

    def __call__(self, *, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=TABLE_VV[input_ids])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A judge's folder, and the stand-in where the package would be."""
    stand_in = ModuleType("transformers")
    stand_in.__spec__ = ModuleSpec("transformers", None)
    stand_in.AutoTokenizer = PairTokenizer  # type: ignore[attr-defined]
    stand_in.AutoModelForCausalLM = BigramModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    path = tmp_path / "large-judge"
    path.mkdir()
    (path / "tokenizer.json").write_text("{}")
    return path


def nats_by_hand(text: str, first: int, last: int) -> float:
    """Of tokens `first` to `last` of a text, one after another."""
    ids = [sum(map(ord, text[start : start + 2])) % VOCAB for start in range(0, len(text), 2)]
    total = 0.0
    for place in range(first, last + 1):
        row = TABLE_VV[ids[place - 1]].double()
        total -= math.log(math.exp(row[ids[place]]) / sum(math.exp(value) for value in row))
    return total


def test_only_the_continuation_is_judged_and_a_shared_token_belongs_to_it(folder: Path) -> None:
    judge = Judge(folder)
    even, odd = judge.read("abcd", "efgh"), judge.read("abc", "defgh")
    assert even.nats == pytest.approx(nats_by_hand("abcdefgh", 2, 3))
    assert (even.tokens, even.bytes) == (2, 4)
    assert odd.nats == pytest.approx(nats_by_hand("abcdefgh", 1, 3))
    assert (odd.tokens, odd.bytes) == (3, 6)


def test_the_first_token_has_no_context_and_is_never_judged(folder: Path) -> None:
    judge = Judge(folder)
    assert judge.read("", "abcd").tokens == 1
    assert judge.read("", "ab") == judge.read("abcd", "") == Judged(0.0, 0, 0)


def test_what_lies_behind_the_judges_window_is_not_judged(folder: Path) -> None:
    judged = Judge(folder).read("ab", "cd" * 100)
    assert (judged.tokens, judged.bytes) == (39, 78)
    assert judged.nats == pytest.approx(nats_by_hand("ab" + "cd" * 100, 1, 39))


def test_our_stories_are_read_beside_held_out_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFERENCE_STORIES", 2)
    heard: list[int] = []
    held_out = ['"Hi!" he said. A dog ran home.', "One only", "Never read. Not this."]
    judgement = judge_stories(Judge(folder), [("A cat", " sat."), ("A dog", " ran.")], held_out, heard.append)
    assert (len(judgement.stories), len(judgement.reference), sum(heard)) == (2, 2, 4)
    assert judgement.reference[0] == Judge(folder).read('"Hi!"', " he said. A dog ran home.")
    assert judgement.reference[1] == Judged(0.0, 0, 0)
    output = judgement.as_dict()
    assert output["judge"] == "large-judge"
    nats, tokens = (sum(getattr(one, name) for one in judgement.stories) for name in ("nats", "tokens"))
    assert output["perplexity"] == pytest.approx(math.exp(nats / tokens))
    size = sum(one.bytes for one in judgement.stories)
    assert output["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
    assert output["reference_stories"] == 2


def test_no_tokens_have_no_perplexity() -> None:
    assert Judgement("none", (Judged(0.0, 0, 0),), ()).as_dict()["perplexity"] is None


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("One day, a dog ran. It was big.", "One day, a dog ran."),
        ('"Stop!" said Tom. He ran.', '"Stop!"'),
        ("No end", "No end"),
    ],
)
def test_the_first_sentence_is_given(text: str, first: str) -> None:
    assert first_sentence(text) == first


def test_without_a_judge_or_its_package_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not(None) == "no judge was named (--judge FOLDER)"
    monkeypatch.setattr(module, "PACKAGE", "a_package_that_is_not_there")
    assert why_not(tmp_path) == ("the judge needs the package 'a_package_that_is_not_there', which is not installed")
    with pytest.raises(InputError, match="judge must be a folder"):
        why_not(tmp_path / "nowhere")


def test_a_folder_that_is_no_judge_is_named_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not(folder) is None
    monkeypatch.setattr(PairTokenizer, "is_fast", False)
    with pytest.raises(InputError, match="large-judge needs a fast tokenizer"):
        Judge(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"large-judge cannot be read .*no file named tokenizer.json see the"):
        Judge(folder)
