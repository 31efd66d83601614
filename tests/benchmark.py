"""Where the time goes, and how the script compares.

    python tests/benchmark.py                            tables of each part and of the whole loop
    python tests/benchmark.py --device cuda              the same, and --growth, on a GPU
    python tests/benchmark.py --scaling                  by --num-envs and --num-workers
    python tests/benchmark.py --growth --device cuda     by --num-envs, with and without CUDA graphs
    python tests/benchmark.py --against OTHER.py         another copy of the script, in turn

An older copy is made with `git show COMMIT:ppo_atari.py >OTHER.py`; --script measures a changed one
in place of this one.

The tables, in Markdown, are of the environments alone, the policy alone, the update alone, the
whole loop, the peak memory of all processes (proportional set size) and the time from the command
to the end of the first rollout, for each precision that the hardware has and, if installed, for
Stable-Baselines3 as tests/stable_baselines.py sets it up (pip install "stable-baselines3==2.9.2").
The variants take turns, and each figure is the median of the repeats. A whole loop's speed is the
median of its iterations from the third on. Rates are steps/s: one step is four emulator frames.
Takes about ten minutes.
"""

import argparse
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GAME = "BreakoutNoFrameskip-v4"
PARTS = ["policy alone", "update alone"]
LOOP = ["whole loop", "peak memory, MB", "first rollout after, s"]


# -------------------------------------------------------------------------------- parts, alone
def apart(function: Callable, *arguments: Any) -> Any:
    """Calls a function in a new process, which no other measurement has touched: with all its
    threads, without CUDA, and free to fork workers."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def load(script: str) -> ModuleType:
    """The script as a module, under the name that its own processes know it by."""
    spec = spec_from_file_location("ppo_atari", script)
    module = sys.modules["ppo_atari"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags_for(device: str, num_envs: int, *more: str) -> list[str]:
    cuda = "--cuda" if device == "cuda" else "--no-cuda"
    return ["--env-id", GAME, "--num-envs", str(num_envs), cuda, *more]


def rate(work: Callable, steps: int) -> float:
    """Steps per second of a function that does `steps` steps of work; its first call warms up."""
    work()
    started = time.perf_counter()
    work()
    return steps / (time.perf_counter() - started)


def precisions(script: str, device: str) -> list[str]:
    """float32 and, where the hardware has it, bfloat16."""
    p = load(script)
    args = p.parse_args(flags_for(device, 8))
    found = p.choose_dtype(args, p.choose_device(args))
    return ["float32", "bfloat16"] if "bfloat16" in str(found) else ["float32"]


def environments_alone(script: str, device: str, num_envs: int) -> float:
    """Random actions in place of a policy; a worker for each core, and groups as on this device."""
    import numpy as np
    import torch

    p = load(script)
    workers = str(len(os.sched_getaffinity(0)))
    args = p.parse_args(flags_for(device, num_envs, "--num-workers", workers))
    env = p.make_env(args)
    size = (num_envs, args.num_steps)
    actions = np.random.default_rng(1).integers(0, env.action_space.n, size)
    actions = torch.from_numpy(actions)

    def work() -> None:
        for _ in range(8):
            for t, group in envs.turns(args.num_steps):
                if t < args.num_steps:
                    envs.step(group, actions[group, t])

    with closing(p.ParallelEnvs(args, env.observation_space)) as envs:
        return rate(work, 8 * args.batch_size)


def stock_environment() -> Any:
    import ale_py
    import gymnasium as gym
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    gym.register_envs(ale_py)
    env = gym.make(GAME)
    env = AtariPreprocessing(env, noop_max=30, frame_skip=4, terminal_on_life_loss=True)
    return FrameStackObservation(env, 4)


def stock_environments_alone(num_envs: int) -> float:
    """The same with gymnasium's own wrappers, in a process for each environment."""
    import gymnasium as gym
    import numpy as np

    makers = [stock_environment] * num_envs
    actions = np.random.default_rng(1).integers(0, 4, (512, num_envs))

    def work() -> None:
        for action in actions:
            envs.step(action)

    with closing(gym.vector.AsyncVectorEnv(makers, autoreset_mode="SameStep")) as envs:
        envs.reset(seed=1)
        return rate(work, actions.size)


