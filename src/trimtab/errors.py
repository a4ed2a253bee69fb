"""The two errors a command may end with: one clear line each, never a traceback."""

from __future__ import annotations


class TrimtabError(Exception):
    """Base of both kinds. ``str(error)`` is the one line that is printed; it names the field or file and what to do."""

    exit_code = 1


class UserError(TrimtabError):
    """Something the user gave is wrong: a field, a file, a schedule, a tokenizer. Exit code 2."""

    exit_code = 2


class Fault(TrimtabError):
    """Something went wrong around us: a full disk, a damaged artefact, no network. Exit code 1."""

    exit_code = 1
