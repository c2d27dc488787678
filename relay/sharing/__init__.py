"""Memory from one process to another: the same pages, sealed, handed over through a unix socket.

`shared`: something final, given to anybody, for ever. `draft`: an array made where it will be shared, in `pages`.
`sink` and `source`: a stream of blocks through slots that are used again when they were given back. `memory`: a
stream's end in memory, for routes from code. `wire`: what is said on the socket. `content`: what the bytes are. `held`:
who owns a descriptor.
"""
