"""Runs side by side: read from their folders, compared picture by picture, drawn and written as one page."""
