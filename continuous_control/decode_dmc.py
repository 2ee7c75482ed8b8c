"""Stage 3 for continuous control: decode latent actions with a few labelled frames (A.3, 4.3).

For each number of labels N and each seed, a decoder regresses the true action on N labelled frames,
and plays in the suite on top of the frozen latent policy. It is fitted on what it plays on, the
policy's last hidden layer: action = decoder(hidden(o_t)). With --decode-from idm, as in the paper,
it is fitted on the IDM's z_t and plays on the policy's: action = decoder(policy(o_t)). Regression
shrinks actions; --match-std undoes that. Beside it play, as controls:

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
on a CPU      python -m continuous_control.decode_dmc --game cheetah_run --labels 64 256 1024
                  --decoder-seeds 3 --episodes 4 --clone-steps 5000 --clone-lr 1e-3
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import common  # before torch
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from decode_offline import load_policy
from train_latent_bc import LatentPolicy
from train_latent_dynamics import in_batches

from continuous_control.collect_dmc import mean_return, pick_renderer

TEST_FRAMES = 4096  # held-out frames on which decoders and clones are judged
UNLABELLED_FRAMES = 4096  # of all shards, for means and stds that need no labels
SAME_FLAGS = ("labels", "decode_from", "match_std")  # where returns stand beside each other
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
    decode_from: Literal["policy", "idm"] = "policy"
    """Fit decoders on the last hidden layer of the latent policy, of which its latent is a linear
    map, or on the IDM's z_t (the paper). LAOM (arXiv 2502.00379) decodes LAPO here from both."""
    match_std: bool = True
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


# --- networks -------------------------------------------------------------------------------------


class RegressionDecoder(nn.Module):
    """Latent action, or the policy's hidden layer -> true action; hidden layers of 192, 128, 64
    (official code, for Procgen).
    """

    def __init__(self, z_dim, num_actions):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(z_dim, 192),
            nn.ReLU(),
            nn.Linear(192, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, num_actions),
        )
        self.register_buffer("mean", torch.zeros(z_dim))  # the input is standardized
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


# --- decoding -------------------------------------------------------------------------------------


def fit(network, inputs_at, actions, steps, batch_size, lr, generator):
    """Regresses actions float32 (N, A) from the inputs that inputs_at() returns for int64 (B,) of
    0 .. N - 1.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    batch_size = min(batch_size, len(actions))
    for _ in range(steps):
        batch = torch.randint(len(actions), (batch_size,), generator=generator)
        inputs = inputs_at(batch)
        loss = F.mse_loss(network(inputs), actions[batch].to(inputs.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def read_labels(store, name):
    """float32 (R, A): the label of this name of each row of a FrameStore; None if the label files
    have none.
    """
    labels = []
    for path in store.paths:
        common.read_actions(path)  # checks the file
        shard = common.load_npz(common.labels_path(path))
        if name not in shard:
            return None
        labels.append(torch.from_numpy(shard[name]))
    return torch.cat(labels)


@torch.no_grad()
def r2(network, inputs, actions):
    """R^2 of a network's actions, mean over their dimensions, on held-out inputs (N, ...)."""
    guesses = in_batches(network, inputs).clamp(-1, 1)
    actions = actions.to(guesses.device)
    residual = (guesses - actions).square().mean(0) / actions.var(0, correction=0)
    return 1 - residual.mean().item()


class Frames(NamedTuple):
    """What networks are fitted and judged on. Inputs are those of decoders, decoder_inputs()."""

    train: common.FrameStore
    actions: torch.Tensor  # float32 (R, A), of each row of `train`
    unlabelled_obs: torch.Tensor  # (n, S, S, 3), of all shards of `train`
    unlabelled_inputs: torch.Tensor  # (n, 256) or (n, Z)
    test_obs: torch.Tensor  # (m, S, S, 3), held out
    test_inputs: torch.Tensor  # (m, 256) or (m, Z)
    test_actions: torch.Tensor  # (m, A)


def decoder_inputs(encoder, store, rows, args):
    """What decoders are fitted on, at rows (n,) of a FrameStore: the policy's hidden layer (n, 256)
    or the IDM's z (n, Z).
    """
    if args.decode_from == "policy":
        return in_batches(encoder, store.frames_at(rows))
    return store.z_at(rows)


