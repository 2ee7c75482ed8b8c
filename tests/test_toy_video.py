"""The test of the method: stage 1 finds the actions of a video in which nothing else shows them."""

import csv

import numpy as np
import pytest
from conftest import MOVES, fails, folders, toy_video

import common
import train_latent_dynamics as stage1

# Small and fast codebooks, so that they follow z while it spreads out (results/LOG.md)
FLAGS = dict(
    device="cpu", multiplier=0.25, fdm_width=4, embeddings=16, vq_decay=0.9, commitment_cost=0.0005,
    predict_change=True, batch_size=32, lr=1e-3, eval_every=300, eval_windows=960,
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    for split, episodes, seed in (("train", 256, 1), ("test", 48, 1001)):
        obs, first, action = toy_video(episodes, 32, seed, frame_size=32)
        folder = root / "data/toy" / split
        common.save_npz(folder / "frames_000.npz", {}, obs=obs, first=first)
        common.save_npz(folder / "labels_000.npz", {}, action=action, reward=np.zeros(len(action)))
    return root


def run(root, **flags):
    """The first and the last row of metrics: of the untrained and of the trained IDM."""
    stage1.main(stage1.Args(**folders(root, "toy"), **FLAGS | flags))
    with open(root / "runs/toy/train_latent_dynamics.csv") as file:
        rows = [{k: float(x) for k, x in row.items()} for row in csv.DictReader(file)]
    return rows[0], rows[-1]


def test_stage_1_finds_the_hidden_actions(root):
    untrained, trained = run(root, grad_steps=600)
    assert untrained["majority"] == pytest.approx(0.2, abs=0.06)
    assert untrained["probe"] < 0.5
    assert trained["probe"] > 0.9 and trained["test_mse"] < 0.6 * trained["copy_mse"]


def test_without_quantization_the_fdm_errs_less(root):
    """As in A.2: what a narrow bottleneck (here one bit) keeps back helps to predict."""
    sizes = dict(codebooks=1, latents_per_codebook=1, embedding_dim=128, embeddings=2)
    one_bit = run(root, grad_steps=300, **sizes)[1]
    free = run(root, grad_steps=300, **sizes, vq=False)[1]
    assert free["test_mse"] < 0.95 * one_bit["test_mse"]


def test_the_square_moves_as_its_action_says():
    obs, first, action = toy_video(3, 20, seed=5)
    yellow = (obs == (255, 255, 0)).all(-1)
    corner = np.array([np.argwhere(frame).min(0) for frame in yellow])
    for i in range(len(obs) - 1):
        if not first[i + 1]:
            assert (corner[i + 1] - corner[i] == 3 * MOVES[action[i]]).all()


def test_a_collapsed_codebook_is_reported(root, tmp_path, capsys):
    """Identical frames leave every position of a codebook on one code."""
    frames = np.full((200, 16, 16, 3), 77, np.uint8)
    for split in ("train", "test"):
        folder = tmp_path / "data/still" / split
        common.save_npz(folder / "frames_000.npz", {}, obs=frames, first=np.zeros(200, bool))
    flags = FLAGS | dict(grad_steps=3, eval_every=3, lr=1e-3)
    stage1.main(stage1.Args(**folders(tmp_path, "still"), **flags))
    assert "the codebooks have collapsed" in capsys.readouterr().out
    assert "is not one of Procgen's games" in fails(
        common.ProcgenEnvs, dict(game="still", frame_size=16), 1, 1
    )
