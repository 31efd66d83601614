"""Section 1: flags, their checks, and the pins and marks that the file promises."""

import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest

import ppo_atari
from ppo_atari import parse_args

ROOT = Path(ppo_atari.__file__).parent


def test_defaults_are_the_papers():
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


def test_exit_code_and_line_of_the_real_program():
    command = [sys.executable, ROOT / "ppo_atari.py", "--env-id", "Breakout"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    assert "(default: 0.00025)" in text and "(default: 10000000)" in text
    for name in parse_args([]).flags:
        assert "--" + name.replace("_", "-") in text


def test_pins_of_the_script_equal_requirements():
    head = (ROOT / "ppo_atari.py").read_text().split("# ///")[1]
    pins = (ROOT / "requirements.txt").read_text().split()
    assert re.findall(r'"([\w-]+==[\w.]+)"', head) == pins and "torch==2.13.0" in pins


def test_every_detail_of_the_paper_is_marked():
    marks = set(re.findall(r"\[(core|atari) (\d+)\]", (ROOT / "ppo_atari.py").read_text()))
    assert marks == {("core", str(i)) for i in range(1, 14)} | {("atari", str(i)) for i in range(1, 10)}


def test_readme_names_every_flag_that_exists_and_no_other():
    flags = {"--" + name.replace("_", "-") for name in parse_args([]).flags}
    named = set(re.findall(r"--[a-z][a-z-]+", (ROOT / "README.md").read_text()))
    others = {"--logdir", "--standalone", "--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--help"}
    others |= {"--device", "--scaling", "--iterations", "--flag", "--no-flag"} | {
        flag.replace("--", "--no-", 1) for flag in flags
    }
    assert flags <= named and named <= flags | others
