"""Texts of a store as anyone may read them: without addresses and folders, which name machines and people."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"\b[a-z][a-z0-9+.-]*:/{2,}[^\s'\"()<>]*", re.IGNORECASE)
_WINDOWS = re.compile(r"\b[a-z]:\\[^\s'\"()<>]*", re.IGNORECASE)
_FOLDER = re.compile(r"(?<![\w/.~])~?/(?:[^\s'\"()<>:/]+/)+[^\s'\"()<>:/]*")


def without_places(text: str) -> str:
    """`text` with each address and each absolute path as `…`; a unit such as `tokens/s` stays."""
    for pattern in (_ADDRESS, _WINDOWS, _FOLDER):
        text = pattern.sub("…", text)
    return text


def target_name(target: str) -> str:
    """A benchmark's target: what it is, not where. A registered version is named by its alias or number."""
    if target.startswith("models:/"):
        return target.removeprefix("models:/")
    if target.startswith(("http://", "https://")):
        return "a server"
    return without_places(target)
