"""`relay bench`: every hop by every method, through the pipelines that routes are made of.

cell        one hop, so many sinks, such pieces, one method: what is measured, and what came out
ends        what feeds the source and reads from the sinks: loops in C on threads of their own
trial       one cell at work
survey      all of them in turn, signals, exit codes
report      the table for people, the JSON for programs, the bars
"""
