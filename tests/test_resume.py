"""Nothing is lost: exact resume, clean interruption, safe files."""

import io
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir, closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import (
    at_call,
    curves,
    differences,
    finish,
    fork,
    here,
    living,
    load,
    refusal,
    run_directory,
    same_weights,
    wait_for,
    weights,
)

import ppo_atari

BATCH = 2 * 32
ITERATIONS = 8
# With a frame skip of 10, some games end in this short time.
FLAGS = ["--env-id", "ALE/Breakout-v5", "--num-envs", "2", "--num-steps", "32", "--frame-skip",
         "10", "--frame-size", "36", "--update-epochs", "1", "--eval-episodes", "0"]  # fmt: skip
RUN = [*FLAGS, "--total-timesteps", str(BATCH * ITERATIONS), "--checkpoint-interval", "1"]
TINY = ["--env-id", "ALE/Breakout-v5", "--num-envs", "1", "--num-steps", "16", "--frame-size", "36",
        "--num-workers", "0", "--eval-episodes", "0", "--checkpoint-interval", "1",
        "--total-timesteps"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, to compare the others with."""
    cwd = tmp_path_factory.mktemp("whole")
    assert finish(fork(*RUN, "--num-workers", "1", cwd=cwd)) == 0, (cwd / "log").read_text()
    return run_directory(cwd)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A finished run of two small iterations, whose files are small too."""
    with chdir(tmp_path_factory.mktemp("tiny")):
        assert ppo_atari.main([*TINY, "32", "--num-envs", "2", "--num-steps", "8"]) == 0
        return run_directory(Path.cwd())


def checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)


def assert_same_run(run: Path, whole: Path) -> None:
    """Weights, optimizer, generators and games equal bit for bit, and each loss and game once in
    the curves, where the other run has it."""
    assert same_weights(weights(run), weights(whole))
    assert not differences(checkpoint(run) | {"flags": None}, checkpoint(whole) | {"flags": None})
    got = curves(run)
    expected = curves(whole)
    assert got.keys() == expected.keys()
    for tag in expected:
        np.testing.assert_array_equal(got[tag], expected[tag], tag)


def saved_iteration(cwd: Path) -> int:
    """How many iterations the checkpoint in the run directory below cwd has; 0: there is none."""
    runs = list(cwd.glob("runs/*/checkpoint.pt"))
    return checkpoint(runs[0].parent)["iteration"] if runs else 0


def test_curves_of_an_uninterrupted_run(whole):
    """What the other tests compare with is itself complete: each loss once per iteration, and games
    that ended."""
    expected = [BATCH * (i + 1) for i in range(ITERATIONS)]
    losses = {}
    for tag, curve in curves(whole).items():
        if tag.startswith("losses/"):
            losses[tag] = [step for step, _ in curve]
    assert len(losses) >= 7
    assert all(steps == expected for steps in losses.values()), losses
    assert len(curves(whole)["charts/episodic_return"]) >= 3
    args = ppo_atari.parse_args(RUN)
    untrained = ppo_atari.make_agent(args, ppo_atari.make_env(args)).state_dict()
    for name, tensor in weights(whole).items():
        assert (tensor != untrained[name]).any(), name


