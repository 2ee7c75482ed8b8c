"""Continuous control: shards of the suite, stage 1's probe of float actions, the decoder."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import args_of, fails, run

import common
import train_latent_bc as stage2
import train_latent_dynamics as stage1

pytest.importorskip("dm_control", reason="pip install -r continuous_control/requirements-dmc.txt")

from continuous_control import collect_dmc, decode_dmc, decode_dmc_online, visualize_dmc
from continuous_control.decode_dmc import RegressionDecoder, fit, r2

STEPS, GAME = 20, "walker_walk"
SIZES = dict(train_episodes=3, test_episodes=2, random_episodes=2, frame_size=16, plain=True)
EXPERT = dict(expert_steps=64, num_envs=2, rollout_steps=16, minibatches=2, epochs=1, hidden=8)


def collect(root, **flags):
    flags = dict(game=GAME, data_dir=root / "data", experts_dir=root / "experts") | SIZES | flags
    collect_dmc.main(collect_dmc.Args(**EXPERT | flags))


def read(root, split, shard=0):
    """The arrays of a shard's two files, and their settings."""
    shards = [root / f"data/{GAME}/{split}/{name}_{shard:03d}.npz" for name in ("frames", "labels")]
    arrays = dict(np.load(shards[0])) | dict(np.load(shards[1]))
    return arrays, json.loads(str(arrays.pop("settings")))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Short episodes of a hardly trained expert, with stages 1 and 2 run on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_dmc, "EPISODE_STEPS", STEPS)
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


def test_actions_replayed_give_the_same_frames_and_rewards(root):
    for split, shard, episodes in (("train", 0, 2), ("train", 1, 1), ("random", 0, 2)):
        arrays, settings = read(root, split, shard)
        assert arrays["obs"].shape == (episodes * STEPS, 16, 16, 3)
        assert arrays["action"].dtype == np.float32 and abs(arrays["action"]).max() <= 1
        assert np.flatnonzero(arrays["first"]).tolist() == list(range(0, episodes * STEPS, STEPS))
        recorded = {
            name: array.reshape(episodes, STEPS, *array.shape[1:]) for name, array in arrays.items()
        }
        seed = common.derive_seed(settings["seed"], f"{split} {shard}")
        envs = collect_dmc.ControlEnvs(settings, episodes, seed)
        for step in range(STEPS):
            assert np.array_equal(envs.obs, recorded["obs"][:, step])
            _, reward, done = envs.step(recorded["action"][:, step])
            assert np.array_equal(reward, recorded["reward"][:, step])
            assert (done == (step == STEPS - 1)).all()
        returns = [episode_return for _, episode_return in envs.finished]
        np.testing.assert_allclose(returns, recorded["reward"].sum(1), rtol=1e-5)
        envs.close()
    assert settings["random_return"] < STEPS and settings["split"] == "random"


def test_a_gray_stack_holds_the_last_three_frames_of_the_episode(root, monkeypatch):
    monkeypatch.setattr(collect_dmc, "EPISODE_STEPS", 4)
    settings, rng = dict(game=GAME, plain=True, frame_size=32), np.random.default_rng(0)
    envs = [collect_dmc.ControlEnvs(settings | dict(gray_stack=x), 2, 3) for x in (False, True)]
    frames, first = [], [True]
    for _ in range(7):
        color, stacked = (x.obs for x in envs)
        gray = np.rint(color.astype(float).mean(-1))
        frames = [gray] * 3 if first[-1] else [*frames[1:], gray]
        assert np.array_equal(stacked, np.stack(frames, -1))
        assert first[-1] or not np.array_equal(stacked[..., 1], stacked[..., 2])
        actions = rng.uniform(-1, 1, (2, 6))
        first.append([x.step(actions)[2] for x in envs][0].all())
    assert np.flatnonzero(first).tolist() == [0, 4]
    [x.close() for x in envs]


