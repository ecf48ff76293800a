"""Measurements against peers, behind `bench`."""
