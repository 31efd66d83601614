"""Section 1: flags, their checks, and the pins and marks that the file promises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from launch import load

import ppo_atari
from ppo_atari import parse_args

ROOT = Path(ppo_atari.__file__).parent


def test_defaults_are_those_of_baselines():
    args = vars(parse_args([]))
    expected = {
        "env_id": "ALE/Breakout-v5", "seed": 1, "total_timesteps": 10_000_000, "num_envs": 8,
        "num_steps": 128, "num_minibatches": 4, "update_epochs": 4, "learning_rate": 2.5e-4,
        "anneal_lr": True, "gamma": 0.99, "gae_lambda": 0.95, "clip_coef": 0.1, "clip_vloss": True,
        "norm_adv": True, "ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 0.5, "target_kl": None,
        "noop_max": 30, "frame_skip": 4, "episodic_life": True, "fire_reset": True,
        "frame_size": 84, "clip_reward": True, "frame_stack": 4, "shared_network": True,
        "scale_obs": True, "repeat_action_probability": None, "torch_deterministic": True,
        "cuda": True, "track": False, "capture_video": False, "exp_name": "ppo_atari",
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    assert (args["batch_size"], args["minibatch_size"], args["num_iterations"]) == (1024, 256, 9765)


def test_sizes_follow_from_the_flags():
    flags = "--num-envs 6 --num-steps 10 --num-minibatches 3 --total-timesteps 600 --no-clip-vloss"
    args = parse_args(flags.split())
    assert (args.batch_size, args.minibatch_size, args.num_iterations) == (60, 20, 10)
    assert not args.clip_vloss


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
    ("--resume=", "args.json"),
    ("--output=", "--evaluate"),
    ("--output there", "--evaluate"),
    ("--run-dir there --play", "--run-dir"),
    ("--clip-coef 1e39", "--clip-coef"),
    ("--learning-rate 1e-60", "--learning-rate"),
    ("--ent-coef-final 1e300", "--ent-coef-final"),
    ("--target-kl 0", "--target-kl"),
    ("--frame-skip 0", "--frame-skip"),
    ("--frame-stack 65", "--frame-stack"),
    (f"--noop-max {10**15}", "--noop-max"),
    (f"--num-envs {10**15}", "--num-envs"),
    (f"--num-workers {10**16}", "--num-workers"),
    ("--num-workers -1", "--num-workers"),
    (f"--total-timesteps {10**30}", "--total-timesteps"),
    (f"--seed {2**31}", "--seed"),
    ("--start-method fork", "--start-method"),
    ("--inference-batch 4", "--inference-batch"),
    ("--num-groups 0", "--num-groups"),
    ("--num-groups 9", "--num-envs 8"),
    ("--no-gamma", "--no-gamma"),
    ("--clip-vloss=yes", "--clip-vloss"),
    ("--anneal-lr False", "--no-name, without a value"),
    ("--lr 1", "--help"),
    ("breakout", "breakout"),
    ("--gamma", "--gamma"),
    ("--evaluate a --resume b", "b"),
    ("--total-timesteps 0", "--total-timesteps"),
]


@pytest.mark.parametrize(("flags", "says"), MISTAKES, ids=[flags for flags, _ in MISTAKES])
def test_a_mistake_gets_one_line_and_exit_code_2(flags, says, capsys, monkeypatch):
    monkeypatch.setattr(ppo_atari, "train", lambda args: pytest.fail("it would train"))
    gym.register(
        "Test/Continuous-v0", "ale_py.env:AtariEnv", kwargs={"game": "pong", "continuous": True}
    )
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
    ("name", "value"),
    [("WORLD_SIZE", "x"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "-1"), ("RANK", "1")],
)
def test_what_torchrun_would_never_say(name, value, monkeypatch, capsys):
    """Left behind by another program, say. A rank above 0 without other processes would train and
    keep nothing."""
    for other in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit:
        parse_args([])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and f"error: {name} " in error and error.count("\n") == 1, error


@pytest.mark.parametrize("flags", [["--evaluate", "runs"], ["--play"]])
def test_torchrun_is_for_training(flags, monkeypatch, capsys):
    """Else its processes would race for the run directory, and an idle one might get it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit:
        parse_args(flags)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1, error
    assert "torchrun" in error and flags[0] in error


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
        if name == "num_groups":  # args.flags holds what it came to
            assert defaults == ["2, GPU: 16"]
        elif default is None:
            assert len(defaults) <= 1
            assert not any(re.fullmatch(r"[\d.]*", text) for text in defaults)
        else:
            assert defaults == [str(default)], name
    assert sorted(starts) == starts  # each was found in its own place


