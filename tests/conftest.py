"""Markers that skip themselves with a reason; no test reaches a model hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: threads would only get in their way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from browsers import Chromium, headless

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run tests that take minutes")
    parser.addoption("--network", action="store_true", help="run tests that need a model hub")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "slow": None if config.getoption("--slow") else "takes minutes; run with --slow",
        "network": None if config.getoption("--network") else "needs a model hub; run with --network",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets beside a development checkout."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"real data sets are not at {REAL_DATA}")
    return REAL_DATA


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """One browser for all tests; each opens the page that it needs."""
    with headless(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser
