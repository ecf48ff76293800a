"""Bridges to other libraries; only here may they be imported."""
