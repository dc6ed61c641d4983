"""What py-spy's failures are told as. A program of a few lines stands in for it."""

import sys
from pathlib import Path

import pytest

from excimer.cli.profiler import ProfileFailedError, ProfileNotPermittedError, check_writable, record_profile

PERMISSION = "Error: Permission Denied: Try running again with elevated permissions by going 'sudo env ...'"


def _program(directory: Path, body: str) -> Path:
    path = directory / "py-spy"
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_profile_is_written_with_native_frames(tmp_path: Path) -> None:
    program = _program(tmp_path, "open(sys.argv[-1], 'w').write(' '.join(sys.argv[1:-1]))")
    out = tmp_path / "out.svg"
    record_profile(program, 12, 3, out, with_idle=False)
    asked = out.read_text()
    assert "record --pid 12 --duration 3" in asked
    assert "--native" in asked
    assert "--idle" not in asked


@pytest.mark.parametrize(
    ("says", "kind", "told"),
    [
        (PERMISSION, ProfileNotPermittedError, "SYS_PTRACE"),
        ("Error: Operation not permitted (os error 1)", ProfileNotPermittedError, "ptrace_scope"),
        ("Error: No stack counts found", ProfileFailedError, "--idle"),
        ("Error: Failed to find python version", ProfileFailedError, "Failed to find python version"),
        ("", ProfileFailedError, "wrote nothing"),
    ],
)
def test_failures_say_what_to_do(
    tmp_path: Path, says: str, kind: type[ProfileFailedError], told: str
) -> None:
    program = _program(tmp_path, f"sys.exit({says!r})" if says else "sys.exit(1)")
    with pytest.raises(kind, match=told):
        record_profile(program, 12, 1, tmp_path / "out.svg", with_idle=False)
    assert not (tmp_path / "out.svg").exists()


def test_a_place_that_cannot_be_written_is_said_before_anything_is_sampled(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.svg")
    with pytest.raises(ProfileFailedError, match="there is no directory"):
        check_writable(tmp_path / "none" / "new.svg")
    with pytest.raises(ProfileFailedError, match="is a directory"):
        check_writable(tmp_path)


def test_success_without_a_file_is_a_failure(tmp_path: Path) -> None:
    program = _program(tmp_path, "print('py-spy> Error: No stack counts found', file=sys.stderr)")
    with pytest.raises(ProfileFailedError, match="no CPU"):
        record_profile(program, 12, 1, tmp_path / "out.svg", with_idle=False)
