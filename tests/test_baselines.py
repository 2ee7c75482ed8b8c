"""The baselines: ILPO's losses and files, and other uses of the labels of decode_offline.py."""

import baselines.label_efficiency as efficiency
import baselines.train_ilpo as ilpo
import common
import decode_offline
import decode_online_ppo
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, PaysForActions, fails, load, run

GAME, K = "starpilot", 5
SETTINGS = dict(game=GAME, frame_size=16, random_return=1.5, expert_return=67.0)


@pytest.fixture
def work(tmp_path):
    """Two train shards and a test shard, with latents: pixels and z show shard and row."""
    rng = np.random.default_rng(0)
    first = np.arange(100) % 25 == 0
    for split, shard in (("train", 0), ("train", 1), ("test", 0)):
        obs = rng.integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)
        obs[:, 0, 0, 0], obs[:, 0, 0, 1] = shard, np.arange(100)
        labels = dict(action=rng.integers(0, 15, 100, dtype=np.uint8), reward=np.zeros(100))
        latents = dict(z=obs[:, 0, 0, :2].astype(np.float16), valid=common.valid_windows(first, 1))
        data, run_dir = tmp_path / "data" / GAME / split, tmp_path / "runs" / GAME / split
        common.save_npz(data / f"frames_{shard:03d}.npz", SETTINGS, obs=obs, first=first)
        common.save_npz(data / f"labels_{shard:03d}.npz", SETTINGS, **labels)
        common.save_npz(run_dir / f"latents_{shard:03d}.npz", dict(dynamics="abc"), **latents)
    return tmp_path


def ilpo_networks(context=1):
    torch.manual_seed(0)
    policy = ilpo.LatentPolicy(16, 0.25, K)
    generator = ilpo.FDM(16, context, K, 4, predict_change=True)
    torch.nn.init.normal_(generator.last[-1].weight)  # a new one predicts no change for all z
    return policy, generator, torch.randint(256, (6, context + 2, 16, 16, 3), dtype=torch.uint8)


@pytest.mark.parametrize("context", [1, 2])
def test_losses_and_metrics_equal_a_naive_loop(context):
    policy, generator, windows = ilpo_networks(context)
    generator.eval()
    nearest, mse, mean_mse, copy_mse, pis = [], [], [], [], []
    for window in windows.split(1):
        o_t, o_next = (window[0, i].permute(2, 0, 1) / 255 for i in (-2, -1))
        with torch.no_grad():  # Edwards et al.'s generator predicts the change
            changes = [generator(window[:, :-1], z)[0] + 0.5 - o_t for z in torch.eye(K).split(1)]
            pi = policy(window[:, -2]).softmax(-1)[0]
        errors = [((o_next - o_t - change) ** 2).mean().item() for change in changes]
        mean_change = sum(p * change for p, change in zip(pi, changes))
        nearest.append(int(np.argmin(errors)))
        mse.append(min(errors))
        mean_mse.append(((o_next - o_t - mean_change) ** 2).mean().item())
        copy_mse.append(((o_next - o_t) ** 2).mean().item())
        pis.append(pi.numpy())
    assert ilpo.nearest_latents(generator, windows, K, batch_size=4).tolist() == nearest
    loss, first, second = ilpo.ilpo_loss(policy, generator, windows, K)
    assert second.item() == pytest.approx(np.mean(mean_mse), rel=1e-4)
    again = generator(windows[:, :-1], F.one_hot(torch.tensor(nearest), K).float())
    assert first.item() == pytest.approx(F.mse_loss(again, common.to_input(windows[:, -1:])).item())
    assert loss == first + second and all(module.training for module in generator.modules())

    policy, generator, _ = ilpo_networks(context)  # batch norm has moved
    actions = np.array([3, 3, 7, 7, 3, 7])
    metrics = ilpo.evaluate(policy, generator, windows, windows, actions, K, batch_size=4)
    p, mean_p, frequency = np.array(pis), np.mean(pis, 0), np.bincount(nearest, minlength=K) / 6
    expected = dict(
        test_mse=np.mean(mse), test_mean_mse=np.mean(mean_mse), copy_mse=np.mean(copy_mse),
        policy_entropy=-(p * np.log(p)).sum(1).mean(),
        policy_perplexity=np.exp(-(mean_p * np.log(mean_p)).sum()),
        perplexity=np.prod([f**-f for f in frequency if f]),
    )  # fmt: skip
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4), name
    halves = np.array(nearest[:4]), actions[:4], np.array(nearest[4:]), actions[4:]
    assert (metrics["map_accuracy"], metrics["majority"]) == ilpo.map_accuracy(*halves, K)


