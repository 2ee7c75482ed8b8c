"""Continuous control: shards of the suite, stage 1's probe of float actions, the decoder."""

import copy
import csv
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, args_of, fails, load, run
from test_readme import spellings

import common
import train_latent_bc as stage2
import train_latent_dynamics as stage1

pytest.importorskip("dm_control", reason="pip install -r continuous_control/requirements-dmc.txt")

from continuous_control import collect_dmc, decode_dmc, decode_dmc_online, visualize_dmc
from continuous_control.decode_dmc import RegressionDecoder, fit, r2

GAME, REPEAT, FRAMES = "walker_walk", 4, 20  # of an episode, each of which is REPEAT steps
SIZES = dict(train_episodes=3, test_episodes=2, random_episodes=2, frame_size=16)
EXPERT = dict(expert_steps=64, num_envs=2, rollout_steps=16, minibatches=2, epochs=1, hidden=8)


def collect(root, again=False, **flags):
    if again:
        shutil.rmtree(root / f"data/{GAME}")
    flags = dict(game=GAME, data_dir=root / "data", experts_dir=root / "experts") | SIZES | flags
    collect_dmc.main(collect_dmc.Args(**EXPERT | flags))


def read(root, split, shard=0):
    """The arrays of a shard's two files, and how it was recorded."""
    folder = root / f"data/{GAME}/{split}"
    arrays = load(folder / f"frames_{shard:03d}.npz") | load(folder / f"labels_{shard:03d}.npz")
    return arrays, arrays.pop("settings")


def make_envs(num_envs, seed, **changes):
    """Environments without pictures, unless frame_size is given."""
    recording = dict(game=GAME, frame_size=0, plain=True, gray_stack=False, action_repeat=1)
    recording["episode_steps"] = collect_dmc.EPISODE_STEPS
    return collect_dmc.ControlEnvs(recording | changes, num_envs, seed)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Short episodes of a hardly trained expert, with stages 1 and 2 run on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_dmc, "EPISODE_STEPS", REPEAT * FRAMES)
        patch.setattr(collect_dmc, "EPISODES_PER_SHARD", 2)
        patch.setattr(common, "NUM_CORES", 2)
        try:
            collect_dmc.pick_renderer()
        except SystemExit as error:
            pytest.skip(str(error))
        root = tmp_path_factory.mktemp("dmc")
        collect(root)
        for script in (stage1, stage2):
            run(script, root, game=GAME)
        yield root


def link_run(root, runs_dir):
    """A folder of runs with the checkpoints of stages 1 and 2."""
    run_dir = runs_dir / GAME
    run_dir.mkdir(parents=True)
    for name in ("latent_policy.pt", "latent_dynamics.pt"):
        (run_dir / name).symlink_to(root / f"runs/{GAME}/{name}")
    return run_dir


# --- environments and recordings ------------------------------------------------------------------


def test_actions_replayed_give_the_same_frames_and_rewards(root):
    for split, shard, episodes in (("train", 0, 2), ("train", 1, 1), ("random", 0, 2)):
        arrays, recording = read(root, split, shard)
        starts = list(range(0, episodes * FRAMES, FRAMES))
        assert arrays["obs"].shape == (episodes * FRAMES, 16, 16, 3)
        assert arrays["action"].dtype == np.float32 and abs(arrays["action"]).max() <= 1
        assert np.flatnonzero(arrays["first"]).tolist() == starts
        recorded = {name: x.reshape(episodes, FRAMES, *x.shape[1:]) for name, x in arrays.items()}
        seed = common.derive_seed(recording["seed"], f"{split} {shard}")
        envs = collect_dmc.ControlEnvs(recording, episodes, seed)
        for t in range(FRAMES):
            assert np.array_equal(envs.obs, recorded["obs"][:, t])
            _, reward, done = envs.step(recorded["action"][:, t])
            assert np.array_equal(reward, recorded["reward"][:, t])
            assert (done == (t == FRAMES - 1)).all()
        returns = [episode_return for _, episode_return in envs.finished]
        np.testing.assert_allclose(returns, recorded["reward"].sum(1), rtol=1e-5)
        envs.close()
    assert recording["random_return"] < REPEAT * FRAMES and recording["split"] == "random"


def test_the_defaults_are_what_works(root):
    """Plain pictures, gray stacks, every fourth step, noise of 0.4 on the mean action."""
    _, recording = read(root, "train")
    expected = dict(plain=True, gray_stack=True, action_repeat=4, noise=0.4, mean_action=True)
    assert recording | expected == recording
    args = decode_dmc.Args()
    assert args.decode_from == "policy" and args.match_std


