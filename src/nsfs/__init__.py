"""nsfs: lazy root filesystems of container images, per namespace, isolated or shared."""

__version__ = "0.1.0"
