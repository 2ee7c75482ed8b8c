"""The expert's PPO, and recording: every frame beside its own action and reward."""

import csv
import fcntl

import numpy as np
import pytest
import torch
from conftest import check_rollouts, fails, load, run
import collect_data
import common
from experts.solvers import Solver

SPLITS = ("train", "test", "random")


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr(common, "play_episodes", lambda envs, act, episodes: np.zeros(1))


def test_gae_against_sums_of_discounted_deltas():
    rng = np.random.default_rng(0)
    r, v, done = rng.normal(size=(20, 3)), rng.normal(size=(21, 3)), rng.random((20, 3)) < 0.2
    gamma, lam = 0.9, 0.8
    naive = np.zeros((20, 3))
    for t, b in np.ndindex(20, 3):
        weight = 1.0
        for s in range(t, 20):  # v[20]: of the frame after the rollout
            naive[t, b] += weight * (r[s, b] + gamma * v[s + 1, b] * (not done[s, b]) - v[s, b])
            if done[s, b]:
                break
            weight *= gamma * lam
    tensors = [torch.from_numpy(x) for x in (r, v, done)]
    advantages, targets = collect_data.compute_gae(*tensors, gamma, lam)
    np.testing.assert_allclose(advantages, naive, atol=1e-6)
    np.testing.assert_allclose(targets, naive + v[:20], atol=1e-6)


def ppo(ratio=(1.0, 1.0), advantage=(1.0, -1.0), value=(0.0, 0.0), target=(0.0, 0.0)):
    """Loss and metrics of two steps; the policy is uniform, and the old values are 0."""
    old_logprob = -torch.log(torch.tensor(15.0)) - torch.tensor(ratio).log()
    batch = dict(
        actions=torch.tensor([3, 4]),
        logprobs=old_logprob,
        values=torch.zeros(2),
        advantages=torch.tensor(advantage),
        targets=torch.tensor(target),
    )
    args = collect_data.Args(clip=0.2, value_coef=0.5, entropy_coef=0.01)
    return collect_data.ppo_loss(torch.zeros(2, 15), torch.tensor(value), batch, args)


def test_ppos_policy_loss_by_hand():
    for ratio, clipped in (
        ((1.1, 0.9), (1.1, 0.9)),
        ((1.5, 0.5), (1.2, 0.8)),  # would gain more by going further: clipped
        ((0.5, 1.5), (0.5, 1.5)),  # loses: not clipped
    ):
        std = np.sqrt(2)  # of the advantages 1 and -1, unbiased; they are normalized
        expected = -np.mean([clipped[0] / std, -clipped[1] / std])
        for advantage in ((1.0, -1.0), (10.0, -10.0)):
            metrics = ppo(ratio=ratio, advantage=advantage)[1]
            assert metrics["policy_loss"].item() == pytest.approx(expected, rel=1e-5)
        kl = np.mean([x - 1 - np.log(x) for x in ratio])
        assert metrics["kl"].item() == pytest.approx(kl, abs=1e-6)


def test_ppos_value_loss_and_entropy_by_hand():
    metrics = ppo(value=(1.0, 0.1), target=(1.0, 1.0))[1]
    clipped = max((1 - 1) ** 2, (0.2 - 1) ** 2)  # the worse of the two counts
    value_loss = 0.5 * (clipped + 0.9**2) / 2
    assert metrics["value_loss"].item() == pytest.approx(value_loss)
    loss = ppo(value=(1.0, 0.1), target=(1.0, 1.0))[0]
    assert metrics["entropy"].item() == pytest.approx(np.log(15), rel=1e-5)
    assert loss.item() == pytest.approx(0.5 * value_loss - 0.01 * np.log(15), rel=1e-4)


def test_actions_are_drawn_from_the_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(5000, 3)
    counts = common.sample_actions(logits, generator).bincount() / 5000
    np.testing.assert_allclose(counts, [0.7, 0.2, 0.1], atol=0.03)


def test_rewards_values_and_dones_belong_together(tmp_path, toy_games, record_calls):
    gae = record_calls(collect_data, "compute_gae")
    normalized = record_calls(common.RewardNormalizer, "__call__")
    run(collect_data, tmp_path, expert_lr=0.0, train_frames=0)
    check_rollouts(gae, normalized, toy_games[0].log)


def test_no_two_sets_of_games_have_the_same_seed(tmp_path, record_calls):
    made = record_calls(common, "ProcgenEnvs")
    run(collect_data, tmp_path, expert_steps=128)
    seeds = [seed for _, _, seed in made]  # training, its evaluation, mean return, three splits
    assert len(seeds) == len(set(seeds)) == 6


