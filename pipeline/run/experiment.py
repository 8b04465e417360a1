"""The whole configuration: the core's keys, plus the section of each registered stage."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, create_model

from pipeline.config.base import RESERVED
from pipeline.config.core import Core
from pipeline.config.messages import explain
from pipeline.config.section import Selection
from pipeline.errors import MicrotomeError, nearest
from pipeline.plan.stage import Stage
from pipeline.stages.registry import STAGES

if TYPE_CHECKING:
    import yaml


def configuration(stages: Collection[Stage]) -> type[Core]:
    """Return the configuration model for these stages."""
    sections = tuple(stage.section for stage in stages if stage.section is not None)
    fields: dict[str, Any] = {
        each.key: (each.type, Field(each.default, description=each.description)) for each in sections
    }
    model = create_model("Config", __base__=Core, __doc__=Core.__doc__, **fields)
    model.sections = sections
    model.reserved = (*RESERVED, *(stage.folder for stage in stages if stage.folder))
    return model


Config = configuration(STAGES.values())


def parse(raw: Mapping[str, Any]) -> Core:
    """Validate a configuration; every error names the key, the value found and the nearest known key.

    The key `only` (one name, or several separated by commas) keeps only these networks or data sets and what they need.
    """
    raw = dict(raw)
    only = raw.pop("only", None)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        lines = explain(error, Config)
        raise MicrotomeError("the configuration is refused:\n  " + "\n  ".join(lines)) from None
    return select(config, only) if only is not None else config


def load(path: Path) -> Core:
    """Read a YAML file (data only) and validate it."""
    import yaml

    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _loader())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MicrotomeError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(raw, dict):
        raise MicrotomeError(f"the configuration {path} is not a mapping of keys")
    return parse(raw)


def refuse_repeated_keys(path: Path) -> None:
    """Refuse a YAML file with a key that is given twice: other readers take the last one in silence."""
    import yaml

    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # whoever reads it tells these
        yaml.load(path.read_text(encoding="utf-8"), _loader())


@functools.cache
def _loader() -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML's own loader of plain data, which minds keys that are given twice."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            lines: dict[str, int] = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    line = key.start_mark.line + 1
                    if key.value in lines:
                        raise MicrotomeError(
                            f"the configuration is refused: {key.value!r} is given twice, in lines "
                            f"{lines[key.value]} and {line}; keep one of them"
                        )
                    lines[key.value] = line
            return super().construct_mapping(node, deep)

    return Loader


def select(config: Core, only: str | list[str]) -> Core:
    """Keep only the named networks and data sets; if only one of the two kinds is named, keep all of the other."""
    names = [name.strip() for name in (only.split(",") if isinstance(only, str) else map(str, only))]
    known = [*config.networks, *config.datasets]
    for name in names:
        if name not in known:
            raise MicrotomeError(f"only={name}: no network or data set has this name{nearest(name, known, 5)}")
    networks = {k: v for k, v in config.networks.items() if k in names} or dict(config.networks)
    chosen = [name for name in config.datasets if name in names] or list(config.datasets)
    networks = {
        name: network.model_copy(update={"datasets": [d for d in config.datasets_of(network) if d in chosen]})
        for name, network in networks.items()
    }
    selection = Selection(networks, chosen, named=any(name in config.networks for name in names))
    narrowed = {each.key: each.narrowed(config, config.section(each.key), selection) for each in type(config).sections}
    return config.model_copy(update={"networks": networks} | narrowed)
