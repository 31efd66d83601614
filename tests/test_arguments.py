"""Section 1: flags, their checks, and the pins and marks that the file promises."""

import json
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
from launch import load

import ppo_atari
from ppo_atari import parse_args

ROOT = Path(ppo_atari.__file__).parent


def test_defaults_are_those_of_baselines():
    args = vars(parse_args([]))
    expected = {
        "env_id": "ALE/Breakout-v5", "seed": 1, "total_timesteps": 10_000_000, "num_envs": 8, "num_steps": 128,
        "num_minibatches": 4, "update_epochs": 4, "learning_rate": 2.5e-4, "anneal_lr": True, "gamma": 0.99,
        "gae_lambda": 0.95, "clip_coef": 0.1, "clip_vloss": True, "norm_adv": True, "ent_coef": 0.01, "vf_coef": 0.5,
        "max_grad_norm": 0.5, "target_kl": None, "noop_max": 30, "frame_skip": 4, "episodic_life": True,
        "fire_reset": True, "frame_size": 84, "clip_reward": True, "frame_stack": 4, "shared_network": True,
        "scale_obs": True, "repeat_action_probability": None, "torch_deterministic": True, "cuda": True, "track": False,
        "capture_video": False, "exp_name": "ppo_atari",
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    assert (args["batch_size"], args["minibatch_size"], args["num_iterations"]) == (1024, 256, 9765)


def test_sizes_follow_from_the_flags():
    flags = "--num-envs 6 --num-steps 10 --num-minibatches 3 --total-timesteps 600 --no-clip-vloss"
    args = parse_args(flags.split())
    assert (args.batch_size, args.minibatch_size, args.num_iterations, args.clip_vloss) == (60, 20, 10, False)


MISTAKES = [
    ("--num-minibatches 3", "--num-minibatches 3"),
    ("--total-timesteps 1023", "--total-timesteps"),
    ("--frame-size 80", "8m + 4"),
    ("--frame-size 28", "8m + 4"),
    ("--gamma 1.01", "--gamma"),
    ("--gamma nan", "--gamma"),
    ("--gae-lambda -0.1", "--gae-lambda"),
    ("--num-envs 0", "--num-envs"),
    ("--num-steps -5", "--num-steps"),
    ("--learning-rate inf", "--learning-rate"),
    ("--learning-rate 0", "--learning-rate"),
    ("--seed -1", "--seed"),
    ("--num-envs 2.5", "--num-envs"),
    ("--env-id CartPole-v1", "not an Atari game"),
    ("--env-id Brekout-v5", "ALE/Breakout-v5"),
    ("--env-id Test/Continuous-v0", "continuous"),
    ("--no-such-flag", "--no-such-flag"),
    ("--exp-name a/b", "--exp-name"),
    ("--repeat-action-probability 2", "--repeat-action-probability"),
    ("--resume nowhere", "nowhere"),
    ("--evaluate nowhere", "nowhere"),
    ("--num-minibatches 1024", "minibatch of one"),
    ("--precision float8", "--precision"),
    ("--learning-rat 1", "--learning-rat"),
    ("--evaluate=", "path"),
    ("--resume=", "path"),
    ("--output=", "path"),
    ("--output there", "--evaluate"),
    ("--evaluate nowhere --output=", "path"),
    ("--clip-coef 1e39", "--clip-coef"),
    ("--learning-rate 1e-60", "--learning-rate"),
    ("--ent-coef-final 1e300", "--ent-coef-final"),
    ("--target-kl 0", "--target-kl"),
    ("--frame-skip 0", "--frame-skip"),
    ("--frame-stack 65", "--frame-stack"),
    (f"--noop-max {10**15}", "--noop-max"),
    (f"--num-envs {10**15}", "--num-envs"),
    (f"--num-workers {10**15}", "--num-workers"),
    (f"--total-timesteps {10**30}", "--total-timesteps"),
    (f"--seed {2**31}", "--seed"),
    ("--start-method thread", "--start-method"),
    ("--no-gamma", "--no-gamma"),
    ("--clip-vloss=yes", "--clip-vloss"),
    ("--clip-vloss=yes", "--no-name, without a value"),
    ("--anneal-lr False", "--no-name, without a value"),
    ("--lr 1", "--help"),
    ("breakout", "breakout"),
    ("--gamma", "--gamma"),
    ("--evaluate a --resume b", "b"),
]


@pytest.mark.parametrize(("flags", "says"), MISTAKES, ids=[flags for flags, _ in MISTAKES])
def test_a_mistake_gets_one_line_and_exit_code_2(flags, says, capsys):
    gym.register("Test/Continuous-v0", "ale_py.env:AtariEnv", kwargs={"game": "pong", "continuous": True})
    try:
        code = ppo_atari.main(flags.split())
    except SystemExit as exit:
        code = exit.code
    finally:
        del gym.registry["Test/Continuous-v0"]
    error = capsys.readouterr().err
    assert code == 2
    assert says in error and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "x"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "-1"), ("RANK", "1")]
)
def test_what_torchrun_would_never_say(name, value, monkeypatch, capsys):
    """Left behind by another program, say. A rank of its own above the only process would train and keep nothing."""
    for other in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit:
        parse_args([])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and f"error: {name} " in error and error.count("\n") == 1, error