SAVED = {
    "gamma": 0.9,
    "env_id": "ALE/Pong-v5",
    "seed": 7,
    "clip_vloss": False,
    "precision": "float32",
    "target_kl": None,
    "num_workers": 3,
    "eval_episodes": 2,
}


def test_saved_flags_count_where_nothing_is_said():
    """An agent's own flags, but the machine and what is asked for are those of today; what is
    missing has its default."""
    args = parse_args(["--gamma", "0.8"], SAVED, "agent.pt")
    plain = parse_args([])
    assert (args.gamma, args.env_id, args.seed, args.clip_vloss) == (0.8, "ALE/Pong-v5", 7, False)
    assert (args.precision, args.target_kl) == ("float32", None)
    assert (args.num_workers, args.eval_episodes) == (plain.num_workers, plain.eval_episodes)
    assert (args.gae_lambda, args.num_envs) == (0.95, 8)


def test_saved_flags_come_back_as_they_were():
    """Of every kind, to the last bit, through args.json's format."""
    flags = (
        "--learning-rate 0.1234567890123456789 --ent-coef 1e-30 --target-kl 0.03 --seed 2147483647"
    )
    flags += " --no-anneal-lr --full-action-space --precision bfloat16 --exp-name 5% --num-groups 5"
    flags += " --repeat-action-probability 0 --ent-coef-final 0"
    args = parse_args(flags.split())
    again = parse_args([], json.loads(json.dumps(args.flags)), "agent.pt")
    assert again.flags == args.flags
    types = {name: type(value) for name, value in args.flags.items()}
    assert {name: type(value) for name, value in again.flags.items()} == types
    assert again.learning_rate == 0.1234567890123456789 and again.exp_name == "5%"


def test_flags_that_older_agents_carry_are_passed_over():
    args = parse_args([], {"inference_batch": 4, "start_method": "fork", "gamma": 0.9}, "agent.pt")
    assert args.gamma == 0.9
    assert not {"inference_batch", "start_method"} & vars(args).keys()


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ({"gamma": 7}, "--gamma"),
        ({"gamma": None}, "gamma"),
        ({"gamma": [0.9]}, "--gamma"),
        ({"gamma": {"a": 0.9}}, "--gamma"),
        ({"gamma": float("nan")}, "--gamma"),
        ({"gamma": True}, "gamma"),
        ({"no_such_flag": 1}, "no_such_flag"),
        ({7: 1}, "7"),
        (["gamma"], "no flags"),
        ("gamma", "no flags"),
        ({"env_id": "ALE/Chess-v5"}, "Chess"),
        ({"env_id": 5}, "--env-id"),
        ({"seed": "--play"}, "--seed"),
        ({"seed": 7.5}, "--seed"),
        ({"clip_vloss": "yes"}, "clip_vloss"),
        ({"clip_vloss": "False"}, "clip_vloss"),
        ({"clip_vloss": 0}, "clip_vloss"),
        ({"clip_vloss": None}, "clip_vloss"),
        ({"precision": "float8"}, "--precision"),
        ({"precision": None}, "precision"),
        ({"target_kl": "x"}, "--target-kl"),
        ({"target_kl": False}, "--target-kl"),
        ({"exp_name": "a/b"}, "--exp-name"),
        ({"frame_size": 80}, "--frame-size"),
        ({"num_envs": 6, "num_steps": 1}, "--num-minibatches"),
        ({"num_groups": 9}, "--num-groups"),
        ({"gamma\n": 1}, "gamma"),
    ],
    ids=str,
)
def test_saved_flags_pass_the_same_checks(saved, says, capsys):
    """Also those that the command line overrides."""
    for argv in ([], ["--gamma", "0.5"]):
        with pytest.raises(SystemExit) as exit:
            parse_args(argv, saved, "some/agent.pt")
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error.count("\n") == 1, error
        assert error.startswith("ppo_atari.py: error: some/agent.pt: ") and says in error


