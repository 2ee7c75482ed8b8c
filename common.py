"""Helpers that have one correct answer and teach nothing about LAPO: Procgen's games, flags, error
exits, files, windows of frames, resuming, metrics and plots.

Shapes: [N, Z] of numpy arrays, (N, Z) of tensors.
"""

import collections
import contextlib
import errno
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import os
import shlex
import shutil
import sys
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Before torch loads OpenMP: its idle threads sleep in place of spinning, so that two runs, or a run
# and a browser, can share the cores (docs/lessons.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import tyro
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

ACTIONS = "left-down left left-up down none up right-down right right-up D A W S Q E".split()
NUM_ACTIONS = len(ACTIONS)  # 15, the same in every game
NOOP = ACTIONS.index("none")
RESET = -1  # Procgen ends the episode
# cores that this process may use, which under Slurm are fewer than the machine has
NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
FORMAT = 3  # of checkpoints; earlier ones had other names of weights


class Game(NamedTuple):
    random_return: float  # mean return of a uniformly random policy ("easy", all levels)
    expert_return: float  # of the paper's expert
    equal_actions: str  # groups of actions that have the same effect, separated by commas


# Actions of equal effect were found by trying all 15 in 900 to 3,100 states of each game, with five
# more steps after them: no frame, no reward and no end of an episode differs within a group.
SIDES = "left left-down left-up, right right-down right-up"
GAMES = {
    "bigfish": Game(0.8742888, 36.336166, "none D A W S Q E"),
    "bossfight": Game(0.04618272, 11.634365, "none A W S Q E"),
    "caveflyer": Game(2.5970738, 9.183605, "none A W S Q E"),
    "chaser": Game(0.6632482, 9.955711, "none D A W S Q E"),
    "climber": Game(
        2.2242901, 10.233627, "left left-down, right right-down, none down D A W S Q E"
    ),
    "coinrun": Game(2.704834, 9.93251, "none D A W S Q E"),
    "dodgeball": Game(0.612983, 13.486584, "none A W S Q E"),
    "fruitbot": Game(-2.5330205, 29.925259, f"{SIDES}, none down up A W S Q E"),
    "heist": Game(3.0758767, 9.685265, "none D A W S Q E"),
    "jumper": Game(3.4105318, 8.460201, "left left-down, right right-down, none down D A W S Q E"),
    "leaper": Game(2.5105245, 7.4082565, f"{SIDES}, none D A W S Q E"),
    "maze": Game(4.2726293, 9.969294, f"{SIDES}, none D A W S Q E"),
    "miner": Game(1.2513667, 11.892558, f"{SIDES}, none D A W S Q E"),
    "ninja": Game(2.5599792, 9.474582, "left left-down, right right-down, none down, D Q E"),
    "plunder": Game(4.3207445, 11.460528, f"{SIDES}, none down up A W S Q E"),
    "starpilot": Game(1.5251881, 66.98625, "D W S Q E"),
}

WRITTEN_BY = {  # what a file's name starts with: the script that writes it
    "frames_": "collect_data.py",
    "labels_": "collect_data.py",
    "latents_": "train_latent_dynamics.py",
    "latent_dynamics": "train_latent_dynamics.py",
    "latent_policy": "train_latent_bc.py",
    "decode_offline": "decode_offline.py",
    "decode_online": "decode_online_ppo.py",
}


def distinct_actions(game):
    """int [15]: each action's representative among those with the same effect in this game."""
    distinct = np.arange(NUM_ACTIONS)
    groups = GAMES[game].equal_actions.split(",") if game in GAMES else []
    for group in groups:
        members = [ACTIONS.index(name) for name in group.split()]
        for member in members:
            distinct[member] = members[0]
    return distinct


def normalize_return(value, random_return, expert_return):
    """0 for the random policy, 1 for the expert; NaN where the two are equal."""
    return (value - random_return) / ((expert_return - random_return) or np.nan)


# --- flags, error exits, seeds --------------------------------------------------------------------


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

    def __post_init__(self):
        check_flags(self)


