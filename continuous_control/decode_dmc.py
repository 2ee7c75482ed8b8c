"""Stage 3 for continuous control: decode latent actions with a few labelled frames (A.3, 4.3).

For each number of labels N and each seed, a decoder regresses the true action from the IDM's z_t
on N labelled frames, and plays in the suite on top of the frozen latent policy: action =
decoder(policy(o_t)). With --decode-from policy, it is fitted on what it plays on, the policy's last
hidden layer, in place of z_t. --match-std undoes the shrinking of regression. Beside it play, as
controls:

bc       a policy that clones the N labelled frames alone: what the video adds is the difference
bc_all   a policy that clones all frames with their true labels: the ceiling
mean     the mean action of the data, whatever the frame; random: uniform actions

The control of an untrained IDM is the whole chain with stage 1 at --grad-steps 0 and its own
--runs-dir, which --untrained-dir then points to.

reads   runs/<game>/latent_policy.pt, {train,test}/latents_NNN.npz,
        data/<game>/{train,test}/frames_NNN.npz, labels_NNN.npz
writes  runs/<game>/decode_dmc.npz: labels [L]; returns, r2, policy_r2 [L, seeds] of LAPO, and
        with _bc at the end of controls; of bc_all [1, seeds]; mean_return. decode_dmc.png

at 64x64      python -m continuous_control.decode_dmc --game cheetah_run
on a CPU      python -m continuous_control.decode_dmc --game cheetah_run --labels 16 64 256 1024
                  --decode-from policy --match-std --decoder-seeds 3 --episodes 4
                  --clone-steps 3000 --clone-lr 1e-3
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import common  # before torch
import decode_offline
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from train_latent_bc import LatentPolicy
from train_latent_dynamics import in_batches

from continuous_control.collect_dmc import ControlEnvs, pick_renderer

CURVES = {  # arrays of decode_dmc.npz and their names in the plot
    "returns": "LAPO: decoder on the latent policy",
    "returns_bc": "BC: clones the labelled frames alone",
    "returns_bc_all": "BC: clones all true labels",
    "returns_untrained": "LAPO with an untrained IDM",
}


@dataclass
class Args(common.RunArgs):
    game: Literal["cheetah_run", "walker_walk"] = "cheetah_run"
    """Task of the suite; the later stages' --game."""
    pool_frames: int = 1_000_000
    """Frames in memory (12 KB each at 64x64), from which labelled ones and clones' are drawn."""
    untrained_dir: Path = Path("runs/untrained")
    """If <untrained-dir>/<game>/decode_dmc.npz is there, its returns stand beside the others."""

    methods: tuple[Literal["lapo", "bc", "bc_all"], ...] = ("lapo", "bc", "bc_all")
    """What to fit and play."""
    labels: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """Numbers of labelled frames, N (Figure 4)."""
    decode_from: Literal["idm", "policy"] = "idm"
    """Fit decoders on the IDM's z_t (the paper), or on the last hidden layer of the latent policy,
    of which its latent is a linear map; LAOM (arXiv 2502.00379) decodes LAPO here from both."""
    match_std: bool = False
    """Scale the actions of each decoder and clone about their mean, so that their std on frames
    without labels is that of the labelled actions: regression shrinks it. Not in the paper."""
    decoder_seeds: int = 5
    """Decoders for each N, each with frames of its own (the paper: 3 seeds)."""
    decoder_steps: int = 1000
    """Updates of a decoder, and of a policy that clones the labelled frames."""
    decoder_lr: float = 1e-3
    """Learning rate of Adam for both; it falls to 0 linearly."""
    clone_steps: int = 10_000
    """bc_all: updates on all frames (stage 2: 60,000)."""
    clone_lr: float = 2e-4
    """bc_all: learning rate of Adam (A.4); it falls to 0 linearly."""
    batch_size: int = 128
    """Frames per update of each (A.4); on labelled frames, no more than there are."""
    episodes: int = 10
    """Episodes of 1,000 steps that each decoder or policy plays, at once."""


class RegressionDecoder(nn.Module):
    """Latent action -> true action; hidden layers of 192, 128, 64 (official code, for Procgen)."""

    def __init__(self, z_dim, num_actions):
        super().__init__()
        layers, sizes = [], (z_dim, 192, 128, 64)
        for i, o in zip(sizes, sizes[1:]):
            layers += [nn.Linear(i, o), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(64, num_actions))
        self.register_buffer("mean", torch.zeros(z_dim))  # z is standardized
        self.register_buffer("std", torch.ones(z_dim))

    def forward(self, z):
        """z (B, Z) -> actions (B, A), not yet clipped to -1 .. 1"""
        return self.layers((z - self.mean) / self.std)