def network_alone(script: str, device: str, precision: str, num_envs: int) -> dict[str, float]:
    """The policy, called for one group of games at a time, and the update of a rollout; both as the
    training loop does it. The device's peak memory, too."""
    import torch

    p = load(script)
    args = p.parse_args(flags_for(device, num_envs, "--precision", precision))
    device = p.choose_device(args)
    env = p.make_env(args)
    agent = p.make_agent(args, env).to(device)
    agent.dtype = p.choose_dtype(args, device)
    optimizer = p.make_optimizer(args, agent)
    schedule = p.make_schedule(args, device)
    schedule["learning_rate"].fill_(1e-9)  # of noise, there is nothing to learn
    policy = p.inference_copy(agent, agent.dtype, device)
    act = policy.get_action_and_value
    update = partial(p.update, agent, optimizer, args, schedule)
    if args.use_gpu:
        act = p.CudaGraph(act)
        update = p.CudaGraph(update)

    shape = (num_envs, *env.observation_space.shape)
    rollout = p.make_rollout(
        args, SimpleNamespace(obs=torch.zeros(shape, dtype=torch.uint8)), device
    )
    rollout["obs"].random_(0, 256)
    rollout["action"].random_(0, int(env.action_space.n))
    rollout["value"].normal_()
    rollout["log_prob"].fill_(-1)
    batch = {name: tensor[:-1].flatten(0, 1).to(device) for name, tensor in rollout.items()}
    batch["advantage"] = torch.randn(args.batch_size, device=device)
    batch["return_"] = torch.randn(args.batch_size, device=device)
    group = num_envs // args.num_groups
    uniform = torch.rand(args.batch_size, device=device)

    def play() -> None:
        parts = zip(batch["obs"].split(group), uniform.split(group))
        with torch.no_grad(), p.one_thread():
            for obs, numbers in parts:
                act(obs=obs, uniform=numbers)

    def learn() -> None:
        for _ in range(args.update_epochs):
            shuffled = torch.randperm(args.batch_size).to(device)
            for rows in shuffled.split(args.minibatch_size):
                update(**p.take(batch, rows))

    play()  # a CUDA graph is captured at the fourth call
    learn()
    result = {
        "policy alone": rate(play, args.batch_size),
        "update alone": rate(learn, args.batch_size),
    }
    if args.use_gpu:
        result["device memory, MB"] = torch.cuda.max_memory_allocated() / 2**20
    return result


# ------------------------------------------------------------------------------ the whole loop
# Each program prints "clock", the steps of a rollout, and when it began and ended. anneal() and
# compute_gae() are what each version of the script calls once an iteration, before and after it.
THIS_SCRIPT = f"""
import sys
import time

sys.path.insert(0, {str(ROOT / "tests")!r})
import benchmark

p = benchmark.load(sys.argv[1])
anneal = p.anneal
compute_gae = p.compute_gae
began = None


def clocked_anneal(*arguments):
    global began
    began = time.monotonic()
    return anneal(*arguments)


def clocked_gae(rewards, *others):
    print("clock", rewards.numel(), began, time.monotonic(), flush=True)
    return compute_gae(rewards, *others)


p.anneal = clocked_anneal
p.compute_gae = clocked_gae
sys.exit(p.main(sys.argv[2:]))
"""

STABLE_BASELINES = f"""
import sys
import time

sys.path.insert(0, {str(ROOT / "tests")!r})
from stable_baselines import BATCH, BaseCallback, make_model


class Clock(BaseCallback):
    def _on_step(self):
        return True

    def _on_rollout_start(self):
        self.began = time.monotonic()

    def _on_rollout_end(self):
        print("clock", BATCH, self.began, time.monotonic(), flush=True)


device, iterations = sys.argv[1:]
make_model("{GAME}", 1, device).learn(BATCH * int(iterations), callback=Clock())
"""


