"""The expert's PPO against hand-computed numbers, and its recordings replayed in the games they came from."""

import json
import math
import re
import shutil
import subprocess
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro

import collect_data as collect
import common


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small lose more to threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- PPO -----------------------------------------------------------------------------------------------------------


def test_gae_of_three_steps_by_hand():
    rewards = torch.tensor([[1.0], [2.0], [3.0]])
    values = torch.tensor([[0.5], [1.0], [1.5], [2.0]])
    firsts = torch.tensor([[True], [False], [True], [False]])  # the action at t = 1 ended the episode
    advantages, targets = collect.compute_gae(rewards, values, firsts, gamma=0.9, gae_lambda=0.8)
    last = 3 + 0.9 * 2 - 1.5  # 3.3, from the value of the frame after the rollout
    middle = 2 - 1.0  # no value crosses the end
    opening = (1 + 0.9 * 1.0 - 0.5) + 0.9 * 0.8 * middle  # 1.4 + 0.72
    torch.testing.assert_close(advantages, torch.tensor([[opening], [middle], [last]]))
    torch.testing.assert_close(targets, torch.tensor([[2.62], [2.0], [4.8]]))


def test_gae_is_the_discounted_sum_of_errors_within_an_episode():
    rng, gamma, gae_lambda = np.random.default_rng(0), 0.95, 0.7
    rewards, values, firsts = rng.normal(size=(12, 5)), rng.normal(size=(13, 5)), rng.random((13, 5)) < 0.25
    naive = np.zeros((12, 5))
    for b in range(5):
        for t in range(12):
            weight = 1.0
            for k in range(t, 12):  # forwards from t until the episode or the rollout ends
                bootstrap = 0.0 if firsts[k + 1, b] else values[k + 1, b]
                naive[t, b] += weight * (rewards[k, b] + gamma * bootstrap - values[k, b])
                weight *= gamma * gae_lambda
                if firsts[k + 1, b]:
                    break
    advantages, targets = collect.compute_gae(*map(torch.from_numpy, (rewards, values, firsts)), gamma, gae_lambda)
    np.testing.assert_allclose(advantages, naive, atol=1e-5)
    np.testing.assert_allclose(targets, naive + values[:-1], atol=1e-5)


def loss_of(ratio, value=(0.0, 0.0), old_value=(0.0, 0.0), target=(0.0, 0.0), value_coef=0.5, entropy_coef=0.01):
    """ppo_loss for two samples of advantage 3 and 1 and a uniform policy over four actions, at a clip of 0.2."""
    logits = torch.zeros(2, 4, requires_grad=True)
    old_logprob = -math.log(4) - torch.tensor(ratio).log()
    loss, figures = collect.ppo_loss(
        logits, torch.tensor(value), torch.tensor([2, 0]), old_logprob, torch.tensor(old_value),
        torch.tensor([3.0, 1.0]), torch.tensor(target), 0.2, value_coef, entropy_coef,
    )  # fmt: skip
    return loss, figures, logits


A = 1 / math.sqrt(2)  # advantages 3 and 1 become A and -A: less the mean, over the sample's standard deviation


@pytest.mark.parametrize(
    "ratio, policy_loss",
    [
        ((1.1, 0.9), -(1.1 * A - 0.9 * A) / 2),  # nothing clips
        ((1.5, 1.1), -(1.2 * A - 1.1 * A) / 2),  # the gain of a good action ends at 1.2
        ((1.1, 0.5), -(1.1 * A - 0.8 * A) / 2),  # the gain of avoiding a bad action ends at 0.8
        ((0.5, 1.5), -(0.5 * A - 1.5 * A) / 2),  # a loss is never clipped
    ],
)
def test_ppo_policy_loss_by_hand(ratio, policy_loss):
    loss, figures, _ = loss_of(ratio)
    assert figures["policy_loss"].item() == pytest.approx(policy_loss, abs=1e-6)
    assert figures["entropy"].item() == pytest.approx(math.log(4), rel=1e-6)  # a uniform policy
    assert figures["kl"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in ratio) / 2, abs=1e-6)
    assert loss.item() == pytest.approx(policy_loss - 0.01 * math.log(4), abs=1e-6)


