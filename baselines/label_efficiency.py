r"""Baselines: other ways to use the same N labels as decode_offline.py (not in the paper).

bc          clones the N labelled frames alone: LAPO's advantage over it is what the video adds
vpt         an IDM trained on N labelled windows labels all frames to clone (Baker et al. 2022)
lapo_plus   the offline decoder labels all z_t, a policy clones that (arXiv 2602.02762)
bc_all      clones all frames with their true labels, one policy for each seed

A policy is the latent policy's network with 15 outputs. There is one for each N and seed: 50 for
each method at the defaults, which is why those that clone all frames get a sixth of stage 2's
updates, and share minibatches. Labelled rows, held-out rows, games and numbers of episodes are
those of decode_offline.py.

reads   data/<game>/{train,test}/frames_NNN.npz, labels_NNN.npz, runs/<game>/latent_policy.pt (sizes
        alone), {train,test}/latents_NNN.npz
writes  runs/<game>/label_efficiency_<method>.npz: labels [L]; returns, policy_accuracy and, of the
        network that labels frames for vpt and lapo_plus, accuracy, each [L, D] for D seeds. For
        bc_all, L is 1, and labels is the number of frames.

Run it as a module, in the folder of the project:
paper scale   python -m baselines.label_efficiency --game bigfish --methods bc vpt lapo_plus
on a CPU      python -m baselines.label_efficiency --game miner --methods bc \
                  --labels 16 64 256 1024 --decoder-seeds 3 --labelled-steps 300 --clone-lr 1e-3
"""

import functools
from dataclasses import dataclass
from typing import Literal

import common  # before torch
import decode_offline
import numpy as np
import torch
import torch.nn.functional as F
from decode_offline import LatentPolicy, draw_labels, fit_decoders, judge, load_held_out
from decode_offline import load_labelled, play
from train_latent_dynamics import IDM, in_batches

Method = Literal["bc", "vpt", "lapo_plus", "bc_all"]


@dataclass
class Args(decode_offline.Args):
    pool_frames: int = 1_000_000
    """Frames in memory (12 KB each at 64x64); if there are more on disk, they are streamed."""
    methods: tuple[Method, ...] = ("bc", "vpt", "lapo_plus", "bc_all")
    """What to compare; described at the top of the script."""
    labelled_steps: int = 1000
    """Updates of bc's policies and vpt's IDMs, with the decoder's label smoothing."""
    clone_steps: int = 10_000
    """Updates of vpt, lapo_plus and bc_all on all frames (stage 2: 60,000, for a single policy)."""
    clone_batch_size: int = 128
    """Frames per update (A.4); of labelled frames, at most as many as there are."""
    clone_lr: float = 2e-4
    """Peak learning rate of Adam (A.4); its schedule is stage 2's, scaled to the updates."""


# --- data -----------------------------------------------------------------------------------------


def open_train_frames(checkpoint, args, device):
    """A FrameStore; each one draws the same frames in the same order."""
    where = (args, "train", checkpoint["context"], device, checkpoint["dynamics_id"])
    return common.FrameStore(*where, args.pool_frames)


def load_held_out_windows(checkpoint, args, device):
    """uint8 (N, k + 2, S, S, 3): the windows around the frames of load_held_out()."""
    test = common.FrameStore(args, "test", checkpoint["context"], device)
    return test.windows_at(test.draw(decode_offline.TEST_FRAMES))


def load_labelled_windows(train, actions, args):
    """Windows uint8 (n, k + 2, S, S, 3) and true actions (n,) for each number of labels and each
    seed: of the rows that decode_offline.py draws, and in the order of its decoders. train,
    actions: of decode_offline.load_labelled().
    """
    of_seed = []  # 300 MB each, with 8,192 labels at 64x64
    for seed in range(args.decoder_seeds):
        rows = draw_labels(len(actions), max(args.labels), args, seed)
        windows = train.windows_at(train.rows[rows]).cpu()
        of_seed.append((windows, actions[rows]))
    labelled = []
    for count in args.labels:
        for windows, targets in of_seed:  # more labels contain the fewer ones, which come first
            labelled.append((windows[:count], targets[:count]))
    return labelled


# --- training -------------------------------------------------------------------------------------


def new_networks(network_class, count, device, **config):
    networks = []
    for _ in range(count):
        network = network_class(**config)
        networks.append(network.to(device, memory_format=torch.channels_last))
    return networks


