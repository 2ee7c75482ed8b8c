"""Your own video: frames for stages 1 and 2 from any video file, without actions.

Every `stride`-th picture is resized to a square, whatever its shape; where the picture jumps, an
episode starts, so that no window crosses a cut. Recordings of the official code (.npz with obs, ta,
done, rewards) are converted with their labels. All frames are held in memory.

reads   video files in any format that FFmpeg knows, or the official .npz recordings
writes  data/<name>/{train,test}/frames_NNN.npz, from .npz also labels_NNN.npz

python import_video.py clip.mp4 another.mp4 --name mygame
python train_latent_dynamics.py --game mygame    # then train_latent_bc.py, visualize_latents.py
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common  # before torch
import numpy as np
import torch
import torch.nn.functional as F
import tyro

SHARD_FRAMES = 16_384


@dataclass
class Args:
    files: tyro.conf.Positional[tuple[Path, ...]]
    """Videos or recordings; each starts an episode."""
    name: str = "video"
    """The later stages' --game."""
    data_dir: Path = Path("data")
    """Frames and labels are in <data-dir>/<game>."""
    frame_size: Literal[64, 32, 16] = 64
    """Side of the frames in pixels; below 64 (the paper's), means of blocks."""
    stride: int = 1
    """Of a video, takes every stride-th picture; an action should change the next one visibly."""
    cut: float = 0.15
    """Of a video: mean absolute change of a pixel, as a fraction of its range, that starts an
    episode."""
    test_fraction: float = 0.1
    """Of the frames, the last ones; held out."""
    overwrite: bool = False
    """Replace frames that are there."""


def resize(picture, size):
    """uint8 [H, W, 3] -> uint8 [size, size, 3], means of areas"""
    x = torch.from_numpy(picture).permute(2, 0, 1).float()
    return F.adaptive_avg_pool2d(x, size).round().byte().permute(1, 2, 0).numpy()


def find_cuts(obs, cut):
    """obs uint8 [N, S, S, 3] -> first bool [N]: at the start, and where the picture jumps."""
    change = [abs(b.astype(int) - a).mean() / 255 for a, b in zip(obs, obs[1:])]
    return np.array([True, *(x > cut for x in change)])


def read_video(path, args):
    """obs uint8 [N, S, S, 3], first bool [N] of a video file."""
    import av  # here, so that the official recordings need no FFmpeg

    obs = []
    try:
        with av.open(str(path)) as video:
            for i, picture in enumerate(video.decode(video=0)):
                if i % args.stride == 0:
                    obs.append(resize(picture.to_ndarray(format="rgb24"), args.frame_size))
    except (av.FFmpegError, IndexError) as error:  # IndexError: sound alone
        common.fail(f"{path} is not a video that FFmpeg can read ({error})")
    if not obs:
        common.fail(f"{path} has no pictures")
    return np.stack(obs), find_cuts(obs, args.cut)


def read_recording(path, args):
    """obs, first and labels of a recording of the official code: done ends an episode."""
    keys = ("obs", "ta", "done", "rewards")
    obs, action, done, reward = map(common.load_npz(path, keys).get, keys)
    found = f"{obs.dtype} {obs.shape}"
    if found != f"uint8 {(*obs.shape[:3], 3)}" or {*map(len, (action, done, reward))} != {len(obs)}:
        common.fail(f"{path} has obs {found}, not uint8 (N, S, S, 3), or labels of other lengths")
    obs = np.stack([resize(picture, args.frame_size) for picture in obs])
    first = np.concatenate([[True], done[:-1].astype(bool)])
    return obs, first, dict(action=action.astype(np.uint8), reward=reward.astype(np.float32))


def main(args):
    if not args.files:
        common.fail("name at least one file")
    if args.stride < 1:
        common.fail(f"--stride {args.stride}: it starts at 1")
    folders = {split: args.data_dir / args.name / split for split in ("train", "test")}
    for folder in folders.values():
        if folder.exists() and not args.overwrite:
            common.fail(f"{folder} is there already; --overwrite replaces it")
    if {path.suffix == ".npz" for path in args.files} == {True, False}:
        common.fail(
            "videos and .npz recordings do not go into one data set: labels would be missing"
        )

    parts = []
    for path in args.files:
        obs, first, *labels = (read_recording if path.suffix == ".npz" else read_video)(path, args)
        print(f"{path}: {len(obs):,} frames, {first.sum():,} episodes")
        parts.append(dict(obs=obs, first=first) | (labels[0] if labels else {}))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    num_frames = len(arrays["obs"])
    num_test = int(num_frames * args.test_fraction)
    if min(num_test, num_frames - num_test) < 3:
        counts = f"{num_frames - num_test} and {num_test} frames"
        common.fail(f"--test-fraction {args.test_fraction} gives splits of {counts}, fewer than 3")

    settings, start = dict(game=args.name, frame_size=args.frame_size), 0
    for split, count in dict(train=num_frames - num_test, test=num_test).items():
        with common.new_folder(folders[split], args.overwrite) as folder:
            for shard, row in enumerate(range(start, start + count, SHARD_FRAMES)):
                rows = slice(row, min(row + SHARD_FRAMES, start + count))
                labels = {name: array[rows] for name, array in arrays.items()}
                frames = dict(obs=labels.pop("obs"), first=labels.pop("first"))
                frames["first"][0] = True  # what was before it is in another shard
                common.save_npz(folder / f"frames_{shard:03d}.npz", settings, **frames)
                if labels:
                    common.save_npz(folder / f"labels_{shard:03d}.npz", settings, **labels)
        start += count
        print(f"{split}: {count:,} frames in {folders[split]}")
    common.print_next(f"train_latent_dynamics.py --game {args.name}", args)


if __name__ == "__main__":
    main(tyro.cli(Args))
