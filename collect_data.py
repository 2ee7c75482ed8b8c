"""Data: train a PPO expert on a Procgen game and record its play as video (paper, section 5).

The expert is PPO as in Cobbe et al. 2020; its sampled actions are recorded. Frames and labels are
different files, so that stages 1 and 2 are action-free by construction. A small third split records
uniformly random actions, on which stage 1 probes its latent actions.

reads   experts/<game>.pt, if it is there
writes  otherwise experts/<game>.pt and runs/<game>/expert.csv; data/<game>/{train,test,random}/
        frames_NNN.npz and labels_NNN.npz

paper scale     python collect_data.py --game bigfish
on a CPU        python collect_data.py --game miner --solver --plain --frame-size 32
                    --train-frames 262_144 --test-frames 16_384
                python collect_data.py --game starpilot --plain --frame-size 32 --minibatches 16
                    --expert-multiplier 0.5 --expert-steps 3_000_000 --train-frames 131_072
PPO from        python collect_data.py --game bigfish --train-frames 0 --expert-steps 4_000_000
scratch (6.1)       --expert-multiplier 4 --runs-dir runs/scratch --experts-dir runs/scratch/experts
"""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common  # before torch
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from experts.solvers import Solver


@dataclass
class Args(common.RunArgs):
    resume: bool = False
    """Continue the run that was stopped, or start one if there is none."""
    overwrite: bool = False
    """Replace frames that are there."""
    experts_dir: Path = Path("experts")
    """An expert <experts-dir>/<game>.pt that is there is used, not trained again."""

    train_frames: int = 8_000_000
    """Frames to record for training (section 5: about 8M); 0 trains the expert only."""
    test_frames: int = 100_000
    """Frames of other seeds, and of the next levels if --num-levels is set, for evaluation."""
    random_frames: int = 32_768
    """Frames of uniformly random play, on the same levels as the test frames."""
    frame_size: Literal[64, 32, 16] = 64
    """Side of the frames in pixels; below 64 (the paper's), means of blocks."""
    num_levels: int = 0
    """Train frames are of levels 0 .. n - 1, on which later stages play as well, test and random
    frames of the next n; 0 means all levels (the paper's)."""
    plain: bool = False
    """No backgrounds, one theme, monochrome assets: the same games and rules, in plain pictures in
    which actions are a larger part of what changes. For laptops, not in the paper."""
    one_theme: bool = False
    """One theme for each game, with backgrounds and sprites."""
    solver: bool = False
    """Record a solver in place of a PPO expert: maze, heist, miner, plunder, and with --one-theme
    or --plain bigfish (experts/solvers.py)."""
    random_play: bool = False
    """Record uniformly random actions in every split; no expert is needed."""
    temperature: float = 1.0
    """Divides the expert's logits when it is evaluated and recorded; 1 (the paper's) samples it."""

    expert_steps: int = 25_000_000
    """Environment steps of PPO (Cobbe et al.; section 5 says 50M, 6.1 says 25M)."""
    expert_multiplier: float = 1
    """Multiplies the expert's IMPALA channels 16, 32, 32 (Cobbe et al.)."""
    num_envs: int = 64
    """Games that step together."""
    rollout_steps: int = 256
    """Steps of each game between updates."""
    minibatches: int = 8
    """Minibatches per epoch."""
    epochs: int = 3
    """Passes over a rollout."""
    expert_lr: float = 5e-4
    """Learning rate of Adam, constant."""
    gamma: float = 0.999
    """Discount."""
    gae_lambda: float = 0.95
    """Lambda of generalized advantage estimation."""
    clip: float = 0.2
    """Clips the probability ratio and the value's change."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Clips the gradient's norm."""


# --- networks -------------------------------------------------------------------------------------
# Copies of train_latent_dynamics.py; tests/test_copies.py keeps them equal.


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


