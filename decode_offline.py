"""Stage 3, offline: decode latent actions with a few labelled frames (paper, sections 4.3 and 6.2, Figure 4).

For each number of labels N and each seed, an action decoder is fitted on (z_t of the IDM, true action), then plays on top
of the frozen latent policy. All decoders are fitted at once and play at once, sharing the policy's forward pass.

--methods sets other ways to use the same N labels beside it (not in the paper), judged in the same way:

bc          a policy cloned from the N labelled frames alone: what the video adds, the other methods must add to this
vpt         an IDM trained on the N labelled windows labels all frames, a policy is cloned from that (Baker et al. 2022)
lapo_plus   LAPO the other way round: the decoder labels every stored z_t, a policy is cloned from that (arXiv 2602.02762)

Their policies are the latent policy's network with 15 outputs, from the same first weights. LAPO pays for its policy once; vpt
and lapo_plus clone a new one for each N and seed from all frames, the N labelled ones with pseudo-labels too. At the defaults
these are 50 policies a method, a sixth of stage 2 each; --clone-steps 60_000 gives each as many updates as LAPO's policy had.
They are trained in step on shared minibatches, labelled as they are drawn, so that no pseudo-label is stored.

reads   runs/<game>/latent_policy.pt, runs/<game>/{train,test}/latents_NNN.npz, data/<game>/{train,test}/labels_NNN.npz,
        data/<game>/test/frames_NNN.npz, and data/<game>/train/frames_NNN.npz for all methods but lapo
writes  runs/<game>/decode_offline.npz, runs/<game>/decode_offline.png

paper scale   python decode_offline.py --game bigfish
all methods   python decode_offline.py --game bigfish --methods lapo bc vpt lapo_plus --labels 16 256 4096 --decoder-seeds 3
CPU sized     python decode_offline.py --game coinrun --labels 16 64 256 1024 --decoder-seeds 3 --episodes 32
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.func import functional_call, stack_module_state, vmap

import common

METHODS = {  # in the order in which they run, with their names in the plot
    "lapo": "LAPO: decoder on top of the latent policy",
    "bc": "BC: cloned from the labelled frames alone",
    "vpt": "VPT style: IDM labels all frames, then cloned",
    "lapo_plus": "LAPO+: decoder labels all frames, then cloned",
}


@dataclass
class Args:
    game: str = "bigfish"
    """One of Procgen's 16 games."""
    seed: int = 1
    """Seeds networks, action sampling and the games themselves."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    data_dir: Path = Path("data")
    """Frames and labels lie in <data-dir>/<game>."""
    runs_dir: Path = Path("runs")
    """Checkpoints, metrics and plots go to <runs-dir>/<game>."""
    vq: bool = True
    """Quantise the latent actions; --no-vq is the paper's ablation (A.2), whose runs go to <runs-dir>/<game>_no_vq."""
    pool_frames: int = 1_000_000
    """Frames held in memory at once (12 KB each at 64x64); more on disk than that are streamed."""

    methods: tuple[Literal["lapo", "bc", "vpt", "lapo_plus"], ...] = ("lapo",)
    """lapo: the paper's; bc: clones the labelled frames alone; vpt, lapo_plus: an IDM or the decoder labels all frames to clone.
    bc, vpt and lapo_plus train a policy for each number of labels and each seed."""
    labels: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    """Numbers of labelled frames (Figure 4)."""
    decoder_seeds: int = 5
    """Decoders or policies for each number of labels; each seed draws its own frames (the paper has 3)."""
    decoder_steps: int = 500
    """Updates of each decoder; many more overfit a few hundred labels (results/LOG.md)."""
    decoder_batch_size: int = 128
    """Labelled frames an update."""
    decoder_lr: float = 1e-3
    """Adam's learning rate for the decoder (official code, online)."""
    label_smoothing: float = 0.05
    """Of the decoder's cross entropy (official code, online)."""
    labelled_steps: int = 1000
    """bc, vpt: updates on the labelled frames alone, of bc's policy and of vpt's IDM; smoothed as the decoder's."""
    clone_steps: int = 10_000
    """vpt, lapo_plus: updates of each policy on all frames; fewer than stage 2's 60,000, as each number and seed costs as many."""
    clone_batch_size: int = 128
    """bc, vpt, lapo_plus: frames an update (stage 2: 128); on labelled frames, no more than there are."""
    clone_lr: float = 2e-4
    """bc, vpt, lapo_plus: Adam's peak learning rate, for policies and vpt's IDM (A.4); the schedule is stage 2's in proportion."""
    episodes: int = 64
    """Episodes that each decoder or policy plays."""
    envs_per_decoder: int = 8
    """Games that each decoder or policy plays at once; each finishes its share of the episodes."""


