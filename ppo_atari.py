# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "gymnasium==1.4.0",
#     "numpy==2.4.6",
#     "opencv-python==5.0.0.93",
#     "pytest==9.2.0",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
# ]
# ///
# SPDX-License-Identifier: MIT
"""Proximal Policy Optimization on Atari games, complete in this one file.

    python ppo_atari.py --env-id ALE/Breakout-v5                  train: curves, weights and scores go to runs/
    tensorboard --logdir runs                                     watch
    python ppo_atari.py --resume runs/<run>                       go on after an interruption, bit for bit
    python ppo_atari.py --evaluate runs/<run> --capture-video     play ten full games and film one
    python ppo_atari.py --play --env-id ALE/Breakout-v5           play yourself (pip install pygame)
    torchrun --standalone --nproc-per-node=2 ppo_atari.py         several processes; the same on each of two nodes:
    torchrun --nnodes=2 --nproc-per-node=8 --node-rank=<0 or 1> --master-addr=<host> ppo_atari.py --num-envs 128

It follows "Proximal Policy Optimization Algorithms" (Schulman et al., 2017) with openai/baselines' hyperparameters and
"The 37 Implementation Details of PPO" (Huang et al., 2022), each marked where it happens: [core 1] to [core 13] and
[atari 1] to [atari 9]. A step is one decision of the agent, which is four emulator frames.

Sections, each using only what stands above it: 1 arguments, 2 environment (the seven wrappers), 3 agent (the
Nature-CNN), 4 rollout (policy, step, store, and the worker processes), 5 PPO (advantages and loss), 6 run directory
(checkpoints, TensorBoard, videos), 7 programs (train, evaluate, play), 8 entry.
"""

import argparse
import copy
import ctypes
import difflib
import io
import json
import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import pairwise
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics
from torch import Tensor, nn
from tqdm import tqdm

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner from every emulator
cv2.setNumThreads(1)  # OpenCV's own threads would fight the workers for the cores
with suppress(AttributeError, TypeError):  # glibc only
    # Keep freed memory: to get it anew costs every large tensor thousands of page faults.
    for option, value in ((-1, 2**30), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(option, value)

# ----------------------------------------------------------------------------------------------------- 1 arguments

MAY_CHANGE_ON_RESUME = {"total_timesteps", "num_workers", "start_method", "checkpoint_interval", "eval_episodes"}
MAY_CHANGE_ON_RESUME |= {"eval_interval", "capture_video", "resume"}
MAY_CHANGE_ON_RESUME |= {"track", "wandb_project_name", "wandb_entity", "wandb_name"}


class UsageError(Exception):
    """Something the user can mend: one line on stderr, exit code 2."""


class RunError(Exception):
    """A run that cannot go on for a known reason: one line on stderr, exit code 1."""


def number(kind: type, low: float, high: float, what: str) -> Callable[[str], float]:
    """An argparse type: a number from low to high, both included. NaN never passes."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
        return value

    return convert


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked, plus batch_size, minibatch_size and num_iterations. A mistake exits with code 2.

    With --resume, the flags of the interrupted run are the defaults.
    """
    count = number(int, 1, 2**53, "a whole number of at least 1")
    natural = number(int, 0, 2**53, "a whole number of at least 0")
    seed = number(int, 0, 2**31 - 1, "a whole number from 0 to 2147483647")
    probability = number(float, 0, 1, "a number from 0 to 1")
    positive = number(float, sys.float_info.min, sys.float_info.max, "a finite number above 0")
    weight = number(float, 0, sys.float_info.max, "a finite number of at least 0")
    formatter = partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=40, width=119)
    parser = argparse.ArgumentParser("ppo_atari.py", None, __doc__.split("\n")[0], formatter_class=formatter)
    parser.print_usage = lambda file=None: None  # a mistake is answered with one line

    def flag(name: str, default: Any, kind: Any, help: str) -> None:
        options: dict[str, Any] = {"type": kind, "metavar": "TEXT" if kind is str else "N"}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(kind, tuple):
            options = {"choices": kind}
        group.add_argument(f"--{name}", default=default, help=help, **options)

    group = parser.add_argument_group("run (a step is one decision of the agent: 4 emulator frames by default)")
    flag("env-id", "ALE/Breakout-v5", str, "ALE/<Game>-v5 (sticky actions) or <Game>NoFrameskip-v4 (none)")
    flag("seed", 1, seed, "of weights, games, actions and shuffling")
    flag("total-timesteps", 10_000_000, count, "length of the run, in steps")
    flag("exp-name", "ppo_atari", str, "goes into the name of the run directory")
    flag("torch-deterministic", True, bool, "deterministic algorithms on a GPU too")
    flag("cuda", True, bool, "use a GPU if there is one")
    flag("cuda-graph", True, bool, "on a GPU, launch each update as one graph (in one process only)")
    flag("precision", "auto", ("auto", "float32", "bfloat16"), "of the network; auto: bfloat16 where hardware has it")
    flag("num-workers", None, natural, "rollout processes, 0: none (default: one per core, at most one per game)")
    flag("inference-batch", None, count, "games per policy call, 1 or 4n (default: the share of one default worker)")
    flag("start-method", "fork" if sys.platform == "linux" else "spawn", ("fork", "spawn"), "of the workers")
    flag("resume", None, str, "go on with the run in this directory, with its flags")
    flag("checkpoint-interval", 300, natural, "iterations from one checkpoint to the next; 0: only at the end")

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

    group = parser.add_argument_group("the nine Atari details")
    flag("noop-max", 30, natural, "a game starts after 1 to N frames of doing nothing; 0: at once")
    flag("frame-skip", 4, count, "emulator frames per step")
    flag("episodic-life", True, bool, "a lost life ends the episode, not the game")
    flag("fire-reset", True, bool, "press FIRE to start, in games that have it")
    flag("frame-size", 84, count, "side of the image in pixels: 8m + 4, at least 36")
    flag("clip-reward", True, bool, "learn from the sign of the reward")
    flag("frame-stack", 4, count, "frames that the agent sees at once")
    flag("shared-network", True, bool, "policy and value share the network")
    flag("scale-obs", True, bool, "scale pixels to [0, 1]")
    flag("repeat-action-probability", None, probability, "sticky actions, per frame (default: what the id says)")

    group = parser.add_argument_group("evaluate, film, play, track")
    flag("evaluate", None, str, "play full games with the agent of a run directory or an agent file")
    flag("eval-episodes", 10, natural, "full games per evaluation; 0: none")
    flag("eval-interval", 0, natural, "evaluate every N steps of training as well; 0: only at the end")
    flag("capture-video", False, bool, "film one game of each evaluation")
    flag("play", False, bool, "play yourself; with --evaluate: watch the agent")
    flag("track", False, bool, "mirror the run to Weights & Biases (pip install wandb)")
    flag("wandb-project-name", "ppo-atari", str, "project")
    flag("wandb-entity", None, str, "team or user")
    flag("wandb-name", None, str, "name of the run (default: the run directory's)")

    missing = object()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, missing))))
    given = {name: value for name, value in given.items() if value is not missing}
    try:
        if "resume" in given:
            parser.set_defaults(**flags_to_resume(given))
        args = parser.parse_args(argv)
        derive(args)
        check_env_id(args.env_id)
    except UsageError as error:
        parser.error(str(error))
    args.given, args.flags = tuple(given), {name: getattr(args, name) for name in names}
    return args