GROUPS = [  # games, processes, on a GPU, groups
    (8, 1, False, 2),
    (7, 1, False, 2),
    (1, 1, False, 1),
    (8, 2, False, 2),
    (8, 4, False, 4),
    (9, 3, False, 3),
    (8, 1, True, 8),
    (1, 1, True, 1),
    (64, 1, True, 16),
    (24, 1, True, 12),
    (17, 1, True, 1),
    (8, 2, True, 8),
    (24, 4, True, 12),
    (20, 4, True, 4),
    (40, 20, True, 20),
]


@pytest.fixture
def has_gpu(monkeypatch):
    """has_gpu(True or False): what parse_args shall find."""

    def answer(yes):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(yes))

    answer(False)
    return answer


@pytest.mark.parametrize(("games", "processes", "gpu", "groups"), GROUPS)
def test_default_number_of_groups(games, processes, gpu, groups, has_gpu, monkeypatch):
    """2 on a CPU; on a GPU the largest number up to 16 that gives groups of one size. Always a
    multiple of the number of processes."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    has_gpu(gpu)
    args = parse_args(["--num-envs", str(games)])
    assert args.num_groups == args.flags["num_groups"] == groups
    typed = parse_args(["--num-envs", str(games), "--num-groups", str(groups)])
    assert typed.flags == args.flags
    without = parse_args(["--num-envs", str(games), "--no-cuda"])
    has_gpu(False)
    assert without.num_groups == parse_args(["--num-envs", str(games)]).num_groups


@pytest.mark.parametrize(
    ("flags", "processes", "gpu", "says"),
    [
        ("--num-groups 3", 1, False, None),
        ("--num-groups 8", 1, False, None),
        ("--num-groups 9", 1, False, "at most --num-envs 8"),
        ("--num-groups 3", 2, False, "multiple of 2 processes"),
        ("--num-groups 1", 2, False, "multiple of 2 processes"),
        ("--num-groups 6", 2, False, None),
        ("--num-groups 3 --no-cuda", 1, True, None),
        ("--num-groups 4", 1, True, None),
    ],
)
def test_which_numbers_of_groups_are_possible(
    flags, processes, gpu, says, has_gpu, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    has_gpu(gpu)
    if says is None:
        assert parse_args(flags.split()).num_groups == int(flags.split()[1])
        return
    with pytest.raises(SystemExit) as exit:
        parse_args(flags.split())
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert "--num-groups" in error and says in error


@pytest.mark.parametrize(
    ("flags", "cores", "local_processes", "workers"),
    [
        ("", 4, 1, 3),
        ("", 64, 1, 8),
        ("", 1, 1, 0),
        ("", 8, 2, 3),
        ("", 2, 4, 0),
        ("--num-envs 2", 64, 1, 2),
        ("--num-workers 0", 64, 1, 0),
        ("--num-workers 5", 2, 1, 5),
        ("--num-workers 1000", 2, 1, 8),
    ],
)
def test_number_of_workers(flags, cores, local_processes, workers, monkeypatch):
    """One core is the learner's; no worker without a game."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_processes))
    assert parse_args(flags.split()).workers == workers


