"""The GPU path. Where fakes of the CUDA calls can show it, on any machine; the rest needs a GPU:
pytest -m gpu."""

import gc
import os
import re
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launch import (
    SCRIPT,
    curves,
    differences,
    finish,
    here,
    run_directory,
    same_weights,
    start,
    weights,
)
from test_ppo import CPU, Groups, small_training
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ppo_atari as p

TINY = ["--env-id", "ALE/Breakout-v5", "--num-envs", "2", "--num-steps", "8", "--frame-size", "36",
        "--num-workers", "0", "--eval-episodes", "0", "--checkpoint-interval", "1",
        "--total-timesteps"]  # fmt: skip


@pytest.fixture
def two_gpus(monkeypatch):
    """Pretended calls of CUDA, as far as choosing a device makes them; the deterministic mode is
    put back."""
    calls = SimpleNamespace(device=None, deterministic=None)

    def set_device(device):
        calls.device = device

    def use_deterministic_algorithms(mode, warn_only):
        calls.deterministic = (mode, warn_only)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", use_deterministic_algorithms)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    precisions = [backend.fp32_precision for backend in backends]
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield calls
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    for backend, precision in zip(backends, precisions):
        backend.fp32_precision = precision
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize(("local_rank", "index"), [(0, 0), (1, 1), (2, 0), (5, 1)])
def test_each_rank_sets_its_own_device(local_rank, index, two_gpus, monkeypatch):
    """Also where a process sees fewer GPUs than there are local ranks, as under Slurm."""
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert p.choose_device(p.parse_args([])) == torch.device("cuda", index) == two_gpus.device
    assert p.choose_device(p.parse_args(["--no-cuda"])) == CPU


def test_float32_is_float32(two_gpus):
    """No TF32, neither in matrix products nor in cuDNN's convolutions, whose default it is."""
    p.choose_device(p.parse_args([]))
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"


@pytest.mark.parametrize("flag", [True, False])
def test_deterministic_algorithms_on_a_gpu_only(flag, two_gpus):
    p.choose_device(p.parse_args(["--no-cuda"]))
    assert two_gpus.deterministic is None
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    p.choose_device(p.parse_args(["--torch-deterministic" if flag else "--no-torch-deterministic"]))
    assert two_gpus.deterministic == ((True, True) if flag else None)
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == flag


@pytest.mark.parametrize(
    ("gpus", "fits"),
    [
        ([None, None], True),
        (["a", "b"], True),
        (["a", "a"], False),
        (["a", None], False),
        ([None, "b", "c"], False),
    ],
)
def test_a_gpu_for_each_process_or_for_none(gpus, fits, two_gpus, monkeypatch):
    """NCCL cannot connect two processes on one GPU, nor a GPU with a CPU: refused before the first
    message."""
    monkeypatch.setattr(p, "gather", lambda mine: [mine, *gpus[1:]])
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=gpus[0])
    )
    args = p.parse_args([])
    args.world_size = len(gpus)
    refused = pytest.raises(p.UserError, match="a GPU of its own.*--no-cuda")
    with nullcontext() if fits else refused:
        p.join_processes(args, torch.device("cuda" if gpus[0] else "cpu"))


def test_a_gpu_that_another_process_keeps_for_itself(two_gpus, monkeypatch):
    """PyTorch's own sentence on one line, and how to do without."""

    def busy(device):
        raise RuntimeError(
            "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nand much more"
        )

    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(p.UserError, match="--no-cuda.*busy or unavailable$"):
        p.choose_device(p.parse_args([]))