MAY_BE_0 = "seed context num_levels train_frames test_frames random_frames grad_steps warmup_steps "
MAY_BE_0 += "supervised_steps"  # of continuous_control
MAY_CHANGE = "resume device compile capture_video"  # when a run goes on, like folders


def check_flags(args):
    """Ends the run on a negative count, or 0 where it makes no sense; expands ~ in folders, which
    the shell does not do in --flag=~/folder.
    """
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, value.expanduser())
        counts = value if isinstance(value, tuple) else (value,)
        lowest = 0 if name in MAY_BE_0.split() or name.endswith("_ramp") else 1
        for count in counts:
            if type(count) is int and count < lowest:
                fail(f"--{name.replace('_', '-')} {count}: {lowest} is the least")


def fail(message):
    """Ends the run with one line on stderr and exit status 1."""
    for bar in list(tqdm._instances):  # otherwise the line is glued to a progress bar
        bar.close()
    raise SystemExit(f"error: {message}")


def run(main, args_class):
    """Parses the flags and calls main. Ctrl-C and errors of the file system print one line."""
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line at once
    try:
        main(tyro.cli(args_class))
    except KeyboardInterrupt:
        resumable = "resume" in args_class.__dataclass_fields__
        advice = "; --resume continues from the last saved state or finished recording"
        fail(f"stopped{advice if resumable else ''}")
    except OSError as error:
        known = "ENOSPC EDQUOT EROFS EACCES EPERM EPIPE ENOLCK".split()
        if errno.errorcode.get(error.errno) not in known:
            raise
        place = f" ({error.filename})" if error.filename else ""
        fail(f"{os.strerror(error.errno)}{place}; files that were complete are still there")


def print_next(script, args, *flags):
    """Prints the next command, with this run's seed and folders unless they are the defaults."""
    command = ["python", *script.split(), "--game", args.game, *flags]
    for name in ("seed", "data_dir", "runs_dir"):
        value = getattr(args, name, None)
        if value not in (None, getattr(RunArgs, name)):
            command += [f"--{name.replace('_', '-')}", str(value)]
    print(f"next: {shlex.join(command)}")


def check_game(game):
    """Ends the run if `game` cannot be played here."""
    if game not in GAMES:
        fail(f"'{game}' is not one of Procgen's games: {', '.join(GAMES)}")
    if not importlib.util.find_spec("procgen"):
        fail("games have to be played, and Procgen is not installed; see README, Troubleshooting")


def pick_device(args):
    """--device auto, cpu, cuda or cuda:N -> torch.device"""
    name = args.device
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


# --- games ----------------------------------------------------------------------------------------


def shrink(frames, size):
    """uint8 [B, S, S, 3] -> uint8 [B, size, size, 3], rounded means of blocks"""
    factor = frames.shape[1] // size
    return np.stack([np.asarray(Image.fromarray(frame).reduce(factor)) for frame in frames])


class ProcgenEnvs:
    """`num_envs` Procgen games ("easy") that step together; the games' own seed is set.

    settings: game, frame_size and, if wanted, start_level, num_levels, plain, one_theme, see
    collect_data.py. obs: uint8 [B, S, S, 3], the current frames; rendered: the same at 64x64.
    """

    def __init__(self, settings, num_envs, seed):
        check_game(settings["game"])
        with contextlib.redirect_stderr(io.StringIO()):  # gym's notice about its successor
            from procgen import ProcgenGym3Env
        plain = settings.get("plain", False)
        gc.collect()  # Procgen can crash if games are closed while others are being made
        self.games = ProcgenGym3Env(
            num=num_envs,
            env_name=settings["game"],
            distribution_mode="easy",
            rand_seed=seed,
            num_threads=min(num_envs, NUM_CORES),
            start_level=settings.get("start_level", 0),
            num_levels=settings.get("num_levels", 0),  # 0: all
            use_backgrounds=not plain,
            use_monochrome_assets=plain,
            restrict_themes=plain or settings.get("one_theme", False),
        )
        self.num_envs = num_envs
        self.frame_size = settings["frame_size"]
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
        return self.obs, reward, done

    def state_dict(self):
        states = self.games.get_state()
        return dict(
            games=[torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in states]
        )

    def load_state_dict(self, saved):
        self.games.set_state([state.numpy().tobytes() for state in saved["games"]])
        self._observe()


