"""Windows of consecutive frames, drawn at random from shards that need not fit into memory."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from .devices import derive_seed, leads, num_cores, process
from .files import beside, count_rows, list_shards, read_frames, read_labels, read_latents
from .flags import fail


def valid_windows(first, context):
    """bool [N]: True at i where frames i - context .. i + 1 belong to one episode of one stream."""
    starts = np.concatenate([[0], np.cumsum(first)])  # starts[i]: how many of the rows before i open an episode
    valid = np.zeros(len(first), bool)
    i = np.arange(context, len(first) - 1)
    valid[i] = starts[i + 2] == starts[i - context + 1]
    return valid


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
