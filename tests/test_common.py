"""common.py: games, evaluation, files, windows, resuming and metrics."""

import csv
import json
import multiprocessing as mp
import os
import signal
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails, toy_video, write_toy_data

import common

BIGFISH = dict(game="bigfish", frame_size=64)


# --- Procgen's facts and games --------------------------------------------------------------------


def test_actions_of_equal_effect_are_merged():
    maze = common.distinct_actions("maze")
    assert {common.ACTIONS[a] for a in maze} == {"left", "right", "up", "down", "none"}
    assert common.ACTIONS[maze[common.ACTIONS.index("left-up")]] == "left"
    assert common.distinct_actions("a video of mine").tolist() == list(range(15))
    assert common.GAMES["jumper"][1] == 8.460201 and len(common.GAMES) == 16


def test_normalized_returns():
    assert common.normalize_return(4.5, 2.0, 12.0) == 0.25
    assert np.isnan(common.normalize_return(7.0, 2.0, 2.0))


def play(steps, seed, settings=BIGFISH):
    """Rewards [T, B], frames [T + 1, B, S, S, 3] and dones [T, B] of random actions; the games."""
    envs = common.ProcgenEnvs(settings, 3, seed)
    rng = np.random.default_rng(0)
    frames, rewards, dones = [envs.obs], [], []
    for _ in range(steps):
        obs, reward, done = envs.step(rng.integers(common.NUM_ACTIONS, size=3))
        frames.append(obs), rewards.append(reward), dones.append(done)
    return np.array(rewards), np.array(frames), np.array(dones), envs


def test_the_seed_reaches_the_games():
    one, same, other = (play(200, seed)[:3] for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(one, same))
    assert not np.array_equal(one[1][0], other[1][0])
    assert one[2].any() and not one[2].all()


def test_levels_frame_size_and_plain_pictures_are_as_asked():
    large, small = play(3, 5)[1], play(3, 5, BIGFISH | dict(frame_size=32))[1]
    assert large.shape == (4, 3, 64, 64, 3) and small.shape == (4, 3, 32, 32, 3)
    block = large[2, 1, 10:12, 20:22].astype(float).mean((0, 1))
    assert (abs(block - small[2, 1, 5, 10]) <= 0.5).all()
    one_level = play(0, 5, BIGFISH | dict(start_level=3, num_levels=1))[1]
    assert (one_level[0] == one_level[0, 0]).all() and not (large[0] == large[0, 0]).all()
    plain = play(0, 5, BIGFISH | dict(plain=True))[1]
    assert len(np.unique(plain[0].reshape(-1, 3), axis=0)) < 0.1 * len(
        np.unique(large[0].reshape(-1, 3), axis=0)
    )


def test_each_finished_episode_is_counted_once():
    rewards, _, dones, envs = play(400, 1)
    expected, running = [], np.zeros(3)
    for reward, done in zip(rewards, dones):
        running += reward
        for env in np.flatnonzero(done):
            expected.append((env, running[env]))
            running[env] = 0
    assert len(expected) > 3 and any(total for _, total in expected)
    assert envs.finished == [(env, pytest.approx(total)) for env, total in expected]


def test_games_continue_from_their_state():
    rng = np.random.default_rng(1)
    envs = play(50, 3)[3]
    saved = {**envs.state_dict(), "finished": list(envs.finished)}
    actions = rng.integers(common.NUM_ACTIONS, size=(200, 3))
    once = [envs.step(a) for a in actions]
    other = common.ProcgenEnvs(BIGFISH, 3, 99)
    other.load_state_dict(saved)
    again = [other.step(a) for a in actions]
    assert all(np.array_equal(x, y) for a, b in zip(once, again) for x, y in zip(a, b))
    assert other.finished == envs.finished


class Episodes:
    """Environments whose episodes last lengths[i] steps and return their number in order."""

    def __init__(self, lengths):
        self.lengths, self.num_envs = np.array(lengths), len(lengths)
        self.t, self.episode, self.finished = np.zeros(len(lengths), int), [0] * len(lengths), []
        self.obs = np.zeros((len(lengths), 1))

    def step(self, actions):
        self.t += 1
        for env in np.flatnonzero(self.t % self.lengths == 0):
            self.finished.append((env, 100 * env + self.episode[env]))
            self.episode[env] += 1


