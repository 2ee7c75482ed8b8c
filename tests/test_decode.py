"""Stages 2 and 3: the latent policy, and its decoding offline and online."""

import csv
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ONLINE, STAGE_1, STAGE_2, fails, folders

import common
import decode_offline as offline
import decode_online_ppo as online
import train_latent_bc as stage2
import train_latent_dynamics as stage1

OFFLINE = dict(
    device="cpu", labels=(4, 16), decoder_seeds=2, decoder_steps=3, episodes=8, envs_per_decoder=2
)


@pytest.fixture
def root(chain, tmp_path):
    """A copy of the toy data and its stages 1 and 2."""
    return shutil.copytree(chain, tmp_path / "chain")


# --- stage 2 --------------------------------------------------------------------------------------


def test_the_policy_imitates_the_latent_of_its_own_frame(root, monkeypatch):
    """Each frame is given a latent that shows its own checksum."""

    def latent_of(frame):
        return float(frame.astype(int).sum() % 2000)

    dynamics = torch.load(root / "runs/maze/latent_dynamics.pt", weights_only=True)["fingerprint"]
    for path in root.glob("data/maze/t*/frames_*.npz"):
        obs, first, _ = common.read_frames(path, "maze")
        z = np.array([[latent_of(frame)] * 128 for frame in obs], np.float16)
        name = root / "runs/maze" / path.parent.name / path.name.replace("frames", "latents")
        valid = common.valid_windows(first, 1)
        common.save_npz(
            name, dict(dynamics=dynamics), z=z, codes=z[:, :8].astype(np.uint8), valid=valid
        )
    pairs = []
    loss, evaluate = stage2.imitation_loss, stage2.evaluate
    monkeypatch.setattr(
        stage2, "imitation_loss", lambda p, *pair: pairs.append(pair) or loss(p, *pair)
    )
    monkeypatch.setattr(
        stage2, "evaluate", lambda p, *pair: pairs.append(pair) or evaluate(p, *pair)
    )
    stage2.main(stage2.Args(**folders(root), **STAGE_2))
    assert [len(obs) for obs, _ in pairs] == [8, 8, 64, 8, 8, 64]
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
    policy = stage2.LatentPolicy(64, 4, 128)
    assert sum(p.numel() for p in policy.parameters()) == 3_681_920


def test_stages_1_and_2_decay_their_weights(root, monkeypatch):
    """AdamW with 0.01, as in the official code."""
    optimizers, adamw = [], torch.optim.AdamW

    class AdamW(adamw):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            optimizers.append(self.defaults["weight_decay"])

    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    stage1.main(stage1.Args(**folders(root), **STAGE_1 | dict(grad_steps=1)))
    stage2.main(stage2.Args(**folders(root), **STAGE_2 | dict(grad_steps=1)))
    assert optimizers == [0.01, 0.01]


def test_standardized_latents_have_the_loss_of_their_own_scale(root):
    stage2.main(stage2.Args(**folders(root), **STAGE_2 | dict(grad_steps=1), standardize=True))
    saved = torch.load(root / "runs/maze/latent_policy.pt", weights_only=True)["policy"]
    paths = sorted(root.glob("runs/maze/train/latents_*.npz"))
    shards = [common.load_npz(path, ("z", "valid"), "") for path in paths]
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
    run = root / "runs/maze"
    flags = folders(root)
    other = torch.load(run / "latent_dynamics.pt", weights_only=True) | dict(fingerprint="other")
    common.save_checkpoint(run / "latent_dynamics.pt", **other)
    assert "another run of stage 1" in fails(stage2.main, stage2.Args(**flags, **STAGE_2))
    message = fails(online.main, online.Args(**flags, **ONLINE))
    assert "latent_policy.pt imitates another run" in message
    (run / "latent_policy.pt").unlink()
    for script in (offline, online):
        assert "train_latent_bc.py --game maze" in fails(
            script.main, script.Args(game="maze", runs_dir=root / "runs")
        )
    (run / "latent_dynamics.pt").unlink()
    assert "train_latent_dynamics.py --game maze" in fails(
        stage2.main, stage2.Args(**flags, **STAGE_2)
    )


# --- offline --------------------------------------------------------------------------------------


