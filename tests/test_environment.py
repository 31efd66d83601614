"""Section 2: the seven wrappers, each against the emulator or a slow version of its own; what a
step and a reset report; and what is saved of a game and of whatever wrappers remember."""

import copy
import dataclasses
import enum
import functools
import io
import itertools
import logging
import multiprocessing
import pickle
import random
import resource
import threading
from collections import Counter, defaultdict, deque, namedtuple
from pathlib import Path
from types import SimpleNamespace

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from launch import finish, fork, here, run_directory

import ppo_atari as p
from ppo_atari import make_env, parse_args


def args_for(env_id: str, *flags: str):
    return parse_args(["--env-id", env_id, *flags])


class ScriptedGame(gym.Env):
    """A game whose every step is written down: (reward, lives afterwards, terminated). Observations
    count the steps, and after a reset the resets from 201 on."""

    observation_space = gym.spaces.Box(0, 255, (4, 4, 3), np.uint8)
    action_space = gym.spaces.Discrete(4)

    def __init__(self, script, meanings=("NOOP", "FIRE", "RIGHT", "LEFT")):
        self.script = list(script)
        self.meanings = list(meanings)
        self.at = 0
        self.resets = 0
        self.actions = []
        self.ale = SimpleNamespace(lives=lambda: self.lives)

    def get_action_meanings(self):
        return self.meanings

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.resets += 1
        self.lives = 3
        self.actions.append("reset")
        return np.full((4, 4, 3), 200 + self.resets, np.uint8), {}

    def step(self, action):
        reward, self.lives, terminated = self.script[self.at]
        self.at += 1
        self.actions.append(self.meanings[action])
        return np.full((4, 4, 3), self.at, np.uint8), reward, terminated, False, {}


def test_noops_are_single_frames_from_1_to_30_and_uniform():
    env = make_env(args_for("ALE/Breakout-v5", "--no-fire-reset", "--no-episodic-life"))
    env.reset(seed=3)
    counts = np.zeros(31, int)
    for _ in range(300):
        env.reset()
        counts[env.unwrapped.ale.getEpisodeFrameNumber()] += 1
    assert counts[0] == 0 and counts[1:].min() > 0
    chi_squared = ((counts[1:] - 10) ** 2 / 10).sum()
    # 29 degrees of freedom: exceeded once in a thousand seeds, and this one is fixed
    assert chi_squared < 58.3


def test_noops_press_nothing_and_a_game_they_end_starts_anew():
    script = [(0, 3, False), (0, 0, True)] + [(0, 3, False)] * 40
    game = ScriptedGame(script, ["FIRE", "NOOP", "RIGHT"])
    env = p.NoopResetEnv(game, noop_max=30)
    env.reset(seed=1)
    assert set(game.actions) == {"reset", "NOOP"} and game.resets == 2


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "Breakout-v4", "BreakoutNoFrameskip-v4"])
@pytest.mark.parametrize("skip", [1, 4])
def test_a_step_is_exactly_so_many_frames(env_id, skip):
    env = make_env(args_for(env_id, "--frame-skip", str(skip)))
    env.reset(seed=1)
    before = env.unwrapped.ale.getEpisodeFrameNumber()
    for _ in range(5):
        env.step(2)
    assert env.unwrapped.ale.getEpisodeFrameNumber() - before == 5 * skip


