"""The latent world over HTTP: what the page gets, and what a bad request gets."""

import base64
import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from conftest import folders

import play_latents


@pytest.fixture(scope="module")
def world(chain):
    return play_latents.World(play_latents.Args(device="cpu", **folders(chain)))


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


def test_keys_step_the_dream_and_the_real_game(world, address):
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


@pytest.mark.parametrize(
    "path, body",
    [
        ("x", None),
        ("step", None),
        ("step", ""),
        ("step", "{}"),
        ("step", "[1]"),
        ("x", '{"key": 1}'),
    ]
    + [("step", f'{{"key": {key}}}') for key in ("10", "-1", "1.5", "true", '"1"', "null")],
)
def test_a_bad_request_gets_a_400_and_changes_nothing(world, address, path, body):
    ask(f"{address}/step", '{"key": 0}')
    past = world.past.clone()
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(f"{address}/{path}", body)
    assert error.value.code == 400 and torch.equal(world.past, past)


def test_without_labels_and_game_there_is_the_dream_alone(chain, monkeypatch):
    monkeypatch.setattr(play_latents.common, "true_actions_to_report_on", lambda store, rows: None)
    world = play_latents.World(play_latents.Args(device="cpu", **folders(chain)))
    world.step(0)
    shown = world.step(1)
    assert shown["real"] is None and shown["mse"] is None and shown["step"] == 1


@pytest.mark.skipif(not shutil.which("chromedriver"), reason="no chromedriver")
def test_in_a_browser(address, tmp_path):
    """A key changes the picture, and the console stays silent."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = next(
            m[1] for line in driver.stdout if (m := re.search(r"successfully on port (\d+)", line))
        )
        options = dict(args=["--headless=new", "--no-sandbox", "--window-size=900,900"])
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": dict(browser="ALL")}

        def webdriver(path, **body):
            answer = ask(f"http://127.0.0.1:{port}/session{path}", json.dumps(body))
            return json.loads(answer)["value"]

        session = "/" + webdriver("", capabilities=dict(alwaysMatch=capabilities))["sessionId"]

        def script(text):
            return webdriver(f"{session}/execute/sync", script=f"return {text}", args=[])

        def wait_for(text):
            while text not in script("document.getElementById('numbers').textContent"):
                time.sleep(0.05)

        webdriver(f"{session}/url", url=address)
        picture = "document.getElementById('dream').toDataURL()"
        wait_for("step 0")
        before = script(picture)
        key = dict(type="key", id="keyboard")
        key["actions"] = [dict(type=t, value="1") for t in ("keyDown", "keyUp")]
        webdriver(f"{session}/actions", actions=[key])
        wait_for("step 1")
        assert script(picture) != before
        assert script("document.getElementById('keys').children.length") >= 1
        assert webdriver(f"{session}/se/log", type="browser") == []
        if target := os.environ.get("SCREENSHOT"):
            shot = json.loads(ask(f"http://127.0.0.1:{port}/session{session}/screenshot"))["value"]
            with open(target, "wb") as file:
                file.write(base64.b64decode(shot))
    finally:
        driver.terminate()
