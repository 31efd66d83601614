"""Sections 4 and 7: same seed, same weights, however the work is shared out; nobody is left behind when one dies."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from launch import curves, finish, living, run_directory, same_weights, start, wait_for, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_atari

FLAGS = ["--env-id", "ALE/Breakout-v5", "--num-steps", "16", "--frame-size", "44", "--eval-episodes", "0"]
SHORT = [*FLAGS, "--total-timesteps", "512"]


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


def test_no_git(reference, tmp_path, monkeypatch):
    """Training needs no git: slim container images have none."""
    monkeypatch.setenv("PATH", "")
    run = trained(tmp_path / "run", monkeypatch, "--num-workers", "0")
    assert same_weights(weights(run), weights(reference))
    about, without = (json.loads((path / "args.json").read_text()) for path in (reference, run))
    assert about.keys() - without.keys() == {"git"}


def test_another_seed_gives_other_weights(reference, tmp_path, monkeypatch):
    other = weights(trained(tmp_path / "run", monkeypatch, "--num-workers", "0", "--seed", "2"))
    assert all(not torch.equal(other[name], tensor) for name, tensor in weights(reference).items())


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
    assert about["flags"]["gamma"] == 0.99 and about["versions"]["torch"] and about["hardware"]["cores"]
    assert reference.name.startswith("ALE-Breakout-v5__ppo_atari__1__")


def test_returns_in_tensorboard_are_full_games(tmp_path, monkeypatch):
    """Each is the score that the emulator itself counted in one game, over all its lives, at the step of its end."""
    scores, running, ends = [], {}, []

    class CountingSkip(ppo_atari.MaxAndSkipEnv):
        def step(self, action):
            result = super().step(action)
            running[id(self)] = running.get(id(self), 0) + result[1]
            if result[2] or result[3]:
                scores.append(running.pop(id(self)))
            return result

    class CountingStack(ppo_atari.FrameStack):
        steps = 0

        def step(self, action):
            result = super().step(action)
            self.steps += 8  # one in each of the environments
            if self.unwrapped.ale.game_over():
                ends.append(self.steps)
            return result

    monkeypatch.setattr(ppo_atari, "MaxAndSkipEnv", CountingSkip)
    monkeypatch.setattr(ppo_atari, "FrameStack", CountingStack)
    flags = ["--num-workers", "0", "--num-steps", "64", "--total-timesteps", "4096"]
    run = trained(tmp_path / "run", monkeypatch, *flags)
    steps, returns = zip(*curves(run)["charts/episodic_return"])
    assert list(steps) == sorted(ends) == [step for step, _ in curves(run)["charts/episodic_length"]]
    assert len(returns) > 5 and sorted(returns) == sorted(scores) and max(returns) > 1


@pytest.mark.parametrize("limit", [0.01, 1e9])
def test_first_step_is_adam_on_the_clipped_gradient(limit, tmp_path, monkeypatch):
    """[core 11] The gradient of all parameters together gets at most this norm; [core 3] Adam's epsilon is 1e-5."""
    seen, update = [], ppo_atari.update

    def flat(tensors):
        return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()

    def watched(agent, optimizer, batch, i, args, ent_coef):
        old = (batch.log_probs[i], batch.values[i], batch.advantages[i], batch.returns[i])
        loss, _ = ppo_atari.ppo_loss(*batch.evaluate(agent, i), *old, args)
        gradient, before = flat(torch.autograd.grad(loss, list(agent.parameters()))), flat(agent.parameters())
        stats = update(agent, optimizer, batch, i, args, ent_coef)
        seen.append((gradient, before, flat(agent.parameters()), stats[ppo_atari.STATS.index("grad_norm")].item()))
        return stats

    monkeypatch.setattr(ppo_atari, "update", watched)
    flags = ["--num-workers", "0", "--precision", "float32", "--max-grad-norm", str(limit), "--total-timesteps", "128"]
    trained(tmp_path / "run", monkeypatch, *flags, "--update-epochs", "1", "--num-minibatches", "1")
    ((gradient, before, after, grad_norm),) = seen
    norm = gradient.square().sum().sqrt()
    assert norm > 0.02 and grad_norm == pytest.approx(norm.item(), rel=1e-4)
    gradient = gradient * min(1, limit / norm)
    # In Adam's first step, the bias-corrected moments are the gradient and its square (Kingma and Ba, 2015).
    torch.testing.assert_close(after - before, -2.5e-4 * gradient / (gradient.abs() + 1e-5), rtol=1e-3, atol=3e-8)


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

    def failing(*args):
        if os.getpid() != learner:
            raise ValueError("the joystick is broken")
        return rollout(*args)

    monkeypatch.setattr(ppo_atari, "rollout", failing)
    assert ppo_atari.main([*SHORT, "--num-workers", "2"]) == 1
    assert "the joystick is broken" in capfd.readouterr().err
    assert not multiprocessing.active_children()


def test_workers_follow_a_killed_parent(tmp_path):
    process = start(*FLAGS, "--num-workers", "2", cwd=tmp_path)
    wait_for(lambda: len(living(process.pid)) == 3)
    time.sleep(1)
    process.kill()
    process.wait()
    wait_for(lambda: not living(process.pid))
