"""Does a change help? Trains variants on games with several seeds, and compares each with the
default.

    python tests/study.py --games PongNoFrameskip-v4 --variants default "flat: --ent-coef 0"
    python tests/study.py --variants default clip "mine: --script my_copy.py --my-flag 3"
    python tests/study.py                                all VARIANTS on all GAMES: days
    python tests/study.py --table --picture study.png    runs nothing: what is finished so far

A variant is a name from the list below or "name: flags"; --script FILE among them runs another
script. One run per core at a time (taskset -c 0 in front: on that core), at low priority; game by
game and, within a game, seed by seed. After Ctrl-C, kill or kill -9, the same command goes on: it
skips what is finished and resumes what has a checkpoint.pt. A run that fails is tried again by the
next call. Scripts are copied at the start, so edit on; an edited one is still the same variant, and
the table says so. --common="flags" are for all variants. A run has one core, so it plays its games
itself and in one group (--num-workers 0 --num-groups 1).

Each finished run is one line of JSON in --results; its curves, weights and log lie beside that
file. "evaluation" is the mean of the script's final evaluation, 30 full games, "return" the mean of
training's last 100 games, and "area" the mean of that return over training. Of these, --metric is
compared (needs pip install scipy; pictures: matplotlib).

The statistics follow "Deep RL at the Edge of the Statistical Precipice" (Agarwal et al., 2021):
difference to the default with its 95 % percentile bootstrap interval, resampling the seeds of each
game and variant, and the probability that a run of the variant beats one of the default. For
several games, scores are normalized: 0 is random play, 1 the default. (scipy, because rliable wants
equally many seeds in each game.) If scores were normal, such an interval would hold the truth in
66 % of cases with 2 seeds, 80 % with 3, 88 % with 5, 91 % with 10: look at every seed's value.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
GAMES, SEEDS, STEPS = ["BreakoutNoFrameskip-v4", "PongNoFrameskip-v4"], [1, 2, 3], 1_000_000
MORE_SEEDS = {"default": [1, 2, 3, 4, 5], "float32": [1, 2, 3, 4, 5]}  # in place of SEEDS
VARIANTS = {
    "default": "",
    "noop": "--noop-max 0",
    "skip": "--frame-skip 1",
    "life": "--no-episodic-life",
    "fire": "--no-fire-reset",
    "size": "--frame-size 44",
    "clip": "--no-clip-reward",
    "stack": "--frame-stack 1",
    "shared": "--no-shared-network",
    "scale": "--no-scale-obs",
    "anneal": "--no-anneal-lr",
    "norm": "--no-norm-adv",
    "vloss": "--no-clip-vloss",
    "gae": "--gae-lambda 1",
    "entropy": "--ent-coef 0",
    "float32": "--precision float32",
}
ONE_CORE = ["--num-workers", "0", "--num-groups", "1"]
OURS = {"--env-id", "--seed", "--total-timesteps", "--exp-name", "--resume", "--evaluate", "--play"}
NOWHERE = "/there/is/no/such.agent"
LAUNCH = """
import ctypes, os, signal, sys
os.setpriority(os.PRIO_PROCESS, 0, max(10, os.getpriority(os.PRIO_PROCESS, 0)))
if sys.platform == "linux":
    os.sched_setaffinity(0, {int(sys.argv[1])})
    # PR_SET_PDEATHSIG: when the study is killed, its runs save and end
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Mistake(Exception):
    """Something the user can mend: one line on stderr, exit code 2."""


