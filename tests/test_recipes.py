"""What a user adds in one place, the script carries. Each recipe is a real change, as a patch.

With its flag, a patched copy runs with two workers, resumes bit for bit under another number of
workers, and evaluates the network and the stack that it trained with. Without its flag it is
bit-identical to the script.
"""

import copy
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
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
    "adam_rel": ["--adam-rel"],
    "lstm": ["--lstm", "--num-envs", "4", "--num-minibatches", "2", "--total-timesteps", "320"],
}
PLACES = {
    "impala": 4,
    "alive_bonus": 3,
    "hide_score": 3,
    "kl_penalty": 7,
    "rnd": 12,
    "adam_rel": 2,
    "lstm": 14,
}  # at most
FLAGS = ["--env-id", "ALE/Breakout-v5", "--num-envs", "3", "--num-steps", "16"]
FLAGS += ["--total-timesteps", "240", "--frame-size", "44", "--update-epochs", "2"]
FLAGS += ["--checkpoint-interval", "1"]
NO_EVALUATION = ["--eval-episodes", "0"]
REFERENCE = sorted(SCRIPT.parent.glob("runs/reference/*/agent.pt"))


def patched(name: str, folder: Path) -> Path:
    """A copy of the script with the recipe applied as the README says."""
    copy = Path(shutil.copy(SCRIPT, folder / "ppo_atari.py"))
    patch = SCRIPT.parent / "tests" / "recipes" / f"{name}.patch"
    subprocess.run(["git", "apply", patch], cwd=folder, check=True)
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


def checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The weights of the script itself."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = train(ppo_atari, folder, monkeypatch, "--num-workers", "0", *NO_EVALUATION)
        return weights(run)


def test_every_patch_is_tested():
    patches = (SCRIPT.parent / "tests" / "recipes").glob("*.patch")
    assert {path.stem for path in patches} == RECIPES.keys() == PLACES.keys()


def test_places(recipe):
    """A change touches no more places than it has to."""
    name, module = recipe
    diff = subprocess.run(["diff", "-U0", SCRIPT, module.__file__], capture_output=True, text=True)
    places = sum(line.startswith("@@") for line in diff.stdout.splitlines())
    assert 0 < places <= PLACES[name]
    page = (SCRIPT.parent / "tests" / "README.md").read_text()
    assert f"| `{name}.patch` | {places} |" in page


def test_without_its_flag_nothing_changes(recipe, plain, tmp_path, monkeypatch):
    name, module = recipe
    run = train(module, tmp_path, monkeypatch, "--num-workers", "2", *NO_EVALUATION)
    assert same_weights(weights(run), plain)


def test_interrupted_resumed_and_evaluated(recipe, plain, tmp_path, monkeypatch):
    """Interrupted or not, the weights in the end are the same; --evaluate plays the very games of
    the training's own last evaluation."""
    name, module = recipe
    flags = [*RECIPES[name], "--num-workers", "2"]
    whole = train(module, tmp_path / "whole", monkeypatch, *flags, "--eval-episodes", "1")
    assert not same_weights(weights(whole), plain)
    assert all(tensor.isfinite().all() for tensor in weights(whole).values())

    asked = []
    agreed = module.StopRequest.agreed

    def interrupted(stop):
        """A SIGINT in the third iteration."""
        asked.append(1)
        if len(asked) == 4:
            stop.signum = 2
        return agreed(stop)

    with monkeypatch.context() as patch:
        patch.setattr(module.StopRequest, "agreed", interrupted)
        cut = train(module, tmp_path / "cut", monkeypatch, *flags, code=130)
    assert checkpoint(cut)["iteration"] == 3
    assert module.main(["--resume", str(cut), "--num-workers", "0", *NO_EVALUATION]) == 0
    assert same_weights(weights(cut), weights(whole))

    output = tmp_path / "output"
    flags = ["--evaluate", str(whole), "--eval-episodes", "1", "--output", str(output)]
    assert module.main(flags) == 0
    trained, evaluated = (json.loads((path / "eval.json").read_text()) for path in (whole, output))
    assert trained == evaluated
    assert ppo_atari.main(["--evaluate", str(whole)]) == 2  # the script itself has no such flag