class PaysForActions:
    """Each step is an episode whose return is the action's number."""

    def __init__(self, settings, num_envs, seed):
        self.num_envs, self.finished = num_envs, []
        self.obs = np.zeros((num_envs, 16, 16, 3), np.uint8)

    def step(self, actions):
        self.finished += list(enumerate(map(float, actions)))


def decode(root, monkeypatch, **flags):
    monkeypatch.setattr(common, "ProcgenEnvs", PaysForActions)
    offline.main(offline.Args(**folders(root), **OFFLINE | flags))
    names = ["labels", "returns", "accuracy", "policy_accuracy", "blind_return"]
    return common.load_npz(root / "runs/maze/decode_offline.npz", names, "")


def relabel(root, split, action):
    """Replaces the labels of a split: all the same action, or a function of the true one."""
    for path in root.glob(f"data/maze/{split}/labels_*.npz"):
        labels = common.load_npz(path, ("action", "reward"), "")
        new = np.full_like(labels["action"], action)
        common.save_npz(path, {}, action=new, reward=labels["reward"])


def test_each_decoder_plays_its_own_games(root, monkeypatch, capsys):
    made = []

    def fit(decoder, *rest):  # decoder d always plays action d
        torch.nn.init.zeros_(decoder.layers[-1].weight)
        decoder.layers[-1].bias.data = 100 * F.one_hot(torch.tensor(len(made)), 15).float()
        made.append(decoder)

    monkeypatch.setattr(offline, "fit_decoder", fit)
    assert decode(root, monkeypatch)["returns"].tolist() == [[0, 1], [2, 3]]
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "+-" in line]
    assert [(row[0], row[1], row[4]) for row in rows] == [
        ("4", "0.50", "0.05"),
        ("16", "2.50", "0.25"),
    ]


def test_decoders_are_fitted_on_n_training_rows_and_judged_on_held_out_ones(root, monkeypatch):
    relabel(root, "train", 7), relabel(root, "test", 2)
    fits, fit_decoder = [], offline.fit_decoder
    monkeypatch.setattr(
        offline,
        "fit_decoder",
        lambda d, z, a, *rest: fits.append((z, a)) or fit_decoder(d, z, a, *rest),
    )
    result = decode(root, monkeypatch, decoder_steps=60)
    assert [len(z) for z, _ in fits] == [4, 4, 16, 16]
    where = (root / "data/maze/train", root / "runs/maze/train", "maze")
    dynamics = torch.load(root / "runs/maze/latent_policy.pt", weights_only=True)["dynamics"]
    all_z, all_actions = offline.load_labelled(*where, dynamics)
    assert len(all_z) == 2 * 8 * 14 and (all_actions == 7).all()
    rows = [{tuple(x.tolist()) for x in z} for z, _ in fits]
    assert all(few <= {tuple(x.tolist()) for x in all_z} for few in rows)
    assert (
        rows[0] <= rows[2] and rows[1] <= rows[3] and rows[0] != rows[1]
    )  # more contain the fewer
    assert (result["accuracy"] == 0).all() and (result["policy_accuracy"] == 0).all()
    assert (result["returns"] > 6).all() and result["blind_return"] == 7  # 7 is what training shows


def test_labels_belong_to_their_latents(root):
    """The action at frame i goes with z_i; rows without a window have neither."""
    checkpoint = torch.load(root / "runs/maze/latent_policy.pt", weights_only=True)
    where = (root / "data/maze/train", root / "runs/maze/train", "maze", checkpoint["dynamics"])
    z, actions = offline.load_labelled(*where)
    expected_z, expected_actions = [], []
    for shard in (0, 1):
        path = root / f"data/maze/train/frames_{shard:03d}.npz"
        first, action = common.read_frames(path, "maze")[1], common.read_actions(path, "maze")
        latents = common.load_npz(root / f"runs/maze/train/latents_{shard:03d}.npz", ["z"], "")["z"]
        for i in range(1, len(first) - 1):
            if not first[i] and not first[i + 1]:
                expected_z.append(latents[i]), expected_actions.append(action[i])
    assert np.array_equal(z.numpy(), np.array(expected_z, np.float32))
    assert actions.tolist() == expected_actions


