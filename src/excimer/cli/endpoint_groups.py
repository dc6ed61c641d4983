"""Control groups of an installation's endpoints, once nothing of it runs: nobody else would remove them."""

from pathlib import Path

from excimer.cli.installation import Installation


def remove_groups(installation: Installation) -> None:
    """With whatever is left in them. What cannot be removed is empty, and used again by the next start."""
    from excimer.compute_node.cgroups import look_at_machine, remove_cgroups

    told = installation.config.cgroup_parent
    endpoints_dir = installation.directory / "endpoints"
    remove_cgroups(endpoints_dir, None if told is None else Path(told), look_at_machine())