def warped(screen):
    luminance = cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY)
    return cv2.resize(luminance, (84, 84), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("game", ["Breakout", "SpaceInvaders", "Asteroids", "Qbert"])
def test_pixels_rewards_and_scores_equal_a_slow_version(game):
    """Maximum over RGB of the last two of four screens, then luminance, then area averaging; scores
    of whole games."""
    env_id = f"{game}NoFrameskip-v4"
    env = make_env(args_for(env_id, "--noop-max", "0", "--no-episodic-life", "--no-fire-reset"))
    raw = gym.make(env_id, frameskip=1)
    obs, _ = env.reset(seed=7)
    screen, _ = raw.reset(seed=7)
    stack = [warped(screen)] * 4
    score = 0.0
    np.testing.assert_array_equal(obs, np.stack(stack))  # the first frame four times
    rng = np.random.default_rng(0)
    for steps in range(1, 3001):
        action = rng.integers(env.action_space.n)
        obs, reward, terminated, truncated, info = env.step(action)
        screens = []
        total = 0.0
        for _ in range(4):
            screen, r, over, _, _ = raw.step(action)
            screens.append(screen)
            total += r
            if over:
                break
        score += total
        assert reward == np.sign(total) and terminated == over and not truncated
        largest = np.maximum(screens[-1], screens[-2]) if not over else screens[-1]
        stack = [*stack[1:], warped(largest)]
        np.testing.assert_array_equal(obs, np.stack(stack))
        if over:
            assert (info["episode"]["r"], info["episode"]["l"]) == (score, steps)
            break
    assert over


def test_the_maximum_is_taken_before_the_luminance():
    """Two overlapping sprites, red and green: the maximum is yellow, brighter than either."""

    class TwoScreens(ScriptedGame):
        def __init__(self):
            super().__init__([])
            self.frame = 0
            self.ale = SimpleNamespace(
                act=self.act,
                game_over=lambda with_truncation=True: False,
                game_truncated=lambda: False,
                getScreenRGB=self.screen,
            )

        def act(self, action):
            self.frame += 1
            return 1.0

        def screen(self):
            screen = np.zeros((4, 4, 3), np.uint8)
            screen[..., self.frame % 2] = 255
            return screen

    env = p.MaxAndSkipEnv(TwoScreens(), 4)
    screen, reward, *_ = env.step(0)
    assert reward == 4 and (screen == [255, 255, 0]).all()
    # the luminances of red and green are 76 and 150
    assert p.WarpFrame(env, 36).observation(screen).min() > 200


def test_a_lost_life_ends_the_episode_and_a_game_over_resets():
    env = make_env(args_for("BreakoutNoFrameskip-v4"))
    ale = env.unwrapped.ale
    env.reset(seed=1)
    frames = []
    endings = []
    for _ in range(3000):
        _, _, terminated, _, info = env.step(0)
        if terminated:
            frames.append(ale.getEpisodeFrameNumber())
            endings.append((ale.lives(), ale.game_over(), "episode" in info))
            env.reset()
            frames[-1] = ale.getEpisodeFrameNumber() - frames[-1]
            if endings[-1][1]:
                break
    assert endings == [
        (4, False, False),
        (3, False, False),
        (2, False, False),
        (1, False, False),
        (0, True, True),
    ]
    # the same game goes on: one no-op, FIRE and action 2, four frames each
    assert frames[:4] == [12] * 4
    assert frames[4] < 0  # a new game


def test_lives_that_show_0_before_the_end_are_not_lost():
    game = ScriptedGame([(0, 2, False), (0, 0, False), (0, 0, False), (0, 0, True)])
    env = p.EpisodicLifeEnv(game)
    env.reset(seed=1)
    assert [env.step(0)[2] for _ in range(4)] == [True, False, False, True]


def test_the_noop_after_a_lost_life_can_end_the_game():
    game = ScriptedGame([(1, 3, False), (5, 2, False), (7, 0, True), (0, 3, False)])
    env = p.EpisodicLifeEnv(gym.wrappers.RecordEpisodeStatistics(game))
    env.reset(seed=1)
    assert not env.step(0)[2] and env.step(0)[2]
    obs, info = env.reset()
    assert game.resets == 2 and (obs == 202).all()
    # the score of the finished game is not lost
    assert info["episode"]["r"] == 13 and info["episode"]["l"] == 3
    assert not env.step(0)[2]


def test_a_fire_step_that_ends_the_game_returns_the_new_games_observation():
    game = ScriptedGame([(0, 3, False), (0, 0, True), (0, 3, False), (0, 3, False)])
    obs, _ = p.FireResetEnv(game).reset(seed=1)
    assert game.actions == ["reset", "FIRE", "RIGHT", "reset"]
    assert (obs == 202).all()


def wrappers(env):
    """All wrappers, from the outermost on."""
    return [] if env is env.unwrapped else [env, *wrappers(env.env)]


def test_the_order_of_the_wrappers_is_baselines():
    order = [p.FrameStack, p.ClipRewardEnv, p.WarpFrame, p.FireResetEnv, p.EpisodicLifeEnv]
    order += [gym.wrappers.RecordEpisodeStatistics, p.MaxAndSkipEnv, p.NoopResetEnv]
    types = [type(wrapper) for wrapper in wrappers(make_env(args_for("ALE/Breakout-v5")))]
    assert [kind for kind in types if kind in order] == order


def presses_fire(env):
    return any(isinstance(wrapper, p.FireResetEnv) for wrapper in wrappers(env))


def test_fire_only_where_the_game_has_it():
    assert presses_fire(make_env(args_for("ALE/Breakout-v5")))
    assert not presses_fire(make_env(args_for("ALE/MsPacman-v5")))
    assert not presses_fire(make_env(args_for("ALE/Breakout-v5", "--no-fire-reset")))
    backgammon = make_env(args_for("ALE/Backgammon-v5"))  # no NOOP, and FIRE is action 0
    assert presses_fire(backgammon)
    assert p.find_action(backgammon, "FIRE") == 0 and p.find_action(backgammon, "NOOP") is None


@pytest.mark.parametrize(("reward", "sign"), [(-7.5, -1), (-0.1, -1), (0, 0), (0.2, 1), (400, 1)])
def test_the_sign_of_the_reward(reward, sign):
    assert p.ClipRewardEnv(ScriptedGame([])).reward(reward) == sign


def test_frame_order_and_padding_of_the_stack():
    class Counter(ScriptedGame):
        observation_space = gym.spaces.Box(0, 255, (2, 2), np.uint8)

        def reset(self, **kwargs):
            obs, info = super().reset(**kwargs)
            return obs[:2, :2, 0], info

        def step(self, action):
            obs, *rest = super().step(action)
            return obs[:2, :2, 0], *rest

    env = p.FrameStack(Counter([(0, 3, False)] * 9), 4)
    assert env.observation_space.shape == (4, 2, 2)
    first, _ = env.reset(seed=1)
    stacks = [first] + [env.step(0)[0] for _ in range(5)]
    seen = [stack[:, 0, 0].tolist() for stack in stacks]
    assert seen[:3] == [[201] * 4, [201, 201, 201, 1], [201, 201, 1, 2]]
    assert stacks[-1][:, 0, 0].tolist() == [2, 3, 4, 5]
    assert env.reset()[0][:, 0, 0].tolist() == [202] * 4  # no frame of the episode before


def test_frames_in_colour():
    """A wrapper that gives [3, L, L]: the stack has the channels of the oldest frame first."""

    class Colours(gym.ObservationWrapper):
        def __init__(self, env):
            super().__init__(env)
            self.observation_space = gym.spaces.Box(0, 255, (3, 4, 4), np.uint8)

        def observation(self, screen):
            return screen.transpose(2, 0, 1) * np.array([1, 2, 3], np.uint8)[:, None, None]

    env = p.FrameStack(Colours(ScriptedGame([(0, 3, False)] * 3)), 2)
    assert env.observation_space.shape == (6, 4, 4)
    first = env.reset()[0]
    obs = [first, *(env.step(0)[0] for _ in range(3))]
    assert all(one.shape == (6, 4, 4) and one.dtype == np.uint8 for one in obs)
    frames = [one[:, 0, 0].tolist() for one in obs]
    assert frames[0][:3] == frames[0][3:]
    for before, after in itertools.pairwise(frames):
        assert after[:3] == before[3:]
    for frame in frames:
        assert frame[4:] == [2 * frame[3] % 256, 3 * frame[3] % 256]
    assert len({tuple(frame) for frame in frames}) > 2


def test_frames_that_are_not_bytes():
    """Scaled beneath the stack: neither a reset nor a step rounds them."""

    def scaled(env):
        space = gym.spaces.Box(-1, 1, env.observation_space.shape[:2], np.float32)
        return gym.wrappers.TransformObservation(
            env, lambda screen: (screen[..., 0] / 256).astype(np.float32), space
        )

    env = p.FrameStack(scaled(ScriptedGame([(0, 3, False)] * 3)), 2)
    assert env.observation_space == gym.spaces.Box(-1, 1, (2, 4, 4), np.float32)
    obs = [env.reset()[0], *(env.step(0)[0] for _ in range(2))]
    assert all(one.dtype == np.float32 for one in obs)
    first = obs[0][0, 0, 0]
    assert first == 201 / 256
    seen = [one[:, 0, 0].tolist() for one in obs]
    assert seen == [[first, first], [first, 1 / 256], [1 / 256, 2 / 256]]


def test_truncation_is_not_termination():
    kwargs = {"game": "pong", "repeat_action_probability": 0.0, "max_num_frames_per_episode": 100}
    gym.register("Test/Short-v0", "ale_py.env:AtariEnv", kwargs=kwargs)
    try:
        env = make_env(args_for("Test/Short-v0"))
    finally:
        del gym.registry["Test/Short-v0"]
    env.reset(seed=1)
    for _ in range(40):
        _, _, terminated, truncated, info = env.step(0)
        if truncated:
            break
    assert truncated and not terminated and "episode" in info
    assert gym.spec("ALE/Pong-v5").kwargs["max_num_frames_per_episode"] == 108_000


@pytest.mark.parametrize(
    ("env_id", "flags", "probability"),
    [
        ("ALE/Pong-v5", (), 0.25),
        ("PongNoFrameskip-v4", (), 0),
        ("PongNoFrameskip-v4", ("0.5",), 0.5),
        ("ALE/Pong-v5", ("0",), 0),
    ],
)
def test_sticky_actions_follow_the_id_and_the_flag(env_id, flags, probability):
    if flags:
        flags = ("--repeat-action-probability", *flags)
    env = make_env(args_for(env_id, *flags))
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == probability


ALL_GAMES = sorted(
    name for name in gym.registry if name.startswith("ALE/") and name.endswith("-v5")
)
ALL_GAMES += sorted(name for name in gym.registry if name.endswith("NoFrameskip-v4"))


def test_all_games_are_tested():
    assert len([name for name in ALL_GAMES if name.startswith("ALE/")]) == 104
    assert len(ALL_GAMES) > 150


def played_once(env_id):
    """Every action once: number of actions, last observation and all rewards."""
    env = make_env(args_for(env_id, "--noop-max", "1"))
    rewards = []
    obs, _ = env.reset()  # a seed would load the game once more, which takes longest here
    for action in range(env.action_space.n):
        obs, reward, terminated, truncated, _ = env.step(action)
        rewards.append(reward)
        if terminated or truncated:
            obs, _ = env.reset()
    return int(env.action_space.n), obs, rewards


@pytest.fixture(scope="module")
def played():
    """All games, by id."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return dict(zip(ALL_GAMES, pool.map(played_once, ALL_GAMES, chunksize=8)))


def test_every_game_can_be_played(played):
    assert len(played) == len(ALL_GAMES)
    assert all(obs.shape == (4, 84, 84) and obs.dtype == np.uint8 for _, obs, _ in played.values())
    sizes = {size for size, _, _ in played.values()}
    assert min(sizes) >= 3 and max(sizes) == 18


def test_every_games_rewards_are_signs(played):
    assert all(set(rewards) <= {-1, 0, 1} for _, _, rewards in played.values())


def test_every_game_has_all_actions_if_asked():
    """18, in the emulator's own order, in which NOOP and FIRE come first; two games have 9."""
    names = [ale_py.Action(i).name for i in range(18)]
    fewer = {"ALE/LostLuggage-v5", "ALE/Skiing-v5"}
    for env_id in sorted({*ALL_GAMES[:104:4], *fewer}):
        env = make_env(args_for(env_id, "--full-action-space", "--noop-max", "1"))
        has_fire = env_id not in fewer
        meanings = names if has_fire else [name for name in names if "FIRE" not in name]
        assert env.unwrapped.get_action_meanings() == meanings, env_id
        assert env.action_space.n == len(meanings)
        assert p.find_action(env, "NOOP") == 0
        assert p.find_action(env, "FIRE") == (1 if has_fire else None)
        assert presses_fire(env) == has_fire
        (noops,) = (wrapper for wrapper in wrappers(env) if isinstance(wrapper, p.NoopResetEnv))
        assert noops.noop == 0


@pytest.mark.parametrize(
    "flags", [(), ("--full-action-space",)], ids=["the game's actions", "all actions"]
)
@pytest.mark.parametrize("game", ["Breakout", "MsPacman", "Backgammon", "VideoCheckers", "Freeway"])
def test_an_action_is_the_emulators_of_that_meaning(game, flags):
    """Against an emulator of its own that is told the meaning: the same memory after each."""
    plain = "--noop-max 0 --no-fire-reset --no-episodic-life --repeat-action-probability 0"
    env = make_env(args_for(f"ALE/{game}-v5", *plain.split(), *flags))
    env.reset(seed=1)
    ale = ale_py.ALEInterface()
    ale.setInt("random_seed", env.unwrapped.ale.getInt("random_seed"))
    ale.setFloat("repeat_action_probability", 0)
    ale.loadROM(ale_py.roms.get_rom_path(env.unwrapped.spec.kwargs["game"]))
    ale.reset_game()
    pressed = set()
    for i in np.random.default_rng(1).integers(env.action_space.n, size=300):
        _, _, terminated, truncated, _ = env.step(i)
        if terminated or truncated:
            break
        meaning = env.unwrapped.get_action_meanings()[i]
        for _ in range(4):
            ale.act(getattr(ale_py.Action, meaning))
        pressed.add(meaning)
        np.testing.assert_array_equal(env.unwrapped.ale.getRAM(), ale.getRAM())
    num_actions = 18 if flags else len(env.unwrapped.ale.getMinimalActionSet())
    assert len(pressed) == env.action_space.n == num_actions


def test_a_game_that_ends_within_a_reset_is_reported():
    """The no-op after a lost life ends it. What the step showed is kept beside the new game."""
    game = ScriptedGame([(1, 3, False), (5, 2, False), (7, 0, True), (0, 3, False)])
    env = p.EpisodicLifeEnv(gym.wrappers.RecordEpisodeStatistics(game))
    env.reset(seed=1)
    obs, reward, terminated, truncated, final_obs, games = p.step_and_reset(env, 0)
    assert (reward, terminated, truncated, games) == (1, False, False, [])
    assert (obs == 1).all() and (final_obs == 1).all()
    obs, reward, terminated, truncated, final_obs, games = p.step_and_reset(env, 0)
    assert (reward, terminated, truncated, games) == (5, True, False, [(13, 3)])
    assert game.resets == 2 and (obs == 202).all() and (final_obs == 2).all()
    assert p.step_and_reset(env, 0)[5] == []


def test_two_games_that_end_in_one_step_are_both_reported():
    """The second is over as soon as FIRE is pressed."""
    script = [(0, 3, False), (1, 3, False), (4, 0, True), (2, 0, True), (8, 3, False)]
    env = p.FireResetEnv(gym.wrappers.RecordEpisodeStatistics(ScriptedGame(script)))
    env.reset(seed=1)
    obs, _, terminated, _, final_obs, games = p.step_and_reset(env, 0)
    assert terminated and games == [(5, 3), (2, 1)]
    assert (obs == 5).all() and (final_obs == 3).all()


@pytest.mark.parametrize("game", ["MsPacman", "SpaceInvaders"])
def test_a_game_that_a_time_limit_above_the_stack_cuts_is_reported_once(game):
    """Each with its return before clipping and its length. FIRE and action 2 are steps, too."""
    flags = (f"ALE/{game}-v5", "--no-episodic-life", "--frame-size", "36")
    env = gym.wrappers.TimeLimit(make_env(args_for(*flags)), 100)
    unclipped = make_env(args_for(*flags, "--no-clip-reward"))
    env.reset(seed=3)
    unclipped.reset(seed=3)
    first_steps = 2 if presses_fire(env) else 0
    score = 0
    scores = []
    for i, action in enumerate(np.random.default_rng(1).integers(1, env.action_space.n, size=300)):
        obs, _, terminated, truncated, final_obs, games = p.step_and_reset(env, action)
        before, reward, *_ = unclipped.step(action)
        score += reward
        assert np.array_equal(final_obs, before) and not terminated
        assert truncated == (i % 100 == 99)
        if truncated:
            assert games == [(score, 100 + first_steps)]
            assert np.array_equal(obs, unclipped.reset()[0]) and not np.array_equal(obs, final_obs)
            scores.append(score)
            score = 0
        else:
            assert games == [] and np.array_equal(obs, final_obs)
    assert len(scores) == 3 and min(scores) > 1


def test_a_time_limit_that_ends_an_episode_does_not_end_the_game():
    """With lives as episodes, a reset goes on in it: it is reported when it is over, in full."""
    script = [(1, 3, False)] * 7 + [(10, 0, True)] + [(0, 3, False)] * 2
    game = p.EpisodicLifeEnv(gym.wrappers.RecordEpisodeStatistics(ScriptedGame(script)))
    env = gym.wrappers.TimeLimit(game, 3)
    env.reset(seed=1)
    results = [p.step_and_reset(env, 0) for _ in range(6)]
    assert [result[3] for result in results] == [False, False, True, False, False, True]
    assert [result[5] for result in results] == [[], [], [], [], [], [(17, 8)]]


def test_a_game_that_is_over_as_the_time_is_up_is_reported_once():
    game = gym.wrappers.RecordEpisodeStatistics(ScriptedGame([(1, 3, False), (2, 0, True)]))
    env = gym.wrappers.TimeLimit(game, 2)
    env.reset(seed=1)
    p.step_and_reset(env, 0)
    _, _, terminated, truncated, _, games = p.step_and_reset(env, 0)
    assert terminated and truncated and games == [(3, 2)]


def through_a_file(content):
    """As a checkpoint does it: nothing in it may need code to be run."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def history(env, actions):
    """All that a learner sees in these steps, and the machine's memory beneath; of images their
    hashes, so that a difference can be shown."""
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(int(action))
        score = info["episode"]["r"] if "episode" in info else None
        ram = hash(env.unwrapped.ale.getRAM().tobytes())
        yield hash(obs.tobytes()), float(reward), terminated, truncated, score, ram
        if terminated or truncated:
            yield hash(env.reset()[0].tobytes())


def future(make, state, actions):
    """What follows where a saved state is restored: in an environment that was reset once, as
    --resume does it."""
    env = make()
    env.reset(seed=99)
    p.set_env_state(env, through_a_file(state))
    p.forget_last_action(env)  # as each rollout begins
    return list(history(env, actions))


def assert_restored_exactly(make, remembers=True):
    """Over several episodes and more than one game. If the outermost wrapper remembers something,
    another future must follow where just that is left out of the state."""
    env = make()
    env.reset(seed=5)
    rng = np.random.default_rng(1)
    list(history(env, rng.integers(env.action_space.n, size=170)))
    state = p.get_env_state(env)
    p.forget_last_action(env)
    actions = rng.integers(env.action_space.n, size=300)
    expected = list(history(env, actions))  # the state is a copy: playing on does not change it
    steps = [entry for entry in expected if isinstance(entry, tuple)]
    assert len(expected) - len(steps) >= 4  # episodes that ended
    assert future(make, state, actions) == expected
    if remembers:
        others = {path: x for path, x in state["wrappers"].items() if not path.startswith("0.")}
        assert future(make, state | {"wrappers": others}, actions) != expected
    return steps


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "BreakoutNoFrameskip-v4", "ALE/MsPacman-v5"])
def test_a_restored_environment_plays_the_same_game(env_id):
    """Observations, rewards, ends, memory of the machine, no-op counts and scores; also in an
    environment that has played in between."""
    args = args_for(env_id)
    env = make_env(args)
    twin = make_env(args)
    rng = np.random.default_rng(1)
    env.reset(seed=5)
    list(history(env, rng.integers(env.action_space.n, size=150)))
    p.forget_last_action(env)
    state = p.get_env_state(env)
    twin.reset(seed=99)
    list(history(twin, [1, 2, 3] * 20))
    p.set_env_state(twin, state)
    actions = rng.integers(env.action_space.n, size=1200)
    expected = list(history(env, actions))
    assert expected == list(history(twin, actions))
    scores = [entry[4] for entry in expected if isinstance(entry, tuple) and entry[4] is not None]
    assert len(scores) >= 1  # a game ended in between


def test_forgetting_the_last_action_changes_nothing_else():
    env = make_env(args_for("ALE/Breakout-v5"))
    env.reset(seed=1)
    before = env.unwrapped.ale.cloneState(include_rng=True).serialize()
    p.forget_last_action(env)
    assert env.unwrapped.ale.cloneState(include_rng=True).serialize() == before


@pytest.mark.parametrize("forget", [True, False])
def test_the_last_action_must_be_forgotten(forget):
    """Sticky actions repeat it, and the emulator's state lacks it: the futures are the same if, and
    only if, both sides forget it."""
    env = small("--repeat-action-probability", "0.9")
    twin = small("--repeat-action-probability", "0.9")
    env.reset(seed=5)
    twin.reset(seed=99)
    list(history(env, [1, 2, 2]))  # to the right
    p.set_env_state(twin, through_a_file(p.get_env_state(env)))
    if forget:
        p.forget_last_action(env)
        p.forget_last_action(twin)
    assert (list(history(env, [0] * 9)) == list(history(twin, [0] * 9))) == forget


class FrameDifference(gym.Wrapper):
    """Rewards what moved since the frame before, which it keeps."""

    def reset(self, **kwargs):
        self.previous, info = self.env.reset(**kwargs)
        return self.previous, info

    def step(self, action):
        obs, _, *rest = self.env.step(action)
        difference = obs[-1].astype(float) - self.previous[-1]
        self.previous = obs
        return obs, float(np.abs(difference).mean()), *rest


class Surprising(gym.Wrapper):
    """Its rewards depend on all that it keeps."""

    def __init__(self, env):
        super().__init__(env)
        self.steps = 0
        self.mean = 0.5
        self.counts = np.zeros((3, 2), np.int64)
        self.label = "start"
        self.last = deque(maxlen=3)
        self.noise = np.random.default_rng(0)
        self.bonus = np.float64(0.1).repeat(4)
        self.flags = [True, None]

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * float(obs.mean()) / 3
        self.counts[action % 3, self.steps % 2] += 1
        self.last.append(obs[0, ::10, ::10].astype(np.float32) / 7)
        self.bonus = self.bonus * 1.1 % 1
        self.label = self.label[-4:] + str(action)
        self.flags = [not self.flags[0], self.steps]
        reward += self.mean + self.noise.normal() + len(self.label) + self.flags[0]
        reward += sum(float(frame.sum()) for frame in self.last)
        reward += self.counts[0, 1] / 9 + float(self.bonus[2])
        return obs, reward, *rest


class Statistics:
    def __init__(self):
        self.count = 0
        self.mean = np.zeros(3)


class Model:
    """State of a wrapper in an object of its own, and in that object's own objects."""

    def __init__(self):
        self.statistics = Statistics()
        self.rng = np.random.RandomState(0)
        self.layer = torch.nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), 0.01, momentum=0.9)

    def surprise(self, x):
        self.statistics.count += 1
        self.statistics.mean += (x - self.statistics.mean) / self.statistics.count
        if not hasattr(self, "largest"):
            self.largest = 0.0
        self.largest = max(self.largest * 0.9, float(x.max()))
        loss = (self.layer(torch.tensor(x, dtype=torch.float32)) - self.largest).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return self.largest + self.statistics.mean.sum() + loss.item() + self.rng.normal()


