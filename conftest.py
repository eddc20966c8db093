"""What all tests need of pytest and hypothesis."""

from hypothesis import HealthCheck, settings

pytest_plugins = ["prepared"]

# A loaded machine is slow, and a directory of a test serves all its examples where it says so.
settings.register_profile(
    "nsfs", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("nsfs")
