"""See it: evaluation, videos, TensorBoard, playing and tracking."""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from contextlib import chdir, suppress
from pathlib import Path
from types import SimpleNamespace

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from launch import (
    content,
    curves,
    finish,
    fork,
    here,
    refusal,
    run_directory,
    same_weights,
    start,
    weights,
)
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_atari

GAME = "ALE/Breakout-v5"  # short games, rewards of 1 to 7 points, colours
# A game of a quarter of a minute has some 60 steps of 16 frames.
TRAIN = ["--env-id", GAME, "--num-envs", "2", "--num-steps", "16", "--frame-size", "36",
         "--frame-skip", "16", "--num-workers", "0", "--total-timesteps", "96",
         "--update-epochs", "1"]  # fmt: skip


DUMMIES = {"SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}  # windows that are not shown


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a finished run of three iterations without any evaluation."""
    with chdir(tmp_path_factory.mktemp("trained")):
        assert ppo_atari.main([*TRAIN, "--eval-episodes", "0"]) == 0
        return run_directory(Path.cwd())


@pytest.fixture(scope="module", autouse=True)
def tracked(tmp_path_factory):
    """A run with --track and where it was started: first of all, as Weights & Biases takes its
    time."""
    cwd = tmp_path_factory.mktemp("tracked")
    flags = ["--eval-episodes", 0, "--track"]
    flags += ["--wandb-project-name", "a-test", "--wandb-name", "its-name"]
    process = start(*TRAIN, *flags, cwd=cwd, WANDB_MODE="offline", WANDB_DIR=str(cwd))
    yield process, cwd
    process.kill()


@pytest.fixture(scope="module", autouse=True)
def watched(trained, tmp_path_factory):
    """A game in a window at its real speed, and where it was started: first of all, as it takes
    half a minute."""
    cwd = tmp_path_factory.mktemp("watched")
    process = fork("--play", "--evaluate", trained, cwd=cwd, **DUMMIES)
    yield process, cwd
    process.kill()


@pytest.fixture
def run(trained, tmp_path):
    """A copy to write into."""
    return shutil.copytree(trained, tmp_path / "run")


def images(run: Path) -> list[Image.Image]:
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    found = [image for tag in events.Tags()["images"] for image in events.Images(tag)]
    return [Image.open(io.BytesIO(image.encoded_image_string)) for image in found]


def test_evaluation_is_reproducible(run, capfd):
    """The same seed gives the same games, from the run directory and from the file; another seed
    gives other games."""
    results = []
    for argv in ([run], [run / "agent.pt"], [run, "--seed", 2]):
        code, out, error = here(capfd, "--evaluate", *argv, "--eval-episodes", 2)
        assert code == 0, error
        results.append(json.loads((run / "eval.json").read_text()))
    first, again, other = results
    assert first == again
    assert (first["scores"], first["lengths"]) != (other["scores"], other["lengths"])
    assert [first["env_id"], first["seed"], first["step"], len(first["scores"])] == [GAME, 1, 96, 2]
    assert first["mean"] == pytest.approx(np.mean(first["scores"]))
    assert first["std"] == pytest.approx(np.std(first["scores"]))
    assert first["random_mean"] == pytest.approx(np.mean(first["random_scores"]))
    for score in other["scores"]:  # of the last call
        assert f"{score:g}" in out, out
    for name in ("mean", "std", "random_mean"):
        assert f"{other[name]:.2f}" in out, (name, out)


def test_score_is_the_emulators(run, capfd, monkeypatch):
    """Each score is the sum of what the emulator itself paid, unclipped, from its last reset to the
    real game over."""
    act = ale_py.ALEInterface.act
    reset_game = ale_py.ALEInterface.reset_game
    emulators = []
    paid = []  # to each of them, since its last reset
    games = []

    def counting_reset(ale):
        if ale not in emulators:
            emulators.append(ale)
            paid.append([])
        i = emulators.index(ale)
        if len(paid[i]) > 100:  # more than the no-ops of a start
            assert ale.game_over(with_truncation=False) and ale.lives() == 0
            games.append(paid[i])
        paid[i] = []
        reset_game(ale)

    def counting_act(ale, *args):
        reward = act(ale, *args)
        paid[emulators.index(ale)].append(reward)
        return reward

    monkeypatch.setattr(ale_py.ALEInterface, "reset_game", counting_reset)
    monkeypatch.setattr(ale_py.ALEInterface, "act", counting_act)
    assert here(capfd, "--evaluate", run, "--eval-episodes", 2)[0] == 0
    result = json.loads((run / "eval.json").read_text())
    scores = result["scores"] + result["random_scores"]
    assert sorted(sum(game) for game in games) == sorted(scores)
    rewards = np.concatenate(games)
    assert rewards.sum() > np.sign(rewards).sum() > 0  # or clipping would have made no difference


def test_evaluating_leaves_no_trace_on_training(trained, tmp_path, monkeypatch, capfd):
    """The weights are bit for bit those of a run that never evaluates; the scores are in the curves
    where asked for, and --evaluate finds the last ones again."""
    monkeypatch.chdir(tmp_path)
    code, _, error = here(capfd, *TRAIN, "--eval-interval", 64, "--eval-episodes", 1)
    assert code == 0, error
    run = run_directory(tmp_path)
    assert same_weights(weights(run), weights(trained))
    result = json.loads((run / "eval.json").read_text())
    evaluated = curves(run)
    assert [step for step, _ in evaluated["eval/episodic_return"]] == [64, 96]
    assert evaluated["eval/episodic_return"][-1] == (96, pytest.approx(result["mean"]))
    assert evaluated["eval/episodic_length"][-1] == (96, result["lengths"][0])
    assert not any(tag.startswith("eval/") for tag in curves(trained))
    (run / "eval.json").unlink()
    assert here(capfd, "--evaluate", run, "--eval-episodes", 1)[0] == 0
    assert json.loads((run / "eval.json").read_text()) == result


def test_no_episodes_do_nothing(trained, run, capfd):
    """--eval-episodes 0, at the end of training and in --evaluate: no games, no eval.json."""
    assert here(capfd, "--evaluate", run, "--eval-episodes", 0)[0] == 0
    assert not (run / "eval.json").exists()
    assert not (trained / "eval.json").exists()


def test_agent_that_draws_by_itself():
    """From torch, and without the numbers it is given: the same games again, whatever was drawn
    before, and what follows in the caller's generator is what it would have been."""

    class Drawing:
        def get_action_and_value(self, obs, uniform):
            return {"action": torch.randint(4, (len(obs),))}

    args = ppo_atari.parse_args(["--env-id", GAME, "--frame-size", "36", "--frame-skip", "16"])
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        stop = SimpleNamespace(signum=0)
        results.append(ppo_atari.play_full_games(args, Drawing(), 2, stop))
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1]
    assert results[0][0] != results[0][1]


