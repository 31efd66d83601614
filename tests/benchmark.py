"""Where the time goes, and how this script compares: python tests/benchmark.py [--device cuda] [--repeats 3]

Prints tables in Markdown: environments alone, inference alone, update alone, the whole loop, peak memory of all
processes (proportional set size) and the time from the command to the end of the first rollout. It does so for each
precision and, if installed, for Stable-Baselines3 as tests/stable_baselines.py sets it up (pip install
"stable-baselines3==2.9.2"). The variants take turns, and each figure is the median of the repeats. With
--scaling, it prints instead how the whole loop grows with --num-envs and --num-workers. Rates are steps/s: one step is
four emulator frames. --script measures another copy of ppo_atari.py, a changed one, say. Takes about ten minutes.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GAME = "BreakoutNoFrameskip-v4"


def rate(work, steps: int, warm_up: int = 1) -> float:
    """Steps per second of a function that does `steps` steps of work."""
    for _ in range(warm_up):
        work()
    started = time.perf_counter()
    work()
    return steps / (time.perf_counter() - started)


# Each program gets the script's path first and imports the script as p, under whatever name it has.
IMPORT = """
import sys, time
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("ppo_atari", sys.argv.pop(1))
p = sys.modules["ppo_atari"] = module_from_spec(spec)
spec.loader.exec_module(p)
"""

ENVIRONMENTS = f"""{IMPORT}
import numpy as np
n = int(sys.argv[1])
args = p.parse_args(["--env-id", "{GAME}"])
envs = p.gym.vector.SyncVectorEnv([lambda: p.make_env(args)] * n, copy=False, autoreset_mode="SameStep")
envs.reset(seed=1)
actions = np.random.default_rng(1).integers(0, 4, (1500, n))
print("ready", flush=True)
input()
for a in actions[:500]:
    envs.step(a)
started = time.perf_counter()
for a in actions[500:]:
    envs.step(a)
print(1000 * n / (time.perf_counter() - started))
"""


def environment_alone(kind: str, script: str) -> float:
    """8 environments, random actions: the script's stack, a process per core, or gymnasium's own stack in eight."""
    if kind == "stock":
        import ale_py
        import gymnasium as gym
        import numpy as np
        from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

        gym.register_envs(ale_py)

        def stock():
            env = AtariPreprocessing(gym.make(GAME), noop_max=30, frame_skip=4, terminal_on_life_loss=True)
            return FrameStackObservation(env, 4)

        envs = gym.vector.AsyncVectorEnv([stock] * 8, autoreset_mode="SameStep")
        envs.reset(seed=1)
        actions = np.random.default_rng(1).integers(0, 4, (500, 8))
        result = rate(lambda: [envs.step(a) for a in actions], 4000)
        envs.close()
        return result
    processes = min(8, len(os.sched_getaffinity(0)))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", ENVIRONMENTS, script, str(8 // processes)]
    workers = [subprocess.Popen(command, **pipes) for _ in range(processes)]
    for worker in workers:
        worker.stdout.readline()
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    return sum(float(worker.communicate()[0]) for worker in workers)


def network_alone(p: Any, device_name: str, precision: str, num_envs: int = 8) -> dict[str, float]:
    """Inference in batches of 4 on one thread, and the update of a rollout on all. p: the script's module."""
    import torch

    cpu, device = torch.device("cpu"), torch.device(device_name)
    cuda = "--cuda" if device_name == "cuda" else "--no-cuda"
    flags = ["--env-id", GAME, "--precision", precision, "--num-workers", "0", "--num-envs", str(num_envs), cuda]
    args = p.parse_args(flags)
    env = p.make_env(args)
    agent, storage = p.make_agent(args, env), p.allocate(args, env)
    actor = p.inference_copy(agent, p.choose_dtype(args, cpu))
    storage["obs"].random_(0, 256)
    storage["action"].random_(0, int(env.action_space.n))
    for name in ("reward", "log_prob", "value"):
        storage[name].normal_()
    obs, threads = storage["obs"][:-1].flatten(0, 1)[:512], torch.get_num_threads()
    uniform = torch.rand(len(obs))
    torch.set_num_threads(1)
    with torch.inference_mode():
        inference = rate(lambda: p.act(actor, obs, uniform, 4), len(obs))
    torch.set_num_threads(threads)

    learner = p.Learner(args, agent, p.choose_device(args), p.choose_dtype(args, device))
    learner.knobs["learning_rate"].fill_(1e-9)
    noise = torch.randn(2, args.num_steps, args.num_envs)
    learner.fill(storage, advantage=noise[0], return_=noise[1])

    def update() -> None:
        for _ in range(args.update_epochs):
            for rows in torch.randperm(args.batch_size).to(device).split(args.minibatch_size):
                learner.update(rows)
        if learner.on_gpu:
            torch.cuda.synchronize()

    return {"inference alone": inference, "update alone": rate(update, args.batch_size)}


