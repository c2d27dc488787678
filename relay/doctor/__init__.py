"""`relay doctor`: what this kernel, this sandbox and this user can do, proven by doing it.

ability     one line each: a call, a limit, a feature; tried once
ends        what bytes come from and what they arrive in
path        every end to every other by every way: are pages shared or copied, and how fast
examine     all of it, for people and for programs, and the exit code
"""
