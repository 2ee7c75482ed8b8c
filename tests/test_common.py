"""Helpers that have one correct answer: games, files, the frame store, evaluation."""

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config

import common

CPU = torch.device("cpu")


def message(call, *arguments, **keywords):
    """What a call that must refuse says: one line that starts with 'error: '."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments, **keywords)
    text = str(stop.value)
    assert text.startswith("error: ") and "\n" not in text
    return text


# --- games ---------------------------------------------------------------------------------------------------------


def test_unknown_games_are_refused_with_the_nearest_names():
    assert "bigfish" in message(common.check_game, "bigfihs")
    assert "coinrun" in message(common.check_game, "coin-run")
    everything = message(common.check_game, "xqzw")
    assert all(game in everything for game in common.RETURNS)
    for game in common.RETURNS:
        common.check_game(game)


def test_normalized_returns():
    assert len(common.RETURNS) == 16
    for game, (low, high) in common.RETURNS.items():
        assert low < high, game
        assert common.normalize_return(low, low, high) == 0 and common.normalize_return(high, low, high) == 1
    assert common.normalize_return(7.0, 1.0, 5.0) == 1.5
    with np.errstate(all="raise"):  # a toy expert may score exactly what random play does
        assert np.isnan(common.normalize_return(np.float64(3), np.float64(2), np.float64(2)))


def test_seeds_differ_by_purpose_and_fit_procgen():
    seeds = [common.derive_seed(seed, purpose) for seed in range(50) for purpose in ("train", "test")]
    assert len(set(seeds)) == 100 and min(seeds) >= 0 and max(seeds) < 2**31
    assert common.derive_seed(7, "train") == common.derive_seed(7, "train")


def test_area_mean_equals_a_naive_mean_of_blocks():
    obs = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    obs[0, :8, :8] = 255
    assert common.area_mean(obs, 64) is obs
    for size in (32, 16):
        small, side = common.area_mean(obs, size), 64 // size
        assert small.shape == (2, size, size, 3) and small.dtype == np.uint8
        for y in range(size):
            for x in range(size):
                block = obs[:, y * side : (y + 1) * side, x * side : (x + 1) * side].astype(float)
                assert np.array_equal(small[:, y, x], np.floor(block.mean((1, 2)) + 0.5))


def play(steps, seed, actions_seed=0, **keywords):
    """Rewards [T, B], frames [T + 1, B, S, S, 3] and firsts [T + 1, B] of random actions, and the environments."""
    envs = common.ProcgenEnvs("bigfish", 3, seed, **keywords)
    rng = np.random.default_rng(actions_seed)
    rewards, frames, firsts = [], [], []
    for step in range(steps + 1):
        reward, obs, first = envs.observe()
        rewards.append(reward), frames.append(obs.copy()), firsts.append(first)
        if step < steps:
            envs.act(rng.integers(common.NUM_ACTIONS, size=3))
    return np.array(rewards[1:]), np.array(frames), np.array(firsts), envs


def test_the_seed_reaches_the_games():
    one, same, other = (play(200, seed)[:3] for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(one, same))
    assert not np.array_equal(one[1][0], other[1][0])
    assert one[2][0].all() and one[2][1:].any() and not one[2][1:].all()  # episodes ended while we looked


def test_levels_and_frame_size_are_as_asked():
    large, small = play(5, 5)[1], play(5, 5, frame_size=32)[1]
    assert large.shape == (6, 3, 64, 64, 3) and small.shape == (6, 3, 32, 32, 3)
    assert np.array_equal(common.area_mean(large[3], 32), small[3])
    one_level = play(0, 5, start_level=3, num_levels=1)[1]
    assert (one_level[0] == one_level[0, 0]).all() and not (large[0] == large[0, 0]).all()


def test_finished_episodes_are_counted_once_each():
    rewards, _, firsts, envs = play(400, 1)
    expected, running = [], np.zeros(3)
    for reward, first in zip(rewards, firsts[1:]):
        running += reward
        for env in range(3):
            if first[env]:
                expected.append((env, running[env]))
                running[env] = 0
    assert len(expected) > 3 and any(episode_return for _, episode_return in expected)
    assert envs.finished == [(env, pytest.approx(total)) for env, total in expected]


def test_asking_twice_counts_a_reward_once():
    envs = common.ProcgenEnvs("bigfish", 3, 1)
    rng = np.random.default_rng(0)
    for _ in range(400):
        envs.observe()
        envs.observe()
        envs.act(rng.integers(common.NUM_ACTIONS, size=3))
    envs.observe()
    envs.observe()
    assert envs.finished == play(400, 1)[3].finished


def test_halves_are_games_of_their_own():
    envs = common.HalvedEnvs("bigfish", 5, 1, num_levels=2, frame_size=16)
    assert [(games.num_envs, half) for games, half in envs.halves] == [(3, slice(0, 3)), (2, slice(3, 5))]
    frames = [games.observe()[1] for games, _ in envs.halves]
    assert frames[0].shape == (3, 16, 16, 3) and frames[1].shape == (2, 16, 16, 3)
    (alone,) = common.HalvedEnvs("bigfish", 1, 1).halves
    assert alone[0].num_envs == 1 and alone[1] == slice(0, 1)
    sizes = [[games.num_envs for games, _ in common.HalvedEnvs("bigfish", n, 1, multiple_of=3).halves] for n in (3, 6, 9)]
    assert sizes == [[3], [3, 3], [6, 3]]
    large = common.HalvedEnvs("bigfish", 6, 1)
    first, second = (games.observe()[1] for games, _ in large.halves)
    assert not np.array_equal(first, second)


def step_halves(envs, steps, rng):
    for _ in range(steps):
        for games, _ in envs.halves:
            games.observe()
            games.act(rng.integers(common.NUM_ACTIONS, size=games.num_envs))
    return [games.observe()[1] for games, _ in envs.halves]


def test_episodes_of_both_halves_are_told_apart_and_told_once():
    envs = common.HalvedEnvs("bigfish", 5, 1)
    step_halves(envs, 400, np.random.default_rng(0))
    alone = [list(games.finished) for games, _ in envs.halves]
    assert all(alone)
    assert envs.take_finished() == alone[0] + [(3 + env, episode_return) for env, episode_return in alone[1]]
    assert envs.take_finished() == []


def test_both_halves_go_on_from_a_saved_state():
    envs, other = common.HalvedEnvs("bigfish", 5, 1), common.HalvedEnvs("bigfish", 5, 2)
    step_halves(envs, 100, np.random.default_rng(0))
    saved = envs.state_dict()
    after = step_halves(envs, 300, np.random.default_rng(1))
    other.load_state_dict(saved)
    again = step_halves(other, 300, np.random.default_rng(1))
    assert all(np.array_equal(one, two) for one, two in zip(after, again))
    finished = envs.take_finished()
    assert len(finished) > 3 and other.take_finished() == finished


def test_a_tensor_on_the_cpu_is_the_array_itself():
    array = np.arange(4)
    tensor = common.to_device(array, torch.device("cpu"))
    array[0] = 7
    assert tensor.tolist() == [7, 1, 2, 3] == common.to_device(array, "cpu").tolist()


def test_a_machine_that_cannot_compile_is_told_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    text = message(common.compiled(lambda x: x * 3.0 + 1, True), torch.ones(2))
    assert "torch.compile failed here" in text and "--no-compile" in text


def test_threads_keep_the_order_and_no_more_than_asked_for_in_flight():
    made, done = [], []

    def items():
        for i in range(20):
            made.append(i)
            assert len(made) - len(done) <= 4  # three under way, and this
            yield i

    def slow_if_even(i):
        time.sleep(0.01 * (i % 2 == 0))
        return i * i

    for value in common.in_threads(slow_if_even, items(), 3):
        done.append(value)
    assert done == [i * i for i in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(common.in_threads(lambda i: 1 / i, [2, 1, 0, 1], 2))


class ScriptedEnvs:
    """Each slot plays its episodes of fixed lengths one after the other; an episode's return is its length."""

    def __init__(self, lengths):
        self.lengths, self.num_envs = lengths, len(lengths)
        self.episode, self.step, self.finished, self.acted = [0] * self.num_envs, [0] * self.num_envs, [], False

    def observe(self):
        for env in range(self.num_envs) if self.acted else ():
            self.step[env] += 1
            length = self.lengths[env][self.episode[env] % len(self.lengths[env])]
            if self.step[env] == length:
                self.finished.append((env, float(length)))
                self.step[env], self.episode[env] = 0, self.episode[env] + 1
        self.acted = False
        return np.zeros(self.num_envs), np.zeros((self.num_envs, 4, 4, 3), np.uint8), np.zeros(self.num_envs, bool)

    def act(self, action):
        assert len(action) == self.num_envs
        self.acted = True


