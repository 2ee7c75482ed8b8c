"""Solvers for the plain pictures of maze, heist, miner, plunder and bigfish, in place of a PPO
expert.

PPO needs millions of steps on these games; a rule that reads the picture needs none: a shortest
path through the cells, in plunder a shot ahead of the ships, in bigfish the way to the nearest fish
that can be eaten. They see o_t alone, as the latent policy does. A fraction of the actions is
uniformly random: otherwise the past would predict much of what the agent does, and stage 1 would
have nothing to find. Where nothing is in reach, the episode is given up (common.RESET).

B games, frames of 64x64 pixels, boards of N x N cells; places are (row, column).
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

import common

# fractions; with more of them stage 1 found more on heist, plunder, bigfish (docs/lessons.md, 5)
RANDOM_ACTIONS = dict(maze=0.1, heist=0.4, miner=0.1, plunder=0.5, bigfish=0.3)
CELLS = dict(maze=15, heist=9, miner=10)  # N, in "easy" mode
FAR = 999  # steps; what is out of reach

LEFT, RIGHT, UP, DOWN = range(4)
MOVES = np.array([(0, -1), (0, 1), (-1, 0), (1, 0)])  # (down, right) of LEFT, RIGHT, UP, DOWN
NINE_MOVES = np.array([(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)])
ACTION_OF = np.array([(4, 7, 1), (3, 6, 0), (5, 8, 2)])  # [down, right]; an index of -1 is the last
FIRE = common.ACTIONS.index("D")

# colors of the plain pictures
AGENT = (127, 255, 127)
WALL = (191, 127, 63)  # maze, heist
MAZE_GOAL = (127, 127, 255)
HEIST_GOAL = (191, 63, 191)
BOULDER, DIAMOND, EXIT, EMPTY = (255, 191, 191), (127, 127, 255), (63, 191, 255), (0, 0, 0)  # miner
CANNONBALL = (255, 191, 191)  # plunder


class Lock(NamedTuple):
    key: tuple
    door: tuple
    column: int  # of the pixel in row 3 that shows the key once the agent holds it


LOCKS = [  # heist
    Lock(key=(127, 127, 255), door=(255, 191, 191), column=63),
    Lock(key=(191, 191, 191), door=(63, 255, 127), column=56),
    Lock(key=(255, 255, 127), door=(191, 63, 63), column=53),
]


class Board(NamedTuple):
    can_move: np.ndarray  # bool (4, B, N, N): from each cell to its four neighbors
    target: np.ndarray  # bool (B, N, N): cells to go to
    risk: np.ndarray | float = 0.0  # (4, B, N, N): steps that a move is worth avoiding for


def near(pixels, color):
    """int (..., 3) -> bool (...)"""
    return abs(pixels - np.array(color)).sum(-1) < 60


def neighbors(x, fill):
    """(B, N, N) -> (4, B, N, N): the value of the next cell to the left, right, up, down."""
    n = x.shape[1]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=fill)
    shifted = []
    for down, right in MOVES:
        shifted.append(padded[:, 1 + down : 1 + down + n, 1 + right : 1 + right + n])
    return np.stack(shifted)


# --- maze, heist, miner: a shortest path ----------------------------------------------------------


def read_maze(cells, obs):
    """cells int (B, N, N, 3): the colors in the middle of the cells of obs int (B, 64, 64, 3)"""
    free = ~near(cells, WALL)
    return Board(neighbors(free, False), near(cells, MAZE_GOAL))


def read_heist(cells, obs):
    """A door is open to who holds its key. Keys and the goal are targets, the nearest first."""
    free = ~near(cells, WALL)
    target = near(cells, HEIST_GOAL)
    for lock in LOCKS:
        shown = near(obs[:, 3, lock.column], lock.key)
        in_the_maze = near(obs[:, 1, lock.column], lock.key)  # a key there covers row 1, too
        held = (shown & ~in_the_maze)[:, None, None]
        free &= ~near(cells, lock.door) | held
        target |= near(cells, lock.key) & ~held
    return Board(neighbors(free, False), target)


def read_miner(cells, obs):
    """All diamonds, then the exit; not under falling boulders."""
    boulder = near(cells, BOULDER)
    diamond = near(cells, DIAMOND)
    exit_cell = near(cells, EXIT)
    empty = near(cells, EMPTY)
    diamonds_left = diamond.any((1, 2), keepdims=True)
    below_boulder = neighbors(boulder, False)[UP]
    free = ~boulder & ~(exit_cell & diamonds_left) & ~(empty & below_boulder)
    can_move = neighbors(free, False)
    for side in (LEFT, RIGHT):  # a boulder can be pushed into an empty cell
        beyond = neighbors(neighbors(empty, False)[side], False)[side]
        can_move[side] |= neighbors(boulder, False)[side] & beyond
    risk = np.zeros(can_move.shape)
    risk[DOWN] = 20 * below_boulder  # a boulder follows who moves down from under it
    return Board(can_move, np.where(diamonds_left, diamond, exit_cell), risk)


READ = dict(maze=read_maze, heist=read_heist, miner=read_miner)


def steps_to_target(board):
    """int (B, N, N): steps along a shortest path, FAR where there is none."""
    steps = np.where(board.target, 0, FAR)
    while True:  # relaxed until nothing changes
        shorter = np.where(board.can_move, neighbors(steps, FAR) + 1, FAR).min(0)
        if (shorter >= steps).all():
            return steps
        steps = np.minimum(steps, shorter)


def find_agent(obs, n):
    """The row and the column (B,) of the agent's center, in cells of a board of n x n."""
    agent = near(obs, AGENT)  # (B, 64, 64)
    pixels = np.maximum(agent.sum((1, 2)), 1)
    middle = (np.arange(64) + 0.5) * n / 64  # of each pixel
    row = (agent * middle[:, None]).sum((1, 2)) / pixels
    column = (agent * middle).sum((1, 2)) / pixels
    return row, column


