"""Make the tables of the manual that come from the code: settings and request fields.

`python -m model.reference` writes them into the pages in `docs/`; a test checks that they are up to date.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from model.serving.http.chat import ChatBody
from model.serving.http.schemas import CompletionBody, SimpleBody
from model.settings import Settings, allowed_values

DOCS = Path(__file__).resolve().parents[1] / "docs"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def settings_table() -> str:
    """Return all settings as a Markdown table."""
    return _markdown(
        ("variable", "default", "allowed", "meaning"),
        [
            (f"`{name.upper()}`", _default(field), allowed_values(name.upper()), _description(field))
            for name, field in Settings.model_fields.items()
        ],
    )


def fields_table(body: type[BaseModel], beside: type[BaseModel] = BaseModel) -> str:
    """Return the fields of a request's body as a Markdown table, without those that it has in common with `beside`."""
    common = {(name, field.description) for name, field in beside.model_fields.items()}
    return _markdown(
        ("field", "default", "allowed"),
        [
            (f"`{name}`", "required" if field.is_required() else _default(field), _description(field))
            for name, field in body.model_fields.items()
            if (name, field.description) not in common
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings_table,
    "completion_fields": lambda: fields_table(CompletionBody),
    "chat_fields": lambda: fields_table(ChatBody, beside=CompletionBody),
    "generate_fields": lambda: fields_table(SimpleBody),
}


def with_tables(page: str) -> str:
    """Return a page with each table between `<!-- table: NAME -->` and `<!-- /table -->` made again."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", page)


def _description(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).removesuffix(".")


def _default(field: FieldInfo) -> str:
    return "" if field.default in (None, "", [], {}) else "`" + json.dumps(field.default).strip('"') + "`"


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def main() -> None:
    """Write the tables into the pages."""
    for path in sorted(DOCS.glob("*.md")):
        page = path.read_text("utf-8")
        if (made := with_tables(page)) != page:
            path.write_text(made, "utf-8")


if __name__ == "__main__":
    main()