def frames_of(path: Path) -> list[np.ndarray]:
    """The RGB frames of a film."""
    film = cv2.VideoCapture(str(path))
    frames = []
    while True:
        there_is_one, frame = film.read()
        if not there_is_one:
            return frames
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))


def test_film(run, capfd, monkeypatch):
    """The video has a frame for each step of the game, the right size, speed and the emulator's
    colours; so has the GIF."""
    step = ppo_atari.FrameStack.step
    screens = {}

    def watched(env, action):
        result = step(env, action)
        screens.setdefault(env, []).append(env.unwrapped.ale.getScreenRGB())
        return result

    monkeypatch.setattr(ppo_atari.FrameStack, "step", watched)
    code, _, error = here(capfd, "--evaluate", run, "--eval-episodes", 1, "--capture-video")
    assert code == 0, error
    game = next(iter(screens.values()))
    (path,) = (run / "videos").iterdir()
    assert path.suffix == ".webm"
    signature = path.read_bytes()[:4]
    assert signature == b"\x1a\x45\xdf\xa3"  # of the format that browsers expect
    assert path.stat().st_size < 4e6
    assert cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS) == 4  # nearly 60 / 16
    frames = frames_of(path)
    height, width, _ = game[0].shape
    assert frames[0].shape[0] % height == frames[0].shape[1] % width == 0
    assert frames[0].shape[0] // height == frames[0].shape[1] // width > 0
    assert len(frames) == len(game)
    for i in (10, len(game) // 2):
        shown = cv2.resize(frames[i], (width, height), interpolation=cv2.INTER_AREA).astype(float)
        error = np.abs(shown - game[i]).mean()
        assert error < 6
        assert np.abs(shown[..., ::-1] - game[i]).mean() > 2 * error  # red is not blue
    (gif,) = (image for image in images(run) if image.format == "GIF")
    assert gif.size == (width, height)
    assert gif.n_frames > 1
    gif.seek(gif.n_frames // 2)
    middle = np.asarray(gif.convert("RGB")).astype(float)
    assert min(np.abs(middle - screen).mean() for screen in game) < 6


def test_film_of_a_long_game(tmp_path):
    """Such as one without frame skip: a frame for each step, at the game's speed, and no memory of
    all the screens. The GIF shows the whole film, in at most 600 frames."""
    film = ppo_atari.Film(fps=60)
    steps = 1500
    kept = []
    for i in range(steps):
        obs = np.full((4, 36, 36), i % 256, np.uint8)
        screen = np.full((16, 16, 3), round(255 * i / steps), np.uint8)
        film.add(obs, screen)
        kept += [weakref.ref(obs), weakref.ref(screen)]
        kept = [reference for reference in kept if reference() is not None]
        assert len(kept) <= 4  # of this step, and what the agent saw at one moment
        lists = [value for value in vars(film).values() if isinstance(value, list)]
        assert sum(map(len, lists)) <= 600
    (tmp_path / "film.webm").write_bytes(film.webm())
    brightness = [frame.mean() for frame in frames_of(tmp_path / "film.webm")]
    assert len(brightness) == steps
    assert np.abs(np.array(brightness) - np.linspace(0, 255, steps)).max() < 10
    gif = Image.open(io.BytesIO(film.gif()))
    assert 200 <= gif.n_frames <= 600
    seconds = 0
    for i in range(gif.n_frames):
        gif.seek(i)
        assert np.asarray(gif.convert("L")).mean() == pytest.approx(255 * i / gif.n_frames, abs=5)
        seconds += gif.info["duration"] / 1000
    assert seconds == pytest.approx(steps / 60, rel=0.15)


def test_film_ends_after_five_minutes(tmp_path):
    film = ppo_atari.Film(fps=1)
    for i in range(310):
        film.add(np.zeros((4, 36, 36), np.uint8), np.full((16, 16, 3), i % 256, np.uint8))
    (tmp_path / "film.webm").write_bytes(film.webm())
    assert len(frames_of(tmp_path / "film.webm")) == 300


@pytest.mark.parametrize("frame_skip", [1, 4, 120])
def test_every_step_is_filmed(frame_skip):
    """Those of the game itself, with the screen that the step ended with."""
    flags = ["--env-id", "ALE/Breakout-v5", "--frame-skip", str(frame_skip)]
    args = ppo_atari.parse_args(flags)
    shots = []
    film = SimpleNamespace(add=lambda obs, screen: shots.append((obs, screen)))
    env = ppo_atari.FilmEnv(ppo_atari.make_env(args), film)
    env.reset(seed=1)
    for i, action in enumerate((2, 2, 3, 3)):  # RIGHT and LEFT
        obs = env.step(action)[0]
        assert len(shots) == i + 1
        assert np.array_equal(shots[-1][0], obs)
        assert np.array_equal(shots[-1][1], env.unwrapped.ale.getScreenRGB())
    assert len({screen.tobytes() for _, screen in shots}) > 1


def test_what_the_network_sees(trained):
    """Training logs a picture of the screen beside the four frames, and the hyperparameters as
    text."""
    (image,) = images(trained)
    assert image.size[0] >= 5 * 160
    assert len(np.unique(np.asarray(image))) > 10
    tensors = EventAccumulator(str(trained)).Reload()
    assert any("hyperparameters" in tag for tag in tensors.Tags()["tensors"])


@pytest.mark.parametrize("what", ["missing", "noise", "other content", "another game"])
def test_foreign_agent_is_refused(what, run, capfd):
    """No file, a file of random bytes, a torch file of something else, an agent with another number
    of actions."""
    path = run / "agent.pt"
    saved = torch.load(path, weights_only=True)
    path.unlink()
    if what == "noise":
        path.write_bytes(np.random.default_rng(1).bytes(100_000))
    elif what == "other content":
        torch.save([1, 2, 3], path)
    elif what == "another game":
        saved["flags"]["env_id"] = "ALE/SpaceInvaders-v5"
        torch.save(saved, path)
    assert path.name in refusal(capfd, "--evaluate", run)
    assert path.name in refusal(capfd, "--evaluate", path)
    assert not (run / "eval.json").exists()


def test_games_that_a_time_limit_ends(monkeypatch, run, capfd):
    """Above the statistics, which do not see it: each is over all the same, with what it has earned
    in its nine steps and the two that press FIRE."""
    make = ppo_atari.make_env
    earned = []

    class Limit(gym.wrappers.TimeLimit):
        def __init__(self, env):
            super().__init__(env, 9)

        def step(self, action):
            result = super().step(action)
            if result[3]:
                earned.append(float(self.get_wrapper_attr("episode_returns")))
            return result

    monkeypatch.setattr(ppo_atari, "make_env", lambda *args, **kwargs: Limit(make(*args, **kwargs)))
    argv = ["--evaluate", run, "--eval-episodes", 3, "--no-episodic-life", "--frame-skip", 30]
    code, _, error = here(capfd, *argv)
    assert code == 0, error
    result = json.loads((run / "eval.json").read_text())
    assert result["lengths"] == [11, 11, 11]
    assert result["scores"] + result["random_scores"] == earned
    assert sum(earned) > 0


def evaluated(capfd, run: Path, *flags) -> tuple[str, str]:
    """What --evaluate of one game prints, with exit code 0: the score, and what stands on standard
    error."""
    code, out, error = here(capfd, "--evaluate", run, "--eval-episodes", 1, *flags)
    assert code == 0 and re.search(r"(?m)^mean [\d.]+ .* over 1 full games", out), (out, error)
    return out, own_lines(error)


def own_lines(error: str) -> str:
    """Without what OpenCV itself says about each film."""
    return re.sub(r"(?m)^OpenCV: .*\n", "", error)


def test_published_agent_stays_as_it_is(run, tmp_path, capfd):
    """A directory without checkpoint.pt is not a run of one's own: its scores are printed, and
    nothing changes there. --output names a directory, which need not exist, for what else there
    is."""
    (run / "checkpoint.pt").unlink()
    (run / "eval.json").write_text("what its author measured")
    before = content(run)
    output = tmp_path / "new" / "scores"
    out, error = evaluated(capfd, run, "--capture-video")
    assert content(run) == before and "--output" in error and error.count("\n") == 1
    more, error = evaluated(capfd, run, "--capture-video", "--output", output)
    assert more == f"{out}film: {output}/videos/96.webm\n" and error == ""
    assert content(run) == before
    result = json.loads((output / "eval.json").read_text())
    assert f"{result['scores'][0]:g}" in out
    assert curves(output)["eval/episodic_return"] == [(96, pytest.approx(result["mean"]))]
    assert [path.suffix for path in (output / "videos").iterdir()] == [".webm"]


def test_output_leaves_the_run_as_it_is(run, tmp_path, capfd):
    """With --output, everything goes there and nothing to the run, even to one's own."""
    before = content(run)
    evaluated(capfd, run, "--output", tmp_path / "scores")
    assert content(run) == before
    assert (tmp_path / "scores" / "eval.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_evaluating_where_nothing_can_be_written(run, tmp_path, capfd):
    """A file in a directory into which not even root can write, and where nothing has to be
    written; a run of one's own on a read-only disk, with --output on another."""
    expected, _ = evaluated(capfd, run)
    with open(run / "agent.pt", "rb") as file:
        assert evaluated(capfd, Path(f"/proc/self/fd/{file.fileno()}")) == (expected, "")
    if subprocess.run(["mount", "--bind", run, run], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", run], check=True)
        before = content(run)
        assert evaluated(capfd, run, "--output", tmp_path / "scores") == (expected, "")
        assert content(run) == before
    finally:
        subprocess.run(["umount", "--lazy", run], check=True)


def test_filmed_evaluation_on_a_full_disk(run, tmp_path):
    """Where there is no room for the film: the system's error ends it with exit code 1, after the
    score, and no half film stands there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        full = shutil.copytree(run, disk / "run")
        filler = disk / "filler"
        with suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        os.truncate(filler, filler.stat().st_size - (1 << 14))
        argv = ["--evaluate", full, "--eval-episodes", 1, "--capture-video", "--frame-skip", 4]
        assert finish(fork(*argv, cwd=tmp_path)) == 1
        log = (tmp_path / "log").read_text()
        assert "over 1 full games" in log and "No space left" in log, log
        assert len(json.loads((full / "eval.json").read_text())["scores"]) == 1
        assert not list(full.rglob("*.webm"))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_largest_random_number(run, capfd, monkeypatch):
    """The largest double below 1 is 1 as a float32. It must still choose an action, of a policy or
    at random."""
    generator = SimpleNamespace(random=lambda: 1 - 2.0**-53)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: generator)
    code, _, error = here(capfd, "--evaluate", run, "--eval-episodes", 1)
    assert code == 0, error


def without_letters() -> None:
    """As PYTHONIOENCODING=ascii does."""
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


def test_scores_on_a_terminal_without_the_letters(run, tmp_path):
    """They are shown as far as it can, and written."""
    argv = ["--evaluate", run, "--eval-episodes", 1]
    process = fork(*argv, cwd=tmp_path, before=without_letters)
    log = tmp_path / "log"
    assert finish(process) == 0, log.read_text()
    mean = json.loads((run / "eval.json").read_text())["mean"]
    assert re.search(rf"mean {mean:.2f} \S+ 0\.00 over 1", log.read_text()), log.read_text()


def test_tracking_without_wandb(tmp_path, capfd, monkeypatch):
    """One line says what to install."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refusal(capfd, *TRAIN, "--eval-episodes", 0, "--track")


def test_tracking_under_any_name(tmp_path, monkeypatch):
    """Weights & Biases refuses these characters in a run's id; a name for the experiment may have
    them."""
    monkeypatch.chdir(tmp_path)
    ids = []
    wandb = SimpleNamespace(init=lambda **given: ids.append(given["id"]))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = ppo_atari.parse_args([*TRAIN, "--track", "--exp-name", "a:b;c,d#e?f'g"])
    ppo_atari.open_run(args, 0).close()
    assert "a-b-c-d-e-f-g" in ids[0]


def test_tracking_offline(tracked):
    """Writes a Weights & Biases run without a network."""
    pytest.importorskip("wandb")
    process, cwd = tracked
    assert finish(process) == 0, (cwd / "log").read_text()
    (file,) = cwd.glob("wandb/offline-run-*/*.wandb")
    recorded = file.read_bytes()
    for word in (b"a-test", b"its-name", b"losses/value_loss"):
        assert word in recorded


def test_playing_without_pygame(capfd, monkeypatch):
    """One line says what to install."""
    monkeypatch.delitem(sys.modules, "gymnasium.utils.play", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "pygame"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pygame", None)
    assert "pip install pygame" in refusal(capfd, "--play", "--env-id", "ALE/Breakout-v5")


def press_keys() -> None:
    """FIRE from the 10th frame to the 30th, RIGHT from the 40th on; the 90th closes the window.
    What the emulator got goes to the file "acted"."""
    import pygame

    act = ale_py.ALEInterface.act
    events = {
        10: pygame.event.Event(pygame.KEYDOWN, key=pygame.K_SPACE),
        30: pygame.event.Event(pygame.KEYUP, key=pygame.K_SPACE),
        40: pygame.event.Event(pygame.KEYDOWN, key=pygame.K_d),
        90: pygame.event.Event(pygame.QUIT),
    }
    frames = itertools.count(1)
    acted = []

    def watched(ale, action, *args):
        acted.append(int(getattr(action, "value", action)))
        Path("acted").write_text(json.dumps(acted))
        return act(ale, action, *args)

    def scripted(*args, **kwargs):
        frame = next(frames)
        return [events[frame]] if frame in events else []

    ale_py.ALEInterface.act = watched
    pygame.event.get = scripted


def test_playing_with_scripted_keys(tmp_path):
    """In a window that SDL only pretends to open: the keys reach the game, and closing the window
    ends it."""
    pytest.importorskip("pygame")
    argv = ["--play", "--env-id", "ALE/Breakout-v5"]
    process = fork(*argv, cwd=tmp_path, before=press_keys, **DUMMIES)
    log = tmp_path / "log"
    assert finish(process, 60) == 0, log.read_text()
    out = log.read_text()
    assert re.search(r"(?i)space.*FIRE", out) and re.search(r"\bd\b.*RIGHT", out), "tell the keys"
    acted = json.loads((tmp_path / "acted").read_text())
    assert len(acted) <= 100, "one frame of the emulator per frame of the window"
    fire = ale_py.Action.FIRE.value
    right = ale_py.Action.RIGHT.value
    assert acted.count(fire) == 20 and acted.count(right) > 20
    assert acted.index(fire) < acted.index(right)


def test_playing_the_game_that_the_flags_describe(monkeypatch, capfd):
    """Its sticky actions, its actions and its seed."""
    pytest.importorskip("pygame")
    games = []

    def play(env, **given):
        games.append((env, given["seed"]))

    monkeypatch.setattr("gymnasium.utils.play.play", play)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # which needs no display
    flags = ["--repeat-action-probability", 0, "--full-action-space", "--seed", 7]
    assert here(capfd, "--play", *flags)[0] == 0
    env, seed = games[0]
    assert env.action_space.n == 18 and seed == 7
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == 0


def test_watching_the_agent(watched):
    """--play with --evaluate shows a game in a window (here a pretended one) and tells its
    score."""
    pytest.importorskip("pygame")
    process, cwd = watched
    assert finish(process) == 0, (cwd / "log").read_text()
    assert "score" in (cwd / "log").read_text()
