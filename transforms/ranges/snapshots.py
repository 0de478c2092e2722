"""A ranges snapshot on disk: `ranges.safetensors` with the counts, `ranges.json` with its story."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from schemas.artefacts import read_json, sha256_file, write_bytes, write_json
from schemas.errors import ConfigurationError
from schemas.records import Role
from schemas.version import TOOL_VERSION
from transforms.ranges.policies import SCORE_RULE
from transforms.ranges.ranges import FORMAT, Ranges

TENSORS: Final = "ranges.safetensors"
MANIFEST: Final = "ranges.json"


def save_snapshot(ranges: Ranges, folder: Path, manifest_extra: Mapping[str, Any]) -> None:
    """Write ranges to a folder, which is made if need be.

    Args:
      ranges: to be kept.
      folder: what was in it under the two file names is replaced.
      manifest_extra: how the ranges were made, JSON values; stands under `made`.

    Raises:
      OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / TENSORS, ranges.to_bytes())
    # The manifest comes last: with it, the snapshot is there.
    write_json(folder / MANIFEST, _manifest(ranges, folder / TENSORS, manifest_extra))


def load_snapshot(folder: Path, directions_hash: str) -> Ranges:
    """Read ranges that were made under the directions with this hash.

    Raises:
      ConfigurationError: nothing there, damaged, of another version, or of other directions.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        _check(manifest, folder, directions_hash)
        return Ranges.from_bytes((folder / TENSORS).read_bytes())
    except OSError as error:
        raise ConfigurationError(
            f"no ranges snapshot in {folder} ({error.strerror}); make one with `calibrate`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"the ranges snapshot in {folder} cannot be read ({error}); calibrate anew"
        ) from None


def _manifest(ranges: Ranges, tensors: Path, extra: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "tool_version": TOOL_VERSION,
        "sha256": sha256_file(tensors),
        "ranges_hash": ranges.hash,
        "directions_hash": ranges.directions_hash,
        "directions": ranges.conversations.directions,
        "model": ranges.model,
        "conversations": _by_role(ranges.conversations.stretches),
        "score_rule": SCORE_RULE,
        "scores": _by_role(ranges.scores.n),
        "made": dict(extra),
    }


def _by_role(numbers: Any) -> dict[str, int]:
    return {role.name.lower(): int(numbers[role]) for role in Role}


def _check(manifest: Mapping[str, Any], folder: Path, directions_hash: str) -> None:
    expected = {"format": FORMAT, "score_rule": SCORE_RULE}
    for name, value in expected.items():
        if manifest[name] != value:
            raise ConfigurationError(
                f"the ranges snapshot in {folder} has {name} {manifest[name]!r}, this version"
                f" needs {value!r}; calibrate anew"
            )
    if manifest["directions_hash"] != directions_hash:
        raise ConfigurationError(
            f"the ranges snapshot in {folder} was made for directions"
            f" {manifest['directions_hash'][:12]}, not {directions_hash[:12]}; calibrate anew"
        )
    if sha256_file(folder / TENSORS) != manifest["sha256"]:
        raise ConfigurationError(
            f"{folder / TENSORS} is not the file {MANIFEST} describes; restore it or calibrate anew"
        )
