"""Data: train a PPO expert on a Procgen game, then record it as video without actions (paper, section 5).

The expert is PPO as in Cobbe et al. 2020, "Leveraging procedural generation to benchmark reinforcement learning".
Its sampled actions are recorded. Frames and labels go to different files, so that stages 1 and 2 cannot see an action.

reads   experts/<game>.pt (trained first if it is not there)
writes  experts/<game>.pt, data/<game>/{train,test}/frames_NNN.npz and labels_NNN.npz

paper scale   python collect_data.py --game bigfish
CPU sized     python collect_data.py --game coinrun --train-frames 80_000 --test-frames 16_000 --frame-size 32 --num-levels 5 \\
                  --experts-dir experts/32x32
"""

import json
import shutil
import time
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
    experts_dir: Path = Path("experts")
    """The expert is <experts-dir>/<game>.pt; an expert that is there is used, not trained again."""
    checkpoint_minutes: float = 5
    """Minutes between two writes of the whole state, from which --resume goes on."""
    resume: bool = False
    """Go on with the run that was stopped or killed, or start where none was; one that is finished stays as it is."""
    compile: bool = True
    """On a GPU, compile the networks (torch.compile with CUDA graphs); left aside on a CPU, where it takes minutes, and under torchrun."""

    train_frames: int = 8_000_000
    """Frames to record for training (section 5: about 8M); 0 trains the expert only."""
    test_frames: int = 100_000
    """Frames to record from other seeds, to report on."""
    frame_size: Literal[64, 32, 16] = 64
    """Side of the frames in pixels: 64 (the paper's), 32 or 16 (means over blocks). The expert sees the same frames."""
    start_level: int = 0
    """First level of the game."""
    num_levels: int = 0
    """Number of levels; 0 means all of them (the paper's)."""
    temperature: float = 1.0
    """Divides the expert's logits where it is evaluated and recorded: 1 samples its policy (the paper's), less is less random."""

    expert_steps: int = 25_000_000
    """Environment steps of PPO (Cobbe et al.: 25M)."""
    expert_multiplier: float = 1
    """Multiplies the expert's IMPALA channels (16, 32, 32)."""
    num_envs: int = 64
    """Games that step together."""
    rollout_steps: int = 256
    """Steps of each game between two updates."""
    minibatches: int = 8
    """Minibatches an epoch."""
    epochs: int = 3
    """Passes over a rollout."""
    expert_lr: float = 5e-4
    """Adam's learning rate, constant."""
    gamma: float = 0.999
    """Discount."""
    gae_lambda: float = 0.95
    """Generalised advantage estimation."""
    clip: float = 0.2
    """Clips both the probability ratio and the value's change."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Clips the gradient's norm."""


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


class ExpertPolicy(nn.Module):
    """Actor and critic on one IMPALA-CNN with a hidden layer of 256 (Cobbe et al. 2020)."""

    def __init__(self, frame_size, multiplier):
        super().__init__()
        self.cnn = ImpalaCNN(3, frame_size, multiplier)
        self.hidden = nn.Linear(self.cnn.num_features, 256)
        self.actor = nn.Linear(256, common.NUM_ACTIONS)
        self.critic = nn.Linear(256, 1)
        nn.init.orthogonal_(self.actor.weight, 0.01)  # starts near uniform
        nn.init.orthogonal_(self.critic.weight, 1.0)
        nn.init.zeros_(self.actor.bias)
        nn.init.zeros_(self.critic.bias)

    def forward(self, obs):
        """uint8 (B, S, S, 3) -> logits (B, 15), value (B,)"""
        h = F.relu(self.hidden(self.cnn(to_input(obs[:, None]))))  # (B, 256)
        return self.actor(h), self.critic(h)[:, 0]


# --- PPO -----------------------------------------------------------------------------------------------------------


class RewardNormalizer:
    """Divides rewards by the running standard deviation of the discounted return, then clips them to +-10.

    As OpenAI's VecNormalize, which Cobbe et al. used: the sum restarts where an episode ends, the mean is not subtracted.
    """

    def __init__(self, num_envs, gamma):
        self.gamma = gamma
        self.statistics = common.RunningMeanStd(shape=())
        self.discounted = np.zeros(num_envs)

    def __call__(self, rewards, firsts):
        """rewards float (T, B) and firsts bool (T, B) of the same observations, step by step -> float32 (T, B)"""
        normalized = np.empty(rewards.shape, np.float32)
        for t, (reward, first) in enumerate(zip(rewards, firsts)):
            self.discounted = self.discounted * self.gamma + reward
            self.statistics.update(self.discounted)
            self.discounted[first] = 0.0
            normalized[t] = np.clip(reward / np.sqrt(self.statistics.var + 1e-8), -10, 10)
        return normalized

    def state_dict(self):
        statistics = {name: float(value) for name, value in vars(self.statistics).items()}  # mean, var and count
        return dict(statistics=statistics, discounted=torch.from_numpy(self.discounted.copy()))

    def load_state_dict(self, saved):
        vars(self.statistics).update(saved["statistics"])
        self.discounted = saved["discounted"].numpy()


