"""What the documents promise is what the code takes."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline import options
from schemas.reasons import Reason, SkipReason
from transforms.model.families import FAMILIES, table

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^ *```\w*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every `deltawatch ...` of a code block, its continued lines joined."""
    blocks = [block for path in DOCUMENTS for block in FENCED.findall(path.read_text())]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("deltawatch ")]


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_documents_are_understood(command: str) -> None:
    _, *arguments = shlex.split(command)
    known, beam_arguments = options.parse(arguments)
    assert known.command == arguments[0]
    assert beam_arguments == [], "an option that deltawatch does not know"


def test_the_documents_show_every_command_of_the_job() -> None:
    shown = {command.split()[1] for command in commands()}
    assert {"directions", "calibrate", "audit", "watch"} <= shown


@pytest.mark.parametrize("reason", [*Reason, *SkipReason])
def test_every_reason_is_explained(reason: str) -> None:
    assert f"`{reason}`" in (ROOT / "docs/dead-letters.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_every_metric_is_explained() -> None:
    source = (ROOT / "pipeline/metrics.py").read_text()
    names = set(re.findall(r'"(?:deltawatch_)?([a-z_]+)",\s+"[A-Z]', source))
    assert {"records", "lag", "slice_seconds", "flagged_share"} <= names
    explained = (ROOT / "docs/operations.md").read_text()
    missing = {name for name in names if f"`deltawatch_{name}" not in explained}
    assert not missing


def test_the_table_of_architectures_is_the_codes() -> None:
    document = (ROOT / "docs/architectures.md").read_text()
    _, _, rest = document.partition("<!-- made by `make docs` -->\n")
    assert rest.partition("<!-- end -->")[0] == table(), "run `make docs`"
    assert table().count("\n") == len(FAMILIES) + 2
