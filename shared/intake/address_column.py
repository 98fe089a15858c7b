"""Finds the column of the addresses in a header. Pure.

Programs name it differently: `E-mail 1 - Value`, `E-Mail-Adresse`, `Courriel`, `Primary Email`. A
name is for e-mail addresses if it has a word for e-mail, and all its other words describe an
address or its owner. So `Email Opt-In` and `E-mail 1 - Type` are not. Such names take precedence
over `recipient` and `to`, which may hold names and dates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.quoting import quoted
from outbox_server.shared.templates.batch import variable_name

MAX_SHOWN_COLUMNS: Final = 50
# Words for e-mail, as variable names have them: `E-Mail` is `e_mail`.
_EMAIL: Final = (
    *("e_mail", "email", "e_mails", "emails", "mailto", "courriel", "mél", "e_post", "mail"),
    *("epost", "e_posta", "eposta", "correo", "sahkoposti", "sähköposti", "e_pasts", "el_pasts"),
    *("e_posti", "eposti", "mejl", "电子邮件", "電子郵件", "邮箱", "信箱", "メール", "이메일"),
    *("почта", "пошта", "имейл"),
)
# Names that are one word, and phrases.
_WHOLE: Final = frozenset(
    (
        *("emailaddress", "emailadresse", "mailadresse", "mailaddress", "mailadress", "emailadres"),
        *("e_mailadresse", "e_mailadres", "e_mailaddress", "e_mailadress", "emailadress"),
        *("e_postadress", "e_postadresse", "epostadress", "epostadresse", "mejladress"),
        *("e_posta_adresi", "eposta_adresi", "sähköpostiosoite", "emailid", "mailid"),
        *("correo_electrónico", "correo_electronico", "correio_eletrônico", "correio_eletronico"),
        *("dirección_de_correo_electrónico", "direccion_de_correo_electronico"),
        *("adresse_électronique", "adresse_electronique", "adresse_de_courriel"),
        *("adresse_de_messagerie", "posta_elettronica", "indirizzo_di_posta_elettronica"),
        *("endereço_de_e_mail", "endereço_de_email", "endereco_de_email", "elektronische_post"),
        *("adres_e_mail", "adres_email", "poczta_elektroniczna", "elektronická_pošta"),
        *("e_mailová_adresa", "emailová_adresa", "электронная_почта", "эл_почта", "e_mail_cím"),
        *("адрес_электронной_почты", "адрес_эл_почты", "електронна_пошта", "электронный_адрес"),
        *("メールアドレス", "eメール", "电子邮箱", "邮件地址", "邮箱地址", "電子郵件地址", "电邮"),
        *("이메일_주소", "이메일주소", "電子信箱", "電郵"),
    )
)
# What an address is called.
_PLAIN: Final = frozenset(
    (
        *("address", "addresses", "addr", "adresse", "adresa", "adres", "indirizzo", "dirección"),
        *("direccion", "endereço", "endereco", "adresi", "osoite", "cím", "value", "de", "di"),
        *("electrónico", "electronico", "internet", "of", "the", "smtp", "required", "id"),
    )
)
# Whose address it is.
_OWNER: Final = frozenset(
    (
        *("work", "home", "business", "personal", "private", "professional", "company", "office"),
        *("contact", "customer", "client", "user", "subscriber", "member", "buyer", "guest"),
        *("attendee", "participant", "student", "employee", "person", "lead", "donor", "patient"),
        *("billing", "shipping", "account", "login", "recipient", "recipients", "to", "your"),
        *("kunde", "kunden", "kontakt", "privat", "geschäftlich", "empfänger", "cliente"),
        *("personnel", "personnelle", "professionnel", "professionnelle", "destinataire"),
        *("usuario", "trabajo", "personale", "lavoro"),
    )
)
_FIRST: Final = frozenset(
    (
        *("primary", "main", "preferred", "default", "principal", "principale", "primär"),
        *("primäre", "haupt", "1st", "first"),
    )
)
_LAST: Final = frozenset(
    (
        *("secondary", "alternate", "alternative", "other", "backup", "recovery", "second", "2nd"),
        *("sekundär", "sekundäre", "weitere", "zweite", "secondaire", "secundario"),
    )
)
_NUMBERS: Final = frozenset(map(str, range(1, 21)))
_FALLBACK: Final = ("recipient", "to")

# The rank of a name: the lowest is the address column. Names of one rank count in their order.
_EXACT, _SAYS_EMAIL, _PRIMARY, _OWNED, _SECONDARY, _UNSURE, _OTHER = range(7)


def find_email_column(columns: Sequence[str], names: Sequence[str], wanted: str = "") -> int | None:
    """Return the index of the address column, or None if there is none.

    `names` are the variable names of `columns`. `wanted` is the column that the caller named: as
    the header writes it, or else by its variable name.

    Raises:
        InvalidInput: CSV_DUPLICATE_COLUMN: two columns have that name.
    """
    if wanted:
        return _named(columns, names, wanted)
    ranked = [
        (rank, index) for index, name in enumerate(names) if (rank := _rank(name)) is not None
    ]
    if not ranked:
        return None
    _, found = min(ranked)
    return _only(columns, names, [i for i, name in enumerate(names) if name == names[found]])


def no_email_column(columns: Sequence[str], wanted: str = "") -> InvalidInput:
    """Return the error of a header without an address column."""
    found = ", ".join(map(quoted, columns[:MAX_SHOWN_COLUMNS]))
    said = (
        f"the CSV has no column {quoted(wanted)}, which options.email_column names"
        if wanted
        else "the CSV must have a column `email`, or options.email_column must name its column of "
        "addresses"
    )
    return InvalidInput(
        f"{said}; its columns are {found}",
        reason="CSV_NO_EMAIL_COLUMN",
        metadata={"columns": found},
    )


def _named(columns: Sequence[str], names: Sequence[str], wanted: str) -> int | None:
    wanted = wanted.strip()
    found = [index for index, column in enumerate(columns) if column == wanted]
    if not found:
        name = variable_name(wanted)
        found = [index for index, other in enumerate(names) if name and other == name]
    return _only(columns, names, found) if found else None


def _only(columns: Sequence[str], names: Sequence[str], found: Sequence[int]) -> int:
    if len(found) > 1:
        first, second = (quoted(columns[index]) for index in found[:2])
        raise InvalidInput(
            f"the columns {first} and {second} may both hold the addresses; rename one, or name "
            "the right one in options.email_column",
            reason="CSV_DUPLICATE_COLUMN",
            metadata={"column": names[found[0]]},
        )
    return found[0]


def _rank(name: str) -> tuple[int, int] | None:
    """Return how clearly a variable name means the column of the addresses; None if it does not."""
    if name == "email":
        return _EXACT, 0
    if name in _WHOLE:
        return _SAYS_EMAIL, 0
    if name in _FALLBACK:
        return _OTHER, 0
    word, rest = _around_email(name)
    if not word:
        return None
    numbers = [int(part) for part in rest if part in _NUMBERS]
    others = {part for part in rest if part not in _NUMBERS}
    # A mail address may be a postal one.
    known = _OWNER | _FIRST | _LAST if word == "mail" else _PLAIN | _OWNER | _FIRST | _LAST
    if not others <= known:
        return None
    if word == "mail" or "id" in others:
        # `Mail` may say whether somebody gets mail, and `Email ID` may be a number.
        kind = _UNSURE
    elif others & _LAST:
        kind = _SECONDARY
    elif others & _FIRST:
        kind = _PRIMARY
    elif others & _OWNER:
        kind = _OWNED
    else:
        kind = _SAYS_EMAIL
    return kind, max(numbers, default=0)


def _around_email(name: str) -> tuple[str, list[str]]:
    """Return the word for e-mail in a name, and the other words. Both are empty without one."""
    padded = f"_{name}_"
    for word in _EMAIL:
        before, found, after = padded.partition(f"_{word}_")
        if found:
            return word, [part for part in (*before.split("_"), *after.split("_")) if part]
    return "", []
