r"""Stage 1: learn latent actions from video alone (paper, section 4.1).

The inverse dynamics model (IDM) sees o_{t-k} .. o_{t+1} and emits a latent action z_t, which is
vector-quantized. The forward dynamics model (FDM) predicts o_{t+1} from o_{t-k} .. o_t and the
quantized z_t. It knows the past already, so what is worth sending through the bottleneck is what
the past does not determine: ideally, the agent's action (for which games: docs/lessons.md, 5).

reads   data/<game>/{train,test,random}/frames_NNN.npz (labels, if there, for metrics only)
writes  runs/<game>/latent_dynamics.pt, {train,test}/latents_NNN.npz, train_latent_dynamics.csv

paper scale   python train_latent_dynamics.py --game bigfish
on a CPU      python train_latent_dynamics.py --game miner --multiplier 0.5 --fdm-width 8 \
                  --lr 1e-3 --batch-size 64 --vq-decay 0.99 --predict-change --z-std 0.2 \
                  --grad-steps 1500 --eval-every 250
no VQ (6.1)   python train_latent_dynamics.py --game bigfish --no-vq --runs-dir runs/no_vq
"""

import functools
from dataclasses import dataclass

import common  # before torch
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

TEST_WINDOWS = 4096  # held-out windows in an evaluation
PROBE_FIT = 3 / 4  # the fraction of them on which the probe is fitted; it is tested on the rest


@dataclass
class Args(common.RunArgs):
    resume: bool = False
    """Continue the run that was stopped, or start one if there is none."""
    compile: bool = False
    """Compile the loss with torch.compile."""
    pool_frames: int = 1_000_000
    """Frames in memory (12 KB each at 64x64); if there are more on disk, they are streamed."""
    eval_every: int = 2000
    """Gradient steps between evaluations, checkpoints and saved states."""

    vq: bool = True
    """Quantize latent actions; --no-vq is the paper's ablation (6.1, A.2)."""
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
    leaves z close to a constant, and some runs never get away from one code (docs/lessons.md)."""
    max_grad_norm: float = 2.0
    """Clips the gradient's norm (official code)."""


# --- networks -------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x):
        h = self.conv1(F.relu(x))  # (B, hidden, S, S)
        return x + self.conv2(F.relu(h))  # (B, C, S, S)


class ImpalaCNN(nn.Sequential):
    """IMPALA's CNN (Espeholt et al. 2018): (B, C, S, S) -> (B, 32 * multiplier * (S / 8)^2)"""

    def __init__(self, in_channels, frame_size, multiplier):
        layers = []
        for base_channels in (16, 32, 32):
            channels = int(base_channels * multiplier)
            layers += [
                nn.Conv2d(in_channels, channels, 3, padding=1),
                nn.MaxPool2d(3, 2, 1),
                ResidualBlock(channels, channels),
                ResidualBlock(channels, channels),
            ]
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
        x = common.to_input(windows)  # (B, 3 (k + 2), S, S)
        h = F.relu(self.hidden(self.cnn(x)))  # (B, 256)
        return self.head(h)