def kill() -> None:
    """As kill -9 does, of the learner alone."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_halfway(number: int) -> None:
    """When half of the number-th file in torch's format is written."""
    save = torch.save
    calls = []

    def save_half(content, file):
        calls.append(1)
        if len(calls) < number:
            save(content, file)
            return
        buffer = io.BytesIO()
        save(content, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        kill()

    torch.save = save_half


def kill_after(calls: int) -> None:
    """After as many calls of functions, of Python's or C's, from the first iteration's losses on:
    at any time."""
    left = [calls]

    def count(frame, event, argument):
        left[0] -= 1
        if left[0] == 0:
            kill()

    at_call("mean_stats", 1, partial(sys.setprofile, count))


FIRST = partial(
    at_call, "compute_gae", 3, kill
)  # of a new run, with a checkpoint of two iterations
MOMENTS = {
    "while it starts": partial(at_call, "RunDirectory.begin_progress", 1, kill),
    "in a rollout": partial(at_call, "ParallelEnvs.step", 2 * 32 + 45, kill),
    "in an update": partial(at_call, "ppo_loss", 7, kill),
    "with a loss in the curves": partial(at_call, "RunDirectory.show_progress", 2, kill),
    "between agent.pt and checkpoint.pt": partial(at_call, "os.replace", 3, kill),
    "with half a checkpoint written": partial(kill_halfway, 2),
    "at any time": partial(kill_after, 10_000),
}


@pytest.mark.parametrize(
    ("workers", "moments"),
    [
        (0, ["in an update", "with half a checkpoint written"]),
        (1, ["between agent.pt and checkpoint.pt", "with a loss in the curves"]),
        (2, ["while it starts", "in a rollout", "at any time"]),
    ],
)
def test_killed_again_and_again(workers, moments, whole, tmp_path):
    """kill -9 while it starts, plays, learns or writes: the resumed run ends as if nothing had
    been."""
    argv = [*RUN, "--num-workers", workers]
    sessions = []
    for before in [FIRST] + [MOMENTS[moment] for moment in moments]:
        process = fork(*argv, cwd=tmp_path, before=before)
        sessions.append(process.pid)
        assert finish(process) == -signal.SIGKILL, (tmp_path / "log").read_text()
        run = run_directory(tmp_path)
        assert 2 <= checkpoint(run)["iteration"] < ITERATIONS
        argv = ["--resume", run]
    assert finish(fork(*argv, cwd=tmp_path)) == 0, (tmp_path / "log").read_text()
    assert_same_run(run, whole)
    assert not list(run.rglob("*.tmp"))
    # No worker outlives its learner for long.
    wait_for(lambda: not any(living(session) for session in sessions))


@pytest.mark.parametrize(
    ("number", "code", "workers"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 0)]
)
def test_signal_saves_and_says_how_to_go_on(number, code, workers, whole, tmp_path):
    """Ctrl-C and SIGTERM, which all processes get: saved, told how to resume, nobody left, and
    resumable exactly, with another number of workers."""
    before = partial(at_call, "compute_gae", 3, partial(os.killpg, 0, number))
    process = fork(*RUN, "--num-workers", workers, cwd=tmp_path, before=before)
    assert finish(process) == code
    assert not living(process.pid)
    run = run_directory(tmp_path)
    log = (tmp_path / "log").read_text()
    assert re.search(rf"--resume \S*{re.escape(run.name)}", log), log
    assert "Traceback" not in log
    assert checkpoint(run)["iteration"] == 3, "it ends after the iteration that it was in"
    resumed = fork("--resume", run, "--num-workers", 2 - workers, cwd=tmp_path)
    assert finish(resumed) == 0, (tmp_path / "log").read_text()
    assert_same_run(run, whole)


def test_games_that_the_learner_plays_are_saved_too():
    """Beside a single worker, it plays a quarter of a group: all games go back to where they were,
    and on as they did."""
    args = ppo_atari.parse_args([*FLAGS, "--num-envs", "4", "--num-groups", "1"])
    args.workers = 1

    def play(envs: ppo_atari.ParallelEnvs) -> torch.Tensor:
        shown = []
        for t, group in envs.turns(30):
            shown.append(envs.obs[group].clone())
            if t < 30:
                envs.step(group, torch.full((4,), t % 4))
        return torch.stack(shown)

    space = ppo_atari.make_env(args).observation_space
    with closing(ppo_atari.ParallelEnvs(args, space)) as envs:
        assert list(envs.own_games.envs) == [0] and len(envs.workers) == 1
        play(envs)
        state = ppo_atari.pack(envs)
        first = play(envs)
        other = play(envs)
        ppo_atari.unpack(state, envs)
        again = play(envs)
    for game in range(4):
        assert torch.equal(first[:, game], again[:, game])
        assert not torch.equal(first[:, game], other[:, game])


