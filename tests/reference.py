"""What is worth keeping of finished runs, in runs/reference/, and the tables of it.

    python tests/reference.py RUN_DIRECTORY ...           keep runs whole: one seed of each game
    python tests/reference.py --brief RUN_DIRECTORY ...   keep curves, flags and scores only
    python tests/reference.py --unfinished RUN_DIRECTORY  keep what a run needs to go on elsewhere
    python tests/reference.py --table                     print the tables of the pages
    python tests/reference.py --picture OUT.png           draw all games, with the spread of seeds

--brief is for the other seeds; tables and picture are of what is kept. Kept are the scalars as one
mean per 10 000 steps, args.json and eval.json; of a whole run, also the last video if it is smaller
than 1 MB, what TensorBoard shows in its Images tab, the curve as a PNG, and agent.pt with the
networks' weights in bfloat16, with which --precision bfloat16 plays anyway. Pictures need
matplotlib (pip install matplotlib).

Of an unfinished run, checkpoint.pt is kept with a sixth of its size. --resume goes on from a copy
of such a directory, though not bit for bit.
"""

import argparse
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ppo_atari  # noqa: E402, as it lies in ROOT

REFERENCE = ROOT / "runs" / "reference"
# Means and standard deviations of three seeds after 10 000 000 steps: openai/baselines and CleanRL
# (ppo_atari.py), from CleanRL's documentation, and CleanRL's EnvPool variant that bootstraps
# truncated games, ppo_atari_envpool_xla_jax_truncation, from vwxyzjn/ppo-atari-metrics. For sticky
# actions: SLM-Lab, 16 environments, the best of three lambdas.
PUBLISHED = {
    "BreakoutNoFrameskip-v4": ("406.57 ± 31.55", "414.66 ± 28.09", "465.9 ± 14"),
    "PongNoFrameskip-v4": ("20.51 ± 0.50", "20.36 ± 0.20", "20.62"),
    "BeamRiderNoFrameskip-v4": ("2 642.97 ± 670.37", "1 915.93 ± 484.58", "3 134 ± 293"),
    "SpaceInvadersNoFrameskip-v4": ("1 020 ± 49", "", "1 164"),
    "QbertNoFrameskip-v4": ("15 228 ± 921", "", "17 319 ± 386"),
    "SeaquestNoFrameskip-v4": ("1 518 ± 400", "", "1 203"),
    "MsPacmanNoFrameskip-v4": ("2 153 ± 153", "", "2 574 ± 590"),
    "EnduroNoFrameskip-v4": ("987 ± 25", "", "1 178"),
    "ALE/Breakout-v5": ("", "", "326 (SLM-Lab)"),
}
MILESTONES = (100_000, 250_000, 500_000, 1_000_000, 2_000_000, 5_000_000, 10_000_000)
LOSSES = [
    "losses/value_loss",
    "losses/policy_loss",
    "losses/entropy",
    "losses/approx_kl",
    "losses/old_approx_kl",
    "losses/clipfrac",
    "losses/explained_variance",
    "losses/grad_norm",
]
GOALS = {
    "PongNoFrameskip-v4": (18,),
    "BreakoutNoFrameskip-v4": (100, 400),
    "ALE/Breakout-v5": (100,),
}

# Flags that the tables show in columns of their own, or that do not change how a run learns.
NO_VARIANT = {"env_id", "seed", "total_timesteps", "exp_name", "num_groups"} | ppo_atari.MAY_CHANGE


