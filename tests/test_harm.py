"""No hang, no false word, no harm: how the script ends, and what it takes from files."""

import errno
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import chdir, closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import (
    at_call,
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

# With a frame skip of 16, a game has some 60 steps.
GAME = ["--env-id", "ALE/Breakout-v5", "--num-envs", "1", "--num-steps", "16", "--frame-size", "36",
        "--frame-skip", "16", "--update-epochs", "1", "--num-minibatches", "1"]  # fmt: skip
TINY = [*GAME, "--num-workers", "0", "--eval-episodes", "0", "--checkpoint-interval", "1",
        "--total-timesteps"]  # fmt: skip


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
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def workers_left() -> list:
    """The processes that the script has started in this one and not ended."""
    found = []
    for process in multiprocessing.active_children():
        if "ForkServer" not in process.name:
            found.append(process)
    return found


@pytest.fixture(autouse=True)
def no_worker_stays():
    """A worker that a test finds left over must not keep this process from its end."""
    yield
    for process in workers_left():
        process.kill()


def end(process) -> None:
    """Kills whoever is left of what start() or fork() began."""
    for pid in living(process.pid):
        os.kill(pid, signal.SIGKILL)


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


# --- Ending --------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["ale_py", "libtorch_cpu"])
def test_ctrl_c_during_the_imports(library, tmp_path):
    """Python, or the library, ends as it does: nobody is left, and nothing was written."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        pytest.skip("this process ignores Ctrl-C, and Python's own handler does, too")
    process = start(*TINY, 32, cwd=tmp_path)
    try:
        maps = Path(f"/proc/{process.pid}/maps")
        wait_for(lambda: library in maps.read_text(), pause=0.001)
        assert not handles_signals(process.pid), "it came too late to show anything"
        os.killpg(process.pid, signal.SIGINT)
        assert finish(process, 60) != 0
        assert not living(process.pid)
        assert [path.name for path in tmp_path.iterdir()] == ["log"]
    finally:
        end(process)


def test_ctrl_c_at_the_first_worker(tmp_path):
    """Of the script as a user starts it: it ends with 130, nobody is left, and what it says is
    saved can be resumed."""
    process = start(*GAME, "--num-envs", 2, "--num-workers", 2, cwd=tmp_path)
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_for(lambda: children.read_text(), pause=0.001)
        os.killpg(process.pid, signal.SIGINT)
        code = finish(process, 60)
        log = (tmp_path / "log").read_text()
        assert code == 130 and "Traceback" not in log, log
        assert not living(process.pid)
        path = re.search(r"to go on: .*--resume (\S+)", log)[1]
        saved = torch.load(tmp_path / path / "checkpoint.pt", weights_only=True)
        assert saved["iteration"] == 0
    finally:
        end(process)


@pytest.mark.parametrize(
    "moment", ["ParallelEnvs", "Worker", "choose_device", "open_run", "os.replace"]
)
def test_ctrl_c_while_it_starts(moment, tmp_path):
    """To all processes at once, from the moment on at which the handlers stand: 130, no traceback,
    nobody is left, and there is a checkpoint to go on from."""
    before = partial(at_call, moment, 1, partial(os.killpg, 0, signal.SIGINT))
    flags = [*GAME, "--num-envs", 2, "--num-workers", 2, "--eval-episodes", 0]
    process = fork(*flags, cwd=tmp_path, before=before)
    try:
        code = finish(process, 60)
        log = (tmp_path / "log").read_text()
        assert code == 130 and "Traceback" not in log, log
        assert not living(process.pid)
        assert "to go on: " in log, log
        saved = torch.load(run_directory(tmp_path) / "checkpoint.pt", weights_only=True)
        assert saved["iteration"] == 0
    finally:
        end(process)


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_ctrl_c_before_the_handlers_stand(program, run, tmp_path, monkeypatch, capfd):
    """One line, 130, and nothing changes."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    before = content(tmp_path)
    monkeypatch.setattr(ppo_atari, "make_env", interrupted)
    argv = [*TINY, 32] if program == "train" else ["--evaluate", run]
    code, out, error = here(capfd, *argv)
    assert code == 130 and out == "" and error.count("\n") == 1 and "stopped" in error
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("start", ZeroDivisionError),
        ("start", KeyboardInterrupt),
        ("Games", ZeroDivisionError),
        ("choose_device", KeyboardInterrupt),
        ("open_run", ZeroDivisionError),
        ("RunDirectory.add_picture", KeyboardInterrupt),
        ("anneal", ZeroDivisionError),
        ("anneal", KeyboardInterrupt),
    ],
)
def test_whatever_happens_ends_the_workers(where, error, tmp_path, monkeypatch, capfd):
    """An exception anywhere from their start on: it comes through, as a second Ctrl-C does with the
    exit code 130, and no worker is left, for which the process would wait at its end."""
    learner = os.getpid()
    owner, _, name = where.rpartition(".")
    owner = getattr(ppo_atari, owner) if owner else ppo_atari
    if where == "start":  # of the worker itself, which is there when it fails
        owner = multiprocessing.process.BaseProcess
    function = getattr(owner, name)

    def failing(*args, **kwargs):
        if os.getpid() != learner:
            return function(*args, **kwargs)
        if where == "start":
            function(*args, **kwargs)
        assert workers_left(), "the workers are not there yet: this test shows nothing"
        raise error("a mistake")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(owner, name, failing)
    flags = [*GAME, "--num-workers", 1, "--total-timesteps", 64]
    if where == "Games":  # the learner's own: it plays one of four
        flags += ["--num-envs", 4, "--num-groups", 1]
    if error is KeyboardInterrupt:
        code, _, text = in_time(here, capfd, *flags)
        assert code == 130 and text.count("\n") == 1, text
    else:
        with pytest.raises(ZeroDivisionError, match="a mistake"):
            in_time(ppo_atari.main, list(map(str, flags)))
    assert not workers_left()