def load_frames(args, checkpoint, encoder, device):
    where = (checkpoint["context"], device, checkpoint["dynamics_id"])
    train = common.FrameStore(args, "train", *where, args.pool_frames)
    test = common.FrameStore(args, "test", *where)
    if len(train.rows) < max(args.labels):
        rows = f"{len(train.rows)} labelled rows, fewer than {max(args.labels)}"
        common.fail(f"{train.folder} has {rows}")
    unlabelled_rows = train.rows[:: max(1, len(train.rows) // UNLABELLED_FRAMES)]
    test_rows = test.rows[torch.randperm(len(test.rows))[:TEST_FRAMES]]
    return Frames(
        train=train,
        actions=read_labels(train, "action"),
        unlabelled_obs=train.frames_at(unlabelled_rows),
        unlabelled_inputs=decoder_inputs(encoder, train, unlabelled_rows, args),
        test_obs=test.frames_at(test_rows),
        test_inputs=decoder_inputs(encoder, test, test_rows, args),
        test_actions=read_labels(test, "action")[test_rows],
    )


def fit_decoder(encoder, frames, rows, args, generator):
    """A RegressionDecoder, fitted on the labels of these rows of `frames.train`."""
    decoder = RegressionDecoder(frames.unlabelled_inputs.shape[1], frames.actions.shape[1])
    decoder.mean.copy_(frames.unlabelled_inputs.mean(0))
    decoder.std.copy_(frames.unlabelled_inputs.std(0) + 1e-6)
    decoder.to(frames.train.device)
    inputs = decoder_inputs(encoder, frames.train, rows, args)
    fit(
        decoder,
        lambda batch: inputs[batch],
        frames.actions[rows],
        steps=args.decoder_steps,
        batch_size=args.batch_size,
        lr=args.decoder_lr,
        generator=generator,
    )
    return decoder


def fit_clone(config, frames, rows, args, steps, lr, generator):
    """A network like the latent policy that predicts the true actions of these rows of
    `frames.train` from o_t alone.
    """
    clone = LatentPolicy(**config | dict(z_dim=frames.actions.shape[1]))
    clone.to(frames.train.device, memory_format=torch.channels_last)
    fit(
        clone,
        lambda batch: frames.train.frames_at(rows[batch]),
        frames.actions[rows],
        steps=steps,
        batch_size=args.batch_size,
        lr=lr,
        generator=generator,
    )
    return clone


def play(network, recording, args, device):
    """Mean return of args.episodes whole episodes, from the same starting states for each network:
    obs uint8 (B, S, S, 3) -> actions (B, A).
    """

    def act(obs):
        return network(torch.from_numpy(obs).to(device)).cpu().numpy()

    seed = common.derive_seed(args.seed, "decode dmc")
    return mean_return(recording, act, args.episodes, seed)


def fit_and_play(method, encoder, checkpoint, frames, args):
    """A network for each number of labels and each seed. Returns arrays [L, seeds], where L is 1
    for bc_all: mean returns; policy_r2 on held-out frames; and of LAPO's decoders r2 on what
    they are fitted on.
    """
    device = frames.train.device
    counts = args.labels
    clone_flags = dict(steps=args.decoder_steps, lr=args.decoder_lr)
    if method == "bc_all":
        counts = [len(frames.train.rows)]
        clone_flags = dict(steps=args.clone_steps, lr=args.clone_lr)
    shape = (len(counts), args.decoder_seeds)
    results = dict(returns=np.zeros(shape), policy_r2=np.zeros(shape))
    if method == "lapo":
        results["r2"] = np.zeros(shape)
    bar = common.progress_bar(len(counts) * args.decoder_seeds, "policy", method)
    for i, seed in np.ndindex(shape):
        # draw the frames to label; more labels contain the fewer ones of the same seed
        generator = torch.Generator().manual_seed(common.derive_seed(args.seed, seed))
        torch.manual_seed(common.derive_seed(args.seed, f"weights {seed}"))
        order = torch.randperm(len(frames.train.rows), generator=generator)
        rows = frames.train.rows[order[: counts[i]]]
        # fit a network obs -> action to them
        if method == "lapo":
            decoder = fit_decoder(encoder, frames, rows, args, generator)
            results["r2"][i, seed] = r2(decoder, frames.test_inputs, frames.test_actions)
            network = nn.Sequential(encoder, decoder)
        else:
            config = checkpoint["config"]
            network = fit_clone(config, frames, rows, args, **clone_flags, generator=generator)
        # judge it on held-out frames
        network.requires_grad_(False)
        results["policy_r2"][i, seed] = r2(network, frames.test_obs, frames.test_actions)
        # undo the shrinking of actions by regression
        if args.match_std:
            decoded = in_batches(network, frames.unlabelled_obs)
            network = nn.Sequential(network, MatchStd(decoded, frames.actions[rows].to(device)))
        # play whole episodes
        results["returns"][i, seed] = play(network, checkpoint["recording"], args, device)
        bar.update()
    bar.close()
    return results


# --- results --------------------------------------------------------------------------------------


def earlier_results(output, settings):
    """Arrays of other methods that an earlier run wrote, if they are comparable to this one's."""
    if not output.exists():
        return {}
    results = common.load_npz(output)
    found = results.pop("settings")
    same = found.get("dynamics_id") == settings["dynamics_id"]
    for flag in ("seed", *SAME_FLAGS):
        same &= found.get("args", {}).get(flag) == settings["args"][flag]
    return results if same else {}


def untrained_returns(path, settings):
    """Returns [L, seeds] of the chain on an untrained IDM."""
    control = common.load_npz(path, ["returns"])
    for flag in SAME_FLAGS:
        found = control["settings"].get("args", {}).get(flag)
        wanted = settings["args"][flag]
        if found != wanted:
            flag = flag.replace("_", "-")
            common.fail(f"--{flag} is {wanted}, but {path} has {found}")
    return control["returns"]


def plot_and_print(output, results, recording, args):
    curves = {}
    for name, label in CURVES.items():
        if name in results:
            shape = (len(args.labels), results[name].shape[1])  # bc_all has one row
            curves[label] = (args.labels, np.broadcast_to(results[name], shape))
    references = {
        "expert": recording["expert_return"],
        "random actions": recording["random_return"],
        "mean action": float(results["mean_return"]),
    }
    common.plot_returns(
        output.with_suffix(".png"),
        title=f"{args.game}, decoded offline: mean and std of {args.decoder_seeds} decoders",
        xlabel="labelled frames",
        curves=curves,
        references=references,
    )
    print(f"{'labels':46}" + "".join(f"{count:8}" for count in args.labels))
    for label, (_, returns) in curves.items():
        print(f"{label:46}" + "".join(f"{mean:8.1f}" for mean in returns.mean(1)))
    for name, values in results.items():
        if "r2" in name:
            print(f"{name:46}" + "".join(f"{mean:8.2f}" for mean in values.mean(1)))
    print("mean returns:", ", ".join(f"{name} {value:.1f}" for name, value in references.items()))


def main(args):
    device = common.pick_device(args)
    pick_renderer()
    torch.manual_seed(args.seed)
    run = args.runs_dir / args.game
    output = run / "decode_dmc.npz"
    checkpoint, policy = load_policy(run, args.game, device)
    recording = checkpoint["recording"]
    settings = dict(
        recording=recording,
        args=vars(args) | dict(labels=list(args.labels)),
        dynamics_id=checkpoint["dynamics_id"],
    )
    common.lock(output)
    results = earlier_results(output, settings)
    control = args.untrained_dir / args.game / output.name
    if control.exists() and control != output:
        results["returns_untrained"] = untrained_returns(control, settings)

    # --- data: all frames in memory with their true actions, and held-out ones to judge on
    encoder = HiddenLayer(policy) if args.decode_from == "policy" else policy  # at play
    frames = load_frames(args, checkpoint, encoder, device)
    print(
        f"stage 3, offline: {', '.join(args.methods)} on {args.game} on {device}, "
        f"{args.decoder_seeds} seeds of {len(args.labels)} numbers of labels"
    )

    # --- the control that does not look: one action for all frames
    results["labels"] = np.array(args.labels)
    mean_action = frames.actions[frames.train.rows].mean(0)
    unseen = recording | dict(frame_size=0)
    results["mean_return"] = play(
        lambda obs: mean_action.expand(len(obs), -1), unseen, args, device
    )

    # --- fit and play: for each method a network for each number of labels and each seed
    for method in args.methods:
        ending = "" if method == "lapo" else f"_{method}"
        arrays = fit_and_play(method, encoder, checkpoint, frames, args)
        results |= {f"{name}{ending}": array for name, array in arrays.items()}
        common.save_npz(output, settings, **results)
    plot_and_print(output, results, recording, args)
    print(f"results: {output} and .png")
    common.print_next("-m continuous_control.decode_dmc_online", args)


if __name__ == "__main__":
    common.run(main, Args)
