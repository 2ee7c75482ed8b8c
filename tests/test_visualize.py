"""visualize_latents.py: metrics by hand, and whole runs on tiny data with and without labels."""

import shutil
import sys

import common  # before torch
import numpy as np
import pytest
import torch
import train_latent_dynamics
import visualize_latents as viz
from conftest import fails, load, run, write_toy_data
from PIL import Image


def test_medoids_are_rows_of_their_clusters_and_largest_first():
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat([0, 1, 2], [50, 30, 20]))
    z_q = (10 * np.eye(4)[truth] + rng.uniform(-1, 1, (100, 4))).astype(np.float32)
    cluster = viz.find_clusters(z_q, 3, seed=0)
    assert np.array_equal(cluster, truth)
    rows = viz.medoids(z_q, cluster)
    assert list(rows) == [0, 1, 2]
    for i, row in rows.items():
        distance = np.linalg.norm(z_q - z_q[truth == i].mean(0), axis=1)
        assert row == np.where(truth == i, distance, np.inf).argmin()


def test_fdm_mse_of_an_fdm_that_adds_z_to_the_last_frame():
    step = torch.tensor([30, -10, 0, 20])  # of all pixels
    windows = torch.full((4, 3, 2, 2, 3), 100, dtype=torch.uint8)
    windows[:, 2] += step.to(torch.uint8)[:, None, None, None]  # wraps round to the right value
    z_q = step[:, None].float()

    def fdm(past, z):
        return common.to_input(past[:, -1:]) + z[:, :, None, None] / 255

    latents = dict(true=z_q, zeroed=0 * z_q, shuffled=z_q[[1, 0, 3, 2]])
    mse = viz.fdm_mse(fdm, windows, latents)
    assert list(mse) == [f"fdm_mse_{name}" for name in ("copy", "true", "zeroed", "shuffled")]
    squares = [350, 0, 350, 1000]  # (900 + 100 + 0 + 400) / 4; (40^2 + 40^2 + 20^2 + 20^2) / 4
    assert list(mse.values()) == pytest.approx([x / 255**2 for x in squares], rel=1e-4, abs=1e-12)


def test_the_map_places_latents_that_are_equal():
    """As of a clip that ends in a still card."""
    z = np.zeros((300, 8), np.float32)
    z[:100] = np.random.default_rng(0).normal(size=(100, 8))
    xy = viz.project(z, "umap", seed=1)
    assert xy.shape == (300, 2) and np.isfinite(xy).all()


def load_results(run_dir):
    assert Image.open(run_dir / "latents.png").format == "PNG"
    arrays = load(run_dir / "latents_metrics.npz")
    return arrays, arrays.pop("settings")


def test_whole_script_with_labels(root):
    run_dir = root / "runs/maze"
    run(viz, root, points=120, projection="pca")
    m, settings = load_results(run_dir)
    assert m["xy"].shape == (len(m["group"]), 2) and np.isfinite(m["xy"]).all()
    left, down, none = (common.ACTIONS.index(name) for name in ("left", "down", "none"))
    assert set(m["group"]) == {left, down, none}  # left-down and left-up are merged with left
    fdm = {f"fdm_mse_{name}" for name in ("true", "zeroed", "shuffled", "copy")}
    assert m.keys() == {"xy", "group"} | fdm and all(m[name] > 0 for name in fdm)
    assert settings["args"]["projection"] == "pca" and settings["recording"]["game"] == "maze"


def test_whole_script_without_labels_codes_or_procgen(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "procgen", None)  # cannot be imported
    write_toy_data(tmp_path, "own_video")
    shutil.rmtree(tmp_path / "data/own_video/random")
    for path in tmp_path.rglob("labels_*.npz"):
        path.unlink()
    run(train_latent_dynamics, tmp_path, game="own_video", grad_steps=0, vq=False, context=2)
    latents = load(tmp_path / "runs/own_video/test/latents_000.npz")
    assert latents["codes"].shape == (128, 0) and latents["valid"].sum() == 8 * (16 - 3)
    flags = dict(game="own_video", points=120, projection="pca")
    run(viz, tmp_path, **flags)
    m, settings = load_results(tmp_path / "runs/own_video")
    fdm = {f"fdm_mse_{name}" for name in ("true", "zeroed", "shuffled", "copy")}
    assert m.keys() == {"xy", "group"} | fdm
    counts = np.bincount(m["group"])  # largest first
    assert 2 <= len(counts) <= 12 and (np.diff(counts) <= 0).all()
    assert settings["grad_step"] == 0
    assert "at least 50" in fails(run, viz, tmp_path, **flags | dict(points=20))
    missing = fails(run, viz, tmp_path, **flags | dict(game="maze"))
    assert "train_latent_dynamics.py writes it" in missing
