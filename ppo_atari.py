# /// script
# requires-python = ">=3.11"
# dependencies = ["ale-py==0.12.1", "gymnasium==1.4.0", "numpy==2.4.6", "opencv-python==5.0.0.93",
#                 "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1"]
# ///
# SPDX-License-Identifier: MIT
"""Proximal Policy Optimization on Atari games, complete in this one file.

    python ppo_atari.py --env-id ALE/Breakout-v5                train: everything goes to runs/
    tensorboard --logdir runs                                   watch the curves
    python ppo_atari.py --resume runs/<run>                     go on where it stopped
    python ppo_atari.py --evaluate runs/<run> --capture-video   play ten full games and film one
    python ppo_atari.py --play --env-id ALE/Breakout-v5         play yourself (pip install pygame)
    torchrun --standalone --nproc-per-node=2 ppo_atari.py       train with several processes

After "Proximal Policy Optimization Algorithms" (Schulman et al., 2017), with the hyperparameters of
openai/baselines, and "The 37 Implementation Details of PPO" (Huang et al., 2022). Each detail is
marked where it happens, from [core 1] to [atari 9].

The sections, each of which uses only what stands above it, and what to change where:

    1 arguments              a flag: parse_args
    2 environment            a wrapper: make_env
    3 agent                  a network: make_agent
    4 parallel environments  worker processes, which play the games and know nothing of PPO
    5 PPO                    the loss and what is logged of it: ppo_loss
    6 run directory          files, TensorBoard, films
    7 checkpoint             saving and loading it (what it can hold: pack, in section 2)
    8 programs               the training loop, what it stores of each step, and its state: train
    9 entry

Letters in shapes: T steps of a rollout, N games of this process, B observations in a batch,
k stacked frames of L x L pixels.
"""

import argparse
import copy
import ctypes
import difflib
import enum
import inspect
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import is_dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

Args = argparse.Namespace
Tensors = dict[str, Tensor]

IS_FILE = "__file__" in globals()  # pasted into a notebook, the script is no file
PATH = Path(__file__ if IS_FILE else "ppo_atari.py")
SCRIPT = PATH.name
STOP_SIGNALS = []  # what asks a run to end: also a closed terminal and a cluster's warnings
for _name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
    if hasattr(signal, _name):  # not every system has all of them
        STOP_SIGNALS.append(getattr(signal, _name))
CPU = torch.device("cpu")
CGROUP = Path("/sys/fs/cgroup")  # where a container's quota stands
START_METHOD = "fork" if sys.platform == "linux" else "spawn"  # of the worker processes

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner from every emulator
cv2.setNumThreads(1)  # threads of OpenCV's own would fight the workers for the cores
with suppress(AttributeError, TypeError):  # with glibc
    # Keep freed memory: to get it anew costs an update thousands of page faults. Measured on two
    # cores in float32: 10 to 19 % of the whole loop.
    M_TRIM_THRESHOLD = -1
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**30)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**25)


class UserError(Exception):
    """A mistake that the user can mend: one line on standard error, exit code 2."""


class WorkerError(Exception):
    """A worker process has ended, below its own traceback: one line, exit code 1."""


def say(line: str) -> None:
    """Prints a line. No training ends because nobody reads it: its terminal may be closed."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = None  # from now on, print() does nothing


# ------------------------------------------------------------------------------------ 1 arguments
PRECISIONS = ("auto", "float32", "bfloat16")

# --resume may change these flags, and --evaluate does not take them from the agent's file: they are
# about this call and not about the run.
MAY_CHANGE = {"cuda", "cuda_graph", "torch_deterministic", "num_workers", "checkpoint_interval"}
MAY_CHANGE |= {"resume", "run_dir", "evaluate", "output", "eval_episodes", "eval_interval"}
MAY_CHANGE |= {"greedy", "capture_video", "play"}
MAY_CHANGE |= {"track", "wandb_project_name", "wandb_entity", "wandb_name"}
RETIRED = {"inference_batch", "start_method"}  # flags that older agents carry


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line. They name the file that the flags come from."""

    source = ""

    def error(self, message: str) -> None:
        origin = f"{self.source}: " if self.source else ""
        line = " ".join(f"{SCRIPT}: error: {origin}{message}".split())
        self.exit(2, f"{line}\n")


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from low to high, both included. NaN never passes; 1e7 is a whole
    number."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
            if kind is int and re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d+", text):
                value = float(text)
                value = int(value) if value.is_integer() else math.nan
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            message = f"must be {what} from {low:.9g} to {high:.9g}, not {text!r}"
            raise argparse.ArgumentTypeError(message)
        return value

    return convert


def flag(group: Any, name: str, default: Any, kind: Any, description: str) -> None:
    """Adds --name to a group of flags. kind: bool (--name and --no-name), str, the possible texts
    as a tuple, or a function that makes a value of a text."""
    if kind is bool:
        options = {"action": argparse.BooleanOptionalAction}
    elif isinstance(kind, tuple):
        options = {"choices": kind}
    elif kind is str:
        options = {"metavar": "TEXT"}
    else:
        options = {"type": kind, "metavar": "N"}
    if default is not None:
        description += " (default: %(default)s)"
    group.add_argument(f"--{name}", default=default, help=description, **options)


def use_saved_flags(parser: Parser, saved_flags: Any, skipped: set[str]) -> None:
    """Makes an earlier run's flags the defaults, all but the skipped ones: as text, so that their
    types check them as if the user had typed them."""
    if not isinstance(saved_flags, dict):
        parser.error("it holds no flags")
    defaults = vars(parser.parse_args([]))
    for name, value in saved_flags.items():
        if name in skipped or name in RETIRED:
            continue
        if name not in defaults:
            parser.error(f"this script has no flag {name!r}")
        default = defaults[name]
        is_switch = isinstance(default, bool)
        if default is not None and (value is None or isinstance(value, bool) != is_switch):
            parser.error(f"the flag {name!r} cannot be {value!r}")
        if value is not None and not is_switch:
            value = str(value)
        parser.set_defaults(**{name: value})


def check_env_id(env_id: str, parser: Parser) -> None:
    """Refuses what is no Atari game, with the nearest names of such."""
    try:
        spec = gym.spec(env_id)  # imports nothing, as gym.make would for "module:Id"
    except (gym.error.Error, ImportError, ValueError):
        games = []
        for name in gym.registry:
            if name.startswith("ALE/") or name.endswith("NoFrameskip-v4"):
                games.append(name)
        near = difflib.get_close_matches(env_id[:50], games, n=3, cutoff=0.4) or games[:1]
        parser.error(f"--env-id {env_id[:50]!r} is unknown; did you mean {' or '.join(near)}?")
    if spec.entry_point != "ale_py.env:AtariEnv" or spec.kwargs.get("continuous"):
        parser.error(f"--env-id {env_id} is not an Atari game, or has continuous actions")


def default_num_groups(args: Args) -> int:
    """2 on a CPU, where small batches cost more; up to 16 on a GPU, where all groups have one size,
    since a CUDA graph has. At least one for each process, and at most one for each game."""
    most = 16 if args.use_gpu else 2
    for num_groups in range(min(most, args.num_envs), args.world_size, -1):
        same_size = args.num_envs % num_groups == 0
        if num_groups % args.world_size == 0 and (same_size or not args.use_gpu):
            return num_groups
    return args.world_size


def available_cores() -> int:
    """The cores that this process may use: of the machine, of its affinity and, in a container, of
    its quota (cgroups, version 2 and 1)."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # version 2: there is no such file, or it says "max"
        quota, period = (CGROUP / "cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    with suppress(OSError, ValueError, ZeroDivisionError):  # version 1: there are no such files
        quota = int((CGROUP / "cpu/cpu.cfs_quota_us").read_text())
        period = int((CGROUP / "cpu/cpu.cfs_period_us").read_text())
        if quota > 0:  # -1: there is no limit
            cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


def check_args(args: Args, parser: Parser) -> None:
    """Checks what one flag alone cannot show, and adds what follows from the flags and the machine.
    All values pass through here, from the command line, from args.json and from a stranger's
    agent.pt."""
    check_env_id(args.env_id, parser)
    if args.precision not in PRECISIONS:
        parser.error(f"--precision must be one of {', '.join(PRECISIONS)}, not {args.precision!r}")
    if args.frame_size < 36 or args.frame_size % 8 != 4:
        parser.error(f"--frame-size must be 8m + 4 and at least 36, not {args.frame_size}")
    if not re.fullmatch(r"[^/\\\x00-\x1f]{1,100}", args.exp_name):
        parser.error("--exp-name must be 1 to 100 characters, without slashes")
    if "" in (args.resume, args.run_dir, args.evaluate, args.output):
        parser.error("--resume, --run-dir, --evaluate and --output need a path: it is empty")
    if args.output is not None and args.evaluate is None:
        parser.error("--output is for --evaluate: training makes a directory in runs/")
    if args.run_dir is not None and (args.evaluate is not None or args.play):
        parser.error("--run-dir is for training: leave out --evaluate and --play")
    if args.resume is not None and (args.evaluate is not None or args.play):
        parser.error("--resume trains on; leave out --evaluate and --play")
    check_processes(args, parser)
    check_sizes(args, parser)
    check_workers(args, parser)


def check_processes(args: Args, parser: Parser) -> None:
    """Adds this process' place among those of torchrun, which tells it in the environment."""
    smallest_values = {"rank": 0, "local_rank": 0, "world_size": 1, "local_world_size": 1}
    for name, smallest in smallest_values.items():
        text = os.environ.get(name.upper(), str(smallest))
        try:
            setattr(args, name, number(int, smallest, 2**20)(text))
        except argparse.ArgumentTypeError as error:
            parser.error(f"{name.upper()} in the environment {error}")
    if args.rank >= args.world_size:
        parser.error("RANK and WORLD_SIZE in the environment: start with torchrun, or unset both")
    if args.world_size > 1 and (args.evaluate is not None or args.play):
        parser.error("--evaluate and --play need no torchrun: WORLD_SIZE is above 1")


def check_sizes(args: Args, parser: Parser) -> None:
    """Adds the sizes of the batch, of its minibatches, and of this process' share of both."""
    args.batch_size = args.num_envs * args.num_steps
    args.minibatch_size = args.batch_size // args.num_minibatches
    args.num_iterations = args.total_timesteps // args.batch_size
    sizes = f"{args.num_envs} environments x {args.num_steps} steps"
    num_parts = args.num_minibatches * args.world_size
    if args.num_envs % args.world_size:
        parser.error(f"--num-envs {args.num_envs} does not divide by {args.world_size} processes")
    if args.batch_size % num_parts:
        share = f"{sizes} / {args.world_size} processes"
        parser.error(f"--num-minibatches {args.num_minibatches} does not divide {share}")
    if args.norm_adv and args.batch_size < 2 * num_parts:
        parser.error("a minibatch of one sample has no spread: --no-norm-adv, or fewer minibatches")
    if args.num_iterations < 1:
        steps = f"--total-timesteps {args.total_timesteps}"
        parser.error(f"{steps} is less than one rollout of {sizes}")
    args.local_batch_size = args.batch_size // args.world_size
    args.local_minibatch_size = args.minibatch_size // args.world_size
    args.local_envs = args.num_envs // args.world_size
    args.first_env = args.rank * args.local_envs  # games are numbered over all processes


