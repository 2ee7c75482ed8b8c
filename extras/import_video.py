"""Your own video: frames for stages 1 and 2 from any video file, without actions.

Every `stride`-th frame is resized to a square, whatever its shape; where the picture jumps, an
episode starts, so that no window crosses a cut. Recordings of the official code (.npz with obs, ta,
done, rewards) are converted with their labels. All resized frames are held in memory.

reads   video files in any format that FFmpeg knows, or the official .npz recordings
writes  data/<name>/{train,test}/frames_NNN.npz, from .npz also labels_NNN.npz

python -m extras.import_video clip.mp4 another.mp4 --name mygame
python -m extras.import_video "frames/%04d.png" --name mygame    # numbered pictures, one video
python train_latent_dynamics.py --game mygame    # then train_latent_bc.py, visualize_latents.py
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common  # before torch
import numpy as np
import tyro

SHARD_FRAMES = 16_384


@dataclass
class Args:
    files: tyro.conf.Positional[tuple[Path, ...]]
    """Videos or recordings; each starts an episode. Numbered pictures: "frames/%04d.png"."""
    name: str = "video"
    """The later stages' --game."""
    data_dir: Path = Path("data")
    """Frames and labels are in <data-dir>/<name>."""
    frame_size: Literal[64, 32, 16] = 64
    """Side of the frames in pixels (the paper: 64)."""
    stride: int = 1
    """Of a video, takes every stride-th frame; an action should change the next one visibly."""
    cut: float = 0.15
    """Of a video: mean absolute change of a pixel, as a fraction of its range, that starts an
    episode."""
    test_fraction: float = 0.1
    """Of the frames, the last ones; held out. Cut off a still card at the end of a clip first."""

    def __post_init__(self):
        common.check_flags(self)


def open_video(path):
    """PyAV's container and its video stream; ends the run if it cannot be decoded."""
    import av  # here, so that the official recordings need no FFmpeg

    try:
        video = av.open(str(path), metadata_errors="ignore")
    except av.FFmpegError as error:
        common.fail(f"{path} is not a video that FFmpeg can read ({error.strerror})")
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in video.streams.video if not stream.disposition & cover]
    if not streams:
        common.fail(f"{path} holds no video")
    stream = max(streams, key=lambda x: x.frames)  # a cover that is not marked has one frame
    if stream.codec_context is None:  # decoding would crash
        common.fail(f"FFmpeg lacks a decoder for the video in {path}")
    return video, stream


def find_cuts(obs, cut):
    """obs uint8 [N, S, S, 3] -> first bool [N]: at the start, and where the picture jumps."""
    change = [abs(b.astype(int) - a).mean() / 255 for a, b in zip(obs, obs[1:])]
    return np.array([True, *(x > cut for x in change)])


def read_video(path, args):
    """obs uint8 [N, S, S, 3] and first bool [N] of a video file, as a dict."""
    import av

    video, stream = open_video(path)
    size = args.frame_size
    bar = common.progress_bar(stream.frames or None, "frame", path.name)
    obs = []
    try:
        for i, picture in enumerate(video.decode(stream)):
            if i % args.stride == 0:
                # means of areas; from YUV 4:2:0 to RGB at once, colour would lose resolution
                small = picture.reformat(size, size, "yuv444p", interpolation="AREA")
                upright = np.rot90(small.to_ndarray(format="rgb24"), round(picture.rotation / 90))
                obs.append(upright)
            bar.update()
    except av.FFmpegError as error:
        rest = f"{len(obs):,} frames before it are kept, the rest is left out"
        bar.write(f"warning: {path} is damaged ({error.strerror}); {rest}")
    bar.close()
    video.close()
    if len(obs) < 3:
        advice = 'pictures are one video if named "frames/%04d.png"'
        common.fail(f"{path} gives {len(obs)} frame(s), at least 3 are needed; {advice}")
    return dict(obs=np.stack(obs), first=find_cuts(obs, args.cut))


def read_recording(path, args):
    """obs, first and labels of a recording of the official code, as a dict."""
    recording = common.load_npz(path, ["obs", "ta", "done", "rewards"])
    obs = recording["obs"]
    lengths = {len(recording[name]) for name in ("ta", "done", "rewards")}
    found = f"{obs.dtype} {obs.shape}"
    if found != f"uint8 {(len(obs), 64, 64, 3)}" or lengths != {len(obs)}:
        common.fail(f"{path} has obs {found}, not uint8 (N, 64, 64, 3), or labels of other lengths")
    return dict(
        obs=common.shrink(obs, args.frame_size),
        first=np.concatenate([[True], recording["done"][:-1].astype(bool)]),
        action=recording["ta"].astype(np.uint8),
        reward=recording["rewards"].astype(np.float32),
    )


def save_shards(folder, recording, arrays):
    """arrays: obs, first and, if there are labels, action and reward."""
    for number, start in enumerate(range(0, len(arrays["obs"]), SHARD_FRAMES)):
        labels = {name: array[start : start + SHARD_FRAMES] for name, array in arrays.items()}
        frames = dict(obs=labels.pop("obs"), first=labels.pop("first"))
        frames["first"][0] = True  # what was before it is in another shard
        common.save_npz(folder / f"frames_{number:03d}.npz", recording, **frames)
        if labels:
            common.save_npz(folder / f"labels_{number:03d}.npz", recording, **labels)


def main(args):
    # --- checks, before anything is decoded
    if not args.files:
        common.fail("name at least one file")
    if Path(args.name).name != args.name or args.name in ("", ".."):
        common.fail(f"--name '{args.name}' is not the name of a folder in {args.data_dir}")
    if not 0 < args.test_fraction < 1:
        common.fail(f"--test-fraction {args.test_fraction} is not between 0 and 1")
    are_recordings = {path.suffix == ".npz" for path in args.files}
    if len(are_recordings) == 2:
        common.fail("videos and .npz recordings do not mix: labels would be missing")
    read = read_recording if are_recordings == {True} else read_video
    if read is read_video:
        for path in args.files:
            video, _ = open_video(path)
            video.close()

    data = args.data_dir / args.name
    with (
        common.new_folder(data / "train") as train,
        common.new_folder(data / "test") as test,
    ):
        # --- read all files
        parts = []
        for path in args.files:
            part = read(path, args)
            print(f"{path}: {len(part['obs']):,} frames, {part['first'].sum():,} episodes")
            parts.append(part)
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

        # --- split and save
        num_test = int(len(arrays["obs"]) * args.test_fraction)
        num_train = len(arrays["obs"]) - num_test
        if min(num_train, num_test) < 3:
            counts = f"{num_train} and {num_test} frames"
            common.fail(f"--test-fraction {args.test_fraction} gives {counts}, fewer than 3")
        recording = dict(game=args.name, frame_size=args.frame_size)
        save_shards(train, recording, {name: x[:num_train] for name, x in arrays.items()})
        save_shards(test, recording, {name: x[num_train:] for name, x in arrays.items()})
    print(f"in {data}: train, {num_train:,} frames, and test, {num_test:,} frames")
    for split, obs in dict(train=arrays["obs"][:num_train], test=arrays["obs"][num_train:]).items():
        still = sum(map(np.array_equal, obs, obs[1:])) / len(obs)
        if still > 1 / 3:
            advice = "cut off a still card at the end; of doubled frames, --stride 2 takes one"
            print(f"warning: {still:.0%} of {split} repeats the frame before; {advice}")
    common.print_next(
        "train_latent_dynamics.py", common.RunArgs(game=args.name, data_dir=args.data_dir)
    )


if __name__ == "__main__":
    common.run(main, Args)