def test_a_clipped_ratio_moves_the_policy_no_further():
    loss, _, logits = loss_of((1.5, 1.1), entropy_coef=0.0)
    loss.backward()
    assert logits.grad[0].abs().max() == 0 and logits.grad[1].abs().max() > 0
    # d(-advantage * ratio / 2) / d logits = A * 1.1 / 2 * (one_hot - softmax) for the second sample, whose action is 0
    torch.testing.assert_close(logits.grad[1], A * 1.1 / 2 * torch.tensor([0.75, -0.25, -0.25, -0.25]))


@pytest.mark.parametrize(
    "value, old_value, target, value_loss",
    [
        ((1.1, 0.0), (1.0, 0.0), (2.0, 0.0), 0.9**2 / 4),  # small step: nothing clips
        ((1.5, 0.1), (1.0, 0.0), (2.0, 0.0), (0.8**2 + 0.1**2) / 4),  # towards the target it counts only up to 1.2
        ((3.0, 0.0), (1.0, 0.0), (1.0, 0.0), 2.0**2 / 4),  # away from the target it counts in full
        ((-1.0, 0.0), (0.0, 0.0), (-1.0, 0.0), 0.8**2 / 4),  # downwards as well
    ],
)
def test_ppo_value_loss_by_hand(value, old_value, target, value_loss):
    loss, figures, _ = loss_of((1.0, 1.0), value, old_value, target, value_coef=0.5, entropy_coef=0.0)
    assert figures["value_loss"].item() == pytest.approx(value_loss, rel=1e-5)
    assert loss.item() == pytest.approx(0.5 * value_loss, rel=1e-5)  # the policy's part is zero at ratio 1


def test_the_entropy_bonus_pulls_towards_the_uniform_policy():
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0]] * 2, requires_grad=True)
    old = logits.detach().log_softmax(-1)[:, 0]
    zeros = torch.zeros(2)
    loss, figures = collect.ppo_loss(logits, zeros, zeros.long(), old, zeros, zeros, zeros, 0.2, 0.5, 0.1)
    p = logits.detach().softmax(-1)[0]
    assert figures["entropy"].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)
    loss.backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()  # a step against it evens the logits out


def test_rewards_are_divided_by_the_deviation_of_all_discounted_sums_so_far():
    rng, gamma = np.random.default_rng(0), 0.9
    normalize = collect.RewardNormalizer(4, gamma)
    running, sums, ends = np.zeros(4), [], 0
    for _ in range(6):  # rollouts of ten steps
        rewards, firsts = 2 + 3 * rng.normal(size=(10, 4)), rng.random((10, 4)) < 0.1
        for reward, first, answer in zip(rewards, firsts, normalize(rewards, firsts)):
            running = running * gamma + reward
            sums.extend(running)
            # the statistics open with a weight of 1e-4 of a sample, hence the tolerance
            np.testing.assert_allclose(answer, np.clip(reward / np.std(sums), -10, 10), rtol=1e-3)
            running[first] = 0
            ends += first.sum()
    assert ends > 10


def test_rewards_are_clipped_at_ten():
    normalize = collect.RewardNormalizer(4, 0.999)
    assert (normalize(np.zeros((500, 4)), np.zeros((500, 4), bool)) == 0).all()
    (answer,) = normalize(np.array([[100.0, -100.0, 0.0, 1.0]]), np.zeros((1, 4), bool))  # the deviation is about 3.2 by now
    assert answer.dtype == np.float32
    assert answer[:3].tolist() == [10, -10, 0] and answer[3] == pytest.approx((2004 / 20_001) ** 0.5, rel=1e-3)


