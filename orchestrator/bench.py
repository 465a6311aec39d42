"""Unit costs of a machine: what ``moesaic check`` measures in passing, longer and wider, in a file.

Every kind of device is measured with the same probes (:mod:`moesaic.orchestrator.machine`), at
several sizes; what lies between two is interpolated. What a method takes depends on its switches
(flags and names among its options), so that each of their settings is measured.
"""

import itertools
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from moesaic.methods.base import Chain, Spec, Unit, compressing, link_module, methods
from moesaic.orchestrator import file_probes, machine, probes
from moesaic.orchestrator.bench_form import check_bench
from moesaic.orchestrator.checkpoint import SINGLE, Checkpoint
from moesaic.orchestrator.console import View
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.experiment import Experiment
from moesaic.orchestrator.foreign import read_json, shown
from moesaic.orchestrator.machine import Crew, Load, Speeds
from moesaic.orchestrator.overheads import measure_overheads
from moesaic.orchestrator.pool import Pool, Task
from moesaic.orchestrator.recipe import load_recipe
from moesaic.orchestrator.recipe_sections import Compute
from moesaic.orchestrator.solving import Compressing, probe_compress, switches
from moesaic.orchestrator.timing import SpeedSource
from moesaic.orchestrator.worker import WorkerState

SCHEMA = 2
_DTYPES = (torch.float32, torch.bfloat16)
_ROWS, _WIDTHS = (4, 32, 256, 2048), {"cpu": (256, 1024, 2048), "cuda": (1024, 4096, 8192)}
# Rows and inputs of the weights that are factorised; time is taken to grow with their cube.
_FACTORED = 768
# Tokens of sequences that attend to one another, heads and channels of each.
_LENGTHS, _HEADS, _CHANNELS = (256, 2048), 8, 64
_HIDDEN, _VOCABULARY = 2048, 4096
_CALLS = 300
_FILE_VALUES = 16 << 20


def run_bench(output: Path | None, recipe: Path | None, threads: int, view: View) -> dict[str, Any]:
    """Measures this machine and writes what was found.

    Args:
        output: the file; None for none.
        recipe: its chains are measured as well.
        threads: cores of one worker.

    Raises:
        UserError: the file cannot be written, or the recipe is wrong.
    """
    chains = list({_key(chain): chain for chain in [*_of_recipe(recipe), *_single()]}.values())
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    sizes = {kind: _sizes(kind) for kind in kinds}
    beside = 2 * len(_LENGTHS) + len(_DTYPES) + 3
    total = sum(
        4 * len(own) + len(chains) + 2 * len(_WIDTHS[kind]) + beside for kind, own in sizes.items()
    )
    total += 6 + 1 + 1
    view.stage("bench", total)
    done = lambda: view.advance("bench", 1, machine_bytes())  # noqa: E731
    place = output.resolve().parent if output is not None else Path.cwd()
    with machine.using_threads(threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        devices = {_name(kind): _device(kind, threads, sizes[kind], chains, done) for kind in kinds}
    found = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe_machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "host": {
            **_disk(place, done),
            **_ray(threads, done),
            "overheads": _overheads(threads, place, done),
        },
        "devices": devices,
    }
    if output is not None:
        try:
            output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output: {output} cannot be written: {error.strerror}") from None
    return found


def machine_bytes() -> int:
    """Resident size of this process."""
    return int(psutil.Process().memory_info().rss)


def _name(kind: str) -> str:
    return "cpu" if kind == "cpu" else torch.cuda.get_device_name(0)


def _sizes(kind: str) -> list[tuple[torch.dtype, int, int]]:
    return [*itertools.product(_DTYPES, _ROWS, _WIDTHS[kind])]


def _single() -> Iterator[Chain]:
    """Every method that takes linears, alone, under every setting of its switches."""
    for name in methods():
        module = link_module(name)
        if "linear" not in module.SCOPE:
            continue
        fields: dict[str, list[Any]] = {
            option: cast(Any, field.json_schema_extra)["candidates"]
            for option, field in module.Options.model_fields.items()
            if isinstance(field.default, bool | str)
        }
        for values in itertools.product(*fields.values()):
            try:
                yield (Spec.of(name, dict(zip(fields, values, strict=True))),)
            except ValueError:  # switches that exclude one another
                continue


def _of_recipe(file: Path | None) -> list[Chain]:
    if file is None:
        return []
    found = [compressing(chain) for chain in load_recipe(file).chains()]
    return list(filter(None, found))


