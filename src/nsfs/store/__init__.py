"""What nsfs keeps on local disks: pools, indexes, layouts of directories."""