def scripted(monkeypatch, *halves):
    """HalvedEnvs of these ScriptedEnvs."""
    coming = list(halves)
    monkeypatch.setattr(common.games, "ProcgenEnvs", lambda *_: coming.pop(0))
    envs = common.HalvedEnvs("bigfish", sum(games.num_envs for games in halves), 1)
    assert [games.num_envs for games, _ in envs.halves] == [games.num_envs for games in halves]
    return envs


def test_evaluation_does_not_favour_short_episodes(monkeypatch):
    rng = np.random.default_rng(0)
    lengths = [list(rng.choice([1, 50], 20)) for _ in range(32)]  # half short, half long: the mean is 25.5
    envs = scripted(monkeypatch, ScriptedEnvs(lengths[:16]), ScriptedEnvs(lengths[16:]))
    returns = common.evaluate(envs, lambda obs: np.zeros(len(obs), int), 4)
    assert returns.shape == (32, 4)
    assert np.array_equal(returns, [row[:4] for row in lengths])

    # the first 32 episodes to finish, which is what a loop that stops at a count would take
    envs = ScriptedEnvs(lengths)
    while len(envs.finished) < 32:
        envs.act(np.zeros(32, int))
        envs.observe()
    assert np.mean([total for _, total in envs.finished[:32]]) < 0.7 * returns.mean()


