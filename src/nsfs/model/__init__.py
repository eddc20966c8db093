"""Values and pure decisions: no IO, no clock, no concurrency."""
