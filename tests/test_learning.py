"""A learning test that cannot pass by luck: the script's own rollout, advantages and updates solve an image task."""

import os

import gymnasium as gym
import numpy as np
import torch

import ppo_atari as p


class Block(gym.Env):
    """A white block stands in one of four corners; the action that names it earns 1, others 0.

    An episode has five steps, so the best return is 5 and chance 1.25. One step is a contextual bandit, and gamma > 0
    makes later rewards noise that the advantages have to see through.
    """

    observation_space = gym.spaces.Box(0, 255, (4, 36, 36), np.uint8)
    action_space = gym.spaces.Discrete(4)
    spec = gym.envs.registration.EnvSpec("Block-v0", kwargs={"repeat_action_probability": 0})
    ale = None

    def draw(self) -> np.ndarray:
        self.corner = int(self.np_random.integers(4))
        y, x = 18 * (self.corner // 2), 18 * (self.corner % 2)
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


def learn(sign: float, n: int = 8, rank: int = 0, iterations: int = 40, num_steps: int = 40) -> float:
    """Trains in n games, with the other ranks if there are any. Returns the share of the best return at the end."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's
    flags = ["--num-envs", str(n * world_size), "--num-steps", str(num_steps), "--frame-size", "36"]
    flags += ["--num-workers", "0", "--inference-batch", str(n), "--ent-coef", "0.001", "--learning-rate", "0.001"]
    args = p.parse_args([*flags, "--precision", "float32"])
    envs = gym.vector.SyncVectorEnv([Block] * n, copy=False, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    torch.manual_seed(1)
    agent, storage = p.make_agent(args, envs.envs[0]), p.allocate(args, envs.envs[0])
    actor = p.inference_copy(agent, torch.float32)
    learner = p.Learner(args, agent, torch.device("cpu"), torch.float32)
    generators = [np.random.default_rng([rank, i]) for i in range(n)]
    storage["obs"][-1] = torch.from_numpy(envs.reset(seed=100 * rank)[0])
    storage["done"][-1] = 1
    earned = []
    for _ in range(iterations):
        actor.load_state_dict(agent.state_dict())
        p.rollout(agent=actor, envs=envs, storage=storage, generators=generators, args=args)
        rewards, values, dones = storage["reward"][:-1], storage["value"], storage["done"]
        advantages, returns = p.compute_gae(rewards, values, dones, args.gamma, args.gae_lambda)
        learner.fill(storage, advantage=sign * advantages, return_=returns)
        for _ in range(args.update_epochs):
            for rows in torch.randperm(n * num_steps).split(args.minibatch_size // world_size):
                learner.update(rows)
        earned.append(rewards.mean().item())
    return sum(earned[-5:]) / 5


def test_the_task_is_solved():
    assert learn(+1) > 0.95


def test_with_the_advantage_negated_it_is_not():
    assert learn(-1) < 0.25


def test_the_task_rewards_only_the_right_action():
    game, rewards = Block(), []
    obs, _ = game.reset(seed=1)
    for i in range(40):
        corner = game.corner
        assert obs[:, 18 * (corner // 2) :, 18 * (corner % 2) :][:, :18, :18].all() and obs.sum() == 255 * 4 * 18 * 18
        obs, reward, terminated, _, _ = game.step((corner + i) % 4)
        rewards.append(reward)
        assert terminated == (i % 5 == 4)
        if terminated:
            obs, _ = game.reset()
    assert rewards == [1.0, 0, 0, 0] * 10