def test_shipped_agents_load(recipe):
    name, module = recipe
    for path in REFERENCE:
        assert module.main(["--evaluate", str(path), *NO_EVALUATION]) == 0


@pytest.mark.skipif(shutil.which("patch") is None, reason="patch is missing")
def test_which_recipes_go_together(tmp_path):
    """As the README says: one of each row, but for two pairs."""
    rows = [("impala", "alive_bonus", "hide_score"), ("adam_rel", "kl_penalty", "rnd", "lstm")]
    for pair in itertools.product(*rows):
        shutil.copy(SCRIPT, tmp_path / "ppo_atari.py")
        codes = []
        for name in pair:
            patch = SCRIPT.parent / "tests" / "recipes" / f"{name}.patch"
            command = ["patch", "--silent", "--reject-file=-", "ppo_atari.py", patch]
            codes.append(subprocess.run(command, cwd=tmp_path, capture_output=True).returncode)
        assert (codes == [0, 0]) == (pair not in [("impala", "rnd"), ("impala", "lstm")]), pair


@pytest.mark.parametrize(
    ("title", "flags"),
    [("Example 1", ["--alive-bonus", "0.01"]), ("Example 2", ["--kl-coef", "1"])],
)
def test_the_examples_of_the_readme(title, flags, plain, tmp_path, monkeypatch):
    """Done as it says: in each part of the example, the last line is new."""
    readme = (SCRIPT.parent / "README.md").read_text()
    example = re.search(rf"{title}:.*?```python\n(.*?)```", readme, re.DOTALL)[1]
    script = SCRIPT.read_text()
    for part in example.strip("\n").split("\n\n"):
        there, _, _ = part.rpartition("\n")
        assert script.count(f"{there}\n") == 1
        script = script.replace(f"{there}\n", f"{part}\n")
    (tmp_path / "my_ppo.py").write_text(script)
    copy = load(tmp_path / "my_ppo.py", "my_ppo")
    arguments = ["--num-workers", "0", *NO_EVALUATION]
    assert same_weights(weights(train(copy, tmp_path / "off", monkeypatch, *arguments)), plain)
    run = train(copy, tmp_path / "on", monkeypatch, *arguments, *flags)
    assert not same_weights(weights(run), plain)


@pytest.mark.parametrize("name, kept", [("rnd", "return_int"), ("lstm", "memory")])
def test_two_processes_learn(name, kept, tmp_path):
    """Two ranks end with the same weights, interrupted or not: what differs between them is kept
    for each."""
    copy = patched(name, tmp_path)
    runs = []
    for folder, steps in (("whole", "96"), ("cut", "64")):
        (tmp_path / folder).mkdir()
        flags = [*FLAGS, *RECIPES[name], "--num-envs", "2", "--num-minibatches", "1"]
        flags += ["--no-anneal-lr", "--total-timesteps", steps, "--num-workers", "0"]
        finish_two_ranks(*flags, *NO_EVALUATION, cwd=tmp_path / folder, script=copy)
        runs.append(run_directory(tmp_path / folder))
    flags = ["--resume", runs[1], "--total-timesteps", "96"]
    finish_two_ranks(*flags, cwd=tmp_path, script=copy)
    assert same_weights(weights(runs[0]), weights(runs[1]))
    saved = checkpoint(runs[0])
    assert len(saved["ranks"]) == 1
    assert not torch.equal(saved[kept], saved["ranks"][0][kept])


def only(name):
    """Of the recipes, this one."""
    return pytest.mark.parametrize("recipe", [name], indirect=True)


def num_parameters(agent) -> int:
    return sum(parameter.numel() for parameter in agent.parameters())