def check_workers(args: Args, parser: Parser) -> None:
    """Adds how the games are shared out: the groups, and the workers of this process."""
    args.use_gpu = args.cuda and torch.cuda.device_count() > 0  # asking so does not start CUDA
    if args.num_groups is None:
        args.num_groups = default_num_groups(args)
    if args.num_groups > args.num_envs or args.num_groups % args.world_size:
        limits = f"at most --num-envs {args.num_envs} and a multiple of {args.world_size} processes"
        parser.error(f"--num-groups {args.num_groups} must be {limits}")
    args.cores = max(1, available_cores() // args.local_world_size)
    args.workers = args.num_workers
    if args.workers is None:
        args.workers = args.cores - 1
    args.workers = min(args.workers, args.local_envs)
    if args.workers > 0 and START_METHOD == "spawn" and not IS_FILE:
        parser.error("workers cannot find a script that is no file: give --num-workers 0")


def refuse_another_run(args: Args, saved_args: Args, parser: Parser) -> None:
    """Refuses a flag with which --resume would not continue the run."""
    for name, value in args.flags.items():
        saved_value = getattr(saved_args, name)
        typed = f"--{name.replace('_', '-')}"
        if name == "total_timesteps":
            another = value < saved_value
        else:
            another = value != saved_value and name not in MAY_CHANGE
        if another:
            parser.error(f"--resume: {typed} is {saved_value} in that run, not {value}")


def with_dashes(word: str) -> str:
    """--learning_rate=0.001, as sweeps write it, with the name that the parser knows."""
    name, equals, value = word.partition("=")
    if name.startswith("--"):
        name = name.replace("_", "-")
    return name + equals + value


def read_args(parser: Parser, argv: list[str] | None, saved_flags: Any, source: str) -> Args:
    """What parse_args returns: the parser's flags, of argv and of an earlier run, checked."""
    if argv is None:
        argv = sys.argv[1:] if IS_FILE else []  # a notebook's own, not for us
    argv = [with_dashes(word) for word in argv]
    args, unknown = parser.parse_known_args(argv)
    if args.resume is not None and unknown and not unknown[0].startswith("-"):
        parser.error(f"--resume takes one directory, not also {' '.join(unknown)}")
    if unknown:
        advice = "a switch is --name or --no-name, without a value; --help lists all flags"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; {advice}")
    flag_names = list(vars(args))
    if args.run_dir is not None and args.resume is not None:
        parser.error("--run-dir goes on by itself: leave out --resume")
    if args.run_dir and os.path.exists(f"{args.run_dir}/checkpoint.pt"):
        argv = [*argv, f"--resume={args.run_dir}"]
        args = parser.parse_args(argv)

    skipped = MAY_CHANGE
    if args.resume is not None:
        skipped = {"resume", "run_dir", "evaluate", "output", "play"}
        source = str(Path(args.resume, "args.json"))
        try:
            saved_flags = {**json.loads(Path(source).read_text())["flags"]}  # of a dictionary only
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            parser.error(f"{source} is missing or damaged; give the directory of a run")
    if saved_flags is not None or source:
        parser.source = source
        use_saved_flags(parser, saved_flags, skipped)
        saved_args = parser.parse_args([])
        check_args(saved_args, parser)
        parser.source = ""
        args = parser.parse_args(argv)
    check_args(args, parser)
    args.flags = {name: getattr(args, name) for name in flag_names}
    args.argv = argv
    if args.resume is not None:
        refuse_another_run(args, saved_args, parser)
    return args


def parse_args(argv: list[str] | None = None, saved_flags: Any = None, source: str = "") -> Args:
    """The flags, checked, with what check_args adds. A mistake: one line, exit code 2.

    Each flag is in args.json and in TensorBoard. One that argv does not name has the value of an
    earlier run, if there is one: of --resume's, or of saved_flags, which are from `source`."""
    formatter = partial(argparse.HelpFormatter, max_help_position=36, width=100)
    description = "Proximal Policy Optimization on Atari games"
    parser = Parser(SCRIPT, None, description, formatter_class=formatter, allow_abbrev=False)
    count = number(int, 1, 2**20)
    natural = number(int, 0, 2**53)
    probability = number(float, 0, 1)
    positive = number(float, 1e-37, 1e37)  # what float32 can hold
    weight = number(float, 0, 1e37)

    run = parser.add_argument_group("run (a step is one decision: 4 emulator frames by default)")
    flag(run, "env-id", "ALE/Breakout-v5", str, "ALE/<Game>-v5 (sticky) or <Game>NoFrameskip-v4")
    flag(run, "seed", 1, number(int, 0, 2**31 - 1), "of weights, games, actions and shuffling")
    flag(run, "total-timesteps", 10_000_000, natural, "in steps; may grow with --resume")
    flag(run, "exp-name", PATH.stem, str, "goes into the name of the run directory")
    flag(run, "precision", "auto", PRECISIONS, "of the network; auto: bfloat16 in hardware")
    flag(run, "num-groups", None, count, "groups of games that take turns (default: 2, GPU: 16)")

    machine = parser.add_argument_group("machine and files (may change with --resume)")
    flag(machine, "cuda", True, bool, "use a GPU if there is one")
    flag(machine, "cuda-graph", True, bool, "on a GPU, launch policy and update as graphs")
    flag(machine, "torch-deterministic", True, bool, "deterministic algorithms on a GPU too")
    flag(machine, "num-workers", None, natural, "processes that play games (default: cores - 1)")
    flag(machine, "run-dir", None, str, "train in this directory; go on if it holds a checkpoint")
    flag(machine, "resume", None, str, "go on with the run in this directory, with its flags")
    flag(machine, "checkpoint-interval", 300, natural, "iterations; 0: only at the end")

    watch = parser.add_argument_group("evaluate, film, play, track (may change with --resume)")
    flag(watch, "evaluate", None, str, "play full games with the agent of a run or of a file")
    flag(watch, "output", None, str, "where --evaluate writes (default: to a run of yours)")
    flag(watch, "eval-episodes", 10, number(int, 0, 10_000), "full games per evaluation; 0: none")
    flag(watch, "greedy", False, bool, "evaluate with the most probable action, no sample")
    flag(watch, "eval-interval", 0, natural, "evaluate every N steps, too; 0: only at the end")
    flag(watch, "capture-video", False, bool, "film one game of each evaluation")
    flag(watch, "play", False, bool, "play yourself; with --evaluate: watch the agent")
    flag(watch, "track", False, bool, "mirror the run to Weights & Biases (pip install wandb)")
    flag(watch, "wandb-project-name", "ppo-atari", str, "project")
    flag(watch, "wandb-entity", None, str, "team or user")
    flag(watch, "wandb-name", None, str, "name of the run (default: the run directory's)")

    ppo = parser.add_argument_group("PPO")
    flag(ppo, "num-envs", 8, count, "games played side by side, over all processes")
    flag(ppo, "num-steps", 128, count, "steps per game in one rollout")
    flag(ppo, "learning-rate", 2.5e-4, positive, "of Adam")
    flag(ppo, "anneal-lr", True, bool, "let the learning rate fall linearly to 0")
    flag(ppo, "gamma", 0.99, probability, "discount per step")
    flag(ppo, "gae-lambda", 0.95, probability, "of generalized advantage estimation")
    flag(ppo, "num-minibatches", 4, count, "per epoch")
    flag(ppo, "update-epochs", 4, count, "passes over each rollout")
    flag(ppo, "norm-adv", True, bool, "normalize the advantages of each minibatch")
    flag(ppo, "clip-coef", 0.1, positive, "of the probability ratio and of the value")
    flag(ppo, "clip-vloss", True, bool, "clip the value loss")
    flag(ppo, "ent-coef", 0.01, weight, "of the entropy bonus")
    flag(ppo, "ent-coef-final", None, weight, "anneal the entropy bonus linearly to this")
    flag(ppo, "vf-coef", 0.5, weight, "of the value loss")
    flag(ppo, "max-grad-norm", 0.5, positive, "clip the global gradient norm to this")
    flag(ppo, "target-kl", None, positive, "stop once an epoch's last minibatch has a larger KL")

    atari = parser.add_argument_group("the nine Atari details, and Machado et al. (2018)")
    flag(atari, "noop-max", 30, number(int, 0, 10_000), "frames of doing nothing at a game's start")
    flag(atari, "frame-skip", 4, number(int, 1, 120), "emulator frames per step")
    flag(atari, "episodic-life", True, bool, "a lost life ends the episode, not the game")
    flag(atari, "fire-reset", True, bool, "press FIRE to start, in games that have it")
    flag(atari, "frame-size", 84, number(int, 1, 1020), "side of the image: 8m + 4, at least 36")
    flag(atari, "clip-reward", True, bool, "learn from the sign of the reward")
    flag(atari, "frame-stack", 4, number(int, 1, 64), "frames that the agent sees at once")
    flag(atari, "shared-network", True, bool, "policy and value share the network")
    flag(atari, "scale-obs", True, bool, "scale pixels to [0, 1]")
    flag(atari, "full-action-space", False, bool, "all of the console's actions, mostly 18")
    flag(atari, "mode", None, number(int, 0, 2**31 - 1), "of the game (default: its first)")
    flag(atari, "difficulty", None, number(int, 0, 2**31 - 1), "of the game (default: its first)")
    flag(atari, "max-episode-frames", None, count, "cut longer games (default: the id's, 108000)")
    flag(atari, "repeat-action-probability", None, probability, "sticky (default: the id's)")
    return read_args(parser, argv, saved_flags, source)


# ---------------------------------------------------------------------------------- 2 environment
def find_action(env: gym.Env, meaning: str) -> int | None:
    """The index of the action with this meaning, such as "FIRE", or None if there is none."""
    meanings = env.unwrapped.get_action_meanings()
    return meanings.index(meaning) if meaning in meanings else None


def step_in_reset(env: gym.Env, action: int, info: dict) -> tuple[np.ndarray, dict]:
    """One step within a reset; resets again should it end the episode, and hands on
    info["episode"] of that game."""
    obs, _, terminated, truncated, step_info = env.step(action)
    if terminated or truncated:
        obs, reset_info = env.reset()
        step_info = step_info | reset_info
    return obs, info | step_info


class NoopResetEnv(gym.Wrapper):
    """[atari 1] Starts games after 1 to noop_max frames of NOOP (Mnih et al., 2015). The two games
    without a NOOP get action 0 in its place."""

    def __init__(self, env: gym.Env, noop_max: int = 30):
        super().__init__(env)
        self.noop_max = noop_max
        self.noop = find_action(env, "NOOP") or 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        for _ in range(self.np_random.integers(1, self.noop_max + 1)):
            obs, info = step_in_reset(self.env, self.noop, info)
        return obs, info


class MaxAndSkipEnv(gym.Wrapper):
    """[atari 2] Repeats an action for `skip` frames, sums the rewards and returns the pixelwise
    maximum of the last two RGB screens [H, W, 3], since some objects are drawn in every other frame
    only (Mnih et al., 2015). No other screens are drawn."""

    def __init__(self, env: gym.Env, skip: int = 4):
        super().__init__(env)
        self.ale = env.unwrapped.ale
        self.skip = skip
        self.actions = [ale_py.Action[meaning] for meaning in env.unwrapped.get_action_meanings()]

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        ale = self.ale
        reward = 0.0
        screen_before_last = None
        for frame in range(self.skip):
            reward += ale.act(self.actions[action])
            over = ale.game_over()  # terminated or truncated
            if over:
                break
            if frame == self.skip - 2:
                screen_before_last = ale.getScreenRGB()
        screen = ale.getScreenRGB()
        if screen_before_last is not None and not over:
            screen = np.maximum(screen, screen_before_last, out=screen)
        return screen, reward, ale.game_over(with_truncation=False), ale.game_truncated(), {}


class EpisodicLifeEnv(gym.Wrapper):
    """[atari 3] Ends the episode when a life is lost; reset() then goes on in the same game, unless
    it gets a seed (Mnih et al., 2015). A counter that falls to 0 is no lost life: some games
    (Q*bert) show 0 for a while before they end."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.ale = env.unwrapped.ale
        self.noop = find_action(env, "NOOP") or 0
        self.lives = 0
        self.game_over = True

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.game_over = terminated or truncated
        lives_before = self.lives
        self.lives = self.ale.lives()
        life_lost = 0 < self.lives < lives_before
        return obs, reward, terminated or life_lost, truncated, info

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        if self.game_over or kwargs.get("seed") is not None:
            obs, info = self.env.reset(**kwargs)
        else:
            # This step, too, can end the game (River Raid).
            obs, info = step_in_reset(self.env, self.noop, {})
        self.lives = self.ale.lives()
        self.game_over = False
        return obs, info


class FireResetEnv(gym.Wrapper):
    """[atari 4] Presses FIRE, then action 2, at each reset: some games stand still until then
    (openai/baselines)."""

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        for action in (find_action(self.env, "FIRE"), 2):
            obs, info = step_in_reset(self.env, action, info)
        return obs, info


class WarpFrame(gym.ObservationWrapper):
    """[atari 5] RGB screen [H, W, 3] to luminance, then to uint8 [size, size] by area averaging
    (Mnih et al., 2015)."""

    def __init__(self, env: gym.Env, size: int = 84):
        super().__init__(env)
        self.size = size
        self.observation_space = gym.spaces.Box(0, 255, (size, size), np.uint8)

    def observation(self, screen: np.ndarray) -> np.ndarray:
        luminance = cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY)
        return cv2.resize(luminance, (self.size, self.size), interpolation=cv2.INTER_AREA)


class ClipRewardEnv(gym.RewardWrapper):
    """[atari 6] The sign of the reward: -1, 0 or +1, so that one learning rate suits all games
    (Mnih et al., 2015)."""

    def reward(self, reward: float) -> float:
        return float((reward > 0) - (reward < 0))


class FrameStack(gym.ObservationWrapper):
    """[atari 7] The last k frames [k, L, L], oldest first; after a reset, the first one k times
    (Mnih et al., 2015). Of frames [C, L, L]: [k * C, L, L]."""

    def __init__(self, env: gym.Env, k: int = 4):
        super().__init__(env)
        space = env.observation_space
        self.frames = np.zeros((k, *space.shape), space.dtype)
        shape = (math.prod(self.frames.shape[:-2]), *space.shape[-2:])
        low = space.low.min()
        high = space.high.max()
        self.observation_space = gym.spaces.Box(low, high, shape, space.dtype)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        self.frames[:] = obs
        return self.observation(obs), info

    def observation(self, frame: np.ndarray) -> np.ndarray:
        self.frames = np.concatenate([self.frames[1:], frame[None]])
        return self.frames.reshape(self.observation_space.shape).copy()


def make_emulator(args: Args, render_mode: str | None) -> gym.Env:
    """The game without any wrapper. UserError for a mode or a difficulty that it has not."""
    kwargs = {"full_action_space": args.full_action_space, "render_mode": render_mode}
    if args.repeat_action_probability is not None:
        kwargs["repeat_action_probability"] = args.repeat_action_probability
    if args.max_episode_frames is not None:
        kwargs["max_num_frames_per_episode"] = args.max_episode_frames
    # frameskip=1: the ids' own skipping of frames would come on top of MaxAndSkipEnv's.
    make = partial(gym.make, args.env_id, frameskip=1, disable_env_checker=True, **kwargs)
    try:
        return make(mode=args.mode, difficulty=args.difficulty).unwrapped
    except RuntimeError:  # the emulator has no such mode or difficulty
        ale = make().unwrapped.ale
        modes = f"--mode {ale.getAvailableModes()}"
        difficulties = f"--difficulty {ale.getAvailableDifficulties()}"
        raise UserError(f"{args.env_id} has {modes} and {difficulties}") from None


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """The full stack, in openai/baselines' order; every program here plays through it.

    Observations are uint8 [frame_stack, frame_size, frame_size]. info["episode"] = {"r", "l", "t"}
    appears once per game, when it is really over: return before clipping, length in steps,
    seconds. What wrappers remember is found and checkpointed: see remembered()."""
    env = make_emulator(args, render_mode)
    if args.noop_max > 0:
        env = NoopResetEnv(env, args.noop_max)
    env = MaxAndSkipEnv(env, args.frame_skip)  # steps the emulator itself, and no wrapper beneath
    env = gym.wrappers.RecordEpisodeStatistics(env)  # beneath lives and clipping, as papers score
    env.saved = ("episode_returns", "episode_lengths")  # and not its clock
    if args.episodic_life:
        env = EpisodicLifeEnv(env)
    if args.fire_reset and find_action(env, "FIRE") is not None:
        env = FireResetEnv(env)
    env = WarpFrame(env, args.frame_size)
    if args.clip_reward:
        env = ClipRewardEnv(env)
    return FrameStack(env, args.frame_stack)


def step_and_reset(env: gym.Env, action: int) -> tuple:
    """One step and, where it ends the episode, the reset that begins the next one.

    Returns obs, which after a reset is that of the new episode; reward, terminated and truncated;
    final_obs, which is what the step itself showed; and the (return, length) of each game that was
    really over. The steps of a reset can end one, too: see step_in_reset."""
    final_obs, reward, terminated, truncated, info = env.step(action)
    obs = final_obs
    infos = [info]
    games = []
    if terminated or truncated:
        game_return = float(env.get_wrapper_attr("episode_returns"))
        length = int(env.get_wrapper_attr("episode_lengths"))
        obs, reset_info = env.reset()
        infos.append(reset_info)
        began_anew = env.get_wrapper_attr("episode_lengths") < length
        if began_anew and "episode" not in info and "episode" not in reset_info:
            games.append((game_return, length))  # a wrapper further up, such as TimeLimit, cut it
    for one in infos:
        if "episode" in one:
            games.append((float(one["episode"]["r"]), int(one["episode"]["l"])))
    return obs, reward, terminated, truncated, final_obs, games


def pack(value: Any) -> Any:
    """A copy of the value that torch.load(weights_only=True) accepts: of numbers, text, tensors,
    NumPy's arrays, generators, whatever has a state_dict, and lists, tuples, sets, deques and
    dictionaries of these. TypeError for anything else, since no checkpoint could be loaded."""
    if hasattr(value, "state_dict"):
        return pack(value.state_dict())
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return pack(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return pack(value.get_state())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        numbers = value.tobytes().decode("latin-1")
        return {"packed array": numbers, "dtype": value.dtype.str, "shape": value.shape}
    if isinstance(value, bytes):
        return {"packed bytes": value.decode("latin-1")}
    if isinstance(value, set):
        return {"packed set": [pack(part) for part in value]}
    if isinstance(value, deque):
        return {"packed deque": [pack(part) for part in value], "maxlen": value.maxlen}
    if isinstance(value, dict):
        return {pack_key(key): pack(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [pack(part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}: see pack()")


def pack_key(key: Any) -> Any:
    """The key of a dictionary, with Python's numbers and text in place of NumPy's."""
    if isinstance(key, tuple):
        return tuple(pack_key(part) for part in key)
    if isinstance(key, np.generic):
        return key.item()
    return key if isinstance(key, bytes) else pack(key)


def unpack(saved: Any, current: Any = None, in_place: bool = True) -> Any:
    """What pack() kept, as it was. It is put back into `current` if that is a generator, has a
    state_dict or, unless in_place is False, is a tensor or a dictionary, so that whoever else holds
    it, such as an optimizer or a CUDA graph, sees it. All else is new."""
    if hasattr(current, "load_state_dict"):
        current.load_state_dict(unpack(saved))
    elif isinstance(current, torch.Generator):
        current.set_state(saved)
    elif isinstance(current, np.random.Generator):
        current.bit_generator.state = unpack(saved)
    elif isinstance(current, np.random.RandomState):
        current.set_state(unpack(saved))
    elif isinstance(current, random.Random):
        current.setstate(saved)
    elif isinstance(saved, Tensor):
        same_shape = isinstance(current, Tensor) and current.shape == saved.shape
        if not in_place or not same_shape or current.dtype != saved.dtype:
            return saved.clone()
        current.detach().copy_(saved)
    elif isinstance(saved, dict) and "packed array" in saved:
        array = np.frombuffer(saved["packed array"].encode("latin-1"), saved["dtype"])
        return array.reshape(saved["shape"]).copy()[()]  # [()]: a number of NumPy's, if it was one
    elif isinstance(saved, dict) and "packed bytes" in saved:
        return saved["packed bytes"].encode("latin-1")
    elif isinstance(saved, dict) and "packed set" in saved:
        return set(unpack(saved["packed set"]))
    elif isinstance(saved, dict) and "packed deque" in saved:
        return deque(unpack(saved["packed deque"]), saved["maxlen"])
    elif isinstance(saved, dict):
        if not isinstance(current, dict):
            current = {}
        elif not in_place:
            current = copy.copy(current)  # of the same type, such as a Counter
        parts = {key: unpack(part, current.get(key), in_place) for key, part in saved.items()}
        current.clear()
        current.update(parts)
    elif isinstance(saved, (list, tuple)):
        old_parts = list(current) if isinstance(current, type(saved)) else []
        old_parts += [None] * (len(saved) - len(old_parts))
        parts = [unpack(part, old_part, in_place) for part, old_part in zip(saved, old_parts)]
        if hasattr(current, "_make"):  # a named tuple
            return current._make(parts)
        return parts if isinstance(saved, list) else tuple(parts)
    else:
        return saved
    return current


def wrappers_of(env: gym.Env) -> list[gym.Env]:
    """The wrappers of an environment, from the outermost on."""
    wrappers = []
    while env is not env.unwrapped:
        wrappers.append(env)
        env = env.env
    return wrappers


def has_attributes(value: Any) -> bool:
    """Whether an object's attributes can be part of what a wrapper remembers."""
    if inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value):
        return False
    frozen = is_dataclass(value) and value.__dataclass_params__.frozen
    if frozen or isinstance(value, (enum.Enum, Args)):
        return False  # they are constants
    foreign = ("ale_py", "gymnasium.envs", "torch", "logging", "threading")
    return hasattr(value, "__dict__") and not type(value).__module__.startswith(foreign)