def test_ppo_learns_to_read_the_frame(tmp_path, toy_games):
    flags = dict(num_envs=16, expert_steps=16 * 32 * 12, expert_lr=2e-3, gamma=0.5)
    flags |= dict(log_every_steps=2560, eval_episodes=16)
    run(collect_data, tmp_path, **flags, train_frames=0)
    rows = list(csv.DictReader((tmp_path / "runs/bigfish/expert.csv").open()))
    first, last = float(rows[0]["eval_return"]), float(rows[-1]["eval_return"])
    assert first < 9 and last > 11, (first, last)  # of 12.5; the same action always: 6.2
    assert [row["env_step"] for row in rows] == ["2560", "5120", "6144"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    root = tmp_path_factory.mktemp("recorded")
    run(collect_data, root)
    return root


@pytest.mark.parametrize("split", SPLITS)
def test_replaying_the_actions_gives_the_frames_and_rewards(recorded, split):
    folder = recorded / "data/bigfish" / split
    shards = sorted(folder.glob("frames_*.npz"))
    assert len(shards) == (2 if split == "train" else 1)
    assert len(list(folder.iterdir())) == 2 * len(shards)
    settings = load(shards[0])["settings"]
    assert settings["split"] == split
    assert settings["random_return"] < settings["expert_return"] + 5
    envs = common.ProcgenEnvs(settings, 4, common.derive_seed(1, split))
    done = np.ones(4, bool)
    for path in shards:
        labels = load(folder / path.name.replace("frames", "labels"))
        arrays = (load(path) | labels).items()
        streams = {k: x.reshape(4, -1, *x.shape[1:]) for k, x in arrays if k != "settings"}
        length = streams["first"].shape[1]
        for t in range(length):
            assert np.array_equal(envs.obs, streams["obs"][:, t])
            assert np.array_equal(streams["first"][:, t], done | (t == 0))
            _, reward, done = envs.step(streams["action"][:, t])
            assert np.array_equal(reward, streams["reward"][:, t])
    assert length == (18 if split == "train" else 15)


def test_random_play_is_uniform_and_test_levels_are_others(tmp_path, monkeypatch):
    flags = dict(random_frames=3000, num_levels=3)
    run(collect_data, tmp_path, **flags, train_frames=0)  # trains the expert
    always_3 = torch.full((4,), 3)
    monkeypatch.setattr(common, "sample_actions", lambda *arguments: always_3)
    run(collect_data, tmp_path, **flags)
    shards = {s: sorted((tmp_path / "data/bigfish" / s).glob("labels_*.npz")) for s in SPLITS}
    levels = [load(shards[split][0])["settings"]["start_level"] for split in SPLITS]
    assert levels == [0, 3, 3]
    assert (load(shards["test"][0])["action"] == 3).all()  # the expert's
    actions = np.concatenate([load(path)["action"] for path in shards["random"]])
    assert abs(np.bincount(actions, minlength=15) / len(actions) - 1 / 15).max() < 0.03


def test_each_player_has_random_numbers_of_its_own(tmp_path, no_evaluation):
    flags = dict(random_play=True, train_frames=120, random_frames=120)
    run(collect_data, tmp_path, test_frames=120, **flags)
    actions = []
    for split in SPLITS:
        shards = sorted((tmp_path / f"data/bigfish/{split}").glob("labels_*.npz"))
        actions.append(tuple(np.concatenate([load(path)["action"] for path in shards])))
        settings = load(shards[0])["settings"]
        assert settings["expert_return"] == settings["random_return"]  # there is no expert
    assert len(set(actions)) == 3


def test_an_episode_that_is_given_up_has_no_action(tmp_path):
    """The solver's RESET: the label says none, and the next frame starts an episode."""
    args = collect_data.Args(num_envs=2, frame_size=16)
    recording = dict(game="maze", frame_size=16)

    def give_up(obs):
        return np.array([common.RESET, 9])  # 9 does nothing in maze

    ((frames, labels),) = collect_data.play_shards(args, recording, give_up, False, 10, "train")
    assert labels["action"].tolist() == [common.NOOP] * 5 + [9] * 5
    assert frames["first"].tolist() == [True] * 5 + [True] + [False] * 4


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in (root / "data").rglob("*.npz")}