@only("impala")
def test_impala_network(recipe):
    """Its parameters, counted by hand for 84 x 84 pixels: 15 convolutions and a linear layer to
    256."""
    _, module = recipe
    args = module.parse_args(["--impala"])
    agent = module.make_agent(args, module.make_env(args))
    convolutions = 0
    channels = 4
    for width in (16, 32, 32):
        convolutions += (channels * 9 * width + width) + 4 * (width * 9 * width + width)
        channels = width
    linear = 32 * 11 * 11 * 256 + 256
    heads = (256 * 4 + 4) + (256 + 1)
    assert num_parameters(agent) == convolutions + linear + heads


@only("alive_bonus")
def test_alive_bonus(recipe):
    """0.01 more for each step, above the clipping; the score is the game's own."""
    _, module = recipe
    rewards = []
    for flags in ([], ["--alive-bonus", "0.01"]):
        env = module.make_env(module.parse_args(["--env-id", "PongNoFrameskip-v4", *flags]))
        env.reset(seed=3)
        rewards.append([env.step(i % 6)[1] for i in range(200)])
        assert env.get_wrapper_attr("episode_returns") == sum(rewards[0])
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
    assert screens[0][:15].any()  # 16 rows of 210 / 84 pixels each
    assert not screens[1][:15].any()
    np.testing.assert_array_equal(screens[0][17:], screens[1][17:])


