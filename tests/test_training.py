"""Sections 4 and 8: same seed, same weights, however the work is shared out; nobody is left behind when one dies."""

import inspect
import json
import math
import multiprocessing
import os
import random
import signal
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from launch import curves, finish, here, living, run_directory, same_weights, start, wait_for, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_atari

FLAGS = ["--env-id", "ALE/Breakout-v5", "--num-steps", "16", "--frame-size", "44", "--eval-episodes", "0",
         "--update-epochs", "2"]  # fmt: skip
SHORT = [*FLAGS, "--total-timesteps", "512", "--inference-batch", "2"]  # not this machine's, by its cores
TWO = ["--num-envs", "2", "--num-steps", "64"]  # as many iterations; to load a game takes long


def trained(folder: Path, monkeypatch, *flags: str) -> Path:
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert ppo_atari.main([*SHORT, *flags]) == 0
    return run_directory(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield trained(tmp_path_factory.mktemp("reference") / "run", monkeypatch, "--num-workers", "0")


@pytest.mark.parametrize(
    "flags",
    [
        ["--num-workers", "0"],
        ["--num-workers", "1"],
        ["--num-workers", "2"],
        ["--num-workers", "3"],
        ["--num-workers", "8"],
        ["--num-workers", "3", "--inference-batch", "3"],
        ["--num-workers", "2", "--start-method", "spawn"],
        ["--eval-interval", "256", "--eval-episodes", "1", "--capture-video", "--checkpoint-interval", "1"],
    ],
    ids=" ".join,
)
def test_same_seed_same_weights(flags, reference, tmp_path, monkeypatch):
    """Any number of workers, started either way, evaluating and filming or not: equal bit for bit."""
    assert same_weights(weights(trained(tmp_path / "run", monkeypatch, *flags)), weights(reference))


def test_same_seed_same_weights_one_game_per_call(tmp_path, monkeypatch):
    """As by default on as many cores as games: a kernel of its own, never rounded up to batches of four."""
    alone, workers = (
        trained(tmp_path / n, monkeypatch, "--inference-batch", "1", "--num-workers", n) for n in ("0", "3")
    )
    assert same_weights(weights(alone), weights(workers))


def test_no_git(reference, tmp_path, monkeypatch):
    """Training needs no git: slim container images have none."""
    monkeypatch.setenv("PATH", "")
    run = trained(tmp_path / "run", monkeypatch, "--num-workers", "0")
    assert same_weights(weights(run), weights(reference))
    about, without = (json.loads((path / "args.json").read_text()) for path in (reference, run))
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
def test_precision_and_where_it_is_written(precision, capabilities, computes, tmp_path, monkeypatch, watch):
    """auto is bfloat16 where the processor multiplies it. args.json has what it came to: elsewhere it may differ."""
    learners, actors = [], []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    watch(ppo_atari.Learner, "__init__", after=lambda call, _: learners.append(call["agent"].dtype))
    watch(ppo_atari, "inference_copy", after=lambda call, actor: actors.append(actor.dtype))
    flags = [*TWO, "--num-workers", "0", "--precision", precision, "--total-timesteps", "128"]
    about = json.loads((trained(tmp_path / "run", monkeypatch, *flags) / "args.json").read_text())
    assert {*learners, *actors} == {computes} and learners and actors
    expected = {"device": "cpu", "precision": str(computes)[6:], "threads": 1}
    assert about["hardware"] == expected and about["flags"]["precision"] == precision


def test_another_seed_gives_other_weights(reference, tmp_path, monkeypatch):
    other = weights(trained(tmp_path / "run", monkeypatch, "--num-workers", "0", "--seed", "2"))
    assert not any(torch.equal(other[name], tensor) for name, tensor in weights(reference).items() if tensor.dim() > 1)


def test_what_a_run_writes(reference):
    """CleanRL's tags; hyperparameters as text and in the HParams tab, without a sub-run; what the agent sees."""
    tags = {"charts/learning_rate", "charts/SPS"}
    tags |= {f"losses/{name}" for name in ("value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl")}
    tags |= {"losses/clipfrac", "losses/explained_variance", "losses/grad_norm"}
    events = EventAccumulator(str(reference), size_guidance={"scalars": 0, "images": 0}).Reload()
    found = events.Tags()
    assert tags | {"time/environment", "time/inference", "time/update"} <= set(found["scalars"])
    assert [event.step for event in events.Scalars("losses/entropy")] == [128, 256, 384, 512]
    assert "hyperparameters/text_summary" in found["tensors"] and found["images"] == ["observation"]
    assert "_hparams_/experiment" in events.summary_metadata and "custom_scalars__config__" in found["tensors"]
    image = events.Images("observation")[0]
    assert (image.height, image.width) == (210, 160 + 4 * 210)
    names = {path.name.split(".")[0] for path in reference.iterdir()}
    assert names == {"agent", "args", "checkpoint", "events"} and not [p for p in reference.iterdir() if p.is_dir()]
    about = json.loads((reference / "args.json").read_text())
    assert about["flags"]["gamma"] == 0.99 and about["versions"]["torch"]
    assert about["hardware"].keys() == {"device", "precision", "threads"}
    assert reference.name.startswith("ALE-Breakout-v5__ppo_atari__1__")


def test_returns_in_tensorboard_are_full_games(tmp_path, monkeypatch):
    """Each is the score that the emulator itself counted in one game, over all its lives, at the step of its end."""
    running, order, scores = {}, [], {}

    class CountingSkip(ppo_atari.MaxAndSkipEnv):
        def step(self, action):
            result = super().step(action)
            running[self.unwrapped] = running.get(self.unwrapped, 0) + result[1]
            return result

    class CountingStack(ppo_atari.FrameStack):
        steps = 0

        def step(self, action):
            if self not in order:  # environments take their first step in the order of their numbers
                order.append(self)
            result, at = super().step(action), 8 * self.steps + order.index(self) + 1
            self.steps += 1
            if self.unwrapped.ale.game_over():
                scores[at] = running.pop(self.unwrapped)
            return result

    monkeypatch.setattr(ppo_atari, "MaxAndSkipEnv", CountingSkip)
    monkeypatch.setattr(ppo_atari, "FrameStack", CountingStack)
    flags = ["--num-workers", "0", "--num-steps", "64", "--total-timesteps", "4096", "--update-epochs", "1"]
    found = curves(trained(tmp_path / "run", monkeypatch, *flags))
    assert found["charts/episodic_return"] == sorted(scores.items())
    assert [step for step, _ in found["charts/episodic_length"]] == sorted(scores)
    assert len(order) == 8 and len(scores) > 5 and max(scores.values()) > 1


@pytest.mark.parametrize("workers", ["0", "2"])
def test_every_game_has_a_step_of_its_own(workers, tmp_path, monkeypatch):
    """Games that end at the same moment keep their scores apart, in trackers that hold one value per step."""
    limit = {"game": "pong", "repeat_action_probability": 0.0, "max_num_frames_per_episode": 96}
    gym.register("Test/Short-v0", "ale_py.env:AtariEnv", kwargs=limit)
    try:
        flags = ["--env-id", "Test/Short-v0", "--noop-max", "0", "--no-fire-reset", "--num-envs", "3"]
        run = trained(tmp_path / "run", monkeypatch, *flags, "--num-workers", workers, "--total-timesteps", "480")
    finally:
        del gym.registry["Test/Short-v0"]
    lengths = curves(run)["charts/episodic_length"]
    assert set(length for _, length in lengths) == {24}  # 96 frames, four to a step
    assert [step for step, _ in lengths] == [3 * (24 * game - 1) + i + 1 for game in range(1, 7) for i in range(3)]


@pytest.mark.parametrize("limit", [0.01, 1e9])
def test_first_step_is_adam_on_the_clipped_gradient(limit, tmp_path, monkeypatch, watch):
    """[core 11] The gradient of all parameters together gets at most this norm; [core 3] Adam's epsilon is 1e-5."""
    seen = []

    def flat(tensors):
        return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()

    def before(given):
        agent, old, drawn = given["agent"], ppo_atari.take(given["batch"], given["rows"]), torch.get_rng_state()
        new = agent.get_action_and_value(old["obs"], old["action"])
        loss, _ = ppo_atari.ppo_loss(new, old, args=given["args"], knobs=given["knobs"])
        seen.append([flat(torch.autograd.grad(loss, list(agent.parameters()))), flat(agent.parameters())])
        torch.set_rng_state(drawn)  # for a network with Dropout

    def after(given, stats):
        seen[-1] += [flat(given["agent"].parameters()), float(stats["grad_norm"])]

    watch(ppo_atari, "update", before, after)
    flags = [*TWO, "--num-workers", "0", "--precision", "float32", "--max-grad-norm", str(limit)]
    flags += ["--total-timesteps", "128", "--update-epochs", "1", "--num-minibatches", "1"]
    trained(tmp_path / "run", monkeypatch, *flags)
    ((gradient, before, after, grad_norm),) = seen
    norm = gradient.square().sum().sqrt()
    assert norm > 0.02 and grad_norm == pytest.approx(norm.item(), rel=1e-4)
    gradient = gradient * min(1, limit / norm)
    # In Adam's first step, the bias-corrected moments are the gradient and its square (Kingma and Ba, 2015).
    torch.testing.assert_close(after - before, -2.5e-4 * gradient / (gradient.abs() + 1e-5), rtol=1e-3, atol=3e-8)


def interrupted(folder: Path, monkeypatch, watch, *flags: str) -> Path:
    """The same as trained(), in two pieces: stopped at once in its third iteration, then resumed."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    reached = []

    def stop(given):
        reached.append(given["iteration"])
        if reached == [1, 2, 3]:
            raise KeyboardInterrupt

    watch(ppo_atari, "anneal", before=stop)
    assert ppo_atari.main([*SHORT, *flags, "--checkpoint-interval", "1"]) == 130
    assert ppo_atari.main([*SHORT, *flags, "--resume", str(run_directory(folder))]) == 0
    assert reached == [1, 2, 3, 3, 4]
    return run_directory(folder)


def assert_same_run(run: Path, other: Path) -> None:
    """Weights equal bit for bit, and each loss and game once in the curves, where the other run has it."""
    assert same_weights(weights(run), weights(other))
    assert curves(run) == curves(other)


MODES = []  # (in train mode, with gradients) of each call of a network with a Witness


class Witness(torch.nn.Module):
    def forward(self, x):
        MODES.append((self.training, torch.is_grad_enabled()))
        return x


@pytest.mark.parametrize(
    ("layers", "shared"),
    [(list, False), (lambda: [torch.nn.BatchNorm2d(8)], True), (lambda: [torch.nn.Dropout(0.5)], False)],
    ids=["width 256", "BatchNorm", "Dropout"],
)
def test_a_users_network_is_trained_resumed_and_evaluated(layers, shared, tmp_path, monkeypatch, watch):
    """Put in by make_agent alone. Interrupted or not: the same. It learns in train mode and acts in eval mode."""

    def make_network():
        first = torch.nn.Conv2d(4, 8, 8, stride=4)
        rest = (torch.nn.ReLU(), Witness(), *layers(), torch.nn.Flatten(), torch.nn.Linear(800, 256), torch.nn.ReLU())
        return torch.nn.Sequential(first, *rest)

    def make_agent(args, env):
        shape, num_actions = env.observation_space.shape, int(env.action_space.n)
        return ppo_atari.Agent(shape, num_actions, make_network=make_network, shared_network=args.shared_network)

    MODES.clear()
    monkeypatch.setattr(ppo_atari, "make_agent", make_agent)
    flags = [
        *TWO,
        "--num-workers",
        "0",
        "--eval-episodes",
        "1",
        "--shared-network" if shared else "--no-shared-network",
    ]
    whole = trained(tmp_path / "whole", monkeypatch, *flags)
    assert set(MODES) == {(True, True), (False, False)}
    assert MODES.count((True, True)) == 4 * 8 * (1 if shared else 2)
    assert weights(whole)["actor.weight"].shape == (4, 256)
    assert weights(whole).get("network.3.num_batches_tracked", 4 * 8) == 4 * 8
    assert_same_run(interrupted(tmp_path / "pieces", monkeypatch, watch, *flags), whole)
    scores = json.loads((whole / "eval.json").read_text())
    (whole / "eval.json").unlink()
    assert ppo_atari.main(["--evaluate", str(whole), "--eval-episodes", "1"]) == 0
    assert json.loads((whole / "eval.json").read_text())["scores"] == scores["scores"]


class Curious(gym.Wrapper):
    """A reward for what is new, with a memory and noise of its own: on top of the stack, the future depends on it."""

    saved = ("seen", "noise")

    def __init__(self, env):
        super().__init__(env)
        self.seen, self.noise = {}, np.random.default_rng(7)

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        room = int(obs[-1].sum()) // 100
        self.seen[room] = self.seen.get(room, 0) + 1
        return obs, reward + 1 / self.seen[room] + 0.01 * self.noise.normal(), *rest


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_users_wrapper_is_resumed_exactly(workers, tmp_path, monkeypatch, watch):
    make_env = ppo_atari.make_env
    monkeypatch.setattr(ppo_atari, "make_env", lambda *args, **kwargs: Curious(make_env(*args, **kwargs)))
    whole = trained(tmp_path / "whole", monkeypatch, *TWO, "--num-workers", workers)
    assert_same_run(interrupted(tmp_path / "pieces", monkeypatch, watch, *TWO, "--num-workers", workers), whole)


@pytest.mark.parametrize(
    ("draw", "workers"),
    [(lambda: torch.randint(2, ()), 0), (lambda: torch.randint(2, ()), 2), (lambda: np.random.randint(2), 2),
     (lambda: random.randrange(2), 0)],
    ids=["torch", "torch in a worker", "NumPy in a worker", "Python"],
)  # fmt: skip
def test_an_agent_that_draws_while_acting_is_refused(draw, workers, tmp_path, monkeypatch, capfd):
    """Workers have generators of their own, which no checkpoint holds: such a run could not be resumed exactly."""
    monkeypatch.chdir(tmp_path)
    evaluate = ppo_atari.Agent.get_action_and_value

    def noisy(self, obs, *args, **kwargs):
        return evaluate(self, obs + int(draw()), *args, **kwargs)

    monkeypatch.setattr(ppo_atari.Agent, "get_action_and_value", noisy)
    code, _, error = here(capfd, *SHORT, *TWO, "--num-workers", workers)
    assert code == 1 and error.count("\n") == 1 and "`uniform`" in error
    assert not multiprocessing.active_children()


def test_a_learner_that_draws_is_resumed_exactly(tmp_path, monkeypatch, watch):
    """As from a replay memory: NumPy's and Python's own generators are seeded, and go on where they were, also between
    the two normal numbers that NumPy makes at once: it has given one of them when the run is interrupted."""
    update, anneal = ppo_atari.update, ppo_atari.anneal

    def drawing(agent, optimizer, batch, args, knobs, rows):
        rows = rows[torch.from_numpy(np.random.permutation(len(rows)))][random.randrange(len(rows) // 2) :]
        return update(agent, optimizer, batch, args, knobs, rows)

    def annealing(knobs, args, iteration):
        anneal(knobs, args, iteration)
        if iteration > 1:
            knobs["ent_coef"].fill_(abs(np.random.normal()))

    monkeypatch.setattr(ppo_atari, "update", drawing)
    monkeypatch.setattr(ppo_atari, "anneal", annealing)
    whole = trained(tmp_path / "whole", monkeypatch, *TWO, "--num-workers", "2")
    np.random.seed(0)
    random.seed(0)
    assert_same_run(interrupted(tmp_path / "pieces", monkeypatch, watch, *TWO, "--num-workers", "2"), whole)


def test_observations_that_are_not_bytes(tmp_path, monkeypatch, watch):
    """A wrapper that scales to [0, 1]: the network gets in training what the environment gives."""
    make_env, seen = ppo_atari.make_env, []

    def scaled(*args, **kwargs):
        env = make_env(*args, **kwargs)
        space = gym.spaces.Box(0, 1, env.observation_space.shape, np.float32)
        env = gym.wrappers.TransformObservation(env, lambda obs: (obs / 255).astype(np.float32), space)
        env.saved = ()
        return env

    monkeypatch.setattr(ppo_atari, "make_env", scaled)
    watch(ppo_atari, "ppo_loss", before=lambda given: seen.append(given["old"]["obs"]))
    trained(tmp_path / "run", monkeypatch, *TWO, "--no-scale-obs", "--num-workers", "2")
    assert all(obs.dtype == torch.float32 and 0.3 < obs.max() <= 1 for obs in seen) and len(seen) == 4 * 8
    assert torch.equal(seen[0], (seen[0] * 255).round() / 255) and len(seen[0].unique()) > 5


@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16", "int64", "float16", "float32", "float64"])
def test_picture_of_frames_of_any_type(kind, tmp_path):
    """The screen as it is, beside it the frame from its darkest, black, to its brightest, white."""
    images, screen = [], np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    obs = np.linspace(0, 255 if kind == "uint8" else 100, 64).astype(kind).reshape(1, 8, 8)
    with closing(ppo_atari.RunDirectory(tmp_path)) as run:
        run.events = lambda add: add(SimpleNamespace(add_image=lambda tag, image, *rest, **how: images.append(image)))
        run.picture("observation", obs, screen, 0)
    (image,) = images
    assert image.dtype == np.uint8 and np.array_equal(image[:, :8], screen)
    frame = image[:, 8:, 0].astype(int)
    assert frame.min() == 0 and frame.max() >= 254 and (np.diff(frame.flatten()) >= 0).all()
    assert np.abs(frame.flatten() - np.linspace(0, 255, 64)).max() < 4


def test_what_the_last_step_left_is_there_at_the_first(tmp_path, monkeypatch, watch):
    """Row T of every field is the next rollout's row 0, after a resume too: as a recurrent policy needs it."""
    fields, act, seen = ppo_atari.rollout_fields, ppo_atari.act, []

    def with_memory(*args):
        return fields(*args) | {"memory": (torch.float32, (2,))}

    def remembering(agent, obs, uniform, batch):
        outputs = act(agent, obs, uniform, batch)
        return outputs | {"memory": torch.stack([outputs["value"], uniform], 1)}

    monkeypatch.setattr(ppo_atari, "rollout_fields", with_memory)
    monkeypatch.setattr(ppo_atari, "act", remembering)

    def before(given):
        seen.append(given["storage"]["memory"][-1].clone())
        watched = given["agent"].get_action_and_value

        def first(*args, **kwargs):
            seen.append(given["storage"]["memory"][0].clone())
            given["agent"].get_action_and_value = watched
            return watched(*args, **kwargs)

        given["agent"].get_action_and_value = first

    watch(ppo_atari, "rollout", before=before)
    whole = trained(tmp_path / "whole", monkeypatch, *TWO, "--num-workers", "0")
    assert all(torch.equal(last, first) for last, first in zip(seen[::2], seen[1::2], strict=True))
    assert not seen[0].any() and len(seen) == 8 and all(row.all() for row in seen[2:])
    pieces, seen[:] = seen[:], []
    assert_same_run(interrupted(tmp_path / "pieces", monkeypatch, watch, *TWO, "--num-workers", "0"), whole)
    assert len(seen) == 8 and all(map(torch.equal, seen, pieces))


def test_an_agent_that_acts_otherwise_than_it_learns(tmp_path, monkeypatch, capfd):
    """The ratio of the first minibatch is 1 where the actors have the learner's policy: one line if it is not."""
    trained(tmp_path / "good", monkeypatch, *TWO, "--num-workers", "2")
    assert "acts otherwise" not in capfd.readouterr().err
    features = ppo_atari.Agent.features
    monkeypatch.setattr(
        ppo_atari.Agent, "features", lambda self, *args: features(self, *args) * (1 + 99 * self.training)
    )
    trained(tmp_path / "bad", monkeypatch, *TWO, "--num-workers", "2")
    assert capfd.readouterr().err.count("the agent acts otherwise than it learns") == 1


def test_an_agent_survives_state_that_cannot_be_kept(tmp_path, monkeypatch, capfd):
    """What enters the state after the start and no checkpoint can hold: it is told, and the weights are there."""
    monkeypatch.chdir(tmp_path)
    gather = ppo_atari.gather

    def late(games):
        state = inspect.currentframe().f_back.f_locals.get("state")
        if state and state["iteration"] == 3:
            state["late"] = {1}
        return gather(games)

    monkeypatch.setattr(ppo_atari, "gather", late)
    code, _, error = here(capfd, *SHORT, *TWO, "--num-workers", 0)
    assert code in (1, 2) and "cannot hold a set" in error, error
    assert torch.load(run_directory(tmp_path) / "agent.pt", weights_only=True)["step"] == 512


GOOD = {
    "env-id": ["ALE/Breakout-v5", "BreakoutNoFrameskip-v4", "ALE/MsPacman-v5", "PongNoFrameskip-v4"],
    "seed": [0, 7, 2**31 - 1], "learning-rate": ["1e-37", "2.5e-4", 0.01], "gamma": [0, 0.5, 1],
    "gae-lambda": [0, 0.95, 1], "clip-coef": ["1e-37", 0.2, "1e37"], "ent-coef": [0, 0.01, 2],
    "ent-coef-final": [0, 0.5], "vf-coef": [0, 0.5, 3], "max-grad-norm": ["1e-30", 0.5, "1e37"],
    "target-kl": ["1e-12", 0.03, "1e37"], "noop-max": [0, 1, 30], "frame-skip": [1, 2, 4, 9],
    "repeat-action-probability": [0, 0.25, 1], "frame-stack": [1, 2, 4, 9], "precision": ["auto", "float32"],
    "inference-batch": [1, 2, 3, 9], "checkpoint-interval": [0, 1, 2], "exp-name": ["a b", "x" * 100, "ü"],
}  # fmt: skip
WRONG = {
    "env-id": ["Breakout", "CartPole-v1", ""], "seed": [-1, 2**31, 1.5], "learning-rate": [0, -1, "nan", "1e38", ""],
    "gamma": [1.01, -0.1], "gae-lambda": ["inf"], "clip-coef": [0, "1e39"], "ent-coef": [-1, "nan"],
    "noop-max": [-1, 10**15], "frame-skip": [0, 121], "repeat-action-probability": [2], "frame-stack": [0, 65],
    "frame-size": [28, 35, 0], "precision": ["float8"], "inference-batch": [0], "exp-name": ["a/b", "", "x" * 101],
    "num-envs": [0, "two"], "num-steps": [-1, 2.5], "total-timesteps": [0, 10**17], "resume": ["", "nowhere"],
    "evaluate": ["", "nowhere"], "no-such-flag": [1], "learning-rat": [1], "num-workers": [-1], "update-epochs": [0],
}  # fmt: skip
SWITCHES = ["anneal-lr", "norm-adv", "clip-vloss", "episodic-life", "fire-reset", "clip-reward", "shared-network"]
SWITCHES += ["scale-obs", "full-action-space", "torch-deterministic", "cuda-graph"]


def random_line(rng: random.Random) -> tuple[list[str], bool]:
    """A command line of a tiny run, and whether it is one that must be accepted."""
    num_envs, num_steps, minibatches = rng.choice([1, 1, 2, 2, 3, 4]), rng.randint(1, 8), rng.choice([1, 1, 2, 2, 4])
    batch = num_envs * num_steps
    sizes = {"num-envs": num_envs, "num-steps": num_steps, "num-minibatches": minibatches, "eval-episodes": 0}
    sizes |= {"update-epochs": rng.randint(1, 2), "frame-size": rng.choice([36, 36, 44])}
    sizes |= {"total-timesteps": batch * rng.randint(1, 2) + rng.choice([0, 0, 0, 1, -1])}
    sizes |= {"num-workers": rng.choice([0] * 15 + [1, 2])}
    chosen = {name: rng.choice(GOOD[name]) for name in rng.sample(sorted(GOOD), rng.randint(0, 6))}
    switches = {name: rng.random() < 0.5 for name in rng.sample(SWITCHES, rng.randint(0, 3))}
    good = sizes["total-timesteps"] >= batch and batch % minibatches == 0
    good = good and (batch >= 2 * minibatches or not switches.get("norm-adv", True))
    if rng.random() < 0.25:
        name = rng.choice(sorted(WRONG))
        chosen[name], good = rng.choice(WRONG[name]), False
    line = [f"--{name}={value}" for name, value in (sizes | chosen).items()]
    line += [f"--{'' if value else 'no-'}{name}" for name, value in switches.items()]
    rng.shuffle(line)
    return line, good


@pytest.fixture
def quick_emulators(monkeypatch):
    """To load a game takes a tenth of a second: each one that was loaded is used again by the next command line."""
    make, pool, used = gym.make, {}, {}

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
    """Each trains, with finite curves and nothing to complain of, or is refused in one line and leaves nothing."""
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
            assert error.count("\n") == 1 and "Traceback" not in error and len(error) < 400, (line, error)
            assert not os.listdir(), line
            continue
        assert error == "", (line, error)
        run = run_directory(Path.cwd())
        flags = json.loads((run / "args.json").read_text())["flags"]
        batch = flags["num_envs"] * flags["num_steps"]
        found = curves(run)
        assert [step for step, _ in found["losses/policy_loss"]] == list(
            range(batch, flags["total_timesteps"] + 1, batch)
        )
        assert all(math.isfinite(value) for curve in found.values() for _, value in curve), line
        assert all(tensor.isfinite().all() for tensor in weights(run).values()), line
    assert codes.count(0) >= 40 and codes.count(2) >= 30
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_ends_the_run(tmp_path):
    """kill -9 of a worker: exit code 1, a message that names it, no process left."""
    process = start(*FLAGS, "--num-workers", "2", cwd=tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: (tmp_path / "runs").exists() and len(children.read_text().split()) == 2)
    time.sleep(1)
    os.kill(int(children.read_text().split()[1]), signal.SIGKILL)
    assert finish(process, 60) == 1
    assert "worker 1" in (tmp_path / "log").read_text()
    assert not living(process.pid)


def test_a_worker_that_raises_ends_the_run_with_its_message(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    learner, rollout = os.getpid(), ppo_atari.rollout

    def failing(*args, **kwargs):
        if os.getpid() != learner:
            raise ValueError("the joystick is broken")
        return rollout(*args, **kwargs)

    monkeypatch.setattr(ppo_atari, "rollout", failing)
    assert ppo_atari.main([*SHORT, *TWO, "--num-workers", "2"]) == 1
    assert "the joystick is broken" in capfd.readouterr().err
    assert not multiprocessing.active_children()


def test_workers_follow_a_killed_parent(tmp_path):
    process = start(*FLAGS, "--num-workers", "2", cwd=tmp_path)
    wait_for(lambda: len(living(process.pid)) == 3)
    time.sleep(1)
    process.kill()
    process.wait()
    wait_for(lambda: not living(process.pid))