def test_a_gray_stack_holds_the_last_three_frames_of_the_episode(root, monkeypatch):
    rng = np.random.default_rng(0)
    color = make_envs(2, seed=3, frame_size=32, episode_steps=4)
    stacked = make_envs(2, seed=3, frame_size=32, episode_steps=4, gray_stack=True)
    frames, first = [], [True]
    for _ in range(7):
        gray = np.rint(color.obs.astype(float).mean(-1))
        frames = [gray] * 3 if first[-1] else [*frames[1:], gray]
        assert np.array_equal(stacked.obs, np.stack(frames, -1))
        assert first[-1] or not np.array_equal(stacked.obs[..., 1], stacked.obs[..., 2])
        actions = rng.uniform(-1, 1, (2, 6))
        _, _, done = color.step(actions)
        stacked.step(actions)
        first.append(done.all())
    assert np.flatnonzero(first).tolist() == [0, 4]
    color.close(), stacked.close()


def test_time_limits_end_episodes_and_the_last_state_is_kept(root):
    action = np.full((2, 6), 5.0)
    short = make_envs(2, seed=3, episode_steps=FRAMES)
    long = make_envs(2, seed=3, episode_steps=2 * FRAMES)
    bounded = make_envs(2, seed=3, episode_steps=2 * FRAMES)
    for _ in range(FRAMES):
        assert np.array_equal(short.states, long.states)
        short.step(action), long.step(action), bounded.step(action.clip(-1, 1))
    assert len(short.finished) == 2 and not long.finished
    assert np.array_equal(short.final_states, long.states) and short.states.dtype == np.float32
    assert abs(short.states - long.states).max() > 0.1  # another start
    assert np.array_equal(bounded.states, long.states)  # actions are clipped


def test_a_repeated_action_is_as_many_steps_of_the_suite(root):
    rng = np.random.default_rng(0)
    one = make_envs(2, seed=3, frame_size=16)
    two = make_envs(2, seed=3, frame_size=16, action_repeat=2)
    num_actions = REPEAT * FRAMES // 2
    for t in range(num_actions):
        action = rng.uniform(-1, 1, (2, 6))
        rewards = [one.step(action)[1] for _ in range(2)]
        obs, reward, done = two.step(action)
        assert np.array_equal(obs, one.obs) and np.array_equal(two.states, one.states)
        np.testing.assert_allclose(reward, sum(rewards), rtol=1e-6)
        assert (done == (t == num_actions - 1)).all()
    assert np.allclose(one.finished, two.finished)


def test_the_same_seed_records_the_same_on_any_number_of_cores(root, tmp_path, monkeypatch):
    (tmp_path / "experts").symlink_to(root / "experts")  # trained here, or before: no difference
    monkeypatch.setattr(common, "NUM_CORES", 1)  # no other processes
    collect(tmp_path)
    for split, shard in (("train", 0), ("train", 1), ("test", 0), ("random", 0)):
        first, recording = read(root, split, shard)
        second, same_recording = read(tmp_path, split, shard)
        assert all(np.array_equal(first[name], second[name]) for name in first)
        assert recording == same_recording


def test_noise_is_added_to_the_mean_action_before_it_is_clipped(root, tmp_path, monkeypatch):
    (tmp_path / "experts").symlink_to(root / "experts")
    monkeypatch.setattr(common, "NUM_CORES", 1)
    expert = load(root / f"experts/{GAME}_x{REPEAT}.pt")
    policy = collect_dmc.ExpertPolicy(**expert["config"])
    policy.load_state_dict(expert["policy"])
    envs = make_envs(2, common.derive_seed(1, "test 0"))
    with torch.no_grad():
        mean = policy(torch.from_numpy(envs.states))[0].mean.numpy()  # of the first frames
    starts = slice(None, None, FRAMES)
    noisy, _ = read(root, "test")
    expected = (mean + noisy["noise"][starts]).clip(-1, 1)
    np.testing.assert_allclose(noisy["action"][starts], expected, atol=1e-6)
    assert 0.3 < noisy["noise"].std() < 0.5  # 0.4, the default
    collect(tmp_path, train_episodes=1, noise=0.0, again=True)
    silent, _ = read(tmp_path, "test")
    np.testing.assert_allclose(silent["action"][starts], mean.clip(-1, 1), atol=1e-6)
    assert not silent["noise"].any()
    collect(tmp_path, train_episodes=1, noise=0.0, mean_action=False, again=True)
    sampled, _ = read(tmp_path, "test")
    std = policy.log_std.exp().mean().item()
    assert sampled["noise"].std() == pytest.approx(std, rel=0.2)
    collect(tmp_path, train_episodes=1, noise=2.0, again=True)
    loud, _ = read(tmp_path, "test")
    assert 1.6 < loud["noise"].std() < 2.4 and abs(loud["action"]).max() == 1
    random, _ = read(root, "random")
    assert np.array_equal(random["noise"], random["action"])


