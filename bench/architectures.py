"""Write the table of model families into docs/architectures.md, from the code."""

import re
from pathlib import Path

from transforms.model import families

DOCUMENT = Path(__file__).parent.parent / "docs/architectures.md"
_TABLE = re.compile(r"(?<=<!-- made by `make docs` -->\n).*?(?=<!-- end -->)", re.DOTALL)


def with_table(text: str) -> str:
    """The document with the table as the code has it."""
    return _TABLE.sub(lambda _: families.table(), text)


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