def test_mistake_that_shows_after_the_workers_started(run, tmp_path):
    """The process ends by itself, with a traceback and exit code 1, and nobody is left."""
    edit(run / "checkpoint.pt", lambda saved: saved["envs"].update(obs=torch.zeros(1, 4, 44, 44)))
    before = content(run)
    argv = ["--resume", run, "--num-workers", 1, "--total-timesteps", 64]
    process = fork(*argv, cwd=tmp_path)
    try:
        assert finish(process, 60) == 1
        log = (tmp_path / "log").read_text()
        assert "44" in log and log.count("Traceback") == 1, log
        assert not living(process.pid)
        assert content(run) == before
    finally:
        end(process)


def test_worker_that_cannot_be_started(tmp_path, monkeypatch):
    """As where the system allows a few processes only: its error, and the other worker is gone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo_atari, "START_METHOD", "fork")
    fork = os.fork
    forks = []

    def limited():
        forks.append(1)
        if len(forks) == 2:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    with pytest.raises(BlockingIOError, match="temporarily unavailable"):
        ppo_atari.main([*TINY, "32", "--num-envs", "2", "--num-workers", "2"])
    assert len(forks) == 2 and not workers_left()


@pytest.fixture
def two_workers():
    """Two games in one group, each in a worker of its own."""
    flags = ["--num-envs", "2", "--num-groups", "1", "--num-workers", "2"]
    args = ppo_atari.parse_args([*GAME, *flags])

    def envs() -> ppo_atari.ParallelEnvs:
        return ppo_atari.ParallelEnvs(args, ppo_atari.make_env(args).observation_space)

    return envs


def test_worker_that_dies_after_its_answer(two_workers, monkeypatch):
    """While the other one takes its time: the learner tells who it was, and its exit code."""

    def step(games, indices):
        if indices == [0]:
            threading.Timer(0.1, os._exit, [3]).start()
        else:
            time.sleep(1)
        return []

    monkeypatch.setattr(ppo_atari.Games, "step", step)
    with closing(two_workers()) as envs:
        turns = envs.turns(2)
        _, group = next(turns)
        envs.step(group, torch.zeros(2, dtype=torch.int64))
        with pytest.raises(ppo_atari.WorkerError, match=r"worker 0\b.*\b3\b"):
            in_time(next, turns)
    assert not workers_left()


def test_waiting_for_a_worker_takes_no_time(two_workers, monkeypatch):
    """Of the learner's core, that is."""

    def step(games, indices):
        time.sleep(1)
        return []

    monkeypatch.setattr(ppo_atari.Games, "step", step)
    with closing(two_workers()) as envs:
        turns = envs.turns(2)
        _, group = next(turns)
        envs.step(group, torch.zeros(2, dtype=torch.int64))
        busy = time.process_time()
        next(turns)
        assert time.process_time() - busy < 0.2, "of a second in which there was nothing to do"


