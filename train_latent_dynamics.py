"""Stage 1: learn latent actions from video alone (paper, section 4.1).

The inverse dynamics model (IDM) sees o_{t-k} .. o_{t+1} and emits a latent action z_t, which vector quantisation squeezes;
the forward dynamics model (FDM) must predict o_{t+1} from o_{t-k} .. o_t and the quantised z_t. The FDM already knows the
past, so what is worth sending through the bottleneck is what changed: mostly, the agent's action.

reads   data/<game>/{train,test}/frames_NNN.npz (labels only to report how well z_t matches the true actions)
writes  runs/<game>/latent_dynamics.pt, runs/<game>/{train,test}/latents_NNN.npz, runs/<game>/train_latent_dynamics.csv

paper scale   python train_latent_dynamics.py --game bigfish
CPU sized     python train_latent_dynamics.py --game coinrun --multiplier 0.5 --fdm-width 8 --batch-size 64 --lr 1e-3 \\
                  --vq-decay 0.99 --grad-steps 2000
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import common


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
    checkpoint_minutes: float = 5
    """Minutes between two writes of the whole state, from which --resume goes on."""
    resume: bool = False
    """Go on with the run that was stopped or killed, or start where none was; one that is finished stays as it is."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks: fp32, or bf16 by autocast with fp32 weights; auto takes bf16 on a GPU."""
    compile: bool = True
    """On a GPU, compile the networks (torch.compile with CUDA graphs); left aside on a CPU, where it takes minutes, and under torchrun."""
    vq: bool = True
    """Quantise the latent actions; --no-vq is the paper's ablation (A.2), whose runs go to <runs-dir>/<game>_no_vq."""
    pool_frames: int = 1_000_000
    """Frames held in memory at once (12 KB each at 64x64); more on disk than that are streamed."""
    eval_every: int = 2000
    """Gradient steps between reports on held-out episodes."""
    eval_windows: int = 4096
    """Held-out windows to report on, and as many training windows to fit the probe."""

    context: int = 1
    """k: frames before o_t that both models see (A.4: 1)."""
    codebooks: int = 2
    """Codebooks of the quantiser (A.4)."""
    latents_per_codebook: int = 4
    """Discrete latents that share a codebook (A.4)."""
    embeddings: int = 64
    """Embeddings of a codebook (A.4)."""
    embedding_dim: int = 16
    """Numbers of an embedding (A.4); z has codebooks * latents * dim = 128."""
    commitment: float = 0.05
    """Weight of the commitment loss (A.4)."""
    vq_decay: float = 0.999
    """Decay of the codebook's moving averages (A.4)."""
    multiplier: float = 4
    """Multiplies IMPALA's channels 16, 32, 32 (A.4: 4)."""
    fdm_width: int = 24
    """Channels of the U-Net's first block (official code: 24, 7.8M parameters)."""
    predict_change: bool = False
    """The FDM predicts o_{t+1} - o_t, starting from no change; not in the paper, and quicker to learn at small scale."""
    grad_steps: int = 70_000
    """Updates (A.4)."""
    batch_size: int = 128
    """Windows (stage 2: frames) an update (A.4); under torchrun, of each process."""
    lr: float = 2e-4
    """Adam's peak learning rate (A.4)."""
    warmup_steps: int = 50
    """Updates over which the learning rate rises from 10% to its peak; then it falls linearly to 1% (official code)."""
    max_grad_norm: float = 2.0
    """Clips the gradient's norm (official code)."""


# --- networks ------------------------------------------------------------------------------------------------------


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