def test_actions_are_drawn_from_the_softmax():
    rows, logits = 40_000, torch.tensor([2.0, 0.0, -1.0, 1.0])
    drawn = collect.sample_actions(logits.expand(rows, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (rows,) and drawn.dtype == torch.int64
    for action, p in enumerate(logits.softmax(-1).tolist()):
        assert (drawn == action).float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / rows) ** 0.5)
    again = collect.sample_actions(logits.expand(rows, -1), torch.Generator().manual_seed(0))
    other = collect.sample_actions(logits.expand(rows, -1), torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)

    wanted = torch.randint(15, (100,))  # each row has its own distribution
    sure = collect.sample_actions(100.0 * F.one_hot(wanted, 15), torch.Generator().manual_seed(0))
    assert torch.equal(sure, wanted)


class TinyPolicy(torch.nn.Module):
    """One convolution in the place of 15, each of which takes seconds to compile."""

    def __init__(self):
        super().__init__()
        self.conv, self.heads = torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.Linear(16, 16)

    def forward(self, obs):
        out = self.heads(F.relu(self.conv(collect.to_input(obs[:, None]))).flatten(1))
        return out[:, :15], out[:, 15]


def test_the_compiled_loss_is_the_plain_one():
    torch.manual_seed(0)
    policy = TinyPolicy().to(memory_format=torch.channels_last)
    obs, action = torch.randint(256, (12, 8, 8, 3), dtype=torch.uint8), torch.randint(15, (12,))
    others = [torch.randn(12) - 2, *torch.randn(3, 12)]

    def loss_of(obs, *rest):
        return collect.ppo_loss(*policy(obs), *rest, 0.2, 0.5, 0.01)

    def loss_figures_and_gradients(function):
        loss, figures = function(obs, action, *others)
        return loss, *figures.values(), *torch.autograd.grad(loss, list(policy.parameters()))

    names = list(policy.state_dict())
    plain, compiled = (loss_figures_and_gradients(common.compiled(loss_of, on)) for on in (False, True))
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert list(policy.state_dict()) == names  # as a plain run saves them


def test_the_expert_has_the_size_of_cobbe_et_al():
    def conv(inputs, outputs):
        return outputs * (inputs * 3 * 3 + 1)

    cnn = sum(conv(inputs, c) + 4 * conv(c, c) for inputs, c in ((3, 16), (16, 32), (32, 32)))  # two blocks of two
    hidden = (32 * 8 * 8) * 256 + 256  # 64 pixels, halved three times
    policy = collect.ExpertPolicy(64, 1)
    assert sum(p.numel() for p in policy.parameters()) == cnn + hidden + (256 * 15 + 15) + (256 + 1)
    logits, value = policy(torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8))
    assert logits.shape == (2, 15) and value.shape == (2,)
    assert logits.softmax(-1).max() < 0.1  # near uniform before any training


# --- recording -----------------------------------------------------------------------------------------------------


def small_args(root, **changes):
    """Four games, an expert of 384 steps, eight shards of training frames and a short last one to report on."""
    settings = dict(
        game="bigfish", device="cpu", data_dir=root / "data", runs_dir=root / "runs", experts_dir=root / "experts", num_levels=2,
        train_frames=1024, test_frames=158, frame_size=16, expert_steps=384, expert_multiplier=0.25, num_envs=4, rollout_steps=32,
        minibatches=2, epochs=1,
    )  # fmt: skip
    return collect.Args(**(settings | changes))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    args = small_args(tmp_path_factory.mktemp("recorded"))
    collect.main(args)
    return args


def record(args, policy, split, num_frames):
    collect.record(args, "cpu", policy, split, num_frames, 1.0, common.RunState(args.runs_dir / args.game, "collect_data", args))


def read_split(args, split):
    """All shards as [num_envs, T, ...] in the order of time, and the length of each shard's streams."""
    parts = []
    for path in common.list_shards(args.data_dir / "bigfish" / split, "frames", ""):
        obs, first, settings = common.read_frames(path, "bigfish")
        assert settings == dict(game="bigfish", start_level=0, num_levels=2, seed=1)
        labels = common.read_labels(path, "bigfish")
        assert len(obs) == len(first) == len(labels["action"]) == len(labels["reward"]) == common.count_rows(path)
        assert first.dtype == bool and labels["action"].dtype == np.uint8 and labels["reward"].dtype == np.float32
        rows = (obs, first, labels["action"], labels["reward"])
        parts.append([array.reshape(args.num_envs, -1, *array.shape[1:]) for array in rows])
    return [np.concatenate(arrays, 1) for arrays in zip(*parts)], [part[0].shape[1] for part in parts]


