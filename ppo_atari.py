# /// script
# requires-python = ">=3.11"
# dependencies = ["ale-py==0.12.1", "gymnasium==1.4.0", "numpy==2.4.6", "opencv-python==5.0.0.93", "pytest==9.2.0",
#                 "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1"]
# ///
# SPDX-License-Identifier: MIT
"""Proximal Policy Optimization on Atari games, complete in this one file.

    python ppo_atari.py --env-id ALE/Breakout-v5                  train: curves, weights and scores go to runs/
    tensorboard --logdir runs                                     watch
    python ppo_atari.py --resume runs/<run>                       go on after an interruption, bit for bit
    python ppo_atari.py --evaluate runs/<run> --capture-video     play ten full games and film one
    python ppo_atari.py --play --env-id ALE/Breakout-v5           play yourself (pip install pygame)
    torchrun --standalone --nproc-per-node=2 ppo_atari.py         several processes (README: several nodes)

After "Proximal Policy Optimization Algorithms" (Schulman et al., 2017), with openai/baselines' hyperparameters, and
"The 37 Implementation Details of PPO" (Huang et al., 2022), each marked where it happens, [core 1] to [atari 9].

Sections, each using only what stands above it, and the one place for each kind of change: 1 arguments: a flag, in
parse_args. 2 environment: a wrapper, in make_env; what of it changes during a game, in its `saved`. 3 agent: a network,
in make_agent. 4 rollout: a quantity per step, in rollout_fields, and an output of that name from the agent, or a
store() in rollout. 5 PPO: the loss and what to log, in ppo_loss; a number that changes during training, in make_knobs.
6 run directory. 7 processes. 8 programs: the loop, and state of its own, in train. 9 entry.
"""

import os
import signal

if __name__ in ("__main__", "__mp_main__"):  # before the imports, which take seconds; workers leave it to the learner
    _said = b"\nppo_atari.py: stopped at once; what was saved before is kept\n"
    for _signum in (signal.SIGINT, signal.SIGTERM):
        _stop = lambda signum, frame: (os.write(2, _said), os._exit(128 + signum))  # noqa: E731
        signal.signal(_signum, _stop if __name__ == "__main__" else signal.SIG_IGN)

import argparse
import copy
import ctypes
import difflib
import io
import itertools
import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import weakref
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial, reduce
from multiprocessing import connection, parent_process
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

