"""Shared by all tests: the script on the import path, one thread, the marker gpu, and a way to look into the script."""

import functools
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GPUS, GPU_IS_AVAILABLE = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.is_available
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU that torch can use; skipped where there is none")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not GPU_IS_AVAILABLE():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Only the tests marked gpu see one, here and in the processes they start: the others look into each update, which
    a CUDA graph hides. Before any fixture."""
    gpu = item.get_closest_marker("gpu")
    torch.cuda.is_available = GPU_IS_AVAILABLE if gpu else lambda: False
    if gpu and GPUS is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = GPUS if gpu else ""


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Results must not depend on how many cores the tests find; before any fixture of a module, too."""
    torch.set_num_threads(1)


@pytest.fixture
def watch(monkeypatch):
    """watch(owner, "name", before=see, after=see): until the test ends, each call of that function is told to see: its
    arguments as one dictionary by name, so that no test pins their order, and for after the result as well."""

    def watch(owner, name, before=None, after=None):
        function = getattr(owner, name)
        signature = inspect.signature(function)

        @functools.wraps(function)
        def watched(*args, **kwargs):
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            if before:
                before(given.arguments)
            result = function(*args, **kwargs)
            if after:
                after(given.arguments, result)
            return result

        monkeypatch.setattr(owner, name, watched)

    return watch