def test_evaluation_acts_on_the_frame_that_is_shown(monkeypatch):
    class Echo(ScriptedEnvs):
        """Shows the number of its step; an action that names another number loses the point."""

        def __init__(self, *lengths):
            super().__init__([[length] for length in lengths])
            self.shown, self.right = 0, []

        def observe(self):
            self.shown += self.acted
            reward, obs, first = super().observe()
            return reward, obs + np.uint8(self.shown), first

        def act(self, action):
            self.right.append(list(action) == [self.shown] * self.num_envs)
            super().act(action)

    halves = Echo(3, 4), Echo(5)
    returns = common.evaluate(scripted(monkeypatch, *halves), lambda obs: obs[:, 0, 0, 0], 2)
    assert returns.tolist() == [[3, 3], [4, 4], [5, 5]]
    for half in halves:  # the end of the tenth step shows in the frame after it, on which they act once more
        assert len(half.right) == 11 and all(half.right)


def test_random_return_of_few_levels_is_played():
    assert common.random_return("coinrun", 1, 0, 0) == common.RETURNS["coinrun"][0]
    value = common.random_return("bigfish", 1, 0, 2)
    assert 0 <= value < 5 and value == common.random_return("bigfish", 1, 0, 2) != common.RETURNS["bigfish"][0]


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    common.write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), common.atomic_write(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(b"half of the n")
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    common.write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


def test_npz_files_are_plain_and_come_back_as_they_were(tmp_path):
    arrays = dict(obs=np.arange(24, dtype=np.uint8).reshape(2, 4, 3), first=np.array([True, False]), settings=np.array('{"a": 1}'), r=np.float32(2.5))
    common.save_npz(tmp_path / "a.npz", **arrays)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert archive.files == list(arrays)
        for name, array in arrays.items():
            assert np.array_equal(archive[name], array) and archive[name].dtype == array.dtype
    assert common.load_npz(tmp_path / "a.npz", ("r",), "")["r"] == 2.5
    assert common.count_rows(tmp_path / "a.npz") == 2
    assert common.npz_bytes(**arrays) == common.npz_bytes(**arrays)  # no time stamp: the same data, the same bytes
    assert len(common.npz_bytes(obs=np.zeros(100_000, np.uint8))) < 2000  # compressed indeed
    with pytest.raises(ValueError):
        common.save_npz(tmp_path / "b.npz", objects=np.array([{}], dtype=object))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


MAKE = "python collect_data.py --game maze"


def write_frames(folder, rows=40, name="frames_000.npz", game="maze", size=4, episode=10, shard=0):
    """Frames whose pixels tell their shard, row and episode."""
    obs = np.zeros((rows, size, size, 3), np.uint8)
    obs[:, 0, 0, 0], obs[:, 0, 0, 1], obs[:, 0, 0, 2] = shard, np.arange(rows), np.arange(rows) // episode
    settings = json.dumps(dict(game=game, start_level=0, num_levels=0, seed=1))
    common.save_npz(folder / name, obs=obs, first=np.arange(rows) % episode == 0, settings=settings)
    return folder / name


def test_missing_and_damaged_frames_are_refused_with_the_remedy(tmp_path):
    text = message(common.read_frames, tmp_path / "frames_000.npz", "maze")
    assert str(tmp_path / "frames_000.npz") in text and "missing" in text and MAKE in text

    path = write_frames(tmp_path)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[150:170] = bytes(20)
    for content in (b"", b"PK", whole[:-1], whole[: len(whole) // 2], whole[:100], b"not a zip" * 99, bytes(damaged)):
        path.write_bytes(content)
        text = message(common.read_frames, path, "maze")
        assert str(path) in text and "damaged" in text and MAKE in text
    path.write_bytes(whole)
    assert common.read_frames(path, "maze")[0].shape == (40, 4, 4, 3)

    np.save(tmp_path / "array.npy", np.zeros(3))  # an array under the name of an archive
    (tmp_path / "array.npy").rename(path)
    assert "damaged" in message(common.read_frames, path, "maze")


def test_frames_of_another_game_shape_or_content_are_refused(tmp_path):
    path = write_frames(tmp_path, game="heist")
    text = message(common.read_frames, path, "maze")
    assert str(path) in text and "'heist'" in text and "'maze'" in text and MAKE in text

    obs, first = np.zeros((6, 4, 4, 3), np.uint8), np.zeros(6, bool)
    settings = json.dumps(dict(game="maze"))
    for wrong in (
        dict(obs=obs.astype(np.float32), first=first), dict(obs=obs[:, :2], first=first), dict(obs=obs[..., 0], first=first),
        dict(obs=obs[..., :1], first=first), dict(obs=obs, first=first[:5]), dict(obs=obs, first=first[:, None]),
        dict(obs=obs, first=first.astype(np.float32)),
    ):  # fmt: skip
        common.save_npz(path, settings=settings, **wrong)
        text = message(common.read_frames, path, "maze")
        assert str(path) in text and "[N, S, S, 3]" in text and MAKE in text

    common.save_npz(path, obs=obs, first=first)
    text = message(common.read_frames, path, "maze")
    assert str(path) in text and "holds no 'settings'" in text and MAKE in text
    for settings in ("not json", "[]", "{}"):
        common.save_npz(path, obs=obs, first=first, settings=settings)
        text = message(common.read_frames, path, "maze")
        assert str(path) in text and "settings that cannot be read" in text and MAKE in text

    write_frames(tmp_path)
    write_frames(tmp_path, name="frames_001.npz", size=8)
    assert "differ in frame size" in message(common.FrameStore, tmp_path, "maze", 1, 80, 1, CPU)


def test_missing_labels_and_latents_name_their_command(tmp_path):
    path = write_frames(tmp_path)
    text = message(common.read_labels, path, "maze")
    assert "labels_000.npz is missing" in text and MAKE in text
    text = message(common.read_latents, path, tmp_path / "runs", "maze", "abc")
    assert "latents_000.npz is missing" in text and "python train_latent_dynamics.py --game maze" in text
    text = message(common.list_shards, tmp_path / "nowhere", "frames", MAKE)
    assert "nowhere holds no frames_NNN.npz" in text and MAKE in text
    (tmp_path / "frames_001.npz").write_bytes(b"PK")
    assert "frames_001.npz is damaged" in message(common.FrameStore, tmp_path, "maze", 1, 1000, 1, CPU)


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_an_npz_is_refused(tmp_path):
    path = write_frames(tmp_path)
    np.savez(path, obs=np.array([Bomb(tmp_path / "exploded")], dtype=object), first=np.zeros(1, bool), settings="{}")
    assert "damaged" in message(common.read_frames, path, "maze") and not (tmp_path / "exploded").exists()


def test_checkpoints_come_back_or_are_refused(tmp_path):
    path = tmp_path / "model.pt"

    def load(kind="expert", game="maze"):
        return common.load_checkpoint(path, kind, game, "the command")

    text = message(load)
    assert str(path) in text and "missing" in text and "the command" in text
    weight = torch.randn(40, 40)
    common.save_checkpoint(path, kind="expert", game="maze", step=3, model={"weight": weight})
    content = load()
    assert content["step"] == 3 and torch.equal(content["model"]["weight"], weight)
    text = message(load, game="heist")
    assert str(path) in text and "'maze'" in text and "'heist'" in text and "the command" in text
    text = message(load, kind="latent_policy")
    assert str(path) in text and "'latent_policy'" in text and "the command" in text

    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-200], b"text"):
        path.write_bytes(content)
        text = message(load)
        assert str(path) in text and "damaged" in text and "the command" in text
    torch.save([1, 2], path)
    assert "not a checkpoint of kind" in message(load)

    torch.save(dict(kind="expert"), path)
    assert "'None', not on 'maze'" in message(load)

    torch.save(Bomb(tmp_path / "exploded"), path)
    assert "damaged" in message(load) and not (tmp_path / "exploded").exists()
    torch.save(dict(kind="expert", game="maze", config=json.JSONEncoder()), path)  # an object of a class: weights_only refuses it
    assert "damaged" in message(load)


def test_metrics_go_to_a_csv_file(tmp_path):
    log = common.MetricsLog(tmp_path / "run" / "script.csv", 10, "step")
    log.write(grad_step=1, loss=torch.tensor(0.25))
    log.write(grad_step=2, loss=0.125)
    assert (tmp_path / "run" / "script.csv").read_text().splitlines() == ["grad_step,loss", "1,0.25", "2,0.125"]
    common.MetricsLog(tmp_path / "run" / "script.csv", 10, "step").write(grad_step=7, loss=1.0)
    assert (tmp_path / "run" / "script.csv").read_text().splitlines() == ["grad_step,loss", "7,1.0"]


def test_a_device_that_is_not_there_is_refused():
    assert common.pick_device("cpu").type == "cpu"
    assert "--device cuda:99" in message(common.pick_device, "cuda:99")
    assert "--device toaster" in message(common.pick_device, "toaster")


# --- frames and latents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [1, 2, 3])
def test_valid_windows_equal_a_naive_loop(context):
    rng = np.random.default_rng(context)
    for case in range(200):
        n = int(rng.integers(0, 30))
        first = rng.random(n) < rng.choice([0.0, 0.1, 0.3, 0.7])
        if case % 2 and n:
            first[0] = True
        naive = [i - context >= 0 and i + 1 < n and not any(first[j] for j in range(i - context + 1, i + 2)) for i in range(n)]
        assert np.array_equal(common.valid_windows(first, context), np.array(naive, bool)), first


def look(windows, episode=10):
    """Checks that windows of write_frames() are consecutive and keep to their episode; returns (shard, row) of each o_t."""
    shard, row, own_episode = windows[:, :, 0, 0].int().unbind(-1)
    assert (shard == shard[:, :1]).all() and (own_episode == own_episode[:, :1]).all()
    assert (row.diff(dim=1) == 1).all()
    assert torch.equal(row // episode, own_episode)
    return list(zip(shard[:, -2].tolist(), row[:, -2].tolist()))


@pytest.mark.parametrize("context", [1, 2, 3])
def test_every_window_within_an_episode_is_drawn_and_no_other(tmp_path, context):
    for shard in range(3):
        write_frames(tmp_path, rows=30, name=f"frames_{shard:03d}.npz", shard=shard)
    store = common.FrameStore(tmp_path, "maze", context, 1000, 1, CPU)
    assert store.num_frames == 90 and store.frame_size == 4
    drawn = {where for _ in range(40) for where in look(store.sample_windows(50))}
    assert drawn == {(shard, row) for shard in range(3) for row in range(30) if context <= row % 10 < 9}


def test_the_seed_decides_the_samples(tmp_path):
    for shard in range(4):
        write_frames(tmp_path, name=f"frames_{shard:03d}.npz", shard=shard)

    def samples(seed):
        store = common.FrameStore(tmp_path, "maze", 1, 80, seed, CPU)
        return torch.cat([store.sample_windows(16) for _ in range(30)])

    assert torch.equal(samples(1), samples(1)) and not torch.equal(samples(1), samples(2))


def test_streaming_draws_each_window_about_once_a_pass_in_bounded_memory(tmp_path):
    rows = [40, 40, 20, 40, 30, 40, 40]  # the last shard of a recording may be shorter
    for shard, n in enumerate(rows):
        write_frames(tmp_path, rows=n, name=f"frames_{shard:03d}.npz", shard=shard)
    store = common.FrameStore(tmp_path, "maze", 1, 100, 3, CPU)
    assert len(store.obs) == 80  # two whole shards fit into the 100 frames
    windows = {(shard, row) for shard, n in enumerate(rows) for row in range(n) if 1 <= row % 10 < 9}
    passes = 60
    drawn = Counter()
    for _ in range(passes * len(windows) // 8):
        drawn.update(look(store.sample_windows(8)))
    assert set(drawn) == windows and len(store.obs) == 80
    counts = np.array([drawn[window] for window in sorted(windows)])
    # a window is drawn `passes` times on average; with independent draws the standard deviation would be its root
    assert counts.min() > passes / 2 and counts.max() < 2 * passes
    by_shard = np.array([np.mean([drawn[window] for window in windows if window[0] == shard]) for shard in range(len(rows))])
    assert (abs(by_shard / passes - 1) < 0.2).all()


def test_a_pool_smaller_than_a_shard_is_refused(tmp_path):
    write_frames(tmp_path, rows=40)
    text = message(common.FrameStore, tmp_path, "maze", 1, 39, 1, CPU)
    assert "--pool-frames 39" in text and "40 frames" in text
    write_frames(tmp_path, rows=40, episode=2)
    assert "no window of 3 frames" in message(common.FrameStore, tmp_path, "maze", 1, 40, 1, CPU)


def test_shards_too_short_for_a_window_are_passed_over(tmp_path):
    for shard, episode in enumerate((2, 2, 10, 2)):  # episodes of two frames hold no window of three
        write_frames(tmp_path, name=f"frames_{shard:03d}.npz", shard=shard, episode=episode)
    store = common.FrameStore(tmp_path, "maze", 1, 40, 1, CPU)
    for _ in range(20):
        assert {shard for shard, _ in look(store.sample_windows(16))} == {2}


def write_latents(folder, rows, shard, valid):
    z = np.stack([np.full(rows, shard), np.arange(rows)], 1).astype(np.float16)
    common.save_npz(folder / f"latents_{shard:03d}.npz", z=z, codes=np.zeros((rows, 8), np.uint8), valid=valid, dynamics="abc")


def test_more_readers_draw_the_same_windows(tmp_path, monkeypatch):
    for shard in range(7):
        write_frames(tmp_path, name=f"frames_{shard:03d}.npz", shard=shard)

    def draws(cores, resumed_after=None):
        monkeypatch.setattr(common.frame_store, "num_cores", lambda: cores)
        store, drawn = common.FrameStore(tmp_path, "maze", 1, 100, 3, CPU), []
        for step in range(60):
            if step == resumed_after:
                state, store = store.state_dict(), common.FrameStore(tmp_path, "maze", 1, 100, 3, CPU)
                store.load_state_dict(state)
            drawn.append(store.sample_windows(8))
        return torch.cat(drawn)

    assert common.FrameStore(tmp_path, "maze", 1, 100, 3, CPU).num_readers < 4
    one_reader = draws(cores=1)
    assert torch.equal(one_reader, draws(cores=32))
    assert torch.equal(one_reader, draws(cores=32, resumed_after=31))


def test_frames_are_paired_with_their_own_latents(tmp_path):
    for shard in range(4):
        write_frames(tmp_path / "frames", rows=30, name=f"frames_{shard:03d}.npz", shard=shard)
        write_latents(tmp_path / "latents", 30, shard, common.valid_windows(np.arange(30) % 10 == 0, 2))
    store = common.FrameStore(tmp_path / "frames", "maze", 2, 60, 1, CPU, latents_dir=tmp_path / "latents", dynamics="abc")
    seen = set()
    for _ in range(200):
        obs, z = store.sample_latents(16)
        assert obs.dtype == torch.uint8 and z.dtype == torch.float32
        assert torch.equal(obs[:, 0, 0, :2].float(), z)  # shard and row, written into both
        seen.update(map(tuple, z.int().tolist()))
    assert seen == {(shard, row) for shard in range(4) for row in range(30) if 2 <= row % 10 < 9}

    write_latents(tmp_path / "latents", 29, 3, np.ones(29, bool))
    text = message(common.FrameStore, tmp_path / "frames", "maze", 2, 1000, 1, CPU, tmp_path / "latents", "abc")
    assert "other frames" in text and "train_latent_dynamics.py --game maze" in text
    write_latents(tmp_path / "latents", 30, 3, np.ones(31, bool))
    assert "not of one length" in message(common.read_latents, tmp_path / "frames/frames_003.npz", tmp_path / "latents", "maze", "abc")
    write_latents(tmp_path / "latents", 30, 3, common.valid_windows(np.arange(30) % 10 == 0, 2))
    text = message(common.read_latents, tmp_path / "frames/frames_003.npz", tmp_path / "latents", "maze", "def")
    assert "latents_003.npz" in text and "another run of stage 1" in text and "train_latent_dynamics.py --game maze" in text


def test_rows_are_drawn_without_replacement_from_valid_ones():
    rng = np.random.default_rng(0)
    valid = {name: rng.random(50) < 0.5 for name in "abc"}
    total = sum(v.sum() for v in valid.values())
    chosen = common.draw_rows(valid, 20, seed=1)
    assert list(chosen) == list(valid) and sum(map(len, chosen.values())) == 20
    for name, rows in chosen.items():
        assert (np.diff(rows) > 0).all() and valid[name][rows].all()
    again, other = common.draw_rows(valid, 20, seed=1), common.draw_rows(valid, 20, seed=2)
    assert all(np.array_equal(chosen[name], again[name]) for name in valid)
    assert any(not np.array_equal(chosen[name], other[name]) for name in valid)
    everything = common.draw_rows(valid, 1000, seed=1)
    assert sum(map(len, everything.values())) == total
    assert all(np.array_equal(rows, np.flatnonzero(valid[name])) for name, rows in everything.items())

    reached = Counter(row for seed in range(300) for row in common.draw_rows({"a": np.ones(10, bool)}, 3, seed)["a"].tolist())
    assert set(reached) == set(range(10)) and max(reached.values()) < 2 * min(reached.values())


def test_windows_to_report_on_match_their_labels(tmp_path):
    for shard in range(6):
        write_frames(tmp_path, name=f"frames_{shard:03d}.npz", shard=shard)
        action = (np.arange(40) * 7 + shard) % 15
        common.save_npz(tmp_path / f"labels_{shard:03d}.npz", action=action.astype(np.uint8), reward=np.zeros(40, np.float32), expert_return=1.0)
    windows, where = common.fixed_windows(tmp_path, "maze", 1, 60, seed=1, max_shards=4)
    assert windows.shape == (60, 3, 4, 4, 3)
    seen = look(torch.from_numpy(windows))
    assert len(set(seen)) == 60 and len({shard for shard, _ in seen}) <= 4
    actions = common.true_actions_to_report_on(where, "maze")
    assert np.array_equal(actions, [(row * 7 + shard) % 15 for shard, row in seen])
    for path in where:
        common.beside(path, "labels").unlink()
        break
    assert common.true_actions_to_report_on(where, "maze") is None