class Run(NamedTuple):
    variant: str
    flags: str
    game: str
    seed: int
    steps: int
    common: str

    @property
    def name(self) -> str:
        """Of the experiment; another one for other flags."""
        identity = json.dumps([self.variant, self.flags, self.steps, self.common])
        digest = hashlib.sha256(identity.encode()).hexdigest()
        letters = re.sub(r"[^a-zA-Z0-9.+-]", "-", self.variant).lstrip("-")
        return f"{letters}-{digest[:8]}".lstrip("-")

    def prefix(self) -> str:
        return f"{self.game.replace('/', '-')}__{self.name}__{self.seed}"

    def directories(self, folder: Path) -> list[Path]:
        """The newest last; more than one only where a run was killed before its first
        checkpoint."""
        found = []
        for path in folder.glob(f"runs/{self.prefix()}__*"):
            second = path.name.split("__")[-1]
            if second.isdecimal():
                found.append((int(second), path))
        return [path for _, path in sorted(found)]

    def split(self) -> tuple[str, list[str]]:
        """The script and its flags."""
        words = shlex.split(self.flags)
        script = str(ROOT / "ppo_atari.py")
        if "--script" in words[:-1]:
            at = words.index("--script")
            script = words[at + 1]
            words = words[:at] + words[at + 2 :]
        words = [*ONE_CORE, "--eval-episodes", "30", *shlex.split(self.common), *words]
        wrong = OURS & {word.partition("=")[0] for word in words}
        if wrong:
            raise Mistake(f"{self.variant}: {wrong.pop()} is not for variants or --common")
        if re.search(r"--eval-episodes[ =]0+( |$)", " ".join(words)):
            raise Mistake(f"{self.variant}: without --eval-episodes, a run has no result")
        words += ["--env-id", self.game, "--seed", str(self.seed)]
        words += ["--total-timesteps", str(self.steps), "--exp-name", self.name]
        return script, words


# ------------------------------------------------------------------------------------------ results


def load(path: Path) -> dict[Run, dict[str, Any]]:
    """The lines of a results file. Of two for the same run, the last counts."""
    lines = {}
    try:
        texts = path.read_bytes().splitlines()
    except OSError as error:
        raise Mistake(f"{path}: {error.strerror}") from None
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            run = Run(*(kind(line[name]) for name, kind in Run.__annotations__.items()))
            figures = [line["evaluation"], line["random_mean"]]
            figures += [line["return"] or 0, line["area"] or 0]
            if not all(map(math.isfinite, figures)):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise Mistake(f"{path}, line {number} is not a result: mend it or delete it") from None
        lines[run] = line
    return lines


def append(path: Path, line: dict[str, Any]) -> None:
    """The whole line or nothing of it, even if several studies write to one file."""
    with open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        text = (b"" if file.read(1) in b"\n" else b"\n") + json.dumps(line).encode() + b"\n"
        if file.write(text) < len(text):
            file.truncate(end)
            raise OSError("the disk is full")
        os.fsync(file)


def curve(run: Path) -> tuple[list[int], list[float]]:
    """The steps at which games ended, and the mean return of the last 100 games there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tag = "charts/episodic_return"
    games = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
    steps = [game.step for game in games]
    returns = [game.value for game in games]
    means = [fmean(returns[max(0, i - 99) : i + 1]) for i in range(len(returns))]
    return steps, means


def area(steps: list[int], means: list[float], end: int) -> float:
    """The mean height of a staircase, from the first game's end on."""
    widths = [later - step for step, later in zip(steps, [*steps[1:], end])]
    return fmean(means, widths) if sum(widths) else means[-1]


def result(run: Run, folder: Path) -> dict[str, Any]:
    """The line of a finished run."""
    path = run.directories(folder)[-1]
    about = json.loads((path / "args.json").read_text())
    played = json.loads((path / "eval.json").read_text())
    steps, means = curve(path)
    _, script, commit, _ = script_copy(run.split()[0], folder)
    return run._asdict() | {
        "evaluation": played["mean"],
        "return": means[-1] if means else None,
        "area": area(steps, means, played["step"]) if means else None,
        "random_mean": played["random_mean"],
        "scores": played["scores"],
        "commit": commit,
        "script": script,
        "torch": about["versions"]["torch"],
        "processor": processor(),
        "precision": about.get("hardware", {}).get("precision"),
    }


@cache
def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    name = re.search(r"model name\s*: (.*)", cpuinfo)
    return name[1] if name else platform.processor() or platform.machine()


# --------------------------------------------------------------------------------------------- runs


