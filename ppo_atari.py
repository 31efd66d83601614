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

    python ppo_atari.py --env-id ALE/Breakout-v5                          train; curves, weights and scores go to runs/
    tensorboard --logdir runs                                             watch
    python ppo_atari.py --resume runs/<run>                               go on after an interruption, bit for bit
    python ppo_atari.py --evaluate runs/<run> --capture-video             play ten full games and film one
    python ppo_atari.py --play --env-id ALE/Breakout-v5                   play yourself (pip install pygame)
    torchrun --standalone --nproc-per-node=2 ppo_atari.py ...             several processes on one machine
    torchrun --nnodes=2 --node-rank=0|1 --nproc-per-node=8 --master-addr=HOST --master-port=29500 ppo_atari.py ...

It follows "Proximal Policy Optimization Algorithms" (Schulman et al., 2017) with openai/baselines' hyperparameters and
the details listed in "The 37 Implementation Details of PPO" (Huang et al., 2022): each is marked where it happens, as
[core 1] to [core 13] and [atari 1] to [atari 9]. A step is one decision of the agent, which is four emulator frames.

Sections, each using only what stands above it:
    1 arguments      every flag, checked
    2 environment    the seven wrappers, make_env, saving and restoring an emulator
    3 agent          the Nature-CNN with a policy head and a value head
    4 rollout        the loop "policy, step, store", and the processes that run it
    5 PPO            generalized advantage estimation and the clipped loss: pure functions
    6 run directory  files that are never half-written, TensorBoard, videos
    7 programs       train, evaluate, play
    8 entry          main
"""

import argparse
import copy
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
import time
import traceback
import zipfile
from collections import deque
from datetime import timedelta
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

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner from every emulator
cv2.setNumThreads(1)  # OpenCV's own threads would fight the workers for the cores

# ----------------------------------------------------------------------------------------------------- 1 arguments


class UsageError(Exception):
    """Something the user can mend: one line on stderr, exit code 2."""


class RunError(Exception):
    """A run that cannot go on, for a reason that is known: one line on stderr, exit code 1."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(message)


DERIVED = ("given", "batch_size", "minibatch_size", "num_iterations", "rank", "world_size", "local_rank")
MAY_CHANGE = {"total_timesteps", "num_workers", "start_method", "checkpoint_interval", "eval_episodes", "eval_interval"}
MAY_CHANGE |= {"capture_video", "track", "wandb_project_name", "wandb_entity", "wandb_name", "resume"}


def number(kind: type, low: float, high: float, what: str):
    """An argparse type: a number of the given kind between low and high, both included; NaN never passes."""

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
    """The flags, checked, plus batch_size, minibatch_size and num_iterations.

    With --resume, the flags of the interrupted run are the defaults. A mistake ends the program with exit code 2.
    """
    try:
        return _parse_args(argv)
    except UsageError as error:
        print(f"ppo_atari.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    count = number(int, 1, 2**53, "a whole number of at least 1")
    natural = number(int, 0, 2**53, "a whole number of at least 0")
    seed = number(int, 0, 2**31 - 1, "a whole number from 0 to 2147483647")
    probability = number(float, 0, 1, "a number from 0 to 1")
    positive = number(float, sys.float_info.min, sys.float_info.max, "a finite number above 0")
    nonnegative = number(float, 0, sys.float_info.max, "a finite number of at least 0")

    parser = Parser(
        prog="ppo_atari.py",
        description="PPO on Atari games. A step is one decision of the agent: 4 emulator frames by default.",
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, max_help_position=42, width=119),
        allow_abbrev=False,
    )

    def flag(group: Any, name: str, default: Any, help: str, type: Any = None, **kwargs: Any) -> None:
        if isinstance(default, bool):
            kwargs["action"] = argparse.BooleanOptionalAction
        elif type is not None:
            kwargs |= {"type": type, "metavar": type.__name__.upper() if type is str else "N"}
        group.add_argument(name, default=default, help=help, **kwargs)

    g = parser.add_argument_group("run")
    flag(g, "--env-id", "ALE/Breakout-v5", "game: ALE/<Game>-v5 (sticky actions) or <Game>NoFrameskip-v4 (none)", str)
    flag(g, "--seed", 1, "of weights, games, actions and shuffling", seed)
    flag(g, "--total-timesteps", 10_000_000, "length of the run, in steps", count)
    flag(g, "--exp-name", "ppo_atari", "goes into the name of the run directory", str)
    flag(g, "--torch-deterministic", True, "deterministic algorithms on a GPU too")
    flag(g, "--cuda", True, "use a GPU if there is one")
    flag(g, "--precision", "auto", "of the convolutions; auto: bfloat16 where the hardware has it",
         choices=("auto", "float32", "bfloat16"))  # fmt: skip
    flag(g, "--num-workers", None, "rollout processes; 0: none (default: one per core, at most one per game)", natural)
    flag(g, "--inference-batch", None, "games per policy call (default: the share of one default worker)", count)
    flag(g, "--start-method", "fork" if sys.platform == "linux" else "spawn", "of the workers",
         choices=("fork", "spawn", "forkserver"))  # fmt: skip
    flag(g, "--resume", None, "go on with the run in this directory, with its flags", str)
    flag(g, "--checkpoint-interval", 400, "iterations from one checkpoint to the next; 0: only at the end", natural)

    g = parser.add_argument_group("PPO")
    flag(g, "--num-envs", 8, "games played side by side, over all processes", count)
    flag(g, "--num-steps", 128, "steps per game in one rollout", count)
    flag(g, "--learning-rate", 2.5e-4, "of Adam", positive)
    flag(g, "--anneal-lr", True, "let the learning rate fall linearly to 0")
    flag(g, "--gamma", 0.99, "discount per step", probability)
    flag(g, "--gae-lambda", 0.95, "of generalized advantage estimation", probability)
    flag(g, "--num-minibatches", 4, "per epoch", count)
    flag(g, "--update-epochs", 4, "passes over each rollout", count)
    flag(g, "--norm-adv", True, "normalize the advantages of each minibatch")
    flag(g, "--clip-coef", 0.1, "of the probability ratio and of the value", positive)
    flag(g, "--clip-vloss", True, "clip the value loss")
    flag(g, "--ent-coef", 0.01, "weight of the entropy bonus", nonnegative)
    flag(g, "--ent-coef-final", None, "anneal the entropy bonus linearly to this weight", nonnegative)
    flag(g, "--vf-coef", 0.5, "weight of the value loss", nonnegative)
    flag(g, "--max-grad-norm", 0.5, "clip the global gradient norm to this", positive)
    flag(g, "--target-kl", None, "end an update after the epoch whose approximate KL exceeds this", positive)

    g = parser.add_argument_group("the nine Atari details")
    flag(g, "--noop-max", 30, "a game starts after 1 to N frames of doing nothing; 0: at once", natural)
    flag(g, "--frame-skip", 4, "emulator frames per step", count)
    flag(g, "--episodic-life", True, "a lost life ends the episode, not the game")
    flag(g, "--fire-reset", True, "press FIRE to start, in games that have it")
    flag(g, "--frame-size", 84, "side of the image in pixels: 8m + 4, at least 36", count)
    flag(g, "--clip-reward", True, "learn from the sign of the reward")
    flag(g, "--frame-stack", 4, "frames that the agent sees at once", count)
    flag(g, "--shared-network", True, "policy and value share the convolutions")
    flag(g, "--scale-obs", True, "scale pixels to [0, 1]")
    flag(g, "--repeat-action-probability", None, "sticky actions (default: what the game's id says)", probability)

    g = parser.add_argument_group("evaluate, film, play, track")
    flag(g, "--evaluate", None, "play full games with the agent of a run directory or an agent file", str)
    flag(g, "--eval-episodes", 10, "full games per evaluation; 0: none", natural)
    flag(g, "--eval-interval", 0, "evaluate every N steps of training as well; 0: only at the end", natural)
    flag(g, "--capture-video", False, "film one game of each evaluation")
    flag(g, "--play", False, "play yourself; with --evaluate: watch the agent")
    flag(g, "--track", False, "mirror the run to Weights & Biases (pip install wandb)")
    flag(g, "--wandb-project-name", "ppo-atari", "", str)
    flag(g, "--wandb-entity", None, "team or user", str)
    flag(g, "--wandb-name", None, "name of the run (default: the run directory's)", str)

    missing = object()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, missing))))
    given = {name: value for name, value in given.items() if value is not missing}
    if "resume" in given:
        if "evaluate" in given or "play" in given:
            raise UsageError("--resume trains on; leave out --evaluate and --play")
        parser.set_defaults(**_flags_to_resume(given))
    args = parser.parse_args(argv)
    args.given = tuple(given)
    _derive(args)
    return args


