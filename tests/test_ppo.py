"""Section 5 and what surrounds it in the loop: the formulas of the papers, slowly, in NumPy and float64."""

import multiprocessing
import re
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from launch import curves, here, run_directory
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ppo_atari as p

CPU = torch.device("cpu")


def test_gae_against_the_sum_over_all_later_steps():
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, cut at the first episode start after t; O(T^2)."""
    rng = np.random.default_rng(0)
    T, N, gamma, lam = 23, 5, 0.97, 0.9
    rewards, values = rng.normal(size=(T, N)), rng.normal(size=(T + 1, N))
    dones = (rng.random((T + 1, N)) < 0.2).astype(float)
    dones[T] = [0, 1, 0, 1, 0]
    expected = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            for k in range(t, T):
                alive = 1 - dones[k + 1, n]
                delta = rewards[k, n] + gamma * alive * values[k + 1, n] - values[k, n]
                expected[t, n] += (gamma * lam) ** (k - t) * delta
                if not alive:
                    break
    tensors = [torch.tensor(x) for x in (rewards, values, dones)]
    advantages, returns = p.compute_gae(*tensors, gamma, lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-12)
    np.testing.assert_allclose(returns, expected + values[:T], atol=1e-12)


def test_gae_with_lambda_1_and_0_is_monte_carlo_and_td():
    rewards, values = torch.tensor([[1.0], [2], [4]]), torch.tensor([[0.5], [0.25], [0.125], [8.0]])
    dones = torch.zeros(4, 1)
    _, returns = p.compute_gae(rewards, values, dones, 0.5, 1.0)
    assert returns.flatten().tolist() == [1 + 1 + 1 + 1, 2 + 2 + 2, 4 + 4]
    dones[3] = 1
    advantages, _ = p.compute_gae(rewards, values, dones, 0.5, 0.0)
    assert advantages.flatten().tolist() == [1 + 0.125 - 0.5, 2 + 0.0625 - 0.25, 4 - 0.125]


def numpy_loss(new, old, args, ent_coef):
    """The loss of the paper, sample by sample, and its gradient in log_prob, entropy and value, by hand."""
    B, c = len(new["value"]), args.clip_coef
    advantage = old["advantage"]
    if args.norm_adv:
        advantage = (advantage - advantage.mean()) / (advantage.std(ddof=1) + 1e-8)
    policy, squares = 0.0, 0.0
    gradient = {"log_prob": np.zeros(B), "entropy": np.full(B, -ent_coef / B), "value": np.zeros(B)}
    for i in range(B):
        ratio = np.exp(new["log_prob"][i] - old["log_prob"][i])
        surrogates = ratio * advantage[i], min(max(ratio, 1 - c), 1 + c) * advantage[i]
        policy -= min(surrogates) / B
        if surrogates[0] <= surrogates[1]:
            gradient["log_prob"][i] = -ratio * advantage[i] / B
        value, old_value, return_ = new["value"][i], old["value"][i], old["return_"][i]
        squares += (value - return_) ** 2 / B
        gradient["value"][i] = args.vf_coef * (value - return_) / B
        if args.clip_vloss:
            clipped = old_value + min(max(value - old_value, -c), c) - return_
            if clipped**2 > (value - return_) ** 2:
                squares += (clipped**2 - (value - return_) ** 2) / B
                gradient["value"][i] = args.vf_coef * clipped / B * (abs(value - old_value) < c)
    loss = policy + args.vf_coef * 0.5 * squares - ent_coef * new["entropy"].mean()
    return loss, gradient, {"policy_loss": policy, "value_loss": 0.5 * squares, "entropy": new["entropy"].mean()}


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("clip_vloss", [True, False])
@pytest.mark.parametrize("spread", [0.01, 0.5], ids=["unclipped", "clipped"])
def test_loss_and_gradient_against_numpy(norm_adv, clip_vloss, spread):
    rng = np.random.default_rng(1)
    flags = ["--norm-adv" if norm_adv else "--no-norm-adv", "--clip-vloss" if clip_vloss else "--no-clip-vloss"]
    args = p.parse_args([*flags, "--clip-coef", "0.1", "--vf-coef", "0.7", "--ent-coef", "0.03125"])
    old = {name: rng.normal(size=64) for name in ("log_prob", "value", "advantage", "return_")}
    new = {name: old[name] + spread * rng.normal(size=64) for name in ("log_prob", "value")}
    new["entropy"] = rng.random(64)
    log_ratio = new["log_prob"] - old["log_prob"]
    clipped = np.abs(np.exp(log_ratio) - 1) > 0.1
    assert clipped.any() == (spread > 0.1)
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in new.items()}
    rows, knobs = {name: torch.tensor(array) for name, array in old.items()}, p.make_knobs(args, CPU)
    loss, stats = p.ppo_loss(tensors, rows, args, knobs)
    loss.backward()
    expected, gradient, parts = numpy_loss(new, old, args, 0.03125)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    for name, wanted in gradient.items():
        np.testing.assert_allclose(tensors[name].grad, wanted, atol=1e-12)
    for name, part in parts.items():
        assert stats[name].item() == pytest.approx(part, abs=1e-12)
    assert stats["old_approx_kl"].item() == pytest.approx(-log_ratio.mean())
    assert stats["approx_kl"].item() == pytest.approx((np.exp(log_ratio) - 1 - log_ratio).mean())
    assert stats["clipfrac"].item() == pytest.approx(clipped.mean())
    assert all(stat.dim() == 0 for stat in stats.values())
    knobs["ent_coef"].fill_(0.5)
    louder, _ = p.ppo_loss(tensors, rows, args, knobs)
    assert louder.item() == pytest.approx(expected - (0.5 - 0.03125) * new["entropy"].mean())


def annealed(*flags):
    """The knobs in each of 10 iterations and in the one after the last."""
    args = p.parse_args(["--num-envs", "2", "--num-steps", "8", "--total-timesteps", "160", *flags])
    knobs, history = p.make_knobs(args, CPU), []
    for iteration in range(1, 12):
        p.anneal(knobs, args, iteration)
        history.append({name: float(knob) for name, knob in knobs.items()})
    return {name: [numbers[name] for numbers in history] for name in knobs}


def test_annealing_ends_at_zero():
    """[core 4] Linear; also when it goes on in the middle, as after a resume, for it depends on the iteration alone."""
    history = annealed("--ent-coef", "0.02", "--ent-coef-final", "0.001", "--learning-rate", "0.001")
    np.testing.assert_allclose(history["learning_rate"], np.linspace(1e-3, 0, 11), rtol=1e-6)
    np.testing.assert_allclose(history["ent_coef"], np.linspace(0.02, 0.001, 11), rtol=1e-6)
    steady = annealed("--no-anneal-lr")
    np.testing.assert_allclose(steady["learning_rate"], [2.5e-4] * 11, rtol=1e-6)
    np.testing.assert_allclose(steady["ent_coef"], [0.01] * 11, rtol=1e-6)


FLAGS = ["--num-envs", "2", "--num-steps", "8", "--frame-size", "36", "--num-workers", "0", "--eval-episodes", "0"]


def test_every_sample_is_used_once_per_epoch_and_flags_reach_the_loop(tmp_path, monkeypatch, watch):
    """Records what the loss is given: samples, learning rates, entropy coefficients, clipped gradients' norms."""
    monkeypatch.chdir(tmp_path)
    batches, coefficients, rates, norms, explained = [], [], [], [], []

    def see_loss(given):
        batches.append(given["old"]["advantage"].clone())
        coefficients.append(float(given["knobs"]["ent_coef"]))

    def see_step(given):
        (group,) = given["self"].param_groups
        rates.append(float(group["lr"]))
        norms.append(torch.cat([parameter.grad.flatten() for parameter in group["params"]]).norm().item())

    def see_gae(given, result):
        errors, returns = result[1] - given["values"][:-1], result[1]
        explained.append(1 - np.var(errors.numpy()) / np.var(returns.numpy()))

    watch(p, "ppo_loss", before=see_loss)
    watch(torch.optim.Adam, "step", before=see_step)
    watch(p, "compute_gae", after=see_gae)
    flags = [*FLAGS, "--total-timesteps", "48", "--update-epochs", "3", "--max-grad-norm", "1e-3"]
    assert p.main([*flags, "--ent-coef-final", "0.001", "--no-norm-adv"]) == 0
    assert len(batches) == 3 * 3 * 4 and all(len(batch) == 4 for batch in batches)
    for iteration in range(3):
        epochs = [torch.cat(batches[12 * iteration + 4 * e :][:4]) for e in range(3)]
        assert len(epochs[0].unique()) == 16
        for epoch in epochs[1:]:
            assert torch.equal(epoch.sort().values, epochs[0].sort().values)
            assert not torch.equal(epoch, epochs[0])  # shuffled anew
    np.testing.assert_allclose(rates[::12], [2.5e-4, 2.5e-4 * 2 / 3, 2.5e-4 / 3], rtol=1e-6)
    np.testing.assert_allclose(coefficients[::12], [0.01, 0.007, 0.004], rtol=1e-6)
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)
    logged = [value for _, value in curves(run_directory(tmp_path))["losses/explained_variance"]]
    assert logged == pytest.approx(explained, rel=1e-3)