def interrupt_game(monkeypatch, signum: int, steps: int) -> list[int]:
    """Sends this process a signal at this step of a full game, counted over all; returns the list
    of steps since."""
    step = ppo_atari.FrameStack.step
    games = ppo_atari.play_full_games
    number = itertools.count(1)
    playing = []
    since = []

    def watched_games(*args, **kwargs):
        playing.append(1)
        return games(*args, **kwargs)

    def watched_step(*args, **kwargs):
        if playing and (now := next(number)) >= steps:
            if now == steps:
                os.kill(os.getpid(), signum)
            since.append(now)
        return step(*args, **kwargs)

    monkeypatch.setattr(ppo_atari, "play_full_games", watched_games)
    monkeypatch.setattr(ppo_atari.FrameStack, "step", watched_step)
    return since


@pytest.fixture
def unhandled():
    """A signal that the script does not handle fails the test, in place of ending all tests."""

    def fail(signum, frame):
        raise AssertionError("the script has no handler for this signal")

    handlers = {signum: signal.signal(signum, fail) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_the_final_evaluation(signum, tmp_path, monkeypatch, capfd, unhandled):
    """Ends it between two steps. The run is complete and saved: nothing else is said, neither then
    nor by --resume, which changes nothing."""
    monkeypatch.chdir(tmp_path)
    since = interrupt_game(monkeypatch, signum, 30)
    flags = [*GAME, "--num-workers", 0, "--total-timesteps", 32, "--eval-episodes", 2]
    code, out, error = here(capfd, *flags)
    assert code == 128 + signum, error
    assert 0 < len(since) <= 4, "it played on"
    run = run_directory(tmp_path)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 2
    assert not (run / "eval.json").exists() and "full games" not in out
    said = out + error
    assert "complete" in said and not re.search("--resume|iteration|Traceback", said), said
    assert "evaluation" in error
    monkeypatch.undo()
    before = content(run)
    for flags in ([], ["--total-timesteps", 32], ["--total-timesteps", 47, "--eval-episodes", 1]):
        code, out, error = here(capfd, "--resume", run, *flags)
        said = out + error
        assert code == 0 and "complete" in said and said.count("\n") == 1, said
        assert "--total-timesteps 48 or more" in said  # 47 is larger, but no rollout more
        assert content(run) == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_evaluate(signum, run, monkeypatch, capfd, unhandled):
    """The same for --evaluate: no score of half the games, and no word about training."""
    before = content(run)
    since = interrupt_game(monkeypatch, signum, 30)
    output = run.parent / "scores"
    flags = ["--eval-episodes", 2, "--output", output, "--capture-video"]
    code, out, error = here(capfd, "--evaluate", run, *flags)
    assert code == 128 + signum, error
    assert 0 < len(since) <= 4, "it played on"
    said = out + error
    assert "mean" not in out and not re.search("iteration|training|saved|Traceback", said), said
    assert content(run) == before
    assert not (output / "eval.json").exists() and not (output / "videos").exists()


def test_signal_during_an_evaluation_in_between(tmp_path, monkeypatch, capfd, unhandled):
    """Ends this evaluation at once, too; the run is saved, and to go on."""
    monkeypatch.chdir(tmp_path)
    since = interrupt_game(monkeypatch, signal.SIGINT, 30)
    flags = ["--num-workers", 0, "--total-timesteps", 64]
    flags += ["--eval-interval", 32, "--eval-episodes", 2]
    code, out, error = here(capfd, *GAME, *flags)
    assert code == 130 and 0 < len(since) <= 20, error
    run = run_directory(tmp_path)
    assert f"--resume {run.relative_to(tmp_path)}" in out and "full games" not in out
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_real_process_that_evaluates(signum, run, tmp_path):
    """Two thousand games, which take minutes to set up: also while it does that, it stops at
    once."""
    process = fork("--evaluate", run, "--eval-episodes", 2000, cwd=tmp_path)
    try:
        wait_for(lambda: handles_signals(process.pid))
        time.sleep(0.2)
        os.kill(process.pid, signum)
        assert finish(process, 60) == 128 + signum
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        end(process)


# --- Saying what is true -------------------------------------------------------------------------


def test_the_command_that_goes_on_can_be_typed(tmp_path, monkeypatch, capfd):
    """As it stands there, in a shell, whatever the run is called."""

    def agreed(stop):
        stop.signum = signal.SIGINT
        return True

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ppo_atari.StopRequest, "agreed", agreed)
        code, out, _ = here(capfd, *TINY, 32, "--exp-name", "what's this & that")
    assert code == 130
    command = shlex.split(re.search(r"to go on: (.*)", out)[1])
    assert command[:3] == ["python", "ppo_atari.py", "--resume"] and len(command) == 4
    assert here(capfd, *command[2:])[0] == 0


