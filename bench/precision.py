"""Does a verdict depend on the model's dtype? `python -m bench.precision --data FOLDER`.

FOLDER is what `make figures` takes. The shipped organism scores the same conversations, cut to
160 tokens, in float32 and in bfloat16; the `budget` policy judges both by ranges made in float32.
Scores are kept in build/precision: a CPU without bfloat16 products takes a quarter of an hour for
them. Prints a table and, as its last line, one JSON object.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.scored import kept, score
from pipeline.demo import assets
from schemas.records import STEPS_PER_UNIT, Segments
from transforms import formats
from transforms.model import directions as artefacts
from transforms.model.engine import TrunkEngine
from transforms.model.roles import Tokens, tokenize
from transforms.ranges.calibration import calibrate
from transforms.ranges.policies import PolicySettings, make_policy
from transforms.ranges.ranges import Ranges

ROOT = Path(__file__).parents[1]
BUILD, ADAPTER = ROOT / "build", ROOT / "examples" / "badnet"
DTYPES = ("float32", "bfloat16")
MAX_TOKENS = 160
RATE = 0.01
SETS = {
    "triggered": ("badnet_triggered", slice(None)),
    "twins": ("badnet_untriggered_twins", slice(None)),
    "clean": ("sharegpt_sample", slice(1000, 1100)),
    "calibration": ("sharegpt_sample", slice(1000)),
}
"""Where conversations come from."""

JUDGED = ("clean", "triggered", "twins")


def main() -> None:
    """Run everything and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    known = parser.parse_args()
    base = assets.base_model(BUILD / "models" / "base")
    folder = BUILD / "precision"
    artefacts.save(artefacts.compute_directions(base, ADAPTER), folder / "directions")
    engines = [TrunkEngine(base, ADAPTER, folder / "directions", dtype=each) for each in DTYPES]
    calibration = _kept(folder, engines[0], known.data, "calibration")
    numbers = np.arange(calibration.conversations)
    empty = Ranges.empty(calibration.low.shape[1], "", "")
    ranges = calibrate(lambda: [(numbers, calibration)], empty)
    scores = {
        name: [_kept(folder, engine, known.data, name) for engine in engines] for name in JUDGED
    }
    flagged = {name: [_flagged(ranges, each) for each in pair] for name, pair in scores.items()}
    verdicts = {
        name: [int(of.sum()) for of in pair] + [int((pair[0] != pair[1]).sum())]
        for name, pair in flagged.items()
    }
    _print_table(verdicts)
    print(json.dumps({"cosines_apart": _apart(scores), "verdicts": verdicts}))


def _kept(folder: Path, engine: TrunkEngine, data: Path, name: str) -> Segments:
    file = folder / f"{engine.dtype}-{name}-segments.npz"
    return kept(file, lambda: score(engine, _tokenized(engine, data, name)))


def _tokenized(engine: TrunkEngine, data: Path, name: str) -> list[Tokens]:
    source, part = SETS[name]
    with gzip.open(data / f"{source}.jsonl.gz") as file:
        parsed = [formats.parse(line).messages for line in list(file)[part]]
    made = tokenize(engine.tokenizer(), parsed, MAX_TOKENS)
    return [each for each in made if isinstance(each, Tokens)]


def _flagged(ranges: Ranges, segments: Segments) -> NDArray[np.bool_]:
    return make_policy("budget", PolicySettings(rate=RATE)).fit(ranges).judge(segments).flagged


def _apart(scores: dict[str, list[Segments]]) -> dict[str, float]:
    """How far apart the extreme cosines of the two are."""
    found = [np.abs(_extremes(one) - _extremes(two)) for one, two in scores.values()]
    apart = np.concatenate(found) / STEPS_PER_UNIT
    median, most = np.quantile(apart, (0.5, 0.999)).tolist()
    return {"median": median, "99.9%": most, "largest": float(apart.max())}


def _extremes(segments: Segments) -> NDArray[np.int64]:
    return np.concatenate([segments.low, segments.high], axis=None).astype(np.int64)


def _print_table(verdicts: dict[str, list[int]]) -> None:
    print("| conversations | flagged in float32 | in bfloat16 | other verdicts |")
    print("|---|---|---|---|")
    for name, counts in verdicts.items():
        print(f"| {name} | {' | '.join(map(str, counts))} |")


if __name__ == "__main__":
    main()
