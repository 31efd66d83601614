"""No hang, no false word, no harm: how the script ends, what it says, and what it takes from files."""

import ctypes
import errno
import itertools
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import (
    content,
    curves,
    differences,
    finish,
    fork,
    handles_signals,
    here,
    living,
    refusal,
    run_directory,
    start,
    wait_for,
    weights,
)

import ppo_atari

GAME = ["--env-id", "ALE/Breakout-v5", "--num-envs", "1", "--num-steps", "16", "--frame-size", "36",
        "--update-epochs", "1", "--num-minibatches", "1"]  # fmt: skip
TINY = [*GAME, "--num-workers", "0", "--eval-episodes", "0", "--checkpoint-interval", "1", "--total-timesteps"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two small iterations, not to be written to."""
    with chdir(tmp_path_factory.mktemp("finished")):
        assert ppo_atari.main([*TINY, "32"]) == 0
        return run_directory(Path.cwd())


@pytest.fixture
def run(finished, tmp_path):
    """A copy to write to."""
    return shutil.copytree(finished, tmp_path / "run")


@contextmanager
def small_disk(path: Path, size: str):
    """A disk of this size, mounted at a new directory."""
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def fill(path: Path) -> None:
    """Writes to this file until its disk is full."""
    with suppress(OSError), open(path, "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


def workers_left() -> list:
    """The processes that the script has started in this one and not ended."""
    return [process for process in multiprocessing.active_children() if "ForkServer" not in process.name]


def in_time(function: Callable, *args, seconds: int = 60):
    """Calls a function that might never return, and fails if it does not."""

    def ring(signum, frame):
        raise AssertionError("it hangs")

    handler = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        return function(*args)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


# --- Ending ------------------------------------------------------------------------------------------------------


def test_ctrl_c_at_ten_moments_of_the_start(tmp_path):
    """From the first import to the first checkpoint, to all processes at once: the exit code is 130, no traceback, and
    nobody is left. During the imports, one line says it; afterwards, what is saved can be resumed."""

    def mapped(cwd: Path, pid: int, library: str) -> bool:
        return library in Path(f"/proc/{pid}/maps").read_text()

    def children(cwd: Path, pid: int, number: int) -> bool:
        return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) >= number

    def there(cwd: Path, pid: int, pattern: str) -> bool:
        return any(cwd.glob(pattern))

    moments = [
        (handles_signals, 0), (mapped, "ale_py"), (mapped, "libtorch_cpu"), (mapped, "ale_py", 1), (children, 1),
        (children, 2), (there, "runs/*"), (there, "runs/*/args.json"), (there, "runs/*/events*", 0.2),
        (there, "runs/*/checkpoint.pt"),
    ]  # fmt: skip
    flags = [*GAME, "--num-envs", 2, "--num-workers", 2, "--checkpoint-interval", 1, "--eval-episodes", 0]

    def interrupted(i: int) -> None:
        cwd, (condition, what, *pause) = tmp_path / str(i), moments[i]
        cwd.mkdir()
        process = start(*flags, cwd=cwd)
        try:
            wait_for(lambda: handles_signals(process.pid), pause=0.001)
            wait_for(lambda: not i or condition(cwd, process.pid, what), pause=0.001)
            time.sleep(*pause or [0])
            os.killpg(process.pid, signal.SIGINT)
            code, log = finish(process, 30), (cwd / "log").read_text()
            assert code == 130 and "Traceback" not in log, (i, code, log)
            wait_for(lambda: not living(process.pid), 10)
            if i < 3:
                assert log.strip().count("\n") == 0 and "stopped" in log, (i, log)
            if saved := re.search(r"to go on: .*--resume (\S+)", log):
                assert torch.load(cwd / saved[1] / "checkpoint.pt", weights_only=True)["iteration"] >= 0
            assert bool(saved) == any(cwd.glob("runs/*/checkpoint.pt")), (i, log)
        finally:
            for pid in living(process.pid):
                os.kill(pid, signal.SIGKILL)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(interrupted, range(len(moments))))


@pytest.mark.parametrize("where", ["Learner", "open_run", "RunDirectory.begin", "RunDirectory.picture"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_whatever_happens_ends_the_workers(where, error, tmp_path, monkeypatch, capfd):
    """An exception anywhere between their start and the first iteration: the exit code says so, and no worker is left,
    for which the process would wait at its end."""

    def failing(*args, **kwargs):
        assert workers_left(), "the workers are not there yet: this test shows nothing"
        raise error("a mistake")

    monkeypatch.chdir(tmp_path)
    owner, _, name = where.rpartition(".")
    monkeypatch.setattr(getattr(ppo_atari, owner) if owner else ppo_atari, name, failing)
    code, _, text = in_time(here, capfd, *GAME, "--num-workers", 1, "--total-timesteps", 32)
    assert code == (130 if error is KeyboardInterrupt else 1), text
    assert ("a mistake" in text) == (code == 1)
    assert not workers_left()


@pytest.mark.parametrize("what", ["a checkpoint of other shapes", "no run directory"])
def test_mistake_that_shows_after_the_workers_started(what, run, tmp_path):
    """The process ends by itself, with one line and exit code 2, and nobody is left."""
    if what == "no run directory":
        (tmp_path / "runs").symlink_to("/dev/null/nowhere")
        argv = [*GAME, "--num-envs", 2, "--num-workers", 2, "--total-timesteps", 32]
    else:
        edit(run / "checkpoint.pt", lambda saved: saved.update(obs=torch.zeros(1, 4, 44, 44)))
        argv = ["--resume", run, "--num-workers", 1, "--total-timesteps", 64]
    process = fork(*argv, cwd=tmp_path)
    try:
        assert finish(process, 60) == 2
        log = (tmp_path / "log").read_text()
        assert log.count("\n") == 1 and "Traceback" not in log, log
        wait_for(lambda: not living(process.pid), 10)
    finally:
        for pid in living(process.pid):
            os.kill(pid, signal.SIGKILL)


def test_worker_that_cannot_be_started(tmp_path, monkeypatch, capfd, unhandled):
    """As where the system allows a few processes only: one line, exit code 1, and the other worker is gone."""
    monkeypatch.chdir(tmp_path)
    forks, fork = [], os.fork

    def limited():
        forks.append(1)
        if len(forks) == 2:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    code, _, error = here(capfd, *TINY, 32, "--num-envs", 2, "--num-workers", 2, "--start-method", "fork")
    assert code == 1 and error.count("\n") == 1 and "ulimit -u" in error, error
    assert len(forks) == 2 and not workers_left()


def test_worker_that_dies_after_its_answer(tmp_path, monkeypatch):
    """While another worker takes its time, the learner waits without spinning; the next call tells who died."""
    rollout = ppo_atari.Collector.rollout

    def watched_rollout(collector):
        if collector.first == 0:
            threading.Timer(0.1, os._exit, [3]).start()
        else:
            time.sleep(1)
        return [], {"environment": 0.0}

    monkeypatch.setattr(ppo_atari.Collector, "rollout", watched_rollout)
    args = ppo_atari.parse_args([*GAME, "--num-envs", "2", "--num-workers", "2"])
    env = ppo_atari.make_env(args)
    agent = ppo_atari.inference_copy(ppo_atari.make_agent(args, env), torch.float32)
    with closing(ppo_atari.Workers(args, agent, ppo_atari.allocate(args, env))) as workers:
        assert rollout is not ppo_atari.Collector.rollout
        busy = time.process_time()
        workers.rollout()
        assert time.process_time() - busy < 0.2, "of a second in which there was nothing to do"
        with pytest.raises(ppo_atari.RunError, match=r"worker 0\b.*\b3\b"):
            in_time(workers.rollout)
    assert not workers_left()


def interrupt_game(monkeypatch, signum: int, steps: int) -> list[int]:
    """Sends this process a signal at this step of a full game, counted over all; returns the list of steps since."""
    step, games, since = ppo_atari.FrameStack.step, ppo_atari.full_games, []
    playing, number = [], itertools.count(1)

    def watched_games(*args, **kwargs):
        playing.append(1)
        return games(*args, **kwargs)

    def watched_step(*args, **kwargs):
        if playing and (now := next(number)) >= steps:
            if now == steps:
                os.kill(os.getpid(), signum)
            since.append(now)
        return step(*args, **kwargs)

    monkeypatch.setattr(ppo_atari, "full_games", watched_games)
    monkeypatch.setattr(ppo_atari.FrameStack, "step", watched_step)
    return since


@pytest.fixture
def unhandled(monkeypatch):
    """A signal that the script does not handle fails the test, in place of ending all tests."""

    def fail(signum, frame):
        raise AssertionError("the script has no handler for this signal")

    handlers = {signum: signal.signal(signum, fail) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_the_final_evaluation(signum, tmp_path, monkeypatch, capfd, unhandled):
    """Ends it between two steps. The run is complete and saved: nothing else is said, neither then nor by --resume,
    which changes nothing."""
    monkeypatch.chdir(tmp_path)
    since = interrupt_game(monkeypatch, signum, 100)
    flags = [*GAME, "--num-workers", 0, "--total-timesteps", 32, "--eval-episodes", 4]
    code, out, error = here(capfd, *flags)
    assert code == 128 + signum, error
    assert 0 < len(since) <= 8, "it played on"
    run = run_directory(tmp_path)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 2
    assert not (run / "eval.json").exists() and "mean" not in out
    said = out + error
    assert "complete" in said and "--resume" not in said and "iteration" not in said and "Traceback" not in said, said
    assert "evaluation" in error
    monkeypatch.undo()
    before = content(run)
    for flags in ([], ["--total-timesteps", 32], ["--total-timesteps", 47, "--eval-episodes", 1]):
        code, out, error = here(capfd, "--resume", run, *flags)
        assert code == 0 and "complete" in out + error and (out + error).count("\n") == 1, (out, error)
        assert "--total-timesteps 48 or more" in out + error  # 47 is larger, but no rollout more
        assert content(run) == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_evaluate(signum, run, monkeypatch, capfd, unhandled):
    """The same for --evaluate: no score of half the games, and no word about training."""
    before = content(run)
    since = interrupt_game(monkeypatch, signum, 100)
    code, out, error = here(capfd, "--evaluate", run, "--eval-episodes", 4)
    assert code == 128 + signum, error
    assert 0 < len(since) <= 8, "it played on"
    assert "mean" not in out and not re.search("iteration|training|saved|Traceback", out + error), (out, error)
    assert content(run) == before


def test_signal_during_an_evaluation_in_between(tmp_path, monkeypatch, capfd, unhandled):
    """Ends this evaluation at once, too; the run is saved, and to go on."""
    monkeypatch.chdir(tmp_path)
    since = interrupt_game(monkeypatch, signal.SIGINT, 100)
    flags = ["--num-workers", 0, "--total-timesteps", 64, "--eval-interval", 32, "--eval-episodes", 2]
    code, out, error = here(capfd, *GAME, *flags)
    assert code == 130 and 0 < len(since) <= 20, error
    run = run_directory(tmp_path)
    assert f"--resume {run.relative_to(tmp_path)}" in out and "mean" not in out
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_real_process_that_evaluates(signum, run, tmp_path):
    """Two thousand games, which take minutes to set up: also while it does that, it stops at once."""
    process = fork("--evaluate", run, "--eval-episodes", 2000, cwd=tmp_path)
    try:
        wait_for(lambda: handles_signals(process.pid))
        time.sleep(0.2)
        os.kill(process.pid, signum)
        assert finish(process, 30) == 128 + signum
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.join()


# --- Saying what is true -------------------------------------------------------------------------------------------


def test_the_command_that_goes_on_can_be_typed(tmp_path, monkeypatch, capfd):
    """As it stands there, in a shell, whatever the run is called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo_atari.StopRequest, "agreed", lambda stop: setattr(stop, "signum", 2) or 2)
    code, out, _ = here(capfd, *TINY, 32, "--exp-name", "what's this & that")
    assert code == 130
    command = shlex.split(re.search(r"to go on: (.*)", out)[1])
    assert command[:3] == ["python", "ppo_atari.py", "--resume"] and len(command) == 4
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert here(capfd, *command[2:])[0] == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_without_a_terminal(closed, tmp_path):
    """Standard streams may be closed, as some job systems do: nothing is said, and all is kept."""
    command = shlex.join(map(str, [sys.executable, ppo_atari.__file__, *TINY, 32, "--eval-episodes", 1]))
    assert (
        subprocess.run(
            ["sh", "-c", f"exec {command} {closed}"], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ).returncode
        == 0
    )
    run = run_directory(tmp_path)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 2
    assert len(json.loads((run / "eval.json").read_text())["scores"]) == 1
    assert len(curves(run)["losses/entropy"]) == 2


