"""visualize_latents.py: figures with known outcomes, the table of equivalent actions on real Procgen, and a tiny chain."""

import json

import common
import numpy as np
import pytest
import torch
import visualize_latents as viz


def test_knn_purity_is_one_on_separated_clusters_and_chance_on_shuffled_labels():
    rng = np.random.default_rng(0)
    actions = rng.choice(5, 1000, p=[0.4, 0.3, 0.1, 0.1, 0.1])
    z = 100.0 * np.eye(8)[actions] + rng.normal(size=(1000, 8))
    purity, chance = viz.knn_purity(z, actions)
    assert purity == 1.0
    assert chance == pytest.approx(0.4**2 + 0.3**2 + 3 * 0.1**2, abs=0.03)
    purity, chance = viz.knn_purity(z, rng.permutation(actions))
    assert purity == pytest.approx(chance, abs=0.03)


def test_merged_accuracy_of_hand_made_predictions():
    left_down, left, none, right, d = (common.ACTIONS.index(name) for name in ("left-down", "left", "none", "right", "D"))
    distinct = common.distinct_actions("maze")  # left = left-down = left-up, none = D = A = ..
    assert distinct[left_down] == distinct[left] == left and distinct[d] == distinct[none] == none and distinct[right] == right
    probabilities = np.zeros((4, 15))
    probabilities[0, left] = 1.0  # truly left: right
    probabilities[1, left_down] = 1.0  # truly left: wrong, but equivalent
    probabilities[2, [none, d, right]] = 0.3, 0.3, 0.4  # truly none: right only once none and D add up
    probabilities[3, right] = 1.0  # truly D: wrong either way
    assert viz.accuracies(probabilities, np.array([left, left, none, d]), distinct) == (0.25, 0.75)


def test_probe_finds_a_linear_rule_and_copes_with_actions_it_never_saw():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(400, 6))
    actions = np.where(z[:, 0] > 0, 7, 1)
    probabilities = viz.probe(viz.LogisticRegression(), z[:300], actions[:300], z[300:])
    assert probabilities.shape == (100, 15) and np.allclose(probabilities.sum(1), 1)
    assert viz.accuracies(probabilities, actions[300:], np.arange(15))[0] > 0.95
    assert viz.accuracies(probabilities, np.full(100, 14), np.arange(15))[0] == 0


def test_codebook_use_counts_each_codebook_by_itself():
    codes = np.array([[0, 1, 5, 5], [2, 3, 5, 5]], np.uint8)  # first codebook: 4 codes alike; second: one code only
    perplexity, used = viz.codebook_use(codes, codebooks=2, embeddings=8)
    assert perplexity == pytest.approx([4, 1], rel=1e-3)
    assert used == pytest.approx([4 / 8, 1 / 8])


def test_fdm_errors_of_a_stub_that_adds_z_to_the_last_frame():
    rng = np.random.default_rng(0)
    step = rng.integers(-40, 41, 600)  # what is added to every pixel between o_t and o_{t+1}
    windows = np.full((600, 3, 4, 4, 3), 100, np.uint8)
    windows[:, 2] += step.astype(np.uint8)[:, None, None, None]  # wraps round to the right value
    z_q = torch.from_numpy(step[:, None]).float()

    def fdm(past, z):
        return viz.to_input(past[:, -1:]) + z[:, :, None, None] / 255

    errors = viz.fdm_errors(fdm, windows, z_q, z_q / 2, "cpu", seed=0)
    assert errors["true"] == pytest.approx(0, abs=1e-10)
    assert errors["copy"] == pytest.approx(np.square(step / 255).mean(), rel=1e-4)
    assert errors["zeroed"] == pytest.approx(errors["copy"], rel=1e-4)
    assert errors["mean_of_action"] == pytest.approx(errors["copy"] / 4, rel=1e-4)
    assert errors["shuffled"] == pytest.approx(2 * errors["copy"], rel=0.2)  # two steps that have nothing to do with each other


def test_medoids_are_real_rows_of_their_clusters_largest_first():
    rng = np.random.default_rng(0)
    cluster = rng.permutation(np.repeat([0, 1, 2], [50, 30, 20]))
    z_q = 10.0 * np.eye(4)[cluster] + rng.uniform(-1, 1, (100, 4))
    rows, found = viz.medoids(z_q.astype(np.float32), 3, seed=0)
    assert cluster[rows].tolist() == [0, 1, 2] and np.array_equal(found, cluster)
    for i, row in enumerate(rows):  # of its cluster's rows the nearest to their mean
        distance = np.linalg.norm(z_q - z_q[cluster == i].mean(0), axis=1)
        assert row == np.where(cluster == i, distance, np.inf).argmin()
    rows, found = viz.medoids(np.repeat(np.eye(2), [20, 30], 0).astype(np.float32), 12, seed=0)  # two combinations of codes
    assert rows.tolist() == [20, 0] and found.tolist() == [1] * 20 + [0] * 30


