"""Two processes under torchrun train one agent, and do what one process would do."""

import copy
import hashlib
import json
import os
import re
import shutil
import signal
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import (
    SCRIPT,
    at_call,
    curves,
    differences,
    finish,
    finish_two_ranks,
    fork,
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

ENVS = 4
STEPS = 90  # in which some games end, with a frame skip of 10
ITERATIONS = 4
FLAGS = ["--env-id", "ALE/Breakout-v5", "--num-envs", ENVS, "--num-steps", STEPS,
         "--frame-size", 36, "--frame-skip", 10, "--total-timesteps", STEPS * ENVS * ITERATIONS,
         "--num-minibatches", 1, "--update-epochs", 2, "--num-workers", 0, "--eval-episodes", 0,
         "--precision", "float32", "--checkpoint-interval", 1]  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
PROGRAM = """
import sys
sys.path[:0] = [{tests!r}, {script!r}]
import ppo_atari, test_distributed
test_distributed.{before}()
sys.exit(ppo_atari.main(sys.argv[1:]))
"""


def program(cwd: Path, before: str) -> Path:
    """A program that first calls this function of this module and is then the script."""
    path = cwd / f"{before}.py"
    folders = {"tests": str(Path(__file__).parent), "script": str(SCRIPT.parent)}
    path.write_text(PROGRAM.format(before=before, **folders))
    return path


def threads() -> list[str]:
    """The names of this process' threads."""
    return [(path / "comm").read_text().strip() for path in Path("/proc/self/task").iterdir()]


def digest(tensors: list[torch.Tensor]) -> str:
    content = b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()


def look_on() -> None:
    """Has this process write down its weights after each step, its data, and its threads while it
    trains and at its end."""
    rank = os.environ.get("RANK", "0")
    seen = {"after": [], "seen": [], "timeouts": [], "during": []}
    data = []
    adam_step = torch.optim.Adam.step
    ppo_loss = ppo_atari.ppo_loss
    compute_gae = ppo_atari.compute_gae
    init_process_group = dist.init_process_group
    main = ppo_atari.main

    def watched_step(optimizer, *args, **kwargs):
        result = adam_step(optimizer, *args, **kwargs)
        parameters = []
        for group in optimizer.param_groups:
            parameters += group["params"]
        seen["after"].append(digest(parameters))
        if len(seen["after"]) == 2:  # the first iteration has two epochs of one minibatch
            torch.save([p.detach().clone() for p in parameters], f"first{rank}.pt")
        return result

    def watched_loss(new, old, *args):
        seen["seen"].append(digest([old["log_prob"]]))
        return ppo_loss(new, old, *args)

    def watched_gae(rewards, values, *args):
        advantages, returns = compute_gae(rewards, values, *args)
        data.append((values[:-1].clone(), returns.clone()))
        seen["during"] = threads()
        return advantages, returns

    def watched_init(*args, **kwargs):
        seen["timeouts"].append(kwargs["timeout"].total_seconds())
        return init_process_group(*args, **kwargs)

    def watched_main(argv):
        code = main(argv)
        torch.save(data, f"data{rank}.pt")
        about = seen | {"threads": threads(), "group": dist.is_initialized()}
        Path(f"rank{rank}.json").write_text(json.dumps(about))
        return code

    torch.optim.Adam.step = watched_step
    ppo_atari.ppo_loss = watched_loss
    ppo_atari.compute_gae = watched_gae
    dist.init_process_group = watched_init
    ppo_atari.main = watched_main


def lose_rank_1() -> None:
    """kill -9 of one rank, in the third iteration."""
    if os.environ["RANK"] == "1":
        at_call("compute_gae", 3, partial(os.kill, os.getpid(), signal.SIGKILL))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run of two processes that nothing interrupts, as a user starts it."""
    cwd = tmp_path_factory.mktemp("pair")
    process = start(*FLAGS, cwd=cwd, program=(*TORCHRUN, program(cwd, "look_on")))
    assert finish(process) == 0, (cwd / "log").read_text()
    return run_directory(cwd)


def assert_same_run(run: Path, whole: Path) -> None:
    """Equal bit for bit: weights, optimizer, the games and generators of both ranks, and each point
    of the curves."""
    first, second = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (run, whole))
    assert not differences(first | {"flags": None}, second | {"flags": None})
    assert same_weights(weights(run), weights(whole))
    assert curves(run) == curves(whole)


def ranks(session: int) -> dict[int, int]:
    """The process ids of the ranks that torchrun has started below the process `session`, by
    rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            environment = (path.parent / "environ").read_bytes()
        except OSError:
            continue
        rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", environment)
        if parent == session and rank is not None:
            found[int(rank[1])] = int(path.parent.name)
    return found


def written_by(pair: Path, rank: int) -> dict:
    return json.loads((pair.parent.parent / f"rank{rank}.json").read_text())


def test_ranks_agree_after_every_step(pair):
    """Two processes see different games, and their weights are bit-identical after each optimizer
    step."""
    first, second = (written_by(pair, rank) for rank in (0, 1))
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
    """gloo's threads, alive at the interpreter's end, abort the process now and then. And while
    rank 0 evaluates, the others wait for longer than the half hour, or ten minutes, that torch
    would allow them."""
    for rank in (0, 1):
        about = written_by(pair, rank)
        assert "gloo" in str(about["during"]), "the group has threads that this test cannot see"
        assert "gloo" not in str(about["threads"]) and not about["group"], about["threads"]
        assert about["timeouts"] and min(about["timeouts"]) >= 24 * 60 * 60


def test_explained_variance_is_that_of_all_data(pair):
    """1 - Var(returns - values) / Var(returns), of what both ranks collected: no mean of two
    ratios."""
    halves = [torch.load(pair.parent.parent / f"data{rank}.pt") for rank in (0, 1)]
    logged = [value for _, value in curves(pair)["losses/explained_variance"]]
    assert len(logged) == len(halves[0]) == len(halves[1]) == ITERATIONS
    gaps = []
    for i in range(ITERATIONS):
        ratios = []
        for values, returns in (halves[0][i], halves[1][i]):
            errors = (returns - values).double()
            ratios.append(1 - float(errors.var() / returns.double().var()))
        values = torch.cat([half[i][0].flatten() for half in halves]).double()
        returns = torch.cat([half[i][1].flatten() for half in halves]).double()
        expected = 1 - float((returns - values).var() / returns.var())
        assert logged[i] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        gaps.append(abs(logged[i] - sum(ratios) / 2))
    assert max(gaps) > 1e-4, "the two could not be told apart"


def test_checkpoint_holds_the_state_of_each_rank(pair):
    """Each rank has its own games and its own generators; what trains is the same in both."""
    first = torch.load(pair / "checkpoint.pt", weights_only=True)
    (second,) = first["ranks"]
    assert second.keys() == first.keys() - {"flags", "step", "ranks"}
    different = {name for name in second if differences(first[name], second[name])}
    own = {"action_generators", "envs", "shuffler", "torch", "numpy", "python"}
    assert different == own
    generators = zip(first["action_generators"], second["action_generators"], strict=True)
    assert all(differences(*both) for both in generators)
    assert len(first["envs"]["games"]) == len(second["envs"]["games"]) == ENVS // 2


def test_weights_that_drift_apart_are_told(tmp_path, monkeypatch):
    """Only rank 0's weights would be published: nothing is. A buffer may differ, as the noise of a
    NoisyNet does."""
    agent = torch.nn.BatchNorm1d(3)
    other = copy.deepcopy(agent)
    state = {"weights": agent, "iteration": 1}
    args = SimpleNamespace(flags={}, rank=0)

    def gather(mine):
        return [mine, mine | {"weights": ppo_atari.pack(other)}]

    monkeypatch.setattr(ppo_atari, "gather", gather)
    (tmp_path / "run").mkdir()
    with closing(ppo_atari.RunDirectory(tmp_path / "run")) as run:
        other.running_mean += 1
        ppo_atari.save_checkpoint(run, state, args, 8)
        before = {path.name: path.read_bytes() for path in run.path.glob("*.pt")}
        assert before.keys() == {"agent.pt", "checkpoint.pt"}
        other.weight.data[0] += 1e-6
        with pytest.raises(RuntimeError, match="weights differ"):
            ppo_atari.save_checkpoint(run, state, args, 16)
        assert {path.name: path.read_bytes() for path in run.path.glob("*.pt")} == before


def test_loss_whose_gradients_nobody_averages(tmp_path):
    """Both ranks end with an error, and there is no agent to be published."""
    call = r"(?m)^( +)average_gradients\(agent\)$"
    source, found = re.subn(call, r"\1pass", SCRIPT.read_text())
    assert found == 1
    script = tmp_path / "mine.py"
    script.write_text(source)
    both = two_ranks(*FLAGS, "--num-steps", 8, cwd=tmp_path, script=script)
    assert [finish(process, 120) for process in both] == [1, 1], (tmp_path / "log").read_text()
    assert "weights differ" in (tmp_path / "log").read_text()
    assert not list(run_directory(tmp_path).glob("*.pt"))


@pytest.mark.parametrize(
    ("flags", "num_groups"), [([], 2), (["--num-envs", 2], 2), (["--num-groups", 4], 4)]
)
def test_groups_are_counted_over_all_processes(flags, num_groups, monkeypatch):
    """By default there are two, as in one process: each game is in a group with the same others."""
    own = []
    for rank in (0, 1):
        pretend_two_ranks(monkeypatch, rank)
        args = ppo_atari.parse_args(list(map(str, FLAGS + flags)))
        assert args.num_groups == args.flags["num_groups"] == num_groups
        monkeypatch.setattr(ppo_atari, "Games", lambda args, arrays, indices: None)
        space = gym.spaces.Box(0, 255, (4, 36, 36), np.uint8)
        with closing(ppo_atari.ParallelEnvs(args, space)) as envs:
            for group in envs.groups:
                own.append(range(args.first_env + group.start, args.first_env + group.stop))
    num_envs = args.num_envs
    size = num_envs // num_groups
    assert own == [range(i, i + size) for i in range(0, num_envs, size)]


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
    """On the same data, in two halves or in one piece: the same update, up to rounding, and the
    same games."""
    process = fork(*FLAGS, "--num-groups", 2, cwd=tmp_path, before=look_on)
    assert finish(process) == 0, (tmp_path / "log").read_text()
    assert json.loads((pair / "args.json").read_text())["flags"]["num_groups"] == 2
    whole = torch.load(tmp_path / "first0.pt")
    halves = torch.load(pair.parent.parent / "first0.pt")
    gaps = [float((a - b).abs().max()) for a, b in zip(whole, halves, strict=True)]
    assert max(gaps) < 2e-5, gaps  # two steps of Adam move each weight by up to 5e-4
    one = curves(run_directory(tmp_path))
    two = curves(pair)
    games = []
    for run in (one, two):
        games.append([game for game in run["charts/episodic_return"] if game[0] <= STEPS * ENVS])
    assert games[0] == games[1]
    assert len(games[0]) >= 2
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl"):
        first, second = (run[f"losses/{name}"][0] for run in (one, two))
        assert first == pytest.approx(second, rel=1e-3, abs=1e-6), name


def test_rank_that_dies_takes_the_run_down(pair, tmp_path):
    """kill -9 of one of two ranks: both end within a minute, with a message; resumed, the run ends
    as the whole one."""
    process = start(*FLAGS, cwd=tmp_path, program=(*TORCHRUN, program(tmp_path, "lose_rank_1")))
    wait_for(lambda: len(ranks(process.pid)) == 2)
    pids = ranks(process.pid)
    wait_for(lambda: not Path(f"/proc/{pids[1]}").exists())
    killed = time.monotonic()
    assert finish(process, 60) not in (0, None)
    left = 60 - (time.monotonic() - killed)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.values()), left)
    assert re.search(r"(?i)rank\W.*1|SIGKILL", (tmp_path / "log").read_text())
    run = run_directory(tmp_path)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 2
    finish_two_ranks("--resume", run, cwd=tmp_path)
    assert_same_run(run, pair)


