"""The study: every run once whatever happens in between, its statistics, and one line for each
mistake."""

import itertools
import json
import os
import re
import shlex
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import study
from launch import curves, finish, living, start, wait_for

STUDY = Path(study.__file__).resolve()
ENDS_WELL = 0 if find_spec("scipy") else 2  # without it, everything but a table that compares
TINY = "--num-envs 2 --num-steps 32 --update-epochs 1 --frame-size 36 --eval-episodes 1"
TINY += " --checkpoint-interval 1"
GRID = ["--games", "BreakoutNoFrameskip-v4", "--seeds", 3, "--steps", 512, "--common", TINY]
GRID += ["--variants", "default", "no clip: --no-clip-reward"]
FAKE = """
import json, pathlib, signal, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
for missing in ("--bad", "--evaluate"):
    if missing in flags:
        print(f"fake: error: {missing} {flags[missing]}", file=sys.stderr)
        sys.exit(2)
print("arguments", *sys.argv[1:], flush=True)
if flags.get("--crash") == flags.get("--seed", "resumed"):
    sys.exit("the last line")
if "--resume" in flags:
    run = pathlib.Path(flags["--resume"])
else:
    run = pathlib.Path(f"runs/{flags['--env-id']}__{flags['--exp-name']}__{flags['--seed']}__1")
run.mkdir(parents=True, exist_ok=True)
if "--wait" in flags:
    try:
        (run / "checkpoint.pt").touch()
        time.sleep(1000)
    except KeyboardInterrupt:
        sys.exit(130)
if "--stay" in flags:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (run / "checkpoint.pt").touch()
    while not pathlib.Path(flags["--stay"]).exists():
        time.sleep(0.01)
print("end", flush=True)
(run / "args.json").write_text('{"versions": {"torch": "1"}, "hardware": {"precision": "float32"}}')
played = {"mean": float(flags.get("--seed", 7)), "random_mean": 0.5, "step": 8, "scores": [1]}
(run / "eval.json").write_text(json.dumps(played))
"""


