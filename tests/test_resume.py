"""Nothing is lost: exact resume, clean interruption, safe files."""

import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import (
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
    start,
    wait_for,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_atari

BATCH, ITERATIONS = 32 * 4, 14
FLAGS = ["--env-id", "ALE/Breakout-v5", "--num-envs", "4", "--num-steps", "32", "--update-epochs", "1",
         "--eval-episodes", "0", "--frame-size", "44"]  # fmt: skip
RUN = [*FLAGS, "--total-timesteps", str(BATCH * ITERATIONS), "--checkpoint-interval", "1"]
TINY = ["--env-id", "ALE/Breakout-v5", "--num-envs", "2", "--num-steps", "8", "--frame-size", "36",
        "--num-workers", "0", "--eval-episodes", "0", "--checkpoint-interval", "1", "--total-timesteps"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, to compare the others with."""
    cwd = tmp_path_factory.mktemp("whole")
    assert finish(start(*RUN, "--num-workers", "1", cwd=cwd)) == 0, (cwd / "log").read_text()
    return run_directory(cwd)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A finished run of two small iterations, whose files are small too."""
    with chdir(tmp_path_factory.mktemp("tiny")):
        assert ppo_atari.main([*TINY, "32"]) == 0
        return run_directory(Path.cwd())


def checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)


def assert_same_run(run: Path, whole: Path) -> None:
    """Weights, optimizer, generators and games equal bit for bit, and each loss and game once in the curves, where the
    other run has it."""
    assert same_weights(weights(run), weights(whole))
    first, second = ({name: part for name, part in checkpoint(one).items() if name != "flags"} for one in (run, whole))
    assert not differences(first, second)
    got, expected = curves(run), curves(whole)
    assert got.keys() == expected.keys()
    for tag in expected:
        np.testing.assert_array_equal(got[tag], expected[tag], tag)


def written(cwd: Path, name: str = "checkpoint.pt") -> int:
    """When the file in the run directory below cwd was last replaced; 0: not yet."""
    return max((path.stat().st_mtime_ns for path in cwd.glob(f"runs/*/{name}")), default=0)


def test_curves_of_an_uninterrupted_run(whole):
    """What the other tests compare with is itself complete: each loss once per iteration, and games that ended."""
    expected = [BATCH * (i + 1) for i in range(ITERATIONS)]
    losses = {tag: [step for step, _ in curve] for tag, curve in curves(whole).items() if tag.startswith("losses/")}
    assert len(losses) >= 7
    assert all(steps == expected for steps in losses.values()), losses
    assert len(curves(whole)["charts/episodic_return"]) >= 8
    args = ppo_atari.parse_args(RUN)
    untrained = ppo_atari.make_agent(args, ppo_atari.make_env(args))
    changes = [
        int((a != b).sum()) for a, b in zip(weights(whole).values(), untrained.state_dict().values(), strict=True)
    ]
    assert min(changes) > 0


@pytest.mark.parametrize(("workers", "moments"), [(0, 2), (2, 6)])
def test_killed_again_and_again(workers, moments, whole, tmp_path):
    """kill -9 while it starts, plays, learns or writes: the resumed run ends as if nothing had been."""
    rng = random.Random(workers)
    logged = EventAccumulator(str(whole), size_guidance={"scalars": 0}).Reload().Scalars("losses/value_loss")
    period = (logged[-1].wall_time - logged[0].wall_time) / (len(logged) - 1)
    argv, sessions = [*RUN, "--num-workers", workers], []
    for i in range(moments):
        process = fork(*argv, cwd=tmp_path)
        sessions.append(process.pid)
        if i % 3 == 1:  # while it starts, mostly
            time.sleep(rng.random() * 5 * period)
        else:  # at any time, or between agent.pt and checkpoint.pt, which is written next
            name, moment = ("checkpoint.pt", period) if i % 3 == 0 else ("agent.pt", 0.01)
            before = written(tmp_path, name)
            wait_for(lambda n=name, t=before, p=process: written(tmp_path, n) > t or not p.is_alive(), pause=0.001)
            time.sleep(rng.random() * moment)
        process.kill()
        assert finish(process) == -signal.SIGKILL, (tmp_path / "log").read_text()
        run = run_directory(tmp_path)
        assert 0 < checkpoint(run)["iteration"] < ITERATIONS
        argv = ["--resume", run]
    assert finish(fork(*argv, cwd=tmp_path)) == 0, (tmp_path / "log").read_text()
    assert_same_run(run, whole)
    wait_for(lambda: not any(living(session) for session in sessions))  # no worker outlives its learner for long


@pytest.mark.parametrize(("number", "code", "workers"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 0)])
def test_signal_saves_and_says_how_to_go_on(number, code, workers, whole, tmp_path):
    """Ctrl-C, which all processes get, and SIGTERM: saved, told how to resume, nobody left, and resumable exactly."""
    process = start(*RUN, "--num-workers", workers, cwd=tmp_path)
    wait_for(lambda: written(tmp_path))
    os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
    assert finish(process) == code
    assert not living(process.pid)
    run, log = run_directory(tmp_path), (tmp_path / "log").read_text()
    assert re.search(rf"--resume \S*{re.escape(run.name)}", log), log
    assert "Traceback" not in log
    assert 0 < checkpoint(run)["iteration"] < ITERATIONS
    assert finish(fork("--resume", run, "--num-workers", 2 - workers, cwd=tmp_path)) == 0
    assert_same_run(run, whole)


