"""The paper's baseline: ILPO, imitating latent policies from observation (Edwards et al. 2019; paper, appendix A.5).

There is no IDM. A generator predicts the change o_{t+1} - o_t that each of K discrete latents z would bring, and only the
nearest of the K predictions is trained: so each z comes to stand for one kind of change. A latent policy pi(z | o_t) is
trained on the same frames so that the expectation of the K predictions under it comes near o_{t+1}.

Nothing keeps all K latents in use: one that never is the nearest never learns, and then never becomes it. Struckmeier and
Kyrki (2023) describe this collapse, and the paper met it in several games. So the histogram of the nearest latents and the
entropy of pi are logged at each report: a perplexity near 1 means that one latent stands for everything.

Known of ILPO are the two losses and Adam's settings. Not known are the paper's number of latents, networks, batch and updates
for it: here they are LAPO's (A.4), and K is the number of Procgen's actions.

reads   data/<game>/{train,test}/frames_NNN.npz (labels only to report how well z tells the true actions)
writes  runs/<game>/ilpo.pt, runs/<game>/train_ilpo.csv

paper scale   python train_ilpo.py --game bigfish
one level     python collect_data.py --game coinrun --num-levels 1, then python train_ilpo.py --game coinrun --latents 4 (A.5)
CPU sized     python train_ilpo.py --game coinrun --multiplier 0.5 --fdm-width 8 --batch-size 32 --lr 1e-3 --grad-steps 1000 \\
                  --latents 4 --eval-windows 512 --eval-every 250
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

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
    pool_frames: int = 1_000_000
    """Frames held in memory at once (12 KB each at 64x64); more on disk than that are streamed."""
    eval_every: int = 2000
    """Gradient steps between reports on held-out episodes."""
    eval_windows: int = 4096
    """Held-out windows to report on, and as many training windows to fit the probe."""

    latents: int = 15
    """K: discrete latents. The paper's number is not known; 15 is that of Procgen's actions (Edwards et al. on CoinRun: 4)."""
    context: int = 1
    """k: frames before o_t that the generator sees (LAPO's, A.4: 1); the policy sees o_t alone."""
    multiplier: float = 4
    """Multiplies IMPALA's channels 16, 32, 32 (A.4: 4)."""
    fdm_width: int = 24
    """Channels of the U-Net's first block (official code: 24, 7.8M parameters)."""
    grad_steps: int = 70_000
    """Updates (not known for ILPO; those of stage 1)."""
    batch_size: int = 128
    """Windows (stage 2: frames) an update (A.4); under torchrun, of each process."""
    lr: float = 2e-4
    """Adam's learning rate, constant (Edwards et al.)."""
    adam_beta1: float = 0.5
    """Adam's decay of the gradient's mean (Edwards et al.)."""


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


class DiscreteLatentPolicy(nn.Module):
    """pi(z | o_t) over K discrete latents, from an encoder E(o_t): the convolutions and the layer after them."""

    def __init__(self, frame_size, multiplier, latents):
        super().__init__()
        self.cnn = ImpalaCNN(3, frame_size, multiplier)
        self.hidden = nn.Linear(self.cnn.num_features, 256)
        self.head = nn.Linear(256, latents)

    def forward(self, obs):
        """uint8 (B, S, S, 3) -> logits of pi (B, K)"""
        return self.head(F.relu(self.hidden(self.cnn(to_input(obs[:, None])))))


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


def predict_all(generator, past, latents):
    """What each latent would lead to: past uint8 (B, k + 1, S, S, 3) -> o_{t+1} (B, K, 3, S, S), K passes for each window."""
    z = torch.eye(latents, device=past.device).repeat(len(past), 1)  # (B * K, K): every latent beside every window
    return generator(past.repeat_interleave(latents, 0), z).unflatten(0, (len(past), latents))


def squared_errors(predicted, windows):
    """predicted (B, K, 3, S, S), windows uint8 (B, k + 2, S, S, 3) -> each latent's mean squared error in o_{t+1} (B, K)"""
    return (predicted - to_input(windows[:, -1:])[:, None]).pow(2).mean((2, 3, 4))


@torch.no_grad()
def nearest_latents(generator, windows, latents, batch_size=64):
    """uint8 (B, k + 2, S, S, 3) -> the latent whose prediction comes nearest to o_{t+1}, int64 (B,); a few windows at a time"""
    parts = windows.split(batch_size)
    return torch.cat([squared_errors(predict_all(generator, part[:, :-1], latents), part).argmin(1) for part in parts])


def ilpo_loss(policy, generator, windows, latents):
    """windows uint8 (B, k + 2, S, S, 3) -> loss (), error of the nearest prediction (), error of the expectation under pi ()

    Errors are in o_{t+1}, which are those in the change o_{t+1} - o_t: the generator adds the change to o_t itself. All
    latents are tried without gradients, then the nearest is predicted once more with them. So the first error trains nothing
    but the generator for the nearest latent, the second nothing but the policy with its encoder.
    """
    past, target = windows[:, :-1], to_input(windows[:, -1:])
    generator.eval()  # batch norm by its running statistics: the choice hangs on no other window and on no other latent
    with torch.no_grad():
        predicted = predict_all(generator, past, latents)  # (B, K, 3, S, S)
        nearest = squared_errors(predicted, windows).argmin(1)
    generator.train()
    nearest_error = F.mse_loss(generator(past, F.one_hot(nearest, latents).float()), target)
    pi = policy(windows[:, -2]).softmax(-1)  # (B, K)
    expected_error = F.mse_loss(torch.einsum("bk,bkchw->bchw", pi, predicted), target)
    return nearest_error + expected_error, nearest_error, expected_error


def mapped_accuracy(train_z, train_actions, test_z, test_actions, latents):
    """Share of held-out actions told by the best map from latents to actions, and that of the majority class; all int [N].

    The map gives each latent the true action that it most often goes with in training windows, as good as a linear classifier
    of one-hot latents can be; a latent that never came up there gets the majority class.
    """
    table = np.zeros((latents, common.NUM_ACTIONS))
    np.add.at(table, (train_z, train_actions), 1)
    majority = table.sum(0).argmax()
    action = np.where(table.any(1), table.argmax(1), majority)
    return float((action[test_z] == test_actions).mean()), float((test_actions == majority).mean())


@torch.no_grad()
def report(policy, generator, train, test, latents, device, batch_size=64):
    """Figures on held-out episodes, as a dict. train, test: (windows uint8 [N, k + 2, S, S, 3], true actions int [N] or None)."""
    policy.eval(), generator.eval()
    (train_windows, train_actions), (test_windows, test_actions) = train, test
    nearest, pi, error, expected_error, copy_error = [], [], 0.0, 0.0, 0.0
    for part in torch.from_numpy(test_windows).split(batch_size):
        windows = part.to(device)
        predicted = predict_all(generator, windows[:, :-1], latents)  # (B, K, 3, S, S)
        errors, target = squared_errors(predicted, windows), to_input(windows[:, -1:])
        nearest.append(errors.argmin(1))
        pi.append(policy(windows[:, -2]).softmax(-1))
        weight = len(windows) / len(test_windows)
        error += errors.min(1)[0].mean() * weight
        expected_error += F.mse_loss(torch.einsum("bk,bkchw->bchw", pi[-1], predicted), target) * weight
        copy_error += F.mse_loss(to_input(windows[:, -2:-1]), target) * weight
    test_z, pi = torch.cat(nearest).cpu().numpy(), torch.cat(pi)
    share = np.bincount(test_z, minlength=latents) / len(test_z)
    figures = dict(
        test_error=error, expected_error=expected_error, copy_error=copy_error,
        perplexity=common.perplexity(share), latents_used=float((share > 0).mean()), histogram=" ".join(f"{x:.3f}" for x in share),
        policy_entropy=torch.distributions.Categorical(pi).entropy().mean(),  # in nats, log K at most
        policy_perplexity=common.perplexity(pi.mean(0).cpu().numpy()),
    )  # fmt: skip
    if train_actions is not None and test_actions is not None:
        train_z = nearest_latents(generator, torch.from_numpy(train_windows).to(device), latents).cpu().numpy()
        figures["accuracy"], figures["majority"] = mapped_accuracy(train_z, train_actions, test_z, test_actions, latents)
    policy.train(), generator.train()
    return figures


def main(args):
    common.check_flags(args, shares=("adam_beta1",))
    if args.latents < 2:
        common.fail(f"--latents {args.latents} leaves nothing to choose from; it must be 2 or above")
    if args.fdm_width < 2:
        common.fail(f"--fdm-width {args.fdm_width} must be 2 or above: blocks halve it")
    device = common.pick_device(args.device)
    common.seed_everything(args.seed)
    data, run = args.data_dir / args.game, args.runs_dir / args.game
    run_state = common.RunState(run, "train_ilpo", args)
    if run_state.finished(run / "ilpo.pt"):
        return

    store = common.FrameStore(data / "train", args.game, args.context, args.pool_frames, args.seed, device)
    train, test = (
        (windows, common.true_actions_to_report_on(where, args.game))
        for windows, where in (
            common.fixed_windows(data / split, args.game, args.context, args.eval_windows, args.seed) for split in ("train", "test")
        )
    )
    policy = DiscreteLatentPolicy(store.frame_size, args.multiplier, args.latents).to(device, memory_format=torch.channels_last)
    generator = FDM(store.frame_size, args.context, args.latents, args.fdm_width, predict_change=True)
    share_batch_norms(generator)
    generator.to(device, memory_format=torch.channels_last)
    parameters = [*policy.parameters(), *generator.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, betas=(args.adam_beta1, 0.999), fused=True)
    print(
        f"ILPO: {args.grad_steps:,} updates of {args.batch_size} windows, each tried with {args.latents} latents, from "
        f"{store.num_frames:,} frames of {args.game} at {store.frame_size}x{store.frame_size} "
        f"({store.num_slots * store.slot_rows:,} of them in memory) on {device}; policy "
        f"{sum(p.numel() for p in policy.parameters()):,}, generator {sum(p.numel() for p in generator.parameters()):,} parameters"
    )

    log = common.MetricsLog(run / "train_ilpo.csv", args.grad_steps, "step")
    parts = dict(policy=policy, generator=generator, optimizer=optimizer, store=store, log=log)
    run_state.load(parts)
    networks = (common.parallel(policy), common.parallel(generator))
    for grad_step in range(run_state.step + 1, args.grad_steps + 1):
        windows = store.sample_windows(args.batch_size)
        with common.autocast(args.precision, device):
            loss, error, expected_error = ilpo_loss(*networks, windows, args.latents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.bar.update()
        if common.leads() and (grad_step % args.eval_every == 0 or grad_step == args.grad_steps):
            log.write(
                grad_step=grad_step, train_error=error.detach(), train_expected_error=expected_error.detach(),
                **report(policy, generator, train, test, args.latents, device),
            )  # fmt: skip
            common.check_finite(grad_step, run / "ilpo.pt", policy, generator)
            common.save_checkpoint(
                run / "ilpo.pt", kind="ilpo", game=args.game, grad_step=grad_step, frame_size=store.frame_size,
                start_level=store.settings["start_level"], num_levels=store.settings["num_levels"], context=args.context,
                multiplier=args.multiplier, fdm_width=args.fdm_width, latents=args.latents,
                policy=policy.state_dict(), generator=generator.state_dict(),
            )  # fmt: skip
        if run_state.due():
            run_state.save(grad_step, parts)
    log.bar.close()
    run_state.finish()
    print(f"latent policy and generator: {run / 'ilpo.pt'}\nnext: python decode_online_ppo.py --game {args.game} --method ilpo")


if __name__ == "__main__":
    with common.process_group():
        main(tyro.cli(Args))
