"""Options of the command lines: dataclass fields that are named, typed, defaulted and explained in one place."""

import dataclasses
import json
import shlex
from argparse import BooleanOptionalAction
from collections.abc import Collection
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Config = TypeVar("Config")


def option(
    default: Any,
    help: str,
    *,
    items: type | None = None,
    change_on_resume: bool | Literal["warn"] = False,
    alias: str | None = None,
) -> Any:
    """A dataclass field that also is a command-line option.

    Args:
        default: the default; a dictionary is copied.
        help: what the command line says about it.
        items: of a list, the type of what may be given one after another: `--classes 3 5`.
        change_on_resume: a resumed run may set it anew; "warn" where it does not go on bit for bit then.
        alias: a shorter name on the command line.
    """
    metadata = {"help": help, "items": items, "change_on_resume": change_on_resume, "alias": alias}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def require(config: Any, name: str, holds: bool, expected: str) -> None:
    """Raise a ValueError that names an option of `config`, its value and what was `expected`, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {getattr(config, name)!r}: correct --{flag(name)}")


def default_of(spec: dataclasses.Field) -> Any:
    """The default of an `option`."""
    return spec.default if spec.default is not dataclasses.MISSING else spec.default_factory()


def flag(name: str) -> str:
    """An option's name on the command line: `batch_size` is `--batch-size`."""
    return name.replace("_", "-")


def config_parser(config_class: type, *, prog: str, description: str) -> "ArgumentParser":
    """A command line with one option per field of `config_class`, and `--config FILE` for a YAML file of the same."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise ImportError(
            f"{error}; the command lines need the extra 'train': pip install '.[train]' in the checkout"
        ) from error

    parser = ArgumentParser(prog=prog, description=description)
    parser.add_argument("--config", action="config", help="YAML file of options; options after it take precedence")
    for spec in dataclasses.fields(config_class):
        kind: dict[str, Any] = {"type": spec.type}
        if spec.type is bool:
            kind = {"action": BooleanOptionalAction}
        elif spec.metadata["items"]:
            kind = {"type": spec.metadata["items"], "nargs": "+"}
        names = [flag(name) for name in (spec.name, spec.metadata["alias"]) if name]
        parser.add_argument(
            *[f"--{name}" for name in names], **kind, default=default_of(spec), help=spec.metadata["help"]
        )
    return parser


def build_config(config_class: type[Config], arguments: Any) -> Config:
    """The `config_class` of parsed arguments, which may hold other options too."""
    return config_class(**{spec.name: arguments[spec.name] for spec in dataclasses.fields(config_class)})


def plain(value: Any) -> Any:
    """A value as a YAML file gives it back: lists for tuples, mappings for dataclasses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def to_yaml(config: Any) -> str:
    """A config as YAML that `--config` takes back."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in a YAML file, unchecked.

    Raises:
        ValueError: the file is no YAML or holds no mapping.
    """
    import yaml

    try:
        options = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold options as 'name: value' lines, got {type(options).__name__}")
    return options


def command_line(module: str, config: Any, leave_out: Collection[str] = ()) -> str:
    """The command that gives `config`, a dataclass of options, where it differs from its defaults.

    Args:
        module: as in `python -m`.
        leave_out: names of options that do not change the results.
    """
    words = [f"python -m {module}"]
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if value == default_of(spec) or spec.name in leave_out:
            continue
        words.append(f"--{'no-' if value is False else ''}{flag(spec.name)}")
        if isinstance(value, dict):
            words.append(shlex.quote(json.dumps(value)))
        elif not isinstance(value, bool):
            words += [shlex.quote(str(one)) for one in (value if isinstance(value, list) else [value])]
    return " ".join(words)
