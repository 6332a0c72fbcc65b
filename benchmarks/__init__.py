"""Benchmarks. As in the commands, threads wait passively: this comes before any of them imports PyTorch."""

from mslora_cr.utils.waiting import wait_passively

wait_passively()
