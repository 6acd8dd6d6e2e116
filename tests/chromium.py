"""The system's Chromium, for tests of scripts in a page."""

import shutil
import subprocess

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def dumped(page, *, width=1280, milliseconds=2000):
    """The document that a page's file has become, as HTML, after so much of its own time."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={page.parent / 'profile'}",
        f"--window-size={width},900", f"--virtual-time-budget={milliseconds}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