def lines(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A script that does in no time what a run is expected to do; as the default's, too."""
    monkeypatch.setattr(study, "ROOT", tmp_path)
    (tmp_path / "ppo_atari.py").write_text(FAKE)
    return tmp_path


def call(capfd, *argv) -> tuple[int, str, str]:
    capfd.readouterr()
    try:
        code = study.main(list(map(str, argv)))
    except SystemExit as error:
        code = error.code
    return code, *capfd.readouterr()


def test_killed_and_continued(tmp_path):
    """kill -9 of everything in the middle; the same command ends with each run once, and then has
    nothing to do."""
    results = tmp_path / "s" / "results.jsonl"
    argv = [*GRID, "--results", "s/results.jsonl"]
    process = start(*argv, cwd=tmp_path, program=(STUDY,))

    def all_saved() -> bool:
        """A run killed between agent.pt and checkpoint.pt leaves an agent, which the study does
        not delete."""
        begun = list(tmp_path.glob("s/runs/*"))
        return bool(begun) and all((path / "checkpoint.pt").exists() for path in begun)

    wait_for(lambda: all_saved() or process.poll() is not None)
    process.kill()
    for pid in living(process.pid):
        os.kill(pid, signal.SIGKILL)
    assert finish(process) == -signal.SIGKILL, (tmp_path / "log").read_text()
    wait_for(lambda: not living(process.pid))
    assert not results.exists() or len(lines(results)) < 2
    (tmp_path / "log").unlink()

    code = finish(start(*argv, cwd=tmp_path, program=(STUDY,)))
    assert code == ENDS_WELL, (tmp_path / "log").read_text()
    assert ": resumed" in (tmp_path / "log").read_text()
    found = lines(results)
    made = sorted((line["variant"], line["seed"]) for line in found)
    assert made == [("default", 3), ("no clip", 3)]
    runs = {path.name: path for path in tmp_path.glob("s/runs/*")}
    assert len(runs) == 2
    for line in found:
        name = study.Run(*(line[field] for field in study.Run._fields)).name
        (run,) = (path for path in runs.values() if f"__{name}__{line['seed']}__" in path.name)
        assert line["scores"] == json.loads((run / "eval.json").read_text())["scores"]
        assert line["evaluation"] == np.mean(line["scores"])
        flags = json.loads((run / "args.json").read_text())["flags"]
        assert flags["clip_reward"] == (line["variant"] == "default")
        assert flags["seed"] == line["seed"]
        assert (flags["num_workers"], flags["num_groups"]) == (0, 1)
        games = curves(run).get("charts/episodic_return", [])
        staircase = [[score for at, score in games if at <= step][-100:] for step in range(512)]
        means = [np.mean(scores) for scores in staircase if scores]
        assert line["area"] == (pytest.approx(np.mean(means)) if means else None)
        assert line["return"] == (pytest.approx(means[-1]) if means else None)

    (tmp_path / "log").unlink()
    before = results.read_bytes(), sorted(tmp_path.glob("s/runs/*/*"))
    assert finish(start(*argv, cwd=tmp_path, program=(STUDY,))) == ENDS_WELL
    assert "2 of them finished before" in (tmp_path / "log").read_text()
    assert (results.read_bytes(), sorted(tmp_path.glob("s/runs/*/*"))) == before


def test_ctrl_c_and_on(fake):
    """Ctrl-C reaches the runs once, which save; exit code 130 and how to go on; then they are
    resumed."""
    argv = ["--games", "A", "--seeds", 1, "--steps", 8, "--results", fake / "results.jsonl"]
    argv += ["--variants", f"x: --script {fake}/ppo_atari.py --wait 1"]
    process = start(*argv, cwd=fake, program=(STUDY,))
    wait_for(lambda: list(fake.glob("runs/*/checkpoint.pt")))
    process.send_signal(signal.SIGINT)
    assert finish(process) == 130
    said = (fake / "log").read_text()
    assert "same command" in said and "Traceback" not in said
    assert not living(process.pid)
    assert (fake / "results.jsonl").read_text() == ""
    assert finish(start(*argv, cwd=fake, program=(STUDY,))) == 0
    (log,) = fake.glob("logs/*")
    (run,) = fake.glob("runs/*")
    first, second = (line for line in log.read_text().splitlines() if line.startswith("arguments"))
    assert "--wait 1" in first and second == f"arguments --resume runs/{run.name}"
    assert len(lines(fake / "results.jsonl")) == 1


def test_stable_baselines(tmp_path):
    """Stable-Baselines3 as a variant: stopped, resumed to its last step, evaluated over full
    games."""
    pytest.importorskip("stable_baselines3")
    script = STUDY.with_name("stable_baselines.py")
    argv = ["--games", "BreakoutNoFrameskip-v4", "--seeds", 1, "--steps", 5000]
    argv += ["--results", tmp_path / "r.jsonl"]
    argv += ["--variants", f"sb3: --script {script} --eval-episodes 3"]
    process = start(*argv, cwd=tmp_path, program=(STUDY,))
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    assert finish(process) == 130, (tmp_path / "log").read_text()
    assert (tmp_path / "r.jsonl").read_text() == ""
    assert finish(start(*argv, cwd=tmp_path, program=(STUDY,))) == 0, (tmp_path / "log").read_text()
    (run,) = tmp_path.glob("runs/*")
    (line,) = lines(tmp_path / "r.jsonl")
    assert "stopped and saved" in next(tmp_path.glob("logs/*")).read_text()
    assert json.loads((run / "eval.json").read_text())["step"] == 4096
    assert len(line["scores"]) == 3 and line["evaluation"] == np.mean(line["scores"])
    games = curves(run)["charts/episodic_return"]
    assert line["return"] == pytest.approx(np.mean([score for _, score in games][-100:]))
    assert all(0 < at <= 4096 for at, _ in games)


def test_stable_baselines_random_play(tmp_path):
    """Is of whole games, whatever the agent did before."""
    pytest.importorskip("stable_baselines3")
    from gymnasium.spaces import Discrete
    from stable_baselines import Random, score

    def stand_still(obs, *others, **more):
        return np.zeros(len(obs), int), None

    flags = {"env_id": "BreakoutNoFrameskip-v4", "seed": 1, "eval_episodes": 10}
    means = []
    for predict in (stand_still, Random(Discrete(4)).predict):
        model = SimpleNamespace(num_timesteps=0, action_space=Discrete(4), predict=predict)
        score(model, tmp_path, flags)
        played = json.loads((tmp_path / "eval.json").read_text())
        means.append(played["random_mean"])
    assert means[0] == means[1]
    assert 0.5 < means[0] < 2.5  # 1.7 in Mnih et al. (2015)


def test_a_run_that_outlives_its_study(fake):
    """The study alone is killed: as long as its run goes on, the next one does not start a second
    beside it."""
    argv = ["--games", "A", "--seeds", 1, "--steps", 8, "--results", fake / "results.jsonl"]
    argv += ["--variants", f"x: --script {fake}/ppo_atari.py --stay {fake}/end"]
    process = start(*argv, cwd=fake, program=(STUDY,))
    wait_for(lambda: list(fake.glob("runs/*/checkpoint.pt")))
    process.kill()
    assert finish(process) == -signal.SIGKILL
    assert living(process.pid)
    (fake / "log").unlink()
    process = start(*argv, cwd=fake, program=(STUDY,))
    wait_for(lambda: "0 of them finished" in (fake / "log").read_text())
    time.sleep(1)
    (fake / "end").touch()
    assert finish(process) == 0
    (log,) = fake.glob("logs/*")
    assert [text.split()[0] for text in log.read_text().splitlines()] == ["arguments", "end"] * 2
    assert len(lines(fake / "results.jsonl")) == 1


def test_order_and_seeds_of_the_grid(fake, capfd, monkeypatch):
    """Game by game and, in it, seed by seed; each variant with the seeds that the grid says."""
    begun = []

    def work(grid, results):
        begun.extend(grid)
        results.touch()
        return False

    monkeypatch.setattr(study, "work", work)
    assert call(capfd, "--results", fake / "r.jsonl")[0] == 0
    for game, runs in itertools.groupby(begun, lambda run: run.game):
        runs = list(runs)
        assert [run.seed for run in runs] == sorted(run.seed for run in runs)
        for name, flags in study.VARIANTS.items():
            seeds = [run.seed for run in runs if (run.variant, run.flags) == (name, flags)]
            assert seeds == study.MORE_SEEDS.get(name, study.SEEDS), (game, name)
    assert [game for game, _ in itertools.groupby(begun, lambda run: run.game)] == study.GAMES
    assert {run.steps for run in begun} == {1_000_000}


def test_another_processor_may_mean_another_precision(fake, capfd, monkeypatch):
    """A study that goes on elsewhere says so before it runs anything, and its table if precisions
    are mixed."""
    pytest.importorskip("scipy")
    results = fake / "r.jsonl"
    argv = ["--games", "A", "--steps", 8, "--results", results]
    argv += ["--variants", "default", "full: --precision float32"]
    assert "Mind" not in call(capfd, *argv, "--seeds", 1)[1]
    assert {line["precision"] for line in lines(results)} == {"float32"}
    monkeypatch.setattr(study, "processor", lambda: "another")
    code, out, _ = call(capfd, *argv, "--seeds", 1, 2)
    assert code == 0 and 0 < out.index(", this is another: --precision auto") < out.index(": begun")
    assert out.endswith("Mind: these runs are not all of one processor.\n")
    some = lines(results)
    for one in some:
        one["precision"] = "bfloat16" if one["flags"] == "" else "float32"
    results.write_text("".join(json.dumps(one) + "\n" for one in some))
    out = call(capfd, *argv, "--seeds", 1, 2)[1]
    assert "precision" not in out.split("Mind")[-1]  # each variant is of one
    results.write_text(results.read_text().replace("bfloat16", "float32", 1))
    out = call(capfd, *argv, "--seeds", 1, 2)[1]
    assert "Mind: these runs are not all of one precision in each variant and" in out


def test_a_failing_run_does_not_stop_the_others(fake, capfd):
    argv = ["--games", "A", "--seeds", 1, 2, 3, "--steps", 8, "--results", fake / "r.jsonl"]
    argv += ["--variants", "default"]
    code, out, _ = call(capfd, *argv, "odd: --crash 2")
    assert code == (1 if ENDS_WELL == 0 else 2)
    assert "odd, A, seed 2: failed, exit code 1: the last line" in out
    made = sorted((line["variant"], line["seed"]) for line in lines(fake / "r.jsonl"))
    assert made == [("default", 1), ("default", 2), ("default", 3), ("odd", 1), ("odd", 3)]
    edited = FAKE.replace("the last line", "another")  # tried again, and told
    (fake / "ppo_atari.py").write_text(edited)
    code, out, _ = call(capfd, *argv, "odd: --crash 2")
    assert out.count(": begun") == 1 and "exit code 1: another" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--variants", "defualt"], "defualt"),
        (["--variants", "a: '"], "a: '"),
        (["--variants", "mine: --script none.py"], "none.py: No such file"),
        (["--variants", "mine: --bad 1"], "mine: fake: error: --bad 1"),
        (["--variants", "mine: --seed 4"], "--seed"),
        (["--common=--env-id=B"], "--env-id"),
        (["--seeds", "x"], "x"),
        (["--common=--eval-episodes 0"], "--eval-episodes"),
        (["--common=--eval-episodes=0 --gamma 1"], "--eval-episodes"),
        (["--table", "good.jsonl", "--games", "Typo"], "good.jsonl: no finished run"),
        (["--table", "none.jsonl"], "none.jsonl: No such file"),
        (["--results", "bad.jsonl"], "bad.jsonl, line 2 is not a result"),
        (["--table", "bad.jsonl"], "bad.jsonl, line 2 is not a result"),
    ],
)
def test_mistakes_are_told_in_one_line(argv, message, fake, capfd, monkeypatch):
    monkeypatch.chdir(fake)
    Path("good.jsonl").write_text(json.dumps(line("default", 1, 2.0)) + "\n")
    Path("bad.jsonl").write_text(json.dumps(line("default", 1, 2.0)) + "\n{}\n")
    code, _, error = call(capfd, "--results", fake / "r.jsonl", *argv)
    assert code == 2 and error.count("\n") == 1 and message in error, error
    assert not list(fake.glob("runs/*"))