def test_each_loss_trains_its_own_network():
    policy, generator, windows = ilpo_networks()
    _, nearest_mse, mean_mse = ilpo.ilpo_loss(policy, generator, windows, K)
    chosen = ilpo.nearest_latents(generator.eval(), windows, K).unique()
    assert 0 < len(chosen) < K
    mean_mse.backward()
    assert all(w.grad is None for w in generator.parameters())
    assert all(w.grad.abs().sum() > 0 for w in policy.parameters())
    policy.zero_grad()
    nearest_mse.backward()
    assert all(weight.grad is None for weight in policy.parameters())
    of_z = generator.down[0][0].weight.grad[:, -K:].abs().sum((0, 2, 3))  # z's channels come last
    assert of_z.nonzero()[:, 0].tolist() == chosen.tolist()


def test_map_accuracy_by_hand():
    z, actions = np.array([0, 0, 0, 1, 1, 2, 2]), np.array([7, 7, 3, 3, 3, 7, 7])
    test_z, test_actions = np.array([0, 1, 2, 3, 1]), np.array([7, 3, 3, 7, 7])  # 3 is new: 7
    assert ilpo.map_accuracy(z, actions, test_z, test_actions, 4) == (3 / 5, 3 / 5)


def test_ilpo_needs_no_labels_and_its_policy_is_decoded_online(work):
    for path in (work / "data").rglob("labels_*.npz"):
        path.unlink()
    run_dir = work / "runs" / GAME
    common.save_checkpoint(run_dir / "latent_dynamics.pt")
    assert "would replace; see --runs-dir" in fails(run, ilpo, work, game=GAME)
    (run_dir / "latent_dynamics.pt").unlink()
    run(ilpo, work, game=GAME, context=2, grad_steps=2)
    before = load(run_dir / "latent_policy.pt")
    assert before["z_dim"] == K and before["context"] == 2
    run(decode_online_ppo, work, game=GAME, method="rl", env_steps=1280)
    after = load(run_dir / "decode_online_rl.pt")["latent_policy"]
    assert all(torch.equal(after[name], weight) for name, weight in before["policy"].items())


def test_training_fits_each_network_to_its_own_hard_or_soft_labels():
    x, actions = torch.eye(15), torch.arange(15)
    soft = 0.7 * x + 0.3 * x.roll(1, 1)  # as of windows that leave two actions open
    networks = [torch.nn.Linear(15, 15) for _ in range(2)]
    efficiency.train(networks, lambda: [(x, actions), (x, soft)], 500, 0.1, 0.0, "toy")
    hard, mixed = (network(x).softmax(-1).diag() for network in networks)
    assert hard.min() > 0.95
    torch.testing.assert_close(mixed, torch.full((15,), 0.7), atol=0.02, rtol=0)
    assert efficiency.accuracies(networks, x, actions.numpy(), "toy").tolist() == [1, 1]


def test_each_policy_plays_its_own_games(monkeypatch):
    def always(action):
        return lambda obs: 100 * torch.eye(15)[[action] * len(obs)]

    monkeypatch.setattr(common, "ProcgenEnvs", PaysForActions)
    args = efficiency.Args(episodes=4, envs_per_decoder=2)
    policies = [always(action) for action in (5, 0, 9)]
    returns = efficiency.play(policies, SETTINGS, args, torch.device("cpu"))
    assert returns.tolist() == [5, 0, 9]


def test_labels_of_drawn_frames(work):
    """The pixels show shard and row; with one shard in memory at a time and with both."""

    def open_store(pool_frames=1000):
        args = common.RunArgs(game=GAME, data_dir=work / "data", runs_dir=work / "runs")
        return common.FrameStore(args, "train", 1, torch.device("cpu"), "abc", pool_frames)

    store = open_store()
    rows = store.draw(6)
    for from_z, inputs in ((True, store.z_at(rows)), (False, store.windows_at(rows))):
        weights = torch.randn(2, inputs[0].numel(), 15) / 1000
        networks = [lambda x, w=w: x.flatten(1).float() @ w for w in weights]
        batches = efficiency.draw_soft_labels(open_store(), networks, 6, from_z)
        for (obs, target), network in zip(batches, networks):
            p = network(inputs).exp()
            torch.testing.assert_close(target, p / p.sum(1, keepdim=True))
            assert torch.equal(obs, store.frames_at(rows))
    actions = {path: common.read_actions(path) for path in store.paths}
    of_shard = list(actions.values())
    for store in (store, open_store(pool_frames=100)):
        batches = [efficiency.draw_true_labels(store, actions, 2, 8) for _ in range(20)]
        for obs, target in sum(batches, []):
            places = obs[:, 0, 0, :2].tolist()
            assert target.tolist() == [of_shard[shard][row] for shard, row in places]
        assert {obs[0, 0, 0, 0].item() for (obs, _), _ in batches} == {0, 1}