class EMAVectorQuantizer(nn.Module):
    """Replaces each piece of z by the nearest embedding; embeddings follow their pieces by moving averages (van den Oord
    et al. 2017, appendix A.1). z is C codebooks x E numbers x P positions; the P positions share their codebook.
    """

    def __init__(self, codebooks, positions, embeddings, embedding_dim, decay):
        super().__init__()
        self.shape, self.decay = (codebooks, embedding_dim, positions), decay
        start = torch.empty(codebooks, embeddings, embedding_dim).uniform_(-5 / embeddings, 5 / embeddings)
        self.register_buffer("embedding", start)  # (C, K, E)
        # counts start at 1, as if each embedding had been seen once where it stands: with counts of 0 (official code) the
        # first update divides by almost nothing and the codes explode
        self.register_buffer("count", torch.ones(codebooks, embeddings))  # (C, K)
        self.register_buffer("total", start.clone())  # (C, K, E); embedding = total / count

    def forward(self, z):
        """z (B, C * E * P) -> z_q like z (gradients pass straight through), commitment loss (), codes int64 (B, C * P)"""
        c, e, p = self.shape
        x = z.float().view(-1, c, e, p).permute(1, 0, 3, 2).reshape(c, -1, e)  # (C, B * P, E)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):  # averages move by thousandths: too fine for bf16
            # by differences: by matrix products, codes that lie close together would drown in TF32's rounding
            distance = torch.cdist(x, self.embedding, compute_mode="donot_use_mm_for_euclid_dist")  # (C, B * P, K)
            codes = distance.argmin(-1)  # (C, B * P)
            nearest = self.embedding.gather(1, codes[..., None].expand_as(x))  # with the codebook before its update
            if self.training:
                self.update(x, codes)
        commitment = F.mse_loss(x, nearest)
        z_q = x + (nearest - x).detach()  # straight-through estimator
        z_q = z_q.view(c, -1, p, e).permute(1, 0, 3, 2).reshape(z.shape)
        return z_q, commitment, codes.view(c, -1, p).transpose(0, 1).flatten(1)

    @torch.no_grad()
    def update(self, x, codes):
        """Moves the averages towards x (C, B * P, E), assigned to codes (C, B * P), and revives dead codes."""
        one_hot = F.one_hot(codes, self.embedding.shape[1]).to(x.dtype)  # (C, B * P, K)
        uses, sums, num_pieces = one_hot.sum(1), one_hot.transpose(1, 2) @ x, x.shape[1]  # (C, K), (C, K, E)
        pieces = x[:, torch.randint(x.shape[1], (self.embedding.shape[1],), device=x.device)]  # (C, K, E)
        if torch.distributed.is_initialized():  # the codebooks of all processes follow the pieces of all, and stay the same
            torch.distributed.all_reduce(uses), torch.distributed.all_reduce(sums)
            torch.distributed.broadcast(pieces, src=0)
            num_pieces *= torch.distributed.get_world_size()
        self.count.lerp_(uses, 1 - self.decay)
        self.total.lerp_(sums, 1 - self.decay)
        # a code used ten times less than its fair share restarts on a random piece of this batch, as if it had that share
        fair = num_pieces / self.embedding.shape[1]
        dead = self.count < 0.1 * fair  # (C, K)
        self.count.copy_(torch.where(dead, fair, self.count))
        self.total.copy_(torch.where(dead[..., None], fair * pieces, self.total))
        self.embedding.copy_(self.total / self.count[..., None])

    def lookup(self, codes):
        """codes (B, C * P) -> z_q (B, C * E * P)"""
        c, e, p = self.shape
        codes = codes.long().view(-1, c, p).transpose(0, 1).reshape(c, -1)  # (C, B * P)
        z_q = self.embedding.gather(1, codes[..., None].expand(-1, -1, e))  # (C, B * P, E)
        return z_q.view(c, -1, p, e).permute(1, 0, 3, 2).flatten(1)


class NoQuantizer(nn.Module):
    """In the quantiser's place without vector quantisation (A.2): z goes to the FDM as it is, and has no codes."""

    def forward(self, z):
        """z (B, Z) -> z, commitment loss (), codes int64 (B, 0)"""
        return z, z.new_zeros(()), torch.zeros(len(z), 0, dtype=torch.long, device=z.device)


def conv_beside_constant_planes(conv, x, z):
    """conv(x stacked with z repeated over the plane), without the planes: x (B, C, S, S), z (B, Z) -> (B, out, S, S)

    A padded 3x3 convolution of a constant plane takes 9 values: four corners, four edges, inside. So a 3x3 plane tells
    them all, for 9 places' work instead of S * S.
    """
    weight_x, weight_z = conv.weight.split([x.shape[1], z.shape[1]], dim=1)
    tile = F.conv2d(z[:, :, None, None].expand(-1, -1, 3, 3), weight_z, padding=1)  # (B, out, 3, 3)
    place = torch.ones(x.shape[2], dtype=torch.long, device=x.device)
    place[0], place[-1] = 0, 2
    return F.conv2d(x, weight_x, conv.bias, padding=1) + tile[:, :, place][:, :, :, place]