def test_machine_flags_may_change_on_resume(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert here(capfd, *TINY, 32)[0] == 0
    run = run_directory(tmp_path)
    flags = ["--no-cuda", "--no-cuda-graph", "--no-torch-deterministic", "--num-workers", 1]
    code, _, error = here(capfd, "--resume", run, "--total-timesteps", 48, *flags)
    assert code == 0, error
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 3


def test_a_gpu_that_is_too_small(tmp_path, monkeypatch, capfd):
    """PyTorch's own error, which says what it could not allocate; the last checkpoint is kept."""
    monkeypatch.chdir(tmp_path)
    calls = []
    update = p.update

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return update(*args, **kwargs)

    monkeypatch.setattr(p, "update", full)
    with pytest.raises(torch.OutOfMemoryError, match="2.00 GiB"):
        here(capfd, *TINY, 64)
    run = run_directory(tmp_path)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 1


# ------------------------------------------------------------------------- CUDA graphs, pretended


class PretendedGraph(TorchDispatchMode):
    """What a CUDA graph is: the kernels of the captured code with the addresses and numbers that
    they had then, again and again. As there, capturing computes nothing that lasts, and nothing can
    be read from the device meanwhile."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.overwritten = []  # tensors that the kernels write to, with what they held before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "local_scalar_dense" in str(func):
            raise RuntimeError("operation not permitted when stream is capturing\nand much more")
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(given[argument.name]):
                    self.overwritten.append((tensor, tensor.detach().clone()))
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def undo(self):
        for tensor, old in reversed(self.overwritten):
            tensor.copy_(old)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Where there is no GPU, its graphs on the CPU. Returns those that were captured."""
    graphs = []
    to = torch.Tensor.to

    @contextmanager
    def capture(graph, stream):
        drawn = torch.get_rng_state()
        try:
            with graph:
                yield
        finally:
            graph.undo()
            torch.set_rng_state(drawn)
        graphs.append(graph)

    def copy_to(tensor, *args, **kwargs):
        """What comes from a GPU is a copy, which the next replay does not change."""
        result = to(tensor, *args, **kwargs)
        return result.clone() if kwargs.get("non_blocking") else result

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.Tensor, "to", copy_to)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return graphs


def with_dropout(args, env):
    def make_network():
        return torch.nn.Sequential(p.nature_cnn(4, args.frame_size, True), torch.nn.Dropout(0.5))

    return p.Agent(env.observation_space.shape, int(env.action_space.n), make_network)


def updates(one, graphed, times):
    """The stats of some updates of a small_training, each with other rows and another schedule."""
    update = partial(p.update, one.agent, one.optimizer, one.args, one.schedule)
    if graphed:
        update = p.CudaGraph(update)
    torch.manual_seed(1)  # for a network with Dropout
    stats = []
    for i in range(times):
        one.schedule["learning_rate"].fill_(1e-3 / (i + 1))
        one.schedule["ent_coef"].fill_(0.1 * i)
        start = 4 * (i % 3)
        rows = torch.arange(start, start + 8, device=one.batch["obs"].device)
        stats.append(update(**p.take(one.batch, rows)))
    return stats


def assert_same_training(one, other):
    """Weights and the optimizer's moments, bit for bit."""
    assert same_weights(one.agent.state_dict(), other.agent.state_dict())
    assert not differences(one.optimizer.state_dict(), other.optimizer.state_dict())


