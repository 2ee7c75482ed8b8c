"""Procgen's games as vectorised environments, and how well a policy plays them."""

import contextlib
import io

import numpy as np
import torch

with contextlib.redirect_stderr(io.StringIO()):  # gym greets every import with a notice about its successor
    from gym.wrappers.normalize import RunningMeanStd  # noqa: F401 (for the scripts with PPO)
    from procgen import ProcgenGym3Env

from .devices import derive_seed, num_cores
from .flags import check_game, fail
from .logs import progress_bar
from .procgen_facts import NUM_ACTIONS, RETURNS


class ProcgenEnvs:
    """`num_envs` games of Procgen ("easy") that step together in C++ threads; seeded through `rand_seed`.

    observe() -> reward float32 [B], obs uint8 [B, S, S, 3], first bool [B] (True where obs opens a new episode)
    act(action int [B]) starts the next step and returns at once, so work done before observe() costs no time.

    `finished` collects (env, episodic return) of every episode that ends; the caller empties it.
    """

    def __init__(self, game, num_envs, seed, start_level=0, num_levels=0, frame_size=64, num_threads=None):
        check_game(game)
        self.num_envs, self.frame_size = num_envs, frame_size
        self.games = ProcgenGym3Env(
            num=num_envs,
            env_name=game,
            distribution_mode="easy",
            start_level=start_level,
            num_levels=num_levels,  # 0: all levels
            rand_seed=seed,
            num_threads=min(num_envs, num_cores() if num_threads is None else num_threads),
        )
        self.finished = []
        self._return = np.zeros(num_envs)
        self._acted = False

    def _play(self, call, *arguments):
        try:
            return call(*arguments)
        except Exception as error:
            fail(f"Procgen failed ({type(error).__name__}: {error}); what was saved is whole, and --resume goes on from it")

    def observe(self):
        reward, obs, first = self._play(self.games.observe)
        if self._acted:  # Procgen repeats the last reward when asked twice
            self._return += reward
            for env in np.flatnonzero(first):
                self.finished.append((int(env), float(self._return[env])))
                self._return[env] = 0.0
            self._acted = False
        return reward, area_mean(obs["rgb"], self.frame_size), first

    def act(self, action):
        self._play(self.games.act, np.asarray(action, dtype=np.int32))
        self._acted = True

    def state_dict(self):
        """Between observe() and act(): the games with their random numbers, and the returns of the episodes under way."""
        games = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in self.games.get_state()]
        return dict(games=games, returns=torch.from_numpy(self._return.copy()), finished=list(self.finished))

    def load_state_dict(self, saved):
        self.games.set_state([state.numpy().tobytes() for state in saved["games"]])
        self._return, self.finished, self._acted = saved["returns"].numpy(), saved["finished"], False


class HalvedEnvs:
    """`num_envs` games as two ProcgenEnvs, so that one half steps in C++ threads while the network computes for the other.

        for games, half in envs.halves:  # half: the slice of the num_envs games that these are
            reward, obs, first = games.observe()
            games.act(act(obs))

    The halves share nothing and take turns in a fixed order, so no result hangs on which of them is faster. The size of each is
    a multiple of `multiple_of`, the first is the larger, and where there is nothing to halve it is the only one.
    """

    def __init__(self, game, num_envs, seed, start_level=0, num_levels=0, frame_size=64, multiple_of=1):
        middle = -(-num_envs // (2 * multiple_of)) * multiple_of
        slices = [half for half in (slice(0, middle), slice(middle, num_envs)) if half.start < half.stop]
        threads = -(-num_cores() // len(slices))  # both halves may be stepping
        self.num_envs, self.halves = num_envs, []
        for half in slices:
            half_seed = derive_seed(seed, f"games from {half.start} on")
            games = ProcgenEnvs(game, half.stop - half.start, half_seed, start_level, num_levels, frame_size, threads)
            self.halves.append((games, half))

    def take_finished(self):
        """(env, episodic return) of every episode that ended since the last call, env counted over both halves."""
        finished = [(half.start + env, episode_return) for games, half in self.halves for env, episode_return in games.finished]
        for games, _ in self.halves:
            games.finished.clear()
        return finished

    def state_dict(self):
        """When every half is between observe() and act()."""
        return dict(halves=[games.state_dict() for games, _ in self.halves])

    def load_state_dict(self, saved):
        for (games, _), state in zip(self.halves, saved["halves"], strict=True):
            games.load_state_dict(state)


def area_mean(obs, size):
    """uint8 [B, 64, 64, 3] -> uint8 [B, size, size, 3]: the rounded mean of each block of pixels."""
    factor = obs.shape[1] // size
    if factor == 1:
        return obs
    total = sum(obs[:, i::factor, j::factor].astype(np.uint16) for i in range(factor) for j in range(factor))
    return ((total + factor**2 // 2) // factor**2).astype(np.uint8)


@torch.no_grad()
def evaluate(envs, act, episodes_per_env):
    """Plays until every environment has finished its quota of episodes.

    A quota for each environment, and not the first episodes to finish, because the latter favours short ones.

    envs: fresh HalvedEnvs. act: obs uint8 [B, S, S, 3] of a half -> actions int [B].
    Returns float [B, episodes_per_env].
    """
    returns = [[] for _ in range(envs.num_envs)]
    with progress_bar(envs.num_envs * episodes_per_env, "episode", "evaluate") as bar:
        while min(map(len, returns)) < episodes_per_env:
            for games, _ in envs.halves:
                games.act(act(games.observe()[1]))
            for env, episode_return in envs.take_finished():
                if len(returns[env]) < episodes_per_env:
                    returns[env].append(episode_return)
                    bar.update()
    return np.array(returns)


def random_return(game, seed, start_level, num_levels):
    """Mean return of the uniformly random policy: the paper's for all levels, else played here (256 episodes)."""
    if num_levels == 0:
        return RETURNS[game][0]
    envs = HalvedEnvs(game, 64, derive_seed(seed, "random policy"), start_level, num_levels)
    rng = np.random.default_rng(seed)
    return float(evaluate(envs, lambda obs: rng.integers(NUM_ACTIONS, size=len(obs)), 4).mean())
