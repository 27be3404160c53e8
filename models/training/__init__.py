"""Parts of the trainer behind `python -m models.train`."""
