"""`story data`: make token shards of story files.

Three passes, none of which holds the corpus in memory: clean the texts into a file and hash them for the duplicate
search; train the tokenizer; write the shards. The finished folder replaces the old one by a rename.
"""

import hashlib
import json
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from tokenizers import Tokenizer

from model.errors import DataError, InputError, MissingExtraError
from model.files import replace_folder
from model.validation import Options
from training.data.corpus import BadLineError, file_sha256, find_files, kind_of, layout_of
from training.data.dedup import BANDS
from training.data.pool import Step, StoryPool
from training.data.shards import MAX_VOCAB, SPLITS, TokenShard, load_tokenizer, read_meta, shards_digest

REPOSITORY = "roneneldan/TinyStories"
TRAIN_FILE = "TinyStoriesV2-GPT4-train.txt"
VALID_FILE = "TinyStoriesV2-GPT4-valid.txt"


class TinyStories(NamedTuple):
    """The two files on this machine."""

    train: Path
    valid: Path


def download_tinystories(folder: Path, *, revision: str = "main", endpoint: str | None = None) -> TinyStories:
    """Fetch TinyStories (Eldan and Li 2023, CDLA-Sharing-1.0) into `folder`, or find it there; return the paths.

    The GPT-4 half as plain text, 2.2 GB and 22 MB, from the Hugging Face hub.

    `endpoint` is the hub's address; by default the one in the environment's HF_ENDPOINT, or the public hub.

    Raises:
        DataError: the hub cannot be reached, or does not have the files at this revision.
        MissingExtraError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingExtraError("downloading TinyStories", "train") from error

    def fetch(name: str) -> Path:
        try:
            return Path(
                hf_hub_download(
                    REPOSITORY,
                    name,
                    repo_type="dataset",
                    revision=revision,
                    local_dir=folder,
                    endpoint=endpoint,
                    library_name="write-me-a-story",
                )
            )
        # LocalEntryNotFoundError: nothing answered and nothing was fetched before.
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()
            raise DataError(
                f"{REPOSITORY}/{name} at revision {revision} could not be fetched "
                f"({reason[0] if reason else type(error).__name__}); "
                "check the network and HF_ENDPOINT, or give local files instead"
            ) from error

    return TinyStories(train=fetch(TRAIN_FILE), valid=fetch(VALID_FILE))


FORMAT = 2
"""Raised whenever the same input would give another output, so that old shards are not taken for current ones."""

_EXAMPLES = 5
_SHAPING = ("val_fraction", "skip_bad", "seed", "min_chars", "max_chars", "rename")


class PrepareOptions(Options):
    """What to make shards of, and how; checked when made."""

    sources: tuple[Path, ...] = ()
    """Files or folders to train on: see `training.data.corpus.KINDS`."""
    val_sources: tuple[Path, ...] = ()
    """Files to judge by, kept whole; without them a share of the sources is split off."""
    out: Path = Path("data/tinystories")
    """Folder for the shards; replaced if it holds older ones."""
    download: bool = False
    """Add TinyStories from the Hugging Face hub to the sources (and to the val sources, if there are none)."""
    tokenizer: Path | None = None
    """Use this tokenizer.json instead of training one."""
    vocab_size: int = Field(default=4096, ge=257, le=MAX_VOCAB)
    """Tokens of a newly trained tokenizer, with the 256 bytes and the end mark."""
    val_fraction: float = Field(default=0.02, gt=0, le=0.5)
    """Share of the stories split off for validation where there are no val sources."""
    skip_bad: bool = False
    """Count and report unusable lines instead of stopping at the first."""
    force: bool = False
    """Make the shards again even if they are up to date."""
    seed: int = Field(default=0, ge=0)
    """Chooses which stories fall into the validation split and into the tokenizer's sample."""
    min_chars: int = Field(default=100, ge=1)
    """Training stories of fewer characters are dropped."""
    max_chars: int = 100_000
    """Training stories of more characters are dropped."""
    rename: int = Field(default=0, ge=0)
    """Copies of each training story with other names, behind the stories themselves (`training.data.rename`)."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.sources and not self.download:
            raise InputError("source", "is missing: name files or folders of stories, or ask for the download")
        if self.min_chars > self.max_chars:
            raise InputError("min_chars", f"must be at most max_chars ({self.max_chars}), got {self.min_chars}")
        return self


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """Size of one split: `tokens` counts prediction targets (one end a story included), `bytes` the UTF-8 text."""

    stories: int
    tokens: int
    bytes: int


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What `prepare` did; `dropped` counts stories by reason, `skipped` unusable lines.

    `digest` names the result (see `shards_digest`), `seconds` is wall time and `peak_memory_mb` the largest
    resident size of this process so far.
    """

    out: Path
    up_to_date: bool
    digest: str
    vocab_size: int
    splits: dict[str, SplitCounts]
    sources: list[dict[str, Any]]
    dropped: dict[str, int]
    skipped: dict[str, int]
    skipped_examples: list[str] = field(default_factory=list)
    renamed: dict[str, int] = field(default_factory=dict)
    """`Renamer.counts`, where copies were made."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Files in folders of the sources that hold no stories, by suffix."""
    seconds: float = 0.0
    peak_memory_mb: float = 0.0