@pytest.mark.parametrize("make_agent", [p.make_agent, with_dropout], ids=["plain", "Dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_of_the_update_changes_nothing(make_agent, dtype, pretended_gpu):
    """The same stats, weights and moments as without one, bit for bit, with a learning rate and an
    entropy coefficient that change between. Three calls are real, the fourth is captured and then
    replayed."""
    eager = small_training(dtype=dtype, make_agent=make_agent)
    graphed = small_training(dtype=dtype, make_agent=make_agent)
    assert not differences(updates(eager, False, 3), updates(graphed, True, 3))
    assert not pretended_gpu
    assert_same_training(eager, graphed)
    # From an optimizer that has made steps, as after a resume.
    stats = updates(graphed, True, 6)
    assert not differences(updates(eager, False, 6), stats)
    assert len({stat["entropy"].item() for stat in stats}) == 6
    assert_same_training(eager, graphed)
    (graph,) = pretended_gpu
    assert len(graph.calls) > 100


def test_a_graph_of_the_policy_changes_nothing(pretended_gpu):
    """Other observations, other random numbers, and weights that are loaded between."""
    one = small_training()
    policy = p.inference_copy(one.agent, torch.float32, CPU)
    act = p.CudaGraph(policy.get_action_and_value)
    results = []
    with torch.no_grad():
        for i in range(8):
            for parameter in one.agent.parameters():
                parameter.mul_(1.05)
            policy.load_state_dict(one.agent.state_dict())
            inputs = {
                "obs": one.batch["obs"][2 * i : 2 * i + 2],
                "uniform": torch.tensor([0.1 * i, 1 - 0.1 * i]),
            }
            results.append(act(**inputs))
            assert not differences(results[-1], policy.get_action_and_value(**inputs))
            assert len(pretended_gpu) == (i >= 3)
    values = torch.cat([result["value"] for result in results])
    assert len(values.unique()) == 16  # no result was overwritten by a later one


def test_what_cannot_be_captured_goes_on_without(pretended_gpu, monkeypatch, capfd):
    """A loss that reads a number from the device: one line says so, once, and no step is lost."""
    ppo_loss = p.ppo_loss
    eager = small_training()
    graphed = small_training()
    expected = updates(eager, False, 6)

    def reading(*args, **kwargs):
        loss, stats = ppo_loss(*args, **kwargs)
        return loss * (1 if loss.item() < 1e9 else 0), stats

    monkeypatch.setattr(p, "ppo_loss", reading)
    assert not differences(expected, updates(graphed, True, 6))
    assert_same_training(eager, graphed)
    assert not pretended_gpu
    error = capfd.readouterr().err
    assert re.fullmatch(r"ppo_atari.py: going on without a CUDA graph: .*capturing\n", error)


def test_an_error_of_the_function_itself_is_not_hidden(pretended_gpu, capfd):
    """In the first calls, before anything is captured, it is the user's to see."""

    def broken(x):
        raise RuntimeError("the joystick is broken")

    with pytest.raises(RuntimeError, match="the joystick is broken"):
        p.CudaGraph(broken)(x=torch.zeros(1))
    assert capfd.readouterr().err == ""


def test_a_graph_ends_with_its_owner(pretended_gpu):
    """At once: a collection could come in a process that was forked meanwhile, which would destroy
    a graph of a GPU that it lacks."""
    ends = []
    one = small_training()
    update = p.CudaGraph(partial(p.update, one.agent, one.optimizer, one.args, one.schedule))
    for _ in range(5):
        update(**p.take(one.batch, torch.arange(8)))
    pretended_gpu.clear()
    weakref.finalize(update, ends.append, "update")
    weakref.finalize(update.graph, ends.append, "graph")
    gc.disable()
    try:
        del update
        assert sorted(ends) == ["graph", "update"]
    finally:
        gc.enable()


@pytest.mark.parametrize("is_cuda", [True, False])
@pytest.mark.parametrize("capturing", [True, False])
def test_capturable_only_while_a_graph_is_captured(is_cuda, capturing, monkeypatch, watch):
    """Adam asks for it there, and warns at every step elsewhere; what a checkpoint says of it, of
    the other kind of machine, does not count."""
    ppo_loss = p.ppo_loss
    seen = []

    def on_a_gpu(*args, **kwargs):
        loss, stats = ppo_loss(*args, **kwargs)
        return SimpleNamespace(backward=loss.backward, is_cuda=is_cuda), stats

    def step(optimizer):
        seen.append(optimizer.param_groups[0]["capturable"])

    one = small_training()
    monkeypatch.setattr(p, "ppo_loss", on_a_gpu)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    for before in (True, False):
        state = one.optimizer.state_dict()
        state["param_groups"][0]["capturable"] = before
        one.optimizer.load_state_dict(state)
        p.update(one.agent, one.optimizer, one.args, one.schedule, **one.batch)
    assert seen == [is_cuda and capturing] * 2


GRAPHED = {
    'if device.type == "cuda" and args.cuda_graph:': [None, "if args.cuda_graph:"],
}


def test_the_training_loop_with_graphs(tmp_path, monkeypatch, pretended_gpu, changed):
    """The whole program with a pretended graph of the policy and one of the update: weights, games
    and curves are those of a run without, bit for bit; so are those of a run in two pieces."""
    module = changed(GRAPHED)
    runs = {}
    flags = [*TINY, "64", "--no-anneal-lr"]
    pieces = {
        "eager": [[*flags, "--no-cuda-graph"]],
        "graphed": [flags],
        "cut": [[*TINY, "32", "--no-anneal-lr"], ["--total-timesteps", "64"]],
    }
    for name, calls in pieces.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        pretended_gpu.clear()
        for i, argv in enumerate(calls):
            if i > 0:
                argv = [*argv, "--resume", str(run_directory(tmp_path / name))]
            assert module.main(argv) == 0
        assert len(pretended_gpu) == {"eager": 0, "graphed": 2, "cut": 4}[name]
        runs[name] = run_directory(tmp_path / name)
    for name in ("graphed", "cut"):
        assert same_weights(weights(runs[name]), weights(runs["eager"]))
        assert curves(runs[name]) == curves(runs["eager"])


# --------------------------------------------------------------------------------- on a real GPU


def updated(device, graphed, dtype=torch.float32):
    """The stats and weights after some updates, on the CPU."""
    one = small_training(device=device, dtype=dtype)
    stats = []
    for stat in updates(one, graphed, 6):
        stats.append(torch.stack([stat[name].cpu() for name in sorted(stat)]))
    flat = torch.cat([tensor.detach().flatten().cpu() for tensor in one.agent.parameters()])
    return torch.stack(stats), flat


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, Groups])
def test_graph_against_eager_and_the_cpu(optimizer, monkeypatch):
    """The same updates, to rounding: as a graph, launch by launch, and on the CPU; then bfloat16,
    more loosely."""
    monkeypatch.setattr(torch.optim, "Adam", optimizer)
    device = p.choose_device(p.parse_args([]))
    graph = updated(device, True)
    torch.testing.assert_close(graph, updated(device, False), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(graph, updated(CPU, False), rtol=1e-2, atol=1e-3)
    assert graph[0][0][0].abs() < 1e-6  # approx_kl of the first update: the ratio starts at 1
    low = updated(device, True, dtype=torch.bfloat16)
    torch.testing.assert_close(low[0], graph[0], rtol=0.1, atol=0.05)


@pytest.mark.gpu
def test_policy_graph_against_eager_and_the_cpu():
    """The same actions and values, with weights that are loaded between."""
    device = p.choose_device(p.parse_args([]))
    one = small_training()
    policies = [p.inference_copy(one.agent, torch.float32, where) for where in (device, CPU)]
    act = p.CudaGraph(policies[0].get_action_and_value)
    with torch.no_grad():
        for i in range(8):
            for parameter in one.agent.parameters():
                parameter.mul_(1.05)
            for policy in policies:
                policy.load_state_dict(one.agent.state_dict())
            obs = one.batch["obs"][2 * i : 2 * i + 2]
            uniform = torch.tensor([0.1 * i, 1 - 0.1 * i])
            results = [
                act(obs=obs.to(device), uniform=uniform.to(device)),
                policies[0].get_action_and_value(obs.to(device), uniform=uniform.to(device)),
                policies[1].get_action_and_value(obs, uniform=uniform),
            ]
            graph, eager, cpu = [
                torch.stack([result["value"].cpu(), result["log_prob"].cpu()]) for result in results
            ]
            torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(graph, cpu, rtol=1e-2, atol=1e-3)
            assert results[0]["action"].tolist() == results[1]["action"].tolist()
            assert results[0]["action"].device == CPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu_the_ratio_starts_at_1_up_to_rounding(precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--update-epochs", "1", "--num-minibatches", "1", "--precision", precision]
    assert p.main([*TINY, "16", *flags]) == 0
    logged = {tag: curve[0][1] for tag, curve in curves(run_directory(tmp_path)).items()}
    assert abs(logged["losses/old_approx_kl"]) < (1e-5 if precision == "float32" else 5e-3)
    assert logged["losses/clipfrac"] == 0


@pytest.mark.gpu
def test_float32_is_float32_on_a_gpu():
    """A convolution against float64 on the CPU: TF32 would be off by some 3e-4."""
    device = p.choose_device(p.parse_args([]))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 64, 21, 21, generator=generator)
    weight = torch.randn(64, 64, 3, 3, generator=generator)
    expected = torch.nn.functional.conv2d(images.double(), weight.double())
    got = torch.nn.functional.conv2d(images.to(device), weight.to(device)).cpu().double()
    assert (got - expected).norm() < 5e-5 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("make_agent", [p.make_agent, with_dropout])
def test_graph_after_a_resume_and_checkpoints_on_both_devices(
    make_agent, tmp_path, monkeypatch, capfd
):
    """A run that changes its device goes on; with the same device it ends bit-identical, graph and
    Dropout included, for any number of workers, forked or spawned."""
    monkeypatch.setattr(p, "make_agent", make_agent)
    ends = {}
    ways = {
        "whole": [()],
        "workers": [("--num-workers", 2)],
        "cut": [(), ("--num-workers", 1)],
        "other": [("--seed", 2)],
        "moved": [("--no-cuda",), ("--cuda",), ("--no-cuda",)],
    }
    for name, pieces in ways.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run = None
        for i, flags in enumerate(pieces):
            steps = 96 if i == len(pieces) - 1 else 32 * (i + 1)
            first = [*TINY, steps, "--no-anneal-lr"]
            if i > 0:
                first = ["--resume", run, "--total-timesteps", steps]
            with monkeypatch.context() as patch:
                if i > 0:
                    patch.setattr(p, "START_METHOD", "spawn")
                code, _, error = here(capfd, *first, *flags)
            assert code == 0, error
            assert not error, error
            run = run_directory(tmp_path / name)
        ends[name] = weights(run)
    assert same_weights(ends["whole"], ends["cut"])
    assert same_weights(ends["whole"], ends["workers"])
    assert not same_weights(ends["whole"], ends["other"])
    assert all(tensor.isfinite().all() for tensor in ends["moved"].values())


@pytest.mark.gpu
def test_a_whole_run_learns_as_the_cpu_does(tmp_path):
    """20 000 steps without a warning; the curves of both devices tell the same story."""
    stories = []
    for device in ("--cuda", "--no-cuda"):
        folder = tmp_path / device
        folder.mkdir()
        flags = ["--env-id", "BreakoutNoFrameskip-v4", "--total-timesteps", "20480"]
        process = start(*flags, "--eval-episodes", "0", device, cwd=folder)
        assert finish(process) == 0, (folder / "log").read_text()
        assert "arn" not in (folder / "log").read_text()
        found = curves(run_directory(folder))
        assert found["losses/approx_kl"][0][1] < 0.01
        assert found["losses/clipfrac"][0][1] < 0.3
        story = []
        for name in ("entropy", "value_loss"):
            story.append(np.mean([value for _, value in found[f"losses/{name}"][-10:]]))
        stories.append(story)
    np.testing.assert_allclose(stories[0], stories[1], rtol=0.3, atol=0.05)


@pytest.mark.gpu
def test_ranks_on_the_gpus_there_are(tmp_path):
    """Two ranks; on one GPU, which NCCL cannot, they are refused before anything is written."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT)
    code = finish(start(*TINY, 64, cwd=tmp_path, program=torchrun))
    log = (tmp_path / "log").read_text()
    if torch.cuda.device_count() < 2:
        assert code
        assert "ppo_atari.py: error: each process needs a GPU of its own" in log, log
        assert not (tmp_path / "runs").exists()
    else:
        assert code == 0, log
        checkpoint = torch.load(run_directory(tmp_path) / "checkpoint.pt", weights_only=True)
        assert len(checkpoint["ranks"]) == 2
