"""See it: evaluation, videos, TensorBoard, playing and tracking."""

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import chdir, suppress
from pathlib import Path
from types import SimpleNamespace

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from launch import content, curves, finish, here, refusal, run_directory, same_weights, start, weights
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_atari

GAME = "ALE/SpaceInvaders-v5"  # short games, rewards of 5 to 30 points, colours
TRAIN = ["--env-id", GAME, "--num-envs", "2", "--num-steps", "16", "--frame-size", "36", "--num-workers", "0",
         "--total-timesteps", "96", "--update-epochs", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a finished run of three iterations without any evaluation."""
    with chdir(tmp_path_factory.mktemp("trained")):
        assert ppo_atari.main([*TRAIN, "--eval-episodes", "0"]) == 0
        return run_directory(Path.cwd())


@pytest.fixture(scope="module", autouse=True)
def tracked(tmp_path_factory):
    """A run with --track and where it was started: first of all, as Weights & Biases takes its time."""
    cwd = tmp_path_factory.mktemp("tracked")
    flags = ("--eval-episodes", 0, "--track", "--wandb-project-name", "a-test", "--wandb-name", "its-name")
    process = start(*TRAIN, *flags, cwd=cwd, WANDB_MODE="offline", WANDB_DIR=str(cwd))
    yield process, cwd
    process.kill()


@pytest.fixture(scope="module", autouse=True)
def watched(trained, tmp_path_factory):
    """A game in a window at its real speed, and where it was started: first of all, as it takes half a minute."""
    cwd = tmp_path_factory.mktemp("watched")
    process = start("--play", "--evaluate", trained, cwd=cwd, SDL_VIDEODRIVER="dummy", SDL_AUDIODRIVER="dummy")
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
    """The same seed gives the same games, from the run directory and from the file; another seed gives other games."""
    results = []
    for argv in ([run], [run / "agent.pt"], [run, "--seed", 2]):
        code, out, error = here(capfd, "--evaluate", *argv, "--eval-episodes", 3)
        assert code == 0, error
        results.append(json.loads((run / "eval.json").read_text()))
    first, again, other = results
    assert first == again
    assert (first["scores"], first["lengths"]) != (other["scores"], other["lengths"])
    assert [first["env_id"], first["seed"], first["step"], len(first["scores"])] == [GAME, 1, 96, 3]
    assert first["mean"] == pytest.approx(np.mean(first["scores"]))
    assert first["std"] == pytest.approx(np.std(first["scores"]))
    assert first["random_mean"] == pytest.approx(np.mean(first["random_scores"]))
    for number in (*other["scores"], other["mean"], other["std"], other["random_mean"]):  # of the last call
        assert f"{number:g}" in out or f"{number:.2f}" in out or f"{number:.1f}" in out, (number, out)


def test_score_is_the_emulators(run, capfd, monkeypatch):
    """Each score is the sum of what the emulator itself paid, unclipped, from its last reset to the real game over."""
    paid, emulators = {}, []
    act, reset_game = ale_py.ALEInterface.act, ale_py.ALEInterface.reset_game

    def counting_reset(ale):
        if not any(ale is other for other in emulators):
            emulators.append(ale)
        paid[id(ale)] = []
        reset_game(ale)

    def counting_act(ale, *args):
        reward = act(ale, *args)
        paid[id(ale)].append(reward)
        return reward

    monkeypatch.setattr(ale_py.ALEInterface, "reset_game", counting_reset)
    monkeypatch.setattr(ale_py.ALEInterface, "act", counting_act)
    assert here(capfd, "--evaluate", run, "--eval-episodes", 2)[0] == 0
    result = json.loads((run / "eval.json").read_text())
    played = [ale for ale in emulators if len(paid[id(ale)]) > 100]
    assert all(ale.game_over(with_truncation=False) and ale.lives() == 0 for ale in played)
    assert sorted(sum(paid[id(ale)]) for ale in played) == sorted(result["scores"] + result["random_scores"])
    rewards = np.concatenate([paid[id(ale)] for ale in played])
    assert rewards.sum() > np.sign(rewards).sum() > 0  # or clipping would have made no difference


def test_evaluating_leaves_no_trace_on_training(trained, tmp_path, monkeypatch, capfd):
    """The weights are bit for bit those of a run that never evaluates; the scores are in the curves where asked for."""
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


def test_no_episodes_do_nothing(trained, run, capfd):
    """--eval-episodes 0, at the end of training and in --evaluate: no games, no eval.json."""
    assert here(capfd, "--evaluate", run, "--eval-episodes", 0)[0] == 0
    assert not (run / "eval.json").exists()
    assert not (trained / "eval.json").exists()


def test_film(run, capfd, monkeypatch):
    """The video has a frame for each step of the game, the right size and the emulator's colours; so has the GIF."""
    screens, step = {}, ppo_atari.FrameStack.step

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
    assert path.read_bytes()[:4] == b"\x1a\x45\xdf\xa3"  # the signature of the format that browsers expect
    assert path.stat().st_size < 4e6
    film, frames = cv2.VideoCapture(str(path)), []
    while (frame := film.read())[0]:
        frames.append(cv2.cvtColor(frame[1], cv2.COLOR_BGR2RGB))
    height, width, _ = game[0].shape
    assert frames[0].shape[0] % height == frames[0].shape[1] % width == 0
    assert frames[0].shape[0] // height == frames[0].shape[1] // width > 0
    assert len(frames) == len(game)
    for i in (20, len(game) // 2):
        shown = cv2.resize(frames[i], (width, height), interpolation=cv2.INTER_AREA).astype(float)
        assert np.abs(shown - game[i]).mean() < 6
        assert np.abs(shown[..., ::-1] - game[i]).mean() > 2 * np.abs(shown - game[i]).mean()  # red is not blue
    (gif,) = (image for image in images(run) if image.format == "GIF")
    assert gif.size == (width, height)
    assert gif.n_frames > 1
    gif.seek(gif.n_frames // 2)
    middle = np.asarray(gif.convert("RGB")).astype(float)
    assert min(np.abs(middle - screen).mean() for screen in game) < 6


def test_what_the_network_sees(trained):
    """Training logs a picture of the screen beside the four frames, and the hyperparameters as text."""
    (image,) = images(trained)
    assert image.size[0] >= 5 * 160
    assert len(np.unique(np.asarray(image))) > 10
    tensors = EventAccumulator(str(trained)).Reload()
    assert any("hyperparameters" in tag for tag in tensors.Tags()["tensors"])


@pytest.mark.parametrize("what", ["missing", "noise", "other content", "another game"])
def test_foreign_agent_is_refused(what, run, capfd):
    """No file, a file of random bytes, a torch file of something else, an agent with another number of actions."""
    path = run / "agent.pt"
    saved = torch.load(path, weights_only=True)
    path.unlink()
    if what == "noise":
        path.write_bytes(np.random.default_rng(1).bytes(100_000))
    elif what == "other content":
        torch.save([1, 2, 3], path)
    elif what == "another game":
        saved["flags"]["env_id"] = "ALE/Breakout-v5"
        torch.save(saved, path)
    assert path.name in refusal(capfd, "--evaluate", run)
    assert path.name in refusal(capfd, "--evaluate", path)
    assert not (run / "eval.json").exists()


def test_network_that_reads_numbers_as_it_is_made(tmp_path, monkeypatch, capfd):
    """From NumPy, and from a tensor: --evaluate, which first looks at the shapes alone, plays it as training did."""
    monkeypatch.chdir(tmp_path)
    make = ppo_atari.make_agent

    def reading(*args, **kwargs):
        agent = make(*args, **kwargs)
        agent.register_buffer("mean", torch.from_numpy(np.ones(2)) * float(agent.actor.bias.sum().item() + 1))
        return agent

    monkeypatch.setattr(ppo_atari, "make_agent", reading)
    assert ppo_atari.main([*TRAIN, "--eval-episodes", "1"]) == 0
    run = run_directory(tmp_path)
    expected = json.loads((run / "eval.json").read_text())
    (run / "eval.json").unlink()
    assert here(capfd, "--evaluate", run, "--eval-episodes", 1)[0] == 0
    assert json.loads((run / "eval.json").read_text()) == expected


def test_games_that_end_unseen_are_refused(monkeypatch, run, capfd):
    """A time limit above the statistics: no game would ever be over, and the evaluation never end."""
    make = ppo_atari.make_env
    monkeypatch.setattr(ppo_atari, "make_env", lambda *args, **kwargs: gym.wrappers.TimeLimit(make(*args, **kwargs), 9))
    code, _, error = here(capfd, "--evaluate", run, "--eval-episodes", 1, "--no-episodic-life")
    assert code == 1 and own_lines(error).count("\n") == 1 and "RecordEpisodeStatistics" in error


def evaluated(capfd, run: Path, *flags) -> tuple[str, str]:
    """What --evaluate of one game prints, with exit code 0: the score, and what stands on standard error."""
    code, out, error = here(capfd, "--evaluate", run, "--eval-episodes", 1, *flags)
    assert code == 0 and re.search(r"(?m)^mean [\d.]+ .* over 1 full games", out), (out, error)
    return out, own_lines(error)


def own_lines(error: str) -> str:
    """Without what OpenCV itself says about each film."""
    return re.sub(r"(?m)^OpenCV: .*\n", "", error)


def test_published_agent_stays_as_it_is(run, tmp_path, capfd):
    """A directory without checkpoint.pt is not a run of one's own: its scores are printed, and nothing changes there.
    --output names a directory, which need not exist, for what else there is."""
    (run / "checkpoint.pt").unlink()
    (run / "eval.json").write_text("what its author measured")
    before, output = content(run), tmp_path / "new" / "scores"
    out, error = evaluated(capfd, run, "--capture-video")
    assert content(run) == before and error == ""
    assert evaluated(capfd, run, "--capture-video", "--output", output) == (out, "")
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
def test_evaluating_a_file_where_nothing_can_be_written(run, capfd):
    """Not even root can write into this directory, and nothing has to be written there."""
    expected, _ = evaluated(capfd, run)
    with open(run / "agent.pt", "rb") as file:
        assert evaluated(capfd, Path(f"/proc/self/fd/{file.fileno()}")) == (expected, "")


def test_read_only_run_is_evaluated(run, tmp_path, capfd):
    """A run of one's own on a disk that cannot be written: the same score, and one line that says so."""
    expected, _ = evaluated(capfd, run)
    (run / "eval.json").unlink()
    if subprocess.run(["mount", "--bind", run, run], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", run], check=True)
        before = content(run)
        out, error = evaluated(capfd, run)
        assert out == expected
        assert str(run) in error and error.count("\n") == 1 and "Traceback" not in error, error
        assert content(run) == before
    finally:
        subprocess.run(["umount", "--lazy", run], check=True)


def test_filmed_evaluation_on_a_full_disk(run, tmp_path, capfd):
    """The score is printed, each kind of file that cannot be written is told in one line, no half file stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        full = shutil.copytree(run, disk / "run")
        names = content(full).keys()
        with suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1 << 16))
        code, out, error = here(capfd, "--evaluate", full, "--eval-episodes", 1, "--capture-video")
        assert code == 1 and "over 1 full games" in out
        kinds = re.findall(r"(?m)^ppo_atari.py: (.+) cannot be written: .*No space", error)
        assert len(kinds) == len(set(kinds)) == own_lines(error).count("\n") == 3, error
        assert "eval.json" in kinds
        assert content(full).keys() - names <= {"videos"}
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_largest_random_number(run, capfd, monkeypatch):
    """The largest double below 1 is 1 as a float32. It must still choose an action, of a policy or at random."""
    generator = SimpleNamespace(random=lambda: 1 - 2.0**-53)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: generator)
    code, _, error = here(capfd, "--evaluate", run, "--eval-episodes", 1)
    assert code == 0, error


def test_scores_on_a_terminal_without_the_letters(run, tmp_path):
    """They are shown as far as it can, and written."""
    process = start("--evaluate", run, "--eval-episodes", 1, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert finish(process) == 0, (tmp_path / "log").read_text()
    mean = json.loads((run / "eval.json").read_text())["mean"]
    assert f"mean {mean:.2f} ? 0.00" in (tmp_path / "log").read_text()


def test_tracking_without_wandb(tmp_path, capfd, monkeypatch):
    """One line says what to install."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refusal(capfd, *TRAIN, "--eval-episodes", 0, "--track")


def test_tracking_under_any_name(tmp_path, monkeypatch):
    """Weights & Biases refuses these characters in a run's id; a name for the experiment may have them."""
    monkeypatch.chdir(tmp_path)
    ids = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: ids.append(given["id"])))
    ppo_atari.open_run(ppo_atari.parse_args([*TRAIN, "--track", "--exp-name", "a:b;c,d#e?f'g"])).close()
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


DRIVER = """
import sys
import ale_py, pygame
sys.path.insert(0, sys.argv.pop(1))
import ppo_atari

frames, acted, act, get = 0, [], ale_py.ALEInterface.act, pygame.event.get

def watched(ale, action, *args):
    acted.append(int(getattr(action, "value", action)))
    return act(ale, action, *args)

def scripted(*args, **kwargs):
    global frames
    frames += 1
    if frames == 90:
        return [pygame.event.Event(pygame.QUIT)]
    keys = {10: (pygame.KEYDOWN, pygame.K_SPACE), 30: (pygame.KEYUP, pygame.K_SPACE), 40: (pygame.KEYDOWN, pygame.K_d)}
    return [pygame.event.Event(keys[frames][0], key=keys[frames][1])] if frames in keys else []

ale_py.ALEInterface.act, pygame.event.get = watched, scripted
code = ppo_atari.main(sys.argv[1:])
print("actions:", acted)
sys.exit(code)
"""


def test_playing_with_scripted_keys(tmp_path):
    """In a window that SDL only pretends to open: the keys reach the game, and closing the window ends it."""
    pytest.importorskip("pygame")
    (tmp_path / "driver.py").write_text(DRIVER)
    program = (tmp_path / "driver.py", Path(ppo_atari.__file__).parent)
    process = start("--play", "--env-id", "ALE/Breakout-v5", cwd=tmp_path, program=program, SDL_VIDEODRIVER="dummy")
    log = tmp_path / "log"
    assert finish(process, 60) == 0, log.read_text()
    out, acted = log.read_text().split("actions: ")
    assert re.search(r"(?i)space.*FIRE", out) and re.search(r"\bd\b.*RIGHT", out), out  # the keys are told
    acted = json.loads(acted)
    assert len(acted) <= 100, "one frame of the emulator per frame of the window"
    fire, right = ale_py.Action.FIRE.value, ale_py.Action.RIGHT.value
    assert acted.count(fire) == 20 and acted.count(right) > 20 and acted.index(fire) < acted.index(right)


def test_playing_the_game_that_the_flags_describe(monkeypatch, capfd):
    """Its sticky actions, its actions and its seed."""
    pytest.importorskip("pygame")
    games = []
    monkeypatch.setattr("gymnasium.utils.play.play", lambda env, **given: games.append((env, given["seed"])))
    assert here(capfd, "--play", "--repeat-action-probability", 0, "--full-action-space", "--seed", 7)[0] == 0
    env, seed = games[0]
    assert env.action_space.n == 18 and seed == 7
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == 0


def test_watching_the_agent(watched):
    """--play with --evaluate shows a game in a window (here a pretended one) and tells its score."""
    pytest.importorskip("pygame")
    process, cwd = watched
    assert finish(process) == 0, (cwd / "log").read_text()
    assert "score" in (cwd / "log").read_text()