class EMAVectorQuantizer(nn.Module):
    """Replaces each sub-vector of z by its nearest embedding. Embeddings are moving averages of the
    sub-vectors assigned to them (van den Oord et al. 2017, A.1). z is viewed as C codebooks x E
    numbers x P positions (official code), so neighbours in z belong to different positions. The P
    positions, the paper's discrete latents, share a codebook.
    """

    def __init__(self, codebooks, positions, embeddings, embedding_dim, decay):
        super().__init__()
        self.codebooks = codebooks
        self.positions = positions
        self.embedding_dim = embedding_dim
        self.decay = decay
        start = torch.empty(codebooks, embeddings, embedding_dim)
        start.uniform_(-1, 1).mul_(5 / embeddings)  # official code
        self.register_buffer("embedding", start)  # (C, K, E) = ema_sum / ema_count
        # Counts start at 1 to match the sums. With counts of 0 (official code) the first update
        # divides unused sums by about 1e-5, and the codes explode.
        self.register_buffer("ema_count", torch.ones(codebooks, embeddings))  # (C, K)
        self.register_buffer("ema_sum", start.clone())  # (C, K, E)

    def forward(self, z):
        """z (B, C * E * P) -> z_q of the same shape, commitment loss (), codes int64 (B, C * P)"""
        x = z.view(-1, self.codebooks, self.embedding_dim, self.positions)
        x = x.permute(1, 0, 3, 2).flatten(1, 2)  # (C, B * P, E): the sub-vectors
        with torch.no_grad():
            # exact differences: a matrix product in TF32 would not resolve codes close together
            exact = "donot_use_mm_for_euclid_dist"
            distance = torch.cdist(x, self.embedding, compute_mode=exact)  # (C, B * P, K)
            codes = distance.argmin(-1)  # (C, B * P)
            nearest = self.embedding.gather(1, codes[..., None].expand_as(x))  # (C, B * P, E)
            if self.training:
                self.update(x, codes)
        commitment_loss = F.mse_loss(x, nearest)
        z_q = x + (nearest - x).detach()  # straight-through: the gradient of z_q goes to z
        z_q = z_q.unflatten(1, (-1, self.positions))  # (C, B, P, E)
        z_q = z_q.permute(1, 0, 3, 2).reshape(z.shape)
        codes = codes.unflatten(1, (-1, self.positions))  # (C, B, P)
        return z_q, commitment_loss, codes.transpose(0, 1).flatten(1)

    def update(self, x, codes):
        """Moves the averages towards sub-vectors x (C, B * P, E) with codes (C, B * P)."""
        num_embeddings = self.embedding.shape[1]
        one_hot = F.one_hot(codes, num_embeddings).to(x.dtype)  # (C, B * P, K)
        self.ema_count.lerp_(one_hot.sum(1), 1 - self.decay)
        self.ema_sum.lerp_(one_hot.transpose(1, 2) @ x, 1 - self.decay)
        # Revive dead codes (not in the official code). A code that is used less than a tenth as
        # often as the average one restarts at a random sub-vector, with the average count.
        average_count = x.shape[1] / num_embeddings
        rows = torch.randint(x.shape[1], (num_embeddings,), device=x.device)
        candidates = x[:, rows]  # (C, K, E): random sub-vectors of the batch
        dead = self.ema_count < 0.1 * average_count  # (C, K)
        self.ema_count.masked_fill_(dead, average_count)
        self.ema_sum.copy_(torch.where(dead[..., None], average_count * candidates, self.ema_sum))
        self.embedding.copy_(self.ema_sum / self.ema_count[..., None])


class NoQuantizer(nn.Module):
    """The ablation without VQ (A.2): the FDM gets z as it is."""

    def forward(self, z):
        """z (B, Z) -> z, commitment loss (), codes int64 (B, 0)"""
        no_codes = torch.zeros(len(z), 0, dtype=torch.long, device=z.device)
        return z, z.new_zeros(()), no_codes


def conv_with_planes(conv, x, z):
    """conv(torch.cat([x, z repeated over S x S], 1)): x (B, C, S, S), z (B, Z) -> (B, out, S, S).
    A padded 3x3 convolution of constant planes has 9 distinct values: corners, edges, inside. So a
    3x3 tile is convolved and stretched, which halves the time of stage 1 at 32x32.
    """
    weight_x, weight_z = conv.weight.split([x.shape[1], z.shape[1]], 1)
    planes = z[:, :, None, None].expand(-1, -1, 3, 3)  # (B, Z, 3, 3)
    tile = F.conv2d(planes, weight_z, padding=1)  # (B, out, 3, 3)
    stretch = [0, *[1] * (x.shape[2] - 2), 2]
    of_z = tile[:, :, stretch][..., stretch]  # (B, out, S, S)
    of_x = F.conv2d(x, weight_x, conv.bias, padding=1)  # (B, out, S, S)
    return of_x + of_z


class DownBlock(nn.Sequential):
    """(B, in, S, S) -> (B, out, S / 2, S / 2)"""

    def __init__(self, in_channels, out_channels):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            ResidualBlock(out_channels, out_channels // 2),
            nn.MaxPool2d(2),
            nn.ReLU(),
        )


