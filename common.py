"""What has one correct answer and teaches nothing about LAPO: games, files, frame store, evaluation, logging.

No network, loss or schedule lives here; each script holds its own.
"""

import contextlib
import csv
import difflib
import hashlib
import io
import json
import os
import random
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

with contextlib.redirect_stderr(io.StringIO()):  # gym greets every import with a notice about its successor
    from gym.wrappers.normalize import RunningMeanStd  # noqa: F401 (for the scripts with PPO)
    from procgen import ProcgenGym3Env

NUM_ACTIONS = 15  # Procgen's: 9 moves (left-down, left, left-up, down, none, up, right-down, right, right-up), D A W S Q E

# Mean episodic return of a uniformly random policy and of the paper's expert ("easy", all levels).
RETURNS = {
    "bigfish": (0.8742888, 36.336166), "bossfight": (0.04618272, 11.634365), "caveflyer": (2.5970738, 9.183605),
    "chaser": (0.6632482, 9.955711), "climber": (2.2242901, 10.233627), "coinrun": (2.704834, 9.93251),
    "dodgeball": (0.612983, 13.486584), "fruitbot": (-2.5330205, 29.925259), "heist": (3.0758767, 9.685265),
    "jumper": (3.4105318, 8.46046), "leaper": (2.5105245, 7.4082565), "maze": (4.2726293, 9.969294),
    "miner": (1.2513667, 11.892558), "ninja": (2.5599792, 9.474582), "plunder": (4.3207445, 11.460528),
    "starpilot": (1.5251881, 66.98625),
}  # fmt: skip


def fail(message):
    """Ends the run with one line on stderr and exit status 1."""
    raise SystemExit(f"error: {message}")


def check_game(game):
    """Ends the run with the nearest names unless `game` is one of Procgen's 16."""
    if game not in RETURNS:
        near = difflib.get_close_matches(game, RETURNS, n=3, cutoff=0.4) or sorted(RETURNS)
        fail(f"no Procgen game is called '{game}'; did you mean {', '.join(near)}?")


def normalize_return(value, random_return, expert_return):
    """0 for the random policy, 1 for the expert."""
    return (value - random_return) / (expert_return - random_return)


# --- devices and seeds ---------------------------------------------------------------------------------------------


def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'cuda:N' -> torch.device; asked for and absent ends the run."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} is not usable here ({str(error).splitlines()[0]}); try --device cpu")


def derive_seed(seed, purpose):
    """Another 31-bit seed for each purpose, so that no two streams of one run share their random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:4], "little") >> 1


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# --- games ---------------------------------------------------------------------------------------------------------


class ProcgenEnvs:
    """`num_envs` games of Procgen ("easy") that step together in C++ threads; seeded through `rand_seed`.

    observe() -> reward float32 [B], obs uint8 [B, S, S, 3], first bool [B] (True where obs opens a new episode)
    act(action int [B]) starts the next step and returns at once, so work done before observe() costs no time.

    `finished` collects (env, episodic return) of every episode that ends; the caller empties it.
    """

    def __init__(self, game, num_envs, seed, start_level=0, num_levels=0, frame_size=64):
        check_game(game)
        self.num_envs, self.frame_size = num_envs, frame_size
        self.games = ProcgenGym3Env(
            num=num_envs,
            env_name=game,
            distribution_mode="easy",
            start_level=start_level,
            num_levels=num_levels,  # 0: all levels
            rand_seed=seed,
            num_threads=min(num_envs, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        )
        self.finished = []
        self._return = np.zeros(num_envs)
        self._acted = False

    def observe(self):
        reward, obs, first = self.games.observe()
        if self._acted:  # Procgen repeats the last reward when asked twice
            self._return += reward
            for env in np.flatnonzero(first):
                self.finished.append((int(env), float(self._return[env])))
                self._return[env] = 0.0
            self._acted = False
        return reward, area_mean(obs["rgb"], self.frame_size), first

    def act(self, action):
        self.games.act(np.asarray(action, dtype=np.int32))
        self._acted = True


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

    envs: fresh ProcgenEnvs. act: obs uint8 [B, S, S, 3] -> actions int [B].
    Returns float [B, episodes_per_env].
    """
    returns = [[] for _ in range(envs.num_envs)]
    with progress_bar(envs.num_envs * episodes_per_env, "episode", "evaluate") as bar:
        while min(map(len, returns)) < episodes_per_env:
            envs.act(act(envs.observe()[1]))
            envs.observe()
            for env, episode_return in envs.finished:
                if len(returns[env]) < episodes_per_env:
                    returns[env].append(episode_return)
                    bar.update()
            envs.finished.clear()
    return np.array(returns)