@only("kl_penalty")
def test_kl_penalty(recipe, tmp_path, monkeypatch):
    """The loss of section 4 against a slow version; the coefficient doubles and halves, and a
    checkpoint holds it."""
    _, module = recipe
    flags = ["--kl-penalty", "3", "--no-norm-adv", "--no-clip-vloss"]
    args = module.parse_args([*flags, "--vf-coef", "0", "--ent-coef", "0"])
    schedule = module.make_schedule(args, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    logits, old_logits = torch.randn(2, 8, 4, generator=generator, dtype=torch.float64)
    action = torch.arange(8) % 4
    advantage = torch.linspace(-1, 2, 8, dtype=torch.float64)
    outputs = []
    for x in (logits, old_logits):
        log_probs = x.log_softmax(-1)
        outputs.append({"log_probs": log_probs, "log_prob": log_probs[torch.arange(8), action]})
        outputs[-1] |= {"value": torch.zeros(8), "entropy": torch.zeros(8)}
    new, old = outputs
    old |= {"advantage": advantage, "return_": torch.zeros(8)}
    loss, stats = module.ppo_loss(new, old, args, schedule)
    expected_kl = 0.0
    expected_loss = 0.0
    for i in range(8):
        p = old_logits[i].softmax(-1).numpy()
        q = logits[i].softmax(-1).numpy()
        expected_kl += sum(a * np.log(a / b) for a, b in zip(p, q)) / 8
        expected_loss -= q[action[i]] / p[action[i]] * advantage[i].item() / 8
    assert stats["kl"].item() == pytest.approx(expected_kl)
    assert loss.item() == pytest.approx(expected_loss + 3 * expected_kl)
    for desired, factor in (("1e-30", 2), ("1e30", 0.5)):
        flags = ["--kl-penalty", "1", "--kl-desired", desired, "--total-timesteps", "96"]
        flags += ["--num-workers", "0"]
        run = train(module, tmp_path / desired, monkeypatch, *flags, *NO_EVALUATION)
        assert checkpoint(run)["schedule"]["kl_penalty"] == factor**2


@only("adam_rel")
def test_adams_steps_are_counted_anew(recipe, tmp_path, monkeypatch, watch):
    """Adam's formulas (Kingma and Ba, 2015) for one bias, in double precision: the step count is 1
    at the first update of each iteration, and the moments are kept (Ellis et al., 2024)."""
    _, module = recipe
    updates = []

    def see(given, stats):
        bias = given["agent"].actor.bias
        rate = given["schedule"]["learning_rate"].item()
        updates.append((bias.grad.double().numpy(), rate, bias.detach().double().numpy()))

    watch(module, "update", after=see)
    train(module, tmp_path, monkeypatch, "--adam-rel", "--num-workers", "0", *NO_EVALUATION)
    assert len(updates) == 5 * 2 * 4  # iterations, epochs, minibatches
    bias = first_moment = second_moment = np.zeros(4)
    for i, (gradient, rate, found) in enumerate(updates):
        step = i % 8 + 1
        first_moment = 0.9 * first_moment + 0.1 * gradient
        second_moment = 0.999 * second_moment + 0.001 * gradient**2
        mean = first_moment / (1 - 0.9**step)
        deviation = np.sqrt(second_moment / (1 - 0.999**step))
        bias = bias - rate * mean / (deviation + 1e-5)
        np.testing.assert_allclose(found, bias, rtol=1e-3, atol=1e-8)


@only("rnd")
def test_novelty_wears_off(recipe):
    """What the predictor is trained on becomes less novel than what it never saw, and the target
    stays as it is."""
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
    assert agent.rnd(seen).mean() < 0.3 * before
    assert agent.rnd(seen).mean() < 0.7 * agent.rnd(unseen).mean()
    for before, after in zip(target, agent.rnd.target.parameters()):
        assert torch.equal(before, after)


@only("rnd")
def test_running_moments(recipe):
    """In pieces of any size: the mean and the variance of all of it."""
    _, module = recipe
    x = torch.randn(300, 2, 3, generator=torch.Generator().manual_seed(0)) * 3 + 5
    moments = module.RunningMoments(2, 3)
    for piece in x.split([1, 99, 150, 50]):
        moments.update(piece, lambda mean: mean)
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(moments.var, x.var(0, correction=0), rtol=1e-3, atol=1e-3)


@only("rnd")
def test_intrinsic_rewards(recipe, tmp_path, monkeypatch, watch):
    """Burda et al. (2018), against a slow version over two rollouts: the reward of a step is the
    novelty of what it leads to, by the deviation of the discounted sums of all steps so far; it
    knows no episodes. Pixels are normalized by what was seen."""
    _, module = recipe
    rollouts = []
    calls = []
    losses = []

    def see_rollout(given, rollout):
        rollouts.append(rollout)

    def see_advantages(given, result):
        if len(calls) % 2 == 0:  # the game's own come first
            rollouts.append(copy.deepcopy(rollouts[0]))
        calls.append((copy.deepcopy(given), result))

    def see_loss(given, result):
        losses.append((given, result))

    watch(module, "make_rollout", after=see_rollout)
    watch(module, "compute_gae", after=see_advantages)
    watch(module, "ppo_loss", after=see_loss)
    flags = ["--rnd", "--int-gamma", "0.9", "--total-timesteps", "96", "--num-workers", "0"]
    flags += ["--num-minibatches", "1", "--update-epochs", "1", "--no-norm-adv"]
    run = train(module, tmp_path, monkeypatch, *flags, *NO_EVALUATION)
    del rollouts[0]
    assert len(rollouts) == len(losses) == 2

    sums = [0.0] * 3
    all_sums = []
    frames = []
    for k, rollout in enumerate(rollouts):
        own, intrinsic = calls[2 * k : 2 * k + 2]
        given, (advantages, returns) = intrinsic
        for t in range(16):
            for i in range(3):
                sums[i] = 0.9 * sums[i] + rollout["novelty"][t + 1, i].item()
                all_sums.append(sums[i])
                frames.append(rollout["obs"][t + 1, i, -1].double())
        expected = rollout["novelty"][1:] / np.std(all_sums)
        torch.testing.assert_close(given["rewards"], expected, rtol=1e-3, atol=0)
        assert torch.equal(given["values"], rollout["value_int"])
        assert not given["dones"].any()
        assert given["gamma"] == 0.9

        given, (loss, stats) = losses[k]
        new, old = given["new"], given["old"]
        rows = old["value_int"].argsort()  # the only minibatch: all steps in another order
        rows = rows[rollout["value_int"][:-1].flatten().argsort().argsort()]
        assert torch.equal(old["value_int"][rows], rollout["value_int"][:-1].flatten())
        mixed = 2 * own[1][0] + advantages
        torch.testing.assert_close(old["advantage"][rows], mixed.flatten())
        torch.testing.assert_close(old["return_int"][rows], returns.flatten())
        plain_loss, _ = ppo_atari.ppo_loss(new, old, given["args"], given["schedule"])
        value_loss = ((new["value_int"] - old["return_int"]) ** 2).mean() / 2
        torch.testing.assert_close(loss, plain_loss + value_loss / 2 + new["novelty"].mean())
    saved = weights(run)
    frames = torch.stack(frames)
    for name, expected in (("mean", frames.mean(0)), ("var", frames.var(0, correction=0))):
        found = saved[f"rnd.pixels.{name}"][0].double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.05)  # pixels are 0 to 255
    np.testing.assert_allclose(checkpoint(run)["return_int"], sums, rtol=1e-4)


