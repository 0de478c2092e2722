"""What tests of whole jobs share."""

from typing import Any

import pytest

from pipeline.demo import assets


@pytest.fixture(scope="session")
def conversations() -> list[dict[str, Any]]:
    """600 real conversations."""
    return list(assets.sharegpt(2000, 600))
