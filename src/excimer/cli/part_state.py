"""How a process of the installation is, in a word and in sentences for people.

A process that runs and is not heard is *starting* while it is young, and *silent* later or when somebody has
halted it.
"""

import os
import re
import time
from typing import NamedTuple

from excimer.cli.installation import HOST, Installation
from excimer.cli.local_processes import START_LIMIT_S, Probed, probe_health
from excimer.service.health import HTTP_OK
from excimer.service.process_records import ProcessRecord, is_halted

_SAFEKEEPER = re.compile(rf"safekeeper {re.escape(HOST)}:(\d+)")


class PartState(NamedTuple):
    state: str
    """running, unwell (it says so), starting, or silent."""
    words: list[str]
    """What is to be looked at."""
    facts: dict[str, str]


def ask_part(installation: Installation, process: ProcessRecord, http_address: str) -> PartState:
    """Asks a process that runs."""
    return part_state(installation, process, probe_health(http_address, process.pid))


def part_state(installation: Installation, process: ProcessRecord, probed: Probed) -> PartState:
    """From what it answered."""
    words = [with_names(installation, warning) for warning in probed.warnings]
    if probed.status == HTTP_OK:
        return PartState("running", words, probed.facts)
    if probed.status:
        return PartState("unwell", words, probed.facts)
    if is_halted(process.pid):
        return PartState("silent", [f"process {process.pid} is halted and does not answer"], {})
    if _age_s(process) > START_LIMIT_S:
        return PartState("silent", [f"process {process.pid} does not answer"], {})
    return PartState("starting", [], {})


def with_names(installation: Installation, sentence: str) -> str:
    """With safekeepers by the names of their parts instead of their addresses."""
    names = {str(ports.proposer): f"safekeeper-{ports.id}" for ports in installation.config.safekeepers}
    return _SAFEKEEPER.sub(lambda found: names.get(found[1], found[0]), sentence)


def _age_s(process: ProcessRecord) -> float:
    since_boot_s = process.start_ticks / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s
