"""common.py: games, evaluation, files, windows, resuming and metrics."""

import copy
import csv
import gc
import itertools
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails
import common

BIGFISH = dict(game="bigfish", frame_size=64)


def test_actions_of_equal_effect_are_merged_and_returns_normalized(monkeypatch):
    maze = common.distinct_actions("maze")
    assert {common.ACTIONS[a] for a in maze} == {"left", "right", "up", "down", "none"}
    assert common.ACTIONS[maze[common.ACTIONS.index("left-up")]] == "left"
    assert common.distinct_actions("a video of mine").tolist() == list(range(15))
    assert common.GAMES["jumper"].expert_return == 8.460201 and len(common.GAMES) == 16
    assert common.normalize_return(4.5, 2.0, 12.0) == 0.25
    assert np.isnan(common.normalize_return(7.0, 2.0, 2.0))
    monkeypatch.setitem(common.GAMES, "another", common.Game(0, 1, equal_actions=""))
    assert common.distinct_actions("another").tolist() == list(range(15))


def play(steps, seed, **settings):
    """Rewards [T, B], frames [T + 1, B, S, S, 3] and dones [T, B] of random actions; the games."""
    envs = common.ProcgenEnvs(BIGFISH | settings, 3, seed)
    rng = np.random.default_rng(0)
    frames, rewards, dones = [envs.obs], [], []
    for _ in range(steps):
        obs, reward, done = envs.step(rng.integers(common.NUM_ACTIONS, size=3))
        frames.append(obs), rewards.append(reward), dones.append(done)
    return np.array(rewards), np.array(frames), np.array(dones), envs


def test_the_seed_reaches_the_games():
    one, same, other = play(400, 5), play(400, 5), play(0, 6)
    assert all(np.array_equal(a, b) for a, b in zip(one[:3], same[:3]))
    assert not np.array_equal(one[1][0], other[1][0])
    assert one[0].any() and one[2].any()  # rewards and ends of episodes, too


def test_levels_frame_size_and_plain_pictures_are_as_asked():
    large, small = play(3, 5)[1], play(3, 5, frame_size=32)[1]
    assert large.shape == (4, 3, 64, 64, 3) and small.shape == (4, 3, 32, 32, 3)
    block = large[2, 1, 10:12, 20:22].astype(float).mean((0, 1))
    assert (abs(block - small[2, 1, 5, 10]) <= 0.5).all()
    one_level = play(0, 5, start_level=3, num_levels=1)[1]
    assert (one_level[0] == one_level[0, 0]).all() and not (large[0] == large[0, 0]).all()
    plain = play(0, 5, plain=True)[1]
    colors = [len(np.unique(x[0].reshape(-1, 3), axis=0)) for x in (plain, large)]
    assert colors[0] < 0.1 * colors[1]


def test_evaluation_gives_each_environment_its_quota():
    """Episodes of 1, 5 and 30 steps; step t of the games is rewarded with t."""
    clock, envs = itertools.count(1), types.SimpleNamespace(num_envs=3, obs=None)

    def step(actions):
        now = next(clock)
        return None, np.full(3, now, np.float32), now % np.array([1, 5, 30]) == 0

    envs.step = step
    returns = common.play_episodes(envs, lambda obs: None, 2)
    sums = [[1, 2], [15, 40], [465, 1365]]  # 1 + .. + 5, 6 + .. + 10, ...; not the first six to end
    assert returns.tolist() == sums


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


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.npz"
    common.save_npz(path, dict(game="maze"), x=np.arange(5))
    with pytest.raises(ZeroDivisionError), common.atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        1 / 0
    loaded = common.load_npz(path, ["x"])
    assert loaded["x"].tolist() == [0, 1, 2, 3, 4] and loaded["settings"] == dict(game="maze")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_the_bytes_of_a_checkpoint_do_not_depend_on_its_name(tmp_path):
    files = []
    for name in ("x.pt", "another.pt"):
        common.save_checkpoint(tmp_path / name, kind="state", game="maze", x=torch.ones(3))
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_missing_damaged_and_foreign_files_give_one_line(tmp_path):
    path = tmp_path / "latent_policy.pt"

    def refusal(game="maze"):
        return fails(common.load_checkpoint, path, "latent_policy", game)

    assert refusal().endswith("is missing; train_latent_bc.py writes it")
    common.save_checkpoint(path, kind="latent_policy", game="maze", x=torch.ones(1000))
    assert common.load_checkpoint(path, "latent_policy", "maze")["x"].sum() == 1000
    assert "not latent_policy of miner" in refusal("miner")
    path.write_bytes(path.read_bytes()[:2000])
    assert "is damaged" in refusal() and refusal().endswith("train_latent_bc.py writes it")
    torch.save(
        dict(kind="latent_policy", game="maze", code=types.SimpleNamespace()), path
    )  # needs pickle
    assert "is damaged" in refusal()
    for arrays in (dict(x=np.array([{}], dtype=object)), dict(y=1)):  # needs pickle; another array
        np.savez(tmp_path / "x.npz", **arrays)
        assert "is damaged" in fails(common.load_npz, tmp_path / "x.npz", ["x"])
    layer = torch.nn.Linear(3, 2)
    before = common.fingerprint(layer)
    layer.bias.data[1] += 1
    assert common.fingerprint(layer) != before


