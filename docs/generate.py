"""Make the reference pages from the code while mkdocs builds the site.

mkdocs calls the functions at the end (`hooks` in mkdocs.yml). The pages exist in the site only.
"""

import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import restitch
import restitch.cli.main  # whose import defines the commands
from restitch.cli.app import app
from restitch.merging import errors
from restitch.merging.methods.registry import get_method, method_names
from restitch.registry.specs.schema import schema_of

DOCS = Path(__file__).parent
_FROM_ELSEWHERE = re.compile(r'(?:src|href)="(https?://(?!github\.com)[^"]*\.(?:js|css|woff2?))"')
_LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _code(text: object) -> str:
    return f"`{text}`"


def commands() -> str:
    """Every command with its arguments and options."""
    sections = list(_commands("restitch", typer.main.get_command(app)))
    groups = dict.fromkeys(group for group, *_ in sections)
    parts = [
        "# Commands\n\n"
        "Every command takes `--help`. `VERSION` is a number, `champion` or `candidate`.\n"
    ]
    for group in groups:
        rows = [
            (f"[`{name}`](#{name.replace(' ', '-')})", summary.split("\n\n")[0])
            for of, name, summary, _ in sections
            if of == group
        ]
        parts.append(f"**{group}**\n\n" + table(("command", "purpose"), rows))
    parts += [text for *_, text in sections]
    return "\n".join(parts)


def _commands(name: str, command: Any) -> Iterator[tuple[str, str, str, str]]:
    """(group, name, help, section) of a command, or of all below it."""
    children: Mapping[str, Any] = getattr(command, "commands", {})
    for child, sub in children.items():
        if not sub.hidden:
            yield from _commands(f"{name} {child}", sub)
    if children:
        return
    summary = inspect.cleandoc(command.help or "")
    group = str(getattr(command, "rich_help_panel", None) or "Commands")
    shown = [one for one in command.params if not getattr(one, "hidden", False)]
    usage = " ".join([name, *(_name(one) for one in shown if _is_argument(one)), "[OPTIONS]"])
    text = f"## {name}\n\n{summary}\n\n```\n{usage}\n```\n\n"
    if shown:
        text += table(("argument or option", "type", "default", "meaning"), map(_parameter, shown))
    yield group, name, summary, text


_CONTEXT: Any = None  # no type asks for the context of its command


def _is_argument(one: Any) -> bool:
    return bool(one.param_type_name == "argument")


def _name(one: Any) -> str:
    if not _is_argument(one):
        return ", ".join([*one.opts, *one.secondary_opts])
    name = str(one.metavar or one.name.upper())
    return name if one.required else f"[{name}]"


def _parameter(one: Any) -> tuple[str, str, str, str]:
    if getattr(one, "is_flag", False):
        kind = "flag"
        default = (one.opts if one.default else one.secondary_opts or [""])[0]
    else:
        kind = str(one.display_type(_CONTEXT)).strip("<>").replace("str", "text")
        default = "" if one.default is None or callable(one.default) else str(one.default)
    shown = "required" if one.required else _code(default) if default else ""
    return _code(_name(one)), kind.lower(), shown, inspect.cleandoc(one.help or "")


def keys(kind: str) -> str:
    """Every key of a line's or a task's file, from its JSON schema."""
    schema = schema_of(kind)
    parts = [
        f"# {kind.capitalize()} file\n\n"
        "YAML. A key that is not listed here is an error that names the nearest one. "
        f"`restitch schema {kind}` prints this page as a JSON schema. "
        "With this first line in a file, editors complete and check its keys:\n\n"
        f"```yaml\n# yaml-language-server: $schema={kind}.schema.json\n```\n"
    ]
    seen: list[str] = []
    _object("", "", schema, schema, parts, seen)
    return "\n".join(parts)


def _object(
    path: str,
    heading: str,
    node: Mapping[str, Any],
    schema: Mapping[str, Any],
    parts: list[str],
    seen: list[str],
) -> None:
    """The section of one mapping, then those of the mappings in it."""
    title = f"## {heading}" if heading else "## Keys"
    about = _prose(node.get("description", ""))
    required = node.get("required", ())
    rows, inner = [], []
    for key, raw in node["properties"].items():
        one = _resolved(raw, schema)
        name = f"{path}.{key}" if path else key
        rows.append(
            (_code(key), _type(raw, schema), _default(raw, key in required), _meaning(raw, one))
        )
        inner += [(name, sub, len(_mappings(raw, schema)) > 1) for sub in _mappings(raw, schema)]
    parts.append(f"{title}\n\n{about}\n\n" + table(("key", "type", "default", "meaning"), rows))
    for name, sub, has_others in inner:
        identity = json.dumps(sub, sort_keys=True)
        if identity not in seen:
            seen.append(identity)
            first = next(iter(sub["properties"]))
            heading = f"`{name}` with `{first}`" if has_others else _code(name)
            _object(name, heading, sub, schema, parts, seen)