@cache
def script_copy(name: str, folder: Path) -> tuple[Path, str, str | None, dict[str, str]]:
    """A copy of the script as it is now, its hash, the commit of its git and the environment to run
    it in."""
    path = Path(name).resolve()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Mistake(f"{name}: {error.strerror}") from None
    digest = hashlib.sha256(content).hexdigest()[:12]
    copy = folder / "scripts" / digest / path.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = copy.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(copy)
    commit = None
    if shutil.which("git"):
        git = ["git", "-C", str(path.parent), "describe", "--always", "--dirty"]
        git += ["--abbrev=40", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    imports = str(path.parent)
    if os.environ.get("PYTHONPATH"):
        imports += os.pathsep + os.environ["PYTHONPATH"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": imports}
    return copy, digest, commit, env


def refusal(run: Run, folder: Path) -> str | None:
    """What the script has against the flags: it checks them all before it misses the agent that is
    named here."""
    script, flags = run.split()
    copy, _, _, env = script_copy(script, folder)
    argv = [sys.executable, str(copy), *flags, "--evaluate", NOWHERE]
    probe = subprocess.run(argv, capture_output=True, text=True, env=env)
    if probe.returncode == 0 or NOWHERE in probe.stderr:
        return None
    said = probe.stderr.strip() or f"exit code {probe.returncode}"
    return f"{run.variant}: {said.splitlines()[-1]}"


def complete(path: Path) -> bool:
    """Whether a run has made its last step."""
    import torch

    with suppress(OSError, KeyError):
        flags = json.loads((path / "args.json").read_text())["flags"]
        batch = flags["num_envs"] * flags["num_steps"]
        last_step = flags["total_timesteps"] // batch * batch
        return torch.load(path / "agent.pt", weights_only=True)["step"] >= last_step
    return False


class Child:
    """A run in a process of its own. As long as that or we live, its log is locked, and nobody else
    can start it."""

    def __init__(self, run: Run, folder: Path):
        """Raises BlockingIOError if somebody is at it: another study, or what a killed one has
        left."""
        self.run = run
        self.folder = folder
        self.process = None
        self.log = open(folder / "logs" / f"{run.prefix()}.log", "a+b")  # noqa: SIM115
        self.begin = self.log.seek(0, os.SEEK_END)
        fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def start(self, core: int) -> str:
        script, flags = self.run.split()
        copy, _, _, env = script_copy(script, self.folder)
        what = "begun"
        for path in self.run.directories(self.folder):
            name = str(path.relative_to(self.folder))
            if (path / "checkpoint.pt").exists() and complete(path):
                flags = [*flags, "--evaluate", name]  # it was stopped in its last evaluation
                what = "evaluated"
            elif (path / "checkpoint.pt").exists():
                flags = ["--resume", name]
                what = "resumed"
            elif not (path / "agent.pt").exists():  # nothing that anybody has trained
                shutil.rmtree(path)
        self.process = subprocess.Popen(
            [sys.executable, "-ISc", LAUNCH, str(core), str(copy), *flags],
            cwd=self.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            process_group=0,  # the terminal's Ctrl-C is for us alone
        )
        return f"{what} on core {core}"

    def output(self) -> list[str]:
        self.log.seek(max(self.begin, self.log.seek(0, os.SEEK_END) - 4000))
        return self.log.read().decode(errors="replace").split("\n")

    def end(self, results: Path) -> None:
        """Writes the line of the run. Raises something if it failed."""
        code = self.process.returncode
        if code != 0:
            last = [line for line in self.output() if line.strip()] or ["it said nothing"]
            kind = "signal" if code < 0 else "exit code"
            raise ValueError(f"{kind} {abs(code)}: {last[-1].strip()}")
        append(results, result(self.run, self.folder))

    def progress(self) -> tuple[int, int]:
        """Steps done and steps per second, as its log says; 0: not yet."""
        output = "\n".join(self.output())
        found = re.findall(r"step ([\d,]+) of .* ([\d,]+) steps/s", output)
        if not found:
            return 0, 0
        step, speed = found[-1]
        return int(step.replace(",", "")), int(speed.replace(",", ""))


def work(grid: list[Run], results: Path) -> bool:
    """Runs what is not finished; returns whether a run failed."""
    folder = results.parent.resolve()
    for name in ("runs", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    results.touch()
    done = load(results)
    todo = [run for run in grid if run not in done]
    finished = f"{len(grid) - len(todo)} of them finished before"
    print(f"{len(grid)} runs, {finished}; results in {results}", flush=True)
    others = {str(done[run].get("processor")) for run in grid if run in done} - {processor()}
    if todo and others:
        where = f"finished on {', '.join(sorted(others))}, this is {processor()}"
        print(f"Mind: {where}: --precision auto may not mean the same", flush=True)
    script_copy.cache_clear()
    for run in todo:
        script_copy(run.split()[0], folder)
    if sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    first = {run.name: run for run in reversed(todo)} | {run.game: run for run in reversed(todo)}
    ask = [run for run in dict.fromkeys(first.values()) if not run.directories(folder)]
    with ThreadPoolExecutor(len(cores)) as pool:
        for complaint in pool.map(partial(refusal, folder=folder), ask):
            if complaint is not None:
                raise Mistake(complaint)

    children: dict[int, Child] = {}
    failed = False
    speed = 0.0
    said = time.monotonic() - 240

    def say(run: Run, what: str) -> None:
        print(f"{run.variant}, {run.game}, seed {run.seed}: {what}", flush=True)

    try:
        while todo or children:
            for core in [core for core in children if children[core].process.poll() is not None]:
                child = children.pop(core)
                try:
                    child.end(results)
                    say(child.run, "finished")
                except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
                    failed = True
                    say(child.run, f"failed, {error}")
            for core in [core for core in cores if core not in children]:
                for run in list(todo):
                    try:
                        child = Child(run, folder)
                    except BlockingIOError:
                        continue
                    todo.remove(run)
                    if run not in load(results):
                        children[core] = child
                        say(run, child.start(core))
                        break
            if time.monotonic() > said + 300 and children:
                said = time.monotonic()
                progress = [child.progress() for child in children.values()]
                speed = fmean([now for _, now in progress if now] or [speed])
                left = sum(run.steps for run in todo) - sum(step for step, _ in progress)
                left += sum(child.run.steps for child in children.values())
                rest = timedelta(seconds=round(left / speed / len(progress))) if speed else "?"
                print(f"{len(children)} running, {len(todo)} waiting, {rest} left:", flush=True)
                for child, (step, _) in zip(children.values(), progress):
                    say(child.run, f"{step / child.run.steps:.0%}")
            time.sleep(0.2)
    except KeyboardInterrupt:
        print("stopping: each run finishes its iteration and saves", flush=True)
        processes = [child.process for child in children.values() if child.process]
        for process in processes:
            process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait()
        raise
    return failed


# --------------------------------------------------------------------------------------- statistics


class Comparison(NamedTuple):
    difference: float
    interval: tuple[float, float] | None  # None where a game has one seed
    better: float
    each: list[float]  # runs of the variant, against the default's mean


def compare(pairs: list[tuple[list[float], list[float]]]) -> Comparison:
    """The scores of variant and default, one pair of lists per game, all on one scale."""
    try:
        import numpy as np
        from scipy.stats import bootstrap
    except ImportError:
        mend = "pip install scipy, then the same with --table"
        raise Mistake(f"the table needs scipy: {mend}") from None

    def difference(*samples: Any, axis: int = -1) -> Any:
        total = 0
        for mine, default in zip(samples[::2], samples[1::2]):
            total = total + (mine.mean(axis) - default.mean(axis))
        return total / len(pairs)

    samples = [np.array(scores, dtype=float) for pair in pairs for scores in pair]
    interval = None
    if min(map(len, samples)) > 1:
        found = bootstrap(samples, difference, vectorized=True, method="percentile", rng=1)
        ends = found.confidence_interval
        interval = (float(ends.low), float(ends.high))
    better = fmean(fmean((x > y) + (x == y) / 2 for x in xs for y in ys) for xs, ys in pairs)
    each = [x - fmean(ys) for xs, ys in pairs for x in xs]
    return Comparison(float(difference(*samples)), interval, better, each)


ALL = "all games, normalized"


def comparisons(lines: list[dict[str, Any]], metric: str) -> tuple[dict, dict]:
    """The scores as {(variant, flags): {game: [one per seed]}} and, in the same form, the
    comparisons, also of ALL."""
    scores: dict[tuple[str, str], dict[str, list[float]]] = {}
    random: dict[str, list[float]] = {}
    order = {name: number for number, name in enumerate(VARIANTS)}
    lines = sorted(lines, key=lambda line: (order.get(line["variant"], len(order)), line["seed"]))
    for line in lines:
        if line[metric] is not None:
            by_game = scores.setdefault((line["variant"], line["flags"]), {})
            by_game.setdefault(line["game"], []).append(line[metric])
        if line["variant"] == "default":
            random.setdefault(line["game"], []).append(line["random_mean"])
    default = next((by_game for (name, _), by_game in scores.items() if name == "default"), {})
    unit = {game: fmean(default[game]) - fmean(random[game]) for game in default}
    found: dict[tuple[str, str], dict[str, Comparison]] = {}
    for (name, flags), mine in scores.items():
        both = [game for game in default if game in mine and name != "default"]
        found[name, flags] = {game: compare([(mine[game], default[game])]) for game in both}
        in_all_games = len(both) == len(default) > 1
        if in_all_games and min(unit.values()) > 0:  # otherwise the default has learned nothing
            pairs = []
            for game in both:
                normalized = [x / unit[game] for x in mine[game]]
                normalized_default = [x / unit[game] for x in default[game]]
                pairs.append((normalized, normalized_default))
            found[name, flags][ALL] = compare(pairs)
    return scores, found


def signed(difference: float) -> str:
    """Three digits. A difference of 0 is +0, and not the rounding error of its sums."""
    return f"{round(difference, 9) + 0.0:+.3g}"


def score_cell(values: list[float] | None) -> str:
    if not values:
        return "-"
    return f"{fmean(values):.4g} ({', '.join(f'{x:.4g}' for x in values)})"


def comparison_cell(one: Comparison | None) -> str:
    if one is None:
        return "-"
    interval = ", ".join(map(signed, one.interval)) if one.interval else "-"
    return f"{signed(one.difference)} [{interval}], {one.better:.2f}"


def mixture(lines: list[dict[str, Any]]) -> list[str]:
    """What the lines of one table should have in common, and have not."""
    mixed = []
    versions: dict[tuple, set] = {}
    known: dict[str, set] = {}
    for line in lines:
        script = tuple(re.findall(r"--script \S+", line["flags"]))
        versions.setdefault(script, set()).add(line.get("script"))
        if line.get("precision"):
            known.setdefault(line["flags"], set()).add(line["precision"])
    if any(len(some) > 1 for some in versions.values()):
        mixed.append("version of a script")
    if any(len(some) > 1 for some in known.values()):
        mixed.append("precision in each variant")
    for name in ("torch", "processor"):
        if len({line.get(name) for line in lines}) > 1:
            mixed.append(name)
    return mixed


def report(lines: list[dict[str, Any]], metric: str, picture: str | None) -> None:
    """A table and panels of the picture for each number of steps and --common flags."""
    panels = []
    for steps, common in dict.fromkeys((line["steps"], line["common"]) for line in lines):
        group = [line for line in lines if (line["steps"], line["common"]) == (steps, common)]
        scores, found = comparisons(group, metric)
        games = list(dict.fromkeys(line["game"] for line in group))
        columns = games + [ALL] if len(games) > 1 else games
        head = ["variant", "flags", *games]
        head += [f"difference, {column} [95 %], P(better)" for column in columns]
        title = f"{metric} after {steps:,} steps{f' with {common}' if common else ''}"
        print(f"\n{title}; mean (each seed)\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
        for (name, flags), by_game in scores.items():
            row = [name, flags]
            row += [score_cell(by_game.get(game)) for game in games]
            row += [comparison_cell(found[name, flags].get(column)) for column in columns]
            print(f"| {' | '.join(row)} |")
        for column in columns:
            of_column = {name: of[column] for name, of in found.items() if column in of}
            panels.append((f"{title}\n{column}", of_column))
        mixed = mixture(group)
        if mixed:
            print(f"\nMind: these runs are not all of one {' and one '.join(mixed)}.")
    if picture:
        draw(panels, picture)


def draw(panels: list[tuple[str, dict[tuple[str, str], Comparison]]], path: str) -> None:
    try:
        import matplotlib
    except ImportError:
        mend = "pip install matplotlib, then the same with --table"
        raise Mistake(f"the picture needs matplotlib: {mend}") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for _, found in panels for name in found))[::-1]
    labels = [f"{name}: {flags}" if 0 < len(flags) < 24 else name for name, flags in names]
    size = (4 * len(panels) + 1, 0.3 * len(names) + 1.5)
    figure, all_axes = plt.subplots(
        1, len(panels), sharey=True, squeeze=False, figsize=size, dpi=120
    )
    for axes, (title, found) in zip(all_axes[0], panels):
        axes.axvline(0, color="gray", linewidth=1)
        for name, one in found.items():
            y = names.index(name)
            if one.interval:
                axes.plot(one.interval, [y, y], "C0", linewidth=2)
            dots = {"markersize": 4, "alpha": 0.6, "zorder": 3}
            axes.plot(one.each, [y] * len(one.each), "k.", **dots)
            axes.plot(one.difference, y, "C0o")
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("difference to the default's mean; black: each run", fontsize=8)
        axes.set_yticks(range(len(names)), labels, fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise Mistake(f"--picture {path}: {error}") from None


# --------------------------------------------------------------------------------------------- main


def flags(text: str) -> str:
    """In one way of writing, as they are part of what makes a run this one."""
    return shlex.join(shlex.split(text))


def variant(text: str) -> tuple[str, str]:
    name, colon, rest = map(str.strip, text.partition(":"))
    try:
        return name, flags(rest) if colon else VARIANTS[name]
    except (KeyError, ValueError):
        known = ", ".join(VARIANTS)
        message = f"{text!r} is not one of {known}, nor 'name: flags'"
        raise argparse.ArgumentTypeError(message) from None


def make_grid(options: argparse.Namespace) -> list[Run]:
    """Game by game and, in it, seed by seed."""
    steps = STEPS if options.steps is None else options.steps
    seeds = options.seeds or sorted({*SEEDS, *sum(MORE_SEEDS.values(), [])})
    variants = dict.fromkeys(options.variants or VARIANTS.items())
    grid = []
    for game in options.games or GAMES:
        for seed in seeds:
            for name, words in variants:
                if options.seeds or seed in MORE_SEEDS.get(name, SEEDS):
                    grid.append(Run(name, words, game, seed, steps, options.common or ""))
    return grid


def is_wanted(line: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether the table shall show this line; the default always belongs to it."""
    if options.games and line["game"] not in options.games:
        return False
    if options.seeds and line["seed"] not in options.seeds:
        return False
    if options.steps is not None and line["steps"] != options.steps:
        return False
    if options.common is not None and line["common"] != options.common:
        return False
    if options.variants:
        return line["flags"] in ["", *(words for _, words in options.variants)]
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("study.py", None, __doc__.split("\n\n")[0])
    parser.print_usage = lambda file=None: None  # a mistake is answered with one line
    flag = parser.add_argument
    flag("--games", nargs="+", metavar="ID", help=" ".join(GAMES))
    flag("--seeds", nargs="+", type=int, metavar="N", help=f"{SEEDS}, or as MORE_SEEDS says")
    flag("--steps", type=int, metavar="N", help=f"{STEPS:,}")
    known = f"'name: flags', or of {', '.join(VARIANTS)}"
    flag("--variants", nargs="+", type=variant, metavar="VARIANT", help=known)
    flag("--common", type=flags, metavar="FLAGS", help="flags for all variants: --common='...'")
    flag("--results", type=Path, default=ROOT / "runs" / "study" / "results.jsonl", metavar="FILE")
    only = "run nothing; of --results, or of FILE"
    flag("--table", nargs="?", type=Path, const=True, metavar="FILE", help=only)
    metrics = ("evaluation", "return", "area")
    flag("--metric", choices=metrics, default="evaluation", help="what the table compares")
    flag("--picture", metavar="FILE", help="draw the differences, too")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    results = options.results if options.table in (None, True) else options.table
    try:
        failed = False
        if not options.table:
            failed = work(make_grid(options), results)
        lines = [line for line in load(results).values() if is_wanted(line, options)]
        if options.table and not lines:
            raise Mistake(f"{results}: no finished run is of these")
        if lines:
            report(lines, options.metric, options.picture)
        return int(failed)
    except (Mistake, OSError) as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("study.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
