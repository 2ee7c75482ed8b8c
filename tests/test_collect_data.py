"""The expert's PPO, and recording: every frame beside its own action and reward."""

import csv
import fcntl

import numpy as np
import pytest
import torch
from conftest import fails

import collect_data
import common

TINY = dict(
    game="bigfish", device="cpu", frame_size=16, expert_multiplier=0.25, num_envs=4,
    rollout_steps=32, minibatches=2, expert_steps=256, train_frames=200, test_frames=60,
    random_frames=60,
)  # fmt: skip


def test_gae_of_three_steps_by_hand():
    rewards = torch.tensor([[1.0], [2.0], [3.0]])
    values = torch.tensor([[0.5], [1.5], [2.5], [4.0]])
    dones = torch.tensor([[0.0], [1.0], [0.0]])
    advantages, targets = collect_data.compute_gae(
        rewards, values, dones, gamma=0.5, gae_lambda=0.4
    )
    last = 3 + 0.5 * 4 - 2.5  # bootstraps from the frame after the rollout
    middle = 2 - 1.5  # an episode ends here
    first = 1 + 0.5 * 1.5 - 0.5 + 0.5 * 0.4 * middle
    assert advantages[:, 0].tolist() == pytest.approx([first, middle, last])
    assert targets[:, 0].tolist() == pytest.approx([first + 0.5, middle + 1.5, last + 2.5])


def test_gae_against_sums_of_discounted_deltas():
    rng = np.random.default_rng(0)
    r, v, done = rng.normal(size=(20, 3)), rng.normal(size=(21, 3)), rng.random((20, 3)) < 0.2
    gamma, lam = 0.9, 0.8
    naive = np.zeros((20, 3))
    for t, b in np.ndindex(20, 3):
        weight = 1.0
        for s in range(t, 20):
            naive[t, b] += weight * (r[s, b] + gamma * v[s + 1, b] * (not done[s, b]) - v[s, b])
            if done[s, b]:
                break
            weight *= gamma * lam
    tensors = [torch.from_numpy(x) for x in (r, v, done)]
    found = collect_data.compute_gae(*tensors, gamma, lam)[0]
    np.testing.assert_allclose(found, naive, atol=1e-6)


def ppo(
    ratio=(1.0, 1.0),
    advantage=(1.0, -1.0),
    value=(0.0, 0.0),
    old_value=(0.0, 0.0),
    target=(0.0, 0.0),
):
    logits = torch.zeros(2, 15)
    old_logprob = -torch.log(torch.tensor(15.0)) - torch.tensor(ratio).log()
    rest = (torch.tensor(x) for x in (old_value, advantage, target))
    actions = torch.tensor([3, 4])
    return collect_data.ppo_loss(
        logits, torch.tensor(value), actions, old_logprob, *rest,
        clip=0.2, value_coef=0.5, entropy_coef=0.01,
    )  # fmt: skip


@pytest.mark.parametrize(
    "ratio, clipped",
    [
        ((1.1, 0.9), (1.1, 0.9)),
        ((1.5, 0.5), (1.2, 0.8)),  # would gain more by going further: clipped
        ((0.5, 1.5), (0.5, 1.5)),  # loses: not clipped
    ],
)
def test_ppos_policy_loss_by_hand(ratio, clipped):
    std = np.sqrt(2)  # of the advantages 1 and -1, unbiased; they are normalized
    expected = -np.mean([clipped[0] / std, -clipped[1] / std])
    metrics = ppo(ratio=ratio)[1]
    assert metrics["policy_loss"].item() == pytest.approx(expected, rel=1e-5)
    kl = np.mean([x - 1 - np.log(x) for x in ratio])
    assert metrics["kl"].item() == pytest.approx(kl, abs=1e-6)
    scaled = ppo(ratio=ratio, advantage=(10.0, -10.0))[1]  # the scale of advantages does not matter
    assert scaled["policy_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_ppos_value_loss_by_hand():
    metrics = ppo(value=(1.0, 0.1), old_value=(0.0, 0.0), target=(1.0, 1.0))[1]
    clipped = max((1 - 1) ** 2, (0.2 - 1) ** 2)  # the worse of the two counts
    assert metrics["value_loss"].item() == pytest.approx(0.5 * (clipped + 0.9**2) / 2)
    loss, metrics = ppo()
    assert metrics["entropy"].item() == pytest.approx(np.log(15), rel=1e-5)
    assert loss.item() == pytest.approx(-0.01 * np.log(15), rel=1e-4)


def test_actions_are_drawn_from_the_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(5000, 3)
    counts = collect_data.sample_actions(logits, generator).bincount() / 5000
    np.testing.assert_allclose(counts, [0.7, 0.2, 0.1], atol=0.03)


def test_the_expert_has_the_papers_size():
    policy = collect_data.ExpertPolicy(64, 1)
    assert sum(p.numel() for p in policy.parameters()) == 626_256
    logits = policy(torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8))[0]
    assert (logits.softmax(-1) - 1 / 15).abs().max() < 0.02  # starts near uniform


