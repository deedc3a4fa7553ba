"""The README's table of settings, made from the settings themselves: neither can say what the other does not."""

from __future__ import annotations

from model.settings import Settings, allowed_values


def environment_table() -> str:
    """The README's table of all settings, as Markdown; a test holds the README to it."""
    rows = ["| variable | default | allowed | what it does |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.default if not isinstance(field.default, bool) else str(field.default).lower()
        shown = "" if default is None else f"`{default}`"
        rows.append(f"| `{name.upper()}` | {shown} | {allowed_values(name.upper())} | {field.description} |")
    return "\n".join(rows) + "\n"