def flags_to_resume(given: dict[str, Any]) -> dict[str, Any]:
    """The flags of the run that --resume names, after refusing a change that would make it another run."""
    path = Path(given["resume"]) / "args.json"
    try:
        saved = json.loads(path.read_text())["flags"]
        changed = [name for name in given if name not in MAY_CHANGE_ON_RESUME and saved[name] != given[name]]
        shrinks = given.get("total_timesteps", saved["total_timesteps"]) < saved["total_timesteps"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"--resume: {path} is missing or damaged; give the directory of a run") from None
    for name in changed + ["total_timesteps"] * shrinks:
        new, flag = given[name], f"--{name.replace('_', '-')}"
        raise UsageError(f"--resume: {flag} is {saved[name]} in that run and cannot become {new}; leave it out")
    return saved


def derive(args: argparse.Namespace) -> None:
    """Fills in what follows from the flags and the machine, and checks what one flag alone cannot show."""
    args.rank, args.local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))  # these are torchrun's
    args.batch_size = args.num_envs * args.num_steps
    args.minibatch_size = args.batch_size // args.num_minibatches
    args.num_iterations = args.total_timesteps // args.batch_size
    sizes = f"{args.num_envs} environments x {args.num_steps} steps"
    if args.num_envs % args.world_size:
        raise UsageError(f"--num-envs {args.num_envs} cannot be split evenly over {args.world_size} processes")
    if args.batch_size % (args.num_minibatches * args.world_size):
        split = f"{sizes} / {args.world_size} processes"
        raise UsageError(f"--num-minibatches {args.num_minibatches} does not divide {split}")
    if args.norm_adv and args.minibatch_size < 2 * args.world_size:
        raise UsageError("a minibatch of one sample has no spread: lower --num-minibatches or give --no-norm-adv")
    if args.num_iterations < 1:
        raise UsageError(f"--total-timesteps {args.total_timesteps} is less than one rollout of {sizes}")
    if args.frame_size < 36 or args.frame_size % 8 != 4:
        near = max(36, args.frame_size // 8 * 8 + 4)
        raise UsageError(f"--frame-size must be 8m + 4 and at least 36, such as {near}, not {args.frame_size}")
    if not args.exp_name or "/" in args.exp_name or "\\" in args.exp_name:
        raise UsageError("--exp-name becomes part of a directory name: not empty, and no slashes")
    if args.resume and (args.evaluate or args.play):
        raise UsageError("--resume trains on; leave out --evaluate and --play")
    num_envs = args.num_envs // args.world_size
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), num_envs)
    args.num_workers = min(workers if args.num_workers is None else args.num_workers, num_envs)
    share = args.inference_batch or math.ceil(num_envs / workers)
    args.inference_batch = 1 if share == 1 else math.ceil(share / 4) * 4  # see act()


def check_env_id(env_id: str) -> None:
    """Raises UsageError unless the id is registered and is an Atari game with a finite set of actions."""
    try:
        spec = gym.spec(env_id)
    except (gym.error.Error, ImportError, ValueError):
        games = [name for name in gym.registry if name.startswith("ALE/") or name.endswith("NoFrameskip-v4")]
        near = difflib.get_close_matches(env_id, games, n=3, cutoff=0.4) or ["ALE/Breakout-v5", "PongNoFrameskip-v4"]
        raise UsageError(f"--env-id {env_id!r} is unknown; did you mean {' or '.join(near)}?") from None
    if spec.entry_point != "ale_py.env:AtariEnv":
        raise UsageError(f"--env-id {env_id} is not an Atari game; try ALE/Breakout-v5")
    if spec.kwargs.get("continuous"):
        raise UsageError(f"--env-id {env_id} has continuous actions; this script needs a finite set of them")


# --------------------------------------------------------------------------------------------------- 2 environment


def find_action(env: gym.Env, meaning: str) -> int | None:
    """The index of the action with this meaning, such as "FIRE", or None where the game lacks it."""
    meanings = env.unwrapped.get_action_meanings()
    return meanings.index(meaning) if meaning in meanings else None


def step_in_reset(env: gym.Env, action: int, info: dict) -> tuple[np.ndarray, dict]:
    """One step as part of a reset. Should it end the episode, resets once more and returns the observation after that.

    info["episode"] of a game that ends here is handed on: its score would be lost otherwise.
    """
    obs, _, terminated, truncated, step_info = env.step(action)
    if terminated or truncated:
        obs, reset_info = env.reset()
        step_info = step_info | reset_info
    return obs, info | step_info


class NoopResetEnv(gym.Wrapper):
    """[atari 1] Starts each game after 1 to noop_max frames of doing nothing, uniformly (Mnih et al., 2015).

    In Backgammon and VideoCheckers, which have no NOOP, action 0 stands in for it.
    """

    def __init__(self, env: gym.Env, noop_max: int = 30):
        super().__init__(env)
        self.noop_max, self.noop = noop_max, find_action(env, "NOOP") or 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        for _ in range(self.np_random.integers(1, self.noop_max + 1)):
            obs, info = step_in_reset(self.env, self.noop, info)
        return obs, info