warnings.formatwarning = lambda message, *about: f"ppo_atari.py: {' '.join(str(message).split())}\n"  # one line each
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner from every emulator
cv2.setNumThreads(1)  # OpenCV's own threads would fight the workers for the cores
with suppress(AttributeError, TypeError):  # glibc: keep freed memory, which costs thousands of page faults to get anew
    for _option, _value in ((-1, 2**30), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(_option, _value)

# ----------------------------------------------------------------------------------------------------- 1 arguments
Args, Tensors = argparse.Namespace, dict[str, Tensor]


def say(text: str, file: Any = None) -> None:
    """Prints at once. Where that fails, as on a full disk, nothing else shall."""
    with suppress(OSError):
        print(text, file=file or sys.stdout, flush=True)


class RunError(Exception):
    """A run that cannot go on for a known reason: one line on stderr, exit code 1."""


class UsageError(RunError):
    """One that the user can mend: exit code 2."""


def refuse(message: str) -> None:
    raise UsageError(message)


@contextmanager
def refusing(what: str, kinds: Any = Exception) -> Iterator[None]:
    """Makes an error of these kinds the user's: one line of what is wrong, or what to do about it, and the reason."""
    try:
        yield
    except kinds as error:
        if kinds is Exception and isinstance(error, (RunError, MemoryError)):
            raise
        raise UsageError(f"{what}: {str(getattr(error, 'strerror', None) or error)[:200]}") from None


def between(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from low to high, both included. NaN never passes."""

    def convert(text: str) -> float:
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        what = f"a {'whole ' if kind is int else ''}number from {low:.9g} to {high:.9g}"
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")

    return convert


def parse_args(argv: list[str] | None = None, saved: Any = MappingProxyType({}), source: str = "") -> Args:
    """The flags, checked, and what derive adds. A mistake exits with code 2. saved: an earlier run's flags, from the
    file `source` (--resume: args.json): they pass the same checks, and those of the run count where argv has none."""
    argv, free = sys.argv[1:] if argv is None else argv, {"total_timesteps"}
    count, natural, probability = between(int, 1, 2**20), between(int, 0, 2**53), between(float, 0, 1)
    positive, weight = between(float, 1e-37, 1e37), between(float, 0, 1e37)  # what float32 can hold
    formatter = partial(argparse.HelpFormatter, max_help_position=40, width=119)
    parser = argparse.ArgumentParser("ppo_atari.py", None, __doc__.split("\n")[0], formatter_class=formatter)
    mend = "; a switch is --name or --no-name, without a value, and --help lists all flags"
    parser.allow_abbrev = False
    parser.error = lambda what: refuse(what + mend * bool(re.search("unrecognized arg|explicit arg", what)))

    def flag(name: str, default: Any, kind: Any, help: str) -> None:
        options = {"type": kind, "metavar": "TEXT" if kind is str else "N"}
        options = {"choices": kind, "type": type(kind[0])} if isinstance(kind, tuple) else options
        options = {"action": argparse.BooleanOptionalAction} if kind is bool else options
        help += "" if default is None else " (default: %(default)s)"
        action = group.add_argument(f"--{name.replace('_', '-')}", default=default, help=help, **options)
        free.update({action.dest} if "may change" in group.title else ())

    group = parser.add_argument_group("run (a step is one decision of the agent: 4 emulator frames by default)")
    flag("env-id", "ALE/Breakout-v5", str, "ALE/<Game>-v5 (sticky actions) or <Game>NoFrameskip-v4 (none)")
    flag("seed", 1, between(int, 0, 2**31 - 1), "of weights, games, actions and shuffling")
    flag("total-timesteps", 10_000_000, between(int, 1, 2**53), "length of the run, in steps; may grow with --resume")
    flag("exp-name", "ppo_atari", str, "goes into the name of the run directory")
    flag("precision", "auto", ("auto", "float32", "bfloat16"), "of the network; auto: bfloat16 where hardware has it")
    flag("inference-batch", None, count, "games per policy call (default: the share of one default worker)")
    group = parser.add_argument_group("machine and files (may change with --resume)")
    flag("cuda", True, bool, "use a GPU if there is one")
    flag("cuda-graph", True, bool, "on a GPU, launch each update as one graph (in one process only)")
    flag("torch-deterministic", True, bool, "deterministic algorithms on a GPU too")
    flag("num-workers", None, between(int, 0, 1024), "rollout processes, 0: none (default: one per core and game)")
    flag("start-method", "fork" if sys.platform == "linux" else "spawn", ("fork", "spawn"), "of the workers")
    flag("resume", None, str, "go on with the run in this directory, with its flags")
    flag("checkpoint-interval", 300, natural, "iterations from one checkpoint to the next; 0: only at the end")
    group = parser.add_argument_group("evaluate, film, play, track (may change with --resume)")
    flag("evaluate", None, str, "play full games with the agent of a run directory or an agent file")
    flag("output", None, str, "write what --evaluate finds to this directory (default: to the run's, if it is yours)")
    flag("eval-episodes", 10, between(int, 0, 10_000), "full games per evaluation; 0: none")
    flag("eval-interval", 0, natural, "evaluate every N steps of training as well; 0: only at the end")
    flag("capture-video", False, bool, "film one game of each evaluation")
    flag("play", False, bool, "play yourself; with --evaluate: watch the agent")
    flag("track", False, bool, "mirror the run to Weights & Biases (pip install wandb)")
    flag("wandb-project-name", "ppo-atari", str, "project")
    flag("wandb-entity", None, str, "team or user")
    flag("wandb-name", None, str, "name of the run (default: the run directory's)")
    group = parser.add_argument_group("PPO")
    flag("num-envs", 8, count, "games played side by side, over all processes")
    flag("num-steps", 128, count, "steps per game in one rollout")
    flag("learning-rate", 2.5e-4, positive, "of Adam")
    flag("anneal-lr", True, bool, "let the learning rate fall linearly to 0")
    flag("gamma", 0.99, probability, "discount per step")
    flag("gae-lambda", 0.95, probability, "of generalized advantage estimation")
    flag("num-minibatches", 4, count, "per epoch")
    flag("update-epochs", 4, count, "passes over each rollout")
    flag("norm-adv", True, bool, "normalize the advantages of each minibatch")
    flag("clip-coef", 0.1, positive, "of the probability ratio and of the value")
    flag("clip-vloss", True, bool, "clip the value loss")
    flag("ent-coef", 0.01, weight, "of the entropy bonus")
    flag("ent-coef-final", None, weight, "anneal the entropy bonus linearly to this")
    flag("vf-coef", 0.5, weight, "of the value loss")
    flag("max-grad-norm", 0.5, positive, "clip the global gradient norm to this")
    flag("target-kl", None, positive, "end an update after the epoch whose approximate KL exceeds this")
    group = parser.add_argument_group("the nine Atari details, and the protocol of Machado et al. (2018)")
    flag("noop-max", 30, between(int, 0, 10_000), "a game starts after 1 to N frames of doing nothing; 0: at once")
    flag("frame-skip", 4, between(int, 1, 120), "emulator frames per step")
    flag("episodic-life", True, bool, "a lost life ends the episode, not the game")
    flag("fire-reset", True, bool, "press FIRE to start, in games that have it")
    flag("frame-size", 84, between(int, 1, 1020), "side of the image in pixels: 8m + 4, at least 36")
    flag("clip-reward", True, bool, "learn from the sign of the reward")
    flag("frame-stack", 4, between(int, 1, 64), "frames that the agent sees at once")
    flag("shared-network", True, bool, "policy and value share the network")
    flag("scale-obs", True, bool, "scale pixels to [0, 1]")
    flag("full-action-space", False, bool, "all of the console's actions (18, in nearly every game)")
    flag("repeat-action-probability", None, probability, "sticky actions, per frame (default: what the id says)")

    try:
        given = vars(parser.parse_args(argv))
        if resume := bool(given["resume"]):
            source = str(Path(given["resume"], "args.json"))
        with refusing(f"{source} is missing or damaged; give the directory of a run"):
            saved = {**(json.loads(Path(source).read_text())["flags"] if resume else saved)}  # of a dictionary only
        skipped = {"resume", "evaluate", "output", "play"} if resume else free - {"total_timesteps"}
        before = []  # as a user would type it
        for name, value in saved.items():
            if name not in given or (value is None and parser.get_default(name) is not None):
                refuse(f"{source}: this script has no flag {name!r} with the value {value!r}")
            typed = name.replace("_", "-")
            if value is not None and name not in skipped:
                before += [f"--{'' if value else 'no-'}{typed}" if isinstance(value, bool) else f"--{typed}={value}"]
        if source:
            with refusing(source, UsageError):
                derive(earlier := parser.parse_args(before))
        derive(args := parser.parse_args(before + argv))
        for name in given if resume else ():
            old, new = getattr(earlier, name), getattr(args, name)
            if new < old if name == "total_timesteps" else new != old and name not in free:
                refuse(f"--resume: --{name.replace('_', '-')} is {old} in that run, not {new}; leave it out")
        args.argv, args.flags = argv, {name: getattr(args, name) for name in given}
        args.identity = {name: value for name, value in args.flags.items() if name not in free}
        if not source and parse_args([], args.flags, "what --resume would read").identity != args.identity:
            refuse("a flag has another value when --resume or --evaluate reads it: make it a number or a text")
    except UsageError as error:
        parser.exit(2, f"ppo_atari.py: error: {' '.join(str(error).split())}\n")
    return args


def derive(args: Args) -> None:
    """Fills in what follows from the flags and the machine, and checks what one flag alone cannot show."""
    for name, low in (("rank", 0), ("local_rank", 0), ("world_size", 1), ("local_world_size", 1)):  # torchrun's
        with refusing(f"{name.upper()} in the environment", argparse.ArgumentTypeError):
            setattr(args, name, between(int, low, 2**20)(os.environ.get(name.upper(), str(low))))
    try:
        spec = gym.spec(args.env_id)  # imports nothing
    except (gym.error.Error, ImportError, ValueError):
        games = [name for name in gym.registry if name.startswith("ALE/") or name.endswith("NoFrameskip-v4")]
        near = difflib.get_close_matches(args.env_id[:50], games, n=3, cutoff=0.4) or games[:1]
        refuse(f"--env-id {args.env_id[:50]!r} is unknown; did you mean {' or '.join(near)}?")
    playable = spec.entry_point == "ale_py.env:AtariEnv" and not spec.kwargs.get("continuous")
    args.batch_size = args.num_envs * args.num_steps
    args.minibatch_size = args.batch_size // args.num_minibatches
    args.num_iterations = args.total_timesteps // args.batch_size
    args.local_envs = args.num_envs // args.world_size  # of this process
    sizes, share = f"{args.num_envs} environments x {args.num_steps} steps", f"{args.world_size} processes"
    pieces, size = args.num_minibatches * args.world_size, args.frame_size
    for wrong, message in (
        (not playable, f"--env-id {args.env_id} is not an Atari game, or has continuous actions"),
        (args.rank >= args.world_size, "RANK and WORLD_SIZE in the environment: start with torchrun, or unset both"),
        (args.num_envs % args.world_size, f"--num-envs {args.num_envs} cannot be split evenly over {share}"),
        (args.batch_size % pieces, f"--num-minibatches {args.num_minibatches} does not divide {sizes} / {share}"),
        (args.norm_adv and args.batch_size < 2 * pieces, "a minibatch of one sample has no spread: --no-norm-adv"),
        (args.num_iterations < 1, f"--total-timesteps {args.total_timesteps} is less than one rollout of {sizes}"),
        (size < 36 or size % 8 != 4, f"--frame-size must be 8m + 4 and at least 36, such as 44 or 84, not {size}"),
        (not re.fullmatch(r"[^/\\\x00-\x1f]{1,100}", args.exp_name), "--exp-name: 1 to 100 characters, and no slashes"),
        ("" in (args.resume, args.evaluate, args.output), "--resume, --evaluate and --output need a path: it is empty"),
        (args.output and not args.evaluate, "--output is for --evaluate: training makes a directory in runs/"),
        (args.resume and (args.evaluate or args.play), "--resume trains on; leave out --evaluate and --play"),
        (args.world_size > 1 and (args.evaluate or args.play), "WORLD_SIZE > 1: no torchrun for --evaluate or --play"),
    ):
        if wrong:
            refuse(message)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(max(1, cores // args.local_world_size), args.local_envs)
    args.workers = min(workers if args.num_workers is None else args.num_workers, args.local_envs)
    args.inference_batch = args.inference_batch or math.ceil(args.local_envs / workers)  # saved: other cores keep it


# --------------------------------------------------------------------------------------------------- 2 environment
def pack(value: Any, is_key: bool = False) -> Any:
    """A copy, for torch.load(weights_only=True), of numbers, text, tensors, NumPy's arrays and generators, torch's
    generators, whatever has a state_dict, and lists, tuples, deques and dictionaries, whose keys become Python's
    numbers and text. Of anything else, UsageError."""
    if hasattr(value, "state_dict"):
        return pack(value.state_dict())
    if isinstance(value, (torch.Generator, np.random.Generator)):
        return value.get_state() if isinstance(value, torch.Generator) else pack(value.bit_generator.state)
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, np.generic) and is_key:
        return value.item()
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        return {"ndarray": value.tobytes().decode("latin-1"), "dtype": value.dtype.str, "shape": value.shape}
    if isinstance(value, dict):
        return {pack(name, True): pack(part) for name, part in value.items()}
    if isinstance(value, deque):
        return {"deque": pack(list(value)), "maxlen": value.maxlen}
    if type(value) in (list, tuple):
        return type(value)(pack(part, is_key) for part in value)
    if type(value) in (type(None), bool, int, float, str) or (type(value) is bytes and value):  # torch reads no b""
        return value
    raise UsageError(f"a checkpoint cannot hold a {type(value).__name__}; keep its parts: see pack()")


def unpack(current: Any, kept: Any, seen: dict | None = None) -> Any:
    """What pack() kept, put back into `current` where that can be changed in place. An error of any kind: no fit. seen:
    where it has been put already, since one object under two names may have been two when they were kept."""
    seen = {} if seen is None else seen
    if isinstance(current, (list, dict, deque)):
        current = copy.deepcopy(current) if id(current) in seen else current
        seen[id(current)] = current
    if isinstance(current, Tensor) and kept.dtype == current.dtype:
        place, kept = current.data_ptr(), kept.view(current.shape) if current.numel() else kept  # which may have grown
        if not current.numel() or place in seen and not torch.equal(current.cpu(), kept):
            return kept.to(current)
        seen[place] = current
        current.detach().copy_(kept)  # it may be a parameter
        return current
    if isinstance(kept, dict) and kept.keys() == {"ndarray", "dtype", "shape"}:
        array = np.frombuffer(kept["ndarray"].encode("latin-1"), kept["dtype"]).reshape(kept["shape"])
        kept = array.copy()[()]  # [()]: a number of NumPy's, if it was one
    elif isinstance(kept, dict) and kept.keys() == {"deque", "maxlen"}:
        kept = deque(unpack(None, kept["deque"]), kept["maxlen"])
    elif isinstance(kept, dict):
        old = current if isinstance(current, dict) else {}
        names = [*kept, *(name for name, part in old.items() if isinstance(part, Tensor) and name not in kept)]
        kept = {name: unpack(old.get(name), kept[name], seen) for name in names}
    elif isinstance(kept, (list, tuple)):
        old = [*current] if type(current) is type(kept) else []
        kept = type(kept)(unpack(mine, its, seen) for mine, its in zip(old + [None] * len(kept), kept))
    numbers = [isinstance(x, (int, float, np.generic, np.ndarray)) and np.ndim(x) == 0 for x in (current, kept)]
    kinds = [f"{type(x).__name__} {getattr(x, 'dtype', '')} {getattr(x, 'ndim', '')}" for x in (current, kept)]
    if hasattr(current, "load_state_dict"):
        current.load_state_dict(kept)
    elif isinstance(current, torch.Generator):
        current.set_state(kept)
    elif isinstance(current, np.random.Generator):
        current.bit_generator.state = kept
    elif current is None or kept is None or all(numbers):  # all numbers are alike, of Python or of NumPy
        return kept
    elif kinds[0] != kinds[1] and not (isinstance(current, dict) and isinstance(kept, dict)):  # a Counter is one, too
        raise TypeError(f"{kinds[1].strip()} in place of {kinds[0].strip()}")
    elif isinstance(current, (dict, list, deque)):
        current.clear()
        current.update(kept) if isinstance(current, dict) else current.extend(kept)
    elif isinstance(current, np.ndarray) and current.shape == kept.shape and current.flags.writeable:
        shared = any(isinstance(x, np.ndarray) and np.may_share_memory(x, current) for x in seen.values())
        if (shared or current.ctypes.data in seen) and not np.array_equal(current, kept):
            return kept
        seen[current.ctypes.data] = current
        current[...] = kept
    else:
        return kept
    return current


def find_action(env: gym.Env, meaning: str) -> int | None:
    """The index of the action with this meaning, such as "FIRE", or None where the game lacks it."""
    meanings = env.unwrapped.get_action_meanings()
    return meanings.index(meaning) if meaning in meanings else None


def step_in_reset(env: gym.Env, action: int, info: dict) -> tuple[np.ndarray, dict]:
    """One step within a reset; resets again should it end the episode, and hands on info["episode"] of that game."""
    obs, _, terminated, truncated, step_info = env.step(action)
    if terminated or truncated:
        obs, reset_info = env.reset()
        step_info = step_info | reset_info
    return obs, info | step_info


class NoopResetEnv(gym.Wrapper):
    """[atari 1] Starts games after 1 to noop_max frames of NOOP or, in two games, action 0 (Mnih et al., 2015)."""

    def __init__(self, env: gym.Env, noop_max: int = 30):
        super().__init__(env)
        self.noop_max, self.noop = noop_max, find_action(env, "NOOP") or 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        for _ in range(self.np_random.integers(1, self.noop_max + 1)):
            obs, info = step_in_reset(self.env, self.noop, info)
        return obs, info


class MaxAndSkipEnv(gym.Wrapper):
    """[atari 2] Repeats an action for `skip` frames, sums rewards and returns the pixelwise maximum of the last two RGB
    screens [H, W, 3], the only ones drawn: some objects are in every other frame only (Mnih et al., 2015)."""

    def __init__(self, env: gym.Env, skip: int = 4):
        super().__init__(env)
        self.ale, self.skip = env.unwrapped.ale, skip
        self.actions = [ale_py.Action[meaning] for meaning in env.unwrapped.get_action_meanings()]

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        ale, reward, screen = self.ale, 0.0, None
        for frame in range(self.skip):
            reward += ale.act(self.actions[action])
            if over := ale.game_over():  # terminated or truncated
                break
            if frame == self.skip - 2:
                screen = ale.getScreenRGB()
        last = ale.getScreenRGB()
        screen = last if screen is None or over else np.maximum(screen, last, out=last)
        return screen, reward, ale.game_over(with_truncation=False), ale.game_truncated(), {}


class EpisodicLifeEnv(gym.Wrapper):
    """[atari 3] Ends the episode when a life is lost; reset() then goes on in the same game, unless it has a seed (Mnih
    et al., 2015). A counter that falls to 0 is no lost life: some games (Q*bert) show 0 for a while before they end."""

    saved = ("lives", "game_over")

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.noop, self.ale = find_action(env, "NOOP") or 0, env.unwrapped.ale
        self.lives, self.game_over = 0, True

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.game_over = terminated or truncated
        before, self.lives = self.lives, self.ale.lives()
        return obs, reward, terminated or 0 < self.lives < before, truncated, info

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        if self.game_over or kwargs.get("seed") is not None:
            obs, info = self.env.reset(**kwargs)
        else:
            obs, info = step_in_reset(self.env, self.noop, {})  # this step, too, can end the game (River Raid)
        self.lives, self.game_over = self.ale.lives(), False
        return obs, info


class FireResetEnv(gym.Wrapper):
    """[atari 4] Presses FIRE, then action 2, at each reset: some games stand still until then (openai/baselines)."""

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        for action in (find_action(self.env, "FIRE"), 2):
            obs, info = step_in_reset(self.env, action, info)
        return obs, info


class WarpFrame(gym.ObservationWrapper):
    """[atari 5] RGB screen [H, W, 3] to luminance, then to uint8 [size, size] by area averaging (Mnih et al., 2015)."""

    def __init__(self, env: gym.Env, size: int = 84):
        super().__init__(env)
        self.size, self.observation_space = size, gym.spaces.Box(0, 255, (size, size), np.uint8)

    def observation(self, screen: np.ndarray) -> np.ndarray:
        luminance = cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY)
        return cv2.resize(luminance, (self.size, self.size), interpolation=cv2.INTER_AREA)


class ClipRewardEnv(gym.RewardWrapper):
    """[atari 6] The sign of the reward: -1, 0 or +1, so that one learning rate suits all games (Mnih et al., 2015)."""

    def reward(self, reward: float) -> float:
        return float((reward > 0) - (reward < 0))


class FrameStack(gym.ObservationWrapper):
    """[atari 7] The last k frames [k, L, L], oldest first; after a reset, the first one k times (Mnih et al., 2015).
    Of frames [C, L, L]: [k * C, L, L]."""

    saved = ("frames",)

    def __init__(self, env: gym.Env, k: int = 4):
        super().__init__(env)
        space = env.observation_space
        self.frames = np.zeros((k, *space.shape), space.dtype)
        shape = (math.prod(self.frames.shape[:-2]), *space.shape[-2:])
        self.observation_space = gym.spaces.Box(space.low.min(), space.high.max(), shape, space.dtype)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        self.frames[:] = obs
        return self.observation(obs), info

    def observation(self, frame: np.ndarray) -> np.ndarray:
        self.frames = np.concatenate([self.frames[1:], frame[None]])
        return self.frames.reshape(self.observation_space.shape).copy()


for _stateless in (NoopResetEnv, MaxAndSkipEnv, FireResetEnv, WarpFrame, ClipRewardEnv):
    _stateless.saved = ()  # a wrapper names those of its attributes that change during a game: checkpoints hold them


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """The full stack, in openai/baselines' order: every program here plays through it. Observations are uint8
    [frame_stack, frame_size, frame_size]. info["episode"] = {"r", "l", "t"} appears once per game, when it is really
    over: return before clipping, length in steps, seconds. No frames are skipped but by MaxAndSkipEnv: frameskip=1."""
    sticky = args.repeat_action_probability
    kwargs = {} if sticky is None else {"repeat_action_probability": sticky}
    kwargs |= {"full_action_space": args.full_action_space, "render_mode": render_mode}
    env = gym.make(args.env_id, frameskip=1, disable_env_checker=True, **kwargs).unwrapped
    if args.noop_max > 0:
        env = NoopResetEnv(env, args.noop_max)
    env = MaxAndSkipEnv(env, args.frame_skip)
    env = gym.wrappers.RecordEpisodeStatistics(env)  # above the skip, beneath lives and clipping: as papers score
    env.saved = ("episode_returns", "episode_lengths")
    if args.episodic_life:
        env = EpisodicLifeEnv(env)
    if args.fire_reset and find_action(env, "FIRE") is not None:
        env = FireResetEnv(env)
    env = WarpFrame(env, args.frame_size)
    if args.clip_reward:
        env = ClipRewardEnv(env)
    return FrameStack(env, args.frame_stack)


def saved_attributes(env: gym.Env) -> Iterator[tuple[gym.Env, str]]:
    """What the wrappers declare with `saved`, base classes included: attributes, or parts of such, as "stats.mean".
    UsageError for a wrapper that declares nothing, or what it lacks."""
    while env is not env.unwrapped:
        declared = [vars(part)["saved"] for part in (env, *type(env).__mro__) if "saved" in vars(part)]
        if not declared:
            what = "`saved = ()`, or with the names of its attributes that change during a game"
            refuse(f"{type(env).__name__} needs {what}; on the class or, in make_env, on a stock wrapper's instance")
        for name in dict.fromkeys(itertools.chain(*declared)):
            with refusing(f"`saved` of {type(env).__name__}", AttributeError):
                *path, last = name.split(".")
                getattr(owner := reduce(getattr, path, env), last)
            yield owner, last
        env = env.env


def get_env_state(env: gym.Env, generator: np.random.Generator | None = None) -> dict[str, Any]:
    """Everything that the future of a game depends on, packed; also what its actions are drawn with, if given."""
    emulator = env.unwrapped.ale.cloneState(include_rng=True).serialize()
    wrappers = [getattr(wrapper, name) for wrapper, name in saved_attributes(env)]
    return pack({"emulator": emulator, "np_random": env.np_random, "wrappers": wrappers, "generator": generator})


def set_env_state(env: gym.Env, state: dict[str, Any], generator: np.random.Generator | None = None) -> None:
    """The inverse of get_env_state, for an environment of the same flags, reset once. Raises UsageError. The emulator
    is native code that trusts these bytes: their length, less generators' digits, is checked; forged ones do harm."""
    ale, words = env.unwrapped.ale, re.compile(rb"(?:\d{1,10} ){624}\d{1,3}")
    with refusing("the games in the checkpoint do not fit"):
        mine, its = (words.subn(b"", x) for x in (get_env_state(env)["emulator"], state["emulator"]))
        if (len(mine[0]), mine[1]) != (len(its[0]), its[1]):
            raise ValueError("the emulator's state is not of this game")
        ale.reset_game()
        ale.restoreState(ale_py.ALEState(state["emulator"]))
        unpack(generator, state["generator"])
        unpack(env.np_random, state["np_random"])
        places = [*saved_attributes(env)]
        for place, value in zip(places, unpack([getattr(*place) for place in places], state["wrappers"]), strict=True):
            setattr(*place, value)


def forget_last_action(env: gym.Env) -> None:
    """Makes the emulator's last action, which sticky actions repeat and no saved state contains, a NOOP: each rollout
    starts so, resumed or not. A frame fails to replace it with the sticky probability p, all n with p^n < 10^-11."""
    ale, sticky = env.unwrapped.ale, env.unwrapped.spec.kwargs["repeat_action_probability"]
    if sticky > 0:
        state = ale.cloneState(include_rng=True)
        for _ in range(math.ceil(-11 / math.log10(min(sticky, 0.99)))):
            ale.act(ale_py.Action.NOOP)
        ale.restoreState(state)


# --------------------------------------------------------------------------------------------------------- 3 agent
def layer_init(layer: nn.Module, std: float = math.sqrt(2), bias_const: float = 0.0) -> nn.Module:
    """[core 2] Orthogonal weights scaled by std and constant biases, in place."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


class PixelConv2d(nn.Conv2d):
    """A first layer for pixels of 0 to 255. Scales its weights in place of every pixel, which comes to the same."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype) * (1 / 255), self.bias.to(x.dtype))


class Flatten(nn.Module):
    """[B, C, H, W] to [B, H * W * C]: channels lie innermost in memory, so that this order costs no copy."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def nature_cnn(frame_stack: int, frame_size: int, scale_obs: bool) -> nn.Sequential:
    """[atari 8] The network of Mnih et al. (2015): pixels [B, frame_stack, L, L] to [B, 512]. L = 8m + 4 loses none."""
    first = PixelConv2d if scale_obs else nn.Conv2d  # [atari 9]
    layers = [layer_init(first(frame_stack, 32, 8, stride=4)), nn.ReLU(inplace=True)]
    layers += [layer_init(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(inplace=True)]
    layers += [layer_init(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(inplace=True), Flatten()]
    side = frame_size // 8 - 3  # 8m + 4 -> 2m -> m - 1 -> m - 3
    return nn.Sequential(*layers, layer_init(nn.Linear(64 * side * side, 512)), nn.ReLU(inplace=True))


class Agent(nn.Module):
    """A policy head and a value head on networks that map pixels of 0 to 255, [B, *obs_shape], to [B, any width]. By
    default the heads share one; shared_network=False gives the value head its own [core 13]."""

    def __init__(self, obs_shape: tuple, num_actions: int, make_network: Callable, shared_network: bool = True):
        super().__init__()
        self.dtype = torch.float32  # of the network's arithmetic; the heads always compute in float32
        self.network = make_network()
        self.critic_network = None if shared_network else make_network()
        with torch.no_grad():  # in eval mode: Dropout would draw random numbers
            width = self.eval().features(self.network, torch.zeros(1, *obs_shape, dtype=torch.uint8)).shape[1]
        self.actor = layer_init(nn.Linear(width, num_actions), std=0.01)  # nearly uniform at first
        self.critic = layer_init(nn.Linear(width, 1), std=1)
        self.train().to(memory_format=torch.channels_last)  # several times faster in the first convolution

    def features(self, network: nn.Module, obs: Tensor) -> Tensor:
        """float32 [B, width]."""
        x = obs.to(self.dtype).contiguous(memory_format=torch.channels_last)
        mixed = next(network.parameters()).dtype != self.dtype  # never in the acting copy
        with torch.autocast(obs.device.type, self.dtype) if mixed else nullcontext():
            return network(x).float()

    def get_action_and_value(self, obs: Tensor, action: Tensor | None = None, uniform: Tensor | None = None) -> Tensors:
        """action int64 [B], its log_prob [B], the policy's entropy [B] and the value [B]. Without an action, samples
        one: by inverting the distribution function at uniform [B] in [0, 1), if given."""
        hidden = self.features(self.network, obs)
        critic_hidden = hidden if self.critic_network is None else self.features(self.critic_network, obs)
        value = self.critic(critic_hidden).flatten()
        log_probs = self.actor(hidden).log_softmax(-1)
        probs = log_probs.exp()
        if action is None:
            uniform = torch.rand(len(obs), device=obs.device) if uniform is None else uniform
            action = (probs.cumsum(-1) <= uniform[:, None]).sum(-1).clamp_(max=probs.shape[-1] - 1)
        log_prob = log_probs.gather(-1, action[:, None]).squeeze(-1)
        return {"action": action, "log_prob": log_prob, "entropy": -(probs * log_probs).sum(-1), "value": value}


def make_agent(args: Args, env: gym.Env) -> Agent:
    """The agent that the flags describe, for this environment. Every program here builds its agent with it."""
    obs_shape = env.observation_space.shape
    make_network = partial(nature_cnn, obs_shape[0], obs_shape[1], args.scale_obs)
    return Agent(obs_shape, int(env.action_space.n), make_network, args.shared_network)


def inference_copy(agent: Agent, dtype: torch.dtype) -> Agent:
    """A copy that acts: in eval mode, with the network's weights kept in the dtype it computes in. Before each rollout,
    it gets the agent's parameters and buffers; what else the agent changes in itself, or Dropout, it acts without."""
    clone = copy.deepcopy(agent).requires_grad_(False).eval()
    clone.dtype = dtype
    for network in filter(None, (clone.network, clone.critic_network)):
        network.to(dtype)
    for layer in clone.modules() if dtype == torch.float32 else ():
        if isinstance(layer, nn.Linear):  # small batches times the large matrix: twice as fast with contiguous columns
            layer.weight.data = layer.weight.t().contiguous().t()
    return clone


# ------------------------------------------------------------------------------------------------------- 4 rollout
def rollout_fields(args: Args, env: gym.Env) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What a rollout keeps of each step in each environment: name, type and shape. The loss reads the same names.
    Filled with the agent's outputs of these names, and by store() in rollout(). done: 1 where obs starts an episode."""
    obs = (getattr(torch, env.observation_space.dtype.name), env.observation_space.shape)
    fields = {"obs": obs, "action": (torch.int64, ())}
    return fields | dict.fromkeys(("reward", "done", "log_prob", "value"), (torch.float32, ()))


def allocate(args: Args, env: gym.Env, actor: nn.Module | None = None) -> Tensors:
    """Each field of a rollout, [T + 1, N, ...]; row T becomes the next row 0. In shared memory, for workers."""
    size, fields = (args.num_steps + 1, args.local_envs), rollout_fields(args, env)
    need = sum(math.prod((*size, *shape)) * dtype.itemsize for dtype, shape in fields.values())
    need += sum(tensor.nbytes for tensor in actor.state_dict().values()) if actor else 0  # shared as well
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    shared = shutil.disk_usage("/dev/shm").free if args.workers and os.path.exists("/dev/shm") else math.inf
    kind, room, mend = "memory", physical, "lower --num-envs or --num-steps"
    if shared < physical:
        kind, room = "shared memory", shared
        mend = f"enlarge /dev/shm (docker run --shm-size), give --num-workers 0, or {mend}"
    if need + 2**20 > room:  # the system would kill the process without a word
        raise RunError(f"a rollout needs {need >> 20:,} MB of {kind}, and there are {room >> 20:,} MB: {mend}")
    storage = {name: torch.zeros((*size, *shape), dtype=dtype) for name, (dtype, shape) in fields.items()}
    return {name: tensor.share_memory_() if args.workers else tensor for name, tensor in storage.items()}


def act(agent: Agent, obs: Tensor, uniform: Tensor, batch: int) -> Tensors:
    """The agent's outputs for any number of observations, in batches of one size, 1 or 4n: however many workers share
    the environments. Matrix kernels differ in the last bit between sizes and, in others than these, between rows."""
    batch, parts = 1 if batch == 1 else math.ceil(batch / 4) * 4, []
    for o, u in zip(obs.split(batch), uniform.split(batch)):
        if len(o) < batch:
            o, u = (torch.cat([x, x[:1].expand(batch - len(x), *x.shape[1:])]) for x in (o, u))
        parts.append(agent.get_action_and_value(o, uniform=u))
    return {name: torch.cat([part[name] for part in parts])[: len(obs)] for name in parts[0]}


@torch.inference_mode()
def rollout(agent: Agent, envs: gym.vector.VectorEnv, storage: Tensors, generators: list, args: Args) -> tuple:
    """Plays and stores one rollout of envs, which must have SAME_STEP autoreset; generators[i], NumPy's, draws for the
    i-th. Returns the games that ended, as (step of the rollout, i, return, length), and the seconds by kind of work."""
    num_steps, games, filled = args.num_steps, [], {("obs", 0), ("done", 0)}
    seconds = {"environment": 0.0, "inference": 0.0}
    uniform = torch.from_numpy(np.stack([g.random(num_steps, np.float32) for g in generators], axis=1))

    def store(t: int, **values: Tensor) -> None:
        """Keeps, as step t of the rollout, those of the values [N, ...] that rollout_fields names."""
        for name in values.keys() & storage.keys():
            storage[name][t] = values[name]
            filled.add((name, t))

    for env in envs.envs:
        forget_last_action(env)
    for field in storage.values():
        field[0] = field[num_steps]
    for t in range(num_steps):
        started = time.perf_counter()
        outputs = act(agent, storage["obs"][t], uniform[t], args.inference_batch)
        inferred = time.perf_counter()
        next_obs, reward, terminated, truncated, infos = envs.step(outputs["action"].numpy())
        next_obs, reward = torch.from_numpy(next_obs), torch.from_numpy(reward).float()
        for i in np.flatnonzero(truncated & ~terminated):  # the time limit is not the game's end: bootstrap
            final_obs = torch.from_numpy(infos["final_obs"][i])[None]
            reward[i] += args.gamma * act(agent, final_obs, uniform[t, :1], args.inference_batch)["value"][0]
        store(t, reward=reward, **outputs)
        store(t + 1, obs=next_obs, done=torch.from_numpy(terminated | truncated))
        for info in (infos.get("final_info", {}), infos):  # a game can also end within a reset: see step_in_reset
            for i in np.flatnonzero(info.get("_episode", ())):
                games.append((t, int(i), float(info["episode"]["r"][i]), int(info["episode"]["l"][i])))
        seconds["inference"] += inferred - started
        seconds["environment"] += time.perf_counter() - inferred
    store(num_steps, **act(agent, storage["obs"][num_steps], uniform[0], args.inference_batch))
    for name, t in itertools.product(storage, range(num_steps)):
        if (name, t) not in filled:
            raise RunError(f"rollout_fields names {name!r}: no output of the agent and no store() fills its step {t}")
    return games, seconds


def drawn() -> tuple:
    """Torch's, NumPy's and Python's own generators of the CPU, to see whether something has drawn from one."""
    return torch.get_rng_state().tolist(), pack(np.random.get_state()), random.getstate()


class Collector:
    """Environments low to high - 1 of a process and what acts in them; lives in a worker or in the learner itself."""

    def __init__(self, args: Args, agent: Agent, storage: Tensors, low: int, high: int):
        self.args, self.agent, self.first = args, agent, args.rank * args.local_envs + low
        self.storage = {name: tensor[:, low:high] for name, tensor in storage.items()}
        seeds = [[args.seed, self.first + i] for i in range(high - low)]  # numbered over all processes
        self.generators = [np.random.default_rng(seed) for seed in seeds]
        self.envs = gym.vector.SyncVectorEnv([lambda: make_env(args)] * len(seeds), False, autoreset_mode="SameStep")
        game_seeds = [int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1) for seed in seeds]
        self.storage["obs"][-1] = torch.from_numpy(self.envs.reset(seed=game_seeds)[0])
        self.storage["done"][-1] = 1

    def rollout(self) -> tuple[list, dict]:
        threads, before = torch.get_num_threads(), drawn()
        torch.set_num_threads(1)  # a small batch gains nothing from threads, and results must not depend on them
        games, seconds = rollout(self.agent, self.envs, self.storage, self.generators, self.args)
        torch.set_num_threads(threads)
        if drawn() != before:  # each worker has its own, which no checkpoint holds
            mend = "use `uniform`, a buffer of the agent filled once an iteration, or self.np_random in a wrapper"
            raise RunError(f"torch's, NumPy's or Python's own generator was drawn from while acting: {mend}")
        return [(t, self.first + i, *score) for t, i, *score in games], seconds

    def get_state(self) -> list[dict[str, Any]]:
        return list(map(get_env_state, self.envs.envs, self.generators))

    def set_state(self, states: list[dict[str, Any]]) -> None:
        for env, state, generator in zip(self.envs.envs, states, self.generators):
            set_env_state(env, state, generator)


def worker_main(pipe: connection.Connection, *collector_args: Any) -> None:
    """A worker process: makes its Collector, then answers calls of its methods, for as long as the learner lives."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # the learner decides when to stop
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    try:
        torch.set_num_threads(1)
        collector = Collector(*collector_args)
        while True:
            method, call_args = pipe.recv()
            pipe.send((getattr(collector, method)(*call_args), None))
    except Exception as error:
        pipe.send((None, error if isinstance(error, RunError) else RunError(f"in a worker: {traceback.format_exc()}")))


class Workers:
    """[core 1] The Collectors of a run, in processes that share storage and weights, or in this one: --num-workers 0"""

    def __init__(self, args: Args, agent: Agent, storage: Tensors):
        bounds = np.linspace(0, args.local_envs, max(1, args.workers) + 1).astype(int).tolist()
        self.shares, self.processes, self.pipes = list(itertools.pairwise(bounds)), [], []
        # However this process ends: they ignore the signal with which multiprocessing would end them at its exit.
        self.close = weakref.finalize(self, lambda them: [(p.kill(), p.join()) for p in them if p.pid], self.processes)
        self.local = None if args.workers else Collector(args, agent, storage, *self.shares[0])
        torch._dynamo  # noqa: B018  the optimizer imports it: now, forked workers share its memory, 75 MB
        context = torch.multiprocessing.get_context(args.start_method)
        for share in self.shares if args.workers else ():
            pipe, their_pipe = context.Pipe()
            collector_args = (their_pipe, args, agent.share_memory(), storage, *share)
            self.processes.append(context.Process(target=worker_main, args=collector_args, daemon=True))
            self.pipes.append(pipe)
            self.processes[-1].start()
            their_pipe.close()  # so that recv() notices the end of a worker, after its last words
        self.state_dict()  # waits until each has begun its games, and tells why one could not

    def call(self, method: str, *lists: list) -> list[Any]:
        """Calls a method of all Collectors, each with its part of the lists. Raises its error; RunError if one died."""
        if self.local:
            return [getattr(self.local, method)(*(values[0] for values in lists))]
        for pipe, *values in zip(self.pipes, *lists):
            with suppress(BrokenPipeError, ConnectionResetError):  # who has died is found out below
                pipe.send((method, values))
        answers = []
        for i, (pipe, process) in enumerate(zip(self.pipes, self.processes)):
            try:
                answer, error = pipe.recv()
            except (EOFError, ConnectionResetError):
                process.join()
                error = RunError(f"rollout worker {i} ended with exit code {process.exitcode}")
            if error:
                raise error
            answers.append(answer)
        return answers

    def rollout(self) -> tuple[list, dict[str, float]]:
        """One rollout in all environments: the games that ended, and the mean seconds by kind of work."""
        games, seconds = zip(*self.call("rollout"))
        return sum(games, []), {work: float(np.mean([share[work] for share in seconds])) for work in seconds[0]}

    def state_dict(self) -> list[dict[str, Any]]:
        return sum(self.call("get_state"), [])

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        self.call("set_state", [[states[i] for i in range(*share)] for share in self.shares])


# ----------------------------------------------------------------------------------------------------------- 5 PPO
def compute_gae(rewards: Tensor, values: Tensor, dones: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, ...]:
    """[core 5] Generalized advantage estimation (Schulman et al., 2016): advantages and returns, both [T, N]. rewards
    are [T, N], values and dones [T + 1, N]; dones[t] is 1 where observation t starts a new episode."""
    advantages, advantage = torch.zeros_like(rewards), torch.zeros_like(values[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * values[t + 1] * (1 - dones[t + 1]) - values[t]
        advantages[t] = advantage = delta + gamma * gae_lambda * (1 - dones[t + 1]) * advantage
    return advantages, advantages + values[:-1]


def all_mean(tensor: Tensor) -> Tensor:
    """The mean over all processes, in place; the tensor itself where there is only one."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def normalize(advantage: Tensor) -> Tensor:
    """[core 7] Zero mean and unit standard deviation over the minibatch, of which each process has a share."""
    if not dist.is_initialized():
        return (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    centered = advantage - all_mean(advantage.mean())
    size = len(advantage) * dist.get_world_size()
    return centered / ((all_mean(centered.square().mean()) * size / (size - 1)).sqrt() + 1e-8)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """[core 12] 1 - Var[returns - values] / Var[returns], over all processes; nan where the returns do not vary."""
    errors, returns = (x - all_mean(x.mean()) for x in ((returns - values).double(), returns.double()))
    variance = all_mean(returns.square().mean()).item()
    return 1 - all_mean(errors.square().mean()).item() / variance if variance > 0 else math.nan


def ppo_loss(new: Tensors, old: Tensors, args: Args, knobs: Tensors) -> tuple[Tensor, Tensors]:
    """The loss of one minibatch (Schulman et al., 2017), and what to log of it: any 0-dimensional tensors by name. new:
    the agent's outputs for it, [B] each; old: the same rows of the rollout's fields, of advantage and of return_."""
    advantage = normalize(old["advantage"]) if args.norm_adv else old["advantage"]
    log_ratio = new["log_prob"] - old["log_prob"]
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(advantage * ratio, advantage * clipped_ratio).mean()  # [core 8]

    value, squared_error = new["value"], (new["value"] - old["return_"]).square()
    if args.clip_vloss:  # [core 9]
        clipped_value = old["value"] + (value - old["value"]).clamp(-args.clip_coef, args.clip_coef)
        squared_error = torch.max(squared_error, (clipped_value - old["return_"]).square())
    value_loss = 0.5 * squared_error.mean()

    entropy = new["entropy"].mean()
    loss = policy_loss - knobs["ent_coef"] * entropy + args.vf_coef * value_loss  # [core 10]
    stats = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    # [core 12] Both estimators of the KL divergence: Schulman, "Approximating KL Divergence" (2020)
    stats |= {"old_approx_kl": (-log_ratio).mean(), "approx_kl": (ratio - 1 - log_ratio).mean()}
    stats |= {"clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean()}
    return loss, stats


def make_knobs(args: Args, device: torch.device) -> Tensors:
    """Every number that changes during training, as a 0-dimensional tensor: logged as charts/<name> and checkpointed.
    Change it in place, `knobs[name].fill_(...)`, in anneal() or in the loop: a CUDA graph sees only that."""
    numbers = {"learning_rate": args.learning_rate, "ent_coef": args.ent_coef}
    return {name: torch.tensor(float(number), device=device) for name, number in numbers.items()}


def anneal(knobs: Tensors, args: Args, iteration: int) -> None:
    """[core 4] Linear from the first iteration, 1, to 0 or the final value in the iteration after the last."""
    left = 1 - (iteration - 1) / args.num_iterations
    if args.anneal_lr:
        knobs["learning_rate"].fill_(args.learning_rate * left)
    if args.ent_coef_final is not None:
        knobs["ent_coef"].fill_(args.ent_coef_final + (args.ent_coef - args.ent_coef_final) * left)


def take(batch: Tensors, rows: Tensor) -> Tensors:
    """These rows of every tensor of a batch. Of images, which lie channels-last, index_select gathers whole rows."""
    images = {name: tensor.permute(0, 2, 3, 1) for name, tensor in batch.items() if tensor.dim() == 4}
    taken = {name: tensor[rows] for name, tensor in batch.items() if name not in images}
    return taken | {name: image.index_select(0, rows).permute(0, 3, 1, 2) for name, image in images.items()}


def update(agent: Agent, optimizer: torch.optim.Optimizer, batch: Tensors, args: Args, knobs: Tensors, rows: Tensor):
    """One gradient step on the minibatch that these rows of the batch form. Returns what to log of it, as Tensors."""
    old = take(batch, rows)
    loss, stats = ppo_loss(agent.get_action_and_value(old["obs"], old["action"]), old, args, knobs)
    optimizer.zero_grad()
    loss.backward()
    if args.world_size > 1:  # one message for all; frozen parameters have no gradient
        gradients = [parameter.grad for parameter in agent.parameters() if parameter.grad is not None]
        mean = all_mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))
    grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)  # [core 11]
    for group in optimizer.param_groups:
        group["lr"].copy_(knobs["learning_rate"] * group["lr_scale"])
    optimizer.step()
    return {name: stat.detach().float() for name, stat in stats.items()} | {"grad_norm": grad_norm}


