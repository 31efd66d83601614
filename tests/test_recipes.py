"""The law of the house: what a user adds in one place, the machinery carries. Each recipe is a real change as a patch.

With its flag, a patched copy runs with two workers, resumes bit for bit under another number of workers, and evaluates
the network and the stack that it trained with. Without its flag it is bit-identical to the script.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import SCRIPT, finish_two_ranks, load, run_directory, same_weights, weights

import ppo_atari

RECIPES = {
    "impala": ["--impala"],
    "alive_bonus": ["--alive-bonus", "0.01"],
    "hide_score": ["--hide-score", "17"],
    "kl_penalty": ["--kl-penalty", "1"],
    "rnd": ["--rnd"],
}
PLACES = {"impala": 4, "alive_bonus": 3, "hide_score": 3, "kl_penalty": 7, "rnd": 13}  # at most
FLAGS = ["--env-id", "ALE/Breakout-v5", "--num-envs", "4", "--num-steps", "16", "--frame-size", "44",
         "--total-timesteps", "320", "--checkpoint-interval", "1"]  # fmt: skip
REFERENCE = sorted(SCRIPT.parent.glob("runs/reference/*/agent.pt"))


def patched(name: str, folder: Path) -> Path:
    """A copy of the script with the recipe applied as the README says."""
    copy = Path(shutil.copy(SCRIPT, folder / "ppo_atari.py"))
    subprocess.run(["git", "apply", SCRIPT.parent / "tests" / "recipes" / f"{name}.patch"], cwd=folder, check=True)
    return copy


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request, tmp_path_factory):
    """The name of a recipe and the module that the patched copy is."""
    copy = patched(request.param, tmp_path_factory.mktemp(request.param))
    module = load(copy, f"recipe_{request.param}")
    yield request.param, module
    del sys.modules[module.__name__]


def train(module, folder: Path, monkeypatch, *flags: str, code: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    assert module.main([*FLAGS, *flags]) == code
    return run_directory(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The weights of the script itself."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = train(
            ppo_atari, tmp_path_factory.mktemp("plain"), monkeypatch, "--num-workers", "0", "--eval-episodes", "0"
        )
        return weights(run)


def test_places(recipe):
    """A change touches no more places than it has to."""
    name, module = recipe
    diff = subprocess.run(["diff", "-U0", SCRIPT, module.__file__], capture_output=True, text=True)
    assert sum(line.startswith("@@") for line in diff.stdout.splitlines()) <= PLACES[name]


def test_without_its_flag_nothing_changes(recipe, plain, tmp_path, monkeypatch):
    name, module = recipe
    run = train(module, tmp_path, monkeypatch, "--num-workers", "2", "--eval-episodes", "0")
    assert same_weights(weights(run), plain)


def test_interrupted_resumed_and_evaluated(recipe, plain, tmp_path, monkeypatch):
    """All with the same weights in the end; --evaluate plays the very games of the training's own last evaluation."""
    name, module = recipe
    whole = train(module, tmp_path / "whole", monkeypatch, *RECIPES[name], "--num-workers", "2", "--eval-episodes", "1")
    assert not same_weights(weights(whole), plain)
    assert all(tensor.isfinite().all() for tensor in weights(whole).values())

    with monkeypatch.context() as patch:  # a SIGINT in the third iteration
        asked, agreed = [], module.StopRequest.agreed

        def interrupted(stop):
            asked.append(1)
            stop.signum = 2 if len(asked) == 4 else stop.signum
            return agreed(stop)

        patch.setattr(module.StopRequest, "agreed", interrupted)
        cut = train(module, tmp_path / "cut", monkeypatch, *RECIPES[name], "--num-workers", "2", code=130)
    assert torch.load(cut / "checkpoint.pt", weights_only=True)["iteration"] == 3
    assert module.main(["--resume", str(cut), "--num-workers", "0", "--eval-episodes", "0"]) == 0
    assert same_weights(weights(cut), weights(whole))

    output = tmp_path / "output"
    assert module.main(["--evaluate", str(whole), "--eval-episodes", "1", "--output", str(output)]) == 0
    trained, evaluated = (json.loads((path / "eval.json").read_text()) for path in (whole, output))
    assert trained == evaluated
    with pytest.raises(SystemExit) as refused:  # the script without the recipe does not know the flag
        ppo_atari.main(["--evaluate", str(whole)])
    assert refused.value.code == 2


def test_shipped_agents_load(recipe):
    name, module = recipe
    for path in REFERENCE:
        assert module.main(["--evaluate", str(path), "--eval-episodes", "0"]) == 0


def test_two_processes_learn_with_rnd(tmp_path):
    """Two ranks end with the same weights, interrupted or not: what differs between them is kept for each."""
    copy = patched("rnd", tmp_path)
    runs = []
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        steps = ["--total-timesteps", "192" if name == "whole" else "128"]
        flags = [*FLAGS, *steps, "--rnd", "--no-anneal-lr", "--num-workers", "0", "--eval-episodes", "0"]
        finish_two_ranks(*flags, cwd=tmp_path / name, script=copy)
        runs.append(run_directory(tmp_path / name))
    flags = ["--resume", runs[1], "--total-timesteps", "192"]
    finish_two_ranks(*flags, cwd=tmp_path, script=copy)
    assert same_weights(weights(runs[0]), weights(runs[1]))
    kept = torch.load(runs[0] / "checkpoint.pt", weights_only=True)
    assert len(kept["ranks"]) == 1 and not torch.equal(kept["return_int"], kept["ranks"][0]["return_int"])


