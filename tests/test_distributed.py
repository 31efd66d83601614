"""Two processes under torchrun train one agent, and do what one process would do."""

import copy
import json
import os
import re
import shutil
import signal
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch import (
    SCRIPT,
    curves,
    differences,
    finish,
    finish_two_ranks,
    living,
    refusal,
    run_directory,
    same_weights,
    start,
    two_ranks,
    wait_for,
    weights,
)

import ppo_atari

STEPS, ENVS, ITERATIONS = 300, 4, 4
FLAGS = ["--env-id", "ALE/Breakout-v5", "--num-envs", ENVS, "--num-steps", STEPS, "--frame-size", 36,
         "--total-timesteps", STEPS * ENVS * ITERATIONS, "--num-minibatches", 1, "--update-epochs", 2,
         "--num-workers", 0, "--eval-episodes", 0, "--inference-batch", 2, "--precision", "float32",
         "--checkpoint-interval", 1]  # fmt: skip

DRIVER = """
import hashlib, inspect, json, os, pathlib, sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv.pop(1))
import ppo_atari

rank, after, seen, data, timeouts, during = os.environ.get("RANK", "0"), [], [], [], [], []
step, ppo_loss, fill, init = torch.optim.Adam.step, ppo_atari.ppo_loss, ppo_atari.Learner.fill, dist.init_process_group

def threads():
    return [(path / "comm").read_text().strip() for path in pathlib.Path("/proc/self/task").iterdir()]

def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)).hexdigest()

def watched_step(optimizer, *args, **kwargs):
    result = step(optimizer, *args, **kwargs)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    after.append(digest(parameters))
    if len(after) == 2:  # the first iteration has two epochs of one minibatch
        torch.save([p.detach().clone() for p in parameters], f"first{rank}.pt")
    return result

def watched_loss(*args, **kwargs):
    seen.append(digest([inspect.signature(ppo_loss).bind(*args, **kwargs).arguments["old"]["log_prob"]]))
    return ppo_loss(*args, **kwargs)

def watched_fill(learner, storage, **computed):
    data.append((storage["value"][:-1].clone(), computed["return_"].clone()))
    during[:] = threads()
    return fill(learner, storage, **computed)

def watched_init(*args, **kwargs):
    timeouts.append(kwargs["timeout"].total_seconds())
    return init(*args, **kwargs)

torch.optim.Adam.step, ppo_atari.ppo_loss, ppo_atari.Learner.fill = watched_step, watched_loss, watched_fill
dist.init_process_group = watched_init
code = ppo_atari.main(sys.argv[1:])
torch.save(data, f"data{rank}.pt")
with open(f"rank{rank}.json", "w") as file:
    about = {"during": during, "threads": threads(), "group": dist.is_initialized(), "timeouts": timeouts}
    json.dump({"after": after, "seen": seen} | about, file)
sys.exit(code)
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def watched(cwd: Path, *launcher: str) -> Path:
    """A whole run whose weights and data are written down in each process; returns the run directory."""
    (cwd / "driver.py").write_text(DRIVER)
    program = (*launcher, cwd / "driver.py", SCRIPT.parent)
    assert finish(start(*FLAGS, cwd=cwd, program=program)) == 0, (cwd / "log").read_text()
    return run_directory(cwd)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run of two processes that nothing interrupts."""
    return watched(tmp_path_factory.mktemp("pair"), *TORCHRUN)


def assert_same_run(run: Path, whole: Path) -> None:
    """Equal bit for bit: weights, optimizer, the games and generators of both ranks, and each point of the curves."""
    first, second = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (run, whole))
    assert not differences(first | {"flags": None}, second | {"flags": None})
    assert same_weights(weights(run), weights(whole))
    assert curves(run) == curves(whole)