class RewardNormalizer:
    """Divides rewards by the running std of the discounted return of their episode, and clips them
    to +-10: OpenAI's VecNormalize, which Cobbe et al. 2020 used.
    """

    def __init__(self, num_envs, gamma):
        self.gamma = gamma
        # count, sum and sum of squares of all discounted returns so far; the variance starts at 1
        self.count = 1e-4
        self.total = 0.0
        self.squares = 1e-4
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
        vars(self).update(saved)
        self.discounted = np.array(saved["discounted"])


def sample_actions(logits, generator):
    """logits (B, A) -> actions int64 (B,), drawn from the softmax."""
    probabilities = logits.softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def make_player(compute_logits, device, seed):
    """act: obs uint8 [B, S, S, 3] -> actions int [B], sampled. compute_logits: obs (B, S, S, 3) on
    the device -> logits (B, 15).
    """
    generator = torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def act(obs):
        logits = compute_logits(torch.from_numpy(obs).to(device))
        return sample_actions(logits, generator).cpu().numpy()

    return act


@torch.no_grad()
def play_episodes(envs, act, episodes_per_env):
    """Returns float [B, episodes_per_env] of whole episodes; act: obs -> actions int [B]. Every
    environment plays the same number: the first episodes to end are the short ones. No step was
    taken in envs before.
    """
    returns = [[] for _ in range(envs.num_envs)]
    running = np.zeros(envs.num_envs)  # returns of the current episodes so far
    bar = progress_bar(envs.num_envs * episodes_per_env, "episode", "play")
    while min(map(len, returns)) < episodes_per_env:
        _, reward, done = envs.step(act(envs.obs))
        running += reward
        for env in np.flatnonzero(done):
            if len(returns[env]) < episodes_per_env:
                returns[env].append(running[env])
                bar.update()
        running[done] = 0
    bar.close()
    return np.array(returns)


def evaluation_returns(recording, act, args):
    """Returns float [eval_episodes] of one episode in each of as many games, the same ones each
    time; act: obs -> actions int [B].
    """
    envs = ProcgenEnvs(recording, args.eval_episodes, derive_seed(args.seed, "evaluate"))
    return play_episodes(envs, act, 1)[:, 0]