def test_one_label_and_results_are_saved_before_they_are_printed(root, monkeypatch):
    def broken_terminal(*text):
        if "accuracy from z" in text[0]:
            raise BrokenPipeError

    monkeypatch.setattr(offline, "print", broken_terminal, raising=False)
    with pytest.raises(BrokenPipeError):
        decode(root, monkeypatch, labels=(1,))
    saved = common.load_npz(root / "runs/maze/decode_offline.npz", ("returns",), "")
    assert np.isfinite(saved["returns"]).all() and saved["settings"]["labels"] == [1]
    assert (root / "runs/maze/decode_offline.png").read_bytes()[:4] == b"\x89PNG"
    message = fails(decode, root, monkeypatch, labels=(5000,))
    assert "224 labelled rows, fewer than 5000" in message


# --- online ---------------------------------------------------------------------------------------


def test_refits_come_when_they_should():
    args = online.Args()
    refits = [update for update in range(1, 977) if online.refit_is_due(update, args)]
    assert refits == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 20, 40, 60, 80]  # 12,288 to 327,680 steps


def test_learning_rates_by_hand():
    ramp, end = online.Args.action_lr_ramp, 4_000_000
    steps = (0, 35_000, 42_500, 50_000, 2_025_000, 4_000_000)
    rates = [online.learning_rate(step, ramp, 0.01, end) for step in steps]
    np.testing.assert_allclose(rates, [0, 0, 0.00125, 0.0025, 0.00125, 0], atol=1e-12)


def test_logits_are_the_mean_of_both_heads():
    features, decoded, layer = torch.randn(3, 24), torch.randn(3, 15), torch.nn.Linear(24, 256)
    policy = online.OnlinePolicy(layer, with_decoder=True)
    assert policy.hidden is not layer and torch.equal(policy.hidden.weight, layer.weight)
    torch.testing.assert_close(policy(features, decoded)[0], decoded / 2)  # the head starts silent
    policy.action.weight.data.normal_()
    by_hand = torch.relu(features @ layer.weight.T + layer.bias) @ policy.action.weight.T
    logits, value = policy(features, decoded)
    torch.testing.assert_close(logits, (by_hand + decoded) / 2)
    assert value.shape == (3,)
    policy.with_decoder = False
    torch.testing.assert_close(policy(features, decoded)[0], by_hand)


def test_transitions_of_a_rollout_by_hand():
    """One game, k = 1, five steps; frames are numbered, and frame 3 opens an episode."""
    frames = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1, 1).expand(7, 1, 8, 8, 3)
    firsts = torch.tensor([0, 0, 0, 1, 0, 0, 0], dtype=torch.bool)[:, None]
    actions = torch.tensor([11, 12, 13, 14, 15])[:, None]  # taken at frames 1 .. 5

    def idm(windows):
        return windows[:, :, 0, 0, 0].float()

    z, taken = online.label_transitions(idm, frames, firsts, actions, batch_size=2)
    assert z.tolist() == [[0, 1, 2], [3, 4, 5], [4, 5, 6]]  # not 1 2 3 nor 2 3 4
    assert taken.tolist() == [11, 14, 15]


def test_the_decoder_learns_a_known_code():
    generator, args = (
        torch.Generator().manual_seed(0),
        online.Args(refit_epochs=10, refit_batch_size=128),
    )
    actions = torch.randint(15, (6000,), generator=generator)
    noise = 0.1 * torch.randn(6000, 16, generator=generator)
    z = F.one_hot(actions, 16) * 3.0 + 50 + noise  # far from 0: standardized
    decoder = online.ActionDecoder(16)
    before = decoder.layers[0].weight.clone()
    online.fit_decoder(decoder, z[:5000].half(), actions[:5000], args, generator)
    assert (decoder(z[5000:]).argmax(1) == actions[5000:]).float().mean() > 0.95
    online.fit_decoder(decoder, z[:8].half(), actions[:8], online.Args(refit_epochs=0), generator)
    after = decoder.layers[0].weight
    assert (after - before).abs().max() > 0.01  # every fit starts from new weights
    assert (decoder(z[5000:]).argmax(1) == actions[5000:]).float().mean() < 0.3


