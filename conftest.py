"""What all tests need of pytest."""

pytest_plugins = ["prepared"]