def test_stopped_before_its_first_iteration(tmp_path, monkeypatch, capfd):
    """Resumed, killed and resumed once more: each iteration stands in the curves once."""
    monkeypatch.chdir(tmp_path)
    agreed = ppo_atari.StopRequest.agreed
    anneal = ppo_atari.anneal

    def at_once(stop):
        stop.signum = signal.SIGINT
        return agreed(stop)

    def killed(schedule, args, iteration):
        if iteration == 3:
            raise KeyboardInterrupt
        anneal(schedule, args, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(ppo_atari.StopRequest, "agreed", at_once)
        assert here(capfd, *TINY, 64, "--checkpoint-interval", 0)[0] == 130
    run = run_directory(tmp_path)
    assert checkpoint(run)["step"] == 0
    with monkeypatch.context() as patch:
        patch.setattr(ppo_atari, "anneal", killed)
        assert here(capfd, "--resume", run)[0] == 130
    assert checkpoint(run)["step"] == 0
    assert here(capfd, "--resume", run)[0] == 0
    assert [step for step, _ in curves(run)["losses/entropy"]] == [16, 32, 48, 64]


def stand_still_in_the_third_rollout() -> None:
    """The workers, at its first step, for longer than any test waits."""
    begin_rollout = ppo_atari.Games.begin_rollout
    step = ppo_atari.Games.step
    rollouts = []

    def watched_begin(games):
        rollouts.append(1)
        begin_rollout(games)

    def watched_step(games, indices):
        if len(rollouts) == 3:
            time.sleep(1000)
        return step(games, indices)

    ppo_atari.Games.begin_rollout = watched_begin
    ppo_atari.Games.step = watched_step


def test_second_ctrl_c_stops_at_once(whole, tmp_path):
    """In the middle of an iteration that would not end: no worker is left, the last checkpoint is
    kept, and what follows from it is what it would have been."""
    before = stand_still_in_the_third_rollout
    process = fork(*RUN, "--num-workers", 2, cwd=tmp_path, before=before)
    log = tmp_path / "log"
    wait_for(lambda: saved_iteration(tmp_path) == 2)
    os.killpg(process.pid, signal.SIGINT)
    wait_for(lambda: "Ctrl-C again" in log.read_text())
    time.sleep(0.5)
    assert process.is_alive(), "the first Ctrl-C must let the iteration finish"
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process, 60) == 130, log.read_text()
    assert not living(process.pid)
    assert "at once;" in log.read_text() and "Traceback" not in log.read_text()
    assert saved_iteration(tmp_path) == 2
    assert finish(fork("--resume", run_directory(tmp_path), cwd=tmp_path)) == 0
    assert_same_run(run_directory(tmp_path), whole)


@pytest.mark.parametrize(
    "change",
    [["--gamma", "0.9"], ["--env-id", "ALE/Pong-v5"], ["--num-envs", "4"], ["--seed", "7"],
     ["--no-clip-reward"], ["--learning-rate", "0.1"], ["--num-groups", "1"],
     ["--total-timesteps", "16"]],
)  # fmt: skip
def test_changed_flag_is_refused_by_name(change, tiny, capfd):
    """Each flag that would make it another run; --total-timesteps, if it shrinks."""
    before = (tiny / "checkpoint.pt").read_bytes()
    assert change[0].replace("--no-", "--") in refusal(capfd, "--resume", tiny, *change)
    assert (tiny / "checkpoint.pt").read_bytes() == before


def test_total_timesteps_may_grow(tiny, tmp_path, capfd):
    """The learning rate then falls to 0 over the new length; a flag's same value is no change."""
    run = shutil.copytree(tiny, tmp_path / "run")
    code, _, error = here(capfd, "--resume", run, "--total-timesteps", 64, "--gamma", 0.99)
    assert code == 0, error
    steps, rates = zip(*curves(run)["charts/learning_rate"], strict=True)
    assert steps == (16, 32, 48, 64)
    assert rates == pytest.approx([2.5e-4, 1.25e-4, 1.25e-4, 0.625e-4])
    assert checkpoint(run)["iteration"] == 4


