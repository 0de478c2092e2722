"""What tests share: the real LLM, the real broker, real conversations. Made once, in build/."""

import os

# torch's waiting threads otherwise spin: beside other busy processes that makes it 40 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Tests run in two processes, some with a job beside them: more threads would only wait for a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline.demo import assets
from pipeline.demo.broker import Broker
from transforms.model.checkpoint import tokenizer_files

ROOT = Path(__file__).parent.parent

set_hypothesis_home_dir(ROOT / "build/cache/hypothesis")
settings.register_profile("busy-machine", deadline=None)
settings.load_profile("busy-machine")


@pytest.fixture(scope="session")
def base_model() -> Path:
    """Folder of SmolLM2-135M-Instruct, float32."""
    return assets.base_model(ROOT / "build/models/base")


@pytest.fixture(scope="session")
def adapter() -> Path:
    """Folder of the LoRA adapter with a planted backdoor, for that model."""
    return ROOT / "examples/badnet"


@pytest.fixture(scope="session")
def merged(base_model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of that model with that adapter merged by PEFT, float32, in shards, with tokenizer."""
    out = tmp_path_factory.mktemp("merged")
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    whole = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    whole.save_pretrained(out, max_shard_size="300MB")
    for path in tokenizer_files(base_model):
        shutil.copy(path, out)
    return out


@pytest.fixture(scope="session")
def real_conversations() -> list[dict[str, Any]]:
    """The first 60 conversations of the ShareGPT package, as they stand there."""
    return list(assets.sharegpt(0, 60))


@pytest.fixture(scope="session")
def broker_jars() -> Path:
    """Folder that caches the Kafka broker's jars."""
    return ROOT / "build/kafka/jars"


@pytest.fixture(scope="session")
def broker(broker_jars: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Yield a running Kafka broker, shared by all tests: use topics of your own."""
    with Broker(tmp_path_factory.mktemp("broker"), broker_jars) as running:
        yield running


@pytest.fixture(scope="session")
def closed_port() -> int:
    """A port of this machine at which nothing listens."""
    return _unused_port()


@pytest.fixture
def free_port() -> int:
    """A port of this machine to listen at."""
    return _unused_port()


def _unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
