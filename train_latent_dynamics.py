"""Stage 1: learn latent actions from video alone (paper, section 4.1).

The inverse dynamics model (IDM) sees o_{t-k} .. o_{t+1} and emits a latent action z_t, which is
vector-quantized. The forward dynamics model (FDM) predicts o_{t+1} from o_{t-k} .. o_t and the
quantized z_t. It knows the past already, so what is worth sending through the bottleneck is what
changed: mostly, the agent's action.

reads   data/<game>/{train,test,random}/frames_NNN.npz (labels, if there, for metrics only)
writes  runs/<game>/latent_dynamics.pt, {train,test}/latents_NNN.npz, train_latent_dynamics.csv

paper scale   python train_latent_dynamics.py --game bigfish
on a CPU      python train_latent_dynamics.py --game miner --multiplier 0.5 --fdm-width 8 --lr 1e-3
                  --batch-size 64 --vq-decay 0.99 --predict-change --z-std 0.2 --grad-steps 1500
                  --eval-every 250
no VQ (A.2)   python train_latent_dynamics.py --game bigfish --no-vq --runs-dir runs/no_vq
"""

from dataclasses import dataclass

import common  # before torch
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


@dataclass
class Args(common.RunArgs):
    resume: bool = False
    """Continue the run that was stopped, or start one if there is none."""
    compile: bool = False
    """Compile the loss with torch.compile."""
    bf16: bool = False
    """Compute layers in bfloat16; weights stay float32."""
    pool_frames: int = 1_000_000
    """Frames in memory at once (12 KB each at 64x64); more than that on disk are streamed."""
    eval_every: int = 2000
    """Gradient steps between evaluations, checkpoints and saved states."""

    vq: bool = True
    """Quantize latent actions; --no-vq is the paper's ablation (A.2)."""
    context: int = 1
    """k: frames before o_t that both models see (A.4)."""
    codebooks: int = 2
    """VQ codebooks, C (A.4)."""
    latents_per_codebook: int = 4
    """Discrete latents that share a codebook, P (A.4)."""
    embeddings: int = 64
    """Embeddings of a codebook, K (A.4)."""
    embedding_dim: int = 16
    """Size of an embedding, E (A.4); z has C * E * P = 128 numbers."""
    commitment_cost: float = 0.05
    """Weight of the commitment loss (A.4)."""
    vq_decay: float = 0.999
    """Decay of the codebooks' moving averages (A.4)."""
    multiplier: float = 4
    """Multiplies IMPALA's channels 16, 32, 32 (A.4)."""
    fdm_width: int = 24
    """Channels of the U-Net's first block (official code: 24, 7.8M parameters)."""
    predict_change: bool = False
    """The FDM predicts o_{t+1} - o_t; not in the paper, learns faster at small scale."""
    grad_steps: int = 70_000
    """Updates (A.4); 0 writes the latents of an untrained IDM, a control."""
    batch_size: int = 128
    """Windows per update (A.4)."""
    lr: float = 2e-4
    """Peak learning rate of AdamW (A.4)."""
    weight_decay: float = 0.01
    """Of AdamW (official code)."""
    warmup_steps: int = 50
    """Updates from 10% of the learning rate to its peak; then linear to 1% (official code)."""
    z_std: float = 0.0
    """Scale the IDM's last layer so that z starts with mean 0 and this std; 0, as in the paper,
    leaves z close to a constant, and some runs never get away from one code (results/LOG.md)."""
    max_grad_norm: float = 2.0
    """Clips the gradient's norm (official code)."""


# --- networks -------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))  # (B, C, S, S)


