"""Does the script still compute what it did? Bit for bit, against an older commit.

    python tests/identity.py                                    all cases, 20 iterations each
    python tests/identity.py --only float32 --iterations 3      the cases with this in their names
    python tests/identity.py --list                             the names

For each case, the script of --commit and this one train side by side, on one thread each, and the
table says whether all weights in agent.pt are equal, to the last bit. It also shows a digest of
them: a case's flags have had an effect where no other case has the same. (The number of workers
shall have none; one group or two often have none in float32.) The exit code is 1 if a case differs.

The older script has to have the flag --inference-batch, as commits until 8b4a33b do: its policy
works in batches of that many games, which are the groups of --num-groups. Without bfloat16 in
hardware, its cases take several times as long. All cases take an hour on two such cores.
"""

import argparse
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "8b4a33b"  # the last one whose worker processes ran the policy
BATCH = 8 * 128  # steps of an iteration
SHORT = "Test/Short-v0"  # its games are cut, again and again, at the time limit

# Runs the script named by its first argument, with a game that is cut at 400 frames.
DRIVER = f"""
import runpy
import sys

import gymnasium

limits = {{"max_num_frames_per_episode": 400, "repeat_action_probability": 0.25}}
kwargs = {{"game": "breakout", "obs_type": "rgb", "frameskip": 1, **limits}}
gymnasium.register("{SHORT}", "ale_py.env:AtariEnv", kwargs=kwargs)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Case(NamedTuple):
    name: str
    env_id: str
    flags: list[str]  # of both scripts
    old_flags: list[str]
    new_flags: list[str]
    num_ranks: int = 1
    resumed: bool = False  # this script is stopped half-way and resumed, the old one is not


def make_cases() -> list[Case]:
    cases = []
    two_groups = (["--inference-batch", "4"], ["--num-groups", "2"])
    one_group = (["--inference-batch", "8"], ["--num-groups", "1"])
    for precision in ("float32", "bfloat16"):
        both = ["--precision", precision]
        for env_id in ("ALE/Breakout-v5", "ALE/Riverraid-v5"):
            for workers in ("0", "1", "2"):
                name = f"{env_id} {precision} workers {workers}"
                cases.append(Case(name, env_id, [*both, "--num-workers", workers], *two_groups))
        game = "ALE/Riverraid-v5"
        both += ["--num-workers", "1"]
        cases.append(Case(f"one group {precision}", game, both, *one_group))
        cases.append(Case(f"cut games {precision}", SHORT, both, *two_groups))
        flags = [*both, "--no-shared-network"]
        cases.append(Case(f"separate networks {precision}", game, flags, *two_groups))
        flags = [*both, "--target-kl", "0.0005"]
        cases.append(Case(f"target KL {precision}", game, flags, *two_groups))
        flags = [*both, "--no-anneal-lr"]
        cases.append(Case(f"resumed {precision}", game, flags, *two_groups, resumed=True))
        case = Case(f"two ranks {precision}", game, both, two_groups[0], [], num_ranks=2)
        cases.append(case)
    return cases


class Training:
    """One script's training of a case, in a directory of its own: one process or one per rank."""

    def __init__(self, script: Path, case: Case, flags: list[str], folder: Path):
        self.script = script
        self.case = case
        self.flags = ["--env-id", case.env_id, *case.flags, *flags]
        self.folder = folder
        self.folder.mkdir(parents=True)
        self.processes = []

    def start(self, iterations: int) -> None:
        more = ["--total-timesteps", str(iterations * BATCH), "--eval-episodes", "0", "--no-cuda"]
        if self.processes:
            (run,) = self.folder.glob("runs/*")
            flags = ["--resume", str(run.relative_to(self.folder)), *more]
        else:
            flags = [*self.flags, *more]
        command = [sys.executable, "-c", DRIVER, str(self.script), *flags]
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])  # a free one
        self.processes = []
        for rank in range(self.case.num_ranks):
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            if self.case.num_ranks > 1:
                env |= {"RANK": str(rank), "WORLD_SIZE": str(self.case.num_ranks)}
                env |= {"LOCAL_RANK": env["RANK"], "LOCAL_WORLD_SIZE": env["WORLD_SIZE"]}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with open(self.folder / "log", "a") as log:
                process = subprocess.Popen(
                    command, cwd=self.folder, env=env, stdout=log, stderr=subprocess.STDOUT
                )
            self.processes.append(process)

    def finish(self) -> None:
        """Waits for its end. RuntimeError if it failed: the other rank would wait for ever."""
        codes = [None]
        while None in codes and not any(codes):
            time.sleep(0.1)
            codes = [process.poll() for process in self.processes]
        if any(codes):
            log = (self.folder / "log").read_text()
            raise RuntimeError(f"{self.script.parent.name} script: exit codes {codes}\n{log}")

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def weights(self) -> dict[str, torch.Tensor]:
        (agent,) = self.folder.glob("runs/*/agent.pt")
        return torch.load(agent, weights_only=True)["weights"]


def digest(weights: dict[str, torch.Tensor]) -> str:
    """The first letters of a hash over names, types and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:8]


def compare(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> str:
    if old.keys() != new.keys():
        return "no: other names"
    if digest(old) == digest(new):
        return "yes"
    different = []
    for name, tensor in old.items():
        if not torch.equal(tensor, new[name]):
            different.append((tensor - new[name]).abs().max().item())
    return f"no: {len(different)} of {len(old)} tensors, by up to {max(different, default=0):.1e}"


def run_case(case: Case, scripts: dict[str, Path], iterations: int, folder: Path) -> list[str]:
    """The case's row of the table."""
    old = Training(scripts["old"], case, case.old_flags, folder / "old")
    new = Training(scripts["new"], case, case.new_flags, folder / "new")
    started = time.perf_counter()
    try:
        old.start(iterations)
        if case.resumed:
            new.start(iterations // 2)
            new.finish()
        new.start(iterations)
        new.finish()
        old.finish()
    finally:
        old.kill()
        new.kill()
    equal = compare(old.weights(), new.weights())
    seconds = time.perf_counter() - started
    return [case.name, equal, digest(old.weights()), digest(new.weights()), f"{seconds:.0f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="all in the name")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--iterations", type=int, default=20, help="of each training")
    parser.add_argument("--commit", default=COMMIT, help="of the older script")
    options = parser.parse_args()
    cases = make_cases()
    for words in options.only:
        cases = [case for case in cases if words in case.name]
    if not cases:
        parser.error("no case has all of this in its name; --list shows them")
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if options.iterations < 2:
        parser.error("--iterations must be at least 2, so that a run can be resumed")

    all_equal = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        show = ["git", "-C", str(ROOT), "show", f"{options.commit}:ppo_atari.py"]
        contents = {
            "old": subprocess.run(show, stdout=subprocess.PIPE, check=True).stdout,
            "new": (ROOT / "ppo_atari.py").read_bytes(),
        }
        scripts = {}
        for name, content in contents.items():
            scripts[name] = folder / name / "ppo_atari.py"
            scripts[name].parent.mkdir()
            scripts[name].write_bytes(content)
        print(f"{options.commit} and this script, {options.iterations} iterations each\n")
        print("| case | equal | old weights | new weights | seconds |")
        print("| --- | --- | --- | --- | --- |", flush=True)
        for i, case in enumerate(cases):
            row = run_case(case, scripts, options.iterations, folder / str(i))
            print(f"| {' | '.join(row)} |", flush=True)
            all_equal = all_equal and row[1] == "yes"
    return 0 if all_equal else 1


if __name__ == "__main__":
    sys.exit(main())
