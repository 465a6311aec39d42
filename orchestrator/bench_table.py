"""A file of unit costs as a table."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def bench_table(found: Mapping[str, Any]) -> Table:
    """What was measured, for people."""
    table = Table("", "size", "", title=None)
    for name, device in found["devices"].items():
        for what in ("matmul", "gram", "experts", "reverse"):
            for dtype, rows, width, speed in device[what]:
                label = f"{name} {what} {dtype}"
                table.add_row(label, f"{rows} × {width} × {width}", f"{speed / 1e9:,.1f} GFLOP/s")
        for entry in device["solve"]:
            text = f"{entry['cube'] * 1e12:.2f} ps/weight and singular value"
            if not entry["cube"]:
                (few, slow), *_, (many, fast) = entry["rows"]
                text = f"{slow / few * 1e9:,.1f} to {fast / many * 1e9:,.1f} ns/weight"
            table.add_row(name, entry["chain"], text)
        for what in ("sums", "product"):
            unit = "GB/s" if what == "sums" else "GFLOP/s"
            for width, speed in device[what]:
                table.add_row(f"{name} {what}", f"{width} × {width}", f"{speed / 1e9:.2f} {unit}")
        for dtype, length, seconds in device["attention"]:
            text = f"{4e-9 / seconds:,.1f} GFLOP/s"
            table.add_row(f"{name} attention {dtype}", f"{length} tokens", text)
        table.add_row(f"{name} single values", "", f"{1e-9 / device['wide']:.2f} billion/s")
        table.add_row(f"{name} factor", "", f"{device['factor'] / 1e9:.1f} billion in³/s")
        if device["copy"]:
            table.add_row(f"{name} copy", "", f"{device['copy'] / 1e9:.2f} GB/s")
    for what in ("read", "save", "digest", "host_add"):
        table.add_row(f"host {what}", "", f"{found['host'][what] / 1e9:.2f} GB/s")
    for what in ("write", "entry", "call", "worker_start"):
        table.add_row(f"host {what}", "", f"{found['host'][what] * 1e3:,.2f} ms")
    for stage, seconds in found["host"]["overheads"].items():
        table.add_row(f"run {stage}", "whatever the model", f"{seconds:.2f} s")
    return table