class ImpalaCNN(nn.Sequential):
    """IMPALA's CNN (Espeholt et al. 2018): (B, C, S, S) -> (B, 32 * multiplier * (S / 8)^2)"""

    def __init__(self, in_channels, frame_size, multiplier):
        layers = []
        for channels in (int(16 * multiplier), int(32 * multiplier), int(32 * multiplier)):
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.MaxPool2d(3, 2, 1)]
            layers += [ResidualBlock(channels, channels), ResidualBlock(channels, channels)]
            in_channels = channels
        super().__init__(*layers, nn.ReLU(), nn.Flatten())
        self.num_features = channels * (frame_size // 8) ** 2


class IDM(nn.Module):
    """z_t = IDM(o_{t-k} .. o_{t+1}), before quantization."""

    def __init__(self, frame_size, context, multiplier, z_dim):
        super().__init__()
        self.cnn = ImpalaCNN(3 * (context + 2), frame_size, multiplier)
        self.hidden = nn.Linear(self.cnn.num_features, 256)
        self.head = nn.Linear(256, z_dim)

    def forward(self, windows):
        """uint8 (B, k + 2, S, S, 3) -> z (B, Z)"""
        return self.head(F.relu(self.hidden(self.cnn(common.to_input(windows)))))


class EMAVectorQuantizer(nn.Module):
    """Replaces each piece of z by its nearest embedding; embeddings are moving averages of their
    pieces (van den Oord et al. 2017, A.1). z is viewed as C codebooks x E numbers x P positions;
    the P positions share a codebook (official code).
    """

    def __init__(self, codebooks, positions, embeddings, embedding_dim, decay):
        super().__init__()
        self.shape, self.decay = (codebooks, embedding_dim, positions), decay
        start = torch.empty(codebooks, embeddings, embedding_dim).uniform_(-1, 1) * 5 / embeddings
        self.register_buffer("embedding", start)  # (C, K, E)
        # Counts start at 1 to match the sums. With counts of 0 (official code) the first update
        # divides unused sums by about 1e-5, and the codes explode.
        self.register_buffer("count", torch.ones(codebooks, embeddings))  # (C, K)
        self.register_buffer("total", start.clone())  # (C, K, E); embedding = total / count

    def forward(self, z):
        """z (B, C * E * P) -> z_q of the same shape, commitment loss (), codes int64 (B, C * P)"""
        c, e, p = self.shape
        x = z.float().view(-1, c, e, p).permute(1, 0, 3, 2).reshape(c, -1, e)  # (C, B * P, E)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            # exact differences: a matrix product in TF32 would not resolve codes close together
            exact = "donot_use_mm_for_euclid_dist"
            distance = torch.cdist(x, self.embedding, compute_mode=exact)  # (C, B * P, K)
            codes = distance.argmin(-1)  # (C, B * P)
            nearest = self.embedding.gather(1, codes[..., None].expand_as(x))  # (C, B * P, E)
            if self.training:
                self.update(x, codes)
        commitment_loss = F.mse_loss(x, nearest)
        z_q = x + (nearest - x).detach()  # straight-through: the gradient of z_q goes to z
        z_q = z_q.view(c, -1, p, e).permute(1, 0, 3, 2).reshape(z.shape)
        return z_q, commitment_loss, codes.view(c, -1, p).transpose(0, 1).flatten(1)

    def update(self, x, codes):
        """Moves the averages towards the pieces x (C, B * P, E) of codes (C, B * P)."""
        k = self.embedding.shape[1]
        one_hot = F.one_hot(codes, k).to(x.dtype)  # (C, B * P, K)
        self.count.lerp_(one_hot.sum(1), 1 - self.decay)
        self.total.lerp_(one_hot.transpose(1, 2) @ x, 1 - self.decay)
        # Revive dead codes (not in the official code): one used less than a tenth of its fair share
        # restarts at a random piece of this batch, as if it had had that share.
        fair = x.shape[1] / k
        pieces = x[:, torch.randint(x.shape[1], (k,), device=x.device)]  # (C, K, E)
        dead = self.count < 0.1 * fair
        self.count[dead] = fair
        self.total[dead] = fair * pieces[dead]
        self.embedding.copy_(self.total / self.count[..., None])


class NoQuantizer(nn.Module):
    """The ablation without VQ (A.2): the FDM gets z as it is."""

    def forward(self, z):
        """z (B, Z) -> z, commitment loss (), codes int64 (B, 0)"""
        return z, z.new_zeros(()), torch.zeros(len(z), 0, dtype=torch.long, device=z.device)


def conv_with_planes(conv, x, z):
    """conv(x and z as constant planes): x (B, C, S, S), z (B, Z) -> (B, out, S, S). A padded 3x3
    convolution of constant planes has 9 distinct values: corners, edges, inside. So a 3x3 tile is
    convolved and stretched, in a fraction of the time (results/LOG.md).
    """
    weight_x, weight_z = conv.weight.split([x.shape[1], z.shape[1]], 1)
    tile = F.conv2d(z[:, :, None, None].expand(-1, -1, 3, 3), weight_z, padding=1)  # (B, out, 3, 3)
    stretch = [0, *[1] * (x.shape[2] - 2), 2]
    return F.conv2d(x, weight_x, conv.bias, padding=1) + tile[:, :, stretch][..., stretch]


class FDM(nn.Module):
    """o_{t+1} = FDM(o_{t-k} .. o_t, z_t): a U-Net (Ronneberger et al. 2015) conditioned on z at its
    first layer, and again in place of the bottleneck's skip connection (official code).
    """

    def __init__(self, frame_size, context, z_dim, width, predict_change):
        super().__init__()
        past, self.predict_change = 3 * (context + 1), predict_change
        depth = frame_size.bit_length() - 2  # down blocks until 2x2 is left: 5 at 64x64
        widths = [width * 2**i for i in range(depth + 1)]  # 24, 48, 96, 192, 384 and, at 1x1, 768
        self.down, channels = nn.ModuleList(), past + z_dim
        for o in widths[:-1]:  # halves the side
            block = [nn.Conv2d(channels, o, 3, padding=1), nn.BatchNorm2d(o)]
            block += [ResidualBlock(o, o // 2), nn.MaxPool2d(2), nn.ReLU()]
            self.down.append(nn.Sequential(*block))
            channels = o
        self.bottom = nn.Conv2d(channels, widths[-1], 2)  # (B, 16 width, 2, 2) -> 1x1
        self.up, channels = nn.ModuleList(), widths[-1] + z_dim  # z in place of a skip
        for o in [*reversed(widths[:-1]), width]:  # doubles the side
            block = [nn.ConvTranspose2d(channels, o, 2, 2), nn.BatchNorm2d(o)]
            self.up.append(nn.Sequential(*block, ResidualBlock(o, o // 2), nn.ReLU()))
            channels = 2 * o  # with the skip of the same size
        last = [nn.Conv2d(width + past, width, 3, padding=1), ResidualBlock(width, width // 2)]
        self.last = nn.Sequential(*last, nn.ReLU(), nn.Conv2d(width, 3, 1))
        if predict_change:  # starts from "nothing changes"
            nn.init.zeros_(self.last[-1].weight)
            nn.init.zeros_(self.last[-1].bias)

    def forward(self, past, z):
        """past uint8 (B, k + 1, S, S, 3), z (B, Z) -> o_{t+1} (B, 3, S, S), unclipped if the change
        is predicted, else within [-0.5, 0.5]
        """
        past = common.to_input(past)
        x = conv_with_planes(self.down[0][0], past, z)  # (B, width, S, S)
        skips = [self.down[0][1:](x)]  # (B, width, S / 2, S / 2)
        for block in self.down[1:]:
            skips.append(block(skips[-1]))
        x = self.up[0](torch.cat([self.bottom(skips[-1]), z[:, :, None, None]], 1))
        for block, skip in zip(self.up[1:], reversed(skips)):
            x = block(torch.cat([x, skip], 1))  # at last (B, width, S, S)
        x = self.last(torch.cat([x, past], 1))  # (B, 3, S, S)
        return past[:, -3:] + x if self.predict_change else x.tanh() / 2


# --- training -------------------------------------------------------------------------------------


@torch.no_grad()
def scale_head(idm, windows, std):
    """Data-dependent initialization (Salimans & Kingma 2016): each number of z gets mean 0 and this
    std over the windows uint8 (B, k + 2, S, S, 3).
    """
    z = idm(windows)
    scale = std / (z.std(0) + 1e-8)
    idm.head.weight *= scale[:, None]
    idm.head.bias.copy_((idm.head.bias - z.mean(0)) * scale)


def dynamics_loss(idm, quantizer, fdm, windows, commitment_cost):
    """windows uint8 (B, k + 2, S, S, 3) -> loss (), FDM's mse (), commitment loss ()"""
    z_q, commitment_loss, _ = quantizer(idm(windows))
    mse = F.mse_loss(fdm(windows[:, :-1], z_q), common.to_input(windows[:, -1:]))
    return mse + commitment_cost * commitment_loss, mse, commitment_loss


def perplexity(codes, embeddings):
    """codes [N] -> exp of the entropy of their frequencies: 1 if all are equal, K if uniform."""
    p = np.bincount(codes, minlength=embeddings) / len(codes)
    return float(np.exp(-(p * np.log(np.maximum(p, 1e-10))).sum()))


def linear_probe(z, actions, test_z, test_actions):
    """Accuracy of a linear classifier of z, fitted on z, actions; and of their majority class. Of
    continuous actions float [N, A]: R^2 of a linear regression; and of their mean.
    """
    probe, constant = LogisticRegression(C=0.1, max_iter=1000), DummyClassifier()
    if actions.dtype.kind == "f":
        probe, constant = Ridge(), DummyRegressor()
    probe = probe if len(np.unique(actions)) > 1 else constant  # a classifier needs two
    fitted = (make_pipeline(StandardScaler(), x).fit(z, actions) for x in (probe, constant))
    return tuple(float(x.score(test_z, test_actions)) for x in fitted)


def in_batches(model, *inputs, batch_size=512):
    """The model's outputs for inputs (N, ...), computed in parts."""
    return torch.cat([model(*parts) for parts in zip(*(x.split(batch_size) for x in inputs))])


def as_stored(z):
    """z (B, Z) as files hold it, float16; ends the run if it has grown beyond that. Without VQ, the
    FDM's batch normalization can hide its scale from the loss (results/LOG.md).
    """
    if not (stored := z.half()).isfinite().all():
        size = f"{z.abs().max():.0e}"
        common.fail(f"latents have grown to {size}, beyond float16; try --z-std 0 or a lower --lr")
    return stored


@torch.no_grad()
def evaluate(idm, quantizer, fdm, test_windows, probe_windows, probe_actions):
    """Metrics of held-out windows uint8 (N, k + 2, S, S, 3), as a dict. The probe of probe_actions
    [N] (or None) is fitted on the first 3/4 of probe_windows, in the order of the files, and tested
    on the rest.
    """
    idm.eval(), quantizer.eval(), fdm.eval()
    as_stored(z := in_batches(idm, test_windows))  # ends a run that has diverged
    z_q, _, codes = quantizer(z)
    predicted = in_batches(fdm, test_windows[:, :-1], z_q)
    copied, target = (common.to_input(test_windows[:, i, None]) for i in (-2, -1))
    metrics = dict(test_mse=F.mse_loss(predicted, target), copy_mse=F.mse_loss(copied, target))
    if codes.numel():
        # per position: pooled over positions, four that sit on one code each would give 4
        per_position = [perplexity(p, quantizer.embedding.shape[1]) for p in codes.cpu().numpy().T]
        metrics |= dict(perplexity_mean=np.mean(per_position), perplexity_min=min(per_position))
    if probe_actions is not None:
        z, a = in_batches(idm, probe_windows).cpu().numpy(), probe_actions
        n = len(z) * 3 // 4
        metrics["probe"], metrics["majority"] = linear_probe(z[:n], a[:n], z[n:], a[n:])
    idm.train(), quantizer.train(), fdm.train()
    return {name: float(value) for name, value in metrics.items()}


@torch.no_grad()
def write_latents(idm, quantizer, frames_dir, latents_dir, game, context, device):
    """Labels each valid window of each shard with its latent action; other rows hold zeros."""
    idm.eval(), quantizer.eval()
    settings = dict(dynamics=common.fingerprint(idm, quantizer))
    paths, z_dim = common.list_shards(frames_dir), idm.head.out_features
    num_codes = quantizer(torch.zeros(1, z_dim, device=device))[2].shape[1]
    bar = common.progress_bar(len(paths), "shard", f"latents of {frames_dir}")
    for path, obs, valid, _, _ in common.read_ahead(paths, game=game, context=context):
        z = torch.zeros(len(obs), z_dim, dtype=torch.float16)
        codes = torch.zeros(len(obs), num_codes, dtype=torch.uint8)
        for rows in torch.from_numpy(np.flatnonzero(valid)).split(1024):
            windows = torch.from_numpy(obs)[rows[:, None] + torch.arange(-context, 2)].to(device)
            batch_z = idm(windows)  # (B, Z)
            z[rows], codes[rows] = as_stored(batch_z).cpu(), quantizer(batch_z)[2].byte().cpu()
        name = path.name.replace("frames", "latents")
        common.save_npz(latents_dir / name, settings, z=z, codes=codes, valid=valid)
        bar.update()
    bar.close()


def main(args):
    device = common.pick_device(args.device)
    torch.manual_seed(args.seed)
    data, run = args.data_dir / args.game, args.runs_dir / args.game
    if not 2 <= args.embeddings <= 256:
        common.fail(f"--embeddings {args.embeddings}: a code is stored in one byte, 2 to 256 fit")

    # --- data. Random play is the honest probe of z: its o_t says nothing about the action, so
    # no memory of places can pass. Without it (own videos), the held-out frames are probed.
    k = args.context
    probe_split = "random" if (data / "random").exists() else "test"
    store = common.FrameStore(args, "train", k, device, pool_frames=args.pool_frames)
    test = common.FrameStore(args, "test", k, device)
    probed = test if probe_split == "test" else common.FrameStore(args, "random", k, device)
    if not store.frame_size == test.frame_size == probed.frame_size:
        common.fail(f"the splits of {data} differ in frame size")
    test_windows, rows = test.windows_at(test.draw(4096)), probed.draw(4096).sort()[0]
    probe = probed.windows_at(rows), common.true_actions_to_report_on(probed, rows)

    # --- networks
    size, z_dim = store.frame_size, args.codebooks * args.latents_per_codebook * args.embedding_dim
    idm = IDM(size, k, args.multiplier, z_dim)
    fdm = FDM(size, k, z_dim, args.fdm_width, args.predict_change)
    vq_sizes = (args.codebooks, args.latents_per_codebook, args.embeddings, args.embedding_dim)
    quantizer = EMAVectorQuantizer(*vq_sizes, args.vq_decay) if args.vq else NoQuantizer()
    for module in (idm, quantizer, fdm):
        module.to(device, memory_format=torch.channels_last)
    if args.z_std:
        scale_head(idm, store.windows_at(store.draw(512)), args.z_std)
    parameters = [*idm.parameters(), *fdm.parameters()]  # the codebooks are moving averages
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay, fused=True)
    ramp = ([0, args.warmup_steps, max(args.grad_steps, args.warmup_steps + 1)], [0.1, 1.0, 0.01])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: float(np.interp(i, *ramp)))
    compute_loss = torch.compile(dynamics_loss) if args.compile else dynamics_loss
    print(
        f"stage 1: {args.grad_steps:,} updates of {args.batch_size} windows of {args.game}, {size}x"
        f"{size}; {store.num_frames:,} frames, {len(store.obs):,} in memory; on {device}, "
        f"{sum(p.numel() for p in parameters):,} parameters; probe on {probe_split} frames"
    )

    # --- training
    output, state = run / "latent_dynamics.pt", run / "train_latent_dynamics_state.pt"
    parts = dict(idm=idm, quantizer=quantizer, fdm=fdm, optimizer=optimizer, schedule=schedule)
    parts["sampler"] = store.generator
    start, _ = common.load_state(state, args, parts)
    log = common.MetricsLog(run / "train_latent_dynamics.csv", args.grad_steps, "step", start)
    mse = commitment = float("nan")
    for grad_step in range(start, args.grad_steps + 1):  # grad_step updates have been made
        last = grad_step == args.grad_steps
        # step 0 is the untrained IDM; the first step of a resumed run has been logged already
        if (last or grad_step % args.eval_every == 0) and (grad_step > start or start == 0):
            common.check_finite(grad_step, output, idm, fdm)
            metrics = evaluate(idm, quantizer, fdm, test_windows, *probe)
            log.write(grad_step=grad_step, train_mse=mse, commitment_loss=commitment, **metrics)
            if grad_step and metrics.get("perplexity_mean", 2) < 1.5:
                log.bar.write("warning: the codebooks have collapsed, see README, Troubleshooting")
            common.save_checkpoint(
                output, kind="latent_dynamics", game=args.game, grad_step=grad_step,
                settings=store.settings, frame_size=size, context=k, z_dim=z_dim,
                multiplier=args.multiplier, fdm_width=args.fdm_width,
                predict_change=args.predict_change, vq_sizes=vq_sizes if args.vq else None,
                fingerprint=common.fingerprint(idm, quantizer), idm=idm.state_dict(),
                quantizer=quantizer.state_dict(), fdm=fdm.state_dict(),
            )  # fmt: skip
            common.save_state(state, args, grad_step, parts)
        if last:
            break
        windows = store.windows_at(store.draw(args.batch_size))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss, mse, commitment = compute_loss(idm, quantizer, fdm, windows, args.commitment_cost)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        log.bar.update()
    log.bar.close()
    common.load_checkpoint(output, "latent_dynamics", args.game)  # fails if it has been lost since

    for split in ("train", "test"):
        write_latents(idm, quantizer, data / split, run / split, args.game, k, device)
    print(f"latents and checkpoint: {run}")
    common.print_next(f"train_latent_bc.py --game {args.game}", args)


if __name__ == "__main__":
    main(tyro.cli(Args))
