"""Storages beside local folders, and the tables that go with them."""
