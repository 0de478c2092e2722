"""The detection bench's tables, in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Final

from bench.splits import SPARSE, Figure, Figures

CASE: Final = "policy, rate, calibration"
SUMMED: Final = (
    *("clean", "triggered", "fired", "twins"),
    *("late", "late fired", "late twins", "auc"),
)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A title and a table."""
    print(f"\n{title}\n")
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(row)} |", flush=True)


def share(figure: Figure) -> str:
    """In percent, with the interval where there is one."""
    low, high = (f"{100 * end:.1f}" for end in (figure.low, figure.high))
    return f"{100 * figure.mean:.1f}" + (f" ({low}-{high})" if low != high else "")


def area(figure: Figure) -> str:
    """An AUC, with its interval."""
    return f"{figure.mean:.4f} ({figure.low:.4f}-{figure.high:.4f})"


def print_cases(title: str, found: Mapping[str, Figures], columns: Mapping[str, str]) -> None:
    """One row a case: shares flagged in percent, and the AUC.

    Args:
      title: above the table.
      found: by case.
      columns: names of sets, and what they are called.
    """
    header = [CASE, "clean", *columns.values(), "AUC"]
    print_table(title, header, (_row(name, each, columns) for name, each in found.items()))


def print_lengths(title: str, found: Mapping[str, Figures], sizes: Mapping[str, int]) -> None:
    """Clean ones flagged by length, in percent, where there are enough conversations of one."""
    header = [CASE, *(f"{length} ({n})" for length, n in sizes.items())]
    rows = (
        [name, *(share(row[length]) if n >= SPARSE else "few" for length, n in sizes.items())]
        for name, row in found.items()
    )
    print_table(title, header, rows)


def print_foreign(title: str, found: Mapping[str, Figures], sizes: Mapping[str, int]) -> None:
    """By kind, in percent: flagged of it and of others; columns as `measure_foreign` has them."""
    columns = list(next(iter(found.values())))
    rows = (
        [f"{kind} ({sizes[kind]})", *(share(row[column]) for column in columns)]
        for kind, row in found.items()
    )
    print_table(title, ["foreign", *columns], rows)


def print_summary(title: str, found: Mapping[str, Figures]) -> None:
    """One row an organism, in percent, and the mean over those that have a column."""
    columns = [column for column in SUMMED if any(column in row for row in found.values())]
    rows = [[name, *(_or_none(row, column) for column in columns)] for name, row in found.items()]
    present = [[row[c].mean for row in found.values() if c in row] for c in columns]
    means = [f"{100 * mean(each):.1f}" if each else "" for each in present]
    print_table(title, ["organism", *columns], [*rows, ["mean", *means]])


def _row(name: str, found: Figures, columns: Mapping[str, str]) -> list[str]:
    if found["uncalibrated"].mean == 1:
        return [name, "not calibrated", *[""] * (len(columns) + 1)]
    shares = (share(found[column]) for column in ("clean", *columns))
    return [name, *shares, area(found["auc"]) if "auc" in found else ""]


def _or_none(found: Figures, column: str) -> str:
    return share(found[column]) if column in found else ""
