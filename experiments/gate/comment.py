"""A verdict as a comment on a pull request that later verdicts replace: `python -m experiments.gate.comment FILE`.

It needs only Python, so the job that may write to a pull request installs nothing. The file's first line is a hidden
HTML comment by which the comment is found again.

Read from the environment, as a GitHub runner sets it: `GITHUB_API_URL`, `GITHUB_REPOSITORY`, `GITHUB_TOKEN` and
`PULL_REQUEST`, its number. Where there is no number, nothing is written and the exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = 100
"""Comments in one answer; GitHub gives no more."""
LONGEST = 65_000
"""Characters of a comment; GitHub takes 65,536."""
SECONDS = 30.0
CUT = "\n\n(truncated: GitHub's limit for a comment; the full report is among the job's artifacts)\n"


class CommentError(Exception):
    """The comment could not be written; the message says why in one line, without the token."""


class Comments:
    """The comments of one pull request, by GitHub's REST interface."""

    def __init__(self, api: str, repository: str, number: int, token: str) -> None:
        self._root = f"{api.rstrip('/')}/repos/{repository}/issues"
        self._number = number
        self._token = token

    def put(self, body: str) -> str:
        """Write `body`, or put it in place of the comment that begins with the same first line.

        Returns `written`, `replaced` or `unchanged`.

        Raises:
            CommentError: the body has no mark, or GitHub refused or did not answer.
        """
        mark = body.partition("\n")[0].strip()
        if not (mark.startswith("<!--") and mark.endswith("-->")):
            raise CommentError("the report's first line must be an HTML comment, by which it is found again")
        if len(body) > LONGEST:
            body = body[: LONGEST - len(CUT)] + CUT
        before = self._find(mark)
        if before is None:
            self._ask("POST", f"/{self._number}/comments", {"body": body})
            return "written"
        if before["body"] == body:
            return "unchanged"
        self._ask("PATCH", f"/comments/{before['id']}", {"body": body})
        return "replaced"

    def _find(self, mark: str) -> dict[str, Any] | None:
        """The first comment of a bot that begins with `mark`; a user's comment that quotes it is not touched."""
        page = 1
        while True:
            found = self._ask("GET", f"/{self._number}/comments?per_page={PAGE}&page={page}")
            for comment in found:
                if comment["user"]["type"] == "Bot" and comment["body"].partition("\n")[0].strip() == mark:
                    return dict(comment)
            if len(found) < PAGE:
                return None
            page += 1

    def _ask(self, method: str, path: str, body: dict[str, str] | None = None) -> Any:
        request = urllib.request.Request(
            self._root + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Accept": "application/vnd.github+json",
                "Authorization": f"Bearer {self._token}",
                "Content-Type": "application/json",
                "X-GitHub-Api-Version": "2022-11-28",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()
            raise CommentError(f"GitHub answered {error.code} to {method} of the comments") from None
        except (OSError, ValueError) as error:
            raise CommentError(f"GitHub did not answer to {method} of the comments: {error}") from None


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.gate.comment", description=__doc__)
    parser.add_argument("report", type=Path, help="Markdown whose first line is an HTML comment.")
    parser.add_argument("--details", type=Path, help="More Markdown, folded below it.")
    options = parser.parse_args(arguments)
    number = environment.get("PULL_REQUEST", "")
    if not number:
        print("no pull request, so no comment")
        return 0
    try:
        body = _body(options.report, options.details)
        comments = Comments(
            environment["GITHUB_API_URL"], environment["GITHUB_REPOSITORY"], int(number), environment["GITHUB_TOKEN"]
        )
        print(f"comment {comments.put(body)}")
    except KeyError as error:
        print(f"comment: {error.args[0]} is not set", file=sys.stderr)
        return 2
    except ValueError:
        print(f"comment: PULL_REQUEST must be a number, got {number!r}", file=sys.stderr)
        return 2
    except CommentError as error:
        print(f"comment: {error}", file=sys.stderr)
        return 1
    return 0


def _body(report: Path, details: Path | None) -> str:
    try:
        body = report.read_text("utf-8")
        if details is not None and details.is_file():
            more = details.read_text("utf-8")
            body += f"\n<details><summary>The benchmark</summary>\n\n{more}\n</details>\n"
    except OSError as error:
        raise CommentError(f"{report} cannot be read: {error.strerror}") from None
    return body


if __name__ == "__main__":
    sys.exit(main())