@pytest.mark.parametrize("interrupted", [False, True])
def test_full_disk_without_any_checkpoint(interrupted, tmp_path, monkeypatch, capfd, unhandled):
    """Nobody is told that something was saved, or how to go on: exit code 1, each kind of file told once."""
    with small_disk(tmp_path / "disk", "400k") as disk, monkeypatch.context() as patch:
        patch.chdir(disk)
        compute_gae, iterations = ppo_atari.compute_gae, itertools.count(1)

        def watched(*args, **kwargs):
            if next(iterations) == 3 and interrupted:
                os.kill(os.getpid(), signal.SIGINT)
            return compute_gae(*args, **kwargs)

        patch.setattr(ppo_atari, "compute_gae", watched)
        code, out, error = here(capfd, *TINY, 80)
        assert code == 1 and next(iterations) == (4 if interrupted else 6)
        failed = re.findall(r"(?m)^ppo_atari.py: (.+) cannot be written: .*No space", error)
        assert {"agent.pt", "checkpoint.pt"} <= set(failed) and len(set(failed)) == len(failed), error
        said = error.replace("finishing this iteration, then saving", "")
        assert not re.search(r"\bsaved\b|kept(?<!is kept)|--resume|Traceback", out + said), (out, error)
        assert "no checkpoint" in error
        assert not [path for path in disk.rglob("*") if path.suffix in (".tmp", ".pt")]