def close_streams(*numbers: int) -> None:
    """As a shell does with <&-, >&- and 2>&-; and asks itself to stop in the second iteration."""
    names = ("stdin", "stdout", "stderr")
    for number in numbers:
        os.close(number)
        setattr(sys, names[number], None)
    at_call("compute_gae", 2, partial(os.kill, os.getpid(), signal.SIGTERM))


def test_without_a_terminal(tmp_path):
    """Standard streams may be closed, as some job systems do: nothing is said, and all is kept.
    What the script then opens has their numbers, and no word of its own may get into that."""
    saved = {}
    for closed in ((), (2,), (0, 1, 2)):
        cwd = tmp_path / f"closed{closed}"
        cwd.mkdir()
        before = partial(close_streams, *closed)
        assert finish(fork(*TINY, 48, "--eval-episodes", 1, cwd=cwd, before=before)) == 143, closed
        run = run_directory(cwd)
        saved[closed] = torch.load(run / "checkpoint.pt", weights_only=True)
        assert saved[closed]["iteration"] == 2
        assert len(curves(run)["losses/entropy"]) == 2
    for closed, checkpoint in saved.items():
        assert not differences(checkpoint, saved[()]), closed
    assert finish(fork("--resume", run, cwd=cwd, before=before)) == 0
    assert len(curves(run)["losses/entropy"]) == 3
    assert len(json.loads((run / "eval.json").read_text())["scores"]) == 1


def test_full_disk_without_any_checkpoint(tmp_path):
    """Not even after Ctrl-C is anybody told that something was saved, or how to go on: the system's
    error, and exit code 1."""
    with small_disk(tmp_path / "disk", "400k") as disk:
        before = partial(at_call, "compute_gae", 1, partial(os.killpg, 0, signal.SIGINT))
        process = fork(*TINY, 80, "--num-workers", 1, cwd=disk, before=before)
        try:
            assert finish(process, 60) == 1
            log = (disk / "log").read_text()
            said = log.replace("finishing this iteration, then saving", "")
            assert "No space left" in said
            assert not re.search(r"\bsaved\b|\bkept\b|--resume", said), log
            assert not living(process.pid)
            assert not [path for path in disk.rglob("*") if path.suffix == ".pt"]
        finally:
            end(process)


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


# --- One run, one directory, one writer ----------------------------------------------------------