# --- networks --------------------------------------------------------------------------------------------------------


def to_input(frames):
    """uint8 (B, T, S, S, 3) -> float (B, 3T, S, S) in [-0.5, 0.5], stacked on channels, laid out channels last."""
    b, t, s, _, c = frames.shape
    return frames.permute(0, 2, 3, 1, 4).reshape(b, s, s, t * c).permute(0, 3, 1, 2).float() / 255 - 0.5


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class ImpalaCNN(nn.Module):
    """The convolutions of IMPALA (Espeholt et al. 2018): three times conv, max pool, two residual blocks."""

    def __init__(self, in_channels, frame_size, multiplier):
        super().__init__()
        layers = []
        for channels in (int(16 * multiplier), int(32 * multiplier), int(32 * multiplier)):
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
            layers += [ResidualBlock(channels), ResidualBlock(channels)]
            in_channels = channels
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Flatten())
        self.num_features = channels * (frame_size // 8) ** 2

    def forward(self, x):
        return self.layers(x)  # (B, C, S, S) -> (B, 32 * multiplier * (S / 8)^2)


class LatentPolicy(nn.Module):
    """pi(o_t) -> z_t: an IMPALA-CNN that imitates the latent actions (3,681,920 parameters at paper settings)."""

    def __init__(self, frame_size, multiplier, z_dim):
        super().__init__()
        self.cnn = ImpalaCNN(3, frame_size, multiplier)
        self.hidden = nn.Linear(self.cnn.num_features, 256)
        self.head = nn.Linear(256, z_dim)

    def forward(self, obs):
        """uint8 (B, S, S, 3) -> z (B, Z)"""
        return self.head(F.relu(self.hidden(self.cnn(to_input(obs[:, None])))))


class ActionPolicy(LatentPolicy):
    """pi(o_t) -> logits of the true actions (B, 15): the latent policy's network, with actions in place of z_t."""

    def __init__(self, frame_size, multiplier):
        super().__init__(frame_size, multiplier, common.NUM_ACTIONS)


class IDM(nn.Module):
    """z_t = IDM(o_{t-k} .. o_{t+1}), before quantisation."""

    def __init__(self, frame_size, context, multiplier, z_dim):
        super().__init__()
        self.cnn = ImpalaCNN(3 * (context + 2), frame_size, multiplier)
        self.hidden = nn.Linear(self.cnn.num_features, 256)
        self.head = nn.Linear(256, z_dim)

    def forward(self, windows):
        """uint8 (B, k + 2, S, S, 3) -> z (B, Z)"""
        return self.head(F.relu(self.hidden(self.cnn(to_input(windows)))))


class ActionDecoder(nn.Module):
    """Latent action -> logits of the true actions; hidden layers of 192, 128, 64 (official code)."""

    def __init__(self, z_dim):
        super().__init__()
        sizes = (z_dim, 192, 128, 64)
        layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(64, common.NUM_ACTIONS))
        self.register_buffer("mean", torch.zeros(z_dim))  # z is standardised with the statistics of the latents it was fitted on
        self.register_buffer("std", torch.ones(z_dim))

    def forward(self, z):
        """z (B, Z) -> logits (B, 15)"""
        return self.layers((z - self.mean) / self.std)


# --- decoders, many at once ------------------------------------------------------------------------------------------


class DecoderBank:
    """D action decoders with their weights stacked, so that one call runs them all: z (D, B, Z) -> logits (D, B, 15)."""

    def __init__(self, decoders):
        self.size = len(decoders)
        self.parameters, self.buffers = stack_module_state(decoders)
        self.apply = vmap(lambda parameters, buffers, z: functional_call(decoders[0], (parameters, buffers), (z,)))

    def __call__(self, z):
        return self.apply(self.parameters, self.buffers, z)