def train(networks, draw, steps, lr, label_smoothing, description):
    """Trains each network by cross entropy, as if it were alone. draw() returns a minibatch for
    each network: inputs (B, ...) and targets, int64 (B,) or probabilities (B, 15).
    """
    weights = []
    for network in networks:
        weights += network.parameters()
    optimizer = torch.optim.Adam(weights, lr, fused=True)
    # stage 2's schedule, whose learning rate rises in the first 1000 of 60,000 updates
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: float(np.interp(step, [0, steps / 60, steps], [0.01, 1, 0]))
    )
    bar = common.progress_bar(steps, "step", description)
    for _ in range(steps):
        # the gradient of each network, from its own minibatch
        optimizer.zero_grad()
        for network, (inputs, target) in zip(networks, draw(), strict=True):
            logits = network(inputs)
            F.cross_entropy(logits, target, label_smoothing=label_smoothing).backward()
        # one step of Adam for all of them
        optimizer.step()
        schedule.step()
        bar.update()
    bar.close()


def train_on_labelled(networks, labelled, args, device, description):
    """Trains network d on labelled[d]: inputs (n, ...) and true actions (n,)."""
    generator = torch.Generator().manual_seed(args.seed)

    def draw():
        minibatches = []
        for inputs, actions in labelled:
            batch_size = min(args.clone_batch_size, len(actions))
            rows = torch.randint(len(actions), (batch_size,), generator=generator)
            minibatches.append((inputs[rows].to(device), actions[rows].to(device)))
        return minibatches

    steps = args.labelled_steps
    train(networks, draw, steps, args.clone_lr, args.label_smoothing, description)


@torch.no_grad()
def soft_labels(obs, labellers, inputs):
    """o_t (B, S, S, 3) and, for policy d, probabilities of actions (B, 15) by labeller d. A clone
    of the most probable actions alone would never play the others where inputs do not determine
    the action; LAPO's decoder, whose actions are sampled, plays them.
    """
    return [(obs, labeller(inputs).softmax(-1)) for labeller in labellers]


class TrueActions:
    """The true actions of the frames that a FrameStore has in memory."""

    def __init__(self, store):
        self.store = store
        self.paths = []

    def at(self, rows):
        """int64 (B,): a_t"""
        if self.paths != self.store.paths:  # draw() has loaded the next shards
            self.paths = self.store.paths
            actions = np.concatenate([common.read_actions(path) for path in self.paths])
            self.actions = torch.from_numpy(actions).long()
        return self.actions[rows].to(self.store.device)


def train_bc(policies, labelled, checkpoint, args, device):
    """Policy d clones the frames o_t of labelled[d], see load_labelled_windows()."""
    labelled_frames = []
    for windows, actions in labelled:
        o_t = windows[:, checkpoint["context"]]
        labelled_frames.append((o_t, actions))
    train_on_labelled(policies, labelled_frames, args, device, "bc")


def train_vpt(policies, idms, labelled, checkpoint, args, device):
    """IDM d learns from labelled[d]; policy d clones all frames as IDM d labels their windows."""
    train_on_labelled(idms, labelled, args, device, "vpt's IDMs")
    store = open_train_frames(checkpoint, args, device)

    def draw():
        rows = store.draw(args.clone_batch_size)
        return soft_labels(store.frames_at(rows), idms, store.windows_at(rows))

    train(policies, draw, args.clone_steps, args.clone_lr, 0.0, "vpt")


def train_lapo_plus(policies, decoders, checkpoint, args, device):
    """Policy d clones all frames as decoder d labels their z_t."""
    store = open_train_frames(checkpoint, args, device)

    def draw():
        rows = store.draw(args.clone_batch_size)
        return soft_labels(store.frames_at(rows), decoders, store.z_at(rows))

    train(policies, draw, args.clone_steps, args.clone_lr, 0.0, "lapo_plus")


def train_bc_all(policies, checkpoint, args, device):
    """All policies clone all frames with their true actions; returns the number of frames."""
    store = open_train_frames(checkpoint, args, device)
    true_actions = TrueActions(store)

    def draw():
        rows = store.draw(args.clone_batch_size)
        minibatch = (store.frames_at(rows), true_actions.at(rows))
        return [minibatch] * len(policies)

    train(policies, draw, args.clone_steps, args.clone_lr, 0.0, "bc_all")
    return store.num_frames


