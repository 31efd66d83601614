"""Where people run the script: notebooks, threads, containers, clusters, sweeps, trackers."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from launch import (
    curves,
    finish,
    fork,
    here,
    load,
    refusal,
    run_directory,
    start,
    wait_for,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import ppo_atari

SCRIPT = Path(ppo_atari.__file__).resolve()
GAME = ["--env-id", "ALE/Breakout-v5", "--num-envs", "2", "--num-steps", "8", "--frame-size", "36"]
GAME += ["--num-minibatches", "1", "--update-epochs", "1", "--num-workers", "0"]
TINY = [*GAME, "--eval-episodes", "0", "--total-timesteps"]


class Notebook(io.StringIO):
    """A standard stream as notebooks have it: it has no reconfigure and no file descriptor."""

    def fileno(self):
        raise io.UnsupportedOperation("fileno")


def pasted(argv: list[str], optimize: int = -1) -> dict:
    """Runs the script's text as a cell of a notebook: it is no file."""
    code = SCRIPT.read_text().replace("exit_code = main()", f"exit_code = main({argv!r})")
    module = types.ModuleType("pasted")
    sys.modules["pasted"] = module
    module.__dict__["__name__"] = "pasted"
    exec(compile(code, "cell", "exec", optimize=optimize), module.__dict__)
    return module.__dict__


def test_in_a_notebook(tmp_path, monkeypatch):
    """The file's text in a cell, with a notebook's streams: it trains."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", Notebook())
    monkeypatch.setattr(sys, "stderr", Notebook())
    cell = pasted([])
    assert "__file__" not in cell
    assert cell["main"]([*TINY, "32", "--num-workers", "1"]) == 0
    assert "ppo_atari__1__" in run_directory(tmp_path).name
    assert cell["parse_args"]().flags["seed"] == 1  # and not the notebook's own arguments


def test_in_a_cell_where_workers_are_spawned(capsys):
    """They could not import the cell: one line that names the way out."""
    cell = pasted([])
    cell["START_METHOD"] = "spawn"
    with pytest.raises(SystemExit) as end:
        cell["parse_args"](["--num-workers", "1"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "--num-workers 0" in error and error.count("\n") == 1
    assert cell["parse_args"](["--num-workers", "0"]).workers == 0


def test_in_a_thread(tmp_path, monkeypatch):
    """Python allows signal handlers in the main thread only: elsewhere, none are set."""
    monkeypatch.chdir(tmp_path)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(ppo_atari.main([*TINY, "32"])))
    thread.start()
    thread.join(120)
    assert codes == [0]


def test_the_process_is_as_before(tmp_path, monkeypatch):
    """Signal handlers, torch's threads, and the hooks of Python: in IPython the session goes on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(ppo_atari, "available_cores", lambda: 1)
    torch.set_num_threads(2)
    try:
        before = [signal.getsignal(signum) for signum in ppo_atari.STOP_SIGNALS]
        hooks = (threading.excepthook, sys.excepthook, torch.get_num_threads())
        assert ppo_atari.main([*TINY, "32"]) == 0
        about = json.loads((run_directory(tmp_path) / "args.json").read_text())
        assert about["hardware"]["threads"] == 1
        assert [signal.getsignal(signum) for signum in ppo_atari.STOP_SIGNALS] == before
        assert (threading.excepthook, sys.excepthook, torch.get_num_threads()) == hooks
    finally:
        torch.set_num_threads(1)


@pytest.fixture
def hangups():
    """SIGHUP as a terminal gives it: not ignored, even if these tests run under nohup."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, handler)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_closed_terminal_and_a_clusters_warnings(name, tmp_path, monkeypatch, capfd, hangups):
    """As SIGTERM: the iteration is finished, the run saved, and the exit code 128 + signal."""
    monkeypatch.chdir(tmp_path)
    signum = getattr(signal, name)
    anneal = ppo_atari.anneal

    def warned(schedule, args, iteration):
        anneal(schedule, args, iteration)
        if iteration == 2:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(ppo_atari, "anneal", warned)
    code, out, _ = here(capfd, *TINY, 64)
    assert code == 128 + signum and "to go on: python ppo_atari.py --resume" in out
    kept = torch.load(run_directory(tmp_path) / "checkpoint.pt", weights_only=True)
    assert kept["iteration"] == 2


def test_nohup(tmp_path, monkeypatch):
    """SIGHUP that is ignored stays ignored."""
    monkeypatch.chdir(tmp_path)
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ppo_atari.StopRequest("stopping") as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signum == 0
    finally:
        signal.signal(signal.SIGHUP, handler)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000\n"}, 16),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_a_containers_quota_counts(files, cores, tmp_path, monkeypatch):
    """cgroups, version 2 and 1: the quota over the period, rounded up."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(ppo_atari, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert ppo_atari.available_cores() == cores
    args = ppo_atari.parse_args([])
    assert args.workers == min(cores - 1, 8) and args.cores == cores