# --- the expert -----------------------------------------------------------------------------------


def test_the_loss_of_ppo_by_hand():
    """Two actions each in one dimension, from a standard Gaussian; the second ratio is clipped."""
    distribution = torch.distributions.Normal(torch.zeros(2, 1), torch.ones(2, 1))
    actions = torch.tensor([[0.0], [1.0]])
    logprobs = -0.5 * np.log(2 * np.pi) - torch.tensor([0.0, 0.5])
    ratios = torch.tensor([1.1, 1.5])
    batch = dict(
        actions=actions,
        logprobs=logprobs - ratios.log(),
        advantages=torch.tensor([1.0, 3.0]),
        targets=torch.tensor([2.0, 0.0]),
    )
    loss = collect_dmc.ppo_loss(distribution, torch.ones(2), batch, SimpleNamespace(clip=0.2))
    unit = 1 / np.sqrt(2)  # advantages minus their mean 2, divided by their std sqrt(2)
    policy_loss = -(-1.1 * unit + 1.2 * unit) / 2
    assert loss.item() == pytest.approx(policy_loss + 0.5 * 1.0, abs=1e-5)


def test_an_update_sees_each_step_once_in_each_epoch():
    """Each step is a number of its own; the policy sees features and decoded of the same one."""
    seen = []

    class Policy(torch.nn.Linear):
        def forward(self, a, b):
            seen.append(torch.cat([a, b], 1))
            return torch.distributions.Normal(super().forward(a), 1.0), a[:, 0]

    policy = Policy(1, 1)
    number = torch.arange(12.0).view(4, 3)
    rollout = dict(a=number[..., None], b=-number[..., None], actions=torch.zeros(4, 3, 1))
    rollout |= dict(logprobs=number, advantages=number, targets=number)
    args = SimpleNamespace(epochs=2, minibatches=3, clip=0.2, max_grad_norm=0.5)
    optimizer = torch.optim.Adam(policy.parameters())
    collect_dmc.ppo_update(policy, optimizer, rollout, ["a", "b"], args)
    assert [len(part) for part in seen] == [4] * 6
    for epoch in (torch.cat(seen[:3]), torch.cat(seen[3:])):
        assert epoch[:, 0].sort()[0].tolist() == list(range(12))
        assert torch.equal(epoch[:, 0], -epoch[:, 1])