def test_shards_of_another_form_are_refused(tmp_path):
    path = tmp_path / "frames_000.npz"
    whole = dict(settings={}, obs=np.zeros((4, 16, 16, 3), np.uint8), first=np.zeros(4, bool))
    common.save_npz(path, **whole)
    settings = common.read_frames(path, "maze")[2]
    maze = common.GAMES["maze"]
    ends = dict(random_return=maze.random_return, expert_return=maze.expert_return)
    assert settings == dict(game="maze", frame_size=16, num_levels=0) | ends  # not in the file
    for words, change in {
        "float32": dict(obs=np.zeros((4, 16, 16, 3), np.float32)),
        "(3, 16, 16, 3)": dict(first=np.zeros(3, bool)),
        "recorded from miner": dict(settings=dict(game="miner")),
        "bool [N > 0]": dict(obs=np.zeros((0, 16, 16, 3), np.uint8), first=np.zeros(0, bool)),
    }.items():
        common.save_npz(path, **whole | change)
        assert words in fails(common.read_frames, path, "maze")
    common.save_npz(tmp_path / "maze/train" / path.name, **whole | change)  # the empty one, alone
    assert "bool [N > 0]" in fails(store_of, tmp_path)
    common.save_npz(path, **whole)
    for action in ([0, 1, 2], []):
        common.save_npz(tmp_path / "labels_000.npz", {}, action=np.array(action, np.int64))
        assert f"has {len(action)} actions for 4 frames" in fails(common.read_actions, path)


@pytest.mark.parametrize("context", [0, 1, 3])
def test_valid_windows_against_a_naive_loop(context):
    first = np.random.default_rng(0).random(500) < 0.15
    naive = np.zeros(500, bool)
    for i in range(context, 499):
        naive[i] = not first[i - context + 1 : i + 2].any()
    assert (common.valid_windows(first, context) == naive).all() and naive.any()
    assert not common.valid_windows(np.ones(2, bool), context)[0]


def store_of(root, pool_frames=1000, dynamics_id=None):
    args = common.RunArgs(game="maze", data_dir=root, runs_dir=root)
    return common.FrameStore(args, "train", 1, torch.device("cpu"), dynamics_id, pool_frames)


FIRST = np.arange(20) % 5 == 0
WINDOWS = {i for i in range(80) if i % 5 in (1, 2, 3)}  # o_t; k = 1


@pytest.fixture
def numbered(tmp_path):
    """Four shards of 20 frames, in episodes of 5. Each shows its number, which is its latent, too;
    the last digit is its action.
    """
    folder = tmp_path / "maze/train"
    for shard in range(4):
        z = (20 * shard + np.arange(20))[:, None]
        obs = np.tile(z.astype(np.uint8)[:, None, None], (1, 16, 16, 3))
        common.save_npz(folder / f"frames_{shard:03d}.npz", {}, obs=obs, first=FIRST)
        action = dict(action=z[:, 0].astype(np.uint8) % 10)
        common.save_npz(folder / f"labels_{shard:03d}.npz", {}, **action)
        save_latents(tmp_path, shard, z, common.valid_windows(FIRST, 1))
    return tmp_path


def save_latents(root, shard, z, valid):
    path = root / f"maze/train/latents_{shard:03d}.npz"
    frames_id = common.frames_id([root / f"maze/train/frames_{shard:03d}.npz"])
    source = dict(dynamics_id="abc", frames_id=frames_id)
    common.save_npz(path, source, z=z.astype(np.float16), codes=z[:, :0], valid=valid)


def test_every_window_is_drawn_and_none_across_episodes(numbered):
    store = store_of(numbered)
    windows = store.windows_at(store.draw(2000))[:, :, 0, 0, 0]
    assert (windows[:, 1] == windows[:, 0] + 1).all() and (windows[:, 2] == windows[:, 0] + 2).all()
    assert set(windows[:, 1].tolist()) == WINDOWS
    assert windows.dtype == torch.uint8 and store.num_frames == 80


