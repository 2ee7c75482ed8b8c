"""Play the latent actions, in a browser: each key is one, and the FDM predicts what follows.

Keys 1 to 9 are the medoids of nine k-means clusters of held-out latents, largest first. Beside the
FDM's open-loop rollout, the real game, if there are labels and Procgen is installed, takes the
cluster's most frequent true action. With stages 2 and 3 done, key P lets the latent policy play the
real game by itself. The page loads nothing from elsewhere.

reads   runs/<game>/latent_dynamics.pt, test/latents_NNN.npz, data/<game>/test/frames_NNN.npz and,
        if there, labels_NNN.npz, runs/<game>/latent_policy.pt and decode_offline.pt

python -m extras.play_latents --game miner    # over SSH: ssh -L 8000:localhost:8000 host
"""

import base64
import contextlib
import importlib.util
import io
import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import common  # before torch
import numpy as np
import torch
from PIL import Image

from decode_offline import ActionDecoder, load_policy
from extras.rollouts import cluster_latents, load_dynamics, rollout

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>LAPO: play the latent actions</title>
<link rel="icon" href="data:,">
<style>
  body { font: 16px/1.4 sans-serif; max-width: 60em; margin: 1.5em; }
  img { image-rendering: pixelated; }
  figure { display: inline-block; margin: 0 1.5em 0 0; }
  figure img { width: 320px; height: 320px; background: #ddd; }
  button { font: inherit; margin: 0 0.5em 0.5em 0; }
  button img { width: 64px; height: 64px; margin: 3px; }
  button.on { outline: 3px solid #d33; }
  .no-game .game, .no-policy .policy { display: none; }
</style>
</head>
<body>
<h1>LAPO: the latent actions of <span id="name"></span></h1>
<p>
  Left: the FDM predicts frame after frame from its own predictions, given the latent action of the
  key that you press.
  <span class="game">Right: the real game, with the true action that is most frequent in that
  cluster.</span>
</p>
<figure><img id="predicted" alt=""><figcaption>predicted by the FDM</figcaption></figure>
<figure class="game"><img id="real" alt=""><figcaption>the real game</figcaption></figure>
<p id="status"></p>
<ul>
  <li><b>1 to 9</b>, or a click below, take a latent action. Its button shows a pair of held-out
    frames that had it, o<sub>t</sub> and o<sub>t+1</sub>. The latents are medoids of k-means
    clusters, found without labels; the percentages are a cluster's size<span class="game"> and the
    true actions in it</span>.</li>
  <li><b>R</b> starts again from real frames. Press it when the left picture blurs: after some
    steps, the errors of the predictions have added up.</li>
  <li class="policy"><b>P</b> lets the latent policy play the real game by itself, until you press
    P again: z = policy(o<sub>t</sub>), action = decoder(z). Left is then what the FDM predicts one
    step ahead from the real frames, given z.</li>
</ul>
<div id="keys"></div>
<script>
const get = id => document.getElementById(id);
let timer = null;  // of the latent policy's steps, while it plays
let waiting = false;  // for the server's answer

function show(state) {
  get("predicted").src = state.predicted;
  if (state.real) get("real").src = state.real;
  get("status").textContent = state.status;
}

async function send(key) {
  if (waiting) return;
  waiting = true;
  try {
    const answer = await fetch("/press/" + key, {method: "POST"});
    show(await answer.json());
  } catch {
    get("status").textContent = "no answer: has the script ended?";
  }
  waiting = false;
}

function press(key) {
  const buttons = [...get("keys").children];
  const wasPlaying = timer !== null;
  clearInterval(timer);
  timer = null;
  for (const button of buttons) button.className = button.id === "key" + key ? "on" : "";
  if (key !== "p") send(key);
  else if (!wasPlaying) timer = setInterval(() => send("p"), 200);
}

function addButton(key, frames, text) {
  const button = document.createElement("button");
  button.id = "key" + key;
  for (const frame of frames) {
    const img = document.createElement("img");
    img.src = frame;
    button.append(img);
  }
  button.append(document.createElement("br"), key + ": " + text);
  button.onclick = () => press(key);
  get("keys").append(button);
}

async function start() {
  const world = await (await fetch("/world")).json();
  get("name").textContent = world.game;
  document.body.classList.toggle("no-game", !world.has_game);
  document.body.classList.toggle("no-policy", !world.has_policy);
  world.latents.forEach((latent, i) => addButton(String(i + 1), latent.frames, latent.text));
  document.addEventListener("keydown", event => {
    const key = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (key === "r" || world.latents[key - 1]) press(key);
    if (key === "p" && world.has_policy && !event.repeat) press(key);
  });
  send("r");
}

start();
</script>
</body>
</html>"""


@dataclass
class Args(common.RunArgs):
    port: int = 8000
    """Of the page, on 127.0.0.1 only."""


def picture(frame):
    """uint8 [S, S, 3] -> a PNG as data URL"""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def describe(fraction, action_fractions):
    """A cluster in words: its fraction of all latents, and its two most frequent true actions."""
    text = f"{fraction:.0%} of frames"
    if action_fractions is not None:
        for action in np.argsort(-action_fractions, kind="stable")[:2]:
            if action_fractions[action] > 0:
                text += f", {action_fractions[action]:.0%} {common.ACTIONS[action]}"
    return text


def load_player(run, game, dynamics_id, device):
    """The latent policy and the decoder of most labels; None and None if they are missing or of
    another run of stage 1.
    """
    path = run / "decode_offline.pt"
    if not path.exists() or not (run / "latent_policy.pt").exists():
        return None, None
    policy_checkpoint, policy = load_policy(run, game, device)
    decoded = common.load_checkpoint(path, "decode_offline", game)
    if {policy_checkpoint["dynamics_id"], decoded["dynamics_id"]} != {dynamics_id}:
        print("no key P: latent policy or decoder is of another run of stage 1")
        return None, None
    decoder = ActionDecoder(policy_checkpoint["config"]["z_dim"])
    decoder.load_state_dict(decoded["decoders"][np.argmax(decoded["labels"])])
    return policy, decoder.to(device)


class World:
    """What the page shows: the FDM's rollout and, if there is one, the real game."""

    def __init__(self, args):
        device = common.pick_device(args)
        self.game = args.game
        self.names = [common.ACTIONS[i] for i in common.distinct_actions(args.game)]
        checkpoint, self.quantizer, self.fdm = load_dynamics(args, device)
        clusters = cluster_latents(args, checkpoint, self.quantizer, 9, device)
        self.z_q = clusters.z_q
        self.windows = clusters.windows
        self.latents = []  # for the page
        self.actions = []  # the most frequent true action in each cluster
        for i, window in enumerate(clusters.windows.cpu().numpy()):
            action_fractions = None
            if clusters.action_fractions is not None:
                action_fractions = clusters.action_fractions[i]
                self.actions.append(int(action_fractions.argmax()))
            text = describe(clusters.fractions[i], action_fractions)
            self.latents.append(dict(frames=[picture(frame) for frame in window[-2:]], text=text))

        self.envs = None
        self.policy = None
        if self.actions and importlib.util.find_spec("procgen"):
            self.envs = common.ProcgenEnvs(checkpoint["recording"], 1, args.seed)
            run = args.runs_dir / args.game
            player = load_player(run, args.game, checkpoint["dynamics_id"], device)
            self.policy, self.decoder = player
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.rng = np.random.default_rng(args.seed)
        self.keys = ["r", *(str(i + 1) for i in range(len(self.latents)))]
        if self.policy:
            self.keys.append("p")
        self.restart()

    def restart(self):
        """Both sides start from the same frames: an episode's, or a window's without a game."""
        self.num_steps = 0
        self.action = None  # the last one of the real game
        self.episode_return = 0.0
        self.ended = False
        if self.envs:
            self.envs.step(np.array([common.RESET]))
            frames = [self.envs.obs[0]]
            while len(frames) < self.windows.shape[1] - 1:  # as many as the FDM needs
                self.envs.step(np.array([common.NOOP]))
                frames.append(self.envs.obs[0])
            self.real = torch.from_numpy(np.stack(frames))[None].to(self.z_q.device)
            self.past = self.real  # uint8 (1, k + 1, S, S, 3)
        else:
            row = self.rng.integers(len(self.windows))
            self.past = self.windows[row : row + 1, :-1]

    def step(self, z_q, action):
        """One latent action z_q (1, Z) for the FDM, and one true action for the real game."""
        predicted = rollout(self.fdm, self.past, z_q, 1)[:, -1:]
        self.past = torch.cat([self.past[:, 1:], predicted], 1)
        self.num_steps += 1
        if self.envs and not self.ended:
            obs, reward, done = self.envs.step(np.array([action]))
            self.action = action
            self.episode_return += float(reward[0])
            self.ended = bool(done[0])
            if not self.ended:  # else obs opens the next episode, and the last frame stays
                frame = torch.from_numpy(obs)[:, None].to(self.real.device)
                self.real = torch.cat([self.real[:, 1:], frame], 1)

    @torch.no_grad()
    def press(self, key):
        """key: one of self.keys. Returns what the page shows."""
        if key == "r" or (key == "p" and self.ended):
            self.restart()
        elif key == "p":
            # the latent policy acts on the real frame; the FDM predicts one step from real frames
            z = self.policy(self.real[:, -1])
            action = common.sample_actions(self.decoder(z), self.generator)
            z_q, _, _ = self.quantizer(z)
            self.past = self.real
            self.step(z_q, int(action))
        else:
            i = int(key) - 1
            self.step(self.z_q[i : i + 1], self.actions[i] if self.envs else None)
        return self.state()

    def state(self):
        """Both pictures, and a line about them."""
        predicted = self.past[0, -1].cpu().numpy()
        if not self.envs:
            return dict(predicted=picture(predicted), real=None, status=f"step {self.num_steps}")
        real = self.real[0, -1].cpu().numpy()
        mse = ((predicted / 255 - real / 255) ** 2).mean()
        facts = [f"step {self.num_steps}", f"return {self.episode_return:g}"]
        if self.action is not None:
            facts.append(f"true action: {self.names[self.action]}")
        facts.append("the real game has ended: R" if self.ended else f"mse {mse:.4f}")
        return dict(predicted=picture(predicted), real=picture(real), status=", ".join(facts))


def make_server(world, port):
    lock = threading.Lock()
    description = dict(
        game=world.game,
        latents=world.latents,
        has_game=world.envs is not None,
        has_policy=world.policy is not None,
    )

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, content, kind="application/json"):
            body = content.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            if self.path == "/":
                self.answer(200, PAGE, "text/html")
            elif self.path == "/world":
                self.answer(200, json.dumps(description))
            else:
                self.answer(404, "{}")

        def do_POST(self):
            key = self.path.removeprefix("/press/")
            if f"/press/{key}" != self.path or key not in world.keys:
                return self.answer(404, "{}")
            with lock:
                self.answer(200, json.dumps(world.press(key)))

        def log_message(self, *_):
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main(args):
    world = World(args)
    try:
        server = make_server(world, args.port)
    except (OSError, OverflowError) as error:
        common.fail(f"--port {args.port} is not usable ({error})")
    print(f"play {args.game}: http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    common.run(main, Args)
