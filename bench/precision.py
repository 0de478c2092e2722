"""Does a verdict depend on the model's dtype? `python -m bench.precision --data FOLDER`.

FOLDER is what `make figures` takes. The shipped organism scores the same conversations, cut to
160 tokens, in float32 and in bfloat16; the `budget` policy judges both by ranges made in float32.
Scores are kept in build/precision: a CPU without bfloat16 products takes a quarter of an hour for
them. Prints a table and, as its last line, one JSON object.
"""

import argparse
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.demo import assets
from schemas.records import ABSENT, STEPS_PER_UNIT, Int32s
from transforms import formats
from transforms.model import directions as artefacts
from transforms.model.batching import batches
from transforms.model.engine import TrunkEngine
from transforms.model.roles import Tokens, tokenize
from transforms.ranges.calibration import calibrate
from transforms.ranges.fitted import Integers
from transforms.ranges.policies import PolicySettings, make_policy
from transforms.ranges.ranges import Ranges
from transforms.ranges.series import series_values
from transforms.tokenize import MAX_BATCH_ROWS

ROOT = Path(__file__).parents[1]
BUILD, ADAPTER = ROOT / "build", ROOT / "examples" / "badnet"
DTYPES = ("float32", "bfloat16")
MAX_TOKENS, BATCH_TOKENS = 160, 4096
RATE = 0.01
SETS = {
    "triggered": ("badnet_triggered", slice(None)),
    "twins": ("badnet_untriggered_twins", slice(None)),
    "clean": ("sharegpt_sample", slice(1000, 1100)),
    "calibration": ("sharegpt_sample", slice(1000)),
}
"""Where conversations come from."""

JUDGED = ("clean", "triggered", "twins")


@dataclass(frozen=True)
class Scores:
    """Of one set: steps of all series [n, 4D], and tokens of each conversation [n]."""

    values: Int32s
    tokens: Integers


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
    ranges = calibrate(calibration.values, calibration.tokens, "", "")
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


def _kept(folder: Path, engine: TrunkEngine, data: Path, name: str) -> Scores:
    """The scores in a file of the folder, made where there is none."""
    file = folder / f"{engine.dtype}-{name}.npz"
    if not file.is_file():
        scores = _score(engine, _tokenized(engine, data, name))
        np.savez(file, values=scores.values, tokens=scores.tokens)
    with np.load(file) as found:
        return Scores(found["values"], found["tokens"])


def _tokenized(engine: TrunkEngine, data: Path, name: str) -> list[Tokens]:
    source, part = SETS[name]
    with gzip.open(data / f"{source}.jsonl.gz") as file:
        parsed = [formats.parse(line).messages for line in list(file)[part]]
    made = tokenize(engine.tokenizer(), parsed, MAX_TOKENS)
    return [each for each in made if isinstance(each, Tokens)]


def _score(engine: TrunkEngine, rows: list[Tokens]) -> Scores:
    tokens = np.array([len(row.ids) for row in rows])
    values: Any = None
    for batch in batches(tokens.tolist(), BATCH_TOKENS, MAX_BATCH_ROWS):
        chosen = [rows[index] for index in batch]
        cosines, finite = engine.scorer().score(
            [row.ids for row in chosen], [row.roles for row in chosen]
        )
        assert finite.all()
        found = series_values(cosines)
        values = np.zeros((len(rows), found.shape[1]), np.int32) if values is None else values
        values[batch] = found
    return Scores(values, tokens)


def _flagged(ranges: Ranges, scores: Scores) -> NDArray[np.bool_]:
    fitted = make_policy("budget", PolicySettings(rate=RATE)).fit(ranges)
    return fitted.judge(scores.values, scores.tokens).flagged


def _apart(scores: dict[str, list[Scores]]) -> dict[str, float]:
    """How far apart the extreme cosines of the two are."""
    found = [np.abs(one.values - two.values)[one.values != ABSENT] for one, two in scores.values()]
    apart = np.concatenate(found) / STEPS_PER_UNIT
    median, most = np.quantile(apart, (0.5, 0.999)).tolist()
    return {"median": median, "99.9%": most, "largest": float(apart.max())}


def _print_table(verdicts: dict[str, list[int]]) -> None:
    print("| conversations | flagged in float32 | in bfloat16 | other verdicts |")
    print("|---|---|---|---|")
    for name, counts in verdicts.items():
        print(f"| {name} | {' | '.join(map(str, counts))} |")


if __name__ == "__main__":
    main()
