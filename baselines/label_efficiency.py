"""Baselines: other ways to use the same N labels as decode_offline.py (not in the paper).

bc          clones the N labelled frames alone: what the video adds is the difference to this
vpt         an IDM fitted on N labelled windows labels all frames to clone (Baker et al. 2022)
lapo_plus   the decoder labels every stored z_t, a policy clones that (arXiv 2602.02762)
bc_all      clones all frames with their true labels: the ceiling, one policy for each seed

Policies are the latent policy's network with 15 outputs: one for each N and seed, 50 a method at
the defaults. Those that clone all frames share minibatches, a sixth of stage 2's. Labelled rows,
held-out rows, games and numbers of episodes are those of decode_offline.py.

reads   data/<game>/{train,test}/frames_NNN.npz, labels_NNN.npz, runs/<game>/latent_policy.pt,
        {train,test}/latents_NNN.npz and, if there, decode_offline.npz, also of --untrained-dir
writes  runs/<game>/decode_offline.npz (adds returns_<method>, policy_accuracy_<method>, for vpt and
        lapo_plus accuracy_<method>: of what labels the frames, and returns_untrained), and .png

paper scale   python -m baselines.label_efficiency --game bigfish --methods bc vpt lapo_plus
on a CPU      python -m baselines.label_efficiency --game miner --methods bc --labels 16 64 256 1024
                  --decoder-seeds 3 --labelled-steps 300 --clone-lr 1e-3
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import common  # before torch
import decode_offline
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from decode_offline import ActionDecoder, LatentPolicy, fit_decoder, load_labelled, sample_actions
from train_latent_dynamics import IDM, in_batches

CURVES = {  # arrays of decode_offline.npz and their names in the plot
    "returns": "LAPO: decoder on the latent policy",
    "returns_bc": "BC: clones the labelled frames alone",
    "returns_vpt": "VPT: an IDM labels all frames to clone",
    "returns_lapo_plus": "LAPO+: the decoder labels all frames to clone",
    "returns_bc_all": "BC: clones all true labels",
    "returns_untrained": "LAPO with an untrained IDM",
}
Method = Literal["bc", "vpt", "lapo_plus", "bc_all"]


@dataclass
class Args(decode_offline.Args):
    pool_frames: int = 1_000_000
    """Frames in memory at once (12 KB each at 64x64); more than that on disk are streamed."""
    methods: tuple[Method, ...] = ("bc", "vpt", "lapo_plus", "bc_all")
    """What to compare; described at the top of the script."""
    untrained_dir: Path = Path("runs/untrained")
    """If <untrained-dir>/<game>/decode_offline.npz is there (stage 1 with --grad-steps 0, and the
    rest of the chain), its returns stand beside the others."""
    labelled_steps: int = 1000
    """bc's policy and vpt's IDM: updates on the labelled frames, smoothed as the decoder's."""
    clone_steps: int = 10_000
    """vpt, lapo_plus, bc_all: updates on all frames (stage 2: 60,000, for a single policy)."""
    clone_batch_size: int = 128
    """Frames per update (A.4); on labelled frames, no more than there are."""
    clone_lr: float = 2e-4
    """Peak learning rate of Adam (A.4); the schedule is stage 2's in proportion."""


# --- training -------------------------------------------------------------------------------------


def load_windows(frames_dir, latents_dir, dynamics, game, context, rows, size):
    """uint8 (n, k + 2, S, S, 3): o_{t-k} .. o_{t+1} of the rows int [n] of load_labelled()."""
    paths, start = decode_offline.labelled_shards(frames_dir), 0
    windows = np.empty((len(rows), context + 2, size, size, 3), np.uint8)
    where = dict(game=game, context=context, latents_dir=latents_dir, dynamics=dynamics)
    for _, obs, valid, _, _ in common.read_ahead(paths, **where):
        places = np.flatnonzero(valid)
        here = (start <= rows) & (rows < start + len(places))
        windows[here] = obs[places[rows[here] - start][:, None] + np.arange(-context, 2)]
        start += len(places)
    return torch.from_numpy(windows)


def train(networks, draw, steps, lr, label_smoothing, description):
    """Trains each network by cross entropy, as if it were alone, on draw(): a list of inputs and
    targets, int64 (B,) or probabilities (B, 15), of each network.
    """
    weights = [weight for network in networks for weight in network.parameters()]
    optimizer = torch.optim.Adam(weights, lr, fused=True)
    ramp = ([0, steps / 60, steps], [0.01, 1.0, 0.0])  # stage 2: 1000 of 60,000 updates of warm-up
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: float(np.interp(i, *ramp)))
    bar = common.progress_bar(steps, "step", description)
    for _ in range(steps):
        optimizer.zero_grad()
        for network, (inputs, target) in zip(networks, draw(), strict=True):
            logits = network(inputs)
            F.cross_entropy(logits, target, label_smoothing=label_smoothing).backward()
        optimizer.step()
        schedule.step()
        bar.update()
    bar.close()