def prepare(options: PrepareOptions, console: Console | None = None) -> PrepareReport:
    """Make token shards in `options.out`, or find them up to date; progress is shown on `console`.

    Raises `DataError` for an unusable source or `out`, `InputError` for a val source that is also a source.
    """
    began = time.perf_counter()
    say = console or Console(quiet=True)
    _check_out(options.out)
    train_paths, val_paths = list(options.sources), list(options.val_sources)
    if options.download:
        fetched = download_tinystories(options.out.parent / "downloads")
        train_paths.append(fetched.train)
        val_paths = val_paths or [fetched.valid]
    others: list[Path] = []
    train_files, val_files = find_files(train_paths, others.append), find_files(val_paths, others.append)
    in_both = {path.resolve() for path in train_files} & {path.resolve() for path in val_files}
    if in_both:
        raise InputError("val", f"names a file that is also a source: {min(in_both).name}")

    bars = Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TaskProgressColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=say,
    )
    with bars:
        report = _Preparation(options, train_files, val_files, bars).run()
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    sorts = ("hidden" if path.name.startswith(".") else path.suffix.lower() for path in sorted(set(others)))
    left_out = dict(Counter(sort or "without a suffix" for sort in sorts))
    report = replace(report, seconds=time.perf_counter() - began, peak_memory_mb=peak, left_out=left_out)
    _tell(report, say)
    return report