def test_same_rows_as_decode_offline_and_arrays_survive(work, monkeypatch, record_calls):
    """decode_offline.py without playing, then the other methods beside it."""
    run_dir, policy = work / "runs" / GAME, efficiency.LatentPolicy(16, 0.25, 2)
    common.save_checkpoint(
        run_dir / "latent_policy.pt", kind="latent_policy", game=GAME, settings=SETTINGS, z_dim=2,
        frame_size=16, context=1, multiplier=0.25, dynamics="abc", policy=policy.state_dict(),
    )  # fmt: skip
    monkeypatch.setattr(common, "ProcgenEnvs", PaysForActions)
    fits, draws, real_train = [], [], efficiency.train

    def fit(decoder, z, actions, args, generator):
        fits.append((z, actions, generator.get_state()))

    def train(networks, draw, *rest):
        draws.append(draw())
        real_train(networks, draw, *rest)

    for script in (decode_offline, efficiency):
        monkeypatch.setattr(script, "fit_decoder", fit)
    monkeypatch.setattr(efficiency, "train", train)
    judged = record_calls(efficiency, "accuracies")
    decode = dict(game=GAME) | TINY["decode_offline"]
    run(decode_offline, work, **decode)
    results = [load(run_dir / "decode_offline.npz")]
    flags = decode | dict(labelled_steps=2, clone_steps=2, clone_batch_size=8)
    for methods in (("vpt", "lapo_plus"), ("bc", "bc_all")):
        run(efficiency, work, **flags, methods=methods)
        results.append(load(run_dir / "decode_offline.npz"))

    obs = load(work / "data" / GAME / "test/frames_000.npz")["obs"]
    held_out = {frame.tobytes() for frame in obs}
    inputs = [x[:, 1] if x.ndim == 5 else x for _, x, *_ in judged if x.dtype == torch.uint8]
    assert len(inputs) >= 4 and all(y.numpy().tobytes() in held_out for x in inputs for y in x)
    # decoders get the same latents, labels and random numbers in both scripts
    for there, here in zip(fits[:4], fits[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(there, here))
    # IDMs and bc's policies draw from the same rows: here z and two pixels show shard and row
    for of_idm, of_bc, (z, actions, _) in zip(draws[0], draws[3], fits):
        labels = {(*place, a) for place, a in zip(z.int().tolist(), actions.tolist())}
        for obs, target in ((of_idm[0][:, 1], of_idm[1]), of_bc):
            drawn = zip(*obs[:, 0, 0, :2].T.tolist(), target.tolist())
            assert set(drawn) <= labels and len(target) == min(8, len(z))
        assert (of_idm[0][:, :, 0, 0, 1].diff() == 1).all()  # o_{t-1}, o_t, o_{t+1}
    for before, after in zip(results, results[1:]):  # every array stays, and new ones come
        assert all(np.array_equal(after[x], before[x]) for x in before if x != "settings")
    shapes = [results[2][f"returns_{method}"].shape for method in efficiency.Args.methods]
    assert shapes == [(2, 2), (2, 2), (2, 2), (2,)]
    run(decode_offline, work, **decode)  # another time: what the other methods wrote stays
    again = load(run_dir / "decode_offline.npz")
    assert all(np.array_equal(again[x], results[2][x]) for x in again if x != "settings")
    assert "returns_bc" in again and again["settings"] == results[2]["settings"]
    assert "--labels is (4,), but" in fails(run, efficiency, work, **flags | dict(labels=(4,)))
    assert "not one of Procgen's" in fails(run, efficiency, work, **flags | dict(game="mygame"))
    # the same chain on an untrained IDM is set beside them
    flags |= dict(untrained_dir=work / "untrained", methods=("bc",))
    control, returns = work / "untrained" / GAME / "decode_offline.npz", np.array([[1.0], [2.0]])
    common.save_npz(control, {}, labels=np.array([4, 16]), returns=returns)
    run(efficiency, work, **flags)
    assert np.array_equal(load(run_dir / "decode_offline.npz")["returns_untrained"], returns)
