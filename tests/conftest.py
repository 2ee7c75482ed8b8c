"""Shared by all tests: a toy video whose true actions are known, toy games, tiny runs."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common
import torch

import train_latent_dynamics

torch.set_num_threads(1)  # networks this small lose time by sharing work between threads

train_latent_dynamics.TEST_WINDOWS = 1024  # in an evaluation; 4096 take most of a test's time

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
    room = frame_size - side
    cells = room // step
    obs = np.empty((episodes, length, frame_size, frame_size, 3), np.uint8)
    action = np.empty((episodes, length), np.uint8)
    for episode in range(episodes):
        blocks = rng.integers(60, 140, (8, 8, 3), dtype=np.uint8)
        background = blocks.repeat(frame_size // 8, 0).repeat(frame_size // 8, 1)
        cell = rng.integers(0, cells + 1, 2)
        start, velocity = rng.uniform(0, 2 * room, 2), rng.uniform(0.5, 1, 2) * unit
        for t in range(length):
            frame = obs[episode, t]
            frame[:] = background
            y, x = abs((start + t * velocity) % (2 * room) - room).astype(int)  # between walls
            frame[y : y + side, x : x + side] = 0
            y, x = cell * step
            frame[y : y + side, x : x + side] = (255, 255, 0)
            moves = [cell + move for move in MOVES]
            allowed = [a for a, to in enumerate(moves) if min(to) >= 0 and max(to) <= cells]
            action[episode, t] = rng.choice(allowed)
            cell = moves[action[episode, t]]
    first = np.arange(episodes * length) % length == 0
    return obs.reshape(-1, *obs.shape[2:]), first, action.reshape(-1)


def write_toy_data(root, game="maze", frame_size=16, shards=2, episodes=8, length=16):
    """Writes `shards` shards of the toy video to each split of root/data/<game>; returns root."""
    levels, means = dict(start_level=0, num_levels=0), dict(random_return=0.0, expert_return=10.0)
    settings = dict(game=game, frame_size=frame_size) | levels | means
    for seed, split in enumerate(("train", "test", "random")):
        for shard in range(shards):
            obs, first, action = toy_video(episodes, length, 10 * seed + shard, frame_size)
            folder = root / "data" / game / split
            common.save_npz(folder / f"frames_{shard:03d}.npz", settings, obs=obs, first=first)
            labels = dict(action=action, reward=(action == 2).astype(np.float32))
            common.save_npz(folder / f"labels_{shard:03d}.npz", settings, **labels)
    return root


# Flags that make each script tiny
TRAIN = dict(multiplier=0.25, grad_steps=4, batch_size=8, eval_every=2)
TINY = {
    "collect_data": dict(
        game="bigfish", frame_size=16, expert_multiplier=0.25, num_envs=4, rollout_steps=32,
        minibatches=2, expert_steps=256, train_frames=200, test_frames=60, random_frames=60,
        eval_episodes=1, log_every_steps=256,
    ),
    "train_latent_dynamics": TRAIN | dict(fdm_width=4, lr=1e-3, warmup_steps=1),
    "train_latent_bc": TRAIN | dict(lr=1e-3, warmup_steps=1),
    "baselines.train_ilpo": TRAIN | dict(fdm_width=4, latents=5),
    "decode_offline": dict(
        labels=(4, 16), decoder_seeds=2, decoder_steps=3, episodes=8, envs_per_decoder=2
    ),
    "decode_online_ppo": dict(
        num_envs=8, rollout_steps=16, env_steps=2048, minibatches=4, log_every_steps=1024,
        action_lr_ramp=(256, 512, 0.25), value_lr_ramp=(128, 512, 0.25),
        hidden_lr_ramp=(512, 1024, 0.1), refit_start=256, refit_dense_until=640, refit_interval=4,
        refit_stop=1600, refit_batch_size=64, eval_episodes=2,
    ),
}  # fmt: skip


def args_of(script, root, **flags):
    """Tiny Args of a script whose folders are in root."""
    where = dict(game="maze", device="cpu", data_dir=root / "data", runs_dir=root / "runs")
    if script.__name__ == "collect_data":
        where["experts_dir"] = root / "experts"
    return script.Args(**where | TINY.get(script.__name__, {}) | flags)


def run(script, root, **flags):
    """The script's main() with these Args."""
    script.main(args_of(script, root, **flags))