# --- judging, as decode_offline.py does -----------------------------------------------------------


@torch.no_grad()
def accuracies(networks, inputs, true_actions, game):
    """[D]: each network's accuracy on held-out inputs (N, ...)."""
    return judge([in_batches(network, inputs) for network in networks], true_actions, game)


def compute_own_logits(policies, obs):
    """Frames uint8 (D * n, S, S, 3) -> logits (D * n, 15), the i-th part by policy i."""
    parts = obs.chunk(len(policies))
    logits = [policy(part) for policy, part in zip(policies, parts, strict=True)]
    return torch.cat(logits)


def print_table(results, args, recording):
    """results: {method: what its file holds}"""
    counts = "".join(f"{count:8}" for count in args.labels)
    print(f"{'mean return with N labels':30}{counts}")
    for method, arrays in results.items():
        name = method
        if method == "bc_all":
            name = f"bc_all ({arrays['labels'][0]:,} labels)"
        means = "".join(f"{mean:8.2f}" for mean in arrays["returns"].mean(1))
        print(f"{name:30}{means}")
    expert = recording["expert_return"]
    random = recording["random_return"]
    print(f"mean returns: expert {expert:.2f}, random {random:.2f}")


def main(args):
    device = common.pick_device(args)
    common.check_game(args.game)
    run = args.runs_dir / args.game
    checkpoint = common.load_checkpoint(run / "latent_policy.pt", "latent_policy", args.game)
    recording = checkpoint["recording"]
    context = checkpoint["context"]
    dynamics_id = checkpoint["dynamics_id"]
    outputs = {method: run / f"label_efficiency_{method}.npz" for method in args.methods}
    for output in outputs.values():
        common.lock(output)

    # --- data: labelled rows, and held-out frames
    train_frames, z, actions = load_labelled(args, context, device, dynamics_id)
    if {"bc", "vpt"} & set(args.methods):
        labelled = load_labelled_windows(train_frames, actions, args)
    test_obs, test_z, test_actions = load_held_out(args, context, device, dynamics_id)

    all_results = {}
    for method, output in outputs.items():
        # --- new networks; the policies of all methods start from the same weights
        torch.manual_seed(args.seed)
        labels = args.labels
        num_networks = len(labels) * args.decoder_seeds
        if method == "bc_all":
            num_networks = args.decoder_seeds
        config = checkpoint["config"] | dict(z_dim=common.NUM_ACTIONS)
        policies = new_networks(LatentPolicy, num_networks, device, **config)
        print(f"{method}: {num_networks} policies of {args.game} on {device}")

        # --- train, and judge on held-out frames
        results = {}
        if method == "bc":
            train_bc(policies, labelled, checkpoint, args, device)
        elif method == "vpt":
            idms = new_networks(IDM, num_networks, device, context=context, **config)
            train_vpt(policies, idms, labelled, checkpoint, args, device)
            test_windows = load_held_out_windows(checkpoint, args, device)
            results["accuracy"] = accuracies(idms, test_windows, test_actions, args.game)
        elif method == "lapo_plus":
            decoders = fit_decoders(z, actions, args, device)
            train_lapo_plus(policies, decoders, checkpoint, args, device)
            results["accuracy"] = accuracies(decoders, test_z, test_actions, args.game)
        else:
            labels = [train_bc_all(policies, checkpoint, args, device)]
        results["policy_accuracy"] = accuracies(policies, test_obs, test_actions, args.game)

        # --- play: each policy has its own games
        compute_logits = functools.partial(compute_own_logits, policies)
        results["returns"] = play(compute_logits, num_networks, recording, args, device)

        # --- save
        for name, values in results.items():
            results[name] = values.reshape(len(labels), args.decoder_seeds)
        results["labels"] = np.array(labels)
        if args.capture_video:  # the first policy with the most labels
            act = common.make_player(policies[-args.decoder_seeds], device, args.seed)
            common.capture_video(output.with_suffix(".gif"), recording, act, args.seed)
        settings = dict(recording=recording, args=vars(args), dynamics_id=dynamics_id)
        common.save_npz(output, settings, **results)
        all_results[method] = results
    print_table(all_results, args, recording)
    print(f"results: {', '.join(map(str, outputs.values()))}")


if __name__ == "__main__":
    common.run(main, Args)
