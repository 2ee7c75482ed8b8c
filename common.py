"""Helpers that have one correct answer and teach nothing about LAPO: Procgen's facts; flags, errors
and seeds; games; files; windows of frames; resuming and metrics.
"""

import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

# Before torch loads OpenMP: its idle threads sleep in place of spinning, so that two runs, or a run
# and a browser, can share the cores (measured in results/LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

ACTIONS = "left-down left left-up down none up right-down right right-up D A W S Q E".split()
NUM_ACTIONS = len(ACTIONS)  # 15, the same in every game
# cores that this process may use, which under Slurm are fewer than the machine has
NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
FORMAT = 2  # of checkpoints; 1 had other names of weights

# Mean returns of a uniformly random policy and of the paper's expert ("easy", all levels), and
# actions with the same effect: tried in 900 to 3,100 states a game (get_state, set_state), with
# five more steps; in no case did a frame, a reward or an episode's end differ.
SIDES = "left left-down left-up, right right-down right-up"
GAMES = {
    "bigfish": (0.8742888, 36.336166, "none D A W S Q E"),
    "bossfight": (0.04618272, 11.634365, "none A W S Q E"),
    "caveflyer": (2.5970738, 9.183605, "none A W S Q E"),
    "chaser": (0.6632482, 9.955711, "none D A W S Q E"),
    "climber": (2.2242901, 10.233627, "left left-down, right right-down, none down D A W S Q E"),
    "coinrun": (2.704834, 9.93251, "none D A W S Q E"),
    "dodgeball": (0.612983, 13.486584, "none A W S Q E"),
    "fruitbot": (-2.5330205, 29.925259, f"{SIDES}, none down up A W S Q E"),
    "heist": (3.0758767, 9.685265, "none D A W S Q E"),
    "jumper": (3.4105318, 8.460201, "left left-down, right right-down, none down D A W S Q E"),
    "leaper": (2.5105245, 7.4082565, f"{SIDES}, none D A W S Q E"),
    "maze": (4.2726293, 9.969294, f"{SIDES}, none D A W S Q E"),
    "miner": (1.2513667, 11.892558, f"{SIDES}, none D A W S Q E"),
    "ninja": (2.5599792, 9.474582, "left left-down, right right-down, none down, D Q E"),
    "plunder": (4.3207445, 11.460528, f"{SIDES}, none down up A W S Q E"),
    "starpilot": (1.5251881, 66.98625, "D W S Q E"),
}

WRITTEN_BY = {  # what a file's name starts with: the script that writes it
    "frames_": "collect_data.py", "labels_": "collect_data.py",
    "latents_": "train_latent_dynamics.py", "latent_dynamics": "train_latent_dynamics.py",
    "latent_policy": "train_latent_bc.py", "decode_offline": "decode_offline.py",
    "decode_online": "decode_online_ppo.py", "latents.npz": "visualize_latents.py",
}  # fmt: skip


def distinct_actions(game):
    """int [15]: each action's representative among those with the same effect in this game."""
    distinct = np.arange(NUM_ACTIONS)
    for group in GAMES[game][2].split(",") if game in GAMES else ():
        members = [ACTIONS.index(name) for name in group.split()]
        distinct[members] = members[0]
    return distinct


def check_game(game):
    """Ends the run if `game` cannot be played here."""
    if game not in GAMES:
        fail(f"'{game}' is not one of Procgen's games: {', '.join(GAMES)}")
    if not importlib.util.find_spec("procgen"):
        fail("games have to be played, and Procgen is not installed; see README, Troubleshooting")


def normalize_return(value, random_return, expert_return):
    """0 for the random policy, 1 for the expert; NaN where the two are equal."""
    return (value - random_return) / ((expert_return - random_return) or np.nan)


