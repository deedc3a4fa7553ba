"""TinyStories from the Hugging Face hub (Eldan and Li 2023, arXiv:2305.07759; licence CDLA-Sharing-1.0).

The GPT-4 half of the data set as plain text: 2.2 GB for training and 22 MB for validation.
"""

from pathlib import Path
from typing import NamedTuple

from model.errors import DataError, MissingExtraError

REPOSITORY = "roneneldan/TinyStories"
TRAIN_FILE = "TinyStoriesV2-GPT4-train.txt"
VALID_FILE = "TinyStoriesV2-GPT4-valid.txt"


class TinyStories(NamedTuple):
    """The two files on this machine."""

    train: Path
    valid: Path


def download_tinystories(folder: Path, *, revision: str = "main", endpoint: str | None = None) -> TinyStories:
    """Fetch both files into `folder` (or find them there) and return their paths.

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
