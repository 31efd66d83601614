"""Section 2: the seven wrappers, each against the emulator or a slow version of its own, and what is saved of them."""

import copy
import enum
import io
import multiprocessing
import pickle
import resource
from collections import Counter, defaultdict, deque, namedtuple
from types import SimpleNamespace

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from launch import finish, fork, refusal, run_directory

import ppo_atari as p
from ppo_atari import make_env, parse_args


def args_for(env_id: str, *flags: str):
    return parse_args(["--env-id", env_id, *flags])


class ScriptedGame(gym.Env):
    """A game whose every step is written down: (reward, lives afterwards, terminated). Observations count the steps."""

    observation_space = gym.spaces.Box(0, 255, (4, 4, 3), np.uint8)
    action_space = gym.spaces.Discrete(4)

    def __init__(self, script, meanings=("NOOP", "FIRE", "RIGHT", "LEFT")):
        self.script, self.meanings, self.at, self.resets, self.actions = list(script), list(meanings), 0, 0, []
        self.ale = SimpleNamespace(lives=lambda: self.lives)

    def get_action_meanings(self):
        return self.meanings

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.resets, self.lives = self.resets + 1, 3
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
    assert chi_squared < 58.3  # 29 degrees of freedom: exceeded once in a thousand seeds, and this one is fixed


def test_noops_press_nothing_and_a_game_they_end_starts_anew():
    game = ScriptedGame([(0, 3, False), (0, 0, True)] + [(0, 3, False)] * 40, ["FIRE", "NOOP", "RIGHT"])
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