class Levers:
    """The frame shows which of two actions earns 1; episodes of 10 steps."""

    def __init__(self, settings, num_envs, seed):
        self.rng, self.num_envs, self.finished = np.random.default_rng(seed), num_envs, []
        self.size, self.t, self.total = settings["frame_size"], 0, np.zeros(num_envs)
        self._show()

    def _show(self):
        self.good = self.rng.integers(0, 2, self.num_envs)
        shape = (self.num_envs, self.size, self.size, 3)
        self.obs = np.broadcast_to(
            255 * self.good.astype(np.uint8)[:, None, None, None], shape
        ).copy()

    def step(self, actions):
        reward = (actions == self.good).astype(np.float32)
        self.t, self.total = self.t + 1, self.total + reward
        done = np.full(self.num_envs, self.t % 10 == 0)
        if done.all():
            self.finished += list(enumerate(self.total.tolist()))
            self.total[:] = 0
        self._show()
        return self.obs, reward, done

    def state_dict(self):
        return {}


def test_rewards_values_and_dones_belong_together(tmp_path, monkeypatch):
    steps, gae, pairs, compute_gae = [], [], [], collect_data.compute_gae

    class Normalizer(common.RewardNormalizer):
        def __call__(self, *pair):
            pairs.append(pair)
            return super().__call__(*pair)

    class Recording(Levers):
        def step(self, actions):
            steps.append(super().step(actions)[1:])
            return self.obs, *steps[-1]

    def recording_gae(rewards, values, dones, *rest):
        gae.append([x.clone() for x in (rewards, values, dones)])
        return compute_gae(rewards, values, dones, *rest)

    monkeypatch.setattr(common, "RewardNormalizer", Normalizer)
    monkeypatch.setattr(common, "ProcgenEnvs", Recording)
    monkeypatch.setattr(collect_data, "compute_gae", recording_gae)
    args = collect_data.Args(**TINY, expert_lr=0.0, runs_dir=tmp_path)
    settings = dict(frame_size=16)
    collect_data.train_expert(args, settings, torch.device("cpu"), tmp_path / "expert.pt")
    rewards, values, dones = (torch.stack(x) for x in zip(*gae))  # [2, 32, 4]
    assert all(np.array_equal(a, b) for pair, step in zip(pairs, steps) for a, b in zip(pair, step))
    expected_rewards, expected_dones = (np.stack(x) for x in zip(*steps))
    assert np.array_equal(dones.flatten(0, 1).bool(), expected_dones)
    assert np.array_equal(rewards.flatten(0, 1) > 0, expected_rewards > 0)
    assert torch.equal(values[0, -1], values[1, 0]) and not torch.equal(values[0, -2], values[1, 0])