def test_disk_that_is_full_for_a_while(tmp_path, monkeypatch, capfd):
    """Its failures are told once for each kind of file, and its recovery; TensorBoard's curves go on; nothing half
    written is left; and the run can go on after all."""
    with small_disk(tmp_path / "disk", "20m") as disk, monkeypatch.context() as patch:
        patch.chdir(disk)
        compute_gae, iterations = ppo_atari.compute_gae, itertools.count(1)

        def watched(*args, **kwargs):
            if (iteration := next(iterations)) == 3:
                fill(disk / "filler")
            elif iteration == 6:
                (disk / "filler").unlink()
            return compute_gae(*args, **kwargs)

        patch.setattr(ppo_atari, "compute_gae", watched)
        code, _, error = here(capfd, *TINY, 160)
        assert code == 0, error
        kinds = ["TensorBoard events", "agent.pt", "checkpoint.pt"]
        assert sorted(re.findall(r"(?m)^ppo_atari.py: (.+) cannot be written: .*No space", error)) == kinds, error
        assert sorted(re.findall(r"(?m)^ppo_atari.py: (.+) can be written again", error)) == kinds
        assert error.count("\n") == 6
        run = run_directory(disk)
        assert not list(run.rglob("*.tmp")) and all(path.stat().st_size for path in run.iterdir())
        for tag, curve in curves(run).items():
            steps = [step for step, _ in curve]
            assert len(set(steps)) == len(steps), tag
            if tag.startswith("losses/"):
                assert {16, 32, *range(96, 161, 16)} <= set(steps), (tag, steps)
        assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 10
        assert here(capfd, "--resume", run, "--total-timesteps", 176)[0] == 0


