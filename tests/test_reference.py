"""The shipped agents: what the README claims of them can be had from this clone."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from launch import SCRIPT

import ppo_atari

RUNS = sorted(path.parent for path in (SCRIPT.parent / "runs" / "reference").glob("*/agent.pt"))


def test_there_is_one():
    assert RUNS


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_shipped_agent_plays(run: Path):
    """Six games. The bound: half-way from a random policy's mean to the agent's, both from the games in eval.json.

    The mean of six falls below it by luck with a probability of less than 1 in 1 000, as drawing from them shows:
    where the games spread widely, the bound is lower. A broken wrapper, network or file leaves an agent that plays no
    better than at random. No score is compared exactly: floating point differs from processor to processor.
    """
    games = 6
    claimed = json.loads((run / "eval.json").read_text())
    draws = np.random.default_rng(0).choice(claimed["scores"], (20_000, games)).mean(1)
    bound = min((claimed["mean"] + claimed["random_mean"]) / 2, np.quantile(draws, 5e-4))
    assert (draws < bound).mean() < 1e-3 and max(claimed["random_scores"]) < bound
    content = ppo_atari.load_file(run / "agent.pt", "weights", "flags")
    args = ppo_atari.parse_args(["--seed", "77"], content["flags"], str(run))
    assert (args.env_id, args.seed) == (claimed["env_id"], 77)
    agent = ppo_atari.make_agent(args, ppo_atari.make_env(args))
    agent.load_state_dict(content["weights"])
    actor = ppo_atari.inference_copy(agent, ppo_atari.choose_dtype(args, torch.device("cpu")))  # as --evaluate does
    scores = [score for score, _ in ppo_atari.full_games(args, actor, games)]
    assert np.mean(scores) > bound, scores


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_shipped_run_is_whole_and_small(run: Path):
    assert {path.suffix for path in run.iterdir()} >= {".json", ".pt", ".png", ".webm"}
    assert 0 < sum(path.stat().st_size for path in run.glob("events.out.tfevents.*")) < 2 * 2**20
    assert sum(path.stat().st_size for path in run.iterdir()) < 10 * 2**20


def test_the_readme_has_the_tables_of_what_is_kept(capsys):
    reference.table()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) >= 4 + 2 * len({json.loads((run / "eval.json").read_text())["env_id"] for run in RUNS})
    assert set(lines) <= set((SCRIPT.parent / "README.md").read_text().splitlines())
