"""The services of a worker and of the daemon, on trio; they reach disk and network through `core.ports`."""