@pytest.mark.parametrize("game", ["Breakout", "SpaceInvaders", "Asteroids", "Qbert"])
def test_pixels_rewards_and_scores_equal_a_slow_version(game):
    """Maximum over RGB of the last two of four screens, then luminance, then area averaging; scores of whole games."""
    env = make_env(args_for(f"{game}NoFrameskip-v4", "--noop-max", "0", "--no-episodic-life", "--no-fire-reset"))
    raw = gym.make(f"{game}NoFrameskip-v4", frameskip=1)
    obs, _ = env.reset(seed=7)
    screen, _ = raw.reset(seed=7)
    image = cv2.resize(cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA)
    stack, score, steps = [image] * 4, 0.0, 0
    np.testing.assert_array_equal(obs, np.stack(stack))  # the first frame four times
    rng = np.random.default_rng(0)
    for _ in range(3000):
        action = rng.integers(env.action_space.n)
        obs, reward, terminated, truncated, info = env.step(action)
        screens, total, over = [], 0.0, False
        for _ in range(4):
            screen, r, over, _, _ = raw.step(action)
            screens.append(screen)
            total += r
            if over:
                break
        score, steps = score + total, steps + 1
        assert reward == np.sign(total) and terminated == over and not truncated
        largest = np.maximum(screens[-1], screens[-2]) if not over else screens[-1]
        image = cv2.resize(cv2.cvtColor(largest, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA)
        stack = [*stack[1:], image]
        np.testing.assert_array_equal(obs, np.stack(stack))
        if over:
            assert (info["episode"]["r"], info["episode"]["l"]) == (score, steps)
            break
    assert over


def test_the_maximum_is_taken_before_the_luminance():
    """Two overlapping sprites, pure red and pure green: the maximum is yellow, brighter than either."""

    class TwoScreens(ScriptedGame):
        def __init__(self):
            super().__init__([])
            self.frame = 0
            self.ale = SimpleNamespace(
                act=self.act, game_over=lambda with_truncation=True: False, game_truncated=lambda: False,
                getScreenRGB=self.screen,
            )  # fmt: skip

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
    assert p.WarpFrame(env, 36).observation(screen).min() > 200  # the luminances of red and green are 76 and 150


def test_a_lost_life_ends_the_episode_and_a_game_over_resets():
    env = make_env(args_for("BreakoutNoFrameskip-v4"))
    ale = env.unwrapped.ale
    env.reset(seed=1)
    frames, endings = [], []
    for _ in range(3000):
        _, _, terminated, _, info = env.step(0)
        if terminated:
            frames.append(ale.getEpisodeFrameNumber())
            endings.append((ale.lives(), ale.game_over(), "episode" in info))
            env.reset()
            frames[-1] = ale.getEpisodeFrameNumber() - frames[-1]
            if endings[-1][1]:
                break
    assert endings == [(4, False, False), (3, False, False), (2, False, False), (1, False, False), (0, True, True)]
    assert frames[:4] == [12] * 4  # the same game goes on: one no-op, FIRE and action 2, four frames each
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
    assert info["episode"]["r"] == 13 and info["episode"]["l"] == 3  # the score of the finished game is not lost
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


def test_fire_only_where_the_game_has_it():
    def presses_fire(*flags):
        return any(isinstance(wrapper, p.FireResetEnv) for wrapper in wrappers(make_env(args_for(*flags))))

    assert presses_fire("ALE/Breakout-v5") and not presses_fire("ALE/MsPacman-v5")
    assert not presses_fire("ALE/Breakout-v5", "--no-fire-reset")
    assert presses_fire("ALE/Backgammon-v5")  # no NOOP, and FIRE is action 0
    backgammon = make_env(args_for("ALE/Backgammon-v5"))
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
    assert [stack[:, 0, 0].tolist() for stack in stacks][:3] == [[201] * 4, [201, 201, 201, 1], [201, 201, 1, 2]]
    assert stacks[-1][:, 0, 0].tolist() == [2, 3, 4, 5]
    assert env.reset()[0][:, 0, 0].tolist() == [202] * 4  # no frame of the episode before


def test_truncation_is_not_termination():
    gym.register("Test/Short-v0", "ale_py.env:AtariEnv", kwargs={
        "game": "pong", "repeat_action_probability": 0.0, "max_num_frames_per_episode": 100})  # fmt: skip
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
    env = make_env(args_for(env_id, *(("--repeat-action-probability", *flags) if flags else ())))
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == probability


ALL_GAMES = sorted(name for name in gym.registry if name.startswith("ALE/") and name.endswith("-v5"))
ALL_GAMES += sorted(name for name in gym.registry if name.endswith("NoFrameskip-v4"))


def test_all_games_are_tested():
    assert len([name for name in ALL_GAMES if name.startswith("ALE/")]) == 104 and len(ALL_GAMES) > 150


def played_once(env_id):
    """Every action once: number of actions, last observation and all rewards."""
    env, rewards = make_env(args_for(env_id, "--noop-max", "1")), []
    obs, _ = env.reset(seed=1)
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
    """18, in the emulator's own order, in which NOOP and FIRE come first; the emulator takes 9 in two games."""
    names, fewer = [ale_py.Action(i).name for i in range(18)], {"ALE/LostLuggage-v5", "ALE/Skiing-v5"}
    for env_id in sorted({*ALL_GAMES[:104:4], *fewer}):
        env = make_env(args_for(env_id, "--full-action-space", "--noop-max", "1"))
        meanings = [name for name in names if "FIRE" not in name] if env_id in fewer else names
        assert env.unwrapped.get_action_meanings() == meanings and env.action_space.n == len(meanings), env_id
        assert p.find_action(env, "NOOP") == 0 and p.find_action(env, "FIRE") == (None if env_id in fewer else 1)
        assert any(isinstance(wrapper, p.FireResetEnv) for wrapper in wrappers(env)) == (env_id not in fewer)
        (noops,) = (wrapper for wrapper in wrappers(env) if isinstance(wrapper, p.NoopResetEnv))
        assert noops.noop == 0


@pytest.mark.parametrize("flags", [(), ("--full-action-space",)], ids=["the game's actions", "all actions"])
@pytest.mark.parametrize("game", ["Breakout", "MsPacman", "Backgammon", "VideoCheckers", "Freeway"])
def test_an_action_is_the_emulators_of_that_meaning(game, flags):
    """Against an emulator of its own that is told the meaning: the same memory after every action."""
    plain = ("--noop-max", "0", "--no-fire-reset", "--no-episodic-life", "--repeat-action-probability", "0")
    env = make_env(args_for(f"ALE/{game}-v5", *plain, *flags))
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
    assert len(pressed) == env.action_space.n == (18 if flags else len(env.unwrapped.ale.getMinimalActionSet()))


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "BreakoutNoFrameskip-v4", "ALE/MsPacman-v5"])
def test_a_restored_environment_plays_the_same_game(env_id):
    """Over several games: observations, rewards, ends, memory of the machine, no-op counts and scores."""
    args = args_for(env_id)
    env, twin = make_env(args), make_env(args)
    rng = np.random.default_rng(1)

    def play(env, actions):
        for action in actions:
            obs, reward, terminated, truncated, info = env.step(action)
            score = info["episode"]["r"] if "episode" in info else None
            yield obs.tobytes(), reward, terminated, truncated, score, env.unwrapped.ale.getRAM().tobytes()
            if terminated or truncated:
                yield env.reset()[0].tobytes()

    env.reset(seed=5)
    list(play(env, rng.integers(env.action_space.n, size=150)))
    p.forget_last_action(env)
    state = p.get_env_state(env)
    twin.reset(seed=99)
    list(play(twin, [1, 2, 3] * 20))
    p.set_env_state(twin, state)
    actions = rng.integers(env.action_space.n, size=1200)
    history = list(play(env, actions))
    assert history == list(play(twin, actions))
    assert sum(isinstance(entry, tuple) and entry[4] is not None for entry in history) >= 1  # a game ended in between


