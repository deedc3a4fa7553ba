"""The errors that are meant for users and programs, all derived from `StoryError`.

A message names the input, what was wrong with it and what is allowed, and carries nothing that must stay private. The
command line turns `exit_code` into its own exit status.
"""


class StoryError(Exception):
    """Base of all errors whose message is for the user."""

    exit_code = 2


class InputError(StoryError):
    """A value given by a user is not usable.

    `param` is the name of the input (`temperature`), so that a page can show the message beside its field.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param} {message}")
        self.param = param


class DataError(StoryError):
    """A file of stories is unusable; the message names the file and, where there is one, the line."""


class ModelError(StoryError):
    """A model folder or checkpoint is missing, damaged or of another format."""


class BusyError(StoryError):
    """All slots are taken and the queue is full; try again after `retry_after` seconds."""

    exit_code = 1

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LimitError(BusyError):
    """One client, or all together, have had what they may have in a time; `scope` is `client` or `all`."""

    def __init__(self, message: str, retry_after: float, scope: str) -> None:
        super().__init__(message, retry_after)
        self.scope = scope


class GenerationError(StoryError):
    """A story broke off because of a fault, not because its client stopped it."""

    exit_code = 1


class DrainingError(StoryError):
    """The service stops: it takes no new requests, and aborts those that outlast its time to drain."""

    exit_code = 1

    def __init__(self) -> None:
        super().__init__("the service is draining: it ends its running stories and takes no new ones")


class TrainingError(StoryError):
    """Training had to stop (a loss that is not finite, say); the last good checkpoint is kept."""

    exit_code = 1


class DeployError(StoryError):
    """A deployment did not come up, or did not pass its check."""

    exit_code = 1


class AccountError(StoryError):
    """The platform refuses the credentials, or got none; the message says what to set."""


class MissingExtraError(StoryError):
    """A command needs an optional set of packages that is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the '{extra}' packages: pip install -e '.[{extra}]' -c constraints.txt")


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """Return a text, or an error's, without line breaks and cut to `limit` characters; its type where it has none."""
    line = " ".join(str(error).split()) or (type(error).__name__ if isinstance(error, BaseException) else "")
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