class HalfResidual(nn.Module):
    """A residual pair of convolutions with half the channels between them."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class DownBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.residual = HalfResidual(out_channels)

    def forward(self, x, z=None):
        x = self.conv(x) if z is None else conv_beside_constant_planes(self.conv, x, z)
        return F.relu(F.max_pool2d(self.residual(self.norm(x)), 2))  # (B, in, S, S) -> (B, out, S / 2, S / 2)


class UpBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        self.norm = nn.BatchNorm2d(out_channels)
        self.residual = HalfResidual(out_channels)

    def forward(self, x):
        return F.relu(self.residual(self.norm(self.conv(x))))  # (B, in, S, S) -> (B, out, 2S, 2S)


class FDM(nn.Module):
    """o_{t+1} = FDM(o_{t-k} .. o_t, z_t): a U-Net (Ronneberger et al. 2015) that z enters at the top and at the bottom."""

    def __init__(self, frame_size, context, z_dim, width, predict_change):
        super().__init__()
        self.predict_change = predict_change
        past = 3 * (context + 1)
        depth = frame_size.bit_length() - 2  # down blocks until 2x2 is left: 5 at 64x64
        widths = [width * 2**i for i in range(depth + 1)]  # 24, 48, 96, 192, 384, and 768 at 1x1
        self.down = nn.ModuleList(DownBlock(i, o) for i, o in zip([past + z_dim, *widths], widths[:-1]))
        self.bottom = nn.Conv2d(widths[-2], widths[-1], 2)
        self.up = nn.ModuleList([UpBlock(widths[-1] + z_dim, widths[-2])])
        self.up.extend(UpBlock(2 * i, o) for i, o in zip(widths[-2::-1], [*widths[-3::-1], width]))
        self.last = nn.Sequential(nn.Conv2d(width + past, width, 3, padding=1), HalfResidual(width), nn.ReLU(), nn.Conv2d(width, 3, 1))
        if predict_change:  # starts from "nothing changes"
            nn.init.zeros_(self.last[-1].weight)
            nn.init.zeros_(self.last[-1].bias)

    def forward(self, past, z):
        """past: uint8 (B, k + 1, S, S, 3), z (B, Z) -> o_{t+1} (B, 3, S, S) in [-0.5, 0.5]"""
        past = to_input(past)
        skips = [self.down[0](past, z)]
        for block in self.down[1:]:
            skips.append(block(skips[-1]))
        x = self.up[0](torch.cat([self.bottom(skips[-1]), z[:, :, None, None]], 1))  # (B, 32 width + Z, 1, 1) -> (B, 16 width, 2, 2)
        for block, skip in zip(self.up[1:], reversed(skips)):
            x = block(torch.cat([x, skip], 1))
        x = self.last(torch.cat([x, past], 1))  # (B, 3, S, S)
        return past[:, -3:] + x if self.predict_change else x.tanh() / 2


# --- training ------------------------------------------------------------------------------------------------------


class SumOverProcesses(torch.autograd.Function):
    """x -> its sum over all processes; on the way back, the sum of the gradients."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.forward(ctx, gradient)


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm by the mean and variance over the batches of all processes (torch's own, SyncBatchNorm, needs GPUs)."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            # the running mean is the same everywhere and near the mean: about it, squares lose little to the square of the mean
            values = x.float() - self.running_mean[:, None, None]  # (B, C, S, S)
            count = torch.distributed.get_world_size() * values.numel() / values.shape[1]  # batches are of one size
            sums = SumOverProcesses.apply(torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))]))  # (2, C)
            mean, square = sums / count
            variance = square - mean.square()  # (C,)
            scale = self.weight * (variance + self.eps).rsqrt()
            out = (values - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean += self.momentum * mean
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return out.to(x.dtype)


def share_batch_norms(network):
    """Replaces the batch norms of a fresh network by such over all processes, if there are several."""
    for module in list(network.modules()) if torch.distributed.is_initialized() else ():
        for name, norm in module.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, SharedBatchNorm2d(norm.num_features))


def dynamics_loss(idm, quantizer, fdm, windows, commitment):
    """windows uint8 (B, k + 2, S, S, 3) -> loss (), squared error (), commitment loss ()"""
    z_q, commitment_loss, _ = quantizer(idm(windows))
    error = F.mse_loss(fdm(windows[:, :-1], z_q), to_input(windows[:, -1:]))
    return error + commitment * commitment_loss, error, commitment_loss


@torch.no_grad()
def label(idm, quantizer, windows):
    """windows uint8 (B, k + 2, S, S, 3) -> z (B, Z), codes uint8 (B, C * P)"""
    z = idm(windows)
    return z, quantizer(z)[2].to(torch.uint8)