@pytest.mark.parametrize("context", [1, 2, 3])
def test_rolled_forward_under_a_shift_each_frame_is_shifted_once_more(context):
    past = torch.randint(256, (2, context + 1, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    lengths = []

    def fdm(past, z):  # z pixels to the right of the last frame, and a bit too bright to be a whole pixel value
        lengths.append(past.shape[1])
        shifted = torch.stack([frame.roll(int(by), 1) for frame, by in zip(past[:, -1], z[:, 0])])
        return viz.to_input(shifted[:, None]) + 0.3 / 255

    film = viz.roll_forward(fdm, past, torch.tensor([[1.0], [3.0]]), steps=15)
    assert film.shape == (2, 16, 16, 16, 3) and film.dtype == torch.uint8 and set(lengths) == {context + 1}
    for row, by in enumerate((1, 3)):
        for step in range(16):
            assert torch.equal(film[row, step], past[row, -1].roll(by * step, 1))


def test_pca_gives_the_two_widest_directions():
    z = np.random.default_rng(0).normal(size=(500, 5)) * [1, 20, 1, 5, 1]
    assert viz.project(z, "pca", seed=0).std(0) == pytest.approx([20, 5], rel=0.1)


def test_film_strip_and_gif(tmp_path):
    film = np.random.default_rng(0).integers(256, size=(5, 16, 16, 16, 3), dtype=np.uint8)
    film[:, 8] = film[:, 7]  # a still moment is a frame of its own
    names = [f"{i}: 20%" for i in range(5)]
    viz.plot_film(tmp_path / "film.png", film, names, "title")
    viz.save_film_gif(tmp_path / "film.gif", film, names, "title", columns=4, frames_per_second=5)
    assert viz.Image.open(tmp_path / "film.png").format == "PNG"
    gif = viz.Image.open(tmp_path / "film.gif")
    assert gif.n_frames == 16 and gif.info["loop"] == 0 and gif.info["duration"] == 200
    assert gif.size == (int(2.3 * 4 * 80), int((2.75 * 2 + 0.9) * 80))
    first = np.asarray(gif.convert("RGB")).astype(int)
    gif.seek(1)
    assert np.abs(first - np.asarray(gif.convert("RGB"))).mean() > 10  # it moves


def same_outcome(game, states, horizon):
    """bool [15, 15]: which actions led to the same frames, rewards and episode ends from all of `states` states."""
    source, copies = (common.games.ProcgenGym3Env(num, game, distribution_mode="easy", rand_seed=3, num_threads=0) for num in (8, 15))
    rng = np.random.default_rng(0)
    same = np.ones((15, 15), bool)
    action = rng.integers(15, size=8)
    for _ in range(states // 8):
        for _ in range(10):  # sticky random play between two samples
            action = np.where(rng.random(8) < 0.3, rng.integers(15, size=8), action)
            source.act(action)
            source.observe()
        for state in source.get_state():
            copies.set_state([state] * 15)
            action_of_copy = np.arange(15)
            for _ in range(horizon):  # the internal state may remember the action, so let the copies go on
                copies.act(action_of_copy)
                reward, obs, first = copies.observe()
                outcome = np.array([hash((o.tobytes(), r, f)) for o, r, f in zip(obs["rgb"], reward.tolist(), first.tolist())])
                same &= outcome[:, None] == outcome
                action_of_copy = np.full(15, rng.integers(15))
    return same


@pytest.mark.parametrize("game", ["climber", "ninja", "starpilot"])
def test_actions_said_to_be_equivalent_are_and_no_others(game):
    distinct = common.distinct_actions(game)
    assert (same_outcome(game, states=160, horizon=4) == (distinct[:, None] == distinct[None])).all()


def test_the_table_covers_all_games_and_names_real_actions_once():
    assert set(common.EQUIVALENT_ACTIONS) == set(common.RETURNS)
    for groups in common.EQUIVALENT_ACTIONS.values():
        names = " ".join(groups).split()
        assert len(names) == len(set(names)) and set(names) <= set(common.ACTIONS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a tiny run of the real scripts, up to the latents."""
    import collect_data
    import train_latent_dynamics

    root = tmp_path_factory.mktemp("run")
    where = dict(game="starpilot", device="cpu", data_dir=root / "data", runs_dir=root / "runs")
    collect_data.main(collect_data.Args(
        **where, experts_dir=root / "experts", expert_steps=64, num_envs=4, rollout_steps=64, frame_size=16, expert_multiplier=0.25,
        train_frames=512, test_frames=256,
    ))  # fmt: skip
    train_latent_dynamics.main(train_latent_dynamics.Args(
        **where, multiplier=0.25, fdm_width=4, codebooks=2, latents_per_codebook=2, embeddings=8, embedding_dim=4,
        grad_steps=3, batch_size=8, eval_every=3, eval_windows=64,
    ))  # fmt: skip
    return where


def test_chain_writes_plots_and_figures(run, capsys):
    viz.main(viz.Args(**run, points=100, projection="umap", supervised_steps=2))
    folder = run["runs_dir"] / "starpilot"
    for name in ("latents.png", "latents_frames.png", "fdm.png", "film.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert viz.Image.open(folder / "film.gif").n_frames == 16
    with np.load(folder / "latents.npz", allow_pickle=False) as file:
        arrays = dict(file)
    assert arrays["xy"].shape == (100, 2) and np.isfinite(arrays["xy"]).all()
    assert arrays["action"].shape == arrays["distinct_action"].shape == (100,)
    assert arrays["perplexity"].shape == arrays["codes_used"].shape == (2,)
    for name in ("majority", "untrained_linear", "linear", "mlp", "knn_purity", "knn_chance", "silhouette"):
        assert arrays[name].shape == (2,)  # all 15 actions; equivalent ones merged
    assert arrays["supervised"].shape == (2,)
    for name in ("true", "mean_of_action", "zeroed", "shuffled", "copy"):
        assert arrays[f"fdm_error_{name}"] > 0
    settings = json.loads(str(arrays["settings"]))
    assert settings["projection"] == "umap" and settings["vq"] and (settings["frame_size"], settings["num_levels"]) == (16, 0)
    table = capsys.readouterr().out
    assert "linear probe of z" in table and "shuffled" in table
    assert "IDM trained on true actions" in table


def test_chain_without_quantisation_and_with_more_context(run, capsys):
    import train_latent_dynamics

    small = dict(multiplier=0.25, fdm_width=4, latents_per_codebook=2, embedding_dim=4, grad_steps=3, batch_size=8, eval_windows=64)
    train_latent_dynamics.main(train_latent_dynamics.Args(**run, **small, vq=False, context=3))
    viz.main(viz.Args(**run, vq=False, points=100, projection="tsne", supervised_steps=0))
    assert "IDM trained on true actions" not in capsys.readouterr().out
    folder = run["runs_dir"] / "starpilot_no_vq"
    assert all((folder / name).exists() for name in ("latents.png", "latents_frames.png", "fdm.png", "film.png", "film.gif"))
    with np.load(folder / "latents.npz", allow_pickle=False) as file:
        assert "perplexity" not in file.files and "supervised" not in file.files and np.isfinite(file["xy"]).all()
        assert not json.loads(str(file["settings"]))["vq"]


def error_line(args):
    with pytest.raises(SystemExit) as error:
        viz.main(args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_or_foreign_files_give_one_clear_line(run, tmp_path):
    args = viz.Args(**{**run, "runs_dir": tmp_path})
    assert "latent_dynamics.pt is missing" in error_line(args)
    assert "did you mean" in error_line(viz.Args(game="coinrum"))

    (tmp_path / "starpilot").mkdir()
    checkpoint = run["runs_dir"] / "starpilot" / "latent_dynamics.pt"
    (tmp_path / "starpilot" / "latent_dynamics.pt").write_bytes(checkpoint.read_bytes())
    line = error_line(args)
    assert "latents_000.npz is missing" in line and "python train_latent_dynamics.py --game starpilot" in line

    dynamics = torch.load(checkpoint, weights_only=True)["fingerprint"]
    for split in ("train", "test"):  # latents of fewer frames than lie in data/
        frames = sorted((run["data_dir"] / "starpilot" / split).glob("frames_*.npz"))
        for path in frames:
            rows = common.count_rows(path) - 8
            latents = dict(z=np.zeros((rows, 16), np.float16), codes=np.zeros((rows, 4), np.uint8), valid=np.ones(rows, bool), dynamics=dynamics)
            common.save_npz(common.beside(path, "latents", tmp_path / "starpilot" / split), **latents)
    assert "made from other frames" in error_line(args)


def test_missing_labels_give_one_clear_line(run, tmp_path):
    for split in ("train", "test"):
        for path in (run["data_dir"] / "starpilot" / split).glob("frames_*.npz"):
            common.write_bytes(tmp_path / "starpilot" / split / path.name, path.read_bytes())
    line = error_line(viz.Args(**{**run, "data_dir": tmp_path}))
    assert "labels_000.npz is missing" in line and "python collect_data.py --game starpilot" in line