def test_ppo_learns_to_read_the_frame(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ProcgenEnvs", Levers)
    flags = TINY | dict(
        num_envs=16, expert_steps=16 * 32 * 12, expert_lr=2e-3, train_frames=0, gamma=0.5
    )
    where = dict(data_dir=tmp_path, runs_dir=tmp_path / "runs", experts_dir=tmp_path / "experts")
    collect_data.main(collect_data.Args(**flags | where))
    rows = list(csv.DictReader((tmp_path / "runs/bigfish/expert.csv").open()))
    assert float(rows[0]["mean_return"]) < 5 and float(rows[-1]["mean_return"]) > 8  # blind: 5
    assert [row["env_step"] for row in rows] == ["2560", "5120", "6144"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    root = tmp_path_factory.mktemp("recorded")
    where = dict(data_dir=root / "data", runs_dir=root / "runs", experts_dir=root / "experts")
    collect_data.main(collect_data.Args(**TINY | where))
    return root, where


@pytest.mark.parametrize("split", ["train", "test", "random"])
def test_replaying_the_actions_gives_the_frames_and_rewards(recorded, split):
    folder = recorded[0] / "data/bigfish" / split
    shards = sorted(folder.glob("frames_*.npz"))
    assert len(shards) == (2 if split == "train" else 1) and len(list(folder.iterdir())) == 2 * len(
        shards
    )
    envs = None
    for path in shards:
        frames = common.load_npz(path, ("obs", "first"), "")
        labels = common.load_npz(
            folder / path.name.replace("frames", "labels"), ("action", "reward"), ""
        )
        settings = frames["settings"]
        assert (
            settings["split"] == split and settings["expert_return"] > settings["random_return"] - 5
        )
        if envs is None:
            seed = common.derive_seed(1, split)
            envs, done = common.ProcgenEnvs(settings, 4, seed), np.ones(4, bool)
        streams = {
            k: x.reshape(4, -1, *x.shape[1:])
            for k, x in (frames | labels).items()
            if k != "settings"
        }
        length = streams["first"].shape[1]
        for t in range(length):
            assert np.array_equal(envs.obs, streams["obs"][:, t])
            assert np.array_equal(streams["first"][:, t], done | (t == 0))
            _, reward, done = envs.step(streams["action"][:, t])
            assert np.array_equal(reward, streams["reward"][:, t])
    assert length == 18 if split == "train" else 15


def test_random_play_is_uniform_and_test_levels_are_others(tmp_path, monkeypatch):
    where = dict(
        data_dir=tmp_path / "data", runs_dir=tmp_path / "runs", experts_dir=tmp_path / "experts"
    )
    flags = TINY | where | dict(random_frames=3000, num_levels=3, start_level=7)
    collect_data.main(collect_data.Args(**flags | dict(train_frames=0)))  # trains the expert
    always_3 = torch.full((4,), 3)
    monkeypatch.setattr(collect_data, "sample_actions", lambda *arguments: always_3)
    collect_data.main(collect_data.Args(**flags))
    folder = tmp_path / "data/bigfish"
    shards = sorted((folder / "random").glob("frames_*.npz"))
    actions = np.concatenate([common.read_actions(path, "bigfish") for path in shards])
    assert abs(np.bincount(actions, minlength=15) / len(actions) - 1 / 15).max() < 0.03
    levels = {
        s: common.read_frames(folder / s / "frames_000.npz", "bigfish")[2]
        for s in ("train", "test", "random")
    }
    assert [levels[s]["start_level"] for s in levels] == [7, 10, 10]
    actions = common.read_actions(folder / "test/frames_000.npz", "bigfish")
    assert (actions == 3).all()  # the expert's


def test_frames_that_are_there_are_not_replaced_unless_asked(recorded, tmp_path):
    root, where = recorded
    before = {path: path.read_bytes() for path in (root / "data").rglob("*.npz")}
    assert "--overwrite" in fails(collect_data.main, collect_data.Args(**TINY | where))
    collect_data.main(collect_data.Args(**TINY | where, resume=True))  # complete: nothing to do
    assert "with another seed" in fails(
        collect_data.main, collect_data.Args(**TINY | where, resume=True, seed=2)
    )
    assert "with another solver" in fails(
        collect_data.main, collect_data.Args(**TINY | where, resume=True, solver=True)
    )
    assert before == {path: path.read_bytes() for path in (root / "data").rglob("*.npz")}
    elsewhere = TINY | where | dict(data_dir=tmp_path / "data")
    part = tmp_path / "data/bigfish/train.part"
    part.mkdir(parents=True)  # of a run that was killed
    (part / "frames_999.npz").write_bytes(b"")
    with open(part.with_name(".train.lock"), "w") as lock:  # of a run that is still recording
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is recording" in fails(
            collect_data.main, collect_data.Args(**elsewhere)
        )
        assert (part / "frames_999.npz").exists()
    collect_data.main(collect_data.Args(**elsewhere))  # the same seed, the same files
    found = {p.relative_to(tmp_path): p.read_bytes() for p in (tmp_path / "data").rglob("*.npz")}
    assert found == {path.relative_to(root): content for path, content in before.items()}


def test_an_expert_of_other_games_is_refused(recorded):
    flags = TINY | recorded[1] | dict(overwrite=True)
    assert "--frame-size 16, not 32" in fails(
        collect_data.main, collect_data.Args(**flags | dict(frame_size=32))
    )
    assert "--num-levels 0, not 4" in fails(
        collect_data.main, collect_data.Args(**flags | dict(num_levels=4))
    )
    assert "not one of Procgen's" in fails(
        collect_data.main, collect_data.Args(**flags | dict(game="coinrum"))
    )
    assert "--minibatches" in fails(
        collect_data.main, collect_data.Args(**flags | dict(minibatches=500))
    )
