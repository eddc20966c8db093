"""The exit codes, the same from every command; `nsfs.errors` says which error ends with which."""

EXITS = (
    (0, "success"),
    (1, "a bug in nsfs"),
    (2, "usage: what was asked for makes no sense"),
    (3, "not found: no such image, path or mount"),
    (4, "denied by credentials or policy"),
    (5, "unreachable: a registry, or the daemon, does not answer"),
    (6, "corrupt: bytes are not what their digest says"),
    (7, "no space"),
    (8, "busy, or there already"),
    (9, "not supported by this kernel, this user or this version"),
    (130, "interrupted"),
)

INTERRUPTED = 130
BROKEN_PIPE = 141
"""What a shell reports for a program that SIGPIPE ended."""
