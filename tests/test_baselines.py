"""The baselines: ILPO's losses and files, and other uses of the labels of decode_offline.py."""

import baselines.label_efficiency as efficiency
import baselines.supervised_idm as supervised
import baselines.train_ilpo as ilpo
import common
import decode_offline
import decode_online_ppo
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, PaysForActions, args_of, fails, load, run, write_toy_data
from filelock import FileLock

GAME = "starpilot"
K = 5  # ILPO's latents
CPU = torch.device("cpu")
RECORDING = dict(game=GAME, frame_size=16, random_return=1.5, expert_return=67.0)


@pytest.fixture
def work(tmp_path):
    """Two train shards and a test shard, with latents: pixels and z show shard and row. A latent
    policy of these latents.
    """
    rng = np.random.default_rng(0)
    first = np.arange(100) % 25 == 0
    run_dir = tmp_path / "runs" / GAME
    for split, shard in (("train", 0), ("train", 1), ("test", 0)):
        obs = rng.integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)
        obs[:, 0, 0, 0] = shard
        obs[:, 0, 0, 1] = np.arange(100)
        action = rng.integers(0, 15, 100, dtype=np.uint8)
        frames_path = tmp_path / "data" / GAME / split / f"frames_{shard:03d}.npz"
        labels_path = common.labels_path(frames_path)
        common.save_npz(frames_path, RECORDING, obs=obs, first=first)
        common.save_npz(labels_path, RECORDING, action=action, reward=np.zeros(100))
        source = dict(dynamics_id="abc", frames_id=common.frames_id([frames_path]))
        z = obs[:, 0, 0, :2].astype(np.float16)
        valid = common.valid_windows(first, 1)
        common.save_npz(run_dir / split / f"latents_{shard:03d}.npz", source, z=z, valid=valid)
    torch.manual_seed(0)
    config = dict(frame_size=16, multiplier=0.25, z_dim=2)
    common.save_checkpoint(
        run_dir / "latent_policy.pt",
        kind="latent_policy",
        game=GAME,
        recording=RECORDING,
        context=1,
        config=config,
        dynamics_id="abc",
        policy=decode_offline.LatentPolicy(**config).state_dict(),
    )
    return tmp_path


# --- ILPO -----------------------------------------------------------------------------------------


def ilpo_networks(context=1):
    torch.manual_seed(0)
    policy = ilpo.LatentPolicy(16, 0.25, K)
    generator = ilpo.FDM(16, context, K, 4, predict_change=True)
    torch.nn.init.normal_(generator.last[-1].weight)  # a new one predicts no change for all z
    torch.nn.init.normal_(policy.head.weight)
    brightness = torch.rand(6, context + 2, 1, 1, 1)  # so that pi depends on the frame
    noise = torch.randint(256, (6, context + 2, 16, 16, 3))
    return policy, generator, (brightness * noise).byte()


@torch.no_grad()
def naive_results(policy, generator, window):
    """Of one window (1, k + 2, S, S, 3), in terms of changes, which Edwards et al.'s generator
    predicts: the mse of each latent [K], of the mean change and of no change, and pi [K].
    """
    o_t = window[0, -2].permute(2, 0, 1) / 255
    o_next = window[0, -1].permute(2, 0, 1) / 255
    change = o_next - o_t
    predicted = []
    for z in torch.eye(K).split(1):
        next_frame = generator(window[:, :-1], z)[0] + 0.5
        predicted.append(next_frame - o_t)
    pi = policy(window[:, -2]).softmax(-1)[0]
    mean_change = sum(p * x for p, x in zip(pi, predicted))
    return dict(
        mse=[((change - x) ** 2).mean().item() for x in predicted],
        mean_mse=((change - mean_change) ** 2).mean().item(),
        copy_mse=(change**2).mean().item(),
        pi=pi.numpy(),
    )