class MaxAndSkipEnv(gym.Wrapper):
    """[atari 2] Repeats an action for `skip` frames, sums the rewards and returns the pixelwise maximum of the last two
    RGB screens [H, W, 3], because the Atari draws some objects in every other frame only (Mnih et al., 2015).

    Drives the emulator directly, so that no more than two screens are drawn. The environment beneath must have
    frameskip=1. A game that ends within the skip shows its last screen.
    """

    def __init__(self, env: gym.Env, skip: int = 4):
        super().__init__(env)
        self.ale, self.skip = env.unwrapped.ale, skip
        self.actions = self.ale.getMinimalActionSet()

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
    """[atari 3] Ends the episode when a life is lost, but resets only when the game is over (Mnih et al., 2015).

    After a lost life, reset() goes on in the same game with one step of doing nothing. reset(seed=...) always starts a
    new game. A counter that falls to 0 is no lost life: some games (Q*bert) show 0 for a while before they end.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.noop, self.ale = find_action(env, "NOOP") or 0, env.unwrapped.ale
        self.lives, self.game_over = 0, True

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.game_over = terminated or truncated
        lives, before = self.ale.lives(), self.lives
        self.lives = lives
        return obs, reward, terminated or 0 < lives < before, truncated, info

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


class FrameStack(gym.Wrapper):
    """[atari 7] The last k frames [k, L, L], oldest first; after a reset, the first one k times (Mnih et al., 2015)."""

    def __init__(self, env: gym.Env, k: int = 4):
        super().__init__(env)
        self.frames = np.zeros((k, *env.observation_space.shape), np.uint8)
        self.observation_space = gym.spaces.Box(0, 255, self.frames.shape, np.uint8)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        self.frames[:] = obs
        return self.frames.copy(), info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, *rest = self.env.step(action)
        self.frames[:-1] = self.frames[1:]
        self.frames[-1] = obs
        return self.frames.copy(), *rest


def make_env(args: argparse.Namespace, render_mode: str | None = None) -> gym.Env:
    """The full stack, in openai/baselines' order: every program here plays through it.

    Observations are uint8 [frame_stack, frame_size, frame_size]. info["episode"] = {"r", "l", "t"} appears once per
    game, when it is really over: return before clipping, length in steps, seconds. Raises UsageError for a bad env_id.
    """
    check_env_id(args.env_id)
    # frameskip=1, always: beneath MaxAndSkipEnv, the -v5 ids would skip 4 frames more and the -v4 ids 2 to 4.
    sticky = args.repeat_action_probability
    kwargs = {} if sticky is None else {"repeat_action_probability": sticky}
    env = gym.make(args.env_id, frameskip=1, render_mode=render_mode, disable_env_checker=True, **kwargs)
    if not isinstance(env.action_space, gym.spaces.Discrete) or env.action_space.n < 1:
        raise UsageError(f"--env-id {args.env_id} has no finite set of actions")
    if args.noop_max > 0:
        env = NoopResetEnv(env, args.noop_max)
    env = MaxAndSkipEnv(env, args.frame_skip)
    env = RecordEpisodeStatistics(env)  # above the skip, beneath lives and clipping: the score that papers report
    if args.episodic_life:
        env = EpisodicLifeEnv(env)
    if args.fire_reset and find_action(env, "FIRE") is not None:
        env = FireResetEnv(env)
    env = WarpFrame(env, args.frame_size)
    if args.clip_reward:
        env = ClipRewardEnv(env)
    return FrameStack(env, args.frame_stack)


def wrapper_state(env: gym.Env) -> Iterator[tuple[gym.Env, str]]:
    """The wrappers' attributes that the future of a game depends on."""
    names = {FrameStack: ("frames",), EpisodicLifeEnv: ("lives", "game_over")}
    names[RecordEpisodeStatistics] = ("episode_returns", "episode_lengths")
    while env is not env.unwrapped:
        yield from ((env, name) for name in names.get(type(env), ()))
        env = env.env


def get_env_state(env: gym.Env) -> dict[str, Any]:
    """Everything that the future of a game depends on, as plain numbers, bytes, dictionaries and tensors."""
    values = [getattr(wrapper, name) for wrapper, name in wrapper_state(env)]
    return {
        "emulator": env.unwrapped.ale.cloneState(include_rng=True).serialize(),
        "np_random": env.unwrapped.np_random.bit_generator.state,
        "wrappers": [torch.tensor(value) if isinstance(value, np.ndarray) else value for value in values],
    }


def set_env_state(env: gym.Env, state: dict[str, Any]) -> None:
    """The inverse of get_env_state, for an environment made with the same flags and reset once."""
    env.unwrapped.ale.reset_game()
    env.unwrapped.ale.restoreState(ale_py.ALEState(state["emulator"]))
    env.unwrapped.np_random.bit_generator.state = state["np_random"]
    for (wrapper, name), value in zip(wrapper_state(env), state["wrappers"]):
        setattr(wrapper, name, value.numpy().copy() if isinstance(value, Tensor) else value)


def forget_last_action(env: gym.Env) -> None:
    """Makes the emulator's hidden last action a NOOP. Sticky actions repeat it, but no saved state contains it.

    Each rollout starts with this, whether or not a checkpoint follows: so a resumed run sees the game that the
    uninterrupted one saw. A frame fails to replace the action with the sticky probability p, all n with p^n < 10^-11.
    """
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

    scale = 1 / 255

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype) * self.scale, self.bias.to(x.dtype))


class Flatten(nn.Module):
    """[B, C, H, W] to [B, H * W * C]: channels lie innermost in memory, so that this order costs no copy."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def nature_cnn(frame_stack: int, frame_size: int, scale_obs: bool) -> nn.Sequential:
    """[atari 8] The convolutional network of Mnih et al. (2015): [B, frame_stack, L, L] to [B, 512]."""
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
    """The Nature-CNN with a policy head and a value head. obs is uint8 [B, frame_stack, L, L], L = frame_size = 8m + 4.

    By default the heads share one network; shared_network=False gives the value head its own [core 13].
    """

    def __init__(
        self, num_actions: int, frame_stack: int = 4, frame_size: int = 84, shared_network: bool = True,
        scale_obs: bool = True,
    ):  # fmt: skip
        super().__init__()
        if frame_size < 36 or frame_size % 8 != 4:
            raise ValueError(f"frame_size must be 8m + 4 and at least 36, not {frame_size}")
        self.network = nature_cnn(frame_stack, frame_size, scale_obs)
        self.critic_network = None if shared_network else nature_cnn(frame_stack, frame_size, scale_obs)
        self.actor = layer_init(nn.Linear(512, num_actions), std=0.01)  # nearly uniform at first
        self.critic = layer_init(nn.Linear(512, 1), std=1)
        self.dtype = torch.float32  # of the network's arithmetic; the heads always compute in float32
        self.to(memory_format=torch.channels_last)  # the first convolution is several times faster in this layout

    def features(self, network: nn.Sequential, obs: Tensor) -> Tensor:
        """float32 [B, 512]."""
        x = obs.to(self.dtype).contiguous(memory_format=torch.channels_last)
        with torch.autocast(obs.device.type, self.dtype, enabled=network[0].weight.dtype != self.dtype):
            return network(x).float()

    def get_value(self, obs: Tensor) -> Tensor:
        """The value [B] of each observation."""
        return self.critic(self.features(self.critic_network or self.network, obs)).flatten()

    def get_action_and_value(
        self, obs: Tensor, action: Tensor | None = None, uniform: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """action int64 [B], its log_prob [B], the policy's entropy [B] and the value [B].

        Without an action, samples one: by inverting the distribution function at uniform [B] in [0, 1), if given.
        """
        hidden = self.features(self.network, obs)
        value = self.critic(hidden).flatten() if self.critic_network is None else self.get_value(obs)
        log_probs = F.log_softmax(self.actor(hidden), dim=-1)
        probs = log_probs.exp()
        if action is None:
            uniform = torch.rand(len(obs), device=obs.device) if uniform is None else uniform
            action = (probs.cumsum(-1) <= uniform[:, None]).sum(-1).clamp_(max=probs.shape[-1] - 1)
        log_prob = log_probs.gather(-1, action[:, None]).squeeze(-1)
        return action, log_prob, -(probs * log_probs).sum(-1), value


def inference_copy(agent: Agent) -> Agent:
    """A copy that acts, in shared memory, with the network's weights kept in the precision it computes in."""
    clone = copy.deepcopy(agent).requires_grad_(False)
    for network in (clone.network, clone.critic_network):
        if network is not None:
            network.to(agent.dtype)
    if agent.dtype == torch.float32:  # small batches times the large matrix: twice as fast with its columns contiguous
        for layer in clone.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = layer.weight.t().contiguous().t()
    return clone.share_memory()


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copies all parameters, rounding to the target's precision."""
    for old, new in zip(target.parameters(), source.parameters()):
        old.copy_(new)


# ------------------------------------------------------------------------------------------------------- 4 rollout

Game = tuple[int, int, float, int]  # the step of a rollout in which it ended, environment, return, length