def test_stopped_before_its_first_iteration(tmp_path, monkeypatch, capfd):
    """Resumed, killed and resumed once more: each iteration stands in the curves once."""
    monkeypatch.chdir(tmp_path)
    agreed, anneal = ppo_atari.StopRequest.agreed, ppo_atari.anneal

    def at_once(stop):
        stop.signum = signal.SIGINT
        return agreed(stop)

    def killed(knobs, args, iteration):
        if iteration == 3:
            raise KeyboardInterrupt
        anneal(knobs, args, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(ppo_atari.StopRequest, "agreed", at_once)
        assert here(capfd, *TINY, 64, "--checkpoint-interval", 0)[0] == 130
    run = run_directory(tmp_path)
    assert checkpoint(run)["step"] == 0
    with monkeypatch.context() as patch:
        patch.setattr(ppo_atari, "anneal", killed)
        assert here(capfd, "--resume", run)[0] == 130
    assert here(capfd, "--resume", run)[0] == 0
    assert [step for step, _ in curves(run)["losses/entropy"]] == [16, 32, 48, 64]


def test_second_ctrl_c_stops_at_once(tmp_path):
    """In the middle of an iteration that would take many minutes."""
    steps = 100_000
    process = start("--num-envs", 2, "--num-steps", steps, "--total-timesteps", 2 * steps, "--frame-size", 36,
                    "--frame-stack", 1, "--num-workers", 2, cwd=tmp_path)  # fmt: skip
    wait_for(lambda: "run directory" in (tmp_path / "log").read_text())
    time.sleep(0.5)
    log = tmp_path / "log"
    before = log.read_text()
    os.killpg(process.pid, signal.SIGINT)
    wait_for(lambda: len(log.read_text()) > len(before))
    time.sleep(1)
    assert process.poll() is None, "the first Ctrl-C must let the iteration finish"
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process, 60) == 130, log.read_text()
    assert "at once;" in log.read_text() and "Traceback" not in log.read_text()
    wait_for(lambda: not living(process.pid))