def walk(game, obs):
    """Along a shortest path: int (B, 64, 64, 3) -> actions (B,), RESET if nothing is in reach."""
    n = CELLS[game]
    centers = ((np.arange(n) + 0.5) * 64 / n).astype(int)
    cells = obs[:, centers][:, :, centers]  # (B, N, N, 3)
    board = READ[game](cells, obs)

    # the move from the agent's cell that leaves the fewest steps
    left = np.where(board.can_move, neighbors(steps_to_target(board), FAR), FAR)
    row, column = find_agent(obs, n)
    games = np.arange(len(obs))
    choices = (left + board.risk)[:, games, row.astype(int), column.astype(int)]  # (4, B)
    move = MOVES[choices.argmin(0)]  # (B, 2)

    # heist's agent is not aligned with the cells: first to the middle of its path, then along it
    here = np.stack([row, column], 1)  # (B, 2)
    gap = here.astype(int) + 0.5 + move - here
    beside = (move == 0) & (abs(gap) > 0.18)
    use = np.where(beside.any(1, keepdims=True), beside, move != 0)
    step = use * np.sign(gap).astype(int)
    actions = ACTION_OF[step[:, 0], step[:, 1]]
    return np.where(choices.min(0) >= FAR, common.RESET, actions)


# --- plunder: a shot ahead of the ships -----------------------------------------------------------