class SlowPlayer:
    """One game's memory, by the equations of an LSTM, one observation at a time."""

    def __init__(self, agent):
        self.agent = agent
        self.h = torch.zeros(128)
        self.c = torch.zeros(128)

    def forget(self) -> None:
        self.h = torch.zeros(128)
        self.c = torch.zeros(128)

    def look(self, obs: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The log_probs [actions] and the value of the next observation [1, L, L]."""
        agent = self.agent
        lstm = agent.lstm
        x = agent.network(obs[None].float())[0]
        gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ self.h
        i, f, g, o = (gates + lstm.bias_hh_l0).split(128)
        self.c = f.sigmoid() * self.c + i.sigmoid() * g.tanh()
        self.h = o.sigmoid() * self.c.tanh()
        return agent.actor(self.h).log_softmax(-1), agent.critic(self.h).item()

    def value_after(self, obs: torch.Tensor) -> float:
        """The value that this observation would have next. Nothing is remembered of it."""
        before = (self.h, self.c)
        _, value = self.look(obs)
        self.h, self.c = before
        return value


def sharpen(agent) -> None:
    """Makes a new policy, which is nearly uniform, depend on what it sees and remembers."""
    with torch.no_grad():
        agent.actor.weight.mul_(1000)


@pytest.fixture
def short_game():
    """An id whose games a time limit ends after 60 steps, if their lives have not."""
    limit = {"game": "breakout", "repeat_action_probability": 0.25}
    limit["max_num_frames_per_episode"] = 240
    gym.register("Test/Short-v0", "ale_py.env:AtariEnv", kwargs=limit)
    yield "Test/Short-v0"
    del gym.registry["Test/Short-v0"]


@only("lstm")
def test_lstm_rollouts(recipe, short_game, tmp_path, monkeypatch, watch):
    """Three rollouts against a slow player of each game, and the updates against the rollouts. No
    weight changes, so that the first update and the last one see the same agent."""
    _, module = recipe
    num_steps = 32
    agents = []
    rollouts = []
    own_games = []
    steps = {}  # what each env showed, step by step
    first_obs = []
    updates = []

    def see_agent(given, agent):
        sharpen(agent)
        agents.append(agent)

    def see_games(given, _):
        own_games.append(given["self"])
        first_obs.extend(torch.from_numpy(given["arrays"]["obs"].copy()))

    def see_step(given, result):
        steps.setdefault(given["env"], []).append(result)

    def see_rollout(given, rollout):
        rollouts.append(rollout)

    def see_advantages(given):
        rollouts.append(copy.deepcopy(rollouts[0]))

    def see_loss(given):
        updates.append((given["new"], given["old"]))

    watch(module, "make_agent", after=see_agent)
    watch(module.Games, "__init__", after=see_games)
    watch(module, "step_and_reset", after=see_step)
    watch(module, "make_rollout", after=see_rollout)
    watch(module, "compute_gae", before=see_advantages)
    watch(module, "ppo_loss", before=see_loss)
    flags = ["--lstm", "--env-id", short_game, "--num-steps", str(num_steps), "--num-envs", "4"]
    flags += ["--num-minibatches", "2", "--num-groups", "3", "--learning-rate", "1e-30"]
    flags += ["--total-timesteps", "384", "--precision", "float32", "--num-workers", "0"]
    run = train(module, tmp_path, monkeypatch, *flags, *NO_EVALUATION)
    del rollouts[0]
    assert len(rollouts) == 3
    (agent,) = agents
    (games,) = own_games

    num_lost = 0
    num_truncated = 0
    matters = 0.0  # how much a value depends on the memory
    carried = 0.0  # the same, after a game's final observation
    with torch.no_grad():
        for i, env in games.envs.items():
            player = SlowPlayer(agent)
            obs = first_obs[i]
            begins = True
            for t, step in enumerate(steps[env]):
                rollout = rollouts[t // num_steps]
                row = t % num_steps
                memory = torch.stack([player.h, player.c])
                torch.testing.assert_close(rollout["memory"][row, i], memory, rtol=0, atol=1e-4)
                assert rollout["done"][row, i] == begins
                assert torch.equal(rollout["obs"][row, i], obs)
                forgetful = SlowPlayer(agent).value_after(obs)
                if begins:
                    player.forget()
                log_probs, value = player.look(obs)
                action = rollout["action"][row, i]
                found = (rollout["log_prob"][row, i].item(), rollout["value"][row, i].item())
                assert found == pytest.approx((log_probs[action].item(), value), abs=1e-4)
                matters = max(matters, abs(value - forgetful))

                next_obs, reward, terminated, truncated, final_obs, _ = step
                obs = torch.from_numpy(next_obs)
                begins = terminated or truncated
                expected = reward
                if truncated and not terminated:
                    final_obs = torch.from_numpy(final_obs)
                    value = player.value_after(final_obs)
                    expected += 0.99 * value
                    carried = max(carried, abs(value - SlowPlayer(agent).value_after(final_obs)))
                    num_truncated += 1
                assert rollout["reward"][row, i].item() == pytest.approx(expected, abs=1e-4)
                num_lost += terminated
                if row == num_steps - 1:  # the value after the last step; its obs comes again
                    value = player.value_after(obs)
                    if begins:
                        value = SlowPlayer(agent).value_after(obs)
                    assert rollout["value"][-1, i].item() == pytest.approx(value, abs=1e-4)
            memory = torch.stack([player.h, player.c])
            saved = checkpoint(run)["memory"][i]
            torch.testing.assert_close(saved, memory, rtol=0, atol=1e-4)
    assert num_lost > 2
    assert num_truncated > 1
    assert min(matters, carried) > 1e-2

    assert len(updates) == 3 * 2 * 2
    for k, (new, old) in enumerate(updates):
        for name in ("log_prob", "value"):
            torch.testing.assert_close(new[name].detach(), old[name], rtol=0, atol=1e-4)
        values = torch.cat([old["value"] for _, old in updates[k // 2 * 2 : k // 2 * 2 + 2]])
        expected = rollouts[k // 4]["value"][:-1].flatten()  # each step once in every epoch
        assert torch.equal(values.sort().values, expected.sort().values)


def play_slowly(module, args, agent, i: int, num_steps: int) -> list[int]:
    """The first actions of game i of an evaluation, some of which would be others without a
    memory."""
    generator = np.random.default_rng([args.seed, 2**31, i])
    env = module.make_env(args)
    obs, _ = env.reset(seed=args.seed + 2**31 + i)
    player = SlowPlayer(agent)
    actions = []
    num_others = 0
    for _ in range(num_steps):
        forgetful = SlowPlayer(agent)
        uniform = np.float32(generator.random())
        choices = []
        for one in (player, forgetful):
            log_probs, _ = one.look(torch.from_numpy(obs))
            choices.append(int((log_probs.exp().cumsum(0).numpy() <= uniform).sum()))
        actions.append(choices[0])
        num_others += choices[0] != choices[1]
        obs, _, terminated, truncated, _, _ = module.step_and_reset(env, actions[-1])
        if terminated or truncated:
            player.forget()
    assert num_others > 0
    return actions


@only("lstm")
def test_lstm_evaluation(recipe, monkeypatch):
    """Games of different lengths, side by side, each with a memory of its own that ends with each
    life: the same actions as if each was played alone."""
    _, module = recipe
    args = module.parse_args(["--lstm", "--frame-size", "44"])
    torch.manual_seed(1)
    agent = module.make_agent(args, module.make_env(args))
    sharpen(agent)
    lengths = [60, 20, 110]
    with torch.no_grad():
        alone = [play_slowly(module, args, agent, i, length) for i, length in enumerate(lengths)]

    step_and_reset = module.step_and_reset
    actions = {}

    def stop_early(env, action):
        """Says that the game is over when it has its length."""
        actions.setdefault(env, []).append(action)
        *result, _ = step_and_reset(env, action)
        length = lengths[list(actions).index(env)]
        games = [(0.0, length)] if len(actions[env]) == length else []
        return *result, games

    monkeypatch.setattr(module, "step_and_reset", stop_early)
    policy = module.inference_copy(agent, torch.float32, torch.device("cpu"))
    module.play_full_games(args, policy, 3, module.StopRequest(""))
    assert list(actions.values()) == alone


@only("lstm")
def test_lstm_network(recipe):
    """Its parameters, counted by hand for one frame of 84 x 84 pixels; orthogonal weights, biases 0
    [core 2]. In the copy that acts, only the network computes in bfloat16."""
    _, module = recipe
    args = module.parse_args(["--lstm"])
    agent = module.make_agent(args, module.make_env(args))
    convolutions = (8 * 8 * 32 + 32) + (32 * 4 * 4 * 64 + 64) + (64 * 3 * 3 * 64 + 64)
    linear = 64 * 7 * 7 * 512 + 512
    lstm = 4 * 128 * (512 + 128) + 2 * 4 * 128
    heads = (128 * 4 + 4) + (128 + 1)
    assert num_parameters(agent) == convolutions + linear + lstm + heads
    for weight in (agent.lstm.weight_ih_l0, agent.lstm.weight_hh_l0):
        product = weight.T @ weight
        torch.testing.assert_close(product, torch.eye(len(product)), rtol=0, atol=1e-4)
    for bias in (agent.lstm.bias_ih_l0, agent.lstm.bias_hh_l0):
        assert not bias.any()
    torch.testing.assert_close(agent.actor.weight @ agent.actor.weight.T, 1e-4 * torch.eye(4))
    assert agent.critic.weight.norm().item() == pytest.approx(1)

    policy = module.inference_copy(agent, torch.bfloat16, torch.device("cpu"))
    dtypes = {name: parameter.dtype for name, parameter in policy.named_parameters()}
    for name, dtype in dtypes.items():
        assert dtype == (torch.bfloat16 if name.startswith("network.") else torch.float32)
    obs = torch.randint(0, 256, (2, 1, 84, 84), dtype=torch.uint8)
    inputs = {"obs": obs, "memory": torch.randn(2, 2, 128), "done": torch.zeros(2)}
    outputs = policy.get_action_and_value(**inputs)
    exact = agent.get_action_and_value(**inputs)
    for name in ("value", "memory"):
        assert outputs[name].dtype == torch.float32
        torch.testing.assert_close(outputs[name], exact[name], rtol=0, atol=0.05)


@only("lstm")
def test_lstm_flags(recipe, capsys):
    """The agent sees one frame; minibatches are of whole games."""
    _, module = recipe
    args = module.parse_args(["--lstm", "--num-envs", "6", "--num-minibatches", "3"])
    assert args.flags["frame_stack"] == 1
    assert module.make_env(args).observation_space.shape == (1, 84, 84)
    assert module.parse_args([]).frame_stack == 4
    for flags in (["--num-envs", "6"], ["--no-shared-network"]):
        module.parse_args(flags)
        with pytest.raises(SystemExit) as refused:
            module.parse_args(["--lstm", *flags])
        assert refused.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
