"""Tables that grow by rows, in the form of MLflow's `log_table`: {"columns": […], "data": [[…], …]}."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def table(text: str) -> list[Row]:
    content = json.loads(text)
    return [dict(zip(content["columns"], values, strict=True)) for values in content["data"]]


def merged(standing: Sequence[Row], new: Sequence[Row], key: Sequence[str]) -> dict[str, Any]:
    """The table with more rows. One whose `key` columns stand there already changes that row's columns."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in (*standing, *new):
        rows.setdefault(tuple(row[name] for name in key), {}).update(row)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    return {"columns": columns, "data": [[row.get(name) for name in columns] for row in rows.values()]}