def test_a_rollout_is_valued_by_what_the_next_one_starts_with(tmp_path, monkeypatch, watch):
    """While the acting copy stays the same, the value behind the last step is that of the next rollout's first step."""
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(p.Agent, "load_state_dict", lambda *args, **kwargs: None)
    watch(p, "compute_gae", before=lambda given: calls.append((given["values"].clone(), given["dones"].clone())))
    flags = [*FLAGS, "--num-steps", "2", "--num-minibatches", "1", "--update-epochs", "1"]
    assert p.main([*flags, "--total-timesteps", "640"]) == 0
    assert len(calls) == 160
    for (values, dones), (next_values, next_dones) in pairwise(calls):
        assert torch.equal(values[-1], next_values[0]) and torch.equal(dones[-1], next_dones[0])
        assert not torch.equal(values[-1], next_values[1])
    assert torch.stack([dones[-1] for _, dones in calls]).unique().tolist() == [0, 1]


def test_target_kl_ends_the_epochs(tmp_path, monkeypatch, watch):
    """Checked after each epoch: a tiny target leaves one epoch of four."""
    monkeypatch.chdir(tmp_path)
    calls = []
    watch(p, "ppo_loss", before=lambda given: calls.append(1))
    assert p.main([*FLAGS, "--total-timesteps", "32", "--target-kl", "1e-12"]) == 0
    assert len(calls) == 2 * 4


