"""What has one correct answer and teaches nothing about LAPO: games, files, frame store, evaluation, logging.

No network, loss or schedule lives here; each script holds its own.
"""

import contextlib
import csv
import difflib
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import sys
import time
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # not on Windows, where nothing keeps two processes out of one run
    fcntl = None

with contextlib.redirect_stderr(io.StringIO()):  # gym greets every import with a notice about its successor
    from gym.wrappers.normalize import RunningMeanStd  # noqa: F401 (for the scripts with PPO)
    from procgen import ProcgenGym3Env

NUM_ACTIONS = 15  # Procgen's, in every game; named in ACTIONS

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


def perplexity(share):
    """How many are in use, in effect: share [K] (sums to 1) -> 1 where one has all, K where all have the same."""
    return float(np.exp(-(share * np.log(share + 1e-10)).sum()))


def check_flags(args, zero=(), shares=(), writes=("runs_dir",)):
    """Ends the run with one line if a flag cannot work; every script calls it before anything else.

    Numbers must be finite and above 0, integers below 2^31. zero: flags that may be 0. shares: flags between 0 and 1.
    writes: folders that will be written.
    """
    check_game(args.game)
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, Path):
            there = next(path for path in (value.absolute(), *value.absolute().parents) if os.path.exists(path))
            if not there.is_dir():
                fail(f"{flag} {value} cannot be a folder, because {there} is a file")
            if name in writes and not os.access(there, os.W_OK):
                fail(f"{flag} {value} cannot be written; choose another folder")
        if value == ():
            fail(f"{flag} is empty; give at least one value")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            at_least_0 = name in ("seed", *zero, *shares)
            if not math.isfinite(number) or number < 0 or (number == 0 and not at_least_0):
                fail(f"{flag} {number} must be a finite number, {'0 or above' if at_least_0 else 'above 0'}")
            if name in shares and number > 1:
                fail(f"{flag} {number} must lie between 0 and 1")
            if isinstance(number, int) and number >= 2**31:
                fail(f"{flag} {number} is too large; integers must be below 2^31")
            if name.endswith("multiplier") and number < 1 / 16:
                fail(f"{flag} {number} leaves no channel of the first 16; it must be 1/16 or above")


def normalize_return(value, random_return, expert_return):
    """0 for the random policy, 1 for the expert; not a number where the expert plays no better or worse than random."""
    return (value - random_return) / ((expert_return - random_return) or math.nan)


# --- actions -------------------------------------------------------------------------------------------------------

ACTIONS = "left-down left left-up down none up right-down right right-up D A W S Q E".split()  # Procgen's 0 .. 14

# Actions that do the same thing, written as the one that stands for its group and then the others; actions not named
# differ from all others. Found by trial: from 900 to 3,100 states a game, met in sticky random play, all 15 actions were
# tried from the same state (Procgen's get_state and set_state; the copies share their random numbers) and then five common
# actions. Two actions are equivalent only if no frame, reward or episode end ever differed; Procgen's source agrees. The
# rule is strict: coinrun's "down" is one of its own because it drops through crates, in 1% of those states.
EQUIVALENT_ACTIONS = {
    "bigfish": ["none D A W S Q E"],
    "bossfight": ["none A W S Q E"],
    "caveflyer": ["none A W S Q E"],
    "chaser": ["none D A W S Q E"],
    "climber": ["left left-down", "right right-down", "none down D A W S Q E"],
    "coinrun": ["none D A W S Q E"],
    "dodgeball": ["none A W S Q E"],
    "fruitbot": ["left left-down left-up", "right right-down right-up", "none down up A W S Q E"],
    "heist": ["none D A W S Q E"],
    "jumper": ["left left-down", "right right-down", "none down D A W S Q E"],
    "leaper": ["left left-down left-up", "right right-down right-up", "none D A W S Q E"],
    "maze": ["left left-down left-up", "right right-down right-up", "none D A W S Q E"],
    "miner": ["left left-down left-up", "right right-down right-up", "none D A W S Q E"],
    "ninja": ["left left-down", "right right-down", "none down", "D Q E"],
    "plunder": ["left left-down left-up", "right right-down right-up", "none down up A W S Q E"],
    "starpilot": ["D W S Q E"],
}