def test_frames_that_are_there_are_not_replaced(recorded, tmp_path):
    before = contents(recorded)
    assert "is there already" in fails(run, collect_data, recorded)
    run(collect_data, recorded, resume=True)  # complete: nothing to do
    assert "with seed 1, not 2" in fails(run, collect_data, recorded, resume=True, seed=2)
    other = fails(run, collect_data, recorded, resume=True, train_frames=999)
    assert "with num_frames 200, not 999" in other
    assert before == contents(recorded)
    part = tmp_path / "data/bigfish/train.part"
    part.mkdir(parents=True)  # of a run that was killed
    (part / "frames_999.npz").write_bytes(b"")
    (tmp_path / "experts").symlink_to(recorded / "experts")
    with open(tmp_path / "data/bigfish/.train.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is writing" in fails(run, collect_data, tmp_path)
    run(collect_data, tmp_path)  # the same seed, the same files
    assert before == contents(tmp_path)


def test_a_recording_with_other_random_actions_is_not_kept(tmp_path, no_evaluation, monkeypatch):
    flags = dict(game="maze", solver=True, plain=True, train_frames=64)
    run(collect_data, tmp_path, **flags)
    run(collect_data, tmp_path, resume=True, **flags)
    monkeypatch.setitem(collect_data.RANDOM_ACTIONS, "maze", 0.4)
    message = fails(run, collect_data, tmp_path, resume=True, **flags)
    assert "with random_actions 0.1, not 0.4; remove it" in message


def test_an_expert_of_other_games_and_impossible_flags_are_refused(recorded, tmp_path):
    work = tmp_path
    (work / "experts").symlink_to(recorded / "experts")
    for words, flags in {
        "frame_size 16, not 32": dict(frame_size=32),  # the expert's
        "num_levels 0, not 4": dict(num_levels=4),
        "not one of Procgen's": dict(game="coinrum"),
        "--minibatches": dict(minibatches=500),
        "--solver plays maze, heist, miner": dict(solver=True, game="coinrun"),
    }.items():
        assert words in fails(run, collect_data, work, **flags)


@pytest.mark.parametrize(
    "game, at_least",
    [("maze", 9.9), ("heist", 8.5), ("miner", 7.5), ("plunder", 9), ("bigfish", 8)],
)
def test_the_solver_plays(game, at_least):
    """10 is all of maze and heist; miner has 1 for each diamond and 10 for the exit; plunder 1 for
    each ship of the panel's color (random play: 4.3).
    """
    settings = dict(game=game, frame_size=64, plain=True)
    envs = common.ProcgenEnvs(settings, 16, seed=1)
    assert common.play_episodes(envs, Solver(game, 1), 1).mean() > at_least


def test_the_solver_acts_for_the_same_games_in_default_pictures(tmp_path, no_evaluation):
    """It reads a plain twin; the frames are those of the default pictures, with its actions."""
    flags = dict(game="maze", solver=True, num_envs=8, train_frames=800)
    run(collect_data, tmp_path, frame_size=64, **flags)
    shards = sorted((tmp_path / "data/maze/train").glob("*.npz"))
    action = np.concatenate([load(path)["action"].reshape(8, -1) for path in shards[4:]], 1)
    reward = np.concatenate([load(path)["reward"].reshape(8, -1) for path in shards[4:]], 1)
    obs = np.concatenate([load(p)["obs"].reshape(8, -1, 64, 64, 3) for p in shards[:4]], 1)
    seed, solver = common.derive_seed(1, "train"), Solver("maze", 1)
    envs = common.ProcgenEnvs(load(shards[0])["settings"], 8, seed)
    twin = common.ProcgenEnvs(dict(game="maze", frame_size=64, plain=True), 8, seed)
    assert not np.array_equal(envs.obs, twin.obs) and reward.sum() > 100
    agreed = []
    for t in range(100):
        assert np.array_equal(obs[:, t], envs.obs)
        agrees = solver.solve(twin.obs) == action[:, t]
        agreed.append(agrees.mean())
        envs.step(action[:, t])
        twin.step(action[:, t])
    assert 0.85 < np.mean(agreed) < 0.97  # a tenth of the actions is random


def test_an_expert_of_plain_pictures_plays_while_default_ones_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(collect_data, "EPISODES_PER_GAME", 1)
    flags = dict(game="miner", expert_multiplier=0.5)
    run(collect_data, tmp_path, plain=True, train_frames=0, **flags)  # trains the expert
    path = tmp_path / "experts/miner.pt"
    expert = common.load_checkpoint(path, "expert", "miner")
    expert["policy"]["actor.weight"] *= 20  # nearly greedy, so that its actions depend on the frame
    common.save_checkpoint(path, **expert)
    run(collect_data, tmp_path, plain=True, data_dir=tmp_path / "plain", **flags)
    run(collect_data, tmp_path, **flags)
    for split in SPLITS:
        for path in sorted((tmp_path / "plain/miner" / split).glob("*.npz")):
            one, other = load(path), load(tmp_path / "data/miner" / split / path.name)
            assert one["settings"]["plain"] and not other["settings"]["plain"]
            assert one["settings"]["expert_return"] == other["settings"]["expert_return"]
            for name in one.keys() - {"settings"}:
                same = np.array_equal(one[name], other[name])
                assert same == (name != "obs"), (path, name)
    # without frames to record, the expert itself is wanted
    message = fails(run, collect_data, tmp_path, train_frames=0, **flags)
    assert "was trained with plain True, not False" in message


def test_games_that_differ_in_plain_pictures_end_the_recording(tmp_path, no_evaluation):
    """The size of bigfish depends on the theme."""
    flags = dict(game="bigfish", solver=True, num_envs=16, train_frames=3200)
    assert "--one-theme" in fails(run, collect_data, tmp_path, **flags)
    assert not (tmp_path / "data/bigfish/train").exists()
    run(collect_data, tmp_path, one_theme=True, **flags)
