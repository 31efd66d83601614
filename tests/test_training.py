"""Sections 4 and 8: same seed, same weights, however the work is shared out; nobody is left behind
when one dies."""

import copy
import json
import math
import multiprocessing
import os
import random
import signal
import time
from collections import deque
from contextlib import closing
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from launch import (
    curves,
    differences,
    finish,
    fork,
    here,
    living,
    run_directory,
    same_weights,
    wait_for,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_learning import Block, as_make_env_does
from test_ppo import Groups

import ppo_atari

FLAGS = ["--env-id", "ALE/Breakout-v5", "--num-steps", "16", "--frame-size", "36",
         "--eval-episodes", "0", "--update-epochs", "1"]  # fmt: skip
SHORT = [*FLAGS, "--total-timesteps", "512"]
TWO = ["--num-envs", "2", "--num-steps", "64"]  # as many iterations; to load a game takes long


def trained(folder: Path, monkeypatch, *flags: str, module=ppo_atari) -> Path:
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert module.main([*SHORT, *flags]) == 0
    return run_directory(folder)


def interrupted(folder: Path, monkeypatch, watch, *flags: str, module=ppo_atari) -> Path:
    """The same as trained() in two pieces: stopped at once in its third iteration, then resumed."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    reached = []

    def stop(given):
        reached.append(given["iteration"])
        if reached == [1, 2, 3]:
            raise KeyboardInterrupt

    watch(module, "anneal", before=stop)
    assert module.main([*SHORT, *flags, "--checkpoint-interval", "1"]) == 130
    assert module.main([*SHORT, *flags, "--resume", str(run_directory(folder))]) == 0
    assert reached == [1, 2, 3, 3, 4]
    return run_directory(folder)


def checkpoint(run: Path) -> dict:
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    del content["flags"]  # which also say how often to save, and how many workers there were
    return content


def assert_same_run(run: Path, other: Path) -> None:
    """Everything that a checkpoint holds is equal bit for bit, and each loss and game stands once
    in the curves, where the other run has it."""
    assert same_weights(weights(run), weights(other))
    assert not differences(checkpoint(run), checkpoint(other))
    assert curves(run) == curves(other)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("reference") / "run"
        yield trained(folder, monkeypatch, "--num-workers", "0")


@pytest.fixture
def short_games(monkeypatch):
    """The id of a game that a time limit ends after 96 frames, which are 24 steps."""
    kwargs = {"game": "pong", "repeat_action_probability": 0.0, "max_num_frames_per_episode": 96}
    gym.register("Test/Short-v0", "ale_py.env:AtariEnv", kwargs=kwargs)
    yield "Test/Short-v0"
    del gym.registry["Test/Short-v0"]


@pytest.mark.parametrize(
    ("start_method", "flags"),
    [
        ("fork", ["--num-workers", "0"]),
        ("fork", ["--num-workers", "1"]),
        ("fork", ["--num-workers", "2"]),
        ("fork", ["--num-workers", "3"]),
        ("fork", ["--num-workers", "8"]),
        ("spawn", ["--num-workers", "2"]),
        ("fork", ["--eval-interval", "256", "--eval-episodes", "1", "--capture-video",
                  "--checkpoint-interval", "1"]),
    ],
)  # fmt: skip
def test_same_seed_same_weights(start_method, flags, reference, tmp_path, monkeypatch):
    """Any number of workers, started either way, evaluating and filming or not: all that the run
    leaves is equal bit for bit."""
    monkeypatch.setattr(ppo_atari, "START_METHOD", start_method)
    run = trained(tmp_path / "run", monkeypatch, *flags)
    assert same_weights(weights(run), weights(reference))
    assert not differences(checkpoint(run), checkpoint(reference))
    found = curves(run)
    evaluations = {tag: found.pop(tag) for tag in list(found) if tag.startswith("eval/")}
    assert found == curves(reference)
    assert len(evaluations) == (2 if "--eval-interval" in flags else 0)


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_groups_and_not_workers_decide_what_the_policy_sees_at_once(
    num_groups, tmp_path, monkeypatch, watch
):
    """Five games in groups as even as can be, in turn; the same run for any number of workers."""
    sizes = []

    def see(given):
        if not torch.is_grad_enabled():
            sizes.append(len(given["obs"]))

    watch(ppo_atari.Agent, "get_action_and_value", before=see)
    flags = ["--num-envs", "5", "--num-groups", str(num_groups), "--total-timesteps", "160"]
    runs = []
    for workers in ("0", str(num_groups)):
        sizes.clear()
        run = trained(tmp_path / workers, monkeypatch, *flags, "--num-workers", workers)
        assert sizes == {1: [5], 2: [3, 2], 3: [2, 2, 1]}[num_groups] * 17 * 2
        runs.append(run)
    assert_same_run(runs[1], runs[0])


def sampling(self, obs, action=None, uniform=None):
    """As in CleanRL: it draws from torch's own generator, and so depends on the order of calls."""
    hidden = self.features(self.network, obs)
    policy = torch.distributions.Categorical(logits=self.actor(hidden))
    if action is None:
        action = policy.sample()
    log_prob = policy.log_prob(action)
    value = self.critic(hidden).flatten()
    return {"action": action, "log_prob": log_prob, "entropy": policy.entropy(), "value": value}


class Sleepy(gym.Wrapper):
    """A game that takes its time, for once longer, for once shorter."""

    saved = ()
    luck = random.SystemRandom()

    def step(self, action):
        time.sleep(0.004 * self.luck.random())
        return self.env.step(action)


@pytest.fixture
def sleepy_games(monkeypatch):
    make_env = ppo_atari.make_env
    monkeypatch.setattr(
        ppo_atari, "make_env", lambda *args, **kwargs: Sleepy(make_env(*args, **kwargs))
    )


FOUR = ["--num-envs", "4", "--total-timesteps", "256"]


def test_an_agent_that_draws_by_itself(tmp_path, monkeypatch, watch):
    """The same for any number of workers, evaluated in between or not, and in two pieces."""
    monkeypatch.setattr(ppo_atari.Agent, "get_action_and_value", sampling)
    whole = trained(tmp_path / "whole", monkeypatch, *FOUR, "--num-workers", "0")
    evaluating = ["--eval-interval", "128", "--eval-episodes", "1"]
    ways = {
        "3 workers": ["--num-workers", "3"],
        "evaluated": ["--num-workers", "1", *evaluating],
    }
    for name, flags in ways.items():
        run = trained(tmp_path / name, monkeypatch, *FOUR, *flags)
        assert same_weights(weights(run), weights(whole)), name
        assert not differences(checkpoint(run), checkpoint(whole)), name
    pieces = interrupted(tmp_path / "pieces", monkeypatch, watch, *FOUR, "--num-workers", "3")
    assert_same_run(pieces, whole)
    state = torch.Generator().manual_seed(1000).get_state()
    assert not torch.equal(checkpoint(whole)["torch"], state), "it drew nothing"


def test_games_that_sleep_at_random(sleepy_games, short_games, tmp_path, monkeypatch):
    """Whoever is ready first: an agent that draws gets the same numbers, and the games that end at
    the same moment stand in the curve in the order of their numbers."""
    monkeypatch.setattr(ppo_atari.Agent, "get_action_and_value", sampling)
    runs = []
    for workers in ("0", "1", "3"):
        flags = ["--env-id", short_games, *FOUR, "--num-workers", workers]
        runs.append(trained(tmp_path / workers, monkeypatch, *flags))
    assert_same_run(runs[1], runs[0])
    assert_same_run(runs[2], runs[0])
    steps = [step for step, _ in curves(runs[0])["charts/episodic_return"]]
    assert steps == sorted(steps)
    assert len(steps) >= 4 * 2
    recent = ppo_atari.unpack(checkpoint(runs[0])["recent_returns"])
    assert list(recent) == [score for _, score in curves(runs[0])["charts/episodic_return"]]


def test_in_the_order_of_readiness(sleepy_games, short_games, tmp_path, monkeypatch, watch):
    """As on a GPU: what the script's own agent does is the same in any order."""
    groups = []
    turns = ppo_atari.ParallelEnvs.turns

    def ready_first(envs, num_steps):
        envs.fixed_order = False
        for t, group in turns(envs, num_steps):
            groups.append(group.start)
            yield t, group

    flags = ["--env-id", short_games, *FOUR, "--num-groups", "4"]
    fixed = trained(tmp_path / "fixed", monkeypatch, *flags, "--num-workers", "0")
    monkeypatch.setattr(ppo_atari.ParallelEnvs, "turns", ready_first)
    run = trained(tmp_path / "ready", monkeypatch, *flags, "--num-workers", "3")
    assert_same_run(run, fixed)
    assert len(groups) == 4 * 17 * 4
    assert groups != [0, 1, 2, 3] * (17 * 4), "nobody was ready out of turn"


def test_no_git(reference, tmp_path, monkeypatch):
    """Training needs no git: slim container images have none."""
    monkeypatch.setenv("PATH", "")
    run = trained(tmp_path / "run", monkeypatch, "--num-workers", "0")
    assert same_weights(weights(run), weights(reference))
    about, without = [json.loads((path / "args.json").read_text()) for path in (reference, run)]
    assert about.keys() - without.keys() == {"git"}


@pytest.mark.parametrize(
    ("precision", "capabilities", "computes"),
    [
        ("auto", {"avx512_bf16": True}, torch.bfloat16),
        ("auto", {"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ("auto", {"avx512_f": True, "amx_bf16": False, "avx512_bf16": False}, torch.float32),
        ("auto", {}, torch.float32),
        ("float32", {"amx_bf16": True}, torch.float32),
        ("bfloat16", {}, torch.bfloat16),
    ],
)
def test_precision_and_where_it_is_written(
    precision, capabilities, computes, tmp_path, monkeypatch, watch
):
    """auto is bfloat16 where the processor multiplies it. args.json has what it came to: elsewhere
    it may differ."""
    learners = []
    actors = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    watch(ppo_atari, "update", before=lambda given: learners.append(given["agent"].dtype))
    watch(ppo_atari, "inference_copy", after=lambda given, actor: actors.append(actor.dtype))
    flags = ["--num-envs", "2", "--num-workers", "0", "--total-timesteps", "32"]
    flags += ["--precision", precision]
    about = json.loads((trained(tmp_path / "run", monkeypatch, *flags) / "args.json").read_text())
    assert set(learners) == set(actors) == {computes}
    expected = {"device": "cpu", "precision": str(computes)[6:], "threads": 1}
    assert about["hardware"] == expected
    assert about["flags"]["precision"] == precision


def test_another_seed_gives_other_weights(reference, tmp_path, monkeypatch):
    run = trained(tmp_path / "run", monkeypatch, "--num-workers", "2", "--seed", "2")
    other = weights(run)
    for name, tensor in weights(reference).items():
        if tensor.dim() > 1:
            assert not torch.equal(other[name], tensor)


def test_what_a_run_writes(reference):
    """CleanRL's tags; hyperparameters as text and in the HParams tab, without a sub-run; what the
    agent sees."""
    tags = {"charts/learning_rate", "charts/SPS", "time/rollout", "time/update"}
    losses = ["value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac"]
    losses += ["explained_variance", "grad_norm"]
    tags |= {f"losses/{name}" for name in losses}
    events = EventAccumulator(str(reference), size_guidance={"scalars": 0, "images": 0}).Reload()
    found = events.Tags()
    assert tags <= set(found["scalars"])
    assert [event.step for event in events.Scalars("losses/entropy")] == [128, 256, 384, 512]
    times = [events.Scalars("time/rollout")[-1].value, events.Scalars("time/update")[-1].value]
    assert sum(times) == pytest.approx(1)
    assert min(times) > 0
    assert "hyperparameters/text_summary" in found["tensors"]
    assert found["images"] == ["observation"]
    assert "_hparams_/experiment" in events.summary_metadata
    assert "custom_scalars__config__" in found["tensors"]
    image = events.Images("observation")[0]
    assert (image.height, image.width) == (210, 160 + 4 * 210)
    names = {path.name.split(".")[0] for path in reference.iterdir()}
    assert names == {"agent", "args", "checkpoint", "events"}
    assert all(path.is_file() for path in reference.iterdir())
    about = json.loads((reference / "args.json").read_text())
    assert about["flags"]["gamma"] == 0.99
    assert about["flags"]["num_groups"] == 2
    assert about["versions"]["torch"]
    assert about["hardware"].keys() == {"device", "precision", "threads"}
    assert reference.name.startswith("ALE-Breakout-v5__ppo_atari__1__")


def test_returns_in_tensorboard_are_full_games(tmp_path, monkeypatch):
    """Each is the score that the emulator itself counted in one game, over all its lives, at the
    step of its end."""
    running = {}
    order = []
    scores = {}

    class CountingSkip(ppo_atari.MaxAndSkipEnv):
        def step(self, action):
            result = super().step(action)
            running[self.unwrapped] = running.get(self.unwrapped, 0) + result[1]
            return result

    class CountingStack(ppo_atari.FrameStack):
        steps = 0

        def step(self, action):
            if self not in order:  # games take their first step in the order of their numbers
                order.append(self)
            result = super().step(action)
            at = 4 * self.steps + order.index(self) + 1
            self.steps += 1
            if self.unwrapped.ale.game_over():
                scores[at] = running.pop(self.unwrapped)
            return result

    monkeypatch.setattr(ppo_atari, "MaxAndSkipEnv", CountingSkip)
    monkeypatch.setattr(ppo_atari, "FrameStack", CountingStack)
    flags = ["--num-envs", "4", "--num-workers", "0", "--num-steps", "64"]
    flags += ["--total-timesteps", "3072", "--update-epochs", "1"]
    found = curves(trained(tmp_path / "run", monkeypatch, *flags))
    assert found["charts/episodic_return"] == sorted(scores.items())
    assert [step for step, _ in found["charts/episodic_length"]] == sorted(scores)
    assert len(order) == 4
    assert len(scores) > 5
    assert max(scores.values()) > 1


@pytest.mark.parametrize("workers", ["0", "2"])
def test_every_game_has_a_step_of_its_own(workers, short_games, tmp_path, monkeypatch):
    """Games that end at the same moment keep their scores apart, in trackers that hold one value
    per step."""
    flags = ["--env-id", short_games, "--noop-max", "0", "--no-fire-reset", "--num-envs", "3"]
    flags += ["--num-workers", workers, "--total-timesteps", "480"]
    lengths = curves(trained(tmp_path / "run", monkeypatch, *flags))["charts/episodic_length"]
    assert {length for _, length in lengths} == {24}  # 96 frames, four to a step
    expected = [3 * (24 * game - 1) + i + 1 for game in range(1, 7) for i in range(3)]
    assert [step for step, _ in lengths] == expected


@pytest.mark.parametrize("limit", [0.01, 1e9])
def test_first_step_is_adam_on_the_clipped_gradient(limit, tmp_path, monkeypatch, watch):
    """[core 11] The gradient of all parameters together gets at most this norm; [core 3] Adam's
    epsilon is 1e-5."""
    seen = []

    def flat(tensors):
        return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()

    def before(given):
        agent = given["agent"]
        old = given["minibatch"]
        new = agent.get_action_and_value(old["obs"], old["action"])
        loss, _ = ppo_atari.ppo_loss(new, old, given["args"], given["schedule"])
        gradient = torch.autograd.grad(loss, list(agent.parameters()))
        seen.append([flat(gradient), flat(agent.parameters())])

    def after(given, stats):
        seen[-1] += [flat(given["agent"].parameters()), float(stats["grad_norm"])]

    watch(ppo_atari, "update", before, after)
    flags = [*TWO, "--num-workers", "0", "--precision", "float32", "--max-grad-norm", str(limit)]
    flags += ["--total-timesteps", "128", "--update-epochs", "1", "--num-minibatches", "1"]
    trained(tmp_path / "run", monkeypatch, *flags)
    ((gradient, before, after, grad_norm),) = seen
    norm = gradient.square().sum().sqrt()
    assert norm > 0.02
    assert grad_norm == pytest.approx(norm.item(), rel=1e-4)
    gradient = gradient * min(1, limit / norm)
    # In Adam's first step, the bias-corrected moments are the gradient and its square (Kingma and
    # Ba, 2015).
    expected = -2.5e-4 * gradient / (gradient.abs() + 1e-5)
    torch.testing.assert_close(after - before, expected, rtol=1e-3, atol=3e-8)


MODES = []  # (in train mode, with gradients) of each call of a network with a Witness


class Witness(torch.nn.Module):
    def forward(self, x):
        MODES.append((self.training, torch.is_grad_enabled()))
        return x


@pytest.mark.parametrize(
    ("layer", "shared"),
    [(torch.nn.BatchNorm2d(8), True), (torch.nn.Dropout(0.5), False)],
    ids=["BatchNorm", "Dropout"],
)
def test_a_users_network_is_trained_resumed_and_evaluated(
    layer, shared, tmp_path, monkeypatch, watch
):
    """Put in by make_agent alone, another width included. Interrupted or not: the same. It learns
    in train mode and acts in eval mode."""

    def make_network():
        return torch.nn.Sequential(
            torch.nn.Conv2d(4, 8, 8, stride=4),
            torch.nn.ReLU(),
            Witness(),
            copy.deepcopy(layer),
            torch.nn.Flatten(),
            torch.nn.Linear(512, 256),
            torch.nn.ReLU(),
        )

    def make_agent(args, env):
        shape = env.observation_space.shape
        num_actions = int(env.action_space.n)
        return ppo_atari.Agent(
            shape, num_actions, make_network=make_network, shared_network=args.shared_network
        )

    MODES.clear()
    monkeypatch.setattr(ppo_atari, "make_agent", make_agent)
    flags = [*TWO, "--num-workers", "0", "--eval-episodes", "1"]
    flags.append("--shared-network" if shared else "--no-shared-network")
    whole = trained(tmp_path / "whole", monkeypatch, *flags)
    assert set(MODES) == {(True, True), (False, False)}
    assert MODES.count((True, True)) == 4 * 4 * (1 if shared else 2)
    assert weights(whole)["actor.weight"].shape == (4, 256)
    assert weights(whole).get("network.3.num_batches_tracked", 4 * 4) == 4 * 4
    assert_same_run(interrupted(tmp_path / "pieces", monkeypatch, watch, *flags), whole)
    scores = json.loads((whole / "eval.json").read_text())
    (whole / "eval.json").unlink()
    assert ppo_atari.main(["--evaluate", str(whole), "--eval-episodes", "1"]) == 0
    assert json.loads((whole / "eval.json").read_text())["scores"] == scores["scores"]


class Curious(gym.Wrapper):
    """A reward for what is new, with a memory and noise of its own: on top of the stack, the future
    depends on it."""

    def __init__(self, env):
        super().__init__(env)
        self.seen = {}
        self.noise = np.random.default_rng(7)

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        room = int(obs[-1].sum()) // 100
        self.seen[room] = self.seen.get(room, 0) + 1
        return obs, reward + 1 / self.seen[room] + 0.01 * self.noise.normal(), *rest


class Named(Curious):
    saved = ("seen", "noise")


@pytest.mark.parametrize(("workers", "wrapper"), [("0", Named), ("2", Curious)])
def test_a_users_wrapper_is_resumed_exactly(workers, wrapper, tmp_path, monkeypatch, watch):
    make_env = ppo_atari.make_env
    monkeypatch.setattr(
        ppo_atari, "make_env", lambda *args, **kwargs: wrapper(make_env(*args, **kwargs))
    )
    flags = [*TWO, "--num-workers", workers]
    whole = trained(tmp_path / "whole", monkeypatch, *flags)
    assert_same_run(interrupted(tmp_path / "pieces", monkeypatch, watch, *flags), whole)


def test_a_learner_that_draws_is_resumed_exactly(tmp_path, monkeypatch, watch):
    """As from a replay memory: NumPy's and Python's own generators are seeded, and go on where they
    were, also between the two normal numbers that NumPy makes at once: it has given one of them
    when the run is interrupted."""
    update = ppo_atari.update
    anneal = ppo_atari.anneal

    def drawing(agent, optimizer, args, schedule, **minibatch):
        rows = np.random.permutation(len(minibatch["action"]))[random.randrange(16) :]
        rows = torch.from_numpy(rows)
        minibatch = ppo_atari.take(minibatch, rows)
        return update(agent, optimizer, args, schedule, **minibatch)

    def annealing(schedule, args, iteration):
        anneal(schedule, args, iteration)
        if iteration > 1:
            schedule["ent_coef"].fill_(abs(np.random.normal()))

    monkeypatch.setattr(ppo_atari, "update", drawing)
    monkeypatch.setattr(ppo_atari, "anneal", annealing)
    flags = [*TWO, "--num-workers", "2"]
    whole = trained(tmp_path / "whole", monkeypatch, *flags)
    np.random.seed(0)
    random.seed(0)
    assert_same_run(interrupted(tmp_path / "pieces", monkeypatch, watch, *flags), whole)


class Counter:
    """Something of a user's own with a state."""

    def __init__(self):
        self.numbers = []

    def state_dict(self):
        return {"numbers": self.numbers}

    def load_state_dict(self, state):
        self.numbers = state["numbers"]


STATE = {
    '"recent_returns": deque(maxlen=100),': [
        '"tensor": torch.zeros(3),',
        '"deque": deque(maxlen=3),',
        '"table": {"all": []},',
        '"noise": np.random.default_rng(5),',
        '"counter": Counter(),',
        '"memory": torch.zeros(args.local_envs, 2),',
    ],
    "anneal(schedule, args, iteration)": ["change(state)"],
    'outputs = act(obs=rollout["obs"][t, group]': [
        'memory = torch.stack([outputs["value"], 1 + 0.99 * state["memory"][group, 1]], 1)',
        'state["memory"][group] = memory',
    ],
}


def change(state):
    """What each iteration does with a user's state."""
    number = float(state["noise"].normal())
    state["tensor"] += number
    state["deque"].append(number)
    state["table"]["all"].append(np.float64(number))
    state["counter"].numbers.append(number)
    state["schedule"]["temperature"].mul_(0.5)


def test_a_users_state_is_kept_and_resumed_exactly(tmp_path, monkeypatch, watch, changed):
    """Of every kind, changed between and during rollouts, beside a group of the optimizer with a
    rate of its own and a number more in the schedule."""
    module = changed(STATE)
    make_schedule = module.make_schedule
    states = []

    def with_temperature(*args, **kwargs):
        return make_schedule(*args, **kwargs) | {"temperature": torch.tensor(1.0)}

    monkeypatch.setattr(module, "Counter", Counter, raising=False)
    monkeypatch.setattr(module, "change", change, raising=False)
    monkeypatch.setattr(module, "make_schedule", with_temperature)
    monkeypatch.setattr(torch.optim, "Adam", Groups)
    watch(module, "save_checkpoint", before=lambda given: states.append(given["state"]))
    flags = [*TWO, "--num-workers", "2"]
    whole = trained(tmp_path / "whole", monkeypatch, *flags, module=module)
    pieces = interrupted(tmp_path / "pieces", monkeypatch, watch, *flags, module=module)
    assert_same_run(pieces, whole)
    rng = np.random.default_rng(5)
    numbers = [rng.normal() for _ in range(4)]
    for state in (states[0], states[-1]):
        expected = torch.zeros(3)
        for number in numbers:
            expected += number
        assert torch.equal(state["tensor"], expected)
        assert state["deque"] == deque(numbers[1:])
        assert state["deque"].maxlen == 3
        assert state["table"] == {"all": numbers}
        assert state["counter"].numbers == numbers
        assert float(state["schedule"]["temperature"]) == 0.5**4
        assert (state["memory"][:, 0] != 0).all()
        # Each of the 65 turns of each of four rollouts: 1 + 0.99 + 0.99 ** 2 + ...
        assert state["memory"][:, 1].tolist() == pytest.approx([100 * (1 - 0.99**260)] * 2)
        rates = [float(group["lr"]) for group in state["optimizer"].param_groups]
        assert rates == pytest.approx([2.5e-4 / 4, 2.5e-5 / 4])  # of the last of four iterations
    kept = checkpoint(pieces)
    assert {"tensor", "deque", "table", "noise", "counter", "memory"} <= kept.keys()


def test_a_checkpoint_survives_state_that_cannot_be_kept(tmp_path, monkeypatch, changed):
    """What enters the state after the start and no checkpoint can hold is an error when one is due;
    the last one stands, and so does its agent."""
    module = changed(
        {
            "anneal(schedule, args, iteration)": [
                "if iteration == 3:",
                '    state["late"] = object()',
            ]
        }
    )
    flags = [*TWO, "--num-workers", "2", "--checkpoint-interval", "1"]
    with pytest.raises(TypeError, match="cannot hold a object"):
        trained(tmp_path / "run", monkeypatch, *flags, module=module)
    assert not multiprocessing.active_children()
    run = run_directory(tmp_path / "run")
    for name in ("agent.pt", "checkpoint.pt"):
        assert torch.load(run / name, weights_only=True)["step"] == 256


def test_observations_that_are_not_bytes(tmp_path, monkeypatch, watch):
    """A wrapper that scales to [0, 1]: the network gets in training what the environment gives."""
    make_env = ppo_atari.make_env
    seen = []

    def scaled(*args, **kwargs):
        env = make_env(*args, **kwargs)
        space = gym.spaces.Box(0, 1, env.observation_space.shape, np.float32)
        return gym.wrappers.TransformObservation(
            env, lambda obs: (obs / 255).astype(np.float32), space
        )

    monkeypatch.setattr(ppo_atari, "make_env", scaled)
    watch(ppo_atari, "ppo_loss", before=lambda given: seen.append(given["old"]["obs"]))
    trained(tmp_path / "run", monkeypatch, *TWO, "--no-scale-obs", "--num-workers", "2")
    assert len(seen) == 4 * 4
    for obs in seen:
        assert obs.dtype == torch.float32
        assert 0.3 < obs.max() <= 1
    assert torch.equal(seen[0], (seen[0] * 255).round() / 255)
    assert len(seen[0].unique()) > 5


@pytest.mark.parametrize(
    "kind", ["uint8", "int8", "uint16", "int64", "float16", "float32", "float64"]
)
def test_picture_of_frames_of_any_type(kind, tmp_path):
    """The screen as it is, beside it the frame from its darkest, black, to its brightest, white."""
    images = []
    screen = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    obs = np.linspace(0, 255 if kind == "uint8" else 100, 64).astype(kind).reshape(1, 8, 8)
    with closing(ppo_atari.RunDirectory(tmp_path)) as run:
        run.writer.add_image = lambda tag, image, *rest, **how: images.append(image)
        run.add_picture("observation", obs, screen, 0)
    (image,) = images
    assert image.dtype == np.uint8
    assert np.array_equal(image[:, :8], screen)
    frame = image[:, 8:, 0].astype(int)
    assert frame.min() == 0
    assert frame.max() >= 254
    assert (np.diff(frame.flatten()) >= 0).all()
    assert np.abs(frame.flatten() - np.linspace(0, 255, 64)).max() < 4


# ------------------------------------------------------------------------ the games on their own

T = 64  # steps of a rollout
N = 8  # games
FIRST_ENV = 3  # as if another process had three games


def make_envs(env_id: str, workers: int, num_groups: int = 2, precision: str = "bfloat16"):
    flags = ["--env-id", env_id, "--num-envs", N, "--num-steps", T, "--frame-size", 36]
    flags += ["--num-workers", workers, "--num-groups", num_groups, "--precision", precision]
    args = ppo_atari.parse_args([str(flag) for flag in flags])
    args.first_env = FIRST_ENV
    space = gym.spaces.Box(0, 255, (4, 36, 36), np.uint8)
    return closing(ppo_atari.ParallelEnvs(args, space))


def random_actions(seed: int) -> torch.Tensor:
    return torch.randint(0, 4, (T, N), generator=torch.Generator().manual_seed(seed))


def play(envs, actions: torch.Tensor, tired=lambda: None):
    """A rollout with these actions [T, N]: what was shown, [T + 1, N, ...], the games that ended,
    and the turns (t, number of the group)."""
    shown = {
        "obs": torch.zeros(T + 1, N, 4, 36, 36, dtype=torch.uint8),
        "reward": torch.full((T + 1, N), torch.nan),
        "done": torch.full((T + 1, N), torch.nan),
        "truncated": torch.zeros(T + 1, N, dtype=torch.bool),
        "final_obs": torch.zeros(T + 1, N, 4, 36, 36, dtype=torch.uint8),
    }
    turns = []
    for t, group in envs.turns(T):
        tired()
        turns.append((t, envs.groups.index(group)))
        for name in ("obs", "reward", "done", "truncated"):
            shown[name][t, group] = getattr(envs, name)[group]
        for i in range(group.start, group.stop):
            if envs.truncated[i]:
                shown["final_obs"][t, i] = envs.final_obs[i]
        if t < T:
            envs.step(group, actions[t, group])
    return shown, envs.take_ended(), turns


def play_slowly(env_id: str, rollouts: list[torch.Tensor]):
    """The same by games that are played one after the other, without groups and workers."""
    flags = ["--env-id", env_id, "--frame-size", "36"]
    args = ppo_atari.parse_args(flags)
    results = []
    for _ in rollouts:
        shown = {
            "obs": torch.zeros(T + 1, N, 4, 36, 36, dtype=torch.uint8),
            "reward": torch.zeros(T + 1, N),
            "done": torch.ones(T + 1, N),
            "truncated": torch.zeros(T + 1, N, dtype=torch.bool),
            "final_obs": torch.zeros(T + 1, N, 4, 36, 36, dtype=torch.uint8),
        }
        results.append((shown, []))
    for i in range(N):
        seed = np.random.SeedSequence([args.seed, FIRST_ENV + i]).generate_state(1)[0] >> 1
        env = ppo_atari.make_env(args)
        obs, _ = env.reset(seed=int(seed))
        last = [0.0, 1.0, False]
        final_obs = None
        for (shown, ended), actions in zip(results, rollouts):
            ppo_atari.forget_last_action(env)
            for t in range(T + 1):
                shown["obs"][t, i] = torch.from_numpy(obs)
                for name, number in zip(("reward", "done", "truncated"), last):
                    shown[name][t, i] = number
                if last[2]:
                    shown["final_obs"][t, i] = torch.from_numpy(final_obs)
                if t == T:
                    break
                obs, reward, terminated, truncated, info = env.step(int(actions[t, i]))
                if terminated or truncated:
                    final_obs = obs
                    obs, reset_info = env.reset()
                    info = info | reset_info
                if "episode" in info:
                    ended.append((t, FIRST_ENV + i, info["episode"]["r"], info["episode"]["l"]))
                last = [reward, float(terminated or truncated), truncated and not terminated]
    return [(shown, sorted(ended)) for shown, ended in results]


def assert_shown(shown, expected):
    """Everything but the reward at t = 0, which belongs to the rollout before."""
    for name, tensor in expected.items():
        first = 1 if name == "reward" else 0
        assert torch.equal(shown[name][first:], tensor[first:]), name


@pytest.fixture(scope="module")
def slow_games():
    """slow_games(env_id): two rollouts with random actions, and what they show."""
    kept = {}

    def slow_games(env_id):
        if env_id not in kept:
            rollouts = [random_actions(seed) for seed in range(2)]
            kept[env_id] = (rollouts, play_slowly(env_id, rollouts))
        return kept[env_id]

    return slow_games


@pytest.mark.parametrize(
    ("env_id", "workers"),
    [("ALE/Breakout-v5", 0), ("ALE/Breakout-v5", 1), ("Test/Short-v0", 1), ("Test/Short-v0", 3)],
)
def test_games_side_by_side_show_what_they_show_one_by_one(
    env_id, workers, short_games, slow_games
):
    """With sticky actions, lost lives and games that are over; with games that are cut, and what
    they showed then. On a CPU the groups take turns in fixed order. Saved after a rollout and put
    back after another one, they play it again."""
    rollouts, expected = slow_games(env_id)
    with make_envs(env_id, workers) as envs:
        for k in (0, "save", 1, "restore", 1):
            if k == "save":
                saved = ppo_atari.pack(envs)
                continue
            if k == "restore":
                ppo_atari.unpack(saved, envs)
                continue
            shown, ended, turns = play(envs, rollouts[k])
            assert_shown(shown, expected[k][0])
            assert ended == expected[k][1]
            assert turns == [(t, g) for t in range(T + 1) for g in (0, 1)]
            assert envs.take_ended() == []
    assert not multiprocessing.active_children()
    shown, ended = expected[0]
    if env_id == "Test/Short-v0":
        assert shown["truncated"].sum() == len(ended) >= 2 * N
        assert all(shown["final_obs"][t + 1, i - FIRST_ENV].any() for t, i, _, _ in ended)
    else:
        assert shown["done"][1:].sum() > len(ended)  # lost lives


def test_groups_in_the_order_of_readiness(sleepy_games, short_games, slow_games):
    """Each gets its turns t = 0 ... T, once each and in this order, and shows the same."""
    rollouts, expected = slow_games(short_games)
    with make_envs(short_games, workers=3, num_groups=4) as envs:
        envs.fixed_order = False
        shown, ended, turns = play(envs, rollouts[0])
    assert_shown(shown, expected[0][0])
    assert ended == expected[0][1]
    for g in range(4):
        assert [t for t, group in turns if group == g] == list(range(T + 1))
    assert len(turns) == 4 * (T + 1)


@pytest.fixture
def toys(monkeypatch):
    """Games that are there at once."""
    monkeypatch.setattr(ppo_atari, "make_env", lambda *args: as_make_env_does(Block()))


@pytest.mark.parametrize(
    ("workers", "num_groups", "precision", "own"),
    [
        (0, 2, "bfloat16", range(8)),
        (0, 2, "float32", range(8)),
        (1, 1, "bfloat16", [0, 1]),
        (1, 2, "bfloat16", [0, 4]),
        (1, 2, "float32", [0]),
        (1, 3, "bfloat16", []),  # groups of 3, 3 and 2: none has a quarter
        (2, 2, "bfloat16", []),
        (8, 2, "float32", []),
    ],
)
def test_who_plays_which_games(workers, num_groups, precision, own, toys, watch):
    """Without a worker the learner plays all. Beside a single one it plays a quarter of each group,
    in float32 of the first group only, and beside more of them none. The workers share the others
    evenly."""
    stepped = []
    watch(ppo_atari.Games, "step", before=lambda given: stepped.extend(given["indices"]))
    with make_envs("ALE/Breakout-v5", workers, num_groups, precision) as envs:
        assert len(envs.workers) == workers
        shares = [worker.games for worker in envs.workers]
        for t, group in envs.turns(2):
            if t < 2:
                envs.step(group, torch.zeros(group.stop - group.start, dtype=torch.int64))
    assert sorted(stepped) == sorted([*own] * 2)
    assert sorted(sum(shares, [*own])) == list(range(N))
    if workers > 0:
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_a_worker_that_dies_while_nothing_is_asked_of_it(toys):
    """It is named as well, not only while the learner waits for its answer."""
    with make_envs("ALE/Breakout-v5", workers=8, num_groups=8) as envs:
        turns = envs.turns(T)
        _, group = next(turns)
        os.kill(envs.workers[0].process.pid, signal.SIGSTOP)  # it will not answer
        envs.step(group, torch.zeros(1, dtype=torch.int64))
        os.kill(envs.workers[5].process.pid, signal.SIGKILL)
        envs.workers[5].process.join()
        with pytest.raises(ppo_atari.WorkerError, match="worker 5 ended with exit code -9"):
            envs.wait_for_one([0])
    assert not multiprocessing.active_children()


# ---------------------------------------------------------------------- a hundred command lines

GOOD = {
    "env-id": ["ALE/Breakout-v5", "BreakoutNoFrameskip-v4", "ALE/MsPacman-v5",
               "PongNoFrameskip-v4"],
    "seed": [0, 7, 2**31 - 1], "learning-rate": ["1e-37", "2.5e-4", 0.01], "gamma": [0, 0.5, 1],
    "gae-lambda": [0, 0.95, 1], "clip-coef": ["1e-37", 0.2, "1e37"], "ent-coef": [0, 0.01, 2],
    "ent-coef-final": [0, 0.5], "vf-coef": [0, 0.5, 3], "max-grad-norm": ["1e-30", 0.5, "1e37"],
    "target-kl": ["1e-12", 0.03, "1e37"], "noop-max": [0, 1, 30], "frame-skip": [1, 2, 4, 9],
    "repeat-action-probability": [0, 0.25, 1], "frame-stack": [1, 2, 4, 9],
    "precision": ["auto", "float32"], "checkpoint-interval": [0, 1, 2],
    "exp-name": ["a b", "x" * 100, "ü"], "num-groups": [1, 2, 3, 4],
}  # fmt: skip
WRONG = {
    "env-id": ["Breakout", "CartPole-v1", ""], "seed": [-1, 2**31, 1.5],
    "learning-rate": [0, -1, "nan", "1e38", ""], "gamma": [1.01, -0.1], "gae-lambda": ["inf"],
    "clip-coef": [0, "1e39"], "ent-coef": [-1, "nan"], "noop-max": [-1, 10**15],
    "frame-skip": [0, 121], "repeat-action-probability": [2], "frame-stack": [0, 65],
    "frame-size": [28, 35, 0], "precision": ["float8"], "num-groups": [0, 5, "two"],
    "exp-name": ["a/b", "", "x" * 101], "num-envs": [0, "two"], "num-steps": [-1, 2.5],
    "total-timesteps": [0, 10**17], "resume": ["", "nowhere"], "evaluate": ["", "nowhere"],
    "no-such-flag": [1], "learning-rat": [1], "inference-batch": [4], "start-method": ["fork"],
    "num-workers": [-1], "update-epochs": [0],
}  # fmt: skip
SWITCHES = ["anneal-lr", "norm-adv", "clip-vloss", "episodic-life", "fire-reset", "clip-reward",
            "shared-network", "scale-obs", "full-action-space", "torch-deterministic",
            "cuda-graph"]  # fmt: skip


def random_line(rng: random.Random) -> tuple[list[str], bool]:
    """A command line of a tiny run, and whether it is one that must be accepted."""
    num_envs = rng.choice([1, 1, 2, 2, 3, 4])
    num_steps = rng.randint(1, 8)
    minibatches = rng.choice([1, 1, 2, 2, 4])
    batch = num_envs * num_steps
    sizes = {
        "num-envs": num_envs,
        "num-steps": num_steps,
        "num-minibatches": minibatches,
        "eval-episodes": 0,
        "update-epochs": rng.randint(1, 2),
        "frame-size": rng.choice([36, 36, 44]),
        "total-timesteps": batch * rng.randint(1, 2) + rng.choice([0, 0, 0, 1, -1]),
        "num-workers": rng.choice([0] * 15 + [1, 2]),
    }
    chosen = {name: rng.choice(GOOD[name]) for name in rng.sample(sorted(GOOD), rng.randint(0, 6))}
    switches = {name: rng.random() < 0.5 for name in rng.sample(SWITCHES, rng.randint(0, 3))}
    good = sizes["total-timesteps"] >= batch and batch % minibatches == 0
    good = good and (batch >= 2 * minibatches or not switches.get("norm-adv", True))
    good = good and chosen.get("num-groups", 1) <= num_envs
    if rng.random() < 0.25:
        name = rng.choice(sorted(WRONG))
        chosen[name] = rng.choice(WRONG[name])
        good = False
    line = [f"--{name}={value}" for name, value in (sizes | chosen).items()]
    line += [f"--{'' if value else 'no-'}{name}" for name, value in switches.items()]
    rng.shuffle(line)
    return line, good


@pytest.fixture
def quick_emulators(monkeypatch):
    """To load a game takes a tenth of a second: each one that was loaded is used again by the next
    command line."""
    make = gym.make
    pool = {}
    used = {}

    def make_again(env_id, **kwargs):
        key = (env_id, *kwargs.items())
        used[key] = used.get(key, 0) + 1
        if used[key] > len(pool.setdefault(key, [])):
            pool[key].append(make(env_id, **kwargs))
            pool[key][-1].unwrapped.load_game = lambda: None
        return pool[key][used[key] - 1]

    monkeypatch.setattr(gym, "make", make_again)
    return used


def test_a_hundred_random_command_lines(quick_emulators, tmp_path, monkeypatch, capfd):
    """Each trains, with finite curves and nothing to complain of, or is refused in one line and
    leaves nothing."""
    codes = []
    for seed in range(100):
        line, good = random_line(random.Random(seed))
        (tmp_path / str(seed)).mkdir()
        monkeypatch.chdir(tmp_path / str(seed))
        quick_emulators.clear()
        code, _, error = here(capfd, *line)
        assert code == (0 if good else 2), (line, error)
        codes.append(code)
        if code:
            assert error.count("\n") == 1, (line, error)
            assert "Traceback" not in error, (line, error)
            assert len(error) < 400, (line, error)
            assert not os.listdir(), line
            continue
        assert error == "", (line, error)
        run = run_directory(Path.cwd())
        flags = json.loads((run / "args.json").read_text())["flags"]
        batch = flags["num_envs"] * flags["num_steps"]
        found = curves(run)
        steps = [step for step, _ in found["losses/policy_loss"]]
        assert steps == list(range(batch, flags["total_timesteps"] + 1, batch))
        assert all(math.isfinite(value) for curve in found.values() for _, value in curve), line
        assert all(tensor.isfinite().all() for tensor in weights(run).values()), line
    assert codes.count(0) >= 40
    assert codes.count(2) >= 30
    assert not multiprocessing.active_children()


# ----------------------------------------------------------------------------- processes that end


def error_lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("ppo_atari.py: error: ")]


def test_a_worker_that_dies_ends_the_run(tmp_path):
    """kill -9 of a worker: exit code 1, one line that names it, no process left."""
    process = fork(*FLAGS, "--num-workers", 2, cwd=tmp_path)
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and "run directory" in log.read_text())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    assert finish(process, 60) == 1, log.read_text()
    expected = ["ppo_atari.py: error: worker 1 ended with exit code -9"]
    assert error_lines(log.read_text()) == expected
    assert "Traceback" not in log.read_text()
    assert not living(process.pid)


@pytest.mark.parametrize("method", ["__init__", "begin_rollout", "step", "get_state"])
def test_a_worker_that_raises_ends_the_run_with_its_message(method, tmp_path, monkeypatch, capfd):
    """Its own traceback, whatever it was doing, and then one line."""
    monkeypatch.chdir(tmp_path)
    learner = os.getpid()
    original = getattr(ppo_atari.Games, method)

    def failing(games, *args):
        if os.getpid() != learner:
            raise ValueError("the joystick is broken")
        return original(games, *args)

    monkeypatch.setattr(ppo_atari.Games, method, failing)
    assert ppo_atari.main([*SHORT, *TWO, "--num-workers", "1"]) == 1
    error = capfd.readouterr().err
    assert "Traceback" in error
    assert "ValueError: the joystick is broken\n" in error
    lines = error_lines(error)
    assert lines == ["ppo_atari.py: error: worker 0 ended with exit code 1"]
    assert error.endswith(lines[0] + "\n")
    assert not multiprocessing.active_children()


def test_a_learner_that_raises_ends_its_workers(tmp_path, monkeypatch):
    """An error of the user's own is a traceback, as it is."""
    monkeypatch.chdir(tmp_path)

    def failing(*args):
        raise ValueError("cannot return without a mask")

    monkeypatch.setattr(ppo_atari, "ppo_loss", failing)
    with pytest.raises(ValueError, match="cannot return without a mask"):
        ppo_atari.main([*SHORT, *TWO, "--num-workers", "2"])
    assert not multiprocessing.active_children()


def test_workers_follow_a_killed_learner(tmp_path):
    process = fork(*FLAGS, "--num-workers", 2, cwd=tmp_path)
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and "run directory" in log.read_text())
    assert len(living(process.pid)) == 3
    process.kill()
    assert finish(process) == -signal.SIGKILL
    wait_for(lambda: not living(process.pid))
