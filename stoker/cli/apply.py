"""`stoker deploy -f`: what a file changes in a cluster, shown before it is done; all is checked first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict

from stoker.cli.model_file import Wanted
from stoker.cli.output import console, print_json
from stoker.client import AsyncClient
from stoker.errors import CallerError, InvalidRequest, StokerError
from stoker.v1 import model_pb2

SHOWN_FIELDS = ("checkpoint_uri", "min_replicas", "max_replicas", "keep_alive_seconds", "concurrency")
"""Of a new model, with what its file switches on or names; of one that changes every field that does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What becomes of one model.

    Attributes:
        name: The model.
        kind: `create`, `change`, `same`, `delete` or `keep` (deployed, not in the file, left alone).
        fields: Name, value before and value after, of each field that differs.
    """

    name: str
    kind: str
    fields: tuple[tuple[str, Any, Any], ...] = ()


async def apply(
    client: AsyncClient, wanted: Sequence[Wanted], *, prune: bool, dry_run: bool, as_json: bool
) -> None:
    """Have the controller check everything, show what changes, then do it unless `dry_run`.

    Raises:
        InvalidRequest: The controller refuses some of it; nothing was changed.
        StokerError: It can't be reached, or refused later what it had accepted; what was done is printed.
    """
    deployed = {model.spec.name: model for model in await client.models()}
    after = await _checked(client, wanted)
    changes = plan(deployed, after, prune=prune)
    if as_json:
        print_json({"dry_run": dry_run, "changes": [_plain(change) for change in changes]})
    else:
        for line in lines(changes):
            console.print(line, highlight=False, markup=False)
    if dry_run:
        if not as_json:
            console.print("dry run: nothing was changed", highlight=False)
        return
    kinds = {change.name: change.kind for change in changes}
    for found in wanted:
        if kinds[found.spec.name] in {"create", "change"}:
            await client.deploy(found.spec)
            _done(f"deployed {found.spec.name}", as_json=as_json)
    for change in changes:
        if change.kind == "delete":
            await client.delete(change.name)
            _done(f"deleted {change.name}", as_json=as_json)


def plan(
    deployed: dict[str, model_pb2.Model], after: Iterable[model_pb2.Model], *, prune: bool
) -> tuple[Change, ...]:
    """Return what becomes of every model, by name. Pure.

    Args:
        deployed: What is deployed, by name.
        after: What the file's models would be.
        prune: Delete what is deployed and not in the file.
    """
    changes = []
    wanted = {model.spec.name: model for model in after}
    for name in sorted(deployed.keys() | wanted.keys()):
        if name not in wanted:
            changes.append(Change(name=name, kind="delete" if prune else "keep"))
        elif name not in deployed:
            new = _fields(wanted[name])
            changes.append(
                Change(name=name, kind="create", fields=tuple((key, None, new[key]) for key in sorted(new)))
            )
        else:
            old, new = _fields(deployed[name]), _fields(wanted[name])
            differing = tuple(
                (key, old.get(key), new.get(key))
                for key in sorted(old.keys() | new.keys())
                if old.get(key) != new.get(key)
            )
            changes.append(Change(name=name, kind="change" if differing else "same", fields=differing))
    return tuple(changes)


def lines(changes: Sequence[Change]) -> list[str]:
    """Return the changes for people: `+` new, `~` changed, `-` deleted; the others are counted."""
    found = []
    for change in changes:
        if change.kind == "create":
            values = {key: value for key, _, value in change.fields}
            named = {key: value for key, value in values.items() if isinstance(value, bool | dict | list)}
            more = [key for key, value in named.items() if value]
            shown = [f"{key} {_text(values[key])}" for key in (*SHOWN_FIELDS, *more) if key in values]
            found.append(f"+ {change.name}: {', '.join(shown)}")
        elif change.kind == "change":
            found.append(f"~ {change.name}")
            found.extend(f"    {key}: {_text(old)} → {_text(new)}" for key, old, new in change.fields)
        elif change.kind == "delete":
            found.append(f"- {change.name}")
    same = sum(change.kind == "same" for change in changes)
    if same:
        found.append(f"{same} unchanged")
    kept = [change.name for change in changes if change.kind == "keep"]
    if kept:
        found.append(f"{len(kept)} not in the file, left alone (--prune deletes): {', '.join(kept)}")
    return found


async def _checked(client: AsyncClient, wanted: Sequence[Wanted]) -> list[model_pb2.Model]:
    """Return the models as they would be stored; every refusal is collected before one is raised."""
    after, refusals = [], []
    for found in wanted:
        try:
            after.append((await client.deploy(found.spec, dry_run=True)).model)
        except CallerError as error:
            refusals.append(f"{found.where}: {error.message}")
        except StokerError as error:
            raise type(error)(
                f"{found.where}: {error.message}", retry_after_seconds=error.retry_after_seconds
            ) from error
    if refusals:
        raise InvalidRequest("\n".join([*refusals, "nothing was changed"]))
    return after


def _fields(model: model_pb2.Model) -> dict[str, Any]:
    fields: dict[str, Any] = MessageToDict(
        model.spec, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    del fields["name"]
    fields["checkpoint revision"] = model.checkpoint.revision
    return fields


def _plain(change: Change) -> dict[str, Any]:
    fields = {key: {"before": old, "after": new} for key, old, new in change.fields}
    return {"name": change.name, "kind": change.kind, "fields": fields}


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={each}" for key, each in sorted(value.items())) or "none"
    if isinstance(value, list):
        return (
            ", ".join(str(each.get("name", each)) if isinstance(each, dict) else str(each) for each in value)
            or "none"
        )
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value in {None, ""} else f"{value:g}" if isinstance(value, float) else str(value)


def _done(text: str, *, as_json: bool) -> None:
    if not as_json:
        console.print(text, highlight=False, markup=False)