class UpBlock(nn.Sequential):
    """(B, in, S, S) -> (B, out, 2 S, 2 S)"""

    def __init__(self, in_channels, out_channels):
        super().__init__(
            nn.ConvTranspose2d(in_channels, out_channels, 2, 2),
            nn.BatchNorm2d(out_channels),
            ResidualBlock(out_channels, out_channels // 2),
            nn.ReLU(),
        )


class FDM(nn.Module):
    """o_{t+1} = FDM(o_{t-k} .. o_t, z_t): a U-Net (Ronneberger et al. 2015) conditioned on z at its
    first layer, and again in place of the bottleneck's skip connection (official code).
    """

    def __init__(self, frame_size, context, z_dim, width, predict_change):
        super().__init__()
        self.predict_change = predict_change
        past_channels = 3 * (context + 1)
        depth = frame_size.bit_length() - 2  # down blocks until 2x2 is left: 5 at 64x64
        widths = [width * 2**i for i in range(depth)]  # 24, 48, 96, 192, 384
        bottom_width = width * 2**depth  # 768
        # the first down block; its convolution stands alone for conv_with_planes()
        self.first_conv = nn.Conv2d(past_channels + z_dim, width, 3, padding=1)
        self.after_first_conv = nn.Sequential(
            nn.BatchNorm2d(width), ResidualBlock(width, width // 2), nn.MaxPool2d(2), nn.ReLU()
        )
        self.down = nn.ModuleList(DownBlock(i, o) for i, o in zip(widths, widths[1:]))
        self.bottom = nn.Conv2d(widths[-1], bottom_width, 2)  # (B, 16 width, 2, 2) -> 1x1
        # up blocks at 64x64: 2x2 with 384 channels, 4x4 192, 8x8 96, 16x16 48, 32x32 24, 64x64 24
        self.up = nn.ModuleList([UpBlock(bottom_width + z_dim, widths[-1])])
        skip_widths = widths[::-1]  # 384, 192, 96, 48, 24
        out_widths = skip_widths[1:] + [width]  # 192, 96, 48, 24, 24
        for skip_width, out_width in zip(skip_widths, out_widths):
            self.up.append(UpBlock(2 * skip_width, out_width))  # doubled by the skip connection
        self.last = nn.Sequential(
            nn.Conv2d(width + past_channels, width, 3, padding=1),
            ResidualBlock(width, width // 2),
            nn.ReLU(),
            nn.Conv2d(width, 3, 1),
        )
        if predict_change:  # starts from "nothing changes"
            nn.init.zeros_(self.last[-1].weight)
            nn.init.zeros_(self.last[-1].bias)

    def forward(self, past, z):
        """past uint8 (B, k + 1, S, S, 3), z (B, Z) -> o_{t+1} (B, 3, S, S), unclipped if the change
        is predicted, else within [-0.5, 0.5]
        """
        past = common.to_input(past)  # (B, 3 (k + 1), S, S)
        x = conv_with_planes(self.first_conv, past, z)  # (B, width, S, S)
        x = self.after_first_conv(x)  # (B, width, S / 2, S / 2)
        skips = [x]
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.bottom(x)  # (B, 32 width, 1, 1) at 64x64
        x = torch.cat([x, z[:, :, None, None]], 1)  # z in place of a skip connection
        x = self.up[0](x)
        for block, skip in zip(self.up[1:], reversed(skips)):
            x = block(torch.cat([x, skip], 1))  # at last (B, width, S, S)
        x = self.last(torch.cat([x, past], 1))  # (B, 3, S, S)
        if self.predict_change:
            return past[:, -3:] + x
        return x.tanh() / 2  # frames lie in [-0.5, 0.5], see common.to_input()


# --- training -------------------------------------------------------------------------------------


def dynamics_loss(idm, quantizer, fdm, windows, commitment_cost):
    """windows uint8 (B, k + 2, S, S, 3) -> loss (), FDM's mse (), commitment loss ()"""
    z = idm(windows)
    z_q, commitment_loss, _ = quantizer(z)
    predicted = fdm(windows[:, :-1], z_q)
    mse = F.mse_loss(predicted, common.to_input(windows[:, -1:]))
    return mse + commitment_cost * commitment_loss, mse, commitment_loss


def perplexity(codes):
    """codes int64 (N,) -> exp of the entropy of their frequencies: 1 if all are equal, K if K are
    equally frequent.
    """
    counts = torch.bincount(codes).float()
    return torch.distributions.Categorical(counts).perplexity().item()


def linear_probe(z, actions, test_z, test_actions):
    """Scores on the test set of a linear probe of z and of a constant prediction, both fitted on
    z, actions. Discrete actions [N]: accuracy, and that of the majority class. Continuous actions
    float [N, A]: R^2 of ridge regression, and of the mean action.
    """
    probe = LogisticRegression(C=0.1, max_iter=1000)
    constant = DummyClassifier()
    if actions.dtype.kind == "f":
        probe = Ridge()
        constant = DummyRegressor()
    if len(np.unique(actions)) == 1:  # a classifier needs two
        probe = constant
    probe = make_pipeline(StandardScaler(), probe).fit(z, actions)
    constant.fit(z, actions)
    score = probe.score(test_z, test_actions)
    return float(score), float(constant.score(test_z, test_actions))


def in_batches(model, *inputs, batch_size=512):
    """The model's outputs for inputs (N, ...), computed in parts."""
    parts = zip(*(x.split(batch_size) for x in inputs))
    return torch.cat([model(*part) for part in parts])


def check_range(z):
    """Ends the run if z does not fit into float16, in which files hold it. Without VQ, the FDM's
    batch normalization can hide its scale from the loss.
    """
    largest = z.abs().max().item()
    if not largest <= torch.finfo(torch.float16).max:
        size = f"{largest:.0e}"
        common.fail(f"latents have grown to {size}, beyond float16; try --z-std 0 or a lower --lr")


@torch.no_grad()
def evaluate(idm, quantizer, fdm, test_windows, probe_windows, probe_actions):
    """Metrics of held-out windows uint8 (N, k + 2, S, S, 3), as a dict. The probe of probe_actions
    [N] (or None) is fitted on the first 3/4 of probe_windows, in the order of the files, and tested
    on the rest.
    """
    models = (idm, quantizer, fdm)
    for model in models:
        model.eval()
    z = in_batches(idm, test_windows)  # (N, Z)
    check_range(z)
    z_q, _, codes = quantizer(z)
    predicted = in_batches(fdm, test_windows[:, :-1], z_q)  # (N, 3, S, S)
    o_t = common.to_input(test_windows[:, -2:-1])  # a window is o_{t-k} .. o_t, o_{t+1}
    target = common.to_input(test_windows[:, -1:])
    metrics = dict(test_mse=F.mse_loss(predicted, target), copy_mse=F.mse_loss(o_t, target))
    if codes.numel():
        # one perplexity per position: if each of 4 positions used a single code, pooled codes would
        # have a perplexity of 4 and hide the collapse
        each = [perplexity(position) for position in codes.T]
        metrics["perplexity_mean"] = np.mean(each)
        metrics["perplexity_min"] = min(each)
    if probe_actions is not None:
        z = in_batches(idm, probe_windows).cpu().numpy()
        split = int(PROBE_FIT * len(z))
        fit = z[:split], probe_actions[:split]
        test = z[split:], probe_actions[split:]
        metrics["probe"], metrics["majority"] = linear_probe(*fit, *test)
    for model in models:
        model.train()
    return {name: float(value) for name, value in metrics.items()}


@torch.no_grad()
def write_latents(idm, quantizer, frames_dir, latents_dir, game, context, device):
    """Labels each valid window of each shard with its latent action; other rows hold zeros."""
    idm.eval()
    quantizer.eval()
    dynamics_id = common.fingerprint(idm, quantizer)
    z_dim = idm.head.out_features
    _, _, some_codes = quantizer(torch.zeros(1, z_dim, device=device))
    num_codes = some_codes.shape[1]  # C * P; 0 without VQ
    paths = common.list_shards(frames_dir)
    bar = common.progress_bar(len(paths), "shard", f"latents of {frames_dir}")
    read = functools.partial(common.read_shard, game=game, context=context)
    for shard in common.in_background(read, paths):
        obs = torch.from_numpy(shard.obs)
        z = torch.zeros(len(obs), z_dim, dtype=torch.float16)
        codes = torch.zeros(len(obs), num_codes, dtype=torch.uint8)
        for rows in torch.from_numpy(np.flatnonzero(shard.valid)).split(1024):
            windows = obs[rows[:, None] + torch.arange(-context, 2)]  # (B, k + 2, S, S, 3)
            batch_z = idm(windows.to(device))  # (B, Z)
            check_range(batch_z)
            z[rows] = batch_z.half().cpu()
            codes[rows] = quantizer(batch_z)[2].byte().cpu()
        path = latents_dir / shard.path.name.replace("frames", "latents")
        source = dict(dynamics_id=dynamics_id, frames_id=common.frames_id([shard.path]))
        common.save_npz(path, source, z=z, codes=codes, valid=shard.valid)
        bar.update()
    bar.close()


def load_evaluation_windows(args, device):
    """Held-out windows; windows of random play and their true actions, or None.

    The probe uses random play, because there o_t says nothing about the action, so z that only
    reveals the place fails. Without it (own videos), the held-out frames are probed; fit and test
    windows may then be of the same episode, which flatters the probe.
    """
    test = common.FrameStore(args, "test", args.context, device)
    probed = test
    if (args.data_dir / args.game / "random").exists():
        probed = common.FrameStore(args, "random", args.context, device)
    test_windows = test.windows_at(test.draw(TEST_WINDOWS))
    # in the order of the files: the last ones, on which the probe is tested, are of other episodes
    probe_rows = probed.draw(TEST_WINDOWS).sort()[0]
    probe_actions = common.true_actions_to_report_on(probed, probe_rows)
    if probe_actions is not None:
        print(f"probe: true actions of {probed.folder}, to report on, not to learn")
    return test_windows, probed.windows_at(probe_rows), probe_actions


def model_config(args, frame_size):
    """What the constructors of the three networks need; the checkpoint carries it."""
    window = dict(frame_size=frame_size, context=args.context)
    z_dim = args.codebooks * args.latents_per_codebook * args.embedding_dim
    quantizer = dict(
        codebooks=args.codebooks,
        positions=args.latents_per_codebook,
        embeddings=args.embeddings,
        embedding_dim=args.embedding_dim,
        decay=args.vq_decay,
    )
    return dict(
        idm=dict(**window, multiplier=args.multiplier, z_dim=z_dim),
        fdm=dict(
            **window,
            z_dim=z_dim,
            width=args.fdm_width,
            predict_change=args.predict_change,
        ),
        quantizer=quantizer if args.vq else None,
    )


def build_models(config, device):
    """IDM, quantizer and FDM, untrained."""
    idm = IDM(**config["idm"])
    fdm = FDM(**config["fdm"])
    quantizer = EMAVectorQuantizer(**config["quantizer"]) if config["quantizer"] else NoQuantizer()
    for module in (idm, quantizer, fdm):
        module.to(device, memory_format=torch.channels_last)
    return idm, quantizer, fdm


def make_optimizer(args, parameters):
    """AdamW and its schedule: the learning rate rises from 10% to its peak, then falls to 1%,
    linearly (official code).
    """
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay, fused=True)
    steps = [0, args.warmup_steps, max(args.grad_steps, args.warmup_steps + 1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: float(np.interp(step, steps, [0.1, 1.0, 0.01]))
    )
    return optimizer, schedule


@torch.no_grad()
def scale_head(idm, windows, std):
    """For --z-std, not in the paper: data-dependent initialization (Salimans & Kingma 2016). Each
    number of z gets mean 0 and this std over the windows uint8 (B, k + 2, S, S, 3).
    """
    z = idm(windows)
    scale = std / (z.std(0) + 1e-8)
    idm.head.weight *= scale[:, None]
    centered = idm.head.bias - z.mean(0)
    idm.head.bias.copy_(centered * scale)


def keep_trained(output, game):
    """Ends the run if an untrained IDM would replace a trained one."""
    if output.exists():
        earlier = common.load_checkpoint(output, "latent_dynamics", game)
        if earlier["grad_step"] > 0:
            common.fail(f"{output} is trained; --grad-steps 0 takes a --runs-dir of its own")


def main(args):
    device = common.pick_device(args)
    torch.manual_seed(args.seed)
    data, run = args.data_dir / args.game, args.runs_dir / args.game
    output, state = run / "latent_dynamics.pt", run / "train_latent_dynamics_state.pt"
    common.lock(output)
    if not 2 <= args.embeddings <= 256:
        common.fail(f"--embeddings {args.embeddings}: a code is stored in one byte, 2 to 256 fit")
    if args.grad_steps == 0:
        keep_trained(output, args.game)

    # --- data
    store = common.FrameStore(args, "train", args.context, device, pool_frames=args.pool_frames)
    size = store.frame_size
    train_frames_id = common.frames_id(common.list_shards(store.folder))
    # the FDM is tested on the expert's play, the probe of z on random play
    test_windows, probe_windows, probe_actions = load_evaluation_windows(args, device)

    # --- networks
    config = model_config(args, size)
    idm, quantizer, fdm = build_models(config, device)
    if args.z_std:
        scale_head(idm, store.windows_at(store.draw(512)), args.z_std)
    # the codebooks are moving averages; another quantizer may have parameters
    parameters = [*idm.parameters(), *fdm.parameters(), *quantizer.parameters()]
    optimizer, schedule = make_optimizer(args, parameters)
    compute_loss = torch.compile(dynamics_loss) if args.compile else dynamics_loss
    print(
        f"stage 1: {args.grad_steps:,} updates of {args.batch_size} windows of {args.game}, {size}x"
        f"{size}; {store.num_frames:,} frames, {len(store.obs):,} in memory; on {device}, "
        f"{sum(p.numel() for p in parameters):,} parameters"
    )

    # --- training
    log = common.MetricsLog(run / "train_latent_dynamics.csv", args.grad_steps, "step")
    resumable = dict(idm=idm, quantizer=quantizer, fdm=fdm, sampler=store)
    resumable |= dict(optimizer=optimizer, schedule=schedule, log=log)
    start, _ = common.load_state(state, args, resumable, made_from=train_frames_id)

    def evaluate_and_save(grad_step, train_mse, commitment_loss):
        common.check_finite(grad_step, output, idm, fdm)
        metrics = dict(train_mse=train_mse, commitment_loss=commitment_loss)
        metrics |= evaluate(idm, quantizer, fdm, test_windows, probe_windows, probe_actions)
        log.write(grad_step=grad_step, **metrics)
        if grad_step == 0 and args.grad_steps > 0:
            return  # an earlier checkpoint stays until there is a trained one
        if args.vq and metrics["perplexity_mean"] < 1.5 and grad_step:
            log.bar.write("warning: the codebooks have collapsed, see README, Troubleshooting")
        common.save_checkpoint(
            output,
            kind="latent_dynamics",
            game=args.game,
            grad_step=grad_step,
            recording=store.recording,
            config=config,
            dynamics_id=common.fingerprint(idm, quantizer),
            idm=idm.state_dict(),
            quantizer=quantizer.state_dict(),
            fdm=fdm.state_dict(),
        )
        common.save_state(state, args, grad_step, resumable, made_from=train_frames_id)

    # row 0 of the CSV: the untrained IDM, a control of the probe; saved only with --grad-steps 0
    if start == 0:
        evaluate_and_save(0, float("nan"), float("nan"))
    for grad_step in range(start + 1, args.grad_steps + 1):
        # a minibatch of windows o_{t-k} .. o_{t+1}
        windows = store.windows_at(store.draw(args.batch_size))
        # the IDM labels them with z_t; the FDM predicts o_{t+1}, given the quantized z_t
        losses = compute_loss(idm, quantizer, fdm, windows, args.commitment_cost)
        loss, mse, commitment_loss = losses
        # one step of AdamW for both networks; the codebooks moved in the forward pass
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        log.bar.update()
        if grad_step % args.eval_every == 0 or grad_step == args.grad_steps:
            evaluate_and_save(grad_step, mse, commitment_loss)
    log.bar.close()

    # --- label all frames once, for stages 2 and 3
    for split in ("train", "test"):
        write_latents(idm, quantizer, data / split, run / split, args.game, args.context, device)
    print(f"latents and checkpoint: {run}")
    common.print_next("train_latent_bc.py", args)


if __name__ == "__main__":
    common.run(main, Args)
