"""Solvers for the plain pictures of maze, heist, miner, plunder and bigfish, in place of a PPO
expert.

PPO needs millions of steps on these games; a rule that reads the picture needs none: a shortest
path through the cells, in plunder a shot ahead of the ships, in bigfish the way to the nearest fish
that can be eaten. They see o_t alone, as the latent policy does. A fraction of the actions is
uniformly random: otherwise the past would predict much of what the agent does, and stage 1 would
have nothing to find. Where nothing is in reach, the episode is given up (action -1 restarts the
game).
"""

import numpy as np
from scipy import ndimage

import common

# fraction, by game
RANDOM_ACTIONS = dict(maze=0.1, heist=0.1, miner=0.1, plunder=0.5, bigfish=0.3)
CELLS = dict(maze=15, heist=9, miner=10)  # a side, in "easy" mode
MOVES = np.array([(0, -1), (0, 1), (-1, 0), (1, 0)])  # (row, column): left, right, up, down
NINE_MOVES = np.array([(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)])
ACTIONS = np.array([(4, 7, 1), (3, 6, 0), (5, 8, 2)])  # [step down, step right], -1 is the last
WALL, AGENT, BALL, FAR = (191, 127, 63), (127, 255, 127), (255, 191, 191), 999
# heist: colors of key and door; pixel in row 3 where the key is drawn once the agent holds it
LOCKS = {63: ((127, 127, 255), (255, 191, 191)), 56: ((191, 191, 191), (63, 255, 127)),
         53: ((255, 255, 127), (191, 63, 63))}  # fmt: skip


def near(pixels, color):
    """int (..., 3) -> bool (...)"""
    return abs(pixels - np.array(color)).sum(-1) < 60


def neighbors(x, fill):
    """(B, N, N) -> (4, B, N, N): the value of the next cell to the left, right, up, down."""
    n, padded = x.shape[1], np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=fill)
    return np.stack([padded[:, 1 + r : 1 + r + n, 1 + c : 1 + c + n] for r, c in MOVES])


def read_board(game, obs):
    """int (B, 64, 64, 3) -> can_move bool (4, B, N, N) from each cell to its neighbors, target bool
    (B, N, N), risk (4, B, N, N): steps that a move is worth avoiding for.
    """
    center = ((np.arange(CELLS[game]) + 0.5) * 64 / CELLS[game]).astype(int)
    cells = obs[:, center][:, :, center]
    risk = np.zeros((4, *cells.shape[:3]))
    if game == "maze":
        free, target = ~near(cells, WALL), near(cells, (127, 127, 255))
    elif game == "heist":  # a door is open to who holds its key; nearest key first
        free, target = ~near(cells, WALL), near(cells, (191, 63, 191))
        for column, (key, door) in LOCKS.items():
            held = near(obs[:, 3, column], key) & ~near(obs[:, 1, column], key)  # not in the maze
            held = held[:, None, None]
            free &= ~near(cells, door) | held
            target |= near(cells, key) & ~held
    else:  # miner: all diamonds, then the exit; not under falling boulders
        colors = (255, 191, 191), (127, 127, 255), (63, 191, 255), (0, 0, 0)
        boulder, diamond, goal, empty = (near(cells, color) for color in colors)
        some_left = diamond.any((1, 2), keepdims=True)
        above = neighbors(boulder, False)[2]
        free = ~boulder & ~(goal & some_left) & ~(empty & above)
        target = np.where(some_left, diamond, goal)
        risk[3] = 20 * above  # a boulder follows who moves down from under it
    can_move = neighbors(free, False)
    if game == "miner":
        for side in (0, 1):  # a boulder can be pushed into an empty cell
            beyond = neighbors(neighbors(empty, False)[side], False)[side]
            can_move[side] |= neighbors(boulder, False)[side] & beyond
    return can_move, target, risk


