"""Stable-Baselines3's PPO, with our hyperparameters and wrappers, for benchmark.py and study.py:

    pip install "stable-baselines3==2.9.2" scipy
    python tests/study.py --variants default "sb3: --script tests/stable_baselines.py"

It trains in float32, and without a clipped value loss: the clip_range_vf of SB3 lacks the maximum
of the two errors, so that a value beyond the range gets no gradient. What is resumed has the same
weights and optimizer, but its games begin anew.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack
from torch.utils.tensorboard import SummaryWriter

NUM_ENVS, NUM_STEPS = 8, 128
BATCH = NUM_ENVS * NUM_STEPS
gym.register_envs(ale_py)


def make_envs(game: str, num_envs: int, seed: int) -> VecEnv:
    """Scores are of full games before clipping: the Monitor lies beneath the wrappers."""
    envs = make_atari_env(game, n_envs=num_envs, seed=seed, env_kwargs={"frameskip": 1})
    return VecFrameStack(envs, 4)


def learning_rate(left: float) -> float:
    return 2.5e-4 * left


def make_model(game: str, seed: int, device: str = "cpu") -> PPO:
    return PPO(
        "CnnPolicy",
        make_envs(game, NUM_ENVS, seed),
        n_steps=NUM_STEPS,
        n_epochs=4,
        batch_size=BATCH // 4,
        learning_rate=learning_rate,
        clip_range=0.1,
        vf_coef=0.5,
        ent_coef=0.01,
        seed=seed,
        device=device,
    )


class Stop(Exception):
    """A signal asked for an end; raised between two iterations."""


class Log(BaseCallback):
    """Writes curves and checkpoints to a run directory in the form that study.py reads."""

    def __init__(self, path: Path, total: int):
        super().__init__()
        self.path = path
        self.total = total
        self.writer = None
        self.signum = 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.handle)

    def handle(self, signum: int, frame: Any) -> None:
        self.signum = signum

    def _on_training_start(self) -> None:
        purge_step = self.num_timesteps + 1 if self.num_timesteps else None
        self.writer = SummaryWriter(self.path, purge_step=purge_step)
        self.begun = (time.monotonic(), self.num_timesteps)
        self.said = time.monotonic()

    def _on_step(self) -> bool:
        for i, info in enumerate(self.locals["infos"]):
            if "episode" in info:
                at = self.num_timesteps - NUM_ENVS + i + 1
                self.writer.add_scalar("charts/episodic_return", info["episode"]["r"], at)
        return True

    def _on_rollout_start(self) -> None:  # also: the end of the update before
        step = self.num_timesteps
        if self.signum or step % (100 * BATCH) == 0:
            self.save()
        if self.signum:
            raise Stop
        if time.monotonic() > self.said + 30:
            self.said = time.monotonic()
            speed = (step - self.begun[1]) / (self.said - self.begun[0])
            games = [game["r"] for game in self.model.ep_info_buffer]  # the last 100
            recent = f"return {fmean(games):.1f}" if games else "no game over yet"
            print(f"step {step:,} of {self.total:,}, {recent}, {speed:,.0f} steps/s", flush=True)

    def save(self) -> None:
        """The same under both of the names that study.py looks for."""
        self.writer.flush()
        for name in ("checkpoint.pt", "agent.pt"):
            temporary = self.path / f"{name}.tmp"
            torch.save({"step": self.num_timesteps, **self.model.get_parameters()}, temporary)
            temporary.replace(self.path / name)


class Random:
    """A policy for evaluate_policy."""

    def __init__(self, space: gym.Space):
        space.seed(1)
        self.space = space

    def predict(self, obs: np.ndarray, *others: object, **more: object) -> tuple[np.ndarray, None]:
        return np.array([self.space.sample() for _ in obs]), None


def play(player: Any, flags: dict) -> list[float]:
    """The scores of full games, shared out evenly among ten environments, which are new: a reset
    amid a game does not begin another."""
    envs = make_envs(flags["env_id"], 10, flags["seed"] + 2**20)
    scores, _ = evaluate_policy(
        player,
        envs,
        n_eval_episodes=flags["eval_episodes"],
        deterministic=False,
        return_episode_rewards=True,
    )
    return [float(score) for score in scores]


def score(model: PPO, path: Path, flags: dict) -> None:
    scores = play(model, flags)
    random_mean = fmean(play(Random(model.action_space), flags))
    result = {
        "step": model.num_timesteps,
        "mean": fmean(scores),
        "scores": scores,
        "random_mean": random_mean,
    }
    (path / "eval.json").write_text(json.dumps(result))
    print(f"mean {fmean(scores):.2f} over {len(scores)} full games; random {random_mean:.2f}")


def make_run_directory(args: argparse.Namespace) -> Path:
    """A new one, with the flags."""
    flags = {"num_envs": NUM_ENVS, "num_steps": NUM_STEPS}
    for name, value in vars(args).items():
        if name not in ("resume", "evaluate"):
            flags[name] = value
    second = time.time_ns() // 10**9
    game = args.env_id.replace("/", "-")
    path = Path("runs", f"{game}__{args.exp_name}__{args.seed}__{second}")
    path.mkdir(parents=True)
    about = {"flags": flags, "versions": {"torch": torch.__version__}}
    (path / "args.json").write_text(json.dumps(about))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--env-id", default="BreakoutNoFrameskip-v4")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--total-timesteps", type=int, default=1_000_000)
    parser.add_argument("--exp-name", default="stable_baselines")
    parser.add_argument("--eval-episodes", type=int, default=30)
    parser.add_argument("--num-workers", type=int, choices=[0], default=0, help="there are none")
    parser.add_argument("--num-groups", type=int, choices=[1], default=1, help="there is one")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--evaluate", type=Path)
    args = parser.parse_args()
    begun = args.resume or args.evaluate
    if begun and not (begun / "checkpoint.pt").exists():
        parser.error(f"{begun} has no checkpoint")
    path = begun or make_run_directory(args)
    flags = json.loads((path / "args.json").read_text())["flags"]
    total = flags["total_timesteps"] // BATCH * BATCH
    model = make_model(flags["env_id"], flags["seed"])
    log = Log(path, total)
    if begun:
        saved = torch.load(path / "checkpoint.pt", weights_only=True)
        model.num_timesteps = saved.pop("step")
        model.set_parameters(saved)
        model.set_random_seed(flags["seed"] + model.num_timesteps)
    try:
        if model.num_timesteps < total:
            model.learn(total - model.num_timesteps, callback=log, reset_num_timesteps=False)
            log.save()
    except Stop:
        print(f"stopped and saved at step {model.num_timesteps:,}")
        return 128 + log.signum
    score(model, path, flags)
    return 0


if __name__ == "__main__":
    sys.exit(main())
