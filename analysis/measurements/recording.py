"""Measurements on their way into their files: stored already, begun, saved now and then, done."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from analysis.measurements.files import fits, load, measurement_file, same_data
from analysis.measurements.schema import Measurement, described
from lossgeometry.errors import InputError, one_line
from lossgeometry.layout import FORMAT, image, label, write
from lossgeometry.running.distributed import ALONE, Team
from models.files import locked, patiently, replacing
from models.provenance import Provenance, versions

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint


class Recording:
    """A measurement of a checkpoint: what there is of it already, and where the rest goes.

    Of a team the first process reads and writes; all of them make the same calls, but for `save`.

    Parameters
    ----------
    name : str
        Where in the HDF5 file it belongs.
    checkpoint : Provenance
    options : mapping
        Those that decide the result.
    now : callable
        Fingerprints of the splits of the dataset as they are now, see `stored`.
    team : Team, optional
    at_least : collection of str, optional
        Options of which what is stored may have more.
    force : bool
        Measure again whatever there is.

    Raises
    ------
    InputError
        If a measurement of these weights and images with other options would be replaced.

    Attributes
    ----------
    found : Measurement or None
        As it is stored.
    begun : dict of str to array
        The progress of an interrupted measurement; empty if there is none.
    data : dict of str to str
        Fingerprints of the splits that it is made on, to be set before anything is saved.
    """

    def __init__(
        self,
        name: str,
        checkpoint: Provenance,
        options: Mapping[str, Any],
        now: Callable[[], Mapping[str, str]],
        *,
        team: Team = ALONE,
        at_least: Collection[str] = (),
        force: bool = False,
    ) -> None:
        self.name, self.checkpoint, self.team = name, checkpoint, team
        self.data: dict[str, str] = {}
        self.found: Measurement | None = None
        self.begun: dict[str, np.ndarray] = {}
        self._unfinished = f"unfinished/{name}"
        self._options, self._at_least = options, at_least
        if force:
            return
        look = partial(stored, checkpoint=checkpoint, options=options, data=now)
        self.found = team.first(partial(look, name, at_least=at_least))
        if self.found is None and (begun := team.first(partial(look, self._unfinished))):
            print(f"{begun.path}:/{name} was interrupted; going on from there")
            self.begun = dict(begun.arrays)
        if self.found is None and not self.begun:
            team.first(partial(_require_replaceable, name, checkpoint, options, now, at_least))

    def announce(self) -> None:
        """Say that it is there already, if it is, and of which options it has more."""
        if self.found:
            own = {key: self.found.options[key] for key in self._at_least}
            more = [f"{k}: {value}" for k, value in own.items() if value != self._options[k]]
            of = f" ({', '.join(more)})" if more else ""
            print(f"{self.found.path}:/{self.name} is there already{of}; --force measures it again")

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Save the progress, to go on from after an interruption; of a team, one does."""
        self._store(self._unfinished, arrays)

    def finish(self, arrays: Mapping[str, Any]) -> Measurement:
        """Store the result in place of the progress."""
        final = {name: np.asarray(array) for name, array in arrays.items()}
        write = partial(self._store, self.name, final, in_place_of=self._unfinished)
        self.found = self.team.first(write)
        return self.found

    def _store(self, name: str, arrays: Mapping[str, np.ndarray], **how: Any) -> Measurement:
        common: dict[str, Any] = dict(options=self._options, data=self.data)
        return store(name, arrays, checkpoint=self.checkpoint, **common, **how)


def complete(
    recordings: Iterable[Recording],
    load: Callable[[Provenance], Checkpoint],
    measure: Callable[[Recording, Checkpoint], Mapping[str, Any]],
) -> list[Measurement]:
    """What is stored, and of the other recordings what `measure` makes.

    The weights of all these are loaded before the first is measured: what is wrong with one is said
    now, rather than after hours.
    """
    recordings = list(recordings)
    weights = {r: load(r.checkpoint) for r in recordings if r.found is None}
    return [r.found or r.finish(measure(r, weights[r])) for r in recordings]


def describe(checkpoint: Provenance) -> dict[str, Any]:
    """What a measurement remembers of the checkpoint it was made of."""
    return {
        "architecture": checkpoint.architecture,
        "recipe": checkpoint.recipe.options(),
        "dataset": checkpoint.dataset,
        "images": checkpoint.images,
        "epoch": checkpoint.epoch,
        "seed": checkpoint.seed,
        "sha256": checkpoint.sha256,
    }