class Novelty(gym.Wrapper):
    """Dictionaries and a set with keys of every kind, generators of every kind, an object of its
    own, tensors, and attributes that first appear during a game."""

    def __init__(self, env):
        super().__init__(env)
        torch.manual_seed(0)
        self.counts = {}
        self.by_pixel = defaultdict(int)
        self.by_action = Counter()
        self.seen = set()
        self.model = Model()
        self.python = random.Random(0)
        self.torch = torch.Generator().manual_seed(0)
        self.decaying = torch.zeros(3)

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        if not hasattr(self, "rng"):
            self.rng = np.random.default_rng(seed)
        return obs, info

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        pixels = obs[-1, 20:35:7, 18]
        place = tuple(pixels)  # of NumPy's numbers
        self.counts[place] = self.counts.get(place, 0) + 1
        self.counts[action, "pressed"] = self.counts.get((action, "pressed"), 0) + 1
        self.by_pixel[pixels[1]] += 1
        self.by_action[action] += 1
        is_new = place not in self.seen
        self.seen.add(place)
        self.decaying = 0.9 * self.decaying + torch.rand(3, generator=self.torch)
        if not hasattr(self, "first_frame"):
            self.first_frame = obs[-1].astype(np.float32)
            self.past = []
            self.best = {"reward": 0.0}
            self.drift = torch.zeros(2, dtype=torch.float64)
        self.past = [*self.past[-3:], (action, float(reward))]
        self.best["reward"] = max(self.best["reward"], reward) * 0.99
        self.drift += float(pixels[2]) / 7
        reward += 1 / np.sqrt(self.counts[place]) + self.counts[action, "pressed"] / 7 + is_new
        reward += self.by_pixel[pixels[1]] / 11 + self.by_action.most_common(1)[0][1] / 13
        reward += self.model.surprise(pixels / 255) + self.rng.normal() + self.python.random()
        reward += self.decaying.sum().item() + self.drift[0].item()
        reward += np.abs(obs[-1] - self.first_frame).mean() + sum(x for _, x in self.past)
        return obs, reward + self.best["reward"], *rest


