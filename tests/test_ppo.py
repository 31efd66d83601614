"""Section 5 and what surrounds it in the loop: the formulas of the papers, slowly, in NumPy and
float64."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from launch import curves, run_directory
from test_learning import Toy, as_make_env_does

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


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.997, 0.9), (1, 1), (0, 0.5)])
def test_gae_is_the_plain_loop_bit_for_bit(gamma, gae_lambda):
    """In float32, with torch's own operations: neither what is computed in advance nor NumPy rounds
    otherwise."""
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randn(128, 8, generator=generator)
    values = torch.randn(129, 8, generator=generator)
    dones = (torch.rand(129, 8, generator=generator) < 0.1).float()
    expected = torch.zeros(128, 8)
    advantage = torch.zeros(8)
    for t in reversed(range(128)):
        goes_on = 1 - dones[t + 1]
        delta = rewards[t] + gamma * values[t + 1] * goes_on - values[t]
        advantage = delta + gamma * gae_lambda * goes_on * advantage
        expected[t] = advantage
    advantages, returns = p.compute_gae(rewards, values, dones, gamma, gae_lambda)
    assert advantages.dtype == returns.dtype == torch.float32
    assert torch.equal(advantages, expected)
    assert torch.equal(returns, expected + values[:-1])


def numpy_loss(new, old, args, ent_coef):
    """The loss of the paper, sample by sample, and its gradient in log_prob, entropy and value, by
    hand."""
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
    return (
        loss,
        gradient,
        {"policy_loss": policy, "value_loss": 0.5 * squares, "entropy": new["entropy"].mean()},
    )


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("clip_vloss", [True, False])
@pytest.mark.parametrize("spread", [0.01, 0.5], ids=["unclipped", "clipped"])
def test_loss_and_gradient_against_numpy(norm_adv, clip_vloss, spread):
    rng = np.random.default_rng(1)
    flags = [
        "--norm-adv" if norm_adv else "--no-norm-adv",
        "--clip-vloss" if clip_vloss else "--no-clip-vloss",
    ]
    args = p.parse_args([*flags, "--clip-coef", "0.1", "--vf-coef", "0.7", "--ent-coef", "0.03125"])
    old = {name: rng.normal(size=64) for name in ("log_prob", "value", "advantage", "return_")}
    new = {name: old[name] + spread * rng.normal(size=64) for name in ("log_prob", "value")}
    new["entropy"] = rng.random(64)
    log_ratio = new["log_prob"] - old["log_prob"]
    clipped = np.abs(np.exp(log_ratio) - 1) > 0.1
    assert clipped.any() == (spread > 0.1)
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in new.items()}
    rows = {name: torch.tensor(array) for name, array in old.items()}
    schedule = p.make_schedule(args, CPU)
    loss, stats = p.ppo_loss(tensors, rows, args, schedule)
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
    schedule["ent_coef"].fill_(0.5)
    louder, _ = p.ppo_loss(tensors, rows, args, schedule)
    assert louder.item() == pytest.approx(expected - (0.5 - 0.03125) * new["entropy"].mean())


def annealed(*flags):
    """The schedule in each of 10 iterations and in the one after the last."""
    args = p.parse_args(["--num-envs", "2", "--num-steps", "8", "--total-timesteps", "160", *flags])
    schedule = p.make_schedule(args, CPU)
    history = {name: [] for name in schedule}
    for iteration in range(1, 12):
        p.anneal(schedule, args, iteration)
        for name, number in schedule.items():
            history[name].append(float(number))
    return history


def test_annealing_ends_at_zero():
    """[core 4] Linear; also when it goes on in the middle, as after a resume, for it depends on the
    iteration alone."""
    history = annealed(
        "--ent-coef", "0.02", "--ent-coef-final", "0.001", "--learning-rate", "0.001"
    )
    np.testing.assert_allclose(history["learning_rate"], np.linspace(1e-3, 0, 11), rtol=1e-6)
    np.testing.assert_allclose(history["ent_coef"], np.linspace(0.02, 0.001, 11), rtol=1e-6)
    steady = annealed("--no-anneal-lr")
    np.testing.assert_allclose(steady["learning_rate"], [2.5e-4] * 11, rtol=1e-6)
    np.testing.assert_allclose(steady["ent_coef"], [0.01] * 11, rtol=1e-6)


FLAGS = ["--num-envs", "2", "--num-steps", "8", "--frame-size", "36", "--num-workers", "0",
         "--eval-episodes", "0"]  # fmt: skip


def test_every_sample_is_used_once_per_epoch_and_flags_reach_the_loop(tmp_path, monkeypatch, watch):
    """Records what the loss is given: samples, learning rates, entropy coefficients, clipped
    gradients' norms."""
    monkeypatch.chdir(tmp_path)
    batches = []
    coefficients = []
    rates = []
    norms = []
    explained = []

    def see_loss(given):
        batches.append(given["old"]["advantage"].clone())
        coefficients.append(float(given["schedule"]["ent_coef"]))

    def see_step(given):
        (group,) = given["self"].param_groups
        rates.append(float(group["lr"]))
        gradients = [parameter.grad.flatten() for parameter in group["params"]]
        norms.append(torch.cat(gradients).norm().item())

    def see_gae(given, result):
        _, returns = result
        errors = returns - given["values"][:-1]
        explained.append(1 - np.var(errors.numpy()) / np.var(returns.numpy()))

    watch(p, "ppo_loss", before=see_loss)
    watch(torch.optim.Adam, "step", before=see_step)
    watch(p, "compute_gae", after=see_gae)
    flags = [*FLAGS, "--total-timesteps", "48", "--update-epochs", "3", "--max-grad-norm", "1e-3"]
    assert p.main([*flags, "--ent-coef-final", "0.001", "--no-norm-adv"]) == 0
    assert len(batches) == 3 * 3 * 4
    assert all(len(batch) == 4 for batch in batches)
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
    """While the acting copy stays the same, the value behind the last step is that of the next
    rollout's first step."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def see(given):
        calls.append((given["values"].clone(), given["dones"].clone()))

    monkeypatch.setattr(p.Agent, "load_state_dict", lambda *args, **kwargs: None)
    watch(p, "compute_gae", before=see)
    flags = [*FLAGS, "--num-steps", "2", "--num-minibatches", "1", "--update-epochs", "1"]
    assert p.main([*flags, "--total-timesteps", "400"]) == 0
    assert len(calls) == 100
    for (values, dones), (next_values, next_dones) in pairwise(calls):
        assert torch.equal(values[-1], next_values[0])
        assert torch.equal(dones[-1], next_dones[0])
        assert not torch.equal(values[-1], next_values[1])
    assert torch.stack([dones[-1] for _, dones in calls]).unique().tolist() == [0, 1]


def test_target_kl_ends_the_epochs(tmp_path, monkeypatch, watch):
    """Checked after each epoch: a tiny target leaves one epoch of four."""
    monkeypatch.chdir(tmp_path)
    calls = []
    watch(p, "ppo_loss", before=lambda given: calls.append(1))
    assert p.main([*FLAGS, "--total-timesteps", "32", "--target-kl", "1e-12"]) == 0
    assert len(calls) == 2 * 4


def test_every_number_of_the_schedule_is_logged_and_in_the_checkpoint(tmp_path, monkeypatch, watch):
    """A number that a user adds in make_schedule and changes in anneal: in the loss, in the curves,
    in the checkpoint."""
    monkeypatch.chdir(tmp_path)
    make_schedule = p.make_schedule
    seen = []

    def with_temperature(*args, **kwargs):
        return make_schedule(*args, **kwargs) | {"temperature": torch.tensor(1.0)}

    monkeypatch.setattr(p, "make_schedule", with_temperature)
    watch(p, "anneal", after=lambda given, _: given["schedule"]["temperature"].mul_(0.5))
    watch(p, "ppo_loss", before=lambda given: seen.append(float(given["schedule"]["temperature"])))
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
        assert steps == (16, 32, 48)
        assert logged == pytest.approx(values)
    kept = torch.load(run / "checkpoint.pt", weights_only=True)["schedule"]
    assert kept.keys() == expected.keys()
    for name, values in expected.items():
        assert float(kept[name]) == pytest.approx(values[-1])
    assert p.main([*flags, "--resume", str(run), "--total-timesteps", "64"]) == 0
    assert seen == [0.5, 0.25, 0.125, 0.0625]  # which goes on from the checkpoint's number


class Groups(torch.optim.Adam):
    """Adam without frozen parameters and with the value head, at a tenth of the rate, in a group of
    its own."""

    def __init__(self, params, lr, *args, **kwargs):
        params = [parameter for parameter in params if parameter.requires_grad]
        head = {"params": params[-2:], "lr": 0.1 * lr}
        super().__init__([{"params": params[:-2]}, head], lr, *args, **kwargs)


def test_groups_keep_their_proportion_to_the_learning_rate(tmp_path, monkeypatch, watch):
    """Both anneal, also after a resume; Adam's first step is as long as the group's rate says."""
    monkeypatch.chdir(tmp_path)
    rates = []
    parameters = []
    moved = []
    monkeypatch.setattr(torch.optim, "Adam", Groups)

    def before(given):
        parameters.clear()
        for group in given["optimizer"].param_groups:
            parameters.append([parameter.detach().clone() for parameter in group["params"]])

    def after(given, _):
        groups = given["optimizer"].param_groups
        rates.append([float(group["lr"]) for group in groups])
        distances = []
        for group, old in zip(groups, parameters, strict=True):
            changes = [(a - b).abs().max().item() for a, b in zip(group["params"], old)]
            distances.append(max(changes))
        moved.append(distances)

    watch(p, "update", before=before, after=after)
    flags = [*FLAGS, "--num-minibatches", "1", "--update-epochs", "1", "--learning-rate", "0.001"]
    assert p.main([*flags, "--total-timesteps", "32"]) == 0
    np.testing.assert_allclose(rates, [[1e-3, 1e-4], [5e-4, 5e-5]], rtol=1e-5)
    # The bias-corrected first step is rate * g / (|g| + 1e-5): nearly the rate, where the gradient
    # is not tiny.
    assert moved[0] == pytest.approx([1e-3, 1e-4], rel=0.1)
    run = run_directory(tmp_path)
    assert p.main([*flags, "--resume", str(run), "--total-timesteps", "64"]) == 0
    np.testing.assert_allclose(rates[2:], [[5e-4, 5e-5], [2.5e-4, 2.5e-5]], rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, Groups], ids=["all given", "only the others given"]
)
def test_frozen_parameters_stay_as_they_are(optimizer, tmp_path, monkeypatch):
    """The first layer does not learn, the others do; after a resume, too."""
    monkeypatch.chdir(tmp_path)
    make_agent = p.make_agent
    first = {}
    frozen = set()

    def freezing(*args, **kwargs):
        agent = make_agent(*args, **kwargs)
        for name, parameter in list(agent.named_parameters())[:2]:
            parameter.requires_grad_(False)
            frozen.add(name)
        for name, tensor in agent.state_dict().items():
            first.setdefault(name, tensor.clone())
        return agent

    monkeypatch.setattr(p, "make_agent", freezing)
    monkeypatch.setattr(torch.optim, "Adam", optimizer)
    assert p.main([*FLAGS, "--total-timesteps", "32"]) == 0
    run = run_directory(tmp_path)
    assert p.main([*FLAGS, "--resume", str(run), "--total-timesteps", "48"]) == 0
    trained = torch.load(run / "agent.pt", weights_only=True)["weights"]
    assert len(frozen) == 2
    assert {name for name, tensor in trained.items() if torch.equal(tensor, first[name])} == frozen


def test_a_module_in_eval_mode_stays_in_it(tmp_path, monkeypatch):
    """A frozen BatchNorm counts nothing and normalizes by what it was given, in each update and
    after a resume, while the one beside it learns."""
    monkeypatch.chdir(tmp_path)
    modes = []

    class Seen(torch.nn.BatchNorm2d):
        def forward(self, x):
            if torch.is_grad_enabled():
                modes.append((self.frozen, self.training))
            return super().forward(x)

    def make_network():
        norms = [Seen(8), Seen(8)]
        for norm, frozen in zip(norms, (True, False)):
            norm.frozen = frozen
            norm.train(not frozen)
            norm.requires_grad_(not frozen)
            norm.running_mean.fill_(0.25)
        first = torch.nn.Conv2d(4, 8, 8, stride=4)
        return torch.nn.Sequential(first, *norms, torch.nn.Flatten())

    def make_agent(args, env):
        shape = env.observation_space.shape
        return p.Agent(shape, int(env.action_space.n), make_network)

    monkeypatch.setattr(p, "make_agent", make_agent)
    assert p.main([*FLAGS, "--total-timesteps", "32"]) == 0
    run = run_directory(tmp_path)
    assert p.main([*FLAGS, "--resume", str(run), "--total-timesteps", "48"]) == 0
    assert modes == [(True, False), (False, True)] * (3 * 4 * 4)
    trained = torch.load(run / "agent.pt", weights_only=True)["weights"]
    assert torch.equal(trained["network.1.running_mean"], torch.full((8,), 0.25))
    assert torch.equal(trained["network.1.weight"], torch.ones(8))
    assert trained["network.1.num_batches_tracked"] == 0
    assert not torch.equal(trained["network.2.running_mean"], torch.full((8,), 0.25))
    assert trained["network.2.num_batches_tracked"] == 3 * 4 * 4


WEIGHTS = torch.randint(1, 2**40, (4 * 36 * 36,), generator=torch.Generator().manual_seed(0))


def fingerprint(obs):
    """A number that no other observation has."""
    return (obs.flatten(1).long() * WEIGHTS).sum(1)


FIELDS = {
    '"reward": torch.zeros(size),': [
        '"mark": torch.zeros(size, dtype=torch.int64),',
        '"sides": torch.zeros(*size, 3),',
        '"small": torch.zeros(*size, 4, 18, 18, dtype=torch.uint8),',
    ],
    'for name in ("action", "log_prob", "value"):': [
        None,
        'for name in ("action", "log_prob", "value", "mark", "sides", "small"):',
    ],
}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_stored_of_each_step_reaches_the_loss_in_the_right_rows(
    workers, tmp_path, monkeypatch, watch, changed
):
    """A number, a vector and an image per step: a line where the buffers are made and one in the
    loop, each."""
    monkeypatch.chdir(tmp_path)
    module = changed(FIELDS)
    evaluate = module.Agent.get_action_and_value
    stored = []
    rows = []

    def outputs(self, obs, *args, **kwargs):
        result = evaluate(self, obs, *args, **kwargs)
        result["mark"] = fingerprint(obs)
        result["sides"] = torch.stack([obs[:, 3, :, i].float().mean(1) for i in (0, 17, 35)], 1)
        result["small"] = obs[:, :, ::2, ::2]
        return result

    def check(found):
        """That obs and what the agent said of it lie in the same place."""
        obs = found["obs"]
        assert torch.equal(found["mark"], fingerprint(obs))
        assert torch.equal(found["sides"][:, 1], obs[:, 3, :, 17].float().mean(1))
        assert torch.equal(found["small"], obs[:, :, ::2, ::2])

    def see_take(given):
        check(given["batch"])
        if len(rows) % 4 == 0:
            stored.append({name: tensor.clone() for name, tensor in given["batch"].items()})

    def see_loss(given):
        check(given["old"])
        assert given["old"]["small"].shape == (4, 4, 18, 18)
        assert given["old"]["sides"].shape == (4, 3)
        assert torch.equal(given["new"]["mark"], given["old"]["mark"])
        rows.append({name: tensor.clone() for name, tensor in given["old"].items()})

    monkeypatch.setattr(module.Agent, "get_action_and_value", outputs)
    watch(module, "take", before=see_take)
    watch(module, "ppo_loss", before=see_loss)
    flags = [*FLAGS, "--num-workers", str(workers), "--update-epochs", "1"]
    assert module.main([*flags, "--total-timesteps", "48"]) == 0
    assert len(stored) == 3
    assert len(rows) == 3 * 4
    for iteration, batch in enumerate(stored):
        assert len(batch["mark"].unique()) > 8  # else rows that are swapped would look the same
        parts = rows[4 * iteration :][:4]
        found = {name: torch.cat([part[name] for part in parts]) for name in batch}
        keys = [row_keys(tensors) for tensors in (batch, found)]
        where = [keys[1].index(key) for key in keys[0]]
        assert sorted(where) == list(range(16))
        for name, tensor in batch.items():  # each row of the rollout once, whole
            assert torch.equal(found[name][where], tensor), name


def row_keys(tensors):
    """What tells each row from all others."""
    return list(zip(*(tensors[name].tolist() for name in ("mark", "log_prob", "advantage"))))


def test_what_the_loss_returns_is_logged(tmp_path, monkeypatch):
    """A term that a user adds to the loss: under its name, as the mean over the minibatches."""
    monkeypatch.chdir(tmp_path)
    loss = p.ppo_loss
    values = []

    def longer(*args, **kwargs):
        result, stats = loss(*args, **kwargs)
        values.append(len(values) ** 2)
        return result, stats | {"own_term": (0 * result + values[-1]).mean()}

    monkeypatch.setattr(p, "ppo_loss", longer)
    assert p.main([*FLAGS, "--update-epochs", "1", "--total-timesteps", "32"]) == 0
    logged = curves(run_directory(tmp_path))["losses/own_term"]
    assert logged == [(16, (0 + 1 + 4 + 9) / 4), (32, (16 + 25 + 36 + 49) / 4)]


def small_training(*flags, device=CPU, dtype=torch.float32, make_agent=None):
    """What the update needs, with a batch of 16 random samples; the same weights and samples on
    every device."""
    args = p.parse_args([*FLAGS, "--learning-rate", "0.001", *flags])
    torch.manual_seed(0)
    env = p.make_env(args)
    agent = (make_agent or p.make_agent)(args, env)
    agent.dtype = dtype
    generator = torch.Generator().manual_seed(1)
    batch = {
        "obs": torch.randint(0, 256, (16, 4, 36, 36), dtype=torch.uint8, generator=generator),
        "action": torch.randint(0, 4, (16,), generator=generator),
        "advantage": torch.randn(16, generator=generator),
        "return_": torch.randn(16, generator=generator),
    }
    acting = copy.deepcopy(agent).eval()
    with torch.no_grad():
        outputs = acting.get_action_and_value(batch["obs"], batch["action"])
    for name in ("log_prob", "value"):
        batch[name] = outputs[name]
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    agent.to(device)
    optimizer = p.make_optimizer(args, agent)
    schedule = p.make_schedule(args, device)
    return SimpleNamespace(
        args=args, agent=agent, optimizer=optimizer, schedule=schedule, batch=batch
    )


def update_on(one, rows):
    """One update of a small_training on these rows of its batch."""
    minibatch = p.take(one.batch, torch.as_tensor(rows))
    return p.update(one.agent, one.optimizer, one.args, one.schedule, **minibatch)


def test_processes_average_the_gradients_of_what_learns(monkeypatch, watch):
    """In one message, without the frozen parameters, which have none: here as if the others'
    gradients were zero."""
    now = small_training()
    gradients = []
    messages = []

    def all_mean(tensor):
        messages.append(tensor)
        return tensor * 0.5

    def see(_):
        found = []
        for parameter in now.agent.parameters():
            found.append(None if parameter.grad is None else parameter.grad.clone())
        gradients.append(found)

    monkeypatch.setattr(p, "all_mean", all_mean)
    watch(p.nn.utils, "clip_grad_norm_", before=see)
    for world_size in (1, 2):
        now = small_training()
        next(now.agent.parameters()).requires_grad_(False)
        now.args.world_size = world_size
        update_on(now, range(8))
    alone, shared = gradients
    assert len(messages) == 1
    assert alone[0] is None
    assert shared[0] is None
    assert len(alone) == len(shared) > 2
    for mine, halved in zip(alone[1:], shared[1:]):
        assert mine.any()
        assert torch.equal(mine * 0.5, halved)


def test_the_schedule_alone_sets_the_learning_rate():
    """What is written to a group's rate is overwritten, and never counts in silence."""
    one = small_training()
    other = small_training()
    one.optimizer.param_groups[0]["lr"] = 1.0
    for each in (one, other):
        each.schedule["learning_rate"].fill_(0.0005)
        update_on(each, range(8))
    assert float(one.optimizer.param_groups[0]["lr"]) == pytest.approx(5e-4)
    for mine, theirs in zip(one.agent.parameters(), other.agent.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "number", [torch.tensor(3), torch.tensor(True), torch.tensor(0.5, dtype=torch.float64)]
)
def test_a_scalar_of_any_type_is_logged(number, monkeypatch):
    """A count or a truth value beside the losses: what is logged is their mean over the
    minibatches, for which they must be floats."""
    loss = p.ppo_loss

    def counting(*args, **kwargs):
        total, stats = loss(*args, **kwargs)
        return total, stats | {"mine": number}

    monkeypatch.setattr(p, "ppo_loss", counting)
    one = small_training()
    stats = [update_on(one, range(8)), update_on(one, range(8, 16))]
    means = p.mean_stats(stats)
    assert means["mine"] == float(number)
    entropies = [stat["entropy"].item() for stat in stats]
    assert means["entropy"] == pytest.approx(sum(entropies) / 2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_ratio_starts_at_1_up_to_rounding(precision, tmp_path, monkeypatch):
    """The acting copy computes with a few games at once, the update with the whole minibatch."""
    monkeypatch.chdir(tmp_path)
    flags = [*FLAGS, "--update-epochs", "1", "--num-minibatches", "1", "--total-timesteps", "16"]
    assert p.main([*flags, "--precision", precision]) == 0
    logged = {tag: curve[0][1] for tag, curve in curves(run_directory(tmp_path)).items()}
    assert abs(logged["losses/old_approx_kl"]) < (1e-6 if precision == "float32" else 1e-3)
    assert logged["losses/clipfrac"] == 0


class ThreeEnds(Toy):
    """An episode of three steps without reward that is terminated, truncated, or both; the last
    observation is white."""

    action_space = gym.spaces.Discrete(3)

    def __init__(self, terminates, truncates):
        self.terminates = terminates
        self.truncates = truncates

    def observe(self):
        return np.full((4, 36, 36), 255 * (self.t == 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        over = self.t == 3
        return self.observe(), 0.0, over and self.terminates, over and self.truncates, {}


@pytest.fixture
def three_ends(tmp_path, monkeypatch, watch):
    """Trains for one rollout in the three kinds of ThreeEnds, with a discount of 0.9. Returns a
    copy of the agent that acted and what was stored, [T, N], done and value [T + 1, N]."""
    monkeypatch.chdir(tmp_path)

    def three_ends(num_steps, num_groups, prepare=lambda agent: None):
        made = []
        make_agent = p.make_agent
        acted = []
        stored = {}

        def make_env(args, render_mode=None):
            """The first one is not played; then come the games, in their order."""
            made.append(ThreeEnds(terminates=len(made) != 2, truncates=len(made) >= 2))
            return as_make_env_does(made[-1])

        def prepared(args, env):
            agent = make_agent(args, env)
            prepare(agent)
            acted.append(copy.deepcopy(agent).eval())
            return agent

        def see_gae(given):
            stored["reward"] = given["rewards"].clone()
            stored["value"] = given["values"].clone()
            stored["done"] = given["dones"].clone()

        def see_take(given):
            for name in ("obs", "action", "log_prob"):
                stored[name] = given["batch"][name].unflatten(0, (num_steps, 3)).clone()

        monkeypatch.setattr(p, "make_env", make_env)
        monkeypatch.setattr(p, "make_agent", prepared)
        watch(p, "compute_gae", before=see_gae)
        watch(p, "take", before=see_take)
        flags = [*FLAGS, "--num-envs", 3, "--num-steps", num_steps, "--num-groups", num_groups]
        flags += ["--gamma", 0.9, "--total-timesteps", 3 * num_steps]
        flags += ["--num-minibatches", 1, "--update-epochs", 1]
        flags += ["--precision", "float32"]
        assert p.main([str(flag) for flag in flags]) == 0
        assert len(made) == 4
        (agent,) = acted
        return agent, stored

    return three_ends


def test_actions_are_drawn_from_the_policy(three_ends):
    """A policy that ignores its observation: as often as it says, in both environments,
    independently."""
    probs = torch.tensor([0.5, 0.3, 0.2])

    def prepare(agent):
        with torch.no_grad():
            agent.actor.weight.zero_()
            agent.actor.bias.copy_(probs.log())

    _, stored = three_ends(1000, 1, prepare)
    actions = stored["action"]
    torch.testing.assert_close(stored["log_prob"], probs.log()[actions])
    counts = torch.bincount((3 * actions[:, 0] + actions[:, 1]), minlength=9)
    expected = 1000 * torch.outer(probs, probs).flatten()
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    # 8 degrees of freedom: exceeded once in a thousand seeds, and these are fixed
    assert chi_squared < 26.1


@pytest.mark.parametrize("num_groups", [1, 2])
def test_truncation_is_bootstrapped_and_termination_is_not(num_groups, three_ends):
    """Whatever ends at the same moment in the same group; both at once is a termination."""

    def prepare(agent):
        torch.nn.init.constant_(agent.critic.bias, 0.5)  # else a black observation is worth 0

    agent, stored = three_ends(4, num_groups, prepare)
    ends = torch.zeros(2, 4, 36, 36, dtype=torch.uint8)
    ends[1] = 255
    with torch.no_grad():
        black, white = agent.get_action_and_value(ends)["value"]
    assert abs(white - black) > 0.01
    assert abs(black) > 0.01
    expected = torch.zeros(4, 3)
    expected[2, 1] = 0.9 * white
    torch.testing.assert_close(stored["reward"], expected)
    assert stored["done"].tolist() == [[float(t in (0, 3))] * 3 for t in range(5)]
    # The first observation of the next episode comes in the same step; no game shows its last one.
    assert not stored["obs"].any()
    torch.testing.assert_close(stored["value"], black.expand(5, 3))


class Diary(gym.Wrapper):
    """Writes down each step, and what the emulator says of it."""

    saved = ()

    def __init__(self, env):
        super().__init__(env)
        self.steps = []

    def step(self, action):
        result = self.env.step(action)
        obs, _, terminated, truncated, _ = result
        step = SimpleNamespace(obs=obs.copy(), terminated=terminated, truncated=truncated)
        step.raw_reward = self.get_wrapper_attr("raw_reward")
        step.game_over = self.unwrapped.ale.game_over(with_truncation=False)
        self.steps.append(step)
        return result


@pytest.mark.parametrize("limit", ["400 frames of a game", "40 steps of an episode"])
def test_real_games_are_bootstrapped_where_they_are_cut_and_only_there(
    limit, tmp_path, monkeypatch, watch
):
    """The reward that is learned from: its sign, and where a time limit ended the episode, the
    discounted value of what the game showed then. Nothing for a game or a life that was lost."""
    monkeypatch.chdir(tmp_path)
    diaries = []
    agents = []
    weights = []
    rollouts = []
    make_env = p.make_env

    class RawReward(p.MaxAndSkipEnv):
        def step(self, action):
            result = super().step(action)
            self.raw_reward = result[1]
            return result

    def with_diary(*args, **kwargs):
        env = make_env(*args, **kwargs)
        if limit == "40 steps of an episode":
            env = gym.wrappers.TimeLimit(env, 40)
        diaries.append(Diary(env))
        return diaries[-1]

    monkeypatch.setattr(p, "MaxAndSkipEnv", RawReward)
    monkeypatch.setattr(p, "make_env", with_diary)
    watch(p, "make_agent", after=lambda _, agent: agents.append(agent))
    watch(p, "anneal", before=lambda _: weights.append(copy.deepcopy(agents[0].state_dict())))
    watch(
        p,
        "compute_gae",
        before=lambda given: rollouts.append((given["rewards"].clone(), given["dones"].clone())),
    )
    flags = ["--env-id", "BreakoutNoFrameskip-v4", "--num-groups", "1"]
    kwargs = {"game": "breakout", "repeat_action_probability": 0.0}
    if limit == "400 frames of a game":
        flags = ["--env-id", "Test/Cut-v0", "--num-groups", "2"]
        kwargs["max_num_frames_per_episode"] = 400
    gym.register("Test/Cut-v0", "ale_py.env:AtariEnv", kwargs=kwargs)
    flags += ["--num-steps", "192", "--total-timesteps", "768", "--precision", "float32"]
    flags += ["--update-epochs", "1", "--learning-rate", "0.01", "--gamma", "0.75"]
    try:
        assert p.main([*FLAGS, *flags]) == 0
    finally:
        del gym.registry["Test/Cut-v0"]

    agent = copy.deepcopy(agents[0]).eval()
    kinds = {"cut": 0, "game over": 0, "life lost": 0}
    bootstraps = []
    for iteration, (rewards, dones) in enumerate(rollouts):
        agent.load_state_dict(weights[iteration])
        for i, diary in enumerate(diaries[1:]):  # the first one is not played
            for t, step in enumerate(diary.steps[192 * iteration :][:192]):
                expected = float(np.sign(step.raw_reward))
                if step.terminated:
                    kinds["game over" if step.game_over else "life lost"] += 1
                elif step.truncated:
                    kinds["cut"] += 1
                    with torch.no_grad():
                        final_obs = torch.from_numpy(step.obs)[None]
                        value = agent.get_action_and_value(final_obs)["value"].item()
                    bootstraps.append(0.75 * value)
                    expected += 0.75 * value
                tolerance = 1e-5 if step.truncated and not step.terminated else 0
                assert rewards[t, i].item() == pytest.approx(expected, abs=tolerance, rel=0)
                assert dones[t + 1, i].item() == (step.terminated or step.truncated)
    assert [len(diary.steps) for diary in diaries] == [0, 384, 384]
    assert kinds["cut"] >= 4, kinds
    assert kinds["life lost"] >= 4, kinds
    assert (kinds["game over"] > 0) == (limit == "40 steps of an episode"), kinds
    assert min(abs(bootstrap) for bootstrap in bootstraps) > 1e-3
    assert len(set(bootstraps)) > 3