STABLE_BASELINES = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
from stable_baselines import BaseCallback, make_model
class Clock(BaseCallback):
    def _on_step(self): return True
    def _on_rollout_end(self): print("clock", self.num_timesteps, time.time(), flush=True)
make_model("{GAME}", 1, "DEVICE").learn(1024 * ITERATIONS, callback=Clock())
"""

THIS_SCRIPT = f"""{IMPORT}
steps, rollout = 0, p.Workers.rollout
def clocked(self):
    global steps
    result = rollout(self)
    steps += self.shares[-1][1] * 128
    print("clock", steps, time.time(), flush=True)
    return result
p.Workers.rollout = clocked
sys.exit(p.main(sys.argv[1:]))
"""


def memory_of_tree(pid: int) -> float:
    """Proportional set size in MB of a process and all its descendants; 0 once it is gone."""
    total, todo = 0.0, [pid]
    while todo:
        one = todo.pop()
        try:
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
            todo += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except (OSError, StopIteration):
            pass
    return total


def whole_loop(code: str, arguments: list[str]) -> dict[str, float]:
    """Runs a training program and reads its clock: the rate between the ends of the 2nd and the last rollout."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        command = [sys.executable, "-c", code, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
        peak = [0.0]

        def watch() -> None:
            while process.poll() is None:
                peak[0] = max(peak[0], memory_of_tree(process.pid))
                time.sleep(0.5)

        watcher = threading.Thread(target=watch)
        watcher.start()
        clock = [line.split()[1:] for line in process.stdout if line.startswith("clock")]
        watcher.join()
    times = [(int(steps), float(at)) for steps, at in clock]
    speed = (times[-1][0] - times[1][0]) / (times[-1][1] - times[1][1])
    return {"whole loop": speed, "peak memory, MB": peak[0], "first rollout after, s": times[0][1] - started}


def train_flags(script: str, iterations: int, device: str, num_envs: int = 8, *more: str) -> list[str]:
    total = iterations * num_envs * 128
    flags = [script, "--env-id", GAME, "--num-envs", str(num_envs), "--total-timesteps", str(total)]
    return [*flags, "--eval-episodes", "0", "--cuda" if device == "cuda" else "--no-cuda", *more]


