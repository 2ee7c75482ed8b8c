"""The page of latent actions: what each key does, over HTTP and in a browser."""

import base64
import io
import json
import re
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from conftest import args_of, fails, load
from PIL import Image

import common
from extras import play_latents
from extras.play_latents import World


def save_decoders(root, actions, dynamics_id=None):
    """decode_offline.pt, whose decoder for `labels` labels always takes actions[labels]."""
    run = root / "runs/maze"
    policy = load(run / "latent_policy.pt")
    decoders = []
    for action in actions.values():
        decoder = play_latents.ActionDecoder(policy["config"]["z_dim"])
        if action is not None:
            decoder.layers[-1].bias.data[action] = 100
        decoders.append(decoder.state_dict())
    common.save_checkpoint(
        run / "decode_offline.pt",
        kind="decode_offline",
        game="maze",
        recording=policy["recording"],
        dynamics_id=dynamics_id or policy["dynamics_id"],
        labels=list(actions),
        decoders=decoders,
    )


@pytest.fixture(scope="module")
def world(chain, tmp_path_factory):
    """With a decoder of few labels that goes right, and one of many that goes left."""
    root = shutil.copytree(chain, tmp_path_factory.mktemp("play") / "chain")
    left, right = common.ACTIONS.index("left"), common.ACTIONS.index("right")
    save_decoders(root, {16: left, 4: right})
    return World(args_of(play_latents, root))