def cuda_graph(step: Callable, rows: Tensor, agent: nn.Module, optimizer: torch.optim.Optimizer) -> Callable:
    """The update `step` as a CUDA graph: one launch in place of hundreds. Plain numbers (args.clip_coef, say) and every
    `if` are frozen here: what changes must be a knob. RunError if the CPU draws in it: that would be frozen, too. If
    there can be no graph, says why and returns `step`."""
    before = copy.deepcopy((agent.state_dict(), optimizer.state_dict()["state"], torch.cuda.get_rng_state(), drawn()))

    def replay(new_rows: Tensor) -> Tensors:
        mine.copy_(new_rows)
        graph.replay()
        return dict(zip(names, stats.clone()))

    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings(action="ignore"):  # of steps outside of a graph
            for _ in range(3):  # the first calls choose kernels and allocate, which no graph may
                names = list(step(rows))
        if drawn() != before[3]:
            raise RunError("the CPU draws random numbers in update(): draw on the GPU, or give --no-cuda-graph")
        torch.cuda.current_stream().wait_stream(stream)
        optimizer.zero_grad()
        graph, mine = torch.cuda.CUDAGraph(), rows.clone()
        with torch.cuda.graph(graph):
            stats = torch.stack(list(step(mine).values()))
        replay(rows)
        torch.cuda.synchronize()
    except RuntimeError as error:
        say(f"ppo_atari.py: going on without a CUDA graph: {str(error).splitlines()[0]}", sys.stderr)
        replay = step
        for group in optimizer.param_groups:
            group["capturable"] = False
    agent.load_state_dict(before[0])  # in place, as all this: the graph knows these tensors by their addresses
    for index, parameter in enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]):
        for name, tensor in optimizer.state.get(parameter, {}).items():
            tensor.copy_(before[1][index][name]) if index in before[1] else tensor.zero_()
    torch.cuda.set_rng_state(before[2])
    return replay


