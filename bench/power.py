"""What a GPU draws while it works, where its driver tells."""

from __future__ import annotations

import re
import statistics
import subprocess
import time

import torch
from harness import Call


def mean_watts(device: torch.device, call: Call, seconds: float) -> float | None:
    """Mean power draw over repeated calls that last about ``seconds``; None where not readable."""
    if device.type != "cuda":
        return None
    query = ["--query-gpu=power.draw", "--format=csv,noheader,nounits", "--loop-ms=50"]
    # By its identifier: torch counts the visible GPUs, the driver all.
    identifier = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        process = subprocess.Popen(
            ["nvidia-smi", identifier, *query],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except OSError:
        return None
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        call()
    torch.cuda.synchronize(device)
    process.terminate()
    return mean_reading(process.communicate()[0])


def mean_reading(text: str) -> float | None:
    """The mean of the whole lines that are a number, less the first half, the way up."""
    readings = [float(line) for line in re.findall(r"^\s*(\d+(?:\.\d+)?) *\n", text, re.MULTILINE)]
    return statistics.fmean(readings[len(readings) // 2 :]) if readings else None