def memory_of_tree(pid: int) -> float:
    """Proportional set size in MB of a process and all its descendants; 0 once it is gone."""
    kilobytes = 0
    todo = [pid]
    while todo:
        one = todo.pop()
        try:
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
            children = Path(f"/proc/{one}/task/{one}/children").read_text()
        except OSError:
            continue
        for line in rollup.splitlines():
            if line.startswith("Pss:"):
                kilobytes += int(line.split()[1])
        for child in children.split():
            todo.append(int(child))
    return kilobytes / 1024


class MemoryWatch(threading.Thread):
    """Notes the peak memory of a process and its descendants."""

    def __init__(self, process: subprocess.Popen):
        super().__init__()
        self.process = process
        self.peak = 0.0

    def run(self) -> None:
        while self.process.poll() is None:
            self.peak = max(self.peak, memory_of_tree(self.process.pid))
            time.sleep(0.5)


def whole_loop(code: str, arguments: list[str], memory: bool = False) -> dict[str, float]:
    """Runs a training program and reads its clock. The first two iterations do not count: memory
    is allocated in them, and a CUDA graph is captured."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        command = [sys.executable, "-c", code, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
        watch = MemoryWatch(process)
        if memory:
            watch.start()
        clock = []
        for line in process.stdout:
            if line.startswith("clock"):
                steps, began, ended = line.split()[1:]
                clock.append((int(steps), float(began), float(ended)))
        if process.wait() != 0:
            raise RuntimeError(f"exit code {process.returncode}: {shlex.join(arguments)}")
        if memory:
            watch.join()
    speeds = []
    rollouts = []
    rests = []
    counted = clock[2:]
    for (steps, began, ended), (_, next_began, _) in zip(counted, counted[1:]):
        speeds.append(steps / (next_began - began))
        rollouts.append(1000 * (ended - began))
        rests.append(1000 * (next_began - ended))
    return {
        "whole loop": statistics.median(speeds),
        "rollout, ms": statistics.median(rollouts),
        "rest, ms": statistics.median(rests),
        "peak memory, MB": watch.peak,
        "first rollout after, s": clock[0][2] - started,
    }


def train_flags(script: str, device: str, num_envs: int, iterations: int, *more: str) -> list[str]:
    total = str(iterations * num_envs * 128)
    lengths = ["--total-timesteps", total, "--eval-episodes", "0"]
    return [script, *flags_for(device, num_envs, *lengths, *more)]


# -------------------------------------------------------------------------------------- tables
def shown(figure: float | None) -> str:
    """Three digits or, of larger numbers, all of them."""
    if figure is None:
        return ""
    return f"{figure:,.3g}" if figure < 100 else f"{figure:,.0f}"


def table(title: str, columns: list[str], rows: dict[str, dict[str, float]]) -> None:
    print(f"\n| {title} | {' | '.join(columns)} |")
    print(f"|{' --- |' * (len(columns) + 1)}")
    for name, row in rows.items():
        cells = [shown(row.get(column)) for column in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def medians(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in results) for name in results[0]}


def compare_parts(script: str, device: str, repeats: int, iterations: int) -> None:
    """The tables of the README."""
    names = apart(precisions, script, device)
    programs = {}
    for name in names:
        flags = train_flags(script, device, 8, iterations, "--precision", name)
        programs[name] = (THIS_SCRIPT, flags)
    try:
        import stable_baselines3
    except ImportError:
        print("Stable-Baselines3 is not installed: no comparison (see this file's docstring)")
    else:
        name = f"Stable-Baselines3 {stable_baselines3.__version__}"
        programs[name] = (STABLE_BASELINES, [device, str(iterations)])

    environments = {"this stack, one worker per core": []}
    environments["gymnasium AsyncVectorEnv, stock wrappers"] = []
    ours, stock = environments.values()
    column = "8 environments alone"
    training = {name: [] for name in programs}
    for _ in range(repeats):
        ours.append({column: apart(environments_alone, script, device, 8)})
        stock.append({column: apart(stock_environments_alone, 8)})
        for name, (code, arguments) in programs.items():
            result = whole_loop(code, arguments, memory=True)
            if name in names:
                result |= apart(network_alone, script, device, name, 8)
            training[name].append(result)
    cores = len(os.sched_getaffinity(0))
    print(f"device {device}, {cores} cores, {GAME}, medians of {repeats}, steps/s")
    rows = {name: medians(results) for name, results in environments.items()}
    table("environment", [column], rows)
    rows = {name: medians(results) for name, results in training.items()}
    table("training", [*PARTS, *LOOP], rows)


def scaling(script: str, device: str, iterations: int) -> None:
    """How the whole loop grows with games and with workers."""
    rows = {}
    columns = []
    for workers in (0, 1, 2, 4):
        columns.append(f"{workers} workers")
    for num_envs in (8, 16, 32, 64):
        row = rows[f"{num_envs} environments"] = {}
        for column in columns:
            more = ["--num-workers", column.split()[0]]
            flags = train_flags(script, device, num_envs, iterations, *more)
            row[column] = whole_loop(THIS_SCRIPT, flags)["whole loop"]
    table("whole loop, steps/s", columns, rows)


def growth(script: str, device: str, iterations: int) -> None:
    """What a GPU is asked: how the parts and the whole loop grow with games."""
    rows = {}
    for num_envs in (8, 16, 64, 128):
        row = rows[f"{num_envs} environments"] = {}
        for name in ("graphs", "no graphs"):
            flag = "--cuda-graph" if name == "graphs" else "--no-cuda-graph"
            flags = train_flags(script, device, num_envs, iterations, flag)
            result = whole_loop(THIS_SCRIPT, flags)
            row[f"whole loop, {name}"] = result["whole loop"]
            row[f"rollout, ms, {name}"] = result["rollout, ms"]
        row["environments alone"] = apart(environments_alone, script, device, num_envs)
        row |= apart(network_alone, script, device, "auto", num_envs)
    table("steps/s", list(row), rows)


def compare_scripts(script: str, other: str, options: argparse.Namespace) -> None:
    """The whole loop of two scripts in pairs, one after the other, in changing order."""
    device = options.device
    for precision in apart(precisions, script, device):
        results = {script: [], other: []}
        order = [script, other]
        more = ["--precision", precision, *options.flags]
        for _ in range(options.repeats):
            for one in order:
                flags = train_flags(one, device, options.num_envs, options.iterations, *more)
                results[one].append(whole_loop(THIS_SCRIPT, flags))
            order.reverse()
        rows = {name: medians(some) for name, some in results.items()}
        table(f"{precision}, {device}", ["whole loop", "rollout, ms", "rest, ms"], rows)
        ratios = []
        for first, second in zip(results[script], results[other]):
            ratios.append(first["whole loop"] / second["whole loop"])
        each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"\nfirst to second, {precision}, pair by pair: {each}")
        print(f"median: {statistics.median(ratios):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=16, help="of each whole loop")
    parser.add_argument("--scaling", action="store_true", help="only by games and by workers")
    parser.add_argument("--growth", action="store_true", help="only what a GPU is asked")
    parser.add_argument("--script", type=Path, default=ROOT / "ppo_atari.py", metavar="FILE")
    parser.add_argument("--against", type=Path, metavar="FILE", help="another copy of the script")
    parser.add_argument("--num-envs", type=int, default=8, help="of both, with --against")
    text = "flags of both scripts, with --against: --flags='...'"
    parser.add_argument("--flags", type=shlex.split, default=[], help=text)
    options = parser.parse_args()
    if options.iterations < 4:
        parser.error("--iterations must be at least 4: the first two do not count")
    script = str(options.script.resolve())
    device = options.device
    if options.against is not None:
        compare_scripts(script, str(options.against.resolve()), options)
    elif options.scaling:
        scaling(script, device, options.iterations)
    elif options.growth:
        growth(script, device, options.iterations)
    else:
        compare_parts(script, device, options.repeats, options.iterations)
        if device == "cuda":
            growth(script, device, options.iterations)


if __name__ == "__main__":
    main()
