"""Shared by all tests: the script on the import path, one thread, the marker gpu, and two ways to
look into the script and to change it."""

import functools
import importlib.util
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "ppo_atari.py"
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
GPU_IS_AVAILABLE = torch.cuda.is_available
GPU_COUNT = torch.cuda.device_count
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "gpu: needs a GPU that torch can use; skipped where there is none"
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not GPU_IS_AVAILABLE():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Only the tests marked gpu see one, here and in the processes they start: the others look into
    each update, which a CUDA graph hides. Before any fixture."""
    if item.get_closest_marker("gpu"):
        torch.cuda.is_available = GPU_IS_AVAILABLE
        torch.cuda.device_count = GPU_COUNT
        if GPUS is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = GPUS
    else:
        torch.cuda.is_available = lambda: False
        torch.cuda.device_count = lambda: 0
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Results must not depend on how many cores the tests find; before any fixture of a module,
    too."""
    torch.set_num_threads(1)


@pytest.fixture
def watch(monkeypatch):
    """watch(owner, "name", before=see, after=see): until the test ends, each call of that function
    is told to see: its arguments as one dictionary by name, so that no test pins their order, and
    for after the result as well."""

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


@pytest.fixture
def changed(tmp_path_factory, monkeypatch):
    """changed({line: [new, ...]}): a copy of the script as a user would change it, as a module.
    Below the one line that begins with this text stand the new ones, as far indented; the line
    itself is gone if the first of them is None."""

    def changed(additions):
        lines = SCRIPT.read_text().splitlines()
        for text, added in additions.items():
            (at,) = [i for i, line in enumerate(lines) if line.strip().startswith(text)]
            indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
            if added[0] is None:
                lines[at : at + 1] = [indent + line for line in added[1:]]
            else:
                lines[at + 1 : at + 1] = [indent + line for line in added]
        path = tmp_path_factory.mktemp("changed") / "changed_ppo_atari.py"
        path.write_text("\n".join(lines) + "\n")
        spec = importlib.util.spec_from_file_location("changed_ppo_atari", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "changed_ppo_atari", module)
        spec.loader.exec_module(module)
        return module

    return changed
