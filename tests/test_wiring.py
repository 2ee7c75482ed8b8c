"""What reaches optimizers, losses, probes, players and tables: of bugs that were planted, one at a
time, these tests catch the ones that all others let pass.
"""

import common  # before torch
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PaysForActions, args_of, load, run, write_toy_data
import baselines.label_efficiency as efficiency
import baselines.supervised_idm as supervised
import baselines.train_ilpo as ilpo
import collect_data
import decode_offline as offline
import decode_online_ppo as online
import train_latent_bc as stage2
import train_latent_dynamics as stage1
import visualize_latents as viz
from experts import solvers
from extras import action_pairs, plot_figures, write_tables

CPU = torch.device("cpu")


# --- optimizers -----------------------------------------------------------------------------------


@pytest.fixture
def record_steps(monkeypatch):
    """A list that gets (learning rate, gradient's norm, defaults) at each step of Adam or AdamW."""
    steps = []

    def record(optimizer_class):
        step = optimizer_class.step

        def recording(self, *arguments, **keywords):
            weights = [p for group in self.param_groups for p in group["params"]]
            norm = torch.stack([p.grad.norm() for p in weights if p.grad is not None]).norm()
            steps.append((self.param_groups[0]["lr"], norm.item(), self.defaults))
            return step(self, *arguments, **keywords)

        monkeypatch.setattr(optimizer_class, "step", recording)

    record(torch.optim.AdamW)
    record(torch.optim.Adam)
    return steps


def test_stage_1s_learning_rates_and_clipped_gradients(root, record_steps):
    run(
        stage1, root, grad_steps=6, warmup_steps=2, lr=0.01, max_grad_norm=1e-3, runs_dir=root / "x"
    )
    rates, norms, _ = zip(*record_steps)
    # from 10% to the peak in two updates, then towards 1% after the last one
    peak = np.array([0.1, 0.55, 1, 0.7525, 0.505, 0.2575])
    np.testing.assert_allclose(rates, 0.01 * peak, rtol=1e-6)
    assert max(norms) < 1.001e-3


def test_learning_rates_of_stage_2_and_of_supervised_training(root, record_steps):
    run(stage2, root, grad_steps=6, warmup_steps=2, lr=0.01)
    run(supervised, root, grad_steps=6, warmup_steps=2, lr=0.01, multiplier=0.25, batch_size=4)
    rates = [rate for rate, *_ in record_steps]
    np.testing.assert_allclose(rates[:6], 0.01 * np.array([0.01, 0.505, 1, 0.75, 0.5, 0.25]))
    np.testing.assert_allclose(rates[6:], 0.01 * np.array([0.1, 0.55, 1, 0.7525, 0.505, 0.2575]))


def test_clones_have_stage_2s_schedule(record_steps):
    x = torch.eye(15)
    minibatches = [(x, torch.arange(15))]
    efficiency.train([torch.nn.Linear(15, 15)], lambda: minibatches, 120, 0.1, 0.0, "toy")
    rates = [rate for rate, *_ in record_steps]
    assert rates[:3] == pytest.approx([0.001, 0.0505, 0.1])
    assert rates[61] == pytest.approx(0.05) and rates[-1] == pytest.approx(0.1 / 118)


def test_adam_has_the_papers_settings(root, tmp_path, toy_games, record_steps):
    run(ilpo, root, grad_steps=1, runs_dir=root / "ilpo")
    run(collect_data, tmp_path / "expert", expert_steps=128, train_frames=0, max_grad_norm=1e-3)
    assert record_steps[0][2]["betas"] == (0.5, 0.999)  # Edwards et al.
    assert record_steps[-1][2]["eps"] == 1e-5  # Cobbe et al.
    assert max(norm for _, norm, _ in record_steps[1:]) < 1.001e-3


def test_online_gradients_are_clipped(root, toy_games, record_steps):
    run(online, root, method="rl", env_steps=1280, max_grad_norm=1e-3)
    assert max(norm for _, norm, _ in record_steps) < 1.001e-3