def small(*flags):
    return make_env(args_for("ALE/Breakout-v5", "--frame-size", "36", *flags))


WRAPPERS = {
    "NormalizeReward": lambda: gym.wrappers.NormalizeReward(small("--no-clip-reward")),
    "NormalizeObservation": lambda: gym.wrappers.NormalizeObservation(small()),
    "TimeLimit": lambda: gym.wrappers.TimeLimit(small("--no-episodic-life"), 30),
    "frame difference": lambda: FrameDifference(small()),
    "surprising": lambda: Surprising(small("--no-clip-reward")),
    "novelty": lambda: Novelty(small()),
    "several": lambda: gym.wrappers.NormalizeReward(
        FrameDifference(gym.wrappers.TimeLimit(Surprising(small()), 25))
    ),
}


@pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS)
def test_what_a_wrapper_remembers_is_restored_exactly(make):
    """Without declaring anything, and with sticky actions."""
    assert make().unwrapped.ale.getFloat("repeat_action_probability") == 0.25
    steps = assert_restored_exactly(make)
    assert sum(entry[4] is not None for entry in steps) >= 1 or any(entry[3] for entry in steps)


def test_a_wrapper_of_functions_needs_nothing():
    """And what it calls is no attribute to be saved."""

    def make():
        return gym.wrappers.TransformReward(small(), lambda reward: 2 * reward)

    steps = assert_restored_exactly(make, remembers=False)
    assert {entry[1] for entry in steps} == {0, 2}