@pytest.mark.parametrize("context", [1, 2])
def test_losses_and_metrics_equal_a_naive_loop(context):
    policy, generator, windows = ilpo_networks(context)
    generator.eval()
    naive = [naive_results(policy, generator, window) for window in windows.split(1)]
    nearest = [int(np.argmin(x["mse"])) for x in naive]
    mean_mse = np.mean([x["mean_mse"] for x in naive])
    assert ilpo.nearest_latents(generator, windows, K, batch_size=4).tolist() == nearest

    loss, nearest_mse, policy_mse = ilpo.ilpo_loss(policy, generator, windows, K)
    assert policy_mse.item() == pytest.approx(mean_mse, rel=1e-4)
    prediction = generator(windows[:, :-1], F.one_hot(torch.tensor(nearest), K).float())
    expected = F.mse_loss(prediction, common.to_input(windows[:, -1:]))
    assert nearest_mse.item() == pytest.approx(expected.item())
    assert loss == nearest_mse + policy_mse
    assert all(module.training for module in generator.modules())

    policy, generator, _ = ilpo_networks(context)  # batch norm has moved
    actions = np.array([3, 3, 7, 7, 3, 7])
    metrics = ilpo.evaluate(policy, generator, windows, windows, actions, K, batch_size=4)
    assert all(module.training for module in generator.modules())
    pi = np.array([x["pi"] for x in naive])
    mean_pi = pi.mean(0)
    frequencies = np.bincount(nearest, minlength=K) / 6
    expected = dict(
        test_mse=np.mean([min(x["mse"]) for x in naive]),
        test_mean_mse=mean_mse,
        copy_mse=np.mean([x["copy_mse"] for x in naive]),
        policy_entropy=-(pi * np.log(pi)).sum(1).mean(),
        policy_perplexity=np.exp(-(mean_pi * np.log(mean_pi)).sum()),
        perplexity=np.prod([f**-f for f in frequencies if f]),
    )
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name
    assert metrics["histogram"] == " ".join(f"{f:.3f}" for f in frequencies)
    z = np.array(nearest)
    scores = ilpo.map_accuracy(z[:4], actions[:4], z[4:], actions[4:], K)
    assert (metrics["map_accuracy"], metrics["majority"]) == scores


def test_each_loss_trains_its_own_network():
    policy, generator, windows = ilpo_networks()
    _, nearest_mse, mean_mse = ilpo.ilpo_loss(policy, generator, windows, K)
    chosen = ilpo.nearest_latents(generator.eval(), windows, K).unique()
    assert 0 < len(chosen) < K
    mean_mse.backward()
    assert all(weight.grad is None for weight in generator.parameters())
    assert all(weight.grad.abs().sum() > 0 for weight in policy.parameters())
    policy.zero_grad()
    nearest_mse.backward()
    assert all(weight.grad is None for weight in policy.parameters())
    # the first convolution's last K channels are z's: only chosen latents have a gradient
    of_z = generator.first_conv.weight.grad[:, -K:].abs().sum((0, 2, 3))
    assert of_z.nonzero()[:, 0].tolist() == chosen.tolist()


def test_map_accuracy_by_hand():
    z = np.array([0, 0, 0, 1, 1, 2, 2])
    actions = np.array([7, 7, 3, 3, 3, 7, 7])
    test_z = np.array([0, 1, 2, 3, 1])  # 3 is new: the majority, 7
    test_actions = np.array([7, 3, 3, 7, 7])
    assert ilpo.map_accuracy(z, actions, test_z, test_actions, 4) == (3 / 5, 3 / 5)


def test_ilpo_needs_no_labels_and_its_policy_is_decoded_online(work):
    for path in (work / "data").rglob("labels_*.npz"):
        path.unlink()
    run_dir = work / "runs" / GAME
    common.save_checkpoint(run_dir / "latent_dynamics.pt")
    assert "would replace; see --runs-dir" in fails(run, ilpo, work, game=GAME)
    (run_dir / "latent_dynamics.pt").unlink()
    assert "no choice of a latent" in fails(run, ilpo, work, game=GAME, latents=1)
    run(ilpo, work, game=GAME, context=2, grad_steps=2)
    saved = load(run_dir / "latent_policy.pt")
    assert saved["config"] == dict(frame_size=16, multiplier=0.25, z_dim=K)
    assert saved["context"] == 2
    assert saved["recording"] == RECORDING | dict(num_levels=0)
    run(decode_online_ppo, work, game=GAME, method="rl", env_steps=1280)
    after = load(run_dir / "decode_online_rl.pt")["latent_policy"]
    assert all(torch.equal(after[name], weight) for name, weight in saved["policy"].items())