# Action by action, around the colour circle by direction; none is grey, buttons are dark or earthy.
ACTION_COLORS = (
    "#3454d1 #17a2b8 #3aa655 #7b3fbf #a6a6a6 #c9a400 #e83fb8 #e0202c #f5821f "
    "#000000 #8c5a2b #5c6b2f #c8a27a #5a2a2a #2f5d62"
).split()  # fmt: skip


def distinct_actions(game):
    """int [15]: for each action the one that stands for all those which do the same in this game."""
    distinct = np.arange(NUM_ACTIONS)
    for group in EQUIVALENT_ACTIONS[game]:
        members = [ACTIONS.index(name) for name in group.split()]
        distinct[members] = members[0]
    return distinct


# --- devices and seeds ---------------------------------------------------------------------------------------------


def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'cuda:N' -> torch.device; asked for and absent ends the run. Under torchrun each process has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if dist.is_initialized() and name.startswith("cuda"):
        if name != "cuda":
            fail(f"--device {name} puts all processes on one GPU; under torchrun leave --device out")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} is not usable here ({str(error).splitlines()[0]}); try --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else every process would also take some memory of the first GPU
        torch.set_float32_matmul_precision("high")  # TF32, which convolutions use by default
        torch.backends.cudnn.benchmark = True  # shapes hardly change
    return device


def num_cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def autocast(precision, device):
    """The context for the networks' arithmetic that --precision asks for: weights stay float32, layers compute in bfloat16."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def to_device(array, device):
    """A numpy array as a tensor on `device`; to a GPU it goes through pinned memory, so that Python need not wait for the copy.

    On the CPU it is the array's own memory.
    """
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def compiles(args, device):
    """Whether to compile: on GPUs, and not under torchrun, where the exchange of gradients breaks the graph."""
    return args.compile and device.type == "cuda" and not dist.is_initialized()


def compiled(function, on):
    """`function`, compiled where `on`, with CUDA graphs on a GPU: one launch in place of one for each operation.

    A graph writes its outputs where it wrote them the time before, so copy what must outlast the next call of any compiled
    function. Each shape of the inputs has a graph of its own. Random numbers of an explicit torch.Generator stay outside.
    """
    if not on:
        return function
    compiled_function = torch.compile(function, mode="reduce-overhead", dynamic=False)

    def call(*arguments):
        torch.compiler.cudagraph_mark_step_begin()  # what the call before put out may go
        try:
            return compiled_function(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:  # no C compiler, for one
            fail(f"torch.compile failed here ({str(error).splitlines()[0]}); try --no-compile")

    return call


def derive_seed(seed, purpose):
    """Another 31-bit seed for each purpose, so that no two streams of one run share their random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:4], "little") >> 1


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# --- several processes -----------------------------------------------------------------------------------------------


def process():
    """This process's number (its rank) and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leads():
    """Whether this is the process that reports and writes: the only one, or rank 0."""
    return process()[0] == 0


@contextlib.contextmanager
def process_group():
    """Under torchrun: joins the processes that it started, and leaves them when all are done. Else: nothing.

    All but rank 0 print nothing but errors. When one fails, the calls in which others wait for it fail as well; only the first
    of them tells why.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        yield
        return
    store, rank, size = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # each for the tensors of its device
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere) if rank else contextlib.nullcontext():
            print(f"{size} processes share the work: each has its own shards, and the numbers below are those of each")
            yield
        if rank:
            store.wait(["done"], timedelta(days=30))  # rank 0 may still be labelling; it must not find the others gone
        else:
            store.set("done", "")
    except BaseException as error:
        if store.add("failed", 1) > 1:
            raise SystemExit(1) from None
        if isinstance(error, RuntimeError) and "gloo" in str(error):
            fail("another process has ended and told no reason (out of memory?); --resume goes on from the last state")
        raise
    dist.destroy_process_group()