def _prose(text: str) -> str:
    """A docstring without its list of attributes, which the table shows."""
    return inspect.cleandoc(text).partition("\nAttributes:")[0].strip()


def _resolved(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def _choices(node: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The alternatives of a node, flat and without null."""
    node = _resolved(node, schema)
    options = node.get("anyOf") or node.get("oneOf")
    if options is None:
        return [] if node.get("type") == "null" else [node]
    return [one for option in options for one in _choices(option, schema)]


def _mappings(node: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The mappings with known keys that may stand at a node, or in a list there."""
    result = []
    for one in _choices(node, schema):
        if "properties" in one:
            result.append(one)
        if "items" in one:
            result += _mappings(one["items"], schema)
    return result


def _type(node: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    names = [_one_type(one, schema) for one in _choices(node, schema)]
    return " or ".join(dict.fromkeys(names))


def _one_type(node: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if "const" in node:
        return _code(node["const"])
    if "enum" in node:
        return " or ".join(map(_code, node["enum"]))
    if node.get("type") == "array":
        return f"list of {_type(node.get('items', {}), schema) or 'values'}"
    if node.get("type") == "object" or "properties" in node:
        return "mapping"
    name = {"string": "text", "boolean": "true or false"}.get(
        node.get("type", ""), node.get("type", "any value")
    )
    bounds = [
        f"{sign} {node[bound]:g}"
        for bound, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if bound in node and abs(node[bound]) < 2**53
    ]
    return " ".join([name, ", ".join(bounds)]).strip()


def _default(node: Mapping[str, Any], is_required: bool) -> str:
    if is_required:
        return "required"
    value = node.get("default")
    if value in (None, [], {}, "") or isinstance(value, dict):
        return ""  # a mapping's own section has its defaults
    if isinstance(value, str) and " " in value:
        return value
    return _code(value if isinstance(value, str) else json.dumps(value))


def _meaning(node: Mapping[str, Any], resolved: Mapping[str, Any]) -> str:
    about = node.get("description") or _prose(resolved.get("description", ""))
    examples = node.get("examples", ())
    shown = ", ".join(_code(_flow(one)) for one in examples)
    return f"{about} Example: {shown}" if shown else about


def _flow(value: object) -> str:
    """A value as one writes it in a YAML file, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False)
    return text.removesuffix("\n...\n").strip()


def method_settings() -> str:
    """Every method with its settings and their defaults."""
    parts = [
        "# Settings of methods\n\n"
        "[Merge methods](../methods.md) describes what each method computes.\n"
    ]
    rows = []
    for name in method_names():
        one = get_method(name)
        tuned = f"`{one.tunes[0]}` over {', '.join(map(str, one.tunes[1]))}" if one.tunes else ""
        rows.append(
            (
                _code(name),
                "one model per task" if one.kind == "experts" else "one model",
                "whole task vectors" if one.whole else "sparse deltas",
                ", ".join(one.needs),
                "exact" if one.exact else "numeric",
                ", ".join(f"`{key}: {value}`" for key, value in one.settings.items()),
                tuned,
                one.source,
            )
        )
    head = ("method", "gives", "merges", "statistics", "result", "settings", "tuned", "source")
    return "\n".join([*parts, table(head, rows)])


def exit_codes() -> str:
    """Every exit code with its kind of error."""
    kinds = [
        one for one in vars(errors).values() if isinstance(one, type) and "exit_code" in vars(one)
    ]
    rows = [(_code(0), "", "Done.")]
    rows += [
        (
            _code(one.exit_code),
            _code(one.__name__),
            inspect.cleandoc(one.__doc__ or "").split("\n\n")[0],
        )
        for one in sorted(kinds, key=lambda one: one.exit_code)
        if one is not errors.RestitchError
    ]
    rows.append((_code(restitch.cli.main.INTERRUPTED), "", "Interrupted with Ctrl-C."))
    return (
        "# Exit codes\n\n"
        "Any other code is a bug. A command that ended with 6 can be repeated as it is. "
        "`restitch verify --without` exits with 5 if the named model is in a version.\n\n"
        + table(("code", "error", "meaning"), rows)
    )


def environment() -> str:
    """Every environment variable that restitch reads, or passes on."""
    known = yaml.safe_load((DOCS / "environment.yaml").read_text(encoding="utf-8"))
    parts = ["# Environment variables\n\nAn empty value counts as no value.\n"]
    for title, variables in known.items():
        rows = [(_code(one["name"]), one["read_by"], one["meaning"]) for one in variables]
        parts.append(f"## {title}\n\n" + table(("variable", "read by", "meaning"), rows))
    return "\n".join(parts)


def python() -> str:
    """Every public name of the package with its arguments and docstring."""
    parts = [
        "# Python\n\n`import restitch` offers these names. They are public: they stay, or change"
        " with a note in the changelog. See [Use it from Python](../how-to/python.md).\n"
    ]
    parts += [
        _documented(f"restitch.{name}", getattr(restitch, name), 2) for name in restitch.__all__
    ]
    return "\n".join(parts)


def _documented(name: str, value: Any, level: int) -> str:
    """A function, a class with its public members, or an error."""
    is_error = isinstance(value, type) and issubclass(value, BaseException)
    call = "" if is_error else _arguments(value)
    parts = [f"{'#' * level} {name}\n", f"```python\n{name}{call}\n```\n" if call else ""]
    parts.append(_sections(inspect.getdoc(value) or ""))
    if isinstance(value, type) and not is_error:
        short = name.rsplit(".")[-1]
        for member, one in vars(value).items():
            inner = getattr(one, "fget", None) or getattr(one, "func", None)
            inner = inner or getattr(one, "__func__", one)
            if member.startswith("_") or not callable(inner):
                continue
            if inner is one or isinstance(one, classmethod):
                parts.append(_documented(f"{short}.{member}", inner, level + 1))
            else:
                text = inspect.getdoc(inner) or ""
                parts.append(f"{'#' * (level + 1)} {short}.{member}\n\n{_sections(text)}")
    return "\n".join(part for part in parts if part)


def _arguments(value: Any) -> str:
    """The arguments in the form of a call, without `self`, `cls` and types of modules."""
    found = inspect.signature(value)
    own = [one for one in found.parameters.values() if one.name not in ("self", "cls")]
    result = found.return_annotation if inspect.isfunction(value) else inspect.Signature.empty
    shown = str(found.replace(parameters=own, return_annotation=result))
    shown = re.sub(r"\b(?:restitch|collections|pathlib|typing)[\w.]*\.", "", shown)
    return re.sub(r"-> '(\w+)'", r"-> \1", shown)


def _sections(text: str) -> str:
    """A docstring in Google style as Markdown."""
    lines: list[str] = []
    listed = False
    for line in text.splitlines():
        if re.fullmatch(r"(?:Args|Returns|Raises|Attributes):", line):
            listed = line != "Returns:"
            lines += [f"**{line[:-1]}**", ""]
        elif line.startswith("    ") and listed:
            item = re.match(r"    (\w[\w, ]*): (.*)", line)
            lines += [f"- `{item[1]}`: {item[2]}"] if item else [f"  {line.strip()}"]
        else:
            listed = listed and not line.strip()
            lines.append(line.strip() if line.startswith("    ") else line)
    return "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands,
    "reference/line-file.md": lambda: keys("line"),
    "reference/task-file.md": lambda: keys("task"),
    "reference/method-settings.md": method_settings,
    "reference/python.md": python,
    "reference/exit-codes.md": exit_codes,
    "reference/environment.md": environment,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside of docs/ at the repository."""
    folder = (DOCS / page.file.src_uri).parent

    def target(match: "re.Match[str]") -> str:
        path = Path(os.path.normpath(folder / match[1]))
        is_outside = path.exists() and not path.is_relative_to(DOCS)
        return (
            f"{config.repo_url}/blob/main/{path.relative_to(DOCS.parent)}"
            if is_outside
            else match[1]
        )

    return _LINK.sub(target, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that loads a script, a style or a font from another host."""
    found = _FROM_ELSEWHERE.findall(output)
    if found:
        raise PluginError(f"{page.file.src_path} loads {', '.join(found)}; pages need no network")
    return output