@pytest.mark.parametrize("flags", [["--evaluate", "runs"], ["--play"]])
def test_torchrun_is_for_training(flags, monkeypatch, capsys):
    """Else its processes would race for the run directory, and one that plays nothing might get it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit:
        parse_args(flags)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "torchrun" in error and flags[0] in error and error.count("\n") == 1, error


def test_exit_code_and_line_of_the_real_program():
    command = [sys.executable, ROOT / "ppo_atari.py", "--env-id", "Breakout"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_a_flag_must_be_typed_in_full(capsys):
    """Else --learning-rat would work until another flag begins like it."""
    for name in parse_args([]).flags:
        with pytest.raises(SystemExit) as exit:
            parse_args(["--" + name.replace("_", "-")[:-1], "1"])
        assert exit.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_help_names_every_flag_with_its_default(capsys):
    """Once, and none that says None: an absent default is told in words or not at all."""
    with pytest.raises(SystemExit) as exit:
        parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    assert "(default: 0.00025)" in text and "(default: 10000000)" in text and "None" not in text
    told = text[text.index(" options: ") :]
    names = [f"--{name.replace('_', '-')}" for name in parse_args([]).flags]
    starts = [re.search(rf" {name}(,| N| TEXT| {{)", told).start() for name in names]
    for (name, default), start in zip(parse_args([]).flags.items(), starts):
        end = min((other for other in starts if other > start), default=len(told))
        defaults = re.findall(r"\(default: ([^)]*)\)", told[start:end])
        if name == "inference_batch":  # which the machine decides
            assert len(defaults) == 1 and not re.search(r"\d", defaults[0])
        elif default is None:
            assert len(defaults) <= 1 and not any(re.fullmatch(r"[\d.]*", text) for text in defaults)
        else:
            assert defaults == [str(default)], name
    assert sorted(starts) == starts  # each was found in its own place


SAVED = {"gamma": 0.9, "env_id": "ALE/Pong-v5", "seed": 7, "clip_vloss": False, "num_workers": 3, "eval_episodes": 2}


def test_saved_flags_count_where_nothing_is_said():
    """An agent's own flags, but the machine and what is asked for are those of today; what is missing has a default."""
    args, plain = parse_args(["--gamma", "0.8"], SAVED, "agent.pt"), parse_args([])
    assert (args.gamma, args.env_id, args.seed, args.clip_vloss) == (0.8, "ALE/Pong-v5", 7, False)
    assert (args.num_workers, args.eval_episodes) == (plain.num_workers, plain.eval_episodes)
    assert (args.gae_lambda, args.num_envs) == (0.95, 8)


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ({"gamma": 7}, "--gamma"), ({"gamma": None}, "gamma"), ({"no_such_flag": 1}, "no_such_flag"), (["gamma"], ""),
        ({"env_id": "ALE/Chess-v5"}, "Chess"), ({"seed": "--play"}, "--seed"), ({"clip_vloss": "yes"}, "--clip-vloss"),
    ],
)  # fmt: skip
def test_saved_flags_pass_the_same_checks(saved, says, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_args([], saved, "some/agent.pt")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "some/agent.pt" in error and says in error and error.count("\n") == 1


def test_pins_of_the_script_equal_requirements():
    head = (ROOT / "ppo_atari.py").read_text().split("# ///")[1]
    pins = (ROOT / "requirements.txt").read_text().split()
    assert re.findall(r'"([\w-]+==[\w.]+)"', head) == pins and "torch==2.13.0" in pins


def test_every_detail_of_the_paper_is_marked():
    marks = set(re.findall(r"\[(core|atari) (\d+)\]", (ROOT / "ppo_atari.py").read_text()))
    assert marks == {("core", str(i)) for i in range(1, 14)} | {("atari", str(i)) for i in range(1, 10)}


def test_readme_names_every_flag_that_exists_and_no_other():
    """Besides this script's flags: those of the programs in tests/, of the recipes there, and of other tools."""
    flags = {"--" + name.replace("_", "-") for name in parse_args([]).flags}
    named = set(re.findall(r"--[a-z][a-z-]+", (ROOT / "README.md").read_text()))
    others = {"--logdir", "--standalone", "--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--help"}
    others |= {"--flag", "--no-flag", "--shm-size", "--dist"} | {flag.replace("--", "--no-", 1) for flag in flags}
    for path in (ROOT / "tests").glob("*.py"):
        others |= set(re.findall(r'(?:add_argument|flag)\("(--[a-z-]+)"', path.read_text()))
    for path in (ROOT / "tests").glob("recipes/*"):
        others |= {f"--{name}" for name in re.findall(r'^\+ +flag\("([a-z-]+)"', path.read_text(), re.MULTILINE)}
    assert flags <= named, flags - named
    assert named <= flags | others, named - flags - others


def with_flag(flag, tmp_path):
    """The script with this call behind its last flag, where a user would put it."""
    lines = Path(ppo_atari.__file__).read_text().split("\n")
    last = max(i for i, line in enumerate(lines) if line.startswith("    flag("))
    copy = tmp_path / "mine.py"
    copy.write_text("\n".join([*lines[: last + 1], f"    {flag}", *lines[last + 1 :]]))
    return load(copy, "mine")


@pytest.mark.parametrize(
    "flag", ['"hidden-units", 3, count, "h"', '"hidden_units", 3, int, "h"', '"hidden-units", 3, (3, 5, 6), "h"']
)
def test_flag_behind_the_last_one_describes_the_run(flag, tmp_path, capfd):
    """--evaluate takes it from the run, and --resume refuses another value."""
    module = with_flag(f"flag({flag})", tmp_path)
    args = module.parse_args(["--hidden-units", "5"])
    assert args.identity["hidden_units"] == 5
    assert module.parse_args(["--evaluate", "x"], args.flags).hidden_units == 5
    (tmp_path / "args.json").write_text(json.dumps({"flags": args.flags}))
    assert module.parse_args(["--resume", str(tmp_path)]).hidden_units == 5
    with pytest.raises(SystemExit):
        module.parse_args(["--resume", str(tmp_path), "--hidden-units", "6"])
    assert "--hidden-units" in capfd.readouterr().err


@pytest.mark.parametrize("flag", ['"mine", 0, count, "h"', '"mine", False, str, "h"', '"mine", 0.5, str, "h"'])
def test_a_flag_that_no_resume_could_read_is_refused_before_training(flag, tmp_path, capfd):
    """Outside of its own range, or of another type when it is read again."""
    module = with_flag(f"flag({flag})", tmp_path)
    with pytest.raises(SystemExit) as exit:
        module.parse_args([])
    error = capfd.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and "--resume" in error
