"""Build of the native parts: Cython modules of `_native`, and libhydrate, plain C without CPython.

The redo worker extension is not built here: it needs the headers of the PostgreSQL it serves, so
`excimer.postgres` compiles it on the user's machine from the sources shipped in `excimer/csrc`.
"""

import os
import shutil
import subprocess
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

NATIVE = Path("src/excimer/_native")
CFLAGS = ["-O3", "-Wall", "-Wno-unused-function", "-fno-strict-aliasing"]


class BuildNative(build_ext):
    """Also runs csrc/libhydrate's own Makefile and places the library in the package."""

    def run(self) -> None:
        super().run()
        target = Path("src/excimer" if self.inplace else Path(self.build_lib) / "excimer") / "_native"
        target.mkdir(parents=True, exist_ok=True)
        if Path("csrc/libhydrate/Makefile").exists():
            subprocess.run(["make", "-s", "-C", "csrc/libhydrate", "libhydrate.so"], check=True)
            # A new file, not a new content: whoever runs has the old one mapped, and would crash.
            shutil.copy2("csrc/libhydrate/libhydrate.so", target / "libhydrate.so.new")
            (target / "libhydrate.so.new").replace(target / "libhydrate.so")


class ShipSources(build_py):
    """Copies csrc/ into the wheel, where `excimer.postgres` finds the redo extension's sources."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(
                "csrc",
                Path(self.build_lib) / "excimer" / "csrc",
                ignore=shutil.ignore_patterns("*.o", "*.so", "tests"),
                dirs_exist_ok=True,
            )


# tools/setup.sh builds these after it has installed the packages: pip would build all afresh each time.
sources = [] if os.environ.get("EXCIMER_NATIVE") == "later" else sorted(NATIVE.glob("*.pyx"))
extensions = [
    Extension(f"excimer._native.{source.stem}", [str(source)], extra_compile_args=CFLAGS)
    for source in sources
]
setup(
    ext_modules=cythonize(
        extensions,
        nthreads=os.cpu_count() or 1,
        compiler_directives={
            "language_level": "3",
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
        },
    )
    if extensions
    else [],
    cmdclass={"build_ext": BuildNative, "build_py": ShipSources},
)
