"""The report of a run: one HTML page that needs no network, with its numbers as JSON and CSV beside it."""