def store(
    name: str,
    arrays: Mapping[str, np.ndarray],
    *,
    checkpoint: Provenance,
    options: Mapping[str, Any],
    data: Mapping[str, str] | None = None,
    in_place_of: str | None = None,
) -> Measurement:
    """Write a measurement of a loaded `checkpoint` to its file, in place of one of the same name.

    `data` are the fingerprints of the splits of the dataset that it was made on. The saved progress
    that it completes, if any, is named by `in_place_of` and goes. Other groups stay as they are. A
    changed copy of the file is brought to disk and renamed, under a lock: the file is never
    half-written, whatever happens.

    Raises
    ------
    InputError
        If the file is there and is damaged: it is left as it is.
    OSError
        If it cannot be written.
    """
    assert checkpoint.path is not None, "a checkpoint is saved before it is measured"
    path = measurement_file(checkpoint.path)
    what, forms = described(name)
    attributes = {
        "format": FORMAT,
        "description": what,
        "options": json.dumps(dict(options), sort_keys=True),
        "checkpoint": json.dumps(describe(checkpoint), sort_keys=True),
        "versions": json.dumps(versions()),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "data": json.dumps(dict(data or {}), sort_keys=True),
    }

    def fill(new: h5py.File) -> None:
        """With what stays, for a file would keep the room of all that was ever deleted."""
        if path.exists():
            _copy_all_but((name, in_place_of), path, new)
        group = new.create_group(name)
        group.attrs.update(attributes)
        write(group, arrays, forms)

    with locked(path):
        content = image(fill)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        measurement = load(path, name)
    assert measurement is not None
    return measurement


def _copy_all_but(left_out: Collection[str | None], path: Path, new: h5py.File) -> None:
    def copy(source: h5py.Group, target: h5py.Group, bare: bool = False) -> None:
        """The attributes of arrays that are `bare` refer to others, and have to be made anew."""
        target.attrs.update(source.attrs)
        for key, item in source.items():
            name = item.name.removeprefix("/")
            if name in left_out:
                continue
            if isinstance(item, h5py.Dataset):
                source.copy(item, target, key, without_attrs=bare)
                continue
            own, ours = target.create_group(key), "format" in item.attrs
            copy(item, own, bare or ours)
            if ours:
                label(own, described(name)[1])
            if not len(own) and not own.attrs:
                del target[key]

    try:
        with patiently(lambda: h5py.File(path), BlockingIOError, path) as file:
            copy(file, new)
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a usable measurement file ({one_line(error)}); it is left as it is: move "
            "it away, and measure again"
        ) from error


def stored(
    name: str,
    *,
    checkpoint: Provenance,
    options: Mapping[str, Any],
    data: Callable[[], Mapping[str, str]] | None = None,
    at_least: Collection[str] = (),
) -> Measurement | None:
    """The measurement of exactly this checkpoint with exactly these options, if there is one.

    Of the options `at_least`, numbers or flags, it may have more.
    `data` gives the fingerprints of the splits of the dataset as it is now, as far as it is there.
    If the measurement was made on others, that is printed, and it does not count.
    """
    found = _of_these_weights(name, checkpoint)
    if found is None or not fits(found.options, json.loads(json.dumps(dict(options))), at_least):
        return None
    if data is not None and not same_data(found, data):
        print(f"{found.path}:/{name} is of other images: {checkpoint.dataset} has changed since")
        return None
    return found


def _of_these_weights(name: str, checkpoint: Provenance) -> Measurement | None:
    """The measurement of exactly this checkpoint, with whatever options."""
    assert checkpoint.path is not None, "a checkpoint is saved before it is measured"
    path, older = measurement_file(checkpoint.path), checkpoint.path.with_suffix(".h5")
    found = load(path, name)
    if found is None and path != older:  # all files of a name had one measurement file once
        found = load(older, name)
    same = found and found.checkpoint == json.loads(json.dumps(describe(checkpoint)))
    return found if same else None


def _require_replaceable(
    name: str,
    checkpoint: Provenance,
    options: Mapping[str, Any],
    data: Callable[[], Mapping[str, str]],
    at_least: Collection[str],
) -> None:
    """Raise `InputError` if there is a measurement with other options, which may be dear.

    One that has only less of the options `at_least` is a part of what is asked for.
    """
    found = _of_these_weights(name, checkpoint)
    if found is None or not same_data(found, data):
        return
    asked = json.loads(json.dumps(dict(options)))
    keys = [k for k in {**asked, **found.options} if asked.get(k) != found.options.get(k)]
    keys = [key for key in keys if key not in at_least]
    if keys:
        there, now = ({key: own.get(key) for key in keys} for own in (found.options, asked))
        raise InputError(
            f"{found.path}:/{name}: measured with {_words(there)}, asked for {_words(now)}; "
            "expected --force, which measures again and replaces it"
        )


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', '-')} {value}" for key, value in options.items())
