"""A learning test that cannot pass by luck: the script's own agent, advantages and loss solve an image task."""

import pytest
import torch

from ppo_atari import Agent, Batch, compute_gae, parse_args, update


class Blocks:
    """N games side by side. A white block stands in one of four corners; the action that names it earns 1, others 0.

    An episode has five steps, so the best return is 5 and chance 1.25. One step is a contextual bandit, and gamma > 0
    makes later rewards noise that the advantages have to see through.
    """

    def __init__(self, n: int, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.n, self.t = n, 0
        self.draw()

    def draw(self) -> None:
        self.corner = torch.randint(0, 4, (self.n,), generator=self.generator)
        self.obs = torch.zeros(self.n, 4, 36, 36, dtype=torch.uint8)
        for i, corner in enumerate(self.corner.tolist()):
            y, x = 18 * (corner // 2), 18 * (corner % 2)
            self.obs[i, :, y : y + 18, x : x + 18] = 255

    def step(self, action: torch.Tensor) -> tuple[torch.Tensor, float]:
        reward = (action == self.corner).float()
        self.t = (self.t + 1) % 5
        self.draw()
        return reward, float(self.t == 0)


def learn(sign: float, n: int = 8, rank: int = 0, iterations: int = 40, num_steps: int = 40) -> float:
    """Trains, with the other ranks if there are any. Returns the share of the best return in the last iterations."""
    torch.manual_seed(1)
    args = parse_args(["--num-envs", str(n), "--num-steps", str(num_steps), "--ent-coef", "0.001"])
    agent, games = Agent(4, 4, 36), Blocks(n, seed=rank)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3, eps=1e-5)
    earned, done = [], torch.ones(n)
    for _ in range(iterations):
        obs, actions, log_probs, values, rewards, dones = [], [], [], [], [], []
        with torch.no_grad():
            for _ in range(num_steps):
                action, log_prob, _, value = agent.get_action_and_value(games.obs)
                for history, entry in zip((obs, actions, log_probs, values, dones),
                                          (games.obs, action, log_prob, value, done), strict=True):  # fmt: skip
                    history.append(entry)
                reward, ended = games.step(action)
                rewards.append(reward)
                done = torch.full((n,), ended)
            next_value = agent.get_value(games.obs)
        rewards = torch.stack(rewards)
        advantages, returns = compute_gae(
            rewards, torch.stack(values), torch.stack(dones), next_value, done, args.gamma, args.gae_lambda
        )
        pixels = torch.cat(obs).permute(0, 2, 3, 1).contiguous()
        rest = [torch.cat(x) for x in (actions, log_probs, values)]
        batch = Batch(pixels, *rest, sign * advantages.flatten(), returns.flatten())
        for _ in range(args.update_epochs):
            for i in torch.randperm(n * num_steps).split(n * num_steps // 4):
                update(agent, optimizer, batch, i, args, args.ent_coef)
        earned.append(rewards.mean().item())
    return sum(earned[-5:]) / 5


def test_the_task_is_solved():
    assert learn(+1) > 0.95


def test_with_the_advantage_negated_it_is_not():
    assert learn(-1) < 0.25


@pytest.mark.parametrize("n", [8])
def test_the_task_rewards_only_the_right_action(n):
    games = Blocks(n)
    wrong = (games.corner + 1) % 4
    assert games.step(wrong)[0].sum() == 0
    assert games.step(games.corner)[0].sum() == n
