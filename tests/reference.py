"""Copies what is worth keeping of finished runs to runs/reference/: python tests/reference.py RUN_DIRECTORY ...

The scalars as one mean per 10 000 steps, args.json, eval.json, the last video, the curve as a PNG (pip install
matplotlib) and agent.pt with the networks' weights in bfloat16, which is what --precision bfloat16 plays with anyway.
"""

import shutil
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from plot import main as plot
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

REFERENCE = Path(__file__).resolve().parents[1] / "runs" / "reference"


def thin(run: Path, target: Path, every: int = 10_000) -> None:
    """Writes the mean of each scalar over each stretch of steps, at its last step and time; evaluations whole."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    writer = SummaryWriter(str(target))
    for tag in events.Tags()["scalars"]:
        for _, stretch in groupby(events.Scalars(tag), lambda point: point.step // every):
            points = list(stretch)
            value = points[-1].value if tag.startswith("eval/") else np.mean([point.value for point in points])
            writer.add_scalar(tag, value, points[-1].step, points[-1].wall_time)
    writer.close()


def keep(run: Path) -> None:
    target = REFERENCE / run.name
    target.mkdir(parents=True)
    thin(run, target)
    for name in ("args.json", "eval.json"):
        shutil.copy(run / name, target / name)
    for video in sorted(run.glob("videos/*.webm"), key=lambda path: path.stat().st_mtime)[-1:]:
        shutil.copy(video, target / "video.webm")
    content = torch.load(run / "agent.pt", weights_only=True)
    for name, tensor in content["weights"].items():
        if "network" in name:
            content["weights"][name] = tensor.bfloat16()
    torch.save(content, target / "agent.pt")
    plot(target / "curve.png", run)
    print(target, f"{sum(path.stat().st_size for path in target.iterdir()) / 2**20:.1f} MB")


if __name__ == "__main__":
    for directory in sys.argv[1:]:
        keep(Path(directory))