def test_a_users_wrapper_is_restored_exactly():
    """Integers, floats, text, arrays, a deque of arrays, a generator, a list: of the same types,
    and a generator in place."""
    env = Surprising(small())
    env.reset(seed=5)
    list(history(env, np.random.default_rng(2).integers(4, size=101)))
    state = through_a_file(p.get_env_state(env))
    names = ("steps", "mean", "counts", "label", "last", "noise", "bonus", "flags")
    before = {name: copy.deepcopy(getattr(env, name)) for name in names}
    list(history(env, [1, 2, 3] * 5))
    twin = Surprising(small())
    twin.reset(seed=99)
    list(history(twin, [1, 2, 3] * 5))
    noise = twin.noise
    p.set_env_state(twin, state)
    for name, value in before.items():
        if name != "noise":
            assert same(getattr(twin, name), value), name
    assert twin.noise is noise and noise.normal() == before["noise"].normal()


class Keeping(gym.Wrapper):
    """Keeps these attributes."""

    def __init__(self, env, **attributes):
        super().__init__(env)
        for name, value in attributes.items():
            setattr(self, name, value)


def paths(env):
    """What of the outermost wrapper is in the state, but for gymnasium's own attributes."""
    found = p.get_env_state(env)["wrappers"]
    return sorted(path[2:] for path in found if path.startswith("0.") and path[2] != "_")


@functools.cache
def real_game():
    """One for all tests of what is found in a wrapper."""
    env = small()
    env.reset(seed=1)
    return env


def keeping(**attributes):
    """A wrapper with these attributes around a real game."""
    return Keeping(real_game(), **attributes)


def test_only_what_is_named_is_saved():
    """A wrapper's `saved` is taken at its word, dotted names included; the rest stays as it is."""

    def make(a, mean, b):
        statistics = SimpleNamespace(mean=mean, count=b)
        return keeping(saved=("a", "statistics.mean"), a=a, b=b, statistics=statistics)

    env = make(1, np.ones(2), 3)
    assert paths(env) == ["a", "statistics.mean"]
    twin = make(4, np.zeros(2), 6)
    p.set_env_state(twin, through_a_file(p.get_env_state(env)))
    assert (twin.a, twin.statistics.mean.tolist()) == (1, [1, 1])
    assert (twin.b, twin.statistics.count) == (6, 6)
    assert paths(keeping(saved=(), a=1)) == []
    model = SimpleNamespace(saved=("a",), a=1, b=2)
    assert paths(keeping(model=model, c=3)) == ["c", "model.a"]


def test_the_statistics_that_are_named_are_enough():
    """NormalizeReward divides by a running deviation, which lies in an object of its own."""
    names = ("return_rms.mean", "return_rms.var", "return_rms.count", "discounted_reward")

    def make():
        env = gym.wrappers.NormalizeReward(small("--no-clip-reward"))
        env.saved = names
        return env

    env = make()
    env.reset(seed=1)
    assert paths(env) == sorted(names)
    steps = assert_restored_exactly(make)
    assert any(entry[1] not in (0, 1) for entry in steps)


def test_a_class_may_name_what_is_saved():
    """Those of a subclass take the place of its base's, as in all of Python."""

    class Base(Keeping):
        saved = ("a",)

    class Both(Base):
        saved = (*Base.saved, "b")

    assert paths(Base(real_game(), a=1, b=2, c=3)) == ["a"]
    assert paths(Both(real_game(), a=1, b=2, c=3)) == ["a", "b"]