def _flags_to_resume(given: dict[str, Any]) -> dict[str, Any]:
    """The flags of the run that --resume names, after refusing a change that would make it another run."""
    path = Path(given["resume"]) / "args.json"
    try:
        saved = json.loads(path.read_text())["flags"]
        old_total = saved["total_timesteps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume: {path} is not the args.json of a run ({error.__class__.__name__})") from None
    for name, value in given.items():
        if name not in MAY_CHANGE and name in saved and saved[name] != value:
            raise UsageError(f"--resume: --{name.replace('_', '-')} was {saved[name]} and cannot become {value}")
    if given.get("total_timesteps", old_total) < old_total:
        raise UsageError(f"--resume: --total-timesteps was {old_total} and can only grow")
    return saved


def _derive(args: argparse.Namespace) -> None:
    """Fills in what follows from the flags and the machine, and checks what one flag alone cannot show."""
    args.rank, args.world_size, args.local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    args.batch_size = args.num_envs * args.num_steps
    args.minibatch_size = args.batch_size // args.num_minibatches
    args.num_iterations = args.total_timesteps // args.batch_size
    if args.num_envs % args.world_size:
        raise UsageError(f"--num-envs {args.num_envs} cannot be split evenly over {args.world_size} processes")
    if args.batch_size % (args.num_minibatches * args.world_size):
        raise UsageError(
            f"--num-minibatches {args.num_minibatches} does not divide the batch of {args.num_envs} environments x "
            f"{args.num_steps} steps" + (f" on each of {args.world_size} processes" if args.world_size > 1 else "")
        )
    if args.norm_adv and args.minibatch_size < 2:
        raise UsageError("a minibatch of one sample has no spread: lower --num-minibatches or give --no-norm-adv")
    if args.num_iterations < 1:
        raise UsageError(f"--total-timesteps {args.total_timesteps} is less than one rollout of {args.batch_size} steps")
    if args.frame_size < 36 or args.frame_size % 8 != 4:
        near = max(36, round((args.frame_size - 4) / 8) * 8 + 4)
        raise UsageError(f"--frame-size must be 8m + 4 and at least 36, such as {near}, not {args.frame_size}")
    if not args.exp_name or any(c in args.exp_name for c in "/\\\0"):
        raise UsageError("--exp-name becomes part of a directory name: not empty, and no slashes")
    check_env_id(args.env_id)
    envs_here = args.num_envs // args.world_size
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    default_workers = min(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))), envs_here)
    if args.num_workers is None:
        args.num_workers = default_workers
    args.num_workers = min(args.num_workers, envs_here)
    if args.inference_batch is None:
        args.inference_batch = math.ceil(envs_here / default_workers)


def check_env_id(env_id: str) -> None:
    """Raises UsageError unless the id is registered and is an Atari game with a finite set of actions."""
    try:
        spec = gym.spec(env_id)
    except (gym.error.Error, ImportError, ValueError):
        games = [spec.id for spec in gym.registry.values() if spec.entry_point == "ale_py.env:AtariEnv"]
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
        step_info = {**step_info, **reset_info}
    return obs, {**info, **step_info}


class NoopResetEnv(gym.Wrapper):
    """[atari 1] Starts each game after 1 to noop_max frames of doing nothing, uniformly (Mnih et al., 2015).

    In Backgammon and VideoCheckers, which have no NOOP, action 0 stands in for it.
    """

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
    """[atari 2] Repeats an action for `skip` frames, sums the rewards and returns the pixelwise maximum of the last two
    RGB screens [H, W, 3], because the Atari draws some objects in every other frame only (Mnih et al., 2015).

    Talks to the emulator directly, so that no more than the two screens it needs are ever drawn. Needs a base
    environment with frameskip=1. A game that ends within the skip shows its last screen.
    """

    def __init__(self, env: gym.Env, skip: int = 4):
        super().__init__(env)
        self.ale, self.skip = env.unwrapped.ale, skip
        self.actions = self.ale.getMinimalActionSet()
        self.screens = np.zeros((2, *env.observation_space.shape), np.uint8)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        ale, action, reward = self.ale, self.actions[action], 0.0
        for frame in range(1, self.skip + 1):
            reward += ale.act(action)
            over = ale.game_over()  # terminated or truncated
            if frame == self.skip - 1 and not over:
                ale.getScreenRGB(self.screens[0])
            if over:
                break
        ale.getScreenRGB(self.screens[1])
        screen = self.screens.max(axis=0) if frame == self.skip > 1 and not over else self.screens[1].copy()
        return screen, reward, ale.game_over(with_truncation=False), ale.game_truncated(), {}


class EpisodicLifeEnv(gym.Wrapper):
    """[atari 3] Ends the episode when a life is lost; resets the emulator only when the game is over (Mnih et al., 2015).

    After a lost life, reset() goes on in the same game with one step of doing nothing. reset(seed=...) always starts a
    new game. A counter that falls to 0 is not a lost life: some games (Q*bert) show 0 for a while before they end.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.noop = find_action(env, "NOOP") or 0
        self.lives, self.game_over = 0, True

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.game_over = terminated or truncated
        lives = self.unwrapped.ale.lives()
        terminated = terminated or 0 < lives < self.lives
        self.lives = lives
        return obs, reward, terminated, truncated, info

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        if self.game_over or kwargs.get("seed") is not None:
            obs, info = self.env.reset(**kwargs)
        else:
            obs, info = step_in_reset(self.env, self.noop, {})  # this step, too, can end the game (River Raid)
        self.lives, self.game_over = self.unwrapped.ale.lives(), False
        return obs, info


class FireResetEnv(gym.Wrapper):
    """[atari 4] Presses FIRE, then action 2, at each reset: some games stand still until then (openai/baselines)."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.fire = find_action(env, "FIRE")

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        for action in (self.fire, 2):
            obs, info = step_in_reset(self.env, action, info)
        return obs, info