def test_second_ctrl_c_where_an_exception_is_swallowed(tmp_path):
    """Python prints what is raised in a __del__, a weak reference's callback or around a fork, and goes on."""
    program = f"""if True:
        import os, runpy, signal, sys, torch

        class Interrupting:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

        def draw(*args, **kwargs):
            Interrupting()
            return randperm(*args, **kwargs)

        randperm, torch.randperm = torch.randperm, draw
        sys.argv[0] = {str(ppo_atari.__file__)!r}
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    process = start(*TINY, 32, cwd=tmp_path, program=("-c", program))
    log = tmp_path / "log"
    assert finish(process, 60) == 130, log.read_text()
    assert log.read_text().rstrip().endswith("stopped at once; what was saved before is kept"), log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    "change",
    [["--gamma", "0.9"], ["--env-id", "ALE/Pong-v5"], ["--num-envs", "4"], ["--seed", "7"], ["--no-clip-reward"],
     ["--learning-rate", "0.1"], ["--total-timesteps", "16"]],
)  # fmt: skip
def test_changed_flag_is_refused_by_name(change, tiny, capfd):
    """Each flag that would make it another run; --total-timesteps, if it shrinks."""
    before = (tiny / "checkpoint.pt").read_bytes()
    assert change[0].replace("--no-", "--") in refusal(capfd, "--resume", tiny, *change)
    assert (tiny / "checkpoint.pt").read_bytes() == before


def test_total_timesteps_may_grow(tiny, tmp_path, capfd):
    """The learning rate then falls to 0 over the new length, which the user is told; the same value is no change."""
    run = shutil.copytree(tiny, tmp_path / "run")
    code, out, error = here(capfd, "--resume", run, "--total-timesteps", 64, "--gamma", 0.99)
    assert code == 0, error
    steps, rates = zip(*curves(run)["charts/learning_rate"], strict=True)
    assert steps == (16, 32, 48, 64)
    assert rates == pytest.approx([2.5e-4, 1.25e-4, 1.25e-4, 0.625e-4])
    assert checkpoint(run)["iteration"] == 4
    assert re.search("anneal|learning rate", out + error), "the user is not told that the annealing has changed"


@pytest.mark.parametrize("program", ["--resume", "--evaluate"])
@pytest.mark.parametrize("form", ["pickle", "torch file"])
def test_malicious_file_does_no_harm(form, program, tiny, tmp_path, capfd):
    """A pickle that creates a file, alone or in a torch file with the right keys: refused, and no such file."""

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "harm"), "w")

    run = shutil.copytree(tiny, tmp_path / "run")
    path = run / ("checkpoint.pt" if program == "--resume" else "agent.pt")
    content = torch.load(path, weights_only=True) | {"weights": Evil(), "flags": Evil()}
    torch.save(content, path) if form == "torch file" else path.write_bytes(pickle.dumps(content["weights"]))
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
    size, rng = path.stat().st_size, random.Random(1)
    lengths = {size - 1, size - 100, 1000, 100, 4, 1, 0} | {rng.randrange(size) for _ in range(25)}
    for length in sorted(lengths, reverse=True):
        os.truncate(path, length)
        assert path.name in refusal(capfd, program, run)


@pytest.mark.parametrize("what", ["missing", "other content", "another run's"])
def test_foreign_checkpoint_is_refused(what, tiny, whole, tmp_path, capfd):
    """No checkpoint, a torch file of something else, and the checkpoint of a run with another network."""
    run = shutil.copytree(tiny, tmp_path / "run")
    path = run / "checkpoint.pt"
    path.unlink()
    if what == "other content":
        torch.save([torch.zeros(3)], path)
    elif what == "another run's":
        shutil.copy(whole / "checkpoint.pt", path)
    assert path.name in refusal(capfd, "--resume", run)


def resume_after_failed_writes(process, run: Path, whole: Path, mend) -> None:
    """The process trains to its end, says once of each kind of file that it cannot be written and exits with 1; it
    leaves nothing half written, and the old checkpoint is whole."""
    assert finish(process) == 1
    log = (run.parent.parent / "log").read_text()
    failed = re.findall(r"(?m)^ppo_atari.py: (.+) cannot be written: ", log)
    assert "checkpoint.pt" in failed and len(set(failed)) == len(failed) and "Traceback" not in log, log
    assert not list(run.rglob("*.tmp"))
    assert 0 < checkpoint(run)["iteration"] < ITERATIONS
    mend()
    assert finish(fork("--resume", run, cwd=run.parent.parent)) == 0, log
    assert_same_run(run, whole)


def test_write_that_fails_half_way(whole, tmp_path):
    """From some moment on, the system lets no file grow beyond 1 MB: a checkpoint breaks off in the middle."""
    process = fork(*RUN, "--num-workers", 0, cwd=tmp_path)
    wait_for(lambda: written(tmp_path))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    resume_after_failed_writes(process, run_directory(tmp_path), whole, lambda: None)


def test_full_disk(whole, tmp_path):
    """A disk with room for one checkpoint and a half: afterwards not even the curves can be written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", disk], check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        process = fork(*RUN, "--num-workers", 2, cwd=disk)
        wait_for(lambda: written(disk))
        larger = ["mount", "-o", "remount,size=50m", disk]
        resume_after_failed_writes(process, run_directory(disk), whole, lambda: subprocess.run(larger, check=True))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("what", ["a file", "a link to nowhere", "a long name"])