class Storage(NamedTuple):
    """One rollout of T steps in N environments, in shared memory. Row T becomes row 0 of the next rollout.

    dones[t] is 1 where observation t starts a new episode; log_probs and values are the acting policy's.
    """

    obs: Tensor  # uint8 [T + 1, N, frame_stack, L, L]
    dones: Tensor  # float32 [T + 1, N]
    values: Tensor  # float32 [T + 1, N]
    actions: Tensor  # int64 [T, N]
    log_probs: Tensor  # float32 [T, N]
    rewards: Tensor  # float32 [T, N]

    @staticmethod
    def allocate(T: int, N: int, obs_shape: tuple[int, ...]) -> "Storage":
        shapes = ((T + 1, N, *obs_shape), (T + 1, N), (T + 1, N), (T, N), (T, N), (T, N))
        dtypes = (torch.uint8, torch.float32, torch.float32, torch.int64, torch.float32, torch.float32)
        return Storage(*(torch.zeros(s, dtype=d).share_memory_() for s, d in zip(shapes, dtypes)))

    def columns(self, low: int, high: int) -> "Storage":
        """A view of environments low to high - 1."""
        return Storage(*(tensor[:, low:high] for tensor in self))


def act(agent: Agent, obs: Tensor, uniform: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """action, log_prob and value [B] for any B, computed in batches of one fixed size.

    Matrix kernels differ in the last bit from one batch size to another and, where it is no multiple of 4, from row to
    row. With the size fixed at 1 or such a multiple, it makes no difference how many workers share the environments.
    """
    parts = []
    for o, u in zip(obs.split(batch), uniform.split(batch)):
        if len(o) < batch:
            o, u = (torch.cat([x, x[:1].expand(batch - len(x), *x.shape[1:])]) for x in (o, u))
        action, log_prob, _, value = agent.get_action_and_value(o, uniform=u)
        parts.append((action, log_prob, value))
    return tuple(torch.cat(part)[: len(obs)] for part in zip(*parts))


@torch.inference_mode()
def rollout(
    agent: Agent, envs: SyncVectorEnv, storage: Storage, generators: list[np.random.Generator], gamma: float, batch: int
) -> tuple[list[Game], dict[str, float]]:
    """Plays the steps of one rollout in each environment and stores them. envs must have SAME_STEP autoreset.

    Environment i samples its actions from generators[i]. Returns the games that ended and the seconds by kind of work.
    """
    obs, dones, values, actions, log_probs, rewards = storage
    num_steps, games, seconds = len(actions), [], {"environment": 0.0, "inference": 0.0}
    uniform = torch.from_numpy(np.stack([g.random(num_steps, np.float32) for g in generators], axis=1))
    for env in envs.envs:
        forget_last_action(env)
    obs[0], dones[0] = obs[num_steps], dones[num_steps]
    for t in range(num_steps):
        started = time.perf_counter()
        actions[t], log_probs[t], values[t] = act(agent, obs[t], uniform[t], batch)
        inferred = time.perf_counter()
        next_obs, reward, terminated, truncated, infos = envs.step(actions[t].numpy())
        obs[t + 1], rewards[t] = torch.from_numpy(next_obs), torch.from_numpy(reward)
        dones[t + 1] = torch.from_numpy(terminated | truncated)
        for i in np.flatnonzero(truncated & ~terminated):  # the time limit is not the game's end: bootstrap
            final_obs = torch.from_numpy(infos["final_obs"][i])[None]
            rewards[t, i] += gamma * act(agent, final_obs, uniform[t, :1], batch)[2][0]
        for info in (infos.get("final_info", {}), infos):  # a game can also end within a reset: see step_in_reset
            for i in np.flatnonzero(info.get("_episode", ())):
                games.append((t, int(i), float(info["episode"]["r"][i]), int(info["episode"]["l"][i])))
        seconds["inference"] += inferred - started
        seconds["environment"] += time.perf_counter() - inferred
    values[num_steps] = act(agent, obs[num_steps], uniform[0], batch)[2]
    return games, seconds


class Player:
    """Environments low to high - 1 of a process and what acts in them; lives in a worker or in the learner itself."""

    def __init__(self, args: argparse.Namespace, agent: Agent, storage: Storage, low: int, high: int):
        self.args, self.agent, self.storage, self.low = args, agent, storage.columns(low, high), low
        # Numbered over all processes, so that neither ranks nor workers change the seed of a game.
        first = args.rank * args.num_envs // args.world_size
        seeds = [[args.seed, first + i] for i in range(low, high)]
        self.generators = [np.random.default_rng(seed) for seed in seeds]
        make = [lambda: make_env(args)] * len(seeds)
        self.envs = SyncVectorEnv(make, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
        game_seeds = [int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1) for seed in seeds]
        self.storage.obs[-1] = torch.from_numpy(self.envs.reset(seed=game_seeds)[0])
        self.storage.dones[-1] = 1

    def rollout(self) -> tuple[list[Game], dict[str, float]]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a small batch gains nothing from threads, and results must not depend on them
        batch, gamma = self.args.inference_batch, self.args.gamma
        games, seconds = rollout(self.agent, self.envs, self.storage, self.generators, gamma, batch)
        torch.set_num_threads(threads)
        return [(t, i + self.low, *score) for t, i, *score in games], seconds

    def get_state(self) -> list[dict[str, Any]]:
        pairs = zip(self.envs.envs, self.generators)
        return [get_env_state(env) | {"generator": generator.bit_generator.state} for env, generator in pairs]

    def set_state(self, states: list[dict[str, Any]]) -> None:
        for env, generator, state in zip(self.envs.envs, self.generators, states):
            set_env_state(env, state)
            generator.bit_generator.state = state["generator"]


def worker_main(pipe: connection.Connection, *player_args: Any) -> None:
    """A worker process: makes its Player, then answers calls of its methods until the learner is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the learner decides when to stop
    try:
        torch.set_num_threads(1)
        player, answer = Player(*player_args), None
        while True:
            pipe.send((answer, None))
            while not pipe.poll(1):  # no end of file would come: sister processes hold the pipe's other end, too
                if not parent_process().is_alive():
                    return
            method, call_args = pipe.recv()
            answer = getattr(player, method)(*call_args)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception:
        pipe.send((None, traceback.format_exc()))


class Workers:
    """[core 1] The Players of a run, in processes that share the storage and the weights with the learner by memory.

    num_workers=0 makes one Player in this process. The results are the same bit for bit.
    """

    def __init__(self, args: argparse.Namespace, agent: Agent, storage: Storage):
        bounds = np.linspace(0, storage.actions.shape[1], max(1, args.num_workers) + 1).astype(int).tolist()
        self.shares, self.processes, self.pipes = list(pairwise(bounds)), [], []
        self.local = None if args.num_workers else Player(args, agent, storage, *self.shares[0])
        context = torch.multiprocessing.get_context(args.start_method)
        for share in self.shares if args.num_workers else ():
            pipe, their_pipe = context.Pipe()
            player_args = (their_pipe, args, agent, storage, *share)
            self.processes.append(context.Process(target=worker_main, args=player_args, daemon=True))
            self.pipes.append(pipe)
            self.processes[-1].start()
            their_pipe.close()
        self.answers()

    def call(self, method: str, *lists: list) -> list[Any]:
        """Calls a method of every Player at once; each list holds one argument per share of the environments."""
        if self.local:
            return [getattr(self.local, method)(*(values[0] for values in lists))]
        for pipe, *values in zip(self.pipes, *lists):
            with suppress(BrokenPipeError, ConnectionResetError):  # answers() finds out who died
                pipe.send((method, values))
        return self.answers()

    def answers(self) -> list[Any]:
        """What each worker answers. Raises RunError as soon as one fails or dies, and ends the others."""
        answers, waiting = [None] * len(self.pipes), set(range(len(self.pipes)))
        while waiting:
            connection.wait([self.pipes[i] for i in waiting] + [process.sentinel for process in self.processes])
            for i in sorted(waiting):
                process, pipe, error = self.processes[i], self.pipes[i], None
                ended = process.exitcode is not None  # asked before the pipe: its last words may still be in there
                try:
                    if pipe.poll():
                        answers[i], error = pipe.recv()
                        waiting.discard(i)
                    elif ended:
                        error = f"exit code {process.exitcode}"
                except (EOFError, ConnectionResetError):
                    process.join()
                    error = f"exit code {process.exitcode}"
                if error:
                    self.close()
                    raise RunError(f"rollout worker {i} of {len(self.pipes)} failed: {error}")
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


# ----------------------------------------------------------------------------------------------------------- 5 PPO

STATS = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "grad_norm")


def compute_gae(
    rewards: Tensor, values: Tensor, dones: Tensor, next_value: Tensor, next_done: Tensor, gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[core 5] Generalized advantage estimation (Schulman et al., 2016): advantages and returns, both [T, N].

    rewards, values, dones are [T, N]; dones[t] is 1 where observation t starts a new episode; next_value and next_done
    [N] belong to the observation after the last step.
    """
    advantages, advantage = torch.zeros_like(rewards), torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value * (1 - next_done) - values[t]
        advantages[t] = advantage = delta + gamma * gae_lambda * (1 - next_done) * advantage
        next_value, next_done = values[t], dones[t]
    return advantages, advantages + values


def all_mean(tensor: Tensor) -> Tensor:
    """The mean over all processes, in place; the tensor itself where there is only one."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def normalize(advantage: Tensor) -> Tensor:
    """[core 7] Zero mean and unit standard deviation over the minibatch, which is spread over all processes."""
    if not dist.is_initialized():
        return (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    centered = advantage - all_mean(advantage.mean())
    size = len(advantage) * dist.get_world_size()
    return centered / ((all_mean(centered.square().mean()) * size / (size - 1)).sqrt() + 1e-8)


def ppo_loss(
    log_prob: Tensor, entropy: Tensor, value: Tensor, old_log_prob: Tensor, old_value: Tensor, advantage: Tensor,
    return_: Tensor, args: argparse.Namespace, ent_coef: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The loss of one minibatch (Schulman et al., 2017) and its parts; every tensor is [B].

    Reads norm_adv, clip_coef, clip_vloss, vf_coef and ent_coef of args; the last argument overrides ent_coef.
    """
    if args.norm_adv:
        advantage = normalize(advantage)
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(advantage * ratio, advantage * clipped_ratio).mean()  # [core 8]

    squared_error = (value - return_).square()
    if args.clip_vloss:  # [core 9]
        clipped_value = old_value + (value - old_value).clamp(-args.clip_coef, args.clip_coef)
        squared_error = torch.max(squared_error, (clipped_value - return_).square())
    value_loss = 0.5 * squared_error.mean()

    entropy = entropy.mean()
    ent_coef = args.ent_coef if ent_coef is None else ent_coef
    loss = policy_loss - ent_coef * entropy + args.vf_coef * value_loss  # [core 10]
    stats = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    # [core 12] Both estimators of the KL divergence: Schulman, "Approximating KL Divergence" (2020)
    stats |= {"old_approx_kl": (-log_ratio).mean(), "approx_kl": (ratio - 1 - log_ratio).mean()}
    stats |= {"clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean()}
    return loss, {name: stat.detach() for name, stat in stats.items()}


def anneal(start: float, end: float, iteration: int, num_iterations: int) -> float:
    """[core 4] Linear from start, in iteration 1, to end, in the iteration after the last."""
    return end + (start - end) * (1 - (iteration - 1) / num_iterations)


def average_gradients(agent: Agent) -> None:
    """Averages the gradients over all processes, in one message."""
    gradients = [parameter.grad for parameter in agent.parameters()]
    mean = all_mean(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


class Batch(NamedTuple):
    """A rollout of B steps on the learner's device. The tensors stay where they are: a CUDA graph reads them there."""

    obs: Tensor  # uint8 [B, L, L, frame_stack]: with channels innermost, index_select gathers whole rows
    actions: Tensor  # int64 [B]; the others are float32 [B]
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @staticmethod
    def allocate(size: int, obs_shape: tuple[int, ...], device: torch.device) -> "Batch":
        obs = torch.zeros((size, *obs_shape[1:], obs_shape[0]), dtype=torch.uint8, device=device)
        actions = torch.zeros(size, dtype=torch.int64, device=device)
        return Batch(obs, actions, *torch.zeros((4, size), device=device))

    def fill(self, storage: Storage, advantages: Tensor, returns: Tensor) -> None:
        obs = storage.obs[:-1].flatten(0, 1).to(self.obs.device, non_blocking=True)
        self.obs.copy_(obs.permute(0, 2, 3, 1))
        rest = (storage.actions, storage.log_probs, storage.values[:-1], advantages, returns)
        for mine, new in zip(self[1:], rest):
            mine.copy_(new.flatten(), non_blocking=True)

    def evaluate(self, agent: Agent, i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log_prob, entropy and value of the rows i, as the agent sees them now."""
        return agent.get_action_and_value(self.obs.index_select(0, i).permute(0, 3, 1, 2), self.actions[i])[1:]


def update(
    agent: Agent, optimizer: torch.optim.Optimizer, batch: Batch, i: Tensor, args: argparse.Namespace, ent_coef: Tensor
) -> Tensor:
    """One gradient step on the minibatch that the rows i of the batch form. Returns the stats, in STATS' order."""
    old = (batch.log_probs[i], batch.values[i], batch.advantages[i], batch.returns[i])
    loss, stats = ppo_loss(*batch.evaluate(agent, i), *old, args, ent_coef)
    optimizer.zero_grad()
    loss.backward()
    if args.world_size > 1:
        average_gradients(agent)
    stats["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)  # [core 11]
    optimizer.step()
    return torch.stack([stats[name] for name in STATS])


def cuda_graph(
    step: Callable[[Tensor], Tensor], i: Tensor, agent: Agent, optimizer: torch.optim.Optimizer
) -> Callable[[Tensor], Tensor]:
    """The update `step`, of minibatches as long as i, as a CUDA graph: one launch in place of hundreds.

    The agent and its optimizer are left as they were.
    """
    weights, states = copy.deepcopy((agent.state_dict(), optimizer.state_dict()["state"]))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # the first calls choose kernels and allocate, which no graph may
            step(i)
    torch.cuda.current_stream().wait_stream(stream)
    agent.load_state_dict(weights)
    for index, state in enumerate(optimizer.state.values()):
        for name, tensor in state.items():  # in place: the graph will know these tensors by their addresses
            tensor.copy_(states[index][name]) if index in states else tensor.zero_()
    optimizer.zero_grad()
    graph, rows = torch.cuda.CUDAGraph(), i.clone()
    with torch.cuda.graph(graph):
        stats = step(rows)

    def replay(i: Tensor) -> Tensor:
        rows.copy_(i)
        graph.replay()
        return stats.clone()

    return replay


# --------------------------------------------------------------------------------------------------- 6 run directory


def write_file(path: Path, content: bytes | dict) -> None:
    """Writes bytes, or a dictionary in torch's format, to a temporary name, flushes and renames it.

    At any moment the path holds a whole file, old or new.
    """
    temporary, buffer = path.with_name(path.name + ".tmp"), io.BytesIO()
    if isinstance(content, dict):
        torch.save(content, buffer)  # not to the file: there, a full disk would be a RuntimeError like any other
    with open(temporary, "wb") as file:
        file.write(content if isinstance(content, bytes) else buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_file(path: Path, *keys: str) -> dict[str, Any]:
    """A dictionary that write_file wrote. A file from a stranger can do no harm: weights_only runs no code from it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not set(keys) <= content.keys():
            raise ValueError("other content")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (OSError, RuntimeError, ValueError, AttributeError, EOFError, KeyError, pickle.UnpicklingError):
        raise UsageError(f"{path} is damaged or not a file of this script") from None
    return content


class RunDirectory:
    """What a run writes. A write that fails (a full disk) is reported once and lets the training go on.

    Raises UsageError if nothing can be written here to begin with.
    """

    def __init__(self, path: Path, step: int = 0, about: dict | None = None):
        from torch.utils.tensorboard import SummaryWriter  # here, because the workers do without it

        self.path, self.failed = path, False
        hook = threading.excepthook  # what TensorBoard's own thread cannot write, attempt() reports
        threading.excepthook = lambda error: None if issubclass(error.exc_type, OSError) else hook(error)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if about:
                write_file(path / "args.json", json.dumps(about, indent=1).encode())
            # TensorBoard drops what an interrupted run wrote after its checkpoint: no overlap, no gap.
            self.writer = SummaryWriter(str(path), purge_step=step + 1 if step else None, flush_secs=30)
        except OSError as error:
            raise UsageError(f"cannot write to {path}: {error.strerror}") from None

    def attempt(self, what: str, function: Callable, *args: Any) -> None:
        try:
            function(*args)
        except OSError as error:
            if not self.failed:
                print(f"ppo_atari.py: cannot write {what}: {error}; going on without", file=sys.stderr, flush=True)
            self.failed = True

    def scalars(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self.attempt("TensorBoard events", self.writer.add_scalar, tag, value, step)

    def describe(self, args: argparse.Namespace, screen: np.ndarray, obs: np.ndarray) -> None:
        """Hyperparameters, as text and for the HParams tab; the charts that matter first; what the agent sees."""
        from torch.utils.tensorboard.summary import hparams

        flags = {name: value for name, value in args.flags.items() if value is not None}
        rows = "".join(f"|{name}|{value}|\n" for name, value in flags.items())
        self.writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{rows}")
        for summary in hparams(flags, {"charts/episodic_return": 0}):  # add_hparams would start a sub-run
            self.writer.file_writer.add_summary(summary)
        first = ("charts/episodic_return", "charts/SPS", "losses/explained_variance", "losses/approx_kl")
        self.writer.add_custom_scalars({"PPO": {tag: ["Multiline", [tag]] for tag in first}})
        self.observation("observation", screen, obs, 0)

    def observation(self, tag: str, screen: np.ndarray, obs: np.ndarray, step: int) -> None:
        """An image: the raw screen [H, W, 3] and, to its right, the stacked frames [k, L, L]."""
        size = (len(screen), len(screen))
        frames = [cv2.cvtColor(cv2.resize(f, size, interpolation=cv2.INTER_NEAREST), cv2.COLOR_GRAY2RGB) for f in obs]
        self.writer.add_image(tag, np.concatenate([screen, *frames], axis=1), step, dataformats="HWC")

    def video(self, frames: list[np.ndarray], step: int, fps: int) -> None:
        """RGB frames [H, W, 3] as videos/<step>.webm (VP8, which browsers play) and as a GIF in the Images tab."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width, _ = frames[0].shape
        path, temporary = (self.path / "videos" / f"{step}{ending}" for ending in (".webm", ".tmp.webm"))
        path.parent.mkdir(exist_ok=True)
        film = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"VP80"), fps, (2 * width, 2 * height))
        for frame in frames:
            double = cv2.resize(frame, (2 * width, 2 * height), interpolation=cv2.INTER_NEAREST)
            film.write(cv2.cvtColor(double, cv2.COLOR_RGB2BGR))
        film.release()
        os.replace(temporary, path)
        skip = 2 * math.ceil(len(frames) / 1200)  # at most 600 images, so that the dashboard stays quick
        images = [Image.fromarray(frame).quantize(32) for frame in frames[::skip]]
        gif = io.BytesIO()
        images[0].save(gif, "GIF", save_all=True, append_images=images[1:], duration=1000 * skip // fps, loop=0)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif.getvalue())
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag="eval/video", image=image)]), step)


# -------------------------------------------------------------------------------------------------------- 7 programs


def choose_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """bfloat16 only where the hardware multiplies it: elsewhere it would be slower than float32."""
    if args.precision != "auto":
        return getattr(torch, args.precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else torch.float32


def play_games(
    args: argparse.Namespace, agent: Agent | None, num_games: int, film: list | None = None, mode: str | None = None
) -> list[tuple[float, int]]:
    """Plays full games side by side, through all lives; agent=None plays at random. Returns (score, length) of each.

    The stack is that of training: an agent for whom FIRE was pressed has never learned to press it. film collects
    (screen, observation) of the first game's first 5 minutes.
    """
    envs = [make_env(args, mode) for _ in range(num_games)]
    generators = [np.random.default_rng([args.seed, 2**31, i]) for i in range(num_games)]
    obs = [env.reset(seed=args.seed + 2**31 + i)[0] for i, env in enumerate(envs)]
    results: dict[int, tuple[float, int]] = {}
    while playing := [i for i in range(num_games) if i not in results]:
        uniform = torch.tensor([generators[i].random() for i in playing], dtype=torch.float32)
        if agent is None:
            actions = (uniform * envs[0].action_space.n).long().clamp_(max=envs[0].action_space.n - 1)
        else:
            batch = torch.from_numpy(np.stack([obs[i] for i in playing]))
            with torch.inference_mode():
                actions, *_ = agent.get_action_and_value(batch, None, uniform)
        for i, action in zip(playing, actions.tolist()):
            obs[i], _, terminated, truncated, info = envs[i].step(action)
            if film is not None and i == 0 and len(film) < 5 * 60 * 60 / args.frame_skip:
                film.append((envs[0].unwrapped.ale.getScreenRGB(), obs[0]))
            if (terminated or truncated) and "episode" not in info:  # a lost life
                obs[i], info = envs[i].reset()
            if "episode" in info:
                results[i] = (float(info["episode"]["r"]), int(info["episode"]["l"]))
    for env in envs:
        env.close()
    return [results[i] for i in range(num_games)]


def evaluate_agent(args: argparse.Namespace, agent: Agent, step: int, run: RunDirectory) -> None:
    """Plays --eval-episodes games, prints and logs their scores beside a random policy's, and writes eval.json."""
    film = [] if args.capture_video else None
    scores, lengths = zip(*play_games(args, agent, args.eval_episodes, film))
    random_scores, _ = zip(*play_games(args, None, args.eval_episodes))
    mean, std, random_mean = float(np.mean(scores)), float(np.std(scores)), float(np.mean(random_scores))
    print(f"evaluation at step {step:,}: {' '.join(f'{score:g}' for score in scores)}")
    print(f"mean {mean:.2f} ± {std:.2f} over {len(scores)} full games; a random policy: {random_mean:.2f}", flush=True)
    result = {"env_id": args.env_id, "step": step, "seed": args.seed, "mean": mean, "std": std, "scores": scores}
    result |= {"lengths": lengths, "random_mean": random_mean, "random_scores": random_scores}
    run.scalars({"eval/episodic_return": mean, "eval/episodic_length": float(np.mean(lengths))}, step)
    run.attempt("eval.json", write_file, run.path / "eval.json", json.dumps(result, indent=1).encode())
    if film:
        screens, observations = zip(*film)
        run.attempt("the video", run.video, screens, step, round(60 / args.frame_skip))
        run.observation("eval/observation", screens[len(film) // 2], observations[len(film) // 2], step)


def open_run(args: argparse.Namespace, device: torch.device, step: int) -> RunDirectory:
    """Makes the run directory with args.json and, with --track, the Weights & Biases run that mirrors it."""
    name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
    path = Path(args.resume or Path("runs") / name)
    if args.track:
        try:
            import wandb
        except ImportError:
            raise UsageError("--track needs Weights & Biases: pip install wandb") from None
        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": args.wandb_name or path.name}
        wandb.init(**names, id=path.name, resume="allow", config=args.flags, sync_tensorboard=True)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    about = {
        "flags": args.flags,
        "versions": {module.__name__: module.__version__ for module in (ale_py, cv2, gym, np, torch)},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "device": str(device)},
    }
    with suppress(OSError):  # not every machine has git
        about["git"] = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    run = RunDirectory(path, step, about)
    print(f"run directory: {path}", flush=True)
    return run


def gather(mine: Any) -> list[Any]:
    """What each process contributes, in the order of ranks."""
    everyone = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    return everyone


def train(args: argparse.Namespace) -> int:
    """Trains. Returns the exit code: 0; 1 if a file could not be written; 130 or 143 if a signal ended it early."""
    # SETUP
    device = torch.device("cuda", args.local_rank) if args.cuda and torch.cuda.is_available() else torch.device("cpu")
    if args.world_size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    num_envs = args.num_envs // args.world_size  # of this process, as these two
    batch_size, minibatch_size = args.batch_size // args.world_size, args.minibatch_size // args.world_size
    torch.manual_seed(args.seed)  # the same weights in every process
    torch.backends.cudnn.deterministic = args.torch_deterministic
    shuffler = torch.Generator().manual_seed(args.seed * 1000 + args.rank)
    probe = make_env(args, "rgb_array")
    first_obs, _ = probe.reset(seed=args.seed)
    agent = Agent(probe.action_space.n, args.frame_stack, args.frame_size, args.shared_network, args.scale_obs)
    agent.dtype = choose_dtype(args, torch.device("cpu"))
    actor, storage = inference_copy(agent), Storage.allocate(args.num_steps, num_envs, first_obs.shape)
    agent.to(device).dtype = choose_dtype(args, device)
    on_gpu = device.type == "cuda"
    learning_rate, ent_coef = torch.tensor([args.learning_rate, args.ent_coef], device=device)
    optimizer = torch.optim.Adam(agent.parameters(), learning_rate, eps=1e-5, fused=True, capturable=on_gpu)  # [core 3]
    iteration, recent = 0, deque(maxlen=100)  # recent: the scores of the last games
    if args.resume:
        saved = load_file(Path(args.resume, "checkpoint.pt"), "weights", "optimizer", "iteration", "ranks", "recent")
        if len(saved["ranks"]) != args.world_size:
            raise UsageError(f"--resume: that run has {len(saved['ranks'])} processes, not {args.world_size}")
        try:
            agent.load_state_dict(saved["weights"])
            optimizer.load_state_dict(saved["optimizer"])
            optimizer.param_groups[0] |= {"lr": learning_rate, "capturable": on_gpu}
        except (RuntimeError, ValueError, KeyError):
            raise UsageError(f"--resume: {args.resume}/checkpoint.pt is not of the run in args.json") from None
        iteration, mine = saved["iteration"], saved["ranks"][args.rank]
        recent.extend(saved["recent"])
        shuffler.set_state(mine["shuffler"])
        if args.total_timesteps != saved["flags"]["total_timesteps"] and args.rank == 0:
            print(f"the run is now {args.total_timesteps:,} steps long, and the annealing follows", flush=True)
    step = iteration * args.batch_size
    run = open_run(args, device, step) if args.rank == 0 else None
    workers = Workers(args, actor, storage)
    if args.resume:
        storage.obs[-1], storage.dones[-1] = mine["obs"], mine["dones"]
        workers.call("set_state", [mine["environments"][low:high] for low, high in workers.shares])
    elif run:
        run.attempt("TensorBoard events", run.describe, args, probe.render(), first_obs)
    probe.close()

    def save() -> None:
        mine = {"environments": sum(workers.call("get_state"), []), "shuffler": shuffler.get_state()}
        ranks = gather(mine | {"obs": storage.obs[-1].clone(), "dones": storage.dones[-1].clone()})
        if run:
            run.attempt("TensorBoard events", run.writer.flush)  # first, so that the curve reaches the checkpoint
            content = {"weights": agent.state_dict(), "flags": args.flags, "step": step}
            run.attempt("agent.pt", write_file, run.path / "agent.pt", content)
            content |= {"optimizer": optimizer.state_dict(), "iteration": iteration, "recent": list(recent)}
            run.attempt("checkpoint.pt", write_file, run.path / "checkpoint.pt", content | {"ranks": ranks})

    batch = Batch.allocate(batch_size, first_obs.shape, device)
    step_on = partial(update, agent, optimizer, batch, args=args, ent_coef=ent_coef)
    if on_gpu and args.cuda_graph and args.world_size == 1:
        step_on = cuda_graph(step_on, torch.arange(minibatch_size, device=device), agent, optimizer)
    for tensor in storage if on_gpu else ():  # page-locked memory is copied while the learner goes on
        torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)

    stop = torch.zeros((), dtype=torch.int64)  # the number of the signal that asks for an end

    def request_stop(number: int, frame: Any) -> None:
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.fill_(number)
        print("\nfinishing this iteration, then saving (Ctrl-C again: stop at once)", file=sys.stderr, flush=True)

    old_handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    total, begun, printed = args.num_iterations * args.batch_size, (time.perf_counter(), step), time.perf_counter()
    bar = tqdm(total=total, initial=step, unit="steps", disable=None if run else True)  # None: only on a terminal

    try:
        while iteration < args.num_iterations:
            agreed = stop.clone()  # a copy: a signal that comes during the message must wait for the next one
            if dist.is_initialized():  # all processes stop together: one that left alone would hang the others
                dist.all_reduce(agreed, dist.ReduceOp.MAX)
            if agreed:
                stop.copy_(agreed)
                break
            iteration += 1
            started = time.perf_counter()
            if args.anneal_lr:
                learning_rate.fill_(anneal(args.learning_rate, 0, iteration, args.num_iterations))
            if args.ent_coef_final is not None:
                ent_coef.fill_(anneal(args.ent_coef, args.ent_coef_final, iteration, args.num_iterations))

            # ROLLOUT
            copy_weights(agent, actor)
            played = workers.call("rollout")
            rolled_out = time.perf_counter()

            # ADVANTAGES
            rewards, values, dones = storage.rewards, storage.values, storage.dones
            next_ = (values[-1], dones[-1])
            advantages, returns = compute_gae(rewards, values[:-1], dones[:-1], *next_, args.gamma, args.gae_lambda)
            batch.fill(storage, advantages, returns)
            if on_gpu:  # the actor rounds differently: recompute, so that the ratio starts at exactly 1
                with torch.no_grad():
                    for i in torch.arange(batch_size, device=device).split(minibatch_size):
                        batch.log_probs[i], _, batch.values[i] = batch.evaluate(agent, i)

            # UPDATE
            totals = []
            for _ in range(args.update_epochs):
                rows = torch.randperm(batch_size, generator=shuffler).to(device, non_blocking=True)  # [core 6]
                totals += map(step_on, rows.split(minibatch_size))
                if args.target_kl is not None:
                    approx_kl = all_mean(totals[-1][STATS.index("approx_kl")].clone())
                    if approx_kl > args.target_kl:
                        break

            # LOGGING
            means = all_mean(torch.stack(totals).mean(0)).tolist()
            explained_variance = all_mean(1 - (returns - values[:-1]).var() / returns.var())
            if not all(map(math.isfinite, means)):
                raise RunError(f"iteration {iteration}: the loss is not finite; the last checkpoint is kept")
            for t, _, score, length in sorted(sum(gather(sum((games for games, _ in played), [])), [])):
                recent.append(score)
                if run:
                    at = step + (t + 1) * args.num_envs
                    run.scalars({"charts/episodic_return": score, "charts/episodic_length": length}, at)
            step, now, last = iteration * args.batch_size, time.perf_counter(), iteration == args.num_iterations
            if run:
                scalars = {f"losses/{name}": mean for name, mean in zip(STATS, means)}
                scalars["losses/explained_variance"] = float(explained_variance)
                scalars |= {"charts/learning_rate": float(learning_rate), "charts/ent_coef": float(ent_coef)}
                scalars["charts/SPS"] = args.batch_size / (now - started)
                for work in ("environment", "inference"):
                    scalars[f"time/{work}"] = float(np.mean([seconds[work] for _, seconds in played])) / (now - started)
                scalars["time/update"] = (now - rolled_out) / (now - started)
                run.scalars(scalars, step)
                status = f"return {np.mean(recent):.1f}" if recent else "no game over yet"
                bar.set_postfix_str(status, refresh=False)
                bar.update(args.batch_size)
                if bar.disable and now - printed >= 30:
                    printed, speed = now, (step - begun[1]) / (now - begun[0])
                    left = timedelta(seconds=round((total - step) / speed))
                    print(f"step {step:,} of {total:,}, {status}, {speed:,.0f} steps/s, {left} left", flush=True)
                due = args.eval_interval and step // args.eval_interval > (step - args.batch_size) // args.eval_interval
                if due and args.eval_episodes and not last:
                    copy_weights(agent, actor)
                    evaluate_agent(args, actor, step, run)
            if args.checkpoint_interval and iteration % args.checkpoint_interval == 0 and not last:
                save()
        save()
        bar.close()
        if run and not stop and args.eval_episodes:
            copy_weights(agent, actor)
            evaluate_agent(args, actor, step, run)
    finally:
        bar.close()
        workers.close()
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        if run:
            run.attempt("TensorBoard events", run.writer.close)
        if dist.is_initialized():
            dist.destroy_process_group()
    if stop and run:
        print(f"stopped and saved at step {step:,}; to go on: python ppo_atari.py --resume {run.path}", flush=True)
    return 128 + int(stop) if stop else int(run is not None and run.failed)


def evaluate(args: argparse.Namespace) -> int:
    """--evaluate: the agent of a run directory or a file plays full games; with --play, it plays one in a window."""
    path = Path(args.evaluate)
    path = path / "agent.pt" if path.is_dir() else path
    content = load_file(path, "weights", "flags")
    stack = "env_id noop_max frame_skip episodic_life fire_reset frame_size clip_reward frame_stack shared_network"
    try:
        for name in (*stack.split(), "scale_obs", "repeat_action_probability"):
            if name not in args.given:
                setattr(args, name, content["flags"][name])
        num_actions = make_env(args).action_space.n
        agent = Agent(num_actions, args.frame_stack, args.frame_size, args.shared_network, args.scale_obs)
        agent.load_state_dict(content["weights"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise UsageError(f"the weights in {path} do not fit {args.env_id} and these flags") from None
    agent.dtype = choose_dtype(args, torch.device("cpu"))
    agent = inference_copy(agent)
    torch.set_num_threads(1)  # as in Player.rollout; and waiting threads spin, which starves a training next to it
    if args.play:
        (score, length), *_ = play_games(args, agent, 1, mode="human")
        print(f"score {score:g} in {length} steps")
        return 0
    run = RunDirectory(path.parent)
    if args.eval_episodes:
        evaluate_agent(args, agent, content.get("step", 0), run)
    run.writer.close()
    return int(run.failed)


def play(args: argparse.Namespace) -> int:
    """--play: a person plays the game in a window, at its real speed."""
    try:
        from gymnasium.utils.play import play as play_in_window
    except (ImportError, gym.error.DependencyNotInstalled):
        raise UsageError("--play needs pygame: pip install pygame") from None
    env = gym.make(args.env_id, frameskip=1, render_mode="rgb_array")
    meanings = env.unwrapped.get_action_meanings()
    for keys, action in env.unwrapped.get_keys_to_action().items():
        print(f"{' + '.join('space' if key == ' ' else key for key in keys):>14}  {meanings[action]}")
    play_in_window(env, fps=60, zoom=3, noop=find_action(env, "NOOP") or 0)
    return 0


# ----------------------------------------------------------------------------------------------------------- 8 entry


def main(argv: list[str] | None = None) -> int:
    """Runs the program that the flags ask for and returns its exit code: 0, 1, 2, 130 or 143."""
    args = parse_args(argv)
    program = evaluate if args.evaluate else play if args.play else train
    try:
        return program(args)
    except (UsageError, RunError) as error:
        print(f"ppo_atari.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("ppo_atari.py: stopped at once; what was saved before is kept", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"ppo_atari.py: error: {error.__class__.__name__}: {error}", file=sys.stderr)
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main())
