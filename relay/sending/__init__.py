"""`relay send`: what is asked for (order), what is carried and by whom (lane), all of it (sending), its display."""