def parallel(network):
    """The network, with gradients that backward() averages over all processes if there are several."""
    return torch.nn.parallel.DistributedDataParallel(network) if dist.is_initialized() else network


# --- games ---------------------------------------------------------------------------------------------------------


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


# --- files ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path):
    """A full disk, or a folder that cannot be written, ends the run with one line."""
    try:
        yield
    except OSError as error:
        fail(f"{path} could not be written ({error.strerror}); what was there before is whole")


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path` that takes its place when the block ends well; else it is removed."""
    path = Path(path)
    temporary = path.parent / f".{path.name}.part"  # one name: what a killed run left is overwritten by the next
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # else the machine may go down with the new name on disk, and nothing in it
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def npz_bytes(**arrays):
    """The bytes of a compressed .npz.

    Deflate level 4: of a 64x64 frame's 12 KB (random play) 0.4 are left in bigfish, 1.1 in coinrun, 5.4 in starpilot, at 300, 180
    and 64 MB/s a core. Level 1 leaves up to 3.6 times as much and is at most 1.4 times as fast; level 6 is up to half as fast.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:  # a ZipInfo in the name's place would not be compressed
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    return buffer.getvalue()


def write_bytes(path, content):
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def save_npz(path, **arrays):
    write_bytes(path, npz_bytes(**arrays))


# The header that numpy writes before an array. numpy's own reader hands it to Python's parser, whose count of its depth all
# threads of CPython 3.11 share (its issue 106905): two shards read at once could end in a SystemError, good files in hand.
NPY_HEADER = re.compile(r"\{'descr': '([<|][biufU]\d+)', 'fortran_order': (True|False), 'shape': \(((?:\d+, )*(?:\d+,?)?)\), \} *\n")


def npz_headers(path):
    """{name: (shape, dtype, fortran_order, offset)} of a .npz; an array of another size than its header says raises ValueError."""
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as member:
                if np.lib.format.read_magic(member) != (1, 0):
                    raise ValueError("a header of another version")
                header = NPY_HEADER.fullmatch(member.read(int.from_bytes(member.read(2), "little")).decode("latin1"))
                if not header:
                    raise ValueError("a header of another form")
                dtype, shape = np.dtype(header[1]), tuple(int(size) for size in header[3].split(",") if size.strip())
                fits = info.file_size == member.tell() + math.prod(shape) * dtype.itemsize
                if not fits or info.file_size > 1100 * os.path.getsize(path):  # deflate shrinks 1032 times at most
                    raise ValueError("an array is not as large as its header says")
                headers[info.filename.removesuffix(".npy")] = shape, dtype, header[2] == "True", member.tell()
    return headers


def read_array(archive, name, shape, dtype, fortran_order, offset):
    """One array of an open .npz, as npz_headers describes it; read piece by piece, so that it is in memory only once."""
    array = np.empty(shape, dtype, order="F" if fortran_order else "C")
    content, piece = memoryview(array.reshape(-1, order="A").view(np.uint8)), 1 << 18
    with archive.open(f"{name}.npy") as member:
        member.read(offset)
        for start in range(0, len(content), piece):
            content[start : start + piece] = member.read(piece)
    return array


def end_of_reading(path, error, made_by):
    """Ends the run for a file that did not load: what is missing or damaged is to be made, what this machine cannot read is not."""
    if isinstance(error, FileNotFoundError):
        fail(f"{path} is missing; make it with: {made_by}")
    if isinstance(error, (PermissionError, MemoryError)):
        fail(f"{path} cannot be read ({str(error) or 'no memory left'}); see to that and start again")
    fail(f"{path} is damaged ({type(error).__name__}); delete it and make it anew with: {made_by}")


def load_npz(path, keys, made_by):
    """Arrays of `keys` from a .npz, as a dict; a file that is missing, cut short or lacks a key ends the run."""
    try:
        headers = npz_headers(path)
        for key in keys:
            if key not in headers:
                fail(f"{path} holds no '{key}'; make it anew with: {made_by}")
        with zipfile.ZipFile(path) as archive:
            return {key: read_array(archive, key, *headers[key]) for key in keys}
    except Exception as error:  # zipfile, zlib, ValueError, EOFError and others
        end_of_reading(path, error, made_by)


def save_checkpoint(path, **content):
    """Tensors and plain Python values only, so that it loads with weights_only=True."""
    buffer = io.BytesIO()  # torch.save itself answers a full disk with an error that does not say so
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


class Checkpoint(dict):
    """What save_checkpoint wrote; a key that is not there, or weights that do not fit, end the run."""

    def __init__(self, content, path, made_by):
        super().__init__(content)
        self.path, self.made_by = path, made_by

    def __missing__(self, key):
        fail(f"{self.path} holds no '{key}': it is of another version of the code; make it anew with: {self.made_by}")

    def fill(self, module, key):
        """Loads the weights under `key` into `module`."""
        try:
            module.load_state_dict(self[key])
        except Exception as error:  # RuntimeError, AttributeError, TypeError: names or shapes differ, or these are no weights
            fail(f"{self.path}: '{key}' does not fit its network ({type(error).__name__}); make it anew with: {self.made_by}")


def load_checkpoint(path, kind, game, made_by):
    """The Checkpoint at `path`, on the CPU; a file of another kind or game, or a damaged one, ends the run."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not look whether the bytes are those that were written
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load answers damage with RuntimeError, EOFError, UnpicklingError and others
        end_of_reading(path, error, made_by)
    if not isinstance(content, dict) or content.get("kind") != kind:
        fail(f"{path} is not a checkpoint of kind '{kind}'; make it anew with: {made_by}")
    if content.get("game") != game:
        fail(f"{path} was trained on '{content.get('game')}', not on '{game}'; make it anew with: {made_by}")
    return Checkpoint(content, path, made_by)


def progress_bar(total, unit, description=None):
    """tqdm's bar; where nobody watches (a log file) it prints seldom."""
    pace = 0.5 if sys.stderr.isatty() else 20.0
    return tqdm(total=total, unit=unit, desc=description, dynamic_ncols=True, mininterval=pace, disable=not leads())


def in_threads(function, items, threads):
    """function(item) of each item, in order; up to `threads` of them are under way while the next item is made.

    For functions that let go of Python's lock, as zlib does.
    """
    pending, pool = deque(), ThreadPoolExecutor(threads)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            while pending and (len(pending) > threads or pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def track(items, unit, description, total=None):
    """Iterates over `items` behind a progress bar; `total` tells how many they are where len() cannot."""
    with progress_bar(len(items) if total is None else total, unit, description) as bar:
        for item in items:
            yield item
            bar.update()


class MetricsLog:
    """A progress bar with rate and time left; each write() goes to the screen and, as a row, to a CSV file."""

    def __init__(self, path, total, unit):
        self.path = Path(path)
        if leads():
            write_bytes(self.path, b"")
        self.bar = progress_bar(total, unit)

    def state_dict(self):
        return dict(csv=self.path.read_bytes().decode(), done=self.bar.n)

    def load_state_dict(self, saved):
        if leads():
            write_bytes(self.path, saved["csv"].encode())  # rows that came after the state are gone, to be written anew
        self.bar.n = self.bar.initial = saved["done"]

    def write(self, **row):
        if row.get("episodes") == 0:
            self.bar.write("note: no episode has ended since the last row, so its return is nan; rows of more steps would have one")
        row = {key: float(value) if isinstance(value, torch.Tensor) else value for key, value in row.items()}
        with writing(self.path), open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        self.bar.write("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))


# --- runs that can be killed -----------------------------------------------------------------------------------------


# flags in which a resumed run may differ from the one that it goes on with
MAY_DIFFER = {"device", "compile", "data_dir", "runs_dir", "experts_dir", "checkpoint_minutes", "resume"}


def check_finite(step, last_good, *modules):
    """Ends the run if a weight is no longer finite; `last_good` names the file that so is not overwritten.

    A loss that is not finite leaves such weights behind for good, so it need not be looked for at every step.
    """
    finite = [weight.isfinite().all() for module in modules for weight in module.state_dict().values()]
    if finite and not torch.stack(finite).all():  # one wait for the GPU
        fail(f"the loss is no longer finite at step {step}; {last_good} keeps what was good; try a lower learning rate")


class Captured:
    """A part's state as it is now, for a RunState.save() that comes when the part has gone on."""

    def __init__(self, part):
        self.state = part_state(part)

    def state_dict(self):
        return self.state


def part_state(part):
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


class RunState:
    """The whole state of a run in <folder>/<name>_state.pt, there from its start to its end, so that --resume can go on.

        run_state = RunState(folder, name, args)
        parts = dict(model=model, optimizer=optimizer, ...)  # each with state_dict() and load_state_dict(), or a torch.Generator
        run_state.load(parts)
        for step in range(run_state.step + 1, steps + 1):
            ...
            if run_state.due():
                run_state.save(step, parts, plain=values)  # the next run finds them in run_state.values
        run_state.finish()

    SIGTERM and Ctrl-C: the run saves and stops where it next asks due(), or at once where it does not ask; a second one stops
    it at once. While it lasts, no other process can run the same in this folder.

    Under torchrun rank 0 alone writes and takes the lock; the others read its state to go on from, and stop when it says so.
    """

    def __init__(self, folder, name, args):
        self.path, self.kind, self.args = Path(folder) / f"{name}_state.pt", f"{name}_state", args
        self.flags = {flag: str(value) for flag, value in vars(args).items() if flag not in MAY_DIFFER}
        self.step, self.values, self.saved = 0, {}, {}
        self.signal, self.stop, self.asking, self.time = None, None, False, time.monotonic()
        if leads():
            self._lock(folder, name)
        self.others = self.path.exists() and not args.resume  # a state that is not this run's
        if self.others:
            minutes = f"{args.checkpoint_minutes:g} minutes"
            print(f"note: {self.path} is of an unfinished run, to be overwritten in {minutes}; to go on with that run, pass --resume")
        elif self.path.exists():
            self._read()
        self.handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if self.handlers[signal.SIGINT] == signal.SIG_IGN:  # a job in the background, whose terminal's Ctrl-C is not meant for it
            del self.handlers[signal.SIGINT]
        for number in self.handlers:
            signal.signal(number, self._on_signal)

    def _lock(self, folder, name):
        with writing(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.lock = open(Path(folder) / f".{name}.lock", "a")
        try:
            if fcntl:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process ends, however it does
        except OSError:
            fail(f"another process runs {name} in {folder}; wait for it, or give this one its own --runs-dir")

    def _read(self):
        content = load_checkpoint(self.path, self.kind, self.args.game, "the same command without --resume")
        for flag in self.flags | content["flags"]:
            was, now = content["flags"].get(flag, "absent"), self.flags.get(flag, "absent")
            if was != now:
                flag = "--" + flag.replace("_", "-")
                fail(f"{flag} is {now}, but {self.path} is of a run with {was}; go on with that, or start anew without --resume")
        self.step, self.values, self.saved = content["step"], Checkpoint(content["values"], content.path, content.made_by), content
        print(f"resume: {self.path} is at step {self.step:,}")

    def finished(self, product):
        """Whether --resume has nothing to do: the `product` of the run is there, and no state."""
        done = self.args.resume and not self.path.exists() and Path(product).exists()
        if done:
            print(f"resume: nothing to do, {product} is finished; to make it anew, leave --resume out")
            self.finish()
        return done

    def begin(self):
        """From here on the run has left a trace, by which --resume knows that older products are not its own."""
        if leads() and not self.path.exists():
            save_checkpoint(self.path, kind=self.kind, game=self.args.game, flags=self.flags, step=0, values={}, parts={}, rng={})

    def load(self, parts):
        """Puts the state that --resume found, if any, into `parts` and the random number generators."""
        self.begin()
        saved, self.saved = self.saved, {}
        if not saved or not saved["parts"]:
            return
        try:
            for name, part in parts.items():
                content = saved["parts"][name]
                if not isinstance(part, torch.Generator):
                    part.load_state_dict(content)
                elif content.shape == part.get_state().shape:
                    part.set_state(content)
                else:  # of another kind of device
                    part.manual_seed(derive_seed(self.args.seed, f"resume at {self.step}"))
            random.setstate(saved["rng"]["python"])
            np.random.set_state(saved["rng"]["numpy"])
            torch.set_rng_state(saved["rng"]["torch"])
            for device, state in enumerate(saved["rng"]["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, device)
        except Exception as error:  # what a state of other code may lack or hold has many names
            fail(f"{self.path} does not fit this version of the code ({type(error).__name__}); start anew without --resume")

    def due(self, last=False):
        """Whether to save at the end of this step: it is time, the run was told to stop, or nothing will ask after this."""
        self.asking = not last
        self.stop = self.signal
        due = last or self.stop is not None or time.monotonic() - self.time > 60 * self.args.checkpoint_minutes
        if dist.is_initialized():  # all stop at the same step, when rank 0 does; a tensor on the CPU waits for no GPU
            word = torch.tensor([due, self.stop or 0])
            dist.broadcast(word, src=0)
            due, self.stop = word.tolist()
        return bool(due)

    def save(self, step, parts, **values):
        """Writes the state after `step`; values: tensors and plain values. Ends the run if it was told to stop."""
        check_finite(step, self.path, *(part for part in parts.values() if isinstance(part, torch.nn.Module)))
        if leads() and not (self.stop and self.others):  # who stops a run so soon may have meant the one that lies there
            kind, key, *rest = np.random.get_state()
            cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
            save_checkpoint(
                self.path, kind=self.kind, game=self.args.game, flags=self.flags, step=step, values=values,
                parts={name: part_state(part) for name, part in parts.items()},
                rng=dict(python=random.getstate(), numpy=(kind, key.tolist(), *rest), torch=torch.get_rng_state(), cuda=cuda),
            )  # fmt: skip
            self.step, self.others, self.time = step, False, time.monotonic()
        if self.stop:
            self._stop()

    def _on_signal(self, number, _):
        if self.asking and not leads():  # torchrun tells every process; rank 0 will say at which step
            return
        self._restore_handlers()
        self.signal = number
        if not self.asking:
            self.stop = number
            self._stop()
        os.write(2, b"\nstops at the end of this step; once more stops it at once\n")  # print() may not be called in a handler

    def _restore_handlers(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _stop(self):
        where = f"{self.path} is still of the run before" if self.others else f"{self.path} is at step {self.step:,}"
        if leads():
            tqdm.write(f"stopped: {where}; go on with --resume", file=sys.stderr)
        raise SystemExit(128 + self.stop)

    def finish(self):
        """The run has done all that it had to."""
        if leads():
            self.path.unlink(missing_ok=True)
            self.lock.close()
        self._restore_handlers()


def run_folder(runs_dir, game, vq):
    """Where the runs of a game lie: <runs-dir>/<game>, or <game>_no_vq for those without vector quantisation."""
    return Path(runs_dir) / (game if vq else f"{game}_no_vq")


def fingerprint(*modules):
    """16 hex digits that tell one set of weights from another, so that files made by one are not mixed with another's."""
    digest = hashlib.sha256()
    for module in modules:
        for name, weight in module.state_dict().items():
            digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


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


def read_latents(shard_path, latents_dir, game, dynamics):
    """The latents of one shard: z float16 [N, Z], codes uint8 [N, C], valid bool [N].

    dynamics: the fingerprint of the stage 1 run that they must stem from.
    """
    made_by = f"python train_latent_dynamics.py --game {game}"
    path = beside(shard_path, "latents", latents_dir)
    shard = load_npz(path, ("z", "codes", "valid", "dynamics"), made_by)
    z, codes, valid = shard["z"], shard["codes"], shard["valid"]
    types = z.dtype == np.float16 and codes.dtype == np.uint8 and valid.dtype == bool
    if not types or z.ndim != 2 or codes.ndim != 2 or valid.ndim != 1 or not len(z) == len(codes) == len(valid):
        shapes = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in dict(z=z, codes=codes, valid=valid).items())
        fail(f"{path} has {shapes}, of wrong types or not of one length; make it anew with: {made_by}")
    if str(shard["dynamics"]) != dynamics:
        fail(f"{path} stems from another run of stage 1 than the checkpoint in use; make both anew, beginning with: {made_by}")
    return z, codes, valid


def read_labels(shard_path, game):
    """The labels of one shard, as a dict: action uint8 [N], reward float32 [N], expert_return float32 []."""
    path, made_by = beside(shard_path, "labels"), f"python collect_data.py --game {game}"
    labels = load_npz(path, ("action", "reward", "expert_return"), made_by)
    action, reward = labels["action"], labels["reward"]
    if action.dtype != np.uint8 or action.ndim != 1 or action.shape != reward.shape or (action >= NUM_ACTIONS).any():
        shapes = f"action {action.dtype} {action.shape} and reward {reward.shape}"
        fail(f"{path} has {shapes}, not actions of Procgen and a reward each; make it anew with: {made_by}")
    return labels


def count_rows(path):
    """Rows of the first array of a .npz, read from its header alone."""
    try:
        return next(iter(npz_headers(path).values()))[0][0]
    except Exception as error:
        end_of_reading(path, error, "python collect_data.py")


class FrameStore:
    """Draws windows of consecutive frames at random from all shards of a folder, in bounded memory.

    Holds `pool_frames` frames at most, on `device` where they fit. Where there are more on disk, threads read the next
    shards ahead, and after as many draws as the oldest shard has windows that shard gives way: each window is drawn about
    once a pass. Of several processes, each has every n-th shard to itself, and random numbers of its own.
    """

    def __init__(self, folder, game, context, pool_frames, seed, device, latents_dir=None, dynamics=None):
        paths, (rank, size) = list_shards(folder, "frames", f"python collect_data.py --game {game}"), process()
        if len(paths) < size:
            fail(f"{folder} holds too few shards ({len(paths)}) for {size} processes; start fewer processes, or record more frames")
        self.paths, seed = paths[rank::size], derive_seed(seed, f"process {rank}") if rank else seed
        self.game, self.context, self.latents_dir, self.dynamics, self.device = game, context, latents_dir, dynamics, device
        rows = [count_rows(path) for path in self.paths]
        self.num_frames, self.slot_rows = sum(rows), max(rows)
        if pool_frames < min(self.slot_rows, self.num_frames):
            fail(f"--pool-frames {pool_frames} is less than one shard of {folder} ({self.slot_rows} frames)")
        self.num_slots = min(len(self.paths), pool_frames // self.slot_rows)
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.obs = self.z = None
        self.shard_of_slot, self.windows_of_slot = [None] * self.num_slots, [None] * self.num_slots
        self.oldest, self.draws = 0, 0
        self.num_readers = 1 + num_cores() // 8  # a core inflates some 10,000 frames of 64x64 a second
        self.readers = ThreadPoolExecutor(self.num_readers)
        self.queue = self.rng.permutation(len(self.paths)).tolist()
        self.ahead = []  # (index of a shard, its content to come), in the order in which they will be needed
        for slot in range(self.num_slots):
            self._replace(slot, streams=self.num_slots < len(self.paths))
        self._skip_shards_without_windows()

    def _read_ahead(self, streams):
        while len(self.ahead) < self.num_readers and (self.queue or streams):
            self.queue = self.queue or self.rng.permutation(len(self.paths)).tolist()
            index = self.queue.pop(0)
            self.ahead.append((index, self.readers.submit(self._read, index)))

    def _read(self, index):
        obs, first, settings = read_frames(self.paths[index], self.game)
        valid = valid_windows(first, self.context)
        if self.latents_dir is None:
            return obs, None, valid, settings
        z, _, has_latent = read_latents(self.paths[index], self.latents_dir, self.game, self.dynamics)
        if not np.array_equal(valid, has_latent):
            fail(f"{self.latents_dir} was made from other frames; make it anew with: python train_latent_dynamics.py --game {self.game}")
        return obs, z, valid, settings

    def _replace(self, slot, streams=True):
        self._read_ahead(streams)
        index, shard = self.ahead.pop(0)
        shard = shard.result()
        self._read_ahead(streams)
        self._fill(slot, index, shard)

    def _fill(self, slot, index, shard):
        obs, z, valid, self.settings = shard
        self.shard_of_slot[slot] = index
        if self.obs is None:
            self.frame_size = obs.shape[1]
            z_dim = 0 if z is None else z.shape[1]
            rows = self.num_slots * self.slot_rows
            if self.device.type == "cuda":  # half of the free memory at most: networks and gradients need some as well
                fits = rows * (obs[0].nbytes + 2 * z_dim) < torch.cuda.mem_get_info(self.device)[0] / 2
                pool = dict(device=self.device) if fits else dict(pin_memory=True)
            else:
                pool = dict(device=self.device)
            self.obs = torch.empty(rows, *obs.shape[1:], dtype=torch.uint8, **pool)
            self.z = None if z is None else torch.empty(rows, z_dim, dtype=torch.float16, **pool)
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

    def state_dict(self):
        """The position in the data: which shard lies in which slot, the shards to come, and the random numbers."""
        data = [self.settings, self.dynamics, [path.name for path in self.paths], self.num_frames]
        return dict(
            data=data, slots=list(self.shard_of_slot), ahead=[index for index, _ in self.ahead], queue=list(self.queue),
            oldest=self.oldest, draws=self.draws, rng=self.rng.bit_generator.state, generator=self.generator.get_state(),
        )  # fmt: skip

    def load_state_dict(self, saved):
        if not leads():  # the state is rank 0's, of other shards: this one draws from its own anew, in an order not seen before
            self.generator.set_state(saved["generator"])
            seed = torch.randint(2**31, (), generator=self.generator)
            self.generator.manual_seed(derive_seed(int(seed), f"process {process()[0]}"))
            return
        if saved["data"] != self.state_dict()["data"]:
            fail(
                f"{self.paths[0].parent}, its latents or the number of processes are not those that the run began with; "
                "start it anew without --resume"
            )
        for slot, index in enumerate(saved["slots"]):
            if index != self.shard_of_slot[slot]:
                self._fill(slot, index, self._read(index))
        self.queue, self.oldest, self.draws = list(saved["queue"]), saved["oldest"], saved["draws"]
        self.ahead = [(index, self.readers.submit(self._read, index)) for index in saved["ahead"]]
        self.rng.bit_generator.state = saved["rng"]
        self.generator.set_state(saved["generator"])

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

    def _gather(self, pool, rows):
        """pool[rows] on the device; rows come from the CPU, so that nothing has to wait for the GPU."""
        return pool[rows.to(pool.device, non_blocking=True)].to(self.device, non_blocking=True)

    def sample_windows(self, batch):
        """uint8 (B, context + 2, S, S, 3): o_{t-context} .. o_{t+1}"""
        self._stream()
        return self._gather(self.obs, self._draw(batch)[:, None] + torch.arange(-self.context, 2))

    def sample_latents(self, batch):
        """o_t uint8 (B, S, S, 3) and its latent action z_t float32 (B, Z)"""
        self._stream()
        rows = self._draw(batch)
        return self._gather(self.obs, rows), self._gather(self.z, rows).float()


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