def load(path):
    """The content of a .pt; the arrays of a .npz, its settings as a dict."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    return arrays | dict(settings=json.loads(str(arrays.get("settings", "{}"))))


def fails(function, *arguments, **keywords):
    """The message of the one-line error with which the call ends."""
    with pytest.raises(SystemExit) as error:
        function(*arguments, **keywords)
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message, message
    return message


@pytest.fixture
def record_calls(monkeypatch):
    """record_calls(owner, name): a list that gets the arguments of each call of owner.name."""

    def record(owner, name):
        calls, function = [], getattr(owner, name)

        def recording(*arguments, **keywords):
            calls.append([x.clone() if isinstance(x, torch.Tensor) else x for x in arguments])
            return function(*arguments, **keywords)

        monkeypatch.setattr(owner, name, recording)
        return calls

    return record


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """Toy data with stages 1 and 2 run on it, at 16x16, for tests that change nothing."""
    import train_latent_bc
    import train_latent_dynamics

    root = write_toy_data(tmp_path_factory.mktemp("chain"))
    run(train_latent_dynamics, root)
    run(train_latent_bc, root)
    return root


@pytest.fixture
def root(chain, tmp_path):
    """A copy of the chain."""
    return shutil.copytree(chain, tmp_path / "chain")


class PaysForActions:
    """Each step is an episode whose return is the action's number."""

    def __init__(self, settings, num_envs, seed):
        self.num_envs = num_envs
        self.obs = np.zeros((num_envs, 16, 16, 3), np.uint8)

    def step(self, actions):
        return self.obs, actions, np.ones(self.num_envs, bool)


class ToyGames:
    """Game e has episodes of 5 + e steps, and pays 1 for action 7 or, in the dark, for action 3.

    Frames show episode, step and last action in one pixel, e in the next; half is bright or dark.
    """

    made = []

    def __init__(self, settings, num_envs, seed):
        self.env, self.num_envs = np.arange(num_envs), num_envs
        self.episode, self.t, self.action = np.zeros((3, num_envs), int)
        self.rng, self.log = np.random.default_rng(seed), []  # log: (reward, done) of each step
        self.made.append(self)
        self._show()

    def _show(self):
        self.obs = np.zeros((self.num_envs, 16, 16, 3), np.uint8)
        self.bright = self.rng.integers(0, 2, self.num_envs)
        self.obs[:, 8:] = 255 * self.bright[:, None, None, None]
        self.obs[:, 0, 0] = np.stack([self.episode, self.t, self.action], 1)
        self.obs[:, 0, 1, 0] = self.env

    def good(self, actions):
        return actions == np.where(self.bright, 7, 3)

    def step(self, actions):
        reward = self.good(actions).astype(np.float32)
        self.t, self.action = self.t + 1, actions
        done = self.t == 5 + self.env
        self.episode, self.t = self.episode + done, self.t * ~done
        self._show()
        self.log.append((reward, done))
        return self.obs, reward, done

    def state_dict(self):
        return {}

    def load_state_dict(self, saved):
        pass


@pytest.fixture
def toy_games(monkeypatch):
    """Replaces Procgen by ToyGames; returns the list of those that were made."""
    monkeypatch.setattr(ToyGames, "made", [])
    monkeypatch.setattr(common, "ProcgenEnvs", ToyGames)
    return ToyGames.made


def check_rollouts(gae, normalized, log):
    """PPO's rewards, dones and values have to be those of the games' own steps, in order.

    gae, normalized: the recorded calls of compute_gae() and of the RewardNormalizer. No learning
    rate may leave 0 in the first two rollouts.
    """
    rewards, values, dones = (torch.stack(x) for x in list(zip(*gae))[:3])  # [.., T, B]
    own_rewards, own_dones = (np.stack(x) for x in zip(*log))
    assert np.array_equal(dones.flatten(0, 1).bool(), own_dones)
    assert np.array_equal(rewards.flatten(0, 1) > 0, own_rewards > 0)
    assert np.array_equal([reward for _, reward, _ in normalized], own_rewards)
    assert np.array_equal([done for _, _, done in normalized], own_dones)
    # the value after a rollout is the first one of the next rollout
    assert torch.equal(values[0, -1], values[1, 0]) and not torch.equal(values[0, -2], values[1, 0])