@dataclass
class RunArgs:
    """The flags of every script that works on a game."""

    game: str = "bigfish"
    """One of Procgen's 16 games; in stages 1 and 2, the name of any folder of frames."""
    seed: int = 1
    """Seeds networks, samples and the games themselves."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    data_dir: Path = Path("data")
    """Frames and labels are in <data-dir>/<game>."""
    runs_dir: Path = Path("runs")
    """Checkpoints, metrics and plots go to <runs-dir>/<game>."""


def print_next(command, args):
    """Prints the next command, with this run's folders unless they are the defaults."""
    for flag in ("data_dir", "runs_dir"):
        default = getattr(RunArgs, flag)
        if (value := getattr(args, flag, default)) != default:
            command += f" --{flag.replace('_', '-')} {value}"
    print(f"next: python {command}")


def fail(message):
    """Ends the run with one line on stderr and exit status 1."""
    for bar in list(tqdm._instances):  # otherwise the line is glued to a progress bar
        bar.close()
    raise SystemExit(f"error: {message}")


def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'cuda:N' -> torch.device"""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} is not usable ({str(error).splitlines()[0]}); try --device cpu")
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU; no effect on the CPU's float32
    torch.backends.cudnn.benchmark = True
    return torch.device(name)


def derive_seed(seed, purpose):
    """A 31-bit seed for each purpose, so that no two random streams of a run are equal."""
    return zlib.crc32(f"{seed}/{purpose}".encode()) >> 1


def shrink(frames, size):
    """uint8 [B, S, S, 3] -> uint8 [B, size, size, 3], rounded means of blocks"""
    n = frames.shape[1] // size
    total = sum(frames[:, i::n, j::n].astype(np.uint16) for i in range(n) for j in range(n))
    return ((total + n * n // 2) // (n * n)).astype(np.uint8)


class ProcgenEnvs:
    """`num_envs` Procgen games ("easy") that step together; the games' own seed is set.

    settings: game, frame_size and, if wanted, start_level, num_levels, plain, one_theme (see
    collect_data.py). obs: uint8 [B, S, S, 3], the current frames; rendered: the same at 64x64.
    finished: (env, episodic return) of each episode that ended; the caller empties it.
    """

    def __init__(self, settings, num_envs, seed):
        check_game(settings["game"])
        with contextlib.redirect_stderr(io.StringIO()):  # gym's notice about its successor
            from procgen import ProcgenGym3Env
        options = {name: settings.get(name, 0) for name in ("start_level", "num_levels")}  # 0: all
        options["restrict_themes"] = bool(settings.get("one_theme"))
        if settings.get("plain"):
            options |= dict(use_backgrounds=False, restrict_themes=True, use_monochrome_assets=True)
        gc.collect()  # games that are garbage must not be closed while others are being made
        self.games = ProcgenGym3Env(
            num=num_envs, env_name=settings["game"], distribution_mode="easy", rand_seed=seed,
            num_threads=min(num_envs, NUM_CORES), **options,
        )  # fmt: skip
        self.num_envs, self.frame_size = num_envs, settings["frame_size"]
        self.finished, self._returns = [], np.zeros(num_envs)
        self._observe()

    def _observe(self):
        reward, obs, first = self.games.observe()
        self.rendered = obs["rgb"]
        self.obs = shrink(self.rendered, self.frame_size)
        return reward.copy(), first.copy()

    def step(self, actions):
        """actions int [B] -> obs uint8 [B, S, S, 3], reward float32 [B], done bool [B]: where done,
        an episode has ended with this reward, and obs opens the next one.
        """
        self.games.act(np.asarray(actions, np.int32))
        reward, done = self._observe()
        self._returns += reward
        self.finished += [(int(env), float(self._returns[env])) for env in np.flatnonzero(done)]
        self._returns[done] = 0
        return self.obs, reward, done

    def state_dict(self):
        games = [torch.frombuffer(bytearray(s), dtype=torch.uint8) for s in self.games.get_state()]
        return dict(games=games, returns=self._returns.tolist(), finished=self.finished)

    def load_state_dict(self, saved):
        self.games.set_state([state.numpy().tobytes() for state in saved["games"]])
        self._returns, self.finished = np.array(saved["returns"]), saved["finished"]
        self._observe()


class RewardNormalizer:
    """Divides rewards by the running std of the discounted return of their episode, and clips them
    to +-10: OpenAI's VecNormalize, which Cobbe et al. 2020 used.
    """

    def __init__(self, num_envs, gamma):
        self.gamma = gamma
        # of all discounted returns so far; the variance starts at 1
        self.count, self.total, self.squares = 1e-4, 0.0, 1e-4
        self.discounted = np.zeros(num_envs)

    def __call__(self, reward, done):
        """reward float (B,), done bool (B,) of one step -> float32 (B,)"""
        self.discounted = self.discounted * self.gamma + reward
        self.count += len(reward)
        self.total += self.discounted.sum()
        self.squares += (self.discounted**2).sum()
        var = self.squares / self.count - (self.total / self.count) ** 2
        self.discounted[done] = 0
        return np.clip(reward / np.sqrt(var + 1e-8), -10, 10).astype(np.float32)

    def state_dict(self):
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}

    def load_state_dict(self, saved):
        vars(self).update(saved | dict(discounted=np.array(saved["discounted"])))


@torch.no_grad()
def evaluate(envs, act, episodes_per_env):
    """Returns float [B, episodes_per_env] of whole episodes; act: obs -> actions int [B]. Each
    environment plays equally many: the first episodes to finish would be the short ones.
    """
    returns = [[] for _ in range(envs.num_envs)]
    with progress_bar(envs.num_envs * episodes_per_env, "episode", "evaluate") as bar:
        while min(map(len, returns)) < episodes_per_env:
            envs.step(act(envs.obs))
            for env, episode_return in envs.finished:
                if len(returns[env]) < episodes_per_env:
                    returns[env].append(episode_return)
                    bar.update()
            envs.finished.clear()
    return np.array(returns)


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path that takes the place of `path` if the block ends without error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder, overwrite):
    """Yields a temporary folder that takes the place of `folder` if the block ends without error.
    Of two runs at once, the second ends, as one does that finds a folder and may not overwrite it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)  # released with the variable, or when the process ends
    except Timeout:
        fail(f"another run is writing {folder}")
    if folder.exists() and not overwrite:
        fail(f"{folder} is there already; --overwrite replaces it")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    part.mkdir()
    yield part
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


