"""Studies in processes of their own, which inherit the settings and the store of programs of ``conftest.py``."""

from commands import Command


def start(*words, **options):
    """``effjax compare`` with these words."""
    return Command("compare", *words, **options)


def finish(command, timeout=300):
    """Exit status, output and errors."""
    out, err = command.communicate(timeout=timeout)
    return command.returncode, out, err
