"""Stages 2 and 3: the latent policy, and its decoding offline and online."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PaysForActions, ToyGames, args_of, check_rollouts, fails, load, run
import common
import decode_offline as offline
import decode_online_ppo as online
import train_latent_bc as stage2
import train_latent_dynamics as stage1


def test_the_policy_imitates_the_latent_of_its_own_frame(root, record_calls):
    """Each frame is given a latent that shows its own checksum."""

    def latent_of(frame):
        return float(frame.astype(int).sum() % 2000)

    for path in root.glob("runs/maze/t*/latents_*.npz"):
        latents, frames = load(path), path.name.replace("latents", "frames")
        obs = load(root / "data/maze" / path.parent.name / frames)["obs"]
        latents["z"] = np.array([[latent_of(frame)] * 128 for frame in obs], np.float16)
        common.save_npz(path, **latents)
    losses, evaluations = (record_calls(stage2, name) for name in ("imitation_loss", "evaluate"))
    run(stage2, root)
    pairs = [call[1:3] for call in losses + evaluations]
    assert [len(obs) for obs, _ in pairs] == [8] * 4 + [4096] * 2
    for obs, z in pairs:
        assert [latent_of(frame.numpy()) for frame in obs] == z[:, 0].tolist()


def test_variance_explained_by_hand():
    class Constant(torch.nn.Module):
        def forward(self, obs):
            return torch.full((len(obs), 2), 1.0)

    z = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    metrics = stage2.evaluate(Constant(), torch.zeros(2, 16, 16, 3, dtype=torch.uint8), z)
    assert metrics["test_mse"] == (1 + 1 + 1 + 9) / 4
    assert metrics["variance_explained"] == pytest.approx(1 - 3 / ((1 + 4) / 2))


def test_stages_1_and_2_decay_their_weights(root, record_calls):
    """AdamW with 0.01, as in the official code."""
    optimizers = record_calls(torch.optim.AdamW, "step")
    for script in (stage1, stage2):
        run(script, root, grad_steps=1)
    assert [optimizer.defaults["weight_decay"] for (optimizer,) in optimizers] == [0.01, 0.01]


def test_standardized_latents_have_the_loss_of_their_own_scale(root):
    run(stage2, root, grad_steps=1, standardize=True)
    saved = load(root / "runs/maze/latent_policy.pt")["policy"]
    shards = [load(path) for path in sorted(root.glob("runs/maze/train/latents_*.npz"))]
    z = torch.from_numpy(np.concatenate([x["z"][x["valid"]] for x in shards])).float()
    torch.testing.assert_close(saved["mean"], z.mean(0))
    torch.testing.assert_close(saved["std"], z.std(0) + 1e-6)
    policy = stage2.LatentPolicy(16, 0.25, 128)
    policy.load_state_dict(saved)
    obs = torch.randint(256, (9, 16, 16, 3), dtype=torch.uint8)
    raw = policy.head(F.relu(policy.hidden(policy.features(obs))))
    expected = (raw - (z[:9] - saved["mean"]) / saved["std"]).pow(2).mean()
    torch.testing.assert_close(stage2.imitation_loss(policy, obs, z[:9]), expected)


def test_a_stage_that_comes_too_early_or_from_another_run(root):
    dynamics, policy = (root / f"runs/maze/latent_{name}.pt" for name in ("dynamics", "policy"))
    common.save_checkpoint(dynamics, **load(dynamics) | dict(dynamics_id="other"))
    assert "another run of stage 1" in fails(run, stage2, root)
    assert "another run of stage 1 than latent_policy.pt" in fails(run, online, root)
    policy.unlink(), dynamics.unlink()
    for script in (offline, online):
        assert "train_latent_bc.py" in fails(run, script, root)
    assert "train_latent_dynamics.py" in fails(run, stage2, root)


def decode(root, monkeypatch, **flags):
    monkeypatch.setattr(common, "ProcgenEnvs", PaysForActions)
    run(offline, root, **flags)
    return load(root / "runs/maze/decode_offline.npz")


def test_each_decoder_plays_its_own_games(root, monkeypatch, capsys):
    made = []

    def fit(decoder, *rest):  # decoder d always plays action d
        torch.nn.init.zeros_(decoder.layers[-1].weight)
        decoder.layers[-1].bias.data = 100 * F.one_hot(torch.tensor(len(made)), 15).float()
        made.append(decoder)

    monkeypatch.setattr(offline, "fit_decoder", fit)
    assert decode(root, monkeypatch)["returns"].tolist() == [[0, 1], [2, 3]]
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "+-" in line]
    table = [(row[0], row[1], row[4]) for row in rows]  # labels, mean return, normalized
    assert table == [("4", "0.50", "0.05"), ("16", "2.50", "0.25")]
    assert (root / "runs/maze/decode_offline.png").read_bytes()[:4] == b"\x89PNG"
    assert "224 labelled rows" in fails(decode, root, monkeypatch, labels=(5000,))
    assert "--labels 0" in fails(decode, root, monkeypatch, labels=(0, 4))
    assert "not one of Procgen's" in fails(run, offline, root, game="mygame")
    for path in root.glob("data/maze/test/labels_*.npz"):
        path.unlink()
    assert "lack labels" in fails(decode, root, monkeypatch)


def test_decoders_are_fitted_on_n_training_rows_and_judged_on_held_out_ones(
    root, monkeypatch, record_calls
):
    for split, action in (("train", 7), ("test", 2)):  # all labels of a split become the same
        for path in root.glob(f"data/maze/{split}/labels_*.npz"):
            labels = load(path)
            labels["action"][:] = action
            common.save_npz(path, **labels)
    fits = record_calls(offline, "fit_decoder")
    result = decode(root, monkeypatch, decoder_steps=60)
    assert [len(z) for _, z, *_ in fits] == [4, 4, 16, 16]
    rows = [{tuple(x.tolist()) for x in z} for _, z, *_ in fits]
    assert rows[0] <= rows[2] and rows[1] <= rows[3] and rows[0] != rows[1]
    assert (result["accuracy"] == 0).all() and (result["policy_accuracy"] == 0).all()
    assert (result["returns"] > 6).all() and result["blind_return"] == 7  # 7 is what training shows


def test_labels_belong_to_their_latents(root):
    """The action at frame i goes with z_i; rows without a window have neither."""
    dynamics = load(root / "runs/maze/latent_policy.pt")["dynamics_id"]
    args = offline.Args("maze", data_dir=root / "data", runs_dir=root / "runs", labels=(4,))
    _, z, actions = offline.load_labelled(args, 1, torch.device("cpu"), dynamics)
    expected = []
    for shard in ("000.npz", "001.npz"):
        first = load(root / f"data/maze/train/frames_{shard}")["first"]
        action = load(root / f"data/maze/train/labels_{shard}")["action"]
        latents = load(root / f"runs/maze/train/latents_{shard}")["z"]
        inside = [i for i in range(1, len(first) - 1) if not first[i] and not first[i + 1]]
        expected += [[*latents[i], action[i]] for i in inside]
    assert torch.cat([z, actions[:, None]], 1).tolist() == np.array(expected, float).tolist()


def test_the_decoder_is_refitted_at_the_official_codes_steps(monkeypatch):
    args = online.Args()
    decoder = online.OnlineDecoder(None, 8, args, torch.device("cpu"))
    labelled = (torch.ones(2, 8), torch.tensor([0, 3]))
    monkeypatch.setattr(online, "label_transitions", lambda *_: labelled)
    fits = []  # (update, transitions)
    monkeypatch.setattr(online, "fit_decoder", lambda _, z, *__: fits.append((update, len(z))))
    assert torch.equal(decoder(torch.randn(4, 8)), torch.zeros(4, 15))  # uniform before the first
    for update in range(1, 121):
        decoder.learn(update * 4096, dict(frames=None, first=None, actions=None), None)
    due = [*range(3, 13), 20, 40, 60, 80]  # 12,288 to 327,680 steps
    assert fits == [(update, 2 * update) for update in due]
    assert np.isnan(decoder.accuracy)  # not measured any more


def test_learning_rates_by_hand():
    args = online.Args()
    steps = (0, 35_000, 42_500, 50_000, 2_025_000, 4_000_000)
    rates = [online.learning_rate(x, args.action_lr_ramp, 0.01, args.env_steps) for x in steps]
    np.testing.assert_allclose(rates, [0, 0, 0.00125, 0.0025, 0.00125, 0], atol=1e-12)


def test_logits_are_the_mean_of_both_heads():
    features, decoded, layer = torch.randn(3, 24), torch.randn(3, 15), torch.nn.Linear(24, 256)
    policy = online.OnlinePolicy(layer, with_decoder=True)
    assert policy.hidden is not layer and torch.equal(policy.hidden.weight, layer.weight)
    torch.testing.assert_close(policy(features, decoded)[0], decoded / 2)  # the head starts silent
    policy.action_head.weight.data.normal_()
    by_hand = torch.relu(features @ layer.weight.T + layer.bias) @ policy.action_head.weight.T
    logits, value = policy(features, decoded)
    torch.testing.assert_close(logits, (by_hand + decoded) / 2)
    assert value.shape == (3,)
    policy.with_decoder = False
    torch.testing.assert_close(policy(features, decoded)[0], by_hand)


def test_the_decoder_learns_a_known_code():
    generator, decoder = torch.Generator().manual_seed(0), online.ActionDecoder(16)
    actions = torch.randint(15, (6000,), generator=generator)
    noise = 0.1 * torch.randn(6000, 16, generator=generator)
    z = F.one_hot(actions, 16) * 3.0 + 50 + noise  # far from 0: standardized

    def accuracy_after_fit(epochs):
        args = online.Args(refit_batch_size=128)
        args.refit_epochs = epochs
        online.fit_decoder(decoder, z[:5000].half(), actions[:5000], args, generator)
        return (decoder(z[5000:]).argmax(1) == actions[5000:]).float().mean()

    assert accuracy_after_fit(epochs=10) > 0.95
    assert accuracy_after_fit(epochs=0) < 0.3  # every fit starts from new weights


class TellingIDM(torch.nn.Module):
    """z: episode, step and game of each frame of a window, and the action that led to its last."""

    def __init__(self, **sizes):
        super().__init__()
        self.unused = torch.nn.Linear(1, 1)

    def load_state_dict(self, weights):
        pass

    def forward(self, windows):
        shown = [windows[:, :, 0, 0, 0], windows[:, :, 0, 0, 1], windows[:, :, 0, 1, 0]]
        z = torch.cat([*shown, windows[:, -1:, 0, 0, 2]], 1).float()
        return F.pad(z, (0, 128 - z.shape[1]))


def lr_ramps(*ramp):
    return {f"{part}_lr_ramp": ramp for part in ("action", "value", "hidden")}


def test_every_transition_reaches_the_decoder_once_with_its_action(
    root, toy_games, record_calls, monkeypatch
):
    monkeypatch.setattr(online, "IDM", TellingIDM)
    fits = record_calls(online, "fit_decoder")
    steps = dict(env_steps=8 * 48, refit_start=8 * 32, refit_dense_until=8 * 32, refit_stop=8 * 32)
    run(online, root, **steps, **lr_ramps(0, 16, 0.1), log_every_steps=128)
    ((_, z, actions, *_),) = fits  # after 32 of 48 steps of each game, and then no more
    episode, step, env, last_action = z[:, :10].long().split([3, 3, 3, 1], 1)
    assert torch.equal(last_action[:, 0], actions)  # the action at o_t is what led to o_{t+1}
    assert (episode == episode[:, :1]).all() and (env == env[:, :1]).all()
    assert (step == step[:, :1] + torch.arange(3)).all()
    expected = {
        (e, i // (5 + e), i % (5 + e))
        for e in range(8) for i in range(32) if 1 <= i % (5 + e) < 4 + e
    }  # fmt: skip
    seen = list(zip(env[:, 1].tolist(), episode[:, 1].tolist(), step[:, 1].tolist()))
    assert len(seen) == len(set(seen)) and set(seen) == expected

    curve = load(root / "runs/maze/decode_online_rl_sl.npz")
    assert curve["env_steps"].tolist() == [128, 256, 384]


def test_rewards_meet_their_dones_and_parts_their_learning_rates(
    root, toy_games, record_calls, monkeypatch
):
    gae = record_calls(online, "compute_gae")
    normalized = record_calls(common.RewardNormalizer, "__call__")
    rates, adam = [], torch.optim.Adam
    parts = {(15, 256): "action", (1, 256): "value"}

    class Adam(adam):
        def step(self):
            if len(self.param_groups) == 3:  # not the decoder's
                assert self.defaults["eps"] == 1e-8  # official code
                shapes = [tuple(group["params"][0].shape) for group in self.param_groups]
                names = [parts.get(shape, "hidden") for shape in shapes]
                rates.append(dict(zip(names, [group["lr"] for group in self.param_groups])))
            return super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    run(online, root)
    check_rollouts(gae, normalized, toy_games[0].log)
    args = args_of(online, root)
    assert len(rates) == 16 * 3 * 4
    for i, found in enumerate(rates):
        before = i // 12 * 128  # the step before the rollout
        for part, rate in found.items():
            ramp = getattr(args, f"{part}_lr_ramp")
            assert rate == pytest.approx(online.learning_rate(before, ramp, 0.01, 2048))
        assert found.keys() == {"action", "value", "hidden"}
    rows = list(csv.DictReader((root / "runs/maze/decode_online_rl_sl.csv").open()))
    assert [row["env_step"] for row in rows] == ["1024", "2048"]
    assert 0 <= float(rows[0]["decoder_accuracy"]) <= 1
    assert rows[1]["decoder_accuracy"] == "nan"  # after the last refit no transition is labelled


@pytest.mark.parametrize("context", [0, 1, 2])
def test_transitions_are_labelled_within_episodes_against_a_naive_loop(context):
    torch.manual_seed(0)
    T, B = 5, 3
    frames = torch.randint(256, (context + T + 1, B, 2, 2, 3), dtype=torch.uint8)
    first = torch.rand(context + T + 1, B) < 0.3
    actions = torch.arange(T * B).reshape(T, B)
    naive = []
    for t in range(T):
        for env in range(B):
            if not first[t + 1 : t + context + 2, env].any():
                naive.append((frames[t : t + context + 2, env].flatten(), actions[t, env]))
    z, labels = online.label_transitions(lambda windows: windows.flatten(1), frames, first, actions)
    assert len(z) == len(naive) > 0
    for row, (window, action) in enumerate(naive):
        assert (z[row] == window).all() and labels[row] == action


def test_without_context_stages_1_to_3_work_on_pairs_of_frames(root, toy_games):
    flags = dict(runs_dir=root / "pairs")
    run(stage1, root, context=0, **flags)
    run(stage2, root, **flags)
    run(online, root, **flags)
    run(offline, root, **flags)
    saved = load(root / "pairs/maze/latent_dynamics.pt")
    z_dim = saved["config"]["idm"]["z_dim"]
    assert saved["idm"]["cnn.0.weight"].shape[1] == 6  # o_t, o_{t+1}
    assert saved["fdm"]["first_conv.weight"].shape[1] == 3 + z_dim  # o_t
    assert load(root / "pairs/maze/decode_online_rl_sl.npz")["env_steps"][-1] == 2048


def test_ppo_finds_the_good_action_of_each_frame(root, toy_games):
    path = root / "runs/maze/latent_policy.pt"
    checkpoint = load(path)
    checkpoint["policy"]["hidden.weight"] *= 30  # random features hardly separate bright from dark
    common.save_checkpoint(path, **checkpoint)
    run(online, root, env_steps=6144, entropy_coef=0.02, method="rl", eval_episodes=8)
    returns = load(root / "runs/maze/decode_online_rl.npz")["eval_returns"].mean(1)
    assert returns[0] < 5 and returns[-1] > 7  # of 8.5; the same action always: about 4.2
    after, before = load(root / "runs/maze/decode_online_rl.pt"), checkpoint["policy"]
    for name, weight in before.items():
        assert torch.equal(after["latent_policy"][name], weight)  # frozen
    assert not torch.equal(after["policy"]["hidden.weight"], before["hidden.weight"])


def test_the_decoder_alone_steers(root, toy_games, monkeypatch):
    """A policy that always predicts the latent of action 7 plays 7 once the decoder is fitted."""

    class CodeOfAction(TellingIDM):
        def forward(self, windows):
            return F.one_hot(windows[:, -1, 0, 0, 2].long(), 128).float()

    monkeypatch.setattr(online, "IDM", CodeOfAction)
    monkeypatch.setattr(ToyGames, "good", lambda self, actions: actions == 7)
    path = root / "runs/maze/latent_policy.pt"
    checkpoint = load(path)
    checkpoint["policy"]["head.weight"] *= 0
    checkpoint["policy"]["head.bias"] = F.one_hot(torch.tensor(7), 128).float()
    common.save_checkpoint(path, **checkpoint)
    refit = dict(refit_start=1024, refit_dense_until=1024, refit_stop=1024, refit_epochs=20)
    run(online, root, **lr_ramps(2040, 2047, 0.1), **refit, eval_episodes=8, log_every_steps=512)
    returns = load(root / "runs/maze/decode_online_rl_sl.npz")["eval_returns"].mean(1)
    # the silent head halves the logits: 0.95 becomes about 0.5
    assert returns[0] < 1 and returns[1:].min() > 3
