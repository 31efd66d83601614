"""Section 3: the network's shape and first weights; its distribution against NumPy in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ppo_atari import CPU, Agent, inference_copy, layer_init, make_agent, make_env, parse_args

NAMES = ("action", "log_prob", "entropy", "value")


def agent_for(*flags: str) -> Agent:
    """The agent of these flags, in eval mode. The default game, Breakout, has 4 actions."""
    args = parse_args([*flags])
    return make_agent(args, make_env(args)).eval()


@pytest.fixture
def obs():
    return torch.randint(
        0, 256, (6, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_parameter_count_by_hand():
    convolutions = (4 * 8 * 8 * 32 + 32) + (32 * 4 * 4 * 64 + 64) + (64 * 3 * 3 * 64 + 64)
    hidden = 64 * 7 * 7 * 512 + 512
    heads = (512 * 4 + 4) + (512 * 1 + 1)
    assert convolutions + hidden + heads == 1_686_693
    assert sum(parameter.numel() for parameter in agent_for().parameters()) == 1_686_693
    separate = sum(parameter.numel() for parameter in agent_for("--no-shared-network").parameters())
    assert separate == 2 * (convolutions + hidden) + heads


@pytest.mark.parametrize(("size", "side"), [(36, 1), (44, 2), (84, 7), (100, 9)])
@pytest.mark.parametrize("stack", [1, 4])
def test_the_linear_layer_follows_the_frame_size(size, side, stack):
    agent = agent_for("--frame-size", str(size), "--frame-stack", str(stack), "--full-action-space")
    assert agent.network[7].in_features == 64 * side * side and agent.actor.out_features == 18
    outputs = agent.get_action_and_value(torch.zeros(3, stack, size, size, dtype=torch.uint8))
    assert outputs["action"].dtype == torch.int64
    assert [outputs[name].shape for name in NAMES] == [(3,)] * 4


@pytest.mark.parametrize("shared", [True, False])
def test_first_weights_are_orthogonal_and_biases_zero(shared):
    agent = agent_for() if shared else agent_for("--no-shared-network")
    gains = {agent.actor: 0.01, agent.critic: 1.0}
    layers = [module for module in agent.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == (6 if shared else 10)
    for layer in layers:
        weight = layer.weight.detach().double().flatten(1)
        gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        gain = gains.get(layer, math.sqrt(2))
        torch.testing.assert_close(
            gram, gain**2 * torch.eye(len(gram), dtype=torch.float64), atol=1e-5, rtol=0
        )
        assert not layer.bias.any()
    assert layer_init(nn.Linear(3, 3), bias_const=2.5).bias.tolist() == [2.5] * 3


@pytest.mark.parametrize(("scaled", "divisor"), [(True, 255), (False, 1)])
def test_pixels_are_scaled_by_255(obs, scaled, divisor):
    """The first convolution's output is that of scaled pixels, and so is its weights' gradient."""
    conv = agent_for("--scale-obs" if scaled else "--no-scale-obs").network[0]
    seen = conv(obs.float())
    expected = F.conv2d(obs.double() / divisor, conv.weight.double(), conv.bias.double(), stride=4)
    torch.testing.assert_close(seen.double(), expected, rtol=1e-4, atol=1e-5 * 255 / divisor)
    (gradient,) = torch.autograd.grad(seen.square().mean(), conv.weight)
    (expected_gradient,) = torch.autograd.grad(expected.square().mean(), conv.weight)
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=1e-3, atol=1e-5 * (255 / divisor) ** 2
    )


def trunk(network, obs):
    """The Nature-CNN, written out in float64."""
    x = obs.double() / 255
    for layer, stride in zip((network[0], network[2], network[4]), (4, 2, 1), strict=True):
        x = F.conv2d(x, layer.weight.double(), layer.bias.double(), stride=stride).clamp(min=0)
    x = torch.einsum("bchw,dhwc->bd", x, network[7].weight.double().view(512, *x.shape[2:], 64))
    return (x + network[7].bias.double()).clamp(min=0).numpy()


def linear(layer, hidden):
    return hidden @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()


@pytest.mark.parametrize("shared", [True, False])
def test_log_prob_entropy_and_value_against_numpy(obs, shared):
    torch.manual_seed(1)
    agent = agent_for(
        "--env-id", "ALE/Pong-v5", "--shared-network" if shared else "--no-shared-network"
    )
    with torch.no_grad():
        agent.actor.weight.mul_(600)  # far from uniform
        action = torch.tensor([0, 1, 2, 3, 4, 5])
        outputs = agent.get_action_and_value(obs, action)
        got_action, log_prob, entropy, value = (outputs[name] for name in NAMES)
        policy_hidden = trunk(agent.network, obs)
        value_hidden = policy_hidden if shared else trunk(agent.critic_network, obs)
    logits = linear(agent.actor, policy_hidden)
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    assert probs.shape == (6, 6) and probs.max() > 0.5
    assert torch.equal(got_action, action)
    np.testing.assert_allclose(log_prob, np.log(probs[np.arange(6), action]), atol=1e-4)
    np.testing.assert_allclose(entropy, -(probs * np.log(probs)).sum(1), atol=1e-4)
    np.testing.assert_allclose(value, linear(agent.critic, value_hidden)[:, 0], atol=1e-4)
    with torch.no_grad():
        assert torch.equal(agent.get_action_and_value(obs)["value"], value)


def test_samples_follow_the_policy(obs):
    torch.manual_seed(2)
    agent = agent_for()
    with torch.no_grad():
        agent.actor.weight.zero_()
        agent.actor.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
        many = obs[:1].expand(2000, 4, 84, 84)
        for uniform in (None, torch.arange(2000) / 2000):
            outputs = agent.get_action_and_value(many, uniform=uniform)
            frequencies = torch.bincount(outputs["action"], minlength=4) / 2000
            torch.testing.assert_close(
                frequencies, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.04, rtol=0
            )
            torch.testing.assert_close(outputs["log_prob"].exp(), (outputs["action"] + 1) / 10)
        edges = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.99999994])
        actions = agent.get_action_and_value(obs, uniform=edges)["action"]
        assert actions.tolist() == [0, 0, 1, 1, 2, 3]


def assert_same_outputs(
    first: Agent, second: Agent, obs: torch.Tensor, tolerance: float = 1e-6
) -> None:
    action = torch.arange(len(obs)) % 4
    with torch.no_grad():
        one, two = (agent.get_action_and_value(obs, action) for agent in (first, second))
    assert one.keys() == two.keys() and one.keys() >= set(NAMES)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=tolerance, rtol=tolerance)


def test_bfloat16_computes_the_same_function(obs):
    """Outputs within 2 % and gradients within 8 %, which is what 8 bits allow; so does the copy
    whose weights are kept in bfloat16."""
    torch.manual_seed(3)
    agent = agent_for()
    gradients = []
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        agent.dtype = dtype
        agent.zero_grad()
        new = agent.get_action_and_value(obs, torch.tensor([0, 1, 2, 3, 0, 1]))
        log_prob, entropy, value = new["log_prob"], new["entropy"], new["value"]
        (log_prob * torch.arange(6) + 0.1 * entropy + value.square()).sum().backward()
        outputs.append(torch.stack([log_prob, entropy, value]).detach())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in agent.parameters()]))
    assert gradients[1].dtype == torch.float32
    torch.testing.assert_close(outputs[1], outputs[0], atol=0.02, rtol=0.02)
    assert (gradients[1] - gradients[0]).norm() < 0.08 * gradients[0].norm()
    actor = inference_copy(agent, torch.bfloat16, CPU)
    assert actor.network[0].weight.dtype == torch.bfloat16
    assert actor.critic.weight.dtype == torch.float32
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.mul_(0.9)
    actor.load_state_dict(agent.state_dict())
    assert_same_outputs(agent, actor, obs)


@pytest.mark.parametrize("shared", [True, False])
def test_the_float32_copy_computes_the_same(obs, shared):
    """Its matrices lie in another order; what is copied to it afterwards arrives in its place."""
    torch.manual_seed(4)
    agent = agent_for("--shared-network" if shared else "--no-shared-network")
    actor = inference_copy(agent, torch.float32, CPU)
    assert_same_outputs(agent, actor, obs, 1e-5)
    assert not any(parameter.requires_grad for parameter in actor.parameters())
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    actor.load_state_dict(agent.state_dict())
    for mine, copied in zip(agent.parameters(), actor.parameters(), strict=True):
        assert torch.equal(mine, copied)
    assert_same_outputs(agent, actor, obs, 1e-4)


def recipe(*layers: nn.Module, width: int = 256):
    """What a user may write for Agent's make_network: pixels [B, 4, 84, 84] to [B, width]."""
    body = nn.Sequential(
        nn.Conv2d(4, 8, 8, stride=8), nn.ReLU(), *layers, nn.Flatten(), nn.Linear(800, width)
    )
    return lambda: body


