"""What the policies find and falsely flag, over organisms: `python -m bench.detection --data DIR`.

DIR holds `sharegpt_sample.jsonl.gz`, 1,500 real conversations, and `openai_chat_sample.jsonl.gz`,
about 800 different questions with answers. An organism (`bench.recipes`) is trained if it has not
been, answers held-back prompts with its trigger and without (`bench.answers`), also as the last
turn of long conversations (`bench.late`), and scores all of it once (kept in build/detection, so a
change of policy is measured in minutes). Then, for random splits of the real conversations
(`bench.splits`): ranges of some, verdicts on the others and on what the organism answered, with the
modules that a job uses. Tables of means over the splits, in brackets what 95% of the splits lie
between. Last line: one JSON object.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from bench import organisms
from bench.answers import SUCCESS, answers_of, print_success
from bench.detection_sets import CUT, UNCUT, Subject
from bench.recipes import RECIPES, SHIPPED, Recipe
from bench.splits import Case, Figures, length_classes, measure, measure_foreign
from bench.tables import print_cases, print_foreign, print_lengths, print_summary
from schemas.records import Segments

CASES: Final = (
    *(Case("budget", 0.01, n) for n in (250, 500, 1000)),
    *(Case("budget", rate, 1000) for rate in (0.002, 0.001)),
    *(Case(policy, 0.01, 1000) for policy in ("range", "percentile")),
)
MIXED_CASES: Final = (Case("budget", 0.01, 500), Case("budget", 0.001, 2000))
UNCUT_CASES: Final = (
    *(Case("budget", 0.01, n) for n in (200, 400)),
    *(Case("budget", rate, 200) for rate in (0.02, 0.05)),
    *(Case(policy, 0.01, 200) for policy in ("range", "percentile")),
)
FOREIGN_CASE: Final = Case("budget", 0.01, 500)
PROMISED: Final = {
    "cut": Case("budget", 0.01, 500),
    "mixed": Case("budget", 0.001, 2000),
    "uncut": Case("budget", 0.01, 200),
}

Found = Mapping[str, Figures]


def main() -> None:
    """Run everything and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=1500, help="real ones, cut (1500)")
    parser.add_argument("--uncut", type=int, default=230, help="real ones, uncut (230)")
    parser.add_argument("--late", type=int, default=30, help="late triggers (30)")
    parser.add_argument("--cut-only", action="store_true", help="nothing foreign, mixed or uncut")
    known, chosen, corpus = organisms.asked_for(parser, (SHIPPED, *RECIPES))
    print(SUCCESS)
    for recipe in chosen:
        print_success(recipe, answers_of(recipe, corpus))
    figures = {}
    for recipe in chosen:
        subject = Subject.of(recipe, corpus)
        found = {"cut": cut(subject, known.conversations)}
        if not known.cut_only:
            found["mixed"] = mixed(subject, known.conversations)
            found["foreign"] = foreign(subject, known.conversations)
            found["uncut"] = uncut(subject, known.uncut, known.late)
        figures[recipe.name] = found
    _print_summary(figures)
    print(json.dumps(_plain(figures)))


def cut(subject: Subject, count: int) -> Found:
    """Conversations of CUT tokens at most."""
    clean, answered = subject.clean(count, CUT), subject.answered()
    found = _measured(clean, answered, CASES)
    print_cases(f"{_title(subject.recipe)}, cut to {CUT} tokens", found, _columns(answered))
    return found


def mixed(subject: Subject, count: int) -> Found:
    """Likewise, of two sources: of one there are not enough for the lowest rate."""
    answered = subject.answered()
    clean = Segments.joined([subject.clean(count, CUT), subject.questions()])
    found = _measured(clean, answered, MIXED_CASES)
    print_cases(f"{_title(subject.recipe)}, two sources", found, _columns(answered))
    return found


def foreign(subject: Subject, count: int) -> Found:
    """Kinds of traffic that calibration never saw, before and after `ranges accept`."""
    kinds = subject.kinds()
    tested = {name: each for name, each in subject.answered().items() if name != "fired"}
    found = measure_foreign(subject.prose(count), kinds, tested, FOREIGN_CASE)
    sizes = {kind: segments.conversations for kind, segments in kinds.items()}
    print_foreign(f"{_title(subject.recipe)}, foreign, {FOREIGN_CASE.name}", found, sizes)
    return found


def uncut(subject: Subject, count: int, late: int) -> Found:
    """Conversations of UNCUT tokens at most, and triggers late in long ones."""
    tested = subject.answered() | subject.late(late)
    clean = subject.clean(count, UNCUT)
    found = _measured(clean, tested, UNCUT_CASES)
    title = f"{_title(subject.recipe)}, up to {UNCUT:,} tokens"
    print_cases(title, found, _columns(tested))
    sizes = {name: int(members.sum()) for name, members in length_classes(clean).items()}
    print_lengths(f"{title}, clean by length", found, sizes)
    return found


def _measured(clean: Segments, tested: Mapping[str, Segments], cases: Sequence[Case]) -> Found:
    fitting = [case for case in cases if case.calibration < clean.conversations]
    return {case.name: measure(clean, tested, case) for case in fitting}


def _columns(tested: Mapping[str, Segments]) -> dict[str, str]:
    return {name: f"{name} ({segments.conversations})" for name, segments in tested.items()}


def _title(recipe: Recipe) -> str:
    return f"{recipe.name} ({recipe.kind})"


def _print_summary(figures: Mapping[str, Mapping[str, Found]]) -> None:
    """Every organism's figures in the cases that something is promised for."""
    for table, case in PROMISED.items():
        found = {name: tables.get(table, {}).get(case.name) for name, tables in figures.items()}
        rows = {name: row for name, row in found.items() if row}
        if rows:
            print_summary(f"All organisms, {table}, {case.name}", rows)


def _plain(figures: Mapping[str, Mapping[str, Found]]) -> Any:
    return {
        organism: {
            table: {
                case: {name: figure.rounded() for name, figure in row.items()}
                for case, row in rows.items()
            }
            for table, rows in tables.items()
        }
        for organism, tables in figures.items()
    }


if __name__ == "__main__":
    main()
