"""Errors of Modal's client as one line each, for everything that calls it: sweeps and deployments."""

import contextlib
from collections.abc import Iterator

from model.errors import AccountError, DeployError

NO_ACCOUNT = (
    "Modal does not know you: run `modal token new`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET "
    "(--platform loopback needs no account)"
)


@contextlib.contextmanager
def modal_errors() -> Iterator[None]:
    """Translate what the client raises: no credentials to `AccountError`, everything else to `DeployError`."""
    import modal

    try:
        yield
    except modal.exception.AuthError:
        raise AccountError(NO_ACCOUNT) from None
    except modal.exception.NotFoundError as error:
        raise DeployError(f"Modal has no such thing: {error}") from None
    except (modal.exception.Error, OSError) as error:
        raise DeployError(f"Modal cannot be used: {str(error) or type(error).__name__}") from None
