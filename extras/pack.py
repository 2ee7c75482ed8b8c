"""Packs a trained game for `make play`: networks in half precision, and some held-out frames.

reads   runs/<game>/latent_dynamics.pt, latent_policy.pt, decode_offline.pt, test/latents_000.npz,
        data/<game>/test/frames_000.npz, labels_000.npz
writes  <output-dir>/runs/<game> and <output-dir>/data/<game>, the same files, smaller

python -m extras.pack --game miner --data-dir laptop/data/seed_1 --runs-dir laptop/runs/lapo/seed_1
"""

from dataclasses import dataclass
from pathlib import Path

import common  # before torch
import torch

CHECKPOINTS = ("latent_dynamics", "latent_policy", "decode_offline")


@dataclass
class Args(common.RunArgs):
    output_dir: Path = Path("assets")
    """Files go there."""
    frames: int = 1024
    """The first frames of the first shard that go along."""


def halve(content):
    """Tensors of floats in nested dicts and lists -> float16."""
    if isinstance(content, dict):
        return {name: halve(value) for name, value in content.items()}
    if isinstance(content, list):
        return [halve(value) for value in content]
    if isinstance(content, torch.Tensor) and content.is_floating_point():
        return content.half()
    return content


def main(args):
    data = args.data_dir / args.game / "test"
    run = args.runs_dir / args.game
    to_data = args.output_dir / "data" / args.game / "test"
    to_run = args.output_dir / "runs" / args.game
    for name in CHECKPOINTS:
        content = common.load_checkpoint(run / f"{name}.pt", name, args.game)
        common.save_checkpoint(to_run / f"{name}.pt", **halve(content))

    def cut(source, target, **more_settings):
        arrays = common.load_npz(source)
        settings = arrays.pop("settings") | more_settings
        rows = {name: array[: args.frames] for name, array in arrays.items()}
        if "valid" in rows:
            rows["valid"][-1] = False  # its next frame is left behind
        common.save_npz(target, settings, **rows)

    cut(data / "frames_000.npz", to_data / "frames_000.npz")
    cut(data / "labels_000.npz", to_data / "labels_000.npz")
    frames_id = common.frames_id([to_data / "frames_000.npz"])
    latents = "test/latents_000.npz"
    cut(run / latents, to_run / latents, frames_id=frames_id)
    files = [path for path in args.output_dir.rglob("*.*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"{len(files)} files, {size:.2f} MB in {args.output_dir}")


if __name__ == "__main__":
    common.run(main, Args)