def walk(game, obs):
    """Along a shortest path: int (B, 64, 64, 3) -> actions (B,); -1 where nothing is in reach."""
    can_move, target, risk = read_board(game, obs)
    steps = np.where(target, 0, FAR)  # (B, N, N) to the target; relaxed until nothing changes
    while True:
        shorter = np.where(can_move, neighbors(steps, FAR) + 1, FAR).min(0)
        if (shorter >= steps).all():
            break
        steps = np.minimum(steps, shorter)

    agent, n = near(obs, AGENT), CELLS[game]
    size = np.maximum(agent.sum((1, 2)), 1)
    row, column = (  # (B,), of the agent's center, in cells
        (agent * grid).sum((1, 2)) / size * n / 64
        for grid in np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5, indexing="ij")
    )
    here = slice(None), np.arange(len(obs)), row.astype(int), column.astype(int)
    choices = (np.where(can_move, neighbors(steps, FAR), FAR) + risk)[here]  # (4, B)
    move = MOVES[choices.argmin(0)]
    gap = np.stack(here[2:], 1) + 0.5 + move - np.stack([row, column], 1)  # (B, 2)
    off = (move == 0) & (abs(gap) > 0.18)  # heist's agent is not aligned with the cells
    step = np.where(off.any(1, keepdims=True), off, move != 0) * np.sign(gap).astype(int)
    return np.where(choices.min(0) >= FAR, -1, ACTIONS[tuple(step.T)])


def shoot(obs):
    """Plunder: int (B, 64, 64, 3) -> actions (B,). Fires from where most pixels of ships in the
    color of the panel at the lower left would be hit, less those of other ships.
    """
    row, column = np.arange(3, 50)[:, None], np.arange(64)
    sky, color, sea = obs[:, 3:50], obs[:, 57, 3], obs[:, 55:60, 16:]  # sea: right of the panel
    target = near(sky, color[:, None, None])
    other = sky.any(-1) & ~target & ~near(sky, BALL)
    # ships sail at 0.65 pixels a step, away from the side that is closer, and a ball climbs 3.2
    lead = np.where(column < 32, 0.65, -0.65) * (54 - row) / 3.2
    fire_from = np.rint(column + lead).astype(int)  # (47, 64)
    value = np.where((fire_from >= 0) & (fire_from < 64), target * 1.0 - other, 0)  # (B, 47, 64)
    votes = [np.bincount(fire_from.ravel() % 64, v.ravel(), 64) for v in value]
    hits = np.stack([np.convolve(v, np.ones(7), "same") for v in votes])  # (B, 64): a ship's width

    ship = sea.any(-1) & ~near(sea, BALL)
    x = (ship * np.arange(16, 64)).sum((1, 2)) / np.maximum(ship.sum((1, 2)), 1)
    some = hits.max(1) > 20
    worth = np.where(hits > 20, hits - 1.8 * abs(column - x[:, None]), -FAR)
    gap = np.where(some, worth.argmax(1), 38) - x  # without a target it waits in the middle
    there = abs(gap) <= np.where(some, 2, 4)
    return np.where(there, np.where(some, 9, 4), np.where(gap > 0, 7, 1))


def find_boxes(mask):
    """bool (64, 64) -> centers (M, 2) and sizes (M, 2) of its connected parts, as (row, column)."""
    places = ndimage.find_objects(ndimage.label(mask)[0])
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
        return 4
    biggest = sizes.prod(1).argmax()  # a fish in front can cut the agent in two
    center, size = centers[biggest], sizes[biggest]
    # widths decide who eats whom; a fish that enters at the side shows its height alone
    width = np.maximum(fish_sizes[:, 1], 1.6 * fish_sizes[:, 0])
    smaller = width < size.max() - 0.9
    away = abs(center + 3 * NINE_MOVES[:, None] - fish)  # (9, M, 2)
    gap = (away - (fish_sizes + size) / 2).max(-1)  # (9, M)
    cost = 20 * np.exp(-np.maximum(gap[:, ~smaller], 0) / 3).sum(1)  # (9,)
    if smaller.any():
        cost += np.linalg.norm(away[:, smaller], axis=-1).min(1)
    down, right = NINE_MOVES[cost.argmin()]
    return ACTIONS[down, right]


class Solver:
    """obs uint8 (B, 64, 64, 3) of plain pictures -> actions int (B,)"""

    def __init__(self, game, seed):
        if game not in RANDOM_ACTIONS:
            common.fail(f"--solver plays {', '.join(RANDOM_ACTIONS)}, not {game}")
        self.game, self.random_actions = game, RANDOM_ACTIONS[game]
        self.rng = np.random.default_rng(seed)

    def solve(self, obs):
        """The actions of the rule alone."""
        obs = obs.astype(int)
        if self.game == "bigfish":
            return np.array([chase(frame) for frame in obs])
        return shoot(obs) if self.game == "plunder" else walk(self.game, obs)

    def __call__(self, obs):
        actions = self.solve(obs)
        random = self.rng.integers(common.NUM_ACTIONS, size=len(obs))
        use_random = (self.rng.random(len(obs)) < self.random_actions) & (actions >= 0)
        return np.where(use_random, random, actions)
