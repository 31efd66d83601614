"""Draws learning curves: the mean return of the last 100 games, over steps.

    python tests/plot.py curve.png runs/<run> ...

Runs whose directories have the same <game>__<name> are the seeds of one line: their mean, in a band
from the least to the largest. Where a seed is there twice, each run is a line of its own. The
values at some milestones and at the end are printed. Needs matplotlib (pip install matplotlib).
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from reference import MILESTONES, number, scalars, spread

Curve = tuple[np.ndarray, np.ndarray]  # steps, returns


def draw(axes: Any, curves: list[Curve], label: str | None = None) -> None:
    """One line for the curves of some seeds, as far as all of them go."""
    grid = np.linspace(0, min(steps[-1] for steps, _ in curves), 300)
    values = np.array([np.interp(grid, *curve) for curve in curves])
    axes.plot(grid, values.mean(0), label=label)
    axes.fill_between(grid, values.min(0), values.max(0), alpha=0.3)


def tell(name: str, curves: list[Curve]) -> None:
    """Prints the mean over seeds, and each seed's value, at the milestones and at the end."""
    end = min(steps[-1] for steps, _ in curves)
    for milestone in (*MILESTONES, end):
        if milestone <= end:
            values = [returns[steps <= milestone][-1] for steps, returns in curves]
            print(f"{name}: {number(milestone, 0)} steps: {spread(values)}")


def plot(picture: Path, runs: list[Path]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = defaultdict(list)
    names = [run.name.rsplit("__", 1)[0] for run in runs]  # <game>__<name>__<seed>
    repeated = {name.rsplit("__", 1)[0] for name in names if names.count(name) > 1}
    for run in runs:
        ((steps, returns),) = scalars(run, "charts/return_100")
        if len(steps):
            line = run.name.rsplit("__", 2)[0]
            if line in repeated:
                line = run.name
            lines[line].append((steps, returns))
        else:
            print(f"{run}: no game is over yet")
    if not lines:
        return
    figure, axes = plt.subplots(figsize=(5, 3), dpi=120)
    for name, curves in lines.items():
        label = f"{name}, {len(curves)} seeds" if len(curves) > 1 else name
        draw(axes, curves, label)
        tell(name, curves)
    axes.set(xlabel="steps (4 frames each)", ylabel="return, mean of 100 games")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    options = parser.parse_args(argv)
    try:
        plot(options.picture, options.runs)
    except ImportError:
        print("plot.py: error: it needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
