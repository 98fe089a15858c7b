"""Reads secret settings from files: OUTBOX_DATABASE_URL_FILE names the file of OUTBOX_DATABASE_URL.

Container platforms mount secrets as files. A variable is visible to every child process, and to
everyone who may read the definition of a pod.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final, cast

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource

from outbox_server.shared.errors import ConfigurationError

SECRET_SETTINGS: Final = ("api_key", "database_url", "encryption_keys", "redis_url", "smtp_url")
# A URL or a list of keys takes a few hundred bytes. A larger file is probably the wrong one.
MAX_SECRET_BYTES: Final = 65_536


class SecretFiles(PydanticBaseSettingsSource):
    """The settings whose variable with the suffix _FILE names a file."""

    def __init__(
        self,
        settings_cls: type[BaseSettings],
        overrides: Mapping[str, Any],
        *variables: PydanticBaseSettingsSource,
    ) -> None:
        """`variables` are the sources of variables; no file is read for one of `overrides`."""
        super().__init__(settings_cls)
        self._overrides = overrides
        self._given: dict[str, str] = {}
        for source in reversed(variables):
            found = cast(EnvSettingsSource, source).env_vars
            self._given |= {name: value for name, value in found.items() if value}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return the content of the file of one setting, or None.

        Raises:
            ConfigurationError: the variable is given twice, or its file is not usable.
        """
        del field
        variable = f"outbox_{field_name}"
        path = self._given.get(f"{variable}_file")
        if path is None or field_name in self._overrides:
            return None, field_name, False
        if variable in self._given:
            raise ConfigurationError(
                f"{variable.upper()} and {variable.upper()}_FILE are both set: unset one of them"
            )
        return _read(f"{variable}_file".upper(), path), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the values that come from files.

        Raises:
            ConfigurationError: as `get_field_value`.
        """
        fields = self.settings_cls.model_fields
        found = {name: self.get_field_value(fields[name], name)[0] for name in SECRET_SETTINGS}
        return {name: value for name, value in found.items() if value is not None}


def _read(variable: str, path: str) -> str:
    try:
        # Opened without blocking, because a pipe without a writer would delay the start for ever.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            content = file.read(MAX_SECRET_BYTES + 1) or b""
        text = content.decode("utf-8").rstrip("\r\n")
    except OSError as error:
        raise ConfigurationError(f"{variable}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{variable}: {path} is not text in UTF-8") from None
    if len(content) > MAX_SECRET_BYTES:
        raise ConfigurationError(
            f"{variable}: {path} has more than {MAX_SECRET_BYTES} bytes, too many for a secret"
        )
    if not text:
        raise ConfigurationError(f"{variable}: {path} is empty")
    return text
