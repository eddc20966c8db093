"""How long an image takes to its first output, by each way there is, over a line of a chosen rate: `nsfs bench`."""
