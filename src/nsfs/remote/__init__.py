"""Where images come from: registries and OCI layouts."""