@pytest.mark.parametrize("what", ["full for a while", "full, and Ctrl-C"])
def test_log_on_a_full_disk(what, tmp_path, monkeypatch):
    """Where not even a line of text can be written, training goes on, and Ctrl-C saves what there is."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    monkeypatch.chdir(tmp_path)
    write_file, compute_gae, iterations = ppo_atari.write_file, ppo_atari.compute_gae, itertools.count(1)

    def watched(*args, **kwargs):
        if (iteration := next(iterations)) == 3 and "Ctrl-C" in what:
            os.kill(os.getpid(), signal.SIGINT)
        full = "for a while" in what and iteration in (3, 4)
        monkeypatch.setattr(ppo_atari, "write_file", failing if full else write_file)
        return compute_gae(*args, **kwargs)

    def failing(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ppo_atari, "compute_gae", watched)
    with suppress(OSError), open("/dev/full", "w") as full:
        kept = [os.dup(1), os.dup(2)]
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(full.fileno(), number)
            monkeypatch.setattr(sys, name, full)
        try:
            code = ppo_atari.main([*TINY, "96"])
        finally:
            monkeypatch.undo()
            for number, copy in zip((1, 2), kept):
                os.dup2(copy, number)
                os.close(copy)
    assert code == (130 if "Ctrl-C" in what else 0)
    saved = torch.load(run_directory(tmp_path) / "checkpoint.pt", weights_only=True)
    assert saved["iteration"] == (3 if "Ctrl-C" in what else 6)


@pytest.mark.parametrize("reward", [0, 1])
def test_explained_variance_of_returns_that_do_not_vary(reward, tmp_path, monkeypatch, capfd):
    """Is no number, and no point in the curve. Where they do vary, there is one."""
    compute_gae = ppo_atari.compute_gae

    def paid(rewards, *args, **kwargs):
        rewards[:] = reward * torch.arange(rewards.numel()).view(rewards.shape)
        return compute_gae(rewards, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo_atari, "compute_gae", paid)
    code, _, error = here(capfd, *TINY, 32, "--gamma", 0)
    assert code == 0, error
    found = curves(run_directory(tmp_path))
    assert len(found.get("losses/explained_variance", [])) == 2 * reward
    assert len(found["losses/value_loss"]) == 2
    assert all(np.isfinite(value) for curve in found.values() for _, value in curve)


# --- One run, one directory, one writer ----------------------------------------------------------------------------


def test_two_runs_of_one_second(tmp_path, monkeypatch, capfd):
    """Each has its own directory, also when the names that follow are taken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.5)
    before = {}
    for number in (1, 2, 3):
        assert here(capfd, *TINY, 16)[0] == 0
        runs = {path: content(path) for path in (tmp_path / "runs").iterdir()}
        assert len(runs) == number
        assert all(runs[path] == files for path, files in before.items()), "a run has written to another's directory"
        before = runs


