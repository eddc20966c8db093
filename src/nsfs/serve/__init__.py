"""Adapters to kernel, sockets and processes; they translate and decide nothing."""
