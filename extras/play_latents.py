"""Play a latent world: keys choose latent actions, the FDM draws what follows, in a browser.

Keys 1 to 9 are the middles of nine k-means clusters of held-out latents, largest first. Beside the
FDM's open-loop rollout the real game, if there are labels and Procgen is installed, starts a new
episode at each R and takes the cluster's most frequent true action. The page loads nothing from
elsewhere.

reads   runs/<game>/latent_dynamics.pt, test/latents_NNN.npz, data/<game>/test/frames_NNN.npz and,
        if there, labels_NNN.npz

python play_latents.py --game miner    # over SSH: ssh -L 8000:localhost:8000 host
"""

import base64
import importlib.util
import json
import threading
import time
import warnings
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import common  # before torch
import numpy as np
import torch
import tyro
from train_latent_dynamics import FDM, EMAVectorQuantizer, NoQuantizer
from visualize_latents import medoids, rollout

PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>LAPO: play the latent actions</title>
<link rel="icon" href="data:,">
<style>
  body { font: 16px sans-serif; margin: 2em; } canvas { image-rendering: pixelated; }
  figure { display: inline-block; margin: 0 1.5em 1em 0; } figcaption { margin-top: .3em; }
  .big { width: 320px; height: 320px; } button { font: inherit; margin: 0 .6em .6em 0; }
  [hidden] { display: none !important; }
  button canvas { width: 64px; height: 64px; margin: 3px; } .on { outline: 3px solid #d33; }
</style>
<figure><canvas class="big" id="dream"></canvas><figcaption>the FDM, open loop</figcaption></figure>
<figure><canvas class="big" id="real"></canvas><figcaption>the real game</figcaption></figure>
<p id="numbers"></p><div id="keys"></div>
<p>1 to 9: a latent action (o<sub>t</sub> and o<sub>t+1</sub> of a frame that had it);
space: repeat; R: start from another frame.</p>
<script>
const get = id => document.getElementById(id);
let last = 1, busy = false;
function draw(canvas, rgb, size) {
  const bytes = Uint8Array.from(atob(rgb), c => c.charCodeAt(0));
  canvas.width = canvas.height = size;
  const image = new ImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    image.data.set(bytes.subarray(3 * i, 3 * i + 3), 4 * i);
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
function show(s) {
  draw(get("dream"), s.dream, s.size);
  get("real").parentNode.hidden = s.real === null;
  if (s.real !== null) draw(get("real"), s.real, s.size);
  get("numbers").textContent = `step ${s.step}` +
    (s.step ? `, FDM ${s.milliseconds.toFixed(1)} ms` : "") +
    (s.step ? ` (${(1000 / s.milliseconds).toFixed(0)} frames/s)` : "") +
    (s.mse === null ? "" : `, mse to the real game ${s.mse.toFixed(4)}`) +
    (s.ended ? ", the real game has ended: R" : "");
}
async function send(message) {
  if (busy) return;
  busy = true;
  try {
    const answer = await fetch("/step", {method: "POST", body: JSON.stringify(message)});
    show(await answer.json());
  } finally { busy = false; }
}
function press(key) {
  last = key;
  for (const [i, b] of [...get("keys").children].entries()) b.className = i + 1 === key ? "on" : "";
  send({key});
}
document.addEventListener("keydown", event => {
  const key = Number(event.key);
  if (event.key === " ") { event.preventDefault(); press(last); }
  else if (event.key.toLowerCase() === "r") send({key: 0});
  else if (key >= 1 && key <= get("keys").children.length) press(key);
});
fetch("/keys").then(answer => answer.json()).then(keys => {
  for (const [i, key] of keys.entries()) {
    const button = document.createElement("button");
    for (const rgb of key.frames)
      draw(button.appendChild(document.createElement("canvas")), rgb, key.size);
    button.append(document.createElement("br"), `${i + 1}: ${key.text}`);
    button.onclick = () => press(i + 1);
    get("keys").append(button);
  }
  send({key: 0});
});
</script></html>"""


@dataclass
class Args(common.RunArgs):
    port: int = 8000
    """Of the page, on 127.0.0.1 only."""


def encode(frame):
    """uint8 [S, S, 3] -> base64 of its bytes"""
    return base64.b64encode(np.ascontiguousarray(frame).tobytes()).decode()


class World:
    """The FDM's world and, if there is one, the real game, started from the same frames."""

    def __init__(self, args):
        device, self.rng = common.pick_device(args.device), np.random.default_rng(args.seed)
        path = args.runs_dir / args.game / "latent_dynamics.pt"
        saved = common.load_checkpoint(path, "latent_dynamics", args.game)
        self.size, self.k, vq = saved["frame_size"], saved["context"], saved["vq_sizes"]
        self.fdm = FDM(
            self.size, self.k, saved["z_dim"], saved["fdm_width"], saved["predict_change"]
        )
        quantizer = EMAVectorQuantizer(*vq, decay=1.0) if vq else NoQuantizer()
        for name, module in dict(fdm=self.fdm, quantizer=quantizer).items():
            module.load_state_dict(saved[name])
            module.to(device).eval()

        store = common.FrameStore(args, "test", self.k, device, saved["fingerprint"])
        if store.frame_size != self.size:
            common.fail(f"stage 1 was trained on frames of {self.size}, not {store.frame_size}")
        rows = store.draw(4096).sort()[0].unique()
        self.windows, z_q = store.windows_at(rows), quantizer(store.z_at(rows))[0]
        middle, cluster = medoids(z_q.cpu().numpy(), min(9, len(z_q)), args.seed)
        self.z_q, self.keys = z_q[middle], []
        actions = common.true_actions_to_report_on(store, rows)
        if args.game not in common.GAMES:
            actions = None  # only Procgen's actions have names
        self.actions = None if actions is None else []
        for i, row in enumerate(middle):
            inside = cluster == i
            text = f"{inside.mean():.0%} of frames"
            if actions is not None:
                share = np.bincount(actions[inside], minlength=2) / inside.sum()
                most, second = (int(a) for a in np.argsort(-share, kind="stable")[:2])
                self.actions.append(most)
                text += f": {common.ACTIONS[most]} {share[most]:.0%}"
                if share[second]:
                    text += f", {common.ACTIONS[second]} {share[second]:.0%}"
            frames = [encode(frame) for frame in self.windows[row, -2:].cpu().numpy()]
            self.keys.append(dict(frames=frames, size=self.size, text=text))
        self.envs = None
        if actions is not None and importlib.util.find_spec("procgen"):
            self.envs = common.ProcgenEnvs(store.settings, 1, args.seed)

    @torch.no_grad()
    def step(self, key):
        """key: 0 starts again, 1 .. M takes a latent action. Returns what the page shows."""
        start = time.perf_counter()
        if key == 0:
            self.steps, self.ended = 0, False
            if self.envs:  # -1 ends the episode; then as many frames as the FDM needs
                frames = [self.envs.step(np.array([a]))[0][0] for a in [-1] + [4] * self.k]
                self.past = torch.from_numpy(np.stack(frames))[None].to(self.z_q.device)
            else:
                row = int(self.rng.integers(len(self.windows)))
                self.past = self.windows[row : row + 1, :-1]
        else:
            self.steps += 1
            after = rollout(self.fdm, self.past, self.z_q[key - 1 : key], 1)[:, -1:]
            self.past = torch.cat([self.past[:, 1:], after], 1)
        dream = self.past[0, -1].cpu().numpy()  # waits for a GPU
        milliseconds = 1000 * (time.perf_counter() - start)
        if self.envs and not self.ended:
            if key:
                self.ended = bool(self.envs.step(np.array([self.actions[key - 1]]))[2][0])
            if not self.ended:  # else obs opens the next episode, and the last frame stays
                self.real = self.envs.obs[0]
        real = self.real if self.envs else None
        alive = real is not None and not self.ended
        mse = float(((dream / 255 - real / 255) ** 2).mean()) if alive else None
        return dict(
            dream=encode(dream), real=None if real is None else encode(real), size=self.size,
            step=self.steps, milliseconds=milliseconds, mse=mse, ended=self.ended,
        )  # fmt: skip


def make_server(world, port):
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        timeout = 5  # seconds to wait for the rest of a request

        def answer(self, status, content, kind="application/json"):
            body = content.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            if self.path == "/":
                return self.answer(200, PAGE, "text/html")
            if self.path == "/keys":
                return self.answer(200, json.dumps(world.keys))
            self.answer(400, "{}")

        def do_POST(self):
            try:
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length) if 0 < length < 1000 else b""
                key = json.loads(body)["key"] if len(body) == length else None
                if self.path != "/step" or type(key) is not int or not 0 <= key <= len(world.keys):
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError):
                return self.answer(400, "{}")
            with lock:
                self.answer(200, json.dumps(world.step(key)))

        def send_error(self, *_):  # other methods, malformed requests
            self.answer(400, "{}")

        def log_message(self, *_):
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main(args):
    warnings.filterwarnings("ignore", module="sklearn")  # fewer clusters than keys
    world = World(args)
    world.step(0)
    try:
        server = make_server(world, args.port)
    except (OSError, OverflowError) as error:
        common.fail(f"--port {args.port} is not usable ({error})")
    print(f"play {args.game}: http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main(tyro.cli(Args))