def test_second_process_in_a_running_run(tmp_path, capfd):
    """--resume of it is refused with one line and exit code 2; --evaluate prints the score and writes nothing."""
    process = fork(*GAME, "--num-workers", 0, "--checkpoint-interval", 1, cwd=tmp_path)
    try:
        wait_for(lambda: any(tmp_path.glob("runs/*/checkpoint.pt")))
        run = run_directory(tmp_path)
        assert str(run) in refusal(capfd, "--resume", run, "--num-workers", 0)
        code, out, error = here(capfd, "--evaluate", run, "--eval-episodes", 1)
        assert code == 0 and "over 1 full games" in out
        assert error.count("\n") == 1 and str(run) in error, error
        assert not (run / "eval.json").exists()
        assert len(list(run.glob("events*"))) == 1
        os.kill(process.pid, signal.SIGINT)
        assert finish(process, 60) == 130
        assert (tmp_path / "log").read_text().count("Traceback") == 0
    finally:
        process.kill()
        process.join()
    (run / "args.json.tmp").write_text("left behind by a kill")
    code, out, error = here(capfd, "--evaluate", run, "--eval-episodes", 1)  # the lock went with its process
    assert code == 0 and error == "" and (run / "eval.json").exists()


def test_links_in_a_run_directory(run, tmp_path, capfd):
    """Are not followed: what they point to stays as it was, and nothing is made where they point to nothing."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    for name in ("args.json", "agent.pt", "checkpoint.pt", "eval.json"):
        (run / f"{name}.tmp").symlink_to(tmp_path / ("precious" if name != "agent.pt" else "nothing"))
    (run / "videos").symlink_to(tmp_path / "elsewhere")
    (run / "eval.json").symlink_to(tmp_path / "precious")
    flags = ["--eval-episodes", 1, "--capture-video", "--total-timesteps", 48]
    code, _, error = here(capfd, "--resume", run, *flags)
    assert code == 1 and "video" in error and "Traceback" not in error, error
    code, _, error = here(capfd, "--evaluate", run, "--eval-episodes", 1, "--capture-video")
    assert code == 1 and "video" in error and "Traceback" not in error, error
    assert (tmp_path / "precious").read_text() == "precious"
    assert not any((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "nothing").exists()
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 3
    assert not (run / "eval.json").is_symlink() and json.loads((run / "eval.json").read_text())["step"] == 48
    assert not list(run.glob("*.tmp"))


# --- Too little memory ---------------------------------------------------------------------------------------------


def small_shared_memory(size: str) -> None:
    """Gives this process, and its children, another /dev/shm, of this size."""
    libc, private = ctypes.CDLL(None, use_errno=True), 1 << 14 | 1 << 18  # MS_REC | MS_PRIVATE
    made = libc.unshare(0x20000) == 0 and libc.mount(b"none", b"/", None, private, None) == 0  # CLONE_NEWNS
    if not made or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode()):
        os.write(1, b"no right to mount\n")
        os._exit(77)


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))


def limit_memory(megabytes: int) -> None:
    """To what is in use now and this much more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))


def small_machine() -> None:
    """One that would promise more memory than it has, as some are set to, and then kill who uses it."""
    sysconf = os.sysconf
    os.sysconf = lambda name: 2**26 // sysconf("SC_PAGE_SIZE") if name == "SC_PHYS_PAGES" else sysconf(name)