@pytest.fixture(scope="module")
def address(world):
    server = play_latents.make_server(world, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert server.server_address[0] == "127.0.0.1"  # not reachable from elsewhere
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def get(url):
    with urllib.request.urlopen(url) as answer:
        return answer.read().decode()


def post(url):
    with urllib.request.urlopen(urllib.request.Request(url, method="POST")) as answer:
        return json.loads(answer.read())


def pixels(url):
    """The frame in a data URL, uint8 [S, S, 3]."""
    assert url.startswith("data:image/png;base64,")
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


@torch.no_grad()
def predict(world, past, z_q):
    """What the FDM predicts after past (1, k + 1, S, S, 3), uint8 [S, S, 3]."""
    predicted = world.fdm(past, z_q).clamp(-0.5, 0.5)[0].permute(1, 2, 0)
    return ((predicted + 0.5) * 255).round().numpy()


def test_the_page_describes_each_latent_and_loads_nothing_from_elsewhere(world, address):
    page = get(f"{address}/")
    assert page == play_latents.PAGE and "http" not in page and "dream" not in page
    description = json.loads(get(f"{address}/world"))
    assert description["game"] == "maze"
    assert description["has_game"] and description["has_policy"]
    assert 1 <= len(description["latents"]) <= 9
    for latent, window in zip(description["latents"], world.windows.numpy(), strict=True):
        assert np.array_equal([pixels(frame) for frame in latent["frames"]], window[-2:])
        assert re.match(r"\d+% of frames, \d+% [a-z]", latent["text"])


def test_a_cluster_is_described_by_its_two_most_frequent_actions():
    fractions = np.zeros(common.NUM_ACTIONS)
    fractions[[1, 4, 7]] = 0.3, 0.6, 0.1
    assert play_latents.describe(0.25, fractions) == "25% of frames, 60% none, 30% left"
    fractions = np.eye(common.NUM_ACTIONS)[7]
    assert play_latents.describe(0.25, fractions) == "25% of frames, 100% right"
    assert play_latents.describe(0.25, None) == "25% of frames"


def test_a_latent_steps_the_rollout_and_the_real_game(world, address):
    start = post(f"{address}/press/r")
    assert start["status"] == "step 0, return 0, mse 0.0000"
    assert start["predicted"] == start["real"]
    past = world.past
    for step in (1, 2):  # open loop: the second one sees the first one's prediction
        after = post(f"{address}/press/1")
        expected = predict(world, past, world.z_q[:1])
        assert np.array_equal(pixels(after["predicted"]), expected)
        assert np.array_equal(pixels(after["real"]), world.envs.obs[0])
        mse = ((expected / 255 - world.envs.obs[0] / 255) ** 2).mean()
        name = common.ACTIONS[world.actions[0]]
        assert after["status"] == f"step {step}, return 0, true action: {name}, mse {mse:.4f}"
        past = torch.cat([past[:, 1:], torch.from_numpy(expected).byte()[None, None]], 1)


def test_the_latent_policy_plays_with_the_decoder_of_most_labels(world, address):
    post(f"{address}/press/r")
    post(f"{address}/press/1")  # both sides differ from here on
    for _ in range(3):
        real = world.real.clone()
        with torch.no_grad():
            z_q, _, _ = world.quantizer(world.policy(real[:, -1]))
        after = post(f"{address}/press/p")
        assert world.action == common.ACTIONS.index("left")
        assert "true action: left," in after["status"]
        assert np.array_equal(pixels(after["predicted"]), predict(world, real, z_q))
        assert np.array_equal(pixels(after["real"]), world.envs.obs[0])
        assert torch.equal(world.real[0, -1], torch.from_numpy(world.envs.obs[0]))
        assert torch.equal(world.real[:, :-1], real[:, 1:])


def test_the_latent_policys_actions_are_sampled(root):
    save_decoders(root, {4: None})  # not trained: close to uniform
    world = World(args_of(play_latents, root))
    actions = set()
    for _ in range(40):
        world.press("p")
        actions.add(world.action)
    assert len(actions) > 5


def test_decoders_of_another_stage_1_do_not_play(root, capsys):
    save_decoders(root, {4: 1}, dynamics_id="0" * 16)
    world = World(args_of(play_latents, root))
    assert world.policy is None and "p" not in world.keys
    assert "is of another run of stage 1" in capsys.readouterr().out


def test_without_decoders_there_is_no_key_p(chain):
    world = World(args_of(play_latents, chain))
    assert world.policy is None and "p" not in world.keys and world.envs


def test_weights_stored_in_float16_play_in_float32(root, world):
    path = root / "runs/maze/latent_dynamics.pt"
    checkpoint = load(path)
    for name in ("idm", "quantizer", "fdm"):
        checkpoint[name] = {
            key: value.half() if value.is_floating_point() else value
            for key, value in checkpoint[name].items()
        }
    common.save_checkpoint(path, **checkpoint)
    small = World(args_of(play_latents, root))
    assert {weight.dtype for weight in small.fdm.parameters()} == {torch.float32}
    past = world.windows[:1, :-1]
    expected = predict(world, past, world.z_q[:1])
    assert abs(predict(small, past, world.z_q[:1]) - expected).max() <= 2


def test_a_bad_request_is_refused_and_changes_nothing(world, address):
    post(f"{address}/press/r")
    past = world.past.clone()
    bad = ["press/0", "press/10", "press/-1", "press/x", "press/", "press/press/1", "press/1/"]
    for path in bad + ["1", "", "r"]:
        with pytest.raises(urllib.error.HTTPError) as error:
            post(f"{address}/{path}")
        assert error.value.code == 404, path
    for path in ("x", "press/1", "../common.py"):  # a link cannot press a key
        with pytest.raises(urllib.error.HTTPError) as error:
            get(f"{address}/{path}")
        assert error.value.code == 404, path
    for request in (b"PUT / HTTP/1.0\r\n\r\n", b"nonsense\r\n\r\n"):
        with socket.create_connection(address.removeprefix("http://").split(":"), 10) as client:
            client.sendall(request)
            answer = b"".join(iter(lambda: client.recv(4096), b""))
        assert b"501" in answer or b"400" in answer, request
    assert torch.equal(world.past, past) and world.num_steps == 0


def test_after_the_real_game_has_ended_only_the_rollout_goes_on(world, monkeypatch):
    monkeypatch.setattr(world, "actions", [common.RESET] * len(world.actions))
    start = world.press("r")
    first, second = world.press("1"), world.press("1")
    assert first["status"].startswith("step 1") and second["status"].startswith("step 2")
    for shown in (first, second):
        assert shown["status"].endswith("the real game has ended: R")
    assert start["real"] == first["real"] == second["real"]  # not the next episode's frame
    assert first["predicted"] != second["predicted"]
    shown = world.press("p")  # the latent policy goes on with the next episode
    assert shown["status"].startswith("step 0") and shown["real"] != second["real"]


def test_without_labels_there_is_the_rollout_alone(root):
    save_decoders(root, {4: 1})
    for path in (root / "data/maze/test").glob("labels_*"):
        path.unlink()
    world = World(args_of(play_latents, root))
    assert world.keys == ["r", *(str(i + 1) for i in range(len(world.z_q)))]
    past = world.past
    shown = world.press("1")
    assert shown["real"] is None and shown["status"] == "step 1"
    assert np.array_equal(pixels(shown["predicted"]), predict(world, past, world.z_q[:1]))


def test_a_port_in_use_gives_one_line(chain):
    with socket.create_server(("127.0.0.1", 0)) as used:
        args = args_of(play_latents, chain, port=used.getsockname()[1])
        assert "is not usable" in fails(play_latents.main, args)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PRESS_KEYS = """<script>
const source = () => get("predicted").src + get("real").src;
const pause = seconds => new Promise(resolve => setTimeout(resolve, 1000 * seconds));
const hit = key => document.dispatchEvent(new KeyboardEvent("keydown", {key}));
setTimeout(async () => {
  const found = [];
  for (const key of ["s", "0", "1", "1", "p"]) {  // the first two do nothing
    const before = source();
    hit(key);
    await pause(2);
    found.push(source() !== before);
  }
  hit("p");
  await pause(1);
  const stopped = source();
  await pause(1);
  found.push(source() === stopped, get("status").textContent.includes("true action: left"));
  document.title = "found: " + found;
}, 2000);
</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_keys_change_the_pictures_in_a_browser(address, monkeypatch):
    page = play_latents.PAGE.replace("</body>", PRESS_KEYS)
    monkeypatch.setattr(play_latents, "PAGE", page)
    flags = ["--headless=new", "--no-sandbox", "--dump-dom", "--virtual-time-budget=20000"]
    flags += ["--enable-logging=stderr"]
    browser = subprocess.run([CHROMIUM, *flags, address], capture_output=True, text=True)
    assert "CONSOLE" not in browser.stderr  # what the page logs, errors among it
    assert "<title>found: false,false,true,true,true,true,true</title>" in browser.stdout
    assert len(re.findall("<button", browser.stdout)) >= 1
