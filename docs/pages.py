"""What mkdocs asks for as it builds the site: the pages of every setting and of every command, made from the code.

Links to files of the project that are no pages become plain words.
"""

import inspect
import re
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from launch.cli import app
from launch.settings.schema import run_schema

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "settings.md", content=settings_page()))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(lambda match: match[1] if match[1].startswith("`") else f"`{match[1]}`", markdown)


def settings_page() -> str:
    """A section for each of a run file, a row for each setting, from the schema of the types."""
    schema = run_schema()
    lines = [
        "# Every setting",
        "",
        "A run file is YAML in these sections; `run.name`, `data.dataset` and one of `training.max_steps` and",
        "`training.max_epochs` are required. On the command line a setting is `section.key=value`. An unknown key is",
        "an error that names its nearest neighbours. `globallocal config show RUN.yaml` prints all of a run's, and",
        "where each comes from. In an editor with a YAML language server, the first line of a run file brings this",
        "page: `# yaml-language-server: $schema=schema.json` (in `launch/runs`; elsewhere its path, or a copy:",
        "`globallocal config schema > schema.json`).",
    ]
    for section, entry in schema["properties"].items():
        made = schema["$defs"][entry["$ref"].rsplit("/", 1)[-1]] if "$ref" in entry else entry
        lines += ["", f"## {section}", "", code(made.get("description", "")), "", "| setting | takes | default | |"]
        lines.append("|---|---|---|---|")
        for name, item in made["properties"].items():
            wanted = "required" if name in made.get("required", ()) else default(section, name, item)
            said = cell(code(item.get("description", "")))
            lines.append(f"| `{section}.{name}` | {cell(kind(item, schema))} | {cell(wanted)} | {said} |")
    return "\n".join(lines) + "\n"


def default(section: str, name: str, item: dict[str, Any]) -> str:
    if section == "model" and name != "preset":
        return "the preset's"
    return f"`{str(item['default']).lower() if isinstance(item['default'], bool | None) else item['default']}`".replace(
        "`none`", "`null`"
    )


def kind(item: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a setting takes, in words: kinds, choices, bounds."""
    if "$ref" in item:
        made = schema["$defs"][item["$ref"].rsplit("/", 1)[-1]]
        return "{" + ", ".join(made["properties"]) + "}"
    if options := item.get("anyOf") or item.get("oneOf"):
        return " or ".join(dict.fromkeys(kind(option, schema) for option in options))
    if "const" in item or "enum" in item:
        return ", ".join(f"`{value}`" for value in item.get("enum", [item.get("const")]))
    if item.get("type") == "array":
        parts = item.get("prefixItems") or [item.get("items", {})]
        return "a list of " + " and ".join(dict.fromkeys(kind(part, schema) for part in parts))
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
    bounds = [
        f"{sign} {item[name]:,}"
        for name, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
        if name in item
    ]
    return " ".join([words.get(item.get("type", ""), "any"), ", ".join(bounds)]).strip()


def commands_page() -> str:
    """Each command with its help, in the order of the work."""
    group: Any = typer.main.get_command(app)
    lines = ["# Every command", "", "As `globallocal COMMAND --help` prints it.", "", *exit_codes()]
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            for inner, part in command.commands.items():
                lines += command_lines(f"{name} {inner}", part)
        else:
            lines += command_lines(name, command)
    return "\n".join(lines) + "\n"


def exit_codes() -> list[str]:
    return [
        "| exit code | |",
        "|---|---|",
        "| 0 | done |",
        "| 1 | of `doctor`: warnings; of `config diff`: they differ; of a job: a fault |",
        "| 2 | something to fix, said in plain lines |",
        "| 75 | asked to stop, all saved: the same command goes on |",
        "| 76 | a rank hung |",
        "| 130 | interrupted |",
    ]


def command_lines(name: str, command: Any) -> list[str]:
    lines = ["", f"## {name}", "", inspect.cleandoc(command.help or "")]
    shown = [item for item in command.params if item.name != "help" and not item.hidden]
    if shown:
        lines += ["", "| | default | |", "|---|---|---|"]
    for item in shown:
        spelt = ", ".join(f"`{word}`" for word in item.opts) if item.param_type_name == "option" else ""
        spelt = spelt or f"`{item.metavar or item.name.upper()}`"
        start = item.default if isinstance(item.default, int | float | str) and item.default != "" else ""
        wanted = "required" if item.required else "" if start is False or start == "" else f"`{start}`"
        lines.append(f"| {cell(spelt)} | {cell(wanted)} | {cell(code(getattr(item, 'help', '') or ''))} |")
    return lines


def code(text: str) -> str:
    """On one line; what Markdown would read as HTML is escaped."""
    return " ".join(text.split()).replace("<", "&lt;") if "`" not in text else " ".join(text.split())


def cell(text: str) -> str:
    return text.replace("|", "\\|")