def test_nothing_trained_is_deleted(fake, capfd):
    """A run without checkpoint.pt, as a full disk leaves it, begins anew; what has weights stays. A
    copy beside a run is not one, and a name of other letters does not make a flag of the run's."""
    run = study.Run("λ=1", "", "A", 1, 8, "")
    assert not run.name.startswith("-")
    for number in (2, 3):
        (fake / f"runs/{run.prefix()}__{number}").mkdir(parents=True)
    weights = fake / f"runs/{run.prefix()}__2/agent.pt"
    weights.touch()
    (fake / f"runs/{run.prefix()}__1.bak").mkdir()
    argv = ["--games", "A", "--seeds", 1, "--steps", 8, "--results", fake / "r.jsonl"]
    argv += ["--variants", "λ=1: "]
    code, out, error = call(capfd, *argv)
    assert "begun" in out and "Traceback" not in error, error
    assert weights.exists() and not (fake / f"runs/{run.prefix()}__3").exists()


# --------------------------------------------------------------------------------------- statistics


def line(variant: str, seed: int, evaluation: float, game: str = "A", **other) -> dict:
    """A line of the results."""
    line = {
        "variant": variant,
        "flags": "" if variant == "default" else f"--{variant}",
        "game": game,
        "seed": seed,
        "steps": 8,
        "common": "",
        "evaluation": evaluation,
        "return": None,
        "area": None,
        "random_mean": -1.0,
        "script": "0",
        "torch": "1",
        "processor": "p",
    }
    return line | other