def _device(
    kind: str,
    threads: int,
    sizes: Sequence[tuple[torch.dtype, int, int]],
    chains: Sequence[Chain],
    done: Callable[[], None],
) -> dict[str, Any]:
    def each(values: Sequence[Any], measure: Callable[..., Any]) -> list[Any]:
        found = []
        for value in values:
            found.append(measure(value))
            done()
        return found

    dtype = _DTYPES[kind == "cuda"]
    square = {"weight": (_FACTORED, _FACTORED)}
    units = [Unit("probe", "linear", 0, "mlp", square, {"weight": "probe"})]
    tables: dict[str, Callable[[torch.dtype, int, int], float]] = {
        "matmul": lambda d, rows, width: probes.probe_matmul(rows, width, width, d, kind),
        "gram": lambda d, rows, width: probes.probe_gram(rows, width, d, kind),
        "experts": lambda d, rows, width: probes.probe_experts(rows, width, width, d, kind),
        "reverse": lambda d, rows, width: probes.probe_reverse(rows, width, width, d, kind),
    }
    measured = {name: each(sizes, lambda s, p=probe: p(*s)) for name, probe in tables.items()}
    looks = [(dtype, length) for dtype in _DTYPES for length in _LENGTHS]
    attention = each(looks, lambda s: probes.probe_attention(s[1], _HEADS, _CHANNELS, s[0], kind))
    widths = _WIDTHS[kind]
    sums = each(widths, lambda width: probes.probe_sums(width, kind))
    judging = each(widths, lambda width: probes.probe_product(width, kind))
    wide, factor = each(
        [probes.probe_wide, lambda k: probes.probe_factor(_FACTORED, k)], lambda probe: probe(kind)
    )
    solved = each(chains, lambda chain: probe_compress(chain, dtype, kind, units))
    head = each(_DTYPES, lambda d: machine.probe_head(_HIDDEN, _VOCABULARY, d, kind))
    (copy,) = each([machine.probe_copy], lambda probe: probe(kind))
    memory = psutil.virtual_memory().total if kind == "cpu" else torch.cuda.mem_get_info(0)[1]
    return {
        "kind": kind,
        "threads": threads,
        "memory_bytes": memory,
        **{
            name: [[*_plain(s), speed] for s, speed in zip(sizes, found, strict=True)]
            for name, found in measured.items()
        },
        "attention": [
            [_plain_dtype(dtype), length, seconds]
            for (dtype, length), seconds in zip(looks, attention, strict=True)
        ],
        "sums": [list(pair) for pair in zip(widths, sums, strict=True)],
        "product": [list(pair) for pair in zip(widths, judging, strict=True)],
        "wide": wide,
        "factor": factor,
        "head": {
            _plain_dtype(d): seconds / (_HIDDEN * _VOCABULARY)
            for d, seconds in zip(_DTYPES, head, strict=True)
        },
        "copy": None if math.isinf(copy) else copy,
        "solve": [
            {"chain": _key(chain), **vars(entry), "rows": [list(pair) for pair in entry.rows]}
            for chain, entry in zip(chains, solved, strict=True)
        ],
    }


def _plain_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _measured(dtype: torch.dtype) -> torch.dtype:
    """The one of those measured that is as large: float16 is taken to be as fast as bfloat16."""
    return min(_DTYPES, key=lambda own: abs(own.itemsize - dtype.itemsize))


def _plain(size: tuple[torch.dtype, int, int]) -> list[Any]:
    return [_plain_dtype(size[0]), *size[1:]]


def _key(chain: Chain) -> str:
    """Methods and switches: chains that are alike in these are taken to be equally fast."""
    parts = []
    for spec in chain:
        own = [f"{name}={value}" for name, value in switches((spec,)) if value != ""]
        parts.append(" ".join([spec.method, *own]))
    return " → ".join(parts)


def _disk(folder: Path, done: Callable[[], None]) -> dict[str, float]:
    """Reading and writing in the folder's file system."""
    with tempfile.TemporaryDirectory(prefix=".moesaic-", dir=folder) as name:
        place = Path(name)
        (place / "config.json").write_text("{}", encoding="utf-8")
        save_file({"x": torch.ones(_FILE_VALUES)}, place / SINGLE)
        probes: dict[str, Callable[[], float]] = {
            "read": lambda: machine.probe_read(Checkpoint(place)),
            "save": lambda: file_probes.probe_save(place),
            "digest": lambda: file_probes.probe_digest(place),
            "write": lambda: file_probes.probe_write(place),
            "entry": lambda: file_probes.probe_entry(place),
            "host_add": lambda: machine.probe_add("cpu"),
        }
        found = {}
        for what, probe in probes.items():
            found[what] = probe()
            done()
    return found


def nothing(state: WorkerState) -> dict[str, int]:
    """A task that does nothing."""
    return {"peak_bytes": 0}


def _ray(threads: int, done: Callable[[], None]) -> dict[str, float]:
    """Seconds until a worker is there, and of the driver for one task."""
    with Pool(Compute(workers=1, cpus_per_worker=threads)) as pool:
        started = time.perf_counter()
        pool.run([Task("bench:nothing", {}, "first")])
        start = time.perf_counter() - started
        started = time.perf_counter()
        pool.run([Task("bench:nothing", {}, str(number)) for number in range(_CALLS)])
        call = (time.perf_counter() - started) / _CALLS
    done()
    return {"worker_start": start, "call": call}


