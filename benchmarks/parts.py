"""The parts of the benchmarks; apart from the cases, so that options know them before any kernel is imported."""

# Each fits a process, the most telling first.
PARTS = ("experts", "layers", "attention", "compared", "models", "extras", "other-models")
ALONE = ("models", "other-models")  # leave no room on the GPU for anything else
