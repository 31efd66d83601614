"""A learning test that cannot pass by luck: the script's own training loop solves an image task."""

import os
import tempfile
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest

import ppo_atari as p


class Toy(gym.Env):
    """All that the training loop wants of a game beside its reset and its steps: an emulator, here
    without a state, and a screen."""

    observation_space = gym.spaces.Box(0, 255, (4, 36, 36), np.uint8)
    spec = gym.envs.registration.EnvSpec("Toy-v0", kwargs={"repeat_action_probability": 0})
    ale = SimpleNamespace(cloneState=lambda include_rng: SimpleNamespace(serialize=lambda: b""))

    def render(self) -> np.ndarray:
        return np.zeros((36, 36, 3), np.uint8)


def as_make_env_does(game: Toy) -> gym.Env:
    """The game with the statistics that the training loop logs."""
    env = gym.wrappers.RecordEpisodeStatistics(game)
    env.saved = ("episode_returns", "episode_lengths")
    return env


class Block(Toy):
    """A white block stands in one of four corners; the action that names it earns 1, others 0.

    An episode has five steps, so the best return is 5 and chance 1.25. One step is a contextual
    bandit, and gamma > 0 makes later rewards noise that the advantages have to see through.
    """

    action_space = gym.spaces.Discrete(4)

    def draw(self) -> np.ndarray:
        self.corner = int(self.np_random.integers(4))
        y = 18 * (self.corner // 2)
        x = 18 * (self.corner % 2)
        obs = np.zeros((4, 36, 36), np.uint8)
        obs[:, y : y + 18, x : x + 18] = 255
        return obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.draw(), {}

    def step(self, action):
        self.t += 1
        reward = float(action == self.corner)
        return self.draw(), reward, self.t == 5, False, {}


def learn(sign: float, n: int = 8, iterations: int = 20, num_steps: int = 40) -> float:
    """Trains in n games, beside the other processes of torchrun if there are any, with the
    advantages multiplied by sign. Returns this process' share of the best return at the end."""
    num_envs = n * int(os.environ.get("WORLD_SIZE", "1"))
    flags = ["--num-envs", num_envs, "--num-steps", num_steps, "--frame-size", 36]
    flags += ["--total-timesteps", num_envs * num_steps * iterations, "--checkpoint-interval", 0]
    flags += ["--num-workers", 0, "--ent-coef", 0.001, "--learning-rate", 0.001, "--no-anneal-lr"]
    flags += ["--precision", "float32", "--eval-episodes", 0]
    args = p.parse_args([str(flag) for flag in flags])
    compute_gae = p.compute_gae
    earned = []

    def signed_gae(rewards, *others):
        advantages, returns = compute_gae(rewards, *others)
        earned.append(rewards.mean().item())
        return sign * advantages, returns

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(p, "make_env", lambda args, render_mode=None: as_make_env_does(Block()))
        patch.setattr(p, "compute_gae", signed_gae)
        assert p.train(args) == 0
    assert len(earned) == iterations
    return sum(earned[-5:]) / 5


def test_the_task_is_solved():
    assert learn(+1) > 0.95


def test_with_the_advantage_negated_it_is_not():
    assert learn(-1, iterations=12) < 0.1  # chance is 0.25


def test_the_task_rewards_only_the_right_action():
    game = Block()
    rewards = []
    obs, _ = game.reset(seed=1)
    for i in range(40):
        corner = game.corner
        white = obs[:, 18 * (corner // 2) :, 18 * (corner % 2) :][:, :18, :18]
        assert white.all()
        assert obs.sum() == 255 * 4 * 18 * 18
        obs, reward, terminated, _, _ = game.step((corner + i) % 4)
        rewards.append(reward)
        assert terminated == (i % 5 == 4)
        if terminated:
            obs, _ = game.reset()
    assert rewards == [1.0, 0, 0, 0] * 10
