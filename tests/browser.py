"""Pages in a real browser, headless and without a network."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium")

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: install Debian's package chromium")


def browse(page: Path, *words: str) -> str:
    """What the browser prints; its profile lies beside the page."""
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", f"--user-data-dir={page.parent / 'profile'}", *words, page.as_uri(),
        ],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr  # a script error, or something the content policy refused
    return done.stdout


def dom(html: str, folder: Path, script: str = "") -> str:
    """The document after its own scripts and `script` ran. A page without scripts is allowed this one."""
    if script and "script-src" not in html:
        html = html.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    page = folder / "page.html"
    page.write_text(
        html.replace("</body>", f"<script>{script}</script></body>" if script else "</body>"), encoding="utf-8"
    )
    return browse(page, "--dump-dom")
