"""Pure Python for now; the CUDA extension will be driven from here."""

from setuptools import setup

setup()
