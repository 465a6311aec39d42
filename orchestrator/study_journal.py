"""Journals of studies: whether one can be worked on, and by whom; what a study there was made of.

A study's trials can only be compared if they were made of the same things. Whoever opens one says
what it wants to be made of: facts by name, as JSON. Some facts are hashes, which tell that two
things differ and not how; they are told in words.
"""

import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.files import disk_errors, make_folder
from moesaic.orchestrator.foreign import parse_json, printable, shown

if TYPE_CHECKING:
    from optuna.storages import JournalStorage

MADE_OF = "made_of"
MODEL, TEXT, CANDIDATES, MEASUREMENTS = "model", "calibration text", "candidates", "measurements"
CALIBRATION, VERSION, MODEL_NAME = "calibration", "version", "model's name"
# Facts that may be others in a study that goes on.
ASIDE = frozenset({VERSION, MODEL_NAME})
KNOBS = "knobs"
# Attribute of a trial whose values are among those tried first: their name.
START = "start"
_JOURNAL_BYTES = 1 << 30
# Seconds after which a lock within the journal is that of a dead process (Optuna waits for 30).
_GRACE_SECONDS = 5
# Facts that are hashes, in words.
_DIFFER = {
    TEXT: "calibration text differs (its files, sequences, length or seed, or the tokenizer)",
    MEASUREMENTS: "measurements differ (other calibration, or another version of moesaic)",
}
# Facts that journals of earlier versions lack.
_ADDED = frozenset({CALIBRATION})
# Candidates that are named, and characters of each.
_NAMED, _CHARACTERS = 3, 80
# Of all differences together.
_MOST_CHARACTERS = 1200


def journal_file(storage: str) -> Path:
    """The journal that ``--storage`` names.

    Raises:
        UserError: it names a database, an object store, or no file at all.
    """
    if "://" in storage:
        raise UserError(
            f"--storage: {shown(storage)} is no file: give the path of one, which the study's"
            " journal is kept in (study.log); databases and object stores cannot hold it"
        )
    if not Path(storage).name:
        raise UserError(f"--storage: {shown(storage)} is no file: give the path of one (study.log)")
    return Path(storage)


@contextmanager
def locked(journal: Path) -> Iterator[None]:
    """Keeps other drivers away while it is open; the folder is made if it is not there.

    Raises:
        UserError: somebody else is at work on the journal, or the place may not be written.
    """
    make_folder(journal.parent, "--storage")
    path = _lock_file(journal)
    with disk_errors(path):
        lock = path.open("a+")
    with lock:
        _take(lock, journal)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _lock_file(journal: Path) -> Path:
    return journal.with_name(f"{journal.name}.driver")


def _take(lock: IO[str], journal: Path) -> None:
    """The system's lock, which ends with its process."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        who = lock.read().strip()
        raise UserError(
            f"{journal}: process {who or 'unknown'} is at work on it: wait until it has"
            " finished, end it, or take another --storage"
        ) from None


# What Optuna meets in a journal that it did not write so: it checks nothing.
_NOT_AS_WRITTEN = (
    *(ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(ArithmeticError, RecursionError),
)


@contextmanager
def journal_errors(journal: Path) -> Iterator[None]:
    """Tells what Optuna finds wrong with a journal as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{journal}: cannot be used: {error.strerror}") from None
    except _NOT_AS_WRITTEN as error:
        raise UserError(_damaged(journal, str(error))) from None