def test_an_expert_resumes_after_the_last_saved_update(tmp_path, monkeypatch, capsys):
    batch, save_state = 2 * 16 * REPEAT, common.save_state

    def save_and_stop(*args, **values):
        save_state(*args, **values)
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_state", save_and_stop)
    flags = dict(expert_steps=22 * batch, expert_only=True)
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path, **flags)
    path = tmp_path / f"experts/{GAME}_x{REPEAT}.pt"
    state = load(path.with_name(f"{path.stem}_state.pt"))
    assert state["step"] == 20 * batch and not path.exists()
    collect(tmp_path, **flags, resume=True)
    assert f"is at step {20 * batch:,}" in capsys.readouterr().out
    rows = path.with_suffix(".csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["env_step", str(20 * batch), str(22 * batch)]
    expert, before = load(path), state["states"]["policy"]
    assert expert["env_step"] == 22 * batch
    assert not any(torch.equal(weight, before[x]) for x, weight in expert["policy"].items())
    assert not list(tmp_path.glob("experts/*_state.pt")) and not (tmp_path / "data").exists()


def test_what_would_follow_a_time_limit_counts_for_the_expert(
    root, tmp_path, record_calls, monkeypatch
):
    """The value of an episode's last state is added to its last reward."""
    steps, policies = [], []

    class Recorded(collect_dmc.ControlEnvs):
        def step(self, actions):
            obs, reward, done = super().step(actions)
            steps.append((reward.copy(), done.copy(), self.final_states.copy()))
            return obs, reward, done

    def no_update(policy, *_):
        policies.append(copy.deepcopy(policy))
        return torch.zeros(())

    monkeypatch.setattr(collect_dmc, "ControlEnvs", Recorded)
    monkeypatch.setattr(collect_dmc, "ppo_update", no_update)
    monkeypatch.setattr(common.RewardNormalizer, "__call__", lambda self, reward, done: reward)
    calls = record_calls(collect_dmc, "compute_gae")
    collect(tmp_path, rollout_steps=FRAMES + 5, expert_only=True)
    ((rewards, _, dones, *_),) = calls
    assert dones.sum(1).tolist() == [0] * (FRAMES - 1) + [2] + [0] * 5
    for t, (reward, done, final_states) in enumerate(steps):
        with torch.no_grad():
            _, values = policies[0](torch.from_numpy(final_states))
        expected = torch.from_numpy(reward) + 0.99 * values * torch.from_numpy(done)
        torch.testing.assert_close(rewards[t], expected)


def test_shipped_experts_are_for_their_task():
    for path in sorted((ROOT / "continuous_control/experts").glob("*.pt")):
        game, _, repeat = path.stem.rpartition("_x")
        expert = common.load_checkpoint(path, "dmc_expert", game)
        policy = collect_dmc.ExpertPolicy(**expert["config"])
        policy.load_state_dict(expert["policy"])
        envs = make_envs(2, seed=0, game=game)
        distribution, _ = policy(torch.from_numpy(envs.states))
        assert distribution.mean.shape == (2, envs.num_actions)
        assert expert["recording"]["action_repeat"] == int(repeat)


# --- stages 1 and 2 -------------------------------------------------------------------------------


def test_stages_1_and_2_take_the_shards_and_no_window_crosses_an_episode(root):
    with open(root / f"runs/{GAME}/train_latent_dynamics.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["probe"]) <= 1 and float(row["majority"]) < 0.01 for row in rows)
    args = args_of(stage1, root, game=GAME)
    recorded = np.concatenate([read(root, "train", shard)[0]["action"] for shard in (0, 1)])
    for context in (1, 3):
        store = common.FrameStore(args, "train", context, torch.device("cpu"))
        place = store.rows % FRAMES
        assert place.min() == context and place.max() == FRAMES - 2
        assert len(store.rows) == 3 * (FRAMES - 1 - context)
        rows = store.rows[[0, 20, -1]]
        assert np.array_equal(common.true_actions_to_report_on(store, rows), recorded[rows])
        assert np.array_equal(decode_dmc.read_labels(store, "action"), recorded)
        assert decode_dmc.read_labels(store, "no_such_label") is None


def test_the_probe_of_float_actions_against_naive_least_squares():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3000, 6)).astype(np.float32)
    noise = rng.normal(size=(3000, 2)).astype(np.float32)
    actions = z[:, :2] @ np.float32([[2, 0], [1, 0.3]]) + 0.5 + noise
    score, mean = stage1.linear_probe(z[:2000], actions[:2000], z[2000:], actions[2000:])
    x = np.hstack([z, np.ones((3000, 1))])
    weights = np.linalg.lstsq(x[:2000], actions[:2000], rcond=None)[0]
    test = actions[2000:]
    residual = ((x[2000:] @ weights - test) ** 2).sum(0)
    spread = ((test - test.mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(score, (1 - residual / spread).mean(), atol=1e-3)
    assert -0.01 < mean <= 0


# --- decoding offline -----------------------------------------------------------------------------


def test_the_decoder_against_closed_form_least_squares():
    torch.manual_seed(0)
    z = 3 * torch.randn(4096, 6) + 1
    actions = (z @ torch.randn(6, 2) * 0.05).clamp(-1, 1)
    decoder = RegressionDecoder(6, 2)
    decoder.mean.copy_(z.mean(0)), decoder.std.copy_(z.std(0))
    generator = torch.Generator().manual_seed(0)
    labelled = torch.arange(1, 2049)
    options = dict(steps=1000, batch_size=128, lr=1e-3, generator=generator)
    fit(decoder, lambda batch: z[labelled[batch]], actions[labelled], **options)
    x = torch.cat([z, torch.ones(4096, 1)], 1)
    closed = x[2049:] @ torch.linalg.lstsq(x[1:2049], actions[1:2049]).solution
    assert (decoder(z[2049:]) - closed).abs().mean() < 0.03 < actions.abs().mean()
    assert r2(decoder, z[2049:], actions[2049:]) > 0.97
    assert abs(r2(lambda z: actions.mean(0).expand(len(z), 2), z, actions)) < 1e-4


def decode_args(root, **flags):
    tiny = dict(game=GAME, device="cpu", data_dir=root / "data", runs_dir=root / "runs")
    tiny |= dict(labels=(4, 16), decoder_seeds=1, decoder_steps=3, clone_steps=3, episodes=1)
    return decode_dmc.Args(**tiny | dict(untrained_dir=root / "none") | flags)


def test_decoding_plays_and_saves_every_method(root, tmp_path):
    decode_dmc.main(decode_args(root))
    path = root / f"runs/{GAME}/decode_dmc.npz"
    one = load(path)
    for name in ("returns", "policy_r2", "r2", "returns_bc", "policy_r2_bc"):
        assert one[name].shape == (2, 1) and np.isfinite(one[name]).all()
    assert one["returns_bc_all"].shape == (1, 1) and 0 <= one["mean_return"] <= REPEAT * FRAMES
    assert one["settings"]["args"]["seed"] == 1 and path.with_suffix(".png").exists()
    assert one["settings"]["recording"]["action_repeat"] == REPEAT
    # an earlier run's methods stay, and the control's returns stand beside them
    control = tmp_path / GAME
    control.mkdir()
    (control / path.name).write_bytes(path.read_bytes())
    decode_dmc.main(decode_args(root, methods=("lapo",), untrained_dir=tmp_path))
    two = load(path)
    for name in ("returns", "returns_bc", "returns_bc_all"):
        assert np.array_equal(one[name], two[name])  # the same seed
    assert np.array_equal(one["returns"], two["returns_untrained"])
    # but not where they are not comparable
    for flags in (dict(labels=(8, 16)), dict(decode_from="idm"), dict(match_std=False)):
        args = decode_args(root, untrained_dir=tmp_path, **flags)
        (flag,) = flags
        assert f"--{flag.replace('_', '-')} is" in fails(decode_dmc.main, args)
    decode_dmc.main(decode_args(root, methods=("bc",), seed=2))
    assert "returns" not in load(path)
    args = decode_args(root, labels=(4, 999))
    assert "fewer than 999" in fails(decode_dmc.main, args)


@pytest.fixture
def played(monkeypatch):
    """The networks that were to be played: none is."""
    networks = []
    monkeypatch.setattr(decode_dmc, "play", lambda network, *_: networks.append(network) or 0.0)
    return networks


def test_decoders_are_fitted_on_the_policys_hidden_layer_or_on_z(root, played, record_calls):
    calls = record_calls(decode_dmc, "fit")
    obs = torch.from_numpy(read(root, "test")[0]["obs"][:5])
    train = common.FrameStore(args_of(stage1, root, game=GAME), "train", 1, torch.device("cpu"))
    actions = decode_dmc.read_labels(train, "action")
    for decode_from, size in (("policy", 256), ("idm", 128)):
        flags = dict(labels=(8,), methods=("lapo",), match_std=False)
        decode_dmc.main(decode_args(root, decode_from=decode_from, **flags))
        encoder, decoder = played[-1]
        _, inputs_at, labelled = calls[-1]
        inputs = inputs_at(torch.arange(8))
        assert inputs.shape == (8, size)
        # each input belongs to the frame whose action it is fitted to
        rows = [(actions == action).all(1).nonzero().item() for action in labelled]
        if decode_from == "idm":
            shards = sorted(root.glob(f"runs/{GAME}/train/latents_*.npz"))
            z = np.concatenate([load(path)["z"] for path in shards])
            assert np.array_equal(inputs.numpy(), z[rows].astype(np.float32))
            latent = encoder(obs)
        else:
            torch.testing.assert_close(inputs, encoder(train.obs[rows]))
            policy = encoder.policy  # its latent is a linear map of this layer
            latent = policy.mean + policy.std * policy.head(encoder(obs))
            torch.testing.assert_close(latent, policy(obs))
        torch.testing.assert_close(played[-1](obs), decoder(encoder(obs)))


def test_match_std_gives_decoded_actions_the_std_of_labelled_ones(root, played):
    decoded, labelled = torch.randn(500, 6) * 0.1 + 0.2, torch.rand(40, 6) * 2 - 1
    matched = decode_dmc.MatchStd(decoded, labelled)(decoded)
    torch.testing.assert_close(matched.mean(0), decoded.mean(0))
    torch.testing.assert_close(matched.std(0, correction=0), labelled.std(0, correction=0))
    for match_std in (False, True):
        flags = dict(labels=(1, 8), methods=("lapo", "bc"), decoder_steps=2)
        decode_dmc.main(decode_args(root, match_std=match_std, **flags))
    obs = torch.from_numpy(read(root, "train")[0]["obs"])
    plain, scaled = played[1:5], played[6:]  # before them, the mean action
    for network, other in zip(plain, scaled):
        before, scale = other
        torch.testing.assert_close(before(obs), network(obs))
        torch.testing.assert_close(other(obs), scale(network(obs)))
        assert scale.factor.isfinite().all()
    one, eight = (network[1].factor for network in scaled[:2])
    assert (one == 0).all() and (eight > 0).all()  # one label has no std


def test_clones_and_the_mean_action_see_the_labels_that_they_should(root, played, record_calls):
    calls, judged = record_calls(decode_dmc, "fit"), record_calls(decode_dmc, "r2")
    held_out, _ = read(root, "test")
    flags = dict(labels=(8,), methods=("bc", "bc_all"), match_std=False)
    decode_dmc.main(decode_args(root, **flags))
    train = common.FrameStore(args_of(stage1, root, game=GAME), "train", 1, torch.device("cpu"))
    actions = decode_dmc.read_labels(train, "action")
    for (_, inputs_at, labelled), count in zip(calls, (8, len(train.rows))):
        rows = [(actions == action).all(1).nonzero().item() for action in labelled]
        assert len(set(rows)) == count and set(rows) <= set(train.rows.tolist())
        assert torch.equal(inputs_at(torch.arange(count)), train.obs[rows])
    for _, obs, actions_of_obs in judged:  # held-out frames with their own actions
        same = (torch.from_numpy(held_out["action"]) == actions_of_obs[:, None]).all(2)
        rows = [row.nonzero().item() for row in same]
        assert np.array_equal(obs, held_out["obs"][rows])
    mean = played[0](torch.zeros(3, 24))
    torch.testing.assert_close(mean, actions[train.rows].mean(0).expand(3, 6))


# --- decoding online ------------------------------------------------------------------------------

ONLINE = dict(game=GAME, device="cpu", num_envs=2, rollout_steps=8, minibatches=2, epochs=1)
ONLINE |= dict(env_steps=6 * 16 * REPEAT, log_every_steps=32 * REPEAT, decoder_steps=2, episodes=1)


def test_online_ppo_moves_the_mean_from_the_decoders_action_to_the_better_one():
    torch.manual_seed(0)
    policy = decode_dmc_online.OnlinePolicy(torch.nn.Linear(4, 8), 2, start_std=0.6)
    features, decoded = torch.randn(16, 4, 4), torch.rand(16, 4, 2) - 0.5
    distribution, _ = policy(features, decoded)
    assert torch.equal(distribution.mean, decoded)
    torch.testing.assert_close(distribution.stddev, torch.full_like(decoded, 0.6))
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    args = SimpleNamespace(epochs=4, minibatches=4, clip=0.2, max_grad_norm=0.5)
    target = decoded + torch.tensor([0.4, -0.2])
    rollout = dict(features=features, decoded=decoded, targets=torch.full((16, 4), 3.0))
    for _ in range(60):
        with torch.no_grad():
            distribution, _ = policy(features, decoded)
            actions = distribution.sample()
            rollout["actions"] = actions
            rollout["logprobs"] = distribution.log_prob(actions).sum(-1)
            rollout["advantages"] = -(actions - target).square().sum(-1)
        collect_dmc.ppo_update(policy, optimizer, rollout, ["features", "decoded"], args)
    distribution, value = policy(features, decoded)
    assert (distribution.mean - target).abs().mean() < 0.1 < (decoded - target).abs().mean()
    assert (value - 3).abs().mean() < 0.3 and (distribution.stddev < 0.5).all()


@pytest.fixture
def online_steps(monkeypatch):
    """Each step of decode_dmc_online's games: obs before, actions, obs after, done, reward."""
    steps = []

    class Recorded(collect_dmc.ControlEnvs):
        def step(self, actions):
            before = self.obs.copy()
            obs, reward, done = super().step(actions)
            step = dict(before=before, actions=np.clip(actions, -1, 1), after=obs.copy())
            steps.append(step | dict(done=done.copy(), reward=reward.copy()))
            return obs, reward, done

    monkeypatch.setattr(decode_dmc_online, "ControlEnvs", Recorded)
    return steps


def test_online_every_transition_reaches_the_decoder_with_its_clipped_action(
    root, tmp_path, record_calls, online_steps, monkeypatch
):
    fits = []
    monkeypatch.setattr(
        decode_dmc_online,
        "fit",
        lambda decoder, inputs_at, actions, **_: fits.append(
            (inputs_at(torch.arange(len(actions))), actions)
        ),
    )
    run_dir = link_run(root, tmp_path)
    decode_dmc_online.main(decode_dmc_online.Args(**ONLINE, runs_dir=tmp_path, start_std=2.0))
    saved = load(run_dir / "latent_dynamics.pt")
    idm = stage1.IDM(**saved["config"]["idm"])
    idm.load_state_dict(saved["idm"])
    z, taken = [], []
    for t in range(1, 3 * 8):  # half of the six rollouts
        for env in range(2):
            past, now = online_steps[t - 1], online_steps[t]
            if not past["done"][env] and not now["done"][env]:  # frames of one episode
                window = np.stack([past["before"][env], now["before"][env], now["after"][env]])
                z.append(idm(torch.from_numpy(window)[None])[0].detach())
                taken.append(now["actions"][env])
    assert len(z) == 2 * (3 * 8 - 1 - 2) and len(fits) == 3  # an episode ends: two windows less
    # each rollout's transitions have their order within the rollout
    found_z, found_actions = fits[-1]
    order = [(found_actions - torch.from_numpy(a)).abs().sum(1).argmin().item() for a in taken]
    assert sorted(order) == list(range(len(z)))
    torch.testing.assert_close(found_z[order], torch.stack(z), atol=2e-3, rtol=1e-2)
    np.testing.assert_allclose(found_actions[order], np.stack(taken), atol=1e-6)
    assert (abs(np.stack(taken)) == 1).any()  # a std of 2 leaves the bounds


def test_online_time_ends_episodes_so_the_value_of_the_last_frame_counts(
    root, tmp_path, record_calls, online_steps, monkeypatch
):
    calls = record_calls(decode_dmc_online, "compute_gae")
    monkeypatch.setattr(common.RewardNormalizer, "__call__", lambda self, reward, done: reward)
    link_run(root, tmp_path)
    decode_dmc_online.main(decode_dmc_online.Args(**ONLINE, runs_dir=tmp_path, method="rl"))
    rewards = torch.cat([call[0] for call in calls])
    values = torch.cat([call[1][:-1] for call in calls])
    dones = torch.cat([call[2] for call in calls])
    steps = online_steps[:48]
    assert torch.equal(dones, torch.from_numpy(np.stack([step["done"] for step in steps])))
    assert dones.sum() == 4
    own_rewards = torch.from_numpy(np.stack([step["reward"] for step in steps]))
    torch.testing.assert_close(rewards, own_rewards + 0.99 * values * dones)
    # the value after a rollout is the first one of the next rollout, but for PPO's update between
    assert [len(call[1]) for call in calls] == [9] * 6


def test_a_saved_decoder_is_restored_with_its_transitions():
    device = torch.device("cpu")
    one, two = (decode_dmc_online.OnlineDecoder(None, 8, 2, 3, None, device) for _ in range(2))
    torch.nn.init.normal_(one.decoder.layers[-1].weight)
    one.decoder.mean.fill_(0.5)
    one.r2, one.z, one.actions = 0.25, torch.rand(5, 8).half(), torch.rand(5, 2)
    two.load_state_dict(one.state_dict())
    z = torch.randn(4, 8)
    assert torch.equal(one(z), two(z)) and one(z).abs().max() <= 1 and two.r2 == 0.25
    assert torch.equal(one.z, two.z) and torch.equal(one.actions, two.actions)


def test_online_runs_resume_and_have_a_plot_of_their_own(root, tmp_path, monkeypatch, capsys):
    flags = dict(runs_dir=tmp_path, resume=True)
    run_dir, save_state = link_run(root, tmp_path), common.save_state

    def save_and_stop(*args, **values):
        save_state(*args, **values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "save_state", save_and_stop)
        decode_dmc_online.main(decode_dmc_online.Args(**ONLINE, **flags))
    assert not list(tmp_path.glob("*/decode_online_*.npz"))
    # the first two rollouts, without the first frame of each environment
    decoder = load(run_dir / "decode_online_rl_sl_state.pt")["states"]["decoder"]
    assert len(decoder["z"]) == len(decoder["actions"]) == 2 * (16 - 1)
    fits = []
    plain_fit = decode_dmc_online.fit

    def record_fit(network, inputs_at, actions, **options):
        fits.append(actions)
        plain_fit(network, inputs_at, actions, **options)

    monkeypatch.setattr(decode_dmc_online, "fit", record_fit)
    decode_dmc_online.main(decode_dmc_online.Args(**ONLINE, **flags))
    assert f"is at step {32 * REPEAT}" in capsys.readouterr().out
    curve = load(run_dir / "decode_online_rl_sl.npz")
    assert curve["env_steps"].tolist() == [32 * REPEAT, 64 * REPEAT, 96 * REPEAT]
    assert curve["episodes"].sum() == 2 and curve["settings"]["args"]["method"] == "rl_sl"
    assert np.nanmin(curve["returns"]) >= 0 and 0 <= curve["mean_return"] <= REPEAT * FRAMES
    # the last fit has one more rollout, of new episodes; then transitions are released
    assert [len(actions) for actions in fits] == [2 * (16 - 1) + 2 * (8 - 1)]
    assert torch.equal(fits[0][: 2 * (16 - 1)], decoder["actions"])
    assert len(load(run_dir / "decode_online_rl_sl_state.pt")["states"]["decoder"]["z"]) == 0
    (run_dir / "latent_dynamics.pt").unlink()
    decode_dmc_online.main(decode_dmc_online.Args(**ONLINE, runs_dir=tmp_path, method="rl"))
    assert (run_dir / "decode_online_rl.png").exists()
    assert "latent_dynamics.pt is missing" in fails(
        decode_dmc_online.main, decode_dmc_online.Args(**ONLINE, runs_dir=tmp_path)
    )


# --- pictures, flags, messages --------------------------------------------------------------------


def test_pictures_and_metrics(root):
    flags = dict(game=GAME, data_dir=root / "data", runs_dir=root / "runs", device="cpu")
    flags |= dict(points=32, projection="pca", supervised_steps=2)
    visualize_dmc.main(visualize_dmc.Args(**flags))
    run_dir = root / f"runs/{GAME}"
    saved = load(run_dir / "latents_metrics.npz")
    for name in ("probe", "noise_probe", "noise_probe_untrained", "random_probe", "supervised"):
        assert saved[name].shape == (6,) and (saved[name] <= 1).all()
    assert all((run_dir / name).exists() for name in ("latents.png", "film.png", "film.gif"))


def test_the_noise_of_a_window_is_that_of_its_frame(root):
    """On random play, noise and action are one."""
    flags = dict(game=GAME, data_dir=root / "data", points=8)
    split = visualize_dmc.load_split(visualize_dmc.Args(**flags), "random", 1, torch.device("cpu"))
    assert 1 < len(split.actions) <= 8 and np.array_equal(split.noise, split.actions)


def test_latents_are_pushed_along_their_principal_directions():
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(20_000, 4)) * [3, 2, 1, 0.1] + [5, 0, 0, 0]).astype(np.float32)
    moved, names = visualize_dmc.pushed(z, stage1.NoQuantizer(), torch.device("cpu"))
    expected = np.zeros((6, 4))
    expected[:, 0] = 5
    for i, std in enumerate((3, 2, 1)):
        expected[2 * i, i] -= 2 * std
        expected[2 * i + 1, i] += 2 * std
    for i in range(3):  # a direction may point either way
        pair = moved[2 * i : 2 * i + 2].numpy()
        pair = pair if pair[0, i] < pair[1, i] else pair[::-1]
        np.testing.assert_allclose(pair, expected[2 * i : 2 * i + 2], atol=0.25)
    assert names[0] == "direction 1\n-2 std" and names[5] == "direction 3\n+2 std"


