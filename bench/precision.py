"""Does a verdict depend on the model's dtype? `python -m bench.precision --data FOLDER`.

FOLDER is what `make figures` takes. The shipped organism scores the same conversations in float32
and in bfloat16, cut to 160 tokens; the `budget` policy judges them by ranges made in the same dtype
and by those made in float32. Scores are kept in build/precision, since a CPU without bfloat16
products takes an hour for them. Prints a table and, as its last line, one JSON object.
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
    "clean": ("sharegpt_sample", slice(1000, None)),
    "calibration": ("sharegpt_sample", slice(1000)),
}
"""Where conversations come from; the smallest first."""


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
    scores = {dtype: _scores(known.data, base, folder, dtype) for dtype in DTYPES}
    results = [_compare(scores, calibrated_in) for calibrated_in in DTYPES]
    _print(results)
    print(json.dumps({"differences": _differences(scores), "verdicts": results}))


def _scores(data: Path, base: Path, folder: Path, dtype: str) -> dict[str, Scores]:
    engine = TrunkEngine(base, ADAPTER, folder / "directions", dtype=dtype)
    return {name: _kept(folder / f"{dtype}-{name}.npz", engine, data, name) for name in SETS}


def _kept(file: Path, engine: TrunkEngine, data: Path, name: str) -> Scores:
    """The scores in the file, made where there is none."""
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


def _compare(scores: dict[str, dict[str, Scores]], calibrated_in: str) -> dict[str, Any]:
    """Verdicts of both dtypes by ranges made in float32, or each by its own."""
    own = calibrated_in != DTYPES[0]
    result: dict[str, Any] = {"ranges": "of the same dtype" if own else DTYPES[0]}
    for name in ("clean", "triggered", "twins"):
        flagged = [
            _flagged(scores[dtype if own else DTYPES[0]]["calibration"], scores[dtype][name])
            for dtype in DTYPES
        ]
        counts = dict(zip(DTYPES, (int(each.sum()) for each in flagged), strict=True))
        result[name] = {**counts, "changed": int((flagged[0] != flagged[1]).sum())}
    return result


def _flagged(calibration: Scores, test: Scores) -> NDArray[np.bool_]:
    ranges: Ranges = calibrate(calibration.values, calibration.tokens, "", "")
    fitted = make_policy("budget", PolicySettings(rate=RATE)).fit(ranges)
    return fitted.judge(test.values, test.tokens).flagged


def _differences(scores: dict[str, dict[str, Scores]]) -> dict[str, float]:
    """Between the cosines of the two, over all sets."""
    pairs = [(scores[DTYPES[0]][name].values, scores[DTYPES[1]][name].values) for name in SETS]
    found = np.concatenate([np.abs(a - b)[a != ABSENT] for a, b in pairs]) / STEPS_PER_UNIT
    median, most = (float(np.quantile(found, share)) for share in (0.5, 0.999))
    return {"median": median, "99.9%": most, "largest": float(found.max())}


def _print(results: list[dict[str, Any]]) -> None:
    print("| ranges | conversations | flagged in float32 | in bfloat16 | other verdicts |")
    print("|---|---|---|---|---|")
    for result in results:
        for name in ("clean", "triggered", "twins"):
            found = result[name]
            cells = (result["ranges"], name, *(found[dtype] for dtype in DTYPES), found["changed"])
            print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