def test_evaluation_gives_each_environment_its_quota():
    returns = common.evaluate(Episodes([1, 5, 30]), lambda obs: obs, 2)
    assert returns.tolist() == [[0, 1], [100, 101], [200, 201]]  # not the first six to finish


def test_reward_normalization_by_hand():
    normalize = common.RewardNormalizer(2, gamma=0.5)
    rewards = np.array([[1.0, 3.0], [0.0, -2.0], [100.0, 4.0]])
    dones = np.array([[False, True], [False, False], [False, False]])
    discounted, seen = np.zeros(2), []
    for reward, done in zip(rewards, dones):
        discounted = 0.5 * discounted + reward
        seen += discounted.tolist()
        # as if 1e-4 observations of mean 0 and variance 1 had come before (VecNormalize)
        n, mean = len(seen) + 1e-4, sum(seen) / (len(seen) + 1e-4)
        var = (1e-4 * (1 + mean**2) + sum((x - mean) ** 2 for x in seen)) / n
        expected = np.clip(reward / np.sqrt(var + 1e-8), -10, 10)
        np.testing.assert_allclose(normalize(reward, done), expected, rtol=1e-5)
        discounted[done] = 0
    other = common.RewardNormalizer(2, gamma=0.5)
    other.load_state_dict(normalize.state_dict())
    one = normalize(np.ones(2), np.zeros(2, bool))
    assert (one == other(np.ones(2), np.zeros(2, bool))).all()


# --- files ----------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.npz"
    common.save_npz(path, dict(game="maze"), x=np.arange(5))
    with pytest.raises(ZeroDivisionError), common.atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        1 / 0
    loaded = common.load_npz(path, ["x"], "")
    assert loaded["x"].tolist() == [0, 1, 2, 3, 4] and loaded["settings"] == dict(game="maze")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_missing_damaged_and_foreign_files_give_one_line(tmp_path):
    path = tmp_path / "c.pt"
    command = "python make_it.py"
    assert "is missing" in fails(common.load_checkpoint, path, "expert", "maze", command)
    common.save_checkpoint(path, kind="expert", game="maze", x=torch.ones(1000))
    assert common.load_checkpoint(path, "expert", "maze", command)["x"].sum() == 1000
    assert "not a expert of miner" in fails(
        common.load_checkpoint, path, "expert", "miner", command
    )
    path.write_bytes(path.read_bytes()[:2000])
    message = fails(common.load_checkpoint, path, "expert", "maze", command)
    assert "is damaged" in message and message.endswith(command)
    torch.save(dict(kind="expert", game="maze", code=types.SimpleNamespace()), path)  # needs pickle
    assert "is damaged" in fails(common.load_checkpoint, path, "expert", "maze", command)
    np.savez(tmp_path / "p.npz", x=np.array([{}], dtype=object))
    assert "is damaged" in fails(common.load_npz, tmp_path / "p.npz", ["x"], command)
    np.savez(tmp_path / "q.npz", x=1)
    assert "y is not a file" in fails(common.load_npz, tmp_path / "q.npz", ["y"], command)


def test_weights_of_another_class_are_named(tmp_path):
    message = fails(
        common.load_weights, torch.nn.Linear(3, 2), torch.nn.Linear(4, 2).state_dict(), "x.pt"
    )
    assert "x.pt" in message and "Linear" in message and "[2, 4]" in message