def test_another_number_of_processes_is_refused(pair, tmp_path, capfd):
    """A run of two processes cannot go on in one."""
    run = shutil.copytree(pair, tmp_path / "run")
    more = ["--total-timesteps", 10 * STEPS * ENVS * ITERATIONS]
    assert "2 processes" in refusal(capfd, "--resume", run, *more)


def pretend_two_ranks(monkeypatch, rank: int) -> None:
    """Sets what torchrun sets for a process of this rank."""
    sizes = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in (sizes | {"RANK": rank, "LOCAL_RANK": rank}).items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    "flags",
    [
        ["--num-envs", 3],
        ["--num-envs", 2, "--num-steps", 3, "--num-minibatches", 2],
        ["--num-groups", 3],
    ],
)
def test_uneven_split_is_refused(flags, monkeypatch, capfd, tmp_path):
    """Environments, minibatches and groups that two processes cannot share evenly: one line, before
    anything starts."""
    monkeypatch.chdir(tmp_path)
    pretend_two_ranks(monkeypatch, 0)
    error = refusal(capfd, *flags)
    assert flags[-2] in error and "2" in error
    assert not (tmp_path / "runs").exists()


def test_signal_to_one_rank_stops_both(pair, tmp_path):
    """SIGINT that reaches rank 1 only: both end after the same iteration, saved, with 130; and the
    run can go on."""
    before = partial(at_call, "compute_gae", 3, partial(signal.raise_signal, signal.SIGINT))
    both = two_ranks(*FLAGS, cwd=tmp_path, before={1: before})
    log = tmp_path / "log"
    assert [finish(process, 120) for process in both] == [130, 130], log.read_text()
    assert not living(both[0].pid) and not living(both[1].pid)
    assert log.read_text().count("--resume") == 1, log.read_text()
    run = run_directory(tmp_path)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 3
    finish_two_ranks("--resume", run, cwd=tmp_path)
    assert_same_run(run, pair)


LEARNER = """
import os, pathlib
from test_learning import learn

def main(argv):
    share = learn(+1, n=4)
    pathlib.Path("share" + os.environ["RANK"]).write_text(str(share))
"""


def test_two_ranks_learn_the_image_task(tmp_path):
    """Four games on each of two ranks, gradients and normalization shared: both solve the task of
    the learning test."""
    (tmp_path / "learner.py").write_text(LEARNER)
    finish_two_ranks(cwd=tmp_path, script=tmp_path / "learner.py")
    shares = [float((tmp_path / f"share{rank}").read_text()) for rank in (0, 1)]
    assert min(shares) > 0.95, shares