def broken(**attributes):
    """A wrapper class whose attributes are these."""
    return type("Novelty", (gym.Wrapper,), attributes)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("wrapper", "error", "says"),
    [
        (broken(saved=("nothing_like_it",)), AttributeError, "nothing_like_it"),
        (broken(saved=("seen",), seen=object()), TypeError, "a checkpoint cannot hold a object"),
    ],
    ids=["no such attribute", "of an unknown kind"],
)
def test_a_name_that_cannot_be_saved_is_found_at_the_start(
    wrapper, error, says, workers, tmp_path, monkeypatch, capfd
):
    """Before there is a run directory; nobody is left behind."""
    monkeypatch.chdir(tmp_path)
    make = p.make_env
    monkeypatch.setattr(p, "make_env", lambda *args, **kwargs: wrapper(make(*args, **kwargs)))
    flags = "--num-envs 2 --num-steps 8 --frame-size 36 --total-timesteps 16 --no-cuda"
    argv = [*flags.split(), "--num-workers", workers]
    if workers == 0:
        with pytest.raises(error, match=says):
            here(capfd, *argv)
    else:
        code, _, text = here(capfd, *argv)
        assert code == 1 and f"{error.__name__}: " in text and says in text
        assert text.splitlines()[-1].startswith("ppo_atari.py: error: worker ")
    assert not (tmp_path / "runs").exists() and not multiprocessing.active_children()


def test_the_clock_is_not_in_the_state(monkeypatch):
    """Two runs that play alike have the same state, whatever the time was."""
    states = []
    for first in (5.0, 1000.0):
        clock = itertools.count(first, 1.5)
        monkeypatch.setattr("time.perf_counter", lambda clock=clock: next(clock))
        env = small()
        env.reset(seed=1)
        steps = list(history(env, np.random.default_rng(1).integers(4, size=300)))
        assert any(isinstance(entry, tuple) and entry[4] is not None for entry in steps)
        states.append(p.get_env_state(env))
    assert same(*states)
    (index,) = (
        str(i)
        for i, wrapper in enumerate(wrappers(env))
        if isinstance(wrapper, gym.wrappers.RecordEpisodeStatistics)
    )
    found = {path for path in states[0]["wrappers"] if path.split(".")[0] == index}
    assert found == {f"{index}.episode_returns", f"{index}.episode_lengths"}


class Node:
    pass


def circle(first, second):
    """A wrapper whose objects refer to each other and to the wrapper, by several ways."""
    one = Node()
    other = Node()
    env = keeping(one=one, other=other, again=one, itself=None)
    one.value = first
    one.other = other
    one.owner = env
    one.step = env.step
    other.value = second
    other.other = one
    other.itself = other
    env.itself = env
    return env


def test_objects_in_a_circle_are_kept_once():
    env = circle(1.5, "text")
    found = paths(env)
    assert len([path for path in found if path.endswith("value")]) == 2
    twin = circle(0.0, "")
    p.set_env_state(twin, through_a_file(p.get_env_state(env)))
    assert (twin.one.value, twin.other.value) == (1.5, "text")
    assert twin.again is twin.one is twin.other.other and twin.one.other is twin.other


def test_an_object_of_two_wrappers_is_kept_once():
    states = []
    for value in (1, 2):
        statistics = Node()
        statistics.mean = np.full(2, value)
        env = Keeping(keeping(statistics=statistics), more=SimpleNamespace(same=statistics))
        states.append(through_a_file(p.get_env_state(env)))
        found = [path for path in states[-1]["wrappers"] if path.endswith("mean")]
        assert found == ["0.more.same.mean"]
    p.set_env_state(env, states[0])
    assert env.env.statistics is env.more.same and env.more.same.mean.tolist() == [1, 1]


def test_what_cannot_change_during_a_game_is_passed_over():
    """The emulator, spaces, functions, classes, modules, other wrappers, logs and locks."""
    lock = threading.Lock()
    env = keeping(
        emulator=real_game().unwrapped.ale,
        button=ale_py.Action.FIRE,
        game=real_game().unwrapped.spec,
        space=real_game().observation_space,
        inner=real_game(),
        function=make_env,
        method=real_game().step,
        partial=functools.partial(make_env, render_mode=None),
        kind=Model,
        module=np,
        logger=logging.getLogger("test"),
        lock=lock,
        path=Path("here"),
        steps=3,
    )
    assert paths(env) == ["steps"]
    kept = dict(vars(env))
    p.set_env_state(env, p.get_env_state(env))
    assert all(getattr(env, name) is value for name, value in kept.items() if name[0] != "_")


def test_a_wrapper_that_keeps_the_flags_leaves_them_alone():
    """They are those of this call: a resumed run may be longer, and has another --resume."""
    first = keeping(args=args_for("ALE/Breakout-v5", "--total-timesteps", "10240"), steps=7)
    second = keeping(args=args_for("ALE/Breakout-v5", "--total-timesteps", "20480"), steps=0)
    flags = dict(vars(second.args))
    p.set_env_state(second, through_a_file(p.get_env_state(first)))
    assert second.steps == 7 and vars(second.args) == flags


def test_a_wrapper_that_keeps_what_cannot_be_changed():
    """A member of an enumeration and a frozen dataclass have attributes, but not to be set."""

    class Phase(enum.Enum):
        EARLY = 1
        LATE = 2

    @dataclasses.dataclass(frozen=True)
    class Settings:
        scale: float = 2.0

    first = keeping(phase=Phase.EARLY, settings=Settings(), steps=7)
    second = keeping(phase=Phase.LATE, settings=Settings(), steps=0)
    p.set_env_state(second, through_a_file(p.get_env_state(first)))
    assert second.steps == 7 and second.settings == Settings()
    assert [(phase.name, phase.value) for phase in Phase] == [("EARLY", 1), ("LATE", 2)]


def test_a_wrapper_whose_attributes_begin_as_one_array():
    """After a reset, the frame before is the frame itself: one array or list of two names, restored
    as two."""

    class Moving(gym.Wrapper):
        """Rewards what moved since the frame before."""

        def reset(self, **kwargs):
            obs, info = self.env.reset(**kwargs)
            self.before = self.now = obs
            self.old = self.new = [0]
            return obs, info

        def step(self, action):
            obs, _, *rest = self.env.step(action)
            self.before, self.now = self.now, obs
            self.old, self.new = self.new, [action]
            reward = float(np.abs(self.now.astype(float) - self.before).mean())
            return obs, reward + self.old[0], *rest

    assert_restored_exactly(lambda: Moving(small()))


def test_a_wrapper_whose_attributes_begin_as_one_tensor_or_dictionary():
    """The same with what is restored in place."""

    class Moving(gym.Wrapper):
        """Rewards what moved since the frame before."""

        def reset(self, **kwargs):
            obs, info = self.env.reset(**kwargs)
            self.tensors = [torch.from_numpy(obs)] * 2
            self.previous = self.current = torch.from_numpy(obs)
            self.past, (self.counts, self.twin, self.same) = {}, [{"pixels": obs[0]}] * 3
            return obs, info

        def step(self, action):
            obs, _, *rest = self.env.step(action)
            self.tensors = [self.tensors[1], torch.from_numpy(obs)]
            self.previous, self.current = self.current, torch.from_numpy(obs)
            self.past, self.counts = self.counts, {"pixels": obs[1]}
            self.twin = self.same = {"pixels": obs[2], "more": [obs]}
            moved = (self.current.float() - self.previous.float()).abs().mean()
            return obs, moved.item(), *rest

    env = Moving(small())
    twin = Moving(small())
    env.reset(seed=1)
    actions = np.random.default_rng(1).integers(4, size=60)
    list(history(env, actions[:30]))
    state = through_a_file(p.get_env_state(env))
    names = ("tensors", "previous", "current", "past", "counts", "twin", "same")
    before = {name: copy.deepcopy(getattr(env, name)) for name in names}
    assert not torch.equal(env.previous, env.current) and not same(env.past, env.counts)
    p.forget_last_action(env)
    expected = list(history(env, actions[30:]))
    twin.reset(seed=2)
    p.set_env_state(twin, state)
    assert [name for name, value in before.items() if not same(getattr(twin, name), value)] == []
    p.forget_last_action(twin)
    assert list(history(twin, actions[30:])) == expected


