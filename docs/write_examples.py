"""Copy the example files of docs/examples into docs/extending.md, so that the page shows code that the tests run."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).with_name("extending.md")
BLOCK = re.compile(r"<!-- (examples/\S+) -->\n```(\w+)\n.*?```", re.S)


def write() -> str:
    """Return the page with the current content of the file in each block `<!-- examples/FILE -->`."""

    def block(match: re.Match[str]) -> str:
        code = (PAGE.parent / match[1]).read_text(encoding="utf-8")
        return f"<!-- {match[1]} -->\n```{match[2]}\n{code}```"

    return BLOCK.sub(block, PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(write(), encoding="utf-8")