def run_with(folder, *flags, parse=parse_args):
    """A run directory as --resume reads it, with these flags in its args.json."""
    args = parse([*flags])
    (folder / "args.json").write_text(json.dumps({"flags": args.flags}))
    return args


OTHER_VALUES = {
    "env_id": "ALE/Pong-v5",
    "seed": 2,
    "total_timesteps": 20_000_000,
    "exp_name": "other",
    "precision": "float32",
    "num_groups": 1,
    "num_workers": 3,
    "checkpoint_interval": 7,
    "eval_episodes": 3,
    "eval_interval": 9,
    "wandb_project_name": "other",
    "wandb_entity": "other",
    "wandb_name": "other",
    "num_envs": 16,
    "num_steps": 64,
    "learning_rate": 1e-3,
    "gamma": 0.9,
    "gae_lambda": 0.9,
    "num_minibatches": 2,
    "update_epochs": 3,
    "clip_coef": 0.2,
    "ent_coef": 0.02,
    "ent_coef_final": 0.0,
    "vf_coef": 1.0,
    "max_grad_norm": 1.0,
    "target_kl": 0.03,
    "noop_max": 10,
    "frame_skip": 2,
    "frame_size": 44,
    "frame_stack": 2,
    "mode": 4,
    "difficulty": 1,
    "max_episode_frames": 18_000,
    "repeat_action_probability": 0.0,
}
MAY_CHANGE = {
    "cuda",
    "cuda_graph",
    "torch_deterministic",
    "num_workers",
    "checkpoint_interval",
    "eval_episodes",
    "eval_interval",
    "greedy",
    "capture_video",
    "track",
    "wandb_project_name",
    "wandb_entity",
    "wandb_name",
    "total_timesteps",
}


def test_what_may_change_with_resume(tmp_path, capsys):
    """Every flag is tried: what the file of the run says, typed again, is always welcome."""
    flags = run_with(tmp_path).flags
    resume = ["--resume", str(tmp_path)]
    tried = {"resume", "run_dir", "evaluate", "output", "play"}  # which are about one call
    for name, value in flags.items():
        if name in tried:
            continue
        typed = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            new_value = not value
            argv = [typed if new_value else typed.replace("--", "--no-", 1)]
            same_argv = [typed if value else typed.replace("--", "--no-", 1)]
        else:
            new_value = OTHER_VALUES[name]
            argv = [typed, str(new_value)]
            same_argv = [] if value is None else [typed, str(value)]
        tried.add(name)
        assert new_value != value
        assert parse_args(resume + same_argv).flags == flags | {"resume": str(tmp_path)}
        if name in MAY_CHANGE:
            args = parse_args(resume + argv)
            assert args.flags == flags | {"resume": str(tmp_path), name: new_value}
            continue
        with pytest.raises(SystemExit) as exit:
            parse_args(resume + argv)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error.count("\n") == 1
        assert f"--resume: {typed} is {value} in that run, not {new_value}" in error
    assert tried == flags.keys()


@pytest.mark.parametrize("flags", ["--evaluate x", "--play", "--output x"])
def test_resume_trains_and_nothing_else(flags, tmp_path, capsys):
    run_with(tmp_path)
    with pytest.raises(SystemExit) as exit:
        parse_args(["--resume", str(tmp_path), *flags.split()])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and flags.split()[0] in error


def test_a_resumed_run_keeps_its_flags(tmp_path, capsys):
    """Those of the machine, too, unless they are typed; it may grow but not shrink."""
    flags = "--gamma 0.9 --num-workers 3 --no-cuda --checkpoint-interval 7 --total-timesteps 4096"
    run_with(tmp_path, *flags.split())
    resume = ["--resume", str(tmp_path)]
    args = parse_args(resume)
    assert (args.gamma, args.num_workers, args.cuda, args.checkpoint_interval) == (0.9, 3, False, 7)
    assert parse_args([*resume, "--total-timesteps", "5000"]).total_timesteps == 5000
    with pytest.raises(SystemExit):
        parse_args([*resume, "--total-timesteps", "4095"])
    assert "--total-timesteps is 4096 in that run, not 4095" in capsys.readouterr().err