@pytest.mark.parametrize("program", ["--resume", "--evaluate"])
@pytest.mark.parametrize("form", ["pickle", "torch file"])
def test_malicious_file_does_no_harm(form, program, tiny, tmp_path, capfd):
    """A pickle that creates a file, alone or in a torch file with the right keys: refused, and no
    such file."""

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "harm"), "w")

    run = shutil.copytree(tiny, tmp_path / "run")
    path = run / ("checkpoint.pt" if program == "--resume" else "agent.pt")
    content = torch.load(path, weights_only=True) | {"weights": Evil(), "flags": Evil()}
    if form == "torch file":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content["weights"]))
    assert path.name in refusal(capfd, program, run)
    assert not (tmp_path / "harm").exists()
    if form == "torch file":
        torch.load(path, weights_only=False)
        assert (tmp_path / "harm").exists(), "the file was harmless: this test has shown nothing"


@pytest.mark.parametrize("program", ["--resume", "--evaluate"])
def test_truncated_file_is_refused(program, tiny, tmp_path, capfd):
    """Cut at any length, from one byte too short to nothing at all."""
    run = shutil.copytree(tiny, tmp_path / "run")
    path = run / ("checkpoint.pt" if program == "--resume" else "agent.pt")
    size = path.stat().st_size
    rng = random.Random(1)
    lengths = {size - 1, size - 100, 1000, 100, 4, 1, 0} | {rng.randrange(size) for _ in range(25)}
    for length in sorted(lengths, reverse=True):
        os.truncate(path, length)
        assert path.name in refusal(capfd, program, run)


@pytest.mark.parametrize("what", ["missing", "other content", "another run's"])
def test_foreign_checkpoint_is_refused(what, tiny, whole, tmp_path, capfd):
    """No checkpoint, a torch file of something else, and the checkpoint of a run with another
    network."""
    run = shutil.copytree(tiny, tmp_path / "run")
    path = run / "checkpoint.pt"
    path.unlink()
    if what == "other content":
        torch.save([torch.zeros(3)], path)
    elif what == "another run's":
        shutil.copy(whole / "checkpoint.pt", path)
    assert path.name in refusal(capfd, "--resume", run)


def resume_after_a_failed_write(process, cwd: Path, whole: Path, mend: Callable) -> None:
    """The process ends with the system's error and exit code 1, nobody is left, and nothing half
    written has taken the place of a whole file."""
    assert finish(process) == 1
    log = (cwd / "log").read_text()
    assert "OSError" in log, log
    assert not re.search(r"--resume|\bcomplete\b", log), log
    assert not living(process.pid)
    run = run_directory(cwd)
    assert 0 < checkpoint(run)["iteration"] < ITERATIONS
    assert weights(run).keys() == weights(whole).keys()
    mend()
    assert finish(fork("--resume", run, cwd=cwd)) == 0, log
    assert_same_run(run, whole)
    assert not list(run.rglob("*.tmp"))


def test_write_that_fails_half_way(whole, tmp_path):
    """From some moment on, the system lets no file grow beyond 1 MB: a checkpoint breaks off in the
    middle."""
    limits = (1 << 20, resource.RLIM_INFINITY)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
    before = partial(at_call, "compute_gae", 3, limit)
    process = fork(*RUN, "--num-workers", 0, cwd=tmp_path, before=before)

    def mend() -> None:
        """The limit went with the process."""

    resume_after_a_failed_write(process, tmp_path, whole, mend)