# --- stage 1 --------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_test_mse_by_hand():
    torch.manual_seed(0)
    idm, fdm = stage1.IDM(16, 1, 0.25, 32), stage1.FDM(16, 1, 32, 4, predict_change=False)
    quantizer = stage1.EMAVectorQuantizer(1, 4, 8, 8, 0.9)
    quantizer.embedding.normal_()
    windows = torch.randint(256, (40, 3, 16, 16, 3), dtype=torch.uint8)
    before = common.fingerprint(idm, quantizer, fdm)
    metrics = stage1.evaluate(idm, quantizer, fdm, windows, None, None)
    assert common.fingerprint(idm, quantizer, fdm) == before  # codebooks and batch norm, too
    target = common.to_input(windows[:, 2:])
    z_q = quantizer.eval()(idm(windows))[0]
    expected = F.mse_loss(fdm.eval()(windows[:, :2], z_q), target).item()
    assert metrics["test_mse"] == pytest.approx(expected, rel=1e-4)
    copy = F.mse_loss(common.to_input(windows[:, 1:2]), target).item()
    assert metrics["copy_mse"] == pytest.approx(copy, rel=1e-4)


def test_the_probe_is_of_random_play_in_the_order_of_the_files(tmp_path):
    root = write_toy_data(tmp_path)
    for i, split in enumerate(("train", "test", "random")):
        for shard, path in enumerate(sorted((root / f"data/maze/{split}").glob("frames_*"))):
            frames = load(path)
            frames["obs"][:, 0, 0] = [[i, shard, row] for row in range(len(frames["obs"]))]
            common.save_npz(path, **frames)
    windows, probe_windows, actions = stage1.load_evaluation_windows(args_of(stage1, root), CPU)
    assert (windows[:, :, 0, 0, 0] == 1).all() and (probe_windows[:, :, 0, 0, 0] == 2).all()
    places = probe_windows[:, 1, 0, 0, 1:].tolist()  # shard and row
    assert places == sorted(places)
    labels = [load(root / f"data/maze/random/labels_00{shard}.npz")["action"] for shard in (0, 1)]
    own = np.array([labels[shard][row] for shard, row in places])
    assert np.array_equal(actions, common.distinct_actions("maze")[own])


def test_the_majority_class_is_that_of_the_rows_of_the_fit():
    z = np.random.default_rng(0).normal(size=(20, 2))
    actions = np.array([0] * 8 + [1] * 4 + [0] * 2 + [1] * 6)
    assert stage1.linear_probe(z[:12], actions[:12], z[12:], actions[12:])[1] == 2 / 8


@torch.no_grad()
@pytest.mark.parametrize("script", [stage1, online], ids=lambda script: script.__name__)
def test_the_idm_is_that_of_the_paper(script):
    """IMPALA's CNN, a hidden layer with ReLU, and a linear head, written out."""
    torch.manual_seed(0)
    idm = script.IDM(16, 1, 0.25, 32)
    weights = idm.state_dict()

    def conv(x, name):
        return F.conv2d(x, weights[f"cnn.{name}.weight"], weights[f"cnn.{name}.bias"], padding=1)

    windows = torch.randint(256, (5, 3, 16, 16, 3), dtype=torch.uint8)
    x = common.to_input(windows)
    for start in (0, 4, 8):
        x = F.max_pool2d(conv(x, start), 3, stride=2, padding=1)
        for block in (start + 2, start + 3):
            x = x + conv(F.relu(conv(F.relu(x), f"{block}.conv1")), f"{block}.conv2")
    h = F.relu(F.linear(F.relu(x).flatten(1), weights["hidden.weight"], weights["hidden.bias"]))
    z = F.linear(h, weights["head.weight"], weights["head.bias"])
    torch.testing.assert_close(idm(windows), z, rtol=1e-4, atol=1e-5)


# --- stage 2 --------------------------------------------------------------------------------------


def test_held_out_frames_of_stage_2_are_of_the_test_split(root, record_calls):
    for path in root.glob("runs/maze/test/latents_*.npz"):
        latents = load(path)
        common.save_npz(path, **latents | dict(z=np.full_like(latents["z"], 7)))
    losses, evaluations = (record_calls(stage2, name) for name in ("imitation_loss", "evaluate"))
    run(stage2, root)
    assert all((z == 7).all() for _, _, z in evaluations) and len(evaluations) == 2
    assert not any((z == 7).any() for _, _, z in losses)


