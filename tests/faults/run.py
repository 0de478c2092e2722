"""Disturbs jobs in every way that can be thought of and compares what they leave: `make faults`.

A real broker, real conversations, real processes; the model is the cheap scorer, or with
`--subject llm` the real one. Prints what was done and, as its last line, one JSON object.
"""

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cases
from marks import PHASES
from subjects import SUBJECTS
from world import World


def main() -> int:
    """Run all cases; the exit status is 1 where anything is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--subject", choices=list(SUBJECTS), default="cheap")
    parser.add_argument("--kills", type=int, default=3 * len(PHASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(cases.CASES), default=list(cases.CASES))
    known = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("kafka").setLevel(logging.CRITICAL)  # brokers are meant to be away here
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="faults-") as folder,
        World.made(Path(folder), known.subject, known.records) as world,
    ):
        failed = run(world, known.kills, known.seed, known.only)
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    return failed


def run(world: World, kills: int, seed: int, names: Sequence[str]) -> int:
    """Run cases; returns the exit status."""
    print(f"undisturbed: {world.expected.total}")
    for name in names:
        case = cases.Case(name, world, random.Random(f"{seed}/{name}"), kills)
        print(f"{name}:", flush=True)
        cases.CASES[name](case)
    return report(world)


def report(world: World) -> int:
    """Print the table of what was hit and the JSON object."""
    found = world.differences
    print("\n| fault | times | longest recovery, s |\n|---|---|---|")
    for fault, seconds in sorted(world.faults.items()):
        longest = f"{max(seconds):.1f}" if max(seconds) else "-"
        print(f"| {fault} | {len(seconds)} | {longest} |")
    result = {
        "faults": sum(map(len, world.faults.values())),
        "lost": found.lost,
        "changed_verdicts": found.changed_verdicts,
        "changed_ids": found.changed_ids,
        "ranges_equal": found.ranges_equal,
        "ledgers_equal": found.ledgers_equal,
        "broken_promises": world.broken,
    }
    print(json.dumps(result))
    harmless = not (found.lost or found.changed_verdicts or found.changed_ids or world.broken)
    return int(not (harmless and found.ranges_equal and found.ledgers_equal))


if __name__ == "__main__":
    sys.exit(main())