def capture_video(path, recording, act, seed, max_steps=300):
    """Writes an animation (GIF) of an episode in each of 2 x 4 games, cut after `max_steps`. The
    games are the same for all agents; the last frame of an episode stays.
    """
    envs = ProcgenEnvs(recording, 8, derive_seed(seed, "video"))
    shown = envs.rendered.copy()  # (8, 64, 64, 3)
    playing = np.ones(8, bool)
    pictures = []
    while playing.any() and len(pictures) < max_steps:
        framed = np.pad(shown, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        grid = framed.reshape(2, 4, 66, 66, 3).swapaxes(1, 2)
        pictures.append(Image.fromarray(grid.reshape(132, 264, 3)))
        _, _, done = envs.step(act(envs.obs))
        playing &= ~done
        shown[playing] = envs.rendered[playing]
    save_animation(pictures, path)
    print(f"video: {path}")


def save_animation(pictures, path):
    """PIL images -> GIF, 15 a second"""
    rest = pictures[1:]
    with atomic_write(path) as temporary:
        pictures[0].save(
            temporary, format="GIF", save_all=True, append_images=rest, duration=66, loop=0
        )


# --- files ----------------------------------------------------------------------------------------

_locks = {}


def lock(path):
    """Ends the run if another process writes `path`; the lock is held until this process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.resolve().with_name(f".{path.name}.lock")
    try:
        _locks.setdefault(file, FileLock(file)).acquire(timeout=0)
    except Timeout:
        fail(f"another run is writing {path}; give this one another --runs-dir or --data-dir")


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path that takes the place of `path` if the block ends without error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder):
    """Yields <folder>.part, which becomes `folder` if the block ends without error. A folder that
    is there is never replaced. A second run that writes the same folder exits.
    """
    folder = folder.resolve()  # a link may point to a folder that does not exist yet
    lock(folder)
    if folder.exists():
        fail(f"{folder} is there already; remove it, or choose another --data-dir")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # incomplete, of a run that was killed
    part.mkdir()
    yield part
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
        name = Path(path).name
        advice = [f"{script} writes it" for x, script in WRITTEN_BY.items() if name.startswith(x)]
        if name.endswith("_state.pt"):
            advice = ["leave out --resume to start from the beginning"]
        fail("; ".join([f"{path} is {fault}", *advice[:1]]))


def save_npz(path, settings, **arrays):
    """A compressed .npz, settings (a dict) as JSON."""
    arrays["settings"] = json.dumps(settings, default=str)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


# Python 3.11's parser, which numpy uses for the header of an array, fails now and then if several
# threads are in it (github.com/python/cpython/issues/106905): one thread reads at a time.
_npz_lock = threading.Lock()


def load_npz(path, keys=None):
    """The arrays `keys`, or all, and the dict of settings ({} if there is none), as a dict."""
    with reading(path), _npz_lock, np.load(path, allow_pickle=False) as file:
        settings = json.loads(str(file["settings"])) if "settings" in file.files else {}
        arrays = {key: file[key] for key in keys or file.files}
    return arrays | dict(settings=settings)


def save_checkpoint(path, **content):
    """Tensors and plain Python values only, so that it loads with weights_only=True."""
    # through a file object: given a path, torch.save stores its name
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(dict(format=FORMAT) | content, file)


def load_checkpoint(path, kind, game):
    """The dict that save_checkpoint() wrote, on the CPU."""
    with reading(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or "kind" not in content:
        fail(f"{path} is not a checkpoint of this project")
    found = f"{content['kind']} of {content['game']}, format {content.get('format', 1)}"
    expected = f"{kind} of {game}, format {FORMAT}"
    if found != expected:
        fail(f"{path} holds {found}, not {expected}")
    return content


def fingerprint(*modules):
    """16 hex digits that identify the weights, so that files of two runs are not mixed."""
    digest = hashlib.sha256()
    for module in modules:
        for weight in module.state_dict().values():
            digest.update(weight.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def frames_id(paths):
    """Identifies the frames of these shards: the checksums that .npz files, which are zip archives,
    hold of their arrays.
    """
    checksums = []
    for path in paths:
        with reading(path), zipfile.ZipFile(path) as archive:
            checksums += [archive.getinfo(f"{name}.npy").CRC for name in ("obs", "first")]
    return hashlib.sha256(str(checksums).encode()).hexdigest()[:16]


# --- shards of frames -----------------------------------------------------------------------------


class Shard(NamedTuple):
    path: Path
    obs: np.ndarray  # uint8 [N, S, S, 3]
    valid: np.ndarray  # bool [N], see valid_windows()
    z: np.ndarray  # float16 [N, Z]; Z is 0 where latents are not read
    recording: dict  # game, frame_size, plain, levels, mean returns, ..., see collect_data.py


def list_shards(folder):
    """Sorted paths of frames_NNN.npz; a folder without any ends the run."""
    paths = sorted(Path(folder).glob("frames_*.npz"))
    return paths or fail(f"{folder} has no frames_*.npz; collect_data.py writes them")


def read_frames(path, game):
    """One shard: obs uint8 [N, S, S, 3], first bool [N], recording dict."""
    shard = load_npz(path, ["obs", "first"])
    obs = shard["obs"]
    first = shard["first"]
    size = obs.shape[1] if obs.ndim == 4 and obs.shape[1] in (16, 32, 64) else 64
    found = f"{obs.dtype} {obs.shape}"
    expected = f"uint8 {(len(first), size, size, 3)}"
    if found != expected or first.dtype != bool or len(first) == 0:
        fail(f"{path} has obs {found}, not {expected}, or first is not bool [N > 0]")
    recording = dict(num_levels=0)  # shards of one's own may lack settings
    if game in GAMES:
        recording["random_return"] = GAMES[game].random_return
        recording["expert_return"] = GAMES[game].expert_return
    recording |= shard["settings"]
    if recording.setdefault("game", game) != game:
        fail(f"{path} was recorded from {recording['game']}, not from {game}")
    return obs, first, recording | dict(frame_size=size)


def read_latents(frames_path, latents_dir, dynamics_id):
    """z float16 [N, Z] of one shard, before quantization. The latents must be of these frames, and
    of the run of stage 1 with this id.
    """
    path = latents_dir / frames_path.name.replace("frames", "latents")
    latents = load_npz(path, ["z"])
    if latents["settings"].get("dynamics_id") != dynamics_id:
        fail(f"{path} is of another run of stage 1; repeat stage 1 (--resume), then stage 2")
    if latents["settings"].get("frames_id") != frames_id([frames_path]):
        fail(f"{path} was made from other frames than {frames_path}; repeat stage 1, then stage 2")
    return latents["z"]


def labels_path(frames_path):
    return frames_path.with_name(frames_path.name.replace("frames", "labels"))


def read_actions(frames_path):
    """The true actions of one shard of frames: uint8 [N], or float32 [N, A] if continuous."""
    path = labels_path(frames_path)
    action = load_npz(path, ["action"])["action"]
    num_frames = len(load_npz(frames_path, ["first"])["first"])
    if len(action) != num_frames:
        fail(f"{path} has {len(action)} actions for {num_frames} frames")
    return action


def valid_windows(first, context):
    """bool [N]: True at i where frames i - context .. i + 1 belong to one episode of one stream.
    With context 1, first 1 0 0 0 1 0 0 gives 0 1 1 0 0 1 0.
    """
    starts = np.concatenate([[0], np.cumsum(first)])  # starts[i]: episode starts before row i
    valid = np.zeros(len(first), bool)
    # no episode starts in rows i - context + 1 .. i + 1
    valid[context:-1] = starts[context + 2 :] == starts[1 : -context - 1]
    return valid


def read_shard(path, game, context, latents_dir=None, dynamics_id=None):
    """Frames, and with dynamics_id their latents."""
    obs, first, recording = read_frames(path, game)
    valid = valid_windows(first, context)
    z = np.zeros((len(obs), 0), np.float16)
    if dynamics_id:
        z = read_latents(path, latents_dir, dynamics_id)
    return Shard(path, obs, valid, z, recording)


def in_background(function, items, ahead=4):
    """Yields function(item) of each item, in order; threads compute the next `ahead` ones meanwhile
    (zlib releases the GIL). An error is raised where its result would be yielded.
    """
    pending = collections.deque()
    with ThreadPoolExecutor(min(4, NUM_CORES)) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def endless_passes(paths, generator):
    """Yields all paths in random order, again and again."""
    while True:
        for i in torch.randperm(len(paths), generator=generator).tolist():
            yield paths[i]


class FrameStore:
    """Draws windows uniformly, with replacement, from shards that need not fit into memory.

    If there are more than `pool_frames` frames, memory is split in two halves: windows are drawn
    from one, once per window on average, while threads read the next shards for the other. A load
    is what one half holds. Frames in use are on `device` if they fit there.
    """

    def __init__(self, args, split, context, device, dynamics_id=None, pool_frames=131_072):
        """args: RunArgs, for folders and seed; dynamics_id: see read_latents(), for z_at()."""
        self.folder = args.data_dir / args.game / split
        self.game = args.game
        self.context = context
        self.device = device
        self.generator = torch.Generator().manual_seed(derive_seed(args.seed, split))
        self.order_seed = derive_seed(args.seed, "order of shards")
        paths = list_shards(self.folder)
        lengths = [len(load_npz(path, ["first"])["first"]) for path in paths]
        self.num_frames = sum(lengths)
        self.all_paths = paths
        self.streams = self.num_frames > pool_frames
        self.num_shards = len(paths)  # in use at once
        if self.streams:
            self.num_shards = max(1, pool_frames // 2 // max(lengths))
        self.size = self.num_shards * max(1, *lengths)
        self.read = functools.partial(
            read_shard,
            game=args.game,
            context=context,
            latents_dir=args.runs_dir / args.game / split,
            dynamics_id=dynamics_id,
        )
        self.obs = None
        self._restart(loads_done=0)

    def _restart(self, loads_done):
        """Starts to read, so that load number `loads_done` + 1 is in memory."""
        order = self.all_paths
        if self.streams:
            generator = torch.Generator().manual_seed(self.order_seed)
            order = endless_passes(self.all_paths, generator)
            order = itertools.islice(order, loads_done * self.num_shards, None)
        self.shards = in_background(self.read, order, ahead=self.num_shards)
        self.loads = loads_done
        self._load_next()

    def state_dict(self):
        return dict(
            generator=self.generator.get_state(), loads=self.loads, draws_left=self.draws_left
        )

    def load_state_dict(self, saved):
        if saved["loads"] != self.loads:  # other shards were in memory
            self._restart(saved["loads"] - 1)
        self.draws_left = saved["draws_left"]
        self.generator.set_state(saved["generator"])

    def _allocate(self, shard):
        self.frame_size = shard.obs.shape[1]
        self.recording = shard.recording
        device = self.device
        if device.type == "cuda":  # at most half of what is free: networks need some, too
            free = torch.cuda.mem_get_info(device)[0]
            device = device if self.size * shard.obs[0].nbytes < free / 2 else "cpu"
        self.obs = torch.empty(self.size, *shard.obs.shape[1:], dtype=torch.uint8, device=device)
        self.z = torch.empty(self.size, shard.z.shape[1], dtype=torch.float16, device=device)

    def _load_next(self):
        """Puts the next shards in the place of those in use."""
        self.paths = []
        rows = []
        start = 0
        for _ in range(self.num_shards):
            shard = next(self.shards)
            if self.obs is None:
                self._allocate(shard)
            stop = start + len(shard.obs)
            self.obs[start:stop] = torch.from_numpy(shard.obs)
            self.z[start:stop] = torch.from_numpy(shard.z)
            self.paths.append(shard.path)
            rows.append(start + np.flatnonzero(shard.valid))
            start = stop
        self.rows = torch.from_numpy(np.concatenate(rows))  # of all valid windows
        self.draws_left = len(self.rows)
        self.loads += 1
        if len(self.rows) == 0:
            fail(f"no window of {self.context + 2} frames in {self.folder} lies within an episode")

    def draw(self, batch):
        """Rows int64 (B,) of o_t, for the methods below; they hold until the next draw()."""
        if self.streams and self.draws_left <= 0:
            self._load_next()
        self.draws_left -= batch
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


def true_actions(store, rows):
    """The recorded actions at rows of a FrameStore: int [n], or float32 [n, A] if continuous."""
    missing = [path for path in store.paths if not labels_path(path).exists()]
    if missing:
        fail(f"{len(missing)} of {len(store.paths)} shards in {store.folder} lack labels_NNN.npz")
    return np.concatenate([read_actions(path) for path in store.paths])[rows.numpy()]


def true_actions_to_report_on(store, rows):
    """As true_actions(), but actions of equal effect are merged. None if there are no label files.
    To report on latents, not to learn them.
    """
    if not any(labels_path(path).exists() for path in store.paths):
        return None
    actions = true_actions(store, rows)
    return actions if actions.dtype.kind == "f" else distinct_actions(store.game)[actions]


def to_input(frames):
    """uint8 (B, T, S, S, 3) -> float (B, 3T, S, S) in [-0.5, 0.5], channels last in memory."""
    x = frames.permute(0, 2, 3, 1, 4).flatten(3)  # (B, S, S, 3T)
    x = x.permute(0, 3, 1, 2)  # (B, 3T, S, S)
    return x.float() / 255 - 0.5


# --- resuming, metrics, plots ---------------------------------------------------------------------


def check_finite(step, path, *modules):
    """Ends the run if a weight is not finite, before `path` is overwritten."""
    for module in modules:
        if not all(weight.isfinite().all() for weight in module.parameters()):
            fail(f"not finite at step {step}; {path} stays as it was; try a lower learning rate")


def save_state(path, args, step, resumable, **values):
    """What load_state() needs to go on after `step`; values: tensors and plain Python values."""
    states = {}
    for name, x in resumable.items():
        states[name] = x.get_state() if isinstance(x, torch.Generator) else x.state_dict()
    save_checkpoint(
        path,
        kind="run state",
        game=args.game,
        step=step,
        flags={flag: str(value) for flag, value in vars(args).items()},
        states=states,
        values=values,
        rng=torch.get_rng_state(),
    )


def load_state(path, args, resumable, made_from=None):
    """With --resume, restores {name: object with state_dict(), or torch.Generator}. Returns the
    step and the values that were saved; 0 and {} without --resume or a saved state. made_from: id
    of the frames or weights that the run reads, if save_state() has it.
    """
    if not args.resume or not Path(path).exists():
        return 0, {}
    state = load_checkpoint(path, "run state", args.game)
    for flag, value in vars(args).items():
        saved = state["flags"].get(flag)
        free = flag in MAY_CHANGE.split() or flag.endswith("_dir")
        if str(value) != saved and not free:
            flag = flag.replace("_", "-")
            fail(f"--{flag} is {value}, but the run in {path} has {saved}; resume with its flags")
    if state["values"].get("made_from", made_from) != made_from:
        fail(f"{path} is of a run on other frames or another earlier stage; leave out --resume")
    for name, x in resumable.items():
        restore = x.set_state if isinstance(x, torch.Generator) else x.load_state_dict
        restore(state["states"][name])
    torch.set_rng_state(state["rng"])
    tqdm.write(f"resume: {path} is at step {state['step']:,}")
    return state["step"], state["values"]


class LogFile:
    """stderr of a progress bar that is not on a screen: lines in place of carriage returns."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


def progress_bar(total, unit, description=None):
    """tqdm's bar: steps, rate and time left; in a log file a line every 20 seconds."""
    options = dict(total=total, unit=unit, desc=description)
    if sys.stderr.isatty():
        return tqdm(**options, dynamic_ncols=True, mininterval=0.5)
    return tqdm(**options, file=LogFile(), ncols=0, mininterval=20, miniters=1, delay=20)


class MetricsLog:
    """A progress bar, and rows of metrics for the screen and a CSV file; first comes the step. With
    the rest of a run's state, it resumes at the saved step and row.
    """

    def __init__(self, path, total, unit):
        self.path = path
        self.bar = progress_bar(total, unit)
        self.lines = []  # of the CSV

    def write(self, **row):
        for name, value in row.items():
            row[name] = value.item() if isinstance(value, torch.Tensor) else value
        if not self.lines:
            self.lines.append(",".join(row))
        self.lines.append(",".join(map(str, row.values())))
        with atomic_write(self.path) as temporary:
            temporary.write_text("\n".join([*self.lines, ""]))
        shown = [f"{k} {x:.4g}" if isinstance(x, float) else f"{k} {x}" for k, x in row.items()]
        self.bar.write("  ".join(shown))

    def state_dict(self):
        return dict(lines=self.lines, steps=self.bar.n)

    def load_state_dict(self, saved):
        self.lines = saved["lines"]
        bar = self.bar
        bar.initial = bar.n = bar.last_print_n = saved["steps"]  # or it shows a wrong rate


def save_figure(figure, path):
    """Writes a matplotlib figure as PNG, atomically, and closes it."""
    import matplotlib.pyplot as plt

    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)


def plot_returns(path, title, xlabel, curves, references):
    """Returns of one game (Figures 3 and 4): curves {name: (x [L], returns [L, seeds])}, references
    {name: return}.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5.5), layout="constrained")
    for i, (name, (x, returns)) in enumerate(curves.items()):
        mean = returns.mean(1)
        std = returns.std(1, ddof=min(1, returns.shape[1] - 1))
        axes.plot(x, mean, ".-", color=f"C{i}", label=name)
        axes.fill_between(x, mean - std, mean + std, color=f"C{i}", alpha=0.2, linewidth=0)
    for style, (name, value) in zip(("--", ":", "-."), references.items()):
        axes.axhline(value, color="black", linestyle=style, label=f"{name} ({value:.2f})")
    axes.set(xlabel=xlabel, ylabel="mean episodic return", title=title)
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    if xlabel == "labelled frames":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    save_figure(figure, path)