def own_agent(make_network, shared: bool = True) -> Agent:
    return Agent(
        obs_shape=(4, 84, 84), num_actions=4, make_network=make_network, shared_network=shared
    )


@pytest.mark.parametrize("width", [1, 256, 513])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_follow_a_network_of_any_width(obs, width, shared, dtype):
    torch.manual_seed(5)
    networks = [recipe(width=width)() for _ in range(1 if shared else 2)]
    made = iter(networks)
    agent = own_agent(lambda: next(made), shared)
    assert agent.actor.in_features == agent.critic.in_features == width and agent.training
    assert (agent.critic_network is None) == shared
    with torch.no_grad():
        outputs = agent.get_action_and_value(obs, torch.zeros(6, dtype=torch.int64))
        hidden = [network(obs.float()) for network in networks]
        logits = hidden[0] @ agent.actor.weight.T + agent.actor.bias
        torch.testing.assert_close(outputs["log_prob"], logits.log_softmax(-1)[:, 0])
        torch.testing.assert_close(
            outputs["value"], (hidden[-1] @ agent.critic.weight.T + agent.critic.bias)[:, 0]
        )
    actor = inference_copy(agent, dtype, CPU)
    agent.dtype = dtype
    assert_same_outputs(agent, actor, obs, 1e-4 if dtype == torch.float32 else 0.02)


