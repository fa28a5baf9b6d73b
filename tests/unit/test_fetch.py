"""`assess.py fetch` against a hub and a GitHub that this test serves: what it downloads is found offline."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.harmful_suites import XSTEST
from pipeline.evaluation.suite_sources import GitHubFile
from pipeline.evaluation.tasks import SST2

ROOT = Path(__file__).resolve().parents[2]


class Handler(BaseHTTPRequestHandler):
    """What a snapshot needs of the hub, and GitHub's raw files."""

    files: dict[str, bytes]  # by path
    trees: dict[str, list[str]]  # names, by the path of a commit

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path in self.trees:
            files = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.trees[path]]
            content = json.dumps(files).encode()
        elif path in self.files:
            content = self.files[path]
        else:
            gated = "sorry-bench" in path
            self.send_response(403 if gated else 404)
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", SST2.revision)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a command that sees the served hub alone."""
    import pyarrow
    import pyarrow.parquet

    table = tmp_path / "table.parquet"
    rows = [{"idx": 0, "sentence": "a lovely film", "label": 1}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    name = "data/validation-00000-of-00001.parquet"
    at = f"/datasets/{SST2.repo}/resolve/{SST2.revision}"
    Handler.files = {
        f"{at}/{name}": table.read_bytes(),
        f"{at}/data/train-00000.parquet": b"not asked for",
        f"/{XSTEST.repo}/{XSTEST.revision}/{XSTEST.path}": b"id,prompt\n",
    }
    Handler.trees = {f"/api/datasets/{SST2.repo}/tree/{SST2.revision}": [name, "data/train-00000.parquet"]}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"http://127.0.0.1:{server.server_address[1]}"
    yield {
        **os.environ, "HF_ENDPOINT": host, "GITHUB_ENDPOINT": host, "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*",
    }  # fmt: skip
    server.shutdown()


def assess(environment: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "pipeline/assess.py", *map(str, words)],
        cwd=ROOT, env=environment, text=True, capture_output=True, timeout=200, check=False,
    )  # fmt: skip


def test_what_is_fetched_is_found_offline(hub: dict[str, str], tiny_model_dir: Path, tmp_path: Path) -> None:
    words = ["--model_name_or_path", tiny_model_dir, "--suites", "sst2", "--output_dir", tmp_path / "out"]
    offline = {**hub, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    before = assess(offline, *words)
    assert before.returncode == 2
    assert "python pipeline/assess.py fetch --suites sst2" in before.stderr
    fetched = assess(hub, "fetch", "--suites", "sst2")
    assert fetched.returncode == 0, fetched.stderr
    assert f"{SST2.repo}@{SST2.revision[:12]}" in fetched.stdout
    assert not list((tmp_path / "hf").rglob("train*"))
    after = assess(offline, *words)
    assert after.returncode == 0, after.stderr
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["suites"]["sst2"]
    assert settings["n"] == 1
    assert settings["source"] == str(SST2)


def test_problems_of_a_fetch_are_all_named(hub: dict[str, str], tmp_path: Path) -> None:
    done = assess(hub, "fetch", "--suites", "xstest,sorrybench,gsm8k")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert any("xstest: paul-rottger/" in line and "has SHA-256" in line for line in errors)
    assert any("sorrybench: " in line and "agree to their terms" in line for line in errors)
    assert any("gsm8k: openai/gsm8k" in line and "could not be fetched" in line for line in errors)
    assert not list((tmp_path / "hf" / "assess").rglob("*.csv"))


def test_a_changed_file_in_the_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    content = b"id,prompt\n1,tea?\n"
    source = GitHubFile("a/b", "0" * 40, "x/rows.csv", hashlib.sha256(content).hexdigest())
    source._place.parent.mkdir(parents=True)
    source._place.write_bytes(content)
    assert source.find() == source._place
    source._place.write_bytes(content + b"2,more?\n")
    with pytest.raises(ValueError, match=r"rows\.csv: has SHA-256 .* remove"):
        source.find()


def test_nothing_to_fetch_is_said(hub: dict[str, str]) -> None:
    done = assess(hub, "fetch")
    assert done.returncode == 2
    assert "--suites: name what to fetch" in done.stderr