def test_every_knob_is_logged_and_in_the_checkpoint(tmp_path, monkeypatch, watch):
    """A number that a user adds in make_knobs and changes in anneal: in the loss, in the curves, in the checkpoint."""
    monkeypatch.chdir(tmp_path)
    make, seen = p.make_knobs, []
    monkeypatch.setattr(
        p, "make_knobs", lambda *args, **kwargs: make(*args, **kwargs) | {"temperature": torch.tensor(1.0)}
    )
    watch(p, "anneal", after=lambda given, _: given["knobs"]["temperature"].mul_(0.5))
    watch(p, "ppo_loss", before=lambda given: seen.append(float(given["knobs"]["temperature"])))
    flags = [*FLAGS, "--num-minibatches", "1", "--update-epochs", "1", "--ent-coef-final", "0"]
    assert p.main([*flags, "--total-timesteps", "48"]) == 0
    run = run_directory(tmp_path)
    expected = {
        "temperature": [0.5, 0.25, 0.125],
        "learning_rate": [2.5e-4, 2.5e-4 * 2 / 3, 2.5e-4 / 3],
        "ent_coef": [0.01, 0.01 * 2 / 3, 0.01 / 3],
    }
    for name, values in expected.items():
        steps, logged = zip(*curves(run)[f"charts/{name}"])
        assert steps == (16, 32, 48) and logged == pytest.approx(values)
    kept = torch.load(run / "checkpoint.pt", weights_only=True)["knobs"]
    assert {name: float(kept[name]) for name in expected} == pytest.approx({n: v[-1] for n, v in expected.items()})
    assert p.main([*flags, "--resume", str(run), "--total-timesteps", "64"]) == 0
    assert seen == expected["temperature"] + [0.0625]  # which goes on from the checkpoint's number


