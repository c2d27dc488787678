"""A route at work for one stream.

chain, node, outlet, intake    what stands there: pipes, places where bytes leave, the source's side
pipeline                       what happens to it: the theory of operation is there
crossing, experience, place, ring_shape    a ring in place of the chain, and which routes may have one
balance                        which of the two is cheaper, by measuring
sinks, sink_wait, absences     sinks as they are made, waited for, and come back
checksums                      files that end with theirs
stragglers, source_clock       who may hold the end of a stream, and how long a source may be idle
subscribers                    the readers of a broadcast
introduction                   a PROXY header in front of a stream
account                        the turn as one session record
"""
