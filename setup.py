"""Packaging. The metadata and the settings of the tools are in pyproject.toml."""

from setuptools import setup

setup()
