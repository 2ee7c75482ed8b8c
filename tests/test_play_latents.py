"""The latent world over HTTP: what the page gets, and what a bad request gets."""

import base64
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
from conftest import args_of
import play_latents


@pytest.fixture(scope="module")
def world(chain):
    return play_latents.World(args_of(play_latents, chain))


@pytest.fixture(scope="module")
def address(world):
    server = play_latents.make_server(world, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert server.server_address[0] == "127.0.0.1"  # not reachable from elsewhere
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(url, body=None):
    with urllib.request.urlopen(url, None if body is None else body.encode()) as answer:
        return answer.read().decode()


def pixels(text, size=16):
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(size, size, 3)


def test_keys_step_the_rollout_and_the_real_game(world, address):
    assert "<canvas" in ask(f"{address}/")
    keys = json.loads(ask(f"{address}/keys"))
    assert 1 <= len(keys) <= 9 and all(pixels(f).size for key in keys for f in key["frames"])
    start = json.loads(ask(f"{address}/step", '{"key": 0}'))
    assert start["step"] == 0 and start["mse"] == 0 and start["dream"] == start["real"]
    past = world.past
    after = json.loads(ask(f"{address}/step", '{"key": 1}'))
    with torch.no_grad():
        predicted = world.fdm(past, world.z_q[:1]).clamp(-0.5, 0.5)[0].permute(1, 2, 0)
    expected = ((predicted + 0.5) * 255).round().numpy()
    assert np.array_equal(pixels(after["dream"]), expected) and after["step"] == 1
    difference = pixels(after["dream"]) / 255 - pixels(after["real"]) / 255
    assert after["mse"] == pytest.approx((difference**2).mean())
    assert np.array_equal(pixels(after["real"]), world.envs.obs[0])


def test_a_bad_request_gets_a_400_and_changes_nothing(world, address):
    ask(f"{address}/step", '{"key": 0}')
    past, keys = world.past.clone(), ("10", "-1", "1.5", "true", '"1"')
    bad = [("x", None), ("step", None), ("step", ""), ("step", "[1]"), ("x", '{"key": 1}')]
    bad += [("step", "[" * 999), ("step", " " * 1000 + '{"key": 1}')]
    for path, body in bad + [("step", f'{{"key": {key}}}') for key in keys]:
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(f"{address}/{path}", body)
        assert error.value.code == 400 and torch.equal(world.past, past), body
    post = 'POST /step HTTP/1.0\r\nContent-Length: {}\r\n\r\n{{"key": 1}}'
    for request in (post.format(-1), post.format(100), "PUT / HTTP/1.0\r\n\r\n"):
        with socket.create_connection(address.removeprefix("http://").split(":"), 10) as client:
            client.sendall(request.encode())
            client.shutdown(socket.SHUT_WR)  # no more follows, whatever the length says
            answer = b"".join(iter(lambda: client.recv(4096), b""))
        assert answer.endswith(b"{}") and b" 400 " in answer, request
        assert torch.equal(world.past, past), request


def test_after_the_real_game_has_ended_only_the_rollout_goes_on(world, monkeypatch):
    monkeypatch.setattr(world, "actions", [-1] * len(world.keys))  # ends an episode
    assert not world.step(0)["ended"]
    shown = [world.step(1) for _ in range(2)]
    assert [(s["step"], s["ended"], s["mse"]) for s in shown] == [(1, True, None), (2, True, None)]
    assert shown[0]["real"] == shown[1]["real"] and shown[0]["dream"] != shown[1]["dream"]


def test_without_labels_and_game_there_is_the_rollout_alone(chain, monkeypatch):
    monkeypatch.setattr(play_latents.common, "true_actions_to_report_on", lambda store, rows: None)
    world = play_latents.World(args_of(play_latents, chain))
    world.step(0)
    shown = world.step(1)
    assert shown["real"] is None and shown["mse"] is None and shown["step"] == 1


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PRESS_1 = """<script>
const picture = () => document.getElementById("dream").toDataURL();
setTimeout(() => {
  const before = picture();
  document.dispatchEvent(new KeyboardEvent("keydown", {key: "1"}));
  setTimeout(() => { document.title = `changed: ${picture() !== before}`; }, 2000);
}, 2000);
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_a_key_changes_the_picture_in_a_browser(address, monkeypatch):
    monkeypatch.setattr(play_latents, "PAGE", play_latents.PAGE + PRESS_1)
    flags = ["--headless=new", "--no-sandbox", "--dump-dom", "--virtual-time-budget=6000"]
    flags += ["--enable-logging=stderr"]
    browser = subprocess.run([CHROMIUM, *flags, address], capture_output=True, text=True)
    page = browser.stdout
    assert "CONSOLE" not in browser.stderr  # what the page logs, errors among it
    assert "changed: true" in page and re.search(r'id="numbers">step 1,', page)
    assert len(re.findall("<button", page)) >= 1
