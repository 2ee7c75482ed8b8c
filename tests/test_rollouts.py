"""Open-loop rollouts of the FDM, the clusters whose latents they hold, and their film."""

import numpy as np
import pytest
import torch
from conftest import args_of, fails, load, run
from PIL import Image

import common
from extras import rollouts


@pytest.mark.parametrize("context", [1, 3])
def test_rollout_feeds_predictions_back_as_whole_pixel_values(context):
    past = torch.randint(256, (2, context + 1, 8, 8, 3), dtype=torch.uint8)

    def fdm(past, z):  # z pixels to the right of the last frame, and not a whole pixel value
        assert past.shape[1] == context + 1 and past.dtype == torch.uint8
        moved = torch.stack([frame.roll(int(by), 1) for frame, by in zip(past[:, -1], z[:, 0])])
        return common.to_input(moved[:, None]) + 0.3 / 255

    film = rollouts.rollout(fdm, past, torch.tensor([[1.0], [3.0]]), steps=5)
    for row, by in enumerate((1, 3)):
        for step in range(6):
            assert torch.equal(film[row, step], past[row, -1].roll(by * step, 1))


def test_rollout_clips_what_leaves_the_range_of_pixels():
    past = torch.zeros(1, 2, 8, 8, 3, dtype=torch.uint8)
    film = rollouts.rollout(lambda past, z: z.expand(1, 3, 8, 8), past, torch.tensor(9.0), 1)
    assert (film[0, 1] == 255).all()


@torch.no_grad()
def clusters_of(root, num_clusters):
    args = args_of(rollouts, root)
    checkpoint, quantizer, _ = rollouts.load_dynamics(args, torch.device("cpu"))
    return rollouts.cluster_latents(args, checkpoint, quantizer, num_clusters, torch.device("cpu"))


def rewrite_latents(root, z_of_action):
    """Makes each valid latent of the test split a function of its true action."""
    for path in (root / "runs/maze/test").glob("latents_*.npz"):
        latents = load(path)
        action = load(root / "data/maze/test" / path.name.replace("latents", "labels"))["action"]
        latents["z"] = z_of_action[action].astype(np.float16) * latents["valid"][:, None]
        common.save_npz(path, latents.pop("settings"), **latents)


def test_clusters_of_latents_that_are_the_actions(root):
    z_dim = load(root / "runs/maze/latent_dynamics.pt")["config"]["idm"]["z_dim"]
    rewrite_latents(root, np.random.default_rng(0).normal(size=(5, z_dim)))
    # one quantized latent for each action
    clusters = clusters_of(root, 5)
    assert (clusters.action_fractions.max(1) == 1).all()
    assert clusters.action_fractions.sum(1) == pytest.approx(np.ones(5))
    # fractions: those of the true actions, the largest first
    distinct = common.distinct_actions("maze")
    counts = np.zeros(common.NUM_ACTIONS)
    windows = {}
    for path in sorted((root / "data/maze/test").glob("frames_*.npz")):
        frames = load(path)
        valid = np.flatnonzero(common.valid_windows(frames["first"], 1))
        action = load(common.labels_path(path))["action"]
        for row in valid:
            counts[action[row]] += 1
            windows[frames["obs"][row - 1 : row + 2].tobytes()] = distinct[action[row]]
    expected = np.sort(counts[counts > 0] / counts.sum())[::-1]
    assert clusters.fractions == pytest.approx(expected, abs=0.05)  # of rows drawn
    assert (np.diff(clusters.fractions) <= 0).all()
    # the window of each medoid is one whose latent it is
    for window, fractions in zip(clusters.windows.numpy(), clusters.action_fractions):
        assert windows[window.tobytes()] == fractions.argmax()


def test_fewer_distinct_latents_than_clusters(root):
    z_dim = load(root / "runs/maze/latent_dynamics.pt")["config"]["idm"]["z_dim"]
    rewrite_latents(root, np.repeat([[0.0], [1], [0], [0], [0]], z_dim, 1))
    clusters = clusters_of(root, 12)
    assert len(clusters.z_q) == len(clusters.windows) == len(clusters.fractions) <= 2


def test_film_of_each_latent_held(root, monkeypatch, record_calls):
    films = record_calls(rollouts, "plot_film")
    figures = []
    monkeypatch.setattr(common, "save_figure", lambda figure, path: figures.append(figure))
    run(rollouts, root, clusters=3, steps=4)
    folder, frames, names, title = films[0]
    assert folder == root / "runs/maze" and title.startswith("maze: open-loop rollouts")
    assert frames.shape == (3, 5, 16, 16, 3) and frames.dtype == np.uint8
    assert (frames[:, 0] == frames[0, 0]).all()  # one start
    clusters = clusters_of(root, 3)
    args = args_of(rollouts, root)
    _, _, fdm = rollouts.load_dynamics(args, torch.device("cpu"))
    for i in range(3):
        past = clusters.windows[:1, :-1]
        with torch.no_grad():
            expected = rollouts.rollout(fdm, past, clusters.z_q[i : i + 1], 4)[0]
        assert abs(frames[i].astype(int) - expected.numpy()).max() <= 1
        assert names[i].startswith(f"{i + 1}: {clusters.fractions[i]:.0%} of z\n")
    panels = figures[0].axes  # o_t, +2, +4 of each rollout
    assert [ax.get_title() for ax in panels[:3]] == ["$o_t$", "+2", "+4"]
    assert [panels[3 * i].get_ylabel() for i in range(3)] == names


def test_film_files(tmp_path):
    frames = np.random.default_rng(0).integers(256, size=(5, 6, 16, 16, 3), dtype=np.uint8)
    rollouts.plot_film(tmp_path, frames, list("abcde"), "title")
    assert Image.open(tmp_path / "film.png").format == "PNG"
    film = Image.open(tmp_path / "film.gif")
    assert film.format == "GIF" and film.n_frames == 6 and film.info["duration"] == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.gif", "film.png"]


def test_without_labels_clusters_have_no_names(root):
    for path in (root / "data/maze/test").glob("labels_*"):
        path.unlink()
    assert clusters_of(root, 3).action_fractions is None


def test_too_early_gives_one_line(root):
    (root / "runs/maze/latent_dynamics.pt").unlink()
    assert "train_latent_dynamics.py writes it" in fails(run, rollouts, root)