def files(args):
    return {path.relative_to(args.data_dir).as_posix(): path.read_bytes() for path in args.data_dir.rglob("*.*")}


def test_all_frames_are_recorded_in_shards_of_one_rollout(recorded):
    (obs, _, action, _), lengths = read_split(recorded, "train")
    assert lengths == [32] * 8 and obs.shape == (4, 256, 16, 16, 3)  # 1024 frames
    assert set(np.unique(action)) <= set(range(15)) and len(np.unique(action)) > 5
    (test_obs, *_), lengths = read_split(recorded, "test")
    assert lengths == [32, 8] and test_obs.shape[1] == 40  # 158 frames are asked for: 4 x 40 is the next that holds them
    assert (obs[:, :40] != test_obs).any((2, 3, 4)).mean() > 0.9  # other streams than the training's
    shards = [("train", shard) for shard in range(8)] + [("test", shard) for shard in range(2)]
    names = {f"{split}/{kind}_{shard:03d}.npz" for kind in ("frames", "labels") for split, shard in shards}
    assert set(files(recorded)) == {f"bigfish/{name}" for name in names}  # and no temporary file


def replay_envs(split, num_envs=4):
    return common.HalvedEnvs("bigfish", num_envs, common.derive_seed(1, f"record {split}"), 0, 2, 16)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_recorded_actions_replay_the_recorded_frames(recorded, split):
    (obs, first, action, reward), lengths = read_split(recorded, split)
    envs = replay_envs(split)
    stream_starts = set(np.cumsum([0, *lengths]))
    for games, half in envs.halves:  # one after the other
        _, now, new = games.observe()
        for t in range(obs.shape[1]):
            assert np.array_equal(obs[half, t], now)
            assert np.array_equal(first[half, t], new | (t in stream_starts))
            games.act(action[half, t])  # the action of row t leads to the frame of row t + 1 and earns row t's reward
            earned, now, new = games.observe()
            assert np.array_equal(reward[half, t], earned)
    if split == "train":  # so that the above says something about ends and rewards
        assert len(envs.take_finished()) > 3 and reward.any()
        moved = (obs[:, 1:] != obs[:, :-1]).any((2, 3, 4))
        assert moved.mean() > 0.5


def test_a_low_temperature_records_the_likeliest_actions(recorded, tmp_path):
    args = small_args(tmp_path, experts_dir=recorded.experts_dir, temperature=1e-6)
    collect.main(args)
    policy, _ = collect.load_expert(args, "cpu", args.experts_dir / "bigfish.pt")

    def share_of_likeliest(args):
        path = args.data_dir / "bigfish/test/frames_000.npz"
        with torch.no_grad():
            likeliest = policy(torch.from_numpy(common.read_frames(path, "bigfish")[0]))[0].argmax(-1)
        return (likeliest.numpy() == common.read_labels(path, "bigfish")["action"]).mean()

    assert share_of_likeliest(args) == 1
    assert share_of_likeliest(recorded) < 0.5  # near uniform over 15 actions


def test_a_replay_with_other_actions_gives_other_frames(recorded):
    (obs, _, action, _), _ = read_split(recorded, "train")
    for games, half in replay_envs("train").halves:
        games.observe()
        games.act(action[half, 0])  # one step late from here on: the replay above would notice
        for t in range(20):
            games.act(action[half, t])
            now = games.observe()[1]
        assert not np.array_equal(now, obs[half, 20])


@pytest.mark.parametrize("num_envs", [1, 3])
def test_games_that_do_not_halve_evenly_are_recorded(recorded, tmp_path, num_envs):
    args = small_args(tmp_path, num_envs=num_envs)
    policy, _ = collect.load_expert(args, "cpu", recorded.experts_dir / "bigfish.pt")
    record(args, policy, "test", 40 * num_envs)
    (obs, _, action, reward), _ = read_split(args, "test")
    assert obs.shape[:2] == (num_envs, 40)
    for games, half in replay_envs("test", num_envs).halves:
        for t in range(40):
            assert np.array_equal(obs[half, t], games.observe()[1])
            games.act(action[half, t])
            assert np.array_equal(reward[half, t], games.observe()[0])


