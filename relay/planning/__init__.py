"""What a configuration will be on this machine (plan), how that is drawn (drawing), and what it lacks (preflight)."""
