"""Stored rows as tables and charts, for the pages and for the terminal."""
