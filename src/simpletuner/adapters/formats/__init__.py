"""Adapter files in every layout in common use, read into one form in memory and written from it."""
