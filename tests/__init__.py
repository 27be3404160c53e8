"""A package, so that no other of this name takes its place."""