def remembered(thing: Any, path: str, visited: set[int]) -> dict[str, Any]:
    """What an object remembers, packed, by its path, such as "1.return_rms.mean": those of its
    attributes that pack() can keep, and the same of the objects among the others. A wrapper that
    names its attributes in `saved` is taken at its word."""
    visited.add(id(thing))
    values = {}
    if hasattr(thing, "saved"):
        for name in thing.saved:
            value = thing
            for part in name.split("."):
                value = getattr(value, part)
            values[f"{path}.{name}"] = pack(value)
        return values
    for name, value in vars(thing).items():
        if isinstance(value, (gym.Env, gym.Space)):
            continue
        try:
            values[f"{path}.{name}"] = pack(value)
        except TypeError:
            if has_attributes(value) and id(value) not in visited:
                values |= remembered(value, f"{path}.{name}", visited)
    return values


def get_env_state(env: gym.Env) -> dict[str, Any]:
    """Everything that the future of a game depends on, packed."""
    wrappers = {}
    visited = set()
    for i, wrapper in enumerate(wrappers_of(env)):
        wrappers |= remembered(wrapper, str(i), visited)
    emulator = env.unwrapped.ale.cloneState(include_rng=True).serialize()
    return pack({"emulator": emulator, "np_random": env.np_random}) | {"wrappers": wrappers}


def set_env_state(env: gym.Env, state: dict[str, Any]) -> None:
    """The inverse of get_env_state, for an environment of the same flags that was reset once. The
    emulator is native code that believes these bytes: forged ones do harm."""
    ale = env.unwrapped.ale
    ale.reset_game()
    ale.restoreState(ale_py.ALEState(unpack(state["emulator"])))
    unpack(state["np_random"], env.np_random)
    wrappers = wrappers_of(env)
    for path, saved in state["wrappers"].items():
        index, *names, last = path.split(".")
        owner = wrappers[int(index)]
        for name in names:
            owner = getattr(owner, name)
        current = getattr(owner, last, None)  # not in place: two names may begin as one object
        setattr(owner, last, unpack(saved, current, in_place=False))


