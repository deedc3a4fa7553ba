"""The whole way from story files to shards: nothing lost without a count, nothing leaked, the same twice."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer

from model.architecture.folder import PRETRAINED
from model.errors import DataError, InputError
from training.data import prepare as module
from training.data.corpus import load_own_stories, own_stories_folder, story_id
from training.data.pool import MIN_BYTES_PER_TOKEN, repair
from training.data.prepare import PrepareOptions, TinyStories, prepare
from training.data.rename import Renamer
from training.data.shards import TokenShard, read_meta, shards_digest, train_tokenizer
from training.trainer.rows import IGNORED, RowStream

OWN = [story.text for story in load_own_stories()]
VOCAB = 400


def write(path: Path, *texts: str, **more: Any) -> Path:
    data = "".join(json.dumps({"text": text, **more}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)
    return path


def replace(options: PrepareOptions, **change: Any) -> PrepareOptions:
    return PrepareOptions(**dict(options) | change)


@pytest.fixture
def options(tmp_path: Path) -> PrepareOptions:
    """Our own stories as source and as validation file, 100 and 44 of them."""
    return PrepareOptions(
        sources=(write(tmp_path / "train.jsonl.gz", *OWN[:100]),),
        val_sources=(write(tmp_path / "val.jsonl", *OWN[100:]),),
        out=tmp_path / "out",
        vocab_size=VOCAB,
    )


def texts_of(out: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    shard = TokenShard(out, split)
    return [tokenizer.decode(shard.story(i)[1:].tolist()) for i in range(len(shard))]


def test_the_shards_hold_the_stories_and_the_report_counts_them(options: PrepareOptions) -> None:
    report = prepare(options)
    assert texts_of(options.out, "train") == OWN[:100]
    assert texts_of(options.out, "val") == OWN[100:]
    for split, texts in (("train", OWN[:100]), ("val", OWN[100:])):
        counts = report.splits[split]
        assert counts.stories == len(texts)
        assert counts.bytes == sum(len(text.encode()) for text in texts)
        assert counts.tokens == len(TokenShard(options.out, split).tokens) - 1
    assert report.dropped == report.skipped == {}
    assert not report.up_to_date
    assert report.vocab_size == VOCAB
    assert json.loads(json.dumps(dataclasses.asdict(report), default=str))["splits"]["val"]["stories"] == 44


def test_the_meta_file_speaks_of_what_lies_beside_it(options: PrepareOptions) -> None:
    report = prepare(options)
    meta = read_meta(options.out)
    assert meta["digest"] == report.digest == shards_digest(options.out)
    assert [(source["name"], source["split"], source["stories"]) for source in meta["sources"]] == [
        ("val.jsonl", "val", 44),
        ("train.jsonl.gz", "train", 100),
    ]
    source = options.sources[0].read_bytes()
    assert meta["sources"][1]["sha256"] == hashlib.sha256(source).hexdigest()
    assert meta["sources"][1]["bytes"] == len(source)
    assert meta["options"]["min_chars"] == 100
    assert str(options.out.parent) not in json.dumps(meta)


def test_it_says_what_separates_the_stories_and_what_was_left_out(options: PrepareOptions, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "one.txt").write_text("\r".join(" ".join(text.split()) for text in OWN[:100]))
    (folder / "notes.md").write_text("x")
    (folder / "LICENSE").write_text("x")
    (folder / ".git").mkdir()
    for number in range(9):
        (folder / ".git" / f"{number}.txt").write_text("x")
    output = io.StringIO()
    report = prepare(replace(options, sources=(folder,)), Console(file=output, width=200))
    assert (report.splits["train"].stories, report.left_out) == (100, {"hidden": 1, ".md": 1, "without a suffix": 1})
    assert "one.txt: 100 stories, separated by line ends" in output.getvalue()
    assert "left out, not files of stories: 1 .md, 1 hidden, 1 without a suffix" in output.getvalue()


def test_the_tokenizer_is_trained_on_the_training_split_alone(options: PrepareOptions) -> None:
    prepare(options)
    expected = train_tokenizer(OWN[:100], VOCAB)
    assert Tokenizer.from_file(str(options.out / "tokenizer.json")).to_str() == expected.to_str()


def test_the_same_input_gives_the_same_files_byte_for_byte(options: PrepareOptions) -> None:
    other = replace(options, out=options.out.parent / "other")
    prepare(options)
    prepare(other)
    for file in options.out.iterdir():
        assert file.read_bytes() == (other.out / file.name).read_bytes(), file.name


def test_a_second_call_does_nothing_unless_forced(options: PrepareOptions) -> None:
    first = prepare(options)
    inode = (options.out / "train.bin").stat().st_ino
    # Another name and place for the same content is still the same input.
    moved = options.sources[0].rename(options.out.parent / "moved.jsonl.gz")
    options = replace(options, sources=(moved,))
    second = prepare(options)
    assert second.up_to_date
    assert (second.digest, second.splits) == (first.digest, first.splits)
    assert (options.out / "train.bin").stat().st_ino == inode
    forced = prepare(replace(options, force=True))
    assert not forced.up_to_date
    assert forced.digest == first.digest


@pytest.mark.parametrize("change", ["source", "option", "damage", "gone"])
def test_shards_that_are_no_longer_current_are_made_again(options: PrepareOptions, change: str) -> None:
    first = prepare(options)
    if change == "source":
        write(options.sources[0], *OWN[:99])
    elif change == "option":
        options = replace(options, vocab_size=VOCAB + 1)
    elif change == "damage":
        data = bytearray((options.out / "train.bin").read_bytes())
        data[100] ^= 1
        (options.out / "train.bin").write_bytes(data)
    else:
        (options.out / "val.idx.npy").unlink()
    again = prepare(options)
    assert not again.up_to_date
    assert (again.digest == first.digest) == (change in ("damage", "gone"))
    assert shards_digest(options.out) == again.digest


def test_every_dropped_story_is_counted_by_its_reason(tmp_path: Path, options: PrepareOptions) -> None:
    half = OWN[0].split()
    near = " ".join(half[: len(half) * 3 // 4]) + " and then they all went home to bed."
    bad = {
        "empty": [" \n"],
        "too short": ["Short."],
        "too long": [" ".join(OWN[:5])],
        "markup": [OWN[1] + " <br> The end."],
        "odd characters": [OWN[1] + " \x00."],
        "cut off": [OWN[1][:-1] + " and", OWN[2][:-1] + " but"],
        "starts mid-sentence": [OWN[1][1:]],
        "exact duplicate": [OWN[3].upper(), OWN[100]],
        "near duplicate": [near],
    }
    write(options.sources[0], *OWN[:100], *(text for texts in bad.values() for text in texts))
    report = prepare(replace(options, max_chars=2000))
    assert report.dropped == {reason: len(texts) for reason, texts in bad.items()}
    assert texts_of(options.out, "train") == OWN[:100]
    total = sum(source["stories"] for source in report.sources)
    assert total == sum(split.stories for split in report.splits.values()) + sum(report.dropped.values())


def test_validation_files_stay_whole_and_are_only_repaired(options: PrepareOptions) -> None:
    odd = ["Short.", "cut off in the", "“Hi”  <b>there</b>", OWN[100], OWN[0], " \n ", "a<|endoftext|>b"]
    write(options.val_sources[0], *OWN[100:], *odd)
    report = prepare(options)
    expected = [*OWN[100:], *(repair(text) for text in odd if text.strip())]
    assert texts_of(options.out, "val") == expected
    # The story in both files left train; a story twice in the validation file stays twice.
    assert texts_of(options.out, "train") == OWN[1:100]
    assert report.dropped == {"empty": 1, "exact duplicate": 1}


def test_without_a_validation_file_the_split_hangs_on_each_story_alone(options: PrepareOptions) -> None:
    options = replace(options, val_sources=(), val_fraction=0.3)
    prepare(options)
    val, train = texts_of(options.out, "val"), texts_of(options.out, "train")
    assert set(val) | set(train) == set(OWN[:100])
    assert 15 < len(val) < 45
    # In another order and among more stories each one still falls on its side.
    write(options.sources[0], *reversed(OWN))
    prepare(options)
    assert set(val) <= set(texts_of(options.out, "val"))
    assert set(train) <= set(texts_of(options.out, "train"))
    prepare(replace(options, seed=1))
    assert set(texts_of(options.out, "val")) - set(val) - set(OWN[100:])


def test_no_story_or_near_copy_of_one_is_in_both_splits(tmp_path: Path, options: PrepareOptions) -> None:
    copies = [text.rsplit(" ", 3)[0] + " somewhere over there." for text in OWN[:100]]
    write(options.sources[0], *OWN[:100], *copies)
    report = prepare(replace(options, val_sources=(), val_fraction=0.3))
    firsts = {text[:60] for text in texts_of(options.out, "train")}
    assert not firsts & {text[:60] for text in texts_of(options.out, "val")}
    assert report.dropped == {"near duplicate": 100}


def test_stories_marked_as_held_out_are_never_trained_on(tmp_path: Path, options: PrepareOptions) -> None:
    held_out = [story.text for story in load_own_stories("heldout")]
    mine = [story.text for story in load_own_stories("train")]
    small = replace(options, sources=(own_stories_folder(),), val_sources=(), vocab_size=300)
    prepare(small)
    assert texts_of(options.out, "val") == held_out
    assert texts_of(options.out, "train") == mine
    other = write(tmp_path / "other.jsonl", "A story to judge by.")
    report = prepare(replace(small, val_sources=(other,)))
    assert report.dropped == {"held out": len(held_out)}
    assert texts_of(options.out, "train") == mine


def test_a_tokenizer_that_is_given_is_used_as_it_is(tmp_path: Path, options: PrepareOptions) -> None:
    path = tmp_path / "mine.json"
    train_tokenizer(OWN[:20], 300).save(str(path))
    report = prepare(replace(options, tokenizer=path))
    assert report.vocab_size == 300
    expected = Tokenizer.from_file(str(path))
    assert Tokenizer.from_file(str(options.out / "tokenizer.json")).to_str() == expected.to_str()
    assert TokenShard(options.out, "train").story(7)[1:].tolist() == expected.encode(OWN[7]).ids
    assert prepare(replace(options, tokenizer=path)).up_to_date
    train_tokenizer(OWN[:20], 301).save(str(path))
    assert not prepare(replace(options, tokenizer=path)).up_to_date


def test_a_bad_line_stops_or_is_counted_and_shown(options: PrepareOptions) -> None:
    lines = [json.dumps({"text": text}).encode() for text in OWN[:100]]
    lines[10:10] = [b"{", b'{"text": 1}', b'{"text": "\xff"}']
    options.sources[0].write_bytes(gzip.compress(b"\n".join(lines)))
    with pytest.raises(DataError, match=r"train\.jsonl\.gz, line 11: bad JSON"):
        prepare(options)
    assert not options.out.exists()
    screen = io.StringIO()
    report = prepare(replace(options, skip_bad=True), Console(file=screen, width=200))
    assert report.skipped == {"bad JSON": 1, "no text": 1, "not UTF-8": 1}
    assert texts_of(options.out, "train") == OWN[:100]
    assert "skipped: 1 bad JSON, 1 no text, 1 not UTF-8" in screen.getvalue()
    assert "line 13: byte 0xff" in screen.getvalue()


def test_a_corpus_too_small_for_its_tokenizer_says_what_it_needs(options: PrepareOptions) -> None:
    size = sum(len(text) for text in OWN[:100])
    with pytest.raises(DataError, match=rf"{size:,} bytes of training text, .* 4,096 tokens needs 262,144"):
        prepare(replace(options, vocab_size=4096))
    assert MIN_BYTES_PER_TOKEN * 4096 == 262_144


def test_a_text_too_uniform_for_its_tokenizer_is_refused(options: PrepareOptions) -> None:
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat"]
    stories = [" ".join(rng.choices(words, k=100)).capitalize() + "." for _ in range(200)]
    write(options.sources[0], *stories)
    with pytest.raises(DataError, match=r"too small a corpus: its [\d,]+ bytes give \d+ of 600 tokens"):
        prepare(replace(options, vocab_size=600))


def test_a_split_without_stories_is_an_error(options: PrepareOptions) -> None:
    write(options.sources[0], "Short.")
    with pytest.raises(DataError, match=r"no training story is left \(dropped: 1 too short\)"):
        prepare(options)
    write(options.sources[0], *OWN[:100])
    write(options.val_sources[0], " ")
    with pytest.raises(DataError, match="no validation story is left: the files of --val hold none"):
        prepare(options)
    with pytest.raises(DataError, match="raise --val-fraction, or give --val FILE"):
        prepare(replace(options, val_sources=(), val_fraction=1e-9))


def test_a_failure_leaves_the_old_shards_and_no_rubbish(
    options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = prepare(options).digest
    before = sorted(path.name for path in options.out.parent.iterdir())
    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left"), DataError)):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        # A full disk or a Ctrl-C at the worst moment, just before the new folder is put in place.
        monkeypatch.setattr(module, "replace_folder", fail)
        with pytest.raises(raised):
            prepare(replace(options, force=True))
        assert sorted(path.name for path in options.out.parent.iterdir()) == before
        assert shards_digest(options.out) == digest


def test_a_folder_or_file_of_something_else_is_not_replaced(options: PrepareOptions) -> None:
    options.out.mkdir()
    (options.out / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="is a folder of something else"):
        prepare(replace(options, force=True))
    assert (options.out / "thesis.tex").read_text() == "years of work"
    with pytest.raises(DataError, match="is a file; name a folder"):
        prepare(replace(options, out=options.sources[0]))


def test_a_file_cannot_be_source_and_validation_at_once(options: PrepareOptions) -> None:
    with pytest.raises(InputError, match=r"val names a file that is also a source: train\.jsonl\.gz"):
        prepare(replace(options, val_sources=options.sources))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ()}, "source is missing"),
        ({"vocab_size": 256}, "vocab_size must be greater than or equal to 257, got 256"),
        ({"vocab_size": 65_537}, "vocab_size must be less than or equal to 65536"),
        ({"rename": -1}, "rename must be greater than or equal to 0, got -1"),
        ({"val_fraction": 0.0}, "val_fraction must be greater than 0, got 0.0"),
        ({"val_fraction": float("nan")}, "val_fraction must be a finite number"),
        ({"seed": -1}, "seed must be greater than or equal to 0, got -1"),
        ({"min_chars": 0}, "min_chars must be greater than or equal to 1"),
        ({"min_chars": 20, "max_chars": 10}, r"max_chars \(10\), got 20"),
    ],
)
def test_an_option_out_of_its_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PrepareOptions(**({"sources": (Path("a.jsonl"),)} | change))


def test_the_download_becomes_source_and_validation_file(
    options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The transfer itself is tested in test_download; here two files are simply there already.
    asked: list[Path] = []

    def fetched(folder: Path) -> TinyStories:
        asked.append(folder)
        return TinyStories(train=options.sources[0], valid=options.val_sources[0])

    monkeypatch.setattr(module, "download_tinystories", fetched)
    prepare(replace(options, sources=(), val_sources=(), download=True))
    assert asked == [options.out.parent / "downloads"]
    assert texts_of(options.out, "train") == OWN[:100]
    assert texts_of(options.out, "val") == OWN[100:]


def test_a_large_corpus_trains_its_tokenizer_on_a_sample(
    options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def spy(texts: Any, vocab_size: int) -> Tokenizer:
        read.extend(texts)
        return train_tokenizer(read, vocab_size)

    size = sum(len(text) for text in OWN[:100])
    monkeypatch.setattr("training.data.pool.TOKENIZER_SAMPLE_BYTES", size // 2)
    monkeypatch.setattr("training.data.pool.train_tokenizer", spy)
    prepare(options)
    assert set(read) < set(OWN[:100])
    assert 0.3 * size < sum(map(len, read)) < 0.7 * size
    assert texts_of(options.out, "train") == OWN[:100]


def test_progress_and_figures_are_shown(options: PrepareOptions) -> None:
    screen = io.StringIO()
    report = prepare(options, Console(file=screen, width=120))
    text = screen.getvalue()
    for stage in ("checking sources", "reading", "duplicates", "tokenizer", "writing train", "writing val"):
        assert stage in text
    assert "dropped: nothing" in text
    assert report.digest[:12] in text
    screen = io.StringIO()
    prepare(options, Console(file=screen, width=120))
    assert "is up to date" in screen.getvalue()


def test_rename_come_behind_the_stories_and_only_in_train(options: PrepareOptions) -> None:
    report = prepare(replace(options, rename=2))
    texts = texts_of(options.out, "train")
    assert texts[:100] == OWN[:100]
    assert texts_of(options.out, "val") == OWN[100:]
    copies = texts[100:]
    assert len(copies) == report.renamed["copies"] == report.splits["train"].stories - 100 > 0
    assert report.splits["train"].bytes == sum(len(text.encode()) for text in texts)
    assert not set(copies) & set(OWN)
    assert not prepare(options).up_to_date
    assert prepare(replace(options, rename=2)).digest == report.digest


def test_the_first_mention_of_a_new_name_is_masked_and_later_ones_are_not(tmp_path: Path) -> None:
    story = "One day, Lily saw a cat. Lily said to Tim that the cat was hers. Tim and Lily gave it some milk to drink."
    options = PrepareOptions(
        sources=(write(tmp_path / "train.jsonl", story),),
        val_sources=(write(tmp_path / "val.jsonl", OWN[0]),),
        out=tmp_path / "out",
        tokenizer=PRETRAINED / "tokenizer.json",
        rename=1,
    )
    prepare(options)
    tokenizer, shard = Tokenizer.from_file(str(options.tokenizer)), TokenShard(options.out, "train")
    first, second = Renamer([story]).copies(story, story=story_id(story), count=2)
    assert texts_of(options.out, "train") == [story, first.text] != [story, second.text]
    masked = shard.tokens[shard.masked].tolist()
    assert tokenizer.decode(masked).split() == list(first.names.values())
    inputs, targets = next(RowStream(shard, 128, 0))
    assert (targets == IGNORED).sum() == 128 - len(shard.tokens) + 1 + len(masked)
    counted = targets[:-1] != IGNORED
    assert (targets[:-1][counted] == inputs[1:][counted]).all()


def synthetic_corpus(path: Path, size: int, seed: int = 0) -> int:
    """Write `size` bytes of stories as long as TinyStories', all different; returns how many.

    Sentences are drawn from a large stock and share a worn opening, as such corpora do; one story in a
    hundred is a near copy of the one before it.
    """
    rng = random.Random(seed)
    vocabulary = sorted({word.strip('.,!?"') for text in OWN for word in text.split()} - {""})
    sentences = [" ".join(rng.choices(vocabulary, k=rng.randint(4, 7))).capitalize() for _ in range(20_000)]
    openings = [f"Once upon a time there was a little girl named {name}" for name in vocabulary[:300]]
    written = count = 0
    body: list[str] = []
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            if count % 100 != 99:
                # Fresh words in each sentence, so that phrases repeat but, as in real stories, 8-word runs do not.
                body = [f"{s} {' '.join(rng.choices(vocabulary, k=3))}" for s in rng.choices(sentences, k=16)]
            else:
                body[-1] = rng.choice(sentences)
            line = json.dumps({"text": ". ".join([rng.choice(openings), *body]) + "."}) + "\n"
            written += file.write(line)
            count += 1
    return count


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [100, 300, 2000])
def test_a_large_corpus_passes_in_under_a_gigabyte_of_memory(tmp_path: Path, megabytes: int) -> None:
    count = synthetic_corpus(tmp_path / "large.jsonl", megabytes * 1_000_000)
    code = (
        "import dataclasses, json; from pathlib import Path; from training.data.prepare import PrepareOptions, prepare;"
        "report = prepare(PrepareOptions(sources=(Path('large.jsonl'),), out=Path('out')));"
        "print(json.dumps(dataclasses.asdict(report), default=str))"
    )
    # A process of its own, so that its largest size is that of this work alone.
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
    )
    report = json.loads(done.stdout)
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    print({key: report[key] for key in ("peak_memory_mb", "seconds", "splits", "dropped")}, count, cpu)
    assert report["peak_memory_mb"] < 1000
    kept = sum(split["stories"] for split in report["splits"].values())
    assert kept + sum(report["dropped"].values()) == count
    assert report["dropped"]["near duplicate"] == pytest.approx(count / 100, rel=0.02)