class Groups(torch.optim.Adam):
    """Adam without frozen parameters and with the value head, at a tenth of the rate, in a group of its own."""

    def __init__(self, params, lr, *args, **kwargs):
        params = [parameter for parameter in params if parameter.requires_grad]
        head = {"params": params[-2:], "lr": 0.1 * lr}
        super().__init__([{"params": params[:-2]}, head], lr, *args, **kwargs)


def test_groups_keep_their_proportion_to_the_learning_rate(tmp_path, monkeypatch, watch):
    """Both anneal, also after a resume; Adam's first step is as long as the group's rate says."""
    monkeypatch.chdir(tmp_path)
    rates, moved = [], []
    monkeypatch.setattr(torch.optim, "Adam", Groups)

    def parameters(given):
        return [group["params"] for group in given["optimizer"].param_groups]

    def before(given):
        moved.append([[parameter.detach().clone() for parameter in group] for group in parameters(given)])

    def after(given, _):
        rates.append([float(group["lr"]) for group in given["optimizer"].param_groups])
        for old, new in zip(moved[-1], parameters(given)):
            old[:] = [(a - b).abs().max().item() for a, b in zip(old, new)]

    watch(p, "update", before=before, after=after)
    flags = [*FLAGS, "--num-minibatches", "1", "--update-epochs", "1", "--learning-rate", "0.001"]
    assert p.main([*flags, "--total-timesteps", "32"]) == 0
    np.testing.assert_allclose(rates, [[1e-3, 1e-4], [5e-4, 5e-5]], rtol=1e-5)
    # The bias-corrected first step is rate * g / (|g| + 1e-5): nearly the rate, where the gradient is not tiny.
    assert [max(group) for group in moved[0]] == pytest.approx([1e-3, 1e-4], rel=0.1)
    assert p.main([*flags, "--resume", str(run_directory(tmp_path)), "--total-timesteps", "64"]) == 0
    np.testing.assert_allclose(rates[2:], [[5e-4, 5e-5], [2.5e-4, 2.5e-5]], rtol=1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, Groups], ids=["all given", "only the others given"])
def test_frozen_parameters_stay_as_they_are(optimizer, tmp_path, monkeypatch):
    """The first layer does not learn, the others do; after a resume, too."""
    monkeypatch.chdir(tmp_path)
    make, first, frozen = p.make_agent, {}, set()

    def freezing(*args, **kwargs):
        agent = make(*args, **kwargs)
        for name, parameter in list(agent.named_parameters())[:2]:
            parameter.requires_grad_(False)
            frozen.add(name)
        first.update({name: tensor.clone() for name, tensor in agent.state_dict().items() if name not in first})
        return agent

    monkeypatch.setattr(p, "make_agent", freezing)
    monkeypatch.setattr(torch.optim, "Adam", optimizer)
    assert p.main([*FLAGS, "--total-timesteps", "32"]) == 0
    assert p.main([*FLAGS, "--resume", str(run_directory(tmp_path)), "--total-timesteps", "48"]) == 0
    trained = torch.load(run_directory(tmp_path) / "agent.pt", weights_only=True)["weights"]
    assert {name for name, tensor in trained.items() if torch.equal(tensor, first[name])} == frozen


WEIGHTS = torch.randint(1, 2**40, (4 * 36 * 36,), generator=torch.Generator().manual_seed(0))


