"""What the demonstration found, against what was planted."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import duckdb

from schemas.commit import Ledger


@dataclass(frozen=True)
class Result:
    """The content of `result.json`; counts of conversations, but `seconds` of the watched log."""

    planted: int
    found: int
    false_flags: int
    scored: int
    dead_letters: int
    seconds: float


def judge(
    planted: Collection[str], alerted: Collection[str], ledger: Ledger, took: float
) -> Result:
    """Compare conversation ids planted with those alerted."""
    alerted, planted = set(alerted), set(planted)
    return Result(
        planted=len(planted),
        found=len(planted & alerted),
        false_flags=len(alerted - planted),
        scored=ledger.scored,
        dead_letters=ledger.dead_lettered,
        seconds=round(took, 1),
    )


def table(prompts: Mapping[str, str], alerted: Collection[str]) -> str:
    """Every planted conversation and whether it was found, then the false flags, as text."""
    lines = ["", "planted          found   prompt"]
    for name, prompt in prompts.items():
        lines.append(f"{name:<16} {'yes' if name in alerted else 'MISSED':<7} {prompt[:70]}")
    lines += [
        f"{name:<16} false   flagged though not planted"
        for name in sorted(alerted)
        if name not in prompts
    ]
    return "\n".join(lines)


def save(result: Result, path: Path) -> None:
    """Write `result.json`."""
    path.write_text(json.dumps(asdict(result), indent=1) + "\n")


def query(sql: Path, archive: Path) -> str:
    """Run one of the ready queries over the archive; its text and its result."""
    text = sql.read_text()
    with duckdb.connect() as connection:
        connection.execute(f"SET file_search_path = '{archive}'")
        return f"{text}\n{connection.sql(text)}"
