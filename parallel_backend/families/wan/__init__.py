"""Wan (Alibaba)."""