def draw_labelled(inputs, actions, num_labels, batch_size, device, generator):
    """Of the first num_labels[d] rows of seed d % seeds for network d: inputs (seeds, N, ...) are
    o_t for policies or windows for IDMs; actions int64 (seeds, N).
    """
    batches = []
    for d, count in enumerate(num_labels):
        rows = torch.randint(count, (min(batch_size, count),), generator=generator)
        batches.append([x[d % len(x), rows].to(device) for x in (inputs, actions)])
    return batches


@torch.no_grad()
def draw_soft_labels(store, networks, batch_size, from_z):
    """o_t and, for policy d, probabilities of actions (B, 15) by network d: an IDM of windows or a
    decoder of z_t. A clone of the most probable actions alone would never play the others where the
    window does not determine the action; LAPO's decoder, which is sampled, plays them.
    """
    rows = store.draw(batch_size)
    obs, inputs = store.frames_at(rows), store.z_at(rows) if from_z else store.windows_at(rows)
    return [(obs, network(inputs).softmax(-1)) for network in networks]


def draw_true_labels(store, actions, num_policies, batch_size):
    """o_t and the true actions int64 (B,) for each policy; actions: {path of a shard: uint8 [N]}"""
    rows = store.draw(batch_size)
    places = zip((rows // store.slot_rows).tolist(), (rows % store.slot_rows).tolist())
    target = [int(actions[store.paths[slot]][row]) for slot, row in places]
    return [(store.frames_at(rows), torch.tensor(target, device=store.device))] * num_policies


# --- judging, as decode_offline.py does -----------------------------------------------------------


@torch.no_grad()
def accuracies(networks, inputs, true_actions, game):
    """[D]: each network's accuracy on held-out inputs (N, ...), actions of equal effect merged."""
    outputs = [in_batches(network, inputs) for network in networks]
    guesses = common.distinct_actions(game)[torch.stack(outputs).argmax(-1).cpu().numpy()]
    return (guesses == true_actions).mean(1)


def play(policies, settings, args, device):
    """[D]: each policy's mean return."""
    generator = torch.Generator(device).manual_seed(args.seed)

    def act(obs):
        parts = torch.from_numpy(obs).to(device).chunk(len(policies))
        logits = torch.cat([policy(part) for policy, part in zip(policies, parts)])
        return sample_actions(logits, generator).cpu().numpy()

    seed = common.derive_seed(args.seed, "decode offline")
    envs = common.ProcgenEnvs(settings, len(policies) * args.envs_per_decoder, seed)
    quota = -(-args.episodes // args.envs_per_decoder)
    return common.evaluate(envs, act, quota).reshape(len(policies), -1).mean(1)


def main(args):
    device = common.pick_device(args.device)
    common.check_game(args.game)
    if min(args.labels) < 1:
        common.fail(f"--labels {min(args.labels)}: a decoder needs at least one")
    data, run, game = args.data_dir / args.game, args.runs_dir / args.game, args.game
    checkpoint = common.load_checkpoint(run / "latent_policy.pt", "latent_policy", game)
    size, multiplier, k = (checkpoint[name] for name in ("frame_size", "multiplier", "context"))
    settings, stamp = checkpoint["settings"], checkpoint["dynamics"]
    seeds, num_actions = args.decoder_seeds, common.NUM_ACTIONS

    # --- results so far: LAPO's, and of methods that were run before
    results = run / "decode_offline.npz"
    arrays = {name: settings[name] for name in ("random_return", "expert_return")}
    arrays["labels"], saved = np.array(args.labels), settings | asdict(args) | {"dynamics": stamp}
    if results.exists():
        arrays = common.load_npz(results)
        saved = arrays.pop("settings")
        if saved.get("dynamics", stamp) != stamp:
            common.fail(f"{results} is of another run of stage 1; repeat decode_offline.py")
        found = dict(labels=tuple(arrays["labels"].tolist()), seed=saved["seed"])
        for flag, value in found.items():
            if value != getattr(args, flag):
                common.fail(f"--{flag} is {getattr(args, flag)}, but {results} has {value}")
    control = args.untrained_dir / game / results.name
    if control.exists():
        untrained = common.load_npz(control, ("labels", "returns"))
        if untrained["labels"].tolist() != list(args.labels):
            common.fail(f"--labels is {args.labels}, but {control} has {untrained['labels']}")
        arrays["returns_untrained"] = untrained["returns"]

    # --- data: the labelled rows of each seed and the held-out rows, both as in decode_offline.py
    z, actions = load_labelled(data / "train", run / "train", stamp)
    if len(z) < (most := max(args.labels)):
        common.fail(f"{data / 'train'} has {len(z)} labelled rows, fewer than {most}")

    def draw_rows(seed):
        generator = torch.Generator().manual_seed(common.derive_seed(args.seed, f"labels {seed}"))
        return torch.randperm(len(z), generator=generator)[:most], generator

    def new(network, count, *sizes):
        networks = [network(*sizes) for _ in range(count)]
        return [network.to(device, memory_format=torch.channels_last) for network in networks]

    rows = torch.stack([draw_rows(seed)[0] for seed in range(seeds)])  # (seeds, N)
    if {"bc", "vpt"} & set(args.methods):  # 300 MB for each seed, with 8,192 labels at 64x64
        where = (data / "train", run / "train", stamp, game, k)
        windows = load_windows(*where, rows.flatten().numpy(), size).unflatten(0, rows.shape)
    test = common.FrameStore(args, "test", k, device, stamp)
    test_rows = test.draw(4096)
    test_windows, test_z = test.windows_at(test_rows), test.z_at(test_rows)
    judged_on = common.true_actions_to_report_on(test, test_rows), game
    if judged_on[0] is None:
        common.fail(f"{test.folder} lacks labels_NNN.npz, on which methods are judged")

    # --- train and judge; of the networks 0, 1, .. of a method, network d has seed d % seeds
    num_labels = [count for count in args.labels for _ in range(seeds)]
    paths = common.list_shards(data / "train") if "bc_all" in args.methods else []
    all_actions = {path: common.read_actions(path) for path in paths}
    on_labels = args.labelled_steps, args.clone_lr, args.label_smoothing
    on_all, batch, store = (args.clone_steps, args.clone_lr, 0.0), args.clone_batch_size, None
    for method in args.methods:
        print(f"{method} on {game}: {seeds} seeds, labels {args.labels}, on {device}")
        torch.manual_seed(args.seed)  # the policies of all methods start from the same weights
        count, result = seeds if method == "bc_all" else len(num_labels), {}
        policies = new(LatentPolicy, count, size, multiplier, num_actions)
        generator = torch.Generator().manual_seed(args.seed)
        labelled = actions[rows], num_labels, batch, device, generator
        store = None  # releases its memory; a new one draws the same frames for each method
        if method != "bc":
            store = common.FrameStore(args, "train", k, device, stamp, args.pool_frames)
        if method == "vpt":
            labellers, inputs = new(IDM, count, size, k, multiplier, num_actions), test_windows
            train(labellers, lambda: draw_labelled(windows, *labelled), *on_labels, "vpt's IDMs")
        if method == "lapo_plus":
            labellers, inputs = new(ActionDecoder, count, z.shape[1]), test_z
            for d, decoder in enumerate(labellers):
                some, decoder_generator = draw_rows(d % seeds)
                few = [x[some[: num_labels[d]]].to(device) for x in (z, actions)]
                decoder.mean.copy_(z.mean(0)), decoder.std.copy_(z.std(0) + 1e-6)
                fit_decoder(decoder, *few, args, decoder_generator)
        if method in ("vpt", "lapo_plus"):
            result["accuracy"] = accuracies(labellers, inputs, *judged_on)
        draw = dict(
            bc=lambda: draw_labelled(windows[:, :, k], *labelled),
            vpt=lambda: draw_soft_labels(store, labellers, batch, from_z=False),
            lapo_plus=lambda: draw_soft_labels(store, labellers, batch, from_z=True),
            bc_all=lambda: draw_true_labels(store, all_actions, count, batch),
        )[method]
        train(policies, draw, *(on_labels if method == "bc" else on_all), method)
        result["policy_accuracy"] = accuracies(policies, test_windows[:, k], *judged_on)
        result["returns"] = play(policies, settings, args, device)

        # --- save and draw after each method, then print
        for name, values in result.items():  # [L, seeds]; of bc_all [seeds]
            arrays[f"{name}_{method}"] = values if method == "bc_all" else values.reshape(-1, seeds)
        saved[f"settings_{method}"] = asdict(args)
        common.save_npz(results, saved, **arrays)
        shown = {}
        for name in (name for name in CURVES if name in arrays):
            shape = len(args.labels), arrays[name].shape[-1]
            shown[CURVES[name]] = args.labels, np.broadcast_to(arrays[name], shape)
        lines = {"expert": arrays["expert_return"], "random policy": arrays["random_return"]}
        if "blind_return" in arrays:
            lines["blind policy"] = float(arrays["blind_return"])
        title = f"{game}, few labels: mean and std over seeds"
        decode_offline.plot(run / "decode_offline.png", title, "labelled frames", shown, lines)
        for name, values in result.items():
            print(f"{method} {name}: {values.reshape(-1, seeds).mean(1).round(3)}")
    print(f"{'mean return with N labels':46}" + "".join(f"{count:8}" for count in args.labels))
    for name, (_, values) in shown.items():
        print(f"{name:46}" + "".join(f"{x:8.2f}" for x in values.mean(1)))
    print(", ".join(f"{name} {value:.2f}" for name, value in lines.items()))
    print(f"results: {results} and .png")


if __name__ == "__main__":
    main(tyro.cli(Args))