class WarpFrame(gym.ObservationWrapper):
    """[atari 5] RGB screen [H, W, 3] to luminance, then to size x size by area averaging: uint8 (Mnih et al., 2015)."""

    def __init__(self, env: gym.Env, size: int = 84):
        super().__init__(env)
        self.size = size
        self.observation_space = gym.spaces.Box(0, 255, (size, size), np.uint8)

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
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.frames[:-1] = self.frames[1:]
        self.frames[-1] = obs
        return self.frames.copy(), reward, terminated, truncated, info


def make_env(args: argparse.Namespace, render_mode: str | None = None) -> gym.Env:
    """The full stack, in openai/baselines' order: every program here plays through it.

    Observations uint8 [frame_stack, frame_size, frame_size]. info["episode"] = {"r", "l", "t"} appears once per game,
    when it is really over: full return before clipping, length in steps, seconds.
    """
    check_env_id(args.env_id)
    # frameskip=1, always: the -v5 ids skip 4 frames and the -v4 ids 2 to 4 by themselves, beneath MaxAndSkipEnv.
    kwargs: dict[str, Any] = {"frameskip": 1, "render_mode": render_mode, "disable_env_checker": True}
    if args.repeat_action_probability is not None:
        kwargs["repeat_action_probability"] = args.repeat_action_probability
    env = gym.make(args.env_id, **kwargs)
    if not isinstance(env.action_space, gym.spaces.Discrete) or env.action_space.n < 1:
        raise UsageError(f"--env-id {args.env_id} has no finite set of actions")
    if args.noop_max > 0:
        env = NoopResetEnv(env, args.noop_max)
    env = MaxAndSkipEnv(env, args.frame_skip)
    env = RecordEpisodeStatistics(env)  # above the skip, beneath lives and clipping: the score that papers report
    if args.episodic_life:
        env = EpisodicLifeEnv(env)
    if args.fire_reset and find_action(env, "FIRE") is not None and env.action_space.n > 2:
        env = FireResetEnv(env)
    env = WarpFrame(env, args.frame_size)
    if args.clip_reward:
        env = ClipRewardEnv(env)
    return FrameStack(env, args.frame_stack)


WRAPPER_STATE = {
    RecordEpisodeStatistics: ("episode_returns", "episode_lengths"),
    EpisodicLifeEnv: ("lives", "game_over"),
    FrameStack: ("frames",),
}


def _wrapper_attributes(env: gym.Env):
    while env is not env.unwrapped:
        for name in WRAPPER_STATE.get(type(env), ()):
            yield env, name
        env = env.env


def forget_last_action(env: gym.Env) -> None:
    """Makes the emulator's hidden last action a NOOP. Sticky actions repeat it, but no saved state contains it.

    `rollout` calls this at its start, whether or not a checkpoint follows, so that a resumed run and an uninterrupted
    one see the same game. Each frame overwrites the hidden action with probability of at least 1 - p.
    """
    ale, sticky = env.unwrapped.ale, env.unwrapped.spec.kwargs.get("repeat_action_probability", 0)
    if sticky > 0:
        state = ale.cloneState(include_rng=True)
        for _ in range(min(1000, math.ceil(-22 / math.log10(min(sticky, 0.999)) / 2))):  # fails once in 10^11 or less
            ale.act(ale_py.Action.NOOP)
        ale.restoreState(state)


def get_env_state(env: gym.Env) -> dict[str, Any]:
    """Everything that the future of a game depends on, as plain numbers, bytes, dictionaries and tensors."""
    wrappers = [getattr(wrapper, name) for wrapper, name in _wrapper_attributes(env)]
    return {
        "emulator": env.unwrapped.ale.cloneState(include_rng=True).serialize(),
        "np_random": env.unwrapped.np_random.bit_generator.state,
        "wrappers": [torch.tensor(value) if isinstance(value, np.ndarray) else value for value in wrappers],
    }


def set_env_state(env: gym.Env, state: dict[str, Any]) -> None:
    """The inverse of get_env_state, for an environment made with the same flags and reset once."""
    env.unwrapped.ale.reset_game()
    env.unwrapped.ale.restoreState(ale_py.ALEState(state["emulator"]))
    env.unwrapped.np_random.bit_generator.state = state["np_random"]
    for (wrapper, name), value in zip(_wrapper_attributes(env), state["wrappers"], strict=True):
        setattr(wrapper, name, value.numpy().copy() if isinstance(value, Tensor) else value)


# --------------------------------------------------------------------------------------------------------- 3 agent