def scalars(run: Path, *tags: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each curve, empty where there is none, from one reading of the events."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    curves = []
    for tag in tags:
        points = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
        steps = np.array([point.step for point in points])
        curves.append((steps, np.array([point.value for point in points])))
    return curves


def stretches(points: list, every: int) -> Iterator[list]:
    """The points of each stretch of `every` steps."""
    for _, stretch in groupby(points, lambda point: point.step // every):
        yield list(stretch)


def thin(run: Path, target: Path, images: bool, every: int = 10_000) -> None:
    """Writes the mean of each scalar over each stretch of steps, at its last step and time; of
    evaluations, and of what is a mean already, the last value."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()
    writer = SummaryWriter(str(target))
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        for stretch in stretches(points, every):
            last = stretch[-1]
            value = np.mean([point.value for point in stretch])
            if tag.startswith("eval/") or tag == "charts/return_100":
                value = last.value
            writer.add_scalar(tag, value, last.step, last.wall_time)
    if images:
        for tag in events.Tags()["images"]:
            last = events.Images(tag)[-1]
            image = Summary.Image(height=last.height, width=last.width, colorspace=3)
            image.encoded_image_string = last.encoded_image_string
            summary = Summary(value=[Summary.Value(tag=tag, image=image)])
            writer.file_writer.add_summary(summary, last.step)
    flags = json.loads((run / "args.json").read_text())["flags"]
    for summary in ppo_atari.hparams_row(flags):
        writer.file_writer.add_summary(summary)
    writer.close()


def begin_to_keep(run: Path, *names: str, images: bool) -> Path:
    """A directory with the run's curves and the named files."""
    target = REFERENCE / run.name
    target.mkdir(parents=True)
    thin(run, target, images)
    for name in names:
        shutil.copy(run / name, target / name)
    return target


def round_weights(content: dict) -> None:
    """Those of the networks, to bfloat16: the heads compute in float32."""
    for name, tensor in content["weights"].items():
        if "network" in name:
            content["weights"][name] = tensor.bfloat16()


def say_size(target: Path) -> None:
    print(target, f"{sum(path.stat().st_size for path in target.iterdir()) / 2**20:.1f} MB")


def keep_film(run: Path, target: Path) -> None:
    """The last one, if it is smaller than 1 MB: a clone of the repository has to stay small."""
    videos = sorted(run.glob("videos/*.webm"), key=lambda path: path.stat().st_mtime)
    if videos and videos[-1].stat().st_size < 2**20:
        shutil.copy(videos[-1], target / "video.webm")


def keep(run: Path, brief: bool) -> None:
    target = begin_to_keep(run, "args.json", "eval.json", images=not brief)
    if not brief:
        keep_film(run, target)
        content = torch.load(run / "agent.pt", weights_only=True)
        round_weights(content)
        torch.save(content, target / "agent.pt")
        from plot import plot

        plot(target / "curve.png", [run])
    say_size(target)


def keep_unfinished(run: Path) -> None:
    """The checkpoint with rounded weights. In place of Adam's moments of each weight it has their
    mean over the unit's inputs, which the file holds once: the moments of single weights are back
    after 1 000 updates, or 62 iterations.

    Measured once, in SpaceInvaders after 2 838 528 steps, with the full and the small checkpoint
    side by side for 60 iterations: approx_kl was 0.0035 in place of 0.0029 in iterations 2 to 15,
    and 0.0027 beside 0.0028 from the 31st on. The return did not fall."""
    target = begin_to_keep(run, "args.json", images=True)
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    round_weights(checkpoint)
    for moments in checkpoint["optimizer"]["state"].values():
        for name, moment in moments.items():
            if moment.dim() > 1:
                inputs = tuple(range(1, moment.dim()))
                moments[name] = moment.mean(inputs, keepdim=True).expand_as(moment)
    torch.save(checkpoint, target / "checkpoint.pt")
    say_size(target)


def variant(flags: dict) -> str:
    """The game, and behind it the flags with which a run learns in another way than the default, as
    one types them: the tables do not take such runs for seeds of it."""
    words = [flags["env_id"]]
    for name, default in ppo_atari.parse_args([]).flags.items():
        value = flags.get(name, default)  # an older run may lack the flag
        if value == default or name in NO_VARIANT:
            continue
        typed = name.replace("_", "-")
        if value is True:
            words.append(f"--{typed}")
        elif value is False:
            words.append(f"--no-{typed}")
        else:
            words.append(f"--{typed} {value}")
    return " ".join(words)


def facts(run: Path) -> dict:
    """What the tables say of one kept run."""
    flags = json.loads((run / "args.json").read_text())["flags"]
    evaluated = json.loads((run / "eval.json").read_text())
    curve, (_, speeds), *losses = scalars(run, "charts/return_100", "charts/SPS", *LOSSES)
    return {
        "game": variant(flags),
        "seed": flags["seed"],
        "total": flags["total_timesteps"],
        "steps": evaluated["step"],
        "curve": curve,
        "return": curve[1][-1],
        "losses": dict(zip(LOSSES, losses)),
        "evaluation": evaluated["mean"],
        "games": evaluated["scores"],
        "random": evaluated["random_mean"],
        "steps_per_hour": 3600 * np.median(speeds),  # a mean would count what ran beside it
    }


def number(value: float, digits: int = 1) -> str:
    return f"{value:,.{digits}f}".replace(",", " ")


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds, and each seed's value."""
    if len(values) == 1:
        return number(values[0])
    mean = f"{number(np.mean(values))} ± {number(np.std(values, ddof=1))}"
    return f"{mean} ({', '.join(map(number, values))})"


def extent(values: list[float]) -> str:
    """The least and the largest, as runs were made on different machines."""
    return " to ".join(dict.fromkeys(map(number, (min(values), max(values)))))


def groups() -> dict[tuple[str, int], list[dict]]:
    """The kept runs by game (and what differs from the default) and length."""
    found = defaultdict(list)
    for path in sorted(REFERENCE.glob("*/eval.json")):
        run = facts(path.parent)
        found[run["game"], run["total"]].append(run)
    return dict(sorted(found.items(), key=lambda item: (-item[0][1], item[0][0])))


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |")


def heading(*columns: str) -> None:
    print()
    row(*columns)
    row(*["---"] * len(columns))


def short_table(kept: dict) -> None:
    heading("game", "seeds", "this script", "openai/baselines", "random play")
    for (game, total), runs in kept.items():
        published = PUBLISHED.get(game, ("",))[0] if total >= 10_000_000 else ""
        returns = spread([run["return"] for run in runs])
        random = number(np.mean([run["random"] for run in runs]))
        row(f"`{game}`", len(runs), returns, published, random)


def full_table(kept: dict) -> None:
    columns = ["game", "steps", "seeds", "training, last 100 games", "evaluation, full games"]
    columns += ["random play", "openai/baselines", "CleanRL", "CleanRL, EnvPool", "hours"]
    heading(*columns)
    for (game, total), runs in kept.items():
        steps = min(run["steps"] for run in runs)
        length = number(steps, 0)
        if steps < 0.99 * total:
            length += f" of {number(total, 0)}"
        evaluation = spread([run["evaluation"] for run in runs])
        if len(runs) == 1:
            evaluation += f" ± {number(np.std(runs[0]['games']))} (over games)"
        published = ("", "", "")
        if total >= 10_000_000:
            published = PUBLISHED.get(game, published)
        row(
            f"`{game}`",
            length,
            len(runs),
            spread([run["return"] for run in runs]),
            f"{evaluation}, {len(runs[0]['games'])} each",
            number(np.mean([run["random"] for run in runs])),
            *published,
            extent([run["steps"] / run["steps_per_hour"] for run in runs]),
        )


def milestone_table(kept: dict) -> None:
    milestones = [number(milestone, 0) for milestone in MILESTONES]
    heading("game", *milestones)
    for (game, _), runs in kept.items():
        cells = []
        for milestone in MILESTONES:
            reached = [run for run in runs if run["steps"] >= 0.99 * milestone]
            values = [run["curve"][1][run["curve"][0] <= milestone][-1] for run in reached]
            cells.append(number(np.mean(values)) if values else "")
        row(f"`{game}`", *cells)


def goal_table(kept: dict) -> None:
    heading("game", "return", "reached after hours")
    for (game, _), runs in kept.items():
        for goal in GOALS.get(game, ()):
            first = []
            for run in runs:
                steps, means = run["curve"]
                above = steps[means >= goal]
                if len(above):
                    first.append(above[0] / run["steps_per_hour"])
            if first:
                row(f"`{game}`", goal, f"{extent(first)} ({len(first)} of {len(runs)} seeds)")


def range_table(kept: dict) -> None:
    """Where each curve of the kept runs lies, after the first 500 000 steps: 5 % of the points are
    below, 5 % above."""
    heading("curve", "usual")
    for tag in LOSSES:
        points = []
        for runs in kept.values():
            for run in runs:
                steps, values = run["losses"][tag]
                points.extend(values[steps > 500_000])
        low, high = np.percentile(points, (5, 95))
        row(f"`{tag}`", f"{low:.2g} to {high:.2g}")


def table() -> None:
    kept = groups()
    short_table(kept)
    milestone_table(kept)
    range_table(kept)
    full_table(kept)
    goal_table(kept)


def picture(out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from plot import draw

    kept = groups()
    columns = int(np.ceil(len(kept) ** 0.5))
    rows = -(-len(kept) // columns)
    size = (4 * columns, 3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, dpi=120, squeeze=False)
    for ax in axes.flat[len(kept) :]:
        ax.remove()
    for ax, ((game, _), runs) in zip(axes.flat, kept.items()):
        draw(ax, [run["curve"] for run in runs])
        seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
        ax.set(title=f"{game}, {seeds}", xlabel="steps (4 frames each)")
        ax.grid(alpha=0.3)
    figure.supylabel("return, mean of 100 games", fontsize="medium")
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, help="run directories to keep")
    parser.add_argument("--brief", action="store_true", help="keep curves, flags and scores only")
    parser.add_argument("--unfinished", action="store_true", help="keep what --resume needs")
    parser.add_argument("--table", action="store_true", help="print the tables of the pages")
    parser.add_argument("--picture", type=Path, help="draw all kept games into this file")
    options = parser.parse_args()
    for directory in options.runs:
        if options.unfinished:
            keep_unfinished(directory)
        else:
            keep(directory, options.brief)
    if options.table:
        table()
    if options.picture:
        picture(options.picture)