def forget_last_action(env: gym.Env) -> None:
    """Makes the emulator's last action a NOOP. Sticky actions repeat it and no saved state contains
    it, so each rollout starts like this, resumed or not. A frame fails to replace it with the
    sticky probability p, and all n of them with p^n < 10^-11."""
    ale = env.unwrapped.ale
    sticky = env.unwrapped.spec.kwargs["repeat_action_probability"]
    if sticky > 0:
        state = ale.cloneState(include_rng=True)
        for _ in range(math.ceil(-11 / math.log10(min(sticky, 0.99)))):
            ale.act(ale_py.Action.NOOP)
        ale.restoreState(state)


# ---------------------------------------------------------------------------------------- 3 agent
def layer_init(layer: nn.Module, std: float = math.sqrt(2), bias_const: float = 0.0) -> nn.Module:
    """[core 2] Orthogonal weights scaled by std and constant biases, in place."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


class PixelConv2d(nn.Conv2d):
    """A first layer for pixels of 0 to 255. It scales its weights in place of every pixel, which
    comes to the same."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype) * (1 / 255), self.bias.to(x.dtype))


class Flatten(nn.Module):
    """[B, C, H, W] to [B, H * W * C]: channels lie innermost in memory, so that this order costs no
    copy."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def nature_cnn(frame_stack: int, frame_size: int, scale_obs: bool) -> nn.Sequential:
    """[atari 8] The network of Mnih et al. (2015): pixels [B, frame_stack, L, L] to [B, 512]. With
    L = 8m + 4, the convolutions lose no pixels."""
    first = PixelConv2d if scale_obs else nn.Conv2d  # [atari 9]
    side = frame_size // 8 - 3  # 8m + 4 -> 2m -> m - 1 -> m - 3
    return nn.Sequential(
        layer_init(first(frame_stack, 32, 8, stride=4)),
        nn.ReLU(inplace=True),
        layer_init(nn.Conv2d(32, 64, 4, stride=2)),
        nn.ReLU(inplace=True),
        layer_init(nn.Conv2d(64, 64, 3, stride=1)),
        nn.ReLU(inplace=True),
        Flatten(),
        layer_init(nn.Linear(64 * side * side, 512)),
        nn.ReLU(inplace=True),
    )


class Agent(nn.Module):
    """A policy head and a value head on networks that map pixels of 0 to 255, [B, *obs_shape], to
    [B, any width]. By default the heads share one network; shared_network=False gives the value
    head its own [core 13]."""

    def __init__(
        self,
        obs_shape: tuple,
        num_actions: int,
        make_network: Callable,
        shared_network: bool = True,
    ):
        super().__init__()
        self.dtype = torch.float32  # of the network's arithmetic; the heads compute in float32
        self.greedy = False  # whether it takes the most probable action in place of a sample
        self.network = make_network()
        self.critic_network = None if shared_network else make_network()
        # A trial tells the width of the network's output. It is made with a copy in eval mode, so
        # that buffers of the network itself, such as running means, stay as they are.
        trial_network = copy.deepcopy(self.network).eval()
        with torch.no_grad():
            width = trial_network(torch.zeros(1, *obs_shape)).shape[1]
        self.actor = layer_init(nn.Linear(width, num_actions), std=0.01)  # nearly uniform at first
        self.critic = layer_init(nn.Linear(width, 1), std=1)
        self.to(memory_format=torch.channels_last)  # the first convolution is several times faster

    def features(self, network: nn.Module, obs: Tensor) -> Tensor:
        """float32 [B, width]."""
        x = obs.to(self.dtype).contiguous(memory_format=torch.channels_last)
        weights_differ = next(network.parameters()).dtype != self.dtype  # never in the acting copy
        autocast = torch.autocast(obs.device.type, self.dtype) if weights_differ else nullcontext()
        with autocast:
            return network(x).float()

    def get_action_and_value(
        self, obs: Tensor, action: Tensor | None = None, uniform: Tensor | None = None
    ) -> Tensors:
        """action int64 [B], its log_prob [B], the policy's entropy [B] and the value [B]. Without
        an action it samples one: the distribution function, inverted at uniform [B], which are
        random numbers in [0, 1). They come from outside, where each game has a generator of its
        own, so that a game's actions do not depend on which games it is grouped with."""
        hidden = self.features(self.network, obs)
        critic_hidden = hidden
        if self.critic_network is not None:
            critic_hidden = self.features(self.critic_network, obs)
        value = self.critic(critic_hidden).flatten()
        log_probs = self.actor(hidden).log_softmax(-1)
        probs = log_probs.exp()
        if action is None and self.greedy:
            action = probs.argmax(-1)
        if action is None:
            if uniform is None:
                uniform = torch.rand(len(obs), device=obs.device)
            action = (probs.cumsum(-1) <= uniform[:, None]).sum(-1)
            action.clamp_(max=probs.shape[-1] - 1)  # the sum can stay below 1 by rounding
        log_prob = log_probs.gather(-1, action[:, None]).squeeze(-1)
        entropy = -(probs * log_probs).sum(-1)
        return {"action": action, "log_prob": log_prob, "entropy": entropy, "value": value}


def make_agent(args: Args, env: gym.Env) -> Agent:
    """The agent that the flags describe, for this environment; every program here builds it so."""
    obs_shape = env.observation_space.shape
    make_network = partial(nature_cnn, obs_shape[0], obs_shape[1], args.scale_obs)
    return Agent(obs_shape, int(env.action_space.n), make_network, args.shared_network)


def choose_dtype(args: Args, device: torch.device) -> torch.dtype:
    """bfloat16 only where the hardware multiplies it: elsewhere it would be slower than float32."""
    if args.precision != "auto":
        return getattr(torch, args.precision)
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        has_bfloat16 = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if has_bfloat16 else torch.float32


def inference_copy(agent: Agent, dtype: torch.dtype, device: torch.device) -> Agent:
    """A copy that acts: in eval mode, with the networks' weights kept in the dtype they compute in.
    Heads, and any other module, stay in float32. load_state_dict() brings it the agent's parameters
    and buffers."""
    policy = copy.deepcopy(agent).requires_grad_(False).eval().to(device)
    policy.dtype = dtype
    policy.network.to(dtype)
    if policy.critic_network is not None:
        policy.critic_network.to(dtype)
    if dtype == torch.float32 and device.type == "cpu":
        for layer in policy.modules():
            if isinstance(layer, nn.Linear):  # small batches: contiguous columns are twice as fast
                layer.weight.data = layer.weight.t().contiguous().t()
    return policy


# ------------------------------------------------------------------------ 4 parallel environments
class Games:
    """Some of a run's games, in a worker process or in the learner itself. They read their actions
    from arrays [N, ...] that all processes share, and what they show lies there, too."""

    def __init__(self, args: Args, arrays: dict[str, np.ndarray], indices: list[int]):
        self.arrays = arrays
        self.envs = {}
        for i in indices:
            seed_sequence = np.random.SeedSequence([args.seed, args.first_env + i])
            seed = int(seed_sequence.generate_state(1)[0]) >> 1  # below 2^31, as the emulator asks
            self.envs[i] = make_env(args)
            self.arrays["obs"][i], _ = self.envs[i].reset(seed=seed)
            self.arrays["done"][i] = True

    def begin_rollout(self) -> None:
        for env in self.envs.values():
            forget_last_action(env)

    def step(self, indices: list[int]) -> list[tuple]:
        """Steps these games. Returns those that were over, as (i, return, length)."""
        ended = []
        for i in indices:
            action = int(self.arrays["action"][i])
            result = step_and_reset(self.envs[i], action)
            obs, reward, terminated, truncated, final_obs, games = result
            self.arrays["obs"][i] = obs
            self.arrays["reward"][i] = reward
            self.arrays["done"][i] = terminated or truncated
            self.arrays["truncated"][i] = truncated and not terminated
            if truncated:
                self.arrays["final_obs"][i] = final_obs
            for game_return, length in games:
                ended.append((i, game_return, length))
        return ended

    def get_state(self) -> dict[int, dict]:
        return {i: get_env_state(env) for i, env in self.envs.items()}

    def set_state(self, states: dict[int, dict]) -> None:
        for i, env in self.envs.items():
            set_env_state(env, states[i])


def shared_arrays(buffers: dict, layout: dict) -> dict[str, np.ndarray]:
    """NumPy arrays in shared memory. layout: the shape and the type of each."""
    arrays = {}
    for name, (shape, dtype) in layout.items():
        arrays[name] = np.frombuffer(buffers[name], dtype).reshape(shape)
    return arrays


def exit_with_learner() -> None:
    """A worker cannot see by its pipe that the learner was killed: it holds the other end, too."""
    multiprocessing.parent_process().join()
    os._exit(1)