def shoot(obs):
    """Plunder: int (B, 64, 64, 3) -> actions (B,). Fires from where most pixels of ships in the
    color of the panel at the lower left would be hit, less those of other ships.
    """
    # pixels of ships to hit, and of others
    sky = obs[:, 3:50]  # (B, 47, 64, 3)
    panel = obs[:, 57, 3]  # (B, 3)
    target = near(sky, panel[:, None, None])
    other = sky.any(-1) & ~target & ~near(sky, CANNONBALL)

    # the column from which a pixel is hit: ships sail at 0.65 pixels a step, away from the side
    # that is closer, and a ball climbs 3.2
    row = np.arange(3, 50)[:, None]
    column = np.arange(64)
    lead = np.where(column < 32, 0.65, -0.65) * (54 - row) / 3.2
    fire_from = np.rint(column + lead).astype(int)  # (47, 64)
    inside = (fire_from >= 0) & (fire_from < 64)

    # hits from each column, summed over the width of a ship
    value = np.where(inside, target * 1.0 - other, 0)  # (B, 47, 64)
    hits = []
    for of_game in value:
        votes = np.bincount(fire_from.ravel() % 64, of_game.ravel(), 64)
        hits.append(np.convolve(votes, np.ones(7), "same"))
    hits = np.stack(hits)  # (B, 64)

    # where the agent's ship is, right of the panel
    sea = obs[:, 55:60, 16:]
    ship = sea.any(-1) & ~near(sea, CANNONBALL)
    x = (ship * np.arange(16, 64)).sum((1, 2)) / np.maximum(ship.sum((1, 2)), 1)  # (B,)

    # go to the best column, a near one rather than a far one, and fire; without a target, wait in
    # the middle
    can_hit = hits.max(1) > 20
    worth = np.where(hits > 20, hits - 1.8 * abs(column - x[:, None]), -FAR)
    gap = np.where(can_hit, worth.argmax(1), 38) - x
    there = abs(gap) <= np.where(can_hit, 2, 4)
    stay = np.where(can_hit, FIRE, common.NOOP)
    go = np.where(gap > 0, ACTION_OF[0, 1], ACTION_OF[0, -1])
    return np.where(there, stay, go)


# --- bigfish: the nearest smaller fish ------------------------------------------------------------


def find_boxes(mask):
    """bool (64, 64) -> centers (M, 2) and sizes (M, 2) of its connected parts."""
    labels, _ = ndimage.label(mask)
    places = ndimage.find_objects(labels)
    start = np.array([(rows.start, columns.start) for rows, columns in places]).reshape(-1, 2)
    stop = np.array([(rows.stop, columns.stop) for rows, columns in places]).reshape(-1, 2)
    return (start + stop) / 2, stop - start


def chase(frame):
    """Bigfish: int (64, 64, 3) -> action. Of nine moves, the one that comes nearest to a smaller
    fish; the gap to each larger fish costs exponentially more, the smaller it is.
    """
    agent = near(frame, AGENT)
    centers, sizes = find_boxes(agent)
    fish, fish_sizes = find_boxes(frame.any(-1) & ~agent)
    if len(centers) == 0 or len(fish) == 0:
        return common.NOOP
    biggest = sizes.prod(1).argmax()  # a fish in front can cut the agent in two
    center, size = centers[biggest], sizes[biggest]
    # widths decide who eats whom; a fish that enters at the side shows its height alone
    width = np.maximum(fish_sizes[:, 1], 1.6 * fish_sizes[:, 0])
    smaller = width < size.max() - 0.9  # (M,)
    away = abs(center + 3 * NINE_MOVES[:, None] - fish)  # (9, M, 2), after each move
    gap = (away - (fish_sizes + size) / 2).max(-1)  # (9, M), between the boxes
    cost = 20 * np.exp(-np.maximum(gap[:, ~smaller], 0) / 3).sum(1)  # (9,)
    if smaller.any():
        cost += np.linalg.norm(away[:, smaller], axis=-1).min(1)
    down, right = NINE_MOVES[cost.argmin()]
    return ACTION_OF[down, right]


# --- all ------------------------------------------------------------------------------------------


class Solver:
    """obs uint8 (B, 64, 64, 3) of plain pictures -> actions int (B,)"""

    def __init__(self, game, seed):
        if game not in RANDOM_ACTIONS:
            common.fail(f"--solver plays {', '.join(RANDOM_ACTIONS)}, not {game}")
        self.game = game
        self.rng = np.random.default_rng(seed)

    def solve(self, obs):
        """The actions of the rule alone."""
        obs = obs.astype(int)
        if self.game == "bigfish":
            return np.array([chase(frame) for frame in obs])
        if self.game == "plunder":
            return shoot(obs)
        return walk(self.game, obs)

    def __call__(self, obs):
        actions = self.solve(obs)
        random = self.rng.integers(common.NUM_ACTIONS, size=len(obs))
        is_random = self.rng.random(len(obs)) < RANDOM_ACTIONS[self.game]
        return np.where(is_random & (actions != common.RESET), random, actions)
