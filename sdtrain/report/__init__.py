"""Runs side by side: compared picture by picture, drawn and written as one page."""
