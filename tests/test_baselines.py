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

GAME, K = "starpilot", 5
SETTINGS = dict(game=GAME, frame_size=16, random_return=1.5, expert_return=67.0)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Two train shards and a test shard, with latents: pixels and z show shard and row."""

    def read_here(paths, sampler=None, **arguments):
        return (common.read_shard(paths[i], **arguments) for i in sampler or range(len(paths)))

    # no worker processes: one forked after a game was played can hang in that game's destructor
    monkeypatch.setattr(common, "read_ahead", read_here)
    rng = np.random.default_rng(0)
    for split, shard in (("train", 0), ("train", 1), ("test", 0)):
        obs = rng.integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)
        obs[:, 0, 0, 0], obs[:, 0, 0, 1], first = shard, np.arange(100), np.arange(100) % 25 == 0
        z = obs[:, 0, 0, :2].astype(np.float16)
        labels = dict(action=rng.integers(0, 15, 100, dtype=np.uint8), reward=np.zeros(100))
        data, run = tmp_path / "data" / GAME / split, tmp_path / "runs" / GAME / split
        common.save_npz(data / f"frames_{shard:03d}.npz", SETTINGS, obs=obs, first=first)
        common.save_npz(data / f"labels_{shard:03d}.npz", SETTINGS, **labels)
        valid, stamp = common.valid_windows(first, 1), dict(dynamics="abc")
        common.save_npz(run / f"latents_{shard:03d}.npz", stamp, z=z, valid=valid)
    return tmp_path


def where(work, runs="runs"):
    return dict(game=GAME, device="cpu", data_dir=work / "data", runs_dir=work / runs)


# --- ILPO -----------------------------------------------------------------------------------------


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
    assert first.item() == pytest.approx(F.mse_loss(again, ilpo.to_input(windows[:, -1:])).item())
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
    assert metrics["histogram"] == " ".join(f"{f:.3f}" for f in frequency)
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


ILPO = dict(multiplier=0.25, fdm_width=4, batch_size=8, latents=K, eval_windows=16, eval_every=2)


def test_ilpo_resumes_exactly(work, monkeypatch):
    ilpo.main(ilpo.Args(**where(work, "whole"), **ILPO, grad_steps=4))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        save_state = common.save_state  # stops after the first one
        patch.setattr(common, "save_state", lambda *args: save_state(*args) or 1 / 0)
        ilpo.main(ilpo.Args(**where(work, "parts"), **ILPO, grad_steps=4))
    ilpo.main(ilpo.Args(**where(work, "parts"), **ILPO, grad_steps=4, resume=True))
    whole, parts = (work / runs / GAME for runs in ("whole", "parts"))
    for name, module in (("latent_policy.pt", "policy"), ("ilpo_generator.pt", "generator")):
        weights = [torch.load(run / name)[module] for run in (whole, parts)]
        assert all(torch.equal(weights[1][key], value) for key, value in weights[0].items())
    assert (whole / "train_ilpo.csv").read_text() == (parts / "train_ilpo.csv").read_text()


def test_ilpo_needs_no_labels_and_its_policy_is_decoded_online(work):
    for path in (work / "data").rglob("labels_*.npz"):
        path.unlink()
    ilpo.main(ilpo.Args(**where(work), **ILPO, context=2, grad_steps=2))
    run = work / "runs" / GAME
    before = torch.load(run / "latent_policy.pt", weights_only=True)
    saved = torch.load(run / "ilpo_generator.pt", weights_only=True)
    assert before["z_dim"] == saved["latents"] == K and before["context"] == saved["context"] == 2
    generator = ilpo.FDM(saved["frame_size"], 2, K, saved["fdm_width"], predict_change=True)
    generator.load_state_dict(saved["generator"])
    assert before["dynamics"] == common.fingerprint(generator)
    ramps = {f"{part}_lr_ramp": (0, 64, 0.25) for part in ("action", "value", "hidden")}
    steps = dict(num_envs=4, rollout_steps=16, env_steps=128, minibatches=2, log_every_steps=64)
    decode_online_ppo.main(decode_online_ppo.Args(**where(work), method="rl", **steps, **ramps))
    after = torch.load(run / "decode_online_rl.pt", weights_only=True)
    assert all(torch.equal(after["latent_policy"][x], w) for x, w in before["policy"].items())
    assert not torch.equal(after["policy"]["hidden.weight"], before["policy"]["hidden.weight"])


# --- label efficiency -----------------------------------------------------------------------------


def squares(count, seed):
    """Frames uint8 [N, 16, 16, 3] and their actions: in which of 15 places a yellow square is."""
    rng = np.random.default_rng(seed)
    obs, action = rng.integers(0, 120, (count, 16, 16, 3), np.uint8), rng.integers(0, 15, count)
    for frame, place in zip(obs, action):
        y, x = 4 * (place // 4), 4 * (place % 4)
        frame[y : y + 4, x : x + 4] = (255, 255, 0)
    return torch.from_numpy(obs), torch.from_numpy(action)


def test_cloning_finds_the_action_with_many_labels_and_soft_ones_and_not_with_a_few():
    obs, actions = squares(1024, seed=1)
    one_hot = F.one_hot(actions, 15).float()
    soft = 0.7 * one_hot + 0.3 * one_hot.roll(1, 1)  # as of a window that leaves two actions open
    torch.manual_seed(0)
    networks = [efficiency.LatentPolicy(16, 0.5, 15) for _ in range(3)]
    labelled = obs[None], actions[None], [8, 1024], 64, "cpu", torch.Generator().manual_seed(0)

    def draw():
        rows = torch.randint(1024, (64,))
        return [*efficiency.draw_labelled(*labelled), (obs[rows], soft[rows])]

    efficiency.train(networks, draw, 100, 3e-3, 0.0, "clone")
    test_obs, test_actions = squares(300, seed=2)
    few, many, of_soft = efficiency.accuracies(networks, test_obs, test_actions.numpy(), "toy")
    assert few < 0.5 and many > 0.95 and of_soft > 0.95, (few, many, of_soft)
    p = networks[2](test_obs).softmax(-1).gather(1, test_actions[:, None]).mean()
    assert p.item() == pytest.approx(0.7, abs=0.1)  # not 1: the mixture is cloned


def test_each_policy_plays_its_own_games(monkeypatch):
    class PaysForActions:
        """Each step is an episode whose return is the action's number."""

        def __init__(self, settings, num_envs, seed):
            self.num_envs, self.finished, self.obs = num_envs, [], np.zeros((num_envs, 16, 16, 3))

        def step(self, actions):
            self.finished += list(enumerate(map(float, actions)))

    def always(action):
        return lambda obs: 100 * F.one_hot(torch.full((len(obs),), action), 15).float()

    monkeypatch.setattr(common, "ProcgenEnvs", PaysForActions)
    args = efficiency.Args(episodes=4, envs_per_decoder=2)
    policies = [always(action) for action in (5, 0, 9)]
    returns = efficiency.play(policies, SETTINGS, args, torch.device("cpu"))
    assert returns.tolist() == [5, 0, 9]