def only(name):
    """Of the recipes, this one."""
    return pytest.mark.parametrize("recipe", [name], indirect=True)


@only("impala")
def test_impala_network(recipe):
    """Its parameters, counted by hand for 84 x 84 pixels: 15 convolutions and a linear layer to 256."""
    _, module = recipe
    args = module.parse_args(["--impala"])
    agent = module.make_agent(args, module.make_env(args))
    convolutions, channels = 0, 4
    for width in (16, 32, 32):
        convolutions += (channels * 9 * width + width) + 4 * (width * 9 * width + width)
        channels = width
    linear = 32 * 11 * 11 * 256 + 256
    heads = (256 * 4 + 4) + (256 + 1)
    assert sum(parameter.numel() for parameter in agent.parameters()) == convolutions + linear + heads


@only("alive_bonus")
def test_alive_bonus(recipe):
    """0.01 more for each step, above the clipping; the score is the game's own."""
    _, module = recipe
    rewards = []
    for flags in ([], ["--alive-bonus", "0.01"]):
        env = module.make_env(module.parse_args(["--env-id", "PongNoFrameskip-v4", *flags]))
        env.reset(seed=3)
        rewards.append([env.step(i % 6)[1] for i in range(200)])
    assert np.ptp(rewards[0]) > 0
    np.testing.assert_allclose(np.subtract(rewards[1], rewards[0]), 0.01, atol=1e-12)


@only("hide_score")
def test_hidden_score(recipe):
    """The rows of the score are black and the rest is as it was."""
    _, module = recipe
    screens = []
    for flags in ([], ["--hide-score", "40"]):
        env = module.make_env(module.parse_args(["--env-id", "BreakoutNoFrameskip-v4", *flags]))
        env.reset(seed=3)
        screens.append(env.step(0)[0][-1])
    assert screens[0][:15].any() and not screens[1][:15].any()  # 16 rows of 210 / 84 pixels each
    np.testing.assert_array_equal(screens[0][17:], screens[1][17:])


@only("kl_penalty")
def test_kl_penalty(recipe, tmp_path, monkeypatch):
    """The loss of section 4 against a slow version; the coefficient doubles and halves, and a checkpoint holds it."""
    _, module = recipe
    args = module.parse_args(
        ["--kl-penalty", "3", "--no-norm-adv", "--no-clip-vloss", "--vf-coef", "0", "--ent-coef", "0"]
    )
    knobs = module.make_knobs(args, torch.device("cpu"))
    logits, old_logits = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    action, advantage, zeros = torch.arange(8) % 4, torch.linspace(-1, 2, 8, dtype=torch.float64), torch.zeros(8)
    new, old = ({"log_probs": x.log_softmax(-1), "value": zeros, "entropy": zeros} for x in (logits, old_logits))
    for outputs in (new, old):
        outputs["log_prob"] = outputs["log_probs"][torch.arange(8), action]
    loss, stats = module.ppo_loss(new, old | {"advantage": advantage, "return_": zeros}, args, knobs)
    expected_kl = expected = 0.0
    for i in range(8):
        p, q = old_logits[i].softmax(-1).numpy(), logits[i].softmax(-1).numpy()
        expected_kl += sum(a * np.log(a / b) for a, b in zip(p, q)) / 8
        expected -= q[action[i]] / p[action[i]] * advantage[i].item() / 8
    assert stats["kl"].item() == pytest.approx(expected_kl)
    assert loss.item() == pytest.approx(expected + 3 * expected_kl)
    for desired, factor in (("1e-30", 2), ("1e30", 0.5)):
        folder = tmp_path / desired
        flags = ["--kl-penalty", "1", "--kl-desired", desired, "--eval-episodes", "0", "--num-workers", "0"]
        run = train(module, folder, monkeypatch, *flags)
        assert torch.load(run / "checkpoint.pt", weights_only=True)["knobs"]["kl_penalty"] == factor**5


@only("rnd")
def test_novelty_wears_off(recipe, tmp_path, monkeypatch):
    """What the predictor is trained on becomes less novel than what it never saw, and the target stays as it is."""
    _, module = recipe
    torch.manual_seed(0)
    args = module.parse_args(["--rnd", "--frame-size", "44"])
    agent = module.make_agent(args, module.make_env(args))
    seen, unseen = torch.randint(0, 256, (2, 8, 4, 44, 44), dtype=torch.uint8)
    target = [parameter.clone() for parameter in agent.rnd.target.parameters()]
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], 1e-3)
    before = agent.rnd(seen).mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        agent.rnd(seen).mean().backward()
        optimizer.step()
    assert agent.rnd(seen).mean() < 0.3 * before and agent.rnd(seen).mean() < 0.7 * agent.rnd(unseen).mean()
    assert all(torch.equal(a, b) for a, b in zip(target, agent.rnd.target.parameters()))


@only("rnd")
def test_running_moments(recipe):
    """In pieces of any size: the mean and the variance of all of it."""
    _, module = recipe
    x, moments = torch.randn(300, 2, 3, generator=torch.Generator().manual_seed(0)) * 3 + 5, module.RunningMoments(2, 3)
    for piece in x.split([1, 99, 150, 50]):
        moments.update(piece, lambda mean: mean)
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(moments.var, x.var(0, correction=0), rtol=1e-3, atol=1e-3)