class Numbered:
    """Env e plays episodes of 5 + e steps; frames show env, episode, step and the last action."""

    made = []

    def __init__(self, settings, num_envs, seed):
        self.env, self.finished, self.num_envs = np.arange(num_envs), [], num_envs
        self.episode, self.t, self.action, self.total = np.zeros((4, num_envs), int)
        self.rng, self.log = np.random.default_rng(seed), []
        self.made.append(self)
        self._show()

    def _show(self):
        self.obs = np.zeros((self.num_envs, 16, 16, 3), np.uint8)
        self.bright = self.rng.integers(0, 2, self.num_envs)
        self.obs[:, 8:] = 255 * self.bright[:, None, None, None]
        self.obs[:, 0, 0] = np.stack([self.episode, self.t, self.action], 1)
        self.obs[:, 0, 1, 0] = self.env

    def good(self, actions):
        return actions == np.where(self.bright, 7, 3)

    def step(self, actions):
        reward = self.good(actions).astype(np.float32)
        self.t, self.action, self.total = self.t + 1, actions, self.total + reward
        done = self.t == 5 + self.env
        self.finished += [(int(e), float(self.total[e])) for e in np.flatnonzero(done)]
        self.episode, self.t, self.total = self.episode + done, self.t * ~done, self.total * ~done
        self._show()
        self.log.append((reward, done))
        return self.obs, reward, done

    def state_dict(self):
        return {}


class TellingIDM(torch.nn.Module):
    """z: episode, step and env of each frame of the window, and the action that led to its last."""

    def __init__(self, *sizes):
        super().__init__()
        self.unused = torch.nn.Linear(1, 1)

    def load_state_dict(self, weights):
        pass

    def forward(self, windows):
        shown = [windows[:, :, 0, 0, 0], windows[:, :, 0, 0, 1], windows[:, :, 0, 1, 0]]
        z = torch.cat([*shown, windows[:, -1:, 0, 0, 2]], 1).float()
        return F.pad(z, (0, 128 - z.shape[1]))


@pytest.fixture
def numbered(monkeypatch):
    Numbered.made = []
    monkeypatch.setattr(common, "ProcgenEnvs", Numbered)
    monkeypatch.setattr(online, "IDM", TellingIDM)


