"""The server as a person starts it and as the README calls it."""

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.20")
openai = pytest.importorskip("openai")


def test_the_readme_s_client_and_curl(serving, capsys):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (example,) = (e for e in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "127.0.0.1" in e)
    (curl,) = re.findall(r"^curl .*?(?=^```)", text, re.DOTALL | re.MULTILINE)
    with serving(names=("pirate", "butler")) as served:
        exec(compile(example.replace("http://127.0.0.1:8000", served.url), "README", "exec"), {})
        printed = capsys.readouterr().out
        assert all(f"{model}: " in printed for model in ("base", "pirate", "butler", "pirate*0.6+butler*0.4"))
        if shutil.which("curl") is None:
            pytest.skip("no curl")
        command = shlex.split(curl.replace("http://127.0.0.1:8000", served.url).replace("\\\n", ""))
        answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert answer["model"] == "pirate" and answer["usage"]["completion_tokens"] > 0


@pytest.mark.slow
def test_the_command_serves_and_stops_when_told(tiny, tmp_path):
    """`python -m fastlora serve`, as a person starts it: help, summary, an answer, Ctrl-C."""
    command = [sys.executable, "-m", "fastlora", "serve"]
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--adapter NAME=PATH" in told and "127.0.0.1" in told
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = ["--model", str(tiny.model), "--adapter", f"fr={tiny.adapters / 'fr'}", "--cache-tokens", "1024"]
    log = tmp_path / "log"
    with log.open("w") as out:
        running = subprocess.Popen([*command, *model, "--port", str(port)], stdout=out, stderr=subprocess.STDOUT)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + 60
        while True:
            try:
                assert [m.id for m in client.models.list().data] == ["model", "fr"]
                break
            except openai.APIConnectionError:
                assert running.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        answer = client.completions.create(
            model="fr", prompt="Hello", max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.usage.completion_tokens == 8
        client.close()
        running.send_signal(signal.SIGINT)
        assert running.wait(30) in (0, 130, -2), log.read_text()
    finally:
        running.kill()
    said = log.read_text()
    assert "http://127.0.0.1" in said and "adapters" in said
    assert "Traceback" not in said and "WARNING" not in said, said