def probe_accuracy(train_z, train_actions, test_z, test_actions):
    """Share of held-out actions that a linear classifier of z gets right, and that of the majority class."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(train_z, train_actions)
    majority = np.bincount(train_actions).argmax()
    return probe.score(test_z, test_actions), float((test_actions == majority).mean())


@torch.no_grad()
def report(idm, quantizer, fdm, train, test, batch_size=512):
    """Figures on held-out episodes, as a dict. train, test: (windows uint8 (N, k + 2, S, S, 3), true actions int [N] or None)."""
    for module in (idm, quantizer, fdm):
        module.eval()
    (train_windows, train_actions), (test_windows, test_actions) = train, test
    test_z, codes, error, copy_error = [], [], 0.0, 0.0
    for windows in test_windows.split(batch_size):
        z, code = label(idm, quantizer, windows)
        test_z.append(z), codes.append(code)
        target, weight = to_input(windows[:, -1:]), len(windows) / len(test_windows)
        error += F.mse_loss(fdm(windows[:, :-1], quantizer(z)[0]), target) * weight
        copy_error += F.mse_loss(to_input(windows[:, -2:-1]), target) * weight
    figures = dict(test_error=error, copy_error=copy_error)
    if isinstance(quantizer, EMAVectorQuantizer):
        codebooks, embeddings, _ = quantizer.embedding.shape
        for codebook, used in enumerate(np.split(torch.cat(codes).cpu().numpy(), codebooks, axis=1)):
            share = np.bincount(used.ravel(), minlength=embeddings) / used.size
            figures[f"perplexity_{codebook}"] = common.perplexity(share)
            figures[f"codes_used_{codebook}"] = float((share > 0).mean())
    if train_actions is not None and test_actions is not None and len(np.unique(train_actions)) > 1:
        train_z = [label(idm, quantizer, windows)[0] for windows in train_windows.split(batch_size)]
        train_z, test_z = torch.cat(train_z).cpu().numpy(), torch.cat(test_z).cpu().numpy()
        figures["probe"], figures["majority"] = probe_accuracy(train_z, train_actions, test_z, test_actions)
    for module in (idm, quantizer, fdm):
        module.train()
    return figures


def write_latents(idm, quantizer, frames_dir, latents_dir, game, context, device, batch_size=1024):
    """Labels every valid window of every shard with its latent action; other rows hold zeros.

    Threads read the shards to come and write those that are done, while the IDM labels one.
    """
    paths = common.list_shards(frames_dir, "frames", f"python collect_data.py --game {game}")
    for old in Path(latents_dir).glob("latents_*.npz"):
        old.unlink()
    dynamics, threads = common.fingerprint(idm, quantizer), 1 + common.num_cores() // 4

    def read(path):
        obs, first, _ = common.read_frames(path, game)
        return path, torch.from_numpy(obs), common.valid_windows(first, context)

    def labelled():
        offsets = torch.arange(-context, 2, device=device)
        for path, obs, valid in common.in_threads(read, paths, threads):
            obs, invalid = obs.to(device), torch.from_numpy(~valid).to(device)
            # windows across an episode's end as well, to be zeroed: batches of few sizes, for which cuDNN has to choose kernels once
            rows = torch.arange(context, max(context, len(obs) - 1), device=device)
            parts = [label(idm, quantizer, obs[some[:, None] + offsets]) for some in rows.split(batch_size)]
            z, codes = (torch.cat(part) for part in zip(*parts))
            all_z = torch.zeros(len(obs), z.shape[1], dtype=torch.float16, device=device)
            all_codes = torch.zeros(len(obs), codes.shape[1], dtype=torch.uint8, device=device)
            all_z[rows], all_codes[rows] = z.half(), codes
            all_z[invalid], all_codes[invalid] = 0, 0
            yield path, all_z.cpu().numpy(), all_codes.cpu().numpy(), valid

    def write(latents):
        path, z, codes, valid = latents
        common.save_npz(common.beside(path, "latents", latents_dir), z=z, codes=codes, valid=valid, dynamics=dynamics)

    for _ in common.track(common.in_threads(write, labelled(), threads), "shard", f"latents of {frames_dir}", len(paths)):
        pass


def main(args):
    common.check_flags(args, zero=("commitment", "warmup_steps"), shares=("vq_decay",))
    if not 2 <= args.embeddings <= 256:
        common.fail(f"--embeddings {args.embeddings} must lie between 2 and 256: latents_NNN.npz holds a code in one byte")
    if args.fdm_width < 2:
        common.fail(f"--fdm-width {args.fdm_width} must be 2 or above: blocks halve it")
    device = common.pick_device(args.device)
    common.seed_everything(args.seed)
    data, run = args.data_dir / args.game, common.run_folder(args.runs_dir, args.game, args.vq)
    run_state = common.RunState(run, "train_latent_dynamics", args)
    if run_state.finished(run / "latent_dynamics.pt"):
        return

    store = common.FrameStore(data / "train", args.game, args.context, args.pool_frames, args.seed, device)
    train, test = (
        (torch.from_numpy(windows).to(device), common.true_actions_to_report_on(where, args.game))
        for windows, where in (
            common.fixed_windows(data / split, args.game, args.context, args.eval_windows, args.seed) for split in ("train", "test")
        )
    )
    z_dim = args.codebooks * args.latents_per_codebook * args.embedding_dim
    idm = IDM(store.frame_size, args.context, args.multiplier, z_dim).to(device, memory_format=torch.channels_last)
    fdm = FDM(store.frame_size, args.context, z_dim, args.fdm_width, args.predict_change)
    share_batch_norms(fdm)
    fdm.to(device, memory_format=torch.channels_last)
    quantizer = NoQuantizer()
    if args.vq:
        quantizer = EMAVectorQuantizer(
            args.codebooks, args.latents_per_codebook, args.embeddings, args.embedding_dim, args.vq_decay
        ).to(device)
    parameters = [*idm.parameters(), *fdm.parameters()]  # the codebooks learn by moving averages
    optimizer = torch.optim.Adam(parameters, lr=args.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: float(np.interp(step, [0, args.warmup_steps, args.grad_steps], [0.1, 1.0, 0.01]))
    )
    print(
        f"stage 1: {args.grad_steps:,} updates of {args.batch_size} windows from {store.num_frames:,} frames of {args.game} at "
        f"{store.frame_size}x{store.frame_size} ({store.num_slots * store.slot_rows:,} of them in memory) on {device}; "
        f"IDM {sum(p.numel() for p in idm.parameters()):,}, FDM {sum(p.numel() for p in fdm.parameters()):,} parameters"
    )

    log = common.MetricsLog(run / "train_latent_dynamics.csv", args.grad_steps, "step")
    parts = dict(idm=idm, quantizer=quantizer, fdm=fdm, optimizer=optimizer, schedule=schedule, store=store, log=log)
    run_state.load(parts)
    networks = (common.parallel(idm), quantizer, common.parallel(fdm))
    loss_of = common.compiled(dynamics_loss, common.compiles(args, device))
    for grad_step in range(run_state.step + 1, args.grad_steps + 1):
        windows = store.sample_windows(args.batch_size)
        optimizer.zero_grad()  # before a compiled forward pass, which takes the memory of the last gradients
        with common.autocast(args.precision, device):
            loss, error, commitment_loss = loss_of(*networks, windows, args.commitment)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        log.bar.update()
        if common.leads() and (grad_step % args.eval_every == 0 or grad_step == args.grad_steps):
            common.check_finite(grad_step, run / "latent_dynamics.pt", idm, quantizer, fdm)
            figures = report(idm, quantizer, fdm, train, test)
            log.write(grad_step=grad_step, train_error=error.detach(), commitment=commitment_loss.detach(), **figures)
            for name, perplexity in figures.items():
                if name.startswith("perplexity") and perplexity < 1.5:
                    log.bar.write(
                        f"warning: codebook {name[-1]} has collapsed to a perplexity of {perplexity:.2f} of {args.embeddings}; if that lasts, "
                        "try a lower --vq-decay, --lr or --commitment"
                    )
            common.save_checkpoint(
                run / "latent_dynamics.pt", kind="latent_dynamics", game=args.game, grad_step=grad_step, vq=args.vq,
                frame_size=store.frame_size, start_level=store.settings["start_level"], num_levels=store.settings["num_levels"],
                context=args.context, multiplier=args.multiplier, fdm_width=args.fdm_width,
                predict_change=args.predict_change, codebooks=args.codebooks,
                latents_per_codebook=args.latents_per_codebook, embeddings=args.embeddings, embedding_dim=args.embedding_dim,
                fingerprint=common.fingerprint(idm, quantizer),
                idm=idm.state_dict(), quantizer=quantizer.state_dict(), fdm=fdm.state_dict(),
            )  # fmt: skip
        if run_state.due(last=grad_step == args.grad_steps):  # the last too, because labelling takes long as well
            run_state.save(grad_step, parts)
    log.bar.close()

    idm.eval(), quantizer.eval()
    for split in ("train", "test") if common.leads() else ():
        write_latents(idm, quantizer, data / split, run / split, args.game, args.context, device)
    run_state.finish()
    print(f"latents and checkpoint: {run}\nnext: python train_latent_bc.py --game {args.game}")


if __name__ == "__main__":
    with common.process_group():
        main(tyro.cli(Args))