def test_asking_for_the_width_leaves_no_trace():
    """Neither in torch's generator (Dropout) nor in the buffers of the network (BatchNorm)."""
    plain = recipe()()
    network = recipe(nn.Dropout(0.5), nn.BatchNorm2d(8))()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    drawn = []
    for each in (plain, network):
        torch.manual_seed(6)
        own_agent(lambda network=each: network)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_reach_the_acting_copy(obs, dtype):
    """The running statistics of a BatchNorm, which training changes and no optimizer knows."""
    torch.manual_seed(7)
    agent = own_agent(recipe(nn.BatchNorm2d(8)))
    actor = inference_copy(agent, dtype, CPU)
    for _ in range(20):
        agent.get_action_and_value(obs)  # in train mode: the statistics follow these pixels
    actor.load_state_dict(agent.state_dict())
    name = "network.2.running_var"
    assert agent.state_dict()[name].max() > 100
    for key, tensor in agent.state_dict().items():
        torch.testing.assert_close(
            actor.state_dict()[key].float(), tensor.float(), rtol=0.01, atol=1e-2
        )
    assert actor.state_dict()["network.2.num_batches_tracked"] == 20
    agent.eval()
    agent.dtype = dtype
    assert_same_outputs(agent, actor, obs, 1e-4 if dtype == torch.float32 else 0.05)


def test_a_copy_of_another_agent_is_refused():
    with pytest.raises((ValueError, RuntimeError)):
        own_agent(recipe(nn.BatchNorm2d(8))).load_state_dict(own_agent(recipe()).state_dict())


def test_the_acting_copy_drops_nothing(obs):
    """Dropout is for learning: the copy acts alike each time and draws nothing from torch."""
    torch.manual_seed(8)
    agent = own_agent(recipe(nn.Dropout(0.5)))
    actor = inference_copy(agent, torch.float32, CPU)
    uniform = torch.rand(6)
    with torch.no_grad():
        first, second = (
            agent.get_action_and_value(obs, uniform=uniform)["value"] for _ in range(2)
        )
        assert agent.training and not torch.equal(first, second)
        before = torch.get_rng_state()
        first, second = (
            actor.get_action_and_value(obs, uniform=uniform)["value"] for _ in range(2)
        )
        assert torch.equal(first, second) and torch.equal(before, torch.get_rng_state())
    agent.eval()
    assert_same_outputs(agent, actor, obs, 1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_a_module_that_the_user_keeps_in_eval_mode_stays_in_it(obs, shared):
    """A frozen BatchNorm, say, deep in the network: its statistics are not of these pixels. All
    other modules learn."""

    def make_network():
        frozen = nn.Sequential(nn.BatchNorm2d(8), nn.Dropout(0.5)).eval()
        return recipe(frozen, nn.BatchNorm2d(8))()

    agent = own_agent(make_network, shared)
    networks = [agent.network] if shared else [agent.network, agent.critic_network]
    frozen = [module for network in networks for module in network[2].modules()]
    assert len(frozen) == 3 * len(networks)
    assert all(module.training == (module not in frozen) for module in agent.modules())
    agent.get_action_and_value(obs)
    policy = inference_copy(agent, torch.float32, CPU)
    assert not any(module.training for module in policy.modules())
    assert all(module.training == (module not in frozen) for module in agent.modules())
    for network in networks:
        assert network[2][0].num_batches_tracked == 0
        assert network[3].num_batches_tracked == 1