def compute_gae(rewards, values, firsts, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016).

    rewards (T, B): what the action at t earned. values (T + 1, B) and firsts (T + 1, B) of the frames; no value or
    advantage crosses an episode's end. Returns advantages (T, B) and the value targets (T, B).
    """
    advantages, advantage = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        alive = 1.0 - firsts[t + 1].float()
        delta = rewards[t] + gamma * values[t + 1] * alive - values[t]
        advantages[t] = advantage = delta + gamma * gae_lambda * alive * advantage
    return advantages, advantages + values[:-1]


def ppo_loss(logits, value, action, old_logprob, old_value, advantage, target, clip, value_coef, entropy_coef):
    """PPO's clipped loss (Schulman et al. 2017) on one minibatch, all (B,) but logits (B, A); value clipped as well.

    Returns the loss and a dict of detached figures.
    """
    distribution = torch.distributions.Categorical(logits=logits, validate_args=False)
    log_ratio = distribution.log_prob(action) - old_logprob
    ratio = log_ratio.exp()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    policy_loss = -torch.min(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
    clipped_value = old_value + (value - old_value).clamp(-clip, clip)
    value_loss = 0.5 * torch.max((value - target) ** 2, (clipped_value - target) ** 2).mean()
    entropy = distribution.entropy().mean()
    loss = policy_loss + value_coef * value_loss - entropy_coef * entropy
    figures = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy, kl=(ratio - 1 - log_ratio).mean())
    return loss, {name: figure.detach() for name, figure in figures.items()}


def sample_actions(logits, generator):
    """logits (B, A) -> actions int64 (B,), drawn from the softmax."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def train_expert(args, device, path, run_state):
    """Trains ExpertPolicy with PPO and writes it, in half precision, to `path`."""
    policy = ExpertPolicy(args.frame_size, args.expert_multiplier).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.expert_lr, eps=1e-5, fused=True)
    seed = common.derive_seed(args.seed, "expert")
    envs = common.HalvedEnvs(args.game, args.num_envs, seed, args.start_level, args.num_levels, args.frame_size)
    generator = torch.Generator(device).manual_seed(seed)
    # Cobbe et al. left VecNormalize's own discount of 0.99 in place; gamma here, as CleanRL and others do since
    normalize_rewards = RewardNormalizer(args.num_envs, args.gamma)
    compile = common.compiles(args, device)
    forward = common.compiled(policy.forward, compile)
    minibatch_loss = common.compiled(
        lambda obs, *rest: ppo_loss(*policy(obs), *rest, args.clip, args.value_coef, args.entropy_coef), compile
    )

    # a rollout's last row is the frame that the next one starts from
    t, b, s = args.rollout_steps, args.num_envs, args.frame_size
    obs_buffer = torch.zeros(t + 1, b, s, s, 3, dtype=torch.uint8, device=device)
    logits = torch.zeros(t + 1, b, common.NUM_ACTIONS, device=device)
    values = torch.zeros(t + 1, b, device=device)
    actions = torch.zeros(t, b, dtype=torch.long, device=device)
    rewards, firsts = np.zeros((t + 1, b), np.float32), np.zeros((t + 1, b), bool)  # to the device with the whole rollout

    updates = max(1, args.expert_steps // (t * b))
    log = common.MetricsLog(args.runs_dir / args.game / "expert.csv", updates * t * b, "step")
    parts = dict(policy=policy, optimizer=optimizer, envs=envs, generator=generator, normalize_rewards=normalize_rewards, log=log)
    run_state.load(parts)
    for update in range(run_state.step // (t * b) + 1, updates + 1):
        with torch.no_grad():
            for step in range(t + 1):
                for games, half in envs.halves:
                    reward, frames, first = games.observe()
                    obs_buffer[step, half] = obs = common.to_device(frames, device)
                    logits[step, half], values[step, half] = forward(obs)
                    if step < t:
                        actions[step, half] = sample_actions(logits[step, half], generator)
                        games.act(actions[step, half].cpu().numpy())  # these step while we turn to the other half
                    rewards[step, half], firsts[step, half] = reward, first  # the reward of the action before
        logprobs = logits[:-1].log_softmax(-1).gather(-1, actions[..., None])[..., 0]
        normalized, ends = (common.to_device(x, device) for x in (normalize_rewards(rewards[1:], firsts[1:]), firsts))
        advantages, targets = compute_gae(normalized, values, ends, args.gamma, args.gae_lambda)

        flat = [x.flatten(0, 1) for x in (obs_buffer[:-1], actions, logprobs, values[:-1], advantages, targets)]
        for _ in range(args.epochs):
            for rows in torch.randperm(t * b, generator=generator, device=device).chunk(args.minibatches):
                optimizer.zero_grad()  # before a compiled forward pass, which takes the memory of the last gradients
                loss, figures = minibatch_loss(*(x[rows] for x in flat))
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
                optimizer.step()
        figures = {name: figure.clone() for name, figure in figures.items()}  # the next rollout may overwrite them

        common.check_finite(update * t * b, args.runs_dir / args.game / "expert.pt", policy)
        log.bar.update(t * b)
        if update % 5 == 0 or update == updates:  # a row for every 82k steps at the paper's settings
            finished = [episode_return for _, episode_return in envs.take_finished()]
            mean_return = float(np.mean(finished)) if finished else float("nan")
            log.write(env_step=update * t * b, mean_return=mean_return, episodes=len(finished), **figures)
            common.save_checkpoint(
                path if update == updates else args.runs_dir / args.game / "expert.pt",
                kind="expert", game=args.game, env_step=update * t * b, mean_return=mean_return,
                frame_size=args.frame_size, multiplier=args.expert_multiplier,
                start_level=args.start_level, num_levels=args.num_levels,
                model={name: weight.half() for name, weight in policy.state_dict().items()},
            )  # fmt: skip
        if run_state.due(last=update == updates):
            run_state.save(update * t * b, parts, phase="expert")
    log.bar.close()


def load_expert(args, device, path):
    """The expert at `path`, checked against the frames and levels asked for. Returns (policy, env steps it was trained)."""
    made_by = f"python collect_data.py --game {args.game} with another --experts-dir"
    expert = common.load_checkpoint(path, "expert", args.game, made_by)
    for name in ("frame_size", "start_level", "num_levels"):
        if expert[name] != getattr(args, name):
            flag = "--" + name.replace("_", "-")
            common.fail(f"{path} was trained with {flag} {expert[name]}, not {getattr(args, name)}; pass that, or train one: {made_by}")
    policy = ExpertPolicy(expert["frame_size"], expert["multiplier"])
    expert.fill(policy, "model")
    return policy.to(device, memory_format=torch.channels_last).eval(), expert["env_step"]


# --- recording -----------------------------------------------------------------------------------------------------


def acting(policy, temperature, generator):
    """A function of obs uint8 [B, S, S, 3] (numpy) that returns sampled actions int64 (B,) on the CPU."""
    return lambda obs: sample_actions(policy(common.to_device(obs, generator.device))[0] / temperature, generator).cpu()


@torch.no_grad()
def play(envs, act, length):
    """`length` steps of all games: frames uint8 [B, T, S, S, 3], firsts bool, actions uint8 and rewards float32 [B, T].

    act: obs uint8 [B, S, S, 3] of a half -> actions int [B]. The next call goes on from the frame after the last one here.
    """
    shape, size = (envs.num_envs, length), envs.halves[0][0].frame_size
    frames, firsts = np.empty((*shape, size, size, 3), np.uint8), np.empty(shape, bool)
    actions, rewards = np.empty(shape, np.uint8), np.empty(shape, np.float32)
    for step in range(length + 1):
        for games, half in envs.halves:
            reward, obs, first = games.observe()
            if step < length:
                action = act(obs)
                games.act(action)  # these step while we store what they came from, and turn to the other half
                frames[half, step], firsts[half, step], actions[half, step] = obs, first, action
            if step > 0:
                rewards[half, step - 1] = reward
    return frames, firsts, actions, rewards


def record(args, device, policy, split, num_frames, expert_return, run_state):
    """Records `num_frames` frames of the expert's sampled actions in shards of at most num_envs streams x rollout_steps.

    The streams of a shard lie one after the other, each in the order of time. The state after a shard is kept once that shard and
    all before it are on disk, so that a run that was killed goes on from there. Memory holds a few shards.

    policy: obs uint8 (B, S, S, 3) -> logits (B, 15), value (B,)
    """
    seed = common.derive_seed(args.seed, f"record {split}")
    envs = common.HalvedEnvs(args.game, args.num_envs, seed, args.start_level, args.num_levels, args.frame_size)
    generator = torch.Generator(device).manual_seed(seed)
    folder = args.data_dir / args.game / split
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(dict(game=args.game, start_level=args.start_level, num_levels=args.num_levels, seed=args.seed))

    steps = -(-num_frames // args.num_envs)
    shards, total = -(-steps // args.rollout_steps), steps * args.num_envs
    bar = common.progress_bar(total, "frame", split)
    done, parts = 0, dict(envs=envs, generator=generator)
    if run_state.values.get("phase") == split:
        run_state.load(parts)
        done = run_state.step
        bar.update(min(done * args.rollout_steps, steps) * args.num_envs)
    act = acting(policy, args.temperature, generator)

    def played():
        """Shard after shard as it is played, with the state that it leaves behind."""
        for shard in range(done, shards):
            frames, firsts, actions, rewards = play(envs, act, min(args.rollout_steps, steps - shard * args.rollout_steps))
            firsts[:, 0] = True  # a stream starts here: its past lies in another shard
            envs.take_finished()  # nobody asks
            yield (
                shard, dict(obs=frames.reshape(-1, *frames.shape[2:]), first=firsts.reshape(-1), settings=settings),
                dict(action=actions.reshape(-1), reward=rewards.reshape(-1), expert_return=np.float32(expert_return)),
                {name: common.Captured(part) for name, part in parts.items()},
            )  # fmt: skip

    def compress(item):
        shard, frames, labels, captured = item
        return shard, len(frames["obs"]), common.npz_bytes(**frames), common.npz_bytes(**labels), captured

    def compressed():
        """Refuses to go on where there is no room, before any old file is removed."""
        for item in common.in_threads(compress, played(), min(8, max(1, common.num_cores() // 2))):
            shard, rows, frames_npz, _, _ = item
            if shard == 0:  # only now is it known how well the frames compress
                needed, free = 1.05 * len(frames_npz) * total / rows, shutil.disk_usage(folder).free
                print(f"{split}: {total:,} frames will take about {needed / 1e9:.2f} GB of {free / 1e9:.1f} GB free in {folder}")
                if needed > free:
                    common.fail(f"{folder} has no room for {needed / 1e9:.1f} GB of frames; lower --{split}-frames or set --data-dir")
                for old in [*folder.glob("frames_*.npz"), *folder.glob("labels_*.npz")]:
                    old.unlink()
            yield item

    def write(item):
        shard, rows, frames_npz, labels_npz, captured = item
        common.write_bytes(folder / f"labels_{shard:03d}.npz", labels_npz)
        common.write_bytes(folder / f"frames_{shard:03d}.npz", frames_npz)
        return shard, rows, captured

    # while the games go on, several shards are compressed at once, and one after the other is written
    start, rows_written = time.monotonic(), 0
    for shard, rows, captured in common.in_threads(write, compressed(), 1):
        run_state.save(shard + 1, captured, phase=split)
        bar.update(rows)
        rows_written += rows
    bar.close()
    size = sum(path.stat().st_size for path in folder.glob("frames_*.npz"))
    rate = rows_written / (time.monotonic() - start)
    print(f"{split}: {total:,} frames of {size / total:,.0f} bytes each, {rate:,.0f} frames a second")


def main(args):
    common.check_flags(
        args, zero=("train_frames", "start_level", "num_levels", "entropy_coef", "value_coef"), shares=("gamma", "gae_lambda"),
        writes=("runs_dir", "data_dir"),
    )  # fmt: skip
    rollout = args.num_envs * args.rollout_steps
    if rollout % args.minibatches or rollout // args.minibatches < 2:
        common.fail(f"a rollout of {rollout} steps does not divide into --minibatches {args.minibatches} of 2 or more")
    device = common.pick_device(args.device)
    common.seed_everything(args.seed)
    data, path = args.data_dir / args.game, args.experts_dir / f"{args.game}.pt"
    run_state = common.RunState(args.runs_dir / args.game, "collect_data", args)
    if run_state.finished(data / "test" / "frames_000.npz" if args.train_frames else path):
        return
    run_state.begin()
    if path.exists():
        print(f"expert: {path} is there and will be used")
    else:
        print(f"expert: PPO on {args.game} for {args.expert_steps:,} steps on {device}, to {path}")
        train_expert(args, device, path, run_state)
    policy, env_step = load_expert(args, device, path)

    seed = common.derive_seed(args.seed, "evaluate expert")
    envs = common.HalvedEnvs(args.game, args.num_envs, seed, args.start_level, args.num_levels, args.frame_size)
    generator = torch.Generator(device).manual_seed(seed)
    forward = common.compiled(policy.forward, common.compiles(args, device))
    returns = common.evaluate(envs, acting(forward, args.temperature, generator), 4)
    print(
        f"expert: mean return {returns.mean():.2f} over {returns.size} episodes of {args.num_levels or 'all'} levels "
        f"after {env_step:,} steps of PPO (the paper's, on all levels: {common.RETURNS[args.game][1]:.2f})"
    )
    if args.train_frames == 0:
        run_state.finish()
        return
    if run_state.values.get("phase") != "test":
        record(args, device, forward, "train", args.train_frames, returns.mean(), run_state)
    record(args, device, forward, "test", args.test_frames, returns.mean(), run_state)
    run_state.finish()
    print(f"frames and labels: {data}\nnext: python train_latent_dynamics.py --game {args.game}")


if __name__ == "__main__":
    main(tyro.cli(Args))