class HiddenLayer(nn.Module):
    """The last hidden layer of a LatentPolicy."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, obs):
        """uint8 (B, S, S, 3) -> (B, 256)"""
        return F.relu(self.policy.hidden(self.policy.features(obs)))


class MatchStd(nn.Module):
    """Scales actions (B, A) about their mean; the factors are those that give `decoded` (N, A) the
    std of `labelled` (M, A).
    """

    def __init__(self, decoded, labelled):
        super().__init__()
        decoded = decoded.clamp(-1, 1)
        factor = labelled.std(0, correction=0) / (decoded.std(0, correction=0) + 1e-6)
        self.register_buffer("mean", decoded.mean(0))
        self.register_buffer("factor", factor)

    def forward(self, actions):
        return self.mean + self.factor * (actions.clamp(-1, 1) - self.mean)


class MeanAction(nn.Module):
    """The control that does not look: one action (A,) for all observations."""

    def __init__(self, action):
        super().__init__()
        self.register_buffer("action", action)

    def forward(self, obs):
        return self.action.expand(len(obs), -1)


def fit(network, inputs_at, rows, actions, steps, batch_size, lr, generator):
    """Regresses actions float32 (N, A) from inputs_at(rows), with rows int64 (N,): of a FrameStore,
    its z_at() for a decoder, frames_at() for a policy.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        batch = torch.randint(len(rows), (min(batch_size, len(rows)),), generator=generator)
        inputs, target = inputs_at(rows[batch]), actions[batch]
        loss = F.mse_loss(network(inputs), target.to(inputs.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def read_labels(store, name="action"):
    """float32 (R, A): the label of this name of each row of the FrameStore's memory; None if the
    label files have no such label.
    """
    labels = None
    for slot, path in enumerate(store.paths):
        common.read_actions(path)  # checks them
        shard = common.load_npz(path.with_name(path.name.replace("frames", "labels")))
        if name not in shard:
            return None
        if labels is None:
            labels = torch.zeros(len(store.obs), *shard[name].shape[1:])
        labels[slot * store.slot_rows :][: len(shard[name])] = torch.from_numpy(shard[name])
    return labels


@torch.no_grad()
def r2(network, inputs, actions):
    """R^2 of a network's actions, mean over their dimensions, on held-out inputs (N, ...)."""
    guesses = in_batches(network, inputs).cpu().clamp(-1, 1)
    residual = (guesses - actions).square().mean(0) / actions.var(0, correction=0)
    return 1 - residual.mean().item()


def play(network, settings, args, device):
    """Mean return of args.episodes whole episodes, from the same starting states for each network.

    network: obs uint8 (B, S, S, 3) -> actions (B, A)
    """

    def act(obs):
        return network(torch.from_numpy(obs).to(device)).cpu().numpy()

    envs = ControlEnvs(settings, args.episodes, common.derive_seed(args.seed, "decode dmc"))
    mean_return = common.evaluate(envs, act, 1).mean()
    envs.close()
    return mean_return


def main(args):
    device = common.pick_device(args.device)
    if min(args.labels) < 1:
        common.fail(f"--labels {min(args.labels)}: a decoder needs at least one")
    pick_renderer()
    torch.manual_seed(args.seed)
    run = args.runs_dir / args.game
    checkpoint = common.load_checkpoint(run / "latent_policy.pt", "latent_policy", args.game)
    size, multiplier, k = (checkpoint[name] for name in ("frame_size", "multiplier", "context"))
    settings, stamp = checkpoint["settings"], checkpoint["dynamics"]
    policy = LatentPolicy(size, multiplier, checkpoint["z_dim"])
    policy.load_state_dict(checkpoint["policy"])
    policy.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    results = run / "decode_dmc.npz"
    arrays = dict(labels=np.array(args.labels))
    saved = settings | asdict(args) | dict(labels=[*args.labels], dynamics=stamp)
    if results.exists():  # methods of an earlier run stay, if they are comparable
        old = common.load_npz(results)
        was, same = old.pop("settings"), ("labels", "seed", "dynamics", "decode_from", "match_std")
        arrays = old if all(was.get(name) == saved[name] for name in same) else arrays
    control = args.untrained_dir / args.game / results.name
    if control.exists() and control != results:
        untrained = common.load_npz(control, ["returns"])
        for flag in ("labels", "decode_from", "match_std"):
            if (found := untrained["settings"].get(flag)) != (ours := saved[flag]):
                common.fail(f"{flag} is {ours}, but {control} has {found}")
        arrays["returns_untrained"] = untrained["returns"]

    # --- data: all frames in memory with their true actions, and held-out ones to judge on
    store = common.FrameStore(args, "train", k, device, stamp, args.pool_frames)
    if len(store.rows) < (most := max(args.labels)):
        common.fail(f"{store.folder} has {len(store.rows)} labelled rows, fewer than {most}")
    actions, test = read_labels(store), common.FrameStore(args, "test", k, device, stamp)
    test_rows = test.rows[torch.randperm(len(test.rows))[:4096]]
    test_obs, test_actions = test.frames_at(test_rows), read_labels(test)[test_rows]
    from_idm, num_actions = args.decode_from == "idm", actions.shape[1]
    encoder = policy if from_idm else HiddenLayer(policy)

    def inputs_at(frames, rows):
        """What decoders are fitted on at rows (n,) of a FrameStore: (n, Z), or (n, 256)."""
        return frames.z_at(rows) if from_idm else in_batches(encoder, frames.frames_at(rows))

    some_rows = store.rows[:: max(1, len(store.rows) // 4096)]  # of all shards; no labels needed
    some, some_obs = inputs_at(store, some_rows), store.frames_at(some_rows)

    # --- fit and play: of each method a network for each number of labels and each seed
    on_labels = args.decoder_steps, args.batch_size, args.decoder_lr
    for method in args.methods:
        counts = [len(store.rows)] if method == "bc_all" else args.labels
        updates = (args.clone_steps, args.batch_size, args.clone_lr)
        updates = updates if method == "bc_all" else on_labels
        shape = len(counts), args.decoder_seeds
        returns, fitted, from_frames = np.zeros((3, *shape))
        bar = common.progress_bar(returns.size, "policy", method)
        for i, seed in np.ndindex(shape):  # more labels contain the fewer ones of the same seed
            generator = torch.Generator().manual_seed(common.derive_seed(args.seed, seed))
            torch.manual_seed(common.derive_seed(args.seed, f"weights {seed}"))
            rows = store.rows[torch.randperm(len(store.rows), generator=generator)[: counts[i]]]
            if method == "lapo":
                decoder = RegressionDecoder(some.shape[1], num_actions).to(device)
                decoder.mean.copy_(some.mean(0))
                decoder.std.copy_(some.std(0) + 1e-6)
                x, order = inputs_at(store, rows), torch.arange(len(rows))
                fit(decoder, x.__getitem__, order, actions[rows], *updates, generator)
                fitted[i, seed] = r2(decoder, inputs_at(test, test_rows), test_actions)
                network = nn.Sequential(encoder, decoder)
            else:
                network = LatentPolicy(size, multiplier, num_actions)
                network.to(device, memory_format=torch.channels_last)
                fit(network, store.frames_at, rows, actions[rows], *updates, generator)
            from_frames[i, seed] = r2(network, test_obs, test_actions)
            if args.match_std:
                decoded = in_batches(network.requires_grad_(False), some_obs)
                network = nn.Sequential(network, MatchStd(decoded, actions[rows].to(device)))
            returns[i, seed] = play(network, settings, args, device)
            bar.update()
        bar.close()
        ending = "" if method == "lapo" else f"_{method}"
        arrays |= {f"returns{ending}": returns, f"policy_r2{ending}": from_frames}
        arrays |= dict(r2=fitted) if method == "lapo" else {}
    mean_action = MeanAction(actions[store.rows].mean(0))
    arrays["mean_return"] = play(mean_action, settings | dict(frame_size=0), args, device)

    # --- save first, then draw and print
    common.save_npz(results, saved, **arrays)
    shown = {}
    for name in (name for name in CURVES if name in arrays):
        shape = len(args.labels), arrays[name].shape[1]
        shown[CURVES[name]] = args.labels, np.broadcast_to(arrays[name], shape)
    lines = {"expert": settings["expert_return"], "random actions": settings["random_return"]}
    lines["mean action"] = arrays["mean_return"]
    title = f"{args.game}, decoded offline: mean and std of {args.decoder_seeds} decoders"
    decode_offline.plot(run / "decode_dmc.png", title, "labelled frames", shown, lines)
    print(f"{'labels':46}" + "".join(f"{count:8}" for count in args.labels))
    for name, (_, values) in shown.items():
        print(f"{name:46}" + "".join(f"{x:8.1f}" for x in values.mean(1)))
    for name in (name for name in arrays if "r2" in name):
        print(f"{name:46}" + "".join(f"{x:8.2f}" for x in arrays[name].mean(1)))
    print(", ".join(f"{name} {value:.1f}" for name, value in lines.items()))
    print(f"results: {results} and .png")


if __name__ == "__main__":
    main(tyro.cli(Args))