def ranks(session: int) -> dict[int, int]:
    """The process ids of the ranks that torchrun has started below the process `session`, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            environment = (path.parent / "environ").read_bytes()
        except OSError:
            continue
        if parent == session and (rank := re.search(rb"(?:^|\0)RANK=(\d+)\0", environment)):
            found[int(rank[1])] = int(path.parent.name)
    return found


def test_ranks_agree_after_every_step(pair):
    """Two processes see different games, and their weights are bit-identical after each optimizer step."""
    first, second = (json.loads((pair.parent.parent / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["after"] == second["after"]
    assert len(set(first["after"])) == 2 * ITERATIONS
    assert not set(first["seen"]) & set(second["seen"])


def test_rank_0_alone_writes_and_speaks(pair):
    """One run directory, announced once, and each loss once per iteration in the curves."""
    assert (pair.parent.parent / "log").read_text().count("run directory") == 1
    assert len(list(pair.glob("events.out.tfevents.*"))) == 1
    steps = [STEPS * ENVS * (i + 1) for i in range(ITERATIONS)]
    assert [step for step, _ in curves(pair)["losses/value_loss"]] == steps


def test_no_thread_of_the_group_outlives_it(pair):
    """gloo's threads, alive at the interpreter's end, abort the process now and then. And while rank 0 evaluates, the
    others wait for longer than the half hour, or ten minutes, that torch would allow them."""
    for rank in (0, 1):
        about = json.loads((pair.parent.parent / f"rank{rank}.json").read_text())
        assert not about["group"] and not [name for name in about["threads"] if "gloo" in name], about["threads"]
        assert [name for name in about["during"] if "gloo" in name], "the group has threads that this test cannot see"
        assert about["timeouts"] and min(about["timeouts"]) >= 24 * 60 * 60


def test_explained_variance_is_that_of_all_data(pair):
    """1 - Var(returns - values) / Var(returns), of what both ranks collected: no mean of two ratios."""
    halves = [torch.load(pair.parent.parent / f"data{rank}.pt") for rank in (0, 1)]
    logged, means = [value for _, value in curves(pair)["losses/explained_variance"]], []
    assert len(logged) == len(halves[0]) == len(halves[1]) == ITERATIONS
    for both, value in zip(zip(*halves), logged):
        ratios = [1 - float((r - v).double().var() / r.double().var()) for v, r in both]
        values, returns = (torch.cat([part.flatten() for part in parts]).double() for parts in zip(*both))
        assert value == pytest.approx(1 - float((returns - values).var() / returns.var()), rel=1e-4, abs=1e-6)
        means.append(sum(ratios) / 2)
    assert max(abs(value - mean) for value, mean in zip(logged, means)) > 1e-4, "the two could not be told apart"


def test_checkpoint_holds_the_state_of_each_rank(pair):
    """Each rank has its own games and its own generators; what trains is the same in both."""
    first = torch.load(pair / "checkpoint.pt", weights_only=True)
    (second,) = first["ranks"]
    assert second.keys() == first.keys() - {"flags", "step", "ranks"}
    different = {name for name in second if differences(first[name], second[name])}
    assert different == {"generators", "random", "numpy", "environments", "row"}
    assert all(differences(*both) for both in zip(first["generators"], second["generators"], strict=True))
    assert len(first["environments"]) == len(second["environments"]) == ENVS // 2


def test_weights_that_drift_apart_are_told(tmp_path, monkeypatch):
    """A loss of one's own whose gradients nobody averages: only rank 0's weights would be published. A buffer may
    differ, as the noise of a NoisyNet does."""
    agent = torch.nn.BatchNorm1d(3)
    other = copy.deepcopy(agent)
    other.running_mean += 1
    state, args = {"weights": agent, "iteration": 1}, SimpleNamespace(flags={}, rank=0)
    monkeypatch.setattr(ppo_atari, "gather", lambda mine: [mine, mine | {"weights": other.state_dict()}])
    (tmp_path / "run").mkdir()
    with closing(ppo_atari.RunDirectory(tmp_path / "run")) as run:
        ppo_atari.save(run, state, args, 8)
        other.weight.data[0] += 1e-6
        with pytest.raises(ppo_atari.RunError, match="weights differ"):
            ppo_atari.save(run, state, args, 16)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 8


def test_several_processes_without_torchrun(monkeypatch, tmp_path, capfd):
    """One line that names it, before anything is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert ppo_atari.main(list(map(str, FLAGS))) == 2
    error = capfd.readouterr().err
    assert "torchrun" in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_two_ranks_do_what_one_process_does(pair, tmp_path):
    """On the same data, in two halves or in one piece: the same update, up to rounding, and the same games."""
    single = watched(tmp_path)
    whole = torch.load(tmp_path / "first0.pt")
    halves = torch.load(pair.parent.parent / "first0.pt")
    differences = [float((a - b).abs().max()) for a, b in zip(whole, halves, strict=True)]
    assert max(differences) < 2e-5, differences  # two steps of Adam move each weight by up to 5e-4
    one, two = curves(single), curves(pair)
    games = [[game for game in run["charts/episodic_return"] if game[0] <= STEPS * ENVS] for run in (one, two)]
    assert games[0] == games[1]
    assert len(games[0]) >= 2
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl"):
        first, second = (run[f"losses/{name}"][0] for run in (one, two))
        assert first == pytest.approx(second, rel=1e-3, abs=1e-6), name


