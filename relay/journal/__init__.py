"""What relay says: records of finished sessions, log lines, and how often something is worth a line.

record           what a session came to
logs, lines      lines as text and as JSON, and their way to stderr
seldom, repeats  what happens often is said now and then
secrets          what must not be read anywhere
"""
