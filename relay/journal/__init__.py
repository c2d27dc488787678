"""What relay says: records of finished sessions, log lines, and how often something is worth a line."""