def test_two_runs_of_one_second(tmp_path, monkeypatch):
    """Each has its own directory, also when the names that follow are taken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.5)
    args = ppo_atari.parse_args([*TINY, "16"])
    before = {}
    for number in (1, 2, 3):
        with closing(ppo_atari.open_run(args, 0)) as run:
            run.write("args.json", b"%d" % number)
        runs = {path: content(path) for path in (tmp_path / "runs").iterdir()}
        assert len(runs) == number
        for path, files in before.items():
            assert runs[path] == files, "a run has written to another's directory"
        before = runs


def test_two_runs_of_one_moment(tmp_path, monkeypatch):
    """The name was free when this run looked, and is taken when it makes its directory."""
    monkeypatch.chdir(tmp_path)
    mkdir = Path.mkdir
    others = []

    def mkdir_of_two(path, *args, **kwargs):
        if path.parent.name == "runs" and not others:
            others.append(path)
            mkdir(path)
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir_of_two)
    mine = ppo_atari.make_run_directory(ppo_atari.parse_args(GAME))
    assert mine.is_dir() and mine not in others
    assert sorted(Path("runs").iterdir()) == sorted([mine, *others])


def test_second_process_in_a_running_run(tmp_path, capfd):
    """--resume of it is refused with one line and exit code 2; --evaluate prints the score and
    writes nothing, but to where --output says."""
    before = partial(at_call, "compute_gae", 2, signal.pause)  # until a signal comes
    flags = ["--num-workers", 0, "--checkpoint-interval", 1]
    process = fork(*GAME, *flags, cwd=tmp_path, before=before)
    try:
        wait_for(lambda: any(tmp_path.glob("runs/*/checkpoint.pt")))
        run = run_directory(tmp_path)
        assert str(run) in refusal(capfd, "--resume", run, "--num-workers", 0)
        evaluate = ["--evaluate", run, "--eval-episodes", 1]
        code, out, error = here(capfd, *evaluate)
        assert code == 0 and "over 1 full games" in out
        assert error.count("\n") == 1 and str(run) in error, error
        code, out, error = here(capfd, *evaluate, "--output", tmp_path / "scores")
        assert code == 0 and "over 1 full games" in out and error == "", error
        assert (tmp_path / "scores" / "eval.json").exists()
        assert not (run / "eval.json").exists()
        assert len(list(run.glob("events*"))) == 1
        os.kill(process.pid, signal.SIGINT)
        assert finish(process, 60) == 130
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        end(process)
    (run / "eval.json.tmp").write_text("left behind by a kill")
    code, out, error = here(capfd, *evaluate)  # the lock went with its process
    assert code == 0 and error == "" and (run / "eval.json").exists()


def test_links_in_a_run_directory(run, tmp_path, capfd):
    """Are not followed: what they point to stays as it was, and nothing is made where they point to
    nothing."""
    (tmp_path / "precious").write_text("precious")
    for name in ("args.json", "agent.pt", "checkpoint.pt", "eval.json"):
        target = "precious" if name != "agent.pt" else "nothing"
        (run / f"{name}.tmp").symlink_to(tmp_path / target)
    (run / "eval.json").symlink_to(tmp_path / "precious")
    argv = ["--resume", run, "--eval-episodes", 1, "--total-timesteps", 48]
    code, _, error = here(capfd, *argv)
    assert code == 0, error
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "nothing").exists()
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 3
    assert not (run / "eval.json").is_symlink()
    assert json.loads((run / "eval.json").read_text())["step"] == 48
    assert not list(run.glob("*.tmp"))


def test_folder_that_is_a_link(run, tmp_path, capfd):
    """videos/, too, is not followed: the film is not written to where it points."""
    (tmp_path / "elsewhere").mkdir()
    (run / "videos").symlink_to(tmp_path / "elsewhere")
    try:
        code = here(capfd, "--evaluate", run, "--eval-episodes", 1, "--capture-video")[0]
    except OSError as error:
        assert "videos" in str(error)
        code = 1
    assert not any((tmp_path / "elsewhere").iterdir())
    assert code in (1, 2)


# --- Values from files pass the same door --------------------------------------------------------


def edit(path: Path, change: Callable) -> None:
    """Changes in place what a file of a run holds."""
    if path.suffix == ".json":
        saved = json.loads(path.read_text())
        change(saved)
        path.write_text(json.dumps(saved))
    else:
        saved = torch.load(path, weights_only=True)
        change(saved)
        torch.save(saved, path)


FLAGS = {
    "null": {"num_envs": None},
    "number as a name": {"env_id": 5},
    "division by zero": {"num_minibatches": 0},
    "gamma": {"gamma": 7},
    "endless skip": {"frame_skip": 0},
    "endless no-ops": {"noop_max": 10**15},
    "endless stack": {"frame_stack": 10**9},
    "function of torch": {"precision": "load"},
    "other": {"hyper": 1},
    "yes for a number": {"num_steps": True},
    "text for yes": {"anneal_lr": "no"},
    "beyond float32": {"clip_coef": 1e39},
    "list": {"seed": [1]},
    "huge image": {"frame_size": 10**6 + 4},
    "no game": {"env_id": "CartPole-v1"},
    "no-op for a name": {"exp_name": "../../precious"},
    "not a number": {"gae_lambda": float("nan")},
    "options": {"env_id": "ALE/Breakout-v5 --seed=2"},
    "empty": {"env_id": ""},
    "code of a module": {"env_id": "antigravity:Breakout-v5"},
    "more groups than games": {"num_groups": 3},
}


def end_of_a_run(capfd, run: Path, *argv) -> str:
    """The line with which a run that was tampered with is refused: it stays as it is, and no
    process is left."""
    before = content(run)
    error = in_time(refusal, capfd, *argv)
    assert "Traceback" not in error and len(error) < 1000, error
    assert content(run) == before
    assert not workers_left()
    return error


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_hostile_flags_are_refused(flags, run, capfd):
    """In args.json, which --resume reads, and in agent.pt, which --evaluate reads: as if the user
    had typed them."""
    for name, argv in (("args.json", ("--resume", run)), ("agent.pt", ("--evaluate", run))):
        edit(run / name, lambda saved: saved["flags"].update(flags))
        error = end_of_a_run(capfd, run, *argv)
        assert name in error
        assert any(flag in error.replace("-", "_") for flag in flags), error
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[" * 100_000, b'{"flags": [1]}', b'{"flags": "x"}', b'{"flags": null}', b"\xff\xfe",
        b"{}", b'{"flags": []}', b'{"flags": ""}', b'{"flags": [["seed", 1]]}', b"5",
    ],
)  # fmt: skip
def test_damaged_args_are_refused(text, run, capfd):
    (run / "args.json").write_bytes(text)
    assert "args.json" in end_of_a_run(capfd, run, "--resume", run)


def test_flags_of_an_older_script(run, capfd):
    """A flag that its file does not name has its default, two that are no more are passed over, and
    the run goes on; the result is the same."""

    def older(saved: dict) -> None:
        del saved["flags"]["gae_lambda"], saved["flags"]["target_kl"], saved["flags"]["num_groups"]
        saved["flags"] |= {"inference_batch": 4, "start_method": None}

    assert here(capfd, "--evaluate", run, "--eval-episodes", 1)[0] == 0
    score = json.loads((run / "eval.json").read_text())
    for name in ("args.json", "agent.pt", "checkpoint.pt"):
        edit(run / name, older)
    assert here(capfd, "--evaluate", run, "--eval-episodes", 1)[0] == 0
    assert json.loads((run / "eval.json").read_text()) == score
    code, _, error = here(capfd, "--resume", run, "--total-timesteps", 48)
    assert code == 0, error
    flags = json.loads((run / "args.json").read_text())["flags"]
    assert flags["gae_lambda"] == 0.95 and "inference_batch" not in flags
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 3


def put(**values) -> Callable:
    """A change of what a file holds: these values in place of what is there."""
    return lambda saved: saved.update(values)


def put_weight(**values) -> Callable:
    return lambda saved: saved["weights"].update(
        {name.replace("__", "."): value for name, value in values.items()}
    )


def without(name: str) -> Callable:
    return lambda saved: saved.pop(name)


AGENTS = {
    "weights of another network": put_weight(actor__weight=torch.zeros(5, 512)),
    "a weight less": lambda saved: saved["weights"].pop("critic.bias"),
    "a weight more": put_weight(more=torch.zeros(1)),
    "no tensor": put_weight(actor__bias=[0.0] * 4),
    "no weights": without("weights"),
    "weights in a list": put(weights=[torch.zeros(5, 512)]),
    "no flags": without("flags"),
    "flags in a list": put(flags=[1]),
    "flags of nothing": put(flags=None),
    "flags in an empty list": put(flags=[]),
}
CHECKPOINTS = {
    "no weights": without("weights"),
    "no flags": without("flags"),
    "no step": without("step"),
    "no iteration": without("iteration"),
    "no ranks": without("ranks"),
    "no optimizer": without("optimizer"),
    "no games": without("envs"),
    "a process more": put(ranks=[{}]),
    "state of another script": put(counts={"room": 1}),
    "of a run with another seed": lambda saved: saved["flags"].update(seed=2),
    "of a run with another gamma": lambda saved: saved["flags"].update(gamma=0.5),
}
ERRORS = {  # these end with a traceback
    "iteration in words": put(iteration="x"),
    "a game less": lambda saved: saved["envs"]["games"].clear(),
    "weights of another network": AGENTS["weights of another network"],
    "no moments": put(optimizer={}),
    "a generator's half": put(torch=torch.zeros(100, dtype=torch.uint8)),
}


@pytest.mark.parametrize("change", AGENTS.values(), ids=AGENTS)
def test_hostile_agent_is_refused(change, run, capfd):
    edit(run / "agent.pt", change)
    error = end_of_a_run(capfd, run, "--evaluate", run, "--eval-episodes", 1)
    assert "agent.pt" in error


@pytest.mark.parametrize("change", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_foreign_checkpoint_is_refused(change, run, capfd):
    edit(run / "checkpoint.pt", change)
    flags = ["--num-workers", 0, "--total-timesteps", 48]
    assert re.search("checkpoint|processes", end_of_a_run(capfd, run, "--resume", run, *flags))


@pytest.mark.parametrize("change", ERRORS.values(), ids=ERRORS)
def test_checkpoint_that_does_not_fit_ends_the_run(change, run, capfd):
    """With an error, whatever it is; the run stays as it is, and no worker is left."""
    edit(run / "checkpoint.pt", change)
    before = content(run)
    argv = ["--resume", str(run), "--num-workers", "1", "--total-timesteps", "48"]
    try:
        assert in_time(ppo_atari.main, argv) == 1  # a worker has ended: below its own traceback
        assert "Traceback" in capfd.readouterr().err
    except Exception as error:
        assert not isinstance(error, AssertionError), error
    assert content(run) == before
    assert not workers_left()


@pytest.mark.parametrize("name", ["agent.pt", "checkpoint.pt"])
def test_flipped_bits_are_noticed(name, run, capfd):
    """Any of them, in the middle of a weight too: a file is taken as it was written, or not at
    all."""
    rng = np.random.default_rng(1)
    path = run / name
    good = path.read_bytes()
    saved = torch.load(path, weights_only=True)
    stored = [bytes(tensor.untyped_storage()[:64].tolist()) for tensor in weights(run).values()]
    inside = [good.index(part) + 2 for part in stored if len(part) == 64]
    argv = ("--evaluate", run, "--eval-episodes", 0) if name == "agent.pt" else ("--resume", run)
    for place in [*inside[::3], *map(int, rng.integers(len(good), size=6))]:
        flipped = bytes([good[place] ^ 1 << int(rng.integers(8))])
        path.write_bytes(good[:place] + flipped + good[place + 1 :])
        code, _, error = here(capfd, *argv)
        if code == 0:  # a bit of a date, or of the padding between two parts
            assert place not in inside, place
            assert not differences(torch.load(path, weights_only=True), saved), place
        else:
            assert code == 2 and name in error and error.count("\n") == 1, error