def test_ilpo_does_not_resume_on_other_frames_and_locks_its_policy(work):
    path = work / "runs" / GAME / "latent_policy.pt"
    with FileLock(path.with_name(".latent_policy.pt.lock")):
        assert "another run is writing" in fails(run, ilpo, work, game=GAME)
    run(ilpo, work, game=GAME)
    trained = path.read_bytes()
    run(ilpo, work, game=GAME, resume=True)
    assert path.read_bytes() == trained
    frames_path = work / "data" / GAME / "train/frames_001.npz"
    frames = load(frames_path)
    frames["obs"][7] += 1
    common.save_npz(frames_path, **frames)
    assert "other frames" in fails(run, ilpo, work, game=GAME, resume=True)


# --- label efficiency -----------------------------------------------------------------------------


def efficiency_args(work, **flags):
    tiny = TINY["decode_offline"] | dict(labelled_steps=2, clone_steps=2, clone_batch_size=8)
    return args_of(efficiency, work, **tiny | dict(game=GAME) | flags)


def load_policy(work):
    return common.load_checkpoint(work / "runs" / GAME / "latent_policy.pt", "latent_policy", GAME)


def shown(frames):
    """The shard and row that frames (B, S, S, 3) show: [B] of (shard, row)."""
    return [tuple(place) for place in frames[:, 0, 0, :2].tolist()]


def true_actions(work, split):
    """{(shard, row): action}"""
    found = {}
    for path in sorted((work / "data" / GAME / split).glob("labels_*.npz")):
        for row, action in enumerate(load(path)["action"].tolist()):
            found[int(path.stem[-3:]), row] = action
    return found


def load_labelled(work):
    """All labelled rows, as decode_offline.py loads them."""
    return decode_offline.load_labelled(efficiency_args(work), 1, CPU, "abc")


@pytest.fixture
def fake_train(monkeypatch):
    """In place of training: records (networks, minibatches, steps, label smoothing) by description,
    first weights included; network d gives action d, whatever it sees.
    """
    calls = {}

    def train(networks, draw, steps, lr, label_smoothing, description):
        calls[description] = dict(
            weights=[network.head.weight.detach().clone() for network in networks],
            minibatches=[draw() for _ in range(20)],
            steps=steps,
            label_smoothing=label_smoothing,
        )
        for d, network in enumerate(networks):
            torch.nn.init.zeros_(network.head.weight)
            network.head.bias.data = 100 * F.one_hot(torch.tensor(d), 15).float()

    monkeypatch.setattr(efficiency, "train", train)
    return calls


def new_policies(count):
    sizes = dict(frame_size=16, multiplier=0.25, z_dim=15)
    return efficiency.new_networks(efficiency.LatentPolicy, count, CPU, **sizes)


def new_idms(count):
    sizes = dict(frame_size=16, context=1, multiplier=0.25, z_dim=15)
    return efficiency.new_networks(efficiency.IDM, count, CPU, **sizes)


def test_training_fits_each_network_to_its_own_hard_or_soft_labels():
    x = torch.eye(15)
    actions = torch.arange(15)
    soft = 0.7 * x + 0.3 * x.roll(1, 1)  # as of windows that leave two actions open
    networks = [torch.nn.Linear(15, 15) for _ in range(2)]
    efficiency.train(networks, lambda: [(x, actions), (x, soft)], 500, 0.1, 0.0, "toy")
    hard, mixed = (network(x).softmax(-1).diag() for network in networks)
    assert hard.min() > 0.95
    torch.testing.assert_close(mixed, torch.full((15,), 0.7), atol=0.02, rtol=0)
    assert efficiency.accuracies(networks, x, actions, "toy").tolist() == [1, 1]


def test_training_on_labelled_rows_pairs_networks_inputs_and_actions():
    """The labels of network 1 contradict those of network 0."""
    x = torch.eye(15)
    actions = torch.arange(15)
    labelled = [(x, actions), (x, actions.roll(1)), (x[:4], actions[:4])]
    networks = [torch.nn.Linear(15, 15) for _ in labelled]
    args = efficiency.Args(labelled_steps=300, clone_lr=0.1, label_smoothing=0.0)
    efficiency.train_on_labelled(networks, labelled, args, CPU, "toy")
    for network, (inputs, target) in zip(networks, labelled):
        assert torch.equal(network(inputs).argmax(1), target)


