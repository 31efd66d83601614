"""The shipped agents: what the README claims of them can be had from this clone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import SCRIPT

import ppo_atari

RUNS = sorted(path.parent for path in (SCRIPT.parent / "runs" / "reference").glob("*/agent.pt"))


def test_there_is_one():
    assert RUNS


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_shipped_agent_plays(run: Path):
    """Three games. The bound: half-way from the best game of a random policy to the agent's three worst, of thirty.

    The mean of three does not fall below it by luck; a broken wrapper, network or file leaves an agent that plays no
    better than at random. No score is compared exactly: floating point differs from processor to processor.
    """
    claimed = json.loads((run / "eval.json").read_text())
    best_at_random, worst = max(claimed["random_scores"]), np.mean(sorted(claimed["scores"])[:3])
    bound = (best_at_random + worst) / 2
    assert best_at_random < bound < worst
    content = ppo_atari.load_file(run / "agent.pt", "weights", "flags")
    args = ppo_atari.parse_args(["--env-id", claimed["env_id"], "--seed", "77"])
    agent = ppo_atari.Agent(ppo_atari.make_env(args).action_space.n)
    agent.load_state_dict(content["weights"])
    agent.dtype = torch.bfloat16
    scores = [score for score, _ in ppo_atari.play_games(args, ppo_atari.inference_copy(agent), 3)]
    assert np.mean(scores) > bound, scores


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_shipped_run_is_whole_and_small(run: Path):
    assert {path.suffix for path in run.iterdir()} >= {".json", ".pt", ".png", ".webm"}
    assert 0 < sum(path.stat().st_size for path in run.glob("events.out.tfevents.*")) < 2 * 2**20
    assert sum(path.stat().st_size for path in run.iterdir()) < 10 * 2**20