def test_forgetting_the_last_action_changes_nothing_else():
    env = make_env(args_for("ALE/Breakout-v5"))
    env.reset(seed=1)
    before = env.unwrapped.ale.cloneState(include_rng=True).serialize()
    p.forget_last_action(env)
    assert env.unwrapped.ale.cloneState(include_rng=True).serialize() == before


class Remembering(gym.Wrapper):
    """What a user's wrapper may keep, of every kind; declared here, and used and extended below."""

    saved = ("steps", "mean", "counts", "last", "noise")

    def __init__(self, env):
        super().__init__(env)
        self.steps, self.mean, self.counts, self.label = 0, 0.5, np.zeros((3, 2), np.int64), "start"
        self.last, self.noise = deque(maxlen=3), np.random.default_rng(0)


class Surprising(Remembering):
    """Its rewards depend on all of it."""

    saved = ("label", "bonus", "flags")

    def __init__(self, env):
        super().__init__(env)
        self.bonus, self.flags = np.float64(0.1).repeat(4), [True, None]

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * float(obs.mean()) / 3
        self.counts[action % 3, self.steps % 2] += 1
        self.last.append(obs[0, ::40, ::40].astype(np.float32) / 7)
        self.bonus = self.bonus * 1.1 % 1
        self.label, self.flags = self.label[-4:] + str(action), [not self.flags[0], self.steps]
        past = sum(float(frame.sum()) for frame in self.last) + self.counts[0, 1] / 9 + float(self.bonus[2])
        return obs, reward + self.mean + past + self.noise.normal() + len(self.label) + self.flags[0], *rest


