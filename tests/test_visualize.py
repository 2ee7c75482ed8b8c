"""visualize_latents.py: metrics by hand, and whole runs on tiny data with and without labels."""

import json
import sys
from types import SimpleNamespace

import common  # before torch
import numpy as np
import pytest
import torch
import train_latent_dynamics
import visualize_latents as viz
from PIL import Image

LEFT, RIGHT, NONE, D = (common.ACTIONS.index(name) for name in ("left", "right", "none", "D"))


def test_knn_purity_and_chance_by_hand():
    z = np.array([[0.0], [1], [3], [10], [11], [13]])  # neighbours: 1, 0, 1, 4, 3, 4
    purity, chance = viz.knn_purity(z, np.array([0, 0, 0, 0, 1, 1]), k=1)
    assert purity == pytest.approx(4 / 6)  # not: row 3, next to row 4, and row 4
    assert chance == pytest.approx((4 * 3 + 2 * 1) / (6 * 5))


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_medoids_are_rows_of_their_clusters_and_largest_first():
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat([0, 1, 2], [50, 30, 20]))
    z_q = (10 * np.eye(4)[truth] + rng.uniform(-1, 1, (100, 4))).astype(np.float32)
    rows, cluster = viz.medoids(z_q, 3, seed=0)
    assert np.array_equal(cluster, truth) and truth[rows].tolist() == [0, 1, 2]
    for i, row in enumerate(rows):
        distance = np.linalg.norm(z_q - z_q[truth == i].mean(0), axis=1)
        assert row == np.where(truth == i, distance, np.inf).argmin()
    two = np.repeat(np.eye(2), [20, 30], 0).astype(np.float32)  # fewer rows than clusters
    assert viz.medoids(two, 12, seed=0)[0].tolist() == [20, 0]


def test_code_metrics_by_hand():
    codes = np.array([[0, 3, 5, 5], [1, 3, 5, 5]], np.uint8)  # two positions of each codebook
    metrics = viz.code_metrics(codes, codebooks=2, embeddings=8)
    assert metrics["codes_used"] == (3 + 1) / 16
    assert metrics["perplexity_mean"] == pytest.approx((2 + 1 + 1 + 1) / 4)
    assert metrics["perplexity_min"] == pytest.approx(1)


def test_fdm_mse_of_an_fdm_that_adds_z_to_the_last_frame():
    step = torch.tensor([30, -10, 0, 20])  # of all pixels
    windows = torch.full((4, 3, 2, 2, 3), 100, dtype=torch.uint8)
    windows[:, 2] += step.to(torch.uint8)[:, None, None, None]  # wraps round to the right value
    z_q = step[:, None].float()

    def fdm(past, z):
        return viz.to_input(past[:, -1:]) + z[:, :, None, None] / 255

    latents = dict(true=z_q, zeroed=0 * z_q, shuffled=z_q[[1, 0, 3, 2]])
    mse = viz.fdm_mse(fdm, windows, latents, batch_size=3)
    assert list(mse) == [f"fdm_mse_{name}" for name in ("true", "zeroed", "shuffled", "copy")]
    squares = [0, 350, 1000, 350]  # (900 + 100 + 0 + 400) / 4; (40^2 + 40^2 + 20^2 + 20^2) / 4
    assert list(mse.values()) == pytest.approx([x / 255**2 for x in squares], rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("context", [1, 3])
def test_rollout_feeds_predictions_back_as_whole_pixel_values(context):
    past = torch.randint(256, (2, context + 1, 8, 8, 3), dtype=torch.uint8)

    def fdm(past, z):  # z pixels to the right of the last frame, and not a whole pixel value
        assert past.shape[1] == context + 1 and past.dtype == torch.uint8
        moved = torch.stack([frame.roll(int(by), 1) for frame, by in zip(past[:, -1], z[:, 0])])
        return viz.to_input(moved[:, None]) + 0.3 / 255

    film = viz.rollout(fdm, past, torch.tensor([[1.0], [3.0]]), steps=5)
    for row, by in enumerate((1, 3)):
        for step in range(6):
            assert torch.equal(film[row, step], past[row, -1].roll(by * step, 1))


def broken_umap(*_, **__):
    raise RuntimeError("cannot cache function: no locator available for file 'é'\nsecond line")


def test_umap_is_used_if_it_works_and_tsne_if_not(monkeypatch, capsys):
    z = np.random.default_rng(0).normal(size=(40, 4))
    fitted = SimpleNamespace(fit_transform=lambda z: z[:, :2])
    works = SimpleNamespace(UMAP=lambda *_, **__: fitted)
    monkeypatch.setitem(sys.modules, "umap", works)
    xy, method = viz.project(z, "umap", seed=0)
    assert method == "umap" and np.array_equal(xy, z[:, :2])
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=broken_umap))
    xy, method = viz.project(z, "umap", seed=0)
    assert method == "tsne" and xy.shape == (40, 2)
    line = capsys.readouterr().out
    assert line.isascii() and line.count("\n") == 1 and "t-SNE" in line


