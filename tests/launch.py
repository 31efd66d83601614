"""How the tests run the script as a user does, in other processes, and look at what it leaves."""

import importlib.util
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_atari

SCRIPT = Path(ppo_atari.__file__).resolve()


def start(*argv: Any, cwd: Path, program: tuple = (SCRIPT,), **env: str) -> subprocess.Popen:
    """Starts the script in a session of its own, with one thread; its output goes to cwd/log."""
    command = [sys.executable, *map(str, program + argv)]
    with open(cwd / "log", "a") as log:
        return subprocess.Popen(
            command,
            cwd=cwd,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        )


def load(script: Path, name: str) -> ModuleType:
    """Another copy of the script as a module of this name."""
    spec = importlib.util.spec_from_file_location(name, script)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _forked(
    cwd: Path, argv: list[str], before: Callable[[], Any] | None, script: Path, env: dict[str, str]
) -> None:
    os.setsid()
    os.chdir(cwd)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False  # as in the tests themselves: see conftest.py
    torch.cuda.device_count = lambda: 0
    if before is not None:
        before()
    module = ppo_atari if script == SCRIPT else load(script, "forked")
    sys.exit(module.main(argv))


def fork(
    *argv: Any,
    cwd: Path,
    before: Callable[[], Any] | None = None,
    script: Path = SCRIPT,
    **env: str,
) -> BaseProcess:
    """The same as start, without the seconds that the imports take: from a server that has imported
    everything. The process first calls `before`, a function of a test module, to limit what it
    gets, say."""
    context = multiprocessing.get_context("forkserver")
    # torch.optim imports torch._dynamo.
    context.set_forkserver_preload(["ppo_atari", "torch.utils.tensorboard", "torch._dynamo"])
    process = context.Process(target=_forked, args=(cwd, list(map(str, argv)), before, script, env))
    with pytest.MonkeyPatch.context() as patch:  # the server does not learn this process' sys.path
        patch.setenv("PYTHONPATH", str(SCRIPT.parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        process.start()
    return process


def at_call(name: str, number: int, action: Callable) -> None:
    """From now on, this process does something before it calls this function of the script, or of
    os, for the number-th time. Its workers do not. For what fork() is to do `before`."""
    owner, _, attribute = name.rpartition(".")
    owner = {"": ppo_atari, "os": os}.get(owner) or getattr(ppo_atari, owner)
    function = getattr(owner, attribute)
    process = os.getpid()
    calls = []

    def watched(*args, **kwargs):
        if os.getpid() == process:
            calls.append(1)
            if len(calls) == number:
                action()
        return function(*args, **kwargs)

    setattr(owner, attribute, watched)


def two_ranks(
    *argv: Any, cwd: Path, before: dict[int, Callable[[], Any]] | None = None, script: Path = SCRIPT
) -> list[BaseProcess]:
    """Two processes that train one agent, forked, and without torchrun between, to see the exit
    codes of both. before: what the process of a rank does first."""
    port = "29" + str(os.getpid())[-3:].zfill(3)
    env = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    processes = []
    for rank in (0, 1):
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        first = (before or {}).get(rank)
        processes.append(fork(*argv, cwd=cwd, before=first, script=script, **env))
    return processes


def finish(process: Any, timeout: float = 300) -> int:
    """Waits for either kind of process and returns its exit code. One that hangs is killed."""
    if isinstance(process, subprocess.Popen):
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    process.join(timeout)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def finish_two_ranks(*argv: Any, cwd: Path, script: Path = SCRIPT) -> None:
    """Lets two_ranks run to their end, which both have to reach."""
    codes = [finish(process) for process in two_ranks(*argv, cwd=cwd, script=script)]
    assert codes == [0, 0], (cwd / "log").read_text()


def wait_for(condition: Any, timeout: float = 120, pause: float = 0.01) -> None:
    """Waits until the condition holds; fails if it never does."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


def handles_signals(pid: int) -> bool:
    """Whether a handler of the script's own stands: Python itself has none for SIGTERM."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) & 1 << (signal.SIGTERM - 1))


def living(session: int) -> list[int]:
    """The processes of a session that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def run_directory(cwd: Path) -> Path:
    """The one run below cwd/runs."""
    (run,) = (cwd / "runs").iterdir()
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "agent.pt", weights_only=True)["weights"]


def content(folder: Path) -> dict[str, bytes | None]:
    """Each file below a folder with its bytes, and each folder."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in paths
    }


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """The paths within two checkpoints at which they are not equal, bit for bit."""
    if type(first) is not type(second):
        return [where]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{where}: keys"]
        return sum((differences(first[key], second[key], f"{where}/{key}") for key in first), [])
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [f"{where}: length"]
        return sum(
            (differences(*pair, f"{where}/{i}") for i, pair in enumerate(zip(first, second))), []
        )
    equal = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    return [] if equal else [where]


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal, bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) pairs of each curve, as TensorBoard shows them; without those that measure
    time."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        if tag != "charts/SPS" and not tag.startswith("time/"):
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def here(capfd: Any, *argv: Any) -> tuple[int, str, str]:
    """Runs the script in this process: exit code, standard output, standard error."""
    capfd.readouterr()
    code = ppo_atari.main(list(map(str, argv)))
    return code, *capfd.readouterr()


def refusal(capfd: Any, *argv: Any) -> str:
    """Runs the script in this process, which has to end with exit code 2 and one line on standard
    error."""
    code, _, error = here(capfd, *argv)
    assert code == 2, error
    assert error.count("\n") == 1 and len(error) > 20, error
    return error
