"""Metrics and pictures of the latent actions of continuous control (A.3, section 6.3).

How well does a linear probe of z predict each true action, on held-out episodes and on random play,
beside an untrained IDM and one trained on true actions? How well the noise on the expert's actions,
of which the frames before say nothing? What does the FDM predict where z is moved along its
principal directions? True actions are for metrics only.

reads   runs/<game>/latent_dynamics.pt, data/<game>/{train,test,random}/frames_NNN.npz,
        labels_NNN.npz
writes  runs/<game>/latents.npz (metrics), latents.png (maps), film.png, film.gif (rollouts)

at 64x64      python -m continuous_control.visualize_dmc --game cheetah_run
on a CPU      python -m continuous_control.visualize_dmc --game cheetah_run --supervised-steps 1000
"""

from dataclasses import asdict, dataclass
from typing import Literal

import common  # before torch
import matplotlib
import numpy as np
import torch
import tyro
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from train_latent_dynamics import FDM, IDM, EMAVectorQuantizer, NoQuantizer, in_batches
from visualize_latents import fdm_mse, plot_film, project, rollout, save_figure

from continuous_control.decode_dmc import fit, read_labels

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ACTUATORS = dict(  # in the order of the suite's models
    cheetah_run="back thigh, back shin, back foot, front thigh, front shin, front foot",
    walker_walk="right hip, right knee, right ankle, left hip, left knee, left ankle",
)


@dataclass
class Args(common.RunArgs):
    game: Literal["cheetah_run", "walker_walk"] = "cheetah_run"
    """Task of the suite; the later stages' --game."""

    points: int = 4096
    """Windows of each split: held-out ones to plot, and others to fit the probes on."""
    projection: Literal["umap", "tsne", "pca"] = "umap"
    """How latents are mapped to two dimensions (the paper: UMAP)."""
    supervised_steps: int = 3000
    """Updates of an IDM trained on true actions, an upper bound for the probes; 0 leaves it out."""


def probe_each(z, actions, test_z, test_actions):
    """R^2 [A] of a linear regression of each action's dimension."""
    probe = make_pipeline(StandardScaler(), Ridge()).fit(z, actions)
    return r2_score(test_actions, probe.predict(test_z), multioutput="raw_values")


def plot_maps(path, maps, actions, names, scores, title):
    """maps {name: [N, 2]} as rows, coloured by the three dimensions of actions [N, A] that are best
    read from z as columns.
    """
    shown = np.argsort(-scores)[:3]
    size = dict(figsize=(14, 9), layout="constrained", squeeze=False)
    figure, axes = plt.subplots(len(maps), len(shown), **size)
    for (row, column), ax in np.ndenumerate(axes):
        xy, dim = list(maps.values())[row], shown[column]
        style = dict(c=actions[:, dim], cmap="coolwarm", vmin=-1, vmax=1, s=7, linewidths=0)
        points = ax.scatter(*xy.T, **style)
        ax.set(xticks=[], yticks=[])
        if column == 0:
            ax.set_ylabel(list(maps)[row], fontsize=13)
        if row == 0:
            ax.set_title(f"{names[dim]}: linear R² {scores[dim]:.2f}", fontsize=13)
    figure.colorbar(points, ax=axes, label="true action", shrink=0.6)
    figure.suptitle(title, fontsize=16)
    save_figure(figure, path)


def pushed(z, quantizer, scale=2.0):
    """z [N, Z] -> the mean latent moved by +- scale standard deviations along each of the three
    largest principal directions, then quantized as the FDM knows it: (6, Z), and their names.
    """
    pca, names, latents = PCA(3).fit(z), [], []
    for i, (direction, variance) in enumerate(zip(pca.components_, pca.explained_variance_)):
        for sign, mark in ((-1, "−"), (1, "+")):
            latents.append(pca.mean_ + sign * scale * variance**0.5 * direction)
            names.append(f"direction {i + 1}\n{mark}{scale:g} std")
    return quantizer(torch.from_numpy(np.float32(latents)))[0], names