@contextlib.contextmanager
def reading(path):
    """Ends the run with one line if `path` is missing or damaged."""
    try:
        yield
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib, pickle, KeyError, EOFError, ValueError and others
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        fault = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({reason})"
        scripts = [x for start, x in WRITTEN_BY.items() if Path(path).name.startswith(start)]
        fail(f"{path} is {fault}" + (f"; {scripts[0]} writes it" if scripts else ""))


def save_npz(path, settings, **arrays):
    """A compressed .npz, settings (a dict) as JSON; level 4 takes half as long as numpy's 6."""
    arrays["settings"] = json.dumps(settings, default=str)
    with atomic_write(path) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def load_npz(path, keys=None):
    """The arrays `keys`, or all, and the dict of settings ({} if there is none), as a dict."""
    with reading(path), np.load(path, allow_pickle=False) as file:
        settings = json.loads(str(file["settings"])) if "settings" in file.files else {}
        return {key: file[key] for key in keys or file.files} | dict(settings=settings)


def save_checkpoint(path, **content):
    """Tensors and plain Python values only, so that it loads with weights_only=True."""
    # through a file object: given a path, torch.save stores its name, which has the process id
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(dict(format=FORMAT) | content, file)


def load_checkpoint(path, kind, game):
    """The dict that save_checkpoint() wrote, on the CPU."""
    with reading(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = f"{content['kind']} of {content['game']}, format {content.get('format', 1)}"
    if found != (expected := f"{kind} of {game}, format {FORMAT}"):
        fail(f"{path} holds {found}, not {expected}")
    return content


def fingerprint(*modules):
    """16 hex digits that identify the weights, so that files of two runs are not mixed."""
    weights = (weight for module in modules for weight in module.state_dict().values())
    blob = b"".join(weight.cpu().numpy().tobytes() for weight in weights)
    return hashlib.sha256(blob).hexdigest()[:16]


def to_input(frames):
    """uint8 (B, T, S, S, 3) -> float (B, 3T, S, S) in [-0.5, 0.5], channels last in memory."""
    x = frames.permute(0, 2, 3, 1, 4).flatten(3).permute(0, 3, 1, 2)
    return x.float() / 255 - 0.5


def list_shards(folder):
    """Sorted paths of frames_NNN.npz; a folder without any ends the run."""
    paths = sorted(Path(folder).glob("frames_*.npz"))
    return paths or fail(f"{folder} has no frames_*.npz; collect_data.py writes them")


def read_frames(path, game):
    """One shard: obs uint8 [N, S, S, 3], first bool [N], settings dict."""
    obs, first, settings = load_npz(path, ("obs", "first")).values()
    size = obs.shape[1] if obs.ndim == 4 and obs.shape[1] in (16, 32, 64) else 64
    found, expected = f"{obs.dtype} {obs.shape}", f"uint8 {(len(first), size, size, 3)}"
    if found != expected or first.dtype != bool or len(first) == 0:
        fail(f"{path} has obs {found}, not {expected}, or first is not bool [N > 0]")
    if settings.get("game", game) != game:
        fail(f"{path} was recorded from {settings['game']}, not from {game}")
    # own shards may lack settings
    known = dict(zip(("random_return", "expert_return"), GAMES.get(game, ())), num_levels=0)
    return obs, first, known | settings | dict(game=game, frame_size=size)


def read_latents(frames_path, latents_dir, dynamics):
    """z float16 [N, Z] before quantization and valid bool [N] of one shard of frames, which must
    come from the run of stage 1 with the fingerprint `dynamics`.
    """
    path = latents_dir / frames_path.name.replace("frames", "latents")
    z, valid, settings = load_npz(path, ("z", "valid")).values()
    if settings.get("dynamics") != dynamics:
        fail(f"{path} is of another run of stage 1; repeat stage 1 (--resume), then stage 2")
    return z, valid


def read_actions(frames_path):
    """The true actions of one shard of frames: uint8 [N], or float32 [N, A] if continuous."""
    path = frames_path.with_name(frames_path.name.replace("frames", "labels"))
    action, first = load_npz(path, ["action"])["action"], load_npz(frames_path, ["first"])["first"]
    continuous = action.dtype.kind == "f"
    rows = action.shape[:-1] if continuous else action.shape
    if rows != first.shape or not (continuous or np.isin(action, range(NUM_ACTIONS)).all()):
        found = f"actions {action.dtype} {action.shape} for {len(first)} frames"
        fail(f"{path} has {found}, not one of 0 .. 14 or A numbers for each")
    return action


def valid_windows(first, context):
    """bool [N]: True at i where frames i - context .. i + 1 belong to one episode of one stream."""
    starts = np.concatenate([[0], np.cumsum(first)])  # starts[i]: episode starts before row i
    valid = np.zeros(len(first), bool)
    valid[context:-1] = starts[context + 2 :] == starts[1 : -context - 1]
    return valid


def read_shard(path, game, context, latents_dir=None, dynamics=None):
    """path, obs uint8 [N, S, S, 3], valid bool [N], z float16 [N, Z] (Z = 0: unread), settings"""
    try:
        obs, first, settings = read_frames(path, game)
        valid, z = valid_windows(first, context), np.zeros((len(obs), 0), np.float16)
        if dynamics:
            z, labelled = read_latents(path, latents_dir, dynamics)
            if not np.array_equal(valid, labelled):
                fail(f"{latents_dir} was made from other frames than {path}")
        return path, obs, valid, z, settings
    except SystemExit as error:  # of a worker process; read_ahead() raises it in the main one
        return error


def die_with_parent(_):
    """In a worker: without this, workers of a killed run can wait for it for ever (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def read_ahead(paths, sampler=None, **arguments):
    """Yields read_shard(path, **arguments); worker processes read the next ones meanwhile."""
    gc.collect()  # games that are garbage: their destructors hang in a forked worker
    options = dict(num_workers=min(4, NUM_CORES, len(paths)), worker_init_fn=die_with_parent)
    options["collate_fn"] = functools.partial(read_shard, **arguments)
    for shard in torch.utils.data.DataLoader(paths, None, sampler=sampler, **options):
        if isinstance(shard, SystemExit):
            fail(str(shard).removeprefix("error: "))
        yield shard


class FrameStore:
    """Draws windows uniformly, with replacement, from shards that need not fit into memory.

    Holds at most `pool_frames` frames, on `device` if they fit there. If there are more, the oldest
    shard is evicted for the next one after as many draws as it has windows.
    """

    def __init__(self, args, split, context, device, dynamics=None, pool_frames=131_072):
        """args: RunArgs, for folders and seed; dynamics: see read_latents(), for z_at()."""
        self.folder, self.game = args.data_dir / args.game / split, args.game
        self.context, self.device = context, device
        paths, sampler = list_shards(self.folder), None
        lengths = [len(load_npz(path, ["first"])["first"]) for path in paths]
        self.num_frames, self.slot_rows = sum(lengths), max(1, *lengths)
        num_slots = min(len(paths), max(1, pool_frames // self.slot_rows))
        self.streams = num_slots < len(paths)
        self.generator = torch.Generator().manual_seed(derive_seed(args.seed, split))
        if self.streams:  # in shuffled passes without end
            shuffle = torch.Generator().manual_seed(derive_seed(args.seed, "order of shards"))
            sampler = torch.utils.data.RandomSampler(paths, num_samples=10**9, generator=shuffle)
        where = dict(latents_dir=args.runs_dir / args.game / split, dynamics=dynamics)
        self.shards = read_ahead(paths, sampler, game=args.game, context=context, **where)
        self.paths, self.windows = [None] * num_slots, [None] * num_slots  # of the shard in a slot
        self.obs, self.oldest, self.draws = None, 0, 0
        for slot in range(num_slots):
            self._fill(slot)
        if not self.streams:
            self.shards = None  # ends the workers
        self.rows = torch.cat(self.windows)
        if len(self.rows) == 0:
            fail(f"no window of {context + 2} frames in {self.folder} lies within an episode")

    def _fill(self, slot):
        path, obs, valid, z, settings = next(self.shards)
        if self.obs is None:
            self.frame_size, self.settings = obs.shape[1], settings
            size, place = len(self.paths) * self.slot_rows, dict(device=self.device)
            if self.device.type == "cuda":  # at most half of what is free: networks need some, too
                fits = size * obs[0].nbytes < torch.cuda.mem_get_info(self.device)[0] / 2
                place = place if fits else dict(pin_memory=True)
            self.obs = torch.empty(size, *obs.shape[1:], dtype=torch.uint8, **place)
            self.z = torch.empty(size, z.shape[1], dtype=torch.float16, **place)
        if obs.shape[1] != self.frame_size:
            fail(f"{self.folder} has frames of {self.frame_size} and of {obs.shape[1]} pixels")
        start = slot * self.slot_rows
        for pool, array in ((self.obs, obs), (self.z, z)):
            pool[start : start + len(array)] = torch.from_numpy(array)
        self.paths[slot], self.windows[slot] = path, torch.from_numpy(start + np.flatnonzero(valid))

    def draw(self, batch):
        """Rows int64 (B,) of o_t, for the methods below; they hold until the next draw()."""
        if self.streams and self.draws >= len(self.windows[self.oldest]):
            self._fill(self.oldest)
            self.oldest, self.draws = (self.oldest + 1) % len(self.paths), 0
            self.rows = torch.cat(self.windows)
        self.draws += batch
        return self.rows[torch.randint(len(self.rows), (batch,), generator=self.generator)]

    def _gather(self, pool, rows):
        return pool[rows.to(pool.device, non_blocking=True)].to(self.device, non_blocking=True)

    def windows_at(self, rows):
        """uint8 (B, context + 2, S, S, 3): o_{t-context} .. o_{t+1}"""
        return self._gather(self.obs, rows[:, None] + torch.arange(-self.context, 2))

    def frames_at(self, rows):
        """uint8 (B, S, S, 3): o_t"""
        return self._gather(self.obs, rows)

    def z_at(self, rows):
        """float32 (B, Z): z_t"""
        return self._gather(self.z, rows).float()


def true_actions_to_report_on(store, rows):
    """The true actions at rows of a FrameStore: int [n], those of equal effect merged, or float32
    [n, A] if continuous. None if there are no label files. To report on latents, not to learn them.
    """
    names = (path.name.replace("frames", "labels") for path in store.paths)
    if not all((store.folder / name).exists() for name in names):
        return None
    shards = [read_actions(path) for path in store.paths]
    starts = np.cumsum([0, *map(len, shards)])  # of each shard
    slot, row = np.divmod(rows.numpy(), store.slot_rows)
    actions = np.concatenate(shards)[starts[slot] + row]
    return actions if actions.dtype.kind == "f" else distinct_actions(store.game)[actions]


def check_finite(step, path, *modules):
    """Ends the run if a weight is not finite, before `path` is overwritten."""
    if not all(weight.isfinite().all() for module in modules for weight in module.parameters()):
        fail(f"not finite at step {step}; {path} stays as it was; try a lower learning rate")


def save_state(path, args, step, parts, **values):
    """What load_state() needs to go on after `step`; values: tensors and plain Python values."""
    states = {}
    for name, part in parts.items():
        states[name] = part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
    flags = {flag: str(value) for flag, value in vars(args).items()}
    content = dict(flags=flags, step=step, parts=states, values=values, rng=torch.get_rng_state())
    save_checkpoint(path, kind="run state", game=args.game, **content)


def load_state(path, args, parts, made_from=None):
    """With --resume, restores parts ({name: object with state_dict(), or torch.Generator}). Returns
    the step and the values that were saved; 0 and {} without --resume or a saved state. made_from:
    fingerprint of what the stage before made, if save_state() was given it.
    """
    if not args.resume or not Path(path).exists():
        return 0, {}
    state = load_checkpoint(path, "run state", args.game)
    for flag, value in vars(args).items():
        was, free = state["flags"].get(flag), ("resume", "device", "compile", "overwrite")
        if str(value) != was and flag not in free and not flag.endswith("_dir"):
            flag = flag.replace("_", "-")
            fail(f"--{flag} is {value}, but the run in {path} has {was}; resume it with its flags")
    if state["values"].get("made_from", made_from) != made_from:
        fail(f"{path} is of a run on another result of the stage before; leave out --resume")
    for name, part in parts.items():
        restore = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
        restore(state["parts"][name])
    torch.set_rng_state(state["rng"])
    print(f"resume: {path} is at step {state['step']:,}")
    return state["step"], state["values"]


def progress_bar(total, unit, description=None, initial=0):
    """tqdm's bar; in a log file it prints every 20 seconds."""
    options = dict(dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 20)
    return tqdm(total=total, unit=unit, desc=description, initial=initial, **options)


class MetricsLog:
    """A progress bar, and rows of metrics for the screen and a CSV file; first comes the step. Of
    a run that resumes at the step `start`, later rows leave the file.
    """

    def __init__(self, path, total, unit, start=0):
        self.path, self.bar = Path(path), progress_bar(total, unit, initial=start)
        rows = self.path.read_text().splitlines() if start and self.path.exists() else []
        kept = rows[:1] + [row for row in rows[1:] if int(row.split(",")[0]) <= start]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(f"{row}\n" for row in kept))

    def write(self, **row):
        row = {key: x.item() if isinstance(x, torch.Tensor) else x for key, x in row.items()}
        with open(self.path, "a") as file:
            header = [",".join(row)] if file.tell() == 0 else []
            print(*header, ",".join(map(str, row.values())), sep="\n", file=file)
        shown = {key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()}
        self.bar.write("  ".join(f"{key} {x}" for key, x in shown.items()))
