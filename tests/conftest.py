"""Shared by all tests: the paths, tiny data in the project's file formats, and the toy video."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

torch.set_num_threads(1)  # networks this small lose more by sharing work between threads than they win

MOVES = np.array([(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)])  # (y, x) of the toy's actions: stay, left, right, up, down


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """Python's own at the start of every test: a shell's background job ignores Ctrl-C, a failed run leaves its own behind."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def toy_video(episodes, length, seed, frame_size=64, grid=8):
    """A video whose true actions are known, and whose background, starts and distractor tell nothing about them.

    Each episode has a background of random coloured blocks. A bright square obeys one of five random actions a frame
    (stay, left, right, up, down; never into a wall, so each action shows), and a dark square flies straight by itself,
    bounces off the walls and passes beneath the other.

    Returns obs uint8 [N, S, S, 3], first bool [N], action uint8 [N], reward float32 [N], with N = episodes * length.
    """
    rng = np.random.default_rng(seed)
    unit = frame_size // 16  # the bright square is 3 units wide and moves by 1 unit and a half
    side, step = 3 * unit, 3 * unit // 2
    cells = (frame_size - side) // step
    obs = np.empty((episodes, length, frame_size, frame_size, 3), np.uint8)
    action = np.empty((episodes, length), np.uint8)
    for episode in range(episodes):
        blocks = rng.integers(60, 140, (grid, grid, 3), dtype=np.uint8)
        background = blocks.repeat(frame_size // grid, 0).repeat(frame_size // grid, 1)
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

            allowed = [a for a, move in enumerate(MOVES) if 0 <= min(cell + move) and max(cell + move) <= cells]
            action[episode, t] = rng.choice(allowed)
            cell = cell + MOVES[action[episode, t]]
            distractor = distractor + velocity
            velocity = np.where((distractor < 0) | (distractor > frame_size - side), -velocity, velocity)
            distractor = np.clip(distractor, 0, frame_size - side)
    first = np.zeros((episodes, length), bool)
    first[:, 0] = True
    reward = (action == 2).astype(np.float32)  # so that a policy could be worse or better: right is good
    return obs.reshape(-1, *obs.shape[2:]), first.reshape(-1), action.reshape(-1), reward.reshape(-1)