@torch.no_grad()
def main(args):
    device = common.pick_device(args.device)
    torch.manual_seed(args.seed)
    run = args.runs_dir / args.game

    # --- networks
    saved = common.load_checkpoint(run / "latent_dynamics.pt", "latent_dynamics", args.game)
    sizes = size, k, _ = saved["frame_size"], saved["context"], saved["multiplier"]
    vq_sizes, z_dim, names = saved["vq_sizes"], saved["z_dim"], ACTUATORS[args.game].split(", ")
    idm, untrained = IDM(*sizes, z_dim), IDM(*sizes, z_dim)
    fdm = FDM(size, k, z_dim, saved["fdm_width"], saved["predict_change"])
    quantizer = EMAVectorQuantizer(*vq_sizes, decay=1.0) if vq_sizes else NoQuantizer()
    for name, module in dict(idm=idm, fdm=fdm, quantizer=quantizer).items():
        module.load_state_dict(saved[name])
    for module in (idm, untrained, fdm, quantizer):
        module.to(device, memory_format=torch.channels_last).eval()

    # --- data: windows and true actions of each split
    splits = {}
    for split in ("random", "test", "train"):
        store = common.FrameStore(args, split, k, device)
        rows = store.draw(args.points).unique()
        actions = common.true_actions_to_report_on(store, rows)
        if actions is None:
            common.fail(f"{store.folder} has no labels, and these metrics need true actions")
        splits[split] = store.windows_at(rows), actions, read_labels(store, "noise"), rows

    # --- probes: R^2 of each dimension, beside an untrained IDM and one trained on true actions
    metrics, cut = {}, len(splits["random"][3]) * 3 // 4
    windows, actions, test_noise, test_rows = splits["test"]
    _, _, noise, noise_rows = splits["train"]
    with_noise = noise is not None and test_noise is not None and noise.any()
    for name, network in dict(probe=idm, probe_untrained=untrained).items():
        z = {split: in_batches(network, x[0]).cpu().numpy() for split, x in splits.items()}
        random = z["random"], splits["random"][1]
        halves = [x[part] for part in (slice(cut), slice(cut, None)) for x in random]
        metrics[f"random_{name}"] = probe_each(*halves)
        metrics[name] = probe_each(z["train"], splits["train"][1], z["test"], actions)
        if with_noise:
            noises = (noise[noise_rows].numpy(), z["test"], test_noise[test_rows].numpy())
            metrics[f"noise_{name}"] = probe_each(z["train"], *noises)
    if args.supervised_steps > 0:
        supervised = IDM(*sizes, len(names)).to(device, memory_format=torch.channels_last)
        rows, generator = store.rows, torch.Generator().manual_seed(args.seed)
        true = torch.from_numpy(common.true_actions_to_report_on(store, rows))
        with torch.enable_grad():
            where = rows, true, args.supervised_steps, 128, 1e-3, generator
            fit(supervised, store.windows_at, *where)
        guesses = in_batches(supervised, windows).cpu().numpy()
        metrics["supervised"] = r2_score(actions, guesses, multioutput="raw_values")
    test_z = in_batches(idm, windows).cpu().numpy()
    z_q = quantizer(torch.from_numpy(test_z).to(device))[0]
    latents = dict(true=z_q, zeroed=0 * z_q, shuffled=z_q[torch.randperm(len(z_q))])
    mse = fdm_mse(fdm, windows, latents)

    # --- save, draw, print
    xy, method = project(test_z, args.projection, args.seed)
    settings = saved["settings"] | asdict(args) | dict(vq=bool(vq_sizes), context=k)
    common.save_npz(run / "latents.npz", settings, xy=xy, action=actions, **metrics, **mse)
    title = f"{args.game}: {len(test_z):,} held-out latents, coloured by true actions"
    maps = {method: xy, "principal components 1, 2": PCA(2).fit_transform(test_z)}
    plot_maps(run / "latents.png", maps, actions, names, metrics["probe"], title)
    moved, films = pushed(test_z, quantizer.cpu())
    start = [len(windows) // 2] * len(moved)
    frames = rollout(fdm, windows[start, :-1], moved.to(device), 15).cpu().numpy()
    title = f"{args.game}: open-loop rollouts of the FDM, z pushed from its mean"
    plot_film(run, frames, films, title)
    print(f"{'R^2':24}" + "".join(f"{name:>13}" for name in [*names, "mean"]))
    for name, values in metrics.items():
        print(f"{name:24}" + "".join(f"{x:13.2f}" for x in [*values, values.mean()]))
    print(", ".join(f"{name} {value:.3g}" for name, value in mse.items()))
    print(f"in {run}: latents.npz, latents.png, film.png, film.gif")


if __name__ == "__main__":
    main(tyro.cli(Args))