def fingerprint(obs):
    """A number that no other observation has."""
    return (obs.flatten(1).long() * WEIGHTS).sum(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_field_that_the_agent_outputs_reaches_the_loss_in_the_right_rows(workers, tmp_path, monkeypatch, watch):
    """A number, a vector and an image per step, stored by adding their names to rollout_fields alone."""
    monkeypatch.chdir(tmp_path)
    fields, evaluate, stored, rows = p.rollout_fields, p.Agent.get_action_and_value, [], []
    more = {"mark": (torch.int64, ()), "sides": (torch.float32, (3,)), "small": (torch.uint8, (4, 18, 18))}

    def outputs(self, obs, *args, **kwargs):
        result = evaluate(self, obs, *args, **kwargs)
        sides = torch.stack([obs[:, 3, :, i].float().mean(1) for i in (0, 17, 35)], 1)
        return result | {"mark": fingerprint(obs), "sides": sides, "small": obs[:, :, ::2, ::2]}

    def check(found):
        """That obs and what the agent said of it lie in the same place; [..., 4, 36, 36] of any leading shape."""
        obs = found["obs"].reshape(-1, 4, 36, 36)
        assert torch.equal(found["mark"].flatten(), fingerprint(obs))
        assert torch.equal(found["sides"].reshape(-1, 3)[:, 1], obs[:, 3, :, 17].float().mean(1))
        assert torch.equal(found["small"].reshape(-1, 4, 18, 18), obs[:, :, ::2, ::2])

    def see_fill(given):
        check(given["storage"])
        stored.append({name: given["storage"][name][:-1].clone() for name in (*fields(args, env), *more)})

    def see_loss(given):
        check(given["old"])
        assert given["old"]["small"].shape == (4, 4, 18, 18) and given["old"]["sides"].shape == (4, 3)
        assert torch.equal(given["new"]["mark"], given["old"]["mark"])
        rows.append({name: tensor.clone() for name, tensor in given["old"].items()})

    monkeypatch.setattr(p, "rollout_fields", lambda *args, **kwargs: fields(*args, **kwargs) | more)
    monkeypatch.setattr(p.Agent, "get_action_and_value", outputs)
    watch(p.Learner, "fill", before=see_fill)
    watch(p, "ppo_loss", before=see_loss)
    flags = [*FLAGS, "--num-workers", str(workers), "--update-epochs", "1", "--total-timesteps", "48"]
    args = p.parse_args(flags)
    env = p.make_env(args)
    assert p.main(flags) == 0
    assert len(stored) == 3 and len(rows) == 3 * 4
    for iteration, rollout in enumerate(stored):
        assert len(rollout["mark"].unique()) > 8  # else rows that are swapped would look the same
        found = rows[4 * iteration :][:4]
        found = {name: torch.cat([part[name] for part in found]) for name in rollout}
        order = {key: i for i, key in enumerate(zip(*(found[n].tolist() for n in ("mark", "log_prob", "value"))))}
        flat = {name: tensor.flatten(0, 1) for name, tensor in rollout.items()}
        where = [order[key] for key in zip(*(flat[n].tolist() for n in ("mark", "log_prob", "value")))]
        for name in rollout:  # each row of the rollout once, whole
            assert torch.equal(found[name][where], flat[name]), name


@pytest.mark.parametrize("workers", [0, 2])
def test_a_field_that_nobody_fills_is_named(workers, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    fields = p.rollout_fields
    monkeypatch.setattr(
        p, "rollout_fields", lambda *args, **kwargs: fields(*args, **kwargs) | {"novelty": (torch.float32, ())}
    )
    code, _, error = here(capfd, *FLAGS, "--num-workers", workers, "--total-timesteps", 32)
    assert code == 1 and error.count("\n") == 1 and "'novelty'" in error


def test_a_field_that_is_filled_in_some_steps_only_is_named(tmp_path, monkeypatch, capfd):
    """With its step: zeros, or what the rollout before left there, would be learned from."""
    monkeypatch.chdir(tmp_path)
    fields, act, calls = p.rollout_fields, p.act, []

    def forgetful(*args, **kwargs):
        calls.append(1)
        return act(*args, **kwargs) | ({} if len(calls) == 3 else {"novelty": torch.ones(2)})

    monkeypatch.setattr(
        p, "rollout_fields", lambda *args, **kwargs: fields(*args, **kwargs) | {"novelty": (torch.float32, ())}
    )
    monkeypatch.setattr(p, "act", forgetful)
    code, _, error = here(capfd, *FLAGS, "--num-workers", 0, "--total-timesteps", 32)
    assert code == 1 and error.count("\n") == 1 and "'novelty'" in error and "step 2" in error
    assert not multiprocessing.active_children()


def test_what_the_loss_returns_is_logged(tmp_path, monkeypatch):
    """A term that a user adds to the loss: under its name, as the mean over the minibatches."""
    monkeypatch.chdir(tmp_path)
    loss, values = p.ppo_loss, []

    def longer(*args, **kwargs):
        result, stats = loss(*args, **kwargs)
        values.append(len(values) ** 2)
        return result, stats | {"own_term": (0 * result + values[-1]).mean()}

    monkeypatch.setattr(p, "ppo_loss", longer)
    assert p.main([*FLAGS, "--update-epochs", "1", "--total-timesteps", "32"]) == 0
    assert curves(run_directory(tmp_path))["losses/own_term"] == [
        (16, (0 + 1 + 4 + 9) / 4),
        (32, (16 + 25 + 36 + 49) / 4),
    ]


def learner(device=CPU, precision="float32"):
    """A learner with a batch of 16 random samples; the same weights and samples on every device."""
    torch.manual_seed(0)
    args = p.parse_args([*FLAGS, "--precision", precision, "--learning-rate", "0.001"])
    env = p.make_env(args)
    agent, storage = p.make_agent(args, env), p.allocate(args, env)
    storage["obs"].random_(0, 256)
    storage["action"].random_(0, 4)
    for name in ("value", "reward"):
        storage[name].normal_()
    storage["log_prob"].fill_(-1.4)
    result = p.Learner(args, agent, device, getattr(torch, precision))
    result.fill(storage, advantage=torch.randn(8, 2), return_=torch.randn(8, 2))
    for name in ("log_prob", "value"):  # which a GPU computes anew
        result.batch[name].copy_(storage[name][:-1].flatten())
    return result


def updates(learner):
    """The stats of three updates, with other knobs before each."""
    stats = []
    for i, start in enumerate((0, 8, 4)):
        learner.knobs["learning_rate"].fill_(1e-3 / (i + 1))
        learner.knobs["ent_coef"].fill_(0.1 * i)
        stats.append(learner.update(torch.arange(start, start + 8, device=learner.device)))
    return [{name: stat.clone() for name, stat in one.items()} for one in stats]


def test_processes_average_the_gradients_of_what_learns(monkeypatch, watch):
    """In one message, without the frozen parameters, which have none: here as if the others' gradients were zero."""
    gradients, messages = [], []

    def see(given):
        gradients.append([None if x.grad is None else x.grad.clone() for x in one.agent.parameters()])

    monkeypatch.setattr(p, "all_mean", lambda tensor: messages.append(tensor) or tensor.mul_(0.5))
    watch(p.nn.utils, "clip_grad_norm_", before=see)
    for world_size in (1, 2):
        one = learner()
        next(one.agent.parameters()).requires_grad_(False)
        one.args.world_size = world_size
        torch.manual_seed(1)
        one.update(torch.arange(8))
    alone, shared = gradients
    assert len(messages) == 1 and alone[0] is None and shared[0] is None and len(alone) == len(shared) > 2
    for mine, halved in zip(alone[1:], shared[1:]):
        assert mine.any() and torch.equal(mine * 0.5, halved)


def test_a_rate_is_changed_by_its_knob_alone():
    """What is written to a group's rate is either overwritten by the knob or refused, and never counts in silence."""
    one, (rows, other) = learner(), torch.arange(16).split(8)
    one.optimizer.param_groups[0]["lr"].fill_(1.0)
    one.update(rows)
    assert float(one.optimizer.param_groups[0]["lr"]) == pytest.approx(1e-3)
    one.optimizer.param_groups[0]["lr"] = 1.0
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        one.update(other)


def test_a_knob_is_filled_and_not_replaced():
    """A new number under its name would be seen by some and not by others: by no graph, and by no checkpoint."""
    one = learner()
    with pytest.raises(TypeError, match="item assignment"):
        one.knobs["ent_coef"] = 0.5
    one.knobs["ent_coef"].fill_(0.5)
    assert float(one.knobs["ent_coef"]) == 0.5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("args.clip_coef", lambda one: setattr(one.args, "clip_coef", 0.05)),
        ("args.target_kl", lambda one: setattr(one.args, "target_kl", 0.02)),
        ("agent.temperature", lambda one: setattr(one.agent, "temperature", 0.5)),
        ("agent.network.1.mode", lambda one: setattr(one.agent.network[1], "mode", "late")),
        ("scheduler", lambda one: torch.optim.lr_scheduler.ConstantLR(one.optimizer)),
    ],
)
def test_what_is_no_knob_stays_as_it_is(name, change):
    """Annealed by hand or by a scheduler, it would begin anew with --resume, and stand still in a CUDA graph."""
    one = learner()
    one.agent.temperature, one.agent.network[1].mode, one.agent.limit = 1.0, "early", float("nan")
    storage, computed = p.allocate(one.args, p.make_env(one.args)), torch.zeros(8, 2)
    for i in range(3):
        one.knobs["ent_coef"].fill_(0.1 * i)
        one.fill(storage, advantage=computed, return_=computed)
        one.update(torch.arange(8))
    change(one)
    with pytest.raises(p.RunError, match=name):
        one.fill(storage, advantage=computed, return_=computed)


