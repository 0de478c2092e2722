"""What keeping ranges costs: `python -m bench.ranges`.

Conversations made up like real ones (see `bench.made_up`) are counted as a job counts them: in
packs, into the counts of an epoch of ten minutes, which are then added to those of the day and to
all. Seconds are those of one core. Then the sketches of a library and these counts take the same
values. Prints tables and, as its last line, one JSON object. A month of ten million conversations:

    python -m bench.ranges --conversations 10000000
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil

from bench import sketches
from bench.made_up import Traffic
from schemas.records import Segments
from transforms.ranges.ranges import Ranges, close
from transforms.ranges.series import Stretches

EPOCHS_A_DAY = 144
EPOCH = ceil(10_000_000 / 30 / EPOCHS_A_DAY)  # conversations
TENTHS = 10
PACKS = (8, 32, 128)

Figures = dict[str, float]


class Month:
    """Ranges as a job has them, and the seconds of one core they took.

    Attributes:
      total: of the epochs that have ended.
      day: of these, of the present day.
      opened: of the present epoch.
      spent: on `counting` packs, `closing` epochs, `writing` and `reading` files.
    """

    def __init__(self, directions: int) -> None:
        self.total = self.day = self.opened = Ranges.empty(directions, "d" * 64, "made-up")
        self.spent = dict.fromkeys(("counting", "closing", "writing", "reading"), 0.0)
        self._epochs = 0

    def count(self, packs: Sequence[Segments]) -> None:
        """As `transforms.ranges.counting` counts conversations that are not flagged."""
        with self._timed("counting"):
            for pack in packs:
                self.opened = self.opened.plus(Stretches.of(pack))

    def close(self) -> None:
        """End the epoch; the next one begins a new day if this was its last."""
        if self._epochs % EPOCHS_A_DAY == 0:
            self.day = self.day.emptied()
        with self._timed("counting"):
            _tally(self.opened)
        with self._timed("closing"):
            self.total, self.day = close(self.total, self.opened), close(self.day, self.opened)
        self.opened = self.opened.emptied()
        self._epochs += 1

    def sizes(self) -> tuple[int, int, int]:
        """Bytes of the files of a commit: all epochs that have ended, the day, the epoch."""
        with self._timed("counting"):
            _tally(self.opened)
        with self._timed("writing"):
            files = [each.to_bytes() for each in (self.total, self.day, self.opened)]
        with self._timed("reading"):
            for data in files:
                Ranges.from_bytes(data)
        total, day, opened = map(len, files)
        return total, day, opened

    @contextmanager
    def _timed(self, work: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.spent[work] += time.process_time() - started


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=200_000, help="(200,000)")
    parser.add_argument("--epoch", type=int, default=EPOCH, help=f"its conversations ({EPOCH:,})")
    parser.add_argument("--pack", type=int, default=32, help="conversations of a batch (32)")
    parser.add_argument("--directions", type=int, default=1160, help="a quarter of series (1,160)")
    parser.add_argument("--values", type=int, default=100_000, help="in sketches (100,000)")
    known = parser.parse_args(arguments)
    traffic = Traffic(known.directions)
    figures = _by_pack(traffic, known.epoch) | _kept(traffic, known)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    figures |= {"peak_mb": peak} | sketches.compare(known.values)
    print(json.dumps(figures))


def _by_pack(traffic: Traffic, epoch: int) -> Figures:
    """Conversations a second, in packs of several sizes."""
    figures: Figures = {}
    print(f"{'conversations of a pack':>24}{'a second':>12}")
    for size in PACKS:
        month = Month(traffic.directions)
        for _ in range(3):
            month.count(traffic.packs(epoch, size))
            month.close()
        speed = round(month.total.segments.total / month.spent["counting"])
        print(f"{size:>24}{speed:>12,}")
        figures[f"conversations_per_s_packs_of_{size}"] = speed
    return figures


def _kept(traffic: Traffic, known: argparse.Namespace) -> Figures:
    """What becomes of the ranges over a month, or a part of it."""
    columns = ("conversations", "a second", "hot bytes", "total", "day", "epoch", "closing ms")
    print("\n" + "".join(f"{column:>14}" for column in columns))
    month = Month(traffic.directions)
    epochs = max(round(known.conversations / known.epoch / TENTHS), 1)
    rows = [_tenth(month, traffic, known, epochs) for _ in range(TENTHS)]
    first, last = rows[0], rows[-1]
    written = month.sizes()
    return {
        "conversations": month.total.segments.total,
        "conversations_per_s": last["a second"],
        "conversations_per_s_at_first": first["a second"],
        "state_bytes": last["hot bytes"],
        "commit_bytes": sum(written),
        "generation_bytes": written[1],
        "closing_ms": last["closing ms"],
        "writing_ms": round(1000 * month.spent["writing"] / (TENTHS + 1)),
        "reading_ms": round(1000 * month.spent["reading"] / (TENTHS + 1)),
    }


def _tenth(month: Month, traffic: Traffic, known: argparse.Namespace, epochs: int) -> Figures:
    """Further epochs; the files are looked at before the last one of them ends."""
    before, had = dict(month.spent), month.total.segments.total
    for epoch in range(epochs):
        month.count(traffic.packs(known.epoch, known.pack))
        if epoch == epochs - 1:
            total, day, opened = month.sizes()
        month.close()
    spent = {work: month.spent[work] - before[work] for work in before}
    figures: Figures = {
        "conversations": month.total.segments.total,
        "a second": round((month.total.segments.total - had) / spent["counting"]),
        "hot bytes": total + day + opened,
        "total": total,
        "day": day,
        "epoch": opened,
        "closing ms": round(1000 * spent["closing"] / epochs),
    }
    print("".join(f"{value:>14,}" for value in figures.values()), flush=True)
    return figures


def _tally(ranges: Ranges) -> None:
    """Have everything tallied that waits for it, as looking at it would."""
    for counts in (ranges.segments, ranges.conversations):
        _ = counts.histograms


if __name__ == "__main__":
    main()