def test_a_job_that_is_requeued(tmp_path, monkeypatch, capfd):
    """The same line begins in --run-dir and goes on there; killed before its first checkpoint, it
    begins anew. The weights are those of a run that nothing interrupts."""
    monkeypatch.chdir(tmp_path)
    line = [*TINY, 64, "--checkpoint-interval", 1, "--run-dir", "jobs/one"]
    assert here(capfd, *line, "--run-dir", "jobs/whole")[0] == 0
    anneal = ppo_atari.anneal
    for last in (1, 3):  # killed in this iteration
        with monkeypatch.context() as patch:

            def killed(schedule, args, iteration, last=last):
                if iteration == last:
                    raise KeyboardInterrupt
                anneal(schedule, args, iteration)

            patch.setattr(ppo_atari, "anneal", killed)
            assert here(capfd, *line)[0] == 130
    assert here(capfd, *line)[0] == 0
    one, whole = Path("jobs/one"), Path("jobs/whole")
    mine, other = weights(one), weights(whole)
    assert all(torch.equal(mine[name], other[name]) for name in other)
    assert [step for step, _ in curves(one)["losses/entropy"]] == [16, 32, 48, 64]
    code, out, _ = here(capfd, *line)
    assert code == 0 and "complete" in out and not Path("runs").exists()
    assert "--gamma" in refusal(capfd, *line, "--gamma", 0.5)


def test_without_docstrings(tmp_path, monkeypatch):
    """python -OO has none, and no assertions: help, and a whole run."""
    monkeypatch.chdir(tmp_path)
    script = pasted([], optimize=2)
    assert script["Agent"].__doc__ is None
    assert script["main"](["--help"]) == 0
    assert script["main"]([*TINY, "16"]) == 0


def test_flags_as_sweeps_write_them():
    """Underscores in names, and whole numbers as 1e7; what is no whole number is refused."""
    line = [
        "--learning_rate=0.001",
        "--total_timesteps",
        "1e5",
        "--num_envs=1.6e1",
        "--no-anneal_lr",
    ]
    args = ppo_atari.parse_args(line)
    assert (args.learning_rate, args.total_timesteps, args.num_envs) == (0.001, 100_000, 16)
    assert not args.anneal_lr and type(args.total_timesteps) is int
    assert ppo_atari.parse_args(["--exp-name=my_run"]).exp_name == "my_run"
    for text in ("1.55e1", "1e-3", "inf", "1e400"):
        with pytest.raises(SystemExit):
            ppo_atari.parse_args(["--num-envs", text])


def test_two_directories_to_resume(capfd):
    error = refusal(capfd, "--resume", "runs/one", "runs/two")
    assert "one directory" in error and "runs/two" in error


def hparams(run: Path) -> dict:
    """The columns of the HParams tab that a run has."""
    metadata = EventAccumulator(str(run)).Reload().summary_metadata
    content = metadata["_hparams_/session_start_info"].plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    content = metadata["_hparams_/experiment"].plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    metrics = [info.name.tag for info in experiment.metric_infos]
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}
    return values | {"metrics": metrics}


@pytest.mark.parametrize("target", [None, "0.5"])
def test_every_flag_is_a_column(target, tmp_path, monkeypatch):
    """Whether it is set or not; the metric is the mean of the last 100 games or the evaluation."""
    monkeypatch.chdir(tmp_path)
    more = [] if target is None else ["--target-kl", target]
    assert ppo_atari.main([*TINY, "16", *more]) == 0
    found = hparams(run_directory(tmp_path))
    assert found.keys() - {"metrics"} == ppo_atari.parse_args([]).flags.keys()
    assert found["env_id"] == "ALE/Breakout-v5"
    assert found["target_kl"] == ("none" if target is None else 0.5)
    assert "charts/return_100" in found["metrics"]