def layer_init(layer: nn.Module, std: float = math.sqrt(2), bias_const: float = 0.0) -> nn.Module:
    """[core 2] Orthogonal weights scaled by std and constant biases, in place."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


class Agent(nn.Module):
    """[atari 8] The Nature-CNN (Mnih et al., 2015) with a policy head and a value head.

    Observations are uint8 [B, frame_stack, L, L] with L = frame_size = 8m + 4, at least 36. By default the heads share
    one network; shared_network=False gives the value head its own [core 13].
    """

    def __init__(
        self,
        num_actions: int,
        frame_stack: int = 4,
        frame_size: int = 84,
        shared_network: bool = True,
        scale_obs: bool = True,
    ):
        super().__init__()
        if frame_size < 36 or frame_size % 8 != 4:
            raise ValueError(f"frame_size must be 8m + 4 and at least 36, not {frame_size}")
        side = frame_size // 8 - 3  # 8m + 4 -> 2m -> m - 1 -> m - 3

        def nature_cnn() -> nn.Sequential:
            return nn.Sequential(
                layer_init(nn.Conv2d(frame_stack, 32, 8, stride=4)),
                nn.ReLU(),
                layer_init(nn.Conv2d(32, 64, 4, stride=2)),
                nn.ReLU(),
                layer_init(nn.Conv2d(64, 64, 3, stride=1)),
                nn.ReLU(),
                nn.Flatten(),
                layer_init(nn.Linear(64 * side * side, 512)),
                nn.ReLU(),
            )

        self.network = nature_cnn()
        self.critic_network = None if shared_network else nature_cnn()
        self.actor = layer_init(nn.Linear(512, num_actions), std=0.01)  # nearly uniform at first
        self.critic = layer_init(nn.Linear(512, 1), std=1)
        self.scale = 255.0 if scale_obs else 1.0
        self.dtype = torch.float32  # of the networks' arithmetic; the heads always compute in float32
        # The weight gradient of the first convolution is several times faster with the 4 channels innermost.
        self.to(memory_format=torch.channels_last)

    def _features(self, network: nn.Sequential, obs: Tensor) -> Tensor:
        """uint8 [B, frame_stack, L, L] to float32 [B, 512]."""
        x = obs.to(self.dtype, memory_format=torch.channels_last) / self.scale  # [atari 9]
        with torch.autocast(obs.device.type, self.dtype, enabled=network[0].weight.dtype != self.dtype):
            return network(x).float()

    def get_value(self, obs: Tensor) -> Tensor:
        """The value [B] of each observation uint8 [B, frame_stack, L, L]."""
        return self.critic(self._features(self.critic_network or self.network, obs)).flatten()

    def get_action_and_value(
        self, obs: Tensor, action: Tensor | None = None, uniform: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """action int64 [B], its log_prob [B], the policy's entropy [B] and the value [B] for uint8 [B, frame_stack, L, L].

        Without an action, samples one: by inverting the distribution function at uniform [B] in [0, 1), if given.
        """
        hidden = self._features(self.network, obs)
        value = self.critic(hidden).flatten() if self.critic_network is None else self.get_value(obs)
        log_probs = F.log_softmax(self.actor(hidden), dim=-1)
        probs = log_probs.exp()
        if action is None:
            uniform = torch.rand(len(obs), device=obs.device) if uniform is None else uniform
            action = (probs.cumsum(-1) <= uniform[:, None]).sum(-1).clamp_(max=probs.shape[-1] - 1)
        log_prob = log_probs.gather(-1, action[:, None]).squeeze(-1)
        return action, log_prob, -(probs * log_probs).sum(-1), value


def inference_copy(agent: Agent) -> Agent:
    """A copy for rollouts, on the CPU, in shared memory; the networks' weights are kept in the agent's own dtype."""
    clone = copy.deepcopy(agent).cpu().requires_grad_(False)
    for network in (clone.network, clone.critic_network):
        if network is not None:
            network.to(agent.dtype)
    return clone.share_memory()


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copies all parameters, rounding to the target's precision."""
    with torch.no_grad():
        for old, new in zip(target.parameters(), source.parameters(), strict=True):
            old.copy_(new)


# ------------------------------------------------------------------------------------------------------- 4 rollout


class Storage(NamedTuple):
    """One rollout of T steps in N environments, in shared memory. Row T holds what comes next, as row 0 of the next one.

    dones[t] is 1 where observation t starts a new episode; log_probs and values are the acting policy's.
    """

    obs: Tensor  # uint8 [T + 1, N, frame_stack, L, L]
    dones: Tensor  # float32 [T + 1, N]
    values: Tensor  # float32 [T + 1, N]
    actions: Tensor  # int64 [T, N]
    log_probs: Tensor  # float32 [T, N]
    rewards: Tensor  # float32 [T, N]

    @staticmethod
    def allocate(num_steps: int, num_envs: int, obs_shape: tuple[int, ...]) -> "Storage":
        T, N = num_steps, num_envs
        obs = torch.zeros(T + 1, N, *obs_shape, dtype=torch.uint8)
        long = [torch.zeros(T + 1, N) for _ in range(2)]
        short = [torch.zeros(T, N, dtype=torch.int64), torch.zeros(T, N), torch.zeros(T, N)]
        return Storage(*(tensor.share_memory_() for tensor in (obs, *long, *short)))

    def columns(self, low: int, high: int) -> "Storage":
        """The part of environments low to high - 1; a view."""
        return Storage(*(tensor[:, low:high] for tensor in self))


