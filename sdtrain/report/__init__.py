"""Comparison of runs, picture by picture, plotted and written as one page."""
