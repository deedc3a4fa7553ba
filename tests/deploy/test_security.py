"""Every threat in `docs/security.md` has a test, and the test is there."""

from __future__ import annotations

import re
from pathlib import Path


def test_each_row_names_tests_that_exist(repository: Path) -> None:
    text = (repository / "docs" / "security.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(tests/[\w/.]+)`", row.split(" | ")[-1])
        assert named, row
        for path in named:
            assert "def test_" in (repository / path).read_text(), path
