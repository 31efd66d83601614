"""Section 3: the network's shape, its first weights, and its distribution against NumPy in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ppo_atari import Agent, copy_weights, inference_copy, layer_init


@pytest.fixture
def obs():
    return torch.randint(0, 256, (6, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_parameter_count_by_hand():
    convolutions = (4 * 8 * 8 * 32 + 32) + (32 * 4 * 4 * 64 + 64) + (64 * 3 * 3 * 64 + 64)
    hidden = 64 * 7 * 7 * 512 + 512
    heads = (512 * 4 + 4) + (512 * 1 + 1)
    assert convolutions + hidden + heads == 1_686_693
    assert sum(parameter.numel() for parameter in Agent(4).parameters()) == 1_686_693
    separate = sum(parameter.numel() for parameter in Agent(4, shared_network=False).parameters())
    assert separate == 2 * (convolutions + hidden) + heads


@pytest.mark.parametrize(("size", "side"), [(36, 1), (44, 2), (84, 7), (100, 9)])
@pytest.mark.parametrize("stack", [1, 4])
def test_the_linear_layer_follows_the_frame_size(size, side, stack):
    agent = Agent(18, stack, size)
    assert agent.network[7].in_features == 64 * side * side
    action, log_prob, entropy, value = agent.get_action_and_value(torch.zeros(3, stack, size, size, dtype=torch.uint8))
    assert action.dtype == torch.int64
    assert action.shape == log_prob.shape == entropy.shape == value.shape == (3,)


@pytest.mark.parametrize("size", [28, 35, 80, 85])
def test_other_frame_sizes_are_refused(size):
    with pytest.raises(ValueError, match="8m"):
        Agent(4, frame_size=size)


@pytest.mark.parametrize("shared", [True, False])
def test_first_weights_are_orthogonal_and_biases_zero(shared):
    agent = Agent(4, shared_network=shared)
    gains = {agent.actor: 0.01, agent.critic: 1.0}
    layers = [module for module in agent.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == (6 if shared else 10)
    for layer in layers:
        weight = layer.weight.detach().double().flatten(1)
        gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        gain = gains.get(layer, math.sqrt(2))
        torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram), dtype=torch.float64), atol=1e-5, rtol=0)
        assert not layer.bias.any()
    assert layer_init(nn.Linear(3, 3), bias_const=2.5).bias.tolist() == [2.5] * 3


@pytest.mark.parametrize(("scaled", "divisor"), [(True, 255), (False, 1)])
def test_pixels_are_scaled_by_255(obs, scaled, divisor):
    """The first convolution's output is that of scaled pixels, and the gradient that of unscaled weights."""
    agent = Agent(4, scale_obs=scaled)
    conv = agent.network[0]
    seen = conv(obs.float())
    expected = F.conv2d(obs.double() / divisor, conv.weight.double(), conv.bias.double(), stride=4)
    torch.testing.assert_close(seen.double(), expected, rtol=1e-4, atol=1e-5 * 255 / divisor)
    (gradient,) = torch.autograd.grad(seen.square().mean(), conv.weight)
    (expected_gradient,) = torch.autograd.grad(expected.square().mean(), conv.weight)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5 * (255 / divisor) ** 2)


def trunk(network, obs):
    """The Nature-CNN, written out in float64."""
    x = obs.double() / 255
    for layer, stride in zip((network[0], network[2], network[4]), (4, 2, 1), strict=True):
        x = F.conv2d(x, layer.weight.double(), layer.bias.double(), stride=stride).clamp(min=0)
    x = torch.einsum("bchw,dhwc->bd", x, network[7].weight.double().view(512, *x.shape[2:], 64))
    return (x + network[7].bias.double()).clamp(min=0).numpy()


@pytest.mark.parametrize("shared", [True, False])
def test_log_prob_entropy_and_value_against_numpy(obs, shared):
    torch.manual_seed(1)
    agent = Agent(5, shared_network=shared)
    with torch.no_grad():
        agent.actor.weight.mul_(300)  # far from uniform
        action = torch.tensor([0, 1, 2, 3, 4, 0])
        got_action, log_prob, entropy, value = agent.get_action_and_value(obs, action)
        networks = [agent.network, agent.network if shared else agent.critic_network]
        policy_hidden, value_hidden = (trunk(network, obs) for network in networks)
    logits = policy_hidden @ agent.actor.weight.detach().double().numpy().T + agent.actor.bias.detach().double().numpy()
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    assert probs.max() > 0.5
    assert torch.equal(got_action, action)
    np.testing.assert_allclose(log_prob, np.log(probs[np.arange(6), action]), atol=1e-4)
    np.testing.assert_allclose(entropy, -(probs * np.log(probs)).sum(1), atol=1e-4)
    expected = (
        value_hidden @ agent.critic.weight.detach().double().numpy().T + agent.critic.bias.detach().double().numpy()
    )
    np.testing.assert_allclose(value, expected[:, 0], atol=1e-4)
    with torch.no_grad():
        assert torch.equal(agent.get_value(obs), value)


def test_samples_follow_the_policy(obs):
    torch.manual_seed(2)
    agent = Agent(4)
    with torch.no_grad():
        agent.actor.weight.zero_()
        agent.actor.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
        many = obs[:1].expand(2000, 4, 84, 84)
        for uniform in (None, torch.arange(2000) / 2000):
            action, log_prob, _, _ = agent.get_action_and_value(many, uniform=uniform)
            frequencies = torch.bincount(action, minlength=4) / 2000
            torch.testing.assert_close(frequencies, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.04, rtol=0)
            torch.testing.assert_close(log_prob.exp(), (action + 1) / 10)
        edges = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.99999994])
        assert agent.get_action_and_value(obs, uniform=edges)[0].tolist() == [0, 0, 1, 1, 2, 3]


def test_bfloat16_computes_the_same_function(obs):
    """Outputs within 2 % and gradients within 8 %, which is what 8 bits allow; the actor's kept weights agree."""
    torch.manual_seed(3)
    agent = Agent(4)
    gradients, outputs = [], []
    for dtype in (torch.float32, torch.bfloat16):
        agent.dtype = dtype
        agent.zero_grad()
        _, log_prob, entropy, value = agent.get_action_and_value(obs, torch.tensor([0, 1, 2, 3, 0, 1]))
        (log_prob * torch.arange(6) + 0.1 * entropy + value.square()).sum().backward()
        outputs.append(torch.stack([log_prob, entropy, value]).detach())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in agent.parameters()]))
    assert gradients[1].dtype == torch.float32
    torch.testing.assert_close(outputs[1], outputs[0], atol=0.02, rtol=0.02)
    assert (gradients[1] - gradients[0]).norm() < 0.08 * gradients[0].norm()
    actor = inference_copy(agent)
    assert actor.network[0].weight.dtype == torch.bfloat16 and actor.critic.weight.dtype == torch.float32
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.mul_(0.9)
    copy_weights(agent, actor)
    with torch.no_grad():
        action = torch.zeros(6, dtype=torch.int64)
        for learner, acting in zip(
            agent.get_action_and_value(obs, action), actor.get_action_and_value(obs, action), strict=True
        ):
            torch.testing.assert_close(learner, acting, atol=1e-6, rtol=1e-6)