def test_fingerprints_depend_on_every_weight():
    layer = torch.nn.Linear(3, 2)
    before = common.fingerprint(layer)
    assert before == common.fingerprint(layer) and len(before) == 16
    layer.bias.data[1] += 1
    assert common.fingerprint(layer) != before


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(obs=np.zeros((4, 84, 84, 3), np.uint8)), "84, 84"),
        (dict(obs=np.zeros((4, 16, 16, 3), np.float32)), "float32"),
        (dict(obs=np.zeros((0, 16, 16, 3), np.uint8), first=np.zeros(0, bool)), "0, 16"),
        (dict(first=np.zeros(3, bool)), "(3, 16, 16, 3)"),
        (dict(first=np.zeros(4, int)), "first is not bool"),
        (dict(settings=dict(game="miner")), "recorded from miner"),
    ],
)
def test_shards_of_another_form_are_refused(tmp_path, change, words):
    whole = dict(settings={}, obs=np.zeros((4, 16, 16, 3), np.uint8), first=np.zeros(4, bool))
    common.save_npz(tmp_path / "frames_000.npz", **whole)
    settings = common.read_frames(tmp_path / "frames_000.npz", "maze")[2]
    assert settings == dict(game="maze", frame_size=16)  # they need not be in the file
    common.save_npz(tmp_path / "frames_000.npz", **whole | change)
    assert words in fails(common.read_frames, tmp_path / "frames_000.npz", "maze")


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [0, 1, 3])
def test_valid_windows_against_a_naive_loop(context):
    first = np.random.default_rng(0).random(500) < 0.15
    naive = np.zeros(500, bool)
    for i in range(context, 499):
        naive[i] = not first[i - context + 1 : i + 2].any()
    assert (common.valid_windows(first, context) == naive).all() and naive.any()
    assert not common.valid_windows(np.ones(2, bool), context)[0]


def store_of(folder, pool_frames, context=1, **latents):
    cpu = torch.device("cpu")
    return common.FrameStore(folder, "maze", context, pool_frames, 1, cpu, **latents)


@pytest.fixture
def numbered(tmp_path):
    """Four shards of 20 frames, of which each shows its number, in episodes of 5."""
    for shard in range(4):
        obs = np.zeros((20, 16, 16, 3), np.uint8)
        obs[:] = (20 * shard + np.arange(20))[:, None, None, None]
        first = np.arange(20) % 5 == 0
        common.save_npz(tmp_path / f"frames_{shard:03d}.npz", {}, obs=obs, first=first)
    return tmp_path


def test_every_window_is_drawn_and_none_across_episodes(numbered):
    store = store_of(numbered, 80)
    windows = store.windows_at(store.draw(2000))[:, :, 0, 0, 0]
    assert (windows[:, 1] == windows[:, 0] + 1).all() and (windows[:, 2] == windows[:, 0] + 2).all()
    expected = {i for i in range(80) if i % 5 in (1, 2, 3)}  # o_t; k = 1
    assert set(windows[:, 1].tolist()) == expected
    assert windows.dtype == torch.uint8 and store.num_frames == 80


def test_more_frames_than_memory_are_streamed(numbered):
    store = store_of(numbered, 45)  # two of four shards fit
    assert len(store.obs) == 40
    seen, in_memory = [], []
    for _ in range(200):
        rows = store.draw(4)
        seen += store.windows_at(rows)[:, 1, 0, 0, 0].tolist()
        in_memory.append(tuple(path.name for path in store.paths))
    assert set(seen) == {i for i in range(80) if i % 5 in (1, 2, 3)}
    assert len(set(in_memory)) > 5
    assert [seen.count(i) for i in (1, 21, 41, 61)] == pytest.approx([17] * 4, abs=14)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