def worker_main(
    connection: Any, args: Args, buffers: dict, layout: dict, indices: list[int]
) -> None:
    """A worker process: calls the methods of its Games that it is sent, and answers with what they
    return, for as long as the learner lives."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)  # a terminal sends them to all; the learner decides
    threading.Thread(target=exit_with_learner, daemon=True).start()
    if hasattr(os, "SCHED_BATCH"):  # a worker that wakes up shall not push the learner off its core
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    games = Games(args, shared_arrays(buffers, layout), indices)
    connection.send("ready")
    while True:
        method, *arguments = connection.recv()
        connection.send(getattr(games, method)(*arguments))


class Worker:
    """A worker process as the learner sees it."""

    def __init__(self, index: int, process: Any, connection: Any, games: list[int]):
        self.index = index
        self.process = process
        self.connection = connection
        self.games = games
        self.groups_asked = deque()  # the groups whose steps it has not answered yet

    def send(self, *message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError:
            self.fail()

    def recv(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.fail()

    def fail(self) -> None:
        self.process.join()
        code = self.process.exitcode
        raise WorkerError(f"worker {self.index} ended with exit code {code}")


class ParallelEnvs:
    """[core 1] The games of this process in groups that take turns: while the policy thinks about
    one group, worker processes play the others (alternating sampling: Stooke and Abbeel, 2019).

    Groups decide what the policy sees at once; how many workers play changes no number. What the
    games show now: obs [N, *obs_shape], reward [N], done [N] (obs begins an episode), truncated [N]
    (the episode before was cut by a time limit) and, of those, final_obs [N, *obs_shape].

    Without workers, the learner plays all games. Beside a single worker it plays a quarter of each
    group, one game whenever it would otherwise wait, so that two cores are equally busy; in
    float32, where the policy takes longer, of the first group only."""

    def __init__(self, args: Args, observation_space: gym.Space):
        num_games = args.local_envs
        num_groups = args.num_groups // args.world_size
        self.first_env = args.first_env
        self.fixed_order = not args.use_gpu
        obs_layout = ((num_games, *observation_space.shape), observation_space.dtype)
        layout = {
            "obs": obs_layout,
            "final_obs": obs_layout,
            "action": ((num_games,), np.dtype(np.int64)),
            "reward": ((num_games,), np.dtype(np.float32)),
            "done": ((num_games,), np.dtype(np.float32)),
            "truncated": ((num_games,), np.dtype(np.bool_)),
        }
        context = multiprocessing.get_context(START_METHOD)
        buffers = {}
        for name, (shape, dtype) in layout.items():
            buffers[name] = context.RawArray("b", math.prod(shape) * dtype.itemsize)
        arrays = shared_arrays(buffers, layout)
        self.obs = torch.from_numpy(arrays["obs"])
        self.final_obs = torch.from_numpy(arrays["final_obs"])
        self.actions = torch.from_numpy(arrays["action"])
        self.reward = torch.from_numpy(arrays["reward"])
        self.done = torch.from_numpy(arrays["done"])
        self.truncated = torch.from_numpy(arrays["truncated"])

        policy_is_quick = choose_dtype(args, CPU) == torch.bfloat16
        self.groups = []
        own = []  # the games that the learner plays
        for part in np.array_split(range(num_games), num_groups):
            group = range(int(part[0]), int(part[-1]) + 1)
            self.groups.append(slice(group.start, group.stop))
            if args.workers == 0:
                own += group
            elif args.workers == 1 and (policy_is_quick or not own):
                own += group[: len(group) // 4]
        others = [i for i in range(num_games) if i not in own]

        self.own_games = None
        self.own_due = deque()  # (group, game) that the learner still has to step
        self.playing = [0] * num_groups  # answers and own games that are due, for each group
        self.turn = [0] * num_groups
        self.ended = []  # (t, i, return, length)
        self.workers = []
        try:
            for index in range(args.workers):
                share = np.array_split(others, args.workers)[index].tolist()
                connection, worker_connection = context.Pipe()
                target_args = (worker_connection, args, buffers, layout, share)
                process = context.Process(target=worker_main, args=target_args, daemon=True)
                self.workers.append(Worker(index, process, connection, share))
                process.start()
                worker_connection.close()  # so that recv() notices the end of the worker
            if own:
                self.own_games = Games(args, arrays, own)
            for worker in self.workers:
                worker.recv()  # it has begun its games
        except BaseException:
            self.close()
            raise

    def turns(self, num_steps: int) -> Iterator[tuple[int, slice]]:
        """One rollout: (t, group) for t = 0 ... num_steps, as soon as the group shows observation
        t. Whoever iterates calls step(group, actions) at each turn but the group's last.

        On a CPU the groups come in fixed order, so that what the loop draws or averages is the same
        in every run. On a GPU they come as they get ready: there are more of them, and one game
        that is reset would hold up all others."""
        self.call("begin_rollout")
        self.turn = [-1] * len(self.groups)
        queue = list(range(len(self.groups)))
        while queue:
            candidates = queue[:1] if self.fixed_order else queue
            g = self.wait_for_one(candidates)
            self.turn[g] += 1
            queue.remove(g)
            if self.turn[g] < num_steps:
                queue.append(g)
            yield self.turn[g], self.groups[g]

    def step(self, group: slice, actions: Tensor) -> None:
        """Asks for a step of the group's games with these actions [games of the group]."""
        self.actions[group] = actions
        g = self.groups.index(group)
        for worker in self.workers:
            share = [i for i in worker.games if group.start <= i < group.stop]
            if share:
                worker.send("step", share)
                worker.groups_asked.append(g)
                self.playing[g] += 1
        if self.own_games is not None:
            for i in self.own_games.envs:
                if group.start <= i < group.stop:
                    self.own_due.append((g, i))
                    self.playing[g] += 1

    def wait_for_one(self, candidates: list[int]) -> int:
        """The first of these groups whose games have all made their step. While none has, it takes
        the workers' answers, and steps a game of its own if there are none."""
        while True:
            for g in candidates:
                if self.playing[g] == 0:
                    return g
            timeout = 0 if self.own_due else None
            connections = [worker.connection for worker in self.workers]
            ready = multiprocessing.connection.wait(connections, timeout)
            for worker in self.workers:
                if worker.connection in ready:
                    ended = worker.recv()
                    self.note_step(worker.groups_asked.popleft(), ended)
            if not ready:
                g, i = self.own_due.popleft()
                self.note_step(g, self.own_games.step([i]))

    def note_step(self, g: int, ended: list[tuple]) -> None:
        """Notes that one part of a group has made its step, and the games that were over."""
        self.playing[g] -= 1
        for i, game_return, length in ended:
            self.ended.append((self.turn[g], self.first_env + i, game_return, length))

    def take_ended(self) -> list[tuple]:
        """The games that were over since the last call, as (t, i, return, length), in this order
        and not in that of their ends, which is a matter of luck. i counts over all processes."""
        ended = sorted(self.ended)
        self.ended = []
        return ended

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of the Games in every process, with these arguments."""
        for worker in self.workers:
            worker.send(method, *arguments)
        results = []
        if self.own_games is not None:
            results.append(getattr(self.own_games, method)(*arguments))
        for worker in self.workers:
            results.append(worker.recv())
        return results

    def state_dict(self) -> dict[str, Any]:
        states = {}
        for part in self.call("get_state"):
            states |= part
        return {"obs": self.obs, "done": self.done, "games": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.obs.copy_(state["obs"])
        self.done.copy_(state["done"])
        self.call("set_state", state["games"])

    def close(self) -> None:
        for worker in self.workers:
            if worker.process.pid is not None:  # it has been started
                worker.process.kill()
                worker.process.join()
            worker.connection.close()


# ------------------------------------------------------------------------------------------ 5 PPO
def draw_uniform(generators: list[np.random.Generator], num_steps: int) -> Tensor:
    """Random numbers in [0, 1) for the actions of a rollout, [T + 1, N]; each game has a generator.
    Row T is row 0 again: of what comes after the last step, only the value counts."""
    numbers = [generator.random(num_steps, np.float32) for generator in generators]
    uniform = torch.from_numpy(np.stack(numbers, axis=1))
    return torch.cat([uniform, uniform[:1]])


def compute_gae(
    rewards: Tensor, values: Tensor, dones: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """[core 5] Generalized advantage estimation (Schulman et al., 2016): advantages and returns,
    both [T, N]. rewards are [T, N], values and dones [T + 1, N]; dones[t] is 1 where observation t
    starts a new episode."""
    next_nonterminal = 1 - dones[1:]
    deltas = rewards + gamma * values[1:] * next_nonterminal - values[:-1]
    decays = gamma * gae_lambda * next_nonterminal
    advantages = torch.empty_like(rewards)
    # NumPy's arrays, of the same memory: its small operations take a tenth of the time of torch's.
    numpy_advantages = advantages.numpy()
    numpy_deltas = deltas.numpy()
    numpy_decays = decays.numpy()
    advantage = np.zeros_like(numpy_deltas[0])
    for t in reversed(range(len(rewards))):
        advantage = numpy_deltas[t] + numpy_decays[t] * advantage
        numpy_advantages[t] = advantage
    return advantages, advantages + values[:-1]


def all_mean(tensor: Tensor) -> Tensor:
    """The mean over all processes."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def normalize(advantage: Tensor) -> Tensor:
    """[core 7] Zero mean and unit standard deviation over the minibatch, of which each process has
    a share."""
    if not dist.is_initialized():
        return (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    centered = advantage - all_mean(advantage.mean())
    size = len(advantage) * dist.get_world_size()
    variance = all_mean(centered.square().mean()) * size / (size - 1)
    return centered / (variance.sqrt() + 1e-8)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """[core 12] 1 - Var[returns - values] / Var[returns], over all processes; nan where the returns
    do not vary."""
    errors = (returns - values).double()
    returns = returns.double()
    centered_errors = errors - all_mean(errors.mean())
    centered_returns = returns - all_mean(returns.mean())
    variance = all_mean(centered_returns.square().mean()).item()
    if variance == 0:
        return math.nan
    return 1 - all_mean(centered_errors.square().mean()).item() / variance


def make_optimizer(args: Args, agent: nn.Module) -> torch.optim.Optimizer:
    """[core 3] Adam with epsilon 1e-5. Groups of parameters with a learning rate of their own keep
    its proportion to the schedule's."""
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
    for group in optimizer.param_groups:
        group["lr_scale"] = group["lr"] / args.learning_rate
    return optimizer


def make_schedule(args: Args, device: torch.device) -> Tensors:
    """Every number that changes during training, as a 0-dimensional tensor: logged as
    charts/<name> and checkpointed. Fill it in place, in anneal() or in the loop: a CUDA graph sees
    only that."""
    numbers = {"learning_rate": args.learning_rate, "ent_coef": args.ent_coef}
    return {name: torch.tensor(value, device=device) for name, value in numbers.items()}


def anneal(schedule: Tensors, args: Args, iteration: int) -> None:
    """[core 4] The learning rate falls linearly: in the first iteration it has its full value, and
    in the one after the last it would be 0. So does the entropy bonus, to its final value, if it
    has one."""
    left = 1 - (iteration - 1) / args.num_iterations
    if args.anneal_lr:
        schedule["learning_rate"].fill_(args.learning_rate * left)
    if args.ent_coef_final is not None:
        difference = args.ent_coef - args.ent_coef_final
        schedule["ent_coef"].fill_(args.ent_coef_final + difference * left)


def take(batch: Tensors, rows: Tensor) -> Tensors:
    """These rows of every tensor of a batch."""
    minibatch = {}
    for name, tensor in batch.items():
        if tensor.dim() == 4:  # images, channels-last: copying whole rows is 20 times as fast
            images = tensor.permute(0, 2, 3, 1).index_select(0, rows)
            minibatch[name] = images.permute(0, 3, 1, 2)
        else:
            minibatch[name] = tensor[rows]
    return minibatch


def ppo_loss(new: Tensors, old: Tensors, args: Args, schedule: Tensors) -> tuple[Tensor, Tensors]:
    """The loss of one minibatch (Schulman et al., 2017), and what to log of it: any 0-dimensional
    tensors by name. new: the agent's outputs for it, [B] each; old: the same rows of what the
    rollout stored, of advantage and of return_."""
    advantage = normalize(old["advantage"]) if args.norm_adv else old["advantage"]
    log_ratio = new["log_prob"] - old["log_prob"]
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(advantage * ratio, advantage * clipped_ratio).mean()  # [core 8]

    value = new["value"]
    squared_error = (value - old["return_"]).square()
    if args.clip_vloss:  # [core 9]
        clipped_value = old["value"] + (value - old["value"]).clamp(-args.clip_coef, args.clip_coef)
        squared_error = torch.max(squared_error, (clipped_value - old["return_"]).square())
    value_loss = 0.5 * squared_error.mean()

    entropy = new["entropy"].mean()
    loss = policy_loss - schedule["ent_coef"] * entropy + args.vf_coef * value_loss  # [core 10]
    # [core 12] Both estimators of the KL divergence: Schulman, "Approximating KL Divergence" (2020)
    stats = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "old_approx_kl": (-log_ratio).mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
    }
    return loss, stats


def mean_stats(stats: list[Tensors]) -> dict[str, float]:
    """The mean of each number over the minibatches and over all processes."""
    means = {}
    for name in stats[0]:
        means[name] = all_mean(torch.stack([one[name] for one in stats]).mean()).item()
    return means


def average_gradients(agent: nn.Module) -> None:
    """The mean over all processes, in one message. Frozen parameters have no gradient."""
    gradients = []
    for parameter in agent.parameters():
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    mean = all_mean(torch.cat([gradient.flatten() for gradient in gradients]))
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, part in zip(gradients, mean.split(sizes)):
        gradient.copy_(part.view_as(gradient))


def update(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    args: Args,
    schedule: Tensors,
    **minibatch: Tensor,
) -> Tensors:
    """One gradient step on a minibatch, whose tensors have names, as CudaGraph asks for. Returns
    what to log of it, 0-dimensional float32."""
    new = agent.get_action_and_value(minibatch["obs"], minibatch["action"])
    loss, stats = ppo_loss(new, minibatch, args, schedule)
    optimizer.zero_grad()
    loss.backward()
    if args.world_size > 1:
        average_gradients(agent)
    grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)  # [core 11]
    for group in optimizer.param_groups:
        group["lr"] = schedule["learning_rate"] * group["lr_scale"]
        # Adam asks for this where a CUDA graph is captured, and warns about it where none is.
        group["capturable"] = loss.is_cuda and torch.cuda.is_current_stream_capturing()
    optimizer.step()
    stats["grad_norm"] = grad_norm
    return {name: stat.detach().float() for name, stat in stats.items()}


