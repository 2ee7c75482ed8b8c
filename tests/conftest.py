"""Shared by all tests: a toy video whose true actions are known, and tiny data sets of it."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common
import torch

torch.set_num_threads(1)  # networks this small lose time by sharing work between threads

MOVES = np.array([(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)])  # (y, x): stay, left, right, up, down


def toy_video(episodes, length, seed, frame_size=32):
    """A square obeys one of five random actions a frame, and nothing but its motion shows them.

    Each episode has a background of random blocks, and a dark distractor that flies by itself. An
    action that would leave the frame is not drawn, so each action shows. Returns obs uint8
    [N, S, S, 3], first bool [N], action uint8 [N], N = episodes * length.
    """
    rng = np.random.default_rng(seed)
    unit = frame_size // 16  # the square is 3 units wide and moves by 1.5
    side, step = 3 * unit, 3 * unit // 2
    cells = (frame_size - side) // step
    obs = np.empty((episodes, length, frame_size, frame_size, 3), np.uint8)
    action = np.empty((episodes, length), np.uint8)
    for episode in range(episodes):
        blocks = rng.integers(60, 140, (8, 8, 3), dtype=np.uint8)
        background = blocks.repeat(frame_size // 8, 0).repeat(frame_size // 8, 1)
        cell = rng.integers(0, cells + 1, 2)
        distractor = rng.uniform(0, frame_size - side, 2)
        velocity = rng.choice([-1, 1], 2) * rng.uniform(0.5, 1, 2) * unit
        for t in range(length):
            frame = obs[episode, t]
            frame[:] = background
            y, x = distractor.astype(int)
            frame[y : y + side, x : x + side] = 0
            y, x = cell * step
            frame[y : y + side, x : x + side] = (255, 255, 0)
            moves = [cell + move for move in MOVES]
            allowed = [a for a, to in enumerate(moves) if min(to) >= 0 and max(to) <= cells]
            action[episode, t] = rng.choice(allowed)
            cell = moves[action[episode, t]]
            distractor = distractor + velocity
            outside = (distractor < 0) | (distractor > frame_size - side)
            velocity = np.where(outside, -velocity, velocity)
            distractor = np.clip(distractor, 0, frame_size - side)
    first = np.zeros((episodes, length), bool)
    first[:, 0] = True
    return obs.reshape(-1, *obs.shape[2:]), first.reshape(-1), action.reshape(-1)


def write_toy_data(root, game="maze", frame_size=16, shards=2, episodes=8, length=16, **settings):
    """Writes `shards` shards of the toy video to each split of root/data/<game>; returns root."""
    means = dict(random_return=0.0, expert_return=10.0)
    settings = (
        dict(game=game, frame_size=frame_size, start_level=0, num_levels=0) | means | settings
    )
    for seed, split in enumerate(("train", "test", "random")):
        for shard in range(shards):
            obs, first, action = toy_video(episodes, length, 10 * seed + shard, frame_size)
            folder = root / "data" / game / split
            common.save_npz(folder / f"frames_{shard:03d}.npz", settings, obs=obs, first=first)
            labels = dict(action=action, reward=(action == 2).astype(np.float32))
            common.save_npz(folder / f"labels_{shard:03d}.npz", settings, **labels)
    return root


# Flags that make each stage tiny
STAGE_1 = dict(
    device="cpu", multiplier=0.25, fdm_width=4, grad_steps=4, batch_size=8, eval_every=2,
    eval_windows=64, lr=1e-3, warmup_steps=1,
)  # fmt: skip
STAGE_2 = dict(
    device="cpu", multiplier=0.25, grad_steps=4, batch_size=8, eval_every=2, eval_windows=64,
    lr=1e-3, warmup_steps=1,
)  # fmt: skip
ONLINE = dict(
    device="cpu", num_envs=8, rollout_steps=16, env_steps=2048, minibatches=4, log_every_steps=1024,
    action_lr_ramp=(256, 512, 0.25), value_lr_ramp=(128, 512, 0.25),
    hidden_lr_ramp=(512, 1024, 0.1),
    refit_from=256, refit_each_until=640, refit_every=4, refit_until=1600, refit_batch_size=64,
)  # fmt: skip


def folders(root, game="maze"):
    """The flags that point a script to root."""
    return dict(game=game, data_dir=root / "data", runs_dir=root / "runs")


def fails(function, *arguments, **keywords):
    """The message of the one-line error with which the call ends."""
    with pytest.raises(SystemExit) as error:
        function(*arguments, **keywords)
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message, message
    return message


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """Toy data with stages 1 and 2 run on it, at 16x16; tests copy what they change."""
    import train_latent_bc
    import train_latent_dynamics

    root = write_toy_data(tmp_path_factory.mktemp("chain"))
    train_latent_dynamics.main(train_latent_dynamics.Args(**folders(root), **STAGE_1))
    train_latent_bc.main(train_latent_bc.Args(**folders(root), **STAGE_2))
    return root