def test_labelled_windows_are_of_the_rows_that_decoders_have_labels_of(work):
    train, z, actions = load_labelled(work)
    args = efficiency_args(work)
    labelled = efficiency.load_labelled_windows(train, actions, args)
    labels = true_actions(work, "train")
    order = [(4, 0), (4, 1), (16, 0), (16, 1)]  # as fit_decoders()
    for (count, seed), (windows, target) in zip(order, labelled, strict=True):
        rows = decode_offline.draw_labels(len(z), count, args, seed)
        places = [tuple(place) for place in z[rows].int().tolist()]
        assert {shard for shard, _ in places} == {0, 1}
        assert shown(windows[:, 1]) == places
        assert shown(windows[:, 0]) == [(shard, row - 1) for shard, row in places]
        assert shown(windows[:, 2]) == [(shard, row + 1) for shard, row in places]
        assert target.tolist() == [labels[place] for place in places]


def test_held_out_windows_are_around_the_held_out_frames(work):
    args = efficiency_args(work)
    obs, _, _ = decode_offline.load_held_out(args, 1, CPU, "abc")
    windows = efficiency.load_held_out_windows(load_policy(work), args, CPU)
    assert torch.equal(windows[:, 1], obs)
    assert (windows[:, :, 0, 0, 1].int().diff() == 1).all()


def test_bc_and_the_idms_learn_from_the_labelled_rows(work, fake_train):
    """Network d: minibatches of its own rows, o_t for policies and windows for IDMs."""
    args = efficiency_args(work, labelled_steps=5)
    checkpoint = load_policy(work)
    train, _, actions = load_labelled(work)
    labelled = efficiency.load_labelled_windows(train, actions, args)
    idms = new_idms(4)
    efficiency.train_bc(new_policies(4), labelled, checkpoint, args, CPU)
    efficiency.train_vpt(new_policies(4), idms, labelled, checkpoint, args, CPU)
    for description in ("bc", "vpt's IDMs"):
        call = fake_train[description]
        assert (call["steps"], call["label_smoothing"]) == (5, args.label_smoothing)
        for minibatch in call["minibatches"]:
            for (inputs, target), (windows, own_actions) in zip(minibatch, labelled, strict=True):
                assert len(target) == min(8, len(windows))
                own = dict(zip(shown(windows[:, 1]), own_actions.tolist()))
                places = shown(inputs if description == "bc" else inputs[:, 1])
                assert target.tolist() == [own.get(place) for place in places]
                if description != "bc":
                    assert (inputs[:, :, 0, 0, 1].int().diff() == 1).all()


def test_labellers_label_the_frames_that_their_own_policies_clone(work, fake_train):
    """Labeller d gives action (row + d) % 15 with probability 3/4: the policy gets the same
    probabilities, with the frame of this row.
    """

    def labeller(d, row_of):
        def logits(inputs):
            action = (row_of(inputs).long() + d) % 15
            p = torch.full((len(inputs), 15), 0.25 / 14)
            return p.scatter(1, action[:, None], 0.75).log()

        return logits

    args = efficiency_args(work, clone_steps=3)
    checkpoint = load_policy(work)
    policies = new_policies(2)
    decoders = [labeller(d, lambda z: z[:, 1]) for d in range(2)]
    efficiency.train_lapo_plus(policies, decoders, checkpoint, args, CPU)
    idms = new_idms(2)
    for d, idm in enumerate(idms):
        idm.forward = labeller(d, lambda windows: windows[:, 1, 0, 0, 1])
    efficiency.train_vpt(policies, idms, [], checkpoint, args, CPU)
    for description in ("lapo_plus", "vpt"):
        call = fake_train[description]
        assert (call["steps"], call["label_smoothing"]) == (3, 0)
        for minibatch in call["minibatches"]:
            for d, (obs, target) in enumerate(minibatch):
                p, action = target.max(1)
                torch.testing.assert_close(p, torch.full((8,), 0.75))
                assert action.tolist() == [(row + d) % 15 for _, row in shown(obs)]
    # all methods clone the same frames
    for one, other in zip(fake_train["lapo_plus"]["minibatches"], fake_train["vpt"]["minibatches"]):
        assert torch.equal(one[0][0], other[0][0])