class CudaGraph:
    """Calls a function on a GPU as a CUDA graph: one launch in place of hundreds.

    The function takes tensors by name and returns a dictionary of tensors; the copies that a call
    returns lie on the CPU. The first three calls run as they are, since kernels are chosen and
    memory is allocated in them. The fourth is captured: from then on, the same kernels run with new
    inputs. Plain numbers and every `if` are as they were then; what changes must be an input, or a
    tensor that is filled in place."""

    def __init__(self, function: Callable[..., Tensors]):
        self.function = function
        self.num_calls = 0
        self.stream = torch.cuda.Stream()
        self.graph = None
        self.can_capture = True

    def __call__(self, **inputs: Tensor) -> Tensors:
        if self.num_calls < 3:
            self.num_calls += 1
            outputs = self.call_on_side_stream(inputs)  # as capturing asks for
        else:
            if self.graph is None and self.can_capture:
                self.capture(inputs)
            if self.graph is None:
                outputs = self.function(**inputs)
            else:
                for name, tensor in inputs.items():
                    self.inputs[name].copy_(tensor, non_blocking=True)
                self.graph.replay()
                outputs = self.outputs
        copies = {name: x.detach().to("cpu", non_blocking=True) for name, x in outputs.items()}
        torch.cuda.synchronize()  # one wait for all of them
        return copies

    def call_on_side_stream(self, inputs: Tensors) -> Tensors:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(**inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def capture(self, inputs: Tensors) -> None:
        """Records the function's kernels. Nothing is computed yet."""
        self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.outputs = self.function(**self.inputs)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            print(f"{SCRIPT}: going on without a CUDA graph: {reason}", file=sys.stderr)
            self.can_capture = False
        else:
            self.graph = graph


# -------------------------------------------------------------------------------- 6 run directory
def write_file(path: Path, content: bytes | dict) -> None:
    """Writes bytes, or a dictionary in torch's format, to a temporary file that then takes the
    place of the old one: whatever happens, one of the two is there, and whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # left by a kill; and no link is followed
    try:
        with open(temporary, "xb") as file:
            if isinstance(content, dict):
                torch.save(content, file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # half a file would help to keep a full disk full


def load_file(path: Path, *keys: str) -> dict[str, Any]:
    """A dictionary with these keys, or UserError. No code that the file holds is run."""
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load compares no checksums
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, for whatever bytes the file may hold
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged or not of this script: {reason}") from None
    if damaged is not None or not isinstance(content, dict) or not content.keys() >= set(keys):
        raise UserError(f"{path} is damaged or not of this script")
    return content


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Without what a library prints past Python."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Film:
    """A game as videos/<step>.webm (VP8, which browsers play) and as a GIF for TensorBoard's Images
    tab. Frames are written as they come and end after five minutes; the GIF keeps at most 600 of
    them, so that the dashboard stays quick. `sight` is one moment: what the agent saw, [k, L, L],
    and the screen [H, W, 3]."""

    def __init__(self, fps: int):
        self.fps = fps
        self.folder = tempfile.TemporaryDirectory()
        self.writer = None
        self.num_frames = 0
        self.gif_frames = []
        self.gif_interval = 2
        self.sight = None

    def add(self, obs: np.ndarray, screen: np.ndarray) -> None:
        from PIL import Image

        if self.num_frames >= 5 * 60 * self.fps:
            return
        if self.writer is None:
            height, width, _ = screen.shape
            path = f"{self.folder.name}/film.webm"
            code = cv2.VideoWriter_fourcc(*"VP80")
            with silent_stderr():  # OpenCV says that the tag is not supported, and it is
                self.writer = cv2.VideoWriter(path, code, self.fps, (2 * width, 2 * height))
        blue_green_red = screen[..., ::-1]
        self.writer.write(blue_green_red.repeat(2, axis=0).repeat(2, axis=1))
        if self.num_frames % self.gif_interval == 0:
            self.gif_frames.append(Image.fromarray(screen).quantize(32))
        if len(self.gif_frames) > 600:
            self.gif_frames = self.gif_frames[::2]
            self.gif_interval *= 2
        self.num_frames += 1
        if self.num_frames <= 100:
            self.sight = (obs, screen)

    def webm(self) -> bytes:
        self.writer.release()
        return Path(self.folder.name, "film.webm").read_bytes()

    def gif(self) -> bytes:
        buffer = io.BytesIO()
        first, *others = self.gif_frames
        milliseconds = 1000 * self.gif_interval // self.fps
        first.save(
            buffer, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0
        )
        return buffer.getvalue()


class FilmEnv(gym.Wrapper):
    """Films every step."""

    def __init__(self, env: gym.Env, film: Film):
        super().__init__(env)
        self.film = film

    def step(self, action: int) -> tuple:
        result = self.env.step(action)
        self.film.add(result[0], self.unwrapped.ale.getScreenRGB())
        return result


def lock_directory(path: Path) -> int | None:
    """Locks a directory until the returned descriptor is closed. UserError if another process has
    locked it; None where the system, or the file system, has no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise UserError(f"cannot write to {path}: another process does") from None
        return None
    return descriptor


def hparams_row(flags: dict[str, Any]) -> tuple:
    """The summaries that make a row of TensorBoard's HParams tab. SummaryWriter.add_hparams would
    write them into a second run."""
    from torch.utils.tensorboard.summary import hparams

    values = {}
    for name, value in flags.items():
        values[name] = "none" if value is None else value  # a column takes text, but not None
    return hparams(values, {"charts/return_100": 0, "eval/episodic_return": 0})


class RunDirectory:
    """What a run writes: files, TensorBoard's events and its progress on the terminal. One process
    at a time may write to a directory."""

    def __init__(self, path: Path, purge_step: int | None = None, tracker: Any = None):
        """purge_step: TensorBoard drops what an interrupted run wrote from this step on. tracker:
        a run of Weights & Biases, which ends with this one."""
        from torch.utils.tensorboard import SummaryWriter  # here, since workers do without it

        if not os.access(path, os.W_OK):
            raise UserError(f"cannot write to {path}")
        self.path = path
        self.tracker = tracker
        self.lock = lock_directory(path)
        self.bar = None
        self.writer = SummaryWriter(path, purge_step=purge_step)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.writer.close()
        if self.tracker is not None:
            self.tracker.finish()
        if self.lock is not None:
            os.close(self.lock)

    def write(self, name: str, content: bytes | dict) -> None:
        folder = (self.path / name).parent
        if folder != self.path:
            folder.mkdir(exist_ok=not folder.is_symlink())  # no link is followed out of the run
        write_file(self.path / name, content)

    def describe(self, args: Args, device: torch.device, dtype: torch.dtype) -> None:
        """args.json: the flags, which --resume reads, and what they ran on."""
        modules = (ale_py, cv2, gym, np, torch)
        precision = str(dtype).removeprefix("torch.")
        about = {
            "flags": args.flags,
            "versions": {module.__name__: module.__version__ for module in modules},
            "hardware": {
                "device": str(device),
                "precision": precision,
                "threads": torch.get_num_threads(),
            },
        }
        command = ["git", "-C", str(PATH.parent), "describe", "--always", "--dirty"]
        with suppress(OSError):  # not every machine has git
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            about["git"] = done.stdout.strip()
        self.write("args.json", json.dumps(about, indent=1).encode())
        say(f"run directory: {self.path}")
        shares = f"workers: {args.workers}, groups of games: {args.num_groups}"
        say(f"{device}, {precision}, threads: {torch.get_num_threads()}, {shares}")

    def begin_events(self, args: Args) -> None:
        """The hyperparameters as text and in the HParams tab, and a tab of the main curves."""
        rows = [f"|{name}|{value}|" for name, value in args.flags.items()]
        table = "\n".join(["|flag|value|", "|-|-|", *rows])
        self.writer.add_text("hyperparameters", table)
        main_tags = [
            "charts/return_100",
            "charts/episodic_return",
            "charts/SPS",
            "losses/explained_variance",
            "losses/approx_kl",
        ]
        for summary in hparams_row(args.flags):
            self.writer.file_writer.add_summary(summary)
        self.writer.add_custom_scalars({"PPO": {tag: ["Multiline", [tag]] for tag in main_tags}})

    def begin_progress(self, args: Args, step: int) -> None:
        total = args.num_iterations * args.batch_size
        if total < args.total_timesteps:
            say(f"{total:,} steps, which are whole rollouts of {args.batch_size:,}")
        disable = True if sys.stderr is None else None  # None: only on a terminal is there a bar
        self.bar = tqdm(total=total, initial=step, unit="steps", disable=disable)
        self.first_step = step
        self.started = time.perf_counter()
        self.printed = self.started

    def log(self, scalars: dict[str, float], step: int) -> None:
        """A point of each curve, of those that are finite."""
        for tag, value in scalars.items():
            if math.isfinite(value):
                self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def log_games(self, games: list[tuple], args: Args, step: int) -> None:
        """The games that were over in the rollout that began at this step: (t, i, return, length).
        Each has a step of its own, since some trackers keep one value per step."""
        for t, i, game_return, length in games:
            ended_at = step + t * args.num_envs + i + 1
            self.writer.add_scalar("charts/episodic_return", game_return, ended_at)
            self.writer.add_scalar("charts/episodic_length", length, ended_at)

    def show_progress(self, recent_returns: deque, step: int) -> None:
        status = "no game over yet"
        if recent_returns:
            status = f"return {np.mean(recent_returns):.1f}"
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update(step - self.bar.n)
        now = time.perf_counter()
        if self.bar.disable and now - self.printed >= 30:
            speed = (step - self.first_step) / (now - self.started)
            left = timedelta(seconds=round((self.bar.total - step) / speed))
            progress = f"step {step:,} of {self.bar.total:,}, {status}"
            say(f"{progress}, {speed:,.0f} steps/s, {left} left")
            self.printed = now

    def say_how_it_ended(self, args: Args, recent_returns: deque, step: int) -> None:
        """Where the run is, its return, and what to do next."""
        path = shlex.quote(str(self.path))
        if step == self.bar.total:
            evaluation = f"python {SCRIPT} --evaluate {path}"
            ending = f"the training is complete: {path}; to evaluate it: {evaluation}"
        else:
            program = f"python {SCRIPT}"
            if args.world_size > 1:
                processes = f"--nproc-per-node={args.local_world_size}"
                program = f"torchrun --standalone {processes} {SCRIPT}"
            ending = f"stopped and saved at step {step:,}; to go on: {program} --resume {path}"
        if recent_returns:
            mean = np.mean(recent_returns)
            say(f"mean return of the last {len(recent_returns)} games: {mean:.1f}")
        say(ending)

    def add_picture(self, tag: str, obs: np.ndarray, screen: np.ndarray, step: int) -> None:
        """What the agent sees, the stacked frames [k, L, L], beside the raw screen [H, W, 3]."""
        if obs.dtype != np.uint8:  # all that OpenCV and TensorBoard can draw
            limits = (obs.min(), obs.max() + 1e-9)
            obs = np.interp(obs.astype(float), limits, (0, 255)).astype(np.uint8)
        parts = [screen]
        for frame in obs:
            size = (len(screen), len(screen))
            frame = cv2.resize(frame, size, interpolation=cv2.INTER_NEAREST)
            parts.append(cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB))
        self.writer.add_image(tag, np.concatenate(parts, axis=1), step, dataformats="HWC")
        self.writer.flush()

    def add_film(self, film: Film, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.write(f"videos/{step}.webm", film.webm())
        height, width, _ = film.sight[1].shape
        image = Summary.Image(height=height, width=width, colorspace=3)
        image.encoded_image_string = film.gif()
        summary = Summary(value=[Summary.Value(tag="eval/video", image=image)])
        self.writer.file_writer.add_summary(summary, step)
        self.add_picture("eval/observation", *film.sight, step)
        say(f"film: {self.path}/videos/{step}.webm")


def make_directory(path: Path) -> None:
    """Makes a directory, unless it exists. UserError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from None


def make_run_directory(args: Args) -> Path:
    """runs/<env-id>__<exp-name>__<seed>__<unix time>, a new one."""
    second = int(time.time())
    env_id = args.env_id.replace("/", "-")
    while True:
        path = Path(f"runs/{env_id}__{args.exp_name}__{args.seed}__{second}")
        try:
            path.parent.mkdir(exist_ok=True)
            path.mkdir()
        except FileExistsError:
            if not path.is_dir():
                raise UserError("cannot write to runs: it is not a directory") from None
            second += 1  # another run began in the same second
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}") from None
        else:
            return path


def start_tracking(args: Args, path: Path) -> Any:
    """--track: a Weights & Biases run that mirrors what TensorBoard gets."""
    try:
        import wandb
    except ImportError:
        raise UserError("--track needs Weights & Biases: pip install wandb") from None
    try:
        return wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=args.wandb_name or path.name,
            id=re.sub(r"[:;,#?']", "-", path.name),  # which it refuses
            resume="allow",
            config=args.flags,
            sync_tensorboard=True,
        )
    except wandb.errors.Error as error:
        advice = "run `wandb login`, or set WANDB_MODE=offline"
        raise UserError(f"--track: {' '.join(str(error).split())[:200]}; {advice}") from None


def open_run(args: Args, step: int) -> RunDirectory:
    """The directory of --resume, or a new one; with --track, also the run that mirrors it."""
    if args.resume is not None:
        path = Path(args.resume)
    elif args.run_dir is not None:
        path = Path(args.run_dir)
        make_directory(path)
    else:
        path = make_run_directory(args)
    tracker = None
    if args.track:
        try:
            tracker = start_tracking(args, path)
        except UserError:
            if not any(path.iterdir()):  # nothing has begun
                path.rmdir()
            raise
    try:
        return RunDirectory(path, step + 1, tracker)
    except UserError:
        if tracker is not None:
            tracker.finish()
        raise


# ----------------------------------------------------------------------------------- 7 checkpoint
def gather(mine: Any) -> list[Any]:
    """What each process contributes, in the order of ranks."""
    if not dist.is_initialized():
        return [mine]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def save_checkpoint(run: RunDirectory | None, state: dict[str, Any], args: Args, step: int) -> None:
    """Rank 0 writes agent.pt, to evaluate and to share, and checkpoint.pt, to go on with: the state
    of each process. RuntimeError if the processes' weights have drifted apart."""
    ranks = gather(pack(state))
    for name, _ in state["weights"].named_parameters():
        for other in ranks[1:]:
            if not torch.equal(other["weights"][name], ranks[0]["weights"][name]):
                raise RuntimeError(f"the processes' weights differ in {name}: see update()")
    if run is not None:
        agent = {"weights": ranks[0]["weights"], "flags": args.flags, "step": step}
        run.write("agent.pt", agent)
        run.write("checkpoint.pt", agent | ranks[0] | {"ranks": ranks[1:]})


def load_checkpoint(path: Path, args: Args) -> dict[str, Any]:
    """The checkpoint that save_checkpoint wrote. UserError if it is of another run than args."""
    checkpoint = load_file(path, "flags", "step", "ranks", "iteration")
    num_ranks = 1 + len(checkpoint["ranks"])
    if num_ranks != args.world_size:
        raise UserError(f"--resume: that run has {num_ranks} processes, not {args.world_size}")
    for name, value in args.flags.items():
        free = name in MAY_CHANGE or name == "total_timesteps"
        if not free and checkpoint["flags"].get(name, value) != value:
            raise UserError(f"{path} is not of the run in args.json: {name} differs")
    return checkpoint


def restore_state(state: dict[str, Any], checkpoint: dict[str, Any], rank: int) -> None:
    """Puts what the checkpoint holds of this process back into its state."""
    mine = [checkpoint, *checkpoint["ranks"]][rank]
    different = (mine.keys() ^ state.keys()) - {"flags", "step", "ranks", "cuda"}
    if different:
        raise UserError(f"the checkpoint or `state` in train() lacks {sorted(different)}")
    for name in state:
        if name in mine:
            state[name] = unpack(mine[name], state[name])


class GlobalGenerator:
    """NumPy's, Python's or CUDA's own generator of random numbers, with the two methods that
    `state` asks for."""

    def __init__(self, state_dict: Callable, load_state_dict: Callable):
        self.state_dict = state_dict
        self.load_state_dict = load_state_dict


class StopRequest:
    """Until it is left, STOP_SIGNALS such as Ctrl-C ask for an end between two iterations, or
    between two steps of an evaluation. A second Ctrl-C raises KeyboardInterrupt."""

    def __init__(self, doing: str):
        self.doing = doing
        self.signum = 0
        self.handlers = {}
        self.pid = os.getpid()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python allows handlers there only
        for signum in STOP_SIGNALS:
            ignored = signal.getsignal(signum) == signal.SIG_IGN
            if signum == signal.SIGINT or not ignored:  # nohup ignores SIGHUP
                self.handlers[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *exception: Any) -> None:
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def handle(self, signum: int, frame: Any) -> None:
        if os.getpid() != self.pid:  # a worker that has just been forked
            return
        self.signum = signum
        if signal.SIGINT in self.handlers:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(OSError, RuntimeError):  # of a broken terminal; of a print within a print
            print(f"\n{self.doing} (Ctrl-C again: stop at once)", file=sys.stderr, flush=True)

    def agreed(self) -> bool:
        """Whether any process got a signal. All stop after the same iteration, else they hang."""
        self.signum = max(gather(self.signum))
        return self.signum > 0


# ------------------------------------------------------------------------------------- 8 programs
def choose_device(args: Args) -> torch.device:
    """This process' GPU, made to do what the flags say, or the CPU."""
    if not args.use_gpu:
        return CPU
    index = args.local_rank % torch.cuda.device_count()  # some processes see their own GPU only
    device = torch.device("cuda", index)
    try:
        torch.cuda.set_device(device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the GPU cannot be used (--no-cuda does without): {reason}") from None
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        backend.fp32_precision = "ieee"  # TF32, cuDNN's default, would keep 10 of 23 bits
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it determines nothing here
    return device


def join_processes(args: Args, device: torch.device) -> None:
    """Makes torchrun's processes a group, which the caller destroys in the end."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(days=1))  # evaluations may be long
    except ValueError as error:
        raise UserError(f"several processes are started by torchrun: {error}") from None
    gpu = None
    if device.type == "cuda":
        gpu = str(torch.cuda.get_device_properties(device).uuid)
    gpus = gather(gpu)
    if any(gpus) and (None in gpus or len(set(gpus)) < len(gpus)):
        raise UserError("each process needs a GPU of its own: start fewer, or give --no-cuda")


@contextmanager
def one_thread() -> Iterator[None]:
    """The policy on one thread: for a few games more of them gain nothing, and results must not
    depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def play_full_games(
    args: Args,
    agent: Agent | None,
    num_games: int,
    stop: StopRequest,
    film: Film | None = None,
    render_mode: str | None = None,
) -> list[tuple[float, int]]:
    """Plays full games side by side, through all lives, at random without an agent. Returns the
    (return, length) of those that end before a stop is requested. The film is of the first one."""
    generators = [np.random.default_rng([args.seed, 2**31, i]) for i in range(num_games)]
    envs = []
    obs = []
    for i in range(num_games):
        if stop.signum:
            return []
        env = make_env(args, render_mode)
        if film is not None and i == 0:
            env = FilmEnv(env, film)
        envs.append(env)
        obs.append(envs[i].reset(seed=args.seed + 2**31 + i)[0])
    results = {}
    playing = list(range(num_games))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), one_thread():
        torch.default_generator.manual_seed(args.seed)  # for an agent that draws from it
        while playing and not stop.signum:
            numbers = [generators[i].random() for i in playing]
            uniform = torch.tensor(numbers, dtype=torch.float32)
            if agent is None:
                num_actions = int(envs[0].action_space.n)
                actions = (uniform * num_actions).long().clamp_(max=num_actions - 1)
            else:
                batch = torch.from_numpy(np.stack([obs[i] for i in playing]))
                actions = agent.get_action_and_value(batch, uniform=uniform)["action"]
            for i, action in zip(playing, actions.tolist()):
                obs[i], _, _, _, _, games = step_and_reset(envs[i], action)
                if games:
                    results[i] = games[0]
            playing = [i for i in playing if i not in results]
    for env in envs:
        env.close()
    return [results[i] for i in sorted(results)]


def score_agent(
    args: Args, agent: Agent, step: int, run: RunDirectory | None, stop: StopRequest
) -> None:
    """Rank 0 plays --eval-episodes full games, prints their scores beside those of random play, and
    writes them to the run directory, if there is one. A requested stop ends it without a word."""
    if args.rank > 0 or args.eval_episodes == 0:
        return
    film = None
    if args.capture_video and run is None:
        print(f"{SCRIPT}: no film: --output DIR says where to write it", file=sys.stderr)
    elif args.capture_video:
        film = Film(fps=max(1, round(60 / args.frame_skip)))
    policy = inference_copy(agent, choose_dtype(args, CPU), CPU)
    policy.greedy = args.greedy
    games = play_full_games(args, policy, args.eval_episodes, stop, film)
    random_games = play_full_games(args, None, args.eval_episodes, stop)
    if stop.signum:
        return
    scores = [score for score, _ in games]
    lengths = [length for _, length in games]
    random_scores = [score for score, _ in random_games]
    result = {
        "env_id": args.env_id,
        "step": step,
        "seed": args.seed,
        "mean": float(np.mean(scores)),
        "std": float(np.std(scores)),
        "scores": scores,
        "lengths": lengths,
        "random_mean": float(np.mean(random_scores)),
        "random_scores": random_scores,
    }
    say(f"evaluation at step {step:,}: {' '.join(f'{score:g}' for score in scores)}")
    mean = f"mean {result['mean']:.2f} +- {result['std']:.2f} over {len(scores)} full games"
    say(f"{mean}; a random policy: {result['random_mean']:.2f}")
    if run is not None:
        mean_length = float(np.mean(lengths))
        curves = {"eval/episodic_return": result["mean"], "eval/episodic_length": mean_length}
        run.log(curves, step)
        run.write("eval.json", json.dumps(result, indent=1).encode())
    if film is not None:
        run.add_film(film, step)


def make_rollout(args: Args, envs: ParallelEnvs, device: torch.device) -> dict[str, Tensor]:
    """What is stored of each step, [T + 1, N, ...]; row T is for what comes after the last step.
    Observations lie where the network is, with the channels innermost, as it reads them; all else
    lies on the CPU, which computes the advantages."""
    size = (args.num_steps + 1, args.local_envs)
    _, channels, height, width = envs.obs.shape
    images = torch.zeros(*size, height, width, channels, dtype=envs.obs.dtype, device=device)
    return {
        "obs": images.permute(0, 1, 4, 2, 3),
        "done": torch.zeros(size),  # 1 where obs begins an episode
        "action": torch.zeros(size, dtype=torch.int64),
        "log_prob": torch.zeros(size),
        "value": torch.zeros(size),
        "reward": torch.zeros(size),
    }


def train(args: Args) -> int:
    """The algorithm. Returns the exit code: 0, or 128 + the signal that ended it early, such as 130
    for Ctrl-C."""
    # SETUP, in this order: the workers are forked before threads, CUDA, TensorBoard and the process
    # group come to life, which do not survive it.
    if args.use_gpu and args.num_envs % args.num_groups:
        raise UserError("on a GPU, --num-groups must divide --num-envs (--no-cuda does without)")
    checkpoint = None
    if args.resume is not None:
        checkpoint = load_checkpoint(Path(args.resume, "checkpoint.pt"), args)
        if checkpoint["iteration"] >= args.num_iterations:
            more = f"--total-timesteps {(checkpoint['iteration'] + 1) * args.batch_size} or more"
            if args.rank == 0:
                say(f"{args.resume} is complete; {more} goes on, --evaluate plays its agent")
            return 0
        if args.total_timesteps != checkpoint["flags"]["total_timesteps"] and args.rank == 0:
            say(f"the run is now {args.total_timesteps:,} steps long, and the annealing follows")
    torch.manual_seed(args.seed)  # the same first weights in every process
    env = make_env(args, render_mode="rgb_array")
    first_obs, _ = env.reset(seed=args.seed)
    first_screen = env.render()
    agent = make_agent(args, env)
    process_seed = args.seed * 1000 + args.rank
    torch.manual_seed(process_seed)
    np.random.seed([args.seed, args.rank])
    random.seed(process_seed)
    shuffler = torch.Generator().manual_seed(process_seed)
    env_numbers = range(args.first_env, args.first_env + args.local_envs)
    action_generators = [np.random.default_rng([args.seed, i]) for i in env_numbers]

    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest("stopping as soon as everything has started"))
        envs = stack.enter_context(closing(ParallelEnvs(args, env.observation_space)))
        num_threads = torch.get_num_threads()
        stack.callback(torch.set_num_threads, num_threads)  # in the end, for who called main()
        if "OMP_NUM_THREADS" not in os.environ:  # torch knows nothing of a container's quota
            torch.set_num_threads(min(num_threads, args.cores))
        device = choose_device(args)
        agent.dtype = choose_dtype(args, device)
        agent.to(device)
        optimizer = make_optimizer(args, agent)
        schedule = make_schedule(args, device)
        if args.world_size > 1:
            # After the optimizer: the first one imports what would keep an earlier group alive,
            # and its threads then crash the interpreter's end now and then.
            join_processes(args, device)
            stack.callback(dist.destroy_process_group)

        policy = inference_copy(agent, agent.dtype, device)
        act = policy.get_action_and_value
        update_agent = partial(update, agent, optimizer, args, schedule)
        if device.type == "cuda" and args.cuda_graph:
            act = CudaGraph(act)
            if args.world_size == 1:
                update_agent = CudaGraph(update_agent)
        rollout = make_rollout(args, envs, device)

        state = {  # everything that changes during training; see pack() for what it may hold
            "weights": agent,
            "optimizer": optimizer,
            "schedule": schedule,
            "iteration": 0,
            "recent_returns": deque(maxlen=100),
            "envs": envs,
            "action_generators": action_generators,
            "shuffler": shuffler,
            "torch": torch.default_generator,
            "numpy": GlobalGenerator(np.random.get_state, np.random.set_state),
            "python": GlobalGenerator(random.getstate, random.setstate),
        }
        if device.type == "cuda":
            get_cuda_state = partial(torch.cuda.get_rng_state, device)
            set_cuda_state = partial(torch.cuda.set_rng_state, device=device)
            state["cuda"] = GlobalGenerator(get_cuda_state, set_cuda_state)
        if checkpoint is not None:
            restore_state(state, checkpoint, args.rank)
        pack(state)  # what no checkpoint can hold raises its error now, and not after hours
        step = state["iteration"] * args.batch_size
        run = None
        if args.rank == 0:
            run = stack.enter_context(closing(open_run(args, step)))
            run.describe(args, device, agent.dtype)
            run.begin_progress(args, step)
            if args.resume is None:
                run.begin_events(args)
                run.add_picture("observation", first_obs, first_screen, step)

        stop.doing = "finishing this iteration, then saving"
        for iteration in range(state["iteration"] + 1, args.num_iterations + 1):
            if stop.agreed():
                break
            started = time.perf_counter()
            anneal(schedule, args, iteration)

            # ROLLOUT: the policy thinks about one group of games while the others play
            policy.load_state_dict(agent.state_dict())
            uniform = draw_uniform(action_generators, args.num_steps).to(device)
            with torch.no_grad(), one_thread():
                # t = 0 ... num_steps. After the last step, the agent is asked once more, for the
                # value that the advantages need. The next rollout begins with the same
                # observation: what an agent remembers must not advance twice.
                for t, group in envs.turns(args.num_steps):
                    rollout["obs"][t, group] = envs.obs[group]
                    rollout["done"][t, group] = envs.done[group]
                    if t > 0:  # the reward of action t - 1 came with observation t
                        reward = envs.reward[group]
                        if envs.truncated[group].any():  # by a time limit: the game is not lost
                            final_obs = envs.final_obs[group].to(device)
                            # Only its value counts, but a graph has the same inputs every time.
                            final = act(obs=final_obs, uniform=uniform[t, group])
                            final_value = final["value"].cpu() * envs.truncated[group]
                            reward = reward + args.gamma * final_value
                        rollout["reward"][t - 1, group] = reward
                    outputs = act(obs=rollout["obs"][t, group], uniform=uniform[t, group])
                    for name in ("action", "log_prob", "value"):
                        rollout[name][t, group] = outputs[name]
                    if t < args.num_steps:
                        envs.step(group, outputs["action"])
            rollout_seconds = time.perf_counter() - started

            # ADVANTAGES
            rewards = rollout["reward"][:-1]
            advantages, returns = compute_gae(
                rewards, rollout["value"], rollout["done"], args.gamma, args.gae_lambda
            )
            batch = {name: tensor[:-1].flatten(0, 1) for name, tensor in rollout.items()}
            batch["advantage"] = advantages.flatten()
            batch["return_"] = returns.flatten()
            batch = {name: tensor.to(device) for name, tensor in batch.items()}

            # UPDATE
            stats = []
            for _ in range(args.update_epochs):
                shuffled = torch.randperm(args.local_batch_size, generator=shuffler).to(device)
                for rows in shuffled.split(args.local_minibatch_size):  # [core 6]
                    stats.append(update_agent(**take(batch, rows)))
                if args.target_kl is not None:
                    approx_kl = all_mean(stats[-1]["approx_kl"])
                    if approx_kl > args.target_kl:
                        break

            # LOGGING
            losses = mean_stats(stats)
            if not math.isfinite(losses["grad_norm"]):
                raise FloatingPointError(f"iteration {iteration}: the gradient is not finite")
            losses["explained_variance"] = explained_variance(rollout["value"][:-1], returns)
            seconds = time.perf_counter() - started
            scalars = {f"losses/{name}": value for name, value in losses.items()}
            scalars |= {f"charts/{name}": value.item() for name, value in schedule.items()}
            scalars["charts/SPS"] = args.batch_size / seconds
            scalars["time/rollout"] = rollout_seconds / seconds
            scalars["time/update"] = 1 - rollout_seconds / seconds
            games = []  # that were over, in all processes
            for games_of_one in gather(envs.take_ended()):
                games += games_of_one
            games.sort()
            for _, _, game_return, _ in games:
                state["recent_returns"].append(game_return)
            if state["recent_returns"]:
                scalars["charts/return_100"] = float(np.mean(state["recent_returns"]))
            if run is not None:
                run.log_games(games, args, step)
            state["iteration"] = iteration
            step = iteration * args.batch_size
            if run is not None:
                run.log(scalars, step)
                run.show_progress(state["recent_returns"], step)

            # EVALUATION AND CHECKPOINT, now and then; the last ones follow below
            if iteration == args.num_iterations:
                break
            if args.eval_interval > 0 and step % args.eval_interval < args.batch_size:
                score_agent(args, agent, step, run, stop)
            if args.checkpoint_interval > 0 and iteration % args.checkpoint_interval == 0:
                save_checkpoint(run, state, args, step)

        save_checkpoint(run, state, args, step)
        if not stop.agreed():
            stop.doing = "stopping the evaluation"
            score_agent(args, agent, step, run, stop)
        if run is not None:
            run.say_how_it_ended(args, state["recent_returns"], step)
        return 128 + stop.signum if stop.signum else 0