def open_storage(journal: Path) -> "JournalStorage":
    """The journal for Optuna; made if it is not there. For use under :func:`journal_errors`."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    lock = JournalFileOpenLock(str(journal), grace_period=_GRACE_SECONDS)
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))


def mend(journal: Path) -> None:
    """Cuts off a line that has no end: whoever wrote it was killed.

    Raises:
        UserError: another line is no JSON.
    """
    if not journal.exists():
        return
    with journal_errors(journal):
        size = _checked(journal)
        if size < journal.stat().st_size:
            os.truncate(journal, size)


def _checked(journal: Path) -> int:
    """Bytes of the lines that have an end, all of which are JSON."""
    if journal.stat().st_size > _JOURNAL_BYTES:
        raise ValueError(f"more than {_JOURNAL_BYTES} bytes")
    content = journal.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole == 0 and not content.startswith(b"{"):
        whole = len(content)
    for line in content[:whole].splitlines():
        parse_json(line)
    return whole


def _damaged(journal: Path, reason: str) -> str:
    return (
        f"{journal}: is damaged, or no journal of Optuna ({' '.join(reason.split())[:120]}): move"
        " it away, or take another --storage"
    )


def check_journal(
    journal: Path,
    name: str,
    wanted: Mapping[str, Any],
    resume: bool,
    unknown: Collection[str] = (MEASUREMENTS,),
) -> str | None:
    """Finds out before any work whether a study can be begun or gone on with; changes nothing.

    Args:
        name: of the study in the journal.
        wanted: what it is to be made of.
        unknown: facts that are not known before there are measurements.
        resume: whether a study that is there already may be gone on with.

    Returns:
        what may turn out to be an obstacle once there are measurements, for people.

    Raises:
        UserError: as :class:`moesaic.orchestrator.study.Study`.
    """
    if not journal.exists():
        return None
    if _lock_file(journal).exists():
        with disk_errors(_lock_file(journal)), _lock_file(journal).open("r+") as lock:
            _take(lock, journal)
    with journal_errors(journal):
        _checked(journal)
        storage = open_storage(journal)
        check_own(journal, name, storage, len(wanted["objectives"]))
        for study in storage.get_all_studies():
            known = study.user_attrs.get(MADE_OF)
            if study.study_name == name and known is not None:
                before, now = (_comparable(facts, unknown) for facts in (known, wanted))
                check_same(journal, name, before, now, resume)
                if known.get(VERSION) != wanted[VERSION]:
                    return (
                        f"{journal}: the study {name!r} was begun by another version of moesaic:"
                        " whether that measures the same is known when it is measured anew"
                    )
    return None


def check_own(journal: Path, name: str, storage: "JournalStorage", objectives: int) -> None:
    """Refuses a study that does not say what it was made of, unless it is one of ours that has only
    just been begun: all that it has is values to try first.

    Args:
        storage: the journal as Optuna has it.
        objectives: that the study is to have.

    Raises:
        UserError: it was made by something else.
    """
    from optuna.study import StudyDirection
    from optuna.trial import TrialState

    for study in storage.get_all_studies():
        if study.study_name != name or MADE_OF in study.user_attrs:
            continue
        trials = storage.get_all_trials(study._study_id, deepcopy=False)
        ours = all(t.state == TrialState.WAITING and START in t.user_attrs for t in trials)
        if not ours or list(study.directions) != [StudyDirection.MINIMIZE] * objectives:
            raise UserError(
                f"{journal}: the study {name!r} there was not made by moesaic: take another"
                " --storage, or another name for the run"
            )


def _comparable(facts: Mapping[str, Any], unknown: Collection[str]) -> dict[str, Any]:
    """Facts that are known before measuring. Values of knobs are in alphabetical order: which of
    them the measurements name first is not known, either."""
    found = {fact: value for fact, value in facts.items() if fact not in unknown}
    if KNOBS in found:
        found[KNOBS] = {
            name: {**knob, "allowed": sorted(knob["allowed"], key=str)}
            for name, knob in found[KNOBS].items()
        }
    return found


def check_same(
    journal: Path, name: str, known: Mapping[str, Any], wanted: Mapping[str, Any], resume: bool
) -> None:
    """Refuses a study that is made of something else, or is not to be gone on with.

    Raises:
        UserError: saying what differs.
    """
    where = f"{journal}: the study {name!r}"
    if not resume:
        raise UserError(f"{where} is there already: take another --output or --storage")
    if found := printable("; ".join(differences(known, wanted))):
        told = found if len(found) <= _MOST_CHARACTERS else f"{found[:_MOST_CHARACTERS]} …"
        raise UserError(
            f"{where} was made with something else: {told}. Undo that, or take another --output or"
            " --storage"
        )


def differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """What two studies differ in, for people.

    Another version of the code may well measure the same: that alone is no difference.
    """
    for fact in dict.fromkeys([*known, *wanted]):
        before, now = known.get(fact), wanted.get(fact)
        if before == now or fact in ASIDE or (fact in _ADDED and fact not in known):
            continue
        if fact == MODEL:
            yield _other_model(known.get(MODEL_NAME), wanted.get(MODEL_NAME))
        elif fact in _DIFFER:
            yield _DIFFER[fact]
        elif fact == CANDIDATES and isinstance(before, list) and isinstance(now, list):
            yield f"{fact}: {_changed(before, now)}"
        elif isinstance(before, dict) and isinstance(now, dict):
            for name in dict.fromkeys([*before, *now]):
                if before.get(name) != now.get(name):
                    yield f"{fact} {name}: {_shown(before, name)}, now {_shown(now, name)}"
        else:
            yield f"{fact}: {_text(before)}, now {_text(now)}"


def _other_model(before: str | None, now: str | None) -> str:
    """Contents differ, which are compared; names tell people what they are of."""
    if before is None:
        return "the model differs (another one, or its files have changed)"
    if before == now:
        return f"the model differs: files of {before} have changed"
    return f"the model differs: {before}, now {now}"


def _changed(before: Sequence[str], now: Sequence[str]) -> str:
    """What was added to a list and removed from it."""
    changes = {
        "added": [one for one in now if one not in before],
        "removed": [one for one in before if one not in now],
    }
    told = [
        f"{len(found)} {verb} ({_named(found)})" for verb, found in changes.items() if len(found)
    ]
    return ", ".join(told) or "in another order"


def _named(found: Sequence[str]) -> str:
    names = [one if len(one) <= _CHARACTERS else f"{one[:_CHARACTERS]} …" for one in found]
    more = len(names) - _NAMED
    return "; ".join(names[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _shown(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name, "none")
    return _text(found["allowed"] if isinstance(found, dict) and "allowed" in found else found)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]} …"