@pytest.mark.parametrize("pool_frames", [1000, 100])
def test_true_labels_are_of_the_frames_in_memory(work, fake_train, pool_frames):
    """With both shards in memory, and with one at a time."""
    args = efficiency_args(work, pool_frames=pool_frames)
    count = efficiency.train_bc_all(new_policies(2), load_policy(work), args, CPU)
    assert count == 200
    labels = true_actions(work, "train")
    seen = set()
    for minibatch in fake_train["bc_all"]["minibatches"]:
        assert len(minibatch) == 2
        for obs, target in minibatch:
            places = shown(obs)
            assert target.tolist() == [labels[place] for place in places]
            seen |= {shard for shard, _ in places}
    assert seen == {0, 1}


def test_each_policy_plays_on_the_frames_of_its_own_games(monkeypatch):
    """Game e shows e. Policy d plays action e + 3 d, which is the return of the episode."""

    class NumberedGames(PaysForActions):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.obs[:, 0, 0, 0] = np.arange(self.num_envs)

    def policy(d):
        return lambda obs: 100 * F.one_hot(obs[:, 0, 0, 0].long() + 3 * d, 15).float()

    monkeypatch.setattr(common, "ProcgenEnvs", NumberedGames)
    args = efficiency.Args(episodes=4, envs_per_decoder=2)
    policies = [policy(d) for d in range(3)]

    def compute_logits(obs):
        return efficiency.compute_own_logits(policies, obs)

    returns = decode_offline.play(compute_logits, 3, RECORDING, args, CPU)
    assert returns.tolist() == [(0 + 1) / 2, (2 + 3) / 2 + 3, (4 + 5) / 2 + 6]


def test_each_method_has_a_file_with_its_networks_in_order(work, fake_train, monkeypatch, capsys):
    """Network d of a method gives action d, so its return is d, and its accuracy the frequency of d
    in the held-out frames.
    """
    monkeypatch.setattr(common, "ProcgenEnvs", PaysForActions)
    args = efficiency_args(work)
    efficiency.main(args)
    test = common.FrameStore(args, "test", 1, CPU)
    places = shown(test.frames_at(test.draw(4096)))
    labels = true_actions(work, "test")
    distinct = common.distinct_actions(GAME)
    held_out = np.array([distinct[labels[place]] for place in places])
    frequencies = [(held_out == distinct[d]).mean() for d in range(4)]
    expected_returns = np.array([[0, 1], [2, 3]])
    expected_accuracy = np.reshape(frequencies, (2, 2))
    for method in ("bc", "vpt", "lapo_plus", "bc_all"):
        found = load(work / "runs" / GAME / f"label_efficiency_{method}.npz")
        rows = 1 if method == "bc_all" else 2
        assert found["labels"].tolist() == ([200] if method == "bc_all" else [4, 16])
        assert np.array_equal(found["returns"], expected_returns[:rows])
        np.testing.assert_allclose(found["policy_accuracy"], expected_accuracy[:rows], atol=1e-6)
        assert ("accuracy" in found) == (method in ("vpt", "lapo_plus"))
        settings = found["settings"]
        assert settings["recording"] == RECORDING
        assert settings["dynamics_id"] == "abc"
        assert settings["args"]["labels"] == [4, 16]
    idms = load(work / "runs" / GAME / "label_efficiency_vpt.npz")["accuracy"]
    np.testing.assert_allclose(idms, expected_accuracy, atol=1e-6)
    # policies of the same number start from the same weights in all methods
    first = fake_train["bc"]["weights"]
    assert not torch.equal(first[0], first[1])
    for method in ("vpt", "lapo_plus", "bc_all"):
        for weight, other in zip(first, fake_train[method]["weights"]):
            assert torch.equal(weight, other)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mean", "return", "with", "N", "labels", "4", "16"] in rows
    assert ["vpt", "0.50", "2.50"] in rows
    assert ["bc_all", "(200", "labels)", "0.50"] in rows
    assert ["mean", "returns:", "expert", "67.00,", "random", "1.50"] in rows


