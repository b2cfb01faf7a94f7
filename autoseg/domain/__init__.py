"""Frozen values and the rules that hold between them. No torch, no file formats."""