# --- stage 3, offline -----------------------------------------------------------------------------


def test_decoders_standardize_each_number_of_z_over_all_rows():
    torch.manual_seed(0)
    z = torch.randn(400, 3) * torch.tensor([1.0, 10, 100]) + torch.tensor([5.0, 0, -7])
    args = offline.Args(labels=(16,), decoder_seeds=1, decoder_steps=1)
    (decoder,) = offline.fit_decoders(z, torch.randint(15, (400,)), args, CPU)
    torch.testing.assert_close(decoder.mean, z.mean(0))
    torch.testing.assert_close(decoder.std, z.std(0), rtol=1e-4, atol=0)


def test_labelled_rows_are_distinct_and_fewer_labels_come_first():
    args = offline.Args()
    rows = offline.draw_labels(50, 50, args, 0)
    assert sorted(rows.tolist()) == list(range(50))
    assert torch.equal(offline.draw_labels(50, 20, args, 0), rows[:20])


def test_the_blind_policy_has_the_experts_frequencies_and_quotas_are_rounded_up(
    root, monkeypatch, record_calls
):
    monkeypatch.setattr(common, "ProcgenEnvs", PaysForActions)
    plays, played = record_calls(offline, "play"), record_calls(common, "play_episodes")
    run(offline, root, episodes=9, envs_per_decoder=2)
    dynamics = load(root / "runs/maze/latent_policy.pt")["dynamics_id"]
    *_, actions = offline.load_labelled(args_of(offline, root), 1, CPU, dynamics)
    blind_logits = plays[1][0](torch.zeros(2, 16, 16, 3, dtype=torch.uint8))
    expected = np.bincount(actions, minlength=15) / len(actions)
    assert np.count_nonzero(expected) == 5
    np.testing.assert_allclose(blind_logits.softmax(-1), [expected] * 2, atol=1e-6)
    assert [quota for *_, quota in played] == [5, 5]


def test_accuracy_is_from_z_and_policy_accuracy_from_the_frame(root, monkeypatch, record_calls):
    monkeypatch.setattr(common, "ProcgenEnvs", PaysForActions)
    judged = record_calls(offline, "judge")
    run(offline, root)
    checkpoint, policy = offline.load_policy(root / "runs/maze", "maze", CPU)
    saved = load(root / "runs/maze/decode_offline.pt")
    args = args_of(offline, root)
    obs, z, actions = offline.load_held_out(args, 1, CPU, checkpoint["dynamics_id"])
    decoder = offline.ActionDecoder(z.shape[1])
    decoder.load_state_dict(saved["decoders"][0])
    for (logits, true_actions, _), latent in zip(judged, (z, policy(obs)), strict=True):
        torch.testing.assert_close(logits[0], decoder(latent), atol=1e-4, rtol=1e-4)
        assert torch.equal(true_actions, actions)


