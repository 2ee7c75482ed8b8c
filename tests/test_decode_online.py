"""decode_online_ppo.py: its parts against hand-made cases, and the whole of it on fake and real games."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import decode_online_ppo as online

FRAME_SIZE, MULTIPLIER, Z_DIM = 32, 0.25, 16
SMALL = dict(
    device="cpu", num_envs=8, head_rollout_steps=16, env_steps=2048, minibatches=4, log_every_steps=1024,
    action_lr_ramp=(256, 512, 0.25), value_lr_ramp=(128, 512, 0.25), hidden_lr_ramp=(512, 1024, 0.1),
    refit_from=256, refit_each_until=640, refit_every=4, refit_until=1600, refit_batch_size=64,
    scratch_rollout_steps=16, scratch_multiplier=MULTIPLIER, scratch_frame_size=FRAME_SIZE,
)  # fmt: skip


def write_checkpoints(tmp_path, game="coinrun", context=1, frame_size=FRAME_SIZE):
    """latent_policy.pt and latent_dynamics.pt with random weights, as stages 1 and 2 write them. Returns Args' folders."""
    torch.manual_seed(0)
    run = tmp_path / "runs" / game
    sizes = dict(game=game, grad_step=1, frame_size=frame_size, start_level=0, num_levels=0, context=context, multiplier=MULTIPLIER)
    policy = online.LatentPolicy(frame_size, MULTIPLIER, Z_DIM)
    common.save_checkpoint(run / "latent_policy.pt", kind="latent_policy", **sizes, z_dim=Z_DIM, dynamics="abc", model=policy.state_dict())
    idm = online.IDM(frame_size, context, MULTIPLIER, Z_DIM)
    common.save_checkpoint(run / "latent_dynamics.pt", kind="latent_dynamics", **sizes, fingerprint="abc", idm=idm.state_dict())
    return dict(game=game, runs_dir=tmp_path / "runs", data_dir=tmp_path / "data")


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small lose more by sharing work between threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class FakeEnvs:
    """Env e plays episodes of 5 + e steps; each good action earns 1. Frames tell env, episode, step and the last action."""

    def __init__(self, first_env, num_envs, frame_size):
        self.obs = np.zeros((num_envs, frame_size, frame_size, 3), np.uint8)
        self.num_envs, self.number = num_envs, first_env + np.arange(num_envs)
        self.lengths = 5 + self.number
        self.episode, self.step, self.action, self.earned = np.zeros((4, num_envs), int)
        self.reward, self.finished = np.zeros(num_envs, np.float32), []

    def act(self, action):
        self.reward = self.is_good(action).astype(np.float32)
        self.step, self.action, self.earned = self.step + 1, action, self.earned + self.reward
        for env in np.flatnonzero(self.step == self.lengths):
            self.finished.append((int(env), float(self.earned[env])))
            self.episode[env], self.step[env], self.earned[env] = self.episode[env] + 1, 0, 0

    def is_good(self, action):
        return np.ones(len(action), bool)

    def observe(self):
        self.obs[:, 8:] = 255 * (self.step % 2)[:, None, None, None]  # bright at odd steps
        self.obs[:, 0, 0] = np.stack([self.episode, self.step, self.action], 1)
        self.obs[:, 0, 1, 0] = self.number
        return self.reward, self.obs, self.step == 0  # always the same array, as Procgen may


def put_in_place_of_procgen(monkeypatch, games):
    """Both halves of eight envs are such games, numbered through."""
    made = []

    def make(game, num_envs, seed, start_level, num_levels, frame_size, num_threads):
        made.append(games(sum(one.num_envs for one in made) % 8, num_envs, frame_size))
        return made[-1]

    monkeypatch.setattr(common.games, "ProcgenEnvs", make)


class OneGoodAction(FakeEnvs):
    """Eight games return 7.8 in the mean for the good action alone, 0.5 at random (short episodes end more often)."""

    def is_good(self, action):
        return action == 7


class BrightMeansSeven(FakeEnvs):
    """As OneGoodAction, but which action is good hangs on the frame: always the same one returns about 4."""

    def is_good(self, action):
        return action == np.where(self.step % 2, 7, 3)


class FakeIDM(torch.nn.Module):
    """z: episode, step and env of each frame of the window, then the action that led to its last frame."""

    def __init__(self, frame_size, context, multiplier, z_dim):
        super().__init__()

    def load_state_dict(self, weights):
        pass

    def forward(self, windows):
        told = torch.cat([windows[:, :, 0, 0, 0], windows[:, :, 0, 0, 1], windows[:, :, 0, 1, 0], windows[:, -1:, 0, 0, 2]], 1)
        return F.pad(told.float(), (0, Z_DIM - told.shape[1]))