def random_return(game, seed, start_level, num_levels):
    """Mean return of the uniformly random policy: the paper's for all levels, else played here (256 episodes)."""
    if num_levels == 0:
        return RETURNS[game][0]
    envs = ProcgenEnvs(game, 64, derive_seed(seed, "random policy"), start_level, num_levels)
    rng = np.random.default_rng(seed)
    return float(evaluate(envs, lambda obs: rng.integers(NUM_ACTIONS, size=len(obs)), 4).mean())


# --- files ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path` that takes its place when the block ends well; else it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def npz_bytes(**arrays):
    """The bytes of a compressed .npz. Deflate level 1: Procgen's frames shrink nearly as far as at level 6, faster."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    return buffer.getbuffer()


def write_bytes(path, content):
    with atomic_write(path) as temporary:
        Path(temporary).write_bytes(content)


def save_npz(path, **arrays):
    write_bytes(path, npz_bytes(**arrays))


def load_npz(path, keys, made_by):
    """Arrays of `keys` from a .npz, as a dict; a file that is missing, cut short or lacks a key ends the run."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in keys:
                if key not in archive.files:
                    fail(f"{path} holds no '{key}'; make it anew with: {made_by}")
            return {key: archive[key] for key in keys}
    except FileNotFoundError:
        fail(f"{path} is missing; make it with: {made_by}")
    except Exception as error:  # zipfile, zlib, ValueError, EOFError: all mean that the file is damaged
        fail(f"{path} is damaged ({type(error).__name__}); delete it and make it anew with: {made_by}")


def save_checkpoint(path, **content):
    """Tensors and plain Python values only, so that it loads with weights_only=True."""
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path, kind, game, made_by):
    """The dict that save_checkpoint wrote, on the CPU; a file of another kind or game, or a damaged one, ends the run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path} is missing; make it with: {made_by}")
    except Exception as error:  # torch.load answers damage with RuntimeError, EOFError, UnpicklingError and others
        fail(f"{path} is damaged ({type(error).__name__}); delete it and make it anew with: {made_by}")
    if not isinstance(content, dict) or content.get("kind") != kind:
        fail(f"{path} is not a checkpoint of kind '{kind}'; make it anew with: {made_by}")
    if content.get("game") != game:
        fail(f"{path} was trained on '{content.get('game')}', not on '{game}'; make it anew with: {made_by}")
    return content


def progress_bar(total, unit, description=None):
    """tqdm's bar; where nobody watches (a log file) it prints seldom."""
    return tqdm(total=total, unit=unit, desc=description, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 20.0)


def track(items, unit, description):
    """Iterates over `items` behind a progress bar."""
    with progress_bar(len(items), unit, description) as bar:
        for item in items:
            yield item
            bar.update()


