r"""Two animations of --capture-video beside each other, in the same games.

python -m extras.side_by_side demo/runs/miner/label_efficiency_bc.gif \
    demo/runs/miner/decode_offline.gif both.gif --titles "clone of 256 labels" "LAPO, 256 labels"
"""

from dataclasses import dataclass
from pathlib import Path

import common
import tyro
from PIL import Image, ImageDraw

MARGIN = 16  # pixels, above for the titles and between the animations


@dataclass
class Args:
    left: tyro.conf.Positional[Path]
    """Animation (GIF)."""
    right: tyro.conf.Positional[Path]
    """Animation of the same size."""
    output: tyro.conf.Positional[Path]
    """The animation that is written."""
    titles: tuple[str, str] = ("", "")
    """Stand above the two."""


def compose(left, right, titles):
    """Frames of both, as PIL images; the last frame of the shorter one stays."""
    width, height = left.size
    pictures = []
    for i in range(max(left.n_frames, right.n_frames)):
        picture = Image.new("RGB", (2 * width + MARGIN, height + MARGIN), "white")
        for x, animation, title in zip((0, width + MARGIN), (left, right), titles):
            animation.seek(min(i, animation.n_frames - 1))
            picture.paste(animation.convert("RGB"), (x, MARGIN))
            ImageDraw.Draw(picture).text((x + 4, 2), title, fill="black")
        pictures.append(picture)
    return pictures


def main(args):
    with common.reading(args.left):
        left = Image.open(args.left)
    with common.reading(args.right):
        right = Image.open(args.right)
    if left.size != right.size:
        common.fail(f"{args.left} has {left.size} pixels, {args.right} {right.size}")
    common.save_animation(compose(left, right, args.titles), args.output)
    print(f"animation: {args.output}")


if __name__ == "__main__":
    common.run(main, Args)