def test_on_a_gpu_groups_have_one_size(has_gpu, capsys, monkeypatch):
    monkeypatch.setattr(ppo_atari, "make_env", lambda *args: pytest.fail("it would train"))
    has_gpu(True)
    assert ppo_atari.main(["--num-groups", "3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--num-groups" in error and "--num-envs" in error


def test_a_resumed_run_keeps_its_groups_on_another_machine(tmp_path, has_gpu, capsys):
    """A machine with a GPU goes on with groups of different sizes, but on its CPU."""
    has_gpu(True)
    run_with(tmp_path)
    resume = ["--resume", str(tmp_path)]
    has_gpu(False)
    assert parse_args(resume).num_groups == 8

    run_with(tmp_path, "--num-groups", "3")
    has_gpu(True)
    assert ppo_atari.main(resume) == 2
    assert "--num-groups" in capsys.readouterr().err
    args = parse_args([*resume, "--no-cuda"])
    assert args.num_groups == 3 and not args.use_gpu
    assert ppo_atari.main([*resume, "--no-cuda"]) == 2
    assert "checkpoint.pt does not exist" in capsys.readouterr().err


def test_an_agent_is_evaluated_whatever_its_groups_were(has_gpu):
    """They are about training: a machine with a GPU plays an agent of 7 games in 2 groups."""
    flags = parse_args(["--num-envs", "7"]).flags
    assert flags["num_groups"] == 2
    has_gpu(True)
    assert parse_args(["--evaluate", "agent.pt"], flags, "agent.pt").num_envs == 7


@pytest.mark.parametrize(
    "content",
    [
        None, b"", b"[]", b"{}", b"\xff", b'{"flags": 3}', b'{"flags": ["gamma"]}', b"[" * 100_000,
        b'{"flags": {"gamma": 7}}', b'{"flags": {"no_such_flag": 1}}', b'{"flags": {"seed": null}}',
    ],
    ids=lambda content: str(content)[:30],
)  # fmt: skip
def test_a_damaged_file_of_flags_is_named(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "args.json").write_bytes(content)
    with pytest.raises(SystemExit) as exit:
        parse_args(["--resume", str(tmp_path)])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert str(tmp_path / "args.json") in error


def test_pins_of_the_script_are_among_the_requirements():
    """The script needs all of them but pytest; each is pinned."""
    head = (ROOT / "ppo_atari.py").read_text().split("# ///")[1]
    pins = (ROOT / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", pin) for pin in pins)
    needed = [pin for pin in pins if not pin.startswith("pytest==")]
    assert re.findall(r'"([\w-]+==[\w.]+)"', head) == needed and len(needed) == len(pins) - 1
    assert "torch==2.13.0" in needed


def test_every_detail_of_the_paper_is_marked():
    marks = set(re.findall(r"\[(core|atari) (\d+)\]", (ROOT / "ppo_atari.py").read_text()))
    core = {("core", str(i)) for i in range(1, 14)}
    atari = {("atari", str(i)) for i in range(1, 10)}
    assert marks == core | atari


def test_readme_names_every_flag_that_exists_and_no_other():
    """Besides this script's flags: those of its own examples, of the programs in tests/, of the
    recipes there, and of other tools."""
    flags = {"--" + name.replace("_", "-") for name in parse_args([]).flags}
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"--[a-z][a-z-]+", readme))
    others = {"--logdir", "--standalone", "--nproc-per-node", "--nnodes", "--node-rank"}
    others |= {"--master-addr", "--help", "--flag", "--no-flag", "--dist", "--dry-run"}
    others |= {flag.replace("--", "--no-", 1) for flag in flags}
    others |= {f"--{name}" for name in re.findall(r'flag\(\w+, "([a-z-]+)"', readme)}
    for path in (ROOT / "tests").glob("*.py"):
        others |= set(re.findall(r'(?:add_argument|flag)\(\s*"(--[a-z-]+)"', path.read_text()))
    for path in (ROOT / "tests").glob("recipes/*"):
        names = re.findall(r'^\+ +flag\(\w+, "([a-z-]+)"', path.read_text(), re.MULTILINE)
        others |= {f"--{name}" for name in names}
    assert flags <= named, flags - named
    assert named <= flags | others, named - flags - others


def with_flag(flag, tmp_path, extra=""):
    """The script with this call behind its last flag, where a user would put it, and with one more
    line behind what --resume may change."""
    lines = Path(ppo_atari.__file__).read_text().split("\n")
    last = max(i for i, line in enumerate(lines) if line.startswith("    flag("))
    lines.insert(last + 1, f"    {flag}")
    last = max(i for i, line in enumerate(lines) if line.startswith("MAY_CHANGE "))
    lines.insert(last + 1, extra)
    copy = tmp_path / "mine.py"
    copy.write_text("\n".join(lines))
    return load(copy, "mine")


USERS_FLAGS = [  # default, kind, what is typed, its value, what is typed later
    ("3", "count", "--hidden-units 5", 5, "--hidden-units 6"),
    ("3", "int", "--hidden-units -5", -5, "--hidden-units 5"),
    ("None", "positive", "--hidden-units 0.1", 0.1, "--hidden-units 0.2"),
    ("'few'", "('few', 'many')", "--hidden-units many", "many", "--hidden-units few"),
    ("'few'", "str", "--hidden-units many", "many", "--hidden-units few"),
    ("'few'", "str", "--hidden-units=", "", "--hidden-units few"),
    ("False", "bool", "--hidden-units", True, "--no-hidden-units"),
    ("True", "bool", "--no-hidden-units", False, "--hidden-units"),
]


@pytest.mark.parametrize(("default", "kind", "typed", "value", "later"), USERS_FLAGS)
def test_a_users_flag_describes_the_run(default, kind, typed, value, later, tmp_path, capfd):
    """--evaluate and --resume take it from the run, and --resume refuses another value."""
    module = with_flag(f'flag(atari, "hidden-units", {default}, {kind}, "h")', tmp_path)
    args = run_with(tmp_path, *typed.split(), parse=module.parse_args)
    saved = json.loads((tmp_path / "args.json").read_text())["flags"]
    resume = ["--resume", str(tmp_path)]
    for again in (
        args,
        module.parse_args(["--evaluate", "x"], saved, "x"),
        module.parse_args(resume),
        module.parse_args([*resume, *typed.split()]),
    ):
        assert again.hidden_units == again.flags["hidden_units"] == value
        assert type(again.hidden_units) is type(value)
    evaluate = ["--evaluate", "x", *later.split()]
    assert module.parse_args(evaluate, saved, "x").hidden_units not in (value, None)
    with pytest.raises(SystemExit):
        module.parse_args([*resume, *later.split()])
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "--hidden-units is" in error


def test_a_users_flag_that_may_change_is_about_the_call(tmp_path):
    call = 'flag(machine, "hidden-units", 3, count, "h")'
    module = with_flag(call, tmp_path, 'MAY_CHANGE |= {"hidden_units"}')
    args = run_with(tmp_path, "--hidden-units", "5", parse=module.parse_args)
    assert module.parse_args(["--evaluate", "x"], args.flags, "x").hidden_units == 3
    resume = ["--resume", str(tmp_path)]
    assert module.parse_args(resume).hidden_units == 5
    assert module.parse_args([*resume, "--hidden-units", "6"]).hidden_units == 6