def write_split(folder, game, rows, seed, labels):
    """A square that goes left or right, or stays (actions none and D, of equal effect)."""
    rng = np.random.default_rng(seed)
    action = rng.choice([LEFT, RIGHT, NONE, D], rows)
    column = np.cumsum(np.select([action == LEFT, action == RIGHT], [-2, 2], 0)) % 16
    obs = np.full((rows, 16, 16, 3), 60, np.uint8)
    obs[np.arange(rows)[1:], 6:10, column[:-1]] = 255
    first = np.arange(rows) % 50 == 0
    common.save_npz(folder / "frames_000.npz", dict(game=game), obs=obs, first=first)
    if labels:
        arrays = dict(action=action.astype(np.uint8), reward=np.zeros(rows, np.float32))
        common.save_npz(folder / "labels_000.npz", dict(game=game), **arrays)


def tiny_run(root, game, labels, **flags):
    """Arguments for visualize_latents.py after a toy run of stage 1."""
    where = dict(game=game, device="cpu", data_dir=root / "data", runs_dir=root / "runs")
    for seed, split in enumerate(["train", "test", "random"][: 3 if labels else 2]):
        write_split(root / "data" / game / split, game, 300, seed, labels)
    small = dict(codebooks=2, latents_per_codebook=2, embeddings=8, embedding_dim=4, batch_size=8)
    small |= dict(multiplier=0.25, fdm_width=4, grad_steps=2, eval_windows=120)
    train_latent_dynamics.main(train_latent_dynamics.Args(**where, **small, **flags))
    return where


def load_results(run):
    for name in ("latents", "latents_frames", "fdm", "film"):
        assert Image.open(run / f"{name}.png").format == "PNG"
    assert Image.open(run / "film.gif").n_frames == 16
    with np.load(run / "latents.npz", allow_pickle=False) as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("settings")))


def test_whole_script_with_labels(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=broken_umap))
    where = tiny_run(tmp_path, "miner", labels=True)
    run, bounds = tmp_path / "runs" / "miner", dict(random_return=1.25, expert_return=11.75)
    curves = dict(labels=[16], returns=[[2.0, 4.0]], blind_return=1.5)
    common.save_npz(run / "decode_offline.npz", bounds, **curves)
    common.save_npz(run / "decode_online_rl_sl.npz", bounds, env_steps=[4096], returns=[7.5])
    capsys.readouterr()
    probes, linear_probe = [], viz.linear_probe
    monkeypatch.setattr(viz, "linear_probe", lambda *x: probes.append(x) or linear_probe(*x))
    viz.main(viz.Args(**where, points=120, supervised_steps=2))
    assert [len(fit_z) for fit_z, *_ in probes] == [90, 90, 120, 120]  # random play, then train
    assert [len(test_z) for _, _, test_z, _ in probes][:2] == [30, 30]
    with np.load(run / "train/latents_000.npz") as file:
        trained_on = {tuple(z) for z in file["z"][file["valid"]].tolist()}
    assert {tuple(z) for z in probes[2][0].astype(np.float16).tolist()} <= trained_on
    text = capsys.readouterr().out
    assert text.isascii() and text.index("random_probe ") < text.index("majority")  # comes first
    for line in ("without looking 1.5", "16 labels 3", "4,096 steps online 7.5"):
        assert line in " ".join(text.split())
    m, settings = load_results(run)
    assert m["xy"].shape == (len(m["action"]), 2) and np.isfinite(m["xy"]).all()
    assert set(m["action"]) <= {LEFT, RIGHT, NONE}  # D is merged with none
    names = [f"{a}{b}" for a in ("", "random_") for b in ("probe", "majority", "probe_untrained")]
    names += "mlp_probe supervised knn_purity knn_chance codes_used".split()
    assert all(0 <= m[name] <= 1 and m[name].shape == () for name in names)
    assert -1 <= m["silhouette"] <= 1 and 0.99 < m["perplexity_min"] <= m["perplexity_mean"] <= 8
    assert all(m[f"fdm_mse_{x}"] > 0 for x in "true mean_of_action zeroed shuffled copy".split())
    assert settings["projection"] == "tsne" and settings["labelled"] and settings["game"] == "miner"
    names, *_, values = (run / "train_latent_dynamics.csv").read_text().splitlines()
    stage_1 = dict(zip(names.split(","), values.split(",")))  # on the same windows
    assert m["random_probe"] == pytest.approx(float(stage_1["probe"]))


def test_whole_script_without_labels_codes_or_procgen(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "procgen", None)  # cannot be imported
    where = tiny_run(tmp_path, "own_video", labels=False, vq=False, context=2)
    viz.main(viz.Args(**where, points=120, projection="pca"))
    m, settings = load_results(tmp_path / "runs" / "own_video")
    fdm = {f"fdm_mse_{name}" for name in ("true", "zeroed", "shuffled", "copy")}
    assert m.keys() == {"xy", "cluster"} | fdm
    counts = np.bincount(m["cluster"])  # largest first
    assert 2 <= len(counts) <= 12 and (np.diff(counts) <= 0).all()
    assert not settings["labelled"] and not settings["vq"]
    with pytest.raises(SystemExit, match="at least 50"):
        viz.main(viz.Args(**where, points=20, projection="pca"))
    with pytest.raises(SystemExit, match="make it with: python train_latent_dynamics.py"):
        viz.main(viz.Args(**where | dict(game="maze")))
