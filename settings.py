"""Settings as text: from a TOML file and key=value overrides to typed values, and back to a file that says where each came from."""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from pathlib import Path

from run_directory import UserError

BOOLEANS = {**dict.fromkeys(("true", "1", "yes", "on"), True), **dict.fromkeys(("false", "0", "no", "off"), False)}


def coerce(name: str, value, kind, from_text: bool):
    """`value` as the field type `kind`. Text from `--set` is parsed; a TOML value must be of the type already.

    Raises UserError with the contract's wording.
    """
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    base = typing.get_origin(kinds[0]) or kinds[0]
    items = typing.get_args(kinds[0]) if base is list else ()
    result = value
    try:
        if from_text and type(None) in kinds and value.strip().lower() in ("", "none", "null"):
            return None
        if from_text and base is bool:
            result = BOOLEANS[value.strip().lower()]
        elif from_text:
            result = tomllib.loads(f"value = {value}")["value"] if base in (list, dict) else base(value)
        if base is float and type(result) is int:
            result = float(result)
        if float in items:
            result = [float(item) if type(item) is int else item for item in result]
        if type(result) is not base or result != result or any(type(item) not in items for item in items and result):
            raise ValueError
    except (ValueError, KeyError, TypeError):  # tomllib's error is a ValueError
        raise UserError(f"Failed to coerce value: {value!r} to {base} (for {name})") from None
    return result


def read_settings(kinds: dict, path: str | Path | None, overrides: list[str]) -> tuple[dict, dict]:
    """Settings from a TOML file (flat or under [mlx_grpo]) and `key=value` overrides, which win. kinds: types by name.

    Returns values by field and, by field, where each came from. Raises UserError for whatever is not a setting.
    """
    given = []
    if path:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"Config file not found: {path}")
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"Config file is not valid TOML: {path}: {error}") from None
        nested = table.pop("mlx_grpo", {})
        if not isinstance(nested, dict):
            raise UserError(f"Config file {path}: mlx_grpo must be a table, [mlx_grpo]")
        given += [(k, v, path.name, False) for k, v in {**table, **nested}.items()]
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set takes KEY=VALUE, not {override!r}")
        given.append((key.strip(), value, "--set", True))
    values, sources = {}, {}
    for key, value, source, from_text in given:
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, 1)
            raise UserError(f"Unknown config key: {key}" + (f" (did you mean {near[0]}?)" if near else ""))
        values[key] = coerce(key, value, kinds[key], from_text)
        sources[key] = source
    return values, sources


def config_as_toml(config, sources: dict) -> str:
    """A resolved configuration (a dataclass), one line a field, each with where its value came from."""
    import tomli_w

    lines, defaults = [], dataclasses.asdict(type(config)())
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):  # inline, so that every setting stays on its line
            text = f"{name} = {{{', '.join(tomli_w.dumps({k: v}).strip() for k, v in value.items())}}}"
        elif isinstance(value, list):
            text = f"{name} = [{', '.join(tomli_w.dumps({'v': v}).strip()[4:] for v in value)}]"
        else:
            text = f"# {name} is unset" if value is None else tomli_w.dumps({name: value}).strip()
        default = json.dumps(defaults[name], ensure_ascii=False)  # JSON: TOML has no null
        lines.append(f"{text}  # {f'{sources[name]}; default {default}' if name in sources else 'default'}")
    return "\n".join(lines) + "\n"