class _Preparation:
    """One call of `prepare`, after its files are found."""

    def __init__(self, options: PrepareOptions, train: list[Path], val: list[Path], bars: Progress) -> None:
        self._options = options
        self._files = [(path, "val") for path in val] + [(path, "train") for path in train]
        self._val_is_given = bool(val)
        self._bars = bars
        self._skipped: Counter[str] = Counter()
        self._skipped_examples: list[str] = []

    def run(self) -> PrepareReport:
        options = self._options
        sources = self._describe_sources()
        given = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
        settings: dict[str, Any] = {name: getattr(options, name) for name in _SHAPING}
        settings["val_is_given"] = self._val_is_given
        settings["vocab_size"] = options.vocab_size if given is None else given.get_vocab_size()
        settings["tokenizer_sha256"] = None if options.tokenizer is None else file_sha256(options.tokenizer)
        # What the files hold and in which order matters, not what they are called.
        contents = [(source["split"], source["sha256"]) for source in sources]
        inputs = hashlib.sha256(json.dumps([FORMAT, contents, settings], sort_keys=True).encode()).hexdigest()
        if not options.force and (meta := _current_meta(options.out, inputs)):
            return _report(options.out, meta, up_to_date=True)
        try:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f".{options.out.name}.", dir=options.out.parent))
            try:
                meta = self._build(work, sources, given)
                meta |= {"inputs": inputs, "options": settings}
                (work / "shards" / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", "utf-8")
                replace_folder(work / "shards", options.out, work / "old")
            finally:
                shutil.rmtree(work, ignore_errors=True)
        except OSError as error:  # a full disk, mostly; reading errors arrive as DataError
            raise DataError(f"{options.out}: cannot be written: {error.strerror or error}") from error
        return _report(options.out, meta, up_to_date=False)

    def _describe_sources(self) -> list[dict[str, Any]]:
        """Name, split, size and SHA-256 of every source file."""
        step = self._bar("checking sources", sum(path.stat().st_size for path, _ in self._files))

        def describe(path: Path, split: str) -> dict[str, Any]:
            size, digest = path.stat().st_size, file_sha256(path, step)
            return {"name": path.name, "split": split, "bytes": size, "sha256": digest}

        return [describe(path, split) for path, split in self._files]

    def _build(self, work: Path, sources: list[dict[str, Any]], tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Fill `work`/shards with everything but meta.json, whose contents it returns."""
        options = self._options
        shards = work / "shards"
        shards.mkdir()
        pool = StoryPool(
            work / "stories",
            val_fraction=None if self._val_is_given else options.val_fraction,
            min_chars=options.min_chars,
            max_chars=options.max_chars,
            seed=options.seed,
            on_bad=self._skip if options.skip_bad else None,
        )
        try:
            step = self._bar("reading", sum(source["bytes"] for source in sources))
            for (path, split), source in zip(self._files, sources, strict=True):
                if kind_of(path) == "text":
                    source["layout"] = layout_of(path)
                source["stories"] = pool.read(path, validation=split == "val", on_bytes=step)
            every = sum(map(pool.size, SPLITS))
            step = self._bar("duplicates", every)
            pool.drop_duplicates(lambda: step(every / BANDS))  # each band is of all stories
            pool.check(options.vocab_size if tokenizer is None else None)
            if tokenizer is None:
                tokenizer = pool.train_tokenizer(options.vocab_size, self._bar("tokenizer", pool.size("train")))
            tokenizer.save(str(shards / "tokenizer.json"))
            splits: dict[str, dict[str, int]] = {}
            for split in SPLITS:
                copies, size = options.rename if split == "train" else 0, pool.size(split)
                bar = self._bar(f"writing {split}", size * (1 + copies))
                written = pool.write(split, shards, tokenizer, bar, copies)
                size += pool.renamed["bytes"] if copies else 0
                splits[split] = asdict(SplitCounts(written.stories, written.tokens, size))
        finally:
            pool.close()
        return {
            "format": FORMAT,
            "digest": shards_digest(shards),
            "vocab_size": tokenizer.get_vocab_size(),
            "splits": splits,
            "sources": sources,
            "dropped": dict(sorted(pool.dropped.items())),
            "skipped": dict(sorted(self._skipped.items())),
            "skipped_examples": self._skipped_examples,
            "renamed": dict(pool.renamed),
        }

    def _skip(self, error: BadLineError) -> None:
        self._skipped[error.reason] += 1
        if len(self._skipped_examples) < _EXAMPLES:
            self._skipped_examples.append(str(error))

    def _bar(self, what: str, total: int) -> Step:
        """Begin a progress bar of `total` bytes; what it returns is called with the bytes done since the last call."""
        return partial(self._bars.advance, self._bars.add_task(what, total=total))


def _check_out(out: Path) -> None:
    """Refuse to replace what this program did not make."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; name a folder for the shards")
    if out.is_dir() and any(out.iterdir()) and not (out / "meta.json").is_file():
        raise DataError(f"{out}: is a folder of something else (no meta.json); name a new or an empty one")


def _current_meta(out: Path, inputs: str) -> dict[str, Any] | None:
    """The meta.json of shards that are whole and were made of the same input."""
    try:
        meta = read_meta(out)
        if meta.get("inputs") != inputs or meta.get("digest") != shards_digest(out):
            return None
        for split in SPLITS:
            TokenShard(out, split)
    except DataError:
        return None  # missing or damaged: made anew
    return meta


def _report(out: Path, meta: dict[str, Any], *, up_to_date: bool) -> PrepareReport:
    same = ("digest", "vocab_size", "sources", "dropped", "skipped", "skipped_examples", "renamed")
    splits = {split: SplitCounts(**counts) for split, counts in meta["splits"].items()}
    return PrepareReport(out=out, up_to_date=up_to_date, splits=splits, **{name: meta[name] for name in same})


def _tell(report: PrepareReport, say: Console) -> None:
    def line(text: str) -> None:
        say.print(text, highlight=False, markup=False, soft_wrap=True)

    if report.up_to_date:
        line(f"{report.out} is up to date")
    for source in report.sources[:_EXAMPLES]:
        if layout := source.get("layout"):
            line(f"{source['name']}: {source['stories']:,} stories, separated by {layout}")
    if report.left_out:
        listed = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(report.left_out.items()))
        line(f"left out, not files of stories: {listed}")
    for split, counts in report.splits.items():
        line(
            f"{split:>5}: {counts.stories:,} stories, {counts.tokens:,} tokens, {counts.bytes / 1e6:,.2f} MB "
            f"({counts.bytes / counts.tokens:.2f} bytes a token)"
        )
    if renamed := report.renamed:
        line(
            f"renamed: {renamed['copies']:,} copies with {renamed['distinct_names']:,} new names; "
            f"{renamed.get('without_names', 0):,} stories have no name"
        )
    for what, by_reason in (("dropped", report.dropped), ("skipped", report.skipped)):
        listed = ", ".join(f"{count:,} {reason}" for reason, count in by_reason.items())
        line(f"{what}: {listed or 'nothing'}")
    for example in report.skipped_examples:
        line(f"  {example}")
    line(f"digest {report.digest[:12]}, {report.seconds:,.1f} s, peak memory {report.peak_memory_mb:,.0f} MB")
