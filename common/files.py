"""The project's files: written whole or not at all, and refused with one line when they are not what they should be."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from .flags import fail
from .procgen_facts import NUM_ACTIONS


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


def fingerprint(*modules):
    """16 hex digits that tell one set of weights from another, so that files made by one are not mixed with another's."""
    digest = hashlib.sha256()
    for module in modules:
        for name, weight in module.state_dict().items():
            digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def run_folder(runs_dir, game, vq):
    """Where the runs of a game lie: <runs-dir>/<game>, or <game>_no_vq for those without vector quantisation."""
    return Path(runs_dir) / (game if vq else f"{game}_no_vq")


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