def test_every_transition_reaches_the_decoder_once_with_its_action(root, numbered, monkeypatch):
    fits = []

    def fit(decoder, z, actions, *rest):
        fits.append((z.clone(), actions.clone()))

    monkeypatch.setattr(online, "fit_decoder", fit)
    ramps = {f"{part}_lr_ramp": (0, 16, 0.1) for part in ("action", "value", "hidden")}
    steps = dict(env_steps=8 * 48, refit_from=8 * 32, refit_each_until=8 * 32, refit_until=8 * 32)
    online.main(online.Args(**folders(root), **ONLINE | ramps | steps | dict(log_every_steps=128)))
    ((z, actions),) = fits  # after 32 of 48 steps of each game, and then no more
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

    curve = common.load_npz(
        root / "runs/maze/decode_online_rl_sl.npz", ("env_steps", "returns", "episodes"), ""
    )
    ended = np.diff([[i // (5 + e) for e in range(8)] for i in (0, 16, 32, 48)], axis=0).sum(1)
    assert (
        curve["env_steps"].tolist() == [128, 256, 384]
        and curve["episodes"].tolist() == ended.tolist()
    )


def test_rewards_meet_their_dones_and_parts_their_learning_rates(root, numbered, monkeypatch):
    pairs, gae, rates, normalizer, adam = [], [], [], common.RewardNormalizer, torch.optim.Adam
    compute_gae = online.compute_gae
    parts = {(15, 256): "action", (1, 256): "value"}

    class Normalizer(normalizer):
        def __call__(self, *pair):
            pairs.append(pair)
            return super().__call__(*pair)

    class Adam(adam):
        def step(self):
            if len(self.param_groups) == 3:  # not the decoder's
                assert self.defaults["eps"] == 1e-8  # official code
                groups = [
                    (parts.get(tuple(g["params"][0].shape), "hidden"), g["lr"])
                    for g in self.param_groups
                ]
                rates.append(dict(groups))
            return super().step()

    def recording_gae(rewards, values, dones, *rest):
        gae.append([x.clone() for x in (rewards, values, dones)])
        return compute_gae(rewards, values, dones, *rest)

    monkeypatch.setattr(online, "compute_gae", recording_gae)
    monkeypatch.setattr(common, "RewardNormalizer", Normalizer)
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    args = online.Args(**folders(root), **ONLINE)
    online.main(args)
    rewards, values, dones = (torch.stack(x) for x in zip(*gae))  # [16, T, B]
    log_rewards, log_dones = (np.stack(x) for x in zip(*Numbered.made[0].log))
    assert np.array_equal(dones.flatten(0, 1), log_dones)
    assert np.array_equal(rewards.flatten(0, 1) > 0, log_rewards > 0)
    # before any learning rate leaves 0, a rollout's last value is the first of the next one
    assert torch.equal(values[0, -1], values[1, 0]) and not torch.equal(values[0, -2], values[1, 0])
    assert len(pairs) == 256
    for (reward, done), (own_reward, own_done) in zip(pairs, Numbered.made[0].log):
        assert np.array_equal(reward, own_reward) and np.array_equal(done, own_done)
    assert len(rates) == 16 * 3 * 4
    for i, found in enumerate(rates):
        before = i // 12 * 128  # the step before the rollout
        for part in ("action", "value", "hidden"):
            ramp = getattr(args, f"{part}_lr_ramp")
            assert found[part] == pytest.approx(online.learning_rate(before, ramp, 0.01, 2048))


def test_ppo_finds_the_good_action_of_each_frame(root, numbered):
    path = root / "runs/maze/latent_policy.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["policy"]["hidden.weight"] *= 30  # random features hardly separate bright from dark
    common.save_checkpoint(path, **checkpoint)
    flags = ONLINE | dict(env_steps=6144, entropy_coef=0.02, method="rl")
    online.main(online.Args(**folders(root), **flags))
    curve = common.load_npz(root / "runs/maze/decode_online_rl.npz", ("returns",), "")["returns"]
    assert curve[0] < 2 and curve[-1] > 5.5  # the same action always: about 3.9
    after = torch.load(root / "runs/maze/decode_online_rl.pt", weights_only=True)
    for name, weight in checkpoint["policy"].items():
        assert torch.equal(after["latent_policy"][name], weight)  # frozen
    assert after["decoder"] is None and not torch.equal(
        after["policy"]["hidden.weight"], checkpoint["policy"]["hidden.weight"]
    )


def test_the_decoder_alone_steers(root, numbered, monkeypatch):
    """A policy that always predicts the latent of action 7 plays 7 once the decoder is fitted."""

    class CodeOfAction(TellingIDM):
        def forward(self, windows):
            return F.one_hot(windows[:, -1, 0, 0, 2].long(), 128).float()

    monkeypatch.setattr(online, "IDM", CodeOfAction)
    monkeypatch.setattr(Numbered, "good", lambda self, actions: actions == 7)
    path = root / "runs/maze/latent_policy.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["policy"]["head.weight"] *= 0
    checkpoint["policy"]["head.bias"] = F.one_hot(torch.tensor(7), 128).float()
    common.save_checkpoint(path, **checkpoint)
    late = {f"{part}_lr_ramp": (2040, 2047, 0.1) for part in ("action", "value", "hidden")}
    refit = dict(refit_from=1024, refit_each_until=1024, refit_until=1024, refit_epochs=20)
    online.main(online.Args(**folders(root), **ONLINE | late | refit))
    curve = common.load_npz(root / "runs/maze/decode_online_rl_sl.npz", ("returns",), "")["returns"]
    assert (
        curve[0] < 1 and curve[1] > 3
    )  # the silent head halves the logits: 0.95 becomes about 0.5


def test_online_decoding_on_the_real_game(root):
    online.main(online.Args(**folders(root), **ONLINE))
    run = root / "runs/maze"
    rows = list(csv.DictReader((run / "decode_online_rl_sl.csv").open()))
    assert [row["env_steps"] for row in rows] == ["1024", "2048"]
    assert 0 <= float(rows[1]["decoder_accuracy"]) <= 1
    assert (run / "decode_online_rl_sl.png").read_bytes()[:4] == b"\x89PNG"


def test_impossible_flags_give_one_line_before_any_work(root):
    flags = folders(root) | ONLINE
    message = fails(online.main, online.Args(**flags | dict(action_lr_ramp=(35_000, 50_000, 0.25))))
    assert "--action-lr-ramp" in message
    never = dict(refit_from=10_000, refit_each_until=50_000, refit_until=400_000)
    assert "--refit-from" in fails(online.main, online.Args(**flags | never))
