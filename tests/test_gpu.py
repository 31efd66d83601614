"""The GPU path. Where fakes of the CUDA calls can show it, on any machine; the rest needs a GPU: pytest -m gpu."""

import gc
import os
import random
import warnings
import weakref
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launch import SCRIPT, curves, finish, here, run_directory, same_weights, start, weights

import ppo_atari as p

TINY = ["--env-id", "ALE/Breakout-v5", "--num-envs", "2", "--num-steps", "8", "--frame-size", "36",
        "--num-workers", "0", "--eval-episodes", "0", "--checkpoint-interval", "1", "--total-timesteps"]  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def two_gpus(monkeypatch):
    """Pretended calls of CUDA, as far as choosing a device makes them; the deterministic mode is put back."""
    calls = SimpleNamespace(device=None, deterministic=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(calls, "device", device))
    monkeypatch.setattr(
        torch,
        "use_deterministic_algorithms",
        lambda mode, warn_only: setattr(calls, "deterministic", (mode, warn_only)),
    )
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends], torch.utils.deterministic.fill_uninitialized_memory
    yield calls
    for backend, precision in zip(backends, before[0]):
        backend.fp32_precision = precision
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize(("local_rank", "index"), [(0, 0), (1, 1), (2, 0), (5, 1)])
def test_each_rank_sets_its_own_device(local_rank, index, two_gpus, monkeypatch):
    """Also where a process sees fewer GPUs than there are local ranks, as under Slurm."""
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert p.choose_device(p.parse_args([])) == torch.device("cuda", index) == two_gpus.device
    assert p.choose_device(p.parse_args(["--no-cuda"])) == CPU


def test_float32_is_float32(two_gpus):
    """No TF32, neither in matrix products nor in cuDNN's convolutions, whose default it is."""
    p.choose_device(p.parse_args([]))
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"


@pytest.mark.parametrize("flag", [True, False])
def test_deterministic_algorithms_on_a_gpu_only(flag, two_gpus, monkeypatch):
    p.choose_device(p.parse_args(["--no-cuda"]))
    assert two_gpus.deterministic is None and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    p.choose_device(p.parse_args(["--torch-deterministic" if flag else "--no-torch-deterministic"]))
    assert two_gpus.deterministic == ((True, True) if flag else None)
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == flag
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def test_a_driver_that_is_too_old(monkeypatch, capfd):
    """PyTorch's own sentence on one line, and the CPU."""

    def unavailable():
        warnings.warn("CUDA initialization: The NVIDIA driver\n on your system is too old", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        monkeypatch.setattr(warnings, "showwarning", lambda *w, **k: print(warnings.formatwarning(*w[:4]), end=""))
        assert p.choose_device(p.parse_args([])) == CPU
    assert capfd.readouterr().out == "ppo_atari.py: CUDA initialization: The NVIDIA driver on your system is too old\n"


@pytest.mark.parametrize("result", [0, 712])
def test_page_locking_is_checked_and_undone(result, monkeypatch):
    """What was locked is unlocked in the end, and only that; where locking fails, the run goes on."""
    locked, unlocked = [], []
    cudart = SimpleNamespace(
        cudaHostRegister=lambda pointer, size, flags: locked.append((pointer, size)) or result,
        cudaHostUnregister=unlocked.append,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    storage = {"obs": torch.zeros(3, 4, dtype=torch.uint8), "reward": torch.zeros(5)}
    with ExitStack() as stack:
        p.lock_pages(storage, stack)
        assert locked == [(storage["obs"].data_ptr(), 12), (storage["reward"].data_ptr(), 20)] and not unlocked
    assert sorted(unlocked) == (sorted(pointer for pointer, _ in locked) if result == 0 else [])


@contextmanager
def pretended_graph(monkeypatch, capture, replayed=lambda: None):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda s: ExitStack(),
        "CUDAGraph": lambda: SimpleNamespace(replay=replayed), "graph": capture, "synchronize": lambda: None,
        "get_rng_state": lambda: torch.zeros(1), "set_rng_state": lambda state: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    yield


def a_learner(*flags, device=CPU, dtype=torch.float32):
    """A learner with a batch of 16 random samples, the same on every device."""
    args = p.parse_args([*TINY, "16", *flags])
    torch.manual_seed(0)
    env = p.make_env(args)
    learner = p.Learner(args, p.make_agent(args, env), device, dtype)
    storage = p.allocate(args, env)
    generator = torch.Generator().manual_seed(1)
    storage["obs"].random_(0, 256, generator=generator)
    storage["action"].random_(0, env.action_space.n, generator=generator)
    storage["reward"].normal_(generator=generator)
    flat = {name: tensor.flatten(0, 1).to(device) for name, tensor in storage.items()}
    with torch.no_grad():
        outputs = learner.agent.get_action_and_value(flat["obs"], flat["action"])
    for name in ("log_prob", "value"):  # as fill() does on a GPU
        storage[name].copy_(outputs[name].view(storage[name].shape))
    advantages, returns = torch.randn(2, 8, 2, generator=generator)
    learner.fill(storage, advantage=advantages, return_=returns)
    return learner


@pytest.mark.parametrize("where", ["warming up", "capture", "first replay"])
def test_a_graph_that_fails_is_done_without(where, monkeypatch, capfd):
    """One line, the same weights as without a graph, and the run goes on."""
    eager, graphed = a_learner(), a_learner()

    def fail(*args):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand much more")

    @contextmanager
    def capture(graph):
        yield fail() if where == "capture" else None

    calls, step = [], p.update

    def failing(*args, **kwargs):
        calls.append(1)
        return fail() if where == "warming up" and len(calls) == 2 else step(*args, **kwargs)

    with pretended_graph(monkeypatch, capture, fail if where == "first replay" else lambda: None):
        graphed.graphed = True
        monkeypatch.setattr(p, "update", failing)
        rows = torch.arange(4)
        got = graphed.update(rows)
        monkeypatch.setattr(p, "update", step)
    expected = eager.update(rows)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    assert same_weights(graphed.agent.state_dict(), eager.agent.state_dict())
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "without a CUDA graph" in error and "not permitted" in error


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(()), np.random.rand, random.random], ids=["torch", "NumPy", "Python"]
)
def test_an_update_that_the_cpu_draws_in_is_no_graph(draw, monkeypatch):
    """A graph would do for ever what the first numbers said. Without one, it may draw."""
    update = p.update

    def drawing(agent, optimizer, batch, args, knobs, rows):
        return update(agent, optimizer, batch, args, knobs, rows[: 2 + (draw() < 0.5)])

    monkeypatch.setattr(p, "update", drawing)
    eager, graphed = a_learner(), a_learner()
    graphed.graphed = True
    assert eager.update(torch.arange(4))
    with pretended_graph(monkeypatch, lambda graph: ExitStack()), pytest.raises(p.RunError, match="--no-cuda-graph"):
        graphed.update(torch.arange(4))


