"""Shared by all tests: the script on the import path, one thread, and small helpers."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Results must not depend on how many cores the tests find; before any fixture of a module, too."""
    torch.set_num_threads(1)