def test_where_directories_cannot_be_opened(tmp_path, monkeypatch):
    """As on Windows, which has no fcntl either."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    opened = os.open

    def windows(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(path)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", windows)
    assert ppo_atari.main([*TINY, "16"]) == 0


def test_a_copy_speaks_of_itself(tmp_path, monkeypatch, capsys):
    """Its usage, its messages and the name of its runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_ppo.py").write_text(SCRIPT.read_text())
    copy = load(tmp_path / "my_ppo.py", "my_ppo")
    monkeypatch.setattr(copy.StopRequest, "agreed", lambda stop: setattr(stop, "signum", 2) or True)
    assert copy.main([*TINY, "32"]) == 130
    assert "python my_ppo.py --resume" in capsys.readouterr().out
    assert "__my_ppo__1__" in run_directory(tmp_path).name
    assert copy.main(["--gamma", "7"]) == 2
    assert capsys.readouterr().err.startswith("my_ppo.py: error: ")


def test_torchrun_is_told_how_to_go_on(tmp_path, capsys):
    run = ppo_atari.RunDirectory(tmp_path)
    args = ppo_atari.parse_args([])
    args.world_size = 4
    args.local_world_size = 4
    run.begin_progress(args, 0)
    run.say_how_it_ended(args, [], 0)
    run.close()
    command = "torchrun --standalone --nproc-per-node=4 ppo_atari.py --resume"
    assert command in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run without an evaluation, and what it printed."""
    cwd = tmp_path_factory.mktemp("finished")
    process = fork(*TINY, 100, cwd=cwd)
    assert finish(process) == 0
    return run_directory(cwd), (cwd / "log").read_text()


def test_the_end_of_a_run(finished):
    """Where it is, its return, how to evaluate it; and that 100 steps are 96."""
    run, log = finished
    assert f"complete: runs/{run.name}" in log and "--evaluate runs/" in log
    assert log.count("96 steps, which are whole rollouts of 16") == 1


def test_return_100_is_in_every_run(tmp_path, monkeypatch):
    """From the first game on: the mean of the last 100 returns."""
    monkeypatch.chdir(tmp_path)
    assert ppo_atari.main([*TINY, "1024", "--num-steps", "64"]) == 0
    found = curves(run_directory(tmp_path))
    games = found["charts/episodic_return"]
    assert len(games) >= 3
    assert len({value for _, value in games}) >= 2
    for step, value in found["charts/return_100"]:
        returns = [game for at, game in games if at <= step]
        assert value == pytest.approx(np.mean(returns[-100:]))
    first = min(at for at, _ in games)
    assert found["charts/return_100"][0][0] - 128 < first <= found["charts/return_100"][0][0]


def test_the_film_is_told(finished, tmp_path, capfd):
    """Its path; or that --output is needed, for an agent that lies beside no checkpoint. OpenCV is
    silent."""
    run, _ = finished
    agent = tmp_path / "agent.pt"
    agent.write_bytes((run / "agent.pt").read_bytes())
    line = ("--evaluate", agent, "--eval-episodes", 1, "--capture-video")
    code, _, error = here(capfd, *line)
    assert code == 0 and "--output" in error and error.count("\n") == 1
    code, out, error = here(capfd, *line, "--output", tmp_path / "there")
    (film,) = (tmp_path / "there" / "videos").iterdir()
    assert code == 0 and str(film) in out and error == ""


# --- Weights & Biases ----------------------------------------------------------------------------


@pytest.fixture
def pretended_wandb(monkeypatch):
    """A module wandb that notes what it is asked."""
    module = types.ModuleType("wandb")
    module.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    module.calls = []

    def init(**given):
        module.calls.append(given["id"])
        return types.SimpleNamespace(finish=lambda: module.calls.append("finished"))

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_one_tracked_run_for_each_training(pretended_wandb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in ("1", "2"):
        assert ppo_atari.main([*TINY, "16", "--track", "--seed", seed]) == 0
    first, end, second, other_end = pretended_wandb.calls
    assert first != second and end == other_end == "finished"


def test_tracking_without_a_login(pretended_wandb, tmp_path, monkeypatch, capfd):
    """One line that names the ways out, and no directory."""
    monkeypatch.chdir(tmp_path)

    def init(**given):
        raise pretended_wandb.errors.Error("api_key not configured\n(no-tty)")

    pretended_wandb.init = init
    error = refusal(capfd, *TINY, 16, "--track")
    assert "wandb login" in error and "WANDB_MODE=offline" in error
    assert not list((tmp_path / "runs").iterdir())


# --- Features ------------------------------------------------------------------------------------


def emulator_memory(*flags: str) -> bytes:
    """The console's memory after some frames of a game."""
    env = ppo_atari.make_env(ppo_atari.parse_args([*flags, "--noop-max", "0"]))
    env.reset(seed=1)
    for _ in range(20):
        env.step(2)
    return env.unwrapped.ale.getRAM().tobytes()