LARGE = ["--num-envs", "5000", "--num-steps", "1280"]
SHORTAGES = {  # what is short, the flags, and one of what the line must name
    "shared memory of 8 MB": (partial(small_shared_memory, "8m"), ["--num-workers", 2], "--shm-size|--num-workers"),
    "shared memory for the rollout, not for the weights": (
        partial(small_shared_memory, "64m"),
        [*GAME, "--num-workers", 1, "--frame-size", 164, "--no-shared-network", "--precision", "float32"],
        "--shm-size|--num-workers",
    ),
    "twenty open files": (few_files, ["--num-workers", 8], "ulimit -n|--num-workers"),
    "memory for the rollout": (
        partial(limit_memory, 300), ["--num-envs", 64, "--num-steps", 512, "--num-workers", 0], "--num-envs"
    ),
    "memory for the shared rollout": (
        partial(limit_memory, 300), ["--num-envs", 64, "--num-steps", 512, "--num-workers", 2], "--num-envs"
    ),
    "memory for the batch": (
        partial(limit_memory, 400), ["--num-steps", 64, "--frame-stack", 64, "--num-workers", 0], "--num-envs"
    ),
    "memory of 64 MB that promises more": (
        small_machine, ["--num-envs", 64, "--num-steps", 64, "--num-workers", 0], "MB of memory, .* 64 MB: .*--num-envs"
    ),
    "memory of any machine": (None, [*LARGE, "--num-workers", 0], "--num-envs"),
    "shared memory of any machine": (None, [*LARGE, "--num-workers", 2], "--num-envs"),
    "memory beyond any number": (
        None, ["--num-envs", 2**20, "--num-steps", 2**20, "--frame-stack", 64, "--frame-size", 36, "--num-workers", 0,
               "--total-timesteps", 2**45], "--num-envs"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("before", "flags", "names"), SHORTAGES.values(), ids=SHORTAGES)
def test_too_little_memory(before, flags, names, tmp_path):
    """One line says what is short and which flag or limit to change; exit code 1, no process left."""
    process = fork("--eval-episodes", 0, "--total-timesteps", 6_400_000, *flags, cwd=tmp_path, before=before)
    try:
        code, log = finish(process, 120), (tmp_path / "log").read_text()
        if code == 77:
            pytest.skip("needs the right to mount")
        assert code == 1, (code, log)
        error = "".join(line for line in log.splitlines(True) if not re.match("run directory|cpu, ", line))
        assert error.count("\n") == 1 and re.search(names, error) and "Traceback" not in error, log
        wait_for(lambda: not living(process.pid), 10)
    finally:
        for pid in living(process.pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "text",
    [
        "can't start new thread", "could not create a primitive", "std::bad_alloc",
        "DefaultCPUAllocator: can't allocate memory",
        "[enforce fail at inline_container.cc:672] . unexpected pos 13923456 vs 7500820",
        "error return without exception set",
    ],
)  # fmt: skip
def test_words_for_too_little_memory(text):
    """Seen with `ulimit -v` between 0 and 900 MB above what the imports need; any other error is none of these."""
    args = ppo_atari.parse_args([])
    assert "--num-envs" in ppo_atari.shortage(RuntimeError(text), args)
    assert ppo_atari.shortage(RuntimeError("an index is out of range"), args) is None


@pytest.mark.parametrize("words", [(), ("Unable to allocate 4.00 GiB for an array",)])
def test_too_little_memory_in_a_worker(words, tmp_path, monkeypatch, capfd):
    """NumPy's MemoryError has words of its own, Python's has none."""

    def rollout(*args):
        raise MemoryError(*words)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo_atari, "rollout", rollout)
    code, _, error = here(capfd, *TINY, 32, "--num-workers", 2, "--start-method", "fork")
    assert code == 1 and error.count("\n") == 1 and "--num-envs" in error and not workers_left(), error


# --- Values from files pass the same door --------------------------------------------------------------------------


def edit(path: Path, change: Callable) -> None:
    """Changes in place what a file of a run holds."""
    saved = json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, weights_only=True)
    change(saved)
    path.write_text(json.dumps(saved)) if path.suffix == ".json" else torch.save(saved, path)


FLAGS = {
    "null": {"num_envs": None}, "number as a name": {"env_id": 5}, "division by zero": {"num_minibatches": 0},
    "gamma": {"gamma": 7}, "endless skip": {"frame_skip": 0}, "endless no-ops": {"noop_max": 10**15},
    "endless stack": {"frame_stack": 10**9}, "function of torch": {"precision": "load"}, "other": {"hyper": 1},
    "yes for a number": {"num_steps": True}, "text for yes": {"anneal_lr": "no"}, "beyond float32": {"clip_coef": 1e39},
    "list": {"seed": [1]}, "huge image": {"frame_size": 10**6 + 4}, "no game": {"env_id": "CartPole-v1"},
    "no-op for a name": {"exp_name": "../../precious"}, "not a number": {"gae_lambda": float("nan")},
    "options": {"env_id": "ALE/Breakout-v5 --seed=2"}, "empty": {"env_id": ""},
}  # fmt: skip


