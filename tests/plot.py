"""Draws the learning curves of runs: python tests/plot.py OUT.png RUN_DIRECTORY ...

Each line is the mean return of the last 100 games, over steps; its last value and those at some
milestones are printed. Needs matplotlib (pip install matplotlib).
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def curve(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean of the up to 100 returns that ended until then."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    games = events.Scalars("charts/episodic_return")
    steps = np.array([game.step for game in games])
    total = np.cumsum([0.0] + [game.value for game in games])
    last = np.arange(1, len(total))
    first = np.maximum(0, last - 100)
    return steps, (total[last] - total[first]) / (last - first)


def main(out: str | Path, *runs: str | Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 3), dpi=120)
    for run in map(Path, runs):
        steps, means = curve(run)
        axes.plot(steps, means, label=run.name.rsplit("__", 1)[0])
        for milestone in (0.1e6, 0.25e6, 0.5e6, 0.75e6, 1e6, 2e6, 5e6, 10e6):
            if steps[-1] >= 0.99 * milestone:
                print(f"{run.name}: {milestone:,.0f} steps: {means[steps <= milestone][-1]:.1f}")
    axes.set(xlabel="steps (4 frames each)", ylabel="return, mean of 100 games")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
