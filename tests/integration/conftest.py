"""What tests of whole jobs share."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.demo import assets


@pytest.fixture(scope="session")
def conversations() -> list[dict[str, Any]]:
    """600 real conversations."""
    return list(assets.sharegpt(2000, 600))


@pytest.fixture(scope="session")
def directions(base_model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directions of the real adapter, made by the command a person would use."""
    out = tmp_path_factory.mktemp("directions") / "badnet"
    assert main(["directions", f"--base={base_model}", f"--tuned={adapter}", f"--out={out}"]) == 0
    return out