SCORES = {  # of a variant and the default, with ties, and not with as many seeds everywhere
    "A": ([3.0, 9.0, 4.0], [2.0, 3.0]),
    "B": ([-20.0, 5.0], [-18.0, -15.0, -20.0]),
}


@pytest.mark.parametrize("games", [["A"], ["B"], ["A", "B"]])
def test_statistics_against_all_resamples(games):
    """The interval's ends are where the exact distribution, of every possible resample, has 2.5 %
    on either side."""
    pytest.importorskip("scipy")
    pairs = [SCORES[game] for game in games]
    got = study.compare(pairs)

    exact = [0.0]
    for mine, default in pairs:
        these = []
        for x in itertools.product(mine, repeat=len(mine)):
            for y in itertools.product(default, repeat=len(default)):
                these.append((sum(x) / len(x) - sum(y) / len(y)) / len(pairs))
        exact = [total + this for total in exact for this in these]
    exact = np.array(exact)
    for end, share in zip(got.interval, (0.025, 0.975)):
        assert np.mean(exact < end - 1e-9) - 0.006 < share < np.mean(exact <= end + 1e-9) + 0.006
    assert got.difference == pytest.approx(exact.mean())

    better = []
    for mine, default in pairs:
        won = 0.0
        for x in mine:
            for y in default:
                won += 1.0 if x > y else 0.5 if x == y else 0.0
        better.append(won / (len(mine) * len(default)))
    assert got.better == pytest.approx(sum(better) / len(better))

    each = []
    for mine, default in pairs:
        for x in mine:
            each.append(x - sum(default) / len(default))
    assert got.each == pytest.approx(each)