# --- parts -----------------------------------------------------------------------------------------------------------


def test_refits_come_when_they_should():
    paper = online.refit_updates(976, 64 * 64, 10_000, 50_000, 20, 400_000)
    assert paper == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 20, 40, 60, 80]  # 12,288 to 49,152 steps, then 81,920 to 327,680
    assert online.refit_updates(16, 128, 256, 640, 4, 1600) == [2, 3, 4, 5, 8, 12]
    assert online.refit_updates(2, 64 * 64, 10_000, 50_000, 20, 400_000) == []


def test_learning_rate_ramps():
    ramp, end = online.Args.action_lr_ramp, online.Args.env_steps
    rates = [online.learning_rate(step, ramp, 0.01, end) for step in (0, 35_000, 42_500, 50_000, 2_025_000, 4_000_000)]
    np.testing.assert_allclose(rates, [0, 0, 0.00125, 0.0025, 0.00125, 0], atol=1e-12)
    hidden = [online.learning_rate(step, online.Args.hidden_lr_ramp, 0.01, end) for step in (50_000, 125_000, 200_000, 2_100_000)]
    np.testing.assert_allclose(hidden, [0, 0.0005, 0.001, 0.0005], atol=1e-12)
    assert online.learning_rate(25_000, online.Args.value_lr_ramp, 0.01, end) == 0


def test_logits_are_the_mean_of_both_heads():
    features, decoded = torch.randn(3, 24), torch.randn(3, common.NUM_ACTIONS)
    layer = torch.nn.Linear(24, 256)
    policy = online.OnlinePolicy(layer, decoder_share=0.5)
    assert policy.hidden is not layer and torch.equal(policy.hidden.weight, layer.weight)
    logits, value = policy(features, torch.zeros_like(decoded))
    torch.testing.assert_close(logits.softmax(-1), torch.full((3, 15), 1 / 15))  # before the first fit: uniform
    assert value.shape == (3,)
    torch.testing.assert_close(policy(features, decoded)[0], decoded / 2)  # then the decoder alone, at half its strength

    with torch.no_grad():
        policy.action.weight.normal_()
    by_hand = torch.relu(features @ layer.weight.T + layer.bias) @ policy.action.weight.T
    torch.testing.assert_close(policy(features, decoded)[0], (by_hand + decoded) / 2)
    policy.decoder_share = 0.0  # --method rl
    torch.testing.assert_close(policy(features, decoded)[0], by_hand)


def test_cached_features_give_the_gradients_of_recomputed_ones():
    torch.manual_seed(0)
    latent_policy = online.LatentPolicy(FRAME_SIZE, MULTIPLIER, Z_DIM).to(memory_format=torch.channels_last)
    policy = online.OnlinePolicy(latent_policy.hidden, decoder_share=0.5)
    torch.nn.init.normal_(policy.action.weight, std=0.1)
    frames = torch.randint(256, (6, 4, FRAME_SIZE, FRAME_SIZE, 3), dtype=torch.uint8)
    cached = torch.stack([online.encode(latent_policy, frame) for frame in frames])  # (T, B, F), as in a rollout
    assert not cached.requires_grad
    rows = torch.randperm(24)[:10]
    decoded, action, others = torch.randn(10, 15), torch.randint(15, (10,)), torch.randn(4, 10) - 2

    def loss_and_gradients(features):
        loss, _ = online.ppo_loss(*policy(features, decoded), action, *others, 0.2, 0.5, 0.01)
        return loss, *torch.autograd.grad(loss, list(policy.parameters()))

    recomputed = latent_policy.cnn(online.to_input(frames.flatten(0, 1)[rows][:, None]))
    for ours, theirs in zip(loss_and_gradients(cached.flatten(0, 1)[rows]), loss_and_gradients(recomputed)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_windows_of_one_rollout_by_hand():
    """One game, k = 1, five steps; frames are numbered and frame 3 opens a new episode."""
    frames = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1, 1).expand(7, 1, 8, 8, 3)
    firsts = torch.tensor([0, 0, 0, 1, 0, 0, 0], dtype=torch.bool)[:, None]
    actions = torch.tensor([11, 12, 13, 14, 15])[:, None]  # taken at frames 1 .. 5
    z, action = online.label_transitions(lambda windows: windows[:, :, 0, 0, 0].float(), frames, firsts, actions, batch_size=2)
    assert z.tolist() == [[0, 1, 2], [3, 4, 5], [4, 5, 6]]  # not 1 2 3 nor 2 3 4
    assert action.tolist() == [11, 14, 15]
    ends_each_step = torch.ones_like(firsts)
    z, action = online.label_transitions(lambda windows: windows[:, :, 0, 0, 0].float(), frames, ends_each_step, actions)
    assert z.shape == (0, 3) and action.shape == (0,)