def through_a_file(content):
    """As a checkpoint does it: nothing in it may need code to be run."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_users_wrapper_is_restored_exactly():
    """Integers, floats, text, arrays, a deque of arrays, a generator, a list; declared in the class and in its base."""
    args = args_for("ALE/Breakout-v5", "--no-clip-reward")
    env, twin = Surprising(make_env(args)), Surprising(make_env(args))
    rng = np.random.default_rng(2)

    def rewards(env, actions):
        for action in actions:
            obs, reward, terminated, truncated, _ = env.step(int(action))
            if terminated or truncated:
                env.reset()
            yield reward, int(obs.sum())

    env.reset(seed=5)
    list(rewards(env, rng.integers(4, size=101)))
    p.forget_last_action(env)
    state = through_a_file(p.get_env_state(env))
    before = {name: getattr(env, name) for name in Remembering.saved + Surprising.saved}
    before |= {"last": [frame.copy() for frame in env.last], "counts": env.counts.copy()}
    actions = rng.integers(4, size=300)
    expected = list(rewards(env, actions))  # the state is a copy: playing on does not change it
    twin.reset(seed=99)
    list(rewards(twin, [1, 2, 3] * 5))
    p.set_env_state(twin, state)
    for name, value in before.items():
        mine = getattr(twin, name)
        if name == "last":
            assert isinstance(mine, deque) and mine.maxlen == 3
            for frame, old in zip(mine, value, strict=True):
                assert frame.dtype == old.dtype and np.array_equal(frame, old)
        elif isinstance(value, np.ndarray):
            assert mine.dtype == value.dtype and np.array_equal(mine, value)
        elif name != "noise":
            assert type(mine) is type(value) and mine == value, name
    assert list(rewards(twin, actions)) == expected
    assert len({reward for reward, _ in expected}) > 290


def broken(**attributes):
    """A wrapper class whose attributes are these."""
    return type("Novelty", (gym.Wrapper,), attributes)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("wrapper", "says"),
    [
        (broken(), "Novelty"),
        (broken(saved=("nothing_like_it",)), "Novelty"),
        (broken(saved=("seen",), seen={1}), "set"),
    ],
    ids=["nothing declared", "no such attribute", "of an unknown kind"],
)
def test_a_wrapper_that_no_checkpoint_would_hold_is_refused(wrapper, says, workers, tmp_path, monkeypatch, capfd):
    """At the start, before there is a run directory; nobody is left behind."""
    monkeypatch.chdir(tmp_path)
    make = p.make_env
    monkeypatch.setattr(p, "make_env", lambda *args, **kwargs: wrapper(make(*args, **kwargs)))
    flags = ["--num-envs", 2, "--num-steps", 8, "--frame-size", 36, "--num-workers", workers, "--total-timesteps", 16]
    assert says in refusal(capfd, *flags)
    assert not (tmp_path / "runs").exists() and not multiprocessing.active_children()


def test_a_stock_wrapper_is_declared_where_it_is_made():
    env = gym.wrappers.TransformReward(make_env(args_for("ALE/Breakout-v5")), lambda reward: 2 * reward)
    env.reset(seed=1)
    with pytest.raises(p.UsageError, match="TransformReward"):
        p.get_env_state(env)
    env.saved = ()
    p.set_env_state(env, through_a_file(p.get_env_state(env)))


def test_a_stock_wrapper_keeps_its_statistics():
    """NormalizeReward divides by a running deviation, which lies in an object of its own: its parts, by their names."""

    def make():
        env = gym.wrappers.NormalizeReward(make_env(args_for("ALE/Breakout-v5", "--no-clip-reward")))
        env.saved = ("return_rms.mean", "return_rms.var", "return_rms.count", "discounted_reward")
        env.reset(seed=1)
        return env

    def rewards(env, actions):
        for action in actions:
            _, reward, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
            yield float(reward)

    env, twin = make(), make()
    actions = np.random.default_rng(1).integers(4, size=600)
    list(rewards(env, actions[:300]))
    state = through_a_file(p.get_env_state(env))
    expected = list(rewards(env, actions))
    p.set_env_state(twin, state)
    assert list(rewards(twin, actions)) == expected and any(reward not in (0, 1) for reward in expected)
    env.saved = ("return_rms",)
    with pytest.raises(p.UsageError, match="RunningMeanStd.*its parts"):
        p.get_env_state(env)
    env.saved = ("return_rms.median",)
    with pytest.raises(p.UsageError, match="NormalizeReward.*median"):
        p.get_env_state(env)


def test_a_wrapper_whose_attributes_begin_as_one_object():
    """After a reset, the frame before is the frame itself: one array, tensor or list of two names, restored as two."""

    class Moving(gym.Wrapper):
        """Rewards what moved since the frame before."""

        saved = ("before", "now", "tensors", "old", "new", "past", "counts", "twin", "same")

        def reset(self, **kwargs):
            obs, info = self.env.reset(**kwargs)
            self.before = self.now = obs
            self.tensors = [torch.from_numpy(obs)] * 2
            self.old = self.new = [0]
            self.past, (self.counts, self.twin, self.same) = {}, [{"pixels": obs[0]}] * 3
            return obs, info

        def step(self, action):
            obs, reward, *rest = self.env.step(action)
            self.before, self.now = self.now, obs
            self.tensors = [self.tensors[1], torch.from_numpy(obs)]
            self.old, self.new = self.new, [action]
            self.past, self.counts = self.counts, {"pixels": obs[1]}
            self.twin = self.same = {"pixels": obs[2], "more": [obs]}
            return obs, float(np.abs(self.now.astype(float) - self.before).sum()), *rest

    env, twin = (Moving(make_env(args_for("ALE/Breakout-v5"))) for _ in range(2))
    env.reset(seed=1)
    actions = np.random.default_rng(1).integers(4, size=60).tolist()
    for action in actions[:30]:
        env.step(action)
    kept = through_a_file(p.get_env_state(env))
    before = {name: copy.deepcopy(getattr(env, name)) for name in env.saved}
    assert not np.array_equal(env.before, env.now) and env.old != env.new
    expected = [env.step(action)[1] for action in actions[30:]]
    twin.reset(seed=2)
    p.set_env_state(twin, kept)
    assert not [name for name, value in before.items() if not same(getattr(twin, name), value)]
    assert [twin.step(action)[1] for action in actions[30:]] == expected


@pytest.mark.parametrize("names", [("now", "newest"), ("newest", "now")])
def test_a_wrapper_whose_attributes_begin_as_parts_of_one_object(names):
    """At a reset, the newest frame is a part of the stack; a step later, it is the newest of the stack before."""

    class Remembering(gym.Wrapper):
        saved = names

        def reset(self, **kwargs):
            self.now, info = self.env.reset(**kwargs)
            self.newest = self.now[-1]
            return self.now, info

        def step(self, action):
            self.newest = self.now[-1]
            self.now, *rest = self.env.step(action)
            return self.now, *rest

    env, twin = (Remembering(make_env(args_for("ALE/Breakout-v5"))) for _ in range(2))
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

    def remembering(*args):
        env = Remembering(make(*args))
        env.flags = [np.full(2, i) for i in range(200)]
        env.saved = ("flags",)
        return env

    p.make_env = remembering


def test_a_wrapper_that_keeps_many_arrays(tmp_path):
    """On their way from a worker into the checkpoint and back they cost no open file each, as shared tensors would."""
    flags = ["--num-envs", 2, "--num-steps", 8, "--frame-size", 36, "--eval-episodes", 0, "--num-workers", 2]
    for argv in ([*flags, "--total-timesteps", 32], ["--resume", None, "--total-timesteps", 48]):
        argv = [run_directory(tmp_path) if word is None else word for word in argv]
        process = fork(*argv, cwd=tmp_path, before=few_files_for_many_arrays)
        try:
            assert finish(process, 60) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
    kept = torch.load(run_directory(tmp_path) / "checkpoint.pt", weights_only=True)["environments"]
    assert len(kept) == 2 and kept[0]["wrappers"][0][199]["shape"] == (2,)


def test_what_is_changed_in_place_is_restored_in_place():
    """Whoever holds it sees it, an optimizer for one: parameters, at any depth; what is one object stays one."""
    first, second, shared = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    array = np.zeros(2)
    mine = {"multiplier": first, "more": [second, (array, [shared])], "again": shared, "arrays": {"a": array}}
    with torch.no_grad():
        for i, parameter in enumerate((first, second, shared)):
            parameter.add_(i + 1)
    array += 4
    kept = through_a_file(p.pack(mine))
    with torch.no_grad():
        for parameter in (first, second, shared):
            parameter.zero_()
    array[:] = 0
    back = p.unpack(mine, kept)
    assert [float(x.detach().mean()) for x in (first, second, shared)] == [1, 2, 3] and array.tolist() == [4, 4]
    assert back["multiplier"] is first and back["more"][0] is second and back["more"][1][0] is array
    assert back["again"] is shared and back["more"][1][1][0] is shared and back["arrays"]["a"] is array


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
    assert frames[0][:3] == frames[0][3:] and all(b[:3] == a[3:] for a, b in zip(frames, frames[1:], strict=False))
    assert all(frame[4] == 2 * frame[3] % 256 and frame[5] == 3 * frame[3] % 256 for frame in frames)
    assert len({tuple(frame) for frame in frames}) > 2


def test_frames_that_are_not_bytes():
    """Scaled beneath the stack: neither a reset nor a step rounds them."""

    def scaled(env):
        space = gym.spaces.Box(-1, 1, env.observation_space.shape[:2], np.float32)
        return gym.wrappers.TransformObservation(env, lambda screen: (screen[..., 0] / 256).astype(np.float32), space)

    env = p.FrameStack(scaled(ScriptedGame([(0, 3, False)] * 3)), 2)
    assert env.observation_space == gym.spaces.Box(-1, 1, (2, 4, 4), np.float32)
    obs = [env.reset()[0], *(env.step(0)[0] for _ in range(2))]
    assert all(one.dtype == np.float32 for one in obs)
    first = obs[0][0, 0, 0]
    assert first == 201 / 256
    assert [one[:, 0, 0].tolist() for one in obs] == [[first, first], [first, 1 / 256], [1 / 256, 2 / 256]]


def test_another_games_state_is_refused():
    """The emulator believes what it is given: bytes that are not of this game never reach it."""
    env, other = make_env(args_for("ALE/Breakout-v5")), make_env(args_for("ALE/Pong-v5"))
    env.reset(seed=1)
    other.reset(seed=1)
    good = p.get_env_state(env)
    wrong = [p.get_env_state(other), good | {"emulator": good["emulator"][:-1]}, good | {"emulator": b""}, {}]
    wrong += [good | {"wrappers": good["wrappers"][:-1]}, good | {"np_random": {}}]
    for state in wrong:
        with pytest.raises(p.UsageError, match="do not fit"):
            p.set_env_state(env, state)


class Opaque:
    """Nothing that a checkpoint knows."""


Point = namedtuple("Point", "x y")
Number = enum.IntEnum("Number", "ONE")
REFUSED = [
    Opaque(),
    Point(1, 2),
    b"",
    {1, 2},
    {"a": [Opaque()]},
    deque([print]),
    np.array([Opaque()]),
    np.array(["text"]),
    np.str_("text"),
    Number.ONE,
    {Opaque(): 1},
    {(1, Point(1, 2)): 1},
    Opaque,
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_what_a_checkpoint_cannot_hold_is_refused(value):
    with pytest.raises(p.UsageError, match="a checkpoint cannot hold"):
        p.pack(value)


def same(first, second):
    """Of the same type and content, at every depth."""
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray | np.generic | torch.Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and bool((first == second).all())
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple | deque):
        alike = getattr(first, "maxlen", None) == getattr(second, "maxlen", None) and len(first) == len(second)
        return alike and all(map(same, first, second))
    return first == second


KEPT = {
    "numbers": ([], [0, 2**70, -1.5, True, None, "text", b"bytes", float("inf")]),
    "tuples": ((0, (0.0, 0)), (1, (2.5, 3))),
    "numbers of numpy": (None, (np.float32(0.1), np.float64(2.5), np.int16(3), np.bool_(True))),
    "array": (np.zeros((2, 3), np.uint8), np.arange(6, dtype=np.uint8).reshape(2, 3)),
    "unsigned arrays": (None, [np.array([2**32 - 1, 0], np.uint32), np.uint16(65535), np.uint64(2**64 - 1)]),
    "an array that nobody may write to": (np.broadcast_to(np.uint8(0), (2, 3)), np.ones((2, 3), np.uint8)),
    "array with gaps": (None, np.arange(8.0)[::-2]),
    "arrays of other types": (None, [np.zeros((0, 2), np.float32), np.array([True]), np.array([2**63], np.uint64)]),
    "a dictionary that grew": ({}, {"room 1": 3, 7: [np.ones(2)]}),
    "a dictionary that shrank": ({"room 1": 3, "room 2": 4}, {"room 1": 5}),
    "a dictionary with all": ({"a": np.zeros(2)}, {"a": np.ones(2), "b": deque([(1, np.ones(1))], maxlen=2)}),
    "a deque": (deque(), deque([np.ones(2), (1, 2), {"a": np.zeros(3)}])),
    "a deque of limited length": (deque(maxlen=3), deque([1, 2, 3], maxlen=3)),
    "a deque where nothing was": (None, deque([1, 2])),
    "a tensor": (torch.zeros(2), torch.tensor([1.5, 2])),
    "tensors": ({"a": torch.zeros(1)}, {"a": torch.ones(1), "b": torch.ones(2, 0, dtype=torch.bfloat16)}),
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
    kept = pickle.loads(pickle.dumps(through_a_file(p.pack(value))))  # the other processes of torchrun get it so
    back = p.unpack(fresh, kept)
    assert same(value, back), back
    grown = isinstance(fresh, torch.Tensor) and not fresh.numel()
    assert back is fresh or grown or not isinstance(fresh, torch.Tensor | dict)
    if isinstance(fresh, defaultdict):
        assert back["never seen"] == 0


def test_counts_by_what_numpy_gives():
    """Keys that look alike to a dictionary: the count of a state is found again, by NumPy's numbers or Python's."""
    code = np.arange(3, dtype=np.uint8)
    counts = {code[1]: 1, tuple(code): 2, (0, (np.float32(0.5), "x")): 3, np.bool_(True): 4, np.str_("room"): 5}
    back = p.unpack({}, through_a_file(p.pack(counts)))
    assert back == counts and back[tuple(code)] == 2 and back["room"] == 5
    assert not any(isinstance(key, np.generic) for key in back)


KINDS_OF_GENERATORS = [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64]


@pytest.mark.parametrize("kind", [*KINDS_OF_GENERATORS, torch.Generator], ids=lambda kind: kind.__name__)
def test_generators_come_back_in_place(kind):
    def make(seed):
        return kind().manual_seed(seed) if kind is torch.Generator else np.random.Generator(kind(seed))

    def draw(generator):
        if kind is torch.Generator:
            return torch.rand(3, generator=generator).tolist()
        return [*generator.random(3), *generator.integers(9, size=3, dtype=np.int32)]  # which keeps half a number

    generator, other = make(1), make(2)
    draw(generator)
    kept = through_a_file(p.pack(generator))
    expected = [draw(generator) for _ in range(3)]
    draw(other)
    assert p.unpack(other, kept) is other
    assert [draw(other) for _ in range(3)] == expected


@pytest.mark.parametrize(
    ("current", "saved"),
    [
        (1, "one"),
        (1.5, [1]),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2, dtype=torch.int32), torch.ones(2)),
        (torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.uint8)),
        (torch.zeros(0, dtype=torch.int64), torch.ones(2)),
        ({"a": torch.zeros(1)}, {}),
        (np.random.default_rng(), {}),
    ],
    ids=[
        "text for a number",
        "a list for a number",
        "a longer tensor",
        "floats for integers",
        "integers for booleans",
        "floats for none yet",
        "no tensor",
        "no generator",
    ],
)
def test_a_value_that_does_not_fit_is_refused(current, saved):
    with pytest.raises((ValueError, TypeError, KeyError, RuntimeError)):
        p.unpack(current, saved)
