"""The ground floor: the C core and its typed face, kernel pipes, memory that can be lent, probes.

Nothing above this package names a C struct's size, a system call number or a flag.
"""