def test_decoder_learns_a_known_code():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    action = torch.randint(15, (6000,), generator=generator)
    z = F.one_hot(action, Z_DIM) * 3.0 + 50 + 0.1 * torch.randn(6000, Z_DIM, generator=generator)  # far from 0: standardised first
    decoder = online.fit_decoder(z[:5000].half(), action[:5000], 10, 128, 1e-3, 0.05, generator)
    torch.testing.assert_close(decoder.mean, z[:5000].mean(0), rtol=1e-3, atol=0)
    assert (decoder(z[5000:]).argmax(-1) == action[5000:]).float().mean() > 0.95


# --- the whole, on fake games ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context, rollout_steps", [(1, 16), (2, 16), (3, 2)])
def test_every_transition_reaches_the_decoder_once_with_its_action(tmp_path, monkeypatch, context, rollout_steps):
    where = write_checkpoints(tmp_path, context=context)
    fits, encoded = [], []
    encode = online.encode

    def fit_decoder(z, action, *rest):
        fits.append((z.clone(), action.clone()))
        return online.ActionDecoder(Z_DIM)

    def counting_encode(latent_policy, obs):
        encoded.append(len(obs))
        return encode(latent_policy, obs)

    put_in_place_of_procgen(monkeypatch, FakeEnvs)
    monkeypatch.setattr(online, "IDM", FakeIDM)
    monkeypatch.setattr(online, "fit_decoder", fit_decoder)
    monkeypatch.setattr(online, "encode", counting_encode)
    settings = SMALL | dict(
        head_rollout_steps=rollout_steps, env_steps=8 * 48, log_every_steps=8 * 16, refit_from=8 * 32, refit_each_until=8 * 32,
        action_lr_ramp=(0, 16, 0.25), value_lr_ramp=(0, 16, 0.25), hidden_lr_ramp=(0, 16, 0.1), refit_until=8 * 32,
    )  # fmt: skip
    online.main(online.Args(**where, **settings))

    ((z, action),) = fits  # at 32 of 48 steps of each game, and then no more
    episode, step, env, last_action = z[:, : 3 * (context + 2) + 1].long().split([context + 2] * 3 + [1], 1)
    assert torch.equal(last_action[:, 0], action)  # the action at o_t is the one that led to o_{t+1}
    assert len(action.unique()) > 5
    assert (episode == episode[:, :1]).all() and (env == env[:, :1]).all()
    assert (step == step[:, :1] + torch.arange(context + 2)).all()
    # each of the 32 transitions of a game that has its k frames before, and whose next frame is of the same episode
    expected = {(e, i // (5 + e), i % (5 + e)) for e in range(8) for i in range(32) if context <= i % (5 + e) < 4 + e}
    seen = list(zip(env[:, context].tolist(), episode[:, context].tolist(), step[:, context].tolist()))
    assert len(seen) == len(set(seen)) and set(seen) == expected

    assert encoded == [4, 4] * (48 + 48 // rollout_steps)  # each frame once, and once more where one rollout ends and the next begins
    with np.load(where["runs_dir"] / "coinrun" / "decode_online_rl_sl.npz") as result:
        lengths = 5 + np.arange(8)
        ended = np.diff([[i // length for length in lengths] for i in (0, 16, 32, 48)], axis=0)  # (interval, env)
        assert result["env_steps"].tolist() == [8 * 16, 8 * 32, 8 * 48]
        assert result["episodes"].tolist() == ended.sum(1).tolist()
        np.testing.assert_allclose(result["returns"], (ended * lengths).sum(1) / ended.sum(1))  # raw, and all of them


def test_same_seed_same_policy(tmp_path, monkeypatch):
    where = write_checkpoints(tmp_path)
    put_in_place_of_procgen(monkeypatch, FakeEnvs)
    weights = []
    for seed in (1, 1, 2):
        online.main(online.Args(**where, **SMALL | dict(env_steps=1040, log_every_steps=2048), seed=seed))
        pt = where["runs_dir"] / "coinrun" / "decode_online_rl_sl.pt"
        weights.append(torch.load(pt, weights_only=True)["policy"]["action.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("method", ["rl", "scratch"])
def test_ppo_finds_the_good_action_of_each_frame(tmp_path, monkeypatch, method):
    where = write_checkpoints(tmp_path, frame_size=16)
    path = where["runs_dir"] / "coinrun/latent_policy.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["hidden.weight"] *= 100  # random features hardly tell bright from dark
    common.save_checkpoint(path, **checkpoint)
    put_in_place_of_procgen(monkeypatch, BrightMeansSeven)
    settings = SMALL | dict(env_steps=4096, head_entropy_coef=0.03, scratch_frame_size=16, scratch_lr=1e-3)
    online.main(online.Args(**where, **settings, method=method))
    with np.load(where["runs_dir"] / f"coinrun/decode_online_{method}.npz") as result:
        assert result["returns"][-1] > 6


def test_the_decoder_alone_steers(tmp_path, monkeypatch):
    """A latent policy that always wants the latent of action 7 takes action 7 after the first fit, before RL begins."""

    class CodeOfAction(FakeIDM):
        def forward(self, windows):
            return F.one_hot(windows[:, -1, 0, 0, 2].long(), Z_DIM).float()

    where = write_checkpoints(tmp_path)
    path = where["runs_dir"] / "coinrun/latent_policy.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["head.weight"] *= 0
    checkpoint["model"]["head.bias"] = F.one_hot(torch.tensor(7), Z_DIM).float()
    common.save_checkpoint(path, **checkpoint)
    put_in_place_of_procgen(monkeypatch, OneGoodAction)
    monkeypatch.setattr(online, "IDM", CodeOfAction)
    late = {f"{part}_lr_ramp": (2040, 2047, 0.1) for part in ("action", "value", "hidden")}
    settings = SMALL | late | dict(refit_from=1024, refit_each_until=1024, refit_until=1024, refit_epochs=20)
    online.main(online.Args(**where, **settings))
    with np.load(where["runs_dir"] / "coinrun/decode_online_rl_sl.npz") as result:
        at_random, steered = result["returns"]
    assert at_random < 1 and steered > 3  # the mean with a silent RL head halves the decoder's logits: 0.95 becomes about 0.5


def test_an_interval_without_an_episode_is_nan(tmp_path, monkeypatch):
    where = write_checkpoints(tmp_path)
    put_in_place_of_procgen(monkeypatch, FakeEnvs)
    settings = SMALL | dict(head_rollout_steps=4, env_steps=64, log_every_steps=32, minibatches=1)
    ramps = {f"{part}_lr_ramp": (0, 16, 0.1) for part in ("action", "value", "hidden")}
    online.main(online.Args(**where, **settings | ramps, method="rl"))
    with np.load(where["runs_dir"] / "coinrun" / "decode_online_rl.npz") as result:
        assert result["episodes"].tolist() == [0, 4] and np.isnan(result["returns"][0]) and result["returns"][1] == 6.5


class OneAfterTheOther(common.ProcgenEnvs):
    """Games that do not step while anything else happens."""

    def act(self, action):
        super().act(action)
        self.games.observe()  # waits


# --- the whole, on real games ------------------------------------------------------------------------------------------


def test_three_methods_on_bigfish(tmp_path, monkeypatch, capsys):
    where = write_checkpoints(tmp_path, "bigfish")  # its episodes are short
    run = where["runs_dir"] / "bigfish"
    before = torch.load(run / "latent_policy.pt", weights_only=True)["model"]
    common.save_npz(
        tmp_path / "data/bigfish/train/labels_000.npz", action=np.zeros(1, np.uint8), reward=np.zeros(1, np.float32),
        expert_return=np.float32(7.5),
    )  # fmt: skip
    figures = []
    monkeypatch.setattr(online.plt, "close", figures.append)
    for method in ("rl_sl", "rl", "scratch"):
        if method == "scratch":  # reads no checkpoint
            (run / "latent_policy.pt").unlink(), (run / "latent_dynamics.pt").unlink()
        online.main(online.Args(**where, **SMALL, method=method))
        with np.load(run / f"decode_online_{method}.npz", allow_pickle=False) as result:
            assert result["env_steps"].tolist() == [1024, 2048]
            assert result["episodes"].dtype.kind == "i" and result["episodes"].sum() > 0
            assert np.array_equal(np.isnan(result["returns"]), result["episodes"] == 0)
            assert float(result["random_return"]) == common.RETURNS["bigfish"][0] and float(result["expert_return"]) == 7.5
            settings = json.loads(str(result["settings"]))
            assert settings["method"] == method and settings["seed"] == 1
            assert settings["frame_size"] == FRAME_SIZE and settings["multiplier"] == MULTIPLIER
        with open(run / f"decode_online_{method}.csv") as file:
            rows = list(csv.DictReader(file))
        assert [row["env_step"] for row in rows] == ["1024", "2048"]
        assert ("decoder_accuracy" in rows[0]) == (method == "rl_sl")
        assert (run / f"decode_online_{method}.png").read_bytes()[:4] == b"\x89PNG"

        after = torch.load(run / f"decode_online_{method}.pt", weights_only=True)
        assert after["method"] == method and after["env_step"] == 2048 and after["policy"]["action.weight"].abs().sum() > 0
        if method == "scratch":
            common.seed_everything(1)
            start = online.ImpalaCNN(3, FRAME_SIZE, MULTIPLIER).state_dict()
            assert all(not torch.equal(after["policy"][f"cnn.{name}"], weight) for name, weight in start.items())
            assert after["latent_policy"] is None and after["decoder"] is None
        else:
            assert all(torch.equal(after["latent_policy"][name], weight) for name, weight in before.items())
            assert not torch.equal(after["policy"]["hidden.weight"], before["hidden.weight"])
            assert not any(name.startswith("cnn") for name in after["policy"])
            assert (after["decoder"] is not None) == (method == "rl_sl")
    _, labels = figures[-1].axes[0].get_legend_handles_labels()
    assert [label.split(" (")[0] for label in labels] == [
        "LAPO, RL and SL", "LAPO, RL without SL", "PPO from scratch", "expert", "random policy"
    ]  # fmt: skip
    assert "python visualize_latents.py --game bigfish" in capsys.readouterr().out


@pytest.mark.parametrize("num_envs", [8, 3])
def test_nothing_hangs_on_games_that_step_meanwhile(tmp_path, monkeypatch, num_envs):
    where = write_checkpoints(tmp_path, "bigfish")
    results = []
    for games in (common.ProcgenEnvs, OneAfterTheOther):
        monkeypatch.setattr(common.games, "ProcgenEnvs", games)
        online.main(online.Args(**where, **SMALL | dict(env_steps=1536, num_envs=num_envs, log_every_steps=1536)))
        weights = torch.load(where["runs_dir"] / "bigfish/decode_online_rl_sl.pt", weights_only=True)
        results.append([*weights["policy"].values(), *weights["decoder"].values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# --- bad input ---------------------------------------------------------------------------------------------------------


def fails_with(words, **settings):
    with pytest.raises(SystemExit) as error:
        online.main(online.Args(**SMALL | settings))
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    for word in words:
        assert word in message, message


def test_bad_checkpoints_give_one_line(tmp_path):
    fails_with(["latent_policy.pt is missing", "train_latent_bc.py --game coinrun"], game="coinrun", runs_dir=tmp_path / "none")
    where = write_checkpoints(tmp_path)
    run = where["runs_dir"] / "coinrun"
    (where["runs_dir"] / "maze").symlink_to(run)
    fails_with(["'coinrun', not on 'maze'"], **where | dict(game="maze"))

    whole = (run / "latent_dynamics.pt").read_bytes()
    (run / "latent_dynamics.pt").write_bytes(whole[: len(whole) // 2])
    fails_with(["latent_dynamics.pt is damaged", "train_latent_dynamics.py"], **where)
    (run / "latent_dynamics.pt").unlink()
    fails_with(["latent_dynamics.pt is missing"], **where)
    write_checkpoints(tmp_path / "other", context=2)
    (run / "latent_dynamics.pt").write_bytes((tmp_path / "other/runs/coinrun/latent_dynamics.pt").read_bytes())
    fails_with(["context 2", "latent_policy.pt 1", "train_latent_bc.py"], **where)


def test_bad_settings_give_one_line(tmp_path):
    where = write_checkpoints(tmp_path)
    fails_with(["8 games x 16 steps", "--minibatches 5"], **where, minibatches=5)
    fails_with(["--action-lr-ramp", "--env-steps 2048"], **where, action_lr_ramp=(35_000, 50_000, 0.25))
    fails_with(["never be fitted", "--refit-from"], **where, refit_from=10_000, refit_each_until=50_000, refit_until=400_000)
    fails_with(["no Procgen game is called 'coinrum'", "coinrun"], **where | dict(game="coinrum"))
