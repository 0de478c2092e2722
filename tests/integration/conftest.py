"""What tests of whole jobs share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from secure_broker import SecureBroker, secure_broker

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


@pytest.fixture(scope="session")
def secured(broker_jars: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureBroker]:
    """Yield a running broker that wants to know its users: use topics of your own."""
    with secure_broker(tmp_path_factory.mktemp("secured"), broker_jars) as running:
        yield running