def _overheads(threads: int, place: Path, done: Callable[[], None]) -> dict[str, float]:
    found = measure_overheads(threads, place)
    done()
    return found


# What was measured before


def read_bench(file: Path) -> dict[str, Any]:
    """A file that ``moesaic bench`` wrote.

    Raises:
        UserError: it cannot be read, or another version wrote it.
    """
    try:
        found = read_json(file)
        schema = found["schema"] if isinstance(found, dict) else None
        if schema is not None and schema != SCHEMA:
            raise UserError(
                f"{file}: schema {shown(schema)}, this version reads {SCHEMA}: run moesaic bench"
                " again"
            )
        check_bench(found)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: no file of moesaic bench --output ({reason})") from None
    return dict(found)


def bench_source(file: Path, kind: str) -> SpeedSource:
    """Speeds of this machine's workers, from a file that was made here.

    Args:
        kind: ``cpu`` or ``cuda``.

    Raises:
        UserError: the file has no such device.
    """
    found = read_bench(file)
    device = next((d for d in found["devices"].values() if d["kind"] == kind), None)
    if device is None:
        raise UserError(f"{file}: has no {kind}, only {', '.join(found['devices'])}")
    return bench_speeds(found, device, str(file))


def bench_speeds(found: Mapping[str, Any], device: Mapping[str, Any], file: str) -> SpeedSource:
    """What :func:`~moesaic.orchestrator.machine.measure_speeds` gives, from a file.

    Args:
        device: the one of its devices that workers compute on.
        file: for messages.
    """

    def speeds(experiment: Experiment, crew: Crew, load: Load) -> Speeds:
        model, host = experiment.model, found["host"]
        dtype, few = _plain_dtype(_measured(model.dtype)), load.few or load.tokens
        hidden = model.hidden_size
        widths = [unit.shapes["gate"][1] for unit in model.units() if unit.kind == "bank"]
        # Of the three sides of an expert's products, two are the hidden size.
        narrow = round((hidden * max(widths, default=hidden)) ** 0.5)
        visits = device["experts" if widths else "matmul"]
        back = device["reverse" if widths else "matmul"]
        return Speeds(
            matmul=_between(device["matmul"], dtype, load.tokens, hidden),
            hessian=_between(device["gram"], dtype, load.tokens, hidden),
            expert_matmul=_between(visits, dtype, few, narrow),
            expert_hessian=_between(device["gram"], dtype, few, hidden),
            expert_reverse=_between(back, dtype, load.fewer or load.length, narrow),
            attention=_nearest([e[1:] for e in device["attention"] if e[0] == dtype], load.length),
            wide=device["wide"],
            head=device["head"][dtype] * hidden * model.vocab_size,
            read=host["read"],
            sums=_nearest(device["sums"], hidden),
            product=_nearest(device["product"], hidden),
            factor=device["factor"],
            write=host["write"],
            entry=host["entry"],
            compress=_solving(device["solve"], experiment.recipe.chains(), file),
            save=host["save"],
            digest=host["digest"],
            host_add=host["host_add"],
            copy=device["copy"] or math.inf,
        )

    return speeds


def _between(table: Sequence[Sequence[Any]], dtype: str, rows: int, width: int) -> float:
    """Speed at a size: of the nearest width, between the rows that were measured."""
    own = [entry for entry in table if entry[0] == dtype]
    nearest = min({entry[2] for entry in own}, key=lambda w: abs(math.log(w / width)))
    points = sorted((entry[1], entry[3]) for entry in own if entry[2] == nearest)
    counts, speeds = zip(*points, strict=True)
    return float(np.exp(np.interp(math.log(max(rows, 1)), np.log(counts), np.log(speeds))))


def _nearest(table: Sequence[Sequence[float]], size: float) -> float:
    """The figure of the size that is nearest, as a factor."""
    return float(min(table, key=lambda entry: abs(math.log(entry[0] / size)))[1])


def _solving(
    table: Sequence[Mapping[str, Any]], chains: Sequence[Chain], file: str
) -> dict[Chain, Compressing]:
    known = {
        entry["chain"]: Compressing(
            tuple((rows, seconds) for rows, seconds in entry["rows"]),
            entry["bank"],
            entry["dense"],
            entry["cube"],
        )
        for entry in table
    }
    found = {}
    for chain in chains:
        rest = compressing(chain)
        if not rest:
            continue
        if _key(rest) not in known:
            raise UserError(
                f"{file}: has no times of {_key(rest)}: run moesaic bench --recipe RECIPE"
            )
        found[chain] = known[_key(rest)]
    return found