class ExpertPolicy(nn.Module):
    """Actor and critic on one IMPALA-CNN with a hidden layer of 256 (Cobbe et al. 2020)."""

    def __init__(self, frame_size, multiplier):
        super().__init__()
        self.cnn = ImpalaCNN(3, frame_size, multiplier)
        self.hidden = nn.Linear(self.cnn.num_features, 256)
        self.actor = nn.Linear(256, common.NUM_ACTIONS)
        self.critic = nn.Linear(256, 1)
        for head, gain in ((self.actor, 0.01), (self.critic, 1.0)):  # actions start near uniform
            nn.init.orthogonal_(head.weight, gain)
            nn.init.zeros_(head.bias)

    def forward(self, obs):
        """uint8 (B, S, S, 3) -> logits (B, 15), value (B,)"""
        h = F.relu(self.hidden(self.cnn(common.to_input(obs[:, None]))))  # (B, 256)
        return self.actor(h), self.critic(h)[:, 0]


# --- PPO ------------------------------------------------------------------------------------------


def compute_gae(rewards, values, dones, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016): rewards (T, B) and dones (T, B) of
    the actions at t, values (T + 1, B) of the frames -> advantages (T, B), value targets (T, B).
    """
    advantages, advantage = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        alive = 1.0 - dones[t].float()
        delta = rewards[t] + gamma * values[t + 1] * alive - values[t]
        advantages[t] = advantage = delta + gamma * gae_lambda * alive * advantage
    return advantages, advantages + values[:-1]


def ppo_loss(logits, value, action, old_logprob, old_value, advantage, target, args):
    """PPO's loss (Schulman et al. 2017) on a minibatch, all (B,) but logits (B, A), and metrics.
    The value is clipped as well.
    """
    distribution = torch.distributions.Categorical(logits=logits, validate_args=False)
    log_ratio = distribution.log_prob(action) - old_logprob
    ratio = log_ratio.exp()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = advantage * ratio.clamp(1 - args.clip, 1 + args.clip)
    policy_loss = -torch.min(advantage * ratio, clipped).mean()
    clipped_value = old_value + (value - old_value).clamp(-args.clip, args.clip)
    value_loss = 0.5 * torch.max((value - target) ** 2, (clipped_value - target) ** 2).mean()
    entropy = distribution.entropy().mean()
    loss = policy_loss + args.value_coef * value_loss - args.entropy_coef * entropy
    kl = (ratio - 1 - log_ratio).mean()
    return loss, dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy, kl=kl)


def ppo_update(policy, optimizer, inputs, steps, args, generator):
    """Epochs of minibatches. inputs: what the policy sees, steps: action .. target of ppo_loss(),
    all (T, B, ..). Returns the metrics of the last minibatch.
    """
    inputs, steps = ([x.flatten(0, 1) for x in part] for part in (inputs, steps))
    for _ in range(args.epochs):
        permutation = torch.randperm(len(steps[0]), generator=generator, device=generator.device)
        for rows in permutation.chunk(args.minibatches):
            outputs = policy(*(x[rows] for x in inputs))
            loss, metrics = ppo_loss(*outputs, *(x[rows] for x in steps), args)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
            optimizer.step()
    return metrics


def sample_actions(logits, generator):
    """logits (B, A) -> actions int64 (B,), drawn from the softmax."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def train_expert(args, settings, device, path):
    """Trains an ExpertPolicy with PPO; writes it, in half precision, to `path`."""
    policy = ExpertPolicy(args.frame_size, args.expert_multiplier)
    policy.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.expert_lr, eps=1e-5, fused=True)
    seed = common.derive_seed(args.seed, "train expert")
    envs = common.ProcgenEnvs(settings, args.num_envs, seed)
    generator = torch.Generator(device).manual_seed(seed)
    normalize_rewards = common.RewardNormalizer(args.num_envs, args.gamma)

    run, batch = args.runs_dir / args.game, args.rollout_steps * args.num_envs
    updates, state = max(1, args.expert_steps // batch), run / "expert_state.pt"
    parts = dict(policy=policy, optimizer=optimizer, envs=envs, generator=generator)
    parts |= dict(normalize_rewards=normalize_rewards)
    start, _ = common.load_state(state, args, parts)
    log = common.MetricsLog(run / "expert.csv", updates * batch, "step", start)
    for update in range(start // batch + 1, updates + 1):
        steps = []
        with torch.no_grad():
            for _ in range(args.rollout_steps):
                obs = torch.from_numpy(envs.obs).to(device)
                logits, value = policy(obs)
                action = sample_actions(logits, generator)
                logprob = logits.log_softmax(-1).gather(1, action[:, None])[:, 0]
                _, reward, done = envs.step(action.cpu().numpy())
                outcome = torch.from_numpy(normalize_rewards(reward, done)), torch.from_numpy(done)
                steps.append((obs, action, logprob, value, *(x.to(device) for x in outcome)))
            obs, actions, logprobs, values, rewards, dones = map(torch.stack, zip(*steps))
            last_value = policy(torch.from_numpy(envs.obs).to(device))[1]
        all_values = torch.cat([values, last_value[None]])  # (T + 1, B)
        advantages, targets = compute_gae(rewards, all_values, dones, args.gamma, args.gae_lambda)
        rollout = actions, logprobs, values, advantages, targets
        metrics = ppo_update(policy, optimizer, [obs], rollout, args, generator)
        log.bar.update(batch)

        env_step = update * batch
        if update % 5 == 0 or update == updates:  # every 82k steps at the paper's settings
            common.check_finite(env_step, run / "expert.pt", policy)
            returns = [episode_return for _, episode_return in envs.finished]
            mean_return = float(np.mean(returns)) if returns else float("nan")
            envs.finished.clear()
            log.write(env_step=env_step, mean_return=mean_return, episodes=len(returns), **metrics)
            common.save_state(state, args, env_step, parts)
            common.save_checkpoint(
                path if update == updates else run / "expert.pt",
                kind="expert", game=args.game, env_step=env_step, mean_return=mean_return,
                settings=settings, multiplier=args.expert_multiplier,
                policy={name: weight.half() for name, weight in policy.state_dict().items()},
            )  # fmt: skip
    log.bar.close()


# --- recording ------------------------------------------------------------------------------------


def record(args, settings, act, num_frames, folder):
    """Records shards of num_envs streams x rollout_steps frames, one stream after the other.

    act: obs uint8 [B, S, S, 3] -> actions int [B]. The folder appears when it is complete.

    The solver reads plain pictures at 64x64. Other pictures are recorded from a second set of games
    with the same seed, which take the same actions.
    """
    seed = common.derive_seed(args.seed, folder.name)
    envs = common.ProcgenEnvs(settings, args.num_envs, seed)
    solves = args.solver and folder.name != "random"
    twin = envs
    if solves and not args.plain:
        twin = common.ProcgenEnvs(settings | dict(plain=True), args.num_envs, seed)
    b, length = args.num_envs, -(-num_frames // args.num_envs)  # of each stream
    bar, pending = common.progress_bar(length * b, "frame", folder.name), []
    workers = max(1, common.NUM_CORES // 2)  # zlib releases the GIL
    with common.new_folder(folder, args.overwrite) as part, ThreadPoolExecutor(workers) as pool:
        for shard, start in enumerate(range(0, length, args.rollout_steps)):
            steps, first = [], np.ones(b, bool)  # a stream starts: its past is in another shard
            for _ in range(min(args.rollout_steps, length - start)):
                obs, action = envs.obs, act(twin.rendered if solves else envs.obs)
                _, reward, done = envs.step(action)
                if twin is not envs:
                    _, twin_reward, twin_done = twin.step(action)
                    if (reward != twin_reward).any() or (done != twin_done).any():
                        common.fail(
                            f"{args.game} in plain pictures plays differently, so the solver cannot "
                            f"act for it; --one-theme or --plain help"
                        )
                action = np.where(action < 0, 4, action)  # -1 ends an episode (solver)
                steps.append((obs, first, action.astype(np.uint8), reward))
                first = done
            columns = (np.stack(x, 1) for x in zip(*steps))  # [B, T, ..]
            obs, first, action, reward = (x.reshape(-1, *x.shape[2:]) for x in columns)
            frames, labels = dict(obs=obs, first=first), dict(action=action, reward=reward)
            for name, arrays in (("frames", frames), ("labels", labels)):
                path = part / f"{name}_{shard:03d}.npz"
                pending.append(pool.submit(common.save_npz, path, settings, **arrays))
            while len(pending) > 2 * common.NUM_CORES:
                pending.pop(0).result()
            bar.update(len(steps) * b)
        for future in pending:
            future.result()
    bar.close()
    print(f"{folder.name}: {length * b:,} frames in {folder}")


def splits_to_record(args, settings):
    """{split: (frames, settings)} of splits that are not there, or that --overwrite replaces."""
    sizes = dict(train=args.train_frames, test=args.test_frames, random=args.random_frames)
    wanted, splits = {x: n for x, n in sizes.items() if n and args.train_frames}, {}
    for split, num_frames in wanted.items():
        level = 0 if split == "train" else args.num_levels  # test on the next n; 0: all levels
        recorded = settings | dict(start_level=level, split=split, seed=args.seed)
        recorded |= dict(temperature=args.temperature, solver=args.solver, num_frames=num_frames)
        recorded |= dict(random_play=args.random_play)
        folder = args.data_dir / args.game / split
        if folder.exists() and not args.overwrite:
            found = common.read_frames(common.list_shards(folder)[0], args.game)[2]
            differs = [name for name in recorded if found.get(name) != recorded[name]]
            if differs or not args.resume:
                why = f"with another {differs[0]}" if differs else "already"
                common.fail(f"{folder} is there {why}; --overwrite replaces it")
            print(f"{split}: {folder} is complete")
        else:
            splits[split] = num_frames, recorded
    return splits


def load_expert(args, settings, device):
    """The expert's act: obs uint8 [B, S, S, 3] -> actions int [B], trained first if not there."""
    path = args.experts_dir / f"{args.game}.pt"
    if not path.exists():
        print(f"expert: PPO on {args.game} for {args.expert_steps:,} steps on {device}, to {path}")
        train_expert(args, settings, device, path)
    expert = common.load_checkpoint(path, "expert", args.game)
    for name, value in settings.items():
        if (found := expert["settings"].get(name, False)) != value:
            common.fail(f"{path} was trained with {name} {found}, not {value}; see --experts-dir")
    policy = ExpertPolicy(args.frame_size, expert["multiplier"])
    policy.load_state_dict(expert["policy"])
    policy.to(device, memory_format=torch.channels_last).eval()
    generator = torch.Generator(device).manual_seed(common.derive_seed(args.seed, "act"))
    print(f"expert: {path}, trained for {expert['env_step']:,} steps")

    @torch.no_grad()
    def act(obs):
        logits = policy(torch.from_numpy(obs).to(device))[0]
        return sample_actions(logits / args.temperature, generator).cpu().numpy()

    return act


def main(args):
    device = common.pick_device(args.device)
    common.check_game(args.game)
    torch.manual_seed(args.seed)
    if args.num_envs * args.rollout_steps // args.minibatches < 2:
        common.fail(f"--minibatches {args.minibatches} leaves less than 2 steps in each")
    names = ("game", "frame_size", "num_levels", "plain", "one_theme")
    settings = {name: getattr(args, name) for name in names} | dict(start_level=0)
    splits = splits_to_record(args, settings)
    if args.train_frames and not splits:
        return
    rng = np.random.default_rng(args.seed)
    players = dict(random=lambda obs: rng.integers(common.NUM_ACTIONS, size=len(obs)))
    if args.random_play:
        players["expert"] = players["random"]
    elif args.solver:
        players["expert"] = Solver(args.game, args.seed)
    else:
        players["expert"] = load_expert(args, settings, device)

    # the returns of expert and random policy go into the files, for the plots
    means = dict(random_return=common.GAMES[args.game][0])  # the paper's, on all levels
    for name in players if args.num_levels else ["expert"]:
        view = settings | (dict(plain=True, frame_size=64) if args.solver else {})
        envs = common.ProcgenEnvs(view, args.num_envs, common.derive_seed(args.seed, name))
        means[f"{name}_return"] = common.evaluate(envs, players[name], 4).mean().item()
    print(
        f"mean return: expert {means['expert_return']:.2f}, random policy "
        f"{means['random_return']:.2f} (the paper's expert: {common.GAMES[args.game][1]:.2f})"
    )
    args.data_dir.mkdir(parents=True, exist_ok=True)
    raw, free = 3 * args.frame_size**2 / 1e9, shutil.disk_usage(args.data_dir).free / 1e9
    for split, (num_frames, recorded) in splits.items():
        print(f"{split}: up to {num_frames * raw:.2g} GB before compression, {free:.0f} GB free")
        player = players["random" if split == "random" else "expert"]
        record(args, recorded | means, player, num_frames, args.data_dir / args.game / split)
    if splits:
        common.print_next(f"train_latent_dynamics.py --game {args.game}", args)


if __name__ == "__main__":
    main(tyro.cli(Args))