def check_display() -> None:
    """UserError where no window can be opened: SDL would draw into nothing, without a word."""
    names = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        raise UserError("--play needs a display, and there is none here")


def evaluate(args: Args) -> int:
    """--evaluate: the agent of a run directory or a file plays full games; with --play, it plays
    one in a window. Returns the exit code."""
    path = Path(args.evaluate)
    if os.path.isdir(path):
        path = path / "agent.pt"
    content = load_file(path, "weights", "flags")
    step = content.get("step", 0)
    if not isinstance(step, int):
        raise UserError(f"{path} is damaged or not of this script: its step is no number")
    args = parse_args(args.argv, content["flags"], str(path))
    env = make_env(args)
    agent = make_agent(args, env)
    try:
        agent.load_state_dict(content["weights"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights in {path} do not fit {args.env_id}: {reason}") from None
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest("stopping the evaluation"))
        if args.play:
            check_display()
            policy = inference_copy(agent, choose_dtype(args, CPU), CPU)
            policy.greedy = args.greedy
            games = play_full_games(args, policy, 1, stop, render_mode="human")
            for game_return, length in games:
                print(f"score {game_return:g} in {length} steps")
        else:
            run = None
            folder = path.parent
            if args.output is not None:
                folder = Path(args.output)
                make_directory(folder)
            if args.output is not None or (folder / "checkpoint.pt").exists():  # a run of one's own
                try:
                    run = stack.enter_context(closing(RunDirectory(folder)))
                except (UserError, OSError) as error:
                    print(
                        f"{SCRIPT}: {error}; only this terminal shows the scores", file=sys.stderr
                    )
            score_agent(args, agent, step, run, stop)
        return 128 + stop.signum if stop.signum else 0


def play(args: Args) -> int:
    """--play: a person plays the game in a window, at its real speed, with arrows or letters."""
    try:
        import pygame
        from gymnasium.utils.play import play as play_in_window
    except (ImportError, gym.error.DependencyNotInstalled):
        raise UserError("--play needs pygame: pip install pygame") from None
    check_display()
    env = make_env(args, render_mode="rgb_array").unwrapped
    arrows = {"w": pygame.K_UP, "s": pygame.K_DOWN, "a": pygame.K_LEFT, "d": pygame.K_RIGHT}
    names = {" ": "space", "w": "w or up", "s": "s or down", "a": "a or left", "d": "d or right"}
    keys_to_action = {}
    print("keys (Escape ends the game):")
    for keys, action in env.get_keys_to_action().items():
        keys_to_action[keys] = action
        keys_to_action[tuple(arrows.get(key, key) for key in keys)] = action
        typed = " + ".join(names.get(key, key) for key in keys)
        print(f"{typed:>30}  {env.get_action_meanings()[action]}")
    play_in_window(
        env,
        fps=60,
        zoom=3,
        keys_to_action=keys_to_action,
        noop=find_action(env, "NOOP") or 0,
        seed=args.seed,
    )
    return 0


# ---------------------------------------------------------------------------------------- 9 entry
def main(argv: list[str] | None = None) -> int:
    """Runs the program that the flags ask for and returns its exit code: 0; 1 if a worker ended; 2
    for the user's mistake; 128 + the signal that ended it early. All else is a traceback."""
    try:
        args = parse_args(argv)
        if args.evaluate is not None:
            return evaluate(args)
        if args.play:
            return play(args)
        return train(args)
    except UserError as error:
        print(f"{SCRIPT}: error: {error}", file=sys.stderr)
        return 2
    except WorkerError as error:
        print(f"{SCRIPT}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{SCRIPT}: stopped at once; what was saved before is kept", file=sys.stderr)
        return 130
    except SystemExit as end:  # of the parser, which has said why
        return end.code


if __name__ == "__main__":
    exit_code = main()
    if exit_code != 0:  # a notebook takes any SystemExit for an error
        sys.exit(exit_code)
