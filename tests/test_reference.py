"""The shipped agents and the raw lines of the ablation: what the README claims of them can be had
from this clone."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from functools import partial
from pathlib import Path

import numpy as np
import plot
import pytest
import reference
import torch
from launch import SCRIPT, curves, differences, here, load, run_directory, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import ppo_atari

REFERENCE = SCRIPT.parent / "runs" / "reference"
RUNS = sorted(path.parent for path in REFERENCE.glob("*/agent.pt"))


def test_there_is_one():
    assert RUNS


def games_and_bound(claimed: dict) -> tuple[int, float]:
    """How many games tell the agent from a random policy, and what their mean has to reach.

    The bound is half-way from a random policy's mean to the agent's, or lower where the games
    spread widely: the agent falls below it, and a random policy reaches it, by luck with a
    probability of less than 1 in 1 000 each, as drawing from the games in eval.json shows.
    """
    for games in range(2, 10):
        generator = np.random.default_rng(0)
        agent = generator.choice(claimed["scores"], (20_000, games)).mean(1)
        random = generator.choice(claimed["random_scores"], (20_000, games)).mean(1)
        half_way = (claimed["mean"] + claimed["random_mean"]) / 2
        bound = min(half_way, np.quantile(agent, 5e-4))
        if (agent < bound).mean() < 1e-3 and (random >= bound).mean() < 1e-3:
            return games, bound
    pytest.fail("no few games tell the agent from a random policy")


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_shipped_agent_plays(run: Path):
    """Two games, or as many more as tell. A broken wrapper, network or file leaves an agent that
    plays no better than at random. No score is compared exactly: floating point differs from
    processor to processor. With seed 2 the games are short: with others one of Breakout's can take
    three times as long."""
    claimed = json.loads((run / "eval.json").read_text())
    games, bound = games_and_bound(claimed)
    content = ppo_atari.load_file(run / "agent.pt", "weights", "flags")
    args = ppo_atari.parse_args(["--seed", "2"], content["flags"], str(run))
    assert (args.env_id, args.seed) == (claimed["env_id"], 2)
    agent = ppo_atari.make_agent(args, ppo_atari.make_env(args))
    agent.load_state_dict(content["weights"])
    dtype = ppo_atari.choose_dtype(args, ppo_atari.CPU)  # as --evaluate does
    policy = ppo_atari.inference_copy(agent, dtype, ppo_atari.CPU)
    stop = ppo_atari.StopRequest("stopping the evaluation")
    played = ppo_atari.play_full_games(args, policy, games, stop)
    scores = [score for score, _ in played]
    assert len(scores) == games and np.mean(scores) > bound, scores


# Of these runs the film was 1 MB or more.
WITHOUT_FILM = {
    "QbertNoFrameskip-v4__ppo_atari__1__1796014473",
    "SpaceInvadersNoFrameskip-v4__ppo_atari__1__1795974795",
}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_shipped_run_is_whole_and_small(run: Path):
    kinds = {path.suffix for path in run.iterdir()}
    assert kinds >= {".json", ".pt", ".png"}
    assert (".webm" in kinds) == (run.name not in WITHOUT_FILM)
    assert 0 < sum(path.stat().st_size for path in run.glob("events.out.tfevents.*")) < 2 * 2**20
    assert sum(path.stat().st_size for path in run.iterdir()) < 10 * 2**20


def test_a_film_is_kept_where_it_is_small(tmp_path):
    """The last one, which need not be that of the most steps."""
    target = tmp_path / "video.webm"
    reference.keep_film(tmp_path, tmp_path)
    assert not target.exists()
    (tmp_path / "videos").mkdir()
    films = [(2048, 2**20 - 1, True), (1024, 2**20, False), (512, 99, True)]
    for time, (step, size, is_small) in enumerate(films):
        film = tmp_path / "videos" / f"{step}.webm"
        film.write_bytes(bytes(size))
        os.utime(film, (time, time))
        reference.keep_film(tmp_path, tmp_path)
        assert target.exists() == is_small
        if is_small:
            assert target.stat().st_size == size
            target.unlink()


KEPT = sorted(path.parent for path in REFERENCE.glob("*/eval.json"))


@pytest.mark.parametrize("run", KEPT, ids=lambda run: run.name)
def test_kept_runs_lie_beside_new_ones(run: Path):
    """In TensorBoard: the mean of the last 100 games, and a row in the HParams tab."""
    events = EventAccumulator(str(run)).Reload()
    assert "charts/return_100" in events.Tags()["scalars"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_seeds_are_averaged(tmp_path, capsys):
    """Runs of one name: the mean and the spread at each milestone and at the end of the shortest;
    a picture. Values are those of return_100 at the last step until then."""
    runs = []
    for seed, value in ((1, 10.0), (2, 14.0)):
        run = tmp_path / f"Game__mine__{seed}__100"
        writer = SummaryWriter(str(run))
        for step in range(50_000, 150_000 * seed, 50_000):
            writer.add_scalar("charts/return_100", value * step, step)
        writer.close()
        runs.append(str(run))
    SummaryWriter(str(tmp_path / "Game__mine__3__100")).close()
    picture = tmp_path / "curve.png"
    assert plot.main([str(picture), *runs, str(tmp_path / "Game__mine__3__100")]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert "no game is over yet" in first
    mean = "1 200 000.0 ± 282 842.7 (1 000 000.0, 1 400 000.0)"
    assert lines == [f"Game__mine: 100 000 steps: {mean}"] * 2  # a milestone, and the end
    assert picture.read_bytes()[:4] == b"\x89PNG"
    plot.main([str(picture), runs[0], shutil.copytree(runs[0], f"{runs[0]}1")])
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["Game__mine__1__100"] * 2 + ["Game__mine__1__1001"] * 2  # no seeds of one


def test_a_picture_needs_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main([str(tmp_path / "curve.png"), str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "pip install matplotlib" in error and error.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        plot.main(["--help"])
    assert end.value.code == 0


def test_the_pages_have_the_tables_of_what_is_kept(capsys):
    """The README adds columns to one of them."""
    reference.table()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    games = {json.loads((run / "eval.json").read_text())["env_id"] for run in RUNS}
    assert len(lines) >= 4 + 3 * len(games)
    pages = []
    for page in (SCRIPT.parent / "README.md", REFERENCE / "README.md"):
        pages += page.read_text().splitlines()
    for line in lines:
        assert any(there.startswith(line) for there in pages), line


def test_another_way_to_learn_is_no_seed_of_the_default(tmp_path, monkeypatch, capsys):
    """Runs are averaged over seeds; one with other flags has a row of its own, and no published
    score beside it. How a run was started makes no difference."""
    flags = {"env_id": "PongNoFrameskip-v4", "total_timesteps": 10_000_000}
    runs = [
        {"seed": 1, "num_workers": 2, "resume": "runs/1"},
        {"seed": 2, "num_groups": 1, "eval_episodes": 30, "capture_video": True},
        {"seed": 1, "scale_obs": False, "learning_rate": 0.001},
    ]
    for run, (value, others) in enumerate(zip((10, 14, 99), runs)):
        folder = tmp_path / str(run)
        with SummaryWriter(str(folder)) as writer:
            writer.add_scalar("charts/return_100", value, 9_999_360)
            writer.add_scalar("charts/SPS", 1000, 9_999_360)
        scores = {"step": 9_999_360, "mean": value, "scores": [value], "random_mean": -20}
        (folder / "eval.json").write_text(json.dumps(scores))
        (folder / "args.json").write_text(json.dumps({"flags": flags | others}))
    monkeypatch.setattr(reference, "REFERENCE", tmp_path)
    reference.short_table(reference.groups())
    default, other = capsys.readouterr().out.splitlines()[-2:]
    published = reference.PUBLISHED["PongNoFrameskip-v4"][0]
    returns = "12.0 ± 2.8 (10.0, 14.0)"
    assert default == f"| `PongNoFrameskip-v4` | 2 | {returns} | {published} | -20.0 |"
    name = "PongNoFrameskip-v4 --learning-rate 0.001 --no-scale-obs"
    assert other == f"| `{name}` | 1 | 99.0 |  | -20.0 |"


def test_an_unfinished_run_goes_on_elsewhere(tmp_path, monkeypatch, capfd):
    """From a sixth of its checkpoint, in which the network's weights are rounded and each unit's
    moments are their mean; all else is equal. The tables do not show it."""
    flags = ["--env-id", "ALE/Breakout-v5", "--num-envs", "1", "--num-steps", "16"]
    flags += ["--num-workers", "0", "--eval-episodes", "0", "--total-timesteps"]
    with chdir(tmp_path):
        assert here(capfd, *flags, 32)[0] == 0
        run = run_directory(tmp_path)
    monkeypatch.setattr(reference, "REFERENCE", tmp_path / "kept")
    reference.keep_unfinished(run)
    assert not reference.groups()
    kept = tmp_path / "kept" / run.name
    assert (kept / "checkpoint.pt").stat().st_size < (run / "checkpoint.pt").stat().st_size / 5
    full, small = (torch.load(at / "checkpoint.pt", weights_only=True) for at in (run, kept))
    exact, rounded = (content.pop("weights") for content in (full, small))
    for name, tensor in exact.items():
        bound = 2**-8 * tensor.abs() if "network" in name else 0
        assert torch.all((tensor - rounded[name]).abs() <= bound), name
    moments, means = (content["optimizer"].pop("state") for content in (full, small))
    assert not differences(full, small)
    for index, of_a_weight in moments.items():
        for name, moment in of_a_weight.items():
            expected = moment.double().numpy()
            rounding = 1e-6 * np.abs(expected).max()
            if moment.dim() > 1:
                units = expected.reshape(len(expected), -1)
                expected = np.stack([np.full_like(unit, unit.mean()) for unit in units])
            found = means[index][name].reshape(expected.shape).numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=rounding)

    copied = shutil.copytree(kept, tmp_path / "copied")
    for goes_on in (run, copied):
        assert here(capfd, "--resume", goes_on, "--total-timesteps", 64)[0] == 0
    assert [step for step, _ in curves(copied)["losses/value_loss"]] == [32, 48, 64]
    moved = []
    deviation = []
    for name, tensor in weights(run).items():
        moved.append((tensor - exact[name]).flatten())
        deviation.append((tensor - weights(copied)[name]).flatten())
    assert torch.cat(deviation).norm() < torch.cat(moved).norm()


def script_of_the_ablation(commit: str, folder: Path, name: str = "ppo_atari.py") -> Path:
    """The script as it was at the commit that a raw line names; "-dirty": with
    runs/reference/ablation.patch. Some other scripts are that one with a patch of their name."""
    patch = REFERENCE / name.replace(".py", ".patch")
    if patch.exists():
        name = "ppo_atari.py"
    elif commit.endswith("-dirty"):
        patch = REFERENCE / "ablation.patch"
    git = ["git", "-C", SCRIPT.parent, "show", f"{commit.removesuffix('-dirty')}:{name}"]
    shown = subprocess.run(git, capture_output=True)
    if shown.returncode:
        pytest.skip("this copy lacks the history")
    script = folder / Path(name).name
    script.write_bytes(shown.stdout)
    if patch.exists():
        subprocess.run(["git", "apply", patch], cwd=folder, check=True)
    return script


def test_the_raw_lines_name_the_script_that_made_them(tmp_path):
    made = set()
    for text in (REFERENCE / "ablation.jsonl").read_text().splitlines():
        line = json.loads(text)
        name = re.findall(r"--script (\S+)", line["flags"])
        made.add((line["commit"], line["script"], *name))
    assert made
    for commit, digest, *name in made:
        script = script_of_the_ablation(commit, tmp_path, *name)
        assert hashlib.sha256(script.read_bytes()).hexdigest()[:12] == digest


def test_the_ablation_s_float32_rounds_as_bfloat16_does(tmp_path):
    """Against torch's own bfloat16 kernels: outputs and gradients lie four times closer to theirs
    than float32's do."""
    patched = load(script_of_the_ablation("ece292e-dirty", tmp_path), "ablation")
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (4, 4, 9, 9), generator=generator).float()
    smooth = torch.nn.functional.interpolate(coarse, (84, 84), mode="bilinear")
    obs = smooth.byte()  # neighbours are alike, as in a game
    action = torch.arange(4)
    patched_copy = patched.inference_copy  # of the script at that time, which had no device
    our_copy = partial(ppo_atari.inference_copy, device=ppo_atari.CPU)
    found = []
    for script, inference_copy, dtype in (
        (patched, patched_copy, torch.bfloat16),
        (ppo_atari, our_copy, torch.bfloat16),
        (ppo_atari, our_copy, torch.float32),
    ):
        torch.manual_seed(1)
        agent = script.Agent((4, 84, 84), 6, partial(script.nature_cnn, 4, 84, True))
        actor = inference_copy(agent, dtype)
        for parameter in agent.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        actor.load_state_dict(agent.state_dict())  # which the patch must round anew
        agent.dtype = dtype
        new = agent.get_action_and_value(obs, action)
        acted = actor.get_action_and_value(obs, action)
        loss = new["log_prob"].sum() + new["value"].square().sum() - new["entropy"].sum()
        loss.backward()
        numbers = {name: parameter.grad for name, parameter in agent.named_parameters()}
        numbers["log_prob"] = new["log_prob"].detach()
        numbers["acted"] = acted["log_prob"]
        numbers["value"] = acted["value"]
        found.append(numbers)
    for name, rounded in found[0].items():
        native = found[1][name]
        exact = found[2][name]
        assert (rounded - native).norm() < (native - exact).norm() / 4, name