def test_labels_of_drawn_frames(work):
    """The pixels show shard and row; with one shard in memory at a time and with both."""

    def open_store(pool_frames=1000):
        where = work / "data" / GAME / "train", GAME, 1, pool_frames, 1, torch.device("cpu")
        latents_dir = work / "runs" / GAME / "train"
        return common.FrameStore(*where, latents_dir=latents_dir, dynamics="abc")

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
    actions = {path: common.read_actions(path, GAME) for path in store.paths}
    of_shard = list(actions.values())
    for store in (store, open_store(pool_frames=100)):
        batches = [efficiency.draw_true_labels(store, actions, 2, 8) for _ in range(20)]
        for obs, target in sum(batches, []):
            places = obs[:, 0, 0, :2].tolist()
            assert target.tolist() == [of_shard[shard][row] for shard, row in places]
        assert {obs[0, 0, 0, 0].item() for (obs, _), _ in batches} == {0, 1}


def test_same_rows_as_decode_offline_and_arrays_survive(work, monkeypatch):
    run, policy = work / "runs" / GAME, efficiency.LatentPolicy(16, 0.25, 2)
    common.save_checkpoint(
        run / "latent_policy.pt", kind="latent_policy", game=GAME, settings=SETTINGS, z_dim=2,
        frame_size=16, context=1, multiplier=0.25, dynamics="abc", policy=policy.state_dict(),
    )  # fmt: skip
    flags = dict(labels=(4, 16), decoder_seeds=2, episodes=2, envs_per_decoder=2, decoder_steps=2)
    fits, draws, real_train = [], [], efficiency.train

    def fit(decoder, z, actions, args, generator):
        fits.append((z, actions, generator.get_state()))

    def train(networks, draw, *rest):
        draws.append(draw())
        real_train(networks, draw, *rest)

    # decode_offline.py without playing, then the other methods
    with monkeypatch.context() as patch:
        patch.setattr(common, "evaluate", lambda envs, act, n: np.ones((envs.num_envs, n)))
        patch.setattr(decode_offline, "fit_decoder", fit)
        decode_offline.main(decode_offline.Args(**where(work), **flags))
    results = [dict(np.load(run / "decode_offline.npz"))]
    monkeypatch.setattr(efficiency, "fit_decoder", fit)
    monkeypatch.setattr(efficiency, "train", train)
    judged, accuracies = [], efficiency.accuracies
    monkeypatch.setattr(efficiency, "accuracies", lambda *x: judged.append(x[1]) or accuracies(*x))
    flags |= dict(**where(work), labelled_steps=2, clone_steps=2, clone_batch_size=8)
    for methods in (("vpt", "lapo_plus"), ("bc", "bc_all")):
        efficiency.main(efficiency.Args(**flags, methods=methods))
        results.append(dict(np.load(run / "decode_offline.npz")))

    obs = common.read_frames(work / "data" / GAME / "test/frames_000.npz", GAME)[0]
    held_out = {frame.tobytes() for frame in obs}
    frames = [x[:, 1] if x.ndim == 5 else x for x in judged if x.dtype == torch.uint8]
    assert len(frames) >= 4 and all(y.numpy().tobytes() in held_out for x in frames for y in x)
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
    for name in ("returns", "policy_accuracy"):
        shapes = [results[2][f"{name}_{method}"].shape for method in efficiency.Args.methods]
        assert shapes == [(2, 2), (2, 2), (2, 2), (2,)]
    with pytest.raises(SystemExit, match=r"^error: --labels is \(4,\), but .* has \(4, 16\)$"):
        efficiency.main(efficiency.Args(**flags | dict(labels=(4,))))
    # the same chain on an untrained IDM is set beside them
    flags["untrained_dir"] = work / "untrained"
    control, returns = work / "untrained" / GAME / "decode_offline.npz", np.array([[1.0], [2.0]])
    common.save_npz(control, {}, labels=np.array([4, 16]), returns=returns)
    efficiency.main(efficiency.Args(**flags, methods=("bc",)))
    assert np.array_equal(np.load(run / "decode_offline.npz")["returns_untrained"], returns)
    common.save_npz(control, {}, labels=np.array([4, 8]), returns=returns)
    with pytest.raises(SystemExit, match=r"^error: --labels is \(4, 16\), but .* has \[4 8\]$"):
        efficiency.main(efficiency.Args(**flags, methods=("bc",)))
