"""Timings, quality and expert usage: reported, never asserted."""