def test_more_frames_than_memory_are_streamed(numbered):
    store = store_of(numbered, pool_frames=79)  # one of four shards is in use, one is read ahead
    assert len(store.obs) == 20
    seen = [store.windows_at(store.draw(4))[:, 1, 0, 0, 0].tolist() for _ in range(200)]
    count = np.bincount(np.concatenate(seen), minlength=80)
    assert set(np.flatnonzero(count)) == WINDOWS
    assert count.reshape(4, 20).sum(1) == pytest.approx([200] * 4, abs=60)
    shards = {tuple(sorted({i // 20 for i in rows})) for rows in seen}
    assert shards == {(0,), (1,), (2,), (3,)}  # they are in memory by turns


def test_latents_of_other_frames_or_another_run_are_refused(numbered):
    store = store_of(numbered, dynamics_id="abc")
    rows = store.draw(50)
    assert (store.frames_at(rows)[:, 0, 0, 0] == store.z_at(rows)[:, 0]).all()
    assert "another run of stage 1" in fails(store_of, numbered, dynamics_id="another")
    frames = numbered / "maze/train/frames_003.npz"
    changed = common.load_npz(frames)
    changed["obs"][0] += 1
    common.save_npz(frames, **changed)
    assert "made from other frames" in fails(store_of, numbered, dynamics_id="abc")


def test_short_episodes_give_one_line(tmp_path):
    obs, first = np.zeros((6, 16, 16, 3), np.uint8), np.ones(6, bool)
    common.save_npz(tmp_path / "maze/train/frames_000.npz", {}, obs=obs, first=first)
    assert "no window of 3 frames" in fails(store_of, tmp_path)


def test_true_actions_are_those_of_the_rows(numbered):
    store = store_of(numbered)
    rows = store.draw(100)
    actions = store.frames_at(rows)[:, 0, 0, 0].numpy() % 10
    expected = common.distinct_actions("maze")[actions]
    assert np.array_equal(common.true_actions_to_report_on(store, rows), expected)
    labels = sorted(numbered.glob("maze/train/labels_*.npz"))
    labels[1].unlink()
    message = fails(common.true_actions_to_report_on, store, rows)
    assert "1 of 4 shards" in message and "lack labels" in message
    for path in labels:
        path.unlink(missing_ok=True)
    assert common.true_actions_to_report_on(store, rows) is None


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
    args.resume = False
    assert common.load_state(path, args, parts) == (0, {})


def test_metrics_of_a_resumed_run_continue_at_its_step(tmp_path):
    path = tmp_path / "m.csv"
    log = common.MetricsLog(path, 10, "step")
    for step in (2, 4, 6):
        log.bar.update(2)
        log.write(grad_step=step, loss=torch.tensor(step / 2))
        if step == 4:
            saved = copy.deepcopy(log.state_dict())
    log = common.MetricsLog(path, 10, "step")
    log.load_state_dict(saved)
    assert log.bar.n == log.bar.initial == 4  # the rate is of this run's own steps
    log.write(grad_step=6, loss=9.0)
    rows = [(row["grad_step"], row["loss"]) for row in csv.DictReader(path.open())]
    assert rows == [("2", "1.0"), ("4", "2.0"), ("6", "9.0")]


def test_the_next_command_names_folders_that_are_not_the_defaults(capsys):
    args = common.RunArgs(game="maze", runs_dir=Path("runs/no vq"))
    common.print_next("decode_offline.py", args)
    common.print_next("decode_offline.py", common.RunArgs(game="maze", seed=2), "--labels", "16")
    first, second = capsys.readouterr().out.splitlines()
    assert first == "next: python decode_offline.py --game maze --runs-dir 'runs/no vq'"
    assert second == "next: python decode_offline.py --game maze --labels 16 --seed 2"


def test_threads_can_read_at_once(tmp_path):
    """Python 3.11 fails in 1% of these reads, if several threads parse headers of arrays."""

    class Garbage:  # its finalizer lets other threads run in the middle of a parse
        def __init__(self):
            self.itself = self

        def __del__(self):
            time.sleep(0)

    path = tmp_path / "x.npz"
    common.save_npz(path, dict(game="maze"), x=np.arange(3), y=np.zeros((2, 2)))

    def read(_):
        Garbage()
        return common.load_npz(path)["x"].tolist()

    threshold = gc.get_threshold()
    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(x == [0, 1, 2] for x in pool.map(read, range(1000)))
    finally:
        gc.set_threshold(*threshold)