class MetricsLog:
    """A progress bar with rate and time left; each write() goes to the screen and, as a row, to a CSV file."""

    def __init__(self, path, total, unit):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self.bar = progress_bar(total, unit)

    def write(self, **row):
        row = {key: float(value) if isinstance(value, torch.Tensor) else value for key, value in row.items()}
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        self.bar.write("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))


# --- frames and latents --------------------------------------------------------------------------------------------


def valid_windows(first, context):
    """bool [N]: True at i where frames i - context .. i + 1 belong to one episode of one stream."""
    starts = np.concatenate([[0], np.cumsum(first)])  # starts[i]: how many of the rows before i open an episode
    valid = np.zeros(len(first), bool)
    i = np.arange(context, len(first) - 1)
    valid[i] = starts[i + 2] == starts[i - context + 1]
    return valid


def list_shards(folder, kind, made_by):
    """Sorted paths of <kind>_NNN.npz; an empty or missing folder ends the run."""
    return sorted(Path(folder).glob(f"{kind}_*.npz")) or fail(f"{folder} holds no {kind}_NNN.npz; make them with: {made_by}")


def read_frames(path, game):
    """One shard: obs uint8 [N, S, S, 3], first bool [N], settings (a dict of plain values)."""
    made_by = f"python collect_data.py --game {game}"
    shard = load_npz(path, ("obs", "first", "settings"), made_by)
    obs, first = shard["obs"], shard["first"]
    square = obs.ndim == 4 and obs.shape[1] == obs.shape[2] and obs.shape[3] == 3
    if obs.dtype != np.uint8 or not square or first.dtype != bool or first.shape != obs.shape[:1]:
        fail(
            f"{path} has obs {obs.dtype} {obs.shape} and first {first.dtype} {first.shape}, not uint8 [N, S, S, 3] and bool [N]; "
            f"make it anew with: {made_by}"
        )
    try:
        settings = json.loads(str(shard["settings"]))
        recorded = settings["game"]
    except (ValueError, TypeError, KeyError):
        fail(f"{path} has settings that cannot be read; make it anew with: {made_by}")
    if recorded != game:
        fail(f"{path} was recorded from '{recorded}', not from '{game}'; make it anew with: {made_by}")
    return obs, first, settings


def beside(path, kind, folder=None):
    """The path of another kind of file for the shard of `path`: frames_007.npz -> labels_007.npz."""
    return Path(folder or path.parent) / f"{kind}_{path.stem.split('_')[-1]}.npz"


def read_latents(shard_path, latents_dir, game):
    """The latents of one shard: z float16 [N, Z], codes uint8 [N, C], valid bool [N]."""
    made_by = f"python train_latent_dynamics.py --game {game}"
    path = beside(shard_path, "latents", latents_dir)
    shard = load_npz(path, ("z", "codes", "valid"), made_by)
    z, codes, valid = shard["z"], shard["codes"], shard["valid"]
    if z.ndim != 2 or codes.ndim != 2 or valid.dtype != bool or not len(z) == len(codes) == len(valid):
        shapes = f"z {z.shape}, codes {codes.shape}, valid {valid.dtype} {valid.shape}"
        fail(f"{path} has {shapes}, not of one length; make it anew with: {made_by}")
    return z, codes, valid


def read_labels(shard_path, game):
    """The labels of one shard, as a dict: action uint8 [N], reward float32 [N], expert_return float32 []."""
    return load_npz(beside(shard_path, "labels"), ("action", "reward", "expert_return"), f"python collect_data.py --game {game}")


def count_rows(path):
    """Rows of the first array of a .npz, read from its header alone."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as member:
            np.lib.format.read_magic(member)
            return np.lib.format.read_array_header_1_0(member)[0][0]
    except Exception as error:
        fail(f"{path} is damaged ({type(error).__name__}); delete it and make it anew with: python collect_data.py")


class FrameStore:
    """Draws windows of consecutive frames at random from all shards of a folder, in bounded memory.

    Holds `pool_frames` frames at most. Where there are more on disk, a thread reads the next shard ahead, and after as
    many draws as the oldest shard has windows that shard gives way: each window is drawn about once a pass.
    """

    def __init__(self, folder, game, context, pool_frames, seed, latents_dir=None):
        self.paths = list_shards(folder, "frames", f"python collect_data.py --game {game}")
        self.game, self.context, self.latents_dir = game, context, latents_dir
        rows = [count_rows(path) for path in self.paths]
        self.num_frames, self.slot_rows = sum(rows), max(rows)
        if pool_frames < min(self.slot_rows, self.num_frames):
            fail(f"--pool-frames {pool_frames} is less than one shard of {folder} ({self.slot_rows} frames)")
        self.num_slots = min(len(self.paths), pool_frames // self.slot_rows)
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.queue = self._shards_for_ever()
        self.obs = self.z = None
        self.windows_of_slot, self.oldest, self.draws = [None] * self.num_slots, 0, 0
        self.reader = ThreadPoolExecutor(1)
        self.next_shard = self.reader.submit(self._read, next(self.queue))
        for slot in range(self.num_slots):
            self._replace(slot, read_ahead=slot + 1 < self.num_slots or self.num_slots < len(self.paths))
        self._skip_shards_without_windows()

    def _shards_for_ever(self):
        while True:
            yield from self.rng.permutation(len(self.paths))

    def _read(self, index):
        obs, first, settings = read_frames(self.paths[index], self.game)
        if self.latents_dir is None:
            return obs, None, valid_windows(first, self.context), settings
        z, _, valid = read_latents(self.paths[index], self.latents_dir, self.game)
        if len(z) != len(obs):
            fail(f"{self.latents_dir} was made from other frames; make it anew with: python train_latent_dynamics.py --game {self.game}")
        return obs, z, valid, settings

    def _replace(self, slot, read_ahead=True):
        obs, z, valid, self.settings = self.next_shard.result()
        if read_ahead:
            self.next_shard = self.reader.submit(self._read, next(self.queue))
        if self.obs is None:
            self.frame_size = obs.shape[1]
            self.obs = torch.empty(self.num_slots * self.slot_rows, *obs.shape[1:], dtype=torch.uint8)
            self.z = None if z is None else torch.empty(self.num_slots * self.slot_rows, z.shape[1], dtype=torch.float16)
        if obs.shape[1:] != self.obs.shape[1:] or (z is not None and z.shape[1] != self.z.shape[1]):
            made_by = f"python collect_data.py --game {self.game}"
            fail(f"the shards of {self.paths[0].parent} differ in frame size or latents; make them anew with: {made_by}")
        start = slot * self.slot_rows
        self.obs[start : start + len(obs)] = torch.from_numpy(obs)
        if z is not None:
            self.z[start : start + len(z)] = torch.from_numpy(z)
        self.windows_of_slot[slot] = torch.from_numpy(start + np.flatnonzero(valid))
        if all(windows is not None for windows in self.windows_of_slot):
            self.windows = torch.cat(self.windows_of_slot)

    def _skip_shards_without_windows(self):
        """A shard can be too short for any window; a pool of such gives way until one has some."""
        for _ in range(2 * len(self.paths)):  # two passes: each is in an order of its own
            if len(self.windows) == 0 and self.num_slots < len(self.paths):
                self._replace(self.oldest)
                self.oldest = (self.oldest + 1) % self.num_slots
        if len(self.windows) == 0:
            fail(f"no window of {self.context + 2} frames in {self.paths[0].parent} lies within an episode; record longer streams")

    def _draw(self, batch):
        rows = self.windows[torch.randint(len(self.windows), (batch,), generator=self.generator)]
        self.draws += batch
        return rows

    def _stream(self):
        if self.num_slots < len(self.paths) and self.draws >= len(self.windows_of_slot[self.oldest]):
            self.draws -= len(self.windows_of_slot[self.oldest])
            self._replace(self.oldest)
            self.oldest = (self.oldest + 1) % self.num_slots
            self._skip_shards_without_windows()

    def sample_windows(self, batch):
        """uint8 (B, context + 2, S, S, 3): o_{t-context} .. o_{t+1}"""
        self._stream()
        rows = self._draw(batch)[:, None] + torch.arange(-self.context, 2)
        return self.obs[rows]

    def sample_latents(self, batch):
        """o_t uint8 (B, S, S, 3) and its latent action z_t float32 (B, Z)"""
        self._stream()
        rows = self._draw(batch)
        return self.obs[rows], self.z[rows].float()


def draw_rows(valid_of_path, count, seed):
    """Draws `count` valid rows without replacement from {path: bool [N]}; returns {path: sorted rows}."""
    paths = np.concatenate([np.full(valid.sum(), i) for i, valid in enumerate(valid_of_path.values())])
    rows = np.concatenate([np.flatnonzero(valid) for valid in valid_of_path.values()])
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:count])
    return {path: rows[chosen][paths[chosen] == i] for i, path in enumerate(valid_of_path)}


def fixed_windows(folder, game, context, count, seed, max_shards=4):
    """`count` windows to report on, uint8 [n, context + 2, S, S, 3], and where they lie ({path: rows}).

    Drawn from at most `max_shards` shards spread over the folder.
    """
    paths = list_shards(folder, "frames", f"python collect_data.py --game {game}")
    paths = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, max_shards).astype(int))]
    shards = {path: read_frames(path, game) for path in paths}
    where = draw_rows({path: valid_windows(first, context) for path, (_, first, _) in shards.items()}, count, seed)
    return np.concatenate([shards[path][0][rows[:, None] + np.arange(-context, 2)] for path, rows in where.items()]), where


def true_actions_to_report_on(where, game):
    """int [n]: the actions of the rows of fixed_windows(), for figures alone, never for a loss; None without label files."""
    if not all(beside(path, "labels").exists() for path in where):
        return None
    return np.concatenate([read_labels(path, game)["action"][rows] for path, rows in where.items()]).astype(int)