def end_of_a_run(capfd, run: Path, *argv) -> str:
    """The line with which a run that was tampered with is refused: it stays as it is, and no process is left."""
    before = content(run)
    error = in_time(refusal, capfd, *argv)
    assert "Traceback" not in error and len(error) < 1000, error
    assert content(run) == before
    assert not workers_left()
    return error


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_hostile_flags_are_refused(flags, run, capfd):
    """In args.json, which --resume reads, and in agent.pt, which --evaluate reads: as if the user had typed them."""
    for name, argv in (("args.json", ("--resume", run)), ("agent.pt", ("--evaluate", run))):
        edit(run / name, lambda saved: saved["flags"].update(flags))
        error = end_of_a_run(capfd, run, *argv)
        assert name in error
        assert any(flag in error.replace("-", "_") for flag in flags), error


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[" * 100_000, b'{"flags": [1]}', b'{"flags": "x"}', b'{"flags": null}', b"\xff\xfe", b"{}",
        b'{"flags": []}', b'{"flags": ""}', b'{"flags": [["seed", 1]]}',
    ],
)  # fmt: skip
def test_damaged_args_are_refused(text, run, capfd):
    (run / "args.json").write_bytes(text)
    assert "args.json is missing or damaged" in end_of_a_run(capfd, run, "--resume", run)


def test_flags_of_an_older_script(run, capfd):
    """A flag that its file does not name has its default, and the run goes on; the result is the same."""
    assert here(capfd, "--evaluate", run, "--eval-episodes", 1)[0] == 0
    score = json.loads((run / "eval.json").read_text())
    for name in ("args.json", "agent.pt", "checkpoint.pt"):
        edit(run / name, lambda saved: [saved["flags"].pop(flag) for flag in ("gae_lambda", "target_kl")])
    assert here(capfd, "--evaluate", run, "--eval-episodes", 1)[0] == 0
    assert json.loads((run / "eval.json").read_text()) == score
    code, _, error = here(capfd, "--resume", run, "--total-timesteps", 48)
    assert code == 0, error
    assert json.loads((run / "args.json").read_text())["flags"]["gae_lambda"] == 0.95
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 3


def game_state(game: str) -> bytes:
    env = ppo_atari.make_env(ppo_atari.parse_args(["--env-id", game, "--frame-size", "36"]))
    env.reset(seed=1)
    return ppo_atari.get_env_state(env)["emulator"]


def first(saved: dict) -> dict:
    return saved["environments"][0]


def frames(saved: dict) -> dict:
    return first(saved)["wrappers"][0]


def moments(saved: dict) -> dict:
    return saved["optimizer"]["state"][0]


