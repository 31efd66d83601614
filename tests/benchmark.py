"""Where the time goes, and how this script compares: python tests/benchmark.py [--device cuda] [--repeats 3]

Prints tables in Markdown: environments alone, inference alone, update alone, the whole loop, peak memory of all
processes (proportional set size) and the time from the command to the end of the first rollout. It does so for each
precision and, if installed, for Stable-Baselines3 with the same hyperparameters (pip install
"stable-baselines3==2.9.2"). The variants take turns, and each figure is the median of the repeats. With
--scaling, it prints instead how the whole loop grows with --num-envs and --num-workers. Rates are steps/s: one step is
four emulator frames. Takes about ten minutes.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

GAME = "BreakoutNoFrameskip-v4"
SCRIPT = str(ROOT / "ppo_atari.py")


def rate(work, steps: int, warm_up: int = 1) -> float:
    """Steps per second of a function that does `steps` steps of work."""
    for _ in range(warm_up):
        work()
    started = time.perf_counter()
    work()
    return steps / (time.perf_counter() - started)


def environment_alone(kind: str) -> float:
    """8 environments, random actions: this script's stack in two processes of gymnasium's, or gymnasium's own stack."""
    import ale_py
    import gymnasium as gym
    import numpy as np
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    gym.register_envs(ale_py)

    def stock():
        env = AtariPreprocessing(gym.make(GAME), noop_max=30, frame_skip=4, terminal_on_life_loss=True)
        return FrameStackObservation(env, 4)

    if kind == "stock":
        envs = gym.vector.AsyncVectorEnv([stock] * 8, autoreset_mode="SameStep")
        envs.reset(seed=1)
        actions = np.random.default_rng(1).integers(0, 4, (500, 8))
        result = rate(lambda: [envs.step(a) for a in actions], 4000)
        envs.close()
        return result
    processes = len(os.sched_getaffinity(0))
    code = (
        "import sys, time, numpy as np, ppo_atari as p; n = int(sys.argv[1])\n"
        f"args = p.parse_args(['--env-id', '{GAME}'])\n"
        "envs = p.SyncVectorEnv([lambda: p.make_env(args)] * n, copy=False, autoreset_mode='SameStep')\n"
        "envs.reset(seed=1); actions = np.random.default_rng(1).integers(0, 4, (1500, n)); print('ready', flush=True)\n"
        "input(); [envs.step(a) for a in actions[:500]]; s = time.perf_counter()\n"
        "[envs.step(a) for a in actions[500:]]; print(1000 * n / (time.perf_counter() - s))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    workers = [subprocess.Popen([sys.executable, "-c", code, str(8 // processes)], **pipes) for _ in range(processes)]
    for worker in workers:
        worker.stdout.readline()
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    return sum(float(worker.communicate()[0]) for worker in workers)


def network_alone(device_name: str, precision: str) -> dict[str, float]:
    """Inference in batches of 4 on one thread, and the update of 1024 samples on all."""
    import torch

    import ppo_atari

    device = torch.device(device_name)
    args = ppo_atari.parse_args(["--precision", precision])
    agent = ppo_atari.Agent(4)
    agent.dtype = ppo_atari.choose_dtype(args, torch.device("cpu"))
    actor = ppo_atari.inference_copy(agent)
    obs = torch.randint(0, 256, (1024, 4, 84, 84), dtype=torch.uint8)
    uniform, threads = torch.rand(1024), torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        inference = rate(lambda: ppo_atari.act(actor, obs[:512], uniform[:512], 4), 512)
    torch.set_num_threads(threads)

    agent.to(device).dtype = ppo_atari.choose_dtype(args, device)
    on_gpu = device.type == "cuda"
    learning_rate, ent_coef = torch.tensor([1e-9, 0.01], device=device)
    optimizer = torch.optim.Adam(agent.parameters(), learning_rate, eps=1e-5, fused=True, capturable=on_gpu)
    batch = ppo_atari.Batch.allocate(1024, obs.shape[1:], device)
    batch.obs.random_(0, 256)
    batch.actions.random_(0, 4)
    for tensor in batch[2:]:
        tensor.normal_()
    step = partial(ppo_atari.update, agent, optimizer, batch, args=args, ent_coef=ent_coef)
    if on_gpu:
        step = ppo_atari.cuda_graph(step, torch.arange(256, device=device), agent, optimizer)

    def update() -> None:
        for _ in range(args.update_epochs):
            for i in torch.randperm(1024, device=device).split(256):
                step(i)
        if on_gpu:
            torch.cuda.synchronize()

    return {"inference alone": inference, "update alone": rate(update, 1024)}


STABLE_BASELINES = f"""
import time, ale_py, gymnasium
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack
class Clock(BaseCallback):
    def _on_step(self): return True
    def _on_rollout_end(self): print("clock", self.num_timesteps, time.time(), flush=True)
gymnasium.register_envs(ale_py)
envs = VecFrameStack(make_atari_env("{GAME}", n_envs=8, seed=1), 4)
model = PPO("CnnPolicy", envs, n_steps=128, n_epochs=4, batch_size=256, learning_rate=lambda f: 2.5e-4 * f,
            clip_range=0.1, clip_range_vf=0.1, vf_coef=0.5, ent_coef=0.01, device="DEVICE")
model.learn(1024 * ITERATIONS, callback=Clock())
"""

THIS_SCRIPT = """
import sys, time, ppo_atari
rollout = ppo_atari.Workers.call
steps = 0
def call(self, method, *lists):
    global steps
    answer = rollout(self, method, *lists)
    if method == "rollout":
        steps += self.shares[-1][1] * 128
        print("clock", steps, time.time(), flush=True)
    return answer
ppo_atari.Workers.call = call
sys.exit(ppo_atari.main(sys.argv[1:]))
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
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, cwd=folder, env=environment
        )
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


def train_flags(iterations: int, device: str, num_envs: int = 8, *more: str) -> list[str]:
    flags = ["--env-id", GAME, "--num-envs", str(num_envs), "--total-timesteps", str(iterations * num_envs * 128)]
    return [*flags, "--eval-episodes", "0", "--cuda" if device == "cuda" else "--no-cuda", *more]


def table(title: str, columns: list[str], rows: dict[str, dict[str, float]]) -> None:
    print(f"\n| {title} | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name, row in rows.items():
        print(
            f"| {name} | {' | '.join(f'{row[c]:,.3g}' if row.get(c, 0) < 100 else f'{row[c]:,.0f}' for c in columns)} |"
        )


def scaling(device: str) -> None:
    rows: dict[str, dict[str, float]] = {}
    for num_envs in (8, 16, 32, 64):
        for workers in (0, 1, 2, 4):
            result = whole_loop(THIS_SCRIPT, train_flags(6, device, num_envs, "--num-workers", str(workers)))
            rows.setdefault(f"{num_envs} environments", {})[f"{workers} workers"] = result["whole loop"]
    table("whole loop, steps/s", [f"{workers} workers" for workers in (0, 1, 2, 4)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=16, help="of each whole loop")
    parser.add_argument("--scaling", action="store_true", help="only the whole loop, by --num-envs and --num-workers")
    options = parser.parse_args()
    device, iterations = options.device, options.iterations
    if options.scaling:
        return scaling(device)

    variants = {
        "float32": (THIS_SCRIPT, train_flags(iterations, device, 8, "--precision", "float32")),
        "bfloat16": (THIS_SCRIPT, train_flags(iterations, device, 8, "--precision", "bfloat16")),
    }
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
        note("this stack", {"8 environments alone": environment_alone("ours")})
        note("gymnasium AsyncVectorEnv, stock wrappers", {"8 environments alone": environment_alone("stock")})
        for precision in ("float32", "bfloat16"):
            note(precision, network_alone(device, precision))
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