def test_readers_die_with_a_killed_run(tmp_path):
    """A shard is larger than a pipe holds, so a reader waits until somebody takes it."""
    write_toy_data(tmp_path, frame_size=64, shards=2)
    paths, (read_end, write_end) = sorted(tmp_path.glob("data/maze/train/frames_*.npz")), os.pipe()
    child = os.fork()
    if not child:
        try:
            order = torch.utils.data.RandomSampler(paths, num_samples=10**9)
            shards = common.read_ahead(paths, order, game="maze", context=1)
            next(shards)
            os.write(write_end, json.dumps([p.pid for p in mp.active_children()]).encode())
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    readers = json.loads(os.read(read_end, 1000))
    assert readers

    def running(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + 60
    while any(map(running, readers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(running, readers))


def test_latents_of_other_frames_or_another_run_are_refused(numbered):
    latents = numbered / "latents"
    for shard in range(4):
        valid = common.valid_windows(np.arange(20) % 5 == 0, 1)
        z = np.arange(20, dtype=np.float16)[:, None] + 20 * shard
        name = latents / f"latents_{shard:03d}.npz"
        common.save_npz(name, dict(dynamics="abc"), z=z, codes=z[:, :0], valid=valid)
    store = store_of(numbered, 80, latents_dir=latents, dynamics="abc")
    rows = store.draw(50)
    assert (store.frames_at(rows)[:, 0, 0, 0] == store.z_at(rows)[:, 0]).all()
    refuse = dict(latents_dir=latents, dynamics="another")
    assert "another run of stage 1" in fails(store_of, numbered, 80, **refuse)
    common.save_npz(name, dict(dynamics="abc"), z=z, codes=z[:, :0], valid=~valid)
    refuse["dynamics"] = "abc"
    assert "made from other frames" in fails(store_of, numbered, 80, **refuse)


def test_short_episodes_and_mixed_sizes_give_one_line(tmp_path):
    obs, first = np.zeros((6, 16, 16, 3), np.uint8), np.ones(6, bool)
    common.save_npz(tmp_path / "frames_000.npz", {}, obs=obs, first=first)
    assert "no window of 3 frames" in fails(store_of, tmp_path, 10)
    obs = np.zeros((6, 32, 32, 3), np.uint8)
    common.save_npz(tmp_path / "frames_001.npz", {}, obs=obs, first=~first)
    assert "frames of 16 and of 32 pixels" in fails(store_of, tmp_path, 20)
    assert "no frames_*.npz" in fails(store_of, tmp_path / "none", 20)


def test_true_actions_are_those_of_the_rows(tmp_path):
    root = write_toy_data(tmp_path)
    folder = root / "data/maze/train"
    store = store_of(folder, 1000)
    rows = store.draw(100)
    moved = common.true_actions_to_report_on(store, rows)
    shards = [toy_video(8, 16, seed, 16) for seed in (0, 1)]
    obs, action = (np.concatenate([shard[i] for shard in shards]) for i in (0, 2))
    frames = store.frames_at(rows).numpy()
    expected = common.distinct_actions("maze")[action]
    for frame, found in zip(frames, moved):
        assert found in expected[(obs == frame).all((1, 2, 3))]
    shard = folder / "labels_001.npz"
    common.save_npz(shard, {}, action=np.zeros(5, np.uint8), reward=np.zeros(5))
    assert "(5,)" in fails(common.true_actions_to_report_on, store, rows)
    shard.unlink()
    assert common.true_actions_to_report_on(store, rows) is None


# --- resuming and metrics -------------------------------------------------------------------------


def test_state_restores_weights_and_random_numbers(tmp_path):
    path, args = tmp_path / "s.pt", types.SimpleNamespace(game="maze", seed=1, resume=True)
    assert common.load_state(path, args, {}) == (0, {})
    layer, generator = torch.nn.Linear(2, 2), torch.Generator().manual_seed(3)
    parts = dict(layer=layer, generator=generator)
    common.save_state(path, args, 7, parts, curve=[1.0, 2.0])
    expected = layer.weight.clone(), torch.rand(3, generator=generator), torch.rand(3)
    layer.weight.data.zero_()
    assert common.load_state(path, args, parts) == (7, dict(curve=[1.0, 2.0]))
    found = layer.weight, torch.rand(3, generator=generator), torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    args.seed = 2
    message = fails(common.load_state, path, args, parts)
    assert "--seed is 2" in message and "has 1" in message
    args.resume = False
    assert common.load_state(path, args, parts) == (0, {})


def test_weights_that_are_not_finite_end_the_run():
    layer = torch.nn.Linear(2, 2)
    common.check_finite(1, "kept.pt", layer)
    layer.bias.data[0] = float("nan")
    message = fails(common.check_finite, 2, "kept.pt", torch.nn.Linear(2, 2), layer)
    assert "not finite at step 2" in message and "kept.pt" in message


def test_metrics_of_a_resumed_run_continue_at_its_step(tmp_path, capsys):
    path = tmp_path / "m.csv"
    log = common.MetricsLog(path, 10, "step")
    for step in (2, 4, 6):
        log.write(grad_step=step, loss=torch.tensor(step / 2))
    log = common.MetricsLog(path, 10, "step", start=4)
    log.write(grad_step=6, loss=9.0)
    rows = list(csv.DictReader(path.open()))
    assert [(row["grad_step"], row["loss"]) for row in rows] == [
        ("2", "1.0"), ("4", "2.0"), ("6", "9.0")
    ]  # fmt: skip
    assert log.bar.n == 4
    fails(common.fail, "x")
    assert common._bars == []


def test_seeds_differ_by_purpose():
    seeds = [common.derive_seed(s, p) for s in (1, 2) for p in ("a", "b")]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**31 for seed in seeds)