@pytest.mark.parametrize("number", [torch.tensor(3), torch.tensor(True), torch.tensor(0.5, dtype=torch.float64)])
def test_a_scalar_of_any_type_is_logged(number, monkeypatch):
    """A count or a truth value beside the losses: what is logged is their mean, for which they must be floats."""
    loss = p.ppo_loss

    def counting(*batch):
        total, stats = loss(*batch)
        return total, stats | {"mine": number}

    monkeypatch.setattr(p, "ppo_loss", counting)
    stats = learner().update(torch.arange(8))
    assert torch.stack([stats["mine"], stats["entropy"]]).mean() == (float(number) + stats["entropy"]) / 2
    assert stats["mine"].mean() == float(number)


class PretendedGraph(TorchDispatchMode):
    """What a CUDA graph is: the kernels of the captured code with the addresses and numbers that they had then, again
    and again. As there, nothing can be read from the device while it is captured."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "local_scalar_dense" in str(func):
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Where there is no GPU, its graphs on the CPU."""
    graphs = []

    @contextmanager
    def capture(graph):  # a real capture records and does not compute: take back what the call did
        tensors = [*now.agent.parameters(), *now.agent.buffers(), *now.knobs.values()]
        tensors += [tensor for state in now.optimizer.state.values() for tensor in state.values()]
        before = [tensor.detach().clone() for tensor in tensors]
        with graph:
            yield
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
        graphs.append(graph)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    now = learner()
    now.graphed, now.graphs = True, graphs
    return now


