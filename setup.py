"""Everything is in pyproject.toml; building needs no torch."""

from setuptools import setup

setup()