AGENTS = {
    "weights of another network": lambda a: a["weights"].update({"actor.weight": torch.zeros(5, 512)}),
    "a weight less": lambda a: a["weights"].pop("critic.bias"),
    "a weight more": lambda a: a["weights"].update({"more": torch.zeros(1)}),
    "NaN": lambda a: a["weights"]["actor.bias"].fill_(float("nan")),
    "infinity": lambda a: a["weights"]["actor.bias"].fill_(float("inf")),
    "no tensor": lambda a: a["weights"].update({"actor.bias": [0.0] * 4}),
    "no weights": lambda a: a.pop("weights"),
    "weights in a list": lambda a: a.update(weights=list(a["weights"].values())),
    "no flags": lambda a: a.pop("flags"),
    "flags in a list": lambda a: a.update(flags=[1]),
    "flags of nothing": lambda a: a.update(flags=None),
    "flags in an empty list": lambda a: a.update(flags=[]),
    "a step in words": lambda a: a.update(step="x"),
    "a step beyond all": lambda a: a.update(step=2**70),
}
CHECKPOINTS = {name: change for name, change in AGENTS.items() if "step" not in name} | {
    "iteration in words": lambda c: c.update(iteration="x"),
    "half an iteration": lambda c: c.update(iteration=1.5),
    "iteration -1": lambda c: c.update(iteration=-1),
    "no iteration": lambda c: c.pop("iteration"),
    "recent 5": lambda c: c.update(recent=5),
    "recent games in words": lambda c: c.update(recent=["x"]),
    "ranks 5": lambda c: c.update(ranks=5),
    "no ranks": lambda c: c.pop("ranks"),
    "a rank 5": lambda c: c.update(ranks=[5]),
    "ranks by name": lambda c: c.update(ranks={"0": {}}),
    "observations of another shape": lambda c: c["row"].update(obs=c["row"]["obs"][:, :2].clone()),
    "no observations": lambda c: c["row"].pop("obs"),
    "state of another script": lambda c: c.update(counts={"room": 1}),
    "no generators": lambda c: c.pop("generators"),
    "moments of another shape": lambda c: moments(c).update(exp_avg=torch.zeros(3)),
    "moments without a shape": lambda c: moments(c).update(exp_avg_sq=torch.tensor(0.0)),
    "moments in words": lambda c: moments(c).update(exp_avg="x"),
    "no moments": lambda c: c["optimizer"]["state"].update({0: {}}),
    "no optimizer": lambda c: c.update(optimizer={}),
    "a generator's half": lambda c: c.update(generators=[c["generators"][0][:100].clone(), *c["generators"][1:]]),
    "knobs 5": lambda c: c.update(knobs=5),
    "no knobs": lambda c: c.update(knobs={}),
    "a game less": lambda c: c["environments"].pop(),
    "games 5": lambda c: c.update(environments=5),
    "emulator of another game": lambda c: first(c).update(emulator=game_state("ALE/Pong-v5")),
    "emulator, cut": lambda c: first(c).update(emulator=first(c)["emulator"][:-8]),
    "emulator, longer": lambda c: first(c).update(emulator=first(c)["emulator"] + bytes(8)),
    "emulator, nothing": lambda c: first(c).update(emulator=b""),
    "emulator in words": lambda c: first(c).update(emulator="x"),
    "a game's generator, gone": lambda c: first(c).pop("generator"),
    "a game's generator in words": lambda c: first(c).update(generator={"state": "x"}),
    "frames 5": lambda c: first(c)["wrappers"].__setitem__(0, 5),
    "frames of another shape": lambda c: frames(c).update(ndarray=torch.zeros(3, dtype=torch.int8)),
    "frames of another type": lambda c: frames(c).update(dtype="int8"),
    "frames of objects": lambda c: frames(c).update(dtype="O"),
    "a wrapper less": lambda c: first(c)["wrappers"].pop(),
    "of a run with another seed": lambda c: c["flags"].update(seed=2),
    "of a run with another gamma": lambda c: c["flags"].update(gamma=0.5),
}


@pytest.mark.parametrize("change", AGENTS.values(), ids=AGENTS)
def test_hostile_agent_is_refused(change, run, tmp_path, capfd):
    edit(run / "agent.pt", change)
    assert "agent.pt" in end_of_a_run(capfd, run, "--evaluate", run, "--eval-episodes", 1)


@pytest.mark.parametrize("change", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_hostile_checkpoint_is_refused(change, run, capfd, request):
    """The games are taken by a worker, if there is one."""
    edit(run / "checkpoint.pt", change)
    workers = int(bool(re.search("game|emulator|frames|wrapper", request.node.name)))
    flags = ["--num-workers", workers, "--total-timesteps", 48]
    assert re.search("checkpoint|processes", end_of_a_run(capfd, run, "--resume", run, *flags))


@pytest.mark.parametrize("name", ["agent.pt", "checkpoint.pt"])
def test_flipped_bits_are_noticed(name, run, capfd):
    """Any of them, in the middle of a weight too: a file is taken as it was written, or not at all."""
    rng, path = np.random.default_rng(1), run / name
    good, saved = path.read_bytes(), torch.load(path, weights_only=True)
    stored = [bytes(tensor.untyped_storage()[:64].tolist()) for tensor in weights(run).values()]
    inside = [good.index(part) + 2 for part in stored if len(part) == 64]
    argv = ("--evaluate", run, "--eval-episodes", 0) if name == "agent.pt" else ("--resume", run)
    for place in [*inside[::3], *map(int, rng.integers(len(good), size=6))]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << int(rng.integers(8))]) + good[place + 1 :])
        code, _, error = here(capfd, *argv)
        if code == 0:  # a bit of a date, or of the padding between two parts
            assert place not in inside and not differences(torch.load(path, weights_only=True), saved), place
        else:
            assert code == 2 and name in error and error.count("\n") == 1, error