@pytest.mark.parametrize("names", [("now", "newest"), ("newest", "now")])
def test_a_wrapper_whose_attributes_begin_as_parts_of_one_object(names):
    """At a reset, the newest frame is a part of the stack; a step later, it is the newest of the
    stack before."""

    class Newest(gym.Wrapper):
        saved = names

        def reset(self, **kwargs):
            self.now, info = self.env.reset(**kwargs)
            self.newest = self.now[-1]
            return self.now, info

        def step(self, action):
            self.newest = self.now[-1]
            self.now, *rest = self.env.step(action)
            return self.now, *rest

    env = Newest(small())
    twin = Newest(small())
    env.reset(seed=1)
    for action in [1, 2] * 20:
        env.step(action)
    assert not np.array_equal(env.newest, env.now[-1])
    twin.reset(seed=2)
    p.set_env_state(twin, through_a_file(p.get_env_state(env)))
    assert np.array_equal(twin.now, env.now) and np.array_equal(twin.newest, env.newest)


def few_files_for_many_arrays():
    """Sixty open files for a wrapper that keeps two hundred arrays."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
    make = p.make_env

    def remembering(*args, **kwargs):
        return Keeping(make(*args, **kwargs), flags=[np.full(2, i) for i in range(200)])

    p.make_env = remembering


def test_a_wrapper_that_keeps_many_arrays(tmp_path):
    """On their way from a worker into the checkpoint and back they cost no open file each, as
    shared tensors would."""
    flags = "--num-envs 2 --num-steps 8 --frame-size 36 --eval-episodes 0 --num-workers 2"
    for more in ("--total-timesteps 32", "--resume RUN --total-timesteps 48"):
        argv = [*flags.split(), *more.split()]
        if "RUN" in argv:
            argv[argv.index("RUN")] = run_directory(tmp_path)
        process = fork(*argv, cwd=tmp_path, before=few_files_for_many_arrays)
        try:
            assert finish(process, 60) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
    checkpoint = torch.load(run_directory(tmp_path) / "checkpoint.pt", weights_only=True)
    games = checkpoint["envs"]["games"]
    assert games.keys() == {0, 1} and checkpoint["step"] == 48
    assert games[0]["wrappers"]["0.flags"][199]["shape"] == (2,)


class Opaque:
    """Nothing that a checkpoint knows."""


Point = namedtuple("Point", "x y")
Number = enum.IntEnum("Number", "ONE")
REFUSED = [
    object(),
    Opaque(),
    Opaque,
    lambda: 0,
    print,
    np,
    Number.ONE,
    1j,
    range(3),
    frozenset({1}),
    bytearray(b"x"),
    Path("here"),
    np.str_("text"),
    np.datetime64("2024-01-01"),
    np.array([Opaque()]),
    np.array(["text"]),
    {"a": [Opaque()]},
    deque([print]),
    {1, Opaque()},
    (1, (2, Opaque())),
    {Opaque(): 1},
    {(1, Opaque()): 1},
    {Number.ONE: 1},
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_what_a_checkpoint_cannot_hold_is_refused(value):
    with pytest.raises(TypeError, match="a checkpoint cannot hold"):
        p.pack(value)


def same(first, second):
    """Of the same type and content, at every depth."""
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray | np.generic | torch.Tensor):
        if first.dtype != second.dtype or first.shape != second.shape:
            return False
        return bool((first == second).all())
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple | deque):
        if getattr(first, "maxlen", None) != getattr(second, "maxlen", None):
            return False
        return len(first) == len(second) and all(same(*pair) for pair in zip(first, second))
    if isinstance(first, set):
        types = [sorted(type(part).__name__ for part in parts) for parts in (first, second)]
        return first == second and types[0] == types[1]
    return first == second


KEPT = {  # what stands there when it is restored, and what was saved
    "numbers": ([], [0, 2**70, -1.5, True, None, "text", b"bytes", b"\xff\x00", float("inf")]),
    "empty things": (None, [b"", "", [], (), {}, set(), deque(), np.zeros(0), torch.zeros(0)]),
    "tuples": ((0, (0.0, 0)), (1, (2.5, 3))),
    "a list that grew": ([1], [2, [3, 4]]),
    "a list where a tuple was": ((1, 2), [3, 4]),
    "a named tuple": (Point(0, 0), Point(1, 2)),
    "numbers of numpy": (None, (np.float32(0.1), np.float64(2.5), np.int16(3), np.bool_(True))),
    "array": (np.zeros((2, 3), np.uint8), np.arange(6, dtype=np.uint8).reshape(2, 3)),
    "unsigned arrays": (
        None,
        [np.array([2**32 - 1, 0], np.uint32), np.uint16(65535), np.uint64(2**64 - 1)],
    ),
    "an array that nobody may write to": (
        np.broadcast_to(np.uint8(0), (2, 3)),
        np.ones((2, 3), np.uint8),
    ),
    "array with gaps": (None, np.arange(8.0)[::-2]),
    "array by columns": (None, np.asfortranarray(np.arange(6.0).reshape(2, 3))),
    "arrays of other types": (
        None,
        [
            np.zeros((0, 2), np.float32),
            np.array([True]),
            np.array([2**63], np.uint64),
            np.array([1 + 2j]),
            np.array([1, 2], ">i4"),
        ],
    ),
    "an array of another shape": (np.zeros(2), np.ones((3, 1), np.int8)),
    "a dictionary that grew": ({}, {"room 1": 3, 7: [np.ones(2)]}),
    "a dictionary that shrank": ({"room 1": 3, "room 2": 4}, {"room 1": 5}),
    "a dictionary with all": (
        {"a": np.zeros(2), "b": deque(maxlen=2)},
        {"a": np.ones(2), "b": deque([(1, np.ones(1))], maxlen=2)},
    ),
    "keys of all kinds": (None, {0: 1, 1.5: 2, "a": 3, None: 4, b"x": 5, (1, (b"y", "z")): 6}),
    "a set": (set(), {1, "a", (2.5, b"x"), None}),
    "a set where nothing was": (None, {1, np.int16(2)}),
    "a deque": (deque(), deque([np.ones(2), (1, 2), {"a": np.zeros(3)}])),
    "a deque of limited length": (deque(maxlen=3), deque([1, 2, 3], maxlen=3)),
    "a deque where nothing was": (None, deque([1, 2])),
    "a deque of limited length where nothing was": (None, deque([1, 2], maxlen=2)),
    "a tensor": (torch.zeros(2), torch.tensor([1.5, 2])),
    "a tensor without dimensions": (torch.tensor(0), torch.tensor(3)),
    "tensors": (
        {"a": torch.zeros(1)},
        {"a": torch.ones(1), "b": torch.ones(2, 0, dtype=torch.bfloat16)},
    ),
    "tensors of other types": (
        None,
        [torch.tensor([True]), torch.tensor([2**62]), torch.ones(2).half()],
    ),
    "a tensor where one of another type was": (torch.zeros(2), torch.ones(2, dtype=torch.float64)),
    "a list of tensors": ([], [torch.ones(2), [torch.arange(3)]]),
    "a list that held the same twice": ([np.zeros(2)] * 2, [np.ones(2), np.full(2, 2.0)]),
    "counts": (Counter(), Counter({"room 1": 3, (1, b"x"): 2})),
    "counts by default": (defaultdict(int), defaultdict(int, {7: 3})),
    "a tensor that grew": (torch.zeros(0, 3), torch.ones(2, 3)),
    "a number where an array without a dimension was": (np.zeros(()), np.float64(1.5)),
}


@pytest.mark.parametrize(("fresh", "value"), KEPT.values(), ids=KEPT)
def test_what_a_checkpoint_holds_comes_back(fresh, value):
    """What stood in its place does not matter; a tensor and a dictionary are changed in place."""
    # the other processes of torchrun get it pickled
    kept = pickle.loads(pickle.dumps(through_a_file(p.pack(value))))
    back = p.unpack(kept, fresh)
    assert same(value, back), back
    if isinstance(fresh, torch.Tensor):
        assert (back is fresh) == (fresh.shape == value.shape and fresh.dtype == value.dtype)
    if isinstance(fresh, dict):
        assert back is fresh
    if isinstance(fresh, defaultdict):
        assert back["never seen"] == 0


def test_what_is_packed_is_a_copy():
    value = {"a": [torch.zeros(2), np.zeros(2)], "b": deque([1]), "c": {"d": {2}}}
    kept = p.pack(value)
    value["a"][0].add_(1)
    value["a"][1][:] = 1
    value["a"].append(3)
    value["b"].append(4)
    value["c"]["d"].add(5)
    expected = {"a": [torch.zeros(2), np.zeros(2)], "b": deque([1]), "c": {"d": {2}}}
    assert same(p.unpack(through_a_file(kept)), expected)


def test_counts_by_what_numpy_gives():
    """Keys that look alike to a dictionary: the count of a state is found again, by NumPy's numbers
    or Python's."""
    code = np.arange(3, dtype=np.uint8)
    counts = {
        code[1]: 1,
        tuple(code): 2,
        (0, (np.float32(0.5), "x")): 3,
        np.bool_(True): 4,
        np.str_("room"): 5,
    }
    back = p.unpack(through_a_file(p.pack(counts)), {})
    assert back == counts and back[tuple(code)] == 2 and back["room"] == 5
    assert not any(isinstance(key, np.generic) for key in back)


