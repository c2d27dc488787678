"""A log: a row of append-only segments in the page cache, with a cursor for each reader.

log       the row: written at its end, bounded, read by cursors; the facts it relies on
segment   one file of the row, and how large it is
page      what is noted beside the row: how far the reader is, and where the stream ended
"""
