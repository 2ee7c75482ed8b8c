"""Which directions do latent actions tell apart? Accuracy of linear probes of z for each pair.

A latent that says "forwards along the corridor" tells up from down and left from right, but not up
from right: there it depends on the state, and a decoder that sees z alone cannot know the action
(paper, 6.2). Probes are fitted on three quarters of the held-out windows and tested on the rest,
which are of later games in the files: nearly all of other episodes.

reads   runs/<game>/latent_dynamics.pt, test/latents_NNN.npz,
        data/<game>/test/frames_NNN.npz and labels_NNN.npz
writes  runs/<game>/action_pairs.csv: actions, accuracy, that of the majority class, windows

python -m extras.action_pairs --game heist
"""

from dataclasses import dataclass
from itertools import combinations

import common  # before torch
import numpy as np
import torch

from extras import summarize
from train_latent_dynamics import PROBE_FIT, linear_probe

DIRECTIONS = ("left", "right", "up", "down")


@dataclass
class Args(common.RunArgs):
    windows: int = 8192
    """Held-out windows whose latents are probed, at most."""


def probe_pairs(z, actions):
    """A row for each pair of directions, and one for all four. z: float [N, Z], actions: int [N],
    in the order of the files.
    """
    rows = []
    for names in [*combinations(DIRECTIONS, 2), DIRECTIONS]:
        chosen = np.isin(actions, [common.ACTIONS.index(name) for name in names])
        split = int(PROBE_FIT * chosen.sum())
        x, y = z[chosen], actions[chosen]
        if len(np.unique(y[:split])) < len(names):
            common.fail(f"too few of the actions {', '.join(names)} to fit a probe")
        accuracy, majority = linear_probe(x[:split], y[:split], x[split:], y[split:])
        label = "all four" if names == DIRECTIONS else ", ".join(names)
        rows.append(dict(actions=label, accuracy=accuracy, majority=majority, windows=len(y)))
    return rows


def main(args):
    if args.game not in common.GAMES:
        common.fail(f"'{args.game}' is not one of Procgen's games, whose directions are known")
    run = args.runs_dir / args.game
    saved = common.load_checkpoint(run / "latent_dynamics.pt", "latent_dynamics", args.game)
    context = saved["config"]["idm"]["context"]
    device = torch.device("cpu")
    store = common.FrameStore(args, "test", context, device, saved["dynamics_id"])
    rows = store.draw(args.windows).unique()  # sorted: in the order of the files
    actions = common.true_actions_to_report_on(store, rows)
    if actions is None:
        common.fail(f"{store.folder} has no labels")
    pairs = probe_pairs(store.z_at(rows).numpy(), actions)
    summarize.write_table(run / "action_pairs.csv", list(pairs[0]), pairs)
    for row in pairs:
        print(f"{row['actions']:16}{row['accuracy']:.2f}  (majority {row['majority']:.2f})")


if __name__ == "__main__":
    common.run(main, Args)