def test_full_disk(whole, tmp_path):
    """A disk with room for one checkpoint and a half: afterwards not even the curves can be
    written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        process = fork(*RUN, "--num-workers", 2, cwd=disk)
        larger = ["mount", "-o", "remount,size=50m", disk]
        mend = partial(subprocess.run, larger, check=True)
        resume_after_a_failed_write(process, disk, whole, mend)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("what", ["a file", "a link to nowhere", "a long name"])
def test_unwritable_run_directory(what, tmp_path, monkeypatch, capfd):
    """One line, no training, and no worker left."""
    monkeypatch.chdir(tmp_path)
    if what == "a file":
        (tmp_path / "runs").write_text("not a directory")
    elif what == "a link to nowhere":  # as to a disk that is not mounted
        (tmp_path / "runs").symlink_to(tmp_path / "nowhere" / "runs")
    name = "short"
    if what == "a long name":
        name = "\N{SNOWMAN}" * 100  # 300 bytes; file systems take 255
    flags = [*TINY, 32, "--num-workers", 1, "--exp-name", name]
    assert "runs" in refusal(capfd, *flags)
    assert not multiprocessing.active_children()


def test_flags_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    """A run whose args.json is not on the disk could never be resumed: it does not begin."""
    run = shutil.copytree(tiny, tmp_path / "run")
    (run / "args.json.tmp").mkdir()
    begun = []
    monkeypatch.setattr(ppo_atari, "anneal", lambda *args: begun.append(args))
    with pytest.raises(OSError, match=r"args\.json"):
        ppo_atari.main(["--resume", str(run), "--total-timesteps", "64"])
    assert not begun
    for name in ("args.json", "agent.pt", "checkpoint.pt"):
        assert (run / name).read_bytes() == (tiny / name).read_bytes()


@pytest.mark.parametrize("iteration", [1, 3])
def test_loss_that_is_not_finite(iteration, tmp_path, capfd, monkeypatch):
    """Stops the run with the number of the iteration. The last good checkpoint, if there is one, is
    kept and can be resumed."""
    monkeypatch.chdir(tmp_path)
    good_loss = ppo_atari.ppo_loss
    calls = []

    def bad_loss(*args, **kwargs):
        calls.append(1)
        loss, stats = good_loss(*args, **kwargs)
        return (loss * float("nan") if len(calls) > (iteration - 1) * 16 else loss), stats

    monkeypatch.setattr(ppo_atari, "ppo_loss", bad_loss)
    with pytest.raises(FloatingPointError, match=rf"\biteration {iteration}\b"):
        ppo_atari.main([*TINY, "64"])
    run = run_directory(tmp_path)
    monkeypatch.undo()
    assert (run / "checkpoint.pt").exists() == (run / "agent.pt").exists() == (iteration == 3)
    if iteration == 3:
        assert checkpoint(run)["iteration"] == 2
        assert all(tensor.isfinite().all() for tensor in weights(run).values())
        assert here(capfd, "--resume", run)[0] == 0


def with_state(folder, mine):
    """The script with one more entry in `state`."""
    place = '"recent_returns": deque(maxlen=100),'
    source = Path(ppo_atari.__file__).read_text()
    assert source.count(place) == 1
    copy = folder / "mine.py"
    copy.write_text(source.replace(place, place + f' "mine": {mine},'))
    return load(copy, "mine")


def test_state_that_no_checkpoint_could_hold(tmp_path, monkeypatch):
    """What a user adds to `state` is refused when the run starts, not when its first checkpoint is
    due."""
    monkeypatch.chdir(tmp_path)
    module = with_state(tmp_path, "[{'deep': print}]")
    with pytest.raises(TypeError, match="checkpoint cannot hold"):
        module.main([*TINY, "32"])
    assert not (tmp_path / "runs").exists()


def test_a_parameter_of_ones_own_in_the_state(tmp_path, monkeypatch, capfd):
    """A multiplier, say, with an optimizer of its own: it goes on as the checkpoint has it."""
    monkeypatch.chdir(tmp_path)
    module = with_state(tmp_path, "nn.Parameter(torch.full((1,), 0.5))")
    assert module.main([*TINY, "32"]) == 0
    run = run_directory(tmp_path)
    saved = checkpoint(run)
    assert saved["mine"].tolist() == [0.5]
    saved["mine"].fill_(0.25)  # as training would have left it
    torch.save(saved, run / "checkpoint.pt")
    code = module.main(["--resume", str(run), "--total-timesteps", "64"])
    assert code == 0, capfd.readouterr().err
    assert checkpoint(run)["mine"].tolist() == [0.25]


def test_checkpoint_of_another_state(tiny, tmp_path, monkeypatch, capfd):
    """Of the script before something was added to `state`, and after it was taken away again: one
    line that names it, and the run stays as it was."""
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(tiny, tmp_path / "run")
    module = with_state(tmp_path, "0")
    more = ["--total-timesteps", "64"]
    assert module.main(["--resume", str(run), *more]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "mine" in error, error
    saved = checkpoint(run) | {"mine": 0}
    torch.save(saved, run / "checkpoint.pt")
    assert "mine" in refusal(capfd, "--resume", run, *more)
    assert not differences(checkpoint(run), saved)
