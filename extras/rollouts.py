"""A film of open-loop rollouts: the FDM predicts frame after frame from its own predictions. All
start from the same frames, and each holds one latent action.

The latent actions are medoids of k-means clusters of held-out latents, largest cluster first. True
actions, if there are labels, are used to name them, not to choose them.

reads   runs/<game>/latent_dynamics.pt, test/latents_NNN.npz, data/<game>/test/frames_NNN.npz and,
        if there, labels_NNN.npz
writes  runs/<game>/film.png, film.gif

python -m extras.rollouts --game miner
"""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import common  # before torch
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from train_latent_dynamics import build_models
from visualize_latents import find_clusters, medoids

MAX_LATENTS = 4096  # that are clustered


@dataclass
class Args(common.RunArgs):
    clusters: int = 12
    """Rollouts, one for each k-means cluster of latents."""
    steps: int = 15
    """Frames that each rollout predicts."""


class Clusters(NamedTuple):
    """M k-means clusters of held-out latents, largest first, each with its medoid."""

    z_q: torch.Tensor  # (M, Z), the medoids, quantized
    windows: torch.Tensor  # uint8 (M, k + 2, S, S, 3), the windows whose latents they are
    fractions: np.ndarray  # float [M], of all latents
    action_fractions: np.ndarray | None  # float [M, 15], of the true actions in a cluster


def load_dynamics(args, device):
    """The content of latent_dynamics.pt, its quantizer and its FDM."""
    path = args.runs_dir / args.game / "latent_dynamics.pt"
    checkpoint = common.load_checkpoint(path, "latent_dynamics", args.game)
    _, quantizer, fdm = build_models(checkpoint["config"], device)
    quantizer.load_state_dict(checkpoint["quantizer"])
    fdm.load_state_dict(checkpoint["fdm"])
    return checkpoint, quantizer.eval(), fdm.eval()


def cluster_latents(args, checkpoint, quantizer, num_clusters, device):
    """Clusters of the latents that stage 1 wrote of the test split; fewer if fewer differ."""
    context = checkpoint["config"]["idm"]["context"]
    store = common.FrameStore(args, "test", context, device, checkpoint["dynamics_id"])
    rows = store.draw(MAX_LATENTS).unique()
    z_q, _, _ = quantizer(store.z_at(rows))
    warnings.filterwarnings("ignore", module="sklearn")  # fewer distinct latents than clusters
    array = z_q.cpu().numpy()
    cluster = find_clusters(array, min(num_clusters, len(rows)), args.seed)
    medoid = list(medoids(array, cluster).values())
    members = cluster == np.arange(len(medoid))[:, None]  # bool [M, N]
    actions = common.true_actions_to_report_on(store, rows)
    action_fractions = None
    if actions is not None and args.game in common.GAMES:  # only Procgen's actions have names
        one_hot = np.eye(common.NUM_ACTIONS)[actions]  # [N, 15]
        action_fractions = members @ one_hot / members.sum(1, keepdims=True)
    return Clusters(
        z_q=z_q[medoid],
        windows=store.windows_at(rows[medoid]),
        fractions=members.mean(1),
        action_fractions=action_fractions,
    )


def rollout(fdm, past, z_q, steps):
    """Open loop with one latent: past uint8 (B, k + 1, S, S, 3) -> uint8 (B, 1 + steps, S, S, 3)"""
    frames = [past[:, -1]]
    for _ in range(steps):
        predicted = fdm(past, z_q).clamp(-0.5, 0.5).permute(0, 2, 3, 1)  # (B, S, S, 3)
        frames.append(((predicted + 0.5) * 255).round().to(torch.uint8))  # as all frames it saw
        past = torch.cat([past[:, 1:], frames[-1][:, None]], 1)
    return torch.stack(frames, 1)


def panels(images, titles, labels, title, inches=1.75):
    """Figure of images [R, C, S, S, 3]; titles: of the first panels; labels: of the rows."""
    rows, columns = images.shape[:2]
    size = (inches * columns + 1.5, inches * rows + 1.5)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=size,
        layout="constrained",
        squeeze=False,
    )
    for place, ax in np.ndenumerate(axes):
        ax.imshow(images[place], interpolation="nearest")
        ax.set(xticks=[], yticks=[])
    for ax, text in zip(axes.flat, titles):
        ax.set_title(text, fontsize=13)
    for ax, text in zip(axes[:, 0], labels):
        ax.set_ylabel(text, fontsize=13)
    figure.suptitle(title, fontsize=16)
    return figure


def plot_film(run, frames, names, title):
    """film.png and film.gif: frames uint8 [M, T, S, S, 3], with names [M]."""
    num_rollouts, length = frames.shape[:2]
    titles = ["$o_t$"]
    titles += [f"+{step}" for step in range(2, length, 2)]
    figure = panels(frames[:, ::2], titles, names, title, inches=1.2)
    common.save_figure(figure, run / "film.png")

    # the animation: four rollouts in a row, white where the last row is not full
    white = np.full_like(frames[:1], 255).repeat(-num_rollouts % 4, axis=0)
    frames = np.concatenate([frames, white])
    grid = frames[:, 0].reshape(-1, 4, *frames.shape[2:])
    figure = panels(grid, names, [], title)
    figure.set_dpi(80)
    pictures = []
    for step in range(length):
        for axes, film in zip(figure.axes, frames):
            axes.images[0].set_data(film[step])
        figure.suptitle(f"{title}\nstep {step}", fontsize=14)
        figure.canvas.draw()
        pixels = np.array(figure.canvas.buffer_rgba())
        pictures.append(Image.fromarray(pixels).convert("RGB"))
    plt.close(figure)
    with common.atomic_write(run / "film.gif") as temporary:
        pictures[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=200,  # milliseconds
            loop=0,
        )


@torch.no_grad()
def main(args):
    device = common.pick_device(args)
    checkpoint, quantizer, fdm = load_dynamics(args, device)
    clusters = cluster_latents(args, checkpoint, quantizer, args.clusters, device)
    names = [f"{i + 1}: {fraction:.0%} of z" for i, fraction in enumerate(clusters.fractions)]
    if clusters.action_fractions is not None:
        for i, fractions in enumerate(clusters.action_fractions):
            names[i] += f"\n{fractions.max():.0%} {common.ACTIONS[fractions.argmax()]}"
    past = clusters.windows[:1, :-1].expand(len(names), -1, -1, -1, -1)
    frames = rollout(fdm, past, clusters.z_q, args.steps).cpu().numpy()
    title = f"{args.game}: open-loop rollouts of the FDM, each with one latent"
    run = args.runs_dir / args.game
    plot_film(run, frames, names, title)
    print(f"in {run}: film.png, film.gif")


if __name__ == "__main__":
    common.run(main, Args)