def act_in_batches(agent: Agent, obs: Tensor, uniform: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """action, log_prob and value [B] for any B, computed in batches of one fixed size.

    Matrix kernels differ in the last bit from one batch size to another. With the size fixed, how many workers share
    the environments makes no difference.
    """
    parts = []
    for i in range(0, len(obs), batch):
        o, u = obs[i : i + batch], uniform[i : i + batch]
        if len(o) < batch:
            o, u = (torch.cat([x, x[:1].expand(batch - len(x), *x.shape[1:])]) for x in (o, u))
        action, log_prob, _, value = agent.get_action_and_value(o, uniform=u)
        parts.append((action, log_prob, value))
    return tuple(torch.cat(part)[: len(obs)] for part in zip(*parts, strict=True))


@torch.inference_mode()
def rollout(
    agent: Agent,
    envs: SyncVectorEnv,
    storage: Storage,
    generators: list[np.random.Generator],
    gamma: float,
    batch: int,
) -> tuple[list[tuple[int, int, float, int]], dict[str, float]]:
    """Plays num_steps steps in each of the n environments and stores them: [core 1], with SAME_STEP autoreset.

    Returns the games that ended, as (step, environment, return, length), and the seconds by kind of work. Environment i
    samples its actions from generators[i].
    """
    num_steps, num_envs = storage.actions.shape
    obs, dones, values, actions, log_probs, rewards = storage
    uniform = torch.from_numpy(np.stack([g.random(num_steps, np.float32) for g in generators], axis=1))
    games, seconds = [], {"environment": 0.0, "inference": 0.0}
    for env in envs.envs:
        forget_last_action(env)
    obs[0], dones[0] = obs[num_steps], dones[num_steps]
    for t in range(num_steps):
        started = time.perf_counter()
        actions[t], log_probs[t], values[t] = act_in_batches(agent, obs[t], uniform[t], batch)

        inferred = time.perf_counter()
        next_obs, reward, terminated, truncated, infos = envs.step(actions[t].numpy())
        obs[t + 1] = torch.from_numpy(next_obs)
        dones[t + 1] = torch.from_numpy(terminated | truncated)
        rewards[t] = torch.from_numpy(reward)
        for i in np.flatnonzero(truncated & ~terminated):  # the time limit is not the game's end: bootstrap
            final_obs = torch.from_numpy(infos["final_obs"][i])[None]
            rewards[t, i] += gamma * act_in_batches(agent, final_obs, uniform[t, :1], batch)[2][0]
        for info in (infos.get("final_info", {}), infos):  # a game can also end within a reset: see step_in_reset
            if "episode" in info:
                for i in np.flatnonzero(info["_episode"]):
                    games.append((t, int(i), float(info["episode"]["r"][i]), int(info["episode"]["l"][i])))
        seconds["inference"] += inferred - started
        seconds["environment"] += time.perf_counter() - inferred
    values[num_steps] = act_in_batches(agent, obs[num_steps], uniform[0], batch)[2]
    return games, seconds


class Player:
    """Environments low to high - 1 of a run and what acts in them: lives in a worker process, or in the learner's."""

    def __init__(self, args: argparse.Namespace, agent: Agent, storage: Storage, low: int, high: int):
        self.args, self.agent, self.storage = args, agent, storage
        # Environments are numbered over all ranks, so that neither ranks nor workers change a game's seed.
        first = args.rank * args.num_envs // args.world_size + low
        indices = range(first, first + high - low)
        self.low, self.generators = low, [np.random.default_rng([args.seed, i]) for i in indices]
        self.envs = SyncVectorEnv([lambda: make_env(args)] * len(indices), copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
        obs, _ = self.envs.reset(seed=[int(np.random.SeedSequence([args.seed, i]).generate_state(1)[0] >> 1) for i in indices])
        storage.obs[-1] = torch.from_numpy(obs)
        storage.dones[-1] = 1

    def rollout(self) -> tuple[list[tuple[int, int, float, int]], dict[str, float]]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a small batch gains nothing from threads, and results must not depend on them
        try:
            batch = self.args.inference_batch
            games, seconds = rollout(self.agent, self.envs, self.storage, self.generators, self.args.gamma, batch)
        finally:
            torch.set_num_threads(threads)
        return [(t, i + self.low, score, length) for t, i, score, length in games], seconds

    def get_state(self) -> list[dict[str, Any]]:
        pairs = zip(self.envs.envs, self.generators, strict=True)
        return [{**get_env_state(env), "generator": generator.bit_generator.state} for env, generator in pairs]

    def set_state(self, states: list[dict[str, Any]]) -> None:
        for env, generator, state in zip(self.envs.envs, self.generators, states, strict=True):
            set_env_state(env, state)
            generator.bit_generator.state = state["generator"]


def worker_main(pipe: connection.Connection, *player_args: Any) -> None:
    """A worker process: makes its Player, then answers calls of its methods until the learner is gone."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # the learner decides when to stop
    try:
        torch.set_num_threads(1)
        player = Player(*player_args)
        pipe.send(("ok", None))
        while True:
            while not pipe.poll(1):  # the pipe's other end may live on in a sister process, so it cannot tell
                if not parent_process().is_alive():
                    return
            method, call_args = pipe.recv()
            pipe.send(("ok", getattr(player, method)(*call_args)))
    except (EOFError, BrokenPipeError):
        return
    except BaseException:
        pipe.send(("error", traceback.format_exc()))


class Workers:
    """The Players of one run: processes that share the storage and the policy's weights with the learner by memory.

    With num_workers=0, a single Player in this process. Either way, the same results bit for bit.
    """

    def __init__(self, args: argparse.Namespace, agent: Agent, storage: Storage):
        num_envs = storage.actions.shape[1]
        bounds = np.linspace(0, num_envs, max(1, args.num_workers) + 1).astype(int).tolist()
        self.shares = list(zip(bounds, bounds[1:], strict=False))
        self.processes, self.pipes, self.local = [], [], None
        if args.num_workers == 0:
            self.local = Player(args, agent, storage, 0, num_envs)
            return
        context = torch.multiprocessing.get_context(args.start_method)
        try:
            for low, high in self.shares:
                pipe, theirs = context.Pipe()
                player_args = (args, agent, storage.columns(low, high), low, high)
                process = context.Process(target=worker_main, args=(theirs, *player_args), daemon=True)
                process.start()
                theirs.close()
                self.processes.append(process)
                self.pipes.append(pipe)
            self._answers()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *per_share: list) -> list[Any]:
        """Calls a Player's method in every worker at once; per_share lists hold one argument for each share."""
        if self.local is not None:
            return [getattr(self.local, method)(*(values[0] for values in per_share))]
        try:
            for i, pipe in enumerate(self.pipes):
                pipe.send((method, [values[i] for values in per_share]))
        except BrokenPipeError:
            pass  # _answers finds out who died
        return self._answers()

    def _answers(self) -> list[Any]:
        answers: list[Any] = [None] * len(self.pipes)
        waiting = set(range(len(self.pipes)))
        while waiting:
            ready = connection.wait([self.pipes[i] for i in waiting] + [p.sentinel for p in self.processes])
            for i, pipe in enumerate(self.pipes):
                try:
                    if i in waiting and pipe in ready and pipe.poll():
                        status, answers[i] = pipe.recv()
                        if status == "error":
                            raise RunError(f"rollout worker {i} failed:\n{answers[i]}")
                        waiting.remove(i)
                        continue
                except (EOFError, ConnectionResetError):
                    pass
                if not self.processes[i].is_alive() and not pipe.poll():
                    self.processes[i].join()
                    raise RunError(f"rollout worker {i} died (exit code {self.processes[i].exitcode})")
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


# ----------------------------------------------------------------------------------------------------------- 5 PPO


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    next_value: Tensor,
    next_done: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """[core 5] Generalized advantage estimation (Schulman et al., 2016): advantages and returns, both [T, N].

    rewards, values, dones are [T, N]; dones[t] is 1 where observation t starts a new episode; next_value and next_done
    [N] belong to the observation after the last step.
    """
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value * (1 - next_done) - values[t]
        advantage = delta + gamma * gae_lambda * (1 - next_done) * advantage
        advantages[t] = advantage
        next_value, next_done = values[t], dones[t]
    return advantages, advantages + values


def all_mean(tensor: Tensor) -> Tensor:
    """The mean over all processes, in place; nothing to do where there is only one."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def normalize(advantage: Tensor) -> Tensor:
    """[core 7] Zero mean and unit variance over the minibatch, which is spread over all processes."""
    if not dist.is_initialized():
        return (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    centered = advantage - all_mean(advantage.mean())
    size = len(advantage) * dist.get_world_size()
    return centered / ((all_mean(centered.square().mean()) * size / (size - 1)).sqrt() + 1e-8)


def ppo_loss(
    log_prob: Tensor,
    entropy: Tensor,
    value: Tensor,
    old_log_prob: Tensor,
    old_value: Tensor,
    advantage: Tensor,
    return_: Tensor,
    args: argparse.Namespace,
    ent_coef: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one minibatch (Schulman et al., 2017) and its parts; every tensor is [B].

    Reads clip_coef, clip_vloss, norm_adv, vf_coef and ent_coef of args; the last argument overrides ent_coef.
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
    with torch.no_grad():  # [core 12]; both estimators of the KL divergence are from joschu.net/blog/kl-approx.html
        stats = {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy": entropy.detach(),
            "old_approx_kl": (-log_ratio).mean(),
            "approx_kl": ((ratio - 1) - log_ratio).mean(),
            "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
        }
    return loss, stats


def anneal(start: float, end: float, iteration: int, num_iterations: int) -> float:
    """[core 4] Linear from start, in iteration 1, to end, in the iteration after the last."""
    return end + (start - end) * (1 - (iteration - 1) / num_iterations)


# --------------------------------------------------------------------------------------------------- 6 run directory


def write_file(path: Path, data: bytes) -> None:
    """Writes to a temporary name, flushes and renames: at any moment the path holds a whole file, old or new."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def load_tensors(path: Path, *keys: str) -> dict[str, Any]:
    """Reads a file of save_tensors. One from a stranger can do no harm: weights_only runs no code from the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not set(keys) <= content.keys():
            raise ValueError("other content")
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else "damaged, or not a file of this script"
        raise UsageError(f"{path} is {reason}") from None
    return content


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags alone, without what _derive adds."""
    return {name: value for name, value in vars(args).items() if name not in DERIVED}


def describe_run(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The content of args.json: flags, versions, git revision, hardware."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    modules = (ale_py, cv2, gym, np, torch)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "flags": flags_of(args),
        "versions": {"python": platform.python_version(), **{m.__name__: m.__version__ for m in modules}},
        "git": git.stdout.strip(),
        "hardware": {"cores": os.cpu_count(), "cpu": platform.machine(), "threads": torch.get_num_threads(), "gpu": gpu},
    }


class RunDirectory:
    """What a run writes. A write that fails (a full disk) is reported once and lets the training go on."""

    def __init__(self, path: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter  # here, because workers need not import it

        self.path, self.failed = path, False
        # TensorBoard drops what an interrupted run wrote after its checkpoint: no overlap, no gap.
        self.writer = SummaryWriter(str(path), purge_step=step + 1 if step else None, flush_secs=30)

    def attempt(self, what: str, function: Any, *args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except OSError as error:
            if not self.failed:
                print(f"ppo_atari.py: cannot write {what}: {error}; training goes on", file=sys.stderr, flush=True)
            self.failed = True

    def scalars(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self.attempt("TensorBoard events", self.writer.add_scalar, tag, value, step)

    def describe(self, args: argparse.Namespace) -> None:
        """Hyperparameters as a table and for the HParams tab, and a layout with the charts that matter first."""
        from torch.utils.tensorboard.summary import hparams

        flags = {name: value for name, value in flags_of(args).items() if value is not None}
        rows = "\n".join(f"|{name}|{value}|" for name, value in flags.items())
        self.writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{rows}")
        for summary in hparams(flags, {"charts/episodic_return": 0}):  # add_hparams would start a sub-run
            self.writer.file_writer.add_summary(summary)
        first = ["charts/episodic_return", "charts/SPS", "losses/explained_variance", "losses/approx_kl"]
        self.writer.add_custom_scalars({"PPO": {tag.split("/")[1]: ["Multiline", [tag]] for tag in first}})

    def observation(self, tag: str, screen: np.ndarray, obs: np.ndarray, step: int) -> None:
        """An image of the raw screen [H, W, 3] and, to its right, the stacked frames [k, L, L] that the agent sees."""
        height = len(screen)
        frames = [cv2.resize(frame, (height, height), interpolation=cv2.INTER_NEAREST) for frame in obs]
        frames = [np.repeat(frame[:, :, None], 3, axis=2) for frame in frames]
        self.writer.add_image(tag, np.concatenate([screen, *frames], axis=1), step, dataformats="HWC")

    def video(self, frames: list[np.ndarray], step: int, fps: int) -> None:
        """RGB frames [H, W, 3] as videos/<step>.webm (VP8, for browsers) and as a moving image in TensorBoard."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width, _ = frames[0].shape
        path = self.path / "videos" / f"{step}.webm"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp.webm")
        film = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"VP80"), fps, (2 * width, 2 * height))
        for frame in frames:
            double = cv2.resize(frame, (2 * width, 2 * height), interpolation=cv2.INTER_NEAREST)
            film.write(cv2.cvtColor(double, cv2.COLOR_RGB2BGR))
        film.release()
        os.replace(temporary, path)
        skip = 2 * math.ceil(len(frames) / 1200)  # half the frames, and at most 600: a dashboard stays quick
        images = [Image.fromarray(frame).quantize(32) for frame in frames[::skip]]
        gif = io.BytesIO()
        images[0].save(gif, "GIF", save_all=True, append_images=images[1:], duration=1000 * skip // fps, loop=0)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif.getvalue())
        summary = Summary(value=[Summary.Value(tag="eval/video", image=image)])
        self.writer.file_writer.add_summary(summary, step)


# -------------------------------------------------------------------------------------------------------- 7 programs


def choose_device(args: argparse.Namespace) -> torch.device:
    if args.cuda and torch.cuda.is_available():
        torch.cuda.set_device(args.local_rank)
        return torch.device("cuda", args.local_rank)
    return torch.device("cpu")


def choose_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """bfloat16 only where the hardware multiplies it: elsewhere it would be slower than float32."""
    if args.precision != "auto":
        return getattr(torch, args.precision)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def make_agent(args: argparse.Namespace, num_actions: int) -> Agent:
    return Agent(num_actions, args.frame_stack, args.frame_size, args.shared_network, args.scale_obs)


def play_games(
    args: argparse.Namespace, agent: Agent | None, num_games: int, film: list | None = None, render_mode: str | None = None
) -> list[tuple[float, int]]:
    """Plays full games side by side, through all lives; agent=None plays at random. Returns each (score, length).

    The stack is that of training: an agent whom FIRE was pressed for never learned to press it. `film` collects the
    screens of the first game.
    """
    envs = [make_env(args, render_mode) for _ in range(num_games)]
    generators = [np.random.default_rng([args.seed, 2**31, i]) for i in range(num_games)]
    obs = [env.reset(seed=args.seed + 2**31 + i)[0] for i, env in enumerate(envs)]
    results: list[tuple[float, int] | None] = [None] * num_games
    while playing := [i for i in range(num_games) if results[i] is None]:
        uniform = torch.tensor([generators[i].random() for i in playing], dtype=torch.float32)
        if agent is None:
            actions = (uniform * envs[0].action_space.n).long()
        else:
            with torch.inference_mode():
                batch = torch.from_numpy(np.stack([obs[i] for i in playing]))
                actions = agent.get_action_and_value(batch, uniform=uniform)[0]
        for i, action in zip(playing, actions.tolist(), strict=True):
            obs[i], _, terminated, truncated, info = envs[i].step(action)
            if (terminated or truncated) and "episode" not in info:  # a lost life
                obs[i], info = envs[i].reset()
            if film is not None and i == 0:
                film.append(envs[0].unwrapped.ale.getScreenRGB())
            if "episode" in info:
                results[i] = (float(info["episode"]["r"]), int(info["episode"]["l"]))
    for env in envs:
        env.close()
    return results


def evaluate_agent(args: argparse.Namespace, agent: Agent, step: int, run: RunDirectory) -> None:
    """Plays --eval-episodes games, prints and logs their scores beside a random policy's, and writes eval.json."""
    film: list[np.ndarray] | None = [] if args.capture_video else None
    games = play_games(args, agent, args.eval_episodes, film)
    scores, lengths = [score for score, _ in games], [length for _, length in games]
    random_scores = [score for score, _ in play_games(args, None, args.eval_episodes)]
    mean, std, random_mean = np.mean(scores), np.std(scores), np.mean(random_scores)
    print(f"evaluation at step {step:,}: {' '.join(f'{score:g}' for score in scores)}")
    print(f"mean {mean:.2f} ± {std:.2f} over {len(scores)} full games; a random policy: {random_mean:.2f}", flush=True)
    result = {"env_id": args.env_id, "step": step, "seed": args.seed, "scores": scores, "lengths": lengths,
              "mean": mean, "std": std, "random_scores": random_scores, "random_mean": random_mean}  # fmt: skip
    run.scalars({"eval/episodic_return": mean, "eval/episodic_length": np.mean(lengths)}, step)
    run.attempt("eval.json", write_file, run.path / "eval.json", json.dumps(result, indent=1).encode())
    if film:
        run.attempt("the video", run.video, film, step, round(60 / args.frame_skip))


def train(args: argparse.Namespace) -> int:
    """Trains, and returns the exit code: 0; 1 if a file could not be written; 130 or 143 if a signal ended it early."""
    # SETUP
    device = choose_device(args)
    if args.world_size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    main_process = args.rank == 0
    num_envs, world_size = args.num_envs // args.world_size, args.world_size  # of this process; of all
    batch_size, minibatch_size = args.batch_size // world_size, args.minibatch_size // world_size
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    shuffler = torch.Generator().manual_seed(args.seed * 1000 + args.rank)

    probe = make_env(args, "rgb_array")
    first_obs, _ = probe.reset(seed=args.seed)
    first_screen, num_actions = probe.render(), int(probe.action_space.n)
    probe.close()
    agent = make_agent(args, num_actions)
    agent.dtype = choose_dtype(args, torch.device("cpu"))
    actor = inference_copy(agent)
    storage = Storage.allocate(args.num_steps, num_envs, first_obs.shape)

    checkpoint, iteration, step = None, 0, 0
    if args.resume:
        path = Path(args.resume) / "checkpoint.pt"
        checkpoint = load_tensors(path, "weights", "optimizer", "iteration", "ranks", "recent")
        if len(checkpoint["ranks"]) != world_size:
            raise UsageError(f"--resume: the run had {len(checkpoint['ranks'])} processes, not {world_size}")
        iteration = checkpoint["iteration"]
        step = iteration * args.batch_size
    workers = Workers(args, actor, storage)  # before the learner's first parallel section: a fork copies no threads
    agent.to(device)
    agent.dtype = choose_dtype(args, device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)  # [core 3]
    recent: deque[float] = deque(maxlen=100)  # scores of the last games
    if checkpoint:
        agent.load_state_dict(checkpoint["weights"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        recent.extend(checkpoint["recent"])
        mine = checkpoint["ranks"][args.rank]
        shuffler.set_state(mine["shuffler"])
        storage.obs[-1], storage.dones[-1] = mine["obs"], mine["dones"]
        workers.call("set_state", [mine["environments"][low:high] for low, high in workers.shares])
    run = None
    if main_process:
        name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
        run = open_run(args, Path(args.resume) if args.resume else Path("runs") / name, step, device)
        if not args.resume:
            run.describe(args)
            run.observation("observation/start", first_screen, first_obs, 0)
    status = Status(args, step, main_process)
    stop = StopSignal()

    def save() -> None:
        """checkpoint.pt, with everything that the run needs to go on, and agent.pt."""
        environments = [state for states in workers.call("get_state") for state in states]
        mine = {"environments": environments, "shuffler": shuffler.get_state()}
        mine |= {"obs": storage.obs[-1].clone(), "dones": storage.dones[-1].clone()}
        ranks = [mine]
        if world_size > 1:
            ranks = [None] * world_size
            dist.all_gather_object(ranks, mine)
        if main_process:
            content = {"weights": agent.state_dict(), "flags": flags_of(args)}
            run.attempt("agent.pt", save_tensors, run.path / "agent.pt", content)
            content |= {"optimizer": optimizer.state_dict(), "iteration": iteration, "ranks": ranks, "recent": list(recent)}
            run.attempt("TensorBoard events", run.writer.flush)
            run.attempt("checkpoint.pt", save_tensors, run.path / "checkpoint.pt", content)

    try:
        while iteration < args.num_iterations and not stop.requested():
            iteration += 1
            started = time.perf_counter()
            learning_rate = args.learning_rate
            if args.anneal_lr:
                learning_rate = anneal(args.learning_rate, 0.0, iteration, args.num_iterations)
            optimizer.param_groups[0]["lr"] = learning_rate
            ent_coef = args.ent_coef
            if args.ent_coef_final is not None:
                ent_coef = anneal(args.ent_coef, args.ent_coef_final, iteration, args.num_iterations)

            # ROLLOUT
            copy_weights(agent, actor)
            played = workers.call("rollout")
            rolled_out = time.perf_counter()

            # ADVANTAGES
            next_value, next_done = storage.values[-1], storage.dones[-1]
            advantages, returns = compute_gae(
                storage.rewards, storage.values[:-1], storage.dones[:-1], next_value, next_done, args.gamma, args.gae_lambda
            )
            obs = storage.obs[:-1].flatten(0, 1).to(device, non_blocking=True)
            obs = obs.contiguous(memory_format=torch.channels_last)
            actions, old_log_probs, old_values, advantages, returns = (
                tensor.flatten().to(device, non_blocking=True)
                for tensor in (storage.actions, storage.log_probs, storage.values[:-1], advantages, returns)
            )
            if device.type != "cpu":  # the workers computed on other hardware: the ratio has to start at exactly 1
                with torch.no_grad():
                    pairs = zip(obs.split(minibatch_size), actions.split(minibatch_size), strict=True)
                    outputs = [agent.get_action_and_value(o, a) for o, a in pairs]
                    old_log_probs, old_values = (torch.cat([output[i] for output in outputs]) for i in (1, 3))

            # UPDATE
            totals: dict[str, Tensor] = {}
            num_updates = 0
            for _ in range(args.update_epochs):
                epoch_kl = 0.0
                permutation = torch.randperm(batch_size, generator=shuffler).to(device)
                for indices in permutation.split(minibatch_size):  # [core 6]
                    _, log_prob, entropy, value = agent.get_action_and_value(obs[indices], actions[indices])
                    loss, stats = ppo_loss(
                        log_prob, entropy, value, old_log_probs[indices], old_values[indices],
                        advantages[indices], returns[indices], args, ent_coef,
                    )  # fmt: skip
                    optimizer.zero_grad()
                    loss.backward()
                    if world_size > 1:
                        average_gradients(agent)
                    stats["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)  # [core 11]
                    optimizer.step()
                    for tag, value in stats.items():
                        totals[tag] = totals.get(tag, 0) + value
                    num_updates += 1
                    epoch_kl = stats["approx_kl"]
                if args.target_kl is not None and all_mean(epoch_kl) > args.target_kl:
                    break

            # LOGGING
            means = all_mean(torch.stack(list(totals.values())) / num_updates).tolist()
            losses = {f"losses/{tag}": mean for tag, mean in zip(totals, means, strict=True)}
            if not all(map(math.isfinite, means)):
                raise RunError(f"iteration {iteration}: the loss is not finite; the last good checkpoint is kept")
            games = [game for share, _ in played for game in share]
            if world_size > 1:
                everyone: list[Any] = [None] * world_size
                dist.all_gather_object(everyone, games)
                games = [game for share in everyone for game in share]
            for t, _, score, length in sorted(games):
                recent.append(score)
                if run:
                    at = step + (t + 1) * args.num_envs
                    run.scalars({"charts/episodic_return": score, "charts/episodic_length": length}, at)
            step = iteration * args.batch_size
            if run:
                spread = returns.var()
                losses["losses/explained_variance"] = (1 - (returns - old_values).var() / spread).item() if spread > 0 else math.nan
                seconds = time.perf_counter() - started
                shares = {
                    f"time/{kind}": float(np.mean([spent[kind] for _, spent in played])) / seconds
                    for kind in ("environment", "inference")
                }
                shares["time/update"] = 1 - (rolled_out - started) / seconds
                charts = {"charts/learning_rate": learning_rate, "charts/SPS": args.batch_size / seconds}
                if args.ent_coef_final is not None:
                    charts["charts/ent_coef"] = ent_coef
                run.scalars(charts | losses | shares, step)
            status.update(step, recent)

            interval = args.eval_interval
            if run and interval and args.eval_episodes and step // interval > (step - args.batch_size) // interval:
                copy_weights(agent, actor)
                evaluate_agent(args, actor, step, run)
            if args.checkpoint_interval and iteration % args.checkpoint_interval == 0:
                save()
        save()
        status.close()
        if run and not stop.requested() and args.eval_episodes:
            copy_weights(agent, actor)
            evaluate_agent(args, actor, step, run)
    finally:
        status.close()
        workers.close()
        stop.restore()
        if run:
            run.attempt("TensorBoard events", run.writer.close)
        if dist.is_initialized():
            dist.destroy_process_group()
    if run and stop.requested():
        print(f"stopped and saved at step {step:,}; to go on: python ppo_atari.py --resume {run.path}", flush=True)
    return 128 + stop.number if stop.requested() else int(bool(run and run.failed))


def open_run(args: argparse.Namespace, path: Path, step: int, device: torch.device) -> RunDirectory:
    """Makes the run directory and, with --track, the Weights & Biases run that mirrors it."""
    if args.track:
        try:
            import wandb
        except ImportError:
            raise UsageError("--track needs Weights & Biases: pip install wandb") from None
        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=args.wandb_name or path.name,
                   id=path.name, resume="allow", config=flags_of(args), sync_tensorboard=True)  # fmt: skip
    try:
        path.mkdir(parents=True, exist_ok=True)
        args_json = json.dumps(describe_run(args, device), indent=1)
        write_file(path / "args.json", args_json.encode())
        run = RunDirectory(path, step)
    except OSError as error:
        raise UsageError(f"cannot write to {path}: {error.strerror}") from None
    print(f"run directory: {path}", flush=True)
    return run


def average_gradients(agent: Agent) -> None:
    """Averages all gradients over the processes in one message."""
    gradients = [parameter.grad for parameter in agent.parameters()]
    flat = all_mean(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


class StopSignal:
    """The first Ctrl-C or SIGTERM asks the training loop to end after this iteration; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.number = 0
        self.old = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(self, number: int, frame: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        print("\nfinishing this iteration, then saving (Ctrl-C again: stop at once)", file=sys.stderr, flush=True)

    def requested(self) -> bool:
        """Whether to stop; all processes of a distributed run answer alike, since one that left would hang the others."""
        if dist.is_initialized():
            number = torch.tensor(self.number)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.number = int(number)
        return self.number > 0

    def restore(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


class Status:
    """A line that is rewritten, on a terminal; a line every 30 seconds elsewhere."""

    def __init__(self, args: argparse.Namespace, step: int, enabled: bool):
        from tqdm import tqdm

        self.enabled, self.total, self.first, self.started = enabled, args.num_iterations * args.batch_size, step, time.time()
        self.printed = self.started
        self.bar = tqdm(total=self.total, initial=step, unit=" steps", unit_scale=True, dynamic_ncols=True,
                        disable=not (enabled and sys.stderr.isatty()))  # fmt: skip

    def update(self, step: int, recent: deque) -> None:
        score = f"return {np.mean(recent):.1f}" if recent else "no game over yet"
        self.bar.set_postfix_str(score, refresh=False)
        self.bar.update(step - self.bar.n)
        now = time.time()
        if self.enabled and self.bar.disable and now - self.printed >= 30:
            speed = (step - self.first) / (now - self.started)
            left = timedelta(seconds=round((self.total - step) / speed))
            print(f"step {step:,} of {self.total:,}, {score}, {speed:,.0f} steps/s, {left} left", flush=True)
            self.printed = now

    def close(self) -> None:
        self.bar.close()


def evaluate(args: argparse.Namespace) -> int:
    """--evaluate: the agent of a run directory or a file plays full games; with --play, it plays one in a window."""
    path = Path(args.evaluate)
    path = path / "agent.pt" if path.is_dir() else path
    content = load_tensors(path, "weights", "flags")
    of_the_stack = ("env_id", "noop_max", "frame_skip", "episodic_life", "fire_reset", "frame_size", "clip_reward",
                    "frame_stack", "shared_network", "scale_obs", "repeat_action_probability")  # fmt: skip
    try:
        vars(args).update({name: content["flags"][name] for name in of_the_stack if name not in args.given})
        env = make_env(args)
        agent = make_agent(args, int(env.action_space.n))
        agent.load_state_dict(content["weights"])
    except (KeyError, TypeError, RuntimeError, AttributeError):
        raise UsageError(f"the weights in {path} do not fit {args.env_id} and these flags") from None
    agent.dtype = choose_dtype(args, torch.device("cpu"))
    agent = inference_copy(agent)
    if args.play:
        (score, length), *_ = play_games(args, agent, 1, render_mode="human")
        print(f"score {score:g} in {length} steps")
    elif args.eval_episodes:
        run = RunDirectory(path.parent, 0)
        evaluate_agent(args, agent, content.get("step", 0), run)
        run.writer.close()
        return int(run.failed)
    return 0


def play(args: argparse.Namespace) -> int:
    """--play: a person plays the game in a window, at its real speed."""
    try:
        from gymnasium.utils.play import play as play_in_window
    except (ImportError, gym.error.DependencyNotInstalled):
        raise UsageError("--play needs pygame: pip install pygame") from None
    env = gym.make(args.env_id, frameskip=1, render_mode="rgb_array")
    keys = env.unwrapped.get_keys_to_action()
    meanings = env.unwrapped.get_action_meanings()
    print("keys:", ", ".join(f"{'+'.join('space' if k == ' ' else k for k in key)} {meanings[a]}" for key, a in keys.items()))
    play_in_window(env, fps=60, zoom=3, noop=find_action(env, "NOOP") or 0)
    return 0


# ----------------------------------------------------------------------------------------------------------- 8 entry


def main(argv: list[str] | None = None) -> int:
    """Runs the program that the flags ask for and returns its exit code."""
    args = parse_args(argv)
    try:
        if args.evaluate:
            return evaluate(args)
        return play(args) if args.play else train(args)
    except UsageError as error:
        print(f"ppo_atari.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ppo_atari.py: stopped at once; what was saved before is kept", file=sys.stderr)
        return 130
    except RunError as error:
        print(f"ppo_atari.py: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        print(f"ppo_atari.py: failed: {error.__class__.__name__}: {error}", file=sys.stderr)
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main())