def test_a_graph_ends_with_its_learner(monkeypatch):
    """At once: a collection could come in a process forked meanwhile, which would destroy a graph of a GPU it lacks."""
    ends, learner = [], a_learner()
    learner.graphed = True
    with pretended_graph(monkeypatch, lambda graph: ExitStack()):
        learner.update(torch.arange(4))
    weakref.finalize(learner, ends.append, "learner")
    weakref.finalize(learner.step, ends.append, "graph")
    gc.disable()
    try:
        del learner
        assert sorted(ends) == ["graph", "learner"]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("gpus", "fits"),
    [([None, None], True), (["a", "b"], True), (["a", "a"], False), (["a", None], False), ([None, "b", "c"], False)],
)
def test_a_gpu_for_each_process_or_for_none(gpus, fits, two_gpus, monkeypatch):
    """NCCL cannot connect two processes on one GPU, nor a GPU with a CPU: refused before the first message."""
    monkeypatch.setattr(p, "gather", lambda mine: [mine, *gpus[1:]])
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=gpus[0]))
    args = p.parse_args([])
    args.world_size = len(gpus)
    with (
        ExitStack() as stack,
        ExitStack() if fits else pytest.raises(p.UsageError, match="a GPU of its own.*--no-cuda"),
    ):
        p.join_processes(args, torch.device("cuda" if gpus[0] else "cpu"), stack)


def test_a_gpu_that_another_process_keeps_for_itself(two_gpus, monkeypatch):
    def busy(device):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nand much more")

    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(p.UsageError, match="--no-cuda.*busy or unavailable"):
        p.choose_device(p.parse_args([]))


@pytest.mark.parametrize("graphed", [True, False])
def test_capturable_only_with_a_graph(graphed):
    """Without one it warns at every step; and a checkpoint of the other kind of machine does not change it."""
    learner, other = a_learner(), a_learner()
    learner.graphed, other.graphed = graphed, not graphed
    other.settle(other.optimizer)
    learner.optimizer.load_state_dict(other.optimizer.state_dict())
    (group,) = learner.optimizer.param_groups
    assert group["capturable"] == graphed
    assert group["lr"].device == CPU and float(group["lr"]) == pytest.approx(2.5e-4)