def test_decoders_get_the_rows_and_random_numbers_of_decode_offline(work, monkeypatch):
    """They are judged on the same z_t, too. Neither script touches the other's file."""
    labels = true_actions(work, "test")
    action_of_row = torch.tensor([labels[0, row] for row in range(100)])
    fits = []
    judged = []
    load_held_out = decode_offline.load_held_out

    def fit(decoder, z, actions, args, generator):
        fits.append((decoder.mean, decoder.std, z, actions, generator.get_state()))
        decoder.forward = lambda z: F.one_hot(action_of_row[z[:, 1].long()], 15).float()

    def load_recorded(*arguments):
        judged.append(load_held_out(*arguments))
        return judged[-1]

    monkeypatch.setattr(common, "ProcgenEnvs", PaysForActions)
    monkeypatch.setattr(decode_offline, "fit_decoder", fit)
    for script in (decode_offline, efficiency):
        monkeypatch.setattr(script, "load_held_out", load_recorded)
    run_dir = work / "runs" / GAME
    decode = TINY["decode_offline"] | dict(game=GAME)
    run(decode_offline, work, **decode)
    offline = (run_dir / "decode_offline.npz").read_bytes()
    efficiency.main(efficiency_args(work, methods=("lapo_plus",)))
    assert len(fits) == 8
    for there, here in zip(fits[:4], fits[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(there, here))
    assert all(torch.equal(a, b) for a, b in zip(*judged))
    assert (load(run_dir / "label_efficiency_lapo_plus.npz")["accuracy"] == 1).all()
    assert (run_dir / "decode_offline.npz").read_bytes() == offline
    before = (run_dir / "label_efficiency_lapo_plus.npz").read_bytes()
    run(decode_offline, work, **decode)
    assert (run_dir / "label_efficiency_lapo_plus.npz").read_bytes() == before


def test_all_methods_train_and_the_same_seed_gives_the_same_result(work, monkeypatch):
    monkeypatch.setattr(common, "ProcgenEnvs", PaysForActions)
    paths = [work / "runs" / GAME / f"label_efficiency_{m}.npz" for m in efficiency.Args.methods]
    results = []
    for seed in (1, 1, 2):
        efficiency.main(efficiency_args(work, seed=seed))
        results.append([load(path)["returns"].tolist() for path in paths])
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_impossible_runs_end_before_work(work):
    def error(**flags):
        return fails(lambda: efficiency.main(efficiency_args(work, **flags)))

    assert "--labels 0: 1 is the least" in error(labels=(0, 4))
    assert "--clone-steps 0: 1 is the least" in error(clone_steps=0)
    assert "not one of Procgen's" in error(game="mygame")
    with FileLock(work / "runs" / GAME / ".label_efficiency_vpt.npz.lock"):
        assert "another run is writing" in error(methods=("bc", "vpt"))
    assert "184 labelled rows of " in error(labels=(185,))
    assert list(work.rglob("label_efficiency_*.npz")) == []
    (work / "data" / GAME / "test/labels_000.npz").unlink()
    assert "lack labels_NNN.npz" in error()
    (work / "runs" / GAME / "latent_policy.pt").unlink()
    assert "train_latent_bc.py writes it" in error()


# --- the supervised IDM ---------------------------------------------------------------------------


def last_accuracy(root):
    lines = (root / f"runs/{GAME}/supervised_idm.csv").read_text().splitlines()
    return float(lines[-1].split(",")[-1])


def test_the_supervised_idm_learns_actions_and_fails_on_shuffled_ones(tmp_path):
    root = write_toy_data(tmp_path, GAME, episodes=32)
    flags = dict(game=GAME, multiplier=0.5, grad_steps=250, batch_size=32, lr=3e-3, eval_every=250)
    run(supervised, root, **flags)
    assert last_accuracy(root) > 0.7
    rng = np.random.default_rng(0)
    for path in (root / f"data/{GAME}/train").glob("labels_*.npz"):
        labels = load(path)
        settings = labels.pop("settings")
        common.save_npz(path, settings, **labels | dict(action=rng.permutation(labels["action"])))
    run(supervised, root, **flags)
    assert last_accuracy(root) < 0.4
    for path in (root / f"data/{GAME}/random").glob("labels_*.npz"):
        path.unlink()
    assert f"{GAME} lacks labels" in fails(run, supervised, root, **flags)


def test_the_supervised_idm_is_tested_on_the_windows_of_stage_1s_probe(tmp_path, record_calls):
    root = write_toy_data(tmp_path)
    tested = record_calls(supervised, "accuracy")
    run(supervised, root, multiplier=0.25, grad_steps=1, batch_size=8)
    args = args_of(supervised, root)
    _, windows, actions = supervised.load_evaluation_windows(args, CPU)
    ((_, test_windows, test_actions),) = tested
    quarter = len(windows) // 4  # the probe is fitted on the rest
    assert torch.equal(test_windows, windows[-quarter:])
    assert np.array_equal(test_actions, actions[-quarter:])
