"""What all tables share."""

from __future__ import annotations

from typing import Final

from sqlalchemy import MetaData, TextClause, text
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.orm import DeclarativeBase

TIME: Final = TIMESTAMP(timezone=True)


class Base(DeclarativeBase):
    """Base of all tables. It names every constraint, so that migrations can refer to it."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def time_and_sequence(sequence: str) -> TextClause:
    """Return the default of an id that is not secret: ms since 1970, then 21 bits.

    A failover or a restore may set the sequence back, but then the time differs. A process that
    used a lost row must not find another row under the same id.
    """
    ms = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
    return text(f"(({ms} << 21) | (nextval('{sequence}') & 2097151))")