class OneAfterTheOther(common.ProcgenEnvs):
    """Games that do not step while anything else happens."""

    def act(self, action):
        super().act(action)
        self.games.observe()  # waits


def test_nothing_hangs_on_games_that_step_meanwhile(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(common.games, "ProcgenEnvs", OneAfterTheOther)
    args = small_args(tmp_path)
    collect.main(args)  # expert, evaluation and both splits
    assert files(args) == files(recorded)
    ours, theirs = (load_weights(folder) for folder in (args, recorded))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def load_weights(args):
    return common.load_checkpoint(args.experts_dir / "bigfish.pt", "expert", "bigfish", "")["model"]


def test_a_recording_tells_its_size_and_rate(recorded, tmp_path, capsys):
    args = small_args(tmp_path)
    policy, _ = collect.load_expert(args, "cpu", recorded.experts_dir / "bigfish.pt")
    record(args, policy, "test", 160)
    size = sum(path.stat().st_size for path in args.data_dir.rglob("frames_*.npz")) / 160
    assert f"test: 160 frames of {size:.0f} bytes each, " in capsys.readouterr().out


def test_labels_carry_the_return_of_the_expert(recorded):
    returns = {
        float(common.read_labels(path, "bigfish")["expert_return"])
        for split in ("train", "test")
        for path in common.list_shards(recorded.data_dir / "bigfish" / split, "frames", "")
    }
    assert len(returns) == 1 and 0 <= returns.pop() <= 40  # a game of bigfish pays 40 at most


def test_the_expert_is_a_half_precision_checkpoint_that_says_what_it_is(recorded):
    expert = common.load_checkpoint(recorded.experts_dir / "bigfish.pt", "expert", "bigfish", "")
    said = {name: expert[name] for name in ("env_step", "frame_size", "multiplier", "start_level", "num_levels")}
    assert said == dict(env_step=384, frame_size=16, multiplier=0.25, start_level=0, num_levels=2)
    assert all(weight.dtype == torch.float16 for weight in expert["model"].values())
    torch.manual_seed(1)
    fresh = collect.ExpertPolicy(16, 0.25).state_dict()
    assert any((weight.half() != expert["model"][name]).any() for name, weight in fresh.items())  # it was trained
    rows = (recorded.runs_dir / "bigfish" / "expert.csv").read_text().splitlines()
    assert rows[0].startswith("env_step,mean_return,episodes") and rows[-1].startswith("384,")


def test_the_same_seed_writes_the_same_bytes(recorded, tmp_path):
    args = small_args(tmp_path)
    collect.main(args)  # trains its own expert
    assert files(args) == files(recorded)
    ours, theirs = (load_weights(folder) for folder in (args, recorded))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_another_seed_records_other_frames(recorded, tmp_path):
    args = small_args(tmp_path, seed=2, experts_dir=recorded.experts_dir)
    policy, _ = collect.load_expert(args, "cpu", args.experts_dir / "bigfish.pt")
    record(args, policy, "test", 160)
    mine = common.read_frames(args.data_dir / "bigfish/test/frames_000.npz", "bigfish")
    other = common.read_frames(recorded.data_dir / "bigfish/test/frames_000.npz", "bigfish")
    assert mine[2]["seed"] == 2 and (mine[0] != other[0]).any((1, 2, 3)).mean() > 0.5


def set_free_space(monkeypatch, free):
    usage = namedtuple("usage", "total used free")(free, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_too_little_disk_is_refused_before_anything_is_touched(recorded, tmp_path, monkeypatch):
    args = small_args(tmp_path)
    policy, _ = collect.load_expert(args, "cpu", recorded.experts_dir / "bigfish.pt")
    shutil.copytree(recorded.data_dir, args.data_dir)
    before = files(args)
    needed = sum(len(content) for name, content in before.items() if "train/frames" in name)
    set_free_space(monkeypatch, needed // 2)
    with pytest.raises(SystemExit, match=r"\Aerror: .*bigfish/train has no room .* lower --train-frames or set --data-dir\Z"):
        record(args, policy, "train", 1024)
    assert files(args) == before
    set_free_space(monkeypatch, needed * 2)  # the estimate is not far off either
    record(args, policy, "train", 1024)
    assert {name: content for name, content in files(args).items() if "frames" in name} == {
        name: content for name, content in before.items() if "frames" in name
    }


def test_a_shorter_recording_leaves_no_shard_of_a_longer_one(recorded, tmp_path):
    args = small_args(tmp_path)
    policy, _ = collect.load_expert(args, "cpu", recorded.experts_dir / "bigfish.pt")
    shutil.copytree(recorded.data_dir, args.data_dir)
    record(args, policy, "train", 160)
    names = sorted(path.name for path in (args.data_dir / "bigfish/train").iterdir())
    assert names == ["frames_000.npz", "frames_001.npz", "labels_000.npz", "labels_001.npz"]
    assert len(list((args.data_dir / "bigfish/test").iterdir())) == 4  # the other split stays


@pytest.mark.parametrize(
    "change, fault",
    [
        (dict(frame_size=32), "was trained with --frame-size 16, not 32"),
        (dict(num_levels=0), "was trained with --num-levels 2, not 0"),
        (dict(start_level=5), "was trained with --start-level 0, not 5"),
    ],
)
def test_an_expert_of_other_frames_or_levels_is_refused(recorded, tmp_path, change, fault):
    args = small_args(tmp_path, experts_dir=recorded.experts_dir, **change)
    with pytest.raises(SystemExit, match=rf"\Aerror: .*bigfish.pt {fault}.*python collect_data.py --game bigfish.*\Z"):
        collect.main(args)
    assert not args.data_dir.exists()


def test_no_committed_expert_stands_in_the_way_of_the_default_flags():
    folder = Path(__file__).resolve().parents[1] / "experts"
    small = sorted((folder / "32x32").glob("*.pt"))
    assert small  # the demo's
    for path in [*small, *folder.glob("*.pt")]:
        defaults = collect.Args(game=path.stem, frame_size=32 if path in small else 64)
        expert = common.load_checkpoint(path, "expert", path.stem, "")
        assert path in small or expert["num_levels"] == defaults.num_levels
        collect.load_expert(replace(defaults, num_levels=expert["num_levels"]), "cpu", path)


def test_the_small_commands_take_an_expert_that_is_there():
    root = Path(__file__).resolve().parents[1]
    demo = subprocess.run(["make", "--dry-run", "demo"], cwd=root, capture_output=True, text=True, check=True).stdout
    commands = re.findall(r"python collect_data.py (.*)", demo + collect.__doc__.replace("\\\n", " "))
    small = [args for args in (tyro.cli(collect.Args, args=command.split()) for command in commands) if args.frame_size == 32]
    assert len(small) == 3  # two games in the demo, one in the docstring
    for args in small:
        collect.load_expert(args, "cpu", root / args.experts_dir / f"{args.game}.pt")


def test_an_expert_of_another_game_and_an_unknown_game_are_refused(recorded, tmp_path):
    args = small_args(tmp_path, game="maze")
    args.experts_dir.mkdir()
    shutil.copy(recorded.experts_dir / "bigfish.pt", args.experts_dir / "maze.pt")
    with pytest.raises(SystemExit, match=r"\Aerror: .*maze.pt was trained on 'bigfish', not on 'maze'; .*--game maze.*\Z"):
        collect.main(args)
    with pytest.raises(SystemExit, match="no Procgen game is called 'bigfihs'; did you mean bigfish"):
        collect.main(small_args(tmp_path, game="bigfihs"))
    assert not args.data_dir.exists()


def test_zero_frames_train_the_expert_only(recorded, tmp_path):
    args = small_args(tmp_path, experts_dir=recorded.experts_dir, train_frames=0)
    collect.main(args)
    assert not args.data_dir.exists()