def test_an_expert_resumes_after_the_last_saved_update(tmp_path, monkeypatch, capsys):
    batch, save_state = 2 * 16, common.save_state

    def save_and_stop(*args, **values):
        save_state(*args, **values)
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_state", save_and_stop)
    flags = dict(expert_steps=22 * batch, train_episodes=0)
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path, **flags)
    state = torch.load(tmp_path / f"experts/{GAME}_x1_state.pt")
    assert state["step"] == 20 * batch and not (tmp_path / f"experts/{GAME}_x1.pt").exists()
    collect(tmp_path, **flags, resume=True)
    assert f"is at step {20 * batch}" in capsys.readouterr().out
    rows = (tmp_path / f"experts/{GAME}_x1.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["env_step", str(20 * batch), str(22 * batch)]
    expert = torch.load(tmp_path / f"experts/{GAME}_x1.pt")
    assert expert["env_step"] == 22 * batch
    moved = [
        not torch.equal(expert["policy"][x], state["parts"]["policy"][x]) for x in expert["policy"]
    ]
    assert all(moved) and not list(tmp_path.glob("experts/*_state.pt"))


def test_the_same_seed_records_the_same_and_noise_is_added_to_the_mean(root, tmp_path, monkeypatch):
    (tmp_path / "experts").symlink_to(root / "experts")  # trained here, or before: no difference
    monkeypatch.setattr(common, "NUM_CORES", 1)  # no other processes
    collect(tmp_path)
    for split, shard in (("train", 0), ("train", 1), ("test", 0), ("random", 0)):
        first, again = read(root, split, shard)[0], read(tmp_path, split, shard)[0]
        assert all(np.array_equal(first[name], again[name]) for name in first)
    first = read(root, "test")[0]
    collect(tmp_path, train_episodes=1, noise=0, overwrite=True)
    mean, expert = read(tmp_path, "test")[0], torch.load(root / f"experts/{GAME}_x1.pt")
    policy = collect_dmc.ExpertPolicy(*expert["sizes"])
    policy.load_state_dict(expert["policy"])
    seed = common.derive_seed(1, "test 0")
    envs = collect_dmc.ControlEnvs(dict(game=GAME, frame_size=0, plain=True), 2, seed)
    action = policy(torch.from_numpy(envs.states))[0].mean.detach().numpy()
    starts = slice(None, None, STEPS)
    np.testing.assert_allclose(mean["action"][starts], action.clip(-1, 1), atol=1e-6)
    assert 0.05 < (first["action"][starts] - action).std() < 0.4  # 0.2, the default
    noisy = (action + first["noise"][starts]).clip(-1, 1)
    np.testing.assert_allclose(first["action"][starts], noisy, atol=1e-6)
    assert 0.15 < first["noise"].std() < 0.25
    random = read(root, "random")[0]
    assert np.array_equal(random["noise"], random["action"])


def test_time_limits_end_episodes_and_the_last_state_is_kept(root, monkeypatch):
    settings, action = dict(game=GAME, frame_size=0, plain=True), np.full((2, 6), 5.0)
    short = collect_dmc.ControlEnvs(settings, 2, seed=3)
    monkeypatch.setattr(collect_dmc, "EPISODE_STEPS", 2 * STEPS)
    long, bounded = (collect_dmc.ControlEnvs(settings, 2, seed=3) for _ in range(2))
    for step in range(STEPS):
        assert np.array_equal(short.states, long.states)
        short.step(action), long.step(action), bounded.step(action.clip(-1, 1))
    assert len(short.finished) == 2 and not long.finished
    assert np.array_equal(short.final_states, long.states) and short.states.dtype == np.float32
    assert abs(short.states - long.states).max() > 0.1  # another start
    assert np.array_equal(bounded.states, long.states)  # actions are clipped


def test_a_repeated_action_is_as_many_steps_of_the_suite(root, tmp_path):
    settings, rng = dict(game=GAME, frame_size=16, plain=True), np.random.default_rng(0)
    one = collect_dmc.ControlEnvs(settings, 2, seed=3)
    two = collect_dmc.ControlEnvs(settings | dict(action_repeat=2), 2, seed=3)
    for step in range(STEPS // 2):
        action = rng.uniform(-1, 1, (2, 6))
        rewards = [one.step(action)[1] for _ in range(2)]
        obs, reward, done = two.step(action)
        assert np.array_equal(obs, one.obs) and np.array_equal(two.states, one.states)
        np.testing.assert_allclose(reward, sum(rewards), rtol=1e-6)
        assert (done == (step == STEPS // 2 - 1)).all()
    assert np.allclose(one.finished, two.finished)
    collect(tmp_path, action_repeat=2)
    arrays, settings = read(tmp_path, "train")
    assert len(arrays["obs"]) == 2 * STEPS // 2 and settings["action_repeat"] == 2
    assert (tmp_path / f"experts/{GAME}_x2.pt").exists()


def test_stages_1_and_2_take_the_shards_and_no_window_crosses_an_episode(root):
    with open(root / f"runs/{GAME}/train_latent_dynamics.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["probe"]) <= 1 and float(row["majority"]) < 0.01 for row in rows)
    args = args_of(stage1, root, game=GAME)
    for context in (1, 3):
        store = common.FrameStore(args, "train", context, torch.device("cpu"))
        place = store.rows % store.slot_rows % STEPS
        assert place.min() == context and place.max() == STEPS - 2
        assert len(store.rows) == 3 * (STEPS - 1 - context)
        rows = store.rows[[0, 20, -1]]
        actions = common.true_actions_to_report_on(store, rows)
        for row, guess in zip(rows.tolist(), actions):
            shard = read(root, "train", row // store.slot_rows)[0]["action"]
            assert np.array_equal(guess, shard[row % store.slot_rows])


def test_the_probe_of_float_actions_against_naive_least_squares():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3000, 6)).astype(np.float32)
    noise = rng.normal(size=(3000, 2)).astype(np.float32)
    actions = z[:, :2] @ np.float32([[2, 0], [1, 0.3]]) + 0.5 + noise
    score, mean = stage1.linear_probe(z[:2000], actions[:2000], z[2000:], actions[2000:])
    x = np.hstack([z, np.ones((3000, 1))])
    weights = np.linalg.lstsq(x[:2000], actions[:2000], rcond=None)[0]
    test = actions[2000:]
    residual, spread = (
        ((x[2000:] @ weights - test) ** 2).sum(0),
        ((test - test.mean(0)) ** 2).sum(0),
    )
    np.testing.assert_allclose(score, (1 - residual / spread).mean(), atol=1e-3)
    assert -0.01 < mean <= 0


def test_the_decoder_against_closed_form_least_squares():
    torch.manual_seed(0)
    z = 3 * torch.randn(4096, 6) + 1
    actions = (z @ torch.randn(6, 2) * 0.05).clamp(-1, 1)
    decoder = RegressionDecoder(6, 2)
    decoder.mean.copy_(z.mean(0)), decoder.std.copy_(z.std(0))
    store = SimpleNamespace(z_at=lambda rows: z[rows])
    rows, generator = torch.arange(1, 2049), torch.Generator().manual_seed(0)
    fit(decoder, store.z_at, rows, actions[rows], 1000, 128, 1e-3, generator)
    x = torch.cat([z, torch.ones(4096, 1)], 1)
    closed = x[2049:] @ torch.linalg.lstsq(x[1:2049], actions[1:2049]).solution
    assert (decoder(z[2049:]) - closed).abs().mean() < 0.03 < actions.abs().mean()
    assert r2(decoder, z[2049:], actions[2049:]) > 0.97
    assert abs(r2(lambda z: actions.mean(0).expand(len(z), 2), z, actions)) < 1e-4


def test_decoding_plays_and_saves_every_method(root, tmp_path):
    flags = dict(game=GAME, device="cpu", data_dir=root / "data", labels=(4, 16), decoder_seeds=1)
    flags |= dict(decoder_steps=3, clone_steps=3, episodes=1)
    flags |= dict(runs_dir=root / "runs", untrained_dir=root / "untrained")
    decode_dmc.main(decode_dmc.Args(**flags))
    path = root / f"runs/{GAME}/decode_dmc.npz"
    one, settings = dict(np.load(path)), json.loads(str(np.load(path)["settings"]))
    for name in ("returns", "policy_r2", "r2", "returns_bc", "policy_r2_bc"):
        assert one[name].shape == (2, 1) and np.isfinite(one[name]).all()
    assert one["returns_bc_all"].shape == (1, 1) and 0 <= one["mean_return"] <= STEPS
    assert settings["seed"] == 1 and path.with_suffix(".png").exists()
    (root / "untrained" / GAME).mkdir(parents=True)
    (root / "untrained" / GAME / path.name).write_bytes(path.read_bytes())
    decode_dmc.main(decode_dmc.Args(**flags | dict(methods=("lapo",))))
    two = dict(np.load(path))
    assert np.array_equal(one["returns"], two["returns"])  # the same seed
    assert np.array_equal(one["returns"], two["returns_untrained"])
    assert "but" in fails(decode_dmc.main, decode_dmc.Args(**flags | dict(labels=(8, 16))))
    assert "but" in fails(decode_dmc.main, decode_dmc.Args(**flags | dict(decode_from="policy")))
    few = flags | dict(labels=(4, 999), untrained_dir=root / "none")
    assert "fewer than 999" in fails(decode_dmc.main, decode_dmc.Args(**few))


def test_decoding_from_the_policy_fits_its_last_hidden_layer(root, monkeypatch):
    flags = dict(game=GAME, device="cpu", data_dir=root / "data", runs_dir=root / "runs")
    flags |= dict(labels=(8,), decoder_seeds=1, methods=("lapo",), decode_from="policy")
    played, seen = [], []
    monkeypatch.setattr(decode_dmc, "play", lambda network, *_: played.append(network) or 0.0)
    plain_fit = decode_dmc.fit
    record = lambda decoder, *rest: seen.append(rest) or plain_fit(decoder, *rest)  # noqa: E731
    monkeypatch.setattr(decode_dmc, "fit", record)
    decode_dmc.main(decode_dmc.Args(**flags | dict(untrained_dir=root / "none", decoder_steps=2)))
    encoder, decoder = played[0]
    obs = torch.from_numpy(read(root, "test")[0]["obs"][:5])
    hidden = encoder(obs)
    assert hidden.shape == (5, 256) and seen[0][0](torch.arange(8)).shape == (8, 256)
    policy = encoder.policy  # its latent is a linear map of this layer
    latent = policy.mean + policy.std * policy.head(hidden)
    torch.testing.assert_close(latent, policy(obs))
    torch.testing.assert_close(played[0](obs), decoder(hidden))


def test_match_std_gives_decoded_actions_the_std_of_labelled_ones(root, monkeypatch):
    decoded, labelled = torch.randn(500, 6) * 0.1 + 0.2, torch.rand(40, 6) * 2 - 1
    matched = decode_dmc.MatchStd(decoded, labelled)(decoded)
    torch.testing.assert_close(matched.mean(0), decoded.mean(0))
    torch.testing.assert_close(matched.std(0, correction=0), labelled.std(0, correction=0))
    flags = dict(game=GAME, device="cpu", data_dir=root / "data", runs_dir=root / "runs")
    flags |= dict(labels=(1, 8), decoder_seeds=1, methods=("lapo", "bc"), decoder_steps=2)
    played = []
    monkeypatch.setattr(decode_dmc, "play", lambda network, *_: played.append(network) or 0.0)
    for match_std in (False, True):
        more = dict(untrained_dir=root / "none", match_std=match_std)
        decode_dmc.main(decode_dmc.Args(**flags | more))
    obs = torch.from_numpy(read(root, "train")[0]["obs"])
    plain, scaled = (networks[:4] for networks in (played[:5], played[5:]))  # the fifth: the mean
    for network, other in zip(plain, scaled):
        before, scale = other
        torch.testing.assert_close(before(obs), network(obs))
        torch.testing.assert_close(other(obs), scale(network(obs)))
        assert scale.factor.isfinite().all()
    one, eight = (network[1].factor for network in scaled[:2])
    assert (one == 0).all() and (eight > 0).all()  # one label has no std


ONLINE = dict(game=GAME, device="cpu", num_envs=2, rollout_steps=8, minibatches=2, epochs=1)
ONLINE |= dict(env_steps=6 * 16, log_every_steps=32, decoder_steps=2, episodes=1)


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
    for _ in range(60):
        with torch.no_grad():
            distribution, _ = policy(features, decoded)
            actions = distribution.sample()
            logprobs = distribution.log_prob(actions).sum(-1)
        advantages = -(actions - target).square().sum(-1)
        rollout = actions, logprobs, advantages, torch.full((16, 4), 3.0)
        collect_dmc.ppo_update(policy, optimizer, [features, decoded], rollout, args)
    distribution, value = policy(features, decoded)
    assert (distribution.mean - target).abs().mean() < 0.1 < (decoded - target).abs().mean()
    assert (value - 3).abs().mean() < 0.3 and (distribution.stddev < 0.5).all()


def test_online_every_transition_reaches_the_decoder_with_its_clipped_action(
    root, tmp_path, monkeypatch
):
    """And time ends episodes, so the value of the last frame that was rendered still counts."""
    steps, fits, estimates = [], [], []

    class Recorded(collect_dmc.ControlEnvs):
        def step(self, actions):
            before = self.obs.copy()
            obs, reward, done = super().step(actions)
            steps.append((before, np.clip(actions, -1, 1), obs.copy(), done.copy(), reward.copy()))
            return obs, reward, done

    def record_fit(decoder, inputs_at, rows, actions, *rest):
        fits.append((inputs_at(rows), actions))

    monkeypatch.setattr(decode_dmc_online, "ControlEnvs", Recorded)

    def record_gae(*tensors):
        estimates.append(tensors[:3])
        return collect_dmc.compute_gae(*tensors)

    monkeypatch.setattr(decode_dmc_online, "fit", record_fit)
    monkeypatch.setattr(decode_dmc_online, "compute_gae", record_gae)
    monkeypatch.setattr(common.RewardNormalizer, "__call__", lambda self, reward, done: reward)
    (tmp_path / GAME).symlink_to(root / f"runs/{GAME}")
    decode_dmc_online.main(decode_dmc_online.Args(**ONLINE, runs_dir=tmp_path, start_std=2.0))
    saved = torch.load(root / f"runs/{GAME}/latent_dynamics.pt")
    idm = stage1.IDM(16, 1, saved["multiplier"], saved["z_dim"])
    idm.load_state_dict(saved["idm"])
    z, taken = [], []
    for t in range(1, 3 * 8):  # half of the six rollouts
        for env in range(2):
            past, now = steps[t - 1], steps[t]
            if not past[3][env] and not now[3][env]:  # o_{t-1}, o_t, o_{t+1} of one episode
                window = torch.from_numpy(np.stack([past[0][env], now[0][env], now[2][env]]))
                z.append(idm(window[None])[0].detach())
                taken.append(now[1][env])
    assert len(z) == 2 * (3 * 8 - 1 - 2) and len(fits) == 3  # one episode of 20 ends: two windows
    torch.testing.assert_close(fits[-1][0], torch.stack(z).half().float(), atol=2e-3, rtol=1e-2)
    np.testing.assert_allclose(fits[-1][1], np.stack(taken), atol=1e-6)
    assert (abs(np.stack(taken)) == 1).any()  # a std of 2 leaves the bounds
    rewards, dones = (torch.from_numpy(np.stack([x[i] for x in steps[:48]])) for i in (4, 3))
    values = torch.cat([x[1][:-1] for x in estimates])
    torch.testing.assert_close(
        torch.cat([x[0] for x in estimates]), rewards + 0.99 * values * dones
    )
    assert torch.equal(torch.cat([x[2] for x in estimates]), dones) and dones.sum() == 4


def test_online_runs_resume_and_both_methods_share_a_plot(root, tmp_path, monkeypatch, capsys):
    save_state, flags = common.save_state, dict(runs_dir=tmp_path, resume=True)
    (tmp_path / GAME).mkdir()
    for name in ("latent_policy.pt", "latent_dynamics.pt"):
        (tmp_path / GAME / name).symlink_to(root / f"runs/{GAME}/{name}")

    def save_and_stop(*args, **values):
        save_state(*args, **values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "save_state", save_and_stop)
        decode_dmc_online.main(decode_dmc_online.Args(**ONLINE, **flags))
    assert not list(tmp_path.glob("*/decode_online_*.npz"))
    decode_dmc_online.main(decode_dmc_online.Args(**ONLINE, **flags))
    assert "is at step 32" in capsys.readouterr().out
    path = tmp_path / GAME / "decode_online_rl_sl.npz"
    curve = np.load(path)
    assert curve["env_steps"].tolist() == [32, 64, 96] and curve["episodes"].sum() == 2
    assert np.nanmin(curve["returns"]) >= 0 and 0 <= curve["mean_return"] <= STEPS
    state = torch.load(tmp_path / GAME / "decode_online_rl_sl_state.pt")
    # the first two rollouts, and one more of new episodes, without each first frame
    assert len(state["values"]["z_seen"]) == 2 * (16 - 1) + 2 * (8 - 1)
    (tmp_path / GAME / "latent_dynamics.pt").unlink()
    decode_dmc_online.main(decode_dmc_online.Args(**ONLINE, runs_dir=tmp_path, method="rl"))
    assert (tmp_path / GAME / "decode_online_rl.png").exists()
    assert "latent_dynamics.pt is missing" in fails(
        decode_dmc_online.main, decode_dmc_online.Args(**ONLINE, runs_dir=tmp_path)
    )


def test_pictures_and_metrics(root):
    flags = dict(game=GAME, data_dir=root / "data", runs_dir=root / "runs", device="cpu")
    flags |= dict(points=32, projection="pca", supervised_steps=2)
    visualize_dmc.main(visualize_dmc.Args(**flags))
    run = root / f"runs/{GAME}"
    saved = np.load(run / "latents.npz")
    for name in ("probe", "noise_probe", "noise_probe_untrained", "random_probe", "supervised"):
        assert saved[name].shape == (6,) and (saved[name] <= 1).all()
    assert all((run / name).exists() for name in ("latents.png", "film.png", "film.gif"))


def test_what_users_do_wrong_gives_one_line(root, tmp_path, monkeypatch):
    before = read(root, "train")[0]
    assert "--overwrite replaces it" in fails(collect, root)
    assert np.array_equal(before["obs"], read(root, "train")[0]["obs"])
    monkeypatch.setenv("MUJOCO_GL", "no_such_renderer")
    assert "cannot draw here with no_such_renderer" in fails(collect, tmp_path)
    assert not (tmp_path / "data").exists()
    frames = tmp_path / "frames_000.npz"
    frames.write_bytes((root / f"data/{GAME}/train" / frames.name).read_bytes())
    common.save_npz(tmp_path / "labels_000.npz", {}, action=before["action"][:-1])
    assert "for 40 frames" in fails(common.read_actions, frames)
