"""The description of the routes as a page that needs nothing from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from typing import Any


def page(description: dict[str, Any]) -> str:
    """HTML of an OpenAPI document."""
    info = description["info"]
    title = html.escape(f"{info['title']} {info['version']}")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            '<link rel="stylesheet" href="page/docs.css"></head><body><main>',
            f"<h1>{title}</h1><p>{html.escape(info['description'])}",
            'The same for programs: <a href="openapi.json">openapi.json</a>.</p>',
            *(
                _route(path, method, operation)
                for path, methods in description["paths"].items()
                for method, operation in methods.items()
            ),
            "<h2>Shared</h2>",
            *(
                f"<section><h3>{html.escape(name)}</h3>{_schema(schema)}</section>"
                for name, schema in description["components"]["schemas"].items()
            ),
            "</main></body></html>",
        ]
    )


def _route(path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [
        f"<section><h2><code>{method.upper()} {html.escape(path)}</code></h2>",
        f"<p>{html.escape(operation['summary'])}</p>",
    ]
    if "requestBody" in operation:
        parts += ["<h3>Body</h3>", _schema(_content(operation["requestBody"]))]
    for status, response in operation["responses"].items():
        if status == "200":
            parts += ["<h3>Answer</h3>", _schema(_content(response))]
    rest = [
        f"<tr><td>{status}</td><td>{html.escape(response['description'])}</td></tr>"
        for status, response in operation["responses"].items()
        if status != "200"
    ]
    if rest:
        parts.append(f"<details><summary>Errors</summary><table>{''.join(rest)}</table></details>")
    return "".join([*parts, "</section>"])


def _content(holder: dict[str, Any]) -> dict[str, Any]:
    (kind,) = holder["content"].values()
    schema: dict[str, Any] = kind["schema"]
    return schema


def _schema(schema: dict[str, Any]) -> str:
    return f"<pre>{html.escape(chr(10).join(_lines(schema)))}</pre>"


def _lines(schema: dict[str, Any], indent: str = "") -> Iterator[str]:
    """A schema in a few lines: objects field by field, all else on one."""
    if "properties" not in schema:
        options = schema.get("anyOf", [])
        if not any("properties" in option for option in options):
            yield indent + _brief(schema)
            return
        for number, option in enumerate(options):
            if number:
                yield f"{indent}or"
            yield from _lines(option, indent)
        return
    required = set(schema["required"])
    yield f"{indent}{{"
    for name, value in schema["properties"].items():
        mark = "" if name in required else "?"
        meaning = f"  {value['description']}" if "description" in value else ""
        yield f'{indent}  "{name}"{mark}: {_brief(value)}{meaning}'
    yield f"{indent}}}"


def _brief(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_brief(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(json.dumps(value) for value in values)
    if schema.get("type") == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        size = f" ({least} to {most})" if most else ""
        return f"[{_brief(schema['items'])}, ...]{size}"
    if "properties" in schema:
        required = set(schema["required"])
        fields = (
            f'"{name}"{"" if name in required else "?"}: {_brief(value)}'
            for name, value in schema["properties"].items()
        )
        return f"{{{', '.join(fields)}}}"
    return str(schema.get("type", "anything"))