def test_what_users_do_wrong_gives_one_line(root, tmp_path, monkeypatch):
    before = read(root, "train")[0]
    assert "is there already; remove it" in fails(collect, root)
    assert np.array_equal(before["obs"], read(root, "train")[0]["obs"])
    assert "--train-episodes 0" in fails(collect, tmp_path, train_episodes=0)
    few = dict(num_envs=2, rollout_steps=2, minibatches=4)
    assert "less than 2 steps" in fails(collect, tmp_path, **few)
    online = decode_dmc_online.Args(**ONLINE | few, runs_dir=tmp_path)
    assert "less than 2 steps" in fails(decode_dmc_online.main, online)
    link_run(root, tmp_path / "runs")
    flags = ONLINE | dict(runs_dir=tmp_path / "runs", refit_until=0.0)
    early = decode_dmc_online.Args(**flags)
    assert "--refit-until 0.0" in fails(decode_dmc_online.main, early)
    monkeypatch.setenv("MUJOCO_GL", "no_such_renderer")
    assert "cannot draw here with no_such_renderer" in fails(collect, tmp_path)
    assert not (tmp_path / "data").exists()
    frames = tmp_path / "frames_000.npz"
    frames.write_bytes((root / f"data/{GAME}/train" / frames.name).read_bytes())
    common.save_npz(tmp_path / "labels_000.npz", {}, action=before["action"][:-1])
    assert f"for {2 * FRAMES} frames" in fails(common.read_actions, frames)


def test_commands_of_the_readme_have_the_flags_that_they_use():
    folder = ROOT / "continuous_control"
    shared = spellings((ROOT / "common.py").read_text())
    pattern = r"python (?:-m continuous_control\.)?(\w+)(?:\.py)? ([^\n#`]*)"
    commands = re.findall(pattern, (folder / "README.md").read_text())
    assert len(commands) >= 6
    for script, rest in commands:
        path = folder / f"{script}.py"
        path = path if path.exists() else ROOT / f"{script}.py"
        if path.exists():
            known = shared | spellings(path.read_text())
            assert set(re.findall(r"(?<=\s)--[a-z][a-z-]+", f" {rest}")) <= known, (script, rest)