def test_what_is_changed_in_place_is_restored_in_place():
    """Whoever holds it sees it, an optimizer for one: parameters and buffers, at any depth."""
    first, second, third = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    counts = Counter({"a": 1})
    mine = {"multiplier": first, "more": [second, (counts, [third])]}
    places = [parameter.data_ptr() for parameter in (first, second, third)]
    with torch.no_grad():
        for i, parameter in enumerate((first, second, third)):
            parameter.add_(i + 1)
    kept = through_a_file(p.pack(mine))
    counts["b"] = 2
    with torch.no_grad():
        for parameter in (first, second, third):
            parameter.zero_()
    back = p.unpack(kept, mine)
    assert [parameter.tolist() for parameter in (first, second, third)] == [[1, 1], [2, 2], [3, 3]]
    assert [parameter.data_ptr() for parameter in (first, second, third)] == places
    assert all(parameter.requires_grad for parameter in (first, second, third))
    assert back is mine and back["multiplier"] is first and back["more"][0] is second
    assert back["more"][1][0] is counts and back["more"][1][1][0] is third
    assert counts == {"a": 1}


def test_what_has_a_state_dict_is_restored_in_place():
    """A network, its optimizer, and an object of the user's: they learn on."""

    class Average:
        def __init__(self):
            self.mean = np.zeros(2)

        def state_dict(self):
            return {"mean": self.mean, "more": {(1, 2): deque([3])}}

        def load_state_dict(self, state):
            assert state["more"] == {(1, 2): deque([3])}
            self.mean = state["mean"]

    def learn(state):
        state["average"].mean = state["average"].mean * 0.5 + 1
        for _ in range(3):
            state["optimizer"].zero_grad()
            state["network"](torch.ones(1, 2)).square().sum().backward()
            state["optimizer"].step()
        return state["network"].weight.tolist(), state["average"].mean.tolist()

    def make():
        network = torch.nn.Linear(2, 2)
        optimizer = torch.optim.Adam(network.parameters(), 0.1, amsgrad=True)
        return {"network": network, "optimizer": optimizer, "average": Average()}

    state = make()
    learn(state)
    kept = through_a_file(p.pack(state))
    expected = learn(state)
    other = make()
    learn(other)
    parts = list(other.values())
    place = other["network"].weight.data_ptr()
    assert p.unpack(kept, other) is other
    assert all(part is old for part, old in zip(other.values(), parts, strict=True))
    assert other["network"].weight.data_ptr() == place
    assert learn(other) == expected


def draw(generator):
    """Some of everything: also what keeps half of a number for the next time."""
    if isinstance(generator, torch.Generator):
        return torch.rand(3, generator=generator).tolist()
    if isinstance(generator, random.Random):
        return [generator.random(), generator.gauss(0, 1)]
    if isinstance(generator, np.random.RandomState):
        return [*generator.random_sample(3), generator.standard_normal()]
    return [*generator.random(3), *generator.integers(9, size=3, dtype=np.int32)]


GENERATORS = {
    kind.__name__: lambda seed, kind=kind: np.random.Generator(kind(seed))
    for kind in (
        np.random.PCG64,
        np.random.PCG64DXSM,
        np.random.MT19937,
        np.random.Philox,
        np.random.SFC64,
    )
}
GENERATORS |= {
    "RandomState": np.random.RandomState,
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "random": random.Random,
}


@pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS)
def test_generators_come_back_in_place(make):
    """Alone, and within lists and dictionaries."""
    generator = make(1)
    others = [make(2), make(3), make(4)]
    draw(generator)
    alone = through_a_file(p.pack(generator))
    among_others = through_a_file(p.pack({"a": [(generator, 1)], "b": [generator]}))
    expected = [draw(generator) for _ in range(3)]
    for other in others:
        draw(other)
    assert p.unpack(alone, others[0]) is others[0]
    back = p.unpack(among_others, {"a": [(others[1], 0)], "b": [others[2]]})
    assert back["a"][0][0] is others[1] and back["a"][0][1] == 1 and back["b"][0] is others[2]
    for other in others:
        assert [draw(other) for _ in range(3)] == expected
