"""The test of the method: stage 1 finds the actions of a video in which nothing else shows them."""

import csv

from conftest import run, write_toy_data
import train_latent_dynamics as stage1

# Small and fast codebooks that follow z while it spreads out, and latents that start apart: from
# the default start, one code stays alone for 300 updates with one version of torch, and longer with
# another (docs/lessons.md). After 600 updates, seeds 1, 2, 3 are at 0.76, 1.00, 1.00.
FLAGS = dict(
    game="toy", seed=2, embeddings=16, vq_decay=0.9, commitment_cost=0.0005, z_std=0.2,
    predict_change=True, batch_size=32, warmup_steps=50, grad_steps=600, eval_every=300,
)  # fmt: skip


def test_stage_1_finds_the_hidden_actions(tmp_path):
    write_toy_data(tmp_path, "toy", frame_size=32, shards=1, episodes=256, length=32)
    run(stage1, tmp_path, **FLAGS)
    with open(tmp_path / "runs/toy/train_latent_dynamics.csv") as file:
        rows = [{k: float(x) for k, x in row.items()} for row in csv.DictReader(file)]
    untrained, trained = rows[0], rows[-1]
    assert untrained["majority"] < 0.3 and untrained["probe"] < 0.5
    assert trained["probe"] > 0.9 and trained["test_mse"] < 0.65 * trained["copy_mse"]