def assert_same_training(first, second):
    """Stats and weights, bit for bit, of two learners that each make six updates."""
    results = []
    for one in (first, second):
        torch.manual_seed(1)  # for a network with Dropout
        stats = updates(one)
        one.step = None  # captured anew, by an optimizer that has made steps
        results.append(stats + updates(one))
    for mine, other in zip(*results, strict=True):
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    for mine, other in zip(first.agent.parameters(), second.agent.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_cuda_graph_changes_nothing(pretended_gpu):
    """On a pretended GPU: the same stats and weights as without a graph, bit for bit, with knobs that change between.

    From a fresh optimizer and from one that has made steps; neither warming up nor capturing leaves a trace.
    """
    assert_same_training(pretended_gpu, learner())
    assert len(pretended_gpu.graphs) == 2 and min(len(graph.calls) for graph in pretended_gpu.graphs) > 100


def test_without_a_graph_the_update_goes_on(pretended_gpu, monkeypatch, capfd):
    """A loss that reads a number from the device cannot be captured: one line says so, and no step is lost."""
    loss, other = p.ppo_loss, learner()

    def reading(*args, **kwargs):
        result, stats = loss(*args, **kwargs)
        return result * (1 if result.item() < 1e9 else 0), stats

    monkeypatch.setattr(p, "ppo_loss", reading)
    assert_same_training(pretended_gpu, other)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all(re.search("without a CUDA graph: .*capturing", line) for line in lines)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, Groups])
