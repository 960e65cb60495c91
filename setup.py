"""Metadata lives in pyproject.toml; this file is where csrc's build will be declared."""

from setuptools import setup

setup()