def test_rank_that_dies_takes_the_run_down(pair, tmp_path):
    """kill -9 of one of two ranks: both end within a minute, with a message; resumed, the run ends as the whole one."""
    process = start(*FLAGS, cwd=tmp_path, program=(*TORCHRUN, SCRIPT))
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
    pids = ranks(process.pid)
    assert set(pids) == {0, 1}
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    assert finish(process, 60) not in (0, None)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.values()), 60 - (time.monotonic() - killed))
    assert re.search(r"(?i)rank\W.*1|SIGKILL", (tmp_path / "log").read_text())
    run = run_directory(tmp_path)
    assert 0 < torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] < ITERATIONS
    program = (*TORCHRUN, SCRIPT)
    assert finish(start("--resume", run, cwd=tmp_path, program=program)) == 0, (tmp_path / "log").read_text()
    assert_same_run(run, pair)


def test_another_number_of_processes_is_refused(pair, tmp_path, capfd):
    """A run of two processes cannot go on in one."""
    run = shutil.copytree(pair, tmp_path / "run")
    assert re.search(
        "2 processes", refusal(capfd, "--resume", run, "--total-timesteps", 10 * STEPS * ENVS * ITERATIONS)
    )


@pytest.mark.parametrize("flags", [["--num-envs", 3], ["--num-envs", 2, "--num-steps", 3, "--num-minibatches", 2]])
def test_uneven_split_is_refused(flags, monkeypatch, capfd, tmp_path):
    """Environments, and minibatches, that two processes cannot share evenly: one line, before anything starts."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    error = refusal(capfd, *flags)
    assert flags[-2] in error and "2" in error
    assert not (tmp_path / "runs").exists()


def test_signal_to_one_rank_stops_both(pair, tmp_path):
    """SIGINT that reaches rank 1 only: both end after the same iteration, saved, with 130; and the run can go on."""
    both = two_ranks(*FLAGS, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
    os.kill(both[1].pid, signal.SIGINT)
    assert [finish(process, 60) for process in both] == [130, 130], (tmp_path / "log").read_text()
    assert not living(both[0].pid) and not living(both[1].pid)
    log = (tmp_path / "log").read_text()
    assert log.count("--resume") == 1, log
    run = run_directory(tmp_path)
    assert 0 < torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] < ITERATIONS
    finish_two_ranks("--resume", run, cwd=tmp_path)
    assert_same_run(run, pair)


LEARNER = """
import pathlib, torch.distributed as dist
from test_learning import learn

def main(argv):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pathlib.Path(f"share{rank}").write_text(str(learn(+1, n=4, rank=rank)))
    dist.destroy_process_group()
"""


def test_two_ranks_learn_the_image_task(tmp_path):
    """Four games on each of two ranks, gradients and normalization shared: both solve the task of the learning test."""
    (tmp_path / "learner.py").write_text(LEARNER)
    finish_two_ranks(cwd=tmp_path, script=tmp_path / "learner.py")
    shares = [float((tmp_path / f"share{rank}").read_text()) for rank in (0, 1)]
    assert min(shares) > 0.95, shares