def test_modes_and_difficulties(tmp_path, monkeypatch, capfd):
    """The game's flavours reach the emulator, an evaluation and a resume; others get one line."""
    monkeypatch.chdir(tmp_path)
    flavour = ["--mode", "4", "--difficulty", "1"]
    plain = emulator_memory()
    assert emulator_memory(*flavour) == emulator_memory(*flavour) != plain
    assert emulator_memory(*flavour[:2]) != plain and emulator_memory(*flavour[2:]) != plain
    assert "--mode [0, 4, 8" in refusal(capfd, *TINY, 16, "--mode", 99)
    assert "--difficulty [0, 1]" in refusal(capfd, *TINY, 16, "--difficulty", 9)
    assert here(capfd, *TINY, 16, *flavour)[0] == 0
    saved = torch.load(run_directory(tmp_path) / "agent.pt", weights_only=True)["flags"]
    assert ppo_atari.parse_args([], saved).mode == 4
    assert "--mode" in refusal(capfd, "--resume", run_directory(tmp_path), "--mode", 8)


def test_the_cap_on_a_game_is_a_truncation():
    """--max-episode-frames: not a game over, so that it is bootstrapped; 108 000 by the ids."""
    args = ppo_atari.parse_args(["--env-id", "PongNoFrameskip-v4", "--max-episode-frames", "200"])
    env = ppo_atari.make_env(args)
    env.reset(seed=1)
    ended = False
    while not ended:
        _, _, terminated, truncated, info = env.step(0)
        ended = terminated or truncated
    assert truncated and not terminated and "episode" in info
    assert env.unwrapped.ale.getEpisodeFrameNumber() == 200
    spec = gym.spec(ppo_atari.parse_args([]).env_id)
    assert spec.kwargs["max_num_frames_per_episode"] == 108_000


def test_greedy(finished, tmp_path, monkeypatch, capfd, watch):
    """The most probable action at each step of an evaluation, and never of the training."""
    run, _ = finished
    seen = []

    def see(given, outputs):
        agent = given["self"]
        hidden = agent.features(agent.network, given["obs"])
        seen.append(torch.equal(outputs["action"], agent.actor(hidden).argmax(-1)))

    watch(ppo_atari.Agent, "get_action_and_value", after=see)
    line = ("--evaluate", run, "--eval-episodes", 1, "--output", tmp_path)
    assert here(capfd, *line)[0] == 0
    assert not all(seen)
    seen.clear()
    assert here(capfd, *line, "--greedy")[0] == 0
    assert all(seen) and seen
    policies = []
    watch(
        ppo_atari.Agent,
        "get_action_and_value",
        before=lambda given: policies.append(given["self"].greedy),
    )
    monkeypatch.chdir(tmp_path)
    assert here(capfd, *TINY, 32, "--greedy")[0] == 0
    assert policies and not any(policies)


def test_playing_needs_a_display(finished, monkeypatch, capfd):
    pytest.importorskip("pygame")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    assert "display" in refusal(capfd, "--play")
    assert "display" in refusal(capfd, "--play", "--evaluate", finished[0])