# --- PPO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [online, collect_data], ids=lambda script: script.__name__)
def test_nothing_has_changed_before_the_first_update_of_a_rollout(
    root, toy_games, record_calls, script
):
    """One minibatch for each rollout: its ratios are 1, its values those of the rollout."""
    flags = dict(minibatches=1, epochs=1)
    if script is online:
        ramps = {f"{x}_lr_ramp": (0, 128, 0.5) for x in ("action", "value", "hidden")}
        flags |= dict(env_steps=1280, refit_epochs=20, **ramps)
    else:
        flags |= dict(expert_steps=4 * 128, train_frames=0, expert_lr=0.01)
    losses = record_calls(script, "ppo_loss")
    run(script, root, **flags)
    assert len(losses) == (10 if script is online else 4)
    for logits, values, batch, _ in losses:
        own = logits.detach().log_softmax(-1).gather(1, batch["actions"][:, None])[:, 0]
        torch.testing.assert_close(batch["logprobs"], own, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(batch["values"], values.detach(), atol=1e-4, rtol=1e-4)
    assert logits.std(1).mean() > 1e-3  # the policy has moved


def test_the_decoders_accuracy_is_of_transitions_that_it_was_not_fitted_on(monkeypatch):
    decoder = online.OnlineDecoder(None, 8, online.Args(game="maze"), CPU)
    right, right_up = common.ACTIONS.index("right"), common.ACTIONS.index("right-up")
    labelled = (torch.ones(4, 8), torch.full((4,), right_up))
    monkeypatch.setattr(online, "label_transitions", lambda *_: labelled)

    def fit(network, *_):  # from now on it answers right, whose effect is the same
        network.layers[-1].bias.data = F.one_hot(torch.tensor(right), 15).float()

    monkeypatch.setattr(online, "fit_decoder", fit)
    found = []
    for update in (3, 4):  # both refit it
        decoder.learn(4096 * update, dict(frames=None, first=None, actions=None), None)
        found.append(decoder.accuracy)
    assert found == [0, 1]


def test_the_online_decoder_is_standardized_by_its_transitions():
    torch.manual_seed(0)
    z = torch.randn(200, 3) * torch.tensor([1.0, 10, 100]) + torch.tensor([5.0, 0, -7])
    decoder = online.ActionDecoder(3)
    args = online.Args(refit_epochs=1)
    online.fit_decoder(decoder, z, torch.randint(15, (200,)), args, torch.Generator())
    torch.testing.assert_close(decoder.mean, z.mean(0))
    torch.testing.assert_close(decoder.std, z.std(0), rtol=1e-4, atol=0)


def test_evaluation_games_are_not_the_training_games(root, toy_games, record_calls):
    made = record_calls(common, "ProcgenEnvs")
    run(online, root, method="rl", env_steps=1280, log_every_steps=1280)
    assert len(made) == 2 and made[0][2] != made[1][2]  # seeds


@pytest.mark.parametrize("script", [online, collect_data], ids=lambda script: script.__name__)
def test_rewards_are_discounted_by_gamma(root, toy_games, record_calls, script):
    made = record_calls(common.RewardNormalizer, "__init__")
    flags = dict(env_steps=1280) if script is online else dict(expert_steps=128, train_frames=0)
    run(script, root, gamma=0.9, **flags)
    assert [gamma for *_, gamma in made] == [0.9]


# --- recordings, solvers, games -------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", [0, 3])
def test_recordings_have_the_mean_returns_of_who_was_recorded(tmp_path, monkeypatch, num_levels):
    def play_episodes(envs, act, episodes_per_env):
        assert episodes_per_env == collect_data.EPISODES_PER_GAME
        return np.full((2, 2), 3.5 if isinstance(act, solvers.Solver) else 1.5)

    monkeypatch.setattr(common, "play_episodes", play_episodes)
    run(collect_data, tmp_path, game="maze", solver=True, plain=True, num_levels=num_levels)
    for split in ("train", "test", "random"):
        settings = load(tmp_path / f"data/maze/{split}/frames_000.npz")["settings"]
        assert settings["expert_return"] == 3.5
        paper = common.GAMES["maze"].random_return  # of all levels
        assert settings["random_return"] == (1.5 if num_levels else paper)


def test_miners_solver_does_not_go_down_from_under_a_boulder():
    """A diamond two cells below an agent under a boulder: sideways first, though that is longer."""
    obs = np.full((1, 64, 64, 3), 99, int)  # dirt

    def fill(row, column, color):
        rows, columns = (slice(round(6.4 * x), round(6.4 * (x + 1))) for x in (row, column))
        obs[0, rows, columns] = color

    fill(3, 4, solvers.BOULDER)
    fill(4, 4, solvers.AGENT)
    fill(6, 4, solvers.DIAMOND)
    down, left, right = (common.ACTIONS.index(x) for x in ("down", "left", "right"))
    assert solvers.walk("miner", obs)[0] in (left, right)
    fill(3, 4, 99)
    assert solvers.walk("miner", obs)[0] == down


@pytest.mark.parametrize("game", common.GAMES)
def test_actions_that_are_merged_have_the_same_effect(game):
    """From each of some states: 15 copies of the state, an action each, then no action."""
    distinct = common.distinct_actions(game)
    settings = dict(game=game, frame_size=64)
    source = common.ProcgenEnvs(settings, 1, seed=1)
    copies = common.ProcgenEnvs(settings, 15, seed=2)
    rng = np.random.default_rng(0)
    for _ in range(40):
        for _ in range(5):
            source.step(rng.integers(15, size=1))
        copies.games.set_state(source.games.get_state() * 15)
        for actions in (np.arange(15), *[np.full(15, common.NOOP)] * 3):
            obs, reward, done = copies.step(actions)
            assert (obs == obs[distinct]).all() and (reward == reward[distinct]).all()
            assert (done == done[distinct]).all()


# --- baselines and extras -------------------------------------------------------------------------


def test_pairs_are_probed_on_windows_of_other_episodes(root, record_calls):
    directions = np.array([common.ACTIONS.index(x) for x in action_pairs.DIRECTIONS] + [4])
    inside = []
    for path in sorted((root / "data/maze/test").glob("labels*")):
        labels = load(path)
        common.save_npz(path, **labels | dict(action=directions[labels["action"]].astype(np.uint8)))
        latents = load(root / "runs/maze/test" / path.name.replace("labels", "latents"))
        inside.append(latents["z"][latents["valid"]])
    probed = record_calls(action_pairs, "probe_pairs")
    probes = record_calls(action_pairs, "linear_probe")
    args = action_pairs.Args("maze", data_dir=root / "data", runs_dir=root / "runs")
    action_pairs.main(args)
    ((z, actions),) = probed
    assert np.array_equal(z, np.concatenate(inside))  # all windows, once, in the order of the files
    z_fit, fit, z_test, _ = probes[-1]  # all four
    chosen = np.isin(actions, directions[:4])
    assert np.array_equal(np.concatenate([z_fit, z_test]), z[chosen])
    assert len(z_fit) == int(0.75 * chosen.sum()) == len(fit)


def test_pictures_are_of_an_fdm_in_evaluation_mode(root, record_calls):
    measured = record_calls(viz, "fdm_mse")
    run(viz, root, points=120, projection="pca")
    ((fdm, *_),) = measured
    assert not any(module.training for module in fdm.modules())


def test_supervised_idms_learn_merged_actions(tmp_path, monkeypatch):
    """In maze, left-up has the effect of left, and the accuracy counts it as left."""
    root = write_toy_data(tmp_path)
    seen = []
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(
        supervised.F, "cross_entropy", lambda x, y: seen.append(y) or cross_entropy(x, y)
    )
    run(supervised, root, multiplier=0.25, grad_steps=4, batch_size=32)
    learned = torch.cat(seen)
    distinct = common.distinct_actions("maze")
    assert set(learned.tolist()) == {distinct[a] for a in range(5)}


def test_a_tie_is_no_win_and_the_nearest_point_is_taken(tmp_path):
    text = """variant,game,seed,scale,method,labels,env_steps,decoder,mean_return,episodes,kind
lapo,miner,1,x,random,,,,0,4,quota
lapo,miner,1,x,expert,,,,10,4,quota
lapo,miner,1,x,decoder,16,,1,9,4,quota
lapo,miner,1,x,bc,16,,1,9,4,quota
lapo,miner,2,x,decoder,16,,1,9,4,quota
lapo,miner,2,x,bc,16,,1,8,4,quota
"""
    (tmp_path / "returns.csv").write_text(text)
    _, (row,) = write_tables.compare(tmp_path, ["miner"], [("better", "decoder", "bc", 16)])
    assert row[-1] == "1 of 2"
    assert write_tables.at({1: {85: 5.0, 99: 6.0, 115: 7.0}}, 100) == {1: 6.0}


def test_the_supervised_idm_is_that_of_the_same_seed(tmp_path):
    text = "variant,game,seed,grad_step,probe\nlapo,miner,1,5,0.3\nlapo,miner,2,5,0.4\n"
    (tmp_path / "stage_1.csv").write_text(text)
    text = "variant,game,seed,grad_step,accuracy\nlapo,miner,1,4,0.5\nlapo,miner,2,4,0.6\n"
    (tmp_path / "supervised_idm.csv").write_text(text)
    rows = plot_figures.read_stage_1(tmp_path)
    assert [row["supervised"] for row in rows] == [0.5, 0.6]
