"""One reader of numbers for the command line, TOML and YAML: a number is written as in TOML, or as `.5` and `5.`."""

import re

NUMBER = re.compile(r"[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][-+]?\d+)?")
LEADING_ZERO = re.compile(r"[-+]?0[\d_]")


def read_number(text: str) -> int | float | None:
    """Return the number that a whole text is; None: it is none.

    `1e3` is the whole number 1000, and `1000.0` is not one. A leading zero is refused: YAML 1.1 reads `010` as 8.
    """
    if not NUMBER.fullmatch(text) or LEADING_ZERO.match(text) or "__" in text or text.endswith("_"):
        return None
    try:
        return int(text)
    except ValueError:
        value = float(text)
    is_whole = "." not in text and value.is_integer() and abs(value) < 2**53
    return int(value) if is_whole else value
