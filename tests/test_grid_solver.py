"""The solver of maze, heist and miner: its first moves on boards drawn by hand, and whole games."""

import numpy as np
import pytest
from conftest import fails

import common
from experts.grid_solver import CELLS, GridSolver

LEFT, DOWN, UP, RIGHT, GIVE_UP = 1, 3, 5, 7, -1
COLORS = {
    "#": (191, 127, 63), ".": (0, 0, 0), "A": (127, 255, 127), "G": (127, 127, 255),  # maze
    "g": (191, 63, 191), "k": (127, 127, 255), "d": (255, 191, 191),  # heist: gem, key, door
    "o": (255, 191, 191), "*": (127, 127, 255), "X": (63, 191, 255), ":": (191, 63, 191),  # miner
}  # fmt: skip


def draw(game, rows, outside):
    """uint8 (1, 64, 64, 3): the picture of a board, of which `rows` is the upper left corner"""
    n = CELLS[game]
    board = [row.ljust(n, outside) for row in rows] + [outside * n] * (n - len(rows))
    cells = np.array([[COLORS[c] for c in row] for row in board], np.uint8)
    pixel = np.arange(64) * n // 64
    return cells[pixel][:, pixel][None]


@pytest.mark.parametrize(
    "game, rows, action",
    [
        ("maze", ["A#G", ".#.", "..."], DOWN),  # around the wall
        ("maze", ["G..A"], LEFT),
        ("maze", ["A#G"], GIVE_UP),
        ("heist", ["#####", "kAdg#", "#####"], LEFT),  # the key before the door
        ("heist", ["#####", "#Adg#", "#####"], GIVE_UP),  # a door without its key
        ("miner", ["A:*", "X"], RIGHT),  # diamonds before the exit
        ("miner", ["A::", "X"], DOWN),
        ("miner", ["::o::", "::A::", "::*::"], LEFT),  # not straight down from under a boulder
        ("miner", [":Ao.*"], RIGHT),  # pushes
    ],
)
def test_the_first_move(game, rows, action):
    solver = GridSolver(game, True, seed=1, random_actions=0)
    assert solver(draw(game, rows, ":" if game == "miner" else "#"))[0] == action


@pytest.mark.parametrize("game, at_least", [("maze", 9.9), ("heist", 8.5), ("miner", 7.5)])
def test_it_plays(game, at_least):
    """10 is all of maze and heist; miner has 1 for each diamond and 10 for the exit."""
    settings = dict(game=game, frame_size=64, plain=True)
    envs = common.ProcgenEnvs(settings, 32, seed=1)
    assert common.evaluate(envs, GridSolver(game, True, 1), 1).mean() > at_least


def test_other_games_and_pictures_are_refused():
    assert "--solver plays maze, heist, miner" in fails(GridSolver, "coinrun", True, 1)
    assert "--plain" in fails(GridSolver, "maze", False, 1)
