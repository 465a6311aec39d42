"""The command line. People read stderr; with ``--json`` one JSON object goes to stdout."""

import json
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.table import Table

from moesaic.kernels.discovery import UnknownName
from moesaic.orchestrator import runlog
from moesaic.orchestrator.console import show_scores, stderr
from moesaic.orchestrator.errors import RunError, UserError, denied, passes_by
from moesaic.orchestrator.foreign import printable
from moesaic.orchestrator.process import collect_rarely, lead_nowhere, leave, open_streams
from moesaic.orchestrator.redaction import redacted, redacted_tree
from moesaic.orchestrator.runlog import STOPPED

if TYPE_CHECKING:
    from moesaic.orchestrator.pool import Pool

app = typer.Typer(
    name="moesaic",
    help="Fits a language model, dense or Mixture-of-Experts, into a byte budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(help="The folder of finished pieces.", no_args_is_help=True)
app.add_typer(store_app, name="store")

# A command line that is wrong; typer has no other name for it.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).")]
Output = Annotated[
    Path | None, typer.Option(help="Folder for what the run leaves; default runs/NAME.")
]
Register = Annotated[
    str | None,
    typer.Option(help="Name in MLflow's registry; default: the recipe's tracking.register_as."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def _quiet_libraries() -> None:
    """Other libraries' chatter does not belong between our lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")


@contextmanager
def _stdout_kept_for_json(wanted: bool) -> Iterator[None]:
    """While this is open, what anybody prints to stdout, Ray's processes too, goes to stderr."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _answer(work: Callable[[], Mapping[str, Any]], as_json: bool, debug: bool) -> None:
    """Runs a verb; errors become one or two lines and an exit status.

    With ``--json`` they are one object too, ``{"error": TEXT, "exit": STATUS}``.
    """
    _quiet_libraries()
    try:
        with _stdout_kept_for_json(as_json):
            result = work()
    except (UserError, UnknownName) as error:
        _fail("error", str(error), 2, as_json, debug)
    except RunError as error:
        _fail("failed", str(error), 1, as_json, debug)
    except KeyboardInterrupt:
        _fail("failed", STOPPED, 1, as_json, debug)
    except Exception as error:
        if (told := denied(error)) is not None:
            _fail("error", str(told), 2, as_json, debug)
        if isinstance(error, OSError) and passes_by(error) and error.filename:
            again = "finished work is kept: run the same command again"
            _fail("failed", f"{error.filename}: {error.strerror}; {again}", 1, as_json, debug)
        reason = " ".join(redacted(f"{type(error).__name__}: {error}").split())[:400]
        hint = "" if debug else " (--debug shows the traceback)"
        _fail("failed", reason + hint, 1, as_json, debug)
    else:
        if as_json and not _print_json(result):
            raise typer.Exit(1)


def _fail(word: str, reason: str, status: int, as_json: bool, debug: bool) -> NoReturn:
    if debug:
        stderr.print(traceback.format_exc(), markup=False)
    lines = "\n".join(map(printable, reason.split("\n")))  # files of others may be quoted
    stderr.print(f"{word}: {lines}", markup=False)
    if as_json:
        _print_json({"error": reason, "exit": status})
    raise typer.Exit(status) from None


def _print_json(value: Mapping[str, Any]) -> bool:
    """Whether it was written; who has closed a pipe (``| head``) is told nothing."""
    text = json.dumps(redacted_tree(_finite(value)), ensure_ascii=False, allow_nan=False)
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            reason = f"the JSON cannot be written: {error.strerror}"
            stderr.print(f"failed: {reason}", markup=False)
        lead_nowhere(sys.stdout)  # what the stream still holds
        return False
    return True


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run_stages(
    recipe_file: Path, output: Path | None, stages: tuple[str, ...], register: str | None = None
) -> Mapping[str, Any]:
    with _head_start(recipe_file, output) as pool:
        from moesaic.orchestrator.run import run_recipe

        return run_recipe(recipe_file, output, stages, register, pool)


def _head_start(recipe_file: Path, output: Path | None) -> AbstractContextManager["Pool | None"]:
    """For the verbs that have workers."""
    from moesaic.orchestrator.headstart import head_start

    return head_start(recipe_file, output, "moesaic.orchestrator.run")


@app.command()
def run(
    recipe: RecipeFile,
    output: Output = None,
    register: Register = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """All stages: calibrate, measure, search, evaluate, assemble, report."""

    def work() -> Mapping[str, Any]:
        result = _run_stages(recipe, output, ("evaluate", "assemble", "report"), register)
        show_scores(result["scores"], result.get("plans", ("plan",)))
        _print_places(result)
        return result

    _answer(work, as_json, debug)


@app.command()
def tune(
    recipe: RecipeFile,
    trials: Annotated[int, typer.Option(min=1, help="Trials that the study is to have.")],
    output: Output = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds after which no new trial begins, from when all is measured and the first"
            " trial may begin.",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Trials at a time; default: one per worker.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="The study's journal, a file; default OUTPUT/journal.log."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with a study that is there, or refuse to.")
    ] = True,
    register: Register = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """As run, with a study (Optuna) of how far to trust the measurements as search."""

    def work() -> Mapping[str, Any]:
        from moesaic.orchestrator.study_journal import journal_file

        journal = None if storage is None else journal_file(storage)
        with _head_start(recipe, output) as pool:
            from moesaic.orchestrator.run import tune_recipe
            from moesaic.orchestrator.tune import StudyOptions

            options = StudyOptions(trials, timeout, jobs, journal, resume)
            result = tune_recipe(recipe, output, options, register, pool)
        show_scores(result["scores"])
        _print_places(result)
        stderr.print(f"study       optuna-dashboard {result['study']['journal']}", markup=False)
        return result

    _answer(work, as_json, debug)


@app.command()
def scores(
    recipe: RecipeFile,
    plans: Annotated[int, typer.Option(min=6, help="Random plans that are measured.")] = 60,
    swaps: Annotated[
        int | None, typer.Option(min=0, help="Single-unit swaps, at most; default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of all that is random.")] = 0,
    output: Output = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Which score to believe: rank correlations with the KL of plans that are really run."""

    def work() -> Mapping[str, Any]:
        with _head_start(recipe, output) as pool:
            from moesaic.orchestrator.run import score_recipe
            from moesaic.orchestrator.score_table import SCORE_FILES, ScoreOptions, shown

            result = score_recipe(recipe, output, ScoreOptions(plans, swaps, seed), pool)
        folder = Path(result["output"])
        stderr.print(shown(result))
        stderr.print(f"table       {folder / SCORE_FILES[0]}", markup=False)
        stderr.print(f"formula     {folder / SCORE_FILES[2]}", markup=False)
        stderr.print(f"pictures    {folder / 'pictures'}/score_*.png", markup=False)
        stderr.print(f"MLflow      mlflow ui --backend-store-uri {result['tracking_uri']}")
        return result

    _answer(work, as_json, debug)


def _print_places(result: Mapping[str, Any]) -> None:
    """Where to look at what a run has left."""
    folder = Path(result["output"])
    for model in result.get("models", {"plan": folder / "model"}).values():
        stderr.print(f"checkpoint  {model}", markup=False)
    stderr.print(f"report      {folder / 'report.html'}", markup=False)
    stderr.print(f"MLflow      mlflow ui --backend-store-uri {result['tracking_uri']}")


@app.command()
def calibrate(
    recipe: RecipeFile, output: Output = None, as_json: Json = False, debug: Debug = False
) -> None:
    """One stage: statistics of every layer."""
    _answer(lambda: _run_stages(recipe, output, ("calibrate",)), as_json, debug)


@app.command()
def measure(
    recipe: RecipeFile, output: Output = None, as_json: Json = False, debug: Debug = False
) -> None:
    """One stage: every unit under every candidate (and the calibration it needs)."""
    _answer(lambda: _run_stages(recipe, output, ("measure",)), as_json, debug)


@app.command()
def search(
    recipe: RecipeFile, output: Output = None, as_json: Json = False, debug: Debug = False
) -> None:
    """One stage: the plan that loses least within the budget."""
    _answer(lambda: _run_stages(recipe, output, ("search",)), as_json, debug)


@app.command()
def assemble(
    recipe: RecipeFile, output: Output = None, as_json: Json = False, debug: Debug = False
) -> None:
    """One stage: the checkpoint of the plan, reloaded and compared."""
    _answer(lambda: _run_stages(recipe, output, ("assemble",)), as_json, debug)


@app.command()
def evaluate(
    recipe: RecipeFile, output: Output = None, as_json: Json = False, debug: Debug = False
) -> None:
    """One stage: scores of the dense model, the baselines and the plan on held-out text."""

    def work() -> Mapping[str, Any]:
        result = _run_stages(recipe, output, ("evaluate",))
        show_scores(result["scores"], result.get("plans", ("plan",)))
        return result

    _answer(work, as_json, debug)


@app.command()
def check(
    recipe: RecipeFile,
    output: Output = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Predict for this cluster: 8xH100:16cpu,4*32cpu …, or a YAML file."),
    ] = None,
    bench: Annotated[
        Path | None, typer.Option(help="Unit costs, from moesaic bench --output FILE.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Validates everything and predicts bytes, memory and time before anything starts."""

    def work() -> Mapping[str, Any]:
        from moesaic.orchestrator.forecast import show_forecast
        from moesaic.orchestrator.run import check_recipe

        if cluster is not None:
            from moesaic.orchestrator.outlook import predict_on, show_outlook

            result = predict_on(recipe, output, cluster, bench)
            show_outlook(result, stderr)
            return result
        result = check_recipe(recipe, output, bench)
        show_forecast(result, stderr)
        return result

    _answer(work, as_json, debug)


@app.command()
def bench(
    output: Annotated[
        Path | None, typer.Option(help="File (JSON) that check --bench reads.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe whose chains are measured as well.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Cores of one worker.")] = 1,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measures what work costs on this machine: products, solving, files, Ray."""

    def work() -> Mapping[str, Any]:
        from moesaic.orchestrator.bench import run_bench
        from moesaic.orchestrator.bench_table import bench_table
        from moesaic.orchestrator.console import View

        with View() as view:
            result = run_bench(output, recipe, threads, view)
        stderr.print(bench_table(result))
        return result

    _answer(work, as_json, debug)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder, Hugging Face name, or builtin:demo.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a model consists of: blocks, units, experts, bytes."""

    def work() -> Mapping[str, Any]:
        from moesaic.orchestrator.forecast import inspect_model, show_model

        result = inspect_model(model)
        show_model(result, stderr)
        return result

    _answer(work, as_json, debug)


@app.command("list")
def list_names(
    kind: Annotated[str, typer.Argument(help="methods, formats, searches, scores or families.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Names of everything that can be written into a recipe."""

    def work() -> Mapping[str, Any]:
        from moesaic.orchestrator.listing import listing

        found = listing(kind)
        table = Table(show_header=False, box=None)
        for name, text in found.items():
            table.add_row(name, text)
        (stderr if as_json else _stdout()).print(table)
        return {kind: found}

    _answer(work, as_json, debug)


def _stdout() -> Any:
    from rich.console import Console

    return Console(highlight=False)


@app.command()
def show(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that a run left.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Scores and plan of a finished run."""

    def work() -> Mapping[str, Any]:
        from moesaic.orchestrator.listing import read_run

        result = read_run(run_folder)
        show_scores(result["scores"], result.get("plans", ("plan",)))
        for name in result.get("plans", [""]):
            if name:
                stderr.print(name, markup=False, style="bold")
            counts = result["choices"][name] if name else result["choices"]
            for text, count in counts.items():
                stderr.print(f"{count:5d} × {text}", markup=False)
        return result

    _answer(work, as_json, debug)


@store_app.command("gc")
def store_gc(
    store: Annotated[str, typer.Argument(help="Folder or URL of the store.")],
    keep: Annotated[
        list[Path] | None, typer.Option(help="Run folders whose pieces stay (repeatable).")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Instead of --keep: no run's pieces stay.")
    ] = False,
    minutes: Annotated[float, typer.Option(min=0, help="Keep what is younger than this.")] = 60.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Removes what no named run needs (scores are made anew), and what killed writers left."""

    def work() -> Mapping[str, Any]:
        from moesaic.orchestrator.run import collect_garbage

        if bool(keep) == everything:
            raise UserError(
                f"{store}: say what stays: --keep RUN for each run that is still needed, or --all"
                " to remove the pieces of all runs"
            )
        files, size = collect_garbage(store, keep or [], minutes * 60)
        stderr.print(f"{store}: removed {files:,} files, {size:,} bytes", markup=False)
        return {"files": files, "bytes": size}

    _answer(work, as_json, debug)


def main() -> NoReturn:
    """Entry point. SIGTERM (Slurm, Kubernetes, timeout) and SIGHUP (a terminal that is gone) end a
    run in order, as Ctrl-C does."""
    collect_rarely()
    open_streams()
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else of nohup
        signal.signal(signal.SIGHUP, _stop)
    try:
        status = app(prog_name="moesaic", standalone_mode=False)
    except _UsageError as error:
        status = _misused(error)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    leave(status or 0)


def _misused(error: Any) -> int:
    """Tells what is wrong with a command line; returns the exit status."""
    if text := error.format_message():  # else its help was printed
        verb = error.ctx.command_path if error.ctx else "moesaic"
        with suppress(typer.Exit):
            _fail("error", f"{text} ({verb} --help)", 2, "--json" in sys.argv, False)
    return 2


# Schedulers send a signal to a process and to its group: what comes so soon is the same order.
_AGAIN_SECONDS = 10.0
_stopped_at = -math.inf


def _stop(number: int, frame: object) -> None:
    # Another one must not disturb what the first one made us put in order; but where that does not
    # end, or the first one got lost (Python drops what is raised while an object is taken apart),
    # a later one must be able to.
    global _stopped_at
    if time.monotonic() - _stopped_at < _AGAIN_SECONDS:
        return
    _stopped_at = time.monotonic()
    # At once: who sent it (Ray after 3 s) may not wait until everything is in order.
    runlog.urgent(f"stopping, {signal.Signals(number).name}; finished work is kept")
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
