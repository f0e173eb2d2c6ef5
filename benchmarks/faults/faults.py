"""The list of all fault generators, by name."""

from __future__ import annotations

from benchmarks.faults import faults_data, faults_parameters, faults_signal, faults_steps
from benchmarks.faults.fault import Fault

FAMILIES: dict[str, type[Fault]] = {
    fault.family: fault
    for module in (faults_steps, faults_signal, faults_parameters, faults_data)
    for fault in module.FAMILIES
}