def test_games_are_normalized_by_the_default_and_random_play():
    """Twice the default's distance from random play is a difference of 1, whatever the game's
    scale."""
    pytest.importorskip("scipy")
    some = []
    for seed in (1, 2):
        some += [line("default", seed, 1.0, "A"), line("default", seed, 99.0, "B")]
        some += [line("x", seed, 3.0, "A"), line("x", seed, 199.0, "B")]
    scores, found = study.comparisons(some, "evaluation")
    assert scores["x", "--x"] == {"A": [3.0, 3.0], "B": [199.0, 199.0]}
    assert found["x", "--x"]["A"].difference == 2 and found["x", "--x"]["B"].difference == 100
    assert found["x", "--x"][study.ALL].difference == pytest.approx(1)
    assert found["x", "--x"][study.ALL].interval == pytest.approx((1, 1))
    assert found["default", ""] == {}
    some = [one for one in some if (one["variant"], one["game"]) != ("x", "B")]  # not finished yet
    assert study.ALL not in study.comparisons(some, "evaluation")[1]["x", "--x"]


def test_table_and_picture_from_raw_lines_alone(tmp_path, capfd):
    """Every seed's value, the interval, a dash where one seed allows none; another length is
    another table."""
    pytest.importorskip("scipy")
    raw = tmp_path / "raw.jsonl"
    picture = tmp_path / "out.png"
    some = []
    for seed in (1, 2, 3):
        for game in SCORES:
            some.append(line("x", seed, 10.0 * seed + 1, game))
            some.append(line("default", seed, 10.0 * seed, game))
    some.append(line("once", 1, 25.0, "A"))
    some.append(line("default", 1, 5.0, steps=16))
    some.append(line("default", 3, 30.0, script="1"))
    raw.write_text("".join(json.dumps(one) + "\n" for one in some))
    argv = ["--table", raw, "--picture", picture] if find_spec("matplotlib") else ["--table", raw]
    code, out, error = call(capfd, *argv)
    assert (code, error) == (0, "")
    rows = [row.strip("| ").split(" | ") for row in out.splitlines() if row.startswith("|")]
    names = [row[0] for row in rows]
    assert names == ["variant", "---", "default", "x", "once", "variant", "---", "default"]
    assert rows[2][2:] == ["20 (10, 20, 30)", "20 (10, 20, 30)", "-", "-", "-"]
    assert rows[3][2] == "21 (11, 21, 31)"
    assert rows[3][4].startswith("+1 [-") and rows[3][4].endswith("], 0.67")
    assert rows[4][2:] == ["25 (25)", "-", "+5 [-], 0.67", "-", "-"]
    assert "one version of a script" in out
    assert not find_spec("matplotlib") or picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} <= {"raw.jsonl", "out.png"}
    argv = ["--table", raw, "--games", "B", "--steps", 8, "--variants", "x: --x"]
    assert call(capfd, *argv)[1].count("\n| x |") == 1


def test_the_page_has_the_tables_of_the_commands_in_it(tmp_path, capfd, monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.chdir(STUDY.parent.parent)
    readme = Path("runs/reference/README.md").read_text()
    commands = re.findall(r"^python tests/study.py (--table .*)$", readme, re.MULTILINE)
    assert commands
    picture = f" --picture {tmp_path}/out.png" if find_spec("matplotlib") else ""
    for command in commands:
        argv = shlex.split(re.sub(r" --picture \S+", picture, command))
        code, out, error = call(capfd, *argv)
        assert (code, error) == (0, "")
        rows = [row for row in out.splitlines() if row.startswith("|")]
        assert len(rows) > 3
        assert set(rows) <= set(readme.splitlines())


def test_no_difference_is_no_rounding_error(tmp_path, capfd):
    pytest.importorskip("scipy")
    raw = tmp_path / "raw.jsonl"
    some = [line("default", seed, mean) for seed, mean in ((1, 0.1), (2, 0.7), (3, 1.3))]
    some += [line("x", seed, 0.7) for seed in (1, 2, 3)]
    raw.write_text("".join(json.dumps(one) + "\n" for one in some))
    rows = call(capfd, "--table", raw)[1].splitlines()
    assert "| x | --x | 0.7 (0.7, 0.7, 0.7) | +0 [-0.6, +0.6], 0.50 |" in rows


@pytest.mark.parametrize("missing", ["scipy", "matplotlib"])
def test_missing_library_is_named(missing, tmp_path, capfd, monkeypatch):
    if missing == "matplotlib":
        pytest.importorskip("scipy")
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps(line(v, 1, 1.0)) + "\n" for v in ("x", "default")))
    for name in [name for name in sys.modules if name.partition(".")[0] == missing] + [missing]:
        monkeypatch.setitem(sys.modules, name, None)
    code, _, error = call(capfd, "--table", raw, "--picture", tmp_path / "out.png")
    assert code == 2 and error.count("\n") == 1 and f"pip install {missing}" in error