def test_machine_flags_may_change_on_resume(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert here(capfd, *TINY, 32)[0] == 0
    run = run_directory(tmp_path)
    flags = ["--no-cuda", "--no-cuda-graph", "--no-torch-deterministic", "--num-workers", 1]
    code, _, error = here(capfd, "--resume", run, "--total-timesteps", 48, *flags)
    assert code == 0, error
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == 3


def test_a_gpu_that_is_too_small(tmp_path, monkeypatch, capfd):
    """One line that names the flags to lower, exit code 1, and the last checkpoint is kept."""
    monkeypatch.chdir(tmp_path)
    calls, update = [], p.update

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return update(*args, **kwargs)

    monkeypatch.setattr(p, "update", full)
    code, _, error = here(capfd, *TINY, 64)
    assert code == 1 and error.count("\n") == 1 and "--num-envs" in error
    assert torch.load(run_directory(tmp_path) / "checkpoint.pt", weights_only=True)["iteration"] == 1


# ------------------------------------------------------------------------------------------------ on a real GPU


def updated(learner, times=3):
    """The stats and weights after some updates, on the CPU."""
    stats = []
    for i in range(times):
        step = learner.update(torch.arange(4 * i, 4 * i + 4, device=learner.device))
        stats.append(torch.stack([step[name] for name in sorted(step)]).cpu())
    flat = torch.cat([tensor.detach().flatten().cpu() for tensor in learner.agent.parameters()])
    return torch.stack(stats), flat


@pytest.mark.gpu
def test_graph_against_eager_and_the_cpu():
    """The same updates, to rounding: as a graph, launch by launch, and on the CPU; then bfloat16, more loosely."""
    device = torch.device("cuda")
    graph, eager, cpu = (
        updated(a_learner("--cuda-graph", device=device)), updated(a_learner("--no-cuda-graph", device=device)),
        updated(a_learner()),
    )  # fmt: skip
    torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(graph, cpu, rtol=1e-2, atol=1e-3)
    assert graph[0][0][0].abs() < 1e-6  # the ratio starts at 1: no KL divergence in the first update
    low = updated(a_learner("--cuda-graph", device=device, dtype=torch.bfloat16))
    torch.testing.assert_close(low[0], graph[0], rtol=0.1, atol=0.05)


@pytest.mark.gpu
def test_float32_is_float32_on_a_gpu():
    """A convolution against float64 on the CPU: TF32 would be off by some 3e-4."""
    device = p.choose_device(p.parse_args([]))
    generator = torch.Generator().manual_seed(1)
    images, weight = (torch.randn(shape, generator=generator) for shape in ((8, 64, 21, 21), (64, 64, 3, 3)))
    expected = torch.nn.functional.conv2d(images.double(), weight.double())
    got = torch.nn.functional.conv2d(images.to(device), weight.to(device)).cpu().double()
    assert (got - expected).norm() < 5e-5 * expected.norm()


def with_dropout(args, env):
    def make_network():
        return torch.nn.Sequential(p.nature_cnn(4, args.frame_size, True), torch.nn.Dropout(0.5))

    return p.Agent(env.observation_space.shape, int(env.action_space.n), make_network)


@pytest.mark.gpu
@pytest.mark.parametrize("make_agent", [p.make_agent, with_dropout])
def test_graph_after_a_resume_and_checkpoints_on_both_devices(make_agent, tmp_path, monkeypatch, capfd):
    """A run that changes its device goes on; with the same device it ends bit-identical, graph and Dropout included."""
    monkeypatch.setattr(p, "make_agent", make_agent)
    ends, ways = {}, {
        "whole": [()], "cut": [(), ("--num-workers", 1, "--start-method", "spawn")], "other": [("--seed", 2)],
        "moved": [("--no-cuda",), ("--cuda",), ("--no-cuda",)],
    }  # fmt: skip
    for name, pieces in ways.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run = None
        for i, flags in enumerate(pieces):
            steps = 96 if i == len(pieces) - 1 else 32 * (i + 1)
            first = [*TINY, steps, "--no-anneal-lr"] if i == 0 else ["--resume", run, "--total-timesteps", steps]
            code, _, error = here(capfd, *first, *flags)
            assert code == 0 and not error, error
            run = run_directory(tmp_path / name)
        ends[name] = weights(run)
    assert same_weights(ends["whole"], ends["cut"]) and not same_weights(ends["whole"], ends["other"])
    assert all(tensor.isfinite().all() for tensor in ends["moved"].values())


@pytest.mark.gpu
def test_a_whole_run_learns_as_the_cpu_does(tmp_path):
    """20 000 steps without a warning; the curves of both devices tell the same story."""
    stories = []
    for device in ("--cuda", "--no-cuda"):
        folder = tmp_path / device
        folder.mkdir()
        flags = ["--env-id", "BreakoutNoFrameskip-v4", "--total-timesteps", "20480", "--eval-episodes", "0", device]
        assert finish(start(*flags, cwd=folder)) == 0, (folder / "log").read_text()
        assert "arn" not in (folder / "log").read_text()
        found = curves(run_directory(folder))
        assert found["losses/approx_kl"][0][1] < 0.01 and found["losses/clipfrac"][0][1] < 0.3
        stories.append([np.mean([v for _, v in found[f"losses/{name}"][-10:]]) for name in ("entropy", "value_loss")])
    np.testing.assert_allclose(stories[0], stories[1], rtol=0.3, atol=0.05)


@pytest.mark.gpu
def test_ranks_on_the_gpus_there_are(tmp_path):
    """Two ranks; on one GPU, which NCCL cannot, they are refused before anything is written."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT)
    code, log = finish(start(*TINY, 64, cwd=tmp_path, program=torchrun)), (tmp_path / "log").read_text()
    if torch.cuda.device_count() < 2:
        assert code and "ppo_atari.py: error: each process needs a GPU of its own" in log, log
        assert not (tmp_path / "runs").exists()
    else:
        assert code == 0, log
        assert len(torch.load(run_directory(tmp_path) / "checkpoint.pt", weights_only=True)["ranks"]) == 2