def test_arrows_and_letters_play(monkeypatch, capfd):
    """Both, alone and with the space bar; they are listed, with Escape."""
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    given = {}
    monkeypatch.setattr("gymnasium.utils.play.play", lambda env, **how: given.update(how))
    code, out, _ = here(capfd, "--play", "--full-action-space")
    assert code == 0 and "Escape" in out and "space" in out and "up" in out
    keys = given["keys_to_action"]
    meanings = ppo_atari.make_env(ppo_atari.parse_args(["--full-action-space"])).unwrapped
    names = meanings.get_action_meanings()
    assert names[keys[(pygame.K_LEFT,)]] == names[keys[("a",)]] == "LEFT"
    assert names[keys[(pygame.K_UP,)]] == "UP"
    assert {names[action] for action in keys.values()} == set(names)


def test_wandb_is_ignored_by_git():
    assert "wandb/" in (SCRIPT.parent / ".gitignore").read_text().splitlines()


def test_readme_has_what_containers_need():
    readme = (SCRIPT.parent / "README.md").read_text()
    assert "opencv-python-headless" in readme and "%run ppo_atari.py" in readme
    assert re.search(r"--run-dir", readme)


def test_stopped_by_sighup_for_real(tmp_path, hangups):
    """A real process whose terminal closes."""
    process = start(*GAME, "--total-timesteps", 10**6, "--checkpoint-interval", 1, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
    os.killpg(process.pid, signal.SIGHUP)
    assert finish(process, 60) == 128 + signal.SIGHUP, (tmp_path / "log").read_text()
    assert "--resume" in (tmp_path / "log").read_text()


def test_a_closed_terminal_for_real(tmp_path, hangups):
    """The terminal itself is gone when the run says how to go on: it is saved all the same."""
    master, terminal = os.openpty()
    command = [sys.executable, SCRIPT, *GAME, "--total-timesteps", "1000000"]
    command += ["--checkpoint-interval", "1"]
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, start_new_session=True, env=environment, **streams
    )
    os.close(terminal)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
    os.close(master)
    os.kill(process.pid, signal.SIGHUP)  # which a shell sends
    assert finish(process, 60) == 128 + signal.SIGHUP
    kept = torch.load(run_directory(tmp_path) / "checkpoint.pt", weights_only=True)
    steps = [step for step, _ in curves(run_directory(tmp_path))["losses/entropy"]]
    assert steps[-1] == 16 * kept["iteration"]


def test_nobody_reads_on(tmp_path):
    """`python ppo_atari.py | head -1`: all is written, and nothing else is said."""
    command = f"{sys.executable} {SCRIPT} {' '.join(GAME)} --total-timesteps 48 --eval-episodes 1"
    pipe = f"({command}; echo code $? >&2) 2>errors | head -n 1"
    done = subprocess.run(pipe, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("run directory: ") and done.stdout.count("\n") == 1
    assert (tmp_path / "errors").read_text() == "code 0\n"
    assert (run_directory(tmp_path) / "eval.json").exists()


def test_a_link_to_a_run(tmp_path, monkeypatch, capfd):
    """Such as runs/latest, or one to a larger disk: as the directory itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to("far")
    assert here(capfd, *TINY, 32, "--run-dir", "near")[0] == 0
    more = ["--total-timesteps", 48, "--eval-episodes", 0]
    assert here(capfd, "--resume", "near", *more)[0] == 0
    assert here(capfd, "--evaluate", "near", "--eval-episodes", 1)[0] == 0
    assert weights(tmp_path / "far") and (tmp_path / "far" / "eval.json").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--run-dir", "file"], "cannot write to file"),
        (["--run-dir", "a", "--resume", "b"], "--run-dir"),
        (["--run-dir", ""], "--run-dir"),
        (["--evaluate", "agent.pt", "--output", "file"], "cannot write to file"),
        (["--evaluate", "a" * 300], "does not exist"),
        (["--mode", "5000000000"], "--mode"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_places_that_cannot_be(flags, says, finished, tmp_path, monkeypatch, capfd):
    """One line, and exit code 2, which main() returns."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agent.pt").write_bytes((finished[0] / "agent.pt").read_bytes())
    (tmp_path / "file").touch()
    assert says in refusal(capfd, *TINY, 16, *flags)
    assert ppo_atari.main([*TINY, "16", *flags]) == 2


def test_a_strangers_step(finished, tmp_path, capfd):
    content = torch.load(finished[0] / "agent.pt", weights_only=True)
    torch.save(content | {"step": "abc"}, tmp_path / "agent.pt")
    assert "damaged" in refusal(capfd, "--evaluate", tmp_path / "agent.pt")
