"""The test of the method: stage 1 finds the true actions of a toy video in which they are hidden, and only by training.

A square moves over random backgrounds by one of five random actions, beside a distractor that moves by itself. What an
untrained IDM makes of the frames does not tell the actions; what a trained one sends to the FDM must.
"""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import toy_video

import common
import train_latent_dynamics as stage1

SIZES = dict(multiplier=0.5, batch_size=16)  # at 64x64


def record(root, frame_size):
    """Writes 8,192 training and 1,024 held-out frames in episodes of 32 to root/data/maze; returns root."""
    for split, episodes, seed in (("train", 256, 1), ("test", 32, 1001)):
        obs, first, action, reward = toy_video(episodes, 32, seed, frame_size)
        folder = root / "data/maze" / split
        settings = json.dumps(dict(game="maze", start_level=0, num_levels=0, seed=seed))
        common.save_npz(folder / "frames_000.npz", obs=obs, first=first, settings=settings)
        common.save_npz(folder / "labels_000.npz", action=action, reward=reward, expert_return=1.0)
    return root


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return record(tmp_path_factory.mktemp("toy"), frame_size=64)


@pytest.fixture(scope="module")
def small_video(tmp_path_factory):
    return record(tmp_path_factory.mktemp("small_toy"), frame_size=32)


@pytest.fixture
def two_threads():
    """Networks of this size, unlike the other tests', gain by a second core."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def last_figures(root, run, **flags):
    """Runs stage 1 with small flags and returns the last row of its metrics."""
    settings = dict(
        game="maze", device="cpu", data_dir=root / "data", runs_dir=root / run, eval_every=1000, eval_windows=960, multiplier=0.25,
        fdm_width=4, embeddings=16, vq_decay=0.9, commitment=0.0005, predict_change=True, batch_size=32, lr=1e-3, grad_steps=700,
    )  # fmt: skip
    stage1.main(stage1.Args(**settings | flags))
    with open(common.run_folder(root / run, "maze", flags.get("vq", True)) / "train_latent_dynamics.csv") as file:
        return {name: float(value) for name, value in list(csv.DictReader(file))[-1].items()}


def test_stage_1_finds_the_hidden_actions(video, two_threads):
    """Some runs get stuck (two of seven, results/LOG.md): the codes collapse or tell only some actions apart, and with which seed
    hangs on the last bits of the arithmetic. The FDM's held-out error shows it without any label; then another seed has its turn.
    """
    for seed in (2, 3, 4):
        trained = last_figures(video, f"seed_{seed}", seed=seed, grad_steps=1600, **SIZES)
        if trained["test_error"] < 0.45 * trained["copy_error"]:
            break
    assert trained["test_error"] < 0.45 * trained["copy_error"]
    assert trained["probe"] >= 0.95


def test_without_quantisation_the_fdm_errs_less(small_video):
    """The paper's A.2: what the bottleneck does not hold back helps to predict, whether or not it is the action.

    One bit is held to here: eight latents of 16 embeddings hold back nothing of what so few updates can learn on this video.
    """
    sizes = dict(codebooks=1, latents_per_codebook=1, embedding_dim=128)
    one_bit = last_figures(small_video, "one_bit", **sizes, embeddings=2)
    free = last_figures(small_video, "one_bit", **sizes, vq=False)
    assert free["test_error"] < 0.95 * one_bit["test_error"]


def test_an_untrained_idm_does_not_tell_them(video):
    untrained = last_figures(video, "untrained", grad_steps=1, lr=1e-12, **SIZES)
    assert untrained["majority"] == pytest.approx(0.2, abs=0.05)
    assert untrained["probe"] < 0.5


def test_the_square_moves_as_its_action_says():
    obs, first, action, _ = toy_video(3, 20, seed=5)
    yellow = (obs == (255, 255, 0)).all(-1)
    corner = np.array([np.argwhere(frame).min(0) for frame in yellow])
    moves = np.array([(0, 0), (0, -6), (0, 6), (-6, 0), (6, 0)])  # stay, left, right, up, down
    for i in range(len(obs) - 1):
        if not first[i + 1]:
            assert (corner[i + 1] - corner[i] == moves[action[i]]).all()
