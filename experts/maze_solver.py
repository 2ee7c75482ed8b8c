"""A solver that plays Procgen's maze from plain pictures, in place of a PPO expert.

PPO needs millions of steps before it leaves random play on maze; a shortest path needs none. A
fraction of its actions is uniformly random, so that the recordings show more than shortest paths.
"""

import numpy as np

import common

CELLS = 15  # of the easy mazes; smaller ones are surrounded by wall
WALL, AGENT, GOAL = np.array([(191, 127, 63), (127, 255, 127), (127, 127, 255)])  # plain pictures
MOVES = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


def read_cells(obs):
    """uint8 (B, S, S, 3), S 64 or 32 -> bool (B, 15, 15): free cells, the agent's, the goal's."""
    center = ((np.arange(CELLS) + 0.5) * obs.shape[1] / CELLS).astype(int)
    cells = obs[:, center][:, :, center].astype(int)  # (B, 15, 15, 3)
    wall, agent, goal = (abs(cells - color).sum(-1) < 60 for color in (WALL, AGENT, GOAL))
    return ~wall, agent, goal


def neighbors(x, fill):
    """(B, 15, 15) -> (4, B, 15, 15): the value of the next cell to the left, right, up, down."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=fill)
    views = [padded[:, 1 + y : 1 + y + CELLS, 1 + x : 1 + x + CELLS] for y, x in MOVES.values()]
    return np.stack(views)


class MazeSolver:
    """obs uint8 (B, S, S, 3) of plain maze -> actions int (B,) on a shortest path to the goal."""

    def __init__(self, game, plain, seed, random_actions=0.15):
        if game != "maze" or not plain:
            common.fail("--solver plays --game maze --plain only")
        self.rng, self.random_actions = np.random.default_rng(seed), random_actions

    def __call__(self, obs):
        free, agent, goal = read_cells(obs)
        steps = np.where(
            goal, 0, CELLS**2
        )  # (B, 15, 15), to the goal; relaxed until nothing changes
        while True:
            shorter = np.where(
                free, np.minimum(steps, neighbors(steps, CELLS**2).min(0) + 1), CELLS**2
            )
            if (shorter == steps).all():
                break
            steps = shorter
        choices = np.where(agent, neighbors(steps, CELLS**2), CELLS**2).min((2, 3))  # (4, B)
        names = np.array([common.ACTIONS.index(name) for name in MOVES])
        random = self.rng.integers(common.NUM_ACTIONS, size=len(obs))
        return np.where(
            self.rng.random(len(obs)) < self.random_actions, random, names[choices.argmin(0)]
        )