def fit_decoders(bank, z, actions, num_labels, steps, batch_size, lr, label_smoothing, generator):
    """Fits decoder d on its first num_labels[d] rows of z (D, N, Z) and actions (D, N), all decoders in step.

    The sum of the decoders' losses keeps them apart: no weight of one enters the loss of another, and Adam works weight
    by weight.
    """
    optimizer = torch.optim.Adam(bank.parameters.values(), lr=lr)
    which = torch.arange(len(z), device=z.device)[:, None]
    for _ in common.track(range(steps), "step", "fit decoders"):
        rows = (torch.rand(len(z), batch_size, device=z.device, generator=generator) * num_labels[:, None]).long()
        logits = bank(z[which, rows])  # (D, B, 15)
        loss = F.cross_entropy(logits.flatten(0, 1), actions[which, rows].flatten(), label_smoothing=label_smoothing) * len(z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def sample_actions(logits, generator):
    """logits (B, A) -> actions int64 (B,), drawn from the softmax."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# --- the other methods: networks trained in step, each as if it were alone -------------------------------------------


def train(networks, batches, steps, lr, label_smoothing, description):
    """Trains D networks by cross entropy in step; no weight of one enters the loss of another, Adam works weight by weight.

    batches: endless; for each update, the inputs and targets of one network after the other, targets int64 (B,) or
    probabilities (B, 15).
    """
    optimizer = torch.optim.Adam([weight for network in networks for weight in network.parameters()], lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # stage 2's, in proportion: 1000 of 60,000 updates of warm-up, then down to 0
        optimizer, lambda step: float(np.interp(step, [0, steps / 60, steps], [0.01, 1.0, 0.0]))
    )
    for _, batch in zip(common.track(range(steps), "step", description), batches):
        optimizer.zero_grad()
        for network, (inputs, target) in zip(networks, batch):  # one at a time: memory holds the activations of one network
            F.cross_entropy(network(inputs), target, label_smoothing=label_smoothing).backward()
        optimizer.step()
        schedule.step()


def labelled_batches(frames, actions, num_labels, batch_size, device, seed):
    """For train(): network d draws from the first num_labels[d] rows of seed d % seeds, as decoder d does.

    frames: uint8 (seeds, N, ...), o_t for a policy or windows for an IDM. actions: int64 (seeds, N). num_labels: int (D,).
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(network, count):
        rows = torch.randint(count, (min(batch_size, count),), generator=generator)
        which = network % len(frames)
        return frames[which, rows].to(device), actions[which, rows].to(device)

    while True:
        yield (draw(network, count) for network, count in enumerate(num_labels.tolist()))


@torch.no_grad()
def soft_labels(network, inputs):
    """The probabilities of the true actions that an IDM or a decoder gives: float (..., 15).

    Not the likeliest action alone: where a window does not tell the action (many do the same in a game), a policy cloned
    from that would always play the commonest, while LAPO's decoder, whose actions are sampled, keeps the expert's mixture.
    """
    return network(inputs).softmax(-1)


def vpt_batches(store, idms, batch_size):
    """For train(): o_t and IDM d's soft labels for policy d; the same windows for all."""
    while True:
        windows = store.sample_windows(batch_size)
        yield ((windows[:, store.context], soft_labels(idm, windows)) for idm in idms)


def lapo_plus_batches(store, bank, batch_size):
    """For train(): o_t and decoder d's soft labels of the stored z_t for policy d; the same frames for all."""
    while True:
        obs, z = store.sample_latents(batch_size)
        yield ((obs, labels) for labels in soft_labels(bank, z.expand(bank.size, -1, -1)))


@torch.no_grad()
def in_batches(model, windows, device, batch_size=512):
    """windows uint8 [N, k + 2, S, S, 3] (numpy) -> the model's outputs, float (N, D) on the CPU"""
    return torch.cat([model(part.to(device)).cpu() for part in torch.from_numpy(windows).split(batch_size)])


# --- data, plot, loop ------------------------------------------------------------------------------------------------


def load_labelled(split_dir, latents_dir, game, dynamics, count, seed, max_shards=16):
    """`count` valid rows of a split, in random order: z float32 [n, Z], action int64 [n], place int64 [n, 2] (shard, row).

    From at most `max_shards` shards spread over the split, so that a small sweep does not read every latent there is.
    """
    paths = common.list_shards(split_dir, "labels", f"python collect_data.py --game {game}")
    z, actions, places = [], [], []
    for shard in np.unique(np.linspace(0, len(paths) - 1, max_shards).astype(int)):
        shard_z, _, valid = common.read_latents(paths[shard], latents_dir, game, dynamics)
        z.append(shard_z[valid])
        actions.append(common.read_labels(paths[shard], game)["action"][valid])
        places.append(np.stack([np.full(valid.sum(), shard), np.flatnonzero(valid)], 1))
    order = np.random.default_rng(seed).permutation(sum(map(len, z)))[:count]
    z, actions, places = (np.concatenate(x)[order] for x in (z, actions, places))
    return z.astype(np.float32), actions.astype(np.int64), places


def load_windows(split_dir, game, context, frame_size, places):
    """o_{t-k} .. o_{t+1} at the places that load_labelled() drew: int64 [n, 2] -> uint8 [n, k + 2, S, S, 3].

    Holds one shard at a time and reads each once. Frames that the latents were not made from end the run.
    """
    paths = common.list_shards(split_dir, "labels", f"python collect_data.py --game {game}")
    windows = np.empty((len(places), context + 2, frame_size, frame_size, 3), np.uint8)
    for shard in np.unique(places[:, 0]):
        path = common.beside(paths[shard], "frames")
        obs, first, _ = common.read_frames(path, game)
        here = places[:, 0] == shard
        rows = places[here, 1]
        if obs.shape[1] != frame_size or rows.max() >= len(obs) or not common.valid_windows(first, context)[rows].all():
            made_by = f"python train_latent_dynamics.py --game {game}"
            common.fail(f"the latents were made from other frames than {path}; make them anew with: {made_by}")
        windows[here] = obs[rows[:, None] + np.arange(-context, 2)]
    return windows


def plot(path, game, labels, returns, random_return, expert_return):
    """Figure 4 for one game: returns {method: float [L, seeds]} against labels int [L]."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for method, of_method in returns.items():
        mean, std = of_method.mean(1), of_method.std(1)
        (line,) = axes.plot(labels, mean, "o-", color=f"C{list(METHODS).index(method)}", label=METHODS[method])
        axes.fill_between(labels, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.axhline(expert_return, color="black", linestyle="--", label=f"expert ({expert_return:.2f})")
    axes.axhline(random_return, color="gray", linestyle=":", label=f"random policy ({random_return:.2f})")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="labelled frames", ylabel="mean episodic return")
    axes.set_title(f"{game}: one latent policy, mean and std over {of_method.shape[1]} decoders")
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    with common.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def main(args):
    common.check_flags(args, shares=("label_smoothing",))
    methods = [method for method in METHODS if method in args.methods]
    device = common.pick_device(args.device)
    common.seed_everything(args.seed)
    data, run = args.data_dir / args.game, common.run_folder(args.runs_dir, args.game, args.vq)
    made_by = f"python train_latent_bc.py --game {args.game}"
    checkpoint = common.load_checkpoint(run / "latent_policy.pt", "latent_policy", args.game, made_by)
    frame_size, multiplier, context = checkpoint["frame_size"], checkpoint["multiplier"], checkpoint["context"]
    policy = LatentPolicy(frame_size, multiplier, checkpoint["z_dim"])
    checkpoint.fill(policy, "model")
    policy = policy.to(device, memory_format=torch.channels_last).eval()

    # each seed draws its own labelled frames, the same for all methods; a larger number of labels contains the smaller ones
    most = max(args.labels)
    dynamics = checkpoint["dynamics"]
    seeds = range(args.seed, args.seed + args.decoder_seeds)
    drawn = [load_labelled(data / "train", run / "train", args.game, dynamics, most, seed) for seed in seeds]
    if len(drawn[0][0]) < most:
        common.fail(f"{data / 'train'} has {len(drawn[0][0])} usable labels in the shards drawn from, fewer than --labels {most}")
    z, actions, places = (torch.from_numpy(np.stack(x)) for x in zip(*drawn))  # (seeds, N, Z), (seeds, N), (seeds, N, 2)
    test_z, test_actions, test_places = load_labelled(data / "test", run / "test", args.game, dynamics, 4096, args.seed)
    test_windows = load_windows(data / "test", args.game, context, frame_size, test_places)
    if {"bc", "vpt"} & set(methods):  # (seeds, N, k + 2, S, S, 3); 300 MB a seed for 8,192 labels at 64x64
        windows = torch.from_numpy(load_windows(data / "train", args.game, context, frame_size, places.flatten(0, 1).numpy()))
        windows = windows.unflatten(0, places.shape[:2])
    random_return = common.random_return(args.game, args.seed, checkpoint["start_level"], checkpoint["num_levels"])
    shard = common.list_shards(data / "train", "labels", f"python collect_data.py --game {args.game}")[0]
    expert_return = float(common.read_labels(shard, args.game)["expert_return"])

    num_labels = torch.tensor(args.labels).repeat_interleave(args.decoder_seeds)  # (D,): network d has seed d % seeds
    num_envs = len(num_labels) * args.envs_per_decoder
    quota = -(-args.episodes // args.envs_per_decoder)
    print(
        f"stage 3, offline: {', '.join(methods)} with {len(args.labels)} numbers of labels x {args.decoder_seeds} seeds on "
        f"{device}, then {quota * args.envs_per_decoder} episodes of {args.game} each in {num_envs} games at once"
    )
    if methods != ["lapo"]:
        on_labels, on_all = (len(num_labels) * len(which & set(methods)) for which in ({"bc", "vpt"}, {"vpt", "lapo_plus"}))
        print(
            f"trains {on_labels} networks for {args.labelled_steps:,} updates on labelled frames, then {on_all} for "
            f"{args.clone_steps:,} on all frames; the latent policy had {checkpoint['grad_step']:,}"
        )

    def new_networks(make):
        """D networks; every method's policies start from the same weights"""
        torch.manual_seed(args.seed)
        return [make().to(device, memory_format=torch.channels_last) for _ in num_labels]

    def play(logits_of):
        """Mean return of each, float (L, seeds), in the same games for every method. logits_of: (D, B, S, S, 3) -> (D, B, 15)"""
        envs = common.HalvedEnvs(
            args.game, num_envs, common.derive_seed(args.seed, "decode offline"),
            checkpoint["start_level"], checkpoint["num_levels"], frame_size, multiple_of=len(num_labels),
        )  # fmt: skip
        generator = torch.Generator(device).manual_seed(args.seed)

        def act(obs):
            obs = common.to_device(obs, device).unflatten(0, (-1, len(num_labels))).transpose(0, 1)  # game i is for network i % D
            return sample_actions(logits_of(obs).transpose(0, 1).flatten(0, 1), generator).cpu()

        return common.evaluate(envs, act, quota).reshape(-1, len(args.labels), args.decoder_seeds, quota).mean((0, 3))

    def share_correct(outputs):
        """logits or probabilities (D, n, 15) of the held-out rows -> share whose likeliest action is the true one, (L, seeds)"""
        correct = outputs.argmax(-1).cpu().numpy() == test_actions
        return correct.mean(-1).reshape(len(args.labels), args.decoder_seeds)

    if {"lapo", "lapo_plus"} & set(methods):
        decoders = [ActionDecoder(checkpoint["z_dim"]) for _ in num_labels]
        for decoder in decoders:  # latents need no labels, so their statistics come from more than the N labelled ones
            decoder.mean.copy_(z.flatten(0, 1).mean(0)), decoder.std.copy_(z.flatten(0, 1).std(0) + 1e-6)
        bank = DecoderBank([decoder.to(device) for decoder in decoders])
        fit_decoders(
            bank, z.to(device).repeat(len(args.labels), 1, 1), actions.to(device).repeat(len(args.labels), 1),  # (D, N, Z), (D, N)
            num_labels.to(device), args.decoder_steps, args.decoder_batch_size, args.decoder_lr,
            args.label_smoothing, torch.Generator(device).manual_seed(args.seed),
        )  # fmt: skip

    # {method: {name: float (L, seeds)}}; both accuracies are on held-out rows: "accuracy" of what labels them and may see o_{t+1}
    # (the decoder from the IDM's z_t, or vpt's IDM; bc has none), "policy_accuracy" of what plays and sees o_t alone
    results = {}
    for method in methods:
        result = results[method] = {}
        if method in ("lapo", "lapo_plus"):
            result["accuracy"] = share_correct(soft_labels(bank, torch.from_numpy(test_z).to(device).expand(bank.size, -1, -1)))
        if method == "lapo":
            predicted_z = in_batches(policy, test_windows[:, context], device).to(device)  # (n, Z)
            result["policy_accuracy"] = share_correct(soft_labels(bank, predicted_z.expand(bank.size, -1, -1)))
            result["returns"] = play(lambda obs: bank(policy(obs.flatten(0, 1)).unflatten(0, obs.shape[:2])))
            continue
        policies = new_networks(lambda: ActionPolicy(frame_size, multiplier))
        if method == "bc":
            batches = labelled_batches(windows[:, :, context], actions, num_labels, args.clone_batch_size, device, args.seed)
            train(policies, batches, args.labelled_steps, args.clone_lr, args.label_smoothing, "bc: policies")
        else:
            store = common.FrameStore(data / "train", args.game, context, args.pool_frames, args.seed, device, run / "train", dynamics)
            if method == "vpt":
                idms = new_networks(lambda: IDM(frame_size, context, multiplier, common.NUM_ACTIONS))
                batches = labelled_batches(windows, actions, num_labels, args.clone_batch_size, device, args.seed)
                train(idms, batches, args.labelled_steps, args.clone_lr, args.label_smoothing, "vpt: IDMs")
                result["accuracy"] = share_correct(torch.stack([in_batches(idm, test_windows, device) for idm in idms]))
                batches = vpt_batches(store, idms, args.clone_batch_size)
            else:
                batches = lapo_plus_batches(store, bank, args.clone_batch_size)
            train(policies, batches, args.clone_steps, args.clone_lr, 0.0, f"{method}: policies")
        outputs = [in_batches(network, test_windows[:, context], device) for network in policies]
        result["policy_accuracy"] = share_correct(torch.stack(outputs))
        result["returns"] = play(lambda obs: torch.stack([network(o) for network, o in zip(policies, obs)]))

    print(f"{'':9} {'labels':>8} {'return':>15} {'normalised':>11} {'accuracy: labels from z or IDM':>31} {'policy from o_t':>16}")
    for method, result in results.items():
        for i, (count, of_count) in enumerate(zip(args.labels, result["returns"])):
            normalized = common.normalize_return(of_count.mean(), random_return, expert_return)
            from_window = f"{result['accuracy'][i].mean():.3f}" if "accuracy" in result else "-"
            print(
                f"{method:9} {count:>8} {of_count.mean():>8.2f} ± {of_count.std():<4.2f} {normalized:>11.2f} {from_window:>31} "
                f"{result['policy_accuracy'][i].mean():>16.3f}"
            )
    print(f"random policy {random_return:.2f}, expert {expert_return:.2f}")
    suffix = {method: "" if method == "lapo" else f"_{method}" for method in methods}
    arrays = {name + suffix[method]: array for method, result in results.items() for name, array in result.items()}
    sizes = {name: checkpoint[name] for name in ("frame_size", "start_level", "num_levels", "multiplier", "z_dim")}
    common.save_npz(
        run / "decode_offline.npz", labels=np.array(args.labels), **arrays,
        random_return=random_return, expert_return=expert_return, settings=json.dumps(asdict(args) | sizes, default=str),
    )  # fmt: skip
    returns = {method: result["returns"] for method, result in results.items()}
    plot(run / "decode_offline.png", args.game, args.labels, returns, random_return, expert_return)
    print(f"results: {run / 'decode_offline.npz'} and .png\nnext: python decode_online_ppo.py --game {args.game}")


if __name__ == "__main__":
    main(tyro.cli(Args))