def table(title: str, columns: list[str], rows: dict[str, dict[str, float]]) -> None:
    print(f"\n| {title} | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name, row in rows.items():
        print(
            f"| {name} | {' | '.join(f'{row[c]:,.3g}' if row.get(c, 0) < 100 else f'{row[c]:,.0f}' for c in columns)} |"
        )


def scaling(script: str, device: str) -> None:
    rows: dict[str, dict[str, float]] = {}
    for num_envs in (8, 16, 32, 64):
        for workers in (0, 1, 2, 4):
            result = whole_loop(THIS_SCRIPT, train_flags(script, 6, device, num_envs, "--num-workers", str(workers)))
            rows.setdefault(f"{num_envs} environments", {})[f"{workers} workers"] = result["whole loop"]
    table("whole loop, steps/s", [f"{workers} workers" for workers in (0, 1, 2, 4)], rows)


def alone(p: Any, device_name: str, num_envs: int, on_device: bool) -> dict[str, float]:
    """Rollouts by the script's workers, or (on_device) by gymnasium's AsyncVectorEnv with the policy on the device."""
    import gymnasium as gym
    import torch

    device = torch.device(device_name)
    cuda = "--cuda" if device_name == "cuda" else "--no-cuda"
    args = p.parse_args(["--env-id", GAME, "--num-envs", str(num_envs), cuda])
    env = p.make_env(args)
    agent, T = p.make_agent(args, env), args.num_steps
    steps = num_envs * T
    if not on_device:
        actor = p.inference_copy(agent, p.choose_dtype(args, torch.device("cpu")))
        workers = p.Workers(args, actor, p.allocate(args, env, actor))
        speed = rate(workers.rollout, steps)
        workers.close()
        return {"rollout alone": speed}
    envs = gym.vector.AsyncVectorEnv([lambda: p.make_env(args)] * num_envs, autoreset_mode="SameStep")
    obs, _ = envs.reset(seed=1)
    agent = p.inference_copy(agent, p.choose_dtype(args, device)).to(device)
    storage = torch.zeros((T, *obs.shape), dtype=torch.uint8, device=device)

    @torch.inference_mode()
    def rollout() -> None:
        nonlocal obs
        for t in range(T):
            storage[t].copy_(torch.from_numpy(obs))
            outputs = agent.get_action_and_value(storage[t])
            obs, *_ = envs.step(outputs["action"].cpu().numpy())

    speed = rate(rollout, steps)
    envs.close()
    return {"rollout, policy on the device": speed}


def growth(p: Any, script: str, device: str, iterations: int) -> None:
    """What a GPU is asked: by number of environments, the whole loop with and without the graph, the rollout alone with
    the policy on the CPU and on the device, and the device's memory."""
    import torch

    rows: dict[str, dict[str, float]] = {}
    for num_envs in (8, 16, 64, 128):
        row = rows.setdefault(f"{num_envs} environments", {})
        for name, flag in (("whole loop, graph", "--cuda-graph"), ("whole loop, no graph", "--no-cuda-graph")):
            row[name] = whole_loop(THIS_SCRIPT, train_flags(script, iterations, device, num_envs, flag))["whole loop"]
        row |= alone(p, device, num_envs, False)
    for num_envs in (8, 16, 64, 128):
        row = rows[f"{num_envs} environments"]
        row |= alone(p, device, num_envs, True)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row |= network_alone(p, device, "auto", num_envs)
        row["device memory, MB"] = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
    columns = ["whole loop, graph", "whole loop, no graph", "update alone", "rollout alone"]
    table("steps/s", [*columns, "rollout, policy on the device", "device memory, MB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=16, help="of each whole loop")
    parser.add_argument("--scaling", action="store_true", help="only the whole loop, by --num-envs and --num-workers")
    parser.add_argument("--growth", action="store_true", help="only what a GPU is asked; part of --device cuda")
    parser.add_argument("--script", default=str(ROOT / "ppo_atari.py"), help="the copy of ppo_atari.py to measure")
    options = parser.parse_args()
    device, iterations, script = options.device, options.iterations, str(Path(options.script).resolve())
    if options.scaling:
        return scaling(script, device)

    precisions = ("float32", "bfloat16")
    variants = {
        name: (THIS_SCRIPT, train_flags(script, iterations, device, 8, "--precision", name)) for name in precisions
    }
    spec = spec_from_file_location("ppo_atari", script)
    module = sys.modules["ppo_atari"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    if options.growth or device == "cuda":  # first: it forks workers, and this process has not touched the GPU yet
        growth(module, script, device, iterations)
    if options.growth:
        return
    try:
        import stable_baselines3

        code = STABLE_BASELINES.replace("DEVICE", device).replace("ITERATIONS", str(iterations))
        variants[f"Stable-Baselines3 {stable_baselines3.__version__}"] = (code, [])
    except ImportError:
        print("Stable-Baselines3 is not installed: no comparison (see this file's docstring)")

    results: dict[str, dict[str, list[float]]] = {}

    def note(name: str, figures: dict[str, float]) -> None:
        for figure, value in figures.items():
            results.setdefault(name, {}).setdefault(figure, []).append(value)

    for _ in range(options.repeats):
        note("this stack", {"8 environments alone": environment_alone("ours", script)})
        note("gymnasium AsyncVectorEnv, stock wrappers", {"8 environments alone": environment_alone("stock", script)})
        for precision in precisions:
            note(precision, network_alone(module, device, precision))
        for name, (code, arguments) in variants.items():
            note(name, whole_loop(code, arguments))

    medians = {name: {k: statistics.median(v) for k, v in row.items()} for name, row in results.items()}
    print(f"device {device}, {len(os.sched_getaffinity(0))} cores, {GAME}, medians of {options.repeats}, steps/s")
    environments = ["this stack", "gymnasium AsyncVectorEnv, stock wrappers"]
    table("environment", ["8 environments alone"], {name: medians[name] for name in environments})
    columns = ["inference alone", "update alone", "whole loop", "peak memory, MB", "first rollout after, s"]
    nan = dict.fromkeys(columns, float("nan"))
    table("training", columns, {name: nan | medians[name] for name in variants})


if __name__ == "__main__":
    main()