def test_unwritable_run_directory(what, tmp_path):
    """One line, no training, and no worker left."""
    if what == "a file":
        (tmp_path / "runs").write_text("not a directory")
    elif what == "a link to nowhere":  # as to a disk that is not mounted
        (tmp_path / "runs").symlink_to(tmp_path / "nowhere" / "runs")
    name = "\N{SNOWMAN}" * 100 if what == "a long name" else "short"  # 300 bytes; file systems take 255
    process = fork(*RUN, "--num-workers", 2, "--exp-name", name, cwd=tmp_path)
    assert finish(process, 60) == 2
    log = (tmp_path / "log").read_text()
    assert log.count("\n") == 1 and "runs" in log, log
    assert not living(process.pid)


def test_flags_that_cannot_be_written(tiny, tmp_path, capfd):
    """A run whose args.json is not on the disk could never be resumed: it does not begin."""
    run = shutil.copytree(tiny, tmp_path / "run")
    (run / "args.json.tmp").mkdir()
    assert "cannot write" in refusal(capfd, "--resume", run, "--total-timesteps", 64)


@pytest.mark.parametrize("iteration", [1, 3])
def test_loss_that_is_not_finite(iteration, tmp_path, capfd, monkeypatch):
    """Stops the run with the number of the iteration; says what is kept: the last good checkpoint, if there is one,
    which can be resumed."""
    monkeypatch.chdir(tmp_path)
    good_loss, calls = ppo_atari.ppo_loss, []

    def bad_loss(*args, **kwargs):
        calls.append(1)
        loss, stats = good_loss(*args, **kwargs)
        return (loss * float("nan") if len(calls) > (iteration - 1) * 16 else loss), stats

    monkeypatch.setattr(ppo_atari, "ppo_loss", bad_loss)
    code, _, error = here(capfd, *TINY, 64)
    assert code == 1
    assert re.search(rf"\biteration {iteration}\b", error) and error.count("\n") == 1, error
    run = run_directory(tmp_path)
    monkeypatch.undo()
    assert ("checkpoint of step 32" in error) == (iteration == 3) and ("no checkpoint" in error) == (iteration == 1)
    assert (run / "checkpoint.pt").exists() == (iteration == 3)
    if iteration == 3:
        assert checkpoint(run)["iteration"] == 2
        assert all(tensor.isfinite().all() for tensor in weights(run).values())
        assert here(capfd, "--resume", run)[0] == 0


@pytest.mark.parametrize(
    ("mine", "says"),
    [("{1, 2}", "a set"), ("torch.zeros(1).expand(3)", "`state`"), ("torch.zeros(2).to_sparse()", "`state`")],
    ids=["of an unknown kind", "that could not be written to", "that could not be read back"],
)
def test_state_that_no_checkpoint_could_hold(mine, says, tmp_path, monkeypatch, capfd):
    """What a user adds to `state` is refused when the run starts, not when its first checkpoint is due, or read."""
    monkeypatch.chdir(tmp_path)
    module = with_state(tmp_path, mine)
    assert module.main([*TINY, "32"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and says in error
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))


def with_state(folder, mine):
    """The script with one more entry in `state`."""
    place = '"recent": deque(maxlen=100),'
    source = Path(ppo_atari.__file__).read_text()
    assert source.count(place) == 1
    copy = folder / "mine.py"
    copy.write_text(source.replace(place, place + f' "mine": {mine},'))
    return load(copy, "mine")


def test_a_parameter_of_ones_own_in_the_state(tmp_path, monkeypatch, capfd):
    """A multiplier, say, with an optimizer of its own: it must not be found unreadable when it is needed."""
    monkeypatch.chdir(tmp_path)
    module = with_state(tmp_path, "nn.Parameter(torch.full((1,), 0.5))")
    assert module.main([*TINY, "32"]) == 0
    (run,) = tmp_path.glob("runs/*")
    assert module.main(["--resume", str(run), "--total-timesteps", "64"]) == 0, capfd.readouterr().err
    assert checkpoint(run)["mine"].tolist() == [0.5]