class Learner:
    """The agent on its device with all that trains it: optimizer, knobs, and the batch that a rollout becomes.
    Parameters may be frozen. The optimizer's groups follow the knob learning_rate in proportion, not a scheduler."""

    def __init__(self, args: Args, agent: Agent, device: torch.device, dtype: torch.dtype):
        self.args, self.agent, self.device, self.on_gpu = args, agent.to(device), device, device.type == "cuda"
        self.graphed = self.on_gpu and args.cuda_graph and args.world_size == 1
        self.knobs = MappingProxyType(make_knobs(args, device))  # to be filled, not replaced
        self.optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)  # [core 3]
        self.settle(self.optimizer)
        hook = partial(Learner.settle, weakref.proxy(self))  # no cycle: a graph ends with its learner, not in a fork
        self.optimizer.register_load_state_dict_post_hook(hook)  # a checkpoint may be another machine's
        agent.dtype, self.batch, self.step, self.fixed = dtype, {}, None, {}

    def settle(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes each group's learning rate a tensor on the device, to be changed in place."""
        for group in optimizer.param_groups:
            group.setdefault("lr_scale", float(group["lr"]) / self.args.learning_rate)
            group |= {"lr": torch.tensor(float(group["lr"]), device=self.device), "capturable": self.graphed}

    def refuse_changes(self) -> None:
        """RunError for what changes where neither a checkpoint nor a worker nor a CUDA graph would see it: a number or
        a text in args or in a module of the agent, or a learning rate that a scheduler sets."""
        owners = {"args": self.args, **dict(self.agent.named_modules(prefix="agent"))}
        values = [(f"{owner}.{name}", x) for owner, part in owners.items() for name, x in vars(part).items()]
        fixed = {name: repr(x) for name, x in values if isinstance(x, (int, float, str, type(None)))}
        changed = [name for name, x in fixed.items() if self.fixed.get(name, x) != x]
        changed += ["a scheduler's learning rate" for group in self.optimizer.param_groups if "initial_lr" in group]
        if changed:
            raise RunError(f"{changed[0]} changes during training, and no checkpoint holds it: see make_knobs()")
        self.fixed = fixed

    def fill(self, storage: Tensors, **computed: Tensor) -> None:
        """Makes a rollout [T + 1, N, ...] and what was computed from it [T, N] the batch [T * N, ...], in place."""
        self.refuse_changes()
        for name, source in ({name: tensor[:-1] for name, tensor in storage.items()} | computed).items():
            source = source.flatten(0, 1).to(self.device, non_blocking=True)
            if name not in self.batch:
                layout = torch.channels_last if source.dim() == 4 else torch.contiguous_format
                self.batch[name] = torch.empty_like(source, memory_format=layout)
            self.batch[name].copy_(source)  # a CUDA graph reads it there
        if not self.on_gpu:
            return
        torch.cuda.manual_seed(int(torch.randint(2**31, ())))  # from the generator that a checkpoint holds
        self.agent.eval()
        with torch.no_grad():  # the actor rounds differently: its outputs anew, so that the ratio starts at exactly 1
            for rows in torch.arange(len(source), device=self.device).split(1024):
                old = take(self.batch, rows)
                for name, new in self.agent.get_action_and_value(old["obs"], old["action"]).items():
                    if name in old:
                        self.batch[name][rows] = new
        self.agent.train()

    def update(self, rows: Tensor) -> Tensors:
        if self.step is None:
            self.step = partial(update, self.agent, self.optimizer, self.batch, self.args, self.knobs)
            if self.graphed:
                self.step = cuda_graph(self.step, rows, self.agent, self.optimizer)
        return self.step(rows)


# --------------------------------------------------------------------------------------------------- 6 run directory
def write_file(path: Path, content: bytes | dict) -> None:
    """Writes bytes, or a dictionary in torch's format: a whole file or, if it fails, the old one. Follows no link."""
    temporary, buffer = path.with_name(path.name + ".tmp"), io.BytesIO()
    if isinstance(content, dict):
        torch.save(content, buffer)  # not to the file: there, a full disk would be a RuntimeError like any other
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:
            file.write(content if isinstance(content, bytes) else buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # half a file would help to keep a full disk full


def load_file(path: Path, *keys: str) -> dict[str, Any]:
    """A dictionary with these keys and finite "weights"; UsageError for anything else. No code of it is run: an agent
    can do no harm. The emulators in a checkpoint are native code that believes it: resume only what is your own."""
    with refusing(f"{path} is damaged or not of this script"), refusing(f"{path} does not exist", FileNotFoundError):
        damaged = zipfile.ZipFile(path).testzip()  # torch.load compares no checksums
        content = torch.load(path, map_location="cpu", weights_only=True)
        finite = all(tensor.isfinite().all() for tensor in content["weights"].values())
        step = content.get("step", 0)
        if damaged or not finite or not set(keys) <= content.keys() or type(step) is not int or not 0 <= step < 2**53:
            raise ValueError("not finite, or not complete")
    return content


class Nothing:
    """A RunDirectory that swallows every call: for ranks above 0, and to evaluate an agent that is not one's own."""

    kept, failing = "rank 0 says what is kept", ()

    def __getattr__(self, name: str) -> Callable:
        return lambda *args: None


class RunDirectory:
    """What a run writes, by one process at a time, else UsageError. If it cannot (a full disk), training goes on."""

    def __init__(self, path: Path):
        import torch.utils.tensorboard  # noqa: F401  here, because the workers do without it

        self.path, self.failing, self.kept = path, set(), "there is no checkpoint yet"
        self.writer, self.bar, self.purge_step = None, None, None
        hook = threading.excepthook  # what TensorBoard's own thread cannot write, attempt() reports
        threading.excepthook = lambda error: None if issubclass(error.exc_type, OSError) else hook(error)
        with refusing(f"cannot write to {path}", OSError):
            self.lock = os.open(path, os.O_RDONLY)
        with suppress(ImportError, OSError), refusing(f"cannot write to {path}: another process does", BlockingIOError):
            import fcntl  # a system or a disk without locks goes without

            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        for part in filter(None, (self.bar, self.writer)):
            with self.attempt("TensorBoard events"):
                part.close()
        os.close(self.lock)

    def begin(self, args: Args, device: torch.device, dtype: torch.dtype, step: int, sight: tuple) -> None:
        """Writes args.json, or raises UsageError, says what runs where, and describes a new run in its events."""
        about = {"flags": args.flags, "versions": {m.__name__: m.__version__ for m in (ale_py, cv2, gym, np, torch)}}
        about["hardware"] = {"device": str(device), "precision": str(dtype)[6:], "threads": torch.get_num_threads()}
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        with suppress(OSError):  # not every machine has git
            about["git"] = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        with refusing(f"cannot write to {self.path}", OSError):
            write_file(self.path / "args.json", json.dumps(about, indent=1).encode())
        on = f"{device}, {str(dtype)[6:]}, {args.workers} rollout workers, {torch.get_num_threads()} threads"
        say(f"run directory: {self.path}\n{on}")
        if args.resume:  # TensorBoard drops what an interrupted run wrote after its checkpoint: no overlap, no gap
            self.purge_step, self.kept = step + 1, f"the checkpoint of step {step:,} is kept"
        tqdm.monitor_interval = 0  # no thread of its own: where memory is short, that fails with a line of its own
        self.bar = tqdm(total=args.num_iterations * args.batch_size, initial=step, unit="steps", disable=None)  # no tty
        self.begun, self.printed = (time.perf_counter(), step), time.perf_counter()
        if not args.resume:
            rows = "".join(f"|{name}|{value}|\n" for name, value in args.flags.items())
            first = ("charts/episodic_return", "charts/SPS", "losses/explained_variance", "losses/approx_kl")
            charts = {"PPO": {tag: ["Multiline", [tag]] for tag in first}}
            tab = torch.utils.tensorboard.summary.hparams(args.flags, {first[0]: 0})  # add_hparams: in a sub-run
            self.events(lambda writer: writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{rows}"))
            self.events(lambda writer: [*map(writer.file_writer.add_summary, tab), writer.add_custom_scalars(charts)])
            self.picture("observation", *sight, step)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Around what writes. Its failure is told once, and once that it works again."""
        failed, news = False, "can be written again"
        try:
            yield
        except (OSError, cv2.error) as error:
            failed, news = True, f"cannot be written: {error}; going on without"
        if failed != (what in self.failing):
            self.failing ^= {what}
            say(f"ppo_atari.py: {what} {news}", sys.stderr)

    def write(self, name: str, content: bytes | dict) -> None:
        with self.attempt(name):
            write_file(self.path / name, content)

    def events(self, add: Callable) -> None:
        """Calls add(writer) with TensorBoard's writer, a new one after a failure, since it never recovers; flushes."""
        with self.attempt("TensorBoard events"):
            self.writer = self.writer or torch.utils.tensorboard.SummaryWriter(self.path, purge_step=self.purge_step)
            add(self.writer)
            self.writer.flush()
            self.purge_step = None
        for file in self.path.glob("events.out.tfevents.*") if "TensorBoard events" in self.failing else ():
            self.writer = None
            with suppress(OSError):
                file.stat().st_size or file.unlink()  # every attempt leaves one

    def log(self, points: list[tuple[str, float, int]], recent: deque, step: int) -> None:
        """The points (tag, value, step) of an iteration, as far as they are finite, and the progress, now at `step`."""
        self.events(lambda writer: [writer.add_scalar(*point) for point in points if math.isfinite(point[1])])
        status, now = f"return {np.mean(recent):.1f}" if recent else "no game over yet", time.perf_counter()
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and now - self.printed >= 30:
            self.printed, speed = now, (step - self.begun[1]) / (now - self.begun[0])
            left = timedelta(seconds=round((self.bar.total - step) / speed))
            say(f"step {step:,} of {self.bar.total:,}, {status}, {speed:,.0f} steps/s, {left} left")

    def picture(self, tag: str, obs: np.ndarray, screen: np.ndarray, step: int) -> None:
        """What the agent sees, the stacked frames [k, L, L], to the right of the raw screen [H, W, 3]."""
        if obs.dtype != np.uint8:  # all that OpenCV and TensorBoard can draw
            obs = np.interp(obs.astype(float), (obs.min(), obs.max() + 1e-9), (0, 255)).astype(np.uint8)
        size = (len(screen), len(screen))
        frames = [cv2.cvtColor(cv2.resize(f, size, interpolation=cv2.INTER_NEAREST), cv2.COLOR_GRAY2RGB) for f in obs]
        image = np.concatenate([screen, *frames], axis=1)
        self.events(lambda writer: writer.add_image(tag, image, step, dataformats="HWC"))

    def film(self, frames: list[np.ndarray], step: int, fps: int) -> None:
        """RGB frames [H, W, 3] as videos/<step>.webm (VP8, which browsers play) and as a GIF in the Images tab."""
        from PIL import Image

        height, width, _ = frames[0].shape
        folder, size, Summary = self.path / "videos", (2 * width, 2 * height), torch.utils.tensorboard.summary.Summary
        with self.attempt("the video"), tempfile.TemporaryDirectory() as elsewhere:  # OpenCV is silent on a full disk
            film = cv2.VideoWriter(f"{elsewhere}/film.webm", cv2.VideoWriter_fourcc(*"VP80"), fps, size)
            for frame in frames:
                film.write(frame[..., ::-1].repeat(2, 0).repeat(2, 1))  # BGR, twice as large
            film.release()
            folder.mkdir(exist_ok=not folder.is_symlink())
            write_file(folder / f"{step}.webm", Path(elsewhere, "film.webm").read_bytes())
        skip, gif = 2 * math.ceil(len(frames) / 1200), io.BytesIO()  # at most 600 images: the dashboard stays quick
        images = [Image.fromarray(frame).quantize(32) for frame in frames[::skip]]
        images[0].save(gif, "GIF", save_all=True, append_images=images[1:], duration=1000 * skip // fps, loop=0)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif.getvalue())
        summary = Summary(value=[Summary.Value(tag="eval/video", image=image)])
        self.events(lambda writer: writer.file_writer.add_summary(summary, step))

    def farewell(self, step: int, stopped: int) -> None:
        """Says how a training ended, and how to go on if it was stopped."""
        path = shlex.quote(str(self.path))
        if self.failing:
            what = " and ".join(sorted(self.failing))
            say(f"ppo_atari.py: {what} could not be written to the end; {self.kept}", sys.stderr)
        elif stopped and step < self.bar.total:
            say(f"stopped and saved at step {step:,}; to go on: python ppo_atari.py --resume {path}")
        elif stopped:
            say(f"the training is complete; its score: python ppo_atari.py --evaluate {path}")


# ------------------------------------------------------------------------------------------------------- 7 processes
def choose_device(args: Args) -> torch.device:
    """This process' GPU, made to do what the flags say, or the CPU. UsageError if the GPU cannot be used."""
    if not (args.cuda and torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", args.local_rank % torch.cuda.device_count())  # some see their own GPU only
    with refusing("the GPU cannot be used (--no-cuda does without)", RuntimeError):
        torch.cuda.set_device(device)
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        backend.fp32_precision = "ieee"  # TF32, cuDNN's default, would keep 10 of float32's 23 bits
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and determines nothing here
    return device


def choose_dtype(args: Args, device: torch.device) -> torch.dtype:
    """bfloat16 only where the hardware multiplies it: elsewhere it would be slower than float32."""
    if args.precision != "auto":
        return getattr(torch, args.precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if has.get("amx_bf16") or has.get("avx512_bf16") else torch.float32


def lock_pages(storage: Tensors, stack: ExitStack) -> None:
    """Locks the storage into memory until the stack ends, as far as the system allows: so a GPU copies it by itself."""
    cudart = torch.cuda.cudart()
    for tensor in storage.values():
        if int(cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) == 0:
            stack.callback(cudart.cudaHostUnregister, tensor.data_ptr())


def gather(mine: Any) -> list[Any]:
    """What each process contributes, in the order of ranks."""
    everyone = [mine] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(everyone, mine)
    return everyone


def join_processes(args: Args, device: torch.device, stack: ExitStack) -> None:
    """Makes torchrun's processes a group until the stack ends. After the optimizer: its imports would keep it alive."""
    if args.world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with refusing("several processes are started by torchrun", ValueError):
            dist.init_process_group(backend, timeout=timedelta(days=1))  # evaluations may be long
        stack.callback(dist.destroy_process_group)
        gpus = gather(str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None)
        if any(gpus) and (None in gpus or len(set(gpus)) < len(gpus)):
            refuse("each process needs a GPU of its own: start fewer, or give --no-cuda")


class StopRequest(ExitStack):
    """Until close(), Ctrl-C and SIGTERM ask for an end between two iterations or steps, a second Ctrl-C for one now."""

    def __init__(self, doing: str):
        super().__init__()
        self.signum, self.doing, self.pid = 0, doing, os.getpid()
        self.at_once = signal.getsignal(signal.SIGINT)
        for signum in (signal.SIGINT, signal.SIGTERM):
            self.callback(signal.signal, signum, signal.signal(signum, self.request))

    def request(self, signum: int, frame: object) -> None:
        if os.getpid() != self.pid:  # a worker that does not ignore it yet
            return
        signal.signal(signal.SIGINT, self.at_once)  # in the script, ends it: an exception is swallowed in a __del__
        self.signum = signum
        with suppress(OSError):
            os.write(2, f"\n{self.doing} (Ctrl-C again: stop at once)\n".encode())

    def agreed(self) -> int:
        """The signal that any process has got, or 0. All stop after the same iteration: else they would hang."""
        agreed = max(gather(self.signum))  # a signal that comes during the message waits for the next one
        self.signum = agreed or self.signum
        return agreed


def shortage(error: Exception, args: Args) -> str | None:
    """One line about memory or files that the system refused, and what to do; None for any other error."""
    need = args.batch_size * args.frame_stack * args.frame_size**2 / args.world_size / 2**20
    known = "allocate memory|enough memory|bad.?alloc|new thread|create a primitive|inline_container|return without"
    few, or_else = f"are allowed for {args.workers} workers: raise `ulimit", "or lower --num-workers"
    lower = "lower --num-envs, --num-steps or --num-workers, or raise `ulimit -v`"
    for words, line in (
        ("OutOfMemoryError", "too little GPU memory: lower --num-envs or --num-steps, or raise --num-minibatches"),
        ("Too many open", f"too few open files {few} -n` {or_else}"),
        ("temporarily unavailable", f"too few processes {few} -u` {or_else}"),
        (f"MemoryError|{known}", f"too little memory, and a rollout alone needs {need:,.0f} MB, twice: {lower}"),
    ):
        if re.search(words, f"{type(error).__name__} {error}", re.IGNORECASE):
            return line
    return None


# -------------------------------------------------------------------------------------------------------- 8 programs
def open_run(args: Args) -> RunDirectory | Nothing:
    """The run directory, a new one or that of --resume, and with --track the Weights & Biases run that mirrors it."""
    if args.rank:
        return Nothing()
    if args.track:
        with refusing("--track needs Weights & Biases: pip install wandb", ImportError):
            import wandb
    path = Path(args.resume or "runs")
    with refusing(f"cannot write to {path}", OSError):
        path.mkdir(exist_ok=True)
        for second in () if args.resume else itertools.count(int(time.time())):
            path = Path(f"runs/{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{second}")
            with suppress(FileExistsError):  # another run began in the same second
                path.mkdir()
                break
    run = RunDirectory(path)
    if args.track:
        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": args.wandb_name or path.name}
        names["id"] = re.sub(r"[:;,#?']", "-", path.name)  # which W&B refuses
        wandb.init(**names, resume="allow", config=args.flags, sync_tensorboard=True)
    return run


def save(run: RunDirectory | Nothing, state: dict[str, Any], args: Args, step: int) -> None:
    """Writes agent.pt, to evaluate and to share, and checkpoint.pt, to go on: the state of each process."""
    agent = {"weights": pack(state["weights"]), "flags": args.flags, "step": step}
    run.write("agent.pt", agent)
    ranks, names = gather(pack(state)), [name for name, _ in state["weights"].named_parameters()]
    if any(not torch.equal(rank["weights"][name], ranks[0]["weights"][name]) for rank in ranks[1:] for name in names):
        raise RunError(f"the processes' weights differ: average every loss's gradients, as update() does; {run.kept}")
    run.write("checkpoint.pt", agent | ranks[0] | {"ranks": ranks[1:]})
    if args.rank == 0 and "checkpoint.pt" not in run.failing:
        run.kept = f"the checkpoint of step {step:,} is kept"


def load(state: dict[str, Any], saved: dict[str, Any], args: Args) -> None:
    """Restores in place, from the checkpoint of --resume, what save() wrote. UsageError if it does not fit or, in a new
    run, if it never will: what a checkpoint cannot hold or bring back is refused now, and not after hours."""
    if not args.resume:
        packed = pack(state)
        with refusing("a checkpoint cannot bring back `state` in train"):
            unpack(state, packed)
        return
    with refusing(f"--resume: {args.resume}/checkpoint.pt is not of the run in args.json"):
        if 1 + len(saved["ranks"]) != args.world_size:
            refuse(f"--resume: that run has {1 + len(saved['ranks'])} processes, not {args.world_size}")
        if other := [name for name, value in args.identity.items() if saved["flags"].get(name, value) != value]:
            raise ValueError(f"{other[0]} is {saved['flags'][other[0]]}")
        mine = [saved, *saved["ranks"]][args.rank]
        if odd := (mine.keys() ^ state.keys()) - {"flags", "step", "ranks"}:
            raise ValueError(f"{min(odd)!r} is in one of it and `state` only")
        unpack(state, {name: mine[name] for name in state})
        for parameter, memory in state["optimizer"].state.items():
            if not memory or any(memory[x].shape != parameter.shape for x in ("exp_avg", "exp_avg_sq") if x in memory):
                raise ValueError("the optimizer is of other parameters")
        before, done = saved["flags"]["total_timesteps"], state["iteration"]
        if type(done) is not int or not 0 <= done <= before // args.batch_size or math.isnan(sum(state["recent"])):
            raise ValueError("numbers that cannot be")
        longer = f"the run is now {args.total_timesteps:,} steps long, and the annealing follows"
        more = f"--total-timesteps {(done + 1) * args.batch_size} or more"
        complete = f"{args.resume} is complete; {more} goes on, --evaluate plays its agent"
        if args.rank == 0 and (done >= args.num_iterations or args.total_timesteps != before):
            say(complete if done >= args.num_iterations else longer)
        saved.clear()  # some 20 MB


@torch.inference_mode()
def full_games(args: Args, agent: Any, num_games: int, stop: Any = None, film: Any = None, mode: Any = None) -> list:
    """Plays full games side by side, through all lives, at random without an agent. Returns (score, length) of those
    that end before the StopRequest has a signal. The list `film` gets (observation, screen) of the first 5 minutes."""
    generators = [np.random.default_rng([args.seed, 2**31, i]) for i in range(num_games)]
    envs, obs, results = [], [], {}
    while len(envs) < num_games and not (stop and stop.signum):
        envs.append(make_env(args, mode))
        obs.append(envs[-1].reset(seed=args.seed + 2**31 + len(obs))[0])
    while (playing := [i for i in range(num_games) if i not in results]) and not (stop and stop.signum):
        uniform = torch.tensor([generators[i].random() for i in playing], dtype=torch.float32)
        if agent is None:
            actions = (uniform * envs[0].action_space.n).long().clamp_(max=envs[0].action_space.n - 1)
        else:
            batch = torch.from_numpy(np.stack([obs[i] for i in playing]))
            actions = agent.get_action_and_value(batch, uniform=uniform)["action"]
        for i, action in zip(playing, actions.tolist()):
            obs[i], _, terminated, truncated, info = envs[i].step(action)
            if film is not None and i == 0 and len(film) < 5 * 60 * 60 / args.frame_skip:
                film.append((obs[0], envs[0].unwrapped.ale.getScreenRGB()))
            if (terminated or truncated) and "episode" not in info:  # a lost life
                played = envs[i].get_wrapper_attr("episode_lengths")
                obs[i], info = envs[i].reset()
                if "episode" not in info and envs[i].get_wrapper_attr("episode_lengths") < played:
                    raise RunError("a wrapper above RecordEpisodeStatistics ends games unseen: put it beneath")
            if "episode" in info:
                results[i] = (float(info["episode"]["r"]), int(info["episode"]["l"]))
    for env in envs:
        env.close()
    return [results[i] for i in sorted(results)]


def score_agent(args: Args, agent: Agent, step: int, run: RunDirectory | Nothing, stop: StopRequest) -> None:
    """Rank 0 plays --eval-episodes games and tells, logs and writes their scores, unless a stop is requested."""
    film = [] if args.capture_video else None
    num_games = 0 if args.rank else args.eval_episodes
    games, random_games = (full_games(args, player, num_games, stop, f) for player, f in ((agent, film), (None, None)))
    if stop.signum or not games:
        return
    (scores, lengths), (random_scores, _) = zip(*games), zip(*random_games)
    mean, std, random_mean = float(np.mean(scores)), float(np.std(scores)), float(np.mean(random_scores))
    say(f"evaluation at step {step:,}: {' '.join(f'{score:g}' for score in scores)}")
    say(f"mean {mean:.2f} ± {std:.2f} over {len(scores)} full games; a random policy: {random_mean:.2f}")
    result = {"env_id": args.env_id, "step": step, "seed": args.seed, "mean": mean, "std": std, "scores": scores}
    result |= {"lengths": lengths, "random_mean": random_mean, "random_scores": random_scores}
    points = [("eval/episodic_return", mean, step), ("eval/episodic_length", float(np.mean(lengths)), step)]
    run.events(lambda writer: [writer.add_scalar(*point) for point in points])
    run.write("eval.json", json.dumps(result, indent=1).encode())
    if film:
        run.film([screen for _, screen in film], step, max(1, round(60 / args.frame_skip)))
        run.picture("eval/observation", *film[len(film) // 2], step)


def train(args: Args) -> int:
    """Trains. Returns the exit code: 0; 1 if a file could not be written; 130 or 143 if a signal ended it early."""
    # SETUP, in this order: threads, and so CUDA, TensorBoard and the process group, do not survive the workers' fork
    saved = load_file(Path(args.resume, "checkpoint.pt"), "ranks", "flags") if args.resume else {}
    torch.manual_seed(args.seed)  # the same weights in every process
    env = make_env(args, "rgb_array")
    sight = env.reset(seed=args.seed)[0], env.render()
    set_env_state(env, get_env_state(env))  # refuses, before anything starts, what a checkpoint would not bring back
    env.close()
    agent = make_agent(args, env)
    actor = inference_copy(agent, choose_dtype(args, torch.device("cpu")))
    storage = allocate(args, env, actor)
    torch.manual_seed(args.seed * 1000 + args.rank)
    np.random.seed([args.seed, args.rank])  # this one and the next for what users add
    random.seed(args.seed * 1000 + args.rank)
    shuffler = torch.Generator().manual_seed(args.seed * 1000 + args.rank)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest("stopping as soon as everything has started"))
        workers = stack.enter_context(closing(Workers(args, actor, storage)))
        device = choose_device(args)
        learner = Learner(args, agent, device, choose_dtype(args, device))
        join_processes(args, device, stack)
        state = {  # all that changes during training: a checkpoint holds it. Change it in place, or as state[name]
            "weights": agent, "optimizer": learner.optimizer, "knobs": dict(learner.knobs), "iteration": 0,
            "recent": deque(maxlen=100), "environments": workers, "row": {name: x[-1] for name, x in storage.items()},
            "generators": [shuffler, torch.default_generator],
            "random": SimpleNamespace(state_dict=random.getstate, load_state_dict=random.setstate),
            "numpy": SimpleNamespace(state_dict=np.random.get_state, load_state_dict=np.random.set_state),
        }  # fmt: skip
        load(state, saved, args)
        step = state["iteration"] * args.batch_size
        if state["iteration"] >= args.num_iterations:
            return 0
        run = stack.enter_context(closing(open_run(args)))
        run.begin(args, device, agent.dtype, step, sight)
        if learner.on_gpu:
            lock_pages(storage, stack)

        stop.doing = "finishing this iteration, then saving"
        for iteration in range(state["iteration"] + 1, args.num_iterations + 1):
            if stop.agreed():
                break
            started = time.perf_counter()
            anneal(learner.knobs, args, iteration)

            # ROLLOUT
            actor.load_state_dict(agent.state_dict())
            games, seconds = workers.rollout()
            rolled_out = time.perf_counter()

            # ADVANTAGES
            values, dones = storage["value"], storage["done"]
            advantages, returns = compute_gae(storage["reward"][:-1], values, dones, args.gamma, args.gae_lambda)
            learner.fill(storage, advantage=advantages, return_=returns)

            # UPDATE
            stats = []
            for _ in range(args.update_epochs):
                rows = torch.randperm(advantages.numel(), generator=shuffler).to(device, non_blocking=True)  # [core 6]
                stats += map(learner.update, rows.split(args.minibatch_size // args.world_size))
                if args.target_kl is not None and all_mean(stats[-1]["approx_kl"].clone()) > args.target_kl:
                    break

            # LOGGING
            means = {name: all_mean(torch.stack([stat[name] for stat in stats]).mean()) for name in stats[0]}
            scalars = {f"losses/{name}": float(mean) for name, mean in means.items()}
            if not math.isfinite(scalars["losses/grad_norm"]):
                raise RunError(f"iteration {iteration}: the loss or its gradient is not finite; {run.kept}")
            if iteration == 1 and not args.rank and stats[0].get("approx_kl", 0) > 1e-3:  # 0, up to a GPU's rounding
                say("ppo_atari.py: the agent acts otherwise than it learns: see inference_copy()", sys.stderr)
            scalars["losses/explained_variance"] = explained_variance(values[:-1], returns)
            scalars |= {f"charts/{name}": float(knob) for name, knob in learner.knobs.items()}
            seconds["update"] = (now := time.perf_counter()) - rolled_out
            scalars |= {f"time/{work}": spent / (now - started) for work, spent in seconds.items()}
            scalars["charts/SPS"] = args.batch_size / (now - started)
            points = []
            for t, i, score, length in sorted(sum(gather(games), [])):
                state["recent"].append(score)
                at = step + t * args.num_envs + i + 1  # a step of its own: some trackers keep one value per step
                points += [("charts/episodic_return", score, at), ("charts/episodic_length", length, at)]
            state["iteration"], step = iteration, iteration * args.batch_size
            run.log(points + [(tag, value, step) for tag, value in scalars.items()], state["recent"], step)

            # NOW AND THEN
            last = iteration == args.num_iterations
            if args.eval_interval and step % args.eval_interval < args.batch_size and not last:
                actor.load_state_dict(agent.state_dict())
                score_agent(args, actor, step, run, stop)
            if args.checkpoint_interval and iteration % args.checkpoint_interval == 0 and not last:
                save(run, state, args, step)

        save(run, state, args, step)
        if not stop.agreed():
            stop.doing = "stopping the evaluation"
            actor.load_state_dict(agent.state_dict())
            score_agent(args, actor, step, run, stop)
        run.farewell(step, stop.signum)
        return 1 if run.failing else 128 + stop.signum if stop.signum else 0


def evaluate(args: Args) -> int:
    """--evaluate: the agent of a run directory or a file plays full games; with --play, it plays one in a window."""
    path = Path(args.evaluate, "agent.pt" if Path(args.evaluate).is_dir() else "")
    content = load_file(path, "flags")
    args = parse_args(args.argv, content["flags"], str(path))
    env, folder, step, run = make_env(args), Path(args.output or path.parent), content.get("step", 0), Nothing()
    with refusing(f"the weights in {path} do not fit {args.env_id} and these flags"):
        agent = make_agent(args, env)
        agent.load_state_dict(content["weights"])
    agent = inference_copy(agent, choose_dtype(args, torch.device("cpu")))
    torch.set_num_threads(1)  # as in a worker; and waiting threads spin, which starves a training next to it
    try:
        if args.output or (folder / "checkpoint.pt").exists():  # and not beside an agent that somebody has published
            folder.mkdir(parents=True, exist_ok=True)
            run = RunDirectory(folder) if os.access(folder, os.W_OK) else refuse(f"cannot write to {folder}")
    except (OSError, UsageError) as error:
        say(f"ppo_atari.py: {error}; the scores are shown here alone", sys.stderr)
    with StopRequest("stopping the evaluation") as stop, closing(run):
        if not args.play:
            score_agent(args, agent, step, run, stop)
        for score, length in full_games(args, agent, 1, stop, None, "human") if args.play else ():
            say(f"score {score:g} in {length} steps")
        return 128 + stop.signum if stop.signum else int(bool(run.failing))


def play(args: Args) -> int:
    """--play: a person plays the game in a window, at its real speed."""
    with refusing("--play needs pygame: pip install pygame", (ImportError, gym.error.DependencyNotInstalled)):
        from gymnasium.utils.play import play as play_in_window
    env = make_env(args, "rgb_array").unwrapped
    meanings = env.get_action_meanings()
    for keys, action in env.get_keys_to_action().items():
        print(f"{' + '.join('space' if key == ' ' else key for key in keys):>14}  {meanings[action]}")
    play_in_window(env, fps=60, zoom=3, noop=find_action(env, "NOOP") or 0, seed=args.seed)
    return 0


# ----------------------------------------------------------------------------------------------------------- 9 entry
def main(argv: list[str] | None = None) -> int:
    """Runs the program that the flags ask for and returns its exit code: 0, 1, 2, 130 or 143."""
    args = parse_args(argv)
    try:
        return (evaluate if args.evaluate else play if args.play else train)(args)
    except UsageError as error:
        code, text = 2, f"error: {' '.join(str(error).split())}"
    except KeyboardInterrupt:
        code, text = 130, "stopped at once; what was saved before is kept"
    except Exception as error:
        code, text = 1, f"error: {shortage(error, args) or error}"
        if not isinstance(error, RunError) and not shortage(error, args):
            traceback.print_exc()
    say(f"ppo_atari.py: {text}", sys.stderr)
    return code


if __name__ == "__main__":
    sys.stdout, sys.stderr = (file or open(os.devnull, "w") for file in (sys.stdout, sys.stderr))  # noqa: SIM115  >&-
    sys.stdout.reconfigure(errors="replace")  # a terminal without "±" is no reason to lose a score
    sys.exit(main())