def test_cuda_graph_on_a_gpu(optimizer, monkeypatch):
    """The real graph against the eager update on the same GPU and against the CPU, in float32."""
    monkeypatch.setattr(torch.optim, "Adam", optimizer)
    results, gpu = [], torch.device("cuda", 0)
    for device, graphed in ((gpu, True), (gpu, False), (CPU, False)):
        one = learner(device)
        one.graphed = graphed
        stats = torch.stack([torch.stack(list(each.values())) for each in updates(one)]).cpu()
        results.append((stats, torch.cat([tensor.detach().flatten().cpu() for tensor in one.agent.parameters()])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0], results[2], rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu_the_ratio_starts_at_1(precision, tmp_path, monkeypatch):
    """Although the acting copy, on the CPU, rounds otherwise."""
    monkeypatch.chdir(tmp_path)
    flags = [*FLAGS, "--update-epochs", "1", "--num-minibatches", "1", "--total-timesteps", "16"]
    assert p.main([*flags, "--precision", precision]) == 0
    logged = {tag: curve[0][1] for tag, curve in curves(run_directory(tmp_path)).items()}
    assert abs(logged["losses/old_approx_kl"]) < 1e-5 and logged["losses/clipfrac"] == 0


class TwoEnds(gym.Env):
    """An episode of three steps without reward that is terminated or truncated; the last observation is white."""

    observation_space = gym.spaces.Box(0, 255, (4, 36, 36), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, truncates):
        self.truncates = truncates
        self.spec = gym.envs.registration.EnvSpec("Ends-v0", kwargs={"repeat_action_probability": 0})
        self.ale = None

    def observe(self):
        return np.full((4, 36, 36), 255 * (self.t == 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        return self.observe(), 0.0, self.t == 3 and not self.truncates, self.t == 3 and self.truncates, {}


def two_ends(num_steps, prepare=lambda agent: None):
    """A rollout in both kinds of TwoEnds, with a discount of 0.9. Returns the agent and what is stored."""
    args = p.parse_args([*FLAGS, "--num-steps", str(num_steps), "--gamma", "0.9", "--inference-batch", "2"])
    envs = gym.vector.SyncVectorEnv(
        [lambda: TwoEnds(False), lambda: TwoEnds(True)], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP
    )
    agent, storage = p.make_agent(args, envs.envs[0]).eval(), p.allocate(args, envs.envs[0])
    prepare(agent)
    storage["obs"][-1] = torch.from_numpy(envs.reset()[0])
    storage["done"][-1] = 1
    generators = [np.random.default_rng(i) for i in range(2)]
    p.rollout(agent=agent, envs=envs, storage=storage, generators=generators, args=args)
    return agent, storage


def test_actions_are_drawn_from_the_policy():
    """A policy that ignores its observation: as often as it says, in both environments, independently."""
    probs = torch.tensor([0.5, 0.3, 0.2])

    def prepare(agent):
        with torch.no_grad():
            agent.actor.weight.zero_()
            agent.actor.bias.copy_(probs.log())

    _, storage = two_ends(1000, prepare)
    actions = storage["action"][:-1]
    torch.testing.assert_close(storage["log_prob"][:-1], probs.log()[actions])
    counts = torch.bincount((3 * actions[:, 0] + actions[:, 1]), minlength=9)
    expected = 1000 * torch.outer(probs, probs).flatten()
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 26.1  # 8 degrees of freedom: exceeded once in a thousand seeds, and these are fixed


def test_truncation_is_bootstrapped_and_termination_is_not():
    torch.manual_seed(4)
    agent, storage = two_ends(4)
    with torch.no_grad():
        ends = torch.stack([torch.full((4, 36, 36), pixel, dtype=torch.uint8) for pixel in (0, 255)])
        black, white = agent.get_action_and_value(ends)["value"]
    assert abs(white - black) > 0.01
    torch.testing.assert_close(storage["reward"][:-1], torch.tensor([[0, 0], [0, 0], [0, 0.9 * white], [0, 0]]))
    assert storage["done"].tolist() == [[1, 1], [0, 0], [0, 0], [1, 1], [0, 0]]
    assert not storage["obs"][3].any()  # the first observation of the next episode, in the same step
    torch.testing.assert_close(storage["value"], black.expand(5, 2))
